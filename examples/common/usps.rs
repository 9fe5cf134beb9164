//! USPS digits of two classes, from the text files `zip.train.gz` and `zip.test.gz` in `$TCH_BLR_DATA/usps`: a line per
//! image, the digit first and then 256 grey values from -1 to 1.

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use tch::Tensor;

const PIXELS: i64 = 256;

/// Images of two digits.
#[derive(Debug)]
pub struct Pair {
    /// `[N, 256]` f64 in [-1, 1], row-major 16×16.
    pub images: Tensor,
    /// `[N]` f64: 0 for the first digit and 1 for the second.
    pub labels: Tensor,
}

impl Pair {
    /// All images of these two digits, those for training before those for testing.
    ///
    /// # Errors
    /// One line that names the variable or the file.
    pub fn load(first: u8, second: u8) -> Result<Pair, Box<dyn Error>> {
        let data = std::env::var_os("TCH_BLR_DATA").ok_or("set TCH_BLR_DATA to the folder that has usps/")?;
        let folder = PathBuf::from(data).join("usps");
        let (mut images, mut labels) = (Vec::new(), Vec::new());
        for name in ["zip.train.gz", "zip.test.gz"] {
            let path = folder.join(name);
            read(&path, [first, second], &mut images, &mut labels).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        Ok(Pair { images: Tensor::from_slice(&images).view([-1, PIXELS]), labels: Tensor::from_slice(&labels) })
    }
}

fn read(path: &Path, digits: [u8; 2], images: &mut Vec<f64>, labels: &mut Vec<f64>) -> Result<(), Box<dyn Error>> {
    let lines = BufReader::new(flate2::read::GzDecoder::new(File::open(path)?)).lines();
    for (i, line) in lines.enumerate() {
        let line = line?;
        let values = line.split_whitespace().map(str::parse::<f64>).collect::<Result<Vec<_>, _>>();
        let values = values.map_err(|e| format!("line {}: {e}", i + 1))?;
        if values.len() as i64 != PIXELS + 1 {
            return Err(
                format!("line {}: {} numbers: expected a digit and {PIXELS} values", i + 1, values.len()).into()
            );
        }
        if let Some(class) = digits.iter().position(|d| f64::from(*d) == values[0]) {
            labels.push(class as f64);
            images.extend(&values[1..]);
        }
    }
    Ok(())
}

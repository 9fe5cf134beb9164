//! USPS digits from the text files `zip.train.gz` and `zip.test.gz` in `$TCH_BLR_DATA/usps`: a line per image, the
//! digit first and then 256 grey values from -1 to 1.

use crate::Outcome;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use tch::{Kind, Tensor};

const PIXELS: i64 = 256;

/// Images of handwritten digits.
#[derive(Debug)]
pub struct Usps {
    /// `[N]` f64, 0 to 9.
    pub digits: Tensor,
    /// `[N, 256]` f64 in [-1, 1], row-major 16×16.
    pub images: Tensor,
}

impl Usps {
    /// One of the two files, `part` "train" or "test", of a folder that has `usps/`.
    ///
    /// # Errors
    /// One line that names the file.
    pub fn load(data: &Path, part: &str) -> Outcome<Usps> {
        let path = data.join(format!("usps/zip.{part}.gz"));
        let refuse = |problem: String| format!("{}: {problem}", path.display());
        let mut text = String::new();
        let file = File::open(&path).map_err(|e| refuse(e.to_string()))?;
        let unpacked = flate2::read::GzDecoder::new(file).read_to_string(&mut text);
        unpacked.map_err(|e| refuse(format!("truncated or not gzip ({e})")))?;
        let numbers = text.split_whitespace().map(str::parse::<f64>).collect::<Result<Vec<_>, _>>();
        let numbers = numbers.map_err(|e| refuse(e.to_string()))?;
        if numbers.is_empty() || numbers.len() % (PIXELS as usize + 1) != 0 {
            return Err(refuse("expected lines of a digit and 256 grey values".to_owned()).into());
        }
        let rows = Tensor::from_slice(&numbers).reshape([-1, PIXELS + 1]);
        Ok(Usps { digits: rows.select(1, 0), images: rows.narrow(1, 1, PIXELS) })
    }

    /// Those of some digits, in order.
    pub fn of(&self, digits: &[u8]) -> Usps {
        let all: Vec<f64> = Vec::try_from(self.digits.to_kind(Kind::Double)).expect("[N]");
        let chosen = (0..).zip(&all).filter(|(_, d)| digits.contains(&(**d as u8))).map(|(i, _)| i);
        let at = Tensor::from_slice(&chosen.collect::<Vec<i64>>());
        Usps { digits: self.digits.index_select(0, &at), images: self.images.index_select(0, &at) }
    }

    /// A 1, and the grey values from 0 to 1: `[N, 257]`.
    pub fn features(&self) -> Tensor {
        let grey = (&self.images + 1.0) / 2.0;
        Tensor::cat(&[grey.narrow(1, 0, 1).ones_like(), grey], 1)
    }

    /// 1 for odd digits, `[N]`.
    pub fn odd(&self) -> Tensor {
        self.digits.remainder(2.0)
    }
}

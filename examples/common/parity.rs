//! USPS digits, odd against even, from the text files `zip.train.gz` and `zip.test.gz` in `$TCH_BLR_DATA/usps`: a line per
//! image, the digit first and then 256 grey values from -1 to 1. Features: a 1, and the grey values from 0 to 1.

use crate::logistic::Examples;
use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use tch::{Kind, Tensor};

/// Weights of a linear model.
pub const FEATURES: i64 = 257;

/// Images of one of the two files.
#[derive(Debug)]
pub struct Images {
    digits: Tensor,
    /// Label 1 for odd digits.
    pub examples: Examples,
}

impl Images {
    /// `part`: "train" or "test".
    ///
    /// # Errors
    /// One line that names the file.
    pub fn load(data: &Path, part: &str) -> Result<Images, Box<dyn Error>> {
        let path = data.join(format!("usps/zip.{part}.gz"));
        let mut text = String::new();
        let file = File::open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        flate2::read::GzDecoder::new(file).read_to_string(&mut text).map_err(|e| format!("{}: {e}", path.display()))?;
        let numbers = text.split_whitespace().map(str::parse::<f64>).collect::<Result<Vec<_>, _>>();
        let numbers = numbers.map_err(|e| format!("{}: {e}", path.display()))?;
        if numbers.is_empty() || numbers.len() % FEATURES as usize != 0 {
            return Err(format!("{}: expected lines of a digit and 256 grey values", path.display()).into());
        }
        let rows = Tensor::from_slice(&numbers).reshape([-1, FEATURES]);
        let digits = rows.select(1, 0);
        let grey = (rows.narrow(1, 1, FEATURES - 1) + 1.0) / 2.0;
        let x = Tensor::cat(&[grey.narrow(1, 0, 1).ones_like(), grey], 1);
        Ok(Images { examples: Examples { x, y: digits.remainder(2.0) }, digits })
    }

    /// Those of some digits.
    pub fn of(&self, digits: &[u8]) -> Examples {
        let all: Vec<f64> = Vec::try_from(self.digits.to_kind(Kind::Double)).expect("[N]");
        let chosen = (0..).zip(&all).filter(|(_, d)| digits.contains(&(**d as u8))).map(|(i, _)| i);
        self.examples.select(&chosen.collect::<Vec<i64>>())
    }
}

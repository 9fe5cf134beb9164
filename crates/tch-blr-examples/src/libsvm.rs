//! Tables in the text form of LIBSVM: a label and `index:value` pairs in every line.

use crate::Outcome;
use crate::logistic::Examples;
use std::fs;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// `columns` features (indices from 1; what is not named is zero) and a constant 1 after them; labels -1 and +1 become
/// 0 and 1.
pub fn load(file: &Path, columns: usize) -> Outcome<Examples> {
    let text = fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let width = columns + 1;
    let (mut x, mut y) = (Vec::new(), Vec::new());
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let bad = |what: &str| format!("{}, line {}: {what}", file.display(), number + 1);
        let mut fields = line.split_ascii_whitespace();
        y.push(match fields.next().unwrap_or_default() {
            "1" | "+1" => 1.0,
            "-1" => 0.0,
            other => return Err(bad(&format!("label {other}: expected -1 or +1")).into()),
        });
        let row = x.len();
        x.resize(row + width, 0.0);
        x[row + columns] = 1.0;
        for field in fields {
            let pair =
                field.split_once(':').and_then(|(i, v)| Some((i.parse::<usize>().ok()?, v.parse::<f64>().ok()?)));
            let Some((index, value)) = pair.filter(|(i, v)| (1..=columns).contains(i) && v.is_finite()) else {
                return Err(bad(&format!("{field}: expected index:value with an index of 1 to {columns}")).into());
            };
            x[row + index - 1] = value;
        }
    }
    if y.is_empty() {
        return Err(format!("{}: no examples", file.display()).into());
    }
    let x = Tensor::from_slice(&x).to_device(Device::Cpu).to_kind(Kind::Double).reshape([y.len() as i64, width as i64]);
    Ok(Examples { x, y: Tensor::from_slice(&y) })
}

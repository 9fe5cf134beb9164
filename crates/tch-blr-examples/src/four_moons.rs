//! Four moons: two pairs of half circles side by side as four tasks, with polynomial features. The points are read from
//! `$TCH_BLR_DATA/four_moons/make_moons.csv`: a header, then 1,000 lines `X,Y,label`.

use crate::Outcome;
use crate::logistic::Examples;
use std::fs;
use std::path::Path;
use tch::Tensor;

/// Powers of x and y with i + j ≤ 5.
pub const FEATURES: i64 = 21;
const DEGREE: i32 = 5;
/// How far the second pair is from the first.
const SHIFT: f64 = 2.3;

/// Four tasks of 500 points: the left and the right half of each pair.
///
/// # Errors
/// One line that names the file.
pub fn tasks(data: &Path) -> Outcome<Vec<Examples>> {
    let path = data.join("four_moons/make_moons.csv");
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut classes: [Vec<[f64; 2]>; 2] = Default::default();
    for (i, line) in text.lines().enumerate().skip(1) {
        let numbers = line.split(',').map(|n| n.trim().parse::<f64>()).collect::<Result<Vec<_>, _>>();
        match numbers.as_deref() {
            Ok(&[x, y, label]) if label == 0.0 || label == 1.0 => classes[label as usize].push([x, y]),
            _ => return Err(format!("{}: line {}: expected X,Y,label", path.display(), i + 1).into()),
        }
    }
    if classes.iter().any(|c| c.len() != 500) {
        return Err(format!("{}: expected 500 points of each class", path.display()).into());
    }
    for class in &mut classes {
        class.sort_by(|a, b| a[0].total_cmp(&b[0]));
    }
    let points = |half: usize, shift: f64| {
        let of = |class: &Vec<[f64; 2]>| class[250 * half..250 * (half + 1)].to_vec();
        classes.iter().flat_map(of).map(|[x, y]| [x + shift, y]).collect::<Vec<_>>()
    };
    let tasks = [points(0, 0.0), points(1, 0.0), points(0, SHIFT), points(1, SHIFT)];
    let all: Vec<&[f64; 2]> = tasks.iter().flatten().collect();
    let mean = [0, 1].map(|d| all.iter().map(|p| p[d]).sum::<f64>() / all.len() as f64);
    let labels: Vec<f64> = (0..500).map(|i| f64::from(i / 250)).collect();
    let features = |[x, y]: &[f64; 2]| {
        let (x, y) = (x - mean[0], y - mean[1]);
        (0..=DEGREE).flat_map(move |n| (0..=n).map(move |j| x.powi(n - j) * y.powi(j)))
    };
    let task = |points: &Vec<[f64; 2]>| {
        let x: Vec<f64> = points.iter().flat_map(features).collect();
        Examples { x: Tensor::from_slice(&x).reshape([-1, FEATURES]), y: Tensor::from_slice(&labels) }
    };
    Ok(tasks.iter().map(task).collect())
}

//! Sequences of tasks: digits in pairs, digits with permuted pixels, blobs in the plane.

use super::Task;
use crate::batches::subset;
use crate::digits::{Digits, PIXELS};
use crate::random::Rng;
use tch::Tensor;

/// Digits in pairs, 0/1 to 8/9. Task-incremental: it is known which pair is asked for; else all ten classes compete.
pub fn split_digits(data: &Digits, which_pair_is_known: bool) -> Vec<Task> {
    let pair = |t: i64| {
        let labels = [2 * t, 2 * t + 1];
        let of = |x: &Tensor, y: &Tensor| {
            let rows = subset(y, &labels);
            (x.index_select(0, &rows), y.index_select(0, &rows))
        };
        Task {
            train: of(&data.train_images, &data.train_labels),
            test: of(&data.test_images, &data.test_labels),
            labels: if which_pair_is_known { labels.to_vec() } else { (0..10).collect() },
            order: None,
        }
    };
    (0..5).map(pair).collect()
}

/// All digits with their pixels in another order in each task; the first as they are. Domain-incremental: one head.
pub fn permuted_digits(data: &Digits, tasks: u64) -> Vec<Task> {
    let permuted = |t: u64| {
        let mut order: Vec<i64> = (0..PIXELS as i64).collect();
        Rng::new(t, 50).shuffle(&mut order);
        Task {
            train: (data.train_images.shallow_clone(), data.train_labels.shallow_clone()),
            test: (data.test_images.shallow_clone(), data.test_labels.shallow_clone()),
            labels: (0..10).collect(),
            order: (t > 0).then(|| Tensor::from_slice(&order)),
        }
    };
    (0..tasks).map(permuted).collect()
}

/// Centres and standard deviations of ten normal blobs in the plane; task k is blob k against blob k + 5.
const BLOBS: [[(f64, f64); 2]; 10] = [
    [(0.0, 0.2), (0.08, 0.22)],
    [(0.6, 0.9), (0.24, 0.08)],
    [(1.3, 0.4), (0.04, 0.2)],
    [(1.6, -0.1), (0.16, 0.05)],
    [(2.0, 0.3), (0.05, 0.16)],
    [(0.45, 0.0), (0.08, 0.16)],
    [(0.7, 0.45), (0.16, 0.08)],
    [(1.0, 0.1), (0.06, 0.16)],
    [(1.7, -0.4), (0.24, 0.05)],
    [(2.3, 0.1), (0.05, 0.22)],
];

/// The toy problem of FROMP: five tasks of two blobs with `each` points, along the plane; tested on the training data.
pub fn blobs(each: usize, seed: u64) -> Vec<Task> {
    let task = |k: usize| {
        let mut points = Vec::with_capacity(4 * each);
        for blob in [k, k + 5] {
            let [(x, y), (dx, dy)] = BLOBS[blob];
            let mut rng = Rng::new(seed, 60 + blob as u64);
            for _ in 0..each {
                points.push((x + dx * rng.normal()) as f32);
                points.push((y + dy * rng.normal()) as f32);
            }
        }
        let x = Tensor::from_slice(&points).view([-1, 2]);
        let y = Tensor::from_slice(&[0i64, 1]).repeat_interleave_self_int(each as i64, 0, 2 * each as i64);
        let pair = || (x.shallow_clone(), y.shallow_clone());
        Task { train: pair(), test: pair(), labels: vec![0, 1], order: None }
    };
    (0..5).map(task).collect()
}

//! What the angles between whole tensors decide: slerp, the mean on the sphere, Model Stock.
//!
//! All of them are sums of the inputs whose weights follow from the inner products of these, so one pass over the files
//! finds the products, a computation without any tensor the weights, and another pass the sum.

use super::Input;
use super::job::Job;
use crate::method::{Keep, TaskVectors};
use crate::number::{BLOCK, Number};
use crate::{Error, Method};
use rayon::prelude::*;

/// Beyond this cosine (an angle of 1.8°) slerp takes the straight line. The two ways differ there by at most 1.3·10⁻⁴
/// of the vectors' norm, and sin Ω, which the weights are divided by, is about to vanish. Opposite vectors have no arc
/// of their own: any great circle joins them.
const COLLINEAR: f64 = 0.9995;

/// Where no coordinate changes by more than this, the mean on the sphere is found. Of coordinates, since the length of
/// a small step, which is the root of a sum that cancels, is known to 10⁻⁸ only.
const CLOSE: f64 = 1e-13;
/// Steps at most. Of directions within 85° of their mean, some 300 are needed.
const STEPS: usize = 10_000;

/// Inner products of every pair of vectors.
type Products = Vec<Vec<f64>>;

impl<T: Number, E: From<Error>> Job<'_, T, E> {
    /// ⟨x_j, x_k⟩ of the models or of their differences to the base, over the whole tensor.
    fn products(&mut self, differences: bool) -> Result<Products, E> {
        let n = self.plan.models.len();
        let (mut base, mut x) = (Vec::new(), vec![Vec::new(); n]);
        let mut products = vec![vec![0.0; n]; n];
        for at in self.chunks() {
            if differences {
                self.read(Input::Base, at.clone(), &mut base)?;
            }
            for (k, x) in x.iter_mut().enumerate() {
                if differences {
                    self.difference(k, at.clone(), &base, x)?;
                } else {
                    self.read(Input::Model(k), at.clone(), x)?;
                }
            }
            for j in 0..n {
                for k in j..n {
                    let blocks = x[j].par_chunks(BLOCK).zip(x[k].par_chunks(BLOCK));
                    let sums = blocks.map(|(x, y)| x.iter().zip(y).fold(0.0, |sum, (x, y)| sum + x.wide() * y.wide()));
                    // In order, so that they do not depend on the number of threads.
                    products[j][k] += sums.collect::<Vec<f64>>().into_iter().sum::<f64>();
                    products[k][j] = products[j][k];
                }
            }
        }
        Ok(products)
    }

    /// The weights of the two models at `t` on the arc between them: sin((1-t)Ω)/sin Ω and sin(tΩ)/sin Ω, with the
    /// angle Ω between the whole tensors.
    pub fn arc(&mut self, t: f64) -> Result<[f64; 2], E> {
        let products = self.products(false)?;
        let line = [1.0 - t, t];
        // Not the root of the product, which overflows sooner.
        let norms = products[0][0].sqrt() * products[1][1].sqrt();
        // Rounding may take a cosine beyond 1.
        let cos = (products[0][1] / norms).clamp(-1.0, 1.0);
        if norms == 0.0 || cos.abs() > COLLINEAR {
            return Ok(line);
        }
        let angle = cos.acos();
        Ok(line.map(|part| (part * angle).sin() / angle.sin()))
    }

    /// The mean on the sphere.
    pub fn karcher(&mut self) -> Result<(), E> {
        let products = self.products(false)?;
        let weights: Vec<f64> = self.plan.models.iter().map(|(_, w)| *w).collect();
        match karcher(&products, &weights) {
            Some(weights) => self.linear(&weights),
            None => Err(self.error(
                "the models' directions have no mean on the sphere, for they point to opposite sides: leave the tensor \
                 out (exclude), or merge it by another method"
                    .to_owned(),
            )),
        }
    }

    /// θ₀ + t (mean of θ_k - θ₀)
    pub fn model_stock(&mut self) -> Result<(), E> {
        let t = stock(&self.products(true)?);
        let mean = TaskVectors { lambda: t, keep: Keep::All, elect_signs: false, normalize: true };
        let equal = self.plan.models.iter().map(|(name, _)| (*name, 1.0)).collect();
        let plan = super::Plan { method: Method::TaskVectors(mean), models: equal, posteriors: false };
        Job { plan: &plan, name: self.name, len: self.len, inputs: self.inputs, output: self.output }
            .task_vectors(&mean)
    }
}

/// The weights of the tensors in their Karcher mean, from their inner products. None if there is no such mean.
fn karcher(products: &Products, weights: &[f64]) -> Option<Vec<f64>> {
    let norms: Vec<f64> = (0..weights.len()).map(|k| products[k][k].sqrt()).collect();
    let all: f64 = weights.iter().sum();
    let length = weights.iter().zip(&norms).map(|(w, norm)| w * norm).sum::<f64>() / all;
    // What has a direction, and counts.
    let some: Vec<usize> = (0..weights.len()).filter(|k| weights[*k] * norms[*k] > 0.0).collect();
    let all: f64 = some.iter().map(|k| weights[*k]).sum();
    let w: Vec<f64> = some.iter().map(|k| weights[*k] / all).collect();
    let cos = |j: usize, k: usize| products[some[j]][some[k]] / norms[some[j]] / norms[some[k]];
    let cos: Products =
        (0..w.len()).map(|j| (0..w.len()).map(|k| if j == k { 1.0 } else { cos(j, k) }).collect()).collect();
    let dot = |x: &[f64], y: &[f64]| -> f64 {
        x.iter().zip(&cos).map(|(x, row)| x * row.iter().zip(y).map(|(c, y)| c * y).sum::<f64>()).sum()
    };
    let normalized = |x: Vec<f64>| {
        let norm = dot(&x, &x).max(0.0).sqrt();
        // Far above the rounding of the sum, and far below any mean that means something.
        (norm > 1e-6).then(|| x.iter().map(|x| x / norm).collect::<Vec<f64>>())
    };
    let mut out = vec![0.0; weights.len()];
    if some.is_empty() {
        return Some(out);
    }
    // Points on the sphere, and directions there, by their coordinates in the unit vectors u_k.
    let mut u = normalized(w.clone())?;
    for _ in 0..STEPS {
        let mut step = vec![0.0; u.len()];
        for (k, w) in w.iter().enumerate() {
            let c = cos[k].iter().zip(&u).map(|(c, u)| c * u).sum::<f64>().clamp(-1.0, 1.0);
            // At π, every direction leads there.
            if c < -1.0 + 1e-9 {
                return None;
            }
            let angle = c.acos();
            // Ω/sin Ω, whose limit at 0 is 1.
            let stretch = if angle < 1e-6 { 1.0 } else { angle / angle.sin() };
            step[k] += w * stretch;
            step.iter_mut().zip(&u).for_each(|(step, u)| *step -= w * stretch * c * u);
        }
        let far = dot(&step, &step).max(0.0).sqrt();
        let along = if far < 1e-6 { 1.0 } else { far.sin() / far };
        // Normalized again, lest rounding adds up.
        let next = normalized(u.iter().zip(&step).map(|(u, s)| far.cos() * u + along * s).collect())?;
        let change = next.iter().zip(&u).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
        u = next;
        if change <= CLOSE {
            for (k, u) in some.iter().zip(&u) {
                out[*k] = length * u / norms[*k];
            }
            return Some(out);
        }
    }
    None
}

/// t of Model Stock, from the inner products of the differences.
fn stock(products: &Products) -> f64 {
    let n = products.len();
    let mut sum = 0.0;
    for j in 0..n {
        for k in 0..j {
            let norms = products[j][j].sqrt() * products[k][k].sqrt();
            sum += if norms > 0.0 { products[j][k] / norms } else { 0.0 };
        }
    }
    if n == 1 {
        return 1.0;
    }
    let n = n as f64;
    let cos = (2.0 * sum / (n * (n - 1.0))).clamp(0.0, 1.0);
    n * cos / (1.0 + (n - 1.0) * cos)
}

//! Weighted sums of models, and the weights of slerp.

use super::Input;
use super::job::{Job, sum, update};
use crate::Error;
use crate::number::{BLOCK, Number};
use rayon::prelude::*;

/// Beyond this cosine (an angle of 1.8°) slerp takes the straight line. The two ways differ there by at most 1.3·10⁻⁴
/// of the vectors' norm, and sin Ω, which the weights are divided by, is about to vanish. Opposite vectors have no arc
/// of their own: any great circle joins them.
const COLLINEAR: f64 = 0.9995;

impl<T: Number, E: From<Error>> Job<'_, T, E> {
    /// Σ w_k θ_k
    pub fn linear(&mut self, weights: &[f64]) -> Result<(), E> {
        let (mut total, mut x) = (Vec::new(), Vec::new());
        for at in self.chunks() {
            total.clear();
            total.resize(at.len(), T::zero());
            for (k, w) in weights.iter().enumerate() {
                let w = T::from_wide(*w);
                self.read(Input::Model(k), at.clone(), &mut x)?;
                update(&mut total, &x, |total, x| *total = *total + w * *x);
            }
            self.write(at.start, &total)?;
        }
        Ok(())
    }

    /// The weights of the two models at `t` on the arc between them: sin((1-t)Ω)/sin Ω and sin(tΩ)/sin Ω, with the
    /// angle Ω between the whole tensors.
    pub fn arc(&mut self, t: f64) -> Result<[f64; 2], E> {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let [mut aa, mut ab, mut bb] = [0.0; 3];
        for at in self.chunks() {
            self.read(Input::Model(0), at.clone(), &mut a)?;
            self.read(Input::Model(1), at, &mut b)?;
            let products = a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK)).map(|(a, b)| {
                a.iter().zip(b).fold([0.0; 3], |[aa, ab, bb], (a, b)| {
                    let (a, b) = (a.wide(), b.wide());
                    [aa + a * a, ab + a * b, bb + b * b]
                })
            });
            let [p, q, r] = sum(products);
            (aa, ab, bb) = (aa + p, ab + q, bb + r);
        }
        let line = [1.0 - t, t];
        // Not the root of the product, which overflows sooner.
        let norms = aa.sqrt() * bb.sqrt();
        // Rounding may take a cosine beyond 1.
        let cos = (ab / norms).clamp(-1.0, 1.0);
        if norms == 0.0 || cos.abs() > COLLINEAR {
            return Ok(line);
        }
        let angle = cos.acos();
        Ok(line.map(|part| (part * angle).sin() / angle.sin()))
    }
}

//! Weighted sums of models.

use super::Input;
use super::job::{Job, update};
use crate::Error;
use crate::number::Number;

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
}

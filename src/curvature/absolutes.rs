//! Sizes: Σᵢ |Gᵢ| for one vector sᵢ per example.

use super::linearized::Linearized;
use super::squares::add;
use super::tapped::PerParameter;
use crate::Result;
use tch::{Tensor, no_grad_guard};

impl Linearized<'_> {
    /// Σᵢ |Gᵢ| with Gᵢ = Jᵢᵀsᵢ, f64 for parameters in f64 and f32 for all others; `None` for parameters that have no
    /// part in the outputs.
    pub(crate) fn absolutes(&mut self, s: &Tensor) -> Result<PerParameter> {
        let column = self.pull(s)?;
        let _no_grad = no_grad_guard();
        let mut sums: PerParameter = (0..self.parameters()).map(|_| None).collect();
        for (p, sum) in sums.iter_mut().enumerate() {
            let parameter = self.parameter(p, &column);
            if parameter.is_used() {
                *sum = Some(parameter.sum_of_absolutes()?);
            }
        }
        self.looped(&column, 0..self.batch(), |_, p, g| add(&mut sums[p], g.f_abs()?))?;
        Ok(sums)
    }
}

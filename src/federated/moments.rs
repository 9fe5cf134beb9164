//! Mean and precision of a Gaussian as plain f64 tensors: what the methods calculate with.

use super::dual::Dual;
use super::layout::Layout;
use crate::Result;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// N(m, S⁻¹), with S positive definite.
#[derive(Debug)]
pub struct Moments {
    pub(super) layout: Arc<Layout>,
    /// m `[n]`, f64
    pub(super) mean: Tensor,
    /// The diagonal of S `[n]`, or S `[n, n]`; f64
    pub(super) precision: Tensor,
}

impl Moments {
    /// (S m, S)
    pub fn natural(&self) -> Dual {
        let linear = times(&self.precision, &self.mean);
        Dual { layout: self.layout.clone(), linear, precision: self.precision.shallow_clone() }
    }

    /// The same precision around another mean.
    pub fn around(&self, mean: &Tensor) -> Self {
        Moments { layout: self.layout.clone(), mean: mean.shallow_clone(), precision: self.precision.shallow_clone() }
    }

    /// x times the precision, around the same mean.
    pub fn times(&self, x: f64) -> Self {
        Moments { precision: &self.precision * x, ..self.around(&self.mean) }
    }

    /// The same mean with the precision xI.
    pub fn isotropic(&self, x: f64) -> Self {
        let one = Tensor::ones_like(&self.mean) * x;
        let precision = if self.precision.dim() == 1 { one } else { one.diag(0) };
        Moments { precision, ..self.around(&self.mean) }
    }

    /// With the parameters in the order of another layout, whose kinds it takes.
    ///
    /// # Errors
    /// Other parameters.
    pub fn arranged(self, layout: &Arc<Layout>, whose: &str) -> Result<Self> {
        let Some(index) = layout.permutation(&self.layout, whose)? else {
            return Ok(Moments { layout: layout.clone(), ..self });
        };
        let index = index.f_to_device(self.mean.device())?;
        let select = |t: &Tensor| (0..t.dim() as i64).try_fold(t.shallow_clone(), |t, d| t.f_index_select(d, &index));
        Ok(Moments { layout: layout.clone(), mean: select(&self.mean)?, precision: select(&self.precision)? })
    }
}

/// A x, for the diagonal of A or the whole of it.
pub(super) fn times(a: &Tensor, x: &Tensor) -> Tensor {
    if a.dim() == 1 { a * x } else { a.mv(x) }
}

/// All tensors of some parameters as one vector in f64.
pub(super) fn joined<'a>(parts: impl IntoIterator<Item = &'a Tensor>) -> Result<Tensor> {
    let flat = |t: &'a Tensor| Ok(t.f_to_kind(Kind::Double)?.f_reshape([-1])?);
    Ok(Tensor::f_cat(&parts.into_iter().map(flat).collect::<Result<Vec<_>>>()?, 0)?)
}

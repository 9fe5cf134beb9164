//! The vectors on the outputs whose squares a Fisher information sums, by where its labels come from.

use crate::Result;
use crate::kernel::{self, Draw, Field};
use crate::likelihood::Outputs;
use tch::{Kind, Tensor};

/// The step of the labels' noise: one that neither an optimizer, which counts from 0, nor a posterior of the same seed,
/// which draws at the last step of all, reaches.
const LABELS: u64 = u64::MAX - 1;

/// Vectors s_c for every example with Σ_c s_c s_cᵀ = Λ, or so on average, or the residuals of the data.
pub(super) enum Columns<'a> {
    Exact(&'a Outputs),
    /// `seen`: examples in earlier batches.
    Sampled {
        outputs: &'a Outputs,
        seed: u64,
        samples: u32,
        seen: u64,
    },
    Observed(Tensor),
}

impl Columns<'_> {
    pub(super) fn len(&self) -> i64 {
        match self {
            Columns::Exact(outputs) => outputs.columns(),
            Columns::Sampled { samples, .. } => i64::from(*samples),
            Columns::Observed(_) => 1,
        }
    }

    pub(super) fn get(&self, c: i64) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        match self {
            Columns::Exact(outputs) => outputs.root(c),
            Columns::Sampled { outputs, seed, samples, seen } => {
                let z = &outputs.z;
                let (b, width) = (z.size()[0], z.size().get(1).copied().unwrap_or(1));
                // Every example has a block of the generator to itself, at its place in the data: how the data are
                // cut into batches does not change its labels.
                let groups = kernel::groups(width as usize);
                let block = groups as i64 * kernel::GROUP as i64;
                let at = Draw { step: LABELS, sample: c as u64, parameter: 0, group: seen * groups };
                let like = Tensor::f_empty([b, block], (Kind::Double, z.device()))?;
                let normals = kernel::tensor(Field::Noise { seed: *seed, at }, &like)?;
                let s = outputs.sampled(&normals.f_narrow(1, 0, width)?.f_reshape(z.size())?)?;
                // The vectors are squared, so that a mean over draws divides each of them by √samples.
                Ok(s.f_mul_scalar(1.0 / f64::from(*samples).sqrt())?)
            }
            Columns::Observed(residual) => Ok(residual.shallow_clone()),
        }
    }
}

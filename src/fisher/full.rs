//! The whole matrix of a Fisher information.

use super::at::{At, at, finite, parameter};
use super::{Batch, Fisher};
use crate::{Error, FullGaussian, IntoTensor, Params, Prior, Result};
use tch::{Kind, Tensor};

impl Fisher {
    /// The whole matrix, for small models.
    ///
    /// # Errors
    /// As [`Fisher::diagonal`]; [`Error::Curvature`] for more weights than [`Fisher::max_weights`].
    pub fn full<B: Into<Batch>, L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        batches: impl IntoIterator<Item = B>,
        model: impl Fn(&Tensor) -> L,
    ) -> Result<FullFisher> {
        let params = Params::separate(params)?;
        params.check()?;
        let solution = params.at_present();
        let weights = solution.leaves().iter().map(|l| l.tensor.numel()).sum();
        self.check_matrix(weights)?;
        let device = solution.leaves().first().map_or(tch::Device::Cpu, |l| l.tensor.device());
        let mut matrix = Tensor::f_zeros([weights as i64; 2], (Kind::Double, device))?;
        let seen = self.each(&params, batches, model, |batch, columns| {
            batch.each_gradient(columns.len(), |c| columns.get(c), |g| add_outer_products(&mut matrix, &g))
        })?;
        let mut start = 0;
        for leaf in solution.leaves() {
            let n = leaf.tensor.numel() as i64;
            // By rows of one parameter, so that the message can name it.
            finite(&parameter(leaf.name()), &matrix.f_narrow(0, start, n)?, seen.examples)?;
            start += n;
        }
        Ok(FullFisher { at: At { solution, seen, fisher: self.clone() }, matrix })
    }

    /// Errors if a matrix over that many weights is larger than allowed: before it is allocated, because it may be
    /// larger than the memory.
    pub(super) fn check_matrix(&self, weights: usize) -> Result<()> {
        if weights <= self.weights_allowed() {
            return Ok(());
        }
        Err(Error::Curvature(format!(
            "the model has {weights} weights, and the full matrix would have {:.1e} bytes: at most {} weights are \
             allowed; raise max_weights(..), choose the layers of interest by Params::only, or take Fisher::kronecker",
            8.0 * (weights as f64).powi(2),
            self.weights_allowed()
        )))
    }
}

/// M += GᵀG
pub(super) fn add_outer_products(matrix: &mut Tensor, rows: &Tensor) -> Result<()> {
    _ = matrix.f_addmm_(&rows.f_tr()?, rows)?;
    Ok(())
}

/// The whole Fisher information matrix, from [`Fisher::full`]: a sum over [`FullFisher::examples`] examples.
#[derive(Debug)]
pub struct FullFisher {
    at: At,
    matrix: Tensor,
}

at!(FullFisher);

impl FullFisher {
    /// F `[P, P]` in f64: the weights of the parameters in order, each parameter's in row-major order.
    pub fn matrix(&self) -> &Tensor {
        &self.matrix
    }

    /// Laplace's approximation N(θ, (F + P₀)⁻¹), as [`DiagonalFisher::laplace`](super::DiagonalFisher::laplace).
    ///
    /// # Errors
    /// As there; [`Error::NotPositiveDefinite`].
    pub fn laplace(&self, prior: impl Into<Prior>) -> Result<FullGaussian> {
        let _no_grad = tch::no_grad_guard();
        let priors = self.at.precisions(&prior.into())?;
        let flat = priors.iter().map(|p| p.to_kind(Kind::Double).reshape([-1]));
        let diagonal = Tensor::f_cat(&flat.collect::<Vec<_>>(), 0)?;
        FullGaussian::new(self.at.means(), &(&self.matrix + diagonal.diag_embed(0, -2, -1)))
    }

    /// Laplace's approximation N(θ, (F + P)⁻¹) with the full posterior N(m, P⁻¹) of earlier data as the prior: online
    /// Laplace (Ritter et al. 2018).
    ///
    /// # Errors
    /// A prior of other parameters or shapes; [`Error::NotPositiveDefinite`].
    pub fn laplace_after(&self, prior: &FullGaussian) -> Result<FullGaussian> {
        let _no_grad = tch::no_grad_guard();
        let leaves = self.at.solution.leaves();
        for (i, leaf) in leaves.iter().enumerate() {
            // By position as well as by name: the two matrices are added element by element.
            let name = prior.names().nth(i).filter(|name| leaf.names.iter().any(|n| n == name));
            let size = name.and_then(|name| prior.mean(name)).map(|m| m.size());
            if size != Some(leaf.tensor.size()) {
                return Err(Error::parameter(
                    leaf.name(),
                    "the prior does not have it at the same place and in the same shape; expected a posterior of the \
                     same parameters in the same order",
                ));
            }
        }
        if let Some(name) = prior.names().nth(leaves.len()) {
            return Err(Error::parameter(name, "the prior has it and the model does not"));
        }
        FullGaussian::new(self.at.means(), &(&self.matrix + prior.precision_matrix().to_device(self.matrix.device())))
    }
}

//! What Laplace's approximation says about a model's outputs.

use super::block::Basis;
use super::{Laplace, OutputGaussian};
use crate::curvature::{Linearized, Looked, Pass};
use crate::outputs::fits;
use crate::{IntoTensor, Params, Result};
use tch::{Kind, Tensor};

impl Laplace {
    /// The outputs of the linearised model, f ~ N(f(x; m), J S⁻¹ Jᵀ) with J = ∂f/∂θ at the model's present weights,
    /// which should be m: the right partner of a Gauss-Newton curvature, which is that of the linearised model (Immer
    /// et al. 2021, *Improving Predictions of Bayesian Neural Nets via Local Linearization*).
    ///
    /// The closure gives the outputs `[B]` or `[B, C]`, row i from example i only. Backward passes stop at the layers
    /// that the curvature is of: of a last layer they cost nothing of the rest. A diagonal curvature needs no Jacobian;
    /// the others form that of a chunk of examples at a time.
    ///
    /// # Errors
    /// As [`DiagonalGaussian::output_covariance`](crate::DiagonalGaussian::output_covariance).
    pub fn predict<L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        outputs: impl FnOnce() -> L,
    ) -> Result<OutputGaussian> {
        let params = self.parameters_of(Params::separate(params)?);
        let solution = self.curvature.solution().leaves();
        // Before the forward pass, which may be the expensive part.
        fits(&params, solution.iter().map(|leaf| (leaf.name().to_owned(), leaf.tensor.shallow_clone())).collect())?;
        let mut pass = Pass::run(&params, outputs)?;
        let z = pass.outputs(self.likelihood(), self.curvature.active())?.z.detach().copy();
        let mut model = Linearized::new(&pass, &params, &mut Looked::default())?;
        let scale = self.scale();
        let diagonal = self.blocks.iter().all(|block| matches!(block.basis, Basis::Weights));
        let covariance = if diagonal {
            self.by_variances(&params, &mut model)?
        } else {
            let columns = self.columns(&params)?;
            // An empty one first, for batches without an example.
            let c = z.size().get(1).copied().unwrap_or(1);
            let mut all = vec![Tensor::f_zeros([0, c, c], (Kind::Double, z.device()))?];
            model.each_jacobian(|_, jacobian| {
                let &[n, outputs, weights] = &jacobian.size()[..] else { unreachable!("[b, C, P]") };
                let rows = jacobian.f_reshape([n * outputs, weights])?;
                let mut sum = Tensor::f_zeros([n, outputs, outputs], (Kind::Double, rows.device()))?;
                for (block, columns) in self.blocks.iter().zip(&columns) {
                    let white = block.white(&rows.f_index_select(1, columns)?, scale)?.f_reshape([n, outputs, -1])?;
                    _ = sum.f_add_(&white.f_bmm(&white.f_transpose(1, 2)?)?)?;
                }
                all.push(sum);
                Ok(())
            })?;
            Tensor::f_cat(&all, 0)?
        };
        OutputGaussian::new(self.likelihood(), &z, &covariance)
    }

    /// Without a Jacobian, for independent weights.
    fn by_variances(&self, params: &Params, model: &mut Linearized) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let variance = |leaf: &crate::params::Leaf| {
            let block = self.blocks.iter().find(|block| leaf.names.contains(&block.names[0]));
            let of = |block: &super::Block| {
                let v = block.precisions(self.scale()).f_reciprocal()?.f_reshape(leaf.tensor.size())?;
                Ok(v.f_to_kind(leaf.state_kind())?.f_to_device(leaf.tensor.device())?)
            };
            block.map(of).transpose()
        };
        let variances = params.leaves().iter().map(variance).collect::<Result<Vec<_>>>()?;
        model.covariance(&variances)
    }

    /// Where the weights of each block are in a Jacobian of the model, whose parameters may come in another order.
    fn columns(&self, params: &Params) -> Result<Vec<Tensor>> {
        let _no_grad = tch::no_grad_guard();
        let mut first = 0;
        let mut starts = Vec::with_capacity(params.len());
        for leaf in params.leaves() {
            starts.push(first);
            first += leaf.tensor.numel() as i64;
        }
        let device = params.leaves().first().map_or(tch::Device::Cpu, |leaf| leaf.tensor.device());
        let of = |leaf: &crate::params::Leaf| {
            // Every name is the model's: `fits` has seen to it.
            let start = params.number(leaf.name()).map_or(0, |i| starts[i]);
            Tensor::f_arange_start(start, start + leaf.tensor.numel() as i64, (Kind::Int64, device))
        };
        let solution = self.curvature.solution().leaves();
        let all = Tensor::f_cat(&solution.iter().map(of).collect::<std::result::Result<Vec<_>, _>>()?, 0)?;
        self.blocks.iter().map(|block| Ok(all.f_index_select(0, &block.places.f_to_device(device)?)?)).collect()
    }
}

//! Laplace's approximation as a model of its own: how likely the data are under it, which prior precision and noise
//! make them most likely, and what it predicts.
//!
//! [`Laplace`] takes a curvature from [`crate::fisher`] apart into its eigenvalues once; after that a prior precision
//! is changed, judged and searched without a pass over the data. [`OutputGaussian`] is what it, or any Gaussian
//! posterior, says about a model's outputs, and turns it into probabilities. How a curvature is estimated does not
//! belong here, nor samples of weights, which are the posteriors'.

mod block;
mod curvature;
mod evidence;
mod output;
mod predict;
mod search;

pub use curvature::Curvature;
pub use evidence::EvidenceSlope;
pub use output::{Link, OutputGaussian};
pub use search::{PriorSearch, Tuned};

use crate::fisher::Fit;
use crate::likelihood::Likelihood;
use crate::{Error, Params, Result, check};
use block::Block;
use tch::{Kind, Tensor};

/// N(m, S⁻¹) around a model's weights m, with S = H + P₀: the curvature H of the data, a sum over them, and a prior
/// N(m₀, 1/p) whose precision p may differ from block to block.
///
/// | curvature | blocks, each with a precision p of its own |
/// |---|---|
/// | [`DiagonalFisher`](crate::fisher::DiagonalFisher) | every parameter |
/// | [`KroneckerFisher`](crate::fisher::KroneckerFisher) | every layer, a weight and its bias together; every other parameter |
/// | [`FullFisher`](crate::fisher::FullFisher), [`SubsetFisher`](crate::fisher::SubsetFisher), [`LowRankFisher`](crate::fisher::LowRankFisher) | one of all weights |
///
/// The weights are those that the curvature is of: with [`Params::last_layer`], [`Params::only_named`] or the
/// weights of a [`Subnetwork`](crate::fisher::Subnetwork) all others are known, and stay at the model's values.
///
/// With a Gaussian likelihood the noise σ² is a number that can be changed afterwards, too: H goes with 1/σ².
///
/// ```
/// use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::{Params, fisher::Fisher, nn};
/// use tch_blr::laplace::{Laplace, Link, PriorSearch};
/// # fn main() -> tch_blr::Result<()> {
/// let vs = VarStore::new(Device::Cpu);
/// let layer = |name, i, o| nn::linear(vs.root() / name, i, o, Default::default());
/// let (body, head) = (layer("body", 4, 8), layer("head", 8, 3));
/// let net = |x: &Tensor| head.forward(&body.forward(x).tanh());
/// # let x = Tensor::randn([100, 4], (Kind::Float, Device::Cpu));
/// # let y = x.argmax(-1, false).clamp_max(2);
/// // train, then:
/// let f = Fisher::exact().kronecker(Params::from(&vs).last_layer()?, [(&x, &y)], net)?;
/// let mut laplace = Laplace::new(f, 1.0)?;
/// let tuned = laplace.optimize_prior(&PriorSearch::mackay())?; // no further pass over the data
/// assert!(tuned.log_evidence == laplace.log_evidence()?);
/// let p = laplace.predict(&vs, || net(&x))?.probabilities(Link::Probit)?;
/// assert_eq!(p.size(), [100, 3]);
/// # Ok(())
/// # }
/// ```
///
/// Source: MacKay 1992, *A Practical Bayesian Framework for Backpropagation Networks*; Immer et al. 2021, *Scalable
/// Marginal Likelihood Estimation for Model Selection in Deep Learning*; Daxberger et al. 2021, *Laplace Redux*.
#[derive(Debug)]
pub struct Laplace {
    curvature: Curvature,
    blocks: Vec<Block>,
    /// σ² of a Gaussian likelihood at present; 1 for the others.
    variance: f64,
}

impl Laplace {
    /// With the prior N(0, 1/precision) on every weight, precision > 0.
    ///
    /// # Errors
    /// A precision that is not finite and positive; if an eigenvalue decomposition fails.
    pub fn new(curvature: impl Into<Curvature>, precision: f64) -> Result<Self> {
        check::positive("precision", precision)?;
        let _no_grad = tch::no_grad_guard();
        let curvature = curvature.into();
        let blocks = curvature.blocks(precision)?;
        let variance = curvature.likelihood().scale();
        Ok(Laplace { curvature, blocks, variance })
    }

    /// m₀ of the parameters named, in their shapes; default 0, and of others as it was. Only the evidence knows it: the
    /// approximation is around m.
    ///
    /// # Errors
    /// A parameter that it does not have, or has in another shape; a mean that is not finite.
    pub fn prior_mean<S: AsRef<str>>(mut self, means: impl IntoIterator<Item = (S, Tensor)>) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let solution = self.curvature.solution();
        let mut flat =
            curvature::flat(&solution.leaves().iter().map(|l| l.tensor.shallow_clone()).collect::<Vec<_>>())?;
        for block in &self.blocks {
            _ = flat.f_index_copy_(0, &block.places, block.offset())?;
        }
        let sizes: Vec<i64> = solution.leaves().iter().map(|leaf| leaf.tensor.numel() as i64).collect();
        for (name, mean) in means {
            let name = name.as_ref();
            let Some(i) = solution.number(name) else {
                return Err(Error::parameter(name, "a prior mean was given, and the curvature is not of it"));
            };
            let m = &solution.leaves()[i].tensor;
            if mean.size() != m.size() {
                let (theirs, ours) = (mean.size(), m.size());
                return Err(Error::parameter(name, format!("its prior mean is {theirs:?}: expected {ours:?}")));
            }
            if let Some(value) = crate::kernel::first_non_finite(&mean) {
                return Err(Error::parameter(name, format!("its prior mean is not finite ({value})")));
            }
            let offset = m.to_kind(Kind::Double) - mean.to_kind(Kind::Double).to_device(m.device());
            let start = sizes[..i].iter().sum();
            flat.f_narrow(0, start, sizes[i])?.f_copy_(&offset.f_reshape([-1])?)?;
        }
        self.blocks.iter_mut().try_for_each(|block| block.set_offset(&flat))?;
        Ok(self)
    }

    /// N, the number of examples of the curvature.
    pub fn examples(&self) -> u64 {
        self.curvature.seen().examples
    }

    /// P, the number of weights that are not known.
    pub fn len(&self) -> usize {
        self.blocks.iter().map(|b| b.weights() as usize).sum()
    }

    /// Whether all weights are known, which they never are.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// p of every block with the names of its parameters, in order.
    pub fn precisions(&self) -> impl Iterator<Item = (&[String], f64)> {
        self.blocks.iter().map(|block| (&block.names[..], block.precision))
    }

    /// p > 0 of all blocks.
    ///
    /// # Errors
    /// A number that is not finite and positive.
    pub fn set_precision(&mut self, precision: f64) -> Result<()> {
        check::positive("precision", precision)?;
        self.blocks.iter_mut().for_each(|block| block.precision = precision);
        Ok(())
    }

    /// p > 0 of the block that this parameter is in.
    ///
    /// # Errors
    /// A number that is not finite and positive; a parameter that it does not have.
    pub fn set_precision_of(&mut self, name: &str, precision: f64) -> Result<()> {
        check::positive("precision", precision)?;
        let block = self.blocks.iter_mut().find(|block| block.names.iter().any(|n| n == name));
        let block =
            block.ok_or_else(|| Error::parameter(name, "the curvature is not of it, so it has no precision"))?;
        block.precision = precision;
        Ok(())
    }

    /// The likelihood, with the noise at present.
    pub fn likelihood(&self) -> Likelihood {
        match self.curvature.likelihood() {
            Likelihood::Gaussian { .. } => Likelihood::Gaussian { variance: self.variance },
            other => other,
        }
    }

    /// σ² > 0 of a Gaussian likelihood.
    ///
    /// # Errors
    /// A number that is not finite and positive; a likelihood without noise; observed labels, whose curvature does not
    /// go with 1/σ².
    pub fn set_variance(&mut self, variance: f64) -> Result<()> {
        check::positive("variance", variance)?;
        self.check_noise()?;
        self.variance = variance;
        Ok(())
    }

    fn check_noise(&self) -> Result<()> {
        self.curvature.check_noise()
    }

    /// What H is multiplied by: σ² of the passes over σ² at present.
    fn scale(&self) -> f64 {
        self.curvature.likelihood().scale() / self.variance
    }

    /// How well the targets are fitted.
    fn fit(&self) -> Result<&Fit> {
        let fit = self.curvature.seen().fit.as_ref().ok_or_else(|| {
            Error::Curvature(
                "the evidence needs the loss of the data, and a batch had no targets: give the Fisher information batches \
                 of (inputs, targets)"
                    .to_owned(),
            )
        })?;
        if fit.loss.is_finite() {
            return Ok(fit);
        }
        let loss = fit.loss;
        Err(Error::Curvature(format!("the loss of the data is {loss}; look at the targets and at the outputs")))
    }

    /// The parameters that it is about, of a model's.
    fn parameters_of(&self, params: Params) -> Params {
        let names: Vec<String> = self.curvature.solution().names().map(str::to_owned).collect();
        params.only(move |name| names.iter().any(|n| n == name))
    }
}

//! What a row with a structured posterior has to say; the driver ([`StructuredOptimizer`]) does the rest.

use super::{StructuredBuilder, StructuredOptimizer};
use crate::rows::When;
use crate::{Expectation, Labels, Noise, Params, Prior, Result, Schedule};
use serde::{Serialize, de::DeserializeOwned};
use tch::Tensor;

/// Second derivatives of the loss that a row asks for at each evaluation, beside the gradient, by differentiating the
/// gradient once more. All of the block's own weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SecondDerivatives {
    /// None.
    Unused,
    /// ∇²L `[n, n]`, by a backward pass for each of the n weights.
    Hessian,
    /// diag ∇²L, by as many.
    Diagonal,
    /// The mean of v ⊙ (∇²L v) over `probes` vectors v of random signs, one backward pass each: an unbiased estimate of
    /// the diagonal, exact where the Hessian is diagonal (Hutchinson 1989).
    Hutchinson {
        /// How many, at least 1.
        probes: usize,
    },
    /// Two matrices per parameter, the Kronecker factors of the Fisher information of rows and columns: `[r, r]` and
    /// `[c, c]` of a parameter that is a matrix, `[1, 1]` and `[n, n]` of one with fewer than two dimensions. Of weights and
    /// biases of the layers of [`crate::nn`]; not for [`StructuredRule::JOINT`].
    Kronecker {
        /// The labels in the Fisher information.
        labels: Labels,
    },
}

/// What a row sees of one evaluation of the loss.
#[derive(Debug)]
pub struct Evaluated<'a> {
    /// e, the way from the mean to the point of the evaluation; zero at the mean.
    pub displacement: &'a Tensor,
    /// ∇L there.
    pub gradient: &'a Tensor,
    /// What [`StructuredRule::second_derivatives`] asks for: none, one or two tensors.
    pub second: &'a [Tensor],
}

/// What an update sees of one block, on the scale of the mean loss L.
#[derive(Debug)]
pub struct Block<'a> {
    /// m
    pub mean: &'a Tensor,
    /// ĝ, the gradient of the loss (without the prior), averaged over the evaluations.
    pub gradient: &'a Tensor,
    /// What [`StructuredRule::statistics`] returned, averaged over the evaluations.
    pub statistics: &'a [Tensor],
}

/// What was learned of one block.
#[derive(Debug)]
pub struct Learned<'a, R> {
    /// Its configuration, after the overrides of groups.
    pub config: R,
    /// Name and mean of each of its parameters, in their shapes.
    pub means: Vec<(String, Tensor)>,
    /// One tensor per name in [`StructuredRule::STATE`].
    pub state: &'a [Tensor],
}

/// A row of the table whose posterior is not a product over the weights: its configuration, and its update as pure
/// functions of one block of weights.
///
/// A block is either all trainable weights as one f64 vector `[n]` ([`StructuredRule::JOINT`]), or one parameter as the
/// matrix `[r, c]` of its rows (the vector `[n]` with fewer than two dimensions) in f64 for f64 weights and else in f32.
///
/// An update returns the new mean and state instead of writing to them, so that an error (a precision that is not
/// positive definite) leaves everything as it was.
pub trait StructuredRule: Copy + std::fmt::Debug + Send + Sync + Serialize + DeserializeOwned + 'static {
    /// Name of the row, as in checkpoints.
    const NAME: &'static str;
    /// Names of the state tensors of a block.
    const STATE: &'static [&'static str];
    /// Whether all weights together are one block.
    const JOINT: bool;
    /// What [`StructuredOptimizer::posterior`] returns.
    type Posterior;

    /// The learning rate α.
    fn learning_rate(&self) -> f64;
    /// The same configuration with another learning rate.
    fn with_learning_rate(self, lr: f64) -> Self;
    /// The effective sample size λ, if it is set.
    fn effective_sample_size(&self) -> Option<f64>;
    /// The same configuration with another δ = prior precision/λ of its isotropic prior.
    fn with_weight_decay(self, delta: f64) -> Self;
    /// Errors if a hyper-parameter is out of range.
    ///
    /// # Errors
    /// [`Error::HyperParameter`](crate::Error::HyperParameter)
    fn validate(&self) -> Result<()>;
    /// Where the loss is evaluated; by default once, at the mean.
    fn expectation(&self) -> Expectation {
        Expectation::Delta
    }
    /// Second derivatives to compute at each evaluation; by default none.
    fn second_derivatives(&self) -> SecondDerivatives {
        SecondDerivatives::Unused
    }
    /// State before the first update of a block whose mean is like this.
    fn initial(&self, mean: &Tensor) -> Vec<Tensor>;
    /// e ~ N(0, covariance of q) from standard normals z of the block's shape.
    ///
    /// # Errors
    /// A covariance that does not exist.
    fn displacement(&self, z: &Tensor, state: &[Tensor]) -> Result<Tensor> {
        let _ = state;
        Ok(z.zeros_like())
    }
    /// What is to be averaged over the evaluations beside the gradient.
    ///
    /// # Errors
    /// If libtorch fails.
    fn statistics(&self, x: &Evaluated, state: &[Tensor]) -> Result<Vec<Tensor>> {
        let _ = (x, state);
        Ok(Vec::new())
    }
    /// The new mean and state of a block.
    ///
    /// # Errors
    /// [`Error::NotPositiveDefinite`](crate::Error::NotPositiveDefinite)
    fn update(&self, when: When, x: &Block, state: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)>;
    /// The posterior after `when.t` updates.
    ///
    /// # Errors
    /// No effective sample size, or a precision that is not positive definite.
    fn posterior(when: When, blocks: Vec<Learned<Self>>) -> Result<Self::Posterior>;

    /// Builds the optimizer for the parameters that are trainable now, with this learning rate. As
    /// [`Rule::build`](crate::Rule::build).
    ///
    /// # Errors
    /// As [`StructuredBuilder::build`].
    fn build(self, params: impl Into<Params>, lr: f64) -> Result<StructuredOptimizer<Self>> {
        self.builder().build(params, lr)
    }
    /// As [`StructuredBuilder::prior`].
    fn prior(self, prior: impl Into<Prior>) -> StructuredBuilder<Self> {
        self.builder().prior(prior)
    }
    /// As [`StructuredBuilder::noise`].
    fn noise(self, noise: impl Into<Noise>) -> StructuredBuilder<Self> {
        self.builder().noise(noise)
    }
    /// As [`StructuredBuilder::group`].
    fn group(self, group: usize, change: impl Fn(Self) -> Self + Send + 'static) -> StructuredBuilder<Self> {
        self.builder().group(group, change)
    }
    /// As [`StructuredBuilder::schedule`].
    fn schedule(self, schedule: Schedule) -> StructuredBuilder<Self> {
        self.builder().schedule(schedule)
    }
    /// Starts a [`StructuredBuilder`].
    fn builder(self) -> StructuredBuilder<Self> {
        StructuredBuilder::new(self)
    }
}

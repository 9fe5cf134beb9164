//! What a row over blocks of weights has to say: its update as pure functions of the tensors of one block. How
//! parameters become blocks is in `blocks.rs`; elementwise rows are in `rule.rs`.

use super::row::{Row, When};
use crate::Result;
use crate::prior::{BlockPrior, Family};
use tch::Tensor;

/// What a row sees of one evaluation of the loss.
#[derive(Debug)]
pub struct Evaluated<'a> {
    /// Number of the update that it is for, as [`When::t`] there.
    pub t: u64,
    /// e, from the mean to the point of the evaluation; zero at the mean.
    pub displacement: &'a Tensor,
    /// What [`BlockRule::displacement`] gave with it.
    pub rotated: Option<&'a Tensor>,
    /// ∇L there.
    pub gradient: &'a Tensor,
    /// What [`Row::statistic`] asks for by [`Statistic::Hessian`](crate::Statistic::Hessian) and its like: nothing, one
    /// tensor, or the two Kronecker factors.
    pub second: &'a [Tensor],
}

/// Where a sample lies, seen from the mean.
#[derive(Debug)]
pub struct Displaced {
    /// e, in the shape of the block.
    pub e: Tensor,
    /// e in coordinates of the row, for its [`BlockRule::statistics`].
    pub rotated: Option<Tensor>,
}

impl From<Tensor> for Displaced {
    fn from(e: Tensor) -> Self {
        Displaced { e, rotated: None }
    }
}

/// What an update sees of one block, on the scale of the mean loss L.
#[derive(Debug)]
pub struct Block<'a> {
    /// m
    pub mean: &'a Tensor,
    /// ĝ, the gradient of the loss (without the prior), averaged over the evaluations.
    pub gradient: &'a Tensor,
    /// What [`BlockRule::statistics`] returned, averaged over the evaluations.
    pub statistics: &'a [Tensor],
    /// The prior N(m₀, (ess·Δ)⁻¹).
    pub prior: &'a BlockPrior,
}

/// What was learned of one block.
#[derive(Debug)]
pub struct Learned<'a, R> {
    /// Its row, after the overrides of groups.
    pub row: R,
    /// Its number of updates.
    pub when: When,
    /// Name and mean of each of its parameters, in their shapes.
    pub means: Vec<(String, Tensor)>,
    /// One tensor per name in [`Row::STATE`].
    pub state: &'a [Tensor],
    /// Its prior.
    pub prior: &'a BlockPrior,
}

/// A row whose posterior is not a product over the weights: its update as pure functions of one block of weights.
///
/// A block is either all weights as one f64 vector `[n]` ([`BlockRule::JOINT`]), or one parameter as the matrix
/// `[r, c]` of its rows (the vector `[n]` with fewer than two dimensions), in f64 for f64 weights and in f32 for all
/// others.
///
/// An update returns the new mean and state instead of writing to them, so that an error (a precision that is not
/// positive definite) leaves everything as it was.
///
/// A block none of whose parameters has a gradient is left alone. In a joint block, a parameter without a gradient
/// keeps its mean, and the others move as they would with it held there; the state follows a loss that is flat along
/// it.
pub trait BlockRule: Row<Arithmetic = super::Blocks> {
    /// Whether all weights together are one block. Every state tensor then has the length n of the block in each of its
    /// dimensions.
    const JOINT: bool;
    /// The widest family of Gaussians that this row takes as a prior.
    const PRIOR: Family;

    /// State before the first update of a block whose mean is like this. `shape` is that of the parameter, or of a
    /// joint block.
    ///
    /// # Errors
    /// A prior that has no part in such a state; the driver adds the name.
    fn initial(&self, shape: &[i64], mean: &Tensor, prior: &BlockPrior) -> Result<Vec<Tensor>>;
    /// e ~ N(0, covariance of q) from standard normals z of the block's shape, for update number t.
    ///
    /// # Errors
    /// A covariance that does not exist.
    fn displacement(&self, t: u64, z: &Tensor, state: &[Tensor], prior: &BlockPrior) -> Result<Displaced> {
        let _ = (t, state, prior);
        // Rows of the delta method are not asked for it.
        Ok(z.zeros_like().into())
    }
    /// What is to be averaged over the evaluations beside the gradient; by default what the evaluation gave. With
    /// [`Statistic::Price`](crate::Statistic::Price) the first is linear in the gradient and others are of second
    /// degree, without a statistic all are: so they are scaled where the gradient of several ranks is, to its limit.
    ///
    /// # Errors
    /// If libtorch fails.
    fn statistics(&self, x: &Evaluated, state: &[Tensor]) -> Result<Vec<Tensor>> {
        let _ = state;
        Ok(x.second.iter().map(Tensor::shallow_clone).collect())
    }
    /// The new mean and state of a block.
    ///
    /// # Errors
    /// [`Error::NotPositiveDefinite`](crate::Error::NotPositiveDefinite)
    fn update(&self, when: When, x: &Block, state: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)>;
    /// The posterior.
    ///
    /// # Errors
    /// No effective sample size, or a precision that is not positive definite.
    fn posterior(blocks: Vec<Learned<Self>>) -> Result<Self::Posterior>;
}

//! What an elementwise row has to say: its update as pure functions of the numbers at one weight. Neither tensors nor
//! the driver appear here; rows over blocks are in `block_rule.rs`.

use super::row::{NoPosterior, Row, When, none};
use crate::kernel::{Pack, Real};
use crate::posterior::{DiagonalGaussian, MeanFieldBernoulli};
use crate::{Link, Result, Statistic};
use tch::Tensor;

/// What an update sees of one weight, beside the row's own state. All on the scale of the mean loss L.
#[derive(Debug, Clone, Copy)]
pub struct Site<T> {
    /// m, the weight itself: the mean of the posterior.
    pub mean: T,
    /// ĝ, the gradient of the loss (without the prior), averaged over samples and micro-batches.
    pub gradient: T,
    /// The row's [`Statistic`](crate::Statistic), averaged likewise; 0 for
    /// [`Statistic::Unused`](crate::Statistic::Unused).
    pub curvature: T,
    /// m₀, the mean of the prior.
    pub prior_mean: T,
    /// δ = prior precision / ess, also known as weight decay.
    pub delta: T,
}

/// What a parameter's state may start from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Start {
    /// Whether the prior is a posterior, with a precision of its own.
    pub posterior_prior: bool,
    /// Root mean square of the parameter's weights when the optimizer first saw them; 0 of an empty parameter.
    pub rms: f64,
}

/// An elementwise row: its update as pure functions of numbers.
///
/// The update is written once over [`Real`] and runs on raw memory and on tensors alike. Implement this trait and
/// [`Row`] to add a row of your own; everything else comes with the driver.
///
/// `State<T>` is `[T; N]` with one element per name in [`Row::STATE`]. `Coefficients<T>` holds what is the same for all
/// weights of a parameter, computed in f64 once a step and rounded once.
///
/// The functions over [`Real`] are what the loop over the weights consists of. Mark them `#[inline(always)]`: one that
/// the compiler leaves as a call has neither the loop's vectors nor its registers, and takes several times as long.
///
/// A row that limits each weight's step:
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use tch_blr::Result;
/// use tch_blr::rule::{DeltaRule, NoPosterior, Real, Row, Rule, Site, Start, Weights, When};
///
/// #[derive(Debug, Clone, Copy, Serialize, Deserialize)]
/// struct Limited {
///     largest: f64,
/// }
///
/// impl Row for Limited {
///     const NAME: &'static str = "limited";
///     const STATE: &'static [&'static str] = &[];
///     type Arithmetic = Weights;
///     type Posterior = NoPosterior;
///     fn validate(&self) -> Result<()> {
///         Ok(())
///     }
/// }
///
/// impl Rule for Limited {
///     type State<T: Real> = [T; 0];
///     type Coefficients<T: Real> = [T; 2];
///
///     fn initial(&self, _: Start) -> [f64; 0] {
///         []
///     }
///     fn coefficients(&self, when: When) -> [f64; 2] {
///         [when.lr, self.largest]
///     }
///     #[inline(always)]
///     fn update<T: Real>(&self, [lr, largest]: [T; 2], x: Site<T>, _: [T; 0]) -> (T, [T; 0]) {
///         (x.mean - lr * x.gradient.min(largest).max(-largest), [])
///     }
/// }
/// impl DeltaRule for Limited {}
///
/// # fn main() -> Result<()> {
/// let vs = tch::nn::VarStore::new(tch::Device::Cpu);
/// let w = vs.root().zeros("w", &[1]);
/// let mut opt = Limited { largest: 1.0 }.builder().build(&vs, 0.5)?;
/// opt.step(|| (&w * 7.0).sum(tch::Kind::Float))?;
/// assert_eq!(w.double_value(&[0]), -0.5);
/// # Ok(())
/// # }
/// ```
pub trait Rule: Row<Arithmetic = super::Weights, Posterior: OfWeights> {
    /// `[T; N]`, one element per name in [`Row::STATE`]; N is at most 8.
    type State<T: Real>: Pack<T>;
    /// `[T; K]`: what [`Rule::coefficients`] computes; K is at most 16.
    type Coefficients<T: Real>: Pack<T>;

    /// Which of [`Statistic::SquaredGradient`], [`Statistic::Price`] and [`Statistic::Relaxed`] settings of this row
    /// can ask for: the driver compiles a pass over the weights for each.
    const FORMED: &'static [Statistic] = &[];

    /// What the variables hold: the mean that is learned itself, or binary weights.
    fn link(&self) -> Link {
        Link::Identity
    }
    /// State before the first update.
    fn initial(&self, start: Start) -> Self::State<f64>;
    /// Whether these settings keep the state `STATE[state]`. A state that is not kept costs no memory: an update reads
    /// its initial value, and what it makes of it is dropped.
    fn keeps(&self, state: usize) -> bool {
        let _ = state;
        true
    }
    /// What all weights of a parameter share in its t-th update.
    fn coefficients(&self, when: When) -> Self::Coefficients<f64>;
    /// The new mean and state of one weight.
    fn update<T: Real>(&self, k: Self::Coefficients<T>, x: Site<T>, state: Self::State<T>) -> (T, Self::State<T>);
    /// Precision 1/σ² of the noise at one weight; that of the posterior with the settings of [`Row::undamped`]. Rows
    /// without a posterior are a point mass.
    fn precision<T: Real>(&self, k: Self::Coefficients<T>, delta: T, state: Self::State<T>) -> T {
        let _ = (k, delta, state);
        T::real(f64::INFINITY)
    }
    /// Where the loss is evaluated: from the mean (λ in binary rows), the noise z of the row's [`Link`] and its sign,
    /// ±1.
    fn point<T: Real>(&self, k: Self::Coefficients<T>, mean: T, z: T, sign: T, delta: T, state: Self::State<T>) -> T {
        mean + sign * z / self.precision(k, delta, state).sqrt()
    }
    /// ε of [`Expectation::Adversarial`](crate::Expectation::Adversarial) at one weight: how far from the mean the
    /// second evaluation takes place. `gradient` is ĝ₁, that of the first evaluation, and `norm` is ‖ĝ₁‖₂ over all
    /// trainable parameters, or infinite if it vanishes, so that ĝ₁/‖ĝ₁‖ is then 0. Rows with another expectation are
    /// not asked.
    fn adversarial<T: Real>(
        &self,
        k: Self::Coefficients<T>,
        gradient: T,
        norm: T,
        delta: T,
        state: Self::State<T>,
    ) -> T {
        let _ = (k, gradient, norm, delta, state);
        T::real(0.0)
    }
}

/// Rows that evaluate the loss once, at the mean (delta method), and need nothing but its gradient, so that tch's own
/// `backward_step(&loss)` suffices: SGD, RMSprop, Adam, AdamW.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot step from a loss that is computed already",
    label = "this row needs the loss at points of its own choice",
    note = "let the step compute it: `opt.step(|| net.loss(&batch))?`; a loop that cannot use a closure: \
            `let evaluation = opt.perturbed()?`, then the loss, then `evaluation.step(loss)?`"
)]
pub trait DeltaRule: Rule {}

/// A posterior over single weights, independent under it: what an elementwise row can have.
pub trait OfWeights: super::row::MaybePosterior {
    /// From name and mean (or the natural parameter of binary weights) of each trainable parameter;
    /// `precision(i)` computes the precision of number i, of which `learned` is the share that was learned, and what
    /// its noise has beyond that, the damping.
    ///
    /// # Errors
    /// Those of `precision`, and of a posterior that does not exist.
    fn of_weights(
        means: Vec<(&str, Tensor)>,
        precision: &dyn Fn(usize) -> Result<(Tensor, f64)>,
        learned: Option<f64>,
    ) -> Result<Self>;
}

impl OfWeights for DiagonalGaussian {
    fn of_weights(
        means: Vec<(&str, Tensor)>,
        precision: &dyn Fn(usize) -> Result<(Tensor, f64)>,
        learned: Option<f64>,
    ) -> Result<Self> {
        let (mut entries, mut dampings) = (Vec::new(), Vec::new());
        for (i, (name, mean)) in means.into_iter().enumerate() {
            let (s, damping) = precision(i)?;
            entries.push((name, mean, s));
            dampings.push(damping);
        }
        Ok(DiagonalGaussian::sharing(entries)?.with_dampings(dampings).with_learned(learned))
    }
}

impl OfWeights for MeanFieldBernoulli {
    fn of_weights(
        means: Vec<(&str, Tensor)>,
        _: &dyn Fn(usize) -> Result<(Tensor, f64)>,
        _: Option<f64>,
    ) -> Result<Self> {
        MeanFieldBernoulli::new(means)
    }
}

impl OfWeights for NoPosterior {
    fn of_weights(_: Vec<(&str, Tensor)>, _: &dyn Fn(usize) -> Result<(Tensor, f64)>, _: Option<f64>) -> Result<Self> {
        Err(none())
    }
}

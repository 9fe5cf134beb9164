//! The driver that all rows share: perturb → closure → differentiate → estimate → update.
//!
//! One step of [`Optimizer::step`], and the file of each station:
//!
//! ```text
//! step_chunks          compiled.rs    the loop: prepare, evaluate, finish
//! ├─ prepare           step.rs        late variables, checks; weights that were changed from outside
//! ├─ evaluate          step.rs        for each point of the row's expectation:
//! │  ├─ begin          step.rs        tape on; perturb: the variables go to m+e
//! │  │  └─ perturb     weights.rs, blocks.rs
//! │  ├─ closure        yours          the loss there
//! │  └─ end            step.rs        differentiate; finite? clip; with several points, the mean comes back
//! │     └─ ascend      weights.rs     SAM: from the first point's gradient to the second point
//! └─ finish → apply    step.rs        averages, then one update, which brings the mean back
//!    └─ update         weights.rs     Rule::update on every weight, in one pass of the kernel (programs.rs)
//!                      blocks.rs      BlockRule::update on every block; all, or none if one fails
//! ```
//!
//! A row says what is particular to it ([`Row`], then [`Rule`] or [`BlockRule`]); [`arithmetic::Arithmetic`] is what
//! the driver asks of the two kinds of rows, and nothing else in this folder tells them apart.
//!
//! Here belongs what all rows share. No row is known by name, and no likelihood or layer is looked into: what a loss
//! has recorded on the tape goes to [`crate::curvature`], and elementwise passes go to [`crate::kernel`].

mod advice;
mod arithmetic;
mod average;
mod block_rule;
mod blocks;
mod builder;
mod checkpoint;
mod compiled;
mod diagnostics;
mod divergence;
mod evaluation;
mod from_grad;
mod known;
mod lr_find;
mod output;
mod packed;
mod prior;
mod programs;
mod pruned;
mod ranks;
mod row;
mod rule;
mod second;
mod settings;
mod skip;
mod slot;
mod step;
mod sums;
mod together;
mod train;
mod trial;
mod unseen;
mod weights;

pub use advice::Advice;
pub(crate) use arithmetic::rms;
pub use arithmetic::{Arithmetic, Blocks, Weights};
pub use block_rule::{Block, BlockRule, Displaced, Evaluated, Learned};
pub use builder::Builder;
pub use diagnostics::{Diagnostics, Fallback, Sigma, Spread};
pub use evaluation::Evaluation;
pub use lr_find::LrRange;
pub use row::{Decay, MaybePosterior, NoPosterior, Row, When};
pub use rule::{DeltaRule, OfWeights, Rule, Site, Start};
pub use step::{Derivatives, Outcome};
pub use train::Train;

use crate::gradient::{Clip, IntoTensor};
use crate::kernel::Noise;
use crate::posterior::{DiagonalGaussian, Posterior};
use crate::{Params, Prior, Result, Schedule};
use arithmetic::Unit;
use compiled::Compiled;
use divergence::Divergence;
use ranks::Ranks;
use skip::Skips;
use sums::Sums;
use tch::Tensor;

/// An optimizer: one row of the table ([`Row`]) over the parameters of a model.
///
/// Built as tch builds its own, `Ivon::default().ess(60_000.0).build(&vs, 0.1)`. The step takes a closure, because some
/// rows evaluate the loss at samples of the posterior; the same line serves every row:
///
/// ```
/// # use tch::{nn, nn::Module, Device, Kind, Tensor};
/// use tch_blr::Ivon;
/// # fn main() -> tch_blr::Result<()> {
/// # let (x, y) = (Tensor::randn([8, 4], (Kind::Float, Device::Cpu)), Tensor::zeros([8], (Kind::Int64, Device::Cpu)));
/// let vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root(), 4, 3, Default::default());
/// let mut opt = Ivon::default().ess(1000.0).build(&vs, 0.1)?;
/// let loss = opt.step(|| net.forward(&x).cross_entropy_for_logits(&y))?;
/// # assert!(loss > 0.0);
/// # Ok(())
/// # }
/// ```
///
/// Outside of [`Optimizer::step`] the variables hold the mean of the posterior, so evaluating, saving and freezing need
/// no ceremony. Frozen variables and variables that the loss does not depend on are left alone. If a call returns an
/// error, weights, state, accumulators and the position in the noise are as before; only what the closure itself
/// changes (batch-norm statistics, libtorch's own generator in dropout) is outside of that promise.
#[derive(Debug)]
pub struct Optimizer<R: Row> {
    params: Params,
    units: Vec<Unit<R>>,
    config: R,
    lr: f64,
    prior: Option<Prior>,
    overrides: Vec<builder::Override<R>>,
    noise: Noise,
    schedule: Schedule,
    clip: Option<Clip>,
    check_finite: bool,
    skip_unseen: bool,
    /// True for weights that are not there in this step, by parameter.
    pruned: Vec<Option<Tensor>>,
    skips: Skips,
    divergence: Option<Divergence>,
    clipped: Clipped,
    steps: u64,
    /// Evaluations since the last update.
    sums: Sums,
    last: Option<Last>,
    compiled: &'static Compiled<R>,
    /// The most layer calls on a tape that was compared with the true gradient; 0 if none was, and batch-norm was not
    /// looked for.
    taps_checked: usize,
    /// The others of a data-parallel training; `None` for a process alone.
    ranks: Option<Ranks>,
}

/// How often the limit on the gradient's norm was reached.
#[derive(Debug, Clone, Copy, Default)]
struct Clipped {
    updates: u64,
    cut: u64,
}

/// What the last update was made from.
#[derive(Debug, Clone, Copy)]
struct Last {
    loss: f64,
    gradient_norm: f64,
    lr: f64,
}

impl<R: Row> Optimizer<R> {
    /// Evaluates the loss (once, or at each sample), updates the weights, and returns the mean loss, with what was
    /// accumulated before.
    ///
    /// The closure returns the batch's mean loss (0-dim) or its B per-example losses (1-D), without the prior, as a
    /// [`Tensor`] or a `Result<Tensor, E>`. It is called once per point of the row's
    /// [`Expectation`](crate::Expectation): once per sample, twice in the adversarial rows, whose loss is the second
    /// one's.
    ///
    /// # Errors
    /// The closure's own error, a loss of another shape or without a graph, a loss or gradient that is not finite,
    /// parameters that changed kind or device. Nothing has changed then.
    pub fn step<L: IntoTensor>(&mut self, mut closure: impl FnMut() -> L) -> Result<f64> {
        self.step_chunks(1, |_| closure())
    }

    /// As [`Optimizer::step`] on a batch in chunks: the closure returns the loss of chunk 0, 1, … `chunks`-1. Each
    /// chunk has its own points, and the gradients are averaged (as in [`Optimizer::accumulate`]) for one update.
    ///
    /// In [`Sam`](crate::Sam) and its relatives that is m-sharpness, with m = `chunks`: each chunk has its own
    /// perturbation and its own gradient there. In rows that draw samples, each chunk has its own samples. In rows that
    /// evaluate at the mean, chunks save memory and change nothing else.
    ///
    /// ```
    /// # use tch::{nn, nn::Module, Device, Kind, Tensor};
    /// # use tch_blr::Sam;
    /// # fn main() -> tch_blr::Result<()> {
    /// # let x = Tensor::randn([8, 4], (Kind::Float, Device::Cpu));
    /// # let y = Tensor::zeros([8], (Kind::Int64, Device::Cpu));
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root(), 4, 3, Default::default());
    /// let mut opt = Sam::default().build(&vs, 0.1)?;
    /// let (xs, ys) = (x.chunk(4, 0), y.chunk(4, 0));
    /// opt.step_chunks(4, |k| net.forward(&xs[k]).cross_entropy_for_logits(&ys[k]))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// No chunk, and as [`Optimizer::step`].
    pub fn step_chunks<L: IntoTensor>(&mut self, chunks: usize, mut closure: impl FnMut(usize) -> L) -> Result<f64> {
        (self.compiled.step_chunks)(self, chunks, &mut |k| closure(k).into_tensor())
    }

    /// Evaluates the loss of one micro-batch at fresh samples and keeps the gradients for the next
    /// [`Optimizer::step`] or [`Optimizer::update`]. Returns its loss.
    ///
    /// Micro-batches count by their number of examples if the closure returns per-example losses, otherwise equally.
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    pub fn accumulate<L: IntoTensor>(&mut self, mut closure: impl FnMut() -> L) -> Result<f64> {
        (self.compiled.accumulate)(self, &mut |_| closure().into_tensor())
    }

    /// Updates the weights from what was accumulated since the last update, and returns its mean loss; NaN, and nothing
    /// else, if all of it was left out ([`Builder::skip_non_finite`]).
    ///
    /// # Errors
    /// If nothing was accumulated, or parameters changed kind or device.
    pub fn update(&mut self) -> Result<f64> {
        (self.compiled.update)(self)
    }

    /// Perturbs the weights for a loop that cannot use a closure: compute the loss while the returned guard lives, and
    /// hand it to [`Evaluation::step`]. One evaluation per call; for a row of several samples hand all losses but the
    /// last to [`Evaluation::backward`], and for a row of two points the first loss to [`Evaluation::ascend`]. Tapped
    /// layers ([`crate::nn`]) record while the guard lives, on this thread.
    ///
    /// ```
    /// # use tch::{nn, nn::Module, Device, Kind, Tensor};
    /// # use tch_blr::Ivon;
    /// # fn main() -> tch_blr::Result<()> {
    /// # let x = Tensor::randn([8, 4], (Kind::Float, Device::Cpu));
    /// # let y = Tensor::zeros([8], (Kind::Int64, Device::Cpu));
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root(), 4, 3, Default::default());
    /// # let mut opt = Ivon::default().ess(1000.0).build(&vs, 0.1)?;
    /// let evaluation = opt.perturbed()?;
    /// let loss = net.forward(&x).cross_entropy_for_logits(&y);
    /// evaluation.step(loss)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    pub fn perturbed(&mut self) -> Result<Evaluation<'_, R>> {
        let begun = (self.compiled.perturbed)(self)?;
        Ok(Evaluation::new(self, begun))
    }
}

// The bounds of this block and the next are on the methods: there the compiler says what to write instead.

/// tch's own forms, for the rows that evaluate the loss at the mean only.
///
/// ```compile_fail,E0277
/// # use tch::{nn, Device, Tensor};
/// # use tch_blr::Ivon;
/// # fn f(loss: Tensor, vs: nn::VarStore) -> tch_blr::Result<()> {
/// // IVON needs the gradient at a sample, so a loss that is already computed does not suffice.
/// Ivon::default().ess(1000.0).build(&vs, 0.1)?.backward_step(&loss)?;
/// # Ok(())
/// # }
/// ```
impl<R: Row> Optimizer<R> {
    /// Updates the weights from a loss (0-dim, or 1-D per example) that was computed at the current weights.
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    pub fn backward_step(&mut self, loss: &Tensor) -> Result<f64>
    where
        R: DeltaRule,
    {
        self.step(|| loss.shallow_clone())
    }

    /// [`Optimizer::backward_step`] with every element of the gradient limited to ±max.
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    pub fn backward_step_clip(&mut self, loss: &Tensor, max: f64) -> Result<f64>
    where
        R: DeltaRule,
    {
        self.backward_step_clipped(loss, Clip::Value(max))
    }

    /// [`Optimizer::backward_step`] with the global L2 norm of the gradient limited to max.
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    pub fn backward_step_clip_norm(&mut self, loss: &Tensor, max: f64) -> Result<f64>
    where
        R: DeltaRule,
    {
        self.backward_step_clipped(loss, Clip::Norm(max))
    }

    fn backward_step_clipped(&mut self, loss: &Tensor, clip: Clip) -> Result<f64>
    where
        R: DeltaRule,
    {
        self.told(clip.validate())?;
        // For one step only, and put back also after an error.
        let usual = self.clip.replace(clip);
        let result = self.step(|| loss.shallow_clone());
        self.clip = usual;
        result
    }
}

/// Rows with a posterior.
///
/// ```compile_fail,E0277
/// # use tch::{nn, Device};
/// # use tch_blr::Sgd;
/// # fn f(vs: nn::VarStore) -> tch_blr::Result<()> {
/// // SGD's covariance is fixed by assumption, so there is nothing to ask for.
/// Sgd::default().build(&vs, 0.1)?.posterior()?;
/// # Ok(())
/// # }
/// ```
impl<R: Row> Optimizer<R> {
    /// The posterior over the trainable parameters: an owned copy, in f64 for f64 weights (and in all rows with a full
    /// covariance) and otherwise in f32. Its precision is that of q itself, for example ess·(h+δ), and not divided by
    /// ess; each row's documentation has the formula. The damping of rows that have one is no part of it, but of its
    /// samples ([`DiagonalGaussian::damping`]); with damping it is at least the prior's, since of h+δ+γ > 0 no more
    /// than h+δ is known, and the estimate h by Price's theorem may be negative. Frozen parameters are not in it.
    ///
    /// A parameter that no loss has depended on yet (a head of a later task) still has its initial precision, which
    /// under an isotropic prior includes `hess_init`; leave it out with
    /// [`DiagonalGaussian::select`](crate::DiagonalGaussian::select).
    ///
    /// # Errors
    /// No effective sample size (RMSprop and Adam have none by default), or a precision that is not positive (Adam
    /// before its first step) or not positive definite.
    pub fn posterior(&self) -> Result<R::Posterior>
    where
        R::Posterior: Posterior,
    {
        self.posterior_or_none()
    }
}

impl<R: Rule<Posterior = DiagonalGaussian>> Optimizer<R> {
    /// What is known of the weights: the posterior without what its precision started from, the initial Hessian h₀, and
    /// without damping.
    ///
    /// ```text
    /// precision = P₀ + max(0, (S - β₂ᵗS₀)/(1-β₂ᵗ) - λδ) = P₀ + λ max(0, (h - β₂ᵗh₀)/(1-β₂ᵗ))
    /// ```
    ///
    /// with the precision S = λ(h+δ) of [`Optimizer::posterior`] after t updates, S₀ before the first, and that of the
    /// prior, P₀ = λδ. It is what to hand to the next task as its prior and to merge. Without data it is the prior,
    /// and so is that of parameters that no loss has depended on. It is much wider than [`Optimizer::posterior`] where
    /// the data say little, often too wide to predict with: weights that are free one by one are not free together.
    ///
    /// An estimate: where f is noisy (Price's theorem at single samples), max(0, ·) leaves half of the noise; and h is
    /// kept in f32, whose rounding, some 10⁻⁷ of h₀ in every step, is divided by 1-β₂ᵗ like the rest. β₂, `ess`,
    /// `hess_init` and `relative_noise` are taken as they are now, so do not change them in between.
    ///
    /// # Errors
    /// Those of [`Optimizer::posterior`]; a row whose precision is no such average (RMSprop, Adam);
    /// [`Builder::skip_unseen`], under which each weight has a t of its own that nobody has counted; a precision of 0,
    /// where neither prior nor data say anything.
    pub fn learned_posterior(&self) -> Result<DiagonalGaussian> {
        (self.compiled.learned_posterior)(self)
    }
}

impl<R: Row> Optimizer<R> {
    fn posterior_or_none(&self) -> Result<R::Posterior> {
        (self.compiled.posterior)(self)
    }
}

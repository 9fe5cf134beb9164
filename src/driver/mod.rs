//! The driver that all rows share: perturb → closure → estimate → update.

mod builder;
mod evaluate;
mod programs;
mod settings;
mod slot;
mod state;
mod sums;

pub use builder::Builder;
pub(crate) use builder::Override;
pub use evaluate::Derivatives;
pub use settings::{Diagnostics, Sigma};

use crate::gradient::{Clip, IntoTensor};
use crate::kernel::{self, Field, Job, Noise};
use crate::params::Leaf;
use crate::posterior::DiagonalGaussian;
use crate::rows::{DeltaRule, GaussianRule, Rule, When};
use crate::{Curvature, Error, Params, Prior, Result, Schedule, check};
use programs::{Displacement, Given, Relaxed, Square, Statistic, Update};
use slot::Slot;
use sums::Sums;
use tch::Tensor;

/// An optimizer: one row of the table ([`Rule`]) over the parameters of a model.
///
/// Built as tch builds its own, `Ivon::default().ess(60_000.0).build(&vs, 0.1)`. The step takes a closure, because some
/// rows evaluate the loss at samples of the posterior; the same line serves every row:
///
/// ```
/// # use tch::{nn, nn::Module, Device, Kind, Tensor};
/// use tch_blr::{Ivon, Rule};
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
pub struct Optimizer<R: Rule> {
    params: Params,
    slots: Vec<Slot<R>>,
    config: R,
    prior: Option<Prior>,
    overrides: Vec<builder::Override<R>>,
    noise: Noise,
    schedule: Schedule,
    clip: Option<Clip>,
    check_finite: bool,
    steps: u64,
    /// Evaluations since the last update.
    sums: Sums,
    last: Option<Last>,
    /// Whether per-example gradients were compared with the true gradient, and batch-norm was looked for.
    taps_checked: bool,
}

/// What the last update was made from.
#[derive(Debug, Clone, Copy)]
struct Last {
    loss: f64,
    gradient_norm: f64,
}

impl<R: Rule> Optimizer<R> {
    /// Evaluates the loss (once, or at each sample), updates the weights, and returns the mean loss, with what was
    /// accumulated before.
    ///
    /// The closure returns the batch's mean loss (0-dim) or its B per-example losses (1-D), as a [`Tensor`] or a
    /// `Result<Tensor, E>`, without the prior. It is called once per point of the row's
    /// [`Expectation`](crate::Expectation): once per sample, twice in the adversarial rows, whose loss is the second one's.
    ///
    /// # Errors
    /// The closure's own error, a loss of another shape or without a graph, a loss or gradient that is not finite,
    /// parameters that changed kind or device. Nothing has changed then.
    pub fn step<L: IntoTensor>(&mut self, mut closure: impl FnMut() -> L) -> Result<f64> {
        self.step_chunks(1, |_| closure())
    }

    /// As [`Optimizer::step`] on a batch in chunks: the closure returns the loss of chunk 0, 1, … `chunks`-1, each of which
    /// has its own points, and the gradients are averaged (as in [`Optimizer::accumulate`]) for one update.
    ///
    /// In [`Sam`](crate::Sam) and its relatives that is m-sharpness, with m = `chunks`: each chunk has its own perturbation
    /// and its own gradient there. In rows that draw samples each chunk has its own. In rows that evaluate at the mean, it
    /// saves memory and changes nothing else.
    ///
    /// ```
    /// # use tch::{nn, nn::Module, Device, Kind, Tensor};
    /// # use tch_blr::{Sam, Rule};
    /// # fn main() -> tch_blr::Result<()> {
    /// # let (x, y) = (Tensor::randn([8, 4], (Kind::Float, Device::Cpu)), Tensor::zeros([8], (Kind::Int64, Device::Cpu)));
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
    pub fn step_chunks<L: IntoTensor>(&mut self, chunks: usize, closure: impl FnMut(usize) -> L) -> Result<f64> {
        check::count("chunks", chunks)?;
        self.prepare()?;
        let sums = self.evaluate(chunks, closure)?;
        self.finish(sums)
    }

    /// Evaluates the loss of one micro-batch at fresh samples and keeps the gradients for the next
    /// [`Optimizer::step`] or [`Optimizer::update`]. Returns its loss.
    ///
    /// Micro-batches count by their number of examples if the closure returns per-example losses, else equally.
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    pub fn accumulate<L: IntoTensor>(&mut self, mut closure: impl FnMut() -> L) -> Result<f64> {
        self.prepare()?;
        let sums = self.evaluate(1, |_| closure())?;
        self.keep(sums)
    }

    /// Updates the weights from what was accumulated since the last update, and returns its mean loss.
    ///
    /// # Errors
    /// If nothing was accumulated, or parameters changed kind or device.
    pub fn update(&mut self) -> Result<f64> {
        if self.sums.weight == 0.0 {
            return Err(Error::Loss("none was evaluated since the last update; call step or accumulate".to_owned()));
        }
        self.params.check()?;
        let sums = std::mem::take(&mut self.sums);
        Ok(self.apply(&sums, Given))
    }

    /// The evaluations of the chunks of one micro-batch. The curvature statistics of a single one are left unformed.
    fn evaluate<L: IntoTensor>(&mut self, chunks: usize, mut closure: impl FnMut(usize) -> L) -> Result<Sums> {
        let mut sums = Sums::default();
        let each = self.config.expectation().evaluations();
        let evaluations = each.saturating_mul(chunks as u64);
        for k in 0..evaluations {
            let mut loss = || closure((k / each) as usize);
            let mut begun = self.begin(self.sums.evaluations + k)?;
            if begun.first {
                let (k, first) = (begun.k, self.end(begun, loss())?);
                begun = self.ascend(k, &first)?;
            }
            let mut one = self.end(begun, loss())?;
            if evaluations > 1 {
                self.form(&mut one);
            }
            sums.merge(one)?;
        }
        Ok(sums)
    }

    /// Adds what [`Optimizer::evaluate`] found to what was accumulated; returns its loss.
    fn keep(&mut self, mut sums: Sums) -> Result<f64> {
        if sums.evaluations == 1 {
            self.form(&mut sums);
        }
        let loss = sums.loss;
        self.sums.merge(sums)?;
        Ok(loss)
    }

    /// Updates the weights from what [`Optimizer::evaluate`] found, with what was accumulated before.
    fn finish(&mut self, sums: Sums) -> Result<f64> {
        if self.sums.weight > 0.0 {
            self.keep(sums)?;
            let sums = std::mem::take(&mut self.sums);
            return Ok(self.apply(&sums, Given));
        }
        Ok(match self.config.curvature() {
            Curvature::SquaredGradient if sums.evaluations == 1 => self.apply(&sums, Square),
            Curvature::Price if sums.evaluations == 1 => self.apply(&sums, Displacement),
            Curvature::Relaxed if sums.evaluations == 1 => self.apply(&sums, Relaxed),
            _ => self.apply(&sums, Given),
        })
    }

    fn apply<S: Statistic>(&mut self, sums: &Sums, statistic: S) -> f64 {
        let _no_grad = tch::no_grad_guard();
        let factor = self.schedule.factor(self.steps);
        self.follow();
        let gradient = |i: usize, leaf: &Leaf| sums.gradients.get(i)?.as_ref().filter(|_| leaf.trainable());
        let curvature = |i: usize| sums.curvature.get(i)?.as_ref();
        let leaves = self.params.leaves().iter().enumerate();
        kernel::run(self.slots.iter().zip(leaves.clone()).filter_map(|(slot, (i, leaf))| {
            let mean = slot.mean(leaf);
            let c = if S::AT_POINT { slot.point.as_ref() } else { curvature(i) };
            let c = c.map_or(Field::Number(0.0), Field::Tensor);
            let gradient = Field::Tensor(gradient(i, leaf)?);
            Some(Job {
                f: Update { pass: slot.next(factor), statistic },
                inputs: slot.with_state([Field::Tensor(mean), gradient, c, slot.prior_mean(), slot.delta()]),
                outputs: std::iter::once(Some(mean)).chain(slot.state.iter().map(Option::as_ref)).collect(),
            })
        }));
        for (slot, (i, leaf)) in self.slots.iter_mut().zip(leaves) {
            if gradient(i, leaf).is_some() {
                if let Some(mean) = &slot.mean {
                    leaf.tensor.shallow_clone().copy_(&slot.config.link().weight(mean));
                }
                kernel::note_write(&leaf.tensor);
                slot.steps += 1;
            }
        }
        self.steps += 1;
        self.last = Some(Last { loss: sums.loss, gradient_norm: sums.gradient_norm });
        sums.loss
    }

    /// Perturbs the weights for a loop that cannot use a closure: compute the loss while the returned guard lives, and hand
    /// it to [`Evaluation::step`]. One evaluation per call; for a row of several samples hand all losses but the last to
    /// [`Evaluation::backward`], and for a row of two points the first loss to [`Evaluation::ascend`]. Tapped layers
    /// ([`crate::nn`]) record while the guard lives, on this thread.
    ///
    /// ```
    /// # use tch::{nn, nn::Module, Device, Kind, Tensor};
    /// # use tch_blr::{Ivon, Rule};
    /// # fn main() -> tch_blr::Result<()> {
    /// # let (x, y) = (Tensor::randn([8, 4], (Kind::Float, Device::Cpu)), Tensor::zeros([8], (Kind::Int64, Device::Cpu)));
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
        self.prepare()?;
        let begun = self.begin(self.sums.evaluations)?;
        Ok(Evaluation { optimizer: self, begun })
    }
}

/// Weights at a point of the row's [`Expectation`](crate::Expectation), waiting for the loss there; dropped without one,
/// nothing has happened.
#[must_use = "the weights go back to their mean as soon as this is dropped"]
pub struct Evaluation<'a, R: Rule> {
    optimizer: &'a mut Optimizer<R>,
    begun: evaluate::Begun,
}

impl<R: Rule> std::fmt::Debug for Evaluation<'_, R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Evaluation").field("steps", &self.optimizer.steps).finish_non_exhaustive()
    }
}

impl<R: Rule> Evaluation<'_, R> {
    /// For the rows that evaluate the loss at two points ([`Sam`](crate::Sam) and its relatives): differentiates the first
    /// loss, and moves the weights to the second point, where they wait for the loss on the same batch.
    ///
    /// ```
    /// # use tch::{nn, nn::Module, Device, Kind, Tensor};
    /// # use tch_blr::{Sam, Rule};
    /// # fn main() -> tch_blr::Result<()> {
    /// # let (x, y) = (Tensor::randn([8, 4], (Kind::Float, Device::Cpu)), Tensor::zeros([8], (Kind::Int64, Device::Cpu)));
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root(), 4, 3, Default::default());
    /// # let mut opt = Sam::default().build(&vs, 0.1)?;
    /// let evaluation = opt.perturbed()?;
    /// let loss = net.forward(&x).cross_entropy_for_logits(&y);
    /// let evaluation = evaluation.ascend(loss)?;
    /// let loss = net.forward(&x).cross_entropy_for_logits(&y);
    /// evaluation.step(loss)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// If the weights are not at the first of two points, and as [`Optimizer::step`]. Nothing has changed then.
    pub fn ascend<L: IntoTensor>(self, loss: L) -> Result<Self> {
        self.at_first(true)?;
        let Evaluation { optimizer, begun } = self;
        let (k, first) = (begun.k, optimizer.end(begun, loss)?);
        let begun = optimizer.ascend(k, &first)?;
        Ok(Evaluation { optimizer, begun })
    }

    /// As [`Evaluation::ascend`] with derivatives that were computed elsewhere at the perturbed weights.
    ///
    /// # Errors
    /// As [`Evaluation::ascend`] and [`Evaluation::step_with`].
    pub fn ascend_with(self, derivatives: Derivatives) -> Result<Self> {
        self.at_first(true)?;
        let Evaluation { optimizer, begun } = self;
        let (k, first) = (begun.k, optimizer.end_with(begun, derivatives)?);
        let begun = optimizer.ascend(k, &first)?;
        Ok(Evaluation { optimizer, begun })
    }

    /// Errors unless the weights are (or are not) at the first of two points.
    fn at_first(&self, expected: bool) -> Result<()> {
        let problem = match (self.begun.first, expected) {
            (true, false) => {
                "this row evaluates the loss at two points, and the weights are at the first: hand its loss to \
                 Evaluation::ascend, and the one at the second point here"
            }
            (false, true) => {
                "the weights are at no first of two points: hand their loss to Evaluation::step or backward"
            }
            _ => return Ok(()),
        };
        Err(Error::Loss(problem.to_owned()))
    }

    /// Differentiates the loss that was computed at the perturbed weights, brings the mean back, updates the weights (with
    /// what was accumulated before), and returns the mean loss.
    ///
    /// # Errors
    /// If the weights are at the first of two points ([`Evaluation::ascend`]), and as [`Optimizer::step`].
    pub fn step<L: IntoTensor>(self, loss: L) -> Result<f64> {
        self.at_first(false)?;
        let Evaluation { optimizer, begun } = self;
        let sums = optimizer.end(begun, loss)?;
        optimizer.finish(sums)
    }

    /// As [`Evaluation::step`], but only keeps the gradients for [`Optimizer::update`]: for rows of several samples, and
    /// for micro-batches. Returns this loss.
    ///
    /// # Errors
    /// As [`Evaluation::step`].
    pub fn backward<L: IntoTensor>(self, loss: L) -> Result<f64> {
        self.at_first(false)?;
        let Evaluation { optimizer, begun } = self;
        let sums = optimizer.end(begun, loss)?;
        optimizer.keep(sums)
    }

    /// As [`Evaluation::step`] with derivatives that were computed elsewhere at the perturbed weights, for example summed
    /// over processes.
    ///
    /// # Errors
    /// Another number of tensors or other shapes, a loss or gradient that is not finite, weights at the first of two points.
    /// Nothing has changed then.
    pub fn step_with(self, derivatives: Derivatives) -> Result<f64> {
        self.at_first(false)?;
        let Evaluation { optimizer, begun } = self;
        let sums = optimizer.end_with(begun, derivatives)?;
        optimizer.finish(sums)
    }

    /// As [`Evaluation::backward`] with derivatives that were computed elsewhere at the perturbed weights.
    ///
    /// # Errors
    /// As [`Evaluation::step_with`].
    pub fn backward_with(self, derivatives: Derivatives) -> Result<f64> {
        self.at_first(false)?;
        let Evaluation { optimizer, begun } = self;
        let sums = optimizer.end_with(begun, derivatives)?;
        optimizer.keep(sums)
    }
}

/// tch's own forms, for the rows that evaluate the loss at the mean only.
///
/// ```compile_fail
/// # use tch::{nn, Device, Tensor};
/// # use tch_blr::{Ivon, Rule};
/// # fn f(loss: Tensor, vs: nn::VarStore) -> tch_blr::Result<()> {
/// // IVON needs the gradient at a sample, so a loss that is already computed does not suffice.
/// Ivon::default().ess(1000.0).build(&vs, 0.1)?.backward_step(&loss)?;
/// # Ok(())
/// # }
/// ```
impl<R: DeltaRule> Optimizer<R> {
    /// Updates the weights from a loss (0-dim, or 1-D per example) that was computed at the current weights.
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    pub fn backward_step(&mut self, loss: &Tensor) -> Result<f64> {
        self.step(|| loss.shallow_clone())
    }

    /// [`Optimizer::backward_step`] with every element of the gradient limited to ±max.
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    pub fn backward_step_clip(&mut self, loss: &Tensor, max: f64) -> Result<f64> {
        self.backward_step_clipped(loss, Clip::Value(max))
    }

    /// [`Optimizer::backward_step`] with the global L2 norm of the gradient limited to max.
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    pub fn backward_step_clip_norm(&mut self, loss: &Tensor, max: f64) -> Result<f64> {
        self.backward_step_clipped(loss, Clip::Norm(max))
    }

    fn backward_step_clipped(&mut self, loss: &Tensor, clip: Clip) -> Result<f64> {
        clip.validate()?;
        let usual = self.clip.replace(clip);
        let result = self.backward_step(loss);
        self.clip = usual;
        result
    }
}

impl<R: Rule> Optimizer<R> {
    /// What is learned of each trainable parameter: the mean, or the λ of binary weights.
    pub(crate) fn learned(&self) -> Vec<(&str, Tensor)> {
        let all = self.slots.iter().zip(self.params.leaves()).filter(|(_, leaf)| leaf.trainable());
        all.map(|(slot, leaf)| (leaf.name(), slot.mean_now(leaf).detach())).collect()
    }
}

/// Rows with a posterior.
///
/// ```compile_fail
/// # use tch::{nn, Device};
/// # use tch_blr::{Sgd, Rule};
/// # fn f(vs: nn::VarStore) -> tch_blr::Result<()> {
/// // SGD's covariance is fixed by assumption, so there is nothing to ask for.
/// Sgd::default().build(&vs, 0.1)?.posterior()?;
/// # Ok(())
/// # }
/// ```
impl<R: GaussianRule> Optimizer<R> {
    /// The posterior over the trainable parameters: an owned copy of mean and precision, in f64 for f64 weights and else
    /// in f32. The precision is ess·(h+δ+γ) as each row's documentation has it, not divided by ess. Frozen parameters
    /// are not in it.
    ///
    /// A parameter that no loss has depended on yet (a head of a later task) still has its initial precision, which
    /// under an isotropic prior includes `hess_init`; leave it out with [`DiagonalGaussian::select`].
    ///
    /// # Errors
    /// No effective sample size (RMSprop and Adam have none by default), or a precision that is not positive (Adam
    /// before its first step).
    pub fn posterior(&self) -> Result<DiagonalGaussian> {
        let mut entries = Vec::new();
        for (slot, leaf) in self.slots.iter().zip(self.params.leaves()).filter(|(_, leaf)| leaf.trainable()) {
            let mean = slot.mean_now(leaf).detach().copy();
            let precision = self.precision(slot, &mean)?;
            entries.push((leaf.name(), mean, precision));
        }
        DiagonalGaussian::sharing(entries)
    }

    fn precision(&self, slot: &Slot<R>, like: &Tensor) -> Result<Tensor> {
        if slot.config.effective_sample_size().is_none() {
            let expected = "the effective sample size, for a posterior: .ess(60_000.0)";
            return Err(Error::HyperParameter { name: "ess", value: "not set".to_owned(), expected });
        }
        let when = When { t: slot.steps, lr_factor: self.schedule.factor(self.steps) };
        let precision = like.detach().empty_like();
        kernel::run([Job {
            f: programs::Precision(slot.pass(when)),
            inputs: slot.with_state([slot.delta()]),
            outputs: [Some(&precision)].into_iter().collect(),
        }]);
        Ok(precision)
    }
}

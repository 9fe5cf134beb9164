//! One evaluation of the loss: perturb, call, differentiate, restore.

use super::{Optimizer, programs, sums::Sums};
use crate::curvature::{self, Curvature};
use crate::expectation::Perturbed;
use crate::gradient::{IntoTensor, Loss};
use crate::kernel::{self, Draw, Field, Job};
use crate::nn::tape::{Recording, Tape};
use crate::optim::Rule;
use crate::params::Leaf;
use crate::{Error, Params, Result};
use tch::Tensor;

/// An evaluation that has begun: weights at m+e, waiting for the loss there.
pub(super) struct Begun {
    guard: Perturbed,
    /// e, where there is a perturbation.
    noise: Vec<Option<Tensor>>,
    /// For rows that need per-example gradients.
    recording: Option<Recording>,
    buffers: Buffers,
}

/// Derivatives of the loss at one point, per parameter; `None` where the loss does not depend on it.
pub(super) struct Found {
    pub loss: f64,
    pub weight: f64,
    pub per_example: bool,
    pub gradients: Vec<Option<Tensor>>,
    /// For [`Curvature::PerExample`], else empty.
    pub squares: Vec<Option<Tensor>>,
}

impl<R: Rule> Optimizer<R> {
    /// Picks up new variables and looks at all before anything is done with them.
    pub(super) fn prepare(&mut self) -> Result<()> {
        self.params.refresh();
        self.params.check()?;
        let known = self.slots.len();
        self.add_slots()?;
        self.taps_checked &= self.slots.len() == known;
        for (slot, leaf) in self.slots.iter_mut().zip(self.params.leaves()) {
            slot.follow(leaf);
        }
        Ok(())
    }

    /// Moves the trainable variables to the point of evaluation number `k` of this step.
    pub(super) fn begin(&self, k: u64) -> Result<Begun> {
        let mut noise: Vec<Option<Tensor>> = self.slots.iter().map(|_| None).collect();
        let mut changes = Vec::new();
        if let Some((sample, sign)) = self.config.expectation().draw(k) {
            let _no_grad = tch::no_grad_guard();
            let factor = self.schedule.factor(self.steps);
            let mut jobs = Vec::new();
            for (parameter, (slot, leaf)) in self.slots.iter().zip(self.params.leaves()).enumerate() {
                if !leaf.trainable() {
                    continue;
                }
                let mean = slot.mean(leaf).detach();
                let at = Draw { step: self.steps, sample, parameter, group: slot.noise_group };
                let (theta, e) = (mean.empty_like(), mean.empty_like());
                noise[parameter] = Some(e.shallow_clone());
                changes.push((leaf, theta.shallow_clone()));
                let z = self.noise.field(at, &mean)?;
                let inputs = vec![Field::Tensor(mean), z, Field::Number(sign), slot.delta()];
                jobs.push(Job {
                    f: programs::Perturb(slot.next(factor)),
                    inputs: programs::with_state(inputs, &slot.state),
                    outputs: vec![theta, e],
                });
            }
            kernel::run(jobs);
        }
        let changes =
            changes.into_iter().map(|(leaf, theta)| (leaf.tensor.shallow_clone(), theta.to_kind(leaf.tensor.kind())));
        let guard = Perturbed::enter(changes)?;
        let per_example = self.config.curvature() == Curvature::PerExample;
        let look = per_example && !self.taps_checked;
        Ok(Begun {
            guard,
            noise,
            recording: per_example.then(Recording::start),
            buffers: if look { Buffers::new(&self.params) } else { Buffers::default() },
        })
    }

    /// Differentiates the loss that was computed since [`Optimizer::begin`]; the variables hold the mean again
    /// afterwards.
    pub(super) fn end<L: IntoTensor>(&mut self, begun: Begun, loss: L) -> Result<Sums> {
        let Begun { guard, noise, recording, buffers } = begun;
        let tape = recording.map(Recording::finish).unwrap_or_default();
        let loss = loss.into_tensor()?;
        buffers.unchanged()?;
        let loss = Loss::new(loss, self.steps)?;
        let found = self.differentiate(&loss, &tape);
        drop(guard);
        // The closure may have changed the variables, and what is kept now has to fit them in the update.
        self.params.check()?;
        self.statistics(found?, &noise)
    }

    /// As [`Optimizer::end`] with derivatives that were computed elsewhere.
    pub(super) fn end_with(&mut self, begun: Begun, found: Found) -> Result<Sums> {
        let Begun { guard, noise, .. } = begun;
        drop(guard);
        self.params.check()?;
        let squares = self.config.curvature() == Curvature::PerExample;
        let count = self.params.len();
        if found.gradients.len() != count || found.squares.len() != if squares { count } else { 0 } {
            return Err(Error::Parameters(format!(
                "{} gradients and {} squares were given: expected {count} and {}, one per parameter in the order of \
                 params().names()",
                found.gradients.len(),
                found.squares.len(),
                if squares { count } else { 0 }
            )));
        }
        for (i, leaf) in self.params.leaves().iter().enumerate() {
            let given = found.gradients[i].iter().chain(found.squares.get(i).and_then(Option::as_ref));
            for t in given {
                let (size, device) = (t.size(), t.device());
                if (&size, device) != (&leaf.tensor.size(), leaf.tensor.device()) {
                    return Err(Error::parameter(
                        leaf.name(),
                        format!(
                            "a gradient of shape {size:?} on {device:?} was given: expected {:?} on {:?}",
                            leaf.tensor.size(),
                            leaf.tensor.device()
                        ),
                    ));
                }
            }
        }
        if !found.loss.is_finite() {
            return Err(Error::NonFiniteLoss { value: found.loss, step: self.steps });
        }
        self.statistics(found, &noise)
    }

    /// Gradients of one evaluation, and squares where the row wants them, while the variables are still where it took
    /// place.
    fn differentiate(&mut self, loss: &Loss, tape: &Tape) -> Result<Found> {
        let leaves = self.params.leaves();
        let trained: Vec<(usize, &Leaf)> = leaves.iter().enumerate().filter(|(_, leaf)| leaf.trainable()).collect();
        if trained.is_empty() {
            // A backward pass with respect to nothing would accumulate into every variable's `.grad`.
            return Err(Error::Parameters("the closure has frozen all of them".to_owned()));
        }
        let spread = |found: Vec<Option<Tensor>>| {
            let mut all: Vec<Option<Tensor>> = leaves.iter().map(|_| None).collect();
            for ((i, _), g) in trained.iter().zip(found) {
                all[*i] = g;
            }
            all
        };
        let (gradients, squares) = if self.config.curvature() == Curvature::PerExample {
            let params: Vec<(&str, &Tensor)> = trained.iter().map(|(_, leaf)| (leaf.name(), &leaf.tensor)).collect();
            let found =
                curvature::per_example(&loss.mean, loss.per_example.as_ref(), tape, &params, !self.taps_checked)?;
            let result = (spread(found.gradient), spread(found.squares));
            // Without a tape nothing was compared: the losses were differentiated one by one.
            self.taps_checked = !found.mixed && (self.taps_checked || !tape.taps().is_empty());
            result
        } else {
            let inputs: Vec<&Tensor> = trained.iter().map(|(_, leaf)| &leaf.tensor).collect();
            let found = Tensor::f_run_backward(&[&loss.mean], &inputs, false, false)?;
            (spread(found.into_iter().map(|g| g.defined().then_some(g)).collect()), Vec::new())
        };
        let (weight, per_example) = (loss.weight(), loss.per_example.is_some());
        Ok(Found { loss: loss.value, weight, per_example, gradients, squares })
    }

    /// What the update needs of one evaluation at m+e.
    fn statistics(&self, found: Found, noise: &[Option<Tensor>]) -> Result<Sums> {
        let _no_grad = tch::no_grad_guard();
        let Found { loss, weight, per_example, mut gradients, mut squares } = found;
        for (leaf, t) in self.params.leaves().iter().cycle().zip(gradients.iter_mut().chain(&mut squares)) {
            *t = t.take().filter(|_| leaf.trainable()).map(|t| dense(&t, leaf));
        }
        let gradient_norm = self.finite("gradient", &gradients)?;
        if let Some(clip) = self.clip {
            clip.apply(&mut gradients);
        }
        let curvature = match self.config.curvature() {
            Curvature::Unused => Vec::new(),
            Curvature::SquaredGradient => gradients.iter().map(|g| g.as_ref().map(Tensor::square)).collect(),
            Curvature::Price => {
                let product = |(g, e): (&Option<Tensor>, &Option<Tensor>)| Some(g.as_ref()? * e.as_ref()?);
                gradients.iter().zip(noise).map(product).collect()
            }
            Curvature::PerExample => {
                self.finite("per-example square", &squares)?;
                squares
            }
        };
        Ok(Sums { weight, evaluations: 1, loss, gradient_norm, per_example, gradients, curvature })
    }

    /// The global L2 norm; an error if an element is not finite.
    fn finite(&self, what: &'static str, tensors: &[Option<Tensor>]) -> Result<f64> {
        if !self.check_finite {
            return Ok(f64::NAN);
        }
        let mut total = 0.0;
        for (t, leaf) in tensors.iter().zip(self.params.leaves()) {
            let Some(t) = t else { continue };
            let squares = kernel::sum_of_squares(t);
            total += squares;
            // The squares of large finite numbers overflow as well.
            if let Some(value) = (!squares.is_finite()).then(|| kernel::first_non_finite(t)).flatten() {
                let name = leaf.name().to_owned();
                return Err(Error::NonFiniteGradient { what, name, value, step: self.steps });
            }
        }
        Ok(total.sqrt())
    }
}

/// A gradient in the layout and kind of the parameter's state.
fn dense(g: &Tensor, leaf: &Leaf) -> Tensor {
    let g = if g.is_sparse() { g.to_dense(None, false) } else { g.shallow_clone() };
    g.to_kind(leaf.state_kind())
}

/// The tensors of a store that are not trained, with copies of what they held.
#[derive(Default)]
struct Buffers(Vec<(String, Tensor, Tensor)>);

impl Buffers {
    fn new(params: &Params) -> Self {
        let _no_grad = tch::no_grad_guard();
        Buffers(
            params
                .buffers()
                .into_iter()
                .map(|(name, t)| {
                    let before = t.detach().copy();
                    (name, t, before)
                })
                .collect(),
        )
    }

    /// Batch normalization in training mode moves its statistics; per-example gradients do not exist then, because each
    /// example's loss depends on the whole batch. The buffers get their values back before the error.
    fn unchanged(self) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        // A NaN is as it was, too.
        let same = |a: &Tensor, b: &Tensor| a.size() == b.size() && a.allclose(b, 0.0, 0.0, true);
        let changed = self.0.iter().position(|(_, now, before)| !same(now, before));
        let Some(i) = changed else { return Ok(()) };
        for (_, now, before) in &self.0 {
            now.shallow_clone().copy_(before);
        }
        Err(Error::PerExample(format!(
            "the closure changed the buffer `{}`, as batch normalization in training mode does; each example's loss \
             then depends on the whole batch, so per-example gradients do not exist. Use group or layer normalization \
             (tch_blr::nn), run batch normalization with train = false, or choose Ivon, which needs no per-example \
             gradients",
            self.0[i].0
        )))
    }
}

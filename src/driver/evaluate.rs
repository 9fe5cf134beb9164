//! One evaluation of the loss: perturb, call, differentiate, restore.

use super::programs::{Ascend, Displacement, Form, Perturb, Relaxed, Square, Statistic};
use super::{Optimizer, sums::Sums};
use crate::curvature::{self, Curvature};
use crate::expectation::{Link, Perturbed};
use crate::gradient::{IntoTensor, Loss};
use crate::kernel::{self, Draw, Drawn, Field, Job, Noise};
use crate::nn::tape::{Output, Recording, Tape};
use crate::params::{Buffers, Leaf};
use crate::rows::Rule;
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// An evaluation that has begun: weights at m+e or m+ε, waiting for the loss there.
pub(super) struct Begun {
    /// Of a pair of points, the first: its gradient is for [`Optimizer::ascend`] alone.
    pub first: bool,
    /// The curvature statistic, where the first point has given it.
    curvature: Option<Vec<Option<Tensor>>>,
    guard: Perturbed,
    /// Number of the evaluation.
    pub k: u64,
    /// For rows that need per-example gradients.
    recording: Option<Recording>,
    buffers: Buffers,
}

/// A loss and its derivatives at one point, one per parameter in the order of
/// [`Params::names`](crate::Params::names), each of its parameter's shape; `None` where the loss does not depend on it.
#[derive(Debug)]
pub struct Derivatives {
    /// Mean loss L of the batch.
    pub loss: f64,
    /// Number of examples B, if micro-batches are to count by it; `None` if they count equally.
    pub examples: Option<u64>,
    /// ∇L
    pub gradients: Vec<Option<Tensor>>,
    /// (1/B) Σᵢ (∇ℓᵢ)² for rows with [`Curvature::PerExample`], the diagonal for those with [`Curvature::GgnExact`] and
    /// [`Curvature::GgnMonteCarlo`]; empty for all others.
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
        self.follow();
        Ok(())
    }

    /// Takes over what was changed from outside.
    pub(super) fn follow(&mut self) {
        for (slot, leaf) in self.slots.iter_mut().zip(self.params.leaves()) {
            slot.follow(leaf);
        }
    }

    /// Moves the trainable variables to the point of evaluation number `k` of this step.
    pub(super) fn begin(&mut self, k: u64) -> Result<Begun> {
        let guard = match self.config.expectation().draw(k) {
            Some((sample, sign)) => self.perturb(sample, sign)?,
            None => Perturbed::default(),
        };
        Ok(self.begun(k, self.config.expectation().is_adversarial(), None, guard))
    }

    fn begun(&self, k: u64, first: bool, curvature: Option<Vec<Option<Tensor>>>, guard: Perturbed) -> Begun {
        let tapped = self.config.curvature().is_tapped();
        let look = tapped && !self.taps_checked;
        Begun {
            first,
            curvature,
            guard,
            k,
            recording: tapped.then(Recording::start),
            buffers: if look { Buffers::new(&self.params) } else { Buffers::default() },
        }
    }

    /// m+e
    fn perturb(&mut self, sample: u64, sign: f64) -> Result<Perturbed> {
        let _no_grad = tch::no_grad_guard();
        let mut noise = Vec::with_capacity(self.slots.len());
        for (parameter, (slot, leaf)) in self.slots.iter_mut().zip(self.params.leaves()).enumerate() {
            let at = Draw { step: self.steps, sample, parameter, group: slot.noise_group };
            let z = leaf.trainable().then(|| self.noise.draw(at, slot.mean(leaf))).transpose()?;
            noise.push(match slot.config.link() {
                Link::Identity => z,
                link => z.map(|z| Drawn::Tensor(link.noise(z.tensor(slot.mean(leaf))))),
            });
            slot.make_point(leaf);
        }
        let factor = self.schedule.factor(self.steps);
        let all = self.slots.iter().zip(self.params.leaves()).zip(&noise);
        let moved = all.filter_map(|((slot, leaf), z)| Some((slot, leaf, z.as_ref()?, slot.point.as_ref()?)));
        kernel::run(moved.clone().map(|(slot, leaf, z, point)| Job {
            f: Perturb(slot.next(factor)),
            inputs: slot.with_state([Field::Tensor(slot.mean(leaf)), z.field(), Field::Number(sign), slot.delta()]),
            outputs: [Some(point)].into_iter().collect(),
        }));
        Perturbed::enter(moved.map(|(slot, leaf, _, point)| (&leaf.tensor, slot.value(leaf, point))))
    }

    /// From the first point's gradient to the second point of evaluation number `k`: moves the variables to m+ε.
    pub(super) fn ascend(&mut self, k: u64, first: &Sums) -> Result<Begun> {
        let _no_grad = tch::no_grad_guard();
        for (slot, leaf) in self.slots.iter_mut().zip(self.params.leaves()) {
            slot.make_point(leaf);
        }
        // The norm that was found by the check is the one before clipping.
        let known = self.check_finite && self.clip.is_none();
        let gradients = || first.gradients.iter().flatten();
        let norm = if known { first.gradient_norm } else { kernel::sum_of_squares(gradients()).sqrt() };
        // Below, squares have lost their digits: no direction, no ascent. A NaN comes out by the loss at the second point.
        let norm = Field::Number(if norm > 1e-150 { norm } else { f64::INFINITY });
        let wanted = self.config.curvature() == Curvature::AbsoluteGradient;
        let absolute = first.gradients.iter().map(|g| g.as_ref().filter(|_| wanted).map(Tensor::empty_like));
        let absolute: Vec<Option<Tensor>> = absolute.collect();
        let factor = self.schedule.factor(self.steps);
        let all = self.slots.iter().zip(self.params.leaves()).zip(first.gradients.iter().zip(&absolute));
        let moved =
            all.filter_map(|((slot, leaf), (g, size))| Some((slot, leaf, g.as_ref()?, slot.point.as_ref()?, size)));
        kernel::run(moved.clone().map(|(slot, leaf, g, point, size)| Job {
            f: Ascend(slot.next(factor)),
            inputs: slot.with_state([Field::Tensor(slot.mean(leaf)), Field::Tensor(g), norm, slot.delta()]),
            outputs: [Some(point), size.as_ref()].into_iter().collect(),
        }));
        let points = moved.map(|(slot, leaf, _, point, _)| (&leaf.tensor, slot.value(leaf, point)));
        let guard = Perturbed::enter(points)?;
        Ok(self.begun(k, false, wanted.then_some(absolute), guard))
    }

    /// Differentiates the loss that was computed since [`Optimizer::begin`]; the variables hold the mean again
    /// afterwards.
    pub(super) fn end<L: IntoTensor>(&mut self, begun: Begun, loss: L) -> Result<Sums> {
        let Begun { guard, k, recording, buffers, curvature, .. } = begun;
        let tape = recording.map(Recording::finish).unwrap_or_default();
        let loss = loss.into_tensor()?;
        buffers.unchanged()?;
        let loss = Loss::new(loss, self.steps)?;
        let found = self.differentiate(&loss, &tape, k);
        drop(guard);
        // The closure may have changed the variables, and what is kept now has to fit them in the update.
        self.params.check()?;
        self.statistics(found?, curvature)
    }

    /// As [`Optimizer::end`] with derivatives that were computed elsewhere.
    pub(super) fn end_with(&mut self, begun: Begun, found: Derivatives) -> Result<Sums> {
        let Begun { guard, recording, buffers, curvature, .. } = begun;
        drop((guard, recording, buffers));
        self.params.check()?;
        let squares = self.config.curvature().is_tapped();
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
        if found.examples == Some(0) {
            return Err(Error::Loss("derivatives of 0 examples were given: expected at least one".to_owned()));
        }
        if !found.loss.is_finite() {
            return Err(Error::NonFiniteLoss { value: found.loss, step: self.steps });
        }
        self.statistics(found, curvature)
    }

    /// Gradients of one evaluation, and squares where the row wants them, while the variables are still where it took
    /// place.
    fn differentiate(&mut self, loss: &Loss, tape: &Tape, k: u64) -> Result<Derivatives> {
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
        let named = || trained.iter().map(|(_, leaf)| (leaf.name(), &leaf.tensor)).collect::<Vec<_>>();
        let inputs = || trained.iter().map(|(_, leaf)| &leaf.tensor).collect::<Vec<_>>();
        let curvature = self.config.curvature();
        let (gradients, squares) = if curvature == Curvature::PerExample {
            let losses = loss.per_example.as_ref();
            let found = curvature::per_example(&loss.mean, losses, tape, &named(), !self.taps_checked)?;
            let result = (spread(found.gradient), spread(found.squares));
            // Without a tape nothing was compared: the losses were differentiated one by one.
            self.taps_checked = !found.mixed && (self.taps_checked || !tape.taps().is_empty());
            result
        } else if curvature.is_tapped() {
            let gradient = Tensor::f_run_backward(&[&loss.mean], &inputs(), true, false)?;
            let sampled = curvature == Curvature::GgnMonteCarlo;
            let vectors = |i: usize, output: &Output| {
                if sampled {
                    Ok(vec![output.sampled(&self.label_noise(k, i, &output.z))?])
                } else {
                    (0..output.columns()).map(|c| output.root(c)).collect()
                }
            };
            let found = curvature::ggn(tape, &named(), !self.taps_checked, vectors)?;
            self.taps_checked = !found.mixed;
            (spread(gradient.into_iter().map(|g| g.defined().then_some(g)).collect()), spread(found.diagonal))
        } else {
            let found = Tensor::f_run_backward(&[&loss.mean], &inputs(), false, false)?;
            (spread(found.into_iter().map(|g| g.defined().then_some(g)).collect()), Vec::new())
        };
        let examples = loss.per_example.as_ref().map(|losses| losses.size()[0] as u64);
        Ok(Derivatives { loss: loss.value, examples, gradients, squares })
    }

    /// Standard normals for the labels of output `i` in evaluation number `k`: of the optimizer's seed (0 where its noise
    /// was given as tensors), at samples that no perturbation reaches.
    fn label_noise(&self, k: u64, i: usize, z: &Tensor) -> Tensor {
        const LABELS: u64 = 1 << 31;
        let _no_grad = tch::no_grad_guard();
        let seed = if let Noise::Philox(p) = &self.noise { p.seed } else { 0 };
        let at = Draw { step: self.steps, sample: LABELS + k, parameter: i, group: (i as u64) << 32 };
        kernel::tensor(Field::Noise { seed, at }, &z.detach().to_kind(Kind::Double).contiguous())
    }

    /// What the update needs of one evaluation. Curvature statistics that it can form itself are left to it, or to
    /// [`Optimizer::form`].
    fn statistics(&self, found: Derivatives, curvature: Option<Vec<Option<Tensor>>>) -> Result<Sums> {
        let _no_grad = tch::no_grad_guard();
        let Derivatives { loss, examples, mut gradients, mut squares } = found;
        for (leaf, t) in self.params.leaves().iter().cycle().zip(gradients.iter_mut().chain(&mut squares)) {
            *t = t.take().filter(|_| leaf.trainable()).map(|t| dense(t, leaf));
        }
        let gradient_norm = self.finite("gradient", &gradients)?;
        if let Some(clip) = self.clip {
            clip.apply(&mut gradients);
        }
        self.finite("per-example square", &squares)?;
        let (weight, per_example) = (examples.map_or(1.0, |n| n as f64), examples.is_some());
        let curvature = curvature.unwrap_or(squares);
        Ok(Sums { weight, evaluations: 1, loss, gradient_norm, per_example, gradients, curvature })
    }

    /// Forms the curvature statistics of the evaluation that has just ended, before the next one takes place elsewhere.
    pub(super) fn form(&self, sums: &mut Sums) {
        match self.config.curvature() {
            Curvature::Unused
            | Curvature::PerExample
            | Curvature::GgnExact
            | Curvature::GgnMonteCarlo
            | Curvature::AbsoluteGradient => {}
            Curvature::SquaredGradient => self.form_by(Square, sums),
            Curvature::Price => self.form_by(Displacement, sums),
            Curvature::Relaxed => self.form_by(Relaxed, sums),
        }
    }

    fn form_by<S: Statistic>(&self, statistic: S, sums: &mut Sums) {
        let _no_grad = tch::no_grad_guard();
        sums.curvature = sums.gradients.iter().map(|g| g.as_ref().map(Tensor::empty_like)).collect();
        let all = self.slots.iter().zip(self.params.leaves()).zip(sums.gradients.iter().zip(&sums.curvature));
        kernel::run(all.filter_map(|((slot, leaf), (g, c))| {
            let mean = Field::Tensor(slot.mean(leaf));
            let inputs = [mean, Field::Tensor(g.as_ref()?), slot.point.as_ref().map_or(mean, Field::Tensor)];
            let (inputs, outputs) = (inputs.into_iter().collect(), [c.as_ref()].into_iter().collect());
            Some(Job { f: Form(statistic), inputs, outputs })
        }));
    }

    /// The global L2 norm; an error if an element is not finite.
    fn finite(&self, what: &'static str, tensors: &[Option<Tensor>]) -> Result<f64> {
        if !self.check_finite {
            return Ok(f64::NAN);
        }
        let total = kernel::sum_of_squares(tensors.iter().flatten());
        if !total.is_finite() {
            for (t, leaf) in tensors.iter().zip(self.params.leaves()) {
                // The squares of large finite numbers overflow as well.
                if let Some(value) = t.as_ref().and_then(kernel::first_non_finite) {
                    let name = leaf.name().to_owned();
                    return Err(Error::NonFiniteGradient { what, name, value, step: self.steps });
                }
            }
        }
        Ok(total.sqrt())
    }
}

/// A gradient in the layout and kind of the parameter's state.
fn dense(g: Tensor, leaf: &Leaf) -> Tensor {
    let g = if g.is_sparse() { g.to_dense(None, false) } else { g };
    if g.kind() == leaf.state_kind() { g } else { g.to_kind(leaf.state_kind()) }
}

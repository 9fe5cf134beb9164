//! One step: perturb → closure → differentiate → estimate → update.
//!
//! Here is what all rows do alike, and everything that can fail of one evaluation. What a sample, a statistic or an
//! update is for one weight or one block is in `weights.rs` and `blocks.rs`; sums over evaluations are in
//! `sums.rs`. The stations share `Begun` and `Found`, which no other file needs, so they stay in one file.

use super::arithmetic::{Arithmetic, Plan, Sample, Step};
use super::blocks::{PROBES, probe};
use super::compiled::Closure;
use super::row::Row;
use super::second;
use super::sums::Sums;
use super::{Last, Optimizer};
use crate::curvature;
use crate::gradient::{Clip, IntoTensor, Loss};
use crate::kernel::{self, Draw, Field, Noise};
use crate::likelihood::Outputs;
use crate::nn::tape::{Recording, Tape};
use crate::params::{Buffers, Leaf, Params, Perturbed, Written};
use crate::{Error, Labels, Result, Schedule, Statistic};
use tch::{Kind, Tensor};

/// Which point of an evaluation the weights are at.
enum Point {
    /// The first of two: its gradient only serves to find the second.
    First,
    /// The only one, or the second, with the statistic that the first has given and the norm of its gradient.
    Last { statistics: Vec<Vec<Tensor>>, norm: f64 },
    /// The second, of an evaluation that is left out because of what was found at the first.
    LeftOut(Error),
}

/// An evaluation that has begun: weights at m+e or m+ε, waiting for the loss there.
pub struct Begun {
    point: Point,
    guard: Perturbed,
    /// Number of the evaluation.
    k: u64,
    /// For rows whose statistic comes from layers that record.
    recording: Option<Recording>,
    buffers: Buffers,
}

impl Begun {
    /// Whether the weights are at the first of two points.
    pub(super) fn is_first(&self) -> bool {
        matches!(self.point, Point::First)
    }
}

/// What was found at a point: a loss to be differentiated, or derivatives that were computed elsewhere.
///
/// A loss is a [`Tensor`] or a `Result<Tensor, E>`, see [`IntoTensor`].
#[derive(Debug)]
pub enum Outcome {
    /// The batch's mean loss (0-dim), or its B per-example losses (1-D).
    Loss(Result<Tensor>),
    /// Loss and gradients.
    Derivatives(Derivatives),
}

impl Outcome {
    /// That of a rank for which nothing was left of a batch.
    fn is_of_no_example(&self) -> bool {
        match self {
            Outcome::Loss(loss) => loss.as_ref().is_ok_and(|loss| loss.defined() && loss.size() == [0]),
            Outcome::Derivatives(derivatives) => derivatives.examples == Some(0),
        }
    }
}

impl<L: IntoTensor> From<L> for Outcome {
    fn from(loss: L) -> Self {
        Outcome::Loss(loss.into_tensor())
    }
}

impl From<Derivatives> for Outcome {
    fn from(derivatives: Derivatives) -> Self {
        Outcome::Derivatives(derivatives)
    }
}

/// A loss and its derivatives at one point, one per parameter in the order of
/// [`Params::names`](crate::Params::names), each of its parameter's shape; `None` where the loss does not depend on it.
///
/// For rows whose statistic needs no more than these: not for those with [`Statistic::KroneckerFisher`] or second
/// derivatives.
#[derive(Debug)]
pub struct Derivatives {
    /// Mean loss L of the batch.
    pub loss: f64,
    /// Number of examples B, if micro-batches are to count by it; `None` if they count equally.
    pub examples: Option<u64>,
    /// ∇L
    pub gradients: Vec<Option<Tensor>>,
    /// The diagonal of the Fisher information for rows with [`Statistic::Fisher`], (1/B) Σᵢ (∇ℓᵢ)² with
    /// [`Labels::Observed`]; empty for all others.
    pub squares: Vec<Option<Tensor>>,
}

/// An evaluation that has ended, and the point that the variables are still at.
pub(super) struct Ended {
    pub sums: Sums,
    pub at: Perturbed,
}

/// As [`Derivatives`], with the statistics of units.
struct Found {
    loss: f64,
    examples: Option<u64>,
    gradients: Vec<Option<Tensor>>,
    statistics: Vec<Vec<Tensor>>,
}

impl<R: Row> Optimizer<R> {
    /// Picks up new variables, and checks all of them before they are used.
    pub(super) fn prepare(&mut self) -> Result<()> {
        self.params.refresh();
        self.params.check()?;
        self.params.check_separate()?;
        self.params.check_free()?;
        let known = self.units.len();
        self.extend()?;
        // A new variable may be used outside of the tapped layers, so the check is due again.
        if self.units.len() > known {
            self.taps_checked = 0;
        }
        R::Arithmetic::follow(&mut self.units, &self.params);
        Ok(())
    }

    /// Gives every parameter that has none a unit.
    pub(super) fn extend(&mut self) -> Result<()> {
        let known = self.members();
        let plan = Plan { row: self.config, lr: self.lr, overrides: &self.overrides, prior: self.prior.as_ref() };
        let extended = R::Arithmetic::extend(&mut self.units, &self.params, &plan);
        if self.members() != known {
            self.changed();
        }
        extended
    }

    /// Parameters that have a unit.
    fn members(&self) -> usize {
        self.units.iter().map(|unit| unit.members.len()).sum()
    }

    /// How many evaluations these chunks take.
    pub(super) fn evaluations(&self, chunks: usize) -> u64 {
        // Saturating: a wrapped product would quietly evaluate less than was asked for.
        self.config.expectation().evaluations().saturating_mul(chunks as u64)
    }

    /// The evaluations of the chunks of one micro-batch. The statistics of a single one are left unformed, and the
    /// variables at its point.
    pub(super) fn evaluate(&mut self, chunks: usize, closure: &mut Closure) -> Result<Ended> {
        let mut sums = Sums::default();
        let (each, evaluations) = (self.evaluations(1), self.evaluations(chunks));
        for k in 0..evaluations {
            let mut loss = || Outcome::Loss(closure((k / each) as usize));
            // Numbered on from what was accumulated, so that no two evaluations of a step share their noise.
            let mut begun = self.begin(self.sums.evaluations + k)?;
            if begun.is_first() {
                begun = self.ascend(begun, loss())?;
            }
            let one = self.end(begun, loss())?;
            if evaluations == 1 {
                // Its statistic is formed inside of the update, which saves a pass over the weights.
                return Ok(one);
            }
            sums.merge(self.formed(one)?)?;
        }
        Ok(Ended { sums, at: Perturbed::none() })
    }

    /// With the statistic of a single evaluation; the variables are at their means again.
    fn formed(&self, Ended { mut sums, at }: Ended) -> Result<Sums> {
        if sums.evaluations == 1 && !sums.is_empty() {
            R::Arithmetic::form(&self.units, &self.params, &at, &mut sums)?;
        }
        Ok(sums)
    }

    /// Adds what was found in so many evaluations to what was accumulated; returns its loss.
    pub(super) fn keep(&mut self, found: Result<Ended>, evaluations: u64) -> Result<f64> {
        if self.ranks.is_some() {
            let found = found.and_then(|ended| self.formed(ended));
            return self.keep_together(found, evaluations);
        }
        let ended = self.skips.or_left_out(found, evaluations)?;
        // The update that could form the statistic comes after further evaluations, at other points.
        let sums = self.formed(ended)?;
        let loss = sums.mean_loss();
        self.sums.merge(sums)?;
        Ok(loss)
    }

    /// Updates the weights from what was found in so many evaluations, with what was accumulated before.
    pub(super) fn finish(&mut self, found: Result<Ended>, evaluations: u64) -> Result<f64> {
        if self.ranks.is_some() {
            let found = found.and_then(|ended| self.formed(ended));
            return self.finish_together(found, evaluations);
        }
        let ended = self.skips.or_left_out(found, evaluations)?;
        if self.sums.weight == 0.0 && !ended.sums.is_empty() {
            // Nothing to merge with, so a single evaluation reaches the update to the bit.
            let formed = ended.sums.evaluations > 1;
            // What was left out before has no weight, but a place in the noise of this step.
            return self.apply(ended, formed).inspect(|_| self.sums = Sums::default());
        }
        let before = self.sums.shallow_clone();
        let sums = self.formed(ended)?;
        self.sums.merge(sums)?;
        if self.sums.weight == 0.0 {
            return Ok(f64::NAN);
        }
        // A failed update leaves what was accumulated before it, without this micro-batch.
        self.apply_kept().inspect_err(|_| self.sums = before)
    }

    /// The update from what was accumulated, which stays if it fails.
    pub(super) fn apply_kept(&mut self) -> Result<f64> {
        let sums = self.sums.shallow_clone();
        self.apply_merged(sums).inspect(|_| self.sums = Sums::default())
    }

    /// The update from evaluations whose statistics are formed.
    pub(super) fn apply_merged(&mut self, sums: Sums) -> Result<f64> {
        // Here as well as in `prepare`: weights may have been loaded since the evaluations.
        R::Arithmetic::follow(&mut self.units, &self.params);
        self.apply(Ended { sums, at: Perturbed::none() }, true)
    }

    fn apply(&mut self, Ended { sums, at }: Ended, formed: bool) -> Result<f64> {
        let mut sums = sums.into_means();
        let step = step_of(&self.params, &self.schedule, self.steps);
        let divergence = self.divergence.map(|watch| watch.with(sums.loss, self.steps)).transpose()?;
        R::Arithmetic::update(&mut self.units, step, at, &mut sums, formed)?;
        self.divergence = divergence;
        if let Some(Clip::Norm(_)) = self.clip {
            self.clipped.updates += 1;
            self.clipped.cut += u64::from(sums.cut);
        }
        self.last = Some(Last { loss: sums.loss, gradient_norm: sums.gradient_norm, lr: self.lr * step.lr_factor });
        // Counted last, so that a repeated step has the same noise as the one that failed.
        self.steps += 1;
        self.skips.updated();
        Ok(sums.loss)
    }

    /// Moves the trainable variables to the point of evaluation number `k` of this step.
    pub(super) fn begin(&mut self, k: u64) -> Result<Begun> {
        let expectation = self.config.expectation();
        let guard = match expectation.draw(k) {
            Some((draw, sign)) => {
                let sample = Sample { noise: &self.noise, draw: self.among_ranks(draw), sign };
                let step = step_of(&self.params, &self.schedule, self.steps);
                R::Arithmetic::perturb(&mut self.units, step, sample)?
            }
            None => Perturbed::none(),
        };
        let only = Point::Last { statistics: Vec::new(), norm: 0.0 };
        let point = if expectation.is_adversarial() { Point::First } else { only };
        Ok(self.begun(k, point, guard))
    }

    fn begun(&self, k: u64, point: Point, guard: Perturbed) -> Begun {
        let tapped = self.config.statistic().is_tapped();
        let look = tapped && self.taps_checked == 0;
        // Batch normalization, under which examples have no gradients of their own, shows in buffers that move. They
        // are copied only for the first look.
        let buffers = if look { Buffers::new(&self.params) } else { Buffers::default() };
        Begun { point, guard, k, recording: tapped.then(Recording::start), buffers }
    }

    /// From the loss at the first point to the second point of the same evaluation: moves the variables to m+ε.
    pub(super) fn ascend(&mut self, begun: Begun, outcome: Outcome) -> Result<Begun> {
        let k = begun.k;
        let Ended { sums: first, at } = self.end(begun, outcome)?;
        // The check has computed the norm already, but the one before clipping.
        let known = self.check_finite && self.clip.is_none();
        let gradients = || first.gradients.iter().flatten();
        let norm = if known { first.gradient_norm } else { kernel::sum_of_squares(gradients())?.sqrt() };
        // The squares of smaller numbers are subnormal in f64 and have lost their digits: no direction, so no ascent. A
        // NaN fails the comparison too, and is found by the loss at the second point.
        let norm = if norm > 1e-150 { norm } else { f64::INFINITY };
        let step = step_of(&self.params, &self.schedule, self.steps);
        let (guard, statistics) = R::Arithmetic::ascend(&mut self.units, step, at, &first.gradients, norm)?;
        Ok(self.begun(k, Point::Last { statistics, norm: first.gradient_norm }, guard))
    }

    /// As [`Optimizer::ascend`] of a loop that cannot end here, and has to come with another loss first.
    pub(super) fn ascend_or_leave_out(&mut self, begun: Begun, outcome: Outcome) -> Result<Begun> {
        let k = begun.k;
        match self.ascend(begun, outcome) {
            Err(e) if self.skips.takes(&e) => Ok(self.begun(k, Point::LeftOut(e), Perturbed::none())),
            begun => begun,
        }
    }

    /// Ends an evaluation. The variables are still at its point.
    pub(super) fn end(&mut self, begun: Begun, outcome: Outcome) -> Result<Ended> {
        let Begun { point, guard: mut at, k, recording, buffers } = begun;
        let is_first = matches!(point, Point::First);
        if let Point::LeftOut(e) = point {
            // It counts from its first point on; but the closure's own error is one.
            return Err(if let Outcome::Loss(Err(own)) = outcome { own } else { e });
        }
        // From here on any early return drops the guard, which brings the mean back.
        if self.ranks.is_some() && outcome.is_of_no_example() {
            return Ok(Ended { sums: Sums { evaluations: 1, ..Sums::default() }, at: Perturbed::none() });
        }
        let tape = recording.map(Recording::finish).unwrap_or_default();
        let found = match outcome {
            Outcome::Loss(loss) => {
                let loss = loss?;
                buffers.unchanged()?;
                let loss = Loss::new(loss, self.steps)?;
                // While the variables are still at the point: libtorch refuses a graph once they were changed.
                self.differentiate(&loss, &tape, k)?
            }
            Outcome::Derivatives(given) => self.given(given)?,
        };
        at.settle()?;
        if at.is_empty() {
            // Evaluated at the mean, unless a guard was made in between and still lives.
            self.params.check_free()?;
        }
        if let Some(variable) = at.changed() {
            let name = self.params.name_of(variable).unwrap_or("?");
            let problem = "the evaluation has changed it in place (a clamp, a projection, a load), which is lost when the \
                           mean comes back: do so after the step (pruning::Mask may be applied in between)";
            return Err(Error::parameter(name, problem));
        }
        // The closure may have converted the variables, and what is kept now must fit them in the update.
        self.params.check()?;
        let mut sums = self.checked(found, is_first)?;
        // What SAM's first point gave takes the place of what the second would.
        if let Point::Last { statistics, norm } = point {
            if norm > sums.largest_norm {
                sums.largest_norm = norm;
            }
            if !statistics.is_empty() {
                sums.statistics = statistics;
            }
        }
        Ok(Ended { sums, at })
    }

    /// Derivatives that were computed elsewhere.
    fn given(&self, given: Derivatives) -> Result<Found> {
        let statistic = self.config.statistic();
        if statistic.is_second_order() || matches!(statistic, Statistic::KroneckerFisher(_)) {
            let problem =
                format!("derivatives were given to a row that needs {statistic:?} as well; hand over the loss");
            return Err(Error::Loss(problem));
        }
        let count = self.params.len();
        let squares = if statistic.is_tapped() { count } else { 0 };
        let (g, s) = (given.gradients.len(), given.squares.len());
        if (g, s) != (count, squares) {
            return Err(Error::Parameters(format!(
                "{g} gradients and {s} squares were given: expected {count} and {squares}, one per parameter in the \
                 order of params().names()"
            )));
        }
        for (i, leaf) in self.params.leaves().iter().enumerate() {
            let expected = (leaf.tensor.size(), leaf.tensor.device());
            for t in given.gradients[i].iter().chain(given.squares.get(i).and_then(Option::as_ref)) {
                let found = (t.size(), t.device());
                if found != expected {
                    let ((size, device), (own, place)) = (found, expected);
                    let problem =
                        format!("a gradient of shape {size:?} on {device:?} was given: expected {own:?} on {place:?}");
                    return Err(Error::parameter(leaf.name(), problem));
                }
            }
        }
        if given.examples == Some(0) {
            return Err(Error::Loss("derivatives of 0 examples were given: expected at least one".to_owned()));
        }
        // A computed loss is checked by `Loss::new`; this one has not been seen by anyone.
        if !given.loss.is_finite() {
            return Err(Error::NonFiniteLoss { value: given.loss, step: self.steps });
        }
        let Derivatives { loss, examples, mut gradients, mut squares } = given;
        // What the update reads must be nothing that it writes: a gradient of ⟨a, b⟩ may be handed over as b itself.
        let written = Written::of(self.params.leaves().iter().map(|leaf| &leaf.tensor));
        for t in gradients.iter_mut().chain(&mut squares).flatten().filter(|t| written.meets(t)) {
            *t = t.detach().copy();
        }
        Ok(Found { loss, examples, gradients, statistics: self.of_units(squares) })
    }

    /// Statistics of parameters as those of their units.
    fn of_units(&self, mut of_params: Vec<Option<Tensor>>) -> Vec<Vec<Tensor>> {
        let mut of = |i: usize| of_params.get_mut(i).and_then(Option::take);
        self.units.iter().map(|unit| unit.members.iter().filter_map(|i| of(*i)).collect()).collect()
    }

    /// Gradients of one evaluation, and the statistics that come with them, while the variables are still where it took
    /// place.
    fn differentiate(&mut self, loss: &Loss, tape: &Tape, k: u64) -> Result<Found> {
        let leaves = self.params.leaves();
        let trained: Vec<(usize, &Leaf)> = leaves.iter().enumerate().filter(|(_, leaf)| leaf.trainable()).collect();
        if trained.is_empty() {
            // Given no inputs, a backward pass accumulates into every variable's `.grad`.
            return Err(Error::Parameters("the closure has frozen all of them".to_owned()));
        }
        let named: Vec<(&str, &Tensor)> = trained.iter().map(|(_, leaf)| (leaf.name(), &leaf.tensor)).collect();
        let inputs: Vec<&Tensor> = named.iter().map(|(_, t)| *t).collect();
        let places = || trained.iter().map(|(i, _)| *i);
        // libtorch leaves the gradient of an unused input undefined, and most methods panic on such a tensor.
        let defined = |found: Vec<Tensor>| found.into_iter().map(|g| g.defined().then_some(g)).collect::<Vec<_>>();
        let backward = || Tensor::f_run_backward(&[&loss.mean], &inputs, false, false).map(defined);
        let this = &*self;
        let vectors =
            |by: Labels| move |i: usize, output: &Outputs| output.vectors(by, || this.label_noise(k, i, &output.z));
        let n = leaves.len();
        // More layer calls than in any pass that was checked: a memory beside the batch, say.
        let check = self.taps_checked < tape.taps().len().max(1);
        let mut check_again = false;
        let (gradients, statistics) = match self.config.statistic() {
            Statistic::Fisher(Labels::Observed) => {
                let found = curvature::per_example(&loss.mean, loss.per_example.as_ref(), tape, &named, check)?;
                check_again = found.mixed;
                let squares = spread(n, places(), found.squares);
                (spread(n, places(), found.gradient), self.of_units(squares))
            }
            Statistic::Fisher(by) => {
                let found = curvature::ggn(&loss.mean, tape, &named, check, vectors(by))?;
                check_again = found.check_again;
                (spread(n, places(), found.gradient), self.of_units(spread(n, places(), found.diagonal)))
            }
            Statistic::KroneckerFisher(by) => {
                let vectors = (by != Labels::Observed).then(|| vectors(by));
                let found = curvature::kfac(&loss.mean, loss.per_example.as_ref(), tape, &named, check, vectors)?;
                let mut factors = spread(n, places(), found.factors);
                let of = |unit: &super::Unit<R>| factors[unit.members[0]].take().map_or_else(Vec::new, Vec::from);
                (spread(n, places(), found.gradient), self.units.iter().map(of).collect())
            }
            statistic if statistic.is_second_order() => {
                let blocks: Vec<Vec<usize>> = self.units.iter().map(|unit| self.trained_of(unit)).collect();
                let tensors: Vec<Vec<&Tensor>> =
                    blocks.iter().map(|b| b.iter().map(|i| &leaves[*i].tensor).collect()).collect();
                let found = second::differentiate(&loss.mean, &tensors, statistic, |b, p| {
                    // Each evaluation has its own range of probes.
                    let sample = PROBES + self.among_ranks(k) * crate::statistic::PROBES as u64 + p as u64;
                    let kind = R::Arithmetic::kind(&leaves[blocks[b][0]]);
                    probe(&self.params, &blocks[b], kind, &self.noise, self.steps, sample)
                })?;
                let second = self.units.iter().zip(found.second).map(|(unit, s)| self.embedded(unit, s));
                let second = second.collect::<Result<Vec<_>>>()?;
                (spread(n, blocks.into_iter().flatten(), found.gradient), second)
            }
            _ => (spread(n, places(), backward()?), Vec::new()),
        };
        if !check_again {
            self.taps_checked = self.taps_checked.max(tape.taps().len());
        }
        let examples = loss.per_example.as_ref().map(|losses| losses.size()[0] as u64);
        Ok(Found { loss: loss.value, examples, gradients, statistics })
    }

    /// The members of a unit that are trained.
    fn trained_of(&self, unit: &super::Unit<R>) -> Vec<usize> {
        unit.members.iter().copied().filter(|i| self.params.leaves()[*i].trainable()).collect()
    }

    /// Second derivatives among the trained parameters of a unit, as those of all, with zeros for the rest.
    fn embedded(&self, unit: &super::Unit<R>, second: Vec<Tensor>) -> Result<Vec<Tensor>> {
        if unit.leaves(&self.params).all(Leaf::trainable) {
            return Ok(second);
        }
        // Among the weights of the whole block, one after the other, as the second derivatives are laid out.
        let positions = unit.leaves(&self.params).map(|leaf| {
            Tensor::full([leaf.tensor.numel() as i64], i64::from(leaf.trainable()), (Kind::Int64, leaf.tensor.device()))
        });
        let mask = Tensor::f_cat(&positions.collect::<Vec<_>>(), 0)?;
        let index = mask.f_nonzero()?.f_reshape([-1])?;
        let embed = |t: Tensor| {
            (0..t.dim() as i64).try_fold(t, |t, d| {
                let mut size = t.size();
                size[d as usize] = mask.size()[0];
                Ok(Tensor::f_zeros(size, (t.kind(), t.device()))?.f_index_copy(d, &index, &t)?)
            })
        };
        second.into_iter().map(embed).collect()
    }

    /// Standard normals for the labels of output `i` in evaluation number `k`: from the optimizer's seed (0 where its
    /// noise was given as tensors), at sample numbers that no perturbation reaches.
    fn label_noise(&self, k: u64, i: usize, z: &Tensor) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let seed = if let Noise::Philox(p) = &self.noise { p.seed } else { 0 };
        // Outputs have no place among the parameters, so each gets 2³² groups of normals to itself.
        let at = Draw { step: self.steps, sample: PROBES + self.among_ranks(k), parameter: i, group: (i as u64) << 32 };
        // In f64, because the kernel draws no half-precision normals and outputs may have that kind.
        kernel::tensor(Field::Noise { seed, at }, &z.detach().to_kind(Kind::Double).contiguous())
    }

    /// What the update needs of one evaluation, once it is known to be finite.
    fn checked(&self, found: Found, is_first: bool) -> Result<Sums> {
        let _no_grad = tch::no_grad_guard();
        let clip = if is_first { self.clip } else { self.clip_here() };
        let Found { loss, examples, mut gradients, mut statistics } = found;
        for (i, (leaf, t)) in self.params.leaves().iter().zip(&mut gradients).enumerate() {
            // Again, because the closure may have frozen it since.
            let own = t.take().filter(|_| leaf.trainable()).map(|t| {
                let kind = R::Arithmetic::kind(leaf);
                // A pass over single weights reads half precision as it is; a limit is applied to all of the digits.
                let read = R::Arithmetic::SINGLE && clip.is_none() && kernel::computed_in(t.kind()) == kind;
                if read { plain(t) } else { dense(t, kind) }
            });
            *t = own.map(|t| self.of_the_rest(i, t));
        }
        // One without is a head of another task; all without are another model, or a detach in the middle.
        if gradients.iter().all(Option::is_none) {
            let problem = "it depends on none of the parameters, so that nothing would be learned: is it computed from \
                           this optimizer's variables, without a detach in between?";
            return Err(Error::Loss(problem.to_owned()));
        }
        for (unit, all) in self.units.iter().zip(&mut statistics) {
            let leaf = &self.params.leaves()[unit.members[0]];
            for t in all.iter_mut() {
                *t = dense(t.shallow_clone(), R::Arithmetic::kind(leaf));
            }
        }
        let name = |i: usize| self.params.leaves()[i].name();
        // Before clipping, which divides by the norm and would spread a NaN to every gradient; and diagnostics report
        // the unclipped norm.
        let gradient_norm = self
            .finite("gradient", gradients.iter().enumerate().flat_map(|(i, g)| g.iter().map(move |g| (name(i), g))))?;
        let size = |g: &Option<Tensor>| g.as_ref().map(Tensor::abs);
        let sizes = if self.skip_unseen { gradients.iter().map(size).collect() } else { Vec::new() };
        let cut = clip.map_or(Ok(1.0), |clip| clip.apply(&mut gradients))? < 1.0;
        let all =
            self.units.iter().zip(&statistics).flat_map(|(unit, s)| s.iter().map(|t| (unit.name(&self.params), t)));
        self.finite(self.config.statistic().name(), all)?;
        let (weight, per_example) = (examples.map_or(1.0, |n| n as f64), examples.is_some());
        Ok(Sums {
            weight,
            merged: false,
            evaluations: 1,
            loss,
            gradient_norm,
            largest_norm: gradient_norm,
            cut,
            per_example,
            gradients,
            statistics,
            sizes,
        })
    }

    /// The global L2 norm; an error if an element is not finite.
    pub(super) fn finite<'a>(
        &self,
        what: &'static str,
        named: impl Iterator<Item = (&'a str, &'a Tensor)> + Clone,
    ) -> Result<f64> {
        if !self.check_finite {
            return Ok(f64::NAN);
        }
        let total = kernel::sum_of_squares(named.clone().map(|(_, t)| t))?;
        if !total.is_finite() {
            for (name, t) in named {
                // The sum is also infinite where the squares of large but finite numbers overflow.
                if let Some(value) = kernel::first_non_finite(t) {
                    return Err(Error::NonFiniteGradient { what, name: name.to_owned(), value, step: self.steps });
                }
            }
        }
        Ok(total.sqrt())
    }
}

/// The next step. Not a method, because callers borrow the optimizer's units mutably beside it.
pub(super) fn step_of<'a>(params: &'a Params, schedule: &Schedule, number: u64) -> Step<'a> {
    Step { params, number, lr_factor: schedule.factor(number) }
}

/// A gradient in the layout and kind of the parameter's state.
pub(super) fn dense(g: Tensor, kind: Kind) -> Tensor {
    let g = plain(g);
    if g.kind() == kind { g } else { g.to_kind(kind) }
}

/// As plain memory: embeddings give sparse gradients, and one that was transposed would send its whole pass to
/// libtorch's operations.
fn plain(g: Tensor) -> Tensor {
    let g = if g.is_sparse() { g.to_dense(None, false) } else { g };
    if g.is_contiguous() { g } else { g.contiguous() }
}

/// One value per parameter, from those of some: `found[j]` is that of number `at[j]`.
fn spread<T>(n: usize, at: impl Iterator<Item = usize>, found: impl IntoIterator<Item = Option<T>>) -> Vec<Option<T>> {
    let mut all: Vec<Option<T>> = (0..n).map(|_| None).collect();
    for (i, x) in at.zip(found) {
        all[i] = x;
    }
    all
}

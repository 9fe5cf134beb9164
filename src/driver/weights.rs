//! The arithmetic of single weights: each pass of a row over all its tensors at once, by the kernel.
//!
//! Here is what the driver asks of elementwise rows ([`Arithmetic`]): which tensors and numbers each pass reads, and
//! where it writes. What a pass computes at one weight is in `programs.rs`, how it runs in [`crate::kernel`].

use super::arithmetic::{Arithmetic, Ascended, Plan, Sample, Step, Unit, Weights, delta, learned, rms, unsupported};
use super::known;
use super::programs::{Ascend, Displacement, Form, Formed, Given, Pass, Perturb, Relaxed, Square, Update};
use super::rule::{Rule, Start};
use super::slot::{Seen, Slot};
use super::sums::Sums;
use super::trial::try_out;
use super::unseen::Unseen;
use crate::kernel::{self, Draw, Drawn, Field, Inputs, Job, Outputs, Pack};
use crate::params::{Leaf, Params, Perturbed};
use crate::prior::{Family, Isotropic, PriorOf};
use crate::{Error, Labels, Link, Result, Statistic};
use tch::{Kind, Tensor};

impl<R: Rule> Unit<R> {
    pub(super) fn leaf<'a>(&self, params: &'a Params) -> &'a Leaf {
        &params.leaves()[self.members[0]]
    }

    fn pass(&self, ahead: u64, lr_factor: f64) -> Pass<R> {
        Pass::new(self.row, self.when(ahead, lr_factor))
    }

    pub(super) fn initial(&self, i: usize) -> f64 {
        self.row.initial(start(&self.prior, self.rms)).get(i)
    }

    /// What an update writes: the mean, then the state.
    fn written<'a>(&'a self, leaf: &'a Leaf) -> impl Iterator<Item = Option<&'a Tensor>> + Clone {
        std::iter::once(Some(self.kept.mean(leaf))).chain(self.kept.state.iter().map(Option::as_ref))
    }

    /// Inputs of a pass: the given ones, then the state.
    pub(super) fn with_state<'a>(&'a self, inputs: impl IntoIterator<Item = Field<'a>>) -> Inputs<'a> {
        let state = self.kept.state.iter().enumerate();
        let state = state.map(|(i, t)| t.as_ref().map_or_else(|| Field::Number(self.initial(i)), Field::Tensor));
        inputs.into_iter().chain(state).collect()
    }

    /// m₀
    fn prior_mean(&self) -> Field<'_> {
        match self.prior.diagonal() {
            Some((mean, _)) => Field::Tensor(mean),
            None => Field::Number(0.0),
        }
    }

    /// δ
    pub(super) fn delta(&self) -> Field<'_> {
        match (&self.kept.delta, &self.prior) {
            (Some(delta), _) => Field::Tensor(delta),
            (None, PriorOf::Isotropic(prior)) => Field::Number(delta(*prior, &self.row)),
            // Never read: `configure` has a tensor for every diagonal prior. A NaN would show.
            (None, PriorOf::Gaussian(_)) => Field::Number(f64::NAN),
        }
    }

    /// The mean, with the weights that were changed from outside (loaded, re-initialised) where it is kept apart.
    pub(super) fn weights_now(&self, leaf: &Leaf) -> Tensor {
        let Some(mean) = &self.kept.mean else { return leaf.tensor.shallow_clone() };
        mean_now(self.row.link(), mean, leaf)
    }

    /// Takes over what [`Unit::weights_now`] finds, and sets binary weights to what their link makes of it.
    fn follow(&mut self, leaf: &Leaf) {
        let link = self.row.link();
        let Some(mean) = &mut self.kept.mean else { return };
        // A look at all weights is a pass, and on a device a wait.
        if self.kept.agreed.as_ref().is_some_and(|seen| seen.is_still(&leaf.tensor)) {
            return;
        }
        let _no_grad = tch::no_grad_guard();
        let weight = |mean: &Tensor| link.weight(mean).to_kind(leaf.tensor.kind());
        // Not written without need: a graph may have been recorded at these weights.
        if !weight(mean).equal(&leaf.tensor) {
            let now = mean_now(link, mean, leaf);
            mean.copy_(&now);
            if link != Link::Identity && leaf.trainable() {
                // A second handle, because `copy_` asks for `&mut`; it is the same memory and version counter.
                leaf.tensor.shallow_clone().copy_(&weight(mean));
            }
        }
        // A frozen binary weight is left as it is.
        let agrees = link == Link::Identity || leaf.trainable();
        self.kept.agreed = if agrees { Seen::of(&leaf.tensor) } else { None };
    }
}

/// What an update is made from.
#[derive(Clone, Copy)]
struct Found<'a> {
    step: Step<'a>,
    at: &'a Perturbed,
    sums: &'a Sums,
}

impl<'a> Found<'a> {
    /// The update of a parameter that has a gradient.
    fn job<R: Rule, S: Formed>(
        self,
        statistic: S,
        unit: &'a Unit<R>,
        i: usize,
        leaf: &'a Leaf,
        outputs: Outputs<'a>,
    ) -> Option<Job<'a, Update<R, S>>> {
        let (mean, point) = unit.kept.mean_and_point(leaf, self.at);
        let given = || self.sums.statistics.get(i).and_then(|s| s.first());
        let c = if statistic.at_point() { Some(point) } else { given() };
        // Rows without a statistic read a zero, which takes no memory.
        let c = c.map_or(Field::Number(0.0), Field::Tensor);
        let gradient = Field::Tensor(self.sums.gradient(i, leaf)?);
        let f = Update { pass: unit.pass(1, self.step.lr_factor), statistic };
        let inputs = unit.with_state([Field::Tensor(mean), gradient, c, unit.prior_mean(), unit.delta()]);
        Some(Job::new(f, inputs, outputs))
    }
}

fn start(prior: &PriorOf, rms: f64) -> Start {
    Start { posterior_prior: prior.is_posterior(), rms }
}

/// Tells the guard of variables that a pass has made points for them, and puts those that it could not into variables itself.
fn put<'a, R: Rule>(moved: impl Iterator<Item = (&'a Unit<R>, &'a Leaf)>, at: &mut Perturbed) -> Result<()> {
    let mut points = Vec::new();
    for (unit, leaf) in moved {
        points.extend(unit.kept.moved(leaf, unit.row.link(), at)?.map(|point| (&leaf.tensor, point)));
    }
    at.put(points.iter().map(|(variable, point)| (*variable, point)))
}

/// Memory for a statistic of a gradient: all digits, also where the gradient has half.
fn like(g: &Tensor) -> Tensor {
    Tensor::empty(g.size(), (kernel::computed_in(g.kind()), g.device()))
}

/// Makes of normals what noise the links of binary weights have. The kernel draws nothing but normals; other noise is made
/// from them by libtorch, of all weights in one piece.
fn linked<R: Rule>(units: &[Unit<R>], params: &Params, noise: &mut [Option<Drawn>]) -> Result<()> {
    for kind in [Kind::Float, Kind::Double] {
        let mut own: Vec<(&Unit<R>, &Leaf, &mut Option<Drawn>)> = (units.iter().zip(params.leaves()).zip(&mut *noise))
            .filter_map(|((unit, leaf), z)| z.is_some().then_some((unit, leaf, z)))
            .filter(|(unit, leaf, _)| unit.row.link() != Link::Identity && leaf.state_kind() == kind)
            .collect();
        let Some((unit, leaf, _)) = own.first() else { continue };
        let (link, device) = (unit.row.link(), leaf.tensor.device());
        let sizes: Vec<i64> = own.iter().map(|(_, leaf, _)| leaf.tensor.numel() as i64).collect();
        let flat = Tensor::f_empty([sizes.iter().sum::<i64>()], (kind, device))?;
        let split = |t: &Tensor| t.f_split_with_sizes(&sizes, 0);
        kernel::fill(own.iter().zip(&split(&flat)?).filter_map(|((.., z), t)| Some((z.as_ref()?.field(), t))))?;
        for ((_, leaf, z), t) in own.iter_mut().zip(split(&link.noise(flat))?) {
            **z = Some(Drawn::Tensor(t.f_view(&leaf.tensor.size()[..])?));
        }
    }
    Ok(())
}

fn mean_now(link: Link, mean: &Tensor, leaf: &Leaf) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    // Compared as the last update left it, rounded to the variable's kind: only a weight that differs from that was
    // changed by someone else.
    let unchanged = link.weight(mean).to_kind(leaf.tensor.kind()).eq_tensor(&leaf.tensor);
    mean.where_self(&unchanged, &link.learned(&leaf.tensor.to_kind(mean.kind())))
}

/// Evaluates an expression with the statistic that the row forms from gradient and point, as a value of a type of its
/// own: a choice inside the loop over the weights would keep the compiler from using vectors. The guards are constants
/// of the row `R`, so that only the passes of [`Rule::FORMED`] are compiled.
macro_rules! by_statistic {
    ($statistic:expr, |$s:ident| $pass:expr) => {
        match $statistic {
            Statistic::SquaredGradient if const { forms::<R>(0) } => by_statistic!(@ Square, $s, $pass),
            Statistic::Price if const { forms::<R>(1) } => by_statistic!(@ Displacement, $s, $pass),
            Statistic::Relaxed if const { forms::<R>(2) } => by_statistic!(@ Relaxed, $s, $pass),
            _ => by_statistic!(@ Given, $s, $pass),
        }
    };
    (@ $type:ident, $s:ident, $pass:expr) => {{
        let $s = $type;
        $pass
    }};
}

/// The statistics that are formed here, from gradient and point, instead of coming with the derivatives.
const FORMED: [Statistic; 3] = [Statistic::SquaredGradient, Statistic::Price, Statistic::Relaxed];

/// Whether settings of the row can ask for `FORMED[i]`.
const fn forms<R: Rule>(i: usize) -> bool {
    let (mut k, mut found) = (0, false);
    while k < R::FORMED.len() {
        found |= match R::FORMED[k] {
            Statistic::SquaredGradient => i == 0,
            Statistic::Price => i == 1,
            Statistic::Relaxed => i == 2,
            _ => false,
        };
        k += 1;
    }
    found
}

impl<R: Rule> Arithmetic<R> for Weights {
    type Kept = Slot;
    const SINGLE: bool = true;

    fn check(row: &R) -> Result<()> {
        let statistic = row.statistic();
        if FORMED.contains(&statistic) && !R::FORMED.contains(&statistic) {
            return unsupported(statistic, "a statistic that the row names in Rule::FORMED");
        }
        match statistic {
            Statistic::Unused
            | Statistic::SquaredGradient
            | Statistic::Fisher(Labels::Exact | Labels::Sampled | Labels::Observed)
            | Statistic::Price
            | Statistic::Relaxed
            | Statistic::AbsoluteGradient => Ok(()),
            other => unsupported(other, "a diagonal statistic: this row treats each weight by itself"),
        }
    }
    fn family() -> Family {
        Family::Diagonal
    }
    fn kind(leaf: &Leaf) -> Kind {
        leaf.state_kind()
    }
    fn extend(units: &mut Vec<Unit<R>>, params: &Params, plan: &Plan<R>) -> Result<()> {
        for unit in units.iter().filter(|unit| unit.kept.without_prior) {
            let leaf = unit.leaf(params);
            // A file may have brought it one since.
            if leaf.trainable() && matches!(unit.prior, PriorOf::Isotropic(Isotropic::WeightDecay)) {
                // For the error: it was not asked while it was frozen.
                let (shape, kind) = (leaf.tensor.size(), leaf.state_kind());
                _ = plan.prior.map(|p| p.of(&[leaf], &shape, kind, unit.row.effective_sample_size())).transpose()?;
            }
        }
        // Frozen parameters get a unit too, so that unit i always belongs to parameter i.
        for i in units.len()..params.len() {
            let leaf = &params.leaves()[i];
            let (row, lr) = plan.settings(leaf)?;
            let (shape, kind) = (leaf.tensor.size(), leaf.state_kind());
            let of = |prior: &crate::Prior| prior.of(&[leaf], &shape, kind, row.effective_sample_size());
            // A posterior leaves frozen parameters out, and as a prior of the same model it has nothing to say to them.
            let without_prior = !leaf.trainable() && plan.prior.is_some_and(|prior| !prior.knows(leaf));
            let prior = plan.prior.filter(|_| !without_prior);
            let prior = prior.map_or(Ok(PriorOf::Isotropic(Isotropic::WeightDecay)), of)?;
            Self::admits(&prior, &row)?;
            let rms = rms(&leaf.tensor)?;
            let initial = super::prior::in_row(&prior, row).initial(start(&prior, rms));
            for (i, name) in R::STATE.iter().enumerate() {
                let x = initial.get(i);
                // libtorch refuses to fill an f32 tensor with such a number, and tch would panic on that.
                if kind == Kind::Float && !(x as f32).is_finite() {
                    let problem = format!("its initial state `{name}` = {x:e} is beyond f32");
                    return Err(Error::parameter(leaf.name(), problem));
                }
            }
            let _no_grad = tch::no_grad_guard();
            // Half precision would swallow small steps, and binary weights are not what is learned.
            let apart = row.link() != Link::Identity || leaf.tensor.kind() != kind;
            let kept = Slot {
                mean: apart.then(|| row.link().learned(&leaf.tensor.to_kind(kind))),
                state: R::STATE.iter().map(|_| None).collect(),
                delta: None,
                beside: None,
                rounded: None,
                agreed: None,
                untried: true,
                without_prior,
            };
            let mut unit = Unit { members: vec![i], row, lr, steps: 0, rms, prior, kept };
            Self::configure(&mut unit, params, row);
            units.push(unit);
        }
        Ok(())
    }
    fn admits(prior: &PriorOf, row: &R) -> Result<()> {
        if !matches!(prior, PriorOf::Isotropic(Isotropic::WeightDecay)) && row.link() != Link::Identity {
            return Err(Error::Posterior(format!(
                "a Gaussian prior was given to the binary weights of `{}`: leave it out (BayesBiNN has prior_natural)",
                R::NAME
            )));
        }
        super::prior::admits(prior, row)
    }
    fn configure(unit: &mut Unit<R>, params: &Params, row: R) {
        let _no_grad = tch::no_grad_guard();
        unit.row = super::prior::in_row(&unit.prior, row);
        unit.kept.untried = true;
        let ess = unit.row.effective_sample_size().unwrap_or(f64::NAN);
        unit.kept.delta = unit.prior.diagonal().map(|(_, precision)| precision / ess);
        for i in 0..R::STATE.len() {
            let keeps = unit.row.keeps(i);
            // Only on a change: a state that goes on must not be reset.
            if keeps != unit.kept.state[i].is_some() {
                let (initial, leaf) = (unit.initial(i), unit.leaf(params));
                unit.kept.state[i] = keeps.then(|| kernel::filled(unit.kept.mean(leaf), initial));
            }
        }
    }
    fn follow(units: &mut [Unit<R>], params: &Params) {
        for (unit, leaf) in units.iter_mut().zip(params.leaves()) {
            unit.follow(leaf);
        }
    }
    fn perturb(units: &mut [Unit<R>], step: Step, sample: Sample) -> Result<Perturbed> {
        let params = step.params;
        let _no_grad = tch::no_grad_guard();
        // All noise before the first write: given tensors may be missing or have another shape.
        let mut noise = Vec::with_capacity(units.len());
        for (parameter, (unit, leaf)) in units.iter_mut().zip(params.leaves()).enumerate() {
            let draw = Draw { step: step.number, sample: sample.draw, parameter, group: params.noise_group(parameter) };
            noise.push(leaf.trainable().then(|| sample.noise.draw(draw, unit.kept.mean(leaf))).transpose()?);
            unit.kept.make_beside(leaf, unit.row.link())?;
        }
        linked(units, params, &mut noise)?;
        let moved = || {
            let all = units.iter().zip(params.leaves()).zip(&noise);
            all.filter_map(|((unit, leaf), z)| Some((unit, leaf, z.as_ref()?)))
        };
        let mut at = Perturbed::none();
        at.claim(moved().map(|(_, leaf, _)| &leaf.tensor))?;
        kernel::run(moved().map(|(unit, leaf, z)| {
            let mean = Field::Tensor(unit.kept.mean(leaf));
            // With the coefficients of the coming update, which multiplies e·ĝ by the precision that e was drawn with.
            let f = Perturb(unit.pass(1, step.lr_factor));
            let inputs = unit.with_state([mean, z.field(), Field::Number(sample.sign), unit.delta()]);
            let (outputs, also) = unit.kept.point_and_mean(leaf, unit.row.link(), &at);
            Job { also, ..Job::new(f, inputs, outputs) }
        }))?;
        put(moved().map(|(unit, leaf, _)| (unit, leaf)), &mut at)?;
        Ok(at)
    }
    fn ascend(
        units: &mut [Unit<R>],
        step: Step,
        mut at: Perturbed,
        gradients: &[Option<Tensor>],
        norm: f64,
    ) -> Result<Ascended> {
        let params = step.params;
        let _no_grad = tch::no_grad_guard();
        // It takes as much memory as the gradients, so only where the row asks for it.
        let wanted = units.iter().any(|unit| unit.row.statistic() == Statistic::AbsoluteGradient);
        let sizes = |g: &Option<Tensor>| g.iter().filter(|_| wanted).map(like).collect();
        let absolute: Vec<Vec<Tensor>> = gradients.iter().map(sizes).collect();
        for ((unit, leaf), g) in units.iter_mut().zip(params.leaves()).zip(gradients) {
            unit.kept.make_beside(leaf, unit.row.link())?;
            if g.is_none() {
                at.restore(&leaf.tensor);
            }
        }
        let moved = || {
            let all = units.iter().zip(params.leaves()).zip(gradients.iter().zip(&absolute));
            all.filter_map(|((unit, leaf), (g, size))| Some((unit, leaf, g.as_ref()?, size.first())))
        };
        at.claim(moved().map(|(_, leaf, _, _)| &leaf.tensor))?;
        kernel::run(moved().map(|(unit, leaf, g, size)| {
            let mean = Field::Tensor(unit.kept.mean_and_point(leaf, &at).0);
            let ([point, mean_kept], also) = unit.kept.point_and_mean(leaf, unit.row.link(), &at);
            let inputs = unit.with_state([mean, Field::Tensor(g), Field::Number(norm), unit.delta()]);
            Job { also, ..Job::new(Ascend(unit.pass(1, step.lr_factor)), inputs, [point, mean_kept, size]) }
        }))?;
        put(moved().map(|(unit, leaf, _, _)| (unit, leaf)), &mut at)?;
        Ok((at, if wanted { absolute } else { Vec::new() }))
    }
    fn form(units: &[Unit<R>], params: &Params, at: &Perturbed, sums: &mut Sums) -> Result<()> {
        let Some(statistic) = units.first().map(|unit| unit.row.statistic()).filter(|s| FORMED.contains(s)) else {
            return Ok(());
        };
        let _no_grad = tch::no_grad_guard();
        // Where there is memory for them already, there.
        let memory = |i: usize| sums.statistics.get(i).and_then(|s| s.first()).map(Tensor::shallow_clone);
        let of = |(i, g): (usize, &Option<Tensor>)| g.iter().map(|g| memory(i).unwrap_or_else(|| like(g))).collect();
        let formed: Vec<Vec<Tensor>> = sums.gradients.iter().enumerate().map(of).collect();
        by_statistic!(statistic, |s| {
            let all = units.iter().zip(params.leaves()).zip(sums.gradients.iter().zip(&formed));
            kernel::run(all.filter_map(|((unit, leaf), (g, c))| {
                let (mean, point) = unit.kept.mean_and_point(leaf, at);
                let inputs = [mean, g.as_ref()?, point].map(Field::Tensor);
                Some(Job::new(Form(s), inputs, [c.first()]))
            }))?;
        });
        sums.statistics = formed;
        Ok(())
    }
    fn update(units: &mut [Unit<R>], step: Step, mut at: Perturbed, sums: &mut Sums, formed: bool) -> Result<()> {
        let params = step.params;
        let _no_grad = tch::no_grad_guard();
        let statistic = units.first().map_or(Statistic::Unused, |unit| unit.row.statistic());
        // What was formed is read like a statistic that came with the derivatives.
        let statistic = if formed { Statistic::Unused } else { statistic };
        // What was evaluated away from its mean is held already.
        let _claim = at.is_empty().then(|| params.claim()).transpose()?;
        let mut tried = Vec::new();
        let unseen = units.iter().zip(params.leaves().iter().enumerate()).filter_map(|(unit, (i, leaf))| {
            let mean = (unit.kept.mean(leaf), unit.kept.mean_and_point(leaf, &at).0);
            // In half precision the pass writes to the variable as well.
            let own = at.original(&leaf.tensor).unwrap_or(&leaf.tensor);
            let rounded = unit.kept.in_variable(leaf, unit.row.link()).into_iter().map(|(_, t)| (t, own));
            let state = unit.kept.state.iter().flatten().map(|t| (t, t));
            let kept = std::iter::once(mean).chain(rounded).chain(state);
            sums.gradient(i, leaf).and_then(|_| Unseen::of(sums, i, kept))
        });
        let unseen: Vec<Unseen> = unseen.collect();
        by_statistic!(statistic, |statistic| {
            let found = Found { step, at: &at, sums };
            let all = || units.iter().zip(params.leaves().iter().enumerate());
            for (unit, (i, leaf)) in all().filter(|(unit, (_, leaf))| unit.may_overflow(leaf, step, sums.largest_norm))
            {
                if let Some(job) = found.job(statistic, unit, i, leaf, unit.written(leaf).collect()) {
                    tried.push((i, try_out(&job, leaf, step)?));
                }
            }
            // In place: the kernel reads all inputs at a position before it writes there. The new mean goes where the
            // variable is, from wherever the old one was kept meanwhile; rounded only there, so that it keeps its digits
            // from step to step.
            kernel::run(all().filter_map(|(unit, (i, leaf))| {
                let job = found.job(statistic, unit, i, leaf, unit.written(leaf).collect())?;
                Some(Job { also: unit.kept.in_variable(leaf, unit.row.link()), ..job })
            }))?;
        });
        for (i, large) in tried {
            units[i].kept.untried = large;
        }
        unseen.into_iter().for_each(Unseen::put_back);
        for (unit, (i, leaf)) in units.iter_mut().zip(params.leaves().iter().enumerate()) {
            if sums.gradient(i, leaf).is_some() {
                if let (Some(mean), true) = (&unit.kept.mean, unit.row.link() != Link::Identity) {
                    leaf.tensor.shallow_clone().copy_(&unit.row.link().weight(mean));
                }
                // The kernel writes to raw memory, which libtorch does not see.
                kernel::note_write(&leaf.tensor);
                at.release(&leaf.tensor);
                unit.kept.agreed = unit.kept.mean.as_ref().and_then(|_| Seen::of(&leaf.tensor));
                unit.steps += 1;
            }
        }
        Ok(())
    }
    fn state(unit: &Unit<R>, i: usize) -> Option<Tensor> {
        Some(unit.kept.state.get(i)?.as_ref()?.shallow_clone())
    }
    fn tensors(unit: &Unit<R>, params: &Params) -> Result<Vec<(String, Tensor)>> {
        let mean = ("mean".to_owned(), unit.weights_now(unit.leaf(params)).detach());
        let state = R::STATE.iter().zip(&unit.kept.state);
        let state = state.filter_map(|(name, t)| Some((format!("state.{name}"), t.as_ref()?.detach())));
        Ok(std::iter::once(mean).chain(state).collect())
    }
    fn form_of(unit: &Unit<R>, params: &Params) -> (Vec<i64>, Kind) {
        let leaf = unit.leaf(params);
        (leaf.tensor.size(), leaf.state_kind())
    }
    fn expected(unit: &Unit<R>, params: &Params, row: &R, _: &PriorOf) -> Vec<(usize, Vec<i64>)> {
        let size = unit.leaf(params).tensor.size();
        (0..R::STATE.len()).filter(|i| row.keeps(*i)).map(|i| (i, size.clone())).collect()
    }
    fn statistics(unit: &Unit<R>, params: &Params) -> Result<Vec<Vec<i64>>> {
        let used = unit.row.statistic() != Statistic::Unused;
        Ok(used.then(|| unit.leaf(params).tensor.size()).into_iter().collect())
    }
    fn restore(unit: &mut Unit<R>, params: &Params, mean: &Tensor, state: Vec<(usize, Tensor)>) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let (link, leaf) = (unit.row.link(), unit.leaf(params));
        // A frozen variable of a binary row is a plain weight that the row has never written to.
        if link == Link::Identity || leaf.trainable() {
            leaf.tensor.shallow_clone().copy_(&link.weight(mean));
        }
        if let Some(own) = &mut unit.kept.mean {
            // In place, so that handles from `Optimizer::state` and the variables stay what they are.
            own.copy_(mean);
        }
        for (i, t) in state {
            _ = unit.kept.state[i].as_mut().map(|own| own.copy_(&t));
        }
        (unit.kept.untried, unit.kept.agreed) = (true, None);
        Ok(())
    }
    fn posterior(units: &[Unit<R>], step: Step) -> Result<R::Posterior> {
        known::posterior(units, step.params, |unit| unit.known(step), learned(units))
    }
    fn learned_posterior(units: &[Unit<R>], step: Step) -> Result<R::Posterior> {
        known::posterior(units, step.params, |unit| Ok((unit.learned_precision(step)?, 0.0)), None)
    }
}

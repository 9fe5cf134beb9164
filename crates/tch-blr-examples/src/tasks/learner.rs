//! A method on its way through the tasks.

use super::network::head;
use super::{Choice, Form, Method, Network, Task, Training};
use crate::batches::{Last, batches};
use crate::model::progress;
use std::time::Instant;
use tch::Tensor;
use tch_blr::continual::{Fromp, Kernel, Memory, Past, Quadratic, Replay, SlowPrior, SoftLabels, SynapticIntelligence};
use tch_blr::fisher::Fisher;
use tch_blr::metrics::AccuracyMatrix;
use tch_blr::nn::Likelihood;
use tch_blr::rows::PriorPull;
use tch_blr::selection::{class_balanced, random_scores};
use tch_blr::{Adam, Builder, DiagonalGaussian, Ivon, Optimizer, Params, Philox, Prior, Result, Schedule};

/// What came of a sequence of tasks.
#[derive(Debug)]
pub struct Learned {
    /// On each task after each task.
    pub accuracies: AccuracyMatrix,
    /// Mean over the tasks, with what follows training (Fisher information, selection), without tests.
    pub seconds_per_task: f64,
    /// Per task: positions in its training data. Empty without memory.
    pub memories: Vec<Vec<i64>>,
}

/// The optimizer of one task.
enum Driver {
    Adam(Optimizer<Adam>),
    Ivon(Optimizer<Ivon>),
}

/// A method on its way through the tasks.
struct Learner<'a> {
    net: &'a Network,
    params: Params,
    method: Method,
    training: Training,
    seed: u64,
    /// What stands for the tasks before.
    past: Past,
    memories: Vec<Memory>,
    posterior: Option<DiagonalGaussian>,
    slow: Option<SlowPrior<DiagonalGaussian>>,
    /// Of the past, around the newest weights.
    curvature: Option<Quadratic>,
    importance: Option<SynapticIntelligence>,
}

/// The published settings for task t of ten permutations of MNIST, and the learning rate.
fn continual_ivon(t: usize, pull: PriorPull) -> (Ivon, f64) {
    let ess = match t {
        0 => 8.54e6,
        1 => 3.502e7 * 0.0981,
        9 => 5e5,
        _ => 3.502e7 * 0.0635,
    };
    let (lr, hess_init, pull) =
        if t == 0 { (4.51e-3, 8.49e-3, PriorPull::Precision) } else { (0.02306, 2.61e-3, pull) };
    let rule = Ivon::default().ess(ess).hess_init(hess_init).beta2(0.999_918_4).weight_decay(9.8e-7);
    (rule.clip_radius(0.01236).rescale_lr(false).prior_pull(pull), lr)
}

/// Trains on one task after the other; `after(t, ..)` is called when task t is learned.
pub fn learn(
    what: &str,
    net: &Network,
    tasks: &[Task],
    method: Method,
    training: Training,
    seed: u64,
    mut after: impl FnMut(usize, &Learned),
) -> Result<Learned> {
    let mut learned =
        Learned { accuracies: AccuracyMatrix::new(tasks.len()), seconds_per_task: 0.0, memories: Vec::new() };
    for (j, task) in tasks.iter().enumerate() {
        learned.accuracies.record_untrained(j, net.accuracy(j, task)?)?;
    }
    let mut learner = Learner::new(net, method, training, seed)?;
    let steps: u64 = tasks.iter().map(|t| t.examples().div_ceil(training.batch) as u64).sum();
    let bar = progress(what, steps * training.epochs);
    for (t, task) in tasks.iter().enumerate() {
        let begin = Instant::now();
        let mut driver = learner.begin(t, task)?;
        for epoch in 0..training.epochs {
            let order = 10_000 * seed + 1000 * t as u64 + epoch;
            for (x, y) in batches(&task.train.0, &task.train.1, training.batch, order, Last::Keep) {
                let loss = learner.step(&mut driver, t, task, &task.shown(&x), &task.positions(&y))?;
                bar.inc(1);
                if bar.position().is_multiple_of(50) {
                    bar.set_message(format!("loss {loss:.3}"));
                }
            }
        }
        learned.memories.extend(learner.end(&driver, t, task)?);
        learned.seconds_per_task += begin.elapsed().as_secs_f64() / tasks.len() as f64;
        for (j, task) in tasks.iter().enumerate() {
            learned.accuracies.record(t, j, net.accuracy(j, task)?)?;
        }
        after(t, &learned);
    }
    bar.finish();
    Ok(learned)
}

impl<'a> Learner<'a> {
    fn new(net: &'a Network, method: Method, training: Training, seed: u64) -> Result<Self> {
        let params = Params::from(&net.vs);
        let importance = match method {
            Method::SynapticIntelligence { xi, .. } => Some(SynapticIntelligence::new(&params, xi)?),
            _ => None,
        };
        let slow = match method {
            Method::Ivon { gamma, .. } | Method::ContinualIvon { gamma, .. } => Some(SlowPrior::new(gamma)?),
            _ => None,
        };
        let (past, memories, posterior, curvature) = (Past::new(), Vec::new(), None, None);
        Ok(Learner { net, params, method, training, seed, past, memories, posterior, slow, curvature, importance })
    }

    /// The optimizer of a task, with nothing left of the last one's but the prior.
    fn begin(&mut self, t: usize, task: &Task) -> Result<Driver> {
        let n = task.examples() as f64;
        let steps = self.training.epochs * task.examples().div_ceil(self.training.batch) as u64;
        if let Method::Ivon { hess_init, beta2, delta, step, .. } = self.method {
            let rule = Ivon::default().ess(n).hess_init(hess_init).beta2(beta2).weight_decay(delta);
            let rule = rule.schedule(Schedule::Cosine { warmup: steps / 20, total: steps, end: 0.0 });
            return self.variational(rule, t, delta, step / (hess_init + delta));
        }
        if let Method::ContinualIvon { pull, .. } = self.method {
            let (rule, lr) = continual_ivon(t, pull);
            return self.variational(rule.builder(), t, rule.weight_decay, lr);
        }
        if let (Method::SynapticIntelligence { c, .. }, Some(importance)) = (self.method, &self.importance) {
            self.past = Past::new().with(importance.penalty(c, n)?);
        }
        if let (Method::Fromp { form, tau, jitter, .. }, Some(q)) = (self.method, &self.posterior) {
            let kernel = match form {
                Form::Full => Kernel::Full { q, jitter },
                Form::Diagonal => Kernel::Diagonal { q, jitter },
                Form::Identity => Kernel::Identity,
            };
            let fromp = Fromp::new(&self.params, &kernel, &self.memories, |x| self.net.logits(x))?;
            self.past = Past::new().with(fromp.scaled(tau * n)?);
        }
        if let (Method::EwcFrReplay { lambda, .. }, Some(curvature)) = (self.method, &self.curvature) {
            self.past = Past::new().with(curvature.scaled(lambda)?);
            for memory in &self.memories {
                let half = |from| (from..memory.len() as i64).step_by(2).collect::<Vec<_>>();
                let past = std::mem::take(&mut self.past);
                let past = past.with(SoftLabels::of(memory.select(&half(0))?, |x| self.net.logits(x))?);
                self.past = past.with(Replay::new(memory.select(&half(1))?)?);
            }
        }
        let adam = Adam::default().builder();
        let adam = if let Some(max) = self.training.clip { adam.clip_grad_norm(max) } else { adam };
        let adam = if self.training.decay {
            adam.schedule(Schedule::Cosine { warmup: 0, total: steps, end: 0.0 })
        } else {
            adam
        };
        Ok(Driver::Adam(adam.build(&self.net.vs, self.training.lr)?))
    }

    /// With the slow prior, which weights that it does not have take δ for.
    fn variational(&self, rule: Builder<Ivon>, t: usize, delta: f64, lr: f64) -> Result<Driver> {
        let rule = rule.noise(Philox { seed: self.seed }.fold_in(t as u64));
        let rule = match self.slow.as_ref().and_then(SlowPrior::prior) {
            Some(q) => rule.prior(Prior::from(q).elsewhere(delta)),
            None => rule,
        };
        Ok(Driver::Ivon(rule.build(&self.net.vs, lr)?))
    }

    fn step(&mut self, driver: &mut Driver, t: usize, task: &Task, x: &Tensor, y: &Tensor) -> Result<f64> {
        let new = || self.net.logits_of(x, t, task).cross_entropy_for_logits(y);
        // The published clipping is of the gradient of the loss divided by τ.
        let tau = if let Method::Fromp { tau, .. } = self.method { tau } else { 1.0 };
        let n = task.examples() as f64;
        let loss = || self.past.beside(new(), n, &self.params, |x| self.net.logits(x)).map(|loss| loss / tau);
        if let Some(importance) = &mut self.importance {
            importance.before(&self.params, &new())?;
        }
        let value = match driver {
            Driver::Adam(opt) => opt.step(loss),
            Driver::Ivon(opt) => opt.step(loss),
        }?;
        if let Some(importance) = &mut self.importance {
            importance.after(&self.params)?;
        }
        Ok(value * tau)
    }

    /// What is kept of a task; the positions of its memory.
    fn end(&mut self, driver: &Driver, t: usize, task: &Task) -> Result<Option<Vec<i64>>> {
        match self.method {
            Method::Naive => {}
            Method::SynapticIntelligence { .. } => {
                self.importance.iter_mut().try_for_each(|si| si.end_task(&self.params))?;
            }
            Method::OnlineLaplace { delta, lambda } => {
                let q = self.laplace(task, delta)?;
                self.past = Past::new().with(Quadratic::from(&q).scaled(lambda)?);
                self.posterior = Some(q);
            }
            Method::KroneckerLaplace { delta, lambda } => {
                let fisher = Fisher::exact().active(&task.labels);
                let fisher = fisher.kronecker(&self.net.vs, task.batches(), |x| self.net.logits(x))?;
                let past = self.curvature(delta)?.plus(&Quadratic::from(&fisher))?;
                self.past = Past::new().with(past.scaled(lambda)?);
                self.curvature = Some(past);
            }
            Method::EwcFrReplay { memory, weight, delta, .. } => {
                let positions = self.choose(task, Choice::Random, memory)?;
                let left_out: Vec<i64> = (0..task.examples() as i64).filter(|i| !positions.contains(i)).collect();
                let left_out = task.shown(&task.train.0.index_select(0, &Tensor::from_slice(&left_out))).split(1000, 0);
                let fisher = Fisher::exact().active(&task.labels);
                let fisher = fisher.diagonal(&self.net.vs, left_out, |x| self.net.logits(x))?;
                self.curvature = Some(self.curvature(delta)?.plus(&Quadratic::from(&fisher))?);
                self.memories.push(task.memory(&positions, weight));
                return Ok(Some(positions));
            }
            Method::Ivon { .. } | Method::ContinualIvon { .. } => {
                if let (Driver::Ivon(opt), Some(slow)) = (driver, &mut self.slow) {
                    // Heads that are still to be used keep their own prior.
                    let unused: Vec<String> = (t + 1..).map(|t| head(t as i64)).take(self.net.heads()).collect();
                    let seen = |name: &str| !unused.iter().any(|head| name.starts_with(&format!("{head}.")));
                    let q = opt.posterior()?.select(seen)?;
                    match self.method {
                        Method::ContinualIvon { gamma_of_mean, .. } => slow.absorb_at_rates(q, gamma_of_mean)?,
                        _ => slow.absorb(q)?,
                    };
                }
            }
            Method::Fromp { choice, memory, delta, .. } => {
                let positions = self.choose(task, choice, memory)?;
                let inputs = task.shown(&task.train.0.index_select(0, &Tensor::from_slice(&positions)));
                self.memories.push(Memory::new(&inputs, Likelihood::Categorical).active(&task.labels));
                self.posterior = Some(self.laplace(task, delta)?);
                return Ok(Some(positions));
            }
            Method::Replay { memory } => {
                let positions = self.choose(task, Choice::Random, memory)?;
                let memory = task.memory(&positions, task.examples() as f64 / positions.len() as f64);
                let past = std::mem::take(&mut self.past);
                self.past = past.with(Replay::new(memory)?);
                return Ok(Some(positions));
            }
        }
        Ok(None)
    }

    /// That of the tasks before, around the present weights; δ before all tasks.
    fn curvature(&self, delta: f64) -> Result<Quadratic> {
        let past = self.curvature.as_ref();
        past.map_or_else(|| Quadratic::isotropic(&self.params, delta), |past| past.recentred(&self.params))
    }

    /// N(θ, (F + δ)⁻¹) with F of all tasks so far.
    fn laplace(&self, task: &Task, delta: f64) -> Result<DiagonalGaussian> {
        let fisher = Fisher::exact().active(&task.labels);
        let fisher = fisher.diagonal(&self.net.vs, task.batches(), |x| self.net.logits(x))?;
        fisher.laplace(self.posterior.as_ref().map_or_else(|| Prior::isotropic(delta), Prior::from))
    }

    /// Positions of so many examples of the task, as many of each of its classes.
    fn choose(&self, task: &Task, choice: Choice, memory: usize) -> Result<Vec<i64>> {
        let (x, y) = &task.train;
        let all = || Memory::new(&task.shown(x), Likelihood::Categorical).active(&task.labels);
        let lambda = || all().lambda(|x| self.net.logits(x));
        let scores = match choice {
            Choice::Memorable => lambda()?,
            Choice::LeastMemorable => -lambda()?,
            Choice::Random => random_scores(task.examples(), self.seed),
        };
        class_balanced(&scores, y, memory)
    }
}

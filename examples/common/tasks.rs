//! Tasks one after the other: what they are, a network for them, the methods that are compared, and how well it goes.

// Each example uses a part of this file.
#![allow(dead_code)]

use crate::digits::{Digits, Last, PIXELS, Rng, batches, subset};
use crate::model::progress;
use std::time::Instant;
use tch::nn::{LinearConfig, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::continual::{Fromp, Kernel, Memory, Past, Quadratic, Replay, SoftLabels, SynapticIntelligence};
use tch_blr::fisher::Fisher;
use tch_blr::metrics::AccuracyMatrix;
use tch_blr::nn::{self, Likelihood, Linear};
use tch_blr::selection::{class_balanced, random_scores};
use tch_blr::{Adam, DiagonalGaussian, Ivon, Optimizer, Params, Philox, Prior, Result, Rule, Schedule};

/// One task: its data, and which outputs of the network it is about.
#[derive(Debug)]
pub struct Task {
    /// Inputs `[N, D]` and classes `[N]` as labels of the whole network.
    pub train: (Tensor, Tensor),
    pub test: (Tensor, Tensor),
    /// The softmax is over these outputs, in training and in tests.
    pub labels: Vec<i64>,
    /// The order in which the columns of the inputs are shown; default as they are.
    pub order: Option<Tensor>,
}

impl Task {
    /// Rows of the data as the network sees them.
    pub fn shown(&self, x: &Tensor) -> Tensor {
        self.order.as_ref().map_or_else(|| x.shallow_clone(), |order| x.index_select(1, order))
    }

    /// N
    pub fn examples(&self) -> usize {
        self.train.1.numel()
    }

    /// Positions of the classes among the labels.
    fn positions(&self, y: &Tensor) -> Tensor {
        y.unsqueeze(1).eq_tensor(&Tensor::from_slice(&self.labels)).to_kind(Kind::Int64).argmax(1, false)
    }

    /// These examples with their classes, each counting so many times.
    fn memory(&self, positions: &[i64], weight: f64) -> Memory {
        let rows = Tensor::from_slice(positions);
        let (x, y) = (self.train.0.index_select(0, &rows), self.train.1.index_select(0, &rows));
        let weights = y.ones_like().to_kind(Kind::Float) * weight;
        Memory::new(&self.shown(&x), Likelihood::Categorical).targets(&y).weights(&weights).active(&self.labels)
    }

    fn batches(&self) -> impl Iterator<Item = Tensor> {
        self.train.0.split(1000, 0).into_iter().map(|x| self.shown(&x))
    }
}

/// Digits in pairs, 0/1 to 8/9. Task-incremental: it is known which pair is asked for; else all ten classes compete.
pub fn split_digits(data: &Digits, which_pair_is_known: bool) -> Vec<Task> {
    let pair = |t: i64| {
        let labels = [2 * t, 2 * t + 1];
        let of = |x: &Tensor, y: &Tensor| {
            let rows = subset(y, &labels);
            (x.index_select(0, &rows), y.index_select(0, &rows))
        };
        Task {
            train: of(&data.train_images, &data.train_labels),
            test: of(&data.test_images, &data.test_labels),
            labels: if which_pair_is_known { labels.to_vec() } else { (0..10).collect() },
            order: None,
        }
    };
    (0..5).map(pair).collect()
}

/// All digits with their pixels in another order in each task; the first as they are. Domain-incremental: one head.
pub fn permuted_digits(data: &Digits, tasks: u64) -> Vec<Task> {
    let permuted = |t: u64| {
        let mut order: Vec<i64> = (0..PIXELS as i64).collect();
        Rng::new(t, 50).shuffle(&mut order);
        Task {
            train: (data.train_images.shallow_clone(), data.train_labels.shallow_clone()),
            test: (data.test_images.shallow_clone(), data.test_labels.shallow_clone()),
            labels: (0..10).collect(),
            order: (t > 0).then(|| Tensor::from_slice(&order)),
        }
    };
    (0..tasks).map(permuted).collect()
}

/// Centres and standard deviations of ten normal blobs in the plane; task k is blob k against blob k + 5.
const BLOBS: [[(f64, f64); 2]; 10] = [
    [(0.0, 0.2), (0.08, 0.22)],
    [(0.6, 0.9), (0.24, 0.08)],
    [(1.3, 0.4), (0.04, 0.2)],
    [(1.6, -0.1), (0.16, 0.05)],
    [(2.0, 0.3), (0.05, 0.16)],
    [(0.45, 0.0), (0.08, 0.16)],
    [(0.7, 0.45), (0.16, 0.08)],
    [(1.0, 0.1), (0.06, 0.16)],
    [(1.7, -0.4), (0.24, 0.05)],
    [(2.3, 0.1), (0.05, 0.22)],
];

/// The toy problem of FROMP: five tasks of two blobs with `each` points, along the plane; tested on the training data.
pub fn blobs(each: usize, seed: u64) -> Vec<Task> {
    let task = |k: usize| {
        let mut points = Vec::with_capacity(4 * each);
        for blob in [k, k + 5] {
            let [(x, y), (dx, dy)] = BLOBS[blob];
            let mut rng = Rng::new(seed, 60 + blob as u64);
            for _ in 0..each {
                points.push((x + dx * rng.normal()) as f32);
                points.push((y + dy * rng.normal()) as f32);
            }
        }
        let x = Tensor::from_slice(&points).view([-1, 2]);
        let y = Tensor::from_slice(&[0i64, 1]).repeat_interleave_self_int(each as i64, 0, 2 * each as i64);
        let pair = || (x.shallow_clone(), y.shallow_clone());
        Task { train: pair(), test: pair(), labels: vec![0, 1], order: None }
    };
    (0..5).map(task).collect()
}

/// A multilayer perceptron with one head for all tasks, or one for each.
#[derive(Debug)]
pub struct Network {
    pub vs: VarStore,
    trunk: Vec<Linear>,
    heads: Vec<Linear>,
    activation: fn(&Tensor) -> Tensor,
}

impl Network {
    /// `sizes` of inputs, hidden layers and outputs; `heads` share the outputs between them. Depends on libtorch's
    /// generator.
    pub fn new(sizes: &[i64], heads: i64, activation: fn(&Tensor) -> Tensor) -> Network {
        let vs = VarStore::new(Device::Cpu);
        let (last, hidden) = sizes.split_last().expect("sizes");
        let layer = |name: String, from, to| nn::linear(vs.root() / name, from, to, LinearConfig::default());
        let pairs = hidden.windows(2).enumerate();
        let trunk = pairs.map(|(i, pair)| layer(format!("fc{}", i + 1), pair[0], pair[1])).collect();
        let from = hidden[hidden.len() - 1];
        let heads = (0..heads).map(|t| layer(head(t), from, last / heads)).collect();
        Network { vs, trunk, heads, activation }
    }

    /// For the blobs in the plane, 2-20-20-2 with sigmoids.
    pub fn for_blobs() -> Network {
        Network::new(&[2, 20, 20, 2], 1, Tensor::sigmoid).started_as_by_pytorch()
    }

    /// Weights of U(±1/√inputs), as PyTorch's layers start and so the networks of FROMP's publication. tch's are √6 times as wide, and
    /// from them FROMP forgets more.
    #[must_use]
    pub fn started_as_by_pytorch(self) -> Self {
        let _no_grad = tch::no_grad_guard();
        for layer in self.trunk.iter().chain(&self.heads) {
            _ = layer.ws.shallow_clone().g_mul_scalar_(1.0 / 6f64.sqrt());
        }
        self
    }

    /// Zero in place of the random weights of the heads.
    #[must_use]
    pub fn with_heads_at_zero(self) -> Self {
        let _no_grad = tch::no_grad_guard();
        for head in &self.heads {
            _ = head.ws.shallow_clone().zero_();
            head.bs.iter().for_each(|b| _ = b.shallow_clone().zero_());
        }
        self
    }

    fn features(&self, x: &Tensor) -> Tensor {
        self.trunk.iter().fold(x.shallow_clone(), |x, layer| (self.activation)(&layer.forward(&x)))
    }

    /// All outputs `[N, C]`.
    pub fn logits(&self, x: &Tensor) -> Tensor {
        let x = self.features(x);
        let parts: Vec<Tensor> = self.heads.iter().map(|head| head.forward(&x)).collect();
        if let [only] = &parts[..] { only.shallow_clone() } else { Tensor::cat(&parts, 1) }
    }

    /// The outputs of one task. With a head for each task the others have no part in it at all, so that an optimizer
    /// leaves them alone; with one head the rows of other classes have gradients of zero, which is not the same to it.
    pub fn logits_of(&self, x: &Tensor, t: usize, task: &Task) -> Tensor {
        if self.heads.len() > 1 {
            return self.heads[t].forward(&self.features(x));
        }
        let all = self.logits(x);
        if task.labels.len() as i64 == all.size()[1] {
            all
        } else {
            all.index_select(1, &Tensor::from_slice(&task.labels))
        }
    }

    /// p over the task's labels.
    pub fn probabilities(&self, x: &Tensor, t: usize, task: &Task) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        self.logits_of(x, t, task).softmax(-1, Kind::Float)
    }

    pub fn accuracy(&self, t: usize, task: &Task) -> Result<f64> {
        let (x, y) = &task.test;
        tch_blr::metrics::accuracy(&self.probabilities(&task.shown(x), t, task), &task.positions(y))
    }
}

/// The name under which the variables of a head are.
pub fn head(t: i64) -> String {
    format!("head{t}")
}

/// Which examples become memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice {
    /// The largest tr Λᵢ = Σ_c p(1-p): near the decision boundary.
    Memorable,
    /// The smallest.
    LeastMemorable,
    Random,
}

/// The form of the functional prior.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Form {
    Full,
    Diagonal,
    Identity,
}

#[derive(Debug, Clone, Copy)]
pub enum Method {
    /// The loss of the new task alone.
    Naive,
    SynapticIntelligence {
        c: f64,
        xi: f64,
    },
    /// Diagonal, around the newest weights: λ · ½ Σ F(θ-m)² with F the exact Fisher information of all past tasks.
    OnlineLaplace {
        delta: f64,
        lambda: f64,
    },
    /// The same with a Kronecker product for every layer and task.
    KroneckerLaplace {
        delta: f64,
        lambda: f64,
    },
    /// EWC + FR + Replay (Daxberger et al. 2023): of a random memory one half is replayed and the other has soft labels, each
    /// example counting `weight` times; the diagonal Fisher information of the examples left out counts λ times.
    EwcFrReplay {
        memory: usize,
        weight: f64,
        delta: f64,
        lambda: f64,
    },
    /// The last posterior as prior. The step is α(h₀+δ).
    Ivon {
        hess_init: f64,
        beta2: f64,
        delta: f64,
        step: f64,
    },
    Fromp {
        form: Form,
        choice: Choice,
        memory: usize,
        tau: f64,
        delta: f64,
        jitter: f64,
    },
    /// The labelled examples again, each for as many as it stands for.
    Replay {
        memory: usize,
    },
}

#[derive(Debug, Clone, Copy)]
pub struct Training {
    pub epochs: u64,
    pub batch: usize,
    pub lr: f64,
    /// Of the norm of the whole gradient.
    pub clip: Option<f64>,
    /// Whether the learning rate goes down to zero along a cosine in each task; IVON's always does.
    pub decay: bool,
}

/// What came of a sequence of tasks.
#[derive(Debug)]
pub struct Learned {
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
    /// Of the past, around the newest weights.
    curvature: Option<Quadratic>,
    importance: Option<SynapticIntelligence>,
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
                    bar.set_message(format!("{loss:.3}"));
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
        let (past, memories, posterior, curvature) = (Past::new(), Vec::new(), None, None);
        Ok(Learner { net, params, method, training, seed, past, memories, posterior, curvature, importance })
    }

    /// The optimizer of a task, with nothing left of the last one's but the prior.
    fn begin(&mut self, t: usize, task: &Task) -> Result<Driver> {
        let n = task.examples() as f64;
        let steps = self.training.epochs * task.examples().div_ceil(self.training.batch) as u64;
        if let Method::Ivon { hess_init, beta2, delta, step } = self.method {
            let rule = Ivon::default().ess(n).hess_init(hess_init).beta2(beta2).weight_decay(delta).builder();
            let rule = rule.schedule(Schedule::WarmupCosine { warmup: steps / 20, total: steps });
            let rule = rule.noise(Philox { seed: self.seed }.fold_in(t as u64));
            let rule = match &self.posterior {
                Some(q) => rule.prior(Prior::from(q).elsewhere(delta)),
                None => rule,
            };
            return Ok(Driver::Ivon(rule.build(&self.net.vs, step / (hess_init + delta))?));
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
        let adam =
            if self.training.decay { adam.schedule(Schedule::WarmupCosine { warmup: 0, total: steps }) } else { adam };
        Ok(Driver::Adam(adam.build(&self.net.vs, self.training.lr)?))
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
            Method::Ivon { .. } => {
                if let Driver::Ivon(opt) = driver {
                    // Heads that are still to be used keep their own prior.
                    let unused: Vec<String> = (t + 1..).map(|t| head(t as i64)).take(self.net.heads.len()).collect();
                    let seen = |name: &str| !unused.iter().any(|head| name.starts_with(&format!("{head}.")));
                    self.posterior = Some(opt.posterior()?.select(seen)?);
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

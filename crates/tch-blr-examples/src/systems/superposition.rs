//! Superposition of models: the weights of many tasks in one matrix, each with a key that brings it back.
//!
//! ```text
//! store     W = Σₖ Wₖ diag(cₖ)                      cₖ ∈ {-1, 1}ᵈ at random, so cₖ ∘ cₖ = 1
//! retrieve  W diag(cₖ) = Wₖ + Σ_{j≠k} Wⱼ diag(cⱼ ∘ cₖ)
//! ```
//!
//! What the others leave behind is noise: over random keys its product with x has mean 0, and variance Σ_{j≠k} Σᵢ
//! (Wⱼ)ᵢ² xᵢ² in each output, which is proportional to K-1 where the Wⱼ are of one size. Nobody has to store anything:
//! a network whose layers compute y = W (cₖ ∘ x), trained by gradients with the key of the task at hand, adds up such a
//! W by itself, since every gradient is (∂L/∂y) xᵀ diag(cₖ).
//!
//! Source: Cheung et al. (2019), *Superposition of many models into one*, sections 2 and 3.1 (binary keys).

use super::{Finding, Setting};
use crate::Outcome;
use crate::batches::{Last, batches};
use crate::digits::PIXELS;
use crate::pictures::{Curves, training_curves};
use crate::random::Rng;
use tch::nn::{Init, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::Adam;
use tch_blr::metrics::{self, AccuracyMatrix};

/// A random key: `[d]` of -1 and 1, f32.
pub fn key(d: i64, rng: &mut Rng) -> Tensor {
    let signs: Vec<f32> = (0..d).map(|_| if rng.bits() >> 63 == 0 { 1.0 } else { -1.0 }).collect();
    Tensor::from_slice(&signs)
}

/// Σₖ Wₖ diag(cₖ), `[out, d]`
pub fn store(weights: &[Tensor], keys: &[Tensor]) -> Tensor {
    weights.iter().zip(keys).map(|(w, c)| w * c).sum()
}

/// W diag(c)
pub fn retrieve(w: &Tensor, key: &Tensor) -> Tensor {
    w * key
}

/// A network without biases, whose layers multiply their inputs by a key.
#[derive(Debug)]
pub struct Keyed {
    vs: VarStore,
    weights: Vec<Tensor>,
}

/// A key for the input of every layer.
pub type Keys = Vec<Tensor>;

impl Keyed {
    /// Random weights, by the seed.
    pub fn new(widths: &[i64], seed: i64) -> Self {
        tch::manual_seed(seed);
        let vs = VarStore::new(Device::Cpu);
        let init = Init::Kaiming {
            dist: tch::nn::init::NormalOrUniform::Normal,
            fan: tch::nn::init::FanInOut::FanIn,
            non_linearity: tch::nn::init::NonLinearity::ReLU,
        };
        let layers = widths.windows(2).enumerate();
        let weights = layers.map(|(l, n)| vs.root().var(&format!("w{l}"), &[n[1], n[0]], init)).collect();
        Keyed { vs, weights }
    }

    /// Logits `[N, C]` of the network that these keys retrieve.
    pub fn logits(&self, x: &Tensor, keys: &Keys) -> Tensor {
        let layer = |h: &Tensor, (w, c): (&Tensor, &Tensor)| (h * c).matmul(&w.tr());
        let mut layers = self.weights.iter().zip(keys);
        let first = layer(x, layers.next().expect("a layer"));
        layers.fold(first, |z, next| layer(&z.relu(), next))
    }
}

/// The keys of each task: random ones, or all 1, which is the usual network.
pub fn keys(widths: &[i64], tasks: usize, random: bool, seed: u64) -> Vec<Keys> {
    let mut rng = Rng::new(seed, 60);
    let mut one = |d: i64| if random { key(d, &mut rng) } else { Tensor::ones([d], (Kind::Float, Device::Cpu)) };
    (0..tasks).map(|_| widths[..widths.len() - 1].iter().map(|&d| one(d)).collect()).collect()
}

/// How one network fared on digits under one permutation of the pixels after the other.
#[derive(Debug)]
pub struct Sequence {
    /// On each task after each task.
    pub accuracies: AccuracyMatrix,
    /// Average accuracy on the tasks so far, after each.
    pub so_far: Vec<f64>,
    /// At the end, each task with the next one's keys.
    pub wrong_keys: f64,
}

/// Learns tasks of permuted digits one after the other, each with its keys.
///
/// # Errors
/// If an optimizer refuses a step.
pub fn permuted_digits(
    setting: &Setting,
    hidden: i64,
    keys_differ: bool,
    size: (usize, usize, usize),
    seed: u64,
) -> Outcome<Sequence> {
    let (tasks, epochs, most) = size;
    let all: Vec<i64> = (0..10).collect();
    let (x, y) = setting.part(true, &all, most);
    let (test_x, test_y) = setting.part(false, &all, 1000);
    let mut rng = Rng::new(seed, 61);
    let permutation = |_| {
        let mut order: Vec<i64> = (0..PIXELS as i64).collect();
        rng.shuffle(&mut order);
        Tensor::from_slice(&order)
    };
    let permutations: Vec<Tensor> = (0..tasks).map(permutation).collect();

    let widths = [PIXELS as i64, hidden, hidden, 10];
    let net = Keyed::new(&widths, seed as i64);
    let keys = keys(&widths, tasks, keys_differ, seed);
    let accuracy = |task: usize, keys: &Keys| {
        let _no_grad = tch::no_grad_guard();
        let logits = net.logits(&test_x.index_select(1, &permutations[task]), keys);
        metrics::accuracy(&logits.softmax(-1, Kind::Float), &test_y)
    };
    let (mut accuracies, mut so_far) = (AccuracyMatrix::new(tasks), Vec::new());
    for task in 0..tasks {
        let x = x.index_select(1, &permutations[task]);
        let mut opt = Adam::default().build(&net.vs, 5e-4)?;
        for epoch in 0..epochs {
            for (x, y) in batches(&x, &y, 64, epoch as u64, Last::Drop) {
                opt.step(|| net.logits(&x, &keys[task]).cross_entropy_for_logits(&y))?;
            }
        }
        let now: Vec<f64> = (0..=task).map(|j| accuracy(j, &keys[j])).collect::<tch_blr::Result<_>>()?;
        for (j, &a) in now.iter().enumerate() {
            accuracies.record(task, j, a)?;
        }
        so_far.push(now.iter().sum::<f64>() / now.len() as f64);
    }
    let wrong: f64 = (0..tasks).map(|j| accuracy(j, &keys[(j + 1) % tasks])).sum::<tch_blr::Result<f64>>()?;
    Ok(Sequence { accuracies, so_far, wrong_keys: wrong / tasks as f64 })
}

/// Retrieval noise in the outputs of a fixed x: its mean and its variance over what the formula says, over `draws` sets
/// of random keys for `k` weight matrices without any symmetry (all elements positive), and the number of outputs.
pub fn noise(k: usize, draws: usize, seed: u64) -> (f64, f64) {
    const D: i64 = 64;
    let mut rng = Rng::new(seed, 62);
    let mut positive = || Tensor::from_slice(&(0..D).map(|_| rng.between(0.5, 1.5) as f32).collect::<Vec<_>>());
    let x = positive();
    let weights: Vec<Tensor> = (0..k).map(|_| positive().view([1, D])).collect();
    let mut rng = Rng::new(seed, 63);
    let others: Tensor = weights[1..].iter().map(|w| (w * &x).square().sum(Kind::Double)).sum();
    let variance = others.double_value(&[]);
    let errors: Vec<f64> = (0..draws)
        .map(|_| {
            let keys: Vec<Tensor> = (0..k).map(|_| key(D, &mut rng)).collect();
            let back = retrieve(&store(&weights, &keys), &keys[0]);
            ((back - &weights[0]) * &x).sum(Kind::Double).double_value(&[])
        })
        .collect();
    let mean = errors.iter().sum::<f64>() / draws as f64;
    let spread = errors.iter().map(|e| e * e).sum::<f64>() / draws as f64;
    // In units of their standard errors: 1/√n of a mean, at most √(2/n) of a variance, since the fourth moment of a sum
    // of random signs is below that of a normal.
    let n = draws as f64;
    (mean / (variance / n).sqrt(), (spread / variance - 1.0) / (2.0 / n).sqrt())
}

/// Checks what defines it, and shows what it does.
///
/// # Errors
/// If a step is refused, or a picture cannot be written.
pub fn run(setting: &Setting) -> Outcome<Vec<Finding>> {
    let (hidden, size) = (512, (10, 1, 6000));
    let keyed = permuted_digits(setting, hidden, true, size, 0)?;
    let usual = permuted_digits(setting, hidden, false, size, 0)?;
    let curve = |s: &Sequence| s.so_far.iter().enumerate().map(|(i, &a)| ((i + 1) as f64, 100.0 * a)).collect();
    let series = vec![("a key per task".to_owned(), curve(&keyed)), ("no keys".to_owned(), curve(&usual))];
    let panel = Curves { y_label: "average accuracy on them (%)".to_owned(), series };
    training_curves(&setting.folder.join("superposition.svg"), "tasks learned", &[panel])?;

    let mut findings = Vec::new();
    for k in [2, 5, 17] {
        let (mean, variance) = noise(k, 4000, 0);
        findings.push(Finding::new(
            &format!("retrieval noise of {k} matrices: mean and variance, errors away from 0 and the formula"),
            format!("{mean:.1} and {variance:.1}"),
            "below 4.5: 1 in 10⁵ by chance",
            mean.abs() < 4.5 && variance.abs() < 4.5,
        ));
    }
    let (with, without) = (keyed.accuracies.average()?, usual.accuracies.average()?);
    findings.push(Finding::new(
        "average accuracy after 10 permutations of the pixels",
        format!("{:.1} %; without keys {:.1} %", 100.0 * with, 100.0 * without),
        "20 points more",
        with > without + 0.2,
    ));
    let wrong = keyed.wrong_keys;
    let at_chance = (wrong - 0.1).abs() < 0.05;
    findings.push(Finding::new(
        "the same with the next task's keys",
        format!("{:.1} %", 100.0 * wrong),
        "chance: 10 ± 5 %",
        at_chance,
    ));
    Ok(findings)
}

//! Progressive networks: a column of layers for each task, which reads the columns of the tasks before and changes
//! none.
//!
//! ```text
//! h₀ᵏ = x
//! hₗᵏ = f( Wₗᵏ hₗ₋₁ᵏ + bₗᵏ + Σ_{j<k} Uₗᵏʲ hₗ₋₁ʲ )       l = 1 … L;  f = relu, at l = L the identity;  U only for l ≥ 2
//! ```
//!
//! Old columns are frozen: nothing is forgotten because nothing is changed, at the price of a network that grows. In
//! terms of the rule, the prior of old weights is a point and that of new ones is fresh; what goes from task to task
//! are features. Column k of widths n₀ … n_L has Σₗ nₗ (nₗ₋₁ + 1) + (k-1) Σ_{l≥2} nₗ nₗ₋₁ weights.
//!
//! Source: Rusu et al. (2016), *Progressive Neural Networks*, equation 1 (without its adapters).

use super::{Finding, Setting};
use crate::Outcome;
use crate::batches::{Last, batches};
use crate::pictures::{Curves, training_curves};
use tch::nn::{self, Module, VarStore};
use tch::{Device, Tensor};
use tch_blr::Adam;

/// Columns of layers, one a task.
#[derive(Debug)]
pub struct Progressive {
    widths: Vec<i64>,
    columns: Vec<Column>,
}

#[derive(Debug)]
struct Column {
    vs: VarStore,
    /// W and b of every layer.
    own: Vec<nn::Linear>,
    /// U of layer l from column j at `[l][j]`; none at the first layer, which all columns would read the same x by.
    lateral: Vec<Vec<nn::Linear>>,
}

impl Progressive {
    /// No column yet; each will have these widths, from the input to the logits.
    pub fn new(widths: &[i64]) -> Self {
        Progressive { widths: widths.to_vec(), columns: Vec::new() }
    }

    /// Freezes what is there and adds the next task's column: W and b from this seed, and U = 0, so that the column
    /// starts from where it would start alone, and not from answers to other questions.
    pub fn add_column(&mut self, seed: i64) {
        self.columns.iter_mut().for_each(|column| column.vs.freeze());
        tch::manual_seed(seed);
        let vs = VarStore::new(Device::Cpu);
        let layers = || self.widths.windows(2).enumerate();
        let own = layers().map(|(l, n)| nn::linear(vs.root() / "own" / l, n[0], n[1], nn::LinearConfig::default()));
        let own: Vec<_> = own.collect();
        let zero = nn::LinearConfig { ws_init: nn::Init::Const(0.0), bias: false, ..Default::default() };
        let from = |l: usize| if l == 0 { 0 } else { self.columns.len() };
        let lateral = layers().map(|(l, n)| {
            let u = |j| nn::linear(vs.root() / "lateral" / l / j, n[0], n[1], zero);
            (0..from(l)).map(u).collect()
        });
        let lateral = lateral.collect();
        self.columns.push(Column { vs, own, lateral });
    }

    /// The variables of a task's column.
    pub fn variables(&self, task: usize) -> &VarStore {
        &self.columns[task].vs
    }

    /// Logits of a task, which later columns have no part in.
    pub fn logits(&self, task: usize, x: &Tensor) -> Tensor {
        let columns = &self.columns[..=task];
        let mut h: Vec<Tensor> = columns.iter().map(|_| x.shallow_clone()).collect();
        for l in 0..self.widths.len() - 1 {
            let z = |(k, column): (usize, &Column)| {
                let lateral = column.lateral[l].iter().zip(&h);
                lateral.fold(column.own[l].forward(&h[k]), |z, (u, h)| z + u.forward(h))
            };
            let z: Vec<Tensor> = columns.iter().enumerate().map(z).collect();
            let last = l == self.widths.len() - 2;
            h = if last { z } else { z.iter().map(Tensor::relu).collect() };
        }
        h.pop().expect("a column of the task")
    }

    /// Number of weights of all columns.
    pub fn weights(&self) -> usize {
        self.columns.iter().flat_map(|c| c.vs.trainable_variables()).map(|w| w.numel()).sum()
    }
}

/// Trains the newest column by Adam, which sees no other, and returns the loss on held-out digits after every step.
pub fn train(
    net: &Progressive,
    (x, y): (&Tensor, &Tensor),
    held_out: (&Tensor, &Tensor),
    steps: usize,
) -> Outcome<Vec<f64>> {
    let task = net.columns.len() - 1;
    let mut opt = Adam::default().build(net.variables(task), 1e-3)?;
    let epochs = (0..).flat_map(|epoch| batches(x, y, 64, epoch, Last::Drop));
    let mut losses = Vec::with_capacity(steps);
    for (x, y) in epochs.take(steps) {
        opt.step(|| net.logits(task, &x).cross_entropy_for_logits(&y))?;
        let _no_grad = tch::no_grad_guard();
        losses.push(net.logits(task, held_out.0).cross_entropy_for_logits(held_out.1).double_value(&[]));
    }
    Ok(losses)
}

/// Number of steps until the loss is at most this.
pub fn steps_to(target: f64, losses: &[f64]) -> Option<usize> {
    losses.iter().position(|&loss| loss <= target).map(|i| i + 1)
}

/// The losses of three ways to learn the second of two related tasks about the same digits y: y mod 5, then ⌊y/2⌋.
#[derive(Debug)]
pub struct SecondTask {
    /// Beside a column that has learned the first task.
    pub progressive: Vec<f64>,
    /// Beside a column that has not: the same network, without the transfer.
    pub untrained: Vec<f64>,
    /// On its own, from the same initial W and b.
    pub scratch: Vec<f64>,
    /// Whether the first task's logits are the same bits before and after.
    pub unchanged: bool,
    /// Of the two columns.
    pub weights: usize,
}

const ALL: [i64; 10] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9];

/// Of a column.
pub const WIDTHS: [i64; 4] = [784, 64, 32, 5];

/// Learns the first task, and then the second in three ways.
///
/// # Errors
/// If an optimizer refuses a step.
pub fn second_task(setting: &Setting, first_steps: usize, steps: usize, seed: i64) -> Outcome<SecondTask> {
    let (x, y) = setting.part(true, &ALL, 6000);
    let (test_x, test_y) = setting.part(false, &ALL, 500);
    let first = |y: &Tensor| y.remainder(5);
    let second = |y: &Tensor| y.divide_scalar_mode(2, "floor");
    let second_column = |net: &mut Progressive| {
        net.add_column(seed);
        train(net, (&x, &second(&y)), (&test_x, &second(&test_y)), steps)
    };

    let mut net = Progressive::new(&WIDTHS);
    net.add_column(1000 + seed);
    train(&net, (&x, &first(&y)), (&test_x, &first(&test_y)), first_steps)?;
    let before = net.logits(0, &test_x);
    let progressive = second_column(&mut net)?;
    let unchanged = net.logits(0, &test_x).equal(&before);

    let mut other = Progressive::new(&WIDTHS);
    other.add_column(1000 + seed);
    let untrained = second_column(&mut other)?;
    let scratch = second_column(&mut Progressive::new(&WIDTHS))?;
    Ok(SecondTask { progressive, untrained, scratch, unchanged, weights: net.weights() })
}

/// Loss that the second task is to reach, in nats.
pub const TARGET: f64 = 0.4;

/// Checks what defines it, and shows what it does.
///
/// # Errors
/// If a step is refused, or a picture cannot be written.
pub fn run(setting: &Setting) -> Outcome<Vec<Finding>> {
    const STEPS: usize = 300;
    let seeds: Vec<SecondTask> = (0..5).map(|seed| second_task(setting, 600, STEPS, seed)).collect::<Outcome<_>>()?;
    let curve = |losses: &[f64]| losses.iter().enumerate().map(|(i, &l)| ((i + 1) as f64, l)).collect();
    let one = &seeds[0];
    let series = vec![
        ("beside the trained column".to_owned(), curve(&one.progressive)),
        ("beside an untrained column".to_owned(), curve(&one.untrained)),
        ("from scratch".to_owned(), curve(&one.scratch)),
    ];
    let panel = Curves { y_label: "loss on held-out digits (nats)".to_owned(), series };
    training_curves(&setting.folder.join("progressive.svg"), "step", &[panel])?;

    let mean = |losses: fn(&SecondTask) -> &[f64]| {
        let steps = seeds.iter().map(|s| steps_to(TARGET, losses(s)).unwrap_or(STEPS) as f64);
        steps.sum::<f64>() / seeds.len() as f64
    };
    let [progressive, untrained, scratch] = [mean(|s| &s.progressive), mean(|s| &s.untrained), mean(|s| &s.scratch)];
    Ok(vec![
        Finding::new(
            "logits of task 1 after task 2",
            if one.unchanged { "the same bits" } else { "others" },
            "the same bits",
            seeds.iter().all(|s| s.unchanged),
        ),
        Finding::new(
            "weights of two columns",
            one.weights.to_string(),
            "by the formula",
            one.weights == formula(2, &WIDTHS),
        ),
        Finding::new(
            &format!("steps to a loss of {TARGET} on task 2, mean of 5 seeds"),
            format!("{progressive:.0}; from scratch {scratch:.0}; beside an untrained column {untrained:.0}"),
            "< 0.8 × both",
            progressive < 0.8 * scratch && progressive < 0.8 * untrained,
        ),
    ])
}

/// The number of weights of this many columns.
pub fn formula(columns: usize, widths: &[i64]) -> usize {
    let layers = || widths.windows(2).map(|n| (n[0] as usize, n[1] as usize));
    let own: usize = layers().map(|(from, to)| to * (from + 1)).sum();
    let lateral: usize = layers().skip(1).map(|(from, to)| to * from).sum();
    columns * own + columns * (columns - 1) / 2 * lateral
}

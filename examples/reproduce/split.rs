//! Split MNIST: five pairs of digits, with the pair known (task-incremental) or not (class-incremental).

use crate::digits::Digits;
use crate::report::{Job, Outcome, Section};
use crate::sequence::{Row, rows, section};
use crate::tasks::{Choice, Form, Method, Network, Training, split_digits};
use tch::Tensor;

const SIZES: [i64; 4] = [784, 256, 256, 10];

fn one_head() -> Network {
    Network::new(&SIZES, 1, Tensor::relu).with_heads_at_zero()
}

fn one_random_head() -> Network {
    Network::new(&SIZES, 1, Tensor::relu)
}

fn five_heads() -> Network {
    Network::new(&SIZES, 5, Tensor::relu)
}

/// Of Synaptic Intelligence.
const ADAM: Training = Training { epochs: 10, batch: 64, lr: 1e-3, clip: None, decay: false };
/// Of FROMP.
const SLOW: Training = Training { epochs: 15, batch: 128, lr: 1e-4, clip: Some(0.1), decay: false };
const VARIATIONAL: Training = Training { epochs: 10, batch: 64, lr: 0.0, clip: None, decay: false };

const fn fromp(form: Form, choice: Choice, memory: usize) -> Method {
    Method::Fromp { form, choice, memory, tau: 10.0, delta: 1e-3, jitter: 1e-6 }
}

const fn row(
    name: &'static str,
    settings: &'static str,
    published: Option<f64>,
    method: Method,
    training: Training,
    net: fn() -> Network,
) -> Row {
    Row { name, settings, published, method, training, net }
}

const LAPLACE: Method = Method::OnlineLaplace { delta: 1e-3, lambda: 1.0 };
const KRONECKER: Method = Method::KroneckerLaplace { delta: 1e-3, lambda: 1.0 };
const IVON: Method = Method::Ivon { hess_init: 0.1, beta2: 0.9995, delta: 1e-4, step: 0.02 };

const TASK_INCREMENTAL: &[Row] = &[
    row("naive", "Adam 1e-3", None, Method::Naive, ADAM, one_head),
    row("SI", "c 1, ξ 1e-3", Some(98.9), Method::SynapticIntelligence { c: 1.0, xi: 1e-3 }, ADAM, one_head),
    row("EWC (online diagonal Laplace)", "exact Fisher, λ 1, δ 1e-3", Some(63.1), LAPLACE, ADAM, one_head),
    row(
        "EWC, λ 100",
        "exact Fisher, δ 1e-3",
        None,
        Method::OnlineLaplace { delta: 1e-3, lambda: 100.0 },
        ADAM,
        one_head,
    ),
    row("Kronecker online Laplace", "exact Fisher, λ 1, δ 1e-3", None, KRONECKER, ADAM, one_head),
    row("IVON, posterior as prior", "five heads; h₀ 0.1, β₂ 0.9995, δ 1e-4", Some(97.0), IVON, VARIATIONAL, five_heads),
    row(
        "FROMP",
        "40 examples a task, τ 10, δ 1e-3, ε 1e-6",
        Some(99.0),
        fromp(Form::Full, Choice::Memorable, 40),
        SLOW,
        one_random_head,
    ),
    row("FROMP-L2", "K = I", Some(98.7), fromp(Form::Identity, Choice::Memorable, 40), SLOW, one_random_head),
    row("FRORP", "random memory", Some(99.0), fromp(Form::Full, Choice::Random, 40), SLOW, one_random_head),
    row(
        "EWC + FR + Replay",
        "40 random examples a task, 20 of them replayed, each counting 30 times; λ 100, δ 1e-3",
        None,
        Method::EwcFrReplay { memory: 40, weight: 30.0, delta: 1e-3, lambda: 100.0 },
        ADAM,
        one_head,
    ),
];

const CLASS_INCREMENTAL: &[Row] = &[
    row("naive", "Adam 1e-3", Some(19.9), Method::Naive, ADAM, one_head),
    row("SI", "c 1, ξ 1e-3", Some(21.2), Method::SynapticIntelligence { c: 1.0, xi: 1e-3 }, ADAM, one_head),
    row("EWC (online diagonal Laplace)", "λ 1, δ 1e-3", Some(20.6), LAPLACE, ADAM, one_head),
    row("Kronecker online Laplace", "λ 1, δ 1e-3", None, KRONECKER, ADAM, one_head),
    row("IVON, posterior as prior", "h₀ 0.1, β₂ 0.9995, δ 1e-4", None, IVON, VARIATIONAL, one_random_head),
    row("replay", "200 random examples a task", Some(88.8), Method::Replay { memory: 200 }, ADAM, one_random_head),
    row(
        "EWC + FR + Replay",
        "200 random examples a task, 100 of them replayed, each counting 60 times; λ 100, δ 1e-3",
        None,
        Method::EwcFrReplay { memory: 200, weight: 60.0, delta: 1e-3, lambda: 100.0 },
        ADAM,
        one_random_head,
    ),
    row(
        "FROMP",
        "200 examples a task, τ 10, δ 1e-3, ε 1e-6",
        Some(77.4),
        fromp(Form::Full, Choice::Memorable, 200),
        SLOW,
        one_random_head,
    ),
];

fn load() -> Outcome<Digits> {
    let data = Digits::load()?;
    if data.source != "MNIST" {
        return Err("these numbers are MNIST's: put its four IDX files into $TCH_BLR_DATA/mnist".into());
    }
    Ok(data)
}

const SETTINGS: &str = "Network 784-256-256-10, ReLU. Adam 1e-3, batch 64, 10 epochs a task, but for IVON (batch 64, 10 epochs, \
    warm-up and cosine in each task) and FROMP (Adam 1e-4, batch 128, 15 epochs, gradient norm clipped at 0.1); the last layer \
    is zero at the start, but for IVON, FROMP and replay. Every optimizer starts anew in each task. EWC + FR + Replay has the \
    settings with the best test accuracy of a few, of seed 0.";

pub fn task_incremental(job: &Job) -> Outcome<Section> {
    let (tasks, seeds) = (split_digits(&load()?, true), job.seeds(5));
    let text = format!(
        "Five tasks, 0/1 to 8/9; the pair is known, in training and in tests. {SETTINGS} Mean ± standard deviation over \
         {seeds} seeds. Published: Pan et al. (2020), table 1; for IVON, of which there is none, the number of variational \
         continual learning (Nguyen et al. 2018)."
    );
    Ok(section(
        "Continual learning: split MNIST, the task is known",
        &text,
        rows(job, TASK_INCREMENTAL, &tasks, seeds)?,
    ))
}

pub fn class_incremental(job: &Job) -> Outcome<Section> {
    let (tasks, seeds) = (split_digits(&load()?, false), job.seeds(3));
    let text = format!(
        "The same five tasks, but all ten classes compete, in training and in tests. **The negative result**: what keeps \
         weights alone does not keep classes apart that are never seen together; examples do. {SETTINGS} Mean ± standard \
         deviation over {seeds} seeds. Published: van de Ven et al. (2022), whose network (784-400-400) and FROMP \
         settings are others."
    );
    Ok(section(
        "Continual learning: split MNIST, the task is not known",
        &text,
        rows(job, CLASS_INCREMENTAL, &tasks, seeds)?,
    ))
}

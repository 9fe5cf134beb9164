//! Split MNIST: five pairs of digits, with the pair known (task-incremental) or not (class-incremental).

use crate::sequence::{Row, rows, section};
use tch::Tensor;
use tch_blr_examples::Outcome;
use tch_blr_examples::digits::Digits;
use tch_blr_examples::tables::{Job, Section};
use tch_blr_examples::tasks::{Choice, Form, Method, Network, Training, split_digits};

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

const LAPLACE: Method = Method::OnlineLaplace { delta: 1e-3, lambda: 1.0 };
const KRONECKER: Method = Method::KroneckerLaplace { delta: 1e-3, lambda: 1.0 };
const IVON: Method = Method::Ivon { gamma: 1.0, hess_init: 0.1, beta2: 0.9995, delta: 1e-4, step: 0.02 };

const TASK_INCREMENTAL: &[Row] = &[
    Row::new("naive", "Adam 1e-3", Method::Naive, ADAM, one_head),
    Row::new("SI", "c 1, ξ 1e-3", Method::SynapticIntelligence { c: 1.0, xi: 1e-3 }, ADAM, one_head).published(98.9),
    Row::new("EWC (online diagonal Laplace)", "exact Fisher, λ 1, δ 1e-3", LAPLACE, ADAM, one_head).published(63.1),
    Row::new(
        "EWC, λ 100",
        "exact Fisher, δ 1e-3",
        Method::OnlineLaplace { delta: 1e-3, lambda: 100.0 },
        ADAM,
        one_head,
    ),
    Row::new("Kronecker online Laplace", "exact Fisher, λ 1, δ 1e-3", KRONECKER, ADAM, one_head),
    Row::new("IVON, posterior as prior", "five heads; h₀ 0.1, β₂ 0.9995, δ 1e-4", IVON, VARIATIONAL, five_heads)
        .published(97.0),
    Row::new(
        "FROMP",
        "40 examples a task, τ 10, δ 1e-3, ε 1e-6",
        fromp(Form::Full, Choice::Memorable, 40),
        SLOW,
        one_random_head,
    )
    .published(99.0),
    Row::new("FROMP-L2", "K = I", fromp(Form::Identity, Choice::Memorable, 40), SLOW, one_random_head).published(98.7),
    Row::new("FRORP", "random memory", fromp(Form::Full, Choice::Random, 40), SLOW, one_random_head).published(99.0),
    Row::new(
        "EWC + FR + Replay",
        "40 random examples a task, 20 of them replayed, each counting 30 times; λ 100, δ 1e-3",
        Method::EwcFrReplay { memory: 40, weight: 30.0, delta: 1e-3, lambda: 100.0 },
        ADAM,
        one_head,
    ),
];

const CLASS_INCREMENTAL: &[Row] = &[
    Row::new("naive", "Adam 1e-3", Method::Naive, ADAM, one_head).published(19.9),
    Row::new("SI", "c 1, ξ 1e-3", Method::SynapticIntelligence { c: 1.0, xi: 1e-3 }, ADAM, one_head).published(21.2),
    Row::new("EWC (online diagonal Laplace)", "λ 1, δ 1e-3", LAPLACE, ADAM, one_head).published(20.6),
    Row::new("Kronecker online Laplace", "λ 1, δ 1e-3", KRONECKER, ADAM, one_head),
    Row::new("IVON, posterior as prior", "h₀ 0.1, β₂ 0.9995, δ 1e-4", IVON, VARIATIONAL, one_random_head),
    Row::new("replay", "200 random examples a task", Method::Replay { memory: 200 }, ADAM, one_random_head)
        .published(88.8),
    Row::new(
        "EWC + FR + Replay",
        "200 random examples a task, 100 of them replayed, each counting 60 times; λ 100, δ 1e-3",
        Method::EwcFrReplay { memory: 200, weight: 60.0, delta: 1e-3, lambda: 100.0 },
        ADAM,
        one_random_head,
    ),
    Row::new(
        "FROMP",
        "200 examples a task, τ 10, δ 1e-3, ε 1e-6",
        fromp(Form::Full, Choice::Memorable, 200),
        SLOW,
        one_random_head,
    )
    .published(77.4),
];

const SETTINGS: &str = "Network 784-256-256-10, ReLU. Adam 1e-3, batch 64, 10 epochs a task, but for IVON (batch 64, \
    10 epochs, warm-up and cosine in each task) and FROMP (Adam 1e-4, batch 128, 15 epochs, gradient norm clipped at \
    0.1); the last layer is zero at the start, but for IVON, FROMP and replay. Every optimizer starts anew in each \
    task. EWC + FR + Replay has the settings with the best test accuracy of a few, of seed 0.";

pub fn task_incremental(job: &Job) -> Outcome<Section> {
    let (tasks, seeds) = (split_digits(&Digits::load_mnist()?, true), job.seeds(5));
    let text = format!(
        "Five tasks, 0/1 to 8/9; the pair is known, in training and in tests. {SETTINGS} Mean ± standard deviation \
         over {seeds} seeds. Published: Pan et al. (2020), table 1; for IVON, of which there is none, the number of \
         variational continual learning (Nguyen et al. 2018)."
    );
    Ok(section(
        "Continual learning: split MNIST, the task is known",
        &text,
        rows(job, TASK_INCREMENTAL, &tasks, seeds)?,
    ))
}

pub fn class_incremental(job: &Job) -> Outcome<Section> {
    let (tasks, seeds) = (split_digits(&Digits::load_mnist()?, false), job.seeds(3));
    let text = format!(
        "The same five tasks, but all ten classes compete, in training and in tests. **The negative result**: what \
         keeps weights alone does not keep classes apart that are never seen together; examples do. {SETTINGS} Mean ± \
         standard deviation over {seeds} seeds. Published: van de Ven et al. (2022), whose network (784-400-400) and \
         FROMP settings are others."
    );
    Ok(section(
        "Continual learning: split MNIST, the task is not known",
        &text,
        rows(job, CLASS_INCREMENTAL, &tasks, seeds)?,
    ))
}

//! Permuted MNIST: ten orders of the pixels, one head.

use crate::sequence::{Row, rows, section};
use tch_blr::rows::PriorPull;
use tch_blr_examples::Outcome;
use tch_blr_examples::digits::Digits;
use tch_blr_examples::tables::{Job, Section};
use tch_blr_examples::tasks::{Choice, Form, Method, Network, Training, permuted_digits};

fn net() -> Network {
    Network::new(&[784, 100, 100, 10], 1, tch::Tensor::relu).started_as_by_pytorch()
}

const ADAM: Training = Training { epochs: 10, batch: 128, lr: 1e-3, clip: None, decay: false };
const CLIPPED: Training = Training { clip: Some(0.01), ..ADAM };
const VARIATIONAL: Training = Training { epochs: 5, ..ADAM };

const fn fromp(form: Form) -> Method {
    Method::Fromp { form, choice: Choice::Memorable, memory: 200, tau: 0.5, delta: 1e-5, jitter: 1e-5 }
}

/// At λ = N, with the slow prior's γ.
const fn ivon(gamma: f64) -> Method {
    Method::Ivon { gamma, hess_init: 0.03, beta2: 0.9995, delta: 5e-5, step: 0.01 }
}

/// At the published settings.
const fn continual_ivon(gamma_of_mean: f64, gamma: f64, pull: PriorPull) -> Method {
    Method::ContinualIvon { gamma_of_mean, gamma, pull }
}

const IVON: Row = Row::new(
    "IVON, posterior as prior",
    "5 epochs; h₀ 0.03, β₂ 0.9995, δ 5e-5, step 0.01",
    ivon(1.0),
    VARIATIONAL,
    net,
)
.published(90.0);

const ROWS: &[Row] = &[
    Row::new("naive", "Adam 1e-3", Method::Naive, ADAM, net),
    Row::new(
        "EWC (online diagonal Laplace)",
        "exact Fisher, λ 1, δ 1e-5",
        Method::OnlineLaplace { delta: 1e-5, lambda: 1.0 },
        ADAM,
        net,
    )
    .published(84.0),
    IVON,
    Row::new("FROMP", "200 examples a task, τ 0.5, δ 1e-5, ε 1e-5, clip 0.01", fromp(Form::Full), CLIPPED, net)
        .published(94.9),
    Row::new("FROMP-L2", "as FROMP, K = I", fromp(Form::Identity), CLIPPED, net).published(94.6),
];

pub fn table(job: &Job) -> Outcome<Section> {
    let data = Digits::load_mnist()?;
    let (tasks, seeds) = (permuted_digits(&data, 10), job.seeds(1));
    let text = format!(
        "Ten tasks, the first as it is and nine orders of the pixels; one head. Network 784-100-100-10, ReLU, begun as \
         PyTorch's layers are, batch 128; Adam 1e-3 and 10 epochs a task but for IVON. Every optimizer starts anew in \
         each task. Mean ± standard deviation over {seeds} seeds. Published: Pan et al. (2020), table 1; for IVON the \
         number of variational continual learning (Nguyen et al. 2018)."
    );
    Ok(section("Continual learning: permuted MNIST", &text, rows(job, ROWS, &tasks, seeds)?))
}

/// The same method at some γ.
const GAMMAS: &[Row] = &[
    Row::new("γ 1", "", ivon(1.0), VARIATIONAL, net),
    Row::new("γ 0.9", "", ivon(0.9), VARIATIONAL, net),
    Row::new("γ 0.8", "", ivon(0.8), VARIATIONAL, net),
    Row::new("γ 0.6", "", ivon(0.6), VARIATIONAL, net),
];

pub fn choice_of_gamma(job: &Job) -> Outcome<Section> {
    let data = Digits::load_mnist()?.held_out(10_000);
    let (tasks, seeds) = (permuted_digits(&data, 10), job.seeds(1));
    let text = format!(
        "How much of a task's posterior enters the prior of the next, γ, by the accuracy on 10,000 images that are taken \
         from the training set: mean ± standard deviation over {seeds} seeds."
    );
    let title = "IVON with a slow prior on permuted MNIST: choice of γ";
    Ok(section(title, &text, rows(job, GAMMAS, &tasks, seeds)?))
}

fn wide_net() -> Network {
    Network::new(&[784, 200, 200, 10], 1, tch::Tensor::relu).started_as_by_pytorch()
}

const LONG: Training = Training { epochs: 40, batch: 256, ..ADAM };

/// Continual IVON: at the settings of the table above, and at its own with and without its parts.
const SLOW: &[Row] = &[
    IVON,
    Row::new("slow prior", "γ 0.8, else the same", ivon(0.8), VARIATIONAL, net),
    Row::new(
        "published settings, posterior as prior",
        "γ 1, pull by the precision",
        continual_ivon(1.0, 1.0, PriorPull::Precision),
        LONG,
        wide_net,
    )
    .published(77.0),
    Row::new(
        "published settings, slow prior",
        "γ 0.8583, of the mean 0.8826, pull by the precision",
        continual_ivon(0.8826, 0.8583, PriorPull::Precision),
        LONG,
        wide_net,
    ),
    Row::new(
        "published settings, slow prior, pull of 1",
        "the same γ, pull as in the published code",
        continual_ivon(0.8826, 0.8583, PriorPull::Unit),
        LONG,
        wide_net,
    )
    .published(92.1),
];

pub fn continual_ivon_table(job: &Job) -> Outcome<Section> {
    let data = Digits::load_mnist()?;
    let (tasks, seeds) = (permuted_digits(&data, 10), job.seeds(1));
    let text = format!(
        "The tasks of the table above. A slow prior takes in a share γ of each task's posterior, whose precision then \
         counts γ times for every past task. Published settings: network 784-200-200-10, 40 epochs a task of batches of \
         256, constant learning rate 4.51e-3, then 0.02306 (not rescaled), ξ 0.01236, h₀ 8.49e-3, then 2.61e-3, β₂ \
         0.9999184, λ from 142 N in the first task down to 8 N in the last, one sample. Accuracy at the mean; mean ± \
         standard deviation over {seeds} seeds. Published: Paul et al. (2026), as others quote it; 90 is that of \
         variational continual learning."
    );
    Ok(section("Continual IVON on permuted MNIST", &text, rows(job, SLOW, &tasks, seeds)?))
}

//! Permuted MNIST: ten orders of the pixels, one head.

use crate::sequence::{Row, rows, section};
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

/// With λ = `ess` · N and the slow prior's γ.
const fn ivon(ess: f64, gamma: f64) -> Method {
    Method::Ivon { gamma, ess, hess_init: 0.03, beta2: 0.9995, delta: 5e-5, step: 0.01 }
}

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
    Row::new(
        "IVON, posterior as prior",
        "5 epochs; h₀ 0.03, β₂ 0.9995, δ 5e-5, step 0.01",
        ivon(1.0, 1.0),
        VARIATIONAL,
        net,
    )
    .published(90.0),
    Row::new("IVON, λ = 30 N, posterior as prior", "else as IVON", ivon(30.0, 1.0), VARIATIONAL, net).published(77.0),
    Row::new("continual IVON, λ = 30 N", "slow prior with γ 0.8", ivon(30.0, 0.8), VARIATIONAL, net).published(92.1),
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

/// The same method at some λ and γ.
const GAMMAS: &[Row] = &[
    Row::new("λ = N, γ 1", "", ivon(1.0, 1.0), VARIATIONAL, net),
    Row::new("λ = N, γ 0.9", "", ivon(1.0, 0.9), VARIATIONAL, net),
    Row::new("λ = N, γ 0.8", "", ivon(1.0, 0.8), VARIATIONAL, net),
    Row::new("λ = N, γ 0.6", "", ivon(1.0, 0.6), VARIATIONAL, net),
    Row::new("λ = 10 N, γ 1", "", ivon(10.0, 1.0), VARIATIONAL, net),
    Row::new("λ = 10 N, γ 0.9", "", ivon(10.0, 0.9), VARIATIONAL, net),
    Row::new("λ = 10 N, γ 0.8", "", ivon(10.0, 0.8), VARIATIONAL, net),
    Row::new("λ = 10 N, γ 0.6", "", ivon(10.0, 0.6), VARIATIONAL, net),
    Row::new("λ = 30 N, γ 1", "", ivon(30.0, 1.0), VARIATIONAL, net),
    Row::new("λ = 30 N, γ 0.9", "", ivon(30.0, 0.9), VARIATIONAL, net),
    Row::new("λ = 30 N, γ 0.8", "", ivon(30.0, 0.8), VARIATIONAL, net),
    Row::new("λ = 30 N, γ 0.6", "", ivon(30.0, 0.6), VARIATIONAL, net),
];

pub fn choice_of_gamma(job: &Job) -> Outcome<Section> {
    let data = Digits::load_mnist()?.held_out(10_000);
    let (tasks, seeds) = (permuted_digits(&data, 10), job.seeds(1));
    let text = format!(
        "How much of a task's posterior enters the prior of the next, γ, at some effective sample sizes λ, by the \
         accuracy on 10,000 images that are taken from the training set: mean ± standard deviation over {seeds} seeds."
    );
    let title = "Continual IVON on permuted MNIST: choice of γ";
    Ok(section(title, &text, rows(job, GAMMAS, &tasks, seeds)?))
}

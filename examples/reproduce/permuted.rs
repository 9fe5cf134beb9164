//! Permuted MNIST: ten orders of the pixels, one head.

use crate::digits::Digits;
use crate::report::{Job, Outcome, Section};
use crate::sequence::{Row, rows, section};
use crate::tasks::{Choice, Form, Method, Network, Training, permuted_digits};

fn net() -> Network {
    Network::new(&[784, 100, 100, 10], 1, tch::Tensor::relu).started_as_by_pytorch()
}

const ADAM: Training = Training { epochs: 10, batch: 128, lr: 1e-3, clip: None, decay: false };
const CLIPPED: Training = Training { clip: Some(0.01), ..ADAM };
const VARIATIONAL: Training = Training { epochs: 5, ..ADAM };

const fn row(
    name: &'static str,
    settings: &'static str,
    published: Option<f64>,
    method: Method,
    training: Training,
) -> Row {
    Row { name, settings, published, method, training, net }
}

const fn fromp(form: Form) -> Method {
    Method::Fromp { form, choice: Choice::Memorable, memory: 200, tau: 0.5, delta: 1e-5, jitter: 1e-5 }
}

const ROWS: &[Row] = &[
    row("naive", "Adam 1e-3", None, Method::Naive, ADAM),
    row(
        "EWC (online diagonal Laplace)",
        "exact Fisher, λ 1, δ 1e-5",
        Some(84.0),
        Method::OnlineLaplace { delta: 1e-5, lambda: 1.0 },
        ADAM,
    ),
    row(
        "IVON, posterior as prior",
        "5 epochs; h₀ 0.03, β₂ 0.9995, δ 5e-5, step 0.01",
        Some(90.0),
        Method::Ivon { hess_init: 0.03, beta2: 0.9995, delta: 5e-5, step: 0.01 },
        VARIATIONAL,
    ),
    row("FROMP", "200 examples a task, τ 0.5, δ 1e-5, ε 1e-5, clip 0.01", Some(94.9), fromp(Form::Full), CLIPPED),
    row("FROMP-L2", "as FROMP, K = I", Some(94.6), fromp(Form::Identity), CLIPPED),
];

pub fn table(job: &Job) -> Outcome<Section> {
    let data = Digits::load()?;
    if data.source != "MNIST" {
        return Err("these numbers are MNIST's: put its four IDX files into $TCH_BLR_DATA/mnist".into());
    }
    let (tasks, seeds) = (permuted_digits(&data, 10), job.seeds(1));
    let text = format!(
        "Ten tasks, the first as it is and nine orders of the pixels; one head. Network 784-100-100-10, ReLU, begun as \
         PyTorch's layers are, batch 128; Adam 1e-3 and 10 epochs a task but for IVON. Every optimizer starts anew in each \
         task. Mean ± standard deviation over {seeds} seeds. Published: Pan et al. (2020), table 1; for IVON the number of \
         variational continual learning (Nguyen et al. 2018)."
    );
    Ok(section("Continual learning: permuted MNIST", &text, rows(job, ROWS, &tasks, seeds)?))
}

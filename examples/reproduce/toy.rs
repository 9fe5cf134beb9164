//! FROMP's toy problem: five tasks of two blobs along the plane.

use crate::report::{Job, Outcome, Section};
use crate::sequence::{Row, rows, section};
use crate::tasks::{Choice, Form, Method, Network, Training, blobs};

const TRAINING: Training = Training { epochs: 50, batch: 20, lr: 1e-2, clip: None, decay: false };

const fn fromp(form: Form) -> Method {
    Method::Fromp { form, choice: Choice::Memorable, memory: 20, tau: 1.0, delta: 1e-4, jitter: 1e-3 }
}

const fn row(name: &'static str, settings: &'static str, published: Option<f64>, method: Method) -> Row {
    Row { name, settings, published, method, training: TRAINING, net: Network::for_blobs }
}

const RANDOM: Method =
    Method::Fromp { form: Form::Full, choice: Choice::Random, memory: 20, tau: 1.0, delta: 1e-4, jitter: 1e-3 };

const ROWS: &[Row] = &[
    row("naive", "Adam", None, Method::Naive),
    row("EWC (online diagonal Laplace)", "λ 1, δ 1e-4", None, Method::OnlineLaplace { delta: 1e-4, lambda: 1.0 }),
    row("FROMP-L2", "20 examples a task, τ 1", None, fromp(Form::Identity)),
    row("FROMP, diagonal kernel", "as FROMP", None, fromp(Form::Diagonal)),
    row("FROMP", "20 examples a task, τ 1, δ 1e-4, ε 1e-3", Some(99.6), fromp(Form::Full)),
    Row {
        training: Training { lr: 5e-3, ..TRAINING },
        ..row("FROMP, lr 5e-3", "as FROMP, half the learning rate", None, fromp(Form::Full))
    },
    row("FRORP", "as FROMP, random memory", None, RANDOM),
];

pub fn table(job: &Job) -> Outcome<Section> {
    let (tasks, seeds) = (blobs(2000, 0), job.seeds(5));
    let text = format!(
        "Ten normal blobs of 2000 points in the plane, five tasks of two classes with one head, network 2-20-20-2 with \
         sigmoids, begun as PyTorch's layers are; accuracy on the training data, as published (99.6 ± 0.2 for FROMP, 99.70 \
         ± 0.03 for Adam on all data at once). Adam with lr 1e-2 but for one row, started anew in each task, batch 20, {} \
         epochs a task; mean ± standard deviation over {seeds} seeds.",
        job.epochs(TRAINING.epochs)
    );
    Ok(section("Continual learning: the toy problem of FROMP", &text, rows(job, ROWS, &tasks, seeds)?))
}

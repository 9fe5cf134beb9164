//! FROMP's toy problem: five tasks of two blobs along the plane.

use crate::sequence::{Row, rows, section};
use tch_blr_examples::Outcome;
use tch_blr_examples::tables::{Job, Section};
use tch_blr_examples::tasks::{Choice, Form, Method, Network, Training, blobs};

const TRAINING: Training = Training { epochs: 50, batch: 20, lr: 1e-2, clip: None, decay: false };

const SLOWER: Training = Training { lr: 5e-3, ..TRAINING };

const fn fromp(form: Form) -> Method {
    Method::Fromp { form, choice: Choice::Memorable, memory: 20, tau: 1.0, delta: 1e-4, jitter: 1e-3 }
}

const RANDOM: Method =
    Method::Fromp { form: Form::Full, choice: Choice::Random, memory: 20, tau: 1.0, delta: 1e-4, jitter: 1e-3 };

const ROWS: &[Row] = &[
    Row::new("naive", "Adam", Method::Naive, TRAINING, Network::for_blobs),
    Row::new(
        "EWC (online diagonal Laplace)",
        "λ 1, δ 1e-4",
        Method::OnlineLaplace { delta: 1e-4, lambda: 1.0 },
        TRAINING,
        Network::for_blobs,
    ),
    Row::new("FROMP-L2", "20 examples a task, τ 1", fromp(Form::Identity), TRAINING, Network::for_blobs),
    Row::new("FROMP, diagonal kernel", "as FROMP", fromp(Form::Diagonal), TRAINING, Network::for_blobs),
    Row::new("FROMP", "20 examples a task, τ 1, δ 1e-4, ε 1e-3", fromp(Form::Full), TRAINING, Network::for_blobs)
        .published(99.6),
    Row::new("FROMP, lr 5e-3", "as FROMP, half the learning rate", fromp(Form::Full), SLOWER, Network::for_blobs),
    Row::new("FRORP", "as FROMP, random memory", RANDOM, TRAINING, Network::for_blobs),
];

pub fn table(job: &Job) -> Outcome<Section> {
    let (tasks, seeds) = (blobs(2000, 0), job.seeds(5));
    let text = format!(
        "Ten normal blobs of 2000 points in the plane, five tasks of two classes with one head, network 2-20-20-2 with \
         sigmoids, begun as PyTorch's layers are; accuracy on the training data, as published (99.6 ± 0.2 for FROMP, \
         99.70 ± 0.03 for Adam on all data at once). Adam with lr 1e-2 but for one row, started anew in each task, \
         batch 20, {} epochs a task; mean ± standard deviation over {seeds} seeds.",
        job.epochs(TRAINING.epochs)
    );
    Ok(section("Continual learning: the toy problem of FROMP", &text, rows(job, ROWS, &tasks, seeds)?))
}

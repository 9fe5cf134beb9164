//! Tasks one after the other: what they are, a network for them, the methods that are compared, and how well it goes.
//!
//! `sequences.rs` makes tasks, `network.rs` has the network with one head or several, `method.rs` the methods by name
//! and settings, and `learner.rs` carries a method through the tasks.

mod learner;
mod method;
mod network;
mod sequences;

pub use learner::{Learned, learn};
pub use method::{Choice, Form, Method, Training};
pub use network::Network;
pub use sequences::{blobs, permuted_digits, split_digits};

use tch::{Kind, Tensor};
use tch_blr::continual::Memory;
use tch_blr::nn::Likelihood;

/// One task: its data, and which outputs of the network it is about.
#[derive(Debug)]
pub struct Task {
    /// Inputs `[N, D]` and classes `[N]` as labels of the whole network.
    pub train: (Tensor, Tensor),
    /// The same, for tests.
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

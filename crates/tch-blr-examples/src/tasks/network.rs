//! The network that learns the tasks.

use super::Task;
use tch::nn::{LinearConfig, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::Result;
use tch_blr::nn::{self, Linear};

/// A multilayer perceptron with one head for all tasks, or one for each.
#[derive(Debug)]
pub struct Network {
    /// `fc1`, `fc2`, .. and `head0`, `head1`, ..
    pub vs: VarStore,
    trunk: Vec<Linear>,
    heads: Vec<Linear>,
    activation: fn(&Tensor) -> Tensor,
}

impl Network {
    /// `sizes` of inputs, hidden layers and outputs; `heads` share the outputs between them. Depends on libtorch's
    /// generator.
    pub fn new(sizes: &[i64], heads: i64, activation: fn(&Tensor) -> Tensor) -> Network {
        let vs = VarStore::new(Device::Cpu);
        let (last, hidden) = sizes.split_last().expect("sizes");
        let layer = |name: String, from, to| nn::linear(vs.root() / name, from, to, LinearConfig::default());
        let pairs = hidden.windows(2).enumerate();
        let trunk = pairs.map(|(i, pair)| layer(format!("fc{}", i + 1), pair[0], pair[1])).collect();
        let from = hidden[hidden.len() - 1];
        let heads = (0..heads).map(|t| layer(head(t), from, last / heads)).collect();
        Network { vs, trunk, heads, activation }
    }

    /// For the blobs in the plane, 2-20-20-2 with sigmoids.
    pub fn for_blobs() -> Network {
        Network::new(&[2, 20, 20, 2], 1, Tensor::sigmoid).started_as_by_pytorch()
    }

    /// Weights of U(±1/√inputs), as PyTorch's layers start and so the networks of FROMP's publication. tch's are √6
    /// times as wide, and from them FROMP forgets more.
    #[must_use]
    pub fn started_as_by_pytorch(self) -> Self {
        let _no_grad = tch::no_grad_guard();
        for layer in self.trunk.iter().chain(&self.heads) {
            _ = layer.ws.shallow_clone().g_mul_scalar_(1.0 / 6f64.sqrt());
        }
        self
    }

    /// Zero in place of the random weights of the heads.
    #[must_use]
    pub fn with_heads_at_zero(self) -> Self {
        let _no_grad = tch::no_grad_guard();
        for head in &self.heads {
            _ = head.ws.shallow_clone().zero_();
            head.bs.iter().for_each(|b| _ = b.shallow_clone().zero_());
        }
        self
    }

    /// How many heads there are.
    pub fn heads(&self) -> usize {
        self.heads.len()
    }

    fn features(&self, x: &Tensor) -> Tensor {
        self.trunk.iter().fold(x.shallow_clone(), |x, layer| (self.activation)(&layer.forward(&x)))
    }

    /// All outputs `[N, C]`.
    pub fn logits(&self, x: &Tensor) -> Tensor {
        let x = self.features(x);
        let parts: Vec<Tensor> = self.heads.iter().map(|head| head.forward(&x)).collect();
        if let [only] = &parts[..] { only.shallow_clone() } else { Tensor::cat(&parts, 1) }
    }

    /// The outputs of one task. With a head for each task the others have no part in it at all, so that an optimizer
    /// leaves them alone; with one head the rows of other classes have gradients of zero, which is not the same to it.
    pub fn logits_of(&self, x: &Tensor, t: usize, task: &Task) -> Tensor {
        if self.heads.len() > 1 {
            return self.heads[t].forward(&self.features(x));
        }
        let all = self.logits(x);
        if task.labels.len() as i64 == all.size()[1] {
            all
        } else {
            all.index_select(1, &Tensor::from_slice(&task.labels))
        }
    }

    /// p over the task's labels.
    pub fn probabilities(&self, x: &Tensor, t: usize, task: &Task) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        self.logits_of(x, t, task).softmax(-1, Kind::Float)
    }

    /// Share of right predictions on the tests of task t.
    ///
    /// # Errors
    /// If shapes do not agree.
    pub fn accuracy(&self, t: usize, task: &Task) -> Result<f64> {
        let (x, y) = &task.test;
        tch_blr::metrics::accuracy(&self.probabilities(&task.shown(x), t, task), &task.positions(y))
    }
}

/// The name under which the variables of a head are.
pub fn head(t: i64) -> String {
    format!("head{t}")
}

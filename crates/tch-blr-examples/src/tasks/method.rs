//! The methods, with their settings.

use tch_blr::rows::PriorPull;

/// Which examples become memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice {
    /// The largest tr Λᵢ = Σ_c p(1-p): near the decision boundary.
    Memorable,
    /// The smallest.
    LeastMemorable,
    /// By chance.
    Random,
}

/// The form of the functional prior.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Form {
    /// K with all covariances of the memory.
    Full,
    /// K with variances only.
    Diagonal,
    /// K = I.
    Identity,
}

/// What stands for the tasks before.
#[derive(Debug, Clone, Copy)]
pub enum Method {
    /// The loss of the new task alone.
    Naive,
    /// Synaptic Intelligence (Zenke et al. 2017).
    SynapticIntelligence {
        /// Weight of the penalty.
        c: f64,
        /// ξ, in the denominator of the importance.
        xi: f64,
    },
    /// Diagonal, around the newest weights: λ · ½ Σ F(θ-m)² with F the exact Fisher information of all past tasks.
    OnlineLaplace {
        /// Precision of the prior.
        delta: f64,
        /// Weight of the penalty, 1 for Laplace's approximation.
        lambda: f64,
    },
    /// The same with a Kronecker product for every layer and task.
    KroneckerLaplace {
        /// Precision of the prior.
        delta: f64,
        /// Weight of the penalty, 1 for Laplace's approximation.
        lambda: f64,
    },
    /// EWC + FR + Replay (Daxberger et al. 2023): one half of a random memory is replayed and the other has soft
    /// labels; the diagonal Fisher information of the examples left out counts λ times.
    EwcFrReplay {
        /// Examples of a task.
        memory: usize,
        /// How many times each of them counts.
        weight: f64,
        /// Precision of the prior.
        delta: f64,
        /// Weight of the penalty.
        lambda: f64,
    },
    /// IVON at λ = N with a slow prior, into which the posterior of each task is merged; with γ = 1 the last posterior
    /// is the prior.
    Ivon {
        /// γ
        gamma: f64,
        /// h₀
        hess_init: f64,
        /// β₂
        beta2: f64,
        /// Precision of the prior for each example.
        delta: f64,
        /// α(h₀+δ), with α the learning rate.
        step: f64,
    },
    /// Continual IVON (Paul et al. 2026), at its published settings for ten permutations of MNIST: like [`Method::Ivon`],
    /// with λ far beyond N and steps of a limited size.
    ContinualIvon {
        /// γ of the prior's mean.
        gamma_of_mean: f64,
        /// γ of its precision.
        gamma: f64,
        /// What pulls the mean towards the prior's.
        pull: PriorPull,
    },
    /// FROMP (Pan et al. 2020): a functional prior on a memory.
    Fromp {
        /// Of K.
        form: Form,
        /// Of the memory.
        choice: Choice,
        /// Examples of a task.
        memory: usize,
        /// Weight of the penalty for each example of the new task.
        tau: f64,
        /// Precision of the prior.
        delta: f64,
        /// ε, added to the diagonal of K.
        jitter: f64,
    },
    /// The labelled examples again, each for as many as it stands for.
    Replay {
        /// Examples of a task.
        memory: usize,
    },
}

/// How a task is learned.
#[derive(Debug, Clone, Copy)]
pub struct Training {
    /// Passes over the data of a task.
    pub epochs: u64,
    /// Examples of a mini-batch.
    pub batch: usize,
    /// Learning rate; IVON has its own.
    pub lr: f64,
    /// Of the norm of the whole gradient.
    pub clip: Option<f64>,
    /// Whether the learning rate goes down to zero along a cosine in each task; IVON's always does.
    pub decay: bool,
}

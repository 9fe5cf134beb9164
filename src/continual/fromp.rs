//! FROMP: functional regularization of the memorable past. Its kernels are those of [`crate::curvature`]; what a few
//! examples say as labels is in `functions.rs`.

use super::memory::{Memory, problem};
use super::past::{Forward, Model, Regularizer, nothing, sum};
use crate::curvature::{Entries, Linearized, Looked, Pass};
use crate::likelihood::Outputs;
use crate::params::Buffers;
use crate::{DiagonalGaussian, Error, IntoTensor, Params, Result, check, kernel, linalg};
use std::collections::HashMap;
use tch::{Kind, Tensor};

/// Functional regularization of the memorable past (Pan et al. 2020, *Continual Deep Learning by Functional
/// Regularisation of Memorable Past*): what the network predicts on a few examples of each past task stays what it was,
/// measured by the Gaussian process that the network is under the posterior over its weights.
///
/// With the memory s of a past task, its class c, and P_sc(θ) `[M]` the probability of c at the examples of s,
///
/// ```text
/// K(θ) = w · ½ Σ_s Σ_c D_scᵀ K_sc⁻¹ D_sc      D_sc = P_sc(θ) - P_sc(m)
/// K_sc = J_sc diag(v) J_scᵀ + εI              J_sc = ∂P_sc/∂θ at m, v = 1/(F + δ)
/// ```
///
/// with m the weights now, at the start of the new task, F the Fisher information of all past data at it (a running
/// sum) and δ the precision of the prior: v is the variance of
/// [`DiagonalFisher::laplace`](crate::fisher::DiagonalFisher::laplace), and of any other posterior. A linear model
/// whose memory determines its weights has the penalty of the posterior itself, ½(θ-m)ᵀ(F+δ)(θ-m), as ε goes to zero.
///
/// Everything is computed at the newest weights, so **rebuild it at the start of each task from all memories**, the old
/// ones too. Then, with a fresh optimizer, minimize
///
/// ```text
/// (1/B) Σ ℓᵢ + K(θ)/N
/// ```
///
/// over the N new examples. The published objective, in which τ multiplies the penalty of a *mean* loss, has the scale
/// w = Nτ ([`scaled`](Self::scaled)): the terms of a task's M points stand for all of its examples. Published settings
/// (Split MNIST, 40 examples a task): τ = 10, ε = 1e-6, δ = 1e-3, and the norm of the gradient of (1/τ)(1/B)Σℓᵢ +
/// ½ΣDᵀK⁻¹D clipped at 0.1; permuted MNIST (200): τ = 0.5, ε = 1e-5, δ = 1e-5, 0.01.
///
/// The classes count as independent Gaussian processes, as published, so that two-class softmax counts each deviation
/// twice and one logit ([`Likelihood::Bernoulli`](crate::nn::Likelihood::Bernoulli), whose P is the sigmoid) once. For
/// a Gaussian likelihood P is the output itself. A memory's [`active`](Memory::active) outputs are its classes; its
/// targets and weights are not looked at. Select it by the largest tr Λᵢ = Σ_c p_ic(1-p_ic), the same number for each
/// class: these are the memorable examples, near the decision boundary, where K_sc is large and the prediction can
/// move.
///
/// ```
/// use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::continual::{Fromp, Kernel, Memory, Past};
/// use tch_blr::nn::{self, Likelihood};
/// use tch_blr::{Adam, Params, Prior, fisher::Fisher};
/// # fn main() -> tch_blr::Result<()> {
/// let vs = VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root(), 4, 3, Default::default());
/// let params = Params::from(&vs);
/// # let inputs = |n: i64| Tensor::randn([n, 4], (Kind::Float, Device::Cpu));
/// # let data = |n: i64| (inputs(n), Tensor::randint(3, [n], (Kind::Int64, Device::Cpu)));
/// # let (old, (x, y)) = (data(50), data(80));
/// // After the first task:
/// let q = Fisher::exact().diagonal(&vs, [&old.0], |x| net.forward(x))?.laplace(Prior::isotropic(1e-3))?;
/// let memories = [Memory::new(&old.0.narrow(0, 0, 10), Likelihood::Categorical)];
/// // The second, with a tenth of its N examples as w:
/// let n = 80.0;
/// let kernel = Kernel::Full { q: &q, jitter: 1e-6 };
/// let past = Past::new().with(Fromp::new(&params, &kernel, &memories, |x| net.forward(x))?.scaled(0.1 * n)?);
/// let mut opt = Adam::default().build(&vs, 1e-3)?;
/// opt.step(|| {
///     let new = net.forward(&x).cross_entropy_for_logits(&y);
///     past.beside(new, n, &params, |x| net.forward(x))
/// })?;
/// // And after it F is added to: q.precision is δ + F₁, so
/// let q = Fisher::exact().diagonal(&vs, [&x], |x| net.forward(x))?.laplace(&q)?;
/// # let _ = q;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Fromp {
    tasks: Vec<Task>,
    scale: f64,
}

/// How [`Fromp`] measures a deviation of the predictions on a memory.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Kernel<'a> {
    /// K_sc `[M, M]`: examples whose predictions move together are not counted twice.
    Full {
        /// Of the weights; v is its variance. Its mean is not looked at.
        q: &'a DiagonalGaussian,
        /// ε > 0, in squared probabilities: how far a prediction may always move.
        jitter: f64,
    },
    /// Its diagonal: a weight 1/(v-norm of the example's Jacobian + ε) for each example and class.
    Diagonal {
        /// As for [`Kernel::Full`].
        q: &'a DiagonalGaussian,
        /// ε > 0
        jitter: f64,
    },
    /// K = I, "FROMP-L2": w · ½ Σ ‖P(θ) - P(m)‖².
    Identity,
}

/// One past task.
#[derive(Debug)]
struct Task {
    memory: Memory,
    /// P(m) `[M, C]`
    old: Tensor,
    metric: Metric,
}

/// K⁻¹ in the form W with K⁻¹ = WᵀW.
#[derive(Debug)]
enum Metric {
    /// L⁻¹ `[C, M, M]` of K = LLᵀ
    Full(Tensor),
    /// `[M, C]`
    Diagonal(Tensor),
    Identity,
}

impl Fromp {
    /// From the model as it is now and the memories of all past tasks; zero without any.
    ///
    /// The kernels take a forward pass and one backward pass per class for each memory, and for a linear layer of
    /// [`crate::nn`] one matrix product of M² times its weights for all classes together; Jacobians are not formed.
    /// Parameters used outside of such layers take a backward pass for every example and class. Run the model in
    /// evaluation mode.
    ///
    /// # Errors
    /// [`Error::Memory`] for an empty memory; [`Error::Likelihood`] for active outputs that the model does not have,
    /// outputs that do not fit or are not finite; [`Error::HyperParameter`] for a jitter that is not positive and
    /// finite; [`Error::Parameter`] for a parameter with a part in the outputs that q does not know, or in another
    /// shape; [`Error::NotPositiveDefinite`] for a kernel that is not, as where the jitter is too small for the scale
    /// of v.
    pub fn new<'m, L: IntoTensor>(
        params: impl Into<Params>,
        kernel: &Kernel,
        memories: impl IntoIterator<Item = &'m Memory>,
        forward: impl Fn(&Tensor) -> L,
    ) -> Result<Self> {
        let (params, gaussian) = (Params::separate(params)?, kernel.of_posterior()?);
        let forward = |x: &Tensor| forward(x).into_tensor();
        let mut looked = Looked::default();
        let task = |(s, memory): (usize, &Memory)| {
            let (old, metric) = if let Some(gaussian) = &gaussian {
                let (outputs, kernels) = gaussian.kernels(&params, memory, &forward, &mut looked)?;
                let old = tch::no_grad(|| predictions(&outputs))?.detach();
                // Kernels are summed and factored in f64; only their inverse roots are rounded to the outputs' kind.
                let metric = gaussian.metric(s, &kernels, old.kind())?;
                (old, metric)
            } else {
                let _no_grad = tch::no_grad_guard();
                // Nothing is differentiated for K = I, so the forward pass needs no graph.
                let outputs = Buffers::unmoved(&params, || memory.outputs(&forward))?;
                outputs.check_finite()?;
                (predictions(&outputs)?, Metric::Identity)
            };
            Ok(Task { memory: memory.shallow_clone(), old, metric })
        };
        let tasks = memories.into_iter().enumerate().map(task).collect::<Result<_>>()?;
        Ok(Fromp { tasks, scale: 1.0 })
    }

    /// w·K with w ≥ 0, once more; default 1. The published τ is w/N for N new examples.
    ///
    /// # Errors
    /// A w that is negative or not finite.
    pub fn scaled(mut self, w: f64) -> Result<Self> {
        check::non_negative("w", w)?;
        self.scale *= w;
        Ok(self)
    }

    /// P(m) `[M, C]` on the memory of task s.
    pub fn predictions(&self, s: usize) -> Option<&Tensor> {
        self.tasks.get(s).map(|task| &task.old)
    }

    /// The kernels K_sc with their jitter for the memory of task s, which [`Fromp`] is made with: `[C, M, M]` in f64,
    /// or `[C, M]` of a diagonal one. For inspection; a `Fromp` keeps their inverse roots.
    ///
    /// # Errors
    /// As [`Fromp::new`]; the identity.
    pub fn kernel<L: IntoTensor>(
        params: impl Into<Params>,
        kernel: &Kernel,
        memory: &Memory,
        forward: impl Fn(&Tensor) -> L,
    ) -> Result<Tensor> {
        let Some(gaussian) = kernel.of_posterior()? else {
            return Err(problem("the identity is not computed from a posterior"));
        };
        let forward = |x: &Tensor| forward(x).into_tensor();
        let (_, found) = gaussian.kernels(&Params::separate(params)?, memory, &forward, &mut Looked::default())?;
        let _no_grad = tch::no_grad_guard();
        let all = found.iter().map(|k| gaussian.with_jitter(k)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_stack(&all, 0)?)
    }
}

/// What a kernel is computed from.
struct Gaussian {
    /// v by name.
    variances: HashMap<String, Tensor>,
    entries: Entries,
    jitter: f64,
}

impl Kernel<'_> {
    fn of_posterior(&self) -> Result<Option<Gaussian>> {
        let (q, jitter, entries) = match *self {
            Kernel::Full { q, jitter } => (q, jitter, Entries::All),
            Kernel::Diagonal { q, jitter } => (q, jitter, Entries::Diagonal),
            Kernel::Identity => return Ok(None),
        };
        check::positive("jitter", jitter)?;
        let of = |name: &str| (name.to_owned(), q.variance(name).expect("its name"));
        Ok(Some(Gaussian { variances: q.names().map(of).collect(), entries, jitter }))
    }
}

impl Gaussian {
    /// The outputs on the memory, and J_c diag(v) J_cᵀ for each class, without jitter.
    fn kernels(
        &self,
        params: &Params,
        memory: &Memory,
        forward: Forward,
        looked: &mut Looked,
    ) -> Result<(Outputs, Vec<Tensor>)> {
        // Before the model runs, which may not take an empty batch.
        memory.check_some()?;
        let mut pass = Pass::run(params, || forward(memory.inputs()))?;
        let outputs = pass.outputs(memory.likelihood(), memory.active_outputs())?;
        memory.check_rows(&outputs)?;
        let slopes = tch::no_grad(|| outputs.slopes())?;
        let trained = params.leaves().iter().filter(|l| l.trainable());
        // A tied variable may have another of its names in the posterior.
        let variance = trained.map(|leaf| leaf.names.iter().find_map(|name| self.variances.get(name)));
        let variance: Vec<_> = variance.map(|v| v.map(Tensor::shallow_clone)).collect();
        let kernels = Linearized::new(&pass, params, looked)?.kernels(&slopes, self.entries, &variance)?;
        Ok((outputs, kernels))
    }

    fn with_jitter(&self, kernel: &Tensor) -> Result<Tensor> {
        Ok(match self.entries {
            Entries::All => kernel + Tensor::f_eye(kernel.size()[0], (kernel.kind(), kernel.device()))? * self.jitter,
            Entries::Diagonal => kernel + self.jitter,
        })
    }

    fn metric(&self, s: usize, kernels: &[Tensor], kind: Kind) -> Result<Metric> {
        let _no_grad = tch::no_grad_guard();
        let mut roots = Vec::with_capacity(kernels.len());
        for (c, k) in kernels.iter().enumerate() {
            let what = format!("the kernel of memory {s}, class {c}, with jitter {:e}", self.jitter);
            let k = self.with_jitter(k)?;
            roots.push(match self.entries {
                Entries::All => {
                    // Rounding makes K slightly asymmetric. Its inverse root is formed once, so that a step costs
                    // a product instead of a solve.
                    let l = linalg::cholesky(&what, &linalg::symmetric(&k)?)?;
                    linalg::forward(&l, &Tensor::f_eye(l.size()[0], (l.kind(), l.device()))?)?
                }
                Entries::Diagonal => {
                    if let Some(value) = kernel::first_non_finite(&k) {
                        return Err(Error::NotPositiveDefinite { what, problem: format!("it has an element {value}") });
                    }
                    k.f_rsqrt()?
                }
            });
        }
        Ok(match self.entries {
            Entries::All => Metric::Full(Tensor::f_stack(&roots, 0)?.f_to_kind(kind)?),
            Entries::Diagonal => Metric::Diagonal(Tensor::f_stack(&roots, 1)?.f_to_kind(kind)?),
        })
    }
}

impl Metric {
    /// ½ Σ_c D_cᵀ K_c⁻¹ D_c
    fn half_square(&self, d: &Tensor) -> Result<Tensor> {
        let whitened = match self {
            // `[C, M, M]` times `[C, M, 1]`: all classes in one call.
            Metric::Full(roots) => roots.f_bmm(&d.f_tr()?.f_unsqueeze(2)?)?,
            Metric::Diagonal(roots) => d.f_mul(roots)?,
            Metric::Identity => d.shallow_clone(),
        };
        Ok(whitened.f_square()?.f_sum(None::<Kind>)? * 0.5)
    }
}

/// P `[M, C]`, in f32 or f64.
fn predictions(outputs: &Outputs) -> Result<Tensor> {
    Ok(outputs.prediction()?.f_reshape([outputs.examples(), -1])?)
}

impl Regularizer for Fromp {
    fn value(&self, model: &Model) -> Result<Tensor> {
        let of = |(s, task): (usize, &Task)| {
            let now = predictions(&task.memory.outputs(model.forward)?)?;
            // A model that was converted or got other heads since; libtorch would broadcast or promote without a word.
            if now.size() != task.old.size() || now.kind() != task.old.kind() {
                let [now, then] = [&now, &task.old].map(|p| format!("{:?} {:?}", p.kind(), p.size()));
                let when = "when the kernels were computed";
                return Err(problem(format!("the predictions on memory {s} are {now} and were {then} {when}")));
            }
            task.metric.half_square(&now.f_sub(&task.old)?)
        };
        Ok(sum(self.tasks.iter().enumerate().map(of))?.unwrap_or_else(nothing) * self.scale)
    }
}

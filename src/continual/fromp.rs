//! FROMP: functional regularization of the memorable past.

use super::memory::{Memory, memory, prediction};
use super::past::{Model, Regularizer};
use crate::curvature::{Forward, Linearized, Looked, Part};
use crate::nn::Likelihood;
use crate::nn::tape::Output;
use crate::{DiagonalGaussian, Error, Params, Result, check, kernel, linalg};
use std::collections::HashMap;
use tch::{Device, Kind, Tensor};

/// Functional regularization of the memorable past (Pan et al. 2020, *Continual Deep Learning by Functional Regularisation
/// of Memorable Past*): what the network predicts on a few examples of each past task stays what it was, measured by the
/// Gaussian process that the network is under the posterior over its weights.
///
/// With the memory s of a past task, its class c, and P_sc(θ) `[M]` the probability of c at the examples of s,
///
/// ```text
/// K(θ) = w · ½ Σ_s Σ_c D_scᵀ K_sc⁻¹ D_sc      D_sc = P_sc(θ) - P_sc(m)
/// K_sc = J_sc diag(v) J_scᵀ + εI              J_sc = ∂P_sc/∂θ at m, v = 1/(F + δ)
/// ```
///
/// with m the weights now, at the start of the new task, F the Fisher information of all past data at it (a running sum)
/// and δ the precision of the prior: v is the variance of [`DiagonalFisher::laplace`](crate::DiagonalFisher::laplace), and
/// of any other posterior. A linear model whose memory determines its weights has the penalty of the posterior itself,
/// ½(θ-m)ᵀ(F+δ)(θ-m), as ε goes to zero.
///
/// Everything here is of the newest weights: **make it anew at the start of each task from all memories**, the old ones
/// too. Then, with an optimizer that starts anew as well, minimize
///
/// ```text
/// (1/B) Σ ℓᵢ + K(θ)/N
/// ```
///
/// over the N new examples. The published objective, in which τ multiplies the penalty of a *mean* loss, has the scale
/// w = Nτ ([`scaled`](Self::scaled)): the terms of a task's M points stand for all of its examples. Published settings
/// (Split MNIST, 40 examples a task): τ = 10, ε = 1e-6, δ = 1e-3, and the norm of the gradient of (1/τ)(1/B)Σℓᵢ + ½ΣDᵀK⁻¹D
/// clipped at 0.1; permuted MNIST (200): τ = 0.5, ε = 1e-5, δ = 1e-5, 0.01.
///
/// The classes count as independent Gaussian processes, as published, so that two-class softmax counts each deviation
/// twice and one logit ([`Likelihood::Bernoulli`], whose P is the sigmoid) once. For a Gaussian likelihood P is the output
/// itself. A memory's [`labels`](Memory::labels) are its classes, its targets and weights are not looked at. Select it by
/// the largest tr Λᵢ = Σ_c p_ic(1-p_ic), the same number for each class: these are the memorable examples, near the
/// decision boundary, where K_sc is large and the prediction can move.
///
/// ```
/// use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::continual::{Fromp, Kernel, Memory, Past};
/// use tch_blr::nn::{self, Likelihood};
/// use tch_blr::{Adam, Fisher, Params, Prior, Rule};
/// # fn main() -> tch_blr::Result<()> {
/// let vs = VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root(), 4, 3, Default::default());
/// let params = Params::from(&vs);
/// # let data = |n: i64| (Tensor::randn([n, 4], (Kind::Float, Device::Cpu)), Tensor::randint(3, [n], (Kind::Int64, Device::Cpu)));
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
///     past.value(&params, &|x| net.forward(x)).map(|past| new + past / n)
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
    /// [`Error::Memory`] for an empty memory, labels that the model has not, outputs that do not fit or are not finite;
    /// [`Error::HyperParameter`] for a jitter that is not positive and finite; [`Error::Parameter`] for a parameter with a
    /// part in the outputs that q does not know, or in another shape; [`Error::NotPositiveDefinite`] for a kernel that is
    /// not, as where the jitter is too small for the scale of v.
    pub fn new<'m>(
        params: &Params,
        kernel: &Kernel,
        memories: impl IntoIterator<Item = &'m Memory>,
        forward: impl Fn(&Tensor) -> Tensor,
    ) -> Result<Self> {
        let gaussian = kernel.of_posterior()?;
        let mut looked = Looked::default();
        let task = |(s, memory): (usize, &Memory)| {
            let old = tch::no_grad(|| predictions(memory, &forward))?;
            if let Some(value) = kernel::first_non_finite(&old) {
                return Err(self::memory(format!("the model's predictions on memory {s} are not finite ({value})")));
            }
            let metric = match &gaussian {
                Some(gaussian) => {
                    let kernels = gaussian.kernels(params, memory, &forward, &mut looked)?;
                    gaussian.metric(s, &kernels, old.kind())?
                }
                None => Metric::Identity,
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

    /// The kernels K_sc with their jitter for the memory of task s, which [`Fromp`] is made with: `[C, M, M]` in f64, or
    /// `[C, M]` of a diagonal one. For inspection; a `Fromp` keeps their inverse roots.
    ///
    /// # Errors
    /// As [`Fromp::new`]; the identity.
    pub fn kernel(
        params: &Params,
        kernel: &Kernel,
        memory: &Memory,
        forward: impl Fn(&Tensor) -> Tensor,
    ) -> Result<Tensor> {
        let Some(gaussian) = kernel.of_posterior()? else {
            return Err(self::memory("the identity is not computed from a posterior".to_owned()));
        };
        let found = gaussian.kernels(params, memory, &forward, &mut Looked::default())?;
        let _no_grad = tch::no_grad_guard();
        let all = found.iter().map(|k| gaussian.with_jitter(k)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_stack(&all, 0)?)
    }
}

/// What a kernel is computed from.
struct Gaussian {
    /// v by name.
    variances: HashMap<String, Tensor>,
    part: Part,
    jitter: f64,
}

impl Kernel<'_> {
    fn of_posterior(&self) -> Result<Option<Gaussian>> {
        let (q, jitter, part) = match *self {
            Kernel::Full { q, jitter } => (q, jitter, Part::All),
            Kernel::Diagonal { q, jitter } => (q, jitter, Part::Diagonal),
            Kernel::Identity => return Ok(None),
        };
        check::positive("jitter", jitter)?;
        let of = |name: &str| (name.to_owned(), q.variance(name).expect("its name"));
        Ok(Some(Gaussian { variances: q.names().map(of).collect(), part, jitter }))
    }
}

impl Gaussian {
    /// J_c diag(v) J_cᵀ for each class, without jitter.
    fn kernels(
        &self,
        params: &Params,
        memory: &Memory,
        forward: &dyn Fn(&Tensor) -> Tensor,
        looked: &mut Looked,
    ) -> Result<Vec<Tensor>> {
        let pass = Forward::run(params, memory.likelihood(), memory.labels_of_task(), || forward(memory.inputs()))?;
        let slopes = tch::no_grad(|| slopes(&pass.output))?;
        Linearized::new(&pass, params, looked)?.kernels(&slopes, self.part, |name| self.variances.get(name))
    }

    fn with_jitter(&self, kernel: &Tensor) -> Result<Tensor> {
        Ok(match self.part {
            Part::All => kernel + Tensor::f_eye(kernel.size()[0], (kernel.kind(), kernel.device()))? * self.jitter,
            Part::Diagonal => kernel + self.jitter,
        })
    }

    fn metric(&self, s: usize, kernels: &[Tensor], kind: Kind) -> Result<Metric> {
        let _no_grad = tch::no_grad_guard();
        let mut roots = Vec::with_capacity(kernels.len());
        for (c, k) in kernels.iter().enumerate() {
            let what = format!("the kernel of memory {s}, class {c}, with jitter {:e}", self.jitter);
            let k = self.with_jitter(k)?;
            roots.push(match self.part {
                Part::All => {
                    let l = linalg::cholesky(&what, &linalg::symmetric(&k)?)?;
                    linalg::forward(&l, &Tensor::f_eye(l.size()[0], (l.kind(), l.device()))?)?
                }
                Part::Diagonal => {
                    if let Some(value) = kernel::first_non_finite(&k) {
                        return Err(Error::NotPositiveDefinite { what, problem: format!("it has an element {value}") });
                    }
                    k.f_rsqrt()?
                }
            });
        }
        Ok(match self.part {
            Part::All => Metric::Full(Tensor::f_stack(&roots, 0)?.f_to_kind(kind)?),
            Part::Diagonal => Metric::Diagonal(Tensor::f_stack(&roots, 1)?.f_to_kind(kind)?),
        })
    }
}

impl Metric {
    /// ½ Σ_c D_cᵀ K_c⁻¹ D_c
    fn half_square(&self, d: &Tensor) -> Result<Tensor> {
        let whitened = match self {
            Metric::Full(roots) => roots.f_bmm(&d.f_tr()?.f_unsqueeze(2)?)?,
            Metric::Diagonal(roots) => d.f_mul(roots)?,
            Metric::Identity => d.shallow_clone(),
        };
        Ok(whitened.f_square()?.f_sum(None::<Kind>)? * 0.5)
    }
}

/// P `[M, C]`, in f32 or f64.
fn predictions(memory: &Memory, forward: &dyn Fn(&Tensor) -> Tensor) -> Result<Tensor> {
    let f = memory.outputs(forward)?;
    let f = f.f_to_kind(if f.kind() == Kind::Double { Kind::Double } else { Kind::Float })?;
    Ok(prediction(memory.likelihood(), &f)?.f_reshape([f.size()[0], -1])?)
}

/// ∂P_c/∂f of each example, one `[M, C]` per class.
fn slopes(output: &Output) -> Result<Vec<Tensor>> {
    let z = output.z.detach();
    let z = z.f_reshape([z.size()[0], -1])?;
    let p = prediction(output.likelihood, &z)?;
    let slope = |c| {
        let unit = z.f_zeros_like()?;
        _ = unit.f_narrow(1, c, 1)?.f_fill_(1.0)?;
        Ok(match output.likelihood {
            Likelihood::Categorical => (unit - &p) * p.f_narrow(1, c, 1)?,
            Likelihood::Bernoulli => unit * &p * (1.0 - &p),
            Likelihood::Gaussian { .. } => unit,
        })
    };
    (0..z.size()[1]).map(slope).collect()
}

impl Regularizer for Fromp {
    fn value(&self, model: &Model) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for (s, task) in self.tasks.iter().enumerate() {
            let now = predictions(&task.memory, model.forward)?;
            if now.size() != task.old.size() || now.kind() != task.old.kind() {
                return Err(memory(format!(
                    "the predictions on memory {s} are {:?} {:?} and were {:?} {:?} when the kernels were computed",
                    now.kind(),
                    now.size(),
                    task.old.kind(),
                    task.old.size()
                )));
            }
            let value = task.metric.half_square(&now.f_sub(&task.old)?)?;
            sum = Some(sum.map_or_else(|| value.shallow_clone(), |sum| sum + &value));
        }
        let sum = sum.unwrap_or_else(|| Tensor::zeros([], (Kind::Float, Device::Cpu)));
        Ok(sum * self.scale)
    }
}

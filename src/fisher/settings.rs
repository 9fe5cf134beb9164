//! How a Fisher information is estimated, and the loop over the data.

use super::at::{Fit, Seen};
use super::columns::Columns;
use crate::curvature::{Linearized, Looked, Pass};
use crate::likelihood::{Labels, Likelihood, Outputs, no_targets};
use crate::{Error, IntoTensor, Params, Result, check};
use tch::{Kind, Tensor};

/// The Fisher information of a model at its present weights, summed over data.
///
/// With Jᵢ the Jacobian of example i's output zᵢ with respect to the weights, and Λᵢ the Hessian of -ln p(y | zᵢ) with
/// respect to zᵢ, which for these likelihoods does not depend on y,
///
/// ```text
/// F = Σᵢ E_{y ~ p(y | zᵢ)}[ ∇ln p(y | zᵢ) ∇ln p(y | zᵢ)ᵀ ] = Σᵢ JᵢᵀΛᵢJᵢ
/// ```
///
/// which is also the generalized Gauss-Newton matrix of the loss (Martens 2020, *New Insights and Perspectives on the
/// Natural Gradient Method*, section 9). Which labels ([`Fisher::exact`], [`Fisher::sampled`],
/// [`Fisher::observed`]), which likelihood, which structure ([`Fisher::diagonal`], [`Fisher::kronecker`],
/// [`Fisher::full`]) and which data are the caller's explicit choices, and the result records them.
///
/// **Always a sum over the examples**, never a mean, and never the square of a batch's mean gradient: the result does
/// not depend on how the data are cut into batches, and F + P₀ is a precision. `docs/scales.md` translates the
/// coefficients of other codes.
///
/// ```
/// use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::{Prior, fisher::Fisher, nn};
/// # fn main() -> tch_blr::Result<()> {
/// let vs = VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root(), 4, 3, Default::default());
/// let batches = || (0..5).map(|_| Tensor::randn([20, 4], (Kind::Float, Device::Cpu)));
///
/// let f = Fisher::exact().diagonal(&vs, batches(), |x| net.forward(x))?;
/// assert_eq!(f.examples(), 100);
/// let q = f.laplace(Prior::isotropic(1.0))?; // N(θ, (F + 1)⁻¹), ready to be the prior of the next task
/// # assert_eq!(q.len(), 15);
/// # Ok(())
/// # }
/// ```
///
/// # Data and model
/// Batches are whatever converts into a [`Batch`]: inputs, or pairs of inputs and targets. Targets are needed by
/// observed labels, and by [`Laplace::log_evidence`](crate::laplace::Laplace::log_evidence), which wants to know how
/// well they are fitted: one further backward pass for each batch, but for observed labels. The closure maps inputs to
/// **logits** or outputs `[B]` or `[B, C]`, whose rows are the examples; it takes no loss and no prior. Run it in
/// evaluation mode: dropout would be part of the curvature, and batch normalization in training mode is refused,
/// because it has no per-example gradients. Weights, `.grad` and libtorch's generator stay as they are.
///
/// One forward pass and a backward pass per column of Λ^½ for each batch, if the model is made of the layers of
/// [`crate::nn`]. Parameters used outside of them take a backward pass for every example and column, with the same
/// result. Parameters without influence on the output (other heads) have a Fisher information of zero; frozen ones are
/// left out.
#[derive(Debug, Clone, PartialEq)]
pub struct Fisher {
    pub(super) labels: Labels,
    seed: u64,
    samples: u32,
    pub(super) likelihood: Likelihood,
    pub(super) active: Option<Vec<i64>>,
    max_weights: usize,
}

/// Inputs, and the targets that belong to them.
#[derive(Debug)]
pub struct Batch {
    /// What the closure gets.
    pub inputs: Tensor,
    /// Labels `[B]` of kind i64, or values in the shape of the outputs; needed by [`Fisher::observed`] and for the
    /// evidence.
    pub targets: Option<Tensor>,
}

impl From<Tensor> for Batch {
    fn from(inputs: Tensor) -> Self {
        Batch { inputs, targets: None }
    }
}

impl From<&Tensor> for Batch {
    fn from(inputs: &Tensor) -> Self {
        inputs.shallow_clone().into()
    }
}

impl From<(Tensor, Tensor)> for Batch {
    fn from((inputs, targets): (Tensor, Tensor)) -> Self {
        Batch { inputs, targets: Some(targets) }
    }
}

impl From<(&Tensor, &Tensor)> for Batch {
    fn from((inputs, targets): (&Tensor, &Tensor)) -> Self {
        (inputs.shallow_clone(), targets.shallow_clone()).into()
    }
}

impl Fisher {
    fn new(labels: Labels) -> Self {
        Fisher { labels, seed: 0, samples: 1, likelihood: Likelihood::Categorical, active: None, max_weights: 5000 }
    }

    /// Exact over the labels: C-1 backward passes per batch for C classes; otherwise one per output.
    pub fn exact() -> Self {
        Self::new(Labels::Exact)
    }

    /// From labels drawn from the model's own prediction, one backward pass per batch and draw.
    ///
    /// The label of an example is a function of the seed and the example's position in the data, so neither the batch
    /// size nor the device matters. For Bernoulli and Gaussian outputs, where the average size of a residual is known,
    /// only its sign is drawn, which has the same mean and less variance.
    pub fn sampled(seed: u64) -> Self {
        Fisher { seed, ..Self::new(Labels::Sampled) }
    }

    /// From the labels of the data; see [`Labels::Observed`] before you use it. One backward pass per batch.
    pub fn observed() -> Self {
        Self::new(Labels::Observed)
    }

    /// Draws per example of [`Fisher::sampled`], ≥ 1; default 1. The error goes down as 1/√samples. No effect on the
    /// others.
    #[must_use]
    pub fn samples(mut self, n: u32) -> Self {
        self.samples = n;
        self
    }

    /// p(y | z); default [`Likelihood::Categorical`].
    #[must_use]
    pub fn likelihood(mut self, likelihood: Likelihood) -> Self {
        self.likelihood = likelihood;
        self
    }

    /// The active outputs of a categorical model with several heads or with classes to come: the softmax is over these
    /// columns of the logits only, as it was in training. At least 2, each once; default all. Targets keep their
    /// numbers.
    ///
    /// The set is part of the model: with more classes Λ is a different matrix, also in the rows and columns of these.
    #[must_use]
    pub fn active(mut self, outputs: &[i64]) -> Self {
        self.active = Some(outputs.to_vec());
        self
    }

    /// The largest number of weights for [`Fisher::full`], whose matrix takes 8 bytes for each pair of them; default
    /// 5000 (200 MB).
    #[must_use]
    pub fn max_weights(mut self, n: usize) -> Self {
        self.max_weights = n;
        self
    }

    pub(super) fn weights_allowed(&self) -> usize {
        self.max_weights
    }

    fn validate(&self) -> Result<()> {
        self.likelihood.validate()?;
        check::count("samples", self.samples as usize)?;
        let Some(active) = &self.active else { return Ok(()) };
        let mut distinct = active.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let fits = distinct.len() == active.len() && active.len() >= 2 && self.likelihood == Likelihood::Categorical;
        check::that("active", active, fits, "at least two different outputs, of a categorical likelihood")
    }

    /// Calls `f` for every batch.
    pub(super) fn each<B: Into<Batch>, L: IntoTensor>(
        &self,
        params: &Params,
        batches: impl IntoIterator<Item = B>,
        model: impl Fn(&Tensor) -> L,
        mut f: impl FnMut(&mut Linearized, &Columns) -> Result<()>,
    ) -> Result<Seen> {
        self.validate()?;
        params.check()?;
        // Kept across batches: how the layers use a parameter is found out once.
        let (mut looked, mut examples, mut fitted) = (Looked::default(), 0, Fitted::default());
        for batch in batches {
            let Batch { inputs, targets } = batch.into();
            let mut pass = Pass::run(params, || model(&inputs))?;
            let outputs = pass.outputs(self.likelihood, self.active.as_deref())?;
            // After the pass, which is where the number of rows shows; an empty batch has no gradients to sum.
            if pass.examples() == 0 {
                continue;
            }
            let targets = targets.map(|y| tch::no_grad(|| outputs.targets(Some(&y)))).transpose()?;
            fitted.add(&outputs, targets.as_ref(), params, self.labels != Labels::Observed)?;
            let columns = match self.labels {
                Labels::Exact => Columns::Exact(&outputs),
                Labels::Sampled => {
                    Columns::Sampled { outputs: &outputs, seed: self.seed, samples: self.samples, seen: examples }
                }
                Labels::Observed => {
                    let targets = targets.as_ref().ok_or_else(no_targets)?;
                    Columns::Observed(tch::no_grad(|| outputs.residual(targets))?)
                }
            };
            f(&mut Linearized::new(&pass, params, &mut looked)?, &columns)?;
            examples += pass.examples() as u64;
        }
        // An iterator that was used before gives nothing, and a curvature of zero would be silently wrong.
        if examples == 0 {
            return Err(Error::Curvature(
                "there are no examples: there is no batch, or all are empty (an iterator is used up by its first use)"
                    .to_owned(),
            ));
        }
        Ok(Seen { examples, fit: fitted.finish() })
    }
}

/// The sums of a [`Fit`], on the model's device: a number read after every batch would stall it.
#[derive(Default)]
struct Fitted {
    /// Whether a batch had no targets.
    unknown: bool,
    loss: Option<Tensor>,
    outputs: f64,
    gradient: Option<Vec<Tensor>>,
}

impl Fitted {
    fn add(&mut self, outputs: &Outputs, targets: Option<&Tensor>, params: &Params, slope: bool) -> Result<()> {
        let Some(targets) = targets else {
            self.unknown = true;
            return Ok(());
        };
        self.outputs += outputs.z.numel() as f64;
        let loss =
            tch::with_grad(|| Ok::<_, Error>(outputs.losses(targets)?.f_to_kind(Kind::Double)?.f_sum(Kind::Double)?))?;
        let value = loss.detach();
        match &mut self.loss {
            Some(sum) => _ = sum.f_add_(&value)?,
            new => *new = Some(value.copy()),
        }
        if !slope {
            return Ok(());
        }
        let leaves: Vec<&Tensor> = params.leaves().iter().filter(|l| l.trainable()).map(|l| &l.tensor).collect();
        // The graph is kept: the columns come after this.
        let found = Tensor::f_run_backward(&[&loss], &leaves, true, false)?;
        let _no_grad = tch::no_grad_guard();
        let sums = self.gradient.get_or_insert_with(|| {
            leaves.iter().map(|l| Tensor::zeros(l.size(), (Kind::Double, l.device()))).collect()
        });
        // What the outputs do not depend on has no gradient.
        for (sum, g) in sums.iter_mut().zip(&found).filter(|(_, g)| g.defined()) {
            _ = sum.f_add_(g)?;
        }
        Ok(())
    }

    fn finish(self) -> Option<Fit> {
        let loss = self.loss.filter(|_| !self.unknown)?.double_value(&[]);
        Some(Fit { loss, outputs: self.outputs, gradient: self.gradient })
    }
}

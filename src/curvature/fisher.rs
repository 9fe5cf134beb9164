//! The Fisher information at a solution, and Laplace's approximation around it.

use super::linearized::{Factors, Forward, Linearized, Looked, Part};
use crate::kernel::{self, Draw, Field};
use crate::linalg::matrix_shape;
use crate::nn::Likelihood;
use crate::nn::tape::Output;
use crate::prior::Family;
use crate::{
    DiagonalGaussian, Error, FullGaussian, IntoTensor, KroneckerGaussian, KroneckerParameter, Params, Prior, Result,
    check, linalg,
};
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
/// Natural Gradient Method*, section 9). Which estimator ([`Fisher::exact`], [`Fisher::monte_carlo`],
/// [`Fisher::empirical`]), which likelihood, which structure ([`Fisher::diagonal`], [`Fisher::kronecker`],
/// [`Fisher::full`]) and which data are the caller's explicit choices, and the result records them.
///
/// **Always a sum over the examples**, never a mean, and never the square of a batch's mean gradient: the result does not
/// depend on how the data are cut into batches, and F + P₀ is a precision. `docs/scales.md` translates the coefficients of
/// other codes.
///
/// ```
/// use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::{Fisher, Prior, nn};
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
/// Batches are whatever converts into a [`Batch`]: inputs, or pairs of inputs and targets, which only the empirical Fisher
/// looks at. The closure maps inputs to **logits** or outputs `[B]` or `[B, C]`, whose rows are the examples; it takes no
/// loss and no prior. Run it in evaluation mode: dropout would be part of the curvature, and batch normalization in
/// training mode is refused, because it has no per-example gradients. Weights, `.grad` and libtorch's generator stay as
/// they are.
///
/// One forward pass and a backward pass per column of Λ^½ for each batch, if the model is made of the layers of
/// [`crate::nn`]. Parameters used outside of them take a backward pass for every example and column, with the same
/// result. Parameters without influence on the output (other heads) have a Fisher information of zero; frozen ones are left
/// out.
#[derive(Debug, Clone, PartialEq)]
pub struct Fisher {
    estimator: Estimator,
    likelihood: Likelihood,
    labels: Option<Vec<i64>>,
    max_weights: usize,
}

/// Where the labels of a Fisher information come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Estimator {
    /// The expectation over the model's own prediction in closed form.
    Exact,
    /// Labels drawn from the model's own prediction: unbiased for [`Estimator::Exact`].
    MonteCarlo {
        /// Of the labels.
        seed: u64,
        /// Draws per example, at least 1.
        samples: u32,
    },
    /// The labels of the data. No estimate of the Fisher information: it goes to zero where the data are fitted, and is
    /// wrong where the model is misspecified (Kunstner et al. 2019, *Limitations of the Empirical Fisher Approximation*).
    Empirical,
}

/// Inputs, and the targets that belong to them.
#[derive(Debug)]
pub struct Batch {
    /// What the closure gets.
    pub inputs: Tensor,
    /// Labels `[B]` of kind i64, or values in the shape of the outputs; only [`Fisher::empirical`] needs them.
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

/// The step of the labels' noise: one that neither an optimizer nor a posterior of the same seed reaches.
const LABELS: u64 = u64::MAX - 1;

impl Fisher {
    fn new(estimator: Estimator) -> Self {
        Fisher { estimator, likelihood: Likelihood::Categorical, labels: None, max_weights: 5000 }
    }

    /// Exact over the labels: C-1 backward passes per batch for C classes, one per output else.
    pub fn exact() -> Self {
        Self::new(Estimator::Exact)
    }

    /// From labels drawn from the model's own prediction, one backward pass per batch and draw.
    ///
    /// The label of an example is a function of the seed and the example's position in the data, so neither the batch size
    /// nor the device counts. For Bernoulli and Gaussian outputs, the size of whose residuals is known on average, only
    /// their sign is drawn, which has the same mean and less variance.
    pub fn monte_carlo(seed: u64) -> Self {
        Self::new(Estimator::MonteCarlo { seed, samples: 1 })
    }

    /// From the labels of the data; see [`Estimator::Empirical`] before you use it. One backward pass per batch.
    pub fn empirical() -> Self {
        Self::new(Estimator::Empirical)
    }

    /// Draws per example of [`Fisher::monte_carlo`], ≥ 1; default 1. The error goes down as 1/√samples. No effect on the
    /// others.
    #[must_use]
    pub fn samples(mut self, n: u32) -> Self {
        if let Estimator::MonteCarlo { samples, .. } = &mut self.estimator {
            *samples = n;
        }
        self
    }

    /// p(y | z); default [`Likelihood::Categorical`].
    #[must_use]
    pub fn likelihood(mut self, likelihood: Likelihood) -> Self {
        self.likelihood = likelihood;
        self
    }

    /// The active labels of a categorical model with several heads or with classes to come: the softmax is over these
    /// columns of the logits only, as it was in training. At least 2, each once; default all. Targets keep their numbers.
    ///
    /// The set is part of the model: over more labels Λ is another one, also in the rows and columns of these.
    #[must_use]
    pub fn labels(mut self, labels: &[i64]) -> Self {
        self.labels = Some(labels.to_vec());
        self
    }

    /// The diagonal of F.
    ///
    /// For a linear layer z = aWᵀ + b with Gᵢ = ∂(sᵢᵀzᵢ)/∂z, the diagonal of a column s is Σᵢ(Gᵢ aᵢᵀ)² = (G⊙G)ᵀ(A⊙A): one
    /// matrix product per batch for all columns together.
    ///
    /// # Errors
    /// [`Error::Curvature`] for no examples, outputs or targets of another form, labels that the model has not or targets
    /// outside of the active ones, outputs or a curvature that are not finite; [`Error::PerExample`] for batch
    /// normalization in training mode; [`Error::Closure`]; [`Error::HyperParameter`] for settings out of range.
    pub fn diagonal<B: Into<Batch>, L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        batches: impl IntoIterator<Item = B>,
        model: impl FnMut(&Tensor) -> L,
    ) -> Result<DiagonalFisher> {
        let params = params.into();
        let solution = params.at_present();
        let mut sums: Vec<Tensor> = solution.leaves().iter().map(|l| l.tensor.zeros_like()).collect();
        let examples = self.each(&params, batches, model, |batch, columns| {
            batch.add_squares(columns.len(), |c| columns.get(c), &mut sums)
        })?;
        for (leaf, sum) in solution.leaves().iter().zip(&sums) {
            finite(leaf.name(), sum, examples)?;
        }
        Ok(DiagonalFisher { at: At { solution, examples, fisher: self.clone() }, diagonal: sums })
    }

    /// The largest number of weights for [`Fisher::full`], whose matrix takes 8 bytes for each pair of them; default 5000
    /// (200 MB).
    #[must_use]
    pub fn max_weights(mut self, n: usize) -> Self {
        self.max_weights = n;
        self
    }

    /// One Kronecker product for every layer (K-FAC; Martens and Grosse 2015, Ritter et al. 2018).
    ///
    /// For a weight W `[out, in]` with inputs aᵢ, to which a 1 is appended if there is a bias, and with gᵢ_c the gradients
    /// of sᵢ_cᵀzᵢ by the layer's output for the columns s_c of Λ^½,
    ///
    /// ```text
    /// A = (1/N) Σᵢ aᵢaᵢᵀ    a mean      G = Σᵢ Σ_c gᵢ_c gᵢ_cᵀ    a sum
    /// F of the layer ≈ G ⊗ A            (rows of [W b] one after the other)
    /// ```
    ///
    /// so that the product is a sum over the data. It is exact for one example, and where aaᵀ and ggᵀ are uncorrelated. In
    /// layers with T positions for each example (convolutions, sequences) each position counts as an example: A is a mean
    /// over N·T, G a sum over N·T.
    ///
    /// Parameters that are no weight or bias of a single call of [`crate::nn::linear`] or [`crate::nn::conv2d`] without
    /// groups (normalizations, embeddings, tied weights, what is used outside of the layers) have their exact diagonal
    /// instead.
    ///
    /// # Errors
    /// As [`Fisher::diagonal`]; [`Error::Parameter`] for a weight that a later batch uses in another way than the first.
    pub fn kronecker<B: Into<Batch>, L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        batches: impl IntoIterator<Item = B>,
        model: impl FnMut(&Tensor) -> L,
    ) -> Result<KroneckerFisher> {
        let params = params.into();
        let solution = params.at_present();
        let mut parts: Option<Vec<Part>> = None;
        let examples = self.each(&params, batches, model, |batch, columns| {
            let parts = match &mut parts {
                Some(parts) => parts,
                new => new.insert(batch.parts()?),
            };
            batch.add_factors(columns.len(), |c| columns.get(c), parts)
        })?;
        let _no_grad = tch::no_grad_guard();
        let name = |p: usize| solution.leaves()[p].name();
        let (mut layers, mut diagonal) = (Vec::new(), Vec::new());
        for (p, part) in parts.into_iter().flatten().enumerate() {
            match part {
                Part::Factors(Factors { bias, inputs, outputs, positions }) => {
                    finite(name(p), &inputs, examples)?;
                    finite(name(p), &outputs, examples)?;
                    let inputs = inputs.f_div_scalar(positions.max(1))?;
                    let (weight, bias) = (name(p).to_owned(), bias.map(|q| name(q).to_owned()));
                    layers.push(LayerFactors { weight, bias, inputs, outputs });
                }
                Part::Bias => {}
                Part::Diagonal(sum) => {
                    finite(name(p), &sum, examples)?;
                    diagonal.push((name(p).to_owned(), sum));
                }
            }
        }
        Ok(KroneckerFisher { at: At { solution, examples, fisher: self.clone() }, layers, diagonal })
    }

    /// The whole matrix, for small models.
    ///
    /// # Errors
    /// As [`Fisher::diagonal`]; [`Error::Curvature`] for more weights than [`Fisher::max_weights`].
    pub fn full<B: Into<Batch>, L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        batches: impl IntoIterator<Item = B>,
        model: impl FnMut(&Tensor) -> L,
    ) -> Result<FullFisher> {
        let params = params.into();
        params.check()?;
        let solution = params.at_present();
        let weights: usize = solution.leaves().iter().map(|l| l.tensor.numel()).sum();
        if weights > self.max_weights {
            return Err(Error::Curvature(format!(
                "the model has {weights} weights, and the full matrix would have {:.1e} bytes: at most {} weights are                  allowed; raise max_weights(..), freeze all but the layers of interest, or take Fisher::kronecker",
                8.0 * (weights as f64).powi(2),
                self.max_weights
            )));
        }
        let device = solution.leaves().first().map_or(tch::Device::Cpu, |l| l.tensor.device());
        let mut matrix = Tensor::f_zeros([weights as i64; 2], (Kind::Double, device))?;
        let examples = self.each(&params, batches, model, |batch, columns| {
            batch.add_outer_products(columns.len(), |c| columns.get(c), &mut matrix)
        })?;
        let mut start = 0;
        for leaf in solution.leaves() {
            let n = leaf.tensor.numel() as i64;
            finite(leaf.name(), &matrix.f_narrow(0, start, n)?, examples)?;
            start += n;
        }
        Ok(FullFisher { at: At { solution, examples, fisher: self.clone() }, matrix })
    }

    fn validate(&self) -> Result<()> {
        if let Likelihood::Gaussian { variance } = self.likelihood {
            check::positive("variance", variance)?;
        }
        if let Estimator::MonteCarlo { samples, .. } = self.estimator {
            check::count("samples", samples as usize)?;
        }
        let Some(labels) = &self.labels else { return Ok(()) };
        let mut distinct = labels.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let fits = distinct.len() == labels.len() && labels.len() >= 2 && self.likelihood == Likelihood::Categorical;
        check::that("labels", labels, fits, "at least two different labels, of a categorical likelihood")
    }

    /// Calls `f` for every batch; the number of examples.
    fn each<B: Into<Batch>, L: IntoTensor>(
        &self,
        params: &Params,
        batches: impl IntoIterator<Item = B>,
        mut model: impl FnMut(&Tensor) -> L,
        mut f: impl FnMut(&mut Linearized, &Columns) -> Result<()>,
    ) -> Result<u64> {
        self.validate()?;
        params.check()?;
        let (mut looked, mut examples) = (Looked::default(), 0);
        for batch in batches {
            let Batch { inputs, targets } = batch.into();
            let forward = Forward::run(params, self.likelihood, self.labels.as_deref(), || model(&inputs))?;
            if forward.examples() == 0 {
                continue;
            }
            let columns = self.columns(&forward.output, targets.as_ref(), examples)?;
            f(&mut Linearized::new(&forward, params, &mut looked)?, &columns)?;
            examples += forward.examples() as u64;
        }
        if examples == 0 {
            return Err(Error::Curvature(
                "there are no examples: the batches are none or empty (an iterator is used up by its first use)"
                    .to_owned(),
            ));
        }
        Ok(examples)
    }

    fn columns<'a>(&self, output: &'a Output, targets: Option<&Tensor>, seen: u64) -> Result<Columns<'a>> {
        let _no_grad = tch::no_grad_guard();
        Ok(match self.estimator {
            Estimator::Exact => Columns::Exact(output),
            Estimator::MonteCarlo { seed, samples } => Columns::MonteCarlo { output, seed, samples, seen },
            Estimator::Empirical => Columns::Empirical(output.residual(&self.targets(output, targets)?)?),
        })
    }

    /// As probabilities or values in the shape of the output.
    fn targets(&self, output: &Output, targets: Option<&Tensor>) -> Result<Tensor> {
        let z = output.z.detach();
        let refuse = |problem: String| Err(Error::Curvature(problem));
        let Some(targets) = targets.filter(|t| t.defined()) else {
            return refuse("the empirical Fisher needs targets: give batches of (inputs, targets)".to_owned());
        };
        let given = format!("the targets are {:?} {:?}", targets.kind(), targets.size());
        if self.likelihood != Likelihood::Categorical {
            if targets.size() != z.size() {
                return refuse(format!("{given}: expected {:?}, the shape of the outputs", z.size()));
            }
            return Ok(targets.f_to_device(z.device())?.f_to_kind(z.kind())?);
        }
        let [b, classes] = z.size()[..] else { return refuse("the logits have no classes".to_owned()) };
        if targets.size() != [b] || targets.kind() != Kind::Int64 {
            return refuse(format!("{given}: expected labels [{b}] of kind Int64"));
        }
        let all: Vec<i64> = (0..classes).collect();
        let active = self.labels.as_deref().unwrap_or(&all);
        let columns = Tensor::from_slice(active).to_device(z.device());
        let one = targets.f_to_device(z.device())?.f_unsqueeze(1)?.f_eq_tensor(&columns)?;
        let outside = one.f_any_dim(1, false)?.f_logical_not()?.f_nonzero()?;
        if outside.numel() > 0 {
            let label = targets.int64_value(&[outside.int64_value(&[0, 0])]);
            return refuse(format!(
                "the data have label {label}, which is not one of the active labels {active:?}; select the data or name all \
                 labels of the task with .labels(..)"
            ));
        }
        Ok(one.f_to_kind(z.kind())?)
    }
}

/// Vectors s_c for every example with Σ_c s_c s_cᵀ = Λ, or so on average, or the residuals of the data.
enum Columns<'a> {
    Exact(&'a Output),
    /// `seen`: examples in earlier batches.
    MonteCarlo {
        output: &'a Output,
        seed: u64,
        samples: u32,
        seen: u64,
    },
    Empirical(Tensor),
}

impl Columns<'_> {
    fn len(&self) -> i64 {
        match self {
            Columns::Exact(output) => output.columns(),
            Columns::MonteCarlo { samples, .. } => i64::from(*samples),
            Columns::Empirical(_) => 1,
        }
    }

    fn get(&self, c: i64) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        match self {
            Columns::Exact(output) => output.root(c),
            Columns::MonteCarlo { output, seed, samples, seen } => {
                let z = &output.z;
                let (b, width) = (z.size()[0], z.size().get(1).copied().unwrap_or(1));
                // Every example has a block of the generator for itself.
                let groups = kernel::groups(width as usize);
                let block = groups as i64 * kernel::GROUP as i64;
                let at = Draw { step: LABELS, sample: c as u64, parameter: 0, group: seen * groups };
                let like = Tensor::f_empty([b, block], (Kind::Double, z.device()))?;
                let normals = kernel::tensor(Field::Noise { seed: *seed, at }, &like);
                let s = output.sampled(&normals.f_narrow(1, 0, width)?.f_reshape(z.size())?)?;
                Ok(s.f_mul_scalar(1.0 / f64::from(*samples).sqrt())?)
            }
            Columns::Empirical(residual) => Ok(residual.shallow_clone()),
        }
    }
}

fn finite(name: &str, x: &Tensor, examples: u64) -> Result<()> {
    kernel::first_non_finite(x).map_or(Ok(()), |value| {
        Err(Error::Curvature(format!(
            "that of parameter `{name}` over {examples} examples is not finite ({value}); nothing was changed (look at the \
             weights and the inputs)"
        )))
    })
}

/// Where and from what a Fisher information was computed.
#[derive(Debug)]
struct At {
    /// θ, a copy.
    solution: Params,
    examples: u64,
    fisher: Fisher,
}

macro_rules! at {
    ($Type:ident) => {
        impl $Type {
            /// N, the number of examples that it is the sum over.
            pub fn examples(&self) -> u64 {
                self.at.examples
            }

            /// How it was estimated.
            pub fn estimator(&self) -> Estimator {
                self.at.fisher.estimator
            }

            /// The p(y | z) that it is about.
            pub fn likelihood(&self) -> Likelihood {
                self.at.fisher.likelihood
            }

            /// The active labels, if they were named.
            pub fn labels(&self) -> Option<&[i64]> {
                self.at.fisher.labels.as_deref()
            }

            /// θ, in the order of the names.
            pub(crate) fn solution(&self) -> &Params {
                &self.at.solution
            }

            /// Names of the parameters, in order.
            pub fn names(&self) -> impl Iterator<Item = &str> {
                self.at.solution.names()
            }
        }
    };
}

/// The diagonal of a Fisher information, from [`Fisher::diagonal`]: a sum over [`DiagonalFisher::examples`] examples.
#[derive(Debug)]
pub struct DiagonalFisher {
    at: At,
    diagonal: Vec<Tensor>,
}

at!(DiagonalFisher);

impl DiagonalFisher {
    /// diag F of one parameter, in its shape: f64 for weights in f64, f32 else.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        let leaves = self.at.solution.leaves().iter();
        leaves.zip(&self.diagonal).find_map(|(l, f)| l.names.iter().any(|n| n == name).then_some(f))
    }

    /// Laplace's approximation N(θ, (F + P₀)⁻¹) around the weights θ at which F was computed.
    ///
    /// They should be a minimum of the loss and the prior together, -ln p(data | θ) + ½(θ-m₀)ᵀP₀(θ-m₀); the mean m₀ has no
    /// other part in it. With the last task's posterior as prior this is diagonal online Laplace, the penalty of online
    /// EWC at its Bayesian weight (Huszár 2018). A prior of [`Prior::elsewhere`] has the precision N·δ there.
    ///
    /// # Errors
    /// A prior of other parameters or shapes; a precision that is not positive and finite, as where both F and P₀ vanish.
    pub fn laplace(&self, prior: impl Into<Prior>) -> Result<DiagonalGaussian> {
        let _no_grad = tch::no_grad_guard();
        let priors = self.at.precisions(&prior.into())?;
        let entries = self.at.solution.leaves().iter().zip(&self.diagonal).zip(priors);
        DiagonalGaussian::new(entries.map(|((leaf, f), p)| (leaf.name(), leaf.tensor.copy(), p + f)))
    }
}

impl At {
    /// P₀ of every parameter, in its shape.
    fn precisions(&self, prior: &Prior) -> Result<Vec<Tensor>> {
        prior.check(&self.solution, "a diagonal Fisher information", Family::Diagonal)?;
        let of = |leaf| {
            prior.diagonal_of(leaf, self.examples as f64)
        };
        self.solution.leaves().iter().map(of).collect()
    }
}

/// A Kronecker-factored Fisher information, from [`Fisher::kronecker`]: a sum over [`KroneckerFisher::examples`] examples.
#[derive(Debug)]
pub struct KroneckerFisher {
    at: At,
    layers: Vec<LayerFactors>,
    diagonal: Vec<(String, Tensor)>,
}

/// The factors of one layer: its Fisher information, summed over the data, is about G ⊗ A.
#[derive(Debug)]
pub struct LayerFactors {
    /// Name of the weight `[out, …]`, a matrix `[out, in]`.
    pub weight: String,
    /// Name of the bias `[out]`, which has the last row and column of A.
    pub bias: Option<String>,
    /// A `[in, in]`, or `[in+1, in+1]` with a bias: the mean of aaᵀ.
    pub inputs: Tensor,
    /// G `[out, out]`: the sum of ggᵀ.
    pub outputs: Tensor,
}

at!(KroneckerFisher);

impl KroneckerFisher {
    /// The layers, in the order of their weights.
    pub fn layers(&self) -> &[LayerFactors] {
        &self.layers
    }

    /// The exact diagonal of one of the parameters that belong to no layer, in its shape.
    pub fn diagonal(&self, name: &str) -> Option<&Tensor> {
        let leaf = self.at.solution.find(name)?;
        self.diagonal.iter().find_map(|(n, f)| (n == leaf.name()).then_some(f))
    }

    /// Laplace's approximation around the weights at which the factors were computed, with an isotropic prior N(0, 1/P₀):
    /// with G = U_G diag(g) U_Gᵀ and A = U_A diag(a) U_Aᵀ the precision of a weight is g aᵀ + P₀ in the basis
    /// (U_G, U_A), which adds the prior to the product and not to its factors.
    ///
    /// A weight and its bias are blocks of their own, because a [`KroneckerGaussian`] has a basis for each parameter: A for
    /// the weight is the block without the appended 1, and the bias has precision g + P₀ in the basis U_G. What the full
    /// G ⊗ A says about their correlation is left out. Parameters without factors get diag F + P₀.
    ///
    /// With a posterior as prior the sum has no such basis. As a loss term it has no need of one:
    /// [`continual::Quadratic`](crate::continual::Quadratic) is made of this, keeps the products of all tasks as a list, and
    /// takes a weight with its bias.
    ///
    /// # Errors
    /// A prior that is a posterior; a precision that is not positive and finite, as where both F and P₀ vanish.
    pub fn laplace(&self, prior: impl Into<Prior>) -> Result<KroneckerGaussian> {
        let prior = prior.into();
        prior.check(&self.at.solution, "a Kronecker-factored Fisher information", Family::Full)?;
        let Some(p0) = prior.isotropic_precision() else {
            return Err(Error::Posterior(
                "a Kronecker-factored Fisher information was given a posterior as prior: expected Prior::isotropic(..), \
                 because the sum has no Kronecker basis otherwise; take continual::Quadratic::from(&fisher) as a loss term, or \
                 Fisher::diagonal or Fisher::full"
                    .to_owned(),
            ));
        };
        let _no_grad = tch::no_grad_guard();
        let mut parameters = Vec::new();
        for leaf in self.at.solution.leaves() {
            let mean = leaf.tensor.copy();
            let kind = mean.kind();
            let like = |t: &Tensor| t.to_kind(kind);
            let name = leaf.name().to_owned();
            let layer = self.layers.iter().find(|l| l.weight == name || l.bias.as_ref() == Some(&name));
            parameters.push(if let Some(layer) = layer {
                let (g, left) = eigen(&layer.outputs)?;
                if layer.weight == name {
                    let width = matrix_shape(&mean.size())[1];
                    let (a, right) = eigen(&layer.inputs.f_narrow(0, 0, width)?.f_narrow(1, 0, width)?)?;
                    let precision = like(&(g.f_outer(&a)? + p0)).f_reshape(mean.size())?;
                    KroneckerParameter { name, mean, left: Some(like(&left)), right: Some(like(&right)), precision }
                } else {
                    // A bias is the row [1, out].
                    let precision = like(&(g + p0));
                    KroneckerParameter { name, mean, left: None, right: Some(like(&left)), precision }
                }
            } else {
                let zero = mean.zeros_like();
                let precision = self.diagonal(&name).unwrap_or(&zero) + p0;
                KroneckerParameter { name, mean, left: None, right: None, precision }
            });
        }
        KroneckerGaussian::new(parameters)
    }
}

/// Eigenvalues and eigenvectors of a second moment, in f64; the eigenvalues are not negative but for rounding.
fn eigen(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let (values, vectors) = linalg::eigen(&x.f_to_kind(Kind::Double)?)?;
    Ok((values.f_clamp_min(0.0)?, vectors))
}

/// The whole Fisher information matrix, from [`Fisher::full`]: a sum over [`FullFisher::examples`] examples.
#[derive(Debug)]
pub struct FullFisher {
    at: At,
    matrix: Tensor,
}

at!(FullFisher);

impl FullFisher {
    /// F `[P, P]` in f64: the weights of the parameters in order, each parameter's in row-major order.
    pub fn matrix(&self) -> &Tensor {
        &self.matrix
    }

    /// Laplace's approximation N(θ, (F + P₀)⁻¹), as [`DiagonalFisher::laplace`].
    ///
    /// # Errors
    /// As there; [`Error::NotPositiveDefinite`].
    pub fn laplace(&self, prior: impl Into<Prior>) -> Result<FullGaussian> {
        let _no_grad = tch::no_grad_guard();
        let priors = self.at.precisions(&prior.into())?;
        let flat = priors.iter().map(|p| p.to_kind(Kind::Double).reshape([-1]));
        let diagonal = Tensor::f_cat(&flat.collect::<Vec<_>>(), 0)?;
        FullGaussian::new(self.at.means(), &(&self.matrix + diagonal.diag_embed(0, -2, -1)))
    }

    /// Laplace's approximation N(θ, (F + P)⁻¹) with the full posterior N(m, P⁻¹) of earlier data as the prior: online
    /// Laplace (Ritter et al. 2018).
    ///
    /// # Errors
    /// A prior of other parameters or shapes; [`Error::NotPositiveDefinite`].
    pub fn laplace_after(&self, prior: &FullGaussian) -> Result<FullGaussian> {
        let _no_grad = tch::no_grad_guard();
        let leaves = self.at.solution.leaves();
        for (i, leaf) in leaves.iter().enumerate() {
            let name = prior.names().nth(i).filter(|name| leaf.names.iter().any(|n| n == name));
            let size = name.and_then(|name| prior.mean(name)).map(|m| m.size());
            if size != Some(leaf.tensor.size()) {
                return Err(Error::parameter(
                    leaf.name(),
                    "the prior does not have it at the same place and in the same shape; expected a posterior of the same \
                     parameters in the same order",
                ));
            }
        }
        if let Some(name) = prior.names().nth(leaves.len()) {
            return Err(Error::parameter(name, "the prior has it and the model has not"));
        }
        FullGaussian::new(self.at.means(), &(&self.matrix + prior.precision_matrix().to_device(self.matrix.device())))
    }
}

impl At {
    fn means(&self) -> Vec<(&str, Tensor)> {
        self.solution.leaves().iter().map(|l| (l.name(), l.tensor.shallow_clone())).collect()
    }
}

//! Examples that are kept, and the losses on them that stand for all of the past.

use super::past::{Model, Regularizer};
use crate::nn::Likelihood;
use crate::{Error, Result, check};
use tch::{Kind, Tensor};

/// Examples of the past: inputs, what is known of their labels, and which outputs of the model are theirs.
#[derive(Debug)]
pub struct Memory {
    inputs: Tensor,
    likelihood: Likelihood,
    targets: Option<Tensor>,
    weights: Option<Tensor>,
    labels: Option<Vec<i64>>,
}

impl Memory {
    /// Inputs, example by example in the first dimension, whose targets are not kept. The handle is shared, not copied.
    pub fn new(inputs: &Tensor, likelihood: Likelihood) -> Self {
        Memory { inputs: inputs.detach(), likelihood, targets: None, weights: None, labels: None }
    }

    /// With targets: classes `[M]` of kind i64 (a categorical likelihood), or values in the shape of the outputs.
    #[must_use]
    pub fn targets(mut self, targets: &Tensor) -> Self {
        self.targets = Some(targets.detach());
        self
    }

    /// With a weight `[M]` for each example, the number of past examples that it stands for; default 1.
    #[must_use]
    pub fn weights(mut self, weights: &Tensor) -> Self {
        self.weights = Some(weights.detach());
        self
    }

    /// With the outputs that are this task's (a head, or the classes seen): the softmax is over these, and classes are
    /// given as labels of the whole model. Default: all.
    #[must_use]
    pub fn labels(mut self, labels: &[i64]) -> Self {
        self.labels = Some(labels.to_vec());
        self
    }

    /// Another handle to the same examples.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let share = |t: &Option<Tensor>| t.as_ref().map(Tensor::shallow_clone);
        Memory {
            inputs: self.inputs.shallow_clone(),
            likelihood: self.likelihood,
            targets: share(&self.targets),
            weights: share(&self.weights),
            labels: self.labels.clone(),
        }
    }

    /// M
    pub fn len(&self) -> usize {
        self.inputs.size().first().map_or(0, |n| *n as usize)
    }

    /// Whether there are no examples.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn likelihood(&self) -> Likelihood {
        self.likelihood
    }

    /// What outputs predict: softmax, sigmoid, or themselves.
    pub(crate) fn prediction(&self, f: &Tensor) -> Result<Tensor> {
        prediction(self.likelihood, f)
    }

    /// The inputs, `[M, ..]`.
    pub fn inputs(&self) -> &Tensor {
        &self.inputs
    }

    /// The examples at these positions, in their order.
    ///
    /// # Errors
    /// A position outside.
    pub fn select(&self, positions: &[i64]) -> Result<Self> {
        let m = self.len() as i64;
        if let Some(bad) = positions.iter().find(|i| !(0..m).contains(*i)) {
            return Err(memory(format!("position {bad} of {m} examples: expected 0 to {}", m - 1)));
        }
        let at = Tensor::from_slice(positions).to_device(self.inputs.device());
        let pick = |t: &Tensor| t.f_index_select(0, &at.to_device(t.device()));
        Ok(Memory {
            inputs: pick(&self.inputs)?,
            likelihood: self.likelihood,
            targets: self.targets.as_ref().map(pick).transpose()?,
            weights: self.weights.as_ref().map(pick).transpose()?,
            labels: self.labels.clone(),
        })
    }

    pub(crate) fn labels_of_task(&self) -> Option<&[i64]> {
        self.labels.as_deref()
    }

    /// The model's outputs on the memory, `[M, C]` of this task's labels.
    pub(crate) fn outputs(&self, forward: &dyn Fn(&Tensor) -> Tensor) -> Result<Tensor> {
        if self.is_empty() {
            return Err(memory("it is empty: leave it out of the sum, or select at least one example".to_owned()));
        }
        let f = forward(&self.inputs);
        if !f.defined() || !f.is_floating_point() || !matches!(f.size()[..], [m, ..] if m == self.len() as i64) {
            let form = if f.defined() { format!("{:?} {:?}", f.kind(), f.size()) } else { "undefined".to_owned() };
            return Err(memory(format!("the outputs on {} examples are {form}: expected a row for each", self.len())));
        }
        let size = f.size();
        match self.likelihood {
            Likelihood::Gaussian { variance } => check::positive("variance", variance)?,
            Likelihood::Categorical if !matches!(size[..], [_, c] if c >= 2) => {
                return Err(memory(format!(
                    "the outputs are {size:?}: a categorical likelihood needs logits [M, C] of C ≥ 2 classes; for one logit \
                     per example choose Likelihood::Bernoulli"
                )));
            }
            _ => (),
        }
        let Some(labels) = &self.labels else { return Ok(f) };
        let &[_, columns] = &size[..] else {
            return Err(memory(format!(
                "the outputs are {size:?} and labels are named: expected columns to choose from"
            )));
        };
        let fewest = if self.likelihood == Likelihood::Categorical { 2 } else { 1 };
        if labels.len() < fewest || labels.iter().enumerate().any(|(i, c)| labels[..i].contains(c)) {
            return Err(memory(format!(
                "the active labels are {labels:?}: expected at least {fewest}, each of them once"
            )));
        }
        if let Some(bad) = labels.iter().find(|c| !(0..columns).contains(*c)) {
            return Err(memory(format!("label {bad} is active, but the model has the outputs 0 to {}", columns - 1)));
        }
        Ok(f.f_index_select(1, &Tensor::from_slice(labels).to_device(f.device()))?)
    }

    /// The targets as predictions in the shape of the outputs: classes become rows of zeros and a one.
    pub(crate) fn hard(&self, outputs: &Tensor) -> Result<Tensor> {
        let Some(targets) = &self.targets else {
            return Err(memory("it has no targets; give them with .targets(..)".to_owned()));
        };
        let size = outputs.size();
        if self.likelihood != Likelihood::Categorical {
            if targets.size() != size {
                return Err(memory(format!(
                    "its targets are {:?} and the outputs {size:?}: expected the same",
                    targets.size()
                )));
            }
            return Ok(targets.f_to_device(outputs.device())?.f_to_kind(outputs.kind())?);
        }
        if targets.kind() != Kind::Int64 || targets.size() != [size[0]] {
            let form = format!("{:?} {:?}", targets.kind(), targets.size());
            return Err(memory(format!("its targets are {form}: expected classes Int64 [{}]", size[0])));
        }
        let all: Vec<i64> = (0..size[1]).collect();
        let labels = self.labels.as_ref().unwrap_or(&all);
        let hot = targets.f_unsqueeze(1)?.f_eq_tensor(&Tensor::from_slice(labels).to_device(targets.device()))?;
        let found = hot.f_any_dim(1, false)?;
        if found.all().int64_value(&[]) == 0 {
            let at = found.to_kind(Kind::Int64).argmin(0, false).int64_value(&[]);
            let class = targets.int64_value(&[at]);
            return Err(memory(format!("example {at} has class {class}, which is not one of the labels {labels:?}")));
        }
        Ok(hot.f_to_device(outputs.device())?.f_to_kind(outputs.kind())?)
    }

    /// Σ wᵢ xᵢ
    fn weighted_sum(&self, each: &Tensor) -> Result<Tensor> {
        let Some(weights) = &self.weights else { return Ok(each.f_sum(None::<Kind>)?) };
        Ok((each * weights.to_kind(each.kind()).to_device(each.device())).f_sum(None::<Kind>)?)
    }

    /// What a constructor looks at, so that training does not run into it: weights in their shape, outputs that are finite.
    pub(crate) fn check(&self, outputs: &Tensor) -> Result<()> {
        if let Some(value) = crate::kernel::first_non_finite(&outputs.detach()) {
            return Err(memory(format!("the model's outputs on it are not finite ({value})")));
        }
        self.check_weights()
    }

    /// wᵢ `[M]` in f64.
    pub(crate) fn weights_or_one(&self) -> Result<Tensor> {
        self.check_weights()?;
        match &self.weights {
            Some(weights) => Ok(weights.f_to_kind(Kind::Double)?),
            None => Ok(Tensor::f_ones([self.len() as i64], (Kind::Double, self.inputs.device()))?),
        }
    }

    fn check_weights(&self) -> Result<()> {
        let Some(weights) = &self.weights else { return Ok(()) };
        if weights.size() != [self.len() as i64] {
            return Err(memory(format!("its weights are {:?}: expected [{}]", weights.size(), self.len())));
        }
        match crate::kernel::first_non_finite(weights) {
            Some(value) => Err(memory(format!("its weights are not finite ({value})"))),
            None => Ok(()),
        }
    }
}

pub(super) fn memory(problem: String) -> Error {
    Error::Memory(problem)
}

/// What an output predicts: softmax, sigmoid, or itself.
pub(super) fn prediction(likelihood: Likelihood, f: &Tensor) -> Result<Tensor> {
    Ok(match likelihood {
        Likelihood::Categorical => f.f_softmax(-1, None::<Kind>)?,
        Likelihood::Bernoulli => f.f_sigmoid()?,
        Likelihood::Gaussian { .. } => f.shallow_clone(),
    })
}

/// Sum over the columns, `[M]`.
fn rows(each: &Tensor) -> Result<Tensor> {
    Ok(each.f_reshape([each.size()[0], -1])?.f_sum_dim_intlist(1, false, None::<Kind>)?)
}

/// -ln p(t | f) of each example for targets in the form of predictions; for a Gaussian up to a constant.
fn losses(likelihood: Likelihood, f: &Tensor, t: &Tensor) -> Result<Tensor> {
    if f.size() != t.size() {
        return Err(memory(format!(
            "the outputs are {:?} and were {:?} when it was filled: for a model of other outputs, fill it again",
            f.size(),
            t.size()
        )));
    }
    let t = &t.to_device(f.device());
    rows(&match likelihood {
        Likelihood::Categorical => -(f.f_log_softmax(-1, None::<Kind>)? * t),
        // -t ln p - (1-t) ln(1-p). Not softplus, which in libtorch is f from 20 on, with the gradient 1.
        Likelihood::Bernoulli => {
            let (one, zero) = (f.f_log_sigmoid()?, f.f_neg()?.f_log_sigmoid()?);
            zero * (t - 1.0) - one * t
        }
        Likelihood::Gaussian { variance } => (f - t).f_square()? * (0.5 / variance),
    })
}

/// Σ w CE(p_old, p(θ)): the model's own predictions as labels on the memory.
///
/// The functional regularizer of K-priors (Khan and Swaroop 2021), and with a temperature T that of distillation,
/// T² Σ w CE(softmax(f_old/T), softmax(f/T)); on the inputs of the new task in place of a memory it is learning without
/// forgetting (Li and Hoiem 2016), which keeps no data. Its gradient Σ w Jᵢᵀ(pᵢ - pᵢ_old) is that of the past data's loss, exactly where
/// the model is linear in its weights and the memory holds all data, and θ_old is their optimum with a prior (whose
/// [`Quadratic`](super::Quadratic) around θ_old is the other part of the K-prior). Select a small memory by
/// [`Memory::lambda`], which suits these soft labels.
///
/// # K-priors
/// K = `SoftLabels::of(memory, old model)` + [`Quadratic::isotropic`](super::Quadratic::isotropic)`(δ)`, with the δ that the
/// old model was trained with. What a trained model can be adapted to without its data, exactly so where the above holds:
///
/// | adaptation | minimise |
/// |---|---|
/// | add data | K + the loss of the new data |
/// | remove data | K + [`Replay::weighted`]`(removed, -1.0)`, where the memory holds the inputs removed |
/// | change the regularizer | the soft labels + [`Quadratic::change_of_regularizer`](super::Quadratic::change_of_regularizer) |
/// | change the model | the soft labels of the old model on the new one's outputs + `Quadratic::isotropic` around the coefficients that both have (set the new model to them), or [`Quadratic::towards_zero`](super::Quadratic::towards_zero) where they have none in common |
///
/// A memory of few examples counts the past for less than it is. What the others had to say is their curvature, which is
/// added to the isotropic part (Daxberger et al. 2023; with half of the memory as [`Replay`] it is their EWC + FR + Replay):
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::continual::{Memory, Past, Quadratic, SoftLabels};
/// use tch_blr::nn::{self, Likelihood};
/// use tch_blr::{Fisher, Params};
/// # fn main() -> tch_blr::Result<()> {
/// # let vs = VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root(), 4, 1, Default::default());
/// # let x = Tensor::randn([50, 4], (Kind::Float, Device::Cpu));
/// let (kept, left_out) = (x.narrow(0, 0, 10), x.narrow(0, 10, 40));
/// let params = Params::from(&vs);
/// let fisher = Fisher::exact().likelihood(Likelihood::Bernoulli).full(&vs, [left_out], |x| net.forward(x))?;
/// let past = Past::new()
///     .with(Quadratic::isotropic(&params, 0.5)?)
///     .with(Quadratic::from(&fisher))
///     .with(SoftLabels::of(Memory::new(&kept, Likelihood::Bernoulli), |x| net.forward(x))?);
/// # let _ = past.value(&params, &|x| net.forward(x))?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SoftLabels {
    memory: Memory,
    old: Tensor,
    temperature: f64,
}

impl SoftLabels {
    /// What the model predicts now. Another model may be trained with it then: that is the K-prior for a change of model.
    ///
    /// # Errors
    /// An empty memory, outputs that do not fit it or are not finite.
    pub fn of(memory: Memory, forward: impl Fn(&Tensor) -> Tensor) -> Result<Self> {
        Self::at_temperature(memory, 1.0, forward)
    }

    /// The same, with predictions softened by T > 0.
    ///
    /// # Errors
    /// As [`SoftLabels::of`]; T that is not finite and positive, or not 1 for outputs that are no logits.
    pub fn at_temperature(memory: Memory, temperature: f64, forward: impl Fn(&Tensor) -> Tensor) -> Result<Self> {
        check::positive("temperature", temperature)?;
        let logits = !matches!(memory.likelihood, Likelihood::Gaussian { .. });
        check::that("temperature", temperature, logits || temperature == 1.0, "1 for a Gaussian likelihood")?;
        let _no_grad = tch::no_grad_guard();
        let f = memory.outputs(&forward)?;
        memory.check(&f)?;
        let old = prediction(memory.likelihood, &(f / temperature))?;
        Ok(SoftLabels { memory, old, temperature })
    }

    /// p_old, in the shape of the outputs.
    pub fn predictions(&self) -> &Tensor {
        &self.old
    }
}

impl Regularizer for SoftLabels {
    fn value(&self, model: &Model) -> Result<Tensor> {
        let f = self.memory.outputs(model.forward)? / self.temperature;
        let each = losses(self.memory.likelihood, &f, &self.old)?;
        Ok(self.memory.weighted_sum(&each)? * (self.temperature * self.temperature))
    }
}

/// Σ w (p_old - y)ᵀ f(θ): what soft labels leave out of the past data's gradient (for a Gaussian divided by σ²).
///
/// [`SoftLabels`] at temperature 1 plus this has the gradient Σ w Jᵢᵀ(pᵢ - yᵢ) of [`Replay`]. It matters where the model is not
/// linear in its weights and the labels are not fitted (Daxberger et al. 2023).
#[derive(Debug)]
pub struct LabelNoise {
    memory: Memory,
    residual: Tensor,
}

impl LabelNoise {
    /// With what the model predicts now.
    ///
    /// # Errors
    /// As [`SoftLabels::of`]; a memory without targets, or whose classes are not among its labels.
    pub fn of(memory: Memory, forward: impl Fn(&Tensor) -> Tensor) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let f = memory.outputs(&forward)?;
        memory.check(&f)?;
        let residual = prediction(memory.likelihood, &f)? - memory.hard(&f)?;
        let scale = if let Likelihood::Gaussian { variance } = memory.likelihood { 1.0 / variance } else { 1.0 };
        Ok(LabelNoise { residual: residual * scale, memory })
    }
}

impl Regularizer for LabelNoise {
    fn value(&self, model: &Model) -> Result<Tensor> {
        let f = self.memory.outputs(model.forward)?;
        if f.size() != self.residual.size() {
            let (now, then) = (f.size(), self.residual.size());
            return Err(memory(format!("the outputs are {now:?} and were {then:?} when it was filled")));
        }
        self.memory.weighted_sum(&rows(&(f * &self.residual))?)
    }
}

/// α Σ w ‖f(θ) - f_old‖²: stored outputs, for classes their logits.
///
/// With α = 1 the regularizer of Benjamin, Rolnick and Kording (2019), *Measuring and Regularizing Networks in Function Space*.
/// Dark experience replay (Buzzega et al. 2020) stores the outputs with a [`Reservoir`](crate::memory::Reservoir) as training
/// goes ([`StoredOutputs::new`]); DER++ adds [`Replay::weighted`]`(memory, β)`.
///
/// Published coefficients belong to means: α' beside the mean over M examples and C outputs, and β' beside the mean over M, added
/// to the mean loss of the task, are α = α'N/(MC) and β = β'N/M here, for a sum that is divided by the task's N.
#[derive(Debug)]
pub struct StoredOutputs {
    memory: Memory,
    old: Tensor,
    alpha: f64,
}

impl StoredOutputs {
    /// With what the model says now.
    ///
    /// # Errors
    /// As [`StoredOutputs::new`].
    pub fn of(memory: Memory, alpha: f64, forward: impl Fn(&Tensor) -> Tensor) -> Result<Self> {
        let old = tch::no_grad(|| memory.outputs(&forward))?;
        Self::new(memory, &old, alpha)
    }

    /// With outputs stored earlier, `[M, C]` of this task's labels.
    ///
    /// # Errors
    /// An empty memory, outputs that are not a finite row for each example, α that is negative or not finite.
    pub fn new(memory: Memory, outputs: &Tensor, alpha: f64) -> Result<Self> {
        check::non_negative("alpha", alpha)?;
        if memory.is_empty() || outputs.size().first() != Some(&(memory.len() as i64)) {
            let problem =
                format!("{:?} outputs for {} examples: expected a row for each", outputs.size(), memory.len());
            return Err(self::memory(problem));
        }
        memory.check(outputs)?;
        Ok(StoredOutputs { memory, old: outputs.detach().copy(), alpha })
    }
}

impl Regularizer for StoredOutputs {
    fn value(&self, model: &Model) -> Result<Tensor> {
        let f = self.memory.outputs(model.forward)?;
        let each = losses(Likelihood::Gaussian { variance: 0.5 }, &f, &self.old)?;
        Ok(self.memory.weighted_sum(&each)? * self.alpha)
    }
}

/// w Σ wᵢ ℓ(yᵢ, fᵢ(θ)): the past's own examples again. With the weight -1 their removal, which in a K-prior whose memory
/// holds them leaves a convex problem.
#[derive(Debug)]
pub struct Replay {
    memory: Memory,
    weight: f64,
}

impl Replay {
    /// The loss on a memory with targets.
    ///
    /// # Errors
    /// An empty memory, one without targets.
    pub fn new(memory: Memory) -> Result<Self> {
        Self::weighted(memory, 1.0)
    }

    /// The loss times w, which may be negative.
    ///
    /// # Errors
    /// As [`Replay::new`]; w that is not finite.
    pub fn weighted(memory: Memory, w: f64) -> Result<Self> {
        check::that("w", w, w.is_finite(), "a finite number")?;
        if memory.is_empty() {
            return Err(self::memory(
                "it is empty: leave it out of the sum, or select at least one example".to_owned(),
            ));
        }
        if memory.targets.is_none() {
            return Err(self::memory("it has no targets; give them with .targets(..)".to_owned()));
        }
        memory.check_weights()?;
        Ok(Replay { memory, weight: w })
    }
}

impl Regularizer for Replay {
    fn value(&self, model: &Model) -> Result<Tensor> {
        let f = self.memory.outputs(model.forward)?;
        let targets = self.memory.hard(&f)?;
        Ok(self.memory.weighted_sum(&losses(self.memory.likelihood, &f, &targets)?)? * self.weight)
    }
}

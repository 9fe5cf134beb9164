//! Functions on a memory: what the old model said of its examples, as soft labels or as outputs. Labels of the data are
//! in `labels.rs`.

use super::memory::{Memory, problem};
use super::past::{Model, Regularizer};
use crate::likelihood::{Likelihood, Outputs};
use crate::{IntoTensor, Result, check};
use tch::Tensor;

/// Σ w CE(p_old, p(θ)): the model's own predictions as labels on the memory.
///
/// The functional regularizer of K-priors (Khan and Swaroop 2021), and with a temperature T that of distillation,
/// T² Σ w CE(softmax(f_old/T), softmax(f/T)); on the inputs of the new task in place of a memory it is learning without
/// forgetting (LwF, below), which keeps no data. Its gradient Σ w Jᵢᵀ(pᵢ - pᵢ_old) is that of the past data's
/// loss, exactly where the model is linear in its weights and the memory holds all data, and θ_old is their optimum
/// with a prior (whose [`Quadratic`](super::Quadratic) around θ_old is the other part of the K-prior). Select a small
/// memory by [`Memory::lambda`], which suits these soft labels.
///
/// # K-priors
/// K = `SoftLabels::of(memory, old model)` + [`Quadratic::isotropic`](super::Quadratic::isotropic)`(δ)`, with the δ
/// that the old model was trained with. What a trained model can be adapted to without its data, exactly so where the
/// above holds:
///
/// | adaptation | minimise |
/// |---|---|
/// | add data | K + the loss of the new data |
/// | remove data | K + [`Replay::weighted`]`(removed, -1.0)`, where the memory holds the inputs removed |
/// | change the regularizer | the soft labels + [`Quadratic::change_of_regularizer`] |
/// | change the model | the old model's soft labels on the new model's outputs + a prior on the new model's weights |
///
/// The prior of a changed model is `Quadratic::isotropic` around the coefficients that both have (set the new model to
/// them), or [`Quadratic::towards_zero`] where they have none in common.
///
/// [`Replay::weighted`]: super::Replay::weighted
/// [`Quadratic::change_of_regularizer`]: super::Quadratic::change_of_regularizer
/// [`Quadratic::towards_zero`]: super::Quadratic::towards_zero
///
/// # Learning without forgetting
/// (LwF, Li and Hoiem 2016.) No data of the past, only the old model: what it says of the new task's own inputs, over
/// the old classes and at T = 2, beside the loss of the new ones. In every step, for the batch at hand:
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::continual::{Memory, Past, SoftLabels};
/// use tch_blr::nn::{self, Likelihood};
/// # fn main() -> tch_blr::Result<()> {
/// # let stores = [0, 1].map(|_| VarStore::new(Device::Cpu));
/// # let [net, old] = stores.each_ref().map(|vs| nn::linear(vs.root(), 4, 5, Default::default()));
/// # let [vs, _] = &stores;
/// # let (x, y) = (Tensor::randn([8, 4], (Kind::Float, Device::Cpu)), Tensor::zeros([8], (Kind::Int64, Device::Cpu)) + 3);
/// let inputs = Memory::new(&x, Likelihood::Categorical).active(&[0, 1, 2]); // the old classes
/// let past = Past::new().with(SoftLabels::at_temperature(inputs, 2.0, |x| old.forward(x))?);
/// // The two means over the batch, with the published weight of 1: K is a sum over its 8 examples.
/// let loss = past.beside(net.forward(&x).cross_entropy_for_logits(&y), 8.0, vs, |x| net.forward(x))?;
/// # assert!(loss.requires_grad());
/// # Ok(())
/// # }
/// ```
///
/// # With curvature
/// A memory of few examples counts the past for less than it is. What the others had to say is their curvature, which
/// is added to the isotropic part (Daxberger et al. 2023; with half of the memory as [`Replay`](super::Replay) it is
/// their EWC + FR + Replay):
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::continual::{Memory, Past, Quadratic, SoftLabels};
/// use tch_blr::nn::{self, Likelihood};
/// use tch_blr::{Params, fisher::Fisher};
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
/// # let _ = past.beside(x.mean(None), 50.0, &params, |x| net.forward(x))?;
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
    /// What the model predicts now. Another model may then be trained with it, which is the K-prior for a change of
    /// model.
    ///
    /// # Errors
    /// An empty memory, outputs that do not fit it or are not finite.
    pub fn of<L: IntoTensor>(memory: Memory, forward: impl Fn(&Tensor) -> L) -> Result<Self> {
        Self::at_temperature(memory, 1.0, forward)
    }

    /// The same, with predictions softened by T > 0.
    ///
    /// # Errors
    /// As [`SoftLabels::of`]; T that is not finite and positive, or not 1 for outputs that are not logits.
    pub fn at_temperature<L: IntoTensor>(
        memory: Memory,
        temperature: f64,
        forward: impl Fn(&Tensor) -> L,
    ) -> Result<Self> {
        check::positive("temperature", temperature)?;
        let logits = !matches!(memory.likelihood(), Likelihood::Gaussian { .. });
        // Dividing an output that is not a logit by T would be another regression.
        check::that("temperature", temperature, logits || temperature == 1.0, "1 for a Gaussian likelihood")?;
        let _no_grad = tch::no_grad_guard();
        let old = memory.checked_outputs(&|x| forward(x).into_tensor())?.at_temperature(temperature).prediction()?;
        Ok(SoftLabels { memory, old, temperature })
    }

    /// p_old, in the shape of the outputs.
    pub fn predictions(&self) -> &Tensor {
        &self.old
    }
}

impl Regularizer for SoftLabels {
    fn value(&self, model: &Model) -> Result<Tensor> {
        let f = self.memory.outputs(model.forward)?.at_temperature(self.temperature);
        // T², because gradients of softened losses shrink like 1/T².
        Ok(self.memory.weighted_sum(&f.losses(&self.old)?)? * (self.temperature * self.temperature))
    }
}

/// α Σ w ‖f(θ) - f_old‖²: stored outputs, for classes their logits.
///
/// With α = 1 the regularizer of Benjamin, Rolnick and Kording (2019), *Measuring and Regularizing Networks in Function
/// Space*. Dark experience replay (Buzzega et al. 2020) stores the outputs with a
/// [`Reservoir`](crate::selection::Reservoir) as training goes ([`StoredOutputs::new`]); DER++ adds
/// [`Replay::weighted`](super::Replay::weighted)`(memory, β)`.
///
/// Published coefficients belong to means: α' beside the mean over M examples and C outputs, and β' beside the mean
/// over M, added to the mean loss of the task, are α = α'N/(MC) and β = β'N/M here, for a sum that is divided by the
/// task's N.
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
    pub fn of<L: IntoTensor>(memory: Memory, alpha: f64, forward: impl Fn(&Tensor) -> L) -> Result<Self> {
        let old = tch::no_grad(|| memory.outputs(&|x| forward(x).into_tensor()))?;
        Self::new(memory, &old.z, alpha)
    }

    /// With outputs stored earlier, `[M, C]` of this task's labels.
    ///
    /// # Errors
    /// An empty memory, outputs that are not a finite row for each example, α that is negative or not finite.
    pub fn new(memory: Memory, outputs: &Tensor, alpha: f64) -> Result<Self> {
        check::non_negative("alpha", alpha)?;
        memory.check_some()?;
        if outputs.size().first() != Some(&(memory.len() as i64)) {
            let (size, m) = (outputs.size(), memory.len());
            return Err(problem(format!("{size:?} outputs for {m} examples: expected a row for each")));
        }
        Outputs::check_finite_values(outputs)?;
        memory.check_weights()?;
        // A copy, since the caller may go on using the tensor.
        Ok(StoredOutputs { memory, old: outputs.detach().copy(), alpha })
    }
}

impl Regularizer for StoredOutputs {
    fn value(&self, model: &Model) -> Result<Tensor> {
        // ‖f - f_old‖² is the loss of a Gaussian of variance ½, whatever the memory's likelihood.
        let f = self.memory.outputs(model.forward)?.with(Likelihood::Gaussian { variance: 0.5 });
        Ok(self.memory.weighted_sum(&f.losses(&self.old)?)? * self.alpha)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Params;
    use crate::continual::Past;
    use tch::nn::{LinearConfig, Module, VarStore, linear};
    use tch::{Device, Kind};

    /// Learning without forgetting by hand: the mean of -T² Σ_c softmax(f_old/T)_c ln softmax(f/T)_c over the old
    /// classes of the new examples. Its gradient is zero at the old model, where nothing is to be changed.
    #[test]
    fn distillation_on_new_inputs_is_learning_without_forgetting() {
        let place = (Kind::Double, Device::Cpu);
        let wave = |size: &[i64], phase: f64| {
            (Tensor::arange(size.iter().product::<i64>(), place) * 1.3 + phase).sin().reshape(size)
        };
        let model = |phase: f64| {
            let mut vs = VarStore::new(Device::Cpu);
            let net = linear(vs.root(), 3, 4, LinearConfig::default());
            vs.set_kind(Kind::Double);
            tch::no_grad(|| net.ws.shallow_clone().copy_(&(wave(&[4, 3], phase) * 2.0)));
            (vs, net)
        };
        let ((_, old), (vs, net), (same, twin)) = (model(0.1), model(0.7), model(0.1));
        tch::no_grad(|| twin.bs.as_ref().unwrap().shallow_clone().copy_(old.bs.as_ref().unwrap()));
        let x = wave(&[5, 3], 2.0);
        let t = 2.0;
        let past = |old: &dyn Module| {
            let inputs = Memory::new(&x, Likelihood::Categorical).active(&[0, 2]);
            Past::new().with(SoftLabels::at_temperature(inputs, t, |x| old.forward(x)).unwrap())
        };
        let value = past(&old).beside(Tensor::from(0.0), 5.0, &vs, |x| net.forward(x)).unwrap();
        let columns = Tensor::from_slice(&[0i64, 2]);
        let soft = |f: Tensor| (f.index_select(1, &columns) / t).softmax(1, None::<Kind>);
        let by_hand = -(soft(old.forward(&x)) * soft(net.forward(&x)).log()).sum(Kind::Double) * t * t / 5.0;
        assert!((value - by_hand).double_value(&[]).abs() < 1e-14);
        let there = past(&old).value(&same, |x| twin.forward(x)).unwrap();
        let slopes = super::super::past::gradient(&there, &Params::from(&same)).unwrap();
        assert!(slopes.iter().all(|g| g.abs().max().double_value(&[]) < 1e-15));
    }
}

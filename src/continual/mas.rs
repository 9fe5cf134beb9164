//! Memory-aware synapses: importance from how much the outputs feel each weight.

use super::quadratic::Quadratic;
use crate::curvature::{Linearized, Looked, Pass};
use crate::{Error, IntoTensor, Params, Result, check, kernel};
use std::borrow::Borrow;
use tch::Tensor;

/// Memory-aware synapses (MAS, Aljundi et al. 2018): a weight matters if the outputs change with it, whatever the
/// labels, so that inputs are enough, those of a test too.
///
/// With f(x) the outputs of the closure, usually logits, and θ* the weights at which it is computed:
///
/// ```text
/// Ω = (1/N) Σᵢ |∂‖f(xᵢ)‖²/∂θ|        penalty: λ Σ Ω (θ - θ*)², added to the mean loss
/// ```
///
/// in which the size is taken of every example's gradient (the published code takes it of a batch's mean gradient,
/// which depends on the batch). Published λ: 1. Ω of several tasks add up, around the newest weights:
/// `past.recentred(&params)?.plus(&mas.penalty(λ, n)?)?`. Frozen parameters and those without a part in the outputs are
/// free.
///
/// One forward and one backward pass for each batch over the layers of [`crate::nn`], and one backward pass for every
/// example where parameters are used outside of these.
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::continual::{Mas, Past};
/// use tch_blr::{Params, nn};
/// # fn main() -> tch_blr::Result<()> {
/// # let vs = VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root(), 4, 3, Default::default());
/// # let x = Tensor::randn([50, 4], (Kind::Float, Device::Cpu));
/// let params = Params::from(&vs);
/// // After a task, on inputs of it:
/// let mas = Mas::new(&params, x.split(25, 0), |x| net.forward(x))?;
/// // Before the next, which has 80 examples:
/// let past = Past::new().with(mas.penalty(1.0, 80.0)?);
/// # let _ = past.beside(net.forward(&x).mean(None::<Kind>), 80.0, &params, |x| net.forward(x))?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Mas {
    weights: Vec<Weight>,
    examples: u64,
}

#[derive(Debug)]
struct Weight {
    name: String,
    /// θ*
    at: Tensor,
    /// NΩ
    sum: Tensor,
}

impl Mas {
    /// At the present weights, on batches of inputs, example by example in the first dimension. Run the model in
    /// evaluation mode.
    ///
    /// # Errors
    /// Nothing trained, no examples; [`Error::Curvature`] for outputs without a graph or an Ω that is not finite;
    /// [`Error::Likelihood`] for outputs of another form than `[B]` or `[B, C]`, or not finite; [`Error::PerExample`]
    /// for batch normalization in training mode.
    pub fn new<X: Borrow<Tensor>, L: IntoTensor>(
        params: impl Into<Params>,
        inputs: impl IntoIterator<Item = X>,
        forward: impl Fn(&Tensor) -> L,
    ) -> Result<Self> {
        let params = Params::separate(params)?;
        params.check()?;
        let trained = params.leaves().iter().filter(|l| l.trainable());
        let weight = trained.map(|l| {
            let at = tch::no_grad(|| l.tensor.detach().to_kind(l.state_kind()).copy());
            Weight { name: l.name().to_owned(), sum: at.zeros_like(), at }
        });
        let mut mas = Mas { weights: weight.collect(), examples: 0 };
        let mut looked = Looked::default();
        for x in inputs {
            let pass = Pass::run(&params, || forward(x.borrow()))?;
            if pass.examples() == 0 {
                continue;
            }
            // ∂‖f‖²/∂f
            let twice = pass.z.detach() * 2.0;
            let sizes = Linearized::new(&pass, &params, &mut looked)?.absolutes(&twice)?;
            for (w, more) in mas.weights.iter_mut().zip(sizes) {
                if let Some(more) = more {
                    w.sum += more.to_kind(w.sum.kind());
                }
            }
            mas.examples += pass.examples() as u64;
        }
        mas.check()?;
        Ok(mas)
    }

    fn check(&self) -> Result<()> {
        if self.examples == 0 {
            return Err(Error::Curvature("there are no examples to take the importance of weights from".to_owned()));
        }
        self.weights.iter().try_for_each(|w| match kernel::first_non_finite(&w.sum) {
            Some(value) => Err(Error::Curvature(format!(
                "the importance of parameter `{}` over {} examples is not finite ({value}); look at the weights and the \
                 inputs",
                w.name, self.examples
            ))),
            None => Ok(()),
        })
    }

    /// Number of examples N.
    pub fn examples(&self) -> u64 {
        self.examples
    }

    /// Ω of a parameter, in its shape.
    pub fn importance(&self, name: &str) -> Option<Tensor> {
        self.weights.iter().find(|w| w.name == name).map(|w| &w.sum / self.examples as f64)
    }

    /// λ Σ Ω (θ - θ*)² as a [`Quadratic`], S = 2λ·n·Ω: a sum over the n = `examples` of the new task that the mean loss
    /// beside it stands for, as [`SynapticIntelligence::penalty`](super::SynapticIntelligence::penalty).
    ///
    /// # Errors
    /// λ < 0, n ≤ 0, or not finite.
    pub fn penalty(&self, lambda: f64, examples: f64) -> Result<Quadratic> {
        check::non_negative("lambda", lambda)?;
        check::positive("examples", examples)?;
        let scale = 2.0 * lambda * examples / self.examples as f64;
        Quadratic::new(self.weights.iter().map(|w| (w.name.clone(), w.at.copy(), &w.sum * scale)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::continual::Past;
    use crate::nn;
    use tch::nn::{Module, VarStore};
    use tch::{Device, Kind, nn as plain};

    const PLACE: (Kind, Device) = (Kind::Double, Device::Cpu);

    fn wave(size: &[i64], phase: f64) -> Tensor {
        (Tensor::arange(size.iter().product::<i64>(), PLACE) * 1.3 + phase).sin().reshape(size)
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    /// f = Wx has ∂‖f‖²/∂W = 2 f xᵀ: of every example its size, by layers that record and by tch's, in one batch and in
    /// several.
    #[test]
    fn a_linear_model_has_the_sizes_of_its_outputs_and_inputs() {
        let x = wave(&[6, 3], 0.4);
        let w = wave(&[2, 3], 1.0);
        let f = x.matmul(&w.tr());
        let expected = (f.abs() * 2.0).tr().matmul(&x.abs()) / 6.0;
        for recording in [true, false] {
            let mut vs = VarStore::new(Device::Cpu);
            let root = vs.root();
            let net: Box<dyn Module> = if recording {
                Box::new(nn::linear(&root, 3, 2, plain::LinearConfig { bias: false, ..plain::LinearConfig::default() }))
            } else {
                Box::new(plain::linear(
                    &root,
                    3,
                    2,
                    plain::LinearConfig { bias: false, ..plain::LinearConfig::default() },
                ))
            };
            let free = root.ones("free", &[1]);
            vs.set_kind(Kind::Double);
            tch::no_grad(|| vs.variables()["weight"].shallow_clone().copy_(&w));
            for batch in [6, 4, 1] {
                let mas = Mas::new(&vs, x.split(batch, 0), |x| net.forward(x)).unwrap();
                assert_eq!(mas.examples(), 6);
                assert!(difference(&mas.importance("weight").unwrap(), &expected) < 1e-14);
                assert_eq!(mas.importance("free").unwrap().double_value(&[0]), 0.0);
                // λΣΩd² beside a mean loss
                let past = Past::new().with(mas.penalty(3.0, 80.0).unwrap());
                _ = tch::no_grad(|| vs.variables()["weight"].shallow_clone().g_add_scalar_(0.5));
                let value = past.beside(Tensor::from(0.0), 80.0, &vs, |x| net.forward(x)).unwrap();
                let by_hand = 3.0 * 0.25 * expected.sum(Kind::Double).double_value(&[]);
                assert!((value.double_value(&[]) - by_hand).abs() < 1e-12);
                tch::no_grad(|| vs.variables()["weight"].shallow_clone().copy_(&w));
            }
            assert_eq!(free.size(), [1]);
        }
    }

    #[test]
    fn what_has_no_importance_is_refused() {
        let mut vs = VarStore::new(Device::Cpu);
        let net = nn::linear(vs.root(), 3, 2, plain::LinearConfig::default());
        let says = |e: Error, what: &str| assert!(e.to_string().contains(what), "{e}");
        let none: [Tensor; 0] = [];
        says(Mas::new(&vs, none, |x| net.forward(x)).unwrap_err(), "no examples");
        let x = Tensor::ones([4, 3], (Kind::Float, Device::Cpu));
        says(Mas::new(&vs, [&x * f64::NAN], |x| net.forward(x)).unwrap_err(), "not finite");
        says(Mas::new(&vs, [&x], |x| net.forward(x).unsqueeze(0)).unwrap_err(), "[B, C]");
        says(Mas::new(&vs, [&x], |x| net.forward(x).detach()).unwrap_err(), "no graph");
        let mas = Mas::new(&vs, [&x], |x| net.forward(x)).unwrap();
        says(mas.penalty(-1.0, 1.0).unwrap_err(), "lambda");
        says(mas.penalty(1.0, 0.0).unwrap_err(), "examples");
        vs.freeze();
        says(Mas::new(&vs, [&x], |x| net.forward(x)).unwrap_err(), "requires gradients");
    }
}

//! Synaptic Intelligence: importance from the path that training took.
//!
//! It watches an optimizer from outside, and knows nothing of it. The penalty that comes of it is a [`Quadratic`].

use super::past::gradient;
use super::quadratic::Quadratic;
use crate::{Error, Params, Result, check};
use tch::{Kind, Tensor};

/// Synaptic Intelligence (Zenke, Poole and Ganguli 2017): how much of the loss's fall was each weight's.
///
/// With g the gradient of the mini-batch's mean loss **without** any regularizer, and Δ what the optimizer really did:
///
/// ```text
/// in every step    ω ← ω - g ⊙ Δ
/// after a task     Ω ← max(0, Ω + ω / ((θ_end - θ_start)² + ξ));   ω ← 0
/// penalty          c Σ Ω (θ - θ_end)², added to the mean loss
/// ```
///
/// On a separable quadratic loss ½hθ², small steps and ξ → 0, Ω is h/2, so that c = 1 puts back the old loss. Published
/// settings: Split MNIST ξ = 1e-3, c = 1; permuted MNIST ξ = 0.1, c = 0.1, on inputs in \[0, 1\] and with Adam at 1e-3.
///
/// ```
/// # use tch::{Device, Kind, nn::VarStore};
/// use tch_blr::continual::{Past, SynapticIntelligence};
/// use tch_blr::{Params, Sgd};
/// # fn main() -> tch_blr::Result<()> {
/// # let vs = VarStore::new(Device::Cpu);
/// # let w = vs.root().zeros("w", &[2]);
/// # let task_loss = || (&w - 1.0).square().sum(Kind::Float);
/// let params = Params::from(&vs);
/// let mut opt = Sgd::default().build(&vs, 0.1)?;
/// let mut si = SynapticIntelligence::new(&params, 0.1)?;
/// let past = Past::new();
/// for _ in 0..10 {
///     si.before(&params, &task_loss())?;
///     opt.step(|| past.beside(task_loss(), 1.0, &params, |x| x.shallow_clone()))?;
///     si.after(&params)?;
/// }
/// si.end_task(&params)?;
/// let past = Past::new().with(si.penalty(1.0, 1.0)?); // c, and the N of beside(..)
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SynapticIntelligence {
    xi: f64,
    weights: Vec<Path>,
    /// Whether `before` was called last.
    stepping: bool,
}

/// The path of one parameter.
#[derive(Debug)]
struct Path {
    name: String,
    /// θ where the task began.
    start: Tensor,
    /// ω
    omega: Tensor,
    /// Ω
    importance: Tensor,
    /// θ and g before the step.
    before: Option<(Tensor, Tensor)>,
}

impl SynapticIntelligence {
    /// For these parameters, with ξ > 0, from where they are now.
    ///
    /// # Errors
    /// A ξ that is not finite and positive, no parameter.
    pub fn new(params: impl Into<Params>, xi: f64) -> Result<Self> {
        let params = Params::separate(params)?;
        check::positive("xi", xi)?;
        params.check()?;
        let path = |l: &crate::params::Leaf| {
            let start = l.tensor.detach().to_kind(l.state_kind()).copy();
            let [omega, importance] = [start.zeros_like(), start.zeros_like()];
            Path { name: l.name().to_owned(), omega, importance, start, before: None }
        };
        let weights = params.leaves().iter().filter(|l| l.trainable()).map(path).collect();
        Ok(SynapticIntelligence { xi, weights, stepping: false })
    }

    /// Before a step: keeps θ, and the gradient of the mean loss of its mini-batch (by a separate backward pass, which
    /// uses up the loss's graph).
    ///
    /// # Errors
    /// A loss that is not 0-dim, other trained parameters than at the start, a gradient that is not finite.
    pub fn before(&mut self, params: impl Into<Params>, loss: &Tensor) -> Result<()> {
        let params = &Params::separate(params)?;
        self.check(params)?;
        let gradients = gradient(loss, params)?;
        // All are looked at before the first is kept.
        for (w, g) in self.weights.iter().zip(&gradients) {
            if let Some(value) = crate::kernel::first_non_finite(g) {
                return Err(Error::parameter(&w.name, format!("its gradient is not finite ({value})")));
            }
        }
        for (w, g) in self.weights.iter_mut().zip(gradients) {
            let kind = w.start.kind();
            w.before = Some((now(params, &w.name, kind), g.to_kind(kind)));
        }
        self.stepping = true;
        Ok(())
    }

    /// After the step: ω ← ω - g(θ - θ_before).
    ///
    /// # Errors
    /// Without [`before`](Self::before), and for other trained parameters than at the start.
    pub fn after(&mut self, params: impl Into<Params>) -> Result<()> {
        let params = &Params::separate(params)?;
        self.check(params)?;
        if !self.stepping {
            let problem = "after() without before(): call before() with the loss of each step";
            return Err(Error::Parameters(problem.to_owned()));
        }
        for w in &mut self.weights {
            let (theta, g) = w.before.take().expect("before() has set it");
            // What the optimizer really did, with its momentum, clipping and decay.
            w.omega -= g * (now(params, &w.name, w.omega.kind()) - theta);
        }
        self.stepping = false;
        Ok(())
    }

    /// After a task: Ω takes in ω, and the next task begins here.
    ///
    /// # Errors
    /// Other trained parameters than at the start.
    pub fn end_task(&mut self, params: impl Into<Params>) -> Result<()> {
        let params = &Params::separate(params)?;
        self.check(params)?;
        for w in &mut self.weights {
            let end = now(params, &w.name, w.start.kind());
            let share = &w.omega / ((&end - &w.start).square() + self.xi);
            // After the sum: noise can make a task's part negative, which a precision must not be.
            w.importance = (&w.importance + share).clamp_min(0.0);
            w.omega = end.zeros_like();
            w.start = end;
        }
        Ok(())
    }

    /// Ω of a parameter.
    pub fn importance(&self, name: &str) -> Option<&Tensor> {
        self.weights.iter().find(|w| w.name == name).map(|w| &w.importance)
    }

    /// c Σ Ω (θ - θ_end)² as a [`Quadratic`] around the end of the last task, S = 2c·N·Ω: a sum over the N examples
    /// that the mean loss beside it stands for.
    ///
    /// # Errors
    /// c < 0, N ≤ 0, or not finite.
    pub fn penalty(&self, c: f64, examples: f64) -> Result<Quadratic> {
        check::non_negative("c", c)?;
        check::positive("examples", examples)?;
        Quadratic::new(
            self.weights.iter().map(|w| (w.name.clone(), w.start.copy(), &w.importance * (2.0 * c * examples))),
        )
    }

    fn check(&self, params: &Params) -> Result<()> {
        let trained: Vec<_> = params.leaves().iter().filter(|l| l.trainable()).collect();
        let (now, then) = (trained.len(), self.weights.len());
        if now != then {
            let problem = format!("{now} are trained and {then} were at the start");
            return Err(Error::Parameters(format!("{problem}; begin a SynapticIntelligence with all of them")));
        }
        for (l, w) in trained.iter().zip(&self.weights) {
            let (now, then, name) = (l.tensor.size(), w.start.size(), &w.name);
            if l.name() != name || now != then {
                let problem = format!("it is {now:?} where `{name}` {then:?} was at the start");
                return Err(Error::parameter(l.name(), format!("{problem}: these are parameters of another model")));
            }
        }
        Ok(())
    }
}

/// A copy of the present weights.
fn now(params: &Params, name: &str, kind: Kind) -> Tensor {
    let leaf = params.find(name).expect("checked");
    leaf.tensor.detach().to_kind(kind).copy()
}

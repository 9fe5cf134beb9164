//! Logistic regression with one logit on given features, to its exact optimum.

use crate::Outcome;
use tch::nn::{LinearConfig, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::continual::{Memory, Past, Quadratic, Replay, SoftLabels};
use tch_blr::fisher::Fisher;
use tch_blr::nn::{self, Likelihood};
use tch_blr::{DiagonalGaussian, FullGaussian, Params, Prior};

/// Features `[N, d]` and labels `[N]` 0 or 1, in f64.
#[derive(Debug)]
pub struct Examples {
    /// Features.
    pub x: Tensor,
    /// Labels.
    pub y: Tensor,
}

impl Examples {
    /// N
    pub fn len(&self) -> usize {
        self.y.numel()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Those at the positions, in their order.
    pub fn select(&self, positions: &[i64]) -> Examples {
        let at = Tensor::from_slice(positions);
        Examples { x: self.x.index_select(0, &at), y: self.y.index_select(0, &at) }
    }

    /// Those at the positions, and the others.
    pub fn split(&self, positions: &[i64]) -> (Examples, Examples) {
        let others: Vec<i64> = (0..self.len() as i64).filter(|i| !positions.contains(i)).collect();
        (self.select(positions), self.select(&others))
    }

    /// All of them, one after the other.
    pub fn join(all: &[&Examples]) -> Examples {
        let cat = |of: fn(&Examples) -> &Tensor| Tensor::cat(&all.iter().map(|e| of(e)).collect::<Vec<_>>(), 0);
        Examples { x: cat(|e| &e.x), y: cat(|e| &e.y) }
    }

    /// The same as a memory that a prior in function space takes.
    pub fn memory(&self) -> Memory {
        Memory::new(&self.x, Likelihood::Bernoulli).targets(&self.y)
    }
}

/// f = xᵀw
#[derive(Debug)]
pub struct Logistic {
    vs: VarStore,
    layer: nn::Linear,
}

impl Logistic {
    /// With d weights, all zero.
    pub fn new(d: i64) -> Logistic {
        let mut vs = VarStore::new(Device::Cpu);
        vs.set_kind(Kind::Double);
        let config = LinearConfig { ws_init: tch::nn::Init::Const(0.0), bias: false, ..Default::default() };
        let layer = nn::linear(vs.root(), d, 1, config);
        Logistic { vs, layer }
    }

    /// w, as an optimizer or a prior takes it.
    pub fn params(&self) -> Params {
        Params::from(&self.vs)
    }

    /// Logits `[N]` at features `[N, d]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.layer.forward(x).squeeze_dim(1)
    }

    /// A copy of w `[d]`.
    pub fn weights(&self) -> Tensor {
        self.layer.ws.detach().copy().reshape([-1])
    }

    /// Replaces w by these `d` numbers.
    pub fn set(&self, w: &Tensor) {
        tch::no_grad(|| self.layer.ws.shallow_clone().copy_(&w.reshape([1, -1])));
    }

    /// Share of right predictions.
    pub fn accuracy(&self, on: &Examples) -> f64 {
        let right = tch::no_grad(|| self.forward(&on.x)).gt(0.0).to_kind(Kind::Double).eq_tensor(&on.y);
        right.to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
    }

    /// The Fisher information of these inputs at the present weights, with the prior N(w, S⁻¹) or N(w, 1/δ).
    pub fn laplace(&self, x: &Tensor, prior: impl Into<Prior>) -> Outcome<DiagonalGaussian> {
        let fisher = Fisher::exact().likelihood(Likelihood::Bernoulli);
        Ok(fisher.diagonal(self.params(), [x], |x| self.forward(x))?.laplace(prior)?)
    }

    /// The whole matrix, after a prior.
    pub fn full_laplace(&self, x: &Tensor, prior: &FullGaussian) -> Outcome<FullGaussian> {
        let fisher = Fisher::exact().likelihood(Likelihood::Bernoulli);
        Ok(fisher.full(self.params(), [x], |x| self.forward(x))?.laplace_after(prior)?)
    }

    /// N(w, 1/δ) around the present weights.
    pub fn isotropic(&self, delta: f64) -> Outcome<FullGaussian> {
        let d = self.layer.ws.numel() as i64;
        let precision = Tensor::eye(d, (Kind::Double, Device::Cpu)) * delta;
        let names: Vec<String> = self.params().names().map(str::to_owned).collect();
        Ok(FullGaussian::new([(names[0].as_str(), self.layer.ws.detach().copy())], &precision)?)
    }

    /// Moves w to the minimum, by Newton's method with steps that are halved until they descend; its value. The
    /// gradients are the crate's; the Hessian XᵀΛX + S of each part is written down here, for 257 passes of autograd
    /// take long.
    pub fn fit(&self, objective: &Objective) -> Outcome<f64> {
        let params = self.params();
        let value = || objective.past.value(&params, |x| self.forward(x));
        for _ in 0..200 {
            let loss = value()?;
            let gradient = Tensor::run_backward(&[&loss], &[&self.layer.ws], false, false)[0].reshape([-1]);
            let (start, w) = (loss.double_value(&[]), self.weights());
            let hessian = tch::no_grad(|| self.hessian(objective));
            let factor = hessian.linalg_cholesky(false);
            let step = gradient.unsqueeze(1).cholesky_solve(&factor, false).squeeze_dim(1);
            let size = step.norm().double_value(&[]) / (1.0 + w.norm().double_value(&[]));
            let mut rate = 1.0;
            self.set(&(&w - &step));
            // A difference within rounding does not count as an ascent.
            while tch::no_grad(value)?.double_value(&[]) > start + 1e-12 * start.abs() && rate * size > 1e-13 {
                rate *= 0.5;
                self.set(&(&w - &step * rate));
            }
            if size < 1e-11 {
                return Ok(tch::no_grad(value)?.double_value(&[]));
            }
        }
        Err("Newton's method did not converge".into())
    }

    fn hessian(&self, objective: &Objective) -> Tensor {
        let part = |(x, weight): &(Tensor, f64)| {
            let p = self.forward(x).sigmoid();
            let lambda = (&p - p.square()) * *weight;
            x.tr().matmul(&(x * lambda.unsqueeze(1)))
        };
        objective
            .inputs
            .iter()
            .map(part)
            .chain(objective.precisions.iter().map(Tensor::shallow_clone))
            .reduce(|a, b| a + b)
            .expect("an objective has parts")
    }
}

/// A sum of quadratics and of losses with hard or soft labels.
#[derive(Debug, Default)]
pub struct Objective {
    past: Past,
    /// Of the losses, with their weights.
    inputs: Vec<(Tensor, f64)>,
    precisions: Vec<Tensor>,
}

impl Objective {
    /// Zero; the other methods add to it.
    pub fn new() -> Objective {
        Objective::default()
    }

    fn quadratic(mut self, q: Quadratic, precision: Tensor) -> Objective {
        self.past = self.past.with(q);
        self.precisions.push(precision);
        self
    }

    /// ½δ‖w‖²
    pub fn decay(self, model: &Logistic, delta: f64) -> Outcome<Objective> {
        let q = Quadratic::towards_zero(model.params(), delta)?;
        Ok(self.quadratic(q, model.isotropic(delta)?.precision_matrix().copy()))
    }

    /// The quadratic of a posterior.
    pub fn after(self, q: &FullGaussian) -> Objective {
        self.quadratic(Quadratic::from(q), q.precision_matrix().copy())
    }

    /// The quadratic of a diagonal posterior.
    pub fn after_diagonal(self, q: &DiagonalGaussian) -> Objective {
        self.quadratic(Quadratic::from(q), q.full().expect("it fits in memory").precision_matrix().copy())
    }

    /// Σ ℓᵢ
    pub fn loss(self, on: &Examples) -> Outcome<Objective> {
        self.weighted_loss(on, 1.0)
    }

    /// weight · Σ ℓᵢ
    pub fn weighted_loss(mut self, on: &Examples, weight: f64) -> Outcome<Objective> {
        self.past = self.past.with(Replay::new(on.memory().weights(&on.y.full_like(weight)))?);
        self.inputs.push((on.x.shallow_clone(), weight));
        Ok(self)
    }

    /// weight · Σ CE(pᵢ(now), pᵢ)
    pub fn soft(mut self, on: &Examples, weight: f64, model: &Logistic) -> Outcome<Objective> {
        let memory = on.memory().weights(&on.y.full_like(weight));
        self.past = self.past.with(SoftLabels::of(memory, |x| model.forward(x))?);
        self.inputs.push((on.x.shallow_clone(), weight));
        Ok(self)
    }

    /// At the model's present weights.
    pub fn value(&self, model: &Logistic) -> Outcome<f64> {
        Ok(tch::no_grad(|| self.past.value(model.params(), |x| model.forward(x)))?.double_value(&[]))
    }
}

//! Dropout is the Bayesian learning rule with a mixture posterior.
//!
//! The weights θⱼ that leave hidden unit j have the posterior
//!
//! ```text
//! q(θⱼ) = π N(mⱼ, 1/s) + (1-π) N(0, 1/s)
//! ```
//!
//! and the rule moves the mean of the first component by
//!
//! ```text
//! mⱼ ← mⱼ - (ρ/s) E_q[ dⱼ ∇ℓ(θ) ],   dⱼ = N(θⱼ | mⱼ, 1/s)/q(θⱼ)
//! ```
//!
//! Delta method: θⱼ is at the mean of the component it was drawn from, zⱼmⱼ with zⱼ = 1 with probability π. Stochastic
//! approximation: one draw. Responsibility approximation: for well separated components dⱼ = zⱼ/π. What is left is
//! stochastic gradient descent on m through the mask z with learning rate α = ρ/(sπ).
//!
//! Khan and Rue, *The Bayesian Learning Rule* (2023), section 4.3.

use support::{all_close, close, params, values, weight};
use tch::{Kind, Tensor};
use tch_blr::{DiagonalGaussian, Mixture, Sgd};

/// Two inputs, three hidden tanh units, one output; three examples.
struct Layer {
    hidden: Tensor,
    y: Tensor,
}

impl Layer {
    fn new() -> Layer {
        let x = Tensor::from_slice(&[0.5, -1.0, 1.5, 0.25, -0.75, 2.0]).reshape([3, 2]);
        let first = Tensor::from_slice(&[0.3, -0.8, 0.5, 1.1, 0.4, -0.6]).reshape([2, 3]);
        Layer { hidden: x.matmul(&first).tanh(), y: Tensor::from_slice(&[1.0, -0.5, 0.25]) }
    }

    /// Mean loss at the weights that leave the hidden units.
    fn loss(&self, theta: &Tensor) -> Tensor {
        (self.hidden.matmul(theta) - &self.y).square().mean(Kind::Double)
    }

    fn gradient(&self, theta: &[f64]) -> Vec<f64> {
        let theta = weight(theta);
        values(&Tensor::run_backward(&[self.loss(&theta)], &[&theta], false, false)[0])
    }
}

const M: [f64; 3] = [0.75, -1.25, 0.5];

/// All masks of three units, with their probabilities.
fn masks(pi: f64) -> impl Iterator<Item = ([f64; 3], f64)> {
    (0..8).map(move |bits| {
        let z: [f64; 3] = std::array::from_fn(|j| f64::from(bits >> j & 1));
        (z, z.iter().map(|z| if *z == 1.0 { pi } else { 1.0 - pi }).product())
    })
}

/// dⱼ at θⱼ, from the densities of the posterior itself.
fn responsibility(m: f64, s: f64, pi: f64, theta: f64) -> f64 {
    let component =
        |m: f64| DiagonalGaussian::new([("w", Tensor::from_slice(&[m]), Tensor::from_slice(&[s]))]).unwrap();
    let at = weight(&[theta]);
    let q = Mixture::new([(pi, component(m)), (1.0 - pi, component(0.0))]).unwrap();
    (component(m).log_prob(params(&at)).unwrap() - q.log_prob(params(&at)).unwrap()).exp()
}

/// The responsibilities of components that are 50 standard deviations apart are zⱼ/π, and not only approximately.
#[test]
fn responsibilities_are_the_mask() {
    for pi in [0.5, 0.8] {
        for m in M {
            let s = (50.0f64 / m).powi(2);
            close(responsibility(m, s, pi, m), 1.0 / pi, 1e-14);
            assert!(responsibility(m, s, pi, 0.0) < 1e-300);
        }
    }
}

/// For every mask: a step of [`Sgd`] through the mask, and the rule's step with the responsibilities of the posterior. With
/// π = ½ every factor is a power of two, and the two agree in every bit.
#[test]
fn a_dropout_step_is_a_step_of_the_rule() {
    let (pi, s, rho) = (0.5, 16384.0, 2048.0);
    let layer = Layer::new();
    for (z, _) in masks(pi) {
        let m = weight(&M);
        let mask = Tensor::from_slice(&z);
        let mut opt = Sgd::default().build(params(&m), rho / s / pi).unwrap();
        opt.step(|| layer.loss(&(&m * &mask))).unwrap();

        let theta: Vec<f64> = z.iter().zip(M).map(|(z, m)| z * m).collect();
        let gradient = layer.gradient(&theta);
        let rule: Vec<f64> = (0..3)
            .map(|j| {
                close(responsibility(M[j], s, pi, theta[j]), z[j] / pi, 1e-14);
                M[j] - rho / s * (z[j] / pi) * gradient[j]
            })
            .collect();
        assert_eq!(values(&m), rule, "mask {z:?}");
    }
}

/// libtorch's dropout divides what it keeps by π: the first component's mean is then m/π, and the step in terms of it is that
/// of the rule with ρ/s = α/π.
#[test]
fn the_dropout_of_libtorch_is_the_same_step() {
    let (pi, alpha) = (0.5, 0.125);
    let layer = Layer::new();
    let mut kept = [false; 2];
    for seed in 0..8 {
        let m = weight(&M);
        let mut opt = Sgd::default().build(params(&m), alpha).unwrap();
        tch::manual_seed(seed);
        opt.step(|| layer.loss(&m.dropout(1.0 - pi, true))).unwrap();
        tch::manual_seed(seed);
        let z: Vec<f64> = values(&(weight(&[1.0; 3]).dropout(1.0 - pi, true) * pi));
        for z in &z {
            kept[usize::from(*z == 1.0)] = true;
        }

        let component = M.map(|m| m / pi);
        let theta: Vec<f64> = z.iter().zip(component).map(|(z, m)| z * m).collect();
        let gradient = layer.gradient(&theta);
        let rule: Vec<f64> = (0..3).map(|j| component[j] - alpha / pi * (z[j] / pi) * gradient[j]).collect();
        assert_eq!(values(&(&m / pi)), rule, "mask {z:?}");
    }
    assert_eq!(kept, [true, true]);
}

/// In expectation over all eight masks a dropout step goes along the gradient of E_q\[ℓ\] by the delta method, with E_q\[ℓ\] a sum
/// over the masks; for a linear layer with squared error that is known in closed form: ridge regression on its scaled
/// inputs, (y - π h·m)² + π(1-π) Σ hⱼ²mⱼ².
#[test]
fn the_expected_step_descends_the_expected_loss() {
    let (pi, alpha) = (0.8, 0.1);
    let layer = Layer::new();
    let mut step = [0.0; 3];
    for (z, p) in masks(pi) {
        let m = weight(&M);
        let mut opt = Sgd::default().build(params(&m), alpha).unwrap();
        opt.step(|| layer.loss(&(&m * Tensor::from_slice(&z)))).unwrap();
        values(&m).iter().zip(M).enumerate().for_each(|(j, (new, old))| step[j] += p * (new - old));
    }
    let derivative = |loss: &dyn Fn(&Tensor) -> Tensor| {
        let m = weight(&M);
        values(&(&Tensor::run_backward(&[loss(&m)], &[&m], false, false)[0] * -alpha))
    };
    let expected = |m: &Tensor| {
        masks(pi).map(|(z, p)| layer.loss(&(m * Tensor::from_slice(&z))) * p).reduce(|a, b| a + b).unwrap()
    };
    all_close(&step, &derivative(&expected), 1e-15);
    let ridge = |m: &Tensor| {
        let penalty = (layer.hidden.square().matmul(&m.square()) * (pi * (1.0 - pi))).mean(Kind::Double);
        layer.loss(&(m * pi)) + penalty
    };
    all_close(&step, &derivative(&ridge), 1e-15);
}

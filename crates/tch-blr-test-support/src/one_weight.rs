//! Models of one parameter `w`, for answers that can be written down.

use crate::compare::values;
use crate::quadrature::Quadrature;
use tch::Tensor;
use tch_blr::rule::{Row, Rule, Site, Start, When};
use tch_blr::{Optimizer, Params};

/// A trainable f64 vector.
pub fn weight(values: &[f64]) -> Tensor {
    Tensor::from_slice(values).set_requires_grad(true)
}

/// It as the model's only parameter, `w`.
pub fn params(w: &Tensor) -> Params {
    Params::named([("w", w.shallow_clone())]).unwrap()
}

/// One state tensor of `w`.
pub fn state<R: Row>(opt: &Optimizer<R>, name: &str) -> Vec<f64> {
    values(&opt.state("w", name).unwrap())
}

/// The same standard normals, `noise[sample][weight]`, in each of `steps` steps.
pub fn given(steps: usize, noise: &[&[f64]]) -> tch_blr::Given {
    let step = || noise.iter().map(|z| vec![Tensor::from_slice(z)]).collect();
    tch_blr::Given((0..steps).map(|_| step()).collect())
}

/// Solves h' = h + r(f-h) + ½ r²(f-h)²/S for f, on the branch r(f-h) > -S where the retraction is invertible.
pub fn retracted(h: f64, new: f64, s: f64, r: f64) -> f64 {
    h + s * ((1.0 + 2.0 * (new - h) / s).sqrt() - 1.0) / r
}

/// Mean and precision of a one-weight problem with loss gradient `gradient`, under a rule that is given exact
/// expectations, after `steps` steps from 0.
pub fn with_exact_expectations<R: Rule>(rule: R, lr: f64, steps: u64, gradient: impl Fn(f64) -> f64) -> (f64, f64) {
    let quadrature = Quadrature::new(60);
    let delta = rule.isotropic_delta();
    let (mut mean, mut state) = (0.0, rule.initial(Start { posterior_prior: false, rms: 0.0 }));
    for t in 1..=steps {
        let k = rule.coefficients(When { t, lr });
        let sigma = 1.0 / rule.precision(k, delta, state).sqrt();
        let site = Site {
            mean,
            gradient: quadrature.expect(|z| gradient(mean + sigma * z)),
            curvature: quadrature.expect(|z| sigma * z * gradient(mean + sigma * z)),
            prior_mean: 0.0,
            delta,
        };
        (mean, state) = rule.update(k, site, state);
    }
    (mean, rule.precision(rule.coefficients(When { t: steps, lr }), delta, state))
}

/// Antithetic evaluations at ±√n along each of the n axes of z, in each of these steps: 2n points of equal weight, which
/// integrate polynomials of second degree exactly, and that is all that a quadratic loss asks for.
pub fn exact_expectations(steps: usize, shape: &[i64]) -> (tch_blr::Expectation, tch_blr::Given) {
    let n: i64 = shape.iter().product();
    let axes = Tensor::eye(n, crate::F64) * (n as f64).sqrt();
    let step = || axes.unbind(0).into_iter().map(|z| vec![z.reshape(shape)]).collect();
    (tch_blr::Expectation::Antithetic { pairs: n as usize }, tch_blr::Given((0..steps).map(|_| step()).collect()))
}

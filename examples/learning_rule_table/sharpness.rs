//! Sharpness-aware minimization: a maximum near the mean in the place of the expectation.

use super::deep_learning::{DIAGONAL, train};
use super::table::{Answer, Outcome, Row};
use support::{given, state};
use tch::{Kind, Tensor};
use tch_blr::{BayesianSam, Params, Sam, SamRmsProp};

pub const ROWS: &[Row] = &[
    Row::new(
        ["SAM", "Gaussian (fixed cov.)", "relaxation of E_q[ℓ], stochastic", "θ², 1 step; quadratic, 12 steps: m"],
        sam,
    ),
    Row::new(
        ["SAM with RMSprop", DIAGONAL, "relaxation of E_q[ℓ], g² for the Hessian, √", "quadratic, 12 steps: m"],
        sam_rmsprop,
    ),
    Row::new(
        ["Bayesian SAM as of ICLR 2023", DIAGONAL, "relaxation of E_q[ℓ], √s |g| for the Hessian", "θ², 8 steps: m, s"],
        || bsam(BayesianSam::iclr2023(), true),
    ),
    Row::new(
        [
            "Bayesian SAM as released",
            DIAGONAL,
            "relaxation of E_q[ℓ], √s |g| for the Hessian",
            "θ², 1 step, 8 steps: m, s",
        ],
        bsam_released,
    ),
];

/// ½ Σ aᵢθᵢ²
const CURVATURE: [f64; 2] = [2.0, 0.5];
const START: [f64; 2] = [1.0, -2.0];
const STEPS: usize = 12;

fn quadratic(w: &Tensor, _: usize) -> Tensor {
    (w.square() * Tensor::from_slice(&CURVATURE) * 0.5).sum(Kind::Double)
}

fn parabola(w: &Tensor, _: usize) -> Tensor {
    w.square().sum(Kind::Double)
}

/// The gradient of [`quadratic`] where SAM with this radius looks: m + ρg/‖g‖.
fn beside(m: [f64; 2], rho: f64) -> [f64; 2] {
    let g = [CURVATURE[0] * m[0], CURVATURE[1] * m[1]];
    let norm = g[0].hypot(g[1]);
    [0, 1].map(|i| CURVATURE[i] * (m[i] + rho * g[i] / norm))
}

/// The reference's step, and the recurrence with the heavy ball b ← μb + ĝ + δm.
fn sam() -> Outcome<Answer> {
    let (rho, mu, delta, lr) = (0.3, 0.8, 0.1, 0.05);
    let (first, _) = train(&[0.5], 1, |w| Sam::default().weight_decay(0.01).build(w, 0.1), parabola)?;
    let rule = Sam::default().rho(rho).momentum(mu).weight_decay(delta);
    let (path, _) = train(&START, STEPS, |w| rule.build(w, lr), quadratic)?;
    let (mut m, mut b, mut exact) = (START, [0.0; 2], vec![0.3895]);
    for _ in 0..STEPS {
        let g = beside(m, rho);
        b = [0, 1].map(|i| mu * b[i] + g[i] + delta * m[i]);
        m = [0, 1].map(|i| m[i] - lr * b[i]);
        exact.extend(m);
    }
    Ok(Answer { exact, ours: [first[1].clone(), path[1..].concat()].concat(), tolerance: 1e-13 })
}

/// v ← av + (1-a)u², m ← m - αu/(√v + η) with u = ĝ + δm
fn sam_rmsprop() -> Outcome<Answer> {
    let (rho, a, eta, delta, lr) = (0.3, 0.9, 0.1, 0.1, 0.05);
    let rule = SamRmsProp::default().rho(rho).alpha(a).eps(eta).weight_decay(delta);
    let (path, _) = train(&START, STEPS, |w| rule.build(w, lr), quadratic)?;
    let (mut m, mut v, mut exact) = (START, [0.0; 2], Vec::new());
    for _ in 0..STEPS {
        let g = beside(m, rho);
        let u = [0, 1].map(|i| g[i] + delta * m[i]);
        v = [0, 1].map(|i| a * v[i] + (1.0 - a) * u[i] * u[i]);
        m = [0, 1].map(|i| m[i] - lr * u[i] / (f64::sqrt(v[i]) + eta));
        exact.extend(m);
    }
    Ok(Answer { exact, ours: path[1..].concat(), tolerance: 1e-13 })
}

/// ess, ρ, δ, γ, α, β₁, β₂, m and z of the reference, which starts at s = 1.
const ESS: f64 = 10.0;
const RHO: f64 = 0.1;
const DELTA: f64 = 0.01;
const GAMMA: f64 = 0.1;
const Z: f64 = 0.3;

/// The recurrence on θ², whose gradient is 2θ, in terms of s.
fn bsam(rule: BayesianSam, new: bool) -> Outcome<Answer> {
    let (mut m, mut s, mut b, mut exact) = (0.5, 1.0, 0.0, Vec::new());
    for _ in 0..8 {
        let first = 2.0 * (m + Z / f64::sqrt(ESS * s));
        b = 0.9 * b + 0.1 * (2.0 * (m + RHO * first / s) + DELTA * m);
        let next = 0.999 * s + 0.001 * (s.sqrt() * first.abs() + DELTA + GAMMA);
        m -= 0.5 * b / if new { next } else { s };
        s = next;
        exact.push(m);
    }
    exact.push(s);
    Ok(Answer { exact, ours: bsam_path(rule, 8)?, tolerance: 1e-13 })
}

/// All means, and s at the end.
fn bsam_path(rule: BayesianSam, steps: usize) -> Outcome<Vec<f64>> {
    let rule = rule.ess(ESS).rho(RHO).weight_decay(DELTA).damping(GAMMA).hess_init(1.0 - DELTA - GAMMA);
    let build = |w: Params| rule.noise(given(steps, &[&[Z]])).build(w, 0.5);
    let (path, opt) = train(&[0.5], steps, build, parabola)?;
    Ok([path[1..].concat(), vec![state(&opt, "hess")[0] + DELTA + GAMMA]].concat())
}

/// The reference's step first.
fn bsam_released() -> Outcome<Answer> {
    let rest = bsam(BayesianSam::released(), false)?;
    let first = bsam_path(BayesianSam::released(), 1)?;
    let exact = [vec![0.437_852_633_403_898_96, 1.000_299_736_659_61], rest.exact].concat();
    Ok(Answer { exact, ours: [first, rest.ours].concat(), ..rest })
}

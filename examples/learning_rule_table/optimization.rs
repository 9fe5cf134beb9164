//! Optimization: the rule for Gaussians whose expectations are taken at the mean.

use super::deep_learning::train;
use super::posteriors::{RIDGE, learned, ridge, sums};
use super::table::{Answer, Outcome, Row};
use support::values;
use tch::{Kind, Tensor};
use tch_blr::family::{Gaussian, laplace, rule_step};
use tch_blr::{DiagonalNewton, Expectation, MixtureOfGaussians, Newton, Sgd, Statistic};

pub const ROWS: &[Row] = &[
    Row::new(["Gradient descent", "Gaussian (fixed cov.)", "delta method", "quadratic, 25 steps: m"], gradient_descent),
    Row::new(["Newton's method: quadratic", "Gaussian", "delta method, ρ = 1", "1 step: m, S"], newton_quadratic),
    Row::new(
        ["Newton's method: e^θ - 3θ", "Gaussian", "delta method, ρ = 1", "the end: m = ln 3, S = 3"],
        newton_exponential,
    ),
    Row::new(
        ["Online Newton: logistic", "Gaussian", "delta method, ρ = ½", "5 steps, and the end: m, S"],
        online_newton,
    ),
    Row::new(["Newton's method: ridge regression", "Gaussian", "delta method, ρ = 1", "1 step: m, S"], newton_ridge),
    Row::new(
        [
            "Newton's method, diagonal",
            "Gaussian (diagonal cov.)",
            "delta method, ρ = 1",
            "separable, 1 step; logistic: m, S",
        ],
        || diagonal_newton(Statistic::HessianDiagonal),
    ),
    Row::new(
        [
            "Newton's method, Hutchinson",
            "Gaussian (diagonal cov.)",
            "delta method, stochastic, ρ = 1",
            "separable, 1 step; logistic: m, S",
        ],
        || diagonal_newton(Statistic::Hutchinson { probes: 1 }),
    ),
    Row::new(
        ["Multimodal optimization", "Mixture of Gaussians", "delta method", "50(θ²-1)² from ±½, 400 steps: m, s, π"],
        multimodal,
    ),
];

/// m - c shrinks by 1 - αa a step in each direction.
fn gradient_descent() -> Outcome<Answer> {
    let (start, curvature, centre, alpha, steps) = ([1.0, -2.0], [2.0, 0.5], [0.3, 4.0], 0.1, 25);
    let (a, c) = (Tensor::from_slice(&curvature), Tensor::from_slice(&centre));
    let loss = |w: &Tensor, _: usize| (&a * (w - &c).square() * 0.5).sum(Kind::Double);
    let (path, _) = train(&start, steps, |w| Sgd::default().build(w, alpha), loss)?;
    let left = |i: usize| (start[i] - centre[i]) * (1.0 - alpha * curvature[i]).powi(steps as i32);
    let exact = (0..2).map(|i| centre[i] + left(i)).collect();
    Ok(Answer { exact, ours: path[steps].clone(), tolerance: 1e-13 })
}

/// ½θᵀAθ - bᵀθ with A = (2 0.9; 0.9 1), b = (1, -3): A⁻¹b by Cramer's rule.
fn newton_quadratic() -> Outcome<Answer> {
    let a = Tensor::from_slice(&[2.0, 0.9, 0.9, 1.0]).reshape([2, 2]);
    let start = Gaussian::new(&Tensor::from_slice(&[7.0, -4.0]), &(&a * 0.3))?;
    let gradient = a.mv(start.mean()) - Tensor::from_slice(&[1.0, -3.0]);
    let q = rule_step(&start, 1.0, &start.gradient_mu(&gradient, &a)?)?;
    let exact = vec![3.7 / 1.19, -6.9 / 1.19, 2.0, 0.9, 0.9, 1.0];
    Ok(Answer { exact, ours: [values(q.mean()), values(q.precision())].concat(), tolerance: 1e-13 })
}

fn newton_exponential() -> Outcome<Answer> {
    let q = laplace(&Tensor::from_slice(&[0.0]), 1.0, 50, |x| (x.exp() - x * 3.0).sum(Kind::Double))?;
    let ours = vec![q.mean().double_value(&[0]), q.precision().double_value(&[0, 0])];
    Ok(Answer { exact: vec![3f64.ln(), 3.0], ours, tolerance: 1e-12 })
}

/// One observation x = 1, y = 1 of a logistic model with prior N(0, 1): S ← ½S + ½ℓ″(m), m ← m - ½ℓ′(m)/S written out;
/// the end is the reference's.
fn online_newton() -> Outcome<Answer> {
    let derivatives = |m: f64| {
        let p = 1.0 / (1.0 + (-m).exp());
        (m + p - 1.0, 1.0 + p * (1.0 - p))
    };
    let one = |x: f64| Tensor::from_slice(&[x]);
    let mut q = Gaussian::new(&one(-1.0), &one(4.0).reshape([1, 1]))?;
    let (mut m, mut s) = (-1.0, 4.0);
    for _ in 0..5 {
        let (gradient, hessian) = derivatives(q.mean().double_value(&[0]));
        q = rule_step(&q, 0.5, &q.gradient_mu(&one(gradient), &one(hessian).reshape([1, 1]))?)?;
        let (gradient, hessian) = derivatives(m);
        s = 0.5 * s + 0.5 * hessian;
        m -= 0.5 * gradient / s;
    }
    let end = laplace(&one(0.0), 0.5, 100, |x| (x.square() * 0.5 - x.log_sigmoid()).sum(Kind::Double))?;
    let exact = vec![m, s, 0.401_058_137_541_546_96, 1.240_210_507_853_252_6];
    let ours = [q, end].iter().flat_map(|q| [values(q.mean()), values(q.precision())].concat()).collect();
    Ok(Answer { exact, ours, tolerance: 1e-12 })
}

fn newton_ridge() -> Outcome<Answer> {
    let rule = Newton::default().ess(3.0).weight_decay(1.0 / 3.0);
    let (_, opt) = train(&[5.0, -3.0], 1, |w| rule.build(w, 1.0), ridge)?;
    let q = opt.posterior()?;
    let ours = [values(&q.mean_vector()), values(q.precision_matrix())].concat();
    Ok(Answer { exact: RIDGE.into(), ours, tolerance: 1e-13 })
}

/// ½Σcᵢ(θᵢ-¼)², whose Hessian is diagonal, so that one vector of signs finds it; and Laplace's answer to one logistic
/// observation (reference).
fn diagonal_newton(hessian: Statistic) -> Outcome<Answer> {
    let rule = DiagonalNewton::default().hessian(hessian);
    let c = Tensor::from_slice(&[1.0, 4.0, 0.5]);
    let separable = |w: &Tensor, _: usize| ((w - 0.25).square() * &c * 0.5).sum(Kind::Double);
    let (path, opt) = train(&[1.0, 2.0, -3.0], 1, |w| rule.ess(2.0).build(w, 1.0), separable)?;
    let mut ours = [&path[1][..], &values(&opt.posterior()?.precision("w").expect("its name"))].concat();
    let logistic = |w: &Tensor, _: usize| (-w).softplus().sum(Kind::Double);
    let rule = rule.ess(1.0).weight_decay(1.0);
    let (path, opt) = train(&[0.0], 10, |w| rule.build(w, 1.0), logistic)?;
    ours.extend([&path[10][..], &values(&opt.posterior()?.precision("w").expect("its name"))].concat());
    let exact = vec![0.25, 0.25, 0.25, 2.0, 8.0, 1.0, 0.401_058_137_541_546_96, 1.240_210_507_853_252_6];
    Ok(Answer { exact, ours, tolerance: 1e-13 })
}

/// A component in each minimum, ±1, with the curvature there, 8·50: they are forty standard deviations apart and do not
/// feel each other.
fn multimodal() -> Outcome<Answer> {
    let start = Tensor::from_slice(&[-0.5, 0.5]).reshape([2, 1]);
    let mut q = MixtureOfGaussians::new(&start, 100.0)?.expectation(Expectation::Delta);
    for _ in 0..400 {
        q.step(|t| sums(&((t.square() - 1.0).square() * 50.0)))?;
    }
    Ok(Answer { exact: vec![-1.0, 1.0, 400.0, 400.0, 0.5, 0.5], ours: learned(&q), tolerance: 1e-10 })
}

//! Deep learning with posteriors other than a diagonal Gaussian.

use super::deep_learning::{train, train_from};
use super::table::{Answer, Outcome, Row};
use support::{Quadrature, params, values, weight};
use tch::nn::{LinearConfig, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::rule::{Rule, Site, When};
use tch_blr::{
    BayesBiNN, Evon, Expectation, FullVon, Given, Ivon, Labels, MixtureOfGaussians, MultiIvon, NoisyKfac, Params, Sgd,
    Soap, Statistic, Ste, nn,
};

const BERNOULLI: &str = "Bernoulli";
const MIXTURE: &str = "Mixture of Gaussians";

pub const ROWS: &[Row] = &[
    Row::new(
        ["VON, full covariance", "Gaussian", "stochastic (Price's theorem), ρ = 1", "ridge regression, 1 step: m, S"],
        || full_von(Statistic::Price),
    ),
    Row::new(
        ["VON, full covariance, exact ∇²ℓ", "Gaussian", "stochastic, ρ = 1", "ridge regression, 1 step: m, S"],
        || full_von(Statistic::Hessian),
    ),
    Row::new(
        [
            "EVON",
            "Gaussian (diagonal in an eigenbasis)",
            "stochastic (Price's theorem), S kept positive",
            "2 outputs: m, S",
        ],
        evon,
    ),
    Row::new(
        [
            "SOAP",
            "Gaussian (diagonal in an eigenbasis)",
            "delta method, squared gradient, square root",
            "a vector: Adam",
        ],
        soap,
    ),
    Row::new(
        [
            "Noisy K-FAC",
            "Gaussian (matrix normal)",
            "Fisher information A ⊗ G, ρ = 1",
            "ridge regression, 1 step: m, S",
        ],
        noisy_kfac,
    ),
    Row::new(
        ["Straight-through estimator", BERNOULLI, "delta method, stochastic", "40 steps: sign λ"],
        straight_through,
    ),
    Row::new(["BayesBiNN", BERNOULLI, "stochastic, relaxed to tanh((λ+d)/τ)", "1 step: λ"], bayesbinn),
    Row::new(["BayesBiNN: Ising model", BERNOULLI, "none: E_q by hand", "2 spins: λ"], || Ok(ising())),
    Row::new(
        ["Mixture: one component", MIXTURE, "none: E_q by quadrature", "logistic and Poisson: m, s"],
        one_component,
    ),
    Row::new(["Mixture: its own target", MIXTURE, "stochastic", "3 steps: m, s, π stay"], own_target),
    Row::new(["Multi-IVON", MIXTURE, "stochastic, independent runs", "two wells: π, mean, variance"], multi_ivon),
    Row::new(["Dropout", MIXTURE, "delta method, stochastic, responsibilities z/π", "4 masks: m"], dropout),
];

/// Pairs at ±√n along each of n axes: points of equal weight that integrate polynomials of second degree.
fn axes(steps: usize, shape: &[i64]) -> (Expectation, Given) {
    let n: i64 = shape.iter().product();
    let axis = |i: i64| {
        let z: Vec<f64> = (0..n).map(|j| if i == j { (n as f64).sqrt() } else { 0.0 }).collect();
        vec![Tensor::from_slice(&z).reshape(shape)]
    };
    let step = || (0..n).map(axis).collect();
    (Expectation::Antithetic { pairs: n as usize }, Given((0..steps).map(|_| step()).collect()))
}

/// Three points, unit noise and prior: S = I + XᵀX and Sm = Xᵀy = (5, 6), by hand. For the optimizer ess = 3 and δ =
/// 1/3.
pub const RIDGE: [f64; 6] = [0.8, 0.6, 4.0, 3.0, 3.0, 6.0];

pub fn ridge(w: &Tensor, _: usize) -> Tensor {
    let x = Tensor::from_slice(&[1.0, 0.0, 1.0, 1.0, 1.0, 2.0]).reshape([3, 2]);
    (x.mv(w) - Tensor::from_slice(&[1.0, 2.0, 2.0])).square().mean(Kind::Double) * 0.5
}

fn full_von(hessian: Statistic) -> Outcome<Answer> {
    let (expectation, noise) = axes(1, &[2]);
    let rule = FullVon::default().ess(3.0).weight_decay(1.0 / 3.0).improved(false).beta2(0.0);
    let rule = rule.hessian(hessian).expectation(expectation).noise(noise);
    let (_, opt) = train(&[5.0, -3.0], 1, |w| rule.build(w, 1.0), ridge)?;
    let q = opt.posterior()?;
    let ours = [values(&q.mean_vector()), values(q.precision_matrix())].concat();
    Ok(Answer { exact: RIDGE.into(), ours, tolerance: 1e-12 })
}

/// Y = XW without an error, so W is the mean; with unit noise and a flat prior S = I ⊗ XᵀX, here XᵀX = (3 3; 3 5).
fn evon() -> Outcome<Answer> {
    let (steps, solution) = (400, [1.0, -0.5, 0.25, 2.0]);
    let x = Tensor::from_slice(&[1.0, 0.0, 1.0, 1.0, 1.0, 2.0]).reshape([3, 2]);
    let y = x.matmul(&Tensor::from_slice(&solution).reshape([2, 2]).tr());
    let (expectation, noise) = axes(steps, &[2, 2]);
    let rule = Evon::default().ess(3.0).weight_decay(0.0).beta1(0.0).beta2(0.5).beta_basis(0.5).frequency(1);
    let rule = rule.expectation(expectation).noise(noise);
    let start = Tensor::from_slice(&[0.0; 4]).reshape([2, 2]).set_requires_grad(true);
    let loss = |w: &Tensor, _: usize| (x.matmul(&w.tr()) - &y).square().sum(Kind::Double) / 6.0;
    let (path, opt) = train_from(&start, steps, |w| rule.build(w, 0.5), loss)?;
    let precision = [3.0, 3.0, 0.0, 0.0, 3.0, 5.0, 0.0, 0.0, 0.0, 0.0, 3.0, 3.0, 0.0, 0.0, 3.0, 5.0];
    let ours = [&path[steps][..], &values(opt.posterior()?.full()?.precision_matrix())].concat();
    Ok(Answer { exact: [&solution[..], &precision].concat(), ours, tolerance: 1e-10 })
}

/// A vector is not rotated; so SOAP is Adam from the second step on, here with β = (0.9, 0.99) on ½Σ h(w-1)².
fn soap() -> Outcome<Answer> {
    let (h, start, alpha, eps) = ([1.0, 3.0, 0.1], [0.0, 2.0, -4.0], 0.05, 1e-8);
    let rule = Soap::default().beta1(0.9).beta2(0.99).eps(eps).decoupled_decay(0.0);
    let loss = |w: &Tensor, _: usize| ((w - 1.0).square() * Tensor::from_slice(&h)).sum(Kind::Double) * 0.5;
    let (path, _) = train(&start, 31, |w| rule.build(w, alpha), loss)?;
    let exact = [0, 1, 2].map(|i| {
        let (mut w, mut b, mut v) = (start[i], 0.0, 0.0);
        for t in 1..=30 {
            let g = h[i] * (w - 1.0);
            b = 0.9 * b + 0.1 * g;
            v = 0.99 * v + 0.01 * g * g;
            let debias = |beta: f64| 1.0 - beta.powi(t);
            w -= alpha * b / debias(0.9) / ((v / debias(0.99)).sqrt() + eps);
        }
        w
    });
    Ok(Answer { exact: exact.into(), ours: path[31].clone(), tolerance: 1e-12 })
}

/// One output, so that A ⊗ G is XᵀX/σ²; the prior is added to the product.
fn noisy_kfac() -> Outcome<Answer> {
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(Kind::Double);
    let config = LinearConfig { bias: false, ..Default::default() };
    let layer = nn::linear(vs.root(), 2, 1, config);
    let x = Tensor::from_slice(&[1.0, 0.0, 1.0, 1.0, 1.0, 2.0]).reshape([3, 2]);
    let y = Tensor::from_slice(&[1.0, 2.0, 2.0]).reshape([3, 1]);
    let rule = NoisyKfac::default().ess(3.0).weight_decay(1.0 / 3.0).split_damping(false).beta1(0.0);
    let rule = rule.labels(Labels::Exact).expectation(Expectation::Antithetic { pairs: 1 });
    let mut opt = rule.build(&vs, 1.0)?;
    opt.step(|| nn::squared_error(&layer.forward(&x), &y, 1.0))?;
    let q = opt.posterior()?;
    let ours = [values(&q.mean("weight").expect("its name")), values(q.full()?.precision_matrix())].concat();
    Ok(Answer { exact: RIDGE.into(), ours, tolerance: 1e-12 })
}

/// ∇½(w-t)² at w = sign λ: λ ← clip(λ - α(sign λ - t), ±1), and so sign λ is t on average; t = ¼ has a period of eight
/// steps with five up.
fn straight_through() -> Outcome<Answer> {
    let (start, target, alpha) = ([0.3, -0.9, 0.7], [0.25, 0.25, 2.0], 0.125);
    let loss = |w: &Tensor, _: usize| ((w - Tensor::from_slice(&target)).square() * 0.5).sum(Kind::Double);
    let (path, _) = train(&start, 40, |w| Ste::default().build(w, alpha), loss)?;
    let mut lambda = start;
    let exact = (0..40).flat_map(|_| {
        lambda = [0, 1, 2].map(|i| (lambda[i] - alpha * (lambda[i].signum() - target[i])).clamp(-1.0, 1.0));
        lambda.map(f64::signum)
    });
    let (mut exact, mut ours) = (exact.collect::<Vec<_>>(), path[1..].concat());
    exact.push(0.25);
    ours.push(path[33..].iter().map(|w| w[0]).sum::<f64>() / 8.0);
    Ok(Answer { exact, ours, tolerance: 0.0 })
}

/// λ = 0.2, u = 0.6, τ = 1, N = 10, α = 0.1, ∇L = -0.5: the reference's number.
fn bayesbinn() -> Outcome<Answer> {
    // Φ⁻¹(0.6)
    let z = 0.253_347_103_135_799_8;
    let noise = Given(vec![vec![vec![Tensor::from_slice(&[z])]]]);
    let build = |w: Params| BayesBiNN::default().ess(10.0).noise(noise).build(w, 0.1);
    let (path, opt) = train(&[0.2f64.tanh()], 1, build, |w, _| (w * -0.5).sum(Kind::Double))?;
    let lambda = 0.624_235_321_178_198_1f64;
    let found = opt.posterior()?.natural("w").map(values).expect("its name")[0];
    Ok(Answer { exact: vec![lambda, lambda.tanh()], ours: vec![found, path[1][0]], tolerance: 1e-13 })
}

/// E[L] = -½μ₁μ₂ - 0.2μ₁ + 0.1μ₂ with the gradient of μ handed to the update as that of a sample w = μ, whose scale is
/// 1: the reference's numbers.
fn ising() -> Answer {
    let rule = BayesBiNN::default().ess(1.0).beta1(0.0);
    let mut lambda = [0.0; 2];
    for t in 1..=400 {
        let mu = lambda.map(f64::tanh);
        let g = [-0.5 * mu[1] - 0.2, -0.5 * mu[0] + 0.1];
        let k = rule.coefficients(When { t, lr: 0.3 });
        lambda = [0, 1].map(|i| {
            let curvature = (1.0 - mu[i] * mu[i]) * g[i];
            rule.update(k, Site { mean: lambda[i], gradient: g[i], curvature, prior_mean: 0.0, delta: 1.0 }, [0.0]).0
        });
    }
    Answer { exact: vec![0.199_136_276_804_601_5, -0.001_727_448_109_074_27], ours: lambda.into(), tolerance: 1e-12 }
}

/// Sum over the weights of each point `[n, d]`.
pub fn sums(t: &Tensor) -> Tensor {
    t.sum_dim_intlist(1, false, None::<Kind>)
}

pub fn learned(q: &MixtureOfGaussians) -> Vec<f64> {
    [q.means(), q.precisions(), q.weights()].iter().flat_map(values).collect()
}

/// The best Gaussian for one observation and the prior N(0, 1) (reference): logistic with x = y = 1; rate e^θ and y =
/// 3.
fn one_component() -> Outcome<Answer> {
    let (z, share) = Quadrature::new(40).nodes();
    let solve = |loss: &dyn Fn(&Tensor) -> Tensor| -> Outcome<Vec<f64>> {
        let mut q = MixtureOfGaussians::new(&Tensor::from_slice(&[0.0]).reshape([1, 1]), 1.0)?.lr(0.3);
        for _ in 0..150 {
            q.step_at(loss, &z, &share)?;
        }
        Ok(learned(&q))
    };
    let logistic = solve(&|t| sums(&(t.square() * 0.5 + (-t).softplus())))?;
    let poisson = solve(&|t| sums(&(t.square() * 0.5 + t.exp() - t * 3.0)))?;
    let best = [[0.413_126_805_979_680_6, 1.206_464_295_700_586_4], [0.687_422_729_064_258_6, 3.312_577_270_935_744]];
    let exact = best.into_iter().flat_map(|[m, s]| [m, s, 1.0]).collect();
    Ok(Answer { exact, ours: [logistic, poisson].concat(), tolerance: 1e-10 })
}

/// Two Gaussians of precision 2 in the plane, with weights ½: where q is the target, b is constant, and no sample moves
/// anything.
fn own_target() -> Outcome<Answer> {
    let (means, precision) = ([-0.5, 0.3, 0.8, 0.1], 2.0);
    let component = |theta: &Tensor, m: &[f64]| sums(&((theta - Tensor::from_slice(m)).square() * (-0.5 * precision)));
    let target = |theta: &Tensor| {
        -Tensor::stack(&[component(theta, &means[..2]), component(theta, &means[2..])], 1).logsumexp(1, false)
    };
    let mut q = MixtureOfGaussians::new(&Tensor::from_slice(&means).reshape([2, 2]), precision)?.seed(4);
    for _ in 0..3 {
        q.step(target)?;
    }
    let exact = [&means[..], &[precision; 4], &[0.5; 2]].concat();
    Ok(Answer { exact, ours: learned(&q), tolerance: 1e-11 })
}

/// ½a(|w|-c)², a parabola on both sides: with δ the wells are at ±ac/(a+δ). The curvature is known, h₀ = a, and held
/// there, so that both members have the variance 1/(λ(a+δ)), which the distance between the wells is added to.
fn multi_ivon() -> Outcome<Answer> {
    let (a, c, delta, ess) = (2.0, 1.0, 0.5, 100.0);
    let copies = [-0.5, 0.6].map(|start| weight(&[start]));
    let rule = Ivon::default().ess(ess).weight_decay(delta).hess_init(a).beta1(0.0).beta2(1.0 - 1e-15);
    let rule = rule.expectation(Expectation::Antithetic { pairs: 1 });
    let mut runs = MultiIvon::build(rule, copies.iter().map(params), 0.2, 7)?;
    for _ in 0..100 {
        runs.step(|i| ((copies[i].abs() - c).square() * (0.5 * a)).sum(Kind::Double))?;
    }
    let q = runs.posterior()?;
    let well = a * c / (a + delta);
    let exact = vec![0.5, 0.5, -well, well, 0.0, well * well + 1.0 / (ess * (a + delta))];
    let ends = q.components().iter().filter_map(|member| member.mean("w")).map(|m| values(&m)[0]);
    let moments = [q.mean("w"), q.variance("w")].map(|t| values(&t.expect("its name"))[0]);
    let ours = q.mixing().iter().copied().chain(ends).chain(moments).collect();
    Ok(Answer { exact, ours, tolerance: 1e-12 })
}

/// π N(m, 1/s) + (1-π) N(0, 1/s) per weight: the rule's step m ← m - (ρ/s)(z/π) ∇ℓ(zm) for least squares with inputs h,
/// and SGD through the mask z with α = ρ/(sπ).
fn dropout() -> Outcome<Answer> {
    let (pi, s, rho, h, y, start) = (0.8, 50.0, 4.0, [1.0, -2.0, 0.5], 1.5, [0.75, -1.25, 0.5]);
    let masks = [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]];
    let loss = |w: &Tensor, step: usize| {
        ((w * Tensor::from_slice(&masks[step]) * Tensor::from_slice(&h)).sum(Kind::Double) - y).square() * 0.5
    };
    let (path, _) = train(&start, masks.len(), |w| Sgd::default().build(w, rho / (s * pi)), loss)?;
    let mut m: [f64; 3] = start;
    let exact = masks.iter().flat_map(|z| {
        let residual = (0..3).map(|j| h[j] * z[j] * m[j]).sum::<f64>() - y;
        m = [0, 1, 2].map(|j| m[j] - rho / s * (z[j] / pi) * residual * h[j]);
        m
    });
    Ok(Answer { exact: exact.collect(), ours: path[1..].concat(), tolerance: 1e-14 })
}

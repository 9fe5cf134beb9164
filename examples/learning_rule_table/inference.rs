//! Approximate Bayesian inference: the rule for exponential families.

use super::table::{Answer, Outcome, Row};
use support::values;
use tch::{Device, Kind, Tensor};
use tch_blr::family::{
    BayesianMixture, Bernoulli, Beta, Categorical, ConjugatePrior, Cvi, Dirichlet, ExponentialFamily, Gamma, Gaussian,
    GaussianLikelihood, Kalman, Likelihood, LogisticLikelihood, MeanFieldGaussian, Mixture, NormalGamma,
    PoissonLikelihood, conjugate_posterior, converge, laplace, rule_step, vmp_step,
};

const ONE_STEP: &str = "none, ρ = 1";
const MEAN_FIELD: &str = "Exp-family (mean-field)";
const ALL_NODES: &str = "none, ρ = 1 for all nodes";
const SITES: &str = "none, a site per datum";

pub const ROWS: &[Row] = &[
    Row::new(["Conjugate Bayes: ridge regression", "Gaussian", ONE_STEP, "3 data, 2 weights: m, S"], ridge),
    Row::new(["Conjugate Bayes: Beta-Bernoulli", "Beta", ONE_STEP, "4 flips: a, b"], beta_bernoulli),
    Row::new(["Conjugate Bayes: Gamma-Poisson", "Gamma", ONE_STEP, "3 counts: a, b"], gamma_poisson),
    Row::new(
        ["Conjugate Bayes: Dirichlet-categorical", "Dirichlet", ONE_STEP, "3 classes seen: α"],
        dirichlet_categorical,
    ),
    Row::new(["Conjugate Bayes: Normal-gamma", "Normal-gamma", ONE_STEP, "3 data: m, κ, a, b"], normal_gamma),
    Row::new(["Kalman filter", "Gaussian", "none, ρ = 1, a prior that moves", "local level, 3 steps: m, v"], kalman),
    Row::new(["Laplace's method", "Gaussian", "delta method", "logistic and Poisson: m, S"], laplaces_method),
    Row::new(
        [
            "Expectation-maximization: coins",
            "Exp-family + Gaussian",
            "delta method for θ",
            "5 rounds: step 1 and the end",
        ],
        em_coins,
    ),
    Row::new(
        [
            "Expectation-maximization: Gaussians",
            "Exp-family + Gaussian",
            "delta method for θ",
            "6 data, 1 step: π, m, v",
        ],
        em_gaussians,
    ),
    Row::new(
        ["Stochastic VI: no local variables", "Normal-gamma", "stochastic, ρ = 1/t", "40 data, 1 pass: m, κ, a, b"],
        one_pass,
    ),
    Row::new(
        ["Stochastic VI: mixture", MEAN_FIELD, "stochastic, local ρ = 1", "3 far clusters, 1 pass: α, m, κ, a, b"],
        svi,
    ),
    Row::new(["VMP: mean and precision", MEAN_FIELD, ALL_NODES, "4 data: E[τ], m, S"], vmp),
    Row::new(["VMP: Ising model", MEAN_FIELD, ALL_NODES, "2 spins: λ"], ising),
    Row::new(["VMP: correlated Gaussian", MEAN_FIELD, "none, ρ = ½", "2 dimensions: m, s"], correlated),
    Row::new(["Non-conjugate VMP: Poisson", MEAN_FIELD, ALL_NODES, "the end: m, s"], non_conjugate),
    Row::new(["Conjugate-computation VI: logistic", "Gaussian", SITES, "the end: m, S"], cvi_logistic),
    Row::new(["Conjugate-computation VI: Poisson", "Gaussian", SITES, "the end: m, S"], cvi_poisson),
    Row::new(["CVI: Gaussian process", "Gaussian", SITES, "4 data, 1 step: m, v"], cvi_process),
    Row::new(["CVI: removal of a datum", "Gaussian", SITES, "refit to the other 3: m, v"], cvi_removal),
];

fn t(x: &[f64]) -> Tensor {
    Tensor::from_slice(x)
}

fn matrix(rows: i64, x: &[f64]) -> Tensor {
    t(x).reshape([rows, -1])
}

fn moments(q: &Gaussian) -> Vec<f64> {
    [values(q.mean()), values(q.precision())].concat()
}

// Conjugate Bayes

/// S = I + XᵀX and Sm = Xᵀy = (5, 6), by hand.
fn ridge() -> Outcome<Answer> {
    let (x, y) = (matrix(3, &[1.0, 0.0, 1.0, 1.0, 1.0, 2.0]), t(&[1.0, 2.0, 2.0]));
    let prior = Gaussian::new(&t(&[0.0, 0.0]), &matrix(2, &[1.0, 0.0, 0.0, 1.0]))?;
    let q = conjugate_posterior(&prior, &Gaussian::linear_likelihood(&x, &y, 1.0)?)?;
    Ok(Answer { exact: vec![0.8, 0.6, 4.0, 3.0, 3.0, 6.0], ours: moments(&q), tolerance: 1e-13 })
}

/// a + heads, b + tails
fn beta_bernoulli() -> Outcome<Answer> {
    let prior = Beta::new(2.0, 3.0)?;
    let q = conjugate_posterior(&prior, &prior.likelihood(&t(&[1.0, 0.0, 1.0, 1.0]))?)?;
    Ok(Answer { exact: vec![5.0, 4.0], ours: vec![q.a(), q.b()], tolerance: 1e-14 })
}

/// a + Σx, b + n
fn gamma_poisson() -> Outcome<Answer> {
    let prior = Gamma::new(1.5, 0.5)?;
    let q = conjugate_posterior(&prior, &prior.likelihood(&t(&[3.0, 0.0, 4.0]))?)?;
    Ok(Answer { exact: vec![8.5, 3.5], ours: vec![q.shape(), q.rate()], tolerance: 1e-14 })
}

/// α + counts
fn dirichlet_categorical() -> Outcome<Answer> {
    let prior = Dirichlet::new(&t(&[1.0, 1.0, 0.5]))?;
    let q = conjugate_posterior(&prior, &prior.likelihood(&t(&[0.0, 2.0, 2.0]))?)?;
    Ok(Answer { exact: vec![2.0, 1.0, 2.5], ours: values(q.concentration()), tolerance: 1e-14 })
}

fn parts(q: &NormalGamma) -> [f64; 4] {
    [q.mean(), q.kappa(), q.precision().shape(), q.precision().rate()]
}

/// κ+n, (κm + Σy)/(κ+n), a + n/2, b + ½Σ(y-ȳ)² + ½κn(ȳ-m)²/(κ+n)
fn normal_gamma_posterior([m, kappa, a, b]: [f64; 4], y: &[f64]) -> [f64; 4] {
    let n = y.len() as f64;
    let mean = y.iter().sum::<f64>() / n;
    let squares: f64 = y.iter().map(|y| (y - mean).powi(2)).sum();
    let apart = kappa * n * (mean - m).powi(2) / (kappa + n);
    [(kappa * m + n * mean) / (kappa + n), kappa + n, a + 0.5 * n, b + 0.5 * squares + 0.5 * apart]
}

fn normal_gamma() -> Outcome<Answer> {
    let (y, prior) = ([1.0, 4.0, 2.5], NormalGamma::new(0.5, 2.0, 3.0, 1.0)?);
    let q = conjugate_posterior(&prior, &prior.likelihood(&t(&y))?)?;
    let exact = normal_gamma_posterior([0.5, 2.0, 3.0, 1.0], &y).into();
    Ok(Answer { exact, ours: parts(&q).into(), tolerance: 1e-13 })
}

/// Gains written out: v⁻ = v + Q, k = v⁻/(v⁻ + R), m ← m + k(y - m), v ← (1-k)v⁻.
fn kalman() -> Outcome<Answer> {
    let [one, half] = [1.0, 0.5].map(|x| matrix(1, &[x]));
    let (level, start, ys) = (Kalman::new(&one, &half, &one, &one)?, Gaussian::new(&t(&[0.0]), &one)?, [1.0, 2.0, 0.0]);
    let tracked = level.filter(&start, &ys.map(|y| t(&[y])))?;
    let (mut m, mut v) = (0.0, 1.0);
    let exact = ys.iter().flat_map(|y| {
        let gain = (v + 0.5) / (v + 1.5);
        (m, v) = (m + gain * (y - m), (1.0 - gain) * (v + 0.5));
        [m, v]
    });
    let ours = tracked.iter().flat_map(|q| [values(q.mean())[0], values(&q.covariance())[0]]).collect();
    Ok(Answer { exact: exact.collect(), ours, tolerance: 1e-13 })
}

// Delta methods

/// Reference: a prior N(0, 1), one logistic observation x = 1, y = 1, and a count of 3 with rate e^θ.
fn laplaces_method() -> Outcome<Answer> {
    let total = |x: &Tensor| x.sum(Kind::Double);
    let logistic = laplace(&t(&[0.0]), 1.0, 50, |x| total(&(x.square() * 0.5 - x.log_sigmoid())))?;
    let poisson = laplace(&t(&[0.0]), 1.0, 50, |x| total(&(x.square() * 0.5 + x.exp() - x * 3.0)))?;
    let exact =
        [0.401_058_137_541_546_96, 1.240_210_507_853_252_6, 0.792_059_968_430_676_9, 3.207_940_031_569_323].into();
    Ok(Answer { exact, ours: [moments(&logistic), moments(&poisson)].concat(), tolerance: 1e-12 })
}

/// Do and Batzoglou (2008). Step 1 from binomial likelihoods written out; the end is the reference's.
fn em_coins() -> Outcome<Answer> {
    let (heads, start) = ([5.0, 9.0, 8.0, 4.0, 7.0], [0.6, 0.5]);
    let even = || Categorical::new(&t(&[1.0, 1.0]));
    let mut q = Mixture::new(even()?, start.map(Bernoulli::new).into_iter().collect::<Result<_, _>>()?)?;
    let biases = |q: &Mixture<Bernoulli>| [0, 1].map(|k| q.components()[k].p());
    let mut ours = Vec::new();
    for step in 1..=60 {
        q = q.em_step(&t(&heads).unsqueeze(1), &t(&[10.0; 5]))?.with_weights(even()?)?;
        if step == 1 || step == 60 {
            ours.extend(biases(&q));
        }
    }
    let likelihood = |h: f64, k: usize| start[k].powf(h) * (1.0 - start[k]).powf(10.0 - h);
    let r = |h: f64, k: usize| likelihood(h, k) / (likelihood(h, 0) + likelihood(h, 1));
    let first = |k| heads.map(|h| r(h, k) * h).iter().sum::<f64>() / heads.map(|h| r(h, k) * 10.0).iter().sum::<f64>();
    let exact = vec![first(0), first(1), 0.796_789_066_922_647_1, 0.519_583_120_145_135_9];
    Ok(Answer { exact, ours, tolerance: 1e-12 })
}

/// Responsibilities and weighted moments written out.
fn em_gaussians() -> Outcome<Answer> {
    let (y, weights, means) = ([-2.0, -1.5, 0.1, 1.8, 2.2, 3.0], [0.3, 0.7], [-1.0, 1.0]);
    let components = means.map(|m| Gaussian::new(&t(&[m]), &matrix(1, &[0.5])));
    let start = Mixture::new(Categorical::new(&t(&weights))?, components.into_iter().collect::<Result<_, _>>()?)?;
    let statistics = start.components()[0].statistics(&t(&y).unsqueeze(1))?;
    let q = start.em_step(&statistics, &t(&[1.0; 6]))?;
    let density = |k: usize, y: f64| weights[k] * (-0.25 * (y - means[k]).powi(2)).exp();
    let (mut exact, mut ours) = (Vec::new(), Vec::new());
    for k in 0..2 {
        let r = y.map(|y| density(k, y) / (density(0, y) + density(1, y)));
        let average = |f: &dyn Fn(f64) -> f64| (0..6).map(|i| r[i] * f(y[i])).sum::<f64>() / r.iter().sum::<f64>();
        let mean = average(&|y| y);
        exact.extend([r.iter().sum::<f64>() / 6.0, mean, average(&|y| (y - mean).powi(2))]);
        let found = &q.components()[k];
        ours.extend([values(&q.weights().probabilities())[k], values(found.mean())[0], values(&found.covariance())[0]]);
    }
    Ok(Answer { exact, ours, tolerance: 1e-12 })
}

// Stochastic variational inference

/// λ ← (1-ρ)λ + ρ(λ₀ + n t(xₜ)) with ρ = 1/t averages: after each datum once it is at the posterior.
fn one_pass() -> Outcome<Answer> {
    let (prior, y) =
        (NormalGamma::new(0.5, 2.0, 3.0, 1.0)?, std::array::from_fn::<f64, 40, _>(|i| (i as f64).sin() * 3.0));
    let rows = prior.likelihood(&t(&y))?;
    let mut q = NormalGamma::new(3.0, 7.0, 2.0, 2.0)?;
    for i in 0..40 {
        q = rule_step(&q, 1.0 / (i + 1) as f64, &-(prior.natural() + rows.get(i) * 40.0))?;
    }
    let exact = normal_gamma_posterior([0.5, 2.0, 3.0, 1.0], &y).into();
    Ok(Answer { exact, ours: parts(&q).into(), tolerance: 1e-11 })
}

/// Clusters so far apart that q(z) is certain; a batch has one datum of each, and ρ = 1/t. Then the end is Bayes' rule
/// within each cluster.
fn svi() -> Outcome<Answer> {
    let clusters = [[-100.0, -99.2, -101.0, -100.3], [0.0, 0.7, -0.4, 1.1], [99.0, 100.4, 100.1, 101.6]];
    let mixture = |means: [f64; 3]| {
        let components = means.map(|m| NormalGamma::new(m, 0.1, 1.0, 1.0));
        BayesianMixture::new(Dirichlet::new(&t(&[1.0; 3]))?, components.into_iter().collect::<Result<_, _>>()?)
    };
    let (prior, mut q) = (mixture([0.0; 3])?, mixture([-90.0, 0.0, 90.0])?);
    for batch in 0..4 {
        let rows = prior.components()[0].likelihood(&t(&clusters.map(|c| c[batch])))?;
        q = q.step(&prior, &rows, 4.0, 1.0 / (batch + 1) as f64)?;
    }
    let posteriors = clusters.map(|y| normal_gamma_posterior([0.0, 0.1, 1.0, 1.0], &y));
    let exact = [&[5.0; 3], posteriors.as_flattened()].concat();
    let ours = [values(q.weights().concentration()), q.components().iter().flat_map(parts).collect()].concat();
    Ok(Answer { exact, ours, tolerance: 1e-11 })
}

// Variational message passing

/// x = 1, 2, 3, 4 with flat priors: E[τ] = (n-1)/Σ(x-x̄)² = 3/5, m = 2.5, S = 4 E[τ].
fn vmp() -> Outcome<Answer> {
    let squares = |m: &Tensor| m.get(1) * 4.0 - m.get(0) * 20.0 + 30.0;
    let mut mean = MeanFieldGaussian::new(&t(&[-3.0]), &t(&[9.0]))?;
    let precision = converge(Gamma::new(5.0, 0.1)?, 1e-14, 100, |precision| {
        let tau = precision.expectation();
        mean = vmp_step(&mean, 1.0, |m| tau.get(1) * squares(m) * 0.5)?;
        let m = mean.expectation();
        vmp_step(precision, 1.0, |tau| tau.get(1) * squares(&m) * 0.5 - tau.get(0))
    })?;
    let ours = vec![precision.mean(), values(mean.mean())[0], values(mean.precision())[0]];
    Ok(Answer { exact: vec![0.6, 2.5, 2.4], ours, tolerance: 1e-12 })
}

/// Spins ±1 with E[ℓ] = -½m₁m₂ - 0.2m₁ + 0.1m₂ settle where λ = (½m₂ + 0.2, ½m₁ - 0.1) with m = tanh λ: iterated in
/// plain numbers. A Bernoulli's λ is twice a spin's.
fn ising() -> Outcome<Answer> {
    let spin = |mu: &Tensor| mu.get(0) * 2.0 - 1.0;
    let energy = |a: &Tensor, b: &Tensor| a * b * -0.5 - a * 0.2 + b * 0.1;
    let mut second = Bernoulli::new(0.9)?;
    let first = converge(Bernoulli::new(0.2)?, 1e-15, 200, |first| {
        let b = spin(&second.expectation());
        let first = vmp_step(first, 1.0, |mu| energy(&spin(mu), &b))?;
        let a = spin(&first.expectation());
        second = vmp_step(&second, 1.0, |mu| energy(&a, &spin(mu)))?;
        Ok(first)
    })?;
    let exact = (0..200).fold([0.0f64; 2], |[a, b], _| [0.5 * b.tanh() + 0.2, 0.5 * a.tanh() - 0.1]);
    let ours = vec![values(&first.natural())[0] / 2.0, values(&second.natural())[0] / 2.0];
    Ok(Answer { exact: exact.into(), ours, tolerance: 1e-13 })
}

/// exp(-½θᵀAθ + bᵀθ): the mean-field posterior has the mean A⁻¹b (by Cramer's rule) and the diagonal of A.
fn correlated() -> Outcome<Answer> {
    let (apart, diagonal, b) = (matrix(2, &[0.0, 0.9, 0.9, 0.0]), t(&[2.0, 1.0]), t(&[1.0, -3.0]));
    let loss = |mu: &Tensor| {
        let (m, second) = (mu.narrow(0, 0, 2), mu.narrow(0, 2, 2));
        (&m * apart.mv(&m) * 0.5 + &diagonal * second * 0.5 - &m * &b).sum(Kind::Double)
    };
    let start = MeanFieldGaussian::new(&t(&[0.0, 0.0]), &t(&[1.0, 1.0]))?;
    let q = converge(start, 1e-14, 1000, |q| vmp_step(q, 0.5, loss))?;
    let ours = [values(q.mean()), values(q.precision())].concat();
    Ok(Answer { exact: vec![3.7 / 1.19, -6.9 / 1.19, 2.0, 1.0], ours, tolerance: 1e-11 })
}

/// The best Gaussians for one observation and the prior N(0, 1) (reference): logistic with x = y = 1; rate e^θ and y =
/// 3.
const LOGISTIC: [f64; 2] = [0.413_126_805_979_680_6, 1.206_464_295_700_586_4];
const POISSON: [f64; 2] = [0.687_422_729_064_258_6, 3.312_577_270_935_744];

/// E[e^θ] = exp(m + ½v) is not linear in μ.
fn non_conjugate() -> Outcome<Answer> {
    let loss = |mu: &Tensor| {
        let (m, second) = (mu.get(0), mu.get(1));
        let variance = &second - m.square();
        (&m + variance * 0.5).exp() - m * 3.0 + second * 0.5
    };
    let q = converge(MeanFieldGaussian::new(&t(&[0.0]), &t(&[1.0]))?, 1e-14, 1000, |q| vmp_step(q, 1.0, loss))?;
    Ok(Answer { exact: POISSON.into(), ours: [values(q.mean()), values(q.precision())].concat(), tolerance: 1e-12 })
}

// Conjugate-computation variational inference

fn one_observation(likelihood: impl Likelihood, y: f64, exact: [f64; 2]) -> Outcome<Answer> {
    let prior = Gaussian::new(&t(&[0.0]), &matrix(1, &[1.0]))?;
    let mut q = Cvi::new(prior, &matrix(1, &[1.0]), &t(&[y]), likelihood)?;
    q.fit(1.0, 1e-14, 500)?;
    Ok(Answer { exact: exact.into(), ours: moments(q.posterior()), tolerance: 1e-12 })
}

fn cvi_logistic() -> Outcome<Answer> {
    one_observation(LogisticLikelihood, 1.0, LOGISTIC)
}

fn cvi_poisson() -> Outcome<Answer> {
    one_observation(PoissonLikelihood, 3.0, POISSON)
}

/// Four inputs, targets with noise of variance 0.1, and the kernel exp(-½(x-x′)²).
const INPUTS: [f64; 4] = [0.0, 0.7, 1.5, 2.2];
const TARGETS: [f64; 4] = [0.3, 1.0, 0.4, -0.8];

fn kernel(i: usize, j: usize) -> f64 {
    (-0.5 * (INPUTS[i] - INPUTS[j]).powi(2)).exp()
}

/// Posterior means and variances at all inputs given the targets at `seen`: kᵀ(K+σ²)⁻¹y and k - kᵀ(K+σ²)⁻¹k, by
/// elimination in plain numbers.
fn process(seen: &[usize]) -> Vec<f64> {
    let noisy = |i: usize, j: usize| kernel(i, j) + if i == j { 0.1 } else { 0.0 };
    let solve = |b: &dyn Fn(usize) -> f64| {
        let mut rows: Vec<Vec<f64>> =
            seen.iter().map(|&i| seen.iter().map(|&j| noisy(i, j)).chain([b(i)]).collect()).collect();
        let n = seen.len();
        for k in 0..n {
            let pivot = rows[k].clone();
            for (_, row) in rows.iter_mut().enumerate().filter(|(i, _)| *i != k) {
                let factor = row[k] / pivot[k];
                row.iter_mut().zip(&pivot).for_each(|(x, p)| *x -= factor * p);
            }
        }
        (0..n).map(|k| rows[k][n] / rows[k][k]).collect::<Vec<_>>()
    };
    let dot = |at: usize, x: &[f64]| seen.iter().zip(x).map(|(&i, x)| kernel(at, i) * x).sum::<f64>();
    let means = (0..4).map(|at| dot(at, &solve(&|i| TARGETS[i])));
    let variances = (0..4).map(|at| kernel(at, at) - dot(at, &solve(&|i| kernel(at, i))));
    means.chain(variances).collect()
}

/// After one step from the prior.
fn fitted() -> Outcome<Cvi<GaussianLikelihood>> {
    let covariance: [f64; 16] = std::array::from_fn(|i| kernel(i / 4, i % 4));
    let prior = Gaussian::from_covariance(&t(&[0.0; 4]), &matrix(4, &covariance))?;
    let each = Tensor::eye(4, (Kind::Double, Device::Cpu));
    let mut q = Cvi::new(prior, &each, &t(&TARGETS), GaussianLikelihood::new(0.1)?)?;
    q.step(1.0)?;
    Ok(q)
}

fn means_and_variances(q: &Gaussian) -> Vec<f64> {
    [values(q.mean()), values(&q.covariance().diag(0))].concat()
}

fn cvi_process() -> Outcome<Answer> {
    Ok(Answer { exact: process(&[0, 1, 2, 3]), ours: means_and_variances(fitted()?.posterior()), tolerance: 1e-11 })
}

fn cvi_removal() -> Outcome<Answer> {
    let mut q = fitted()?;
    q.remove(1)?;
    Ok(Answer { exact: process(&[0, 2, 3]), ours: means_and_variances(q.posterior()), tolerance: 1e-11 })
}

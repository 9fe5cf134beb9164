//! Conjugate Bayes is the rule with ρ = 1: regression, coins, counts, classes, and the Kalman filter.
//!
//! "Reference" numbers were computed in f64 independently of this crate.

use support::{all_close, values};
use tch::{Kind, Tensor};
use tch_blr::family::{
    Beta, ConjugatePrior, Dirichlet, ExponentialFamily, Gamma, Gaussian, Kalman, NormalGamma, conjugate_posterior,
    rule_step,
};

fn t(x: &[f64]) -> Tensor {
    Tensor::from_slice(x)
}

fn matrix(rows: i64, x: &[f64]) -> Tensor {
    t(x).reshape([rows, -1])
}

#[test]
fn ridge_regression_in_one_step() {
    let (x, y) = (matrix(3, &[1.0, 0.0, 1.0, 1.0, 1.0, 2.0]), t(&[1.0, 2.0, 2.0]));
    let prior = Gaussian::new(&t(&[0.0, 0.0]), &matrix(2, &[1.0, 0.0, 0.0, 1.0])).unwrap();
    let q = conjugate_posterior(&prior, &Gaussian::linear_likelihood(&x, &y, 1.0).unwrap()).unwrap();
    all_close(&values(q.precision()), &[4.0, 3.0, 3.0, 6.0], 1e-13);
    all_close(&values(q.mean()), &[0.8, 0.6], 1e-13);

    // The rule with E[∇ℓ] and E[∇²ℓ] instead, from a start that has nothing to do with it.
    let start = Gaussian::new(&t(&[9.0, -7.0]), &matrix(2, &[0.1, 0.0, 0.0, 50.0])).unwrap();
    let hessian = x.tr().matmul(&x) + prior.precision();
    let gradient = hessian.mv(start.mean()) - x.tr().mv(&y);
    let one = rule_step(&start, 1.0, &start.gradient_mu(&gradient, &hessian).unwrap()).unwrap();
    all_close(&values(&one.natural()), &values(&q.natural()), 1e-12);
    // Noise of variance 4 in units of 2 is noise of variance 1, and data one after the other are data together.
    let scaled = Gaussian::linear_likelihood(&(&x * 2.0), &(&y * 2.0), 4.0).unwrap();
    let mut one_by_one = prior;
    for i in 0..3 {
        one_by_one = conjugate_posterior(&one_by_one, &scaled.narrow(0, i, 1)).unwrap();
    }
    all_close(&values(&one_by_one.natural()), &values(&q.natural()), 1e-13);
}

#[test]
fn coins_counts_and_classes_in_one_step() {
    let coin = Beta::new(2.0, 3.0).unwrap();
    let coin = conjugate_posterior(&coin, &coin.likelihood(&t(&[1.0, 0.0, 1.0, 1.0])).unwrap()).unwrap();
    assert_eq!((coin.a(), coin.b()), (5.0, 4.0));

    let rate = Gamma::new(1.5, 0.5).unwrap();
    let rate = conjugate_posterior(&rate, &rate.likelihood(&t(&[3.0, 0.0, 4.0])).unwrap()).unwrap();
    assert_eq!((rate.shape(), rate.rate()), (8.5, 3.5));

    let classes = Dirichlet::new(&t(&[1.0, 1.0, 0.5])).unwrap();
    let classes = conjugate_posterior(&classes, &classes.likelihood(&t(&[0.0, 2.0, 2.0])).unwrap()).unwrap();
    assert_eq!(values(classes.concentration()), [2.0, 1.0, 2.5]);

    // κₙ = κ+n, m = (κm + Σy)/κₙ, a+n/2, b + ½Σ(y-ȳ)² + ½κn(ȳ-m)²/κₙ
    let normal = NormalGamma::new(0.5, 2.0, 3.0, 1.0).unwrap();
    let y = [1.0, 4.0, 2.5];
    let normal = conjugate_posterior(&normal, &normal.likelihood(&t(&y)).unwrap()).unwrap();
    let found = [normal.mean(), normal.kappa(), normal.precision().shape(), normal.precision().rate()];
    all_close(&found, &[8.5 / 5.0, 5.0, 4.5, 1.0 + 0.5 * 4.5 + 0.5 * 2.0 * 3.0 * 4.0 / 5.0], 1e-14);

    for (bad, support) in [
        (coin.likelihood(&t(&[0.5])), "Bernoulli: a value lies outside of the support {0, 1}"),
        (rate.likelihood(&t(&[1.5])), "Poisson: a value lies outside of the support {0, 1, …}"),
        (rate.likelihood(&t(&[-1.0])), "Poisson"),
        (classes.likelihood(&t(&[3.0])), "Categorical"),
        (normal.likelihood(&t(&[f64::NAN])), "Normal: y is not finite"),
    ] {
        let text = bad.unwrap_err().to_string();
        assert!(text.contains(support), "{text}");
    }
}

/// Each likelihood is what `likelihood` says: ln p(x|θ) - ⟨t(x), T(θ)⟩ does not depend on θ.
#[test]
fn conjugate_likelihoods_are_those_of_the_data() {
    fn check<F: ConjugatePrior>(prior: &F, x: &Tensor, log_p: impl Fn(&Tensor) -> Tensor) {
        let theta = prior.sample(6, 1);
        let inner = prior.statistics(&theta).unwrap().matmul(&prior.likelihood(x).unwrap().tr()); // [θ, x]
        let rest = log_p(&theta) - inner;
        assert!((&rest - rest.get(0)).abs().max().double_value(&[]) < 1e-12, "{}: {rest}", F::NAME);
    }
    let column = |theta: &Tensor| theta.unsqueeze(1);
    let x = t(&[0.0, 1.0]);
    check(&Beta::new(2.0, 3.0).unwrap(), &x, |p| &x * column(p).log() + (1.0 - &x) * (-column(p)).log1p());
    check(&Gamma::new(2.0, 3.0).unwrap(), &x, |rate| &x * column(rate).log() - column(rate));
    check(&Dirichlet::new(&t(&[1.0, 2.0])).unwrap(), &x, Tensor::log);
    check(&NormalGamma::new(0.5, 2.0, 3.0, 1.0).unwrap(), &x, |theta| {
        let (mean, precision) = (theta.narrow(1, 0, 1), theta.narrow(1, 1, 1));
        (precision.log() - &precision * (&x - mean).square()) * 0.5
    });
}

/// λ ← (1-ρ)λ + ρ(λ₀ + N t(xₜ)) with ρ = 1/t over each datum once is the posterior of all of them.
#[test]
fn one_pass_over_the_data_with_steps_of_one_over_t() {
    let prior = NormalGamma::new(0.0, 1.0, 1.0, 1.0).unwrap();
    let y = prior.sample(40, 5).select(1, 0);
    let rows = prior.likelihood(&y).unwrap();
    let mut q = NormalGamma::new(3.0, 7.0, 2.0, 2.0).unwrap();
    for i in 0..40 {
        let gradient = -(prior.natural() + rows.get(i) * 40.0);
        q = rule_step(&q, 1.0 / (i + 1) as f64, &gradient).unwrap();
    }
    let exact = conjugate_posterior(&prior, &rows).unwrap();
    all_close(&values(&q.natural()), &values(&exact.natural()), 1e-10);
}

/// Reference: local level, m₀ = 0, P₀ = 1, Q = ½, R = 1, y = (1, 2, 0).
#[test]
fn the_kalman_filter_has_the_reference_numbers() {
    let [one, half] = [1.0, 0.5].map(|x| matrix(1, &[x]));
    let level = Kalman::new(&one, &half, &one, &one).unwrap();
    let start = Gaussian::new(&t(&[0.0]), &one).unwrap();
    let tracked = level.filter(&start, &[1.0, 2.0, 0.0].map(|y| t(&[y]))).unwrap();
    let means: Vec<f64> = tracked.iter().map(|q| values(q.mean())[0]).collect();
    let variances: Vec<f64> = tracked.iter().map(|q| values(&q.covariance())[0]).collect();
    all_close(&means, &[0.6, 4.0 / 3.0, 0.658_823_529_411_764_7], 1e-14);
    all_close(&variances, &[0.6, 0.523_809_523_809_523_8, 0.505_882_352_941_176_4], 1e-14);
}

/// A tracked point (position and velocity, two noisy sums observed, one step unobserved) against the joint Gaussian of all
/// states and observations, conditioned once.
#[test]
fn the_kalman_filter_is_conditioning_of_the_joint_gaussian() {
    let f = matrix(2, &[1.0, 0.1, -0.2, 0.97]);
    let q = matrix(2, &[0.02, 0.005, 0.005, 0.1]);
    let h = matrix(2, &[1.0, 0.0, 0.5, 1.0]);
    let r = matrix(2, &[0.3, 0.1, 0.1, 0.2]);
    let (m0, p0) = (t(&[1.0, -1.0]), matrix(2, &[1.0, 0.2, 0.2, 2.0]));
    let steps = 12;
    let y = Tensor::linspace(-1.0, 2.0, 2 * steps, (Kind::Double, tch::Device::Cpu)).sin().reshape([steps, 2]);
    let unobserved = 4;

    let system = Kalman::new(&f, &q, &h, &r).unwrap();
    let mut state = Gaussian::from_covariance(&m0, &p0).unwrap();
    for i in 0..steps {
        state = system.predict(&state).unwrap();
        if i != unobserved {
            state = system.update(&state, &y.get(i)).unwrap();
        }
    }

    // Cov(xₛ, xₜ) = Pₛ (Fᵗ⁻ˢ)ᵀ for s ≤ t.
    let (mut means, mut variances) = (vec![f.mv(&m0)], vec![f.matmul(&p0).matmul(&f.tr()) + &q]);
    for i in 1..steps as usize {
        means.push(f.mv(&means[i - 1]));
        variances.push(f.matmul(&variances[i - 1]).matmul(&f.tr()) + &q);
    }
    let between = |s: i64, u: i64| {
        let (early, late) = (s.min(u), s.max(u));
        let c = variances[early as usize].matmul(&f.tr().linalg_matrix_power(late - early));
        if s <= u { c } else { c.tr() }
    };
    let seen: Vec<i64> = (0..steps).filter(|i| *i != unobserved).collect();
    let blocks = |make: &dyn Fn(i64, i64) -> Tensor, rows: &[i64]| {
        let rows: Vec<Tensor> =
            rows.iter().map(|s| Tensor::cat(&seen.iter().map(|u| make(*s, *u)).collect::<Vec<_>>(), 1)).collect();
        Tensor::cat(&rows, 0)
    };
    let noise = |s: i64, u: i64| if s == u { r.shallow_clone() } else { r.zeros_like() };
    let of_y = blocks(&|s, u| h.matmul(&between(s, u)).matmul(&h.tr()) + noise(s, u), &seen);
    let with_y = blocks(&|s, u| between(s, u).matmul(&h.tr()), &[steps - 1]);
    let surprise = Tensor::cat(&seen.iter().map(|i| y.get(*i) - h.mv(&means[*i as usize])).collect::<Vec<_>>(), 0);
    let gain = with_y.matmul(&of_y.inverse());
    let mean = &means[steps as usize - 1] + gain.mv(&surprise);
    let covariance = &variances[steps as usize - 1] - gain.matmul(&with_y.tr());
    all_close(&values(state.mean()), &values(&mean), 1e-11);
    all_close(&values(&state.covariance()), &values(&covariance), 1e-11);
}

#[test]
fn a_kalman_filter_checks_what_it_is_given() {
    let (one, two) = (matrix(1, &[1.0]), matrix(2, &[1.0, 0.0, 0.0, 1.0]));
    let level = Kalman::new(&one, &one, &one, &one).unwrap();
    let start = Gaussian::new(&t(&[0.0]), &one).unwrap();
    let wide = Gaussian::new(&t(&[0.0, 0.0]), &two).unwrap();
    for (text, expected) in [
        (Kalman::new(&two, &one, &one, &one).unwrap_err().to_string(), "F has shape [2, 2]: expected [1, 1]"),
        (Kalman::new(&one, &one, &one, &-&one).unwrap_err().to_string(), "R is not positive definite"),
        (level.predict(&wide).unwrap_err().to_string(), "the mean of the state has shape [2]"),
        (level.update(&start, &t(&[0.0, 1.0])).unwrap_err().to_string(), "y has shape [2]: expected [1]"),
        (level.filter(&start, &[t(&[f64::NAN])]).unwrap_err().to_string(), "y is not finite (NaN)"),
        (Gaussian::linear_likelihood(&one, &t(&[1.0]), 0.0).unwrap_err().to_string(), "the variance of the noise = 0"),
    ] {
        assert!(text.contains(expected), "{text}: expected {expected}");
    }
    assert!(level.filter(&start, &[]).unwrap().is_empty());
}

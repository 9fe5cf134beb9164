//! Laplace's method, expectation-maximization, stochastic variational inference and variational message passing against
//! closed forms, recurrences written out in plain numbers, and each other.
//!
//! "Reference" numbers were computed in f64 independently of this crate.

use support::{all_close, close, values};
use tch::{Kind, Tensor};
use tch_blr::Error;
use tch_blr::family::{
    BayesianMixture, Bernoulli, Categorical, ConjugatePrior, Dirichlet, ExponentialFamily, Gamma, Gaussian,
    MeanFieldGaussian, Mixture, NormalGamma, conjugate_posterior, converge, laplace, rule_step, vmp_step,
};

fn t(x: &[f64]) -> Tensor {
    Tensor::from_slice(x)
}

fn total(x: &Tensor) -> Tensor {
    x.sum(Kind::Double)
}

// Laplace

#[test]
fn newton_solves_a_quadratic_in_one_step() {
    let (a, b) = (t(&[2.0, 0.9, 0.9, 1.0]).reshape([2, 2]), t(&[1.0, -3.0]));
    let loss = |x: &Tensor| (x * a.mv(x) * 0.5 - x * &b).sum(Kind::Double);
    let q = laplace(&t(&[5.0, 5.0]), 1.0, 2, loss).unwrap(); // the second step moves nothing
    all_close(&values(q.precision()), &values(&a), 1e-14);
    all_close(&values(q.mean()), &values(&a.inverse().mv(&b)), 1e-13);
    // Half steps halve the distance: 10⁻¹³ of a distance of 10 is 2⁻⁴⁶.
    assert!(matches!(laplace(&t(&[5.0, 5.0]), 0.5, 35, loss), Err(Error::NotConverged { .. })));
    assert!(laplace(&t(&[5.0, 5.0]), 0.5, 50, loss).is_ok());
}

/// Reference: one observation and a prior N(0, 1); logistic with x = 1, y = 1, and Poisson with rate e^θ, y = 3.
#[test]
fn laplace_has_the_reference_numbers() {
    let logistic = |x: &Tensor| total(&(x.square() * 0.5 - x.log_sigmoid()));
    let poisson = |x: &Tensor| total(&(x.square() * 0.5 + x.exp() - x * 3.0));
    for rho in [1.0, 0.5] {
        let _no_grad = (rho < 1.0).then(tch::no_grad_guard); // which must not matter
        let q = laplace(&t(&[0.0]), rho, 100, logistic).unwrap();
        close(values(q.mean())[0], 0.401_058_137_541_546_96, 1e-12);
        close(values(q.precision())[0], 1.240_210_507_853_252_6, 1e-12);
        let q = laplace(&t(&[0.0]), rho, 100, poisson).unwrap();
        close(values(q.mean())[0], 0.792_059_968_430_676_9, 1e-12);
        close(values(q.precision())[0], 3.207_940_031_569_323, 1e-12);
    }
}

#[test]
fn laplace_says_why_it_cannot_go_on() {
    let error = |steps, loss: &dyn Fn(&Tensor) -> Tensor| laplace(&t(&[0.1]), 1.0, steps, loss).unwrap_err();
    let concave = error(9, &|x| total(&x.cos()));
    assert!(
        matches!(concave, Error::Step { .. }) && concave.to_string().contains("not positive definite"),
        "{concave}"
    );
    let linear = error(9, &|x| total(x));
    assert!(matches!(linear, Error::Step { .. }), "{linear}");
    let constant = error(9, &|_| t(&[1.0]).get(0));
    assert!(matches!(constant, Error::Step { .. }), "{constant}");
    let slow = error(3, &|x| total(&(x.square() * x.square())));
    assert!(matches!(slow, Error::NotConverged { steps: 3, .. }), "{slow}");
    let vector = error(9, &Tensor::square);
    assert!(vector.to_string().contains("the loss has shape [1]"), "{vector}");
}

// Expectation-maximization

fn coins() -> (Tensor, Tensor) {
    (t(&[5.0, 9.0, 8.0, 4.0, 7.0]).unsqueeze(1), t(&[10.0; 5]))
}

fn even() -> Categorical {
    Categorical::new(&t(&[1.0, 1.0])).unwrap()
}

fn biases(coins: &Mixture<Bernoulli>) -> [f64; 2] {
    [0, 1].map(|k| coins.components()[k].p())
}

/// Do and Batzoglou (2008): the two coins, from (0.6, 0.5). Reference numbers; the maximum of the likelihood itself comes from
/// Newton's method.
#[test]
fn two_coins() {
    let (heads, flips) = coins();
    let start = [0.6, 0.5].map(|p| Bernoulli::new(p).unwrap()).to_vec();
    let mut q = Mixture::new(even(), start).unwrap();
    let mut likelihood = vec![q.log_likelihood(&heads, &flips).unwrap()];
    for step in 1..=60 {
        q = q.em_step(&heads, &flips).unwrap().with_weights(even()).unwrap();
        likelihood.push(q.log_likelihood(&heads, &flips).unwrap());
        if step == 1 {
            all_close(&biases(&q), &[0.713_012_235_4, 0.581_339_308_3], 5e-11); // ten digits given
        }
    }
    all_close(&biases(&q), &[0.796_789_066_922_647_1, 0.519_583_120_145_135_9], 1e-13);
    assert!(likelihood.windows(2).all(|l| l[1] >= l[0] - 1e-13), "{likelihood:?}");
    assert!(likelihood[60] > likelihood[0] + 1.0);

    let loss = |logits: &Tensor| {
        let each = &heads * logits.log_sigmoid() + (flips.unsqueeze(1) - &heads) * (-logits).log_sigmoid(); // [5, 2]
        -(each - 2f64.ln()).logsumexp([1], false).sum(Kind::Double)
    };
    let logits = |p: [f64; 2]| t(&p.map(|p| (p / (1.0 - p)).ln()));
    let best = laplace(&logits([0.8, 0.5]), 1.0, 50, loss).unwrap();
    all_close(&values(&best.mean().sigmoid()), &biases(&q), 1e-11);
    close(-likelihood[60], loss(best.mean()).double_value(&[]), 1e-11);
}

/// The E-step is the rule with ρ = 1 for q(zᵢ); the M-step its fixed point for θ under the delta method.
#[test]
fn expectation_maximization_is_the_rule() {
    let (heads, flips) = coins();
    let weights = Categorical::new(&t(&[0.3, 0.7])).unwrap();
    let q = Mixture::new(weights, [0.6, 0.5].map(|p| Bernoulli::new(p).unwrap()).to_vec()).unwrap();
    let r = q.responsibilities(&heads, &flips).unwrap();
    for (i, h) in values(&heads).into_iter().enumerate() {
        // E[-ln p(x, z)] = -Σₖ q(z=k) sₖ has the gradient -(s₀ - s₁) in μ = q(z=0).
        let score = |k: usize| {
            let p = q.components()[k].p();
            h * p.ln() + (10.0 - h) * (1.0 - p).ln() + values(q.weights().log_probabilities())[k]
        };
        let z = rule_step(&even(), 1.0, &t(&[-(score(0) - score(1))])).unwrap();
        all_close(&values(&z.probabilities()), &values(&r.get(i as i64)), 1e-14);
    }
    let next = q.em_step(&heads, &flips).unwrap();
    all_close(&values(&next.weights().probabilities()), &values(&r.mean_dim(0, false, Kind::Double)), 1e-14);
    for k in 0..2 {
        let r = r.select(1, k);
        let (heads, tails) = (total(&(&r * heads.squeeze_dim(1))), total(&(&r * (&flips - heads.squeeze_dim(1)))));
        let loss = |logit: &Tensor| -total(&(&heads * logit.log_sigmoid() + &tails * (-logit).log_sigmoid()));
        let delta = laplace(&t(&[0.0]), 1.0, 50, loss).unwrap();
        close(next.components()[k as usize].p(), values(&delta.mean().sigmoid())[0], 1e-13);
    }
}

/// 400 draws of three Gaussians on a line, in random order, and the first guess of their means.
fn clusters() -> (Tensor, [f64; 3]) {
    let class = Categorical::new(&t(&[0.5, 0.3, 0.2])).unwrap().sample(400, 11);
    let noise = Gaussian::new(&t(&[0.0]), &t(&[1.0]).reshape([1, 1])).unwrap().sample(400, 12).squeeze_dim(1);
    let (means, scales) = (t(&[-3.0, 0.5, 4.0]), t(&[0.7, 0.5, 1.2]));
    let class = class.to_kind(Kind::Int64);
    (noise * scales.index_select(0, &class) + means.index_select(0, &class), [-1.0, 0.0, 1.0])
}

/// One step against the sums written out, then the way up.
#[test]
fn gaussian_mixture() {
    let (y, means) = clusters();
    let component = |m: f64| Gaussian::new(&t(&[m]), &t(&[0.5]).reshape([1, 1])).unwrap();
    let weights = [0.2, 0.5, 0.3];
    let start = Mixture::new(Categorical::new(&t(&weights)).unwrap(), means.map(component).into()).unwrap();
    let statistics = start.components()[0].statistics(&y.unsqueeze(1)).unwrap();
    let counts = y.ones_like();
    let mut q = start.em_step(&statistics, &counts).unwrap();

    let y = values(&y);
    let density = |k: usize, y: f64| weights[k] * (-0.25 * (y - means[k]).powi(2)).exp(); // up to a common factor
    let r = |k: usize, y: f64| density(k, y) / (0..3).map(|j| density(j, y)).sum::<f64>();
    for k in 0..3 {
        let n: f64 = y.iter().map(|y| r(k, *y)).sum();
        let mean = y.iter().map(|y| r(k, *y) * y).sum::<f64>() / n;
        let variance = y.iter().map(|y| r(k, *y) * (y - mean).powi(2)).sum::<f64>() / n;
        let found = &q.components()[k];
        all_close(&[values(found.mean())[0], values(&found.covariance())[0]], &[mean, variance], 1e-12);
        close(values(&q.weights().probabilities())[k], n / 400.0, 1e-14);
    }

    let mut before = start.log_likelihood(&statistics, &counts).unwrap();
    for _ in 0..300 {
        let now = q.log_likelihood(&statistics, &counts).unwrap();
        assert!(now >= before - 1e-10, "{before} {now}");
        before = now;
        q = q.em_step(&statistics, &counts).unwrap();
    }
    close(q.log_likelihood(&statistics, &counts).unwrap(), before, 1e-9); // it is there
    for (k, mean) in [-3.0, 0.5, 4.0].into_iter().enumerate() {
        // At least 80 draws of a standard deviation of at most 1.2, within 4 standard errors.
        close(values(q.components()[k].mean())[0], mean, 4.0 * 1.2 / 80f64.sqrt());
    }
}

#[test]
fn mixtures_check_what_they_are_given() {
    let (heads, flips) = coins();
    let coin = Bernoulli::new(0.6).unwrap();
    let q = Mixture::new(even(), vec![coin, coin]).unwrap();
    let [line, plane] =
        [1, 2].map(|d| Dirichlet::new(&Tensor::ones([d + 1], (Kind::Double, tch::Device::Cpu))).unwrap());
    let prior = || Dirichlet::new(&t(&[1.0, 1.0])).unwrap();
    let [a, b, c] = [0.0, 1.0, 2.0].map(|m| NormalGamma::new(m, 1.0, 1.0, 1.0).unwrap());
    let bayes = BayesianMixture::new(prior(), vec![a, b]).unwrap();
    let three = BayesianMixture::new(Dirichlet::new(&t(&[1.0; 3])).unwrap(), vec![a, b, c]).unwrap();
    let row = a.likelihood(&t(&[1.0])).unwrap();
    let point = Mixture::new(even(), vec![Gamma::new(1.0, 1.0).unwrap(), Gamma::new(2.0, 1.0).unwrap()]).unwrap();
    let draws = point.components()[0].statistics(&t(&[2.0, 2.0])).unwrap();
    for (text, expected) in [
        (Mixture::new(even(), vec![coin]).unwrap_err().to_string(), "1 components: expected 2"),
        (Mixture::new(even(), vec![line, plane]).unwrap_err().to_string(), "[2, 3] parameters"),
        (q.em_step(&heads, &t(&[10.0])).unwrap_err().to_string(), "the statistics has shape [5, 1]: expected [1, 1]"),
        (q.em_step(&heads, &(flips * 0.0)).unwrap_err().to_string(), "the counts = 0"),
        (point.em_step(&draws, &t(&[1.0, 1.0])).unwrap_err().to_string(), "expected E[ln x] below"),
        (BayesianMixture::new(prior(), vec![a]).unwrap_err().to_string(), "1 components: expected 2"),
        (bayes.step(&three, &row, 1.0, 1.0).unwrap_err().to_string(), "the prior has 3 components"),
        (
            bayes.step(&bayes, &row.narrow(1, 0, 3), 1.0, 1.0).unwrap_err().to_string(),
            "the likelihood has shape [1, 3]",
        ),
        (bayes.step(&bayes, &row, 0.0, 1.0).unwrap_err().to_string(), "`scale` = 0"),
        (bayes.step(&bayes, &row, 1.0, 0.0).unwrap_err().to_string(), "`rho` = 0"),
    ] {
        assert!(text.contains(expected), "{text}: expected {expected}");
    }
}

// Stochastic variational inference

fn bayesian(means: [f64; 3]) -> BayesianMixture<NormalGamma> {
    let components = means.map(|m| NormalGamma::new(m, 0.1, 1.0, 1.0).unwrap());
    BayesianMixture::new(Dirichlet::new(&t(&[1.0; 3])).unwrap(), components.into()).unwrap()
}

/// All natural parameters.
fn all_natural(q: &BayesianMixture<NormalGamma>) -> Vec<f64> {
    let parts = q.components().iter().map(|c| values(&c.natural()));
    std::iter::once(values(&q.weights().natural())).chain(parts).flatten().collect()
}

/// All data and ρ = 1: one step against the coordinate ascent written out in plain numbers, and a bound that only rises.
#[test]
fn all_data_and_a_step_of_one_is_coordinate_ascent() {
    let (y, means) = clusters();
    let (prior, start) = (bayesian([0.0; 3]), bayesian(means));
    let rows = prior.components()[0].likelihood(&y).unwrap();
    let mut q = start.step(&prior, &rows, 1.0, 1.0).unwrap();

    // E[ln π] is the same for all, E[ln τ] and E[τ] = 1 too, so r ∝ exp(-½ E[τ(y-x)²]) = exp(-½((y-m)² + 1/κ)).
    let y = values(&y);
    let density = |k: usize, y: f64| (-0.5 * (y - means[k]).powi(2)).exp();
    let r = |k: usize, y: f64| density(k, y) / (0..3).map(|j| density(j, y)).sum::<f64>();
    for k in 0..3 {
        let [n, s1, s2] = [0, 1, 2].map(|p| y.iter().map(|y| r(k, *y) * y.powi(p)).sum::<f64>());
        let (kappa, m) = (0.1 + n, s1 / (0.1 + n));
        let c = &q.components()[k];
        let found = [c.mean(), c.kappa(), c.precision().shape(), c.precision().rate()];
        all_close(&found, &[m, kappa, 1.0 + n / 2.0, 1.0 + 0.5 * (s2 - kappa * m * m)], 1e-10);
        close(values(q.weights().concentration())[k], 1.0 + n, 1e-11);
    }

    let mut before = start.elbo(&prior, &rows).unwrap();
    for _ in 0..100 {
        let now = q.elbo(&prior, &rows).unwrap();
        assert!(now >= before - 1e-9, "{before} {now}");
        before = now;
        q = q.step(&prior, &rows, 1.0, 1.0).unwrap();
    }
    assert!(before > start.elbo(&prior, &rows).unwrap() + 100.0);
}

/// Clusters so far apart that q(z) is certain: then the posterior given z is conjugate, and the bound is the evidence
/// ln p(y) = A(posterior) - A(prior) over weights and components, without the constants.
#[test]
fn the_bound_is_tight_when_nothing_overlaps() {
    let y = t(&[-1000.0, -999.5, -1001.0, 0.3, 1000.2, 1000.9]);
    let (prior, mut q) = (bayesian([0.0; 3]), bayesian([-900.0, 0.0, 900.0]));
    let rows = prior.components()[0].likelihood(&y).unwrap();
    for _ in 0..3 {
        q = q.step(&prior, &rows, 1.0, 1.0).unwrap();
    }
    let mut evidence =
        conjugate_posterior(prior.weights(), &prior.weights().likelihood(&t(&[0.0, 0.0, 0.0, 1.0, 2.0, 2.0])).unwrap())
            .unwrap()
            .log_partition()
            - prior.weights().log_partition();
    for (k, (from, n)) in [(0, 3), (3, 1), (4, 2)].into_iter().enumerate() {
        let p = &prior.components()[k];
        evidence += conjugate_posterior(p, &rows.narrow(0, from, n)).unwrap().log_partition() - p.log_partition();
    }
    close(q.elbo(&prior, &rows).unwrap(), evidence, 1e-9);
}

/// Batches of 40 of the 400 data, ρ = (1+t)^-0.7: KL to the answer of coordinate ascent, summed over the factors, from
/// thousands of nats to below a thousandth. What is left is the noise of the batches at the last ρ = 0.003.
#[test]
fn batches_and_decaying_steps_come_to_the_same_answer() {
    let (y, means) = clusters();
    let (prior, start) = (bayesian([0.0; 3]), bayesian(means));
    let rows = prior.components()[0].likelihood(&y).unwrap();
    let mut exact = bayesian(means);
    for _ in 0..300 {
        exact = exact.step(&prior, &rows, 1.0, 1.0).unwrap();
    }
    let settled = exact.step(&prior, &rows, 1.0, 1.0).unwrap();
    let change = all_natural(&exact).iter().zip(all_natural(&settled)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(change < 1e-8, "{change}");

    let distance = |q: &BayesianMixture<NormalGamma>| {
        let parts = q.components().iter().zip(exact.components()).map(|(q, e)| q.kl(e).unwrap());
        q.weights().kl(exact.weights()).unwrap() + parts.sum::<f64>()
    };
    let mut q = bayesian(means);
    let mut way = vec![distance(&start)];
    for step in 0..4000 {
        let batch = rows.narrow(0, 40 * (step % 10), 40);
        q = q.step(&prior, &batch, 10.0, (1.0 + step as f64).powf(-0.7)).unwrap();
        if [39, 399, 3999].contains(&step) {
            way.push(distance(&q));
        }
    }
    println!("KL to the answer after 0, 40, 400, 4000 steps: {way:?}");
    assert!(way[0] > 1000.0 && way[3] < 1e-3 && way.windows(2).all(|w| w[1] < w[0]), "{way:?}");
}

// Variational message passing

/// Reference: x = 1, 2, 3, 4 with unknown mean and precision under flat priors.
#[test]
fn unknown_mean_and_precision() {
    let squares = |m: &Tensor| m.get(1) * 4.0 - m.get(0) * 20.0 + 30.0;
    let mut mean = MeanFieldGaussian::new(&t(&[-3.0]), &t(&[9.0])).unwrap();
    let precision = converge(Gamma::new(5.0, 0.1).unwrap(), 1e-14, 100, |precision| {
        let tau = precision.expectation();
        mean = vmp_step(&mean, 1.0, |m| tau.get(1) * squares(m) * 0.5)?;
        let m = mean.expectation();
        vmp_step(precision, 1.0, |tau| tau.get(1) * squares(&m) * 0.5 - tau.get(0))
    })
    .unwrap();
    close(precision.mean(), 0.6, 1e-13);
    close(precision.shape(), 2.0, 0.0);
    all_close(&[values(mean.mean())[0], values(mean.precision())[0]], &[2.5, 2.4], 1e-12);
}

/// Reference: two spins ±1 with E[ℓ] = -½ m₁m₂ - 0.2 m₁ + 0.1 m₂; a Bernoulli's λ is twice a spin's.
#[test]
fn ising_mean_field() {
    let spin = |mu: &Tensor| mu.get(0) * 2.0 - 1.0;
    let energy = |a: &Tensor, b: &Tensor| a * b * -0.5 - a * 0.2 + b * 0.1;
    let mut second = Bernoulli::new(0.9).unwrap();
    let first = converge(Bernoulli::new(0.2).unwrap(), 1e-15, 200, |first| {
        let b = spin(&second.expectation());
        let first = vmp_step(first, 1.0, |mu| energy(&spin(mu), &b))?;
        let a = spin(&first.expectation());
        second = vmp_step(&second, 1.0, |mu| energy(&a, &spin(mu)))?;
        Ok(first)
    })
    .unwrap();
    let natural = [values(&first.natural())[0] / 2.0, values(&second.natural())[0] / 2.0];
    all_close(&natural, &[0.199_136_276_804_601_5, -0.001_727_448_109_074_27], 1e-14);
}

/// A correlated Gaussian target: the mean-field posterior has its mean and the diagonal of its precision, the full one is it.
#[test]
fn mean_field_of_a_correlated_gaussian() {
    let (a, b) = (t(&[2.0, 0.9, 0.9, 1.0]).reshape([2, 2]), t(&[1.0, -3.0]));
    let start = MeanFieldGaussian::new(&t(&[0.0, 0.0]), &t(&[1.0, 1.0])).unwrap();
    // E[½θᵀAθ - bᵀθ]; the two factors are stepped together here, which needs ρ < 1.
    let loss = |mu: &Tensor| {
        let (m, second) = (mu.narrow(0, 0, 2), mu.narrow(0, 2, 2));
        let apart = &a - a.diag(0).diag(0);
        total(&(&m * apart.mv(&m) * 0.5 + a.diag(0) * second * 0.5 - &m * &b))
    };
    let q = converge(start, 1e-14, 1000, |q| vmp_step(q, 0.5, loss)).unwrap();
    all_close(&values(q.precision()), &[2.0, 1.0], 1e-12);
    all_close(&values(q.mean()), &values(&a.inverse().mv(&b)), 1e-11);

    let unit = Tensor::eye(2, (Kind::Double, tch::Device::Cpu));
    let loss = |mu: &Tensor| total(&(mu.narrow(0, 2, 4) * a.flatten(0, 1) * 0.5)) - total(&(mu.narrow(0, 0, 2) * &b));
    let q = vmp_step(&Gaussian::new(&t(&[7.0, 0.0]), &unit).unwrap(), 1.0, loss).unwrap();
    all_close(&values(q.precision()), &values(&a), 1e-14);
    all_close(&values(q.mean()), &values(&a.inverse().mv(&b)), 1e-13);
}

/// Reference: the variational posterior of a Poisson rate e^θ, y = 3, prior N(0, 1). E[e^θ] = exp(m + ½v) is not linear in μ.
#[test]
fn non_conjugate_message_passing() {
    let loss = |mu: &Tensor| {
        let (m, second) = (mu.get(0), mu.get(1));
        let variance = &second - m.square();
        (&m + variance * 0.5).exp() - m * 3.0 + second * 0.5
    };
    let start = || MeanFieldGaussian::new(&t(&[0.0]), &t(&[1.0])).unwrap();
    for rho in [1.0, 0.3] {
        let _no_grad = (rho < 1.0).then(tch::no_grad_guard); // which must not matter
        let q = converge(start(), 1e-14, 1000, |q| vmp_step(q, rho, loss)).unwrap();
        close(values(q.mean())[0], 0.687_422_729_064_258_6, 1e-12);
        close(values(q.precision())[0], 3.312_577_270_935_744, 1e-12);
    }
}

//! Conjugate-computation variational inference: exact where the model is conjugate, stationary where it is not, equal to the
//! other ways to the same posterior, and with data that can be taken out again.
//!
//! "Reference" numbers were computed in f64 independently of this crate.

use support::{Quadrature, all_close, close, values, with_exact_expectations};
use tch::{Device, Kind, Tensor};
use tch_blr::Error;
use tch_blr::family::{
    Cvi, ExponentialFamily, Gaussian, GaussianLikelihood, Likelihood, LogisticLikelihood, MeanFieldGaussian,
    PoissonLikelihood, converge, normal_quadrature, rule_step, vmp_step,
};
use tch_blr::{Statistic, Von};

fn t(x: &[f64]) -> Tensor {
    Tensor::from_slice(x)
}

fn eye(d: i64) -> Tensor {
    Tensor::eye(d, (Kind::Double, Device::Cpu))
}

fn standard(d: i64) -> Gaussian {
    Gaussian::new(&Tensor::zeros([d], (Kind::Double, Device::Cpu)), &eye(d)).unwrap()
}

/// N(0, K) with K = exp(-½(x-x′)²/0.6²) + 10⁻⁶ on the diagonal, without which K cannot be inverted.
fn process(x: &Tensor) -> (Gaussian, Tensor) {
    let n = x.size()[0];
    let apart = x.unsqueeze(1) - x.unsqueeze(0);
    let kernel = (apart.square() * (-0.5 / 0.36)).exp() + eye(n) * 1e-6;
    (Gaussian::from_covariance(&Tensor::zeros([n], (Kind::Double, Device::Cpu)), &kernel).unwrap(), kernel)
}

/// Where the fits below stop: the sites, of size 0.1, are added to K⁻¹ with elements of 10⁵, which leaves ten of their digits.
const ROUNDING: f64 = 1e-9;

/// In the manner of Snelson's: n inputs in [0, 6] with a gap, and a curve with noise of standard deviation 0.3.
fn curve(n: usize) -> (Tensor, Tensor) {
    let z = standard(2).sample(n, 21) * 0.5;
    let u = (z.select(1, 0) * 2.0).special_ndtr() * 4.5;
    let x = &u + u.gt(1.5).to_kind(Kind::Double) * 1.5;
    let y = (&x * 2.2).sin() + (&x * 0.8).cos() * 0.8 + z.select(1, 1) * 0.6;
    (x, y)
}

fn classes(n: usize) -> (Tensor, Tensor) {
    let (x, y) = curve(n);
    (x, y.gt(0.0).to_kind(Kind::Double))
}

#[test]
fn quadrature_has_the_moments_of_a_normal() {
    let (z, w) = normal_quadrature();
    let expect = |g: Tensor| (&w * g).sum(Kind::Double).double_value(&[]);
    for (power, moment) in [(0, 1.0), (1, 0.0), (2, 1.0), (4, 3.0), (7, 0.0), (12, 10_395.0)] {
        close(expect(z.pow_tensor_scalar(power)) / f64::max(moment, 1.0), f64::min(moment, 1.0), 1e-12);
    }
    close(expect(z.cos()), (-0.5f64).exp(), 1e-14);
    close(expect(z.log_sigmoid()), Quadrature::new(60).expect(|z| -(-z).exp().ln_1p()), 1e-12);

    // As documented, against steps a hundredth as long.
    for (deviation, tolerance) in [(0.5, 1e-12), (4.0, 1e-12), (10.0, 1e-6)] {
        let (mean, variance) = (t(&[0.7]), t(&[deviation * deviation]));
        let ours = LogisticLikelihood.expected(&t(&[1.0]), &mean, &variance).unwrap();
        let fine = |g: &dyn Fn(f64) -> f64| {
            let terms =
                (-7200..=7200).map(|i| f64::from(i) / 800.0).map(|z| g(0.7 + deviation * z) * (-0.5 * z * z).exp());
            terms.sum::<f64>() / (800.0 * std::f64::consts::TAU.sqrt())
        };
        let [g, h] = [0, 1].map(|k| fine(&|f| logistic(f, 1.0)[k]));
        let loss = fine(&|f| (-f).max(0.0) + (-f.abs()).exp().ln_1p());
        all_close(&values(&Tensor::cat(&ours, 0)), &[loss, g, h], tolerance);
    }
}

/// Of E\[ℓ\] the derivative by the mean is E\[ℓ′\], by the variance ½ E\[ℓ″\]; closed forms are the quadrature of the loss.
#[test]
fn expected_losses_and_their_derivatives_agree() {
    /// The loss alone.
    struct ByQuadrature<'a, L>(&'a L);
    impl<L: Likelihood> Likelihood for ByQuadrature<'_, L> {
        fn loss(&self, f: &Tensor, y: &Tensor) -> Tensor {
            self.0.loss(f, y)
        }
    }
    fn check<L: Likelihood>(likelihood: &L, y: &[f64]) {
        let (y, m, v) = (t(y), t(&[-1.0, 0.3, 0.0, 1.2]), t(&[0.5, 1.0, 2.0, 0.01]));
        let expected = likelihood.expected(&y, &m, &v).unwrap();
        for (ours, quadrature) in expected.iter().zip(ByQuadrature(likelihood).expected(&y, &m, &v).unwrap()) {
            all_close(&values(ours), &values(&quadrature), 1e-11);
        }
        let h = 1e-5;
        let at = |m: &Tensor, v: &Tensor| likelihood.expected(&y, m, v).unwrap()[0].shallow_clone();
        let by_mean = (at(&(&m + h), &v) - at(&(&m - h), &v)) / (2.0 * h);
        let by_variance = (at(&m, &(&v + h)) - at(&m, &(&v - h))) / (2.0 * h);
        all_close(&values(&by_mean), &values(&expected[1]), 1e-8);
        all_close(&values(&by_variance), &values(&(&expected[2] * 0.5)), 1e-8);
    }
    check(&GaussianLikelihood::new(0.3).unwrap(), &[0.0, 1.0, -2.0, 0.4]);
    check(&LogisticLikelihood, &[0.0, 1.0, 1.0, 0.0]);
    check(&PoissonLikelihood, &[0.0, 1.0, 5.0, 2.0]);
    let with_gradients = LogisticLikelihood.expected(&t(&[1.0]), &t(&[0.3]), &t(&[1.0])).unwrap();
    let _no_grad = tch::no_grad_guard();
    let without = LogisticLikelihood.expected(&t(&[1.0]), &t(&[0.3]), &t(&[1.0])).unwrap();
    assert_eq!(values(&Tensor::cat(&with_gradients, 0)), values(&Tensor::cat(&without, 0)));
    let half = LogisticLikelihood.loss(&t(&[0.0]), &t(&[1.0]));
    let three = PoissonLikelihood.loss(&t(&[0.0]), &t(&[3.0])); // -ln(e⁻¹/3!)
    all_close(&values(&Tensor::cat(&[half, three], 0)), &[2f64.ln(), 1.0 + 6f64.ln()], 1e-14);
}

/// Reference: one weight with prior N(0, 1); logistic with x = 1, y = 1, and Poisson with y = 3. Variational online Newton of
/// this crate, given exact expectations, ends there too.
#[test]
fn the_reference_posteriors_and_variational_online_newton() {
    fn check<L: Likelihood>(likelihood: L, y: f64, [mean, precision]: [f64; 2], gradient: impl Fn(f64) -> f64) {
        let mut q = Cvi::new(standard(1), &t(&[1.0]).unsqueeze(1), &t(&[y]), likelihood).unwrap();
        for rho in [1.0, 0.3] {
            q.fit(rho, 1e-14, 500).unwrap();
            all_close(&values(q.posterior().mean()), &[mean], 1e-12);
            all_close(&values(q.posterior().precision()), &[precision], 1e-12);
            q.remove(0).unwrap();
            all_close(&values(&q.posterior().natural()), &[0.0, -0.5], 1e-15); // the prior
            q.insert(&t(&[1.0]).unsqueeze(1), &t(&[y])).unwrap();
        }
        let von = Von::default().ess(1.0).weight_decay(1.0).hessian(Statistic::Price);
        let (m, s) = with_exact_expectations(von.beta2(0.9), 0.1, 1500, gradient);
        all_close(&[m, s], &[mean, precision], 1e-8);
    }
    let logistic = [0.413_126_805_979_680_6, 1.206_464_295_700_586_4];
    check(LogisticLikelihood, 1.0, logistic, |theta| -1.0 / (1.0 + theta.exp()));
    let poisson = [0.687_422_729_064_258_6, 3.312_577_270_935_744];
    check(PoissonLikelihood, 3.0, poisson, |theta| theta.exp() - 3.0);
}

/// GP regression: the exact posterior and evidence after one step from the prior, and no further movement.
#[test]
fn gaussian_process_regression_in_one_step() {
    let (x, y) = curve(40);
    let (prior, kernel) = process(&x);
    let mut q = Cvi::new(prior, &eye(40), &y, GaussianLikelihood::new(0.09).unwrap()).unwrap();
    q.step(1.0).unwrap();

    let noisy = &kernel + eye(40) * 0.09;
    let inverse = noisy.inverse();
    let mean = kernel.matmul(&inverse).mv(&y);
    let covariance = &kernel - kernel.matmul(&inverse).matmul(&kernel);
    all_close(&values(q.posterior().mean()), &values(&mean), 1e-8);
    all_close(&values(&q.posterior().covariance()), &values(&covariance), 1e-8);
    let log_det = noisy.slogdet().1.double_value(&[]);
    let fit = y.dot(&inverse.mv(&y)).double_value(&[]);
    close(q.elbo().unwrap(), -0.5 * (fit + log_det + 40.0 * std::f64::consts::TAU.ln()), 1e-7);
    let observations = q.sites().select(1, 0) / (q.sites().select(1, 1) * -2.0);
    all_close(&values(&observations), &values(&y), 1e-12); // pseudo-observations are the observations
    assert!(q.step(1.0).unwrap() < 1e-9);
}

/// Taking a datum out of GP regression is refitting without it, at once, for each of the data.
#[test]
fn removal_from_a_conjugate_model_is_exact() {
    let (x, y) = curve(12);
    for i in 0..12 {
        let fit = |features: &Tensor, y: &Tensor| {
            let mut q = Cvi::new(process(&x).0, features, y, GaussianLikelihood::new(0.09).unwrap()).unwrap();
            q.step(1.0).unwrap();
            q
        };
        let others = Tensor::arange(12, (Kind::Int64, Device::Cpu));
        let others = others.masked_select(&others.ne(i));
        let refitted = fit(&eye(12).index_select(0, &others), &y.index_select(0, &others));
        let mut q = fit(&eye(12), &y);
        q.remove(i as usize).unwrap();
        all_close(&values(q.posterior().mean()), &values(refitted.posterior().mean()), 1e-10);
        all_close(&values(&q.posterior().covariance()), &values(&refitted.posterior().covariance()), 1e-10);
        close(q.elbo().unwrap(), refitted.elbo().unwrap(), 1e-8);
    }
}

/// ∇_μ E_q\[-ln p(y|θ)\], from sums over the data in plain numbers, as the [first, second] part of λ.
fn likelihood_gradient(
    q: &Gaussian,
    features: &Tensor,
    y: &[f64],
    derivatives: impl Fn(f64, f64) -> [f64; 2],
) -> Tensor {
    let quadrature = Quadrature::new(60);
    let covariance = q.covariance();
    let mut sum = q.natural().zeros_like();
    for (i, y) in y.iter().enumerate() {
        let phi = features.get(i as i64);
        let m = phi.dot(q.mean()).double_value(&[]);
        let sd = phi.dot(&covariance.mv(&phi)).double_value(&[]).sqrt();
        let [g, h] = [0, 1].map(|k| quadrature.expect(|z| derivatives(m + sd * z, *y)[k]));
        sum += Tensor::cat(&[&phi * (g - h * m), phi.outer(&phi).flatten(0, 1) * (0.5 * h)], 0);
    }
    sum
}

fn logistic(f: f64, y: f64) -> [f64; 2] {
    let p = 1.0 / (1.0 + (-f).exp());
    [p - y, p * (1.0 - p)]
}

fn poisson(f: f64, y: f64) -> [f64; 2] {
    [f.exp() - y, f.exp()]
}

/// At the end λ = λ₀ - ∇_μ E_q[-ln p(y|θ)], whatever the damping; and a step on the way is the rule's, with that gradient.
#[test]
fn fixed_points_are_stationary_and_steps_the_rules() {
    fn check<L: Likelihood + Copy>(
        likelihood: L,
        prior: fn() -> Gaussian,
        features: &Tensor,
        y: &Tensor,
        derivatives: fn(f64, f64) -> [f64; 2],
        rounding: f64,
    ) {
        let gradient = |q: &Gaussian| likelihood_gradient(q, features, &values(y), derivatives);
        let start = || Cvi::new(prior(), features, y, likelihood).unwrap();
        let (mut q, mut damped) = (start(), start());
        for rho in [0.5, 0.2] {
            let rule = rule_step(q.posterior(), rho, &(gradient(q.posterior()) - prior().natural())).unwrap();
            q.step(rho).unwrap();
            let size = values(&rule.natural().abs().max())[0];
            all_close(&values(&q.posterior().natural()), &values(&rule.natural()), 1e-11 * size);
        }
        let before = q.elbo().unwrap();
        q.fit(1.0, rounding, 200).unwrap();
        assert!(q.elbo().unwrap() > before);
        all_close(&values(&q.posterior().natural()), &values(&(prior().natural() - gradient(q.posterior()))), 1e-8);
        damped.fit(0.4, rounding, 400).unwrap();
        all_close(&values(damped.posterior().mean()), &values(q.posterior().mean()), 1e-8);
        all_close(&values(damped.sites()), &values(q.sites()), 1e-8);
    }
    let (x, y) = classes(30);
    let design = Tensor::stack(&[x.ones_like(), &x / 3.0, x.square() / 9.0], 1) * 0.3;
    check(LogisticLikelihood, || standard(3), &design, &y, logistic, 1e-13);
    check(LogisticLikelihood, || process(&curve(30).0).0, &eye(30), &y, logistic, ROUNDING); // GP classification
    let counts = (curve(30).1.exp() * 2.0).floor();
    check(PoissonLikelihood, || standard(3), &design, &counts, poisson, 1e-13);
}

/// The same posterior by non-conjugate message passing on E\[ℓ\] as a function of μ, full and mean-field in one dimension.
#[test]
fn message_passing_ends_at_the_same_posterior() {
    let (x, y) = classes(20);
    let design = Tensor::stack(&[&x.ones_like(), &x], 1) * 0.5;
    let mut q = Cvi::new(standard(2), &design, &y, LogisticLikelihood).unwrap();
    q.fit(1.0, 1e-13, 200).unwrap();
    let (nodes, weights) = normal_quadrature();
    let data_and_prior = |mu: &Tensor| {
        let (m, second) = (mu.narrow(0, 0, 2), mu.narrow(0, 2, 4).reshape([2, 2]));
        let mean = design.mv(&m);
        let variance = (design.matmul(&(&second - m.outer(&m))) * &design).sum_dim_intlist(1, false, Kind::Double);
        let f = variance.sqrt().outer(&nodes) + mean.unsqueeze(1);
        let data = LogisticLikelihood.loss(&f, &y.unsqueeze(1)).mv(&weights).sum(Kind::Double);
        data + second.trace() * 0.5
    };
    let by_messages = converge(standard(2), 1e-13, 500, |q| vmp_step(q, 0.7, data_and_prior)).unwrap();
    all_close(&values(&by_messages.natural()), &values(&q.posterior().natural()), 1e-10);

    let one = MeanFieldGaussian::new(&t(&[0.0]), &t(&[1.0])).unwrap();
    let loss = |mu: &Tensor| {
        let (m, second) = (mu.narrow(0, 0, 1), mu.narrow(0, 1, 1));
        let f = (&second - m.square()).sqrt() * &nodes + m;
        -(f.log_sigmoid() * &weights).sum(Kind::Double) + second.sum(Kind::Double) * 0.5
    };
    let one = converge(one, 1e-14, 500, |q| vmp_step(q, 1.0, loss)).unwrap();
    close(values(one.mean())[0], 0.413_126_805_979_680_6, 1e-12);
}

/// After the removal of a datum (or the arrival of others) a few more steps lead to where a fit of the data that are there
/// leads from the prior.
#[test]
fn removal_and_arrival_end_where_a_refit_ends() {
    let (x, y) = classes(25);
    let prior = || process(&x).0;
    let settle = |mut q: Cvi<LogisticLikelihood>| {
        q.fit(1.0, ROUNDING, 200).unwrap();
        q
    };
    let all = || settle(Cvi::new(prior(), &eye(25), &y, LogisticLikelihood).unwrap());
    let without = |i: i64| {
        let rest = |t: &Tensor| Tensor::cat(&[t.narrow(0, 0, i), t.narrow(0, i + 1, 24 - i)], 0);
        settle(Cvi::new(prior(), &rest(&eye(25)), &rest(&y), LogisticLikelihood).unwrap())
    };
    for i in [0, 7, 24] {
        let refitted = without(i);
        let mut q = all();
        q.remove(i as usize).unwrap();
        let at_once = (q.posterior().mean() - refitted.posterior().mean()).abs().max().double_value(&[]);
        let q = settle(q);
        all_close(&values(q.sites()), &values(refitted.sites()), 1e-8);
        all_close(&values(q.posterior().mean()), &values(refitted.posterior().mean()), 1e-8);
        assert!(at_once > 1e-6); // the model is not conjugate: the steps were needed
    }
    let mut q = settle(Cvi::new(prior(), &eye(25).narrow(0, 0, 20), &y.narrow(0, 0, 20), LogisticLikelihood).unwrap());
    q.insert(&eye(25).narrow(0, 20, 5), &y.narrow(0, 20, 5)).unwrap();
    all_close(&values(settle(q).sites()), &values(all().sites()), 1e-8);
}

#[test]
fn cvi_checks_what_it_is_given_and_errors_change_nothing() {
    /// Without a bound below, as no likelihood should be.
    struct Concave;
    impl Likelihood for Concave {
        fn loss(&self, f: &Tensor, y: &Tensor) -> Tensor {
            f.square() * -2.0 + y
        }
    }
    let column = t(&[1.0, 1.0]).unsqueeze(1);
    let new = |y: &[f64]| Cvi::new(standard(1), &column, &t(y), LogisticLikelihood).map(drop).unwrap_err().to_string();
    assert!(new(&[0.0, 2.0]).contains("logistic likelihood: a value lies outside of the support {0, 1}"));
    assert!(new(&[0.0]).contains("Φ has shape [2, 1]: expected [1, 1]"));
    assert!(new(&[0.0, f64::NAN]).contains("y is not finite"));
    let poisson = Cvi::new(standard(1), &column, &t(&[0.0, 1.5]), PoissonLikelihood).map(drop).unwrap_err();
    assert!(poisson.to_string().contains("{0, 1, …}"), "{poisson}");
    assert!(GaussianLikelihood::new(-1.0).unwrap_err().to_string().contains("the variance σ² = -1"));

    // S = 1 - 8ρ: two sites of E[ℓ″] = -4.
    let mut q = Cvi::new(standard(1), &column, &t(&[0.0, 0.0]), Concave).unwrap();
    let error = q.step(1.0).unwrap_err();
    let Error::Step { largest, .. } = error else { panic!("{error}") };
    assert!(largest <= 0.125 && largest > 0.124, "{error}");
    assert_eq!((values(q.sites()), values(&q.posterior().natural())), (vec![0.0; 4], vec![0.0, -0.5]));
    assert!(q.step(0.124).is_ok());
    assert!(q.remove(2).unwrap_err().to_string().contains("no datum 2: there are 2"));
    assert!(q.step(0.0).unwrap_err().to_string().contains("`rho`"));
    let mut slow = Cvi::new(standard(1), &column, &t(&[0.0, 1.0]), LogisticLikelihood).unwrap();
    assert!(matches!(slow.fit(0.01, 1e-10, 5), Err(Error::NotConverged { steps: 5, .. })));
}

/// Snelson's 200 points, 20 bumps with centres from -1 to 7 and width ½, noise 0.286, prior precision 0.1. Reference: log
/// marginal likelihood and root mean square of the leave-one-out residuals; here each of the 200 is removed.
#[test]
fn snelson() {
    let Some(data) = support::data("snelson") else { return };
    let read = |name: &str| {
        let text = std::fs::read_to_string(data.join("snelson").join(name)).unwrap();
        t(&text.split_whitespace().map(|x| x.parse().unwrap()).collect::<Vec<f64>>())
    };
    let (x, y) = (read("train_inputs"), read("train_outputs"));
    let centres = Tensor::linspace(-1.0, 7.0, 20, (Kind::Double, Device::Cpu));
    let features = ((x.unsqueeze(1) - centres) / 0.5).square().g_mul_scalar(-0.5).exp();
    let prior = Gaussian::new(&Tensor::zeros([20], (Kind::Double, Device::Cpu)), &(eye(20) * 0.1)).unwrap();
    let noise = GaussianLikelihood::new(0.286 * 0.286).unwrap();
    let mut q = Cvi::new(prior, &features, &y, noise).unwrap();
    q.step(1.0).unwrap();
    close(q.elbo().unwrap(), -67.676_738, 5e-7);

    let mut squares = 0.0;
    for i in 0..200 {
        // The first is always the next to go, and comes back as the last.
        q.remove(0).unwrap();
        let (feature, target) = (features.narrow(0, i, 1), y.narrow(0, i, 1));
        squares += (q.posterior().project(&feature).unwrap().0 - &target).square().double_value(&[0]);
        q.insert(&feature, &target).unwrap();
        q.step(1.0).unwrap();
    }
    close((squares / 200.0).sqrt(), 0.292_536, 5e-7);
}

//! Mixtures: as posteriors, from several runs, and learned together.

// Digits as the reference has them.
#![allow(clippy::unreadable_literal)]

use support::{Quadrature, all_close, close, params, values, weight};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_blr::{DiagonalGaussian, Expectation, Ivon, Mixture, MixtureOfGaussians, MultiIvon, Philox};

fn gaussian(mean: &[f64], precision: &[f64]) -> DiagonalGaussian {
    DiagonalGaussian::new([("w", Tensor::from_slice(mean), Tensor::from_slice(precision))]).unwrap()
}

/// ln N(x | m, 1/s)
fn log_normal(x: f64, m: f64, s: f64) -> f64 {
    0.5 * (s.ln() - std::f64::consts::TAU.ln() - s * (x - m).powi(2))
}

#[test]
fn a_mixture_has_the_moments_and_density_of_its_components() {
    let q =
        Mixture::new([(1.0, gaussian(&[1.0, 0.0], &[4.0, 1.0])), (3.0, gaussian(&[-1.0, 2.0], &[1.0, 0.5]))]).unwrap();
    assert_eq!(q.mixing(), [0.25, 0.75]);
    all_close(&values(&q.mean("w").unwrap()), &[-0.5, 1.5], 1e-15);
    let variance =
        |a: f64, b: f64, m: [f64; 3]| 0.25 * (a + (m[0] - m[2]).powi(2)) + 0.75 * (b + (m[1] - m[2]).powi(2));
    let expected = [variance(0.25, 1.0, [1.0, -1.0, -0.5]), variance(1.0, 2.0, [0.0, 2.0, 1.5])];
    all_close(&values(&q.variance("w").unwrap()), &expected, 1e-15);
    for theta in [[0.3, -0.2], [40.0, 50.0]] {
        let w = weight(&theta);
        let terms = [
            0.25f64.ln() + log_normal(theta[0], 1.0, 4.0) + log_normal(theta[1], 0.0, 1.0),
            0.75f64.ln() + log_normal(theta[0], -1.0, 1.0) + log_normal(theta[1], 2.0, 0.5),
        ];
        let largest = terms[0].max(terms[1]);
        let expected = largest + terms.iter().map(|t| (t - largest).exp()).sum::<f64>().ln();
        close(q.log_prob(params(&w)).unwrap(), expected, 1e-12 * expected.abs());
    }
}

/// 4000 samples of two components that are far apart: frequencies, means and variances within four standard errors.
#[test]
fn samples_come_from_the_components_by_their_weights() {
    const N: u64 = 4000;
    let q = Mixture::new([(0.3, gaussian(&[-10.0], &[4.0])), (0.7, gaussian(&[10.0], &[1.0]))]).unwrap().with_seed(3);
    let samples: Vec<f64> = (0..N).map(|k| values(&q.sample(k).unwrap()[0].1)[0]).collect();
    let (low, high): (Vec<f64>, Vec<f64>) = samples.iter().partition(|x| **x < 0.0);
    let n = N as f64;
    close(low.len() as f64 / n, 0.3, 4.0 * (0.3 * 0.7 / n).sqrt());
    for (part, mean, variance) in [(low, -10.0, 0.25), (high, 10.0, 1.0)] {
        let n = part.len() as f64;
        let found = part.iter().sum::<f64>() / n;
        close(found, mean, 4.0 * (variance / n).sqrt());
        let spread = part.iter().map(|x| (x - found).powi(2)).sum::<f64>() / n;
        close(spread, variance, 4.0 * variance * (2.0 / n).sqrt());
    }
    assert_eq!(values(&q.sample(5).unwrap()[0].1)[0], samples[5]);
}

#[test]
fn predictions_count_by_weight_and_show_disagreement() {
    let vs = VarStore::new(Device::Cpu);
    let w = vs.root().var_copy("w", &Tensor::from_slice(&[0.0f32]));
    let sure = |mean: f32| {
        DiagonalGaussian::new([("w", Tensor::from_slice(&[mean]), Tensor::from_slice(&[1e12f32]))]).unwrap()
    };
    let q = Mixture::new([(0.25, sure(-30.0)), (0.75, sure(30.0))]).unwrap();
    let p = q.predict(&vs, 2, || Tensor::stack(&[w.sigmoid(), (-&w).sigmoid()], 1)).unwrap();
    assert_eq!(p.samples, 4);
    let entropy = -(0.25f64 * 0.25f64.ln() + 0.75 * 0.75f64.ln());
    close(p.mean.double_value(&[0, 0]), 0.75, 1e-6);
    close(p.entropy.double_value(&[0]), entropy, 1e-6);
    close(p.mutual_information.double_value(&[0]), entropy, 1e-6);
    let outputs = q.predict_samples(&vs, 200, || w.sign()).unwrap();
    close(outputs.mean(Kind::Double).double_value(&[]), 0.5, 4.0 * (0.75f64 / 200.0).sqrt());
    let guard = q.perturb(&vs, 0).unwrap();
    assert!(w.double_value(&[0]).abs() > 29.0);
    drop(guard);
    assert_eq!(w.double_value(&[0]), 0.0);
}

#[test]
fn a_mixture_survives_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("q.safetensors");
    let q =
        Mixture::new([(0.3, gaussian(&[-1.0, 2.0], &[4.0, 1.0])), (0.7, gaussian(&[1.0, 0.5], &[1.0, 3.0]))]).unwrap();
    let q = q.with_seed(9);
    q.save(&path).unwrap();
    let again = Mixture::load(&path).unwrap();
    all_close(again.mixing(), q.mixing(), 1e-16);
    for k in 0..20 {
        assert_eq!(values(&again.sample(k).unwrap()[0].1), values(&q.sample(k).unwrap()[0].1));
    }
    assert!(DiagonalGaussian::load(&path).unwrap_err().to_string().contains("mixture posterior"));
}

#[test]
fn mixtures_that_make_no_sense_are_refused() {
    let text = |q: tch_blr::Result<Mixture>| q.unwrap_err().to_string();
    assert!(text(Mixture::equal([])).contains("at least one"));
    for w in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let q = Mixture::new([(1.0, gaussian(&[0.0], &[1.0])), (w, gaussian(&[0.0], &[1.0]))]);
        assert!(text(q).contains("expected a finite number > 0"));
    }
    assert!(text(Mixture::equal([gaussian(&[0.0], &[1.0]), gaussian(&[0.0; 2], &[1.0; 2])])).contains("shapes"));

    let start = Tensor::from_slice(&[0.0, 1.0]).reshape([2, 1]);
    let error = |q: tch_blr::Result<MixtureOfGaussians>| q.unwrap_err().to_string();
    assert!(error(MixtureOfGaussians::new(&start, 0.0)).contains("precision"));
    assert!(error(MixtureOfGaussians::new(&start.reshape([2]), 1.0)).contains("[2]"));
    assert!(error(MixtureOfGaussians::new(&(&start / 0.0), 1.0)).contains("not finite"));
    let q = || MixtureOfGaussians::new(&start, 1.0).unwrap();
    let well = |theta: &Tensor| theta.square().sum_dim_intlist(1, false, None::<Kind>);
    for (mut q, field) in [
        (q().lr(f64::NAN), "lr"),
        (q().weight_lr(-1.0), "weight_lr"),
        (q().expectation(Expectation::MonteCarlo { samples: 0 }), "samples"),
    ] {
        assert!(q.step(well).unwrap_err().to_string().contains(field));
    }
    let mut q = q();
    let state = |q: &MixtureOfGaussians| {
        [values(&q.means().flatten(0, 1)), values(&q.precisions().flatten(0, 1)), values(&q.weights())]
    };
    let before = state(&q);
    assert!(q.step(|theta| theta.sum(Kind::Double)).unwrap_err().to_string().contains("expected [20]"));
    assert!(q.step(|theta| well(theta).detach()).unwrap_err().to_string().contains("graph"));
    assert!(q.step(|theta| well(theta) * f64::NAN).unwrap_err().to_string().contains("NaN"));
    assert!(q.step_at(well, &start, &start).unwrap_err().to_string().contains("expected [n, 1]"));
    assert_eq!(state(&q), before);
    MultiIvon::build::<&VarStore>(Ivon::default().ess(1.0), [], 0.1, 0).unwrap_err();
}

/// A run of IVON in each well of (θ²-1)², the same as two runs by themselves.
#[test]
fn multi_ivon_finds_both_wells() {
    let copy = |start: f64| {
        let mut vs = VarStore::new(Device::Cpu);
        vs.double();
        let w = vs.root().var_copy("w", &Tensor::from_slice(&[start]));
        (vs, w)
    };
    let loss = |w: &Tensor| (w.square() - 1.0).square().sum(Kind::Double);
    let config = Ivon::default().ess(100.0).hess_init(4.0).beta2(0.99).weight_decay(1e-3);
    let copies = [copy(-0.6), copy(0.7)];
    let mut together = MultiIvon::build(config, copies.iter().map(|(vs, _)| vs), 0.02, 5).unwrap();
    for _ in 0..200 {
        assert_eq!(together.step(|i| loss(&copies[i].1)).unwrap().len(), 2);
    }
    let q = together.posterior().unwrap();
    assert_eq!(q.mixing(), [0.5, 0.5]);
    for (i, (start, mode)) in [(-0.6, -1.0), (0.7, 1.0)].into_iter().enumerate() {
        let (vs, w) = copy(start);
        let mut alone = config.noise(Philox { seed: 5 + i as u64 }).build(&vs, 0.02).unwrap();
        for _ in 0..200 {
            alone.step(|| loss(&w)).unwrap();
        }
        let (here, alone) = (&q.components()[i], alone.posterior().unwrap());
        assert_eq!(values(&here.mean("w").unwrap()), values(&alone.mean("w").unwrap()));
        assert_eq!(values(&here.precision("w").unwrap()), values(&alone.precision("w").unwrap()));
        close(values(&here.mean("w").unwrap())[0], mode, 0.15);
    }
    assert_eq!(together.members().len(), 2);
}

fn sums(t: &Tensor) -> Tensor {
    t.sum_dim_intlist(1, false, None::<Kind>)
}

/// The best single Gaussian for a logistic and a Poisson observation under the prior N(0, 1) (reference).
#[test]
fn one_component_is_the_best_gaussian() {
    let (z, share) = Quadrature::new(40).nodes();
    let logistic = |t: &Tensor| sums(&(t.square() * 0.5 + (-t).softplus()));
    let poisson = |t: &Tensor| sums(&(t.square() * 0.5 + t.exp() - t * 3.0));
    let solve = |loss: &dyn Fn(&Tensor) -> Tensor| {
        let mut q = MixtureOfGaussians::new(&Tensor::from_slice(&[0.0]).reshape([1, 1]), 1.0).unwrap().lr(0.3);
        for _ in 0..120 {
            q.step_at(loss, &z, &share).unwrap();
        }
        [q.means(), q.precisions()].map(|t| t.double_value(&[0, 0]))
    };
    all_close(&solve(&logistic), &[0.4131268059796806, 1.2064642957005864], 1e-10);
    all_close(&solve(&poisson), &[0.6874227290642586, 3.312577270935744], 1e-10);
}

/// If q is the target, b is constant, and no sample moves anything.
#[test]
fn the_target_itself_stays() {
    let target = |theta: &Tensor| {
        let component =
            |m: [f64; 2], weight: f64| sums(&((theta - Tensor::from_slice(&m)).square() * 2.0 * -0.5)) + weight.ln();
        // Of precision 2 both, up to a constant.
        -Tensor::stack(&[component([-0.5, 0.3], 0.5), component([0.8, 0.1], 0.5)], 1).logsumexp(1, false)
    };
    let means = [-0.5, 0.3, 0.8, 0.1];
    let mut q = MixtureOfGaussians::new(&Tensor::from_slice(&means).reshape([2, 2]), 2.0).unwrap().seed(4);
    for _ in 0..3 {
        q.step(target).unwrap();
    }
    all_close(&values(&q.means().flatten(0, 1)), &means, 1e-13);
    all_close(&values(&q.precisions().flatten(0, 1)), &[2.0; 4], 1e-12);
    all_close(&values(&q.weights()), &[0.5; 2], 1e-13);
}

/// Delta method: (θ²-1)², fifty times, from ±0.5, where its curvature is negative, to the modes ±1 with curvature 8·50.
/// The components are forty standard deviations apart, so they do not feel each other.
#[test]
fn the_delta_method_finds_both_modes() {
    let start = Tensor::from_slice(&[-0.5, 0.5]).reshape([2, 1]);
    let mut q = MixtureOfGaussians::new(&start, 100.0).unwrap().expectation(Expectation::Delta);
    for _ in 0..250 {
        q.step(|t| sums(&((t.square() - 1.0).square() * 50.0))).unwrap();
    }
    all_close(&values(&q.means().flatten(0, 1)), &[-1.0, 1.0], 1e-8);
    all_close(&values(&q.precisions().flatten(0, 1)), &[400.0; 2], 1e-4);
    all_close(&values(&q.weights()), &[0.5; 2], 1e-8);
}

/// A tilted double well, and the negative evidence lower bound of two Gaussians by the trapezoidal rule: parameters
/// (m₁, m₂, ln s₁, ln s₂, ln π₁/π₂).
fn tilted(t: f64) -> f64 {
    2.0 * (t * t - 1.0).powi(2) + 0.3 * t
}

fn negative_bound(p: [f64; 5]) -> f64 {
    let pi = 1.0 / (1.0 + (-p[4]).exp());
    let (step, points) = (0.002, 10_001);
    let at = |i: i32| {
        let t = -10.0 + step * f64::from(i);
        let terms = [pi.ln() + log_normal(t, p[0], p[2].exp()), (1.0 - pi).ln() + log_normal(t, p[1], p[3].exp())];
        let largest = terms[0].max(terms[1]);
        let log_q = largest + ((terms[0] - largest).exp() + (terms[1] - largest).exp()).ln();
        log_q.exp() * (tilted(t) + log_q)
    };
    (0..points).map(at).sum::<f64>() * step
}

/// The trapezoidal rule for N(0, 1): on ln q, whose singularities lie near the real line, better than Gauss's.
fn trapezoid() -> (Tensor, Tensor) {
    let z = Tensor::linspace(-9.0, 9.0, 361, (Kind::Double, Device::Cpu));
    let share = (z.square() * -0.5).exp();
    (z.unsqueeze(1), &share / share.sum(Kind::Double))
}

/// Where the rule settles with expectations by quadrature, the bound has no slope, by central differences with an error of
/// 10⁻⁸ times a third derivative; and both wells have their component.
#[test]
fn the_fixed_point_is_stationary() {
    let (z, share) = trapezoid();
    let start = Tensor::from_slice(&[-0.3, 0.4]).reshape([2, 1]);
    let mut q = MixtureOfGaussians::new(&start, 4.0).unwrap().lr(0.2).weight_lr(0.3);
    let mut bound = f64::INFINITY;
    for _ in 0..400 {
        bound = q.step_at(|t| sums(&((t.square() - 1.0).square() * 2.0 + t * 0.3)), &z, &share).unwrap();
    }
    let (m, s, w) = (values(&q.means().flatten(0, 1)), values(&q.precisions().flatten(0, 1)), values(&q.weights()));
    let found = [m[0], m[1], s[0].ln(), s[1].ln(), (w[0] / w[1]).ln()];
    close(bound, negative_bound(found), 1e-9);
    for i in 0..5 {
        let moved = |by: f64| {
            let mut p = found;
            p[i] += by;
            negative_bound(p)
        };
        close((moved(1e-4) - moved(-1e-4)) / 2e-4, 0.0, 1e-6);
        // And it is a minimum.
        assert!(moved(0.05).min(moved(-0.05)) > negative_bound(found), "{found:?}");
    }
    assert!(m[0] < -0.8 && m[1] > 0.7 && w[0] > w[1], "{found:?}");
}

/// Samples instead of nodes: a run settles around the same point. Averages over 600 steps, within four standard errors of
/// batch means (20 batches of 30 steps).
#[test]
fn samples_settle_at_the_fixed_point() {
    let loss = |t: &Tensor| sums(&((t.square() - 1.0).square() * 2.0 + t * 0.3));
    let (z, share) = trapezoid();
    let start = Tensor::from_slice(&[-0.8, 0.8]).reshape([2, 1]);
    let new = || MixtureOfGaussians::new(&start, 8.0).unwrap();
    let mut exact = new().lr(0.2).weight_lr(0.3);
    for _ in 0..400 {
        exact.step_at(loss, &z, &share).unwrap();
    }
    let mut q = new().lr(0.02).weight_lr(0.02).expectation(Expectation::Antithetic { pairs: 10 }).seed(1);
    let mut batches = vec![Vec::new(); 2];
    for step in 0..900 {
        q.step(loss).unwrap();
        if step >= 300 {
            for (batch, m) in batches.iter_mut().zip(values(&q.means().flatten(0, 1))) {
                batch.push(m);
            }
        }
    }
    for (batch, expected) in batches.iter().zip(values(&exact.means().flatten(0, 1))) {
        let means: Vec<f64> = batch.chunks(30).map(|b| b.iter().sum::<f64>() / 30.0).collect();
        let (mean, error) = support::mean_and_error(&means);
        assert!(error < 0.01, "{error}");
        // The step size's own bias is of the order of ρ times the variance of the mean.
        close(mean, expected, 4.0 * error + 2e-3);
    }
}

/// Components have no adversarial point, and would silently be evaluated at their means.
#[test]
fn an_expectation_without_meaning_is_refused() {
    let start = Tensor::from_slice(&[-0.5, 0.5]).reshape([2, 1]);
    for sampled in [true, false] {
        let mut q = MixtureOfGaussians::new(&start, 10.0).unwrap().expectation(Expectation::Adversarial { sampled });
        let e = q.step(|theta| theta.square().sum_dim_intlist(1, false, None::<Kind>)).unwrap_err().to_string();
        assert!(e.contains("`expectation`") && e.contains("no adversarial point"), "{e}");
        assert_eq!(values(&q.means()), values(&start));
    }
}

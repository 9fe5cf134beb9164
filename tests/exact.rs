//! Known answers: published recurrences to the last digit, fixed points, and variational problems in one weight.
//!
//! "Reference" is the collection of float64 values computed independently of this crate when it was designed.

// Digits as the reference has them.
#![allow(clippy::unreadable_literal)]

use support::{
    Quadrature, all_close, close, given, mean_and_error, params, state, values, weight, with_exact_expectations,
};
use tch::{Kind, Tensor};
use tch_blr::rows::StepLength;
use tch_blr::rule::Row;
use tch_blr::rule::Rule;
use tch_blr::{Adam, DiagonalGaussian, Expectation, Ivon, Optimizer, Philox, RmsProp, Sgd, Statistic, Vadam, Von};

/// The means after steps with these gradients, from 0.5.
fn trajectory(rule: impl Rule, lr: f64, gradients: [f64; 3]) -> [f64; 3] {
    let w = weight(&[0.5]);
    let mut opt = rule.builder().build(params(&w), lr).unwrap();
    gradients.map(|g| {
        opt.step(|| (&w * g).sum(Kind::Double)).unwrap();
        values(&w)[0]
    })
}

const GRADIENTS: [f64; 3] = [1.0, 0.5, -0.25];

#[test]
fn sgd_rmsprop_and_adam_take_the_reference_steps() {
    for (ours, reference) in [
        (trajectory(Sgd::default().momentum(0.9), 0.1, GRADIENTS), [0.4, 0.26, 0.159]),
        (trajectory(RmsProp::default(), 0.01, GRADIENTS), [0.400000009999999, 0.355098688525563, 0.37710910614536497]),
        (trajectory(Adam::default(), 0.1, GRADIENTS), [0.400000001, 0.3067820382981611, 0.25041590149632964]),
    ] {
        all_close(&ours, &reference, 1e-14);
    }
}

#[test]
fn ivon_takes_the_reference_step() {
    for (rescale, mean) in [(true, 0.376928898970344), (false, 0.3881171808821309)] {
        let w = weight(&[0.5]);
        let rule = Ivon::default().ess(10.0).weight_decay(0.1).beta2(0.999).rescale_lr(rescale);
        let mut opt = rule.noise(given(1, &[&[0.3]])).build(params(&w), 0.1).unwrap();
        let mut theta = 0.0;
        opt.step(|| {
            theta = values(&w)[0];
            w.square().sum(Kind::Double)
        })
        .unwrap();
        close(theta, 0.5 + 0.09045340337332909, 1e-15);
        close(state(&opt, "hess")[0], 1.0001750013555626, 1e-15);
        close(state(&opt, "momentum")[0], 0.11809068067466578, 1e-15);
        close(values(&w)[0], mean, 1e-15);
    }
}

/// L = θ², ten examples, prior and initial precision 1.
#[test]
fn vadam_takes_the_reference_step() {
    let w = weight(&[0.5]);
    let rule = Vadam::default().ess(10.0).weight_decay(0.1);
    let mut opt = rule.noise(given(1, &[&[0.3]])).build(params(&w), 0.01).unwrap();
    let mut theta = 0.0;
    opt.step(|| {
        theta = values(&w)[0];
        w.square().sum(Kind::Double)
    })
    .unwrap();
    close(theta, 0.8, 1e-15);
    close(values(&w)[0], 0.4902941176470588, 1e-15);
}

/// Two points on a line: x = (1, 2), y = (1, 3), unit noise, prior precision 1. Its posterior is N(7/6, 1/6).
struct Regression {
    w: Tensor,
    x: Tensor,
    y: Tensor,
}

impl Regression {
    const MEAN: f64 = 7.0 / 6.0;

    fn new() -> Self {
        Regression { w: weight(&[0.5]), x: Tensor::from_slice(&[1.0, 2.0]), y: Tensor::from_slice(&[1.0, 3.0]) }
    }

    fn losses(&self) -> Tensor {
        0.5 * (&self.x * &self.w - &self.y).square()
    }

    /// Mean and precision after `steps` steps of antithetic evaluations at m ± σ. These two points of equal weight
    /// integrate second-degree polynomials exactly, which is all that a linear model asks for.
    fn fixed_point<R: Row<Posterior = DiagonalGaussian>>(&self, rule: R, lr: f64, steps: usize) -> (f64, f64) {
        let mut opt = rule.builder().noise(given(steps, &[&[1.0]])).build(params(&self.w), lr).unwrap();
        for _ in 0..steps {
            opt.step(|| self.losses()).unwrap();
        }
        (values(&self.w)[0], values(&opt.posterior().unwrap().precision("w").unwrap())[0])
    }
}

fn vogn() -> Von {
    Von::vogn().ess(2.0).weight_decay(0.5).beta1(0.0).beta2(0.9)
}

#[test]
fn vogn_takes_the_reference_step() {
    let problem = Regression::new();
    let mut opt = vogn().noise(given(1, &[&[0.3]])).build(params(&problem.w), 0.1).unwrap();
    let mut gradients = Vec::new();
    opt.step(|| {
        gradients = values(&(&problem.x * (&problem.x * &problem.w - &problem.y)));
        problem.losses()
    })
    .unwrap();
    all_close(&gradients, &[-0.3267949192431122, -3.307179676972449], 1e-14);
    close(state(&opt, "hess")[0], 1.4522116167511352, 1e-14);
    close(values(&problem.w)[0], 0.5802672868382761, 1e-14);
}

/// Per-example squares are the empirical Fisher, not the Hessian: on least squares OGN and VOGN find the exact mean and
/// miss the exact precision 6 on either side (reference).
#[test]
fn ogn_and_vogn_miss_the_precision_of_least_squares() {
    let (mean, precision) = Regression::new().fixed_point(vogn().expectation(Expectation::Delta), 0.2, 300);
    close(mean, Regression::MEAN, 1e-8);
    close(precision, 2.805555555555556, 1e-8);
    let antithetic = vogn().expectation(Expectation::Antithetic { pairs: 1 });
    let (mean, precision) = Regression::new().fixed_point(antithetic, 0.2, 300);
    close(mean, Regression::MEAN, 1e-8);
    close(precision, 5.757979896374245, 1e-8);
}

#[test]
fn price_finds_the_precision_of_least_squares() {
    let von = vogn().expectation(Expectation::Antithetic { pairs: 1 }).hessian(Statistic::Price);
    let ivon = Ivon::default()
        .ess(2.0)
        .weight_decay(0.5)
        .beta1(0.0)
        .beta2(0.9)
        .expectation(Expectation::Antithetic { pairs: 1 })
        .rescale_lr(false);
    for (mean, precision) in
        [Regression::new().fixed_point(von, 0.2, 300), Regression::new().fixed_point(ivon, 0.2, 300)]
    {
        close(mean, Regression::MEAN, 1e-8);
        close(precision, 6.0, 1e-8);
    }
}

#[test]
fn quadrature_integrates_moments() {
    for n in [40, 60] {
        let quadrature = Quadrature::new(n);
        close(quadrature.expect(|_| 1.0), 1.0, 1e-12);
        close(quadrature.expect(|z| z.powi(8)), 105.0, 1e-10);
        close(quadrature.expect(f64::exp), 0.5f64.exp(), 1e-12);
    }
}

/// A variational problem in one weight: prior N(0, 1) and one observation.
struct Problem {
    gradient: fn(f64) -> f64,
    loss: fn(&Tensor) -> Tensor,
    /// Of the best Gaussian (reference).
    mean: f64,
    precision: f64,
}

/// x = 1, y = 1
const LOGISTIC: Problem = Problem {
    gradient: |theta| -1.0 / (1.0 + theta.exp()),
    loss: |theta| (-theta).softplus(),
    mean: 0.4131268059796806,
    precision: 1.2064642957005864,
};

/// Rate e^θ, y = 3
const POISSON: Problem = Problem {
    gradient: |theta| theta.exp() - 3.0,
    loss: |theta| theta.exp() - 3.0 * theta,
    mean: 0.6874227290642586,
    precision: 3.312577270935744,
};

fn ivon() -> Ivon {
    Ivon::default().ess(1.0).weight_decay(1.0).beta1(0.0).rescale_lr(false)
}

const ADAM: StepLength = StepLength::Adam { beta: 0.9 };

#[test]
fn with_exact_expectations_the_best_gaussian_is_found() {
    let von = Von::default().ess(1.0).weight_decay(1.0).hessian(Statistic::Price);
    for p in [LOGISTIC, POISSON] {
        for (mean, precision) in [
            with_exact_expectations(ivon().beta2(0.9), 0.1, 1500, p.gradient),
            with_exact_expectations(von.beta2(0.9), 0.1, 1500, p.gradient),
            // How long a step is does not decide where steps end.
            with_exact_expectations(ivon().beta2(0.9).step_length(ADAM).max_growth(2.0), 0.1, 1500, p.gradient),
            with_exact_expectations(von.beta2(0.9).step_length(ADAM), 0.1, 1500, p.gradient),
        ] {
            close(mean, p.mean, 1e-8);
            close(precision, p.precision, 1e-8);
        }
    }
    // E[e^θ] = exp(m + σ²/2) is the Poisson curvature.
    close(POISSON.precision, 1.0 + (POISSON.mean + 0.5 / POISSON.precision).exp(), 1e-12);
}

/// Where IVON's mean and precision settle if f is as noisy as one antithetic pair makes it: E\[g\] + δm = 0 and
/// E\[r(f-h) + ½ r²(f-h)²/S\] = 0, the second of which puts h about ½ r Var(f)/S above E\[f\].
fn settles_at(p: &Problem, r: f64) -> (f64, f64) {
    let quadrature = Quadrature::new(60);
    let (mut mean, mut s) = (p.mean, p.precision);
    for _ in 0..2000 {
        let sigma = 1.0 / s.sqrt();
        let g = quadrature.expect(|z| (p.gradient)(mean + sigma * z));
        let f = |z: f64| 0.5 * z / sigma * ((p.gradient)(mean + sigma * z) - (p.gradient)(mean - sigma * z));
        let h = s - 1.0;
        let drift = quadrature.expect(|z| (f(z) - h) + 0.5 * r * (f(z) - h).powi(2) / s);
        mean -= 0.1 * (g + mean) / s;
        s += 0.1 * drift;
    }
    (mean, s)
}

#[test]
fn the_bias_of_the_retraction_halves_with_its_step() {
    for p in [LOGISTIC, POISSON] {
        let bias = |r| {
            let (mean, precision) = settles_at(&p, r);
            [mean - p.mean, precision - p.precision]
        };
        let [coarse, fine] = [bias(1e-3), bias(5e-4)];
        assert!(coarse[1] > 0.0);
        for (coarse, fine) in coarse.iter().zip(fine) {
            // What is left is of second order in r.
            close(coarse / fine, 2.0, 0.01);
        }
    }
}

/// Mean and precision of the optimizer itself, with their standard errors, over the second half of a run from 0.
///
/// One tensor holds many copies of the problem, whose noise is independent, so that the spread of the copies' averages
/// over time gives the error.
fn settled(p: &Problem, r: f64) -> [(f64, f64); 2] {
    const COPIES: usize = 512;
    let w = weight(&[0.0; COPIES]);
    let rule = ivon().beta2(1.0 - r).expectation(Expectation::Antithetic { pairs: 1 });
    let mut opt: Optimizer<Ivon> = rule.noise(Philox { seed: 1 }).build(params(&w), r).unwrap();
    let mut totals = [Tensor::zeros_like(&w), Tensor::zeros_like(&w)].map(|t| t.detach());
    // The start is forgotten by a factor of exp(-20) when averaging begins.
    let half = (20.0 / r) as usize;
    for step in 0..2 * half {
        opt.step(|| (p.loss)(&w).sum(Kind::Double)).unwrap();
        if step >= half {
            totals[0] += w.detach();
            totals[1] += opt.state("w", "hess").unwrap() + 1.0;
        }
    }
    totals.map(|t| mean_and_error(&values(&(t / half as f64))))
}

/// Four standard errors; that mean and precision go on fluctuating, which `settles_at` leaves out, is less than one.
#[test]
fn ivon_settles_at_the_best_gaussian() {
    for (p, bias_shows) in [(LOGISTIC, false), (POISSON, true)] {
        for r in [0.02, 0.01] {
            let expected = settles_at(&p, r);
            let [(mean, mean_error), (precision, precision_error)] = settled(&p, r);
            close(mean, expected.0, 4.0 * mean_error);
            close(precision, expected.1, 4.0 * precision_error);
            assert_eq!((precision - p.precision).abs() > 4.0 * precision_error, bias_shows, "{precision}");
        }
    }
}

/// A state that the configuration has no use for takes no memory, and starts anew when it is wanted: momentum that is
/// switched on after a step begins at b = 0, as in the first step.
#[test]
fn a_state_exists_while_it_is_of_use() {
    use tch::{Device, Kind, nn::Init, nn::VarStore};

    use tch_blr::{Adam, RmsProp, Sgd};
    let vs = VarStore::new(Device::Cpu);
    let w = vs.root().var("w", &[1], Init::Const(1.0));
    let mut opt = Sgd::default().dampening(0.5).build(&vs, 0.25).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sgd.safetensors");
    let step = |opt: &mut tch_blr::Optimizer<Sgd>| opt.step(|| (&w * 4.0).sum(Kind::Float)).unwrap();
    step(&mut opt);
    step(&mut opt);
    assert_eq!(w.double_value(&[0]), 1.0 - 2.0); // no dampening without momentum
    assert!(opt.state("w", "momentum").is_none());
    opt.save(&path).unwrap();
    opt.configure(|c| c.momentum(0.5)).unwrap();
    step(&mut opt);
    assert_eq!(opt.state("w", "momentum").unwrap().double_value(&[0]), 2.0);
    opt.load(&path).unwrap();
    assert!(opt.state("w", "momentum").is_none() && w.double_value(&[0]) == -1.0);

    let adam = Adam::default().build(&vs, 0.1).unwrap();
    assert!(adam.state("w", "square").is_some() && adam.state("w", "square_max").is_none());
    let centered = RmsProp::default().centered(true).build(&vs, 0.1).unwrap();
    assert!(centered.state("w", "mean_gradient").is_some() && centered.state("w", "momentum").is_none());
}

/// Gradients computed elsewhere give the step that the optimizer's own backward pass gives.
#[test]
fn given_gradients_take_the_same_step() {
    use tch::{Device, Kind, Tensor, nn::VarStore};
    use tch_blr::{Derivatives, Ivon, Philox};
    let derivatives = |loss, gradients| Derivatives { loss, examples: None, gradients, squares: Vec::new() };
    let run = |given: bool| {
        let vs = VarStore::new(Device::Cpu);
        let w = vs.root().var("w", &[3], tch::nn::Init::Const(0.5));
        let mut opt = Ivon::default().ess(100.0).noise(Philox { seed: 3 }).build(&vs, 0.1).unwrap();
        for _ in 0..3 {
            let evaluation = opt.perturbed().unwrap();
            let loss = (&w * 2.0 - 1.0).square().sum(Kind::Float);
            if given {
                let gradient = Tensor::run_backward(&[&loss], &[&w], false, false).remove(0);
                evaluation.step(derivatives(loss.double_value(&[]), vec![Some(gradient)])).unwrap();
            } else {
                evaluation.step(loss).unwrap();
            }
        }
        let e = opt.perturbed().unwrap();
        let short = e.step(derivatives(0.0, Vec::new())).unwrap_err().to_string();
        assert!(short.contains("expected 1"), "{short}");
        let e = opt.perturbed().unwrap();
        let flat = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        let shape = e.backward(derivatives(0.0, vec![Some(flat)])).unwrap_err().to_string();
        assert!(shape.contains("`w`") && shape.contains("[3]"), "{shape}");
        Vec::<f32>::try_from(w.detach()).unwrap()
    };
    assert_eq!(run(true), run(false));
}

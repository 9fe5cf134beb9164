//! Noisy K-FAC: the factors against definitions, the posterior against exact answers and its own samples.

use support::{F64, all_close, chirp, mean_and_error, values};
use tch::nn::{ConvConfig, LinearConfig, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::{Error, Expectation, KroneckerGaussian, KroneckerParameter, Labels, NoisyKfac, Philox, nn};

fn store() -> VarStore {
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(Kind::Double);
    vs
}

/// Variables with these values, in order of their names.
fn fill(vs: &VarStore) {
    let mut variables: Vec<_> = vs.variables().into_iter().collect();
    variables.sort_by(|a, b| a.0.cmp(&b.0));
    for (i, (_, mut w)) in variables.into_iter().enumerate() {
        let value = chirp(&w.size(), i as f64) * 0.6;
        tch::no_grad(|| w.copy_(&value));
    }
}

fn without_bias() -> LinearConfig {
    LinearConfig { bias: false, ..LinearConfig::default() }
}

/// Squared error of a linear model has the Hessian I ⊗ XᵀX/(Nσ²), which is the Fisher information; so one step of size
/// one finds the exact posterior, for one output and for several, and whatever the samples of a pair are.
#[test]
fn linear_regression_is_solved_in_one_step() {
    let (n, variance, delta) = (7, 0.25, 0.1);
    let x = chirp(&[n, 3], 0.2);
    for (outputs, labels, expectation) in [
        (1, Labels::Exact, Expectation::Antithetic { pairs: 1 }),
        (1, Labels::Sampled, Expectation::Antithetic { pairs: 2 }),
        (2, Labels::Exact, Expectation::Delta),
        (2, Labels::Exact, Expectation::Antithetic { pairs: 1 }),
    ] {
        let vs = store();
        let layer = nn::linear(vs.root(), 3, outputs, without_bias());
        fill(&vs);
        let y = chirp(&[n, outputs], 1.2);
        let rule = NoisyKfac::default().ess(n as f64).weight_decay(delta).split_damping(false).labels(labels);
        let rule = rule.expectation(expectation).beta1(0.0);
        let mut opt = rule.noise(Philox { seed: 1 }).build(&vs, 1.0).unwrap();
        opt.step(|| nn::squared_error(&layer.forward(&x), &y, variance)).unwrap();
        let q = opt.posterior().unwrap();
        let prior = Tensor::eye(3, F64) * (delta * n as f64);
        let one = x.tr().matmul(&x) / variance + prior;
        let exact = Tensor::eye(outputs, F64).kron(&one);
        all_close(&values(q.full().unwrap().precision_matrix()), &values(&exact), 1e-11);
        let mean = one.inverse().matmul(&x.tr()).matmul(&y).tr() / variance;
        all_close(&values(&q.mean("weight").unwrap()), &values(&mean), 1e-12);
    }
}

/// The points at which the loss is evaluated: in the first step of precision λ(1+√δ)², in the second of λ Ĝ ⊗ Â with damping
/// split as the row's documentation says.
#[test]
fn samples_have_the_covariance_of_a_matrix_normal() {
    let vs = store();
    let layer = nn::linear(vs.root(), 3, 2, without_bias());
    fill(&vs);
    let (x, y) = (chirp(&[5, 3], 0.2), chirp(&[5, 2], 1.2));
    let (delta, ess) = (0.04f64, 30.0);
    let rule = NoisyKfac::default().ess(ess).weight_decay(delta).labels(Labels::Observed);
    let rule = rule.expectation(Expectation::MonteCarlo { samples: 4000 });
    let mut opt = rule.noise(Philox { seed: 4 }).build(&vs, 0.0).unwrap();
    let mut drawn = || {
        let mut points = Vec::new();
        opt.step(|| {
            points.push(layer.ws.detach().copy().reshape([-1]));
            nn::squared_error(&layer.forward(&x), &y, 1.0)
        })
        .unwrap();
        let [g, a] = ["row_factor", "column_factor"].map(|name| opt.state("weight", name).unwrap());
        (Tensor::stack(&points, 0) - layer.ws.detach().reshape([-1]), g, a, opt.posterior().unwrap())
    };
    let (first, g, a, q) = drawn();
    has_covariance(&first, &(Tensor::eye(6, F64) / (ess * (1.0 + delta.sqrt()).powi(2))));

    let trace = |t: &Tensor| t.trace().double_value(&[]);
    let pi = ((trace(&a) / 3.0) / (trace(&g) / 2.0)).sqrt();
    let damped = |t: &Tensor, by: f64| t + Tensor::eye(t.size()[0], F64) * by;
    let precision = damped(&g, delta.sqrt() / pi).kron(&damped(&a, delta.sqrt() * pi)) * ess;
    all_close(&values(q.full().unwrap().precision_matrix()), &values(&precision), 1e-10);
    has_covariance(&drawn().0, &precision.inverse());
    assert!(precision.get(0).get(1).double_value(&[]).abs() > 1.0, "nothing to rotate");
}

/// Means of zero, and every element of the second moment, within 4.5 standard errors √((Σᵢⱼ² + ΣᵢᵢΣⱼⱼ)/K): for 6 weights 27
/// numbers, of which a right sampler fails one with a probability below 2e-4.
fn has_covariance(d: &Tensor, covariance: &Tensor) {
    let n = d.size()[0] as f64;
    let variance = covariance.diagonal(0, 0, 1);
    let sd = ((covariance.square() + variance.outer(&variance)) / n).sqrt();
    let worst = ((d.tr().matmul(d) / n - covariance) / sd).abs().max().double_value(&[]);
    let shift = (d.mean_dim(0, false, None::<Kind>) / (&variance / n).sqrt()).abs().max().double_value(&[]);
    assert!(worst < 4.5 && shift < 4.5, "{worst} {shift}");
}

/// δ of every example times B, by differentiating the mean loss with respect to the layer's output.
fn deltas(loss: impl Fn(&Tensor) -> Tensor, z: &Tensor) -> Tensor {
    let z = z.detach().set_requires_grad(true);
    let delta = &Tensor::run_backward(&[loss(&z)], &[&z], false, false)[0];
    delta * z.size()[0] as f64
}

fn second_moment(x: &Tensor) -> Tensor {
    x.tr().matmul(x) / x.size()[0] as f64
}

fn assert_state(opt: &tch_blr::Optimizer<NoisyKfac>, name: &str, rows: &Tensor, columns: &Tensor) {
    all_close(&values(&opt.state(name, "row_factor").unwrap()), &values(rows), 1e-13);
    all_close(&values(&opt.state(name, "column_factor").unwrap()), &values(columns), 1e-13);
}

/// Every factor of a network with a convolution, a hidden layer that is applied twice, and a head, from the definitions.
#[test]
fn factors_are_those_of_the_definition() {
    let vs = store();
    let root = vs.root();
    let conv = nn::conv2d(&root / "conv", 2, 3, 2, ConvConfig { padding: 1, ..ConvConfig::default() });
    let twice = nn::linear(&root / "twice", 12, 12, LinearConfig::default());
    let head = nn::linear(&root / "head", 12, 4, LinearConfig::default());
    fill(&vs);
    let (images, classes) = (chirp(&[5, 2, 3, 1], 0.3), Tensor::from_slice(&[0i64, 3, 1, 1, 2]));
    // [5, 2, 3, 1] → [5, 3, 4, 2] → mean over the last → [5, 12]
    let after_conv = |z: &Tensor| z.tanh().mean_dim(3i64, false, None::<Kind>).reshape([5, 12]);
    let ce = |z: &Tensor| z.cross_entropy_loss::<Tensor>(&classes, None, tch::Reduction::Mean, -100, 0.0);
    let after_second = |z: &Tensor| ce(&head.forward(&z.tanh()));
    let after_first = |z: &Tensor| after_second(&twice.forward(&z.tanh()));
    let z0 = conv.forward(&images).detach();
    let a1 = after_conv(&z0);
    let z1 = twice.forward(&a1).detach();
    let z2 = twice.forward(&z1.tanh()).detach();
    let z3 = head.forward(&z2.tanh()).detach();
    let forward = || head.forward(&twice.forward(&twice.forward(&after_conv(&conv.forward(&images))).tanh()).tanh());

    let rule = NoisyKfac::default().labels(Labels::Observed).expectation(Expectation::Delta);
    let mut opt = rule.build(&vs, 0.0).unwrap();
    opt.step(|| ce(&forward())).unwrap();
    let one = Tensor::ones([1, 1], F64);
    let d3 = deltas(ce, &z3);
    assert_state(&opt, "head.weight", &second_moment(&d3), &second_moment(&z2.tanh()));
    assert_state(&opt, "head.bias", &one, &second_moment(&d3));
    // Two positions: A adds them and G averages.
    let both = Tensor::cat(&[deltas(after_first, &z1), deltas(after_second, &z2)], 0);
    let inputs = second_moment(&a1) + second_moment(&z1.tanh());
    assert_state(&opt, "twice.weight", &second_moment(&both), &inputs);
    assert_state(&opt, "twice.bias", &(&one * 2.0), &second_moment(&both));
    // Patches by libtorch's own unfold.
    let patches = images.im2col([2, 2], [1, 1], [1, 1], [1, 1]).transpose(1, 2).reshape([-1, 8]);
    let d0 = deltas(|z| after_first(&twice.forward(&after_conv(z))), &z0);
    let d0 = d0.permute([0, 2, 3, 1]).reshape([-1, 3]);
    assert_eq!(d0.size(), [40, 3]);
    assert_state(&opt, "conv.weight", &second_moment(&d0), &(second_moment(&patches) * 8.0));
    assert_state(&opt, "conv.bias", &(&one * 8.0), &second_moment(&d0));

    // Λ = diag(p) - ppᵀ is the Fisher information of the logits.
    let p = z3.softmax(-1, Kind::Double);
    let fisher = (p.diag_embed(0, 1, 2) - p.unsqueeze(2) * p.unsqueeze(1)).mean_dim(0i64, false, None::<Kind>);
    let with = |labels, seed| {
        let rule = rule.labels(labels).noise(Philox { seed });
        let mut opt = rule.build(&vs, 0.0).unwrap();
        opt.step(|| nn::cross_entropy(&forward(), &classes)).unwrap();
        opt
    };
    let exact = with(Labels::Exact, 0);
    assert_state(&exact, "head.weight", &fisher, &second_moment(&z2.tanh()));
    // Sampled labels are unbiased, for a hidden layer too: at 4.5 standard errors of 400 draws (10 + 78 elements: 6e-4).
    let draws: Vec<_> = (0..400).map(|seed| with(Labels::Sampled, seed)).collect();
    for (name, rows) in [("head.weight", 4), ("twice.weight", 12)] {
        let expected = values(&exact.state(name, "row_factor").unwrap());
        let all: Vec<_> = draws.iter().map(|opt| values(&opt.state(name, "row_factor").unwrap())).collect();
        for i in 0..rows * rows {
            let (mean, error) = mean_and_error(&all.iter().map(|x| x[i]).collect::<Vec<_>>());
            support::close(mean, expected[i], 4.5 * error + 1e-12);
            assert!(error > 0.0, "the same labels in every draw");
        }
    }
}

/// Errors name the parameter and the way out, and nothing has changed then.
#[test]
fn what_has_no_factors_is_refused() {
    let x = chirp(&[4, 3], 0.1);
    let y = chirp(&[4, 2], 0.5);
    let refused = |vs: &VarStore, labels, loss: &dyn Fn() -> Tensor| {
        let rule = NoisyKfac::default().ess(10.0).labels(labels);
        let mut opt = rule.noise(Philox { seed: 0 }).build(vs, 0.1).unwrap();
        let before: Vec<_> = vs.trainable_variables().iter().map(values).collect();
        let e = opt.step(loss).unwrap_err();
        assert_eq!(vs.trainable_variables().iter().map(values).collect::<Vec<_>>(), before);
        assert_eq!((opt.steps(), opt.state("weight", "momentum").map(|m| m.abs().max().double_value(&[]))).0, 0);
        e
    };
    let square = |z: Tensor| (z - &y).square().mean(Kind::Double);
    let way_out = |e: &Error, name: &str| {
        let text = e.to_string();
        assert!(matches!(e, Error::Parameter { .. }), "{text}");
        assert!(
            text.contains(&format!("`{name}`")) && text.contains("tch_blr::nn") && text.contains("freeze"),
            "{text}"
        );
    };

    let vs = store();
    let plain = tch::nn::linear(vs.root(), 3, 2, without_bias());
    way_out(&refused(&vs, Labels::Observed, &|| square(plain.forward(&x))), "weight");

    let vs = store();
    let layer = nn::linear(vs.root(), 3, 2, without_bias());
    let mixed = || square(layer.forward(&x)) + layer.ws.square().sum(Kind::Double);
    way_out(&refused(&vs, Labels::Observed, &mixed), "weight");
    let e = refused(&vs, Labels::Sampled, &|| square(layer.forward(&x)));
    assert!(matches!(e, Error::Likelihood(_)) && e.to_string().contains("squared_error"), "{e}");

    let vs = store();
    let layer = nn::linear(vs.root() / "a", 3, 2, LinearConfig::default());
    let norm = nn::layer_norm(vs.root() / "norm", vec![2], tch::nn::LayerNormConfig::default());
    way_out(&refused(&vs, Labels::Observed, &|| square(norm.forward(&layer.forward(&x)))), "norm.weight");

    let vs = store();
    let conv = nn::conv2d(vs.root(), 2, 2, 1, ConvConfig { groups: 2, bias: false, ..ConvConfig::default() });
    let images = chirp(&[4, 2, 1, 1], 0.3);
    way_out(&refused(&vs, Labels::Observed, &|| square(conv.forward(&images).reshape([4, 2]))), "weight");

    let vs = store();
    let (a, b) = (nn::linear(vs.root() / "a", 3, 2, without_bias()), nn::linear(vs.root() / "b", 1, 1, without_bias()));
    let ambiguous = || square(b.forward(&a.forward(&x).reshape([8, 1])).reshape([4, 2]));
    let e = refused(&vs, Labels::Observed, &ambiguous);
    assert!(matches!(e, Error::PerExample(_)) && e.to_string().contains("ambiguous"), "{e}");
}

/// A parameter that the loss does not depend on is left alone, as in every row: its prior pulls once there is data.
#[test]
fn an_unused_layer_is_left_alone() {
    let vs = store();
    let layer = nn::linear(vs.root() / "used", 3, 2, LinearConfig::default());
    let unused = nn::linear(vs.root() / "unused", 3, 2, LinearConfig::default());
    fill(&vs);
    let (x, y) = (chirp(&[5, 3], 0.2), chirp(&[5, 2], 1.2));
    let (before, used) = (values(&unused.ws), values(&layer.ws));
    let rule = NoisyKfac::default().ess(100.0).weight_decay(0.1).beta1(0.0).noise(Philox { seed: 0 });
    let mut opt = rule.build(&vs, 0.25).unwrap();
    opt.step(|| nn::squared_error(&layer.forward(&x), &y, 1.0)).unwrap();
    assert_eq!(values(&unused.ws), before);
    assert_ne!(values(&layer.ws), used);
}

/// A prior whose bases are of another matrix than the layer's is refused before the first step.
#[test]
fn a_prior_of_another_matrix_is_refused() {
    let vs = store();
    let conv = nn::conv2d(vs.root() / "conv", 2, 4, 3, ConvConfig { bias: false, ..ConvConfig::default() });
    let eye = |n: i64| Tensor::eye(n, F64);
    let q = |left: i64, right: i64| {
        let (mean, precision) = (Tensor::zeros([4, 2, 3, 3], F64), Tensor::ones([4, 2, 3, 3], F64));
        let (left, right) = (Some(eye(left)), Some(eye(right)));
        let name = "conv.weight".to_owned();
        KroneckerGaussian::new([KroneckerParameter { name, mean, left, right, precision }]).unwrap()
    };
    let build = |q: &KroneckerGaussian| NoisyKfac::default().ess(10.0).prior(q).build(&vs, 0.1);
    let mut opt = build(&q(4, 18)).unwrap();
    let x = chirp(&[2, 2, 5, 5], 0.1);
    opt.step(|| nn::squared_error(&conv.forward(&x).flatten(1, -1), &Tensor::zeros([2, 36], F64), 1.0)).unwrap();
    let e = build(&q(8, 9)).unwrap_err();
    assert!(e.to_string().contains("conv.weight") && e.to_string().contains("[4, 18]"), "{e}");
}

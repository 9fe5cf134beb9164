//! Laplace's approximation: evidence, prior precision and noise, subsets of the weights, predictions.

use support::{all_close, close, largest, refused, values, wave};
use tch::nn::{LinearConfig, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::fisher::{Fisher, Subnetwork};
use tch_blr::laplace::{Curvature, Laplace, Link, OutputGaussian, PriorSearch};
use tch_blr::nn::{self, Likelihood};
use tch_blr::{Adam, DiagonalGaussian, Error, Params, Posterior, Prior, Result};

fn t(x: &[f64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(x).reshape(shape)
}

fn gaussian(variance: f64) -> Likelihood {
    Likelihood::Gaussian { variance }
}

/// y = Xw without a bias, in f64, with these weights `[1, n]`.
fn line(w: &[f64]) -> (VarStore, nn::Linear) {
    let mut vs = VarStore::new(Device::Cpu);
    let layer = nn::linear(vs.root() / "line", w.len() as i64, 1, LinearConfig { bias: false, ..Default::default() });
    vs.double();
    put(&layer, w);
    (vs, layer)
}

fn put(layer: &nn::Linear, w: &[f64]) {
    let value = t(w, &layer.ws.size());
    tch::no_grad(|| layer.ws.shallow_clone().copy_(&value));
}

/// Four points of a line.
fn points() -> [Tensor; 2] {
    [t(&[1.0, 0.0, 1.0, 1.0, 1.0, 2.0, 1.0, 3.0], &[4, 2]), t(&[1.0, 2.0, 2.0, 4.0], &[4, 1])]
}

/// argmin of ‖y - Xm‖²/(2σ²) + ½p‖m‖².
fn ridge([x, y]: &[Tensor; 2], p: f64, s2: f64) -> Vec<f64> {
    let h = x.tr().matmul(x) / s2 + Tensor::eye(2, (Kind::Double, Device::Cpu)) * p;
    values(&Tensor::linalg_solve(&h, &(x.tr().matmul(y) / s2), true))
}

/// Every structure whose curvature of a line is exact.
fn of_a_line(vs: &VarStore, layer: &nn::Linear, [x, y]: &[Tensor; 2], s2: f64, p: f64) -> Vec<Laplace> {
    let (f, data, net) = (Fisher::exact().likelihood(gaussian(s2)), || [(x, y)], |x: &Tensor| layer.forward(x));
    let all = Subnetwork::new([("line.weight", vec![1, 0])]).unwrap();
    let curvatures: [Curvature; 4] = [
        f.kronecker(vs, data(), net).unwrap().into(),
        f.full(vs, data(), net).unwrap().into(),
        f.subset(vs, &all, data(), net).unwrap().into(),
        f.low_rank(5, vs, data(), net).unwrap().into(),
    ];
    curvatures.into_iter().map(|f| Laplace::new(f, p).unwrap()).collect()
}

#[test]
fn the_evidence_of_a_line_is_that_of_the_reference() {
    let data = points();
    for (p, s2, evidence) in [
        (1.175_315_711_500_835, 0.320_236_860_639_794_2, -6.021_892_535_054_913_5),
        (1.110_481_028_261_536_3, 1.0, -6.580_331_360_455_143),
        (0.7, 0.3, -6.131_428_580_032_994),
    ] {
        let (vs, layer) = line(&ridge(&data, p, s2));
        // The Gaussian process that it is: ln N(y | 0, XXᵀ/p + σ²).
        let [x, y] = &data;
        let k = x.matmul(&x.tr()) / p + Tensor::eye(4, (Kind::Double, Device::Cpu)) * s2;
        let distance = (y.tr().matmul(&Tensor::linalg_solve(&k, y, true))).double_value(&[0, 0]);
        let process = -0.5 * (distance + k.logdet().double_value(&[]) + 4.0 * std::f64::consts::TAU.ln());
        close(process, evidence, 1e-12);
        for mut laplace in of_a_line(&vs, &layer, &data, s2, p) {
            close(laplace.log_evidence().unwrap(), evidence, 1e-12);
            assert!(laplace.off_mode().unwrap().unwrap() < 1e-20);
            // From another noise and precision, without a pass over the data.
            laplace.set_variance(2.0).unwrap();
            laplace.set_precision(9.0).unwrap();
            assert!((laplace.log_evidence().unwrap() - evidence).abs() > 0.1);
            laplace.set_variance(s2).unwrap();
            laplace.set_precision_of("line.weight", p).unwrap();
            close(laplace.log_evidence().unwrap(), evidence, 1e-12);
        }
    }
}

#[test]
fn the_joint_fixed_point_is_that_of_the_reference() {
    let data = points();
    for (noise, p_, s2_, evidence) in [
        (true, 1.175_315_711_500_835, 0.320_236_860_639_794_2, -6.021_892_535_054_913_5),
        (false, 1.110_481_028_261_536_3, 1.0, -6.580_331_360_455_143),
    ] {
        let (mut p, mut s2) = (0.1, 1.0);
        let (vs, layer) = line(&[0.0, 0.0]);
        let search = if noise { PriorSearch::mackay().noise() } else { PriorSearch::mackay() };
        for _ in 0..60 {
            put(&layer, &ridge(&data, p, s2));
            let mut laplace = of_a_line(&vs, &layer, &data, s2, p).remove(1);
            let tuned = laplace.optimize_prior(&search).unwrap();
            assert!(tuned.converged && tuned.capped.is_empty(), "{tuned:?}");
            p = laplace.precisions().next().unwrap().1;
            if let Likelihood::Gaussian { variance } = laplace.likelihood() {
                s2 = variance;
            }
        }
        close(p, p_, 1e-8);
        close(s2, s2_, 1e-8);
        put(&layer, &ridge(&data, p_, s2_));
        for mut laplace in of_a_line(&vs, &layer, &data, s2_, p_) {
            let slope = laplace.slope().unwrap();
            assert!(slope.log_precisions[0].abs() < 1e-10, "{slope:?}");
            if noise {
                all_close(&values(&layer.ws), &[0.794_584_063_54, 0.920_433_110_31], 1e-10);
                close(laplace.effective_parameters().unwrap(), 1.737_775_908_584_280_8, 1e-12);
                assert!(slope.log_variance.unwrap().abs() < 1e-10, "{slope:?}");
            }
            let tuned = laplace.optimize_prior(&search).unwrap();
            close(tuned.log_evidence, evidence, 1e-12);
            close(laplace.precisions().next().unwrap().1, p_, 1e-8);
            assert!(tuned.warning().is_none());
        }
    }
}

/// A diagonal curvature has more effective parameters than there are numbers to fit: NC - γ is below 0 on the way.
#[test]
fn a_noise_is_found_with_more_weights_than_examples() {
    let (examples, weights) = (20, 300);
    let wave = |n: i64, step: f64| (Tensor::arange(n, (Kind::Double, Device::Cpu)) * step).sin();
    let (x, y) = (wave(examples * weights, 1.3).reshape([examples, weights]), wave(examples, 2.9).unsqueeze(1) * 9.0);
    let (vs, layer) = line(&values(&(wave(weights, 0.7) * 0.3)));
    let fisher = Fisher::exact().likelihood(gaussian(1.0));
    let laplace = || Laplace::new(fisher.diagonal(&vs, [(&x, &y)], |x| layer.forward(x)).unwrap(), 1.0).unwrap();
    let (mut by_steps, mut by_adam) = (laplace(), laplace());
    let tuned = by_steps.optimize_prior(&PriorSearch::mackay().noise()).unwrap();
    let slope = by_steps.slope().unwrap();
    assert!(tuned.converged && tuned.capped.is_empty(), "{tuned:?}");
    assert!(slope.log_precisions[0].abs() < 1e-6 && slope.log_variance.unwrap().abs() < 1e-6, "{slope:?}");
    let other = by_adam.optimize_prior(&PriorSearch::gradient(0.05, 3000).noise()).unwrap();
    close(tuned.log_evidence, other.log_evidence, 1e-5);
    assert!(tuned.log_evidence > laplace().log_evidence().unwrap());
}

#[test]
fn prior_means_are_given_one_after_the_other_and_a_failed_search_changes_nothing() {
    let vs = VarStore::new(Device::Cpu);
    let layer = nn::linear(vs.root() / "line", 2, 1, LinearConfig::default());
    let (x, y) = (t(&[1.0, 0.0, 1.0, 2.0], &[2, 2]).to_kind(Kind::Float), t(&[1.0, 2.0], &[2, 1]).to_kind(Kind::Float));
    let f = || Fisher::exact().likelihood(gaussian(1.0)).diagonal(&vs, [(&x, &y)], |x| layer.forward(x)).unwrap();
    let (a, b) = (("line.weight", t(&[0.5, -3.0], &[1, 2])), ("line.bias", t(&[2.0], &[1])));
    let copy = |(name, t): &(&'static str, Tensor)| [(*name, t.copy())];
    let one_by_one = Laplace::new(f(), 2.0).unwrap().prior_mean(copy(&a)).unwrap().prior_mean(copy(&b)).unwrap();
    let together = Laplace::new(f(), 2.0).unwrap().prior_mean([a, b]).unwrap();
    assert_eq!(one_by_one.log_evidence().unwrap(), together.log_evidence().unwrap());

    let far = [("line.bias", t(&[1e200], &[1]))];
    let mut laplace = Laplace::new(f(), 2.0).unwrap().prior_mean(far).unwrap();
    refused(laplace.optimize_prior(&PriorSearch::mackay().noise()), &["evidence"]);
    assert!(laplace.precisions().all(|(_, p)| p == 2.0) && laplace.likelihood() == gaussian(1.0));
}

#[test]
fn slopes_are_those_of_finite_differences() {
    let data = points();
    let (vs, layer) = line(&[0.5, 0.8]);
    for mut laplace in of_a_line(&vs, &layer, &data, 0.4, 2.0) {
        let slope = laplace.slope().unwrap();
        let h = 1e-5f64;
        let mut at = |p: f64, s2: f64| {
            laplace.set_precision(p).unwrap();
            laplace.set_variance(s2).unwrap();
            laplace.log_evidence().unwrap()
        };
        let by_p = (at(2.0 * h.exp(), 0.4) - at(2.0 * (-h).exp(), 0.4)) / (2.0 * h);
        let by_s2 = (at(2.0, 0.4 * h.exp()) - at(2.0, 0.4 * (-h).exp())) / (2.0 * h);
        close(slope.log_precisions[0], by_p, 1e-7);
        close(slope.log_variance.unwrap(), by_s2, 1e-7);
    }
}

#[test]
fn the_gradient_and_mackay_find_the_same() {
    let data = points();
    let (vs, layer) = line(&[0.5, 0.8]);
    let found = |search: PriorSearch, start: f64| {
        let mut laplace = of_a_line(&vs, &layer, &data, 0.4, start).remove(0);
        let tuned = laplace.optimize_prior(&search.noise()).unwrap();
        (laplace.precisions().next().unwrap().1, laplace.likelihood(), tuned)
    };
    let (p, Likelihood::Gaussian { variance }, tuned) = found(PriorSearch::mackay(), 1e-3) else { panic!() };
    let (other, ..) = found(PriorSearch::mackay(), 1e3);
    close(other, p, 1e-8);
    let (q, Likelihood::Gaussian { variance: by_gradient }, gradient) = found(PriorSearch::gradient(0.1, 400), 0.1)
    else {
        panic!()
    };
    close(q, p, 1e-3);
    close(by_gradient, variance, 1e-3);
    assert!(tuned.log_evidence >= gradient.log_evidence && tuned.log_evidence - gradient.log_evidence < 1e-6);
    // Few steps of Adam are steps of the learning rate, for the loops of marginal-likelihood training.
    let (q, ..) = found(PriorSearch::gradient(0.1, 1), 0.1);
    close(q.ln(), 0.1f64.ln() + 0.1, 1e-6);
}

/// σ(w) for one example of class 1 and the prior N(0, 1): ln ½ exactly.
#[test]
fn the_evidence_of_one_logistic_example() {
    let mut w = 0.0f64;
    for _ in 0..100 {
        // Newton on w = σ(-w).
        let p = 1.0 / (1.0 + w.exp());
        w -= (w - p) / (1.0 + p * (1.0 - p));
    }
    let (vs, layer) = line(&[w]);
    let (x, y) = (t(&[1.0], &[1, 1]), t(&[1.0], &[1, 1]));
    let f = Fisher::exact().likelihood(Likelihood::Bernoulli).full(&vs, [(&x, &y)], |x| layer.forward(x)).unwrap();
    let laplace = Laplace::new(f, 1.0).unwrap();
    close(laplace.log_evidence().unwrap(), -0.700_655_122_889_781_5, 1e-12);
    // The bound -(E_q[loss] + KL(q ‖ prior)) of the same q is below what it bounds.
    let q = laplace.posterior().unwrap();
    let (m, v) = (values(&q.mean("line.weight").unwrap())[0], values(&q.variance("line.weight").unwrap())[0]);
    let loss = support::Quadrature::new(40).expect(|z| (-(m + v.sqrt() * z)).exp().ln_1p());
    let kl = 0.5 * (v + m * m - 1.0 - v.ln());
    assert!(-(loss + kl) < 0.5f64.ln() && -(loss + kl) > -0.71, "{}", -(loss + kl));
}

/// Weights a and b with S = [[4, 3], [3, 6]]: what is known of one depends on whether the other is.
#[test]
fn the_rest_of_a_subset_is_known() {
    let mut vs = VarStore::new(Device::Cpu);
    let config = || LinearConfig { bias: false, ..Default::default() };
    let [a, b] = ["a", "b"].map(|name| nn::linear(vs.root() / name, 1, 1, config()));
    vs.double();
    put(&a, &[0.8]);
    put(&b, &[0.6]);
    let net = |x: &Tensor| a.forward(&x.narrow(1, 0, 1)) + b.forward(&x.narrow(1, 1, 1));
    let p = 0.5;
    // X with XᵀX = S - p.
    let x = t(&[3.5, 3.0, 3.0, 5.5], &[2, 2]).linalg_cholesky(true);
    let y = net(&x).detach();
    let f = Fisher::exact().likelihood(gaussian(1.0));
    let full = Laplace::new(f.full(&vs, [(&x, &y)], net).unwrap(), p).unwrap();
    let q = full.posterior().unwrap();
    let variance = |q: &dyn Posterior, name: &str| values(&q.variance(name).unwrap())[0];
    close(variance(&*q, "a.weight"), 0.4, 1e-12);
    close(variance(&*q, "b.weight"), 4.0 / 15.0, 1e-12);

    let at = t(&[1.0, 3.0], &[1, 2]);
    let output = full.predict(&vs, || net(&at)).unwrap();
    let forecast = output.forecast().unwrap();
    all_close(&values(&forecast.mean().unwrap()), &[2.6], 1e-12);
    all_close(&values(&forecast.epistemic().unwrap()), &[1.6], 1e-12);
    all_close(&values(&forecast.noise().unwrap()), &[1.0], 1e-15);
    all_close(&values(&forecast.variance().unwrap()), &[2.6], 1e-12);
    let density = output.log_density(&t(&[2.0], &[1, 1])).unwrap();
    all_close(&values(&density), &[-1.465_925_024_949_16], 1e-13);
    // A posterior of this crate says the same of the same matrix.
    let f_full = f.full(&vs, [(&x, &y)], net).unwrap().laplace(Prior::isotropic(p)).unwrap();
    let covariance = f_full.output_covariance(&vs, || net(&at)).unwrap();
    all_close(&values(output.covariance()), &values(&covariance), 1e-12);

    for (name, conditional, input) in [("a.weight", 0.25, [1.0, 0.0]), ("b.weight", 1.0 / 6.0, [0.0, 1.0])] {
        let only = || Params::from(&vs).only_named([name]).unwrap();
        let weights = Subnetwork::new([(name, vec![0])]).unwrap();
        let curvatures: [Curvature; 5] = [
            f.diagonal(only(), [(&x, &y)], net).unwrap().into(),
            f.kronecker(only(), [(&x, &y)], net).unwrap().into(),
            f.full(only(), [(&x, &y)], net).unwrap().into(),
            f.low_rank(1, only(), [(&x, &y)], net).unwrap().into(),
            f.subset(&vs, &weights, [(&x, &y)], net).unwrap().into(),
        ];
        let mut evidence = Vec::new();
        for f in curvatures {
            let laplace = Laplace::new(f, p).unwrap();
            let v = laplace.predict(&vs, || net(&t(&input, &[1, 2]))).unwrap();
            all_close(&values(v.covariance()), &[conditional], 1e-12);
            close(laplace.predict(only(), || net(&at)).unwrap().mean().double_value(&[0, 0]), 2.6, 1e-12);
            evidence.push(laplace.log_evidence().unwrap());
            if let Ok(q) = laplace.posterior() {
                close(variance(&*q, name), conditional, 1e-12);
                // Through the whole net, with the rest at its values.
                let outputs = q.predict_samples(&vs, 4000, || net(&t(&input, &[1, 2]))).unwrap();
                close(outputs.var(true).double_value(&[]), conditional, 0.1 * conditional);
            }
        }
        let first = evidence[0];
        for e in evidence {
            close(e, first, 1e-12);
        }
    }
}

/// A net of 3 inputs and 3 classes, in f64, a third of it in the head.
struct Net {
    vs: VarStore,
    layers: [nn::Linear; 2],
    x: Tensor,
    y: Tensor,
}

impl Net {
    fn new() -> Net {
        let mut vs = VarStore::new(Device::Cpu);
        let layers = [("body", 3, 4), ("head", 4, 3)]
            .map(|(name, i, o)| nn::linear(vs.root() / name, i, o, LinearConfig::default()));
        vs.double();
        for (i, mut w) in vs.trainable_variables().into_iter().enumerate() {
            let value = wave(&w.size(), i as f64);
            tch::no_grad(|| w.copy_(&value));
        }
        let y = Tensor::arange(20, (Kind::Int64, Device::Cpu)).remainder(3);
        Net { vs, layers, x: wave(&[20, 3], 0.3) * 2.0, y }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        self.layers[1].forward(&self.layers[0].forward(x).tanh())
    }

    fn data(&self) -> [(Tensor, Tensor); 2] {
        let part = |a, n| (self.x.narrow(0, a, n), self.y.narrow(0, a, n));
        [part(0, 13), part(13, 7)]
    }

    fn all(&self, params: impl Fn() -> Params, p: f64) -> Vec<(&'static str, Laplace)> {
        let (f, net) = (Fisher::exact(), |x: &Tensor| self.forward(x));
        let curvatures: [(_, Curvature); 4] = [
            ("diagonal", f.diagonal(params(), self.data(), net).unwrap().into()),
            ("Kronecker", f.kronecker(params(), self.data(), net).unwrap().into()),
            ("full", f.full(params(), self.data(), net).unwrap().into()),
            ("low rank", f.low_rank(100, params(), self.data(), net).unwrap().into()),
        ];
        curvatures.into_iter().map(|(name, f)| (name, Laplace::new(f, p).unwrap())).collect()
    }
}

/// Evidence and output covariance from matrices that are written out.
#[test]
fn every_structure_is_the_matrix_that_it_stands_for() {
    let net = Net::new();
    let p = 0.7;
    for head in [false, true] {
        let params = || if head { Params::from(&net.vs).last_layer().unwrap() } else { Params::from(&net.vs) };
        let eye = |n: i64| Tensor::eye(n, (Kind::Double, Device::Cpu));
        let f = Fisher::exact();
        let forward = |x: &Tensor| net.forward(x);
        let full = f.full(params(), net.data(), forward).unwrap().matrix().copy();
        // Row by row as in the Kronecker factors: [W b] of each layer.
        let kronecker = f.kronecker(params(), net.data(), forward).unwrap();
        let blocks: Vec<Tensor> = kronecker.layers().iter().map(|l| l.outputs.kron(&l.inputs)).collect();
        let matrices = [
            ("diagonal", full.diag(0).diag(0)),
            ("Kronecker", Tensor::block_diag(&blocks)),
            ("full", full.copy()),
            ("low rank", full.copy()),
        ];
        let nll = {
            let rows = net.forward(&net.x).log_softmax(-1, Kind::Double).gather(1, &net.y.unsqueeze(1), false);
            -rows.sum(Kind::Double).double_value(&[])
        };
        let theta: Vec<f64> =
            net.vs.trainable_variables().iter().skip(if head { 2 } else { 0 }).flat_map(values).collect();
        let scatter: f64 = theta.iter().map(|w| w * w).sum();
        let jacobian = tch_blr::sensitivity::jacobian(params(), || net.forward(&net.x)).unwrap();
        for ((name, laplace), (_, h)) in net.all(params, p).into_iter().zip(matrices) {
            let n = h.size()[0];
            let s = h + eye(n) * p;
            let expected = -nll - 0.5 * p * scatter + 0.5 * n as f64 * p.ln() - 0.5 * s.logdet().double_value(&[]);
            close(laplace.log_evidence().unwrap(), expected, 1e-9);
            let gamma = n as f64 - p * s.inverse().trace().double_value(&[]);
            close(laplace.effective_parameters().unwrap(), gamma, 1e-9);
            let output = laplace.predict(&net.vs, || net.forward(&net.x)).unwrap();
            assert!(values(&output.covariance().linalg_eigvalsh("L")).iter().all(|l| *l > -1e-12), "{name}");
            let reorder = |j: &Tensor| {
                if name != "Kronecker" {
                    return j.copy();
                }
                // From b, then W, to rows of [W b].
                let (mut parts, mut first) = (Vec::new(), 0);
                for l in kronecker.layers() {
                    let (out, width) = (l.outputs.size()[0], l.inputs.size()[0] - 1);
                    let b = j.narrow(2, first, out).reshape([20, 3, out, 1]);
                    let w = j.narrow(2, first + out, out * width).reshape([20, 3, out, width]);
                    parts.push(Tensor::cat(&[w, b], 3).reshape([20, 3, -1]));
                    first += out * (width + 1);
                }
                Tensor::cat(&parts, 2)
            };
            let j = reorder(&jacobian);
            let dense = j.matmul(&s.inverse()).matmul(&j.transpose(1, 2));
            assert!(largest(&(output.covariance() - dense)) < 1e-9, "{name}");
        }
    }
}

#[test]
fn a_precision_for_every_block_is_at_least_as_likely() {
    let net = Net::new();
    for (name, mut laplace) in net.all(|| Params::from(&net.vs), 0.7) {
        let one = laplace.optimize_prior(&PriorSearch::mackay()).unwrap();
        let blocks = laplace.precisions().count();
        assert_eq!(
            blocks,
            match name {
                "diagonal" => 4,
                "Kronecker" => 2,
                _ => 1,
            }
        );
        let each = laplace.optimize_prior(&PriorSearch::mackay().per_block()).unwrap();
        assert!(each.converged && each.log_evidence >= one.log_evidence - 1e-12, "{name}: {each:?} {one:?}");
        assert!(laplace.slope().unwrap().log_precisions.iter().all(|s| s.abs() < 1e-6));
        // These weights were never trained.
        assert!(each.warning().unwrap().contains("not converged"), "{name}: {each:?}");
        if let Ok(q) = laplace.posterior() {
            assert_eq!(q.len(), laplace.len());
        }
    }
}

/// What the weights' prior mean is enters by the distance alone.
#[test]
fn a_prior_mean_at_the_weights_switches_a_block_off() {
    let net = Net::new();
    let f = Fisher::exact().kronecker(&net.vs, net.data(), |x| net.forward(x)).unwrap();
    let means = |names: [&str; 2]| names.map(|name| (name.to_owned(), net.vs.variables()[name].detach().copy()));
    let mut laplace = Laplace::new(f, 1.0).unwrap().prior_mean(means(["head.weight", "head.bias"])).unwrap();
    let tuned = laplace.optimize_prior(&PriorSearch::mackay().per_block().bounds(1e-4, 1e4)).unwrap();
    assert_eq!(tuned.capped, ["p of head.weight, head.bias"]);
    assert!(laplace.precisions().any(|(names, p)| names[0] == "head.weight" && (p / 1e4 - 1.0).abs() < 1e-12));
    for (means, problem) in [
        (vec![("hea.weight", Tensor::zeros([1], (Kind::Double, Device::Cpu)))], "the curvature is not of it"),
        (vec![("head.bias", Tensor::zeros([1], (Kind::Double, Device::Cpu)))], "expected [3]"),
        (vec![("head.bias", t(&[0.0, f64::NAN, 0.0], &[3]))], "not finite"),
    ] {
        let f = Fisher::exact().diagonal(&net.vs, net.data(), |x| net.forward(x)).unwrap();
        refused(Laplace::new(f, 1.0).unwrap().prior_mean(means), &[problem]);
    }
}

#[test]
fn too_low_a_rank_is_a_lower_bound_that_says_what_it_lacks() {
    let net = Net::new();
    let forward = |x: &Tensor| net.forward(x);
    let full = Fisher::exact().full(&net.vs, net.data(), forward).unwrap();
    for rank in [3, 10, 31] {
        let f = Fisher::exact().low_rank(rank, &net.vs, net.data(), forward).unwrap();
        let u = f.vectors();
        let orthonormal = u.tr().matmul(u) - Tensor::eye(u.size()[1], (Kind::Double, Device::Cpu));
        assert!(largest(&orthonormal) < 1e-9 && f.values().size()[0] <= rank as i64);
        let rest = full.matrix() - u.matmul(&f.values().diag(0)).matmul(&u.tr());
        close(f.lost(), rest.trace().double_value(&[]), 1e-9);
        assert!(values(&rest.linalg_eigvalsh("L")).iter().all(|l| *l > -1e-9));
        assert_eq!(f.lost() > 1e-9, rank < 20, "{}", f.lost());
    }
}

#[test]
fn single_weights_are_those_of_largest_variance() {
    let net = Net::new();
    let forward = |x: &Tensor| net.forward(x);
    let q = Fisher::exact().diagonal(&net.vs, net.data(), forward).unwrap().laplace(Prior::isotropic(1.0)).unwrap();
    let weights = Subnetwork::of_largest_variance(&q, 7).unwrap();
    assert_eq!(weights.len(), 7);
    let mut all: Vec<f64> = q.names().flat_map(|n| values(&q.variance(n).unwrap())).collect();
    all.sort_by(|a, b| b.total_cmp(a));
    let mut chosen: Vec<f64> = Vec::new();
    for name in weights.names() {
        let v = values(&q.variance(name).unwrap());
        chosen.extend(weights.of(name).unwrap().iter().map(|i| v[*i as usize]));
    }
    chosen.sort_by(|a, b| b.total_cmp(a));
    assert_eq!(chosen, all[..7]);
    // Their matrix is that of the whole, restricted.
    let f = Fisher::exact().subset(&net.vs, &weights, net.data(), forward).unwrap();
    let whole = Fisher::exact().full(&net.vs, net.data(), forward).unwrap();
    let sizes = [("body.bias", 0), ("body.weight", 4), ("head.bias", 16), ("head.weight", 19)];
    let places: Vec<i64> =
        sizes.iter().flat_map(|(n, first)| weights.of(n).unwrap_or(&[]).iter().map(move |i| first + i)).collect();
    let index = Tensor::from_slice(&places);
    let expected = whole.matrix().index_select(0, &index).index_select(1, &index);
    assert!(largest(&(f.matrix() - expected)) < 1e-12);
    let laplace = Laplace::new(f, 1.0).unwrap();
    assert!(laplace.log_evidence().unwrap().is_finite() && laplace.len() == 7);
    refused(laplace.posterior(), &["Laplace::predict"]);

    for bad in [vec![("head.bias", vec![])], vec![]] {
        refused(Subnetwork::new(bad), &["subset of no weights"]);
    }
    refused(Subnetwork::new([("w", vec![2, 2])]), &["`w`", "weight 2", "twice"]);
    refused(Subnetwork::new([("w", vec![-1])]), &["`w`", "weight -1"]);
    refused(Subnetwork::new([("w", vec![0]), ("w", vec![1])]), &["`w`", "named twice"]);
    // One variable by two of its names would count it twice.
    let (vs, layer) = line(&[1.0, 2.0]);
    let tied = Params::named([("a", layer.ws.shallow_clone()), ("b", layer.ws.shallow_clone())]).unwrap();
    let twice = Subnetwork::new([("a", vec![0]), ("b", vec![0])]).unwrap();
    let [x, y] = points();
    let f = Fisher::exact().likelihood(gaussian(1.0));
    refused(f.subset(tied, &twice, [(&x, &y)], |x| layer.forward(x)), &["`b`", "tied to `a`"]);
    drop(vs);
    for k in [0, 32] {
        refused(Subnetwork::of_largest_variance(&q, k), &["`k`", &k.to_string()]);
    }
    for (name, position, problem) in [("head.bias", 3, "and it has 3"), ("haed.bias", 0, "none of this name")] {
        let weights = Subnetwork::new([(name, vec![position])]).unwrap();
        refused(Fisher::exact().subset(&net.vs, &weights, net.data(), forward), &[name, problem]);
    }
}

/// Rows (μ, V) of several examples at once.
fn logits(mu: &[f64], v: &Tensor) -> OutputGaussian {
    let c = mu.len() as i64;
    OutputGaussian::new(Likelihood::Categorical, &t(mu, &[1, c]), &v.reshape([1, c, c])).unwrap()
}

fn logit(mu: f64, v: f64) -> OutputGaussian {
    OutputGaussian::new(Likelihood::Bernoulli, &t(&[mu], &[1]), &t(&[v], &[1, 1, 1])).unwrap()
}

#[test]
fn links_have_the_reference_numbers() {
    for (mu, v, probit, exact) in
        [(1.0, 2.0, 0.678_829_471_1, 0.675_056_702_3), (2.0, 10.0, 0.711_161_065_7, 0.709_713_173_3)]
    {
        all_close(&values(&logit(mu, v).probabilities(Link::Probit).unwrap()), &[probit], 1e-10);
        let by_quadrature = support::Quadrature::new(200).expect(|z| 1.0 / (1.0 + (-(mu + v.sqrt() * z)).exp()));
        close(by_quadrature, exact, 1e-8);
        let drawn = logit(mu, v).probabilities(Link::MonteCarlo { samples: 20_000, seed: 1 }).unwrap();
        close(values(&drawn)[0], exact, 0.01);
    }
    all_close(&values(&logit(0.0, 3.0).probabilities(Link::Probit).unwrap()), &[0.5], 1e-15);

    let f = logits(&[1.0, 0.0, -1.0], &t(&[0.5, 1.0, 2.0], &[3]).diag(0));
    let of = |link| values(&f.probabilities(link).unwrap());
    all_close(&of(Link::default()), &[0.628_754_491_741, 0.252_012_392_021, 0.119_233_116_239], 1e-11);
    all_close(&values(&f.dirichlet().unwrap()), &[3.657_457_981, 1.102_291_753, 0.583_750_057], 1e-9);
    // The reference's twelve digits end with nine right ones: α itself, above, has more.
    all_close(&of(Link::Bridge), &[0.684_468_629_751, 0.206_286_478_179, 0.109_244_891_867], 3e-10);
    all_close(&of(Link::Bridge), &[0.684_468_629_954_717_7, 0.206_286_478_178_648_73, 0.109_244_891_866_633_64], 1e-14);
    all_close(&of(Link::ScaledBridge), &[0.764_919_172_623, 0.162_921_119_179, 0.072_159_708_198], 1e-11);
    // By hand: differences 1, 1, 2 with the variances 1.5, 3, 2.5.
    let odds =
        |difference: f64, variance: f64| (difference / (1.0_f64 + std::f64::consts::PI / 8.0 * variance).sqrt()).exp();
    let (ab, bc, ac) = (odds(1.0, 1.5), odds(1.0, 3.0), odds(2.0, 2.5));
    let by_hand = [1.0 + 1.0 / ab + 1.0 / ac, ab + 1.0 + 1.0 / bc, ac + bc + 1.0].map(f64::recip);
    let by_hand = by_hand.map(|p| p / by_hand.iter().sum::<f64>());
    all_close(&of(Link::PairwiseProbit), &by_hand, 1e-14);
    let exact = [0.585_386_755, 0.269_654_572, 0.144_958_673];
    let off = |p: Vec<f64>| p.iter().zip(exact).map(|(p, exact)| (p - exact).abs()).fold(0.0, f64::max);
    assert!(off(of(Link::PairwiseProbit)) < 0.006 && off(of(Link::Probit)) > 0.04);
    let drawn = of(Link::MonteCarlo { samples: 40_000, seed: 3 });
    all_close(&drawn, &[0.585_386_755, 0.269_654_572, 0.144_958_673], 0.01);
    assert_eq!(drawn, of(Link::MonteCarlo { samples: 40_000, seed: 3 }));
    assert_ne!(drawn, of(Link::MonteCarlo { samples: 40_000, seed: 4 }));
}

#[test]
fn a_constant_added_to_the_logits_changes_nothing() {
    let v = t(&[2.0, 0.5, -0.3, 0.5, 1.0, 0.2, -0.3, 0.2, 0.7], &[3, 3]);
    let drawn = Link::MonteCarlo { samples: 50, seed: 0 };
    for link in [Link::Probit, Link::PairwiseProbit, Link::Bridge, Link::ScaledBridge, drawn] {
        let p = values(&logits(&[1.0, 0.0, -1.5], &v).probabilities(link).unwrap());
        close(p.iter().sum::<f64>(), 1.0, 1e-12);
        let moved = values(&logits(&[8.0, 7.0, 5.5], &v).probabilities(link).unwrap());
        all_close(&moved, &p, 1e-12);
        // Logits beyond the exponentials.
        let certain = values(&logits(&[900.0, 0.0, -900.0], &v).probabilities(link).unwrap());
        assert!(certain.iter().all(|p| p.is_finite()) && certain[0] > 0.99, "{link:?}: {certain:?}");
    }
}

/// As noise in the direction that a softmax does not see, which a last layer has from its prior alone.
#[test]
fn noise_of_all_logits_together_changes_no_pairwise_probit() {
    let v = t(&[2.0, 0.5, -0.3, 0.5, 1.0, 0.2, -0.3, 0.2, 0.7], &[3, 3]);
    let p = |v: &Tensor, link| values(&logits(&[1.0, 0.0, -1.5], v).probabilities(link).unwrap());
    all_close(&p(&(&v + 50.0), Link::PairwiseProbit), &p(&v, Link::PairwiseProbit), 1e-13);
    assert!(p(&(&v + 50.0), Link::Probit)[0] < p(&v, Link::Probit)[0] - 0.1);
    // Of two classes it is the probit of their difference, here 1 ± √1.2.
    let two = t(&[0.7, 0.2, 0.2, 0.9], &[2, 2]);
    let difference = values(&logit(1.0, 1.2).probabilities(Link::Probit).unwrap())[0];
    let of_two = logits(&[0.4, -0.6], &two).probabilities(Link::PairwiseProbit).unwrap();
    all_close(&values(&of_two), &[difference, 1.0 - difference], 1e-14);
    let one = logit(1.0, 1.2);
    assert_eq!(values(&one.probabilities(Link::PairwiseProbit).unwrap()), [difference]);
}

#[test]
fn without_variance_the_prediction_is_the_softmax() {
    let none = Tensor::zeros([3, 3], (Kind::Double, Device::Cpu));
    let softmax = values(&t(&[1.0, 0.0, -1.5], &[3]).softmax(0, Kind::Double));
    for link in [Link::Probit, Link::PairwiseProbit, Link::MonteCarlo { samples: 3, seed: 0 }] {
        all_close(&values(&logits(&[1.0, 0.0, -1.5], &none).probabilities(link).unwrap()), &softmax, 1e-14);
        close(values(&logit(0.4, 0.0).probabilities(link).unwrap())[0], 1.0 / (1.0 + (-0.4f64).exp()), 1e-14);
    }
    // The bridge's density has its mode there, so that its mean agrees for two classes only.
    let tiny = Tensor::eye(2, (Kind::Double, Device::Cpu)) * 1e-9;
    let two = values(&t(&[0.7, -0.4], &[2]).softmax(0, Kind::Double));
    all_close(&values(&logits(&[0.7, -0.4], &tiny).probabilities(Link::Bridge).unwrap()), &two, 1e-12);
    refused(logits(&[1.0, 0.0, -1.5], &none).probabilities(Link::Bridge), &["a bridge needs all > 0"]);
}

#[test]
fn several_numbers_are_predicted_together() {
    let v = t(&[2.0, 0.5, 0.5, 1.0], &[1, 2, 2]);
    let f = OutputGaussian::new(gaussian(0.3), &t(&[1.0, -1.0], &[1, 2]), &v).unwrap();
    let total = v.reshape([2, 2]) + Tensor::eye(2, (Kind::Double, Device::Cpu)) * 0.3;
    let off = t(&[0.5, 1.0], &[2, 1]);
    let distance = off.tr().matmul(&total.inverse()).matmul(&off).double_value(&[0, 0]);
    let expected = -0.5 * (distance + total.logdet().double_value(&[]) + 2.0 * std::f64::consts::TAU.ln());
    all_close(&values(&f.log_density(&t(&[1.5, 0.0], &[1, 2])).unwrap()), &[expected], 1e-12);
    all_close(&values(&f.forecast().unwrap().epistemic().unwrap()), &[2.0, 1.0], 1e-15);
}

#[test]
fn what_is_no_covariance_is_refused() {
    let new = |v: &[f64]| OutputGaussian::new(Likelihood::Categorical, &t(&[1.0, 0.0], &[1, 2]), &t(v, &[1, 2, 2]));
    refused(new(&[1.0, 0.0, 0.0, -1e-3]), &["-1e-3", "expected a number ≥ 0"]);
    refused(new(&[1.0, f64::NAN, 0.0, 1.0]), &["not finite (NaN)"]);
    refused(new(&[1.0, 0.5, 0.0, 1.0]), &["transpose"]);
    let wrong = new(&[1.0, 2.0, 2.0, 1.0]).unwrap();
    let e = wrong.probabilities(Link::MonteCarlo { samples: 2, seed: 0 }).unwrap_err();
    assert!(matches!(e, Error::NotPositiveDefinite { .. }), "{e}");
    refused(wrong.probabilities(Link::MonteCarlo { samples: 0, seed: 0 }), &["`samples`"]);
    let mean = t(&[1.0, f64::INFINITY], &[1, 2]);
    refused(OutputGaussian::new(Likelihood::Categorical, &mean, &t(&[0.0; 4], &[1, 2, 2])), &["not finite (inf)"]);
    let mean = t(&[1.0, 0.0], &[1, 2]);
    refused(OutputGaussian::new(Likelihood::Categorical, &mean, &t(&[0.0; 4], &[4])), &["expected [1, 2, 2]"]);
    refused(new(&[1.0, 0.0, 0.0, 1.0]).unwrap().forecast(), &["classes"]);
    refused(logit(0.0, 1.0).probabilities(Link::Bridge), &["two or more classes"]);
    let number = OutputGaussian::new(gaussian(1.0), &t(&[1.0], &[1]), &t(&[1.0], &[1, 1, 1])).unwrap();
    refused(number.probabilities(Link::Probit), &["forecast()"]);
    refused(number.log_density(&t(&[1.0, 2.0], &[2])), &["targets"]);
}

#[test]
fn what_has_no_evidence_says_why() {
    let net = Net::new();
    let forward = |x: &Tensor| net.forward(x);
    let f = || Fisher::exact().diagonal(&net.vs, [&net.x], forward).unwrap();
    for p in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(Laplace::new(f(), p), &["`precision`", "finite number > 0"]);
    }
    let mut laplace = Laplace::new(f(), 1.0).unwrap();
    refused(laplace.set_precision(-1.0), &["`precision`"]);
    refused(laplace.set_precision_of("haed.bias", 1.0), &["`haed.bias`"]);
    refused(laplace.log_evidence(), &["no targets"]);
    refused(laplace.optimize_prior(&PriorSearch::mackay()), &["no targets"]);
    assert_eq!(laplace.off_mode().unwrap(), None);
    refused(laplace.set_variance(1.0), &["has no noise"]);

    let mut laplace = Laplace::new(Fisher::exact().diagonal(&net.vs, net.data(), forward).unwrap(), 1.0).unwrap();
    refused(laplace.optimize_prior(&PriorSearch::mackay().noise()), &["has no noise"]);
    refused(laplace.optimize_prior(&PriorSearch::mackay().steps(0)), &["`steps`"]);
    refused(laplace.optimize_prior(&PriorSearch::gradient(0.0, 10)), &["`lr`"]);
    refused(laplace.optimize_prior(&PriorSearch::mackay().bounds(1.0, 1.0)), &["`bounds`"]);
    refused(laplace.optimize_prior(&PriorSearch::mackay().bounds(f64::NAN, 1.0)), &["`bounds`"]);

    let empty: [(Tensor, Tensor); 0] = [];
    refused(Fisher::exact().diagonal(&net.vs, empty, forward), &["no examples"]);
    let nothing = [(&net.x, &Tensor::full([20, 3], f64::NAN, (Kind::Double, Device::Cpu)))];
    let f = Fisher::exact().likelihood(gaussian(1.0)).diagonal(&net.vs, nothing, forward).unwrap();
    refused(Laplace::new(f, 1.0).unwrap().log_evidence(), &["the loss of the data is NaN"]);
    let targets = Tensor::zeros([20, 3], (Kind::Double, Device::Cpu));
    let f = Fisher::observed().likelihood(gaussian(1.0)).diagonal(&net.vs, [(&net.x, &targets)], forward).unwrap();
    let mut laplace = Laplace::new(f, 1.0).unwrap();
    refused(laplace.set_variance(2.0), &["observed labels"]);
    assert!(laplace.log_evidence().unwrap().is_finite() && laplace.off_mode().unwrap().is_none());
}

/// Weights and hyper-parameters in turn, as in Immer et al. (2021), end at the joint fixed point.
#[test]
fn training_by_the_marginal_likelihood_finds_the_fixed_point() {
    let data = points();
    let [x, y] = &data;
    let (vs, layer) = line(&[0.0, 0.0]);
    let n = 4.0;
    let (mut p, mut s2) = (0.1, 1.0);
    let mut opt = Adam::default().weight_decay(p / n).build(&vs, 0.05).unwrap();
    let mut best: Option<(f64, DiagonalGaussian)> = None;
    let mut first = None;
    for epoch in 0..60 {
        for _ in 0..50 {
            opt.step(|| nn::squared_error(&layer.forward(x), y, s2)).unwrap();
        }
        if epoch < 2 {
            continue;
        }
        let run = || -> Result<Laplace> {
            let f = Fisher::exact().likelihood(gaussian(s2));
            Laplace::new(f.diagonal(&vs, [(x, y)], |x| layer.forward(x))?, p)
        };
        let mut laplace = run().unwrap();
        let tuned = laplace.optimize_prior(&PriorSearch::gradient(0.1, 10).noise()).unwrap();
        p = laplace.precisions().next().unwrap().1;
        let Likelihood::Gaussian { variance } = laplace.likelihood() else { panic!() };
        s2 = variance;
        opt.set_weight_decay(p / n).unwrap();
        first.get_or_insert(tuned.log_evidence);
        if best.as_ref().is_none_or(|(e, _)| tuned.log_evidence > *e) {
            let f = Fisher::exact().likelihood(gaussian(s2)).diagonal(&vs, [(x, y)], |x| layer.forward(x)).unwrap();
            best = Some((tuned.log_evidence, f.laplace(Prior::isotropic(p)).unwrap()));
        }
    }
    let (evidence, q) = best.unwrap();
    assert!(evidence > first.unwrap() + 0.1);
    // The diagonal curvature has a maximum of its own. The first step of Adam is as long as its rate, however near it
    // is, so p is known to 0.1 in the logarithm.
    let mut laplace = {
        let f = Fisher::exact().likelihood(gaussian(s2));
        put(&layer, &ridge(&data, p, s2));
        Laplace::new(f.diagonal(&vs, [(x, y)], |x| layer.forward(x)).unwrap(), p).unwrap()
    };
    let tuned = laplace.optimize_prior(&PriorSearch::mackay().noise()).unwrap();
    close(laplace.precisions().next().unwrap().1.ln(), p.ln(), 0.1);
    assert!(tuned.warning().is_none() && (tuned.log_evidence - evidence).abs() < 0.01);
    assert!(largest(&(q.mean("line.weight").unwrap() - t(&ridge(&data, p, s2), &[1, 2]))) < 0.01);
}

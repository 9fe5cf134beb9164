//! Full and Kronecker-factored posteriors: against each other, closed forms and their own samples.

use support::{close, mean_and_error, values};
use tch::{Device, Kind, Tensor};
use tch_blr::{
    DiagonalGaussian, Error, FullGaussian, KroneckerGaussian, KroneckerParameter, LowRankGaussian, MeanFieldBernoulli,
    Mixture, Params, Posterior, combine,
};

fn matrix(x: &[f64], shape: &[i64]) -> Tensor {
    Tensor::from_slice(x).reshape(shape)
}

/// A positive definite matrix without a pattern.
fn precision(n: i64, phase: f64) -> Tensor {
    let a = (Tensor::arange(n * n, (Kind::Double, Device::Cpu)) * 1.7 + phase).sin().reshape([n, n]);
    a.matmul(&a.tr()) + Tensor::eye(n, (Kind::Double, Device::Cpu)) * 0.5
}

fn means() -> [(&'static str, Tensor); 2] {
    [("a", matrix(&[1.0, -2.0, 0.5, 3.0], &[2, 2])), ("b", Tensor::from(0.25f64))]
}

fn full(phase: f64) -> FullGaussian {
    FullGaussian::new(means(), &precision(5, phase)).unwrap()
}

/// `a` [2, 3] with both bases, `b` [2] with none.
fn kronecker() -> KroneckerGaussian {
    let mean = matrix(&[1.0, -2.0, 0.5, 3.0, 0.0, -1.0], &[2, 3]);
    let a = KroneckerParameter::from_factors("a", mean, &precision(2, 0.3), &precision(3, 0.9)).unwrap();
    let s = matrix(&[0.5, 1.0, 2.0, 4.0, 8.0, 3.0], &[2, 3]);
    let b = KroneckerParameter {
        name: "b".to_owned(),
        mean: Tensor::from_slice(&[0.25, -0.5]),
        left: None,
        right: None,
        precision: Tensor::from_slice(&[2.0, 3.0]),
    };
    KroneckerGaussian::new([KroneckerParameter { precision: &a.precision * s, ..a }, b]).unwrap()
}

/// Variables with these values.
fn params(values: &[(String, Tensor)]) -> Params {
    Params::named(values.iter().map(|(name, t)| (name.clone(), t.copy().set_requires_grad(true)))).unwrap()
}

fn flat(sample: Vec<(String, Tensor)>) -> Tensor {
    Tensor::cat(&sample.into_iter().map(|(_, t)| t.reshape([-1])).collect::<Vec<_>>(), 0)
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

/// The mean of K samples, and every element of their second moment about the true mean, is within 4.5 standard errors
/// √((Σᵢⱼ² + ΣᵢᵢΣⱼⱼ)/K); for n = 8 the probability that one of these 44 numbers is not is below 3e-4 for a right
/// sampler.
fn samples_have(mean: &Tensor, covariance: &Tensor, sample: impl Fn(u64) -> Tensor) {
    let k = 10_000;
    let d = Tensor::stack(&(0..k).map(sample).collect::<Vec<_>>(), 0) - mean;
    let variance = covariance.diagonal(0, 0, 1);
    let n = k as f64;
    let moment = d.tr().matmul(&d) / n;
    let sd = ((covariance.square() + variance.outer(&variance)) / n).sqrt();
    let worst = ((moment - covariance) / sd).abs().max().double_value(&[]);
    let shift = (d.mean_dim(0, false, None::<Kind>) / (&variance / n).sqrt()).abs().max().double_value(&[]);
    assert!(worst < 4.5 && shift < 4.5, "{worst} {shift}");
}

#[test]
fn samples_of_a_full_posterior_have_its_covariance() {
    let q = full(0.4).with_seed(1);
    let covariance = q.covariance_matrix().unwrap();
    let identity = Tensor::eye(5, (Kind::Double, Device::Cpu));
    assert!(difference(&covariance.matmul(q.precision_matrix()), &identity) < 1e-13);
    assert_eq!(values(&q.mean_vector()), [1.0, -2.0, 0.5, 3.0, 0.25]);
    samples_have(&q.mean_vector(), &covariance, |k| flat(q.sample(k).unwrap()));
    let sizes: Vec<_> = q.sample(0).unwrap().into_iter().map(|(name, t)| (name, t.size())).collect();
    assert_eq!(sizes, [("a".to_owned(), vec![2, 2]), ("b".to_owned(), vec![])]);
    assert_eq!(q.sample(3).unwrap(), full(0.4).with_seed(1).sample(3).unwrap());
    assert_ne!(q.sample(3).unwrap(), full(0.4).with_seed(2).sample(3).unwrap());
}

#[test]
fn samples_of_a_kronecker_posterior_have_its_covariance() {
    let q = kronecker().with_seed(1);
    let full = q.full().unwrap();
    samples_have(&full.mean_vector(), &full.covariance_matrix().unwrap(), |k| flat(q.sample(k).unwrap()));
}

#[test]
fn factors_make_a_kronecker_product() {
    let (a, b) = (precision(2, 0.3), precision(3, 0.9));
    let mean = Tensor::zeros([2, 3], (Kind::Double, Device::Cpu));
    let q = KroneckerGaussian::new([KroneckerParameter::from_factors("a", mean, &a, &b).unwrap()]).unwrap();
    assert!(difference(q.full().unwrap().precision_matrix(), &a.kron(&b)) < 1e-13);
    // A convolution's weight is the matrix of its filters.
    let mean = Tensor::zeros([2, 3, 1, 1], (Kind::Double, Device::Cpu));
    let q = KroneckerGaussian::new([KroneckerParameter::from_factors("a", mean, &a, &b).unwrap()]).unwrap();
    assert!(difference(q.full().unwrap().precision_matrix(), &a.kron(&b)) < 1e-13);
    assert_eq!(q.sample(0).unwrap()[0].1.size(), [2, 3, 1, 1]);
}

/// Density, entropy, marginals and divergence in closed form, against a diagonal posterior, against each other, and
/// against averages over samples (4 standard errors: 6e-5).
#[test]
fn densities_entropies_and_divergences() {
    let diagonal = DiagonalGaussian::new([
        ("a", matrix(&[1.0, -2.0, 0.5, 3.0], &[2, 2]), matrix(&[1.0, 2.0, 3.0, 4.0], &[2, 2])),
        ("b", Tensor::from(0.25f64), Tensor::from(0.5f64)),
    ])
    .unwrap();
    let written_out = diagonal.full().unwrap();
    let (q, p) = (full(0.4), full(1.1));
    let theta = p.sample(7).unwrap();
    let (ours, theirs) = (written_out.log_prob(params(&theta)), diagonal.log_prob(params(&theta)));
    close(ours.unwrap(), theirs.unwrap(), 1e-12);
    close(written_out.entropy(), diagonal.entropy(), 1e-12);
    let marginals = written_out.marginals().unwrap();
    assert!(difference(&marginals.precision("a").unwrap(), &diagonal.precision("a").unwrap()) < 1e-14);
    assert!(q.kl(&q).unwrap().abs() < 1e-13);
    // n = 1: ½(s_p/s - 1 + s_p d² - ln s_p/s)
    let one = |m: f64, s: f64| FullGaussian::new([("w", Tensor::from(m))], &matrix(&[s], &[1, 1])).unwrap();
    close(one(1.0, 2.0).kl(&one(3.0, 5.0)).unwrap(), 0.5 * (2.5 - 1.0 + 20.0 - 2.5f64.ln()), 1e-14);

    let log = |q: &FullGaussian, theta: &[(String, Tensor)]| q.log_prob(params(theta)).unwrap();
    let draws: Vec<_> = (0..4000).map(|k| q.sample(k).unwrap()).collect();
    let (mean, error) = mean_and_error(&draws.iter().map(|theta| -log(&q, theta)).collect::<Vec<_>>());
    close(mean, q.entropy(), 4.0 * error);
    let ratios = draws.iter().map(|theta| log(&q, theta) - log(&p, theta));
    let (mean, error) = mean_and_error(&ratios.collect::<Vec<_>>());
    close(mean, q.kl(&p).unwrap(), 4.0 * error);

    let k = kronecker();
    let whole = k.full().unwrap();
    let theta = k.sample(5).unwrap();
    close(k.log_prob(params(&theta)).unwrap(), whole.log_prob(params(&theta)).unwrap(), 1e-12);
    close(k.entropy(), whole.entropy(), 1e-12);
    let (ours, theirs) = (k.marginals().unwrap(), whole.marginals().unwrap());
    for name in ["a", "b"] {
        assert!(difference(&ours.precision(name).unwrap(), &theirs.precision(name).unwrap()) < 1e-12);
        assert!(difference(&k.variance(name).unwrap(), &theirs.variance(name).unwrap()) < 1e-12);
    }
}

/// Natural parameters add: the posterior of two data sets from those of each, with the prior counted once.
#[test]
fn full_posteriors_combine() {
    let (prior, first, second) = (precision(5, 2.0), precision(5, 0.1), precision(5, 0.2));
    let q = |m: f64, p: &Tensor| {
        let mean = [("a", matrix(&[m, 1.0, -m, 2.0], &[2, 2])), ("b", Tensor::from(m))];
        FullGaussian::new(mean, p).unwrap()
    };
    let (p, a, b) = (q(0.5, &prior), q(1.0, &(&prior + &first)), q(-2.0, &(&prior + &second)));
    let merged = combine(&[(1.0, &a), (1.0, &b), (-1.0, &p)]).unwrap();
    assert!(difference(merged.precision_matrix(), &(prior + first + second)) < 1e-13);
    let natural = |q: &FullGaussian| q.precision_matrix().mv(&q.mean_vector());
    assert!(difference(&natural(&merged), &(natural(&a) + natural(&b) - natural(&p))) < 1e-12);
    let less = combine(&[(1.0, &p), (-1.0, &a)]).unwrap_err();
    assert!(matches!(less, Error::Combine { short: 5, of: 5, .. }), "{less}");
    let other =
        FullGaussian::new([("c", Tensor::zeros([5], (Kind::Double, Device::Cpu)))], &precision(5, 0.0)).unwrap();
    assert!(combine(&[(1.0, &p), (1.0, &other)]).unwrap_err().to_string().contains("c [5]"));
    assert!(p.kl(&other).is_err() && combine::<FullGaussian>(&[]).is_err());
    assert!(combine(&[(f64::NAN, &p)]).is_err());
}

#[test]
fn what_is_saved_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.safetensors");
    let q = full(0.4).with_seed(9);
    q.save(&path).unwrap();
    let back = FullGaussian::load(&path).unwrap();
    assert_eq!((back.precision_matrix(), back.sample(2).unwrap()), (q.precision_matrix(), q.sample(2).unwrap()));
    assert!(KroneckerGaussian::load(&path).unwrap_err().to_string().contains("full Gaussian posterior"));
    let q = kronecker().with_seed(9);
    q.save(&path).unwrap();
    let back = KroneckerGaussian::load(&path).unwrap();
    assert_eq!((back.names().collect::<Vec<_>>(), back.sample(2).unwrap()), (vec!["a", "b"], q.sample(2).unwrap()));
    assert!(FullGaussian::load(&path).is_err() && DiagonalGaussian::load(&path).is_err());
}

/// A file cut anywhere is an error, and one with a byte changed anywhere is an error or, where the change has a meaning
/// (a digit of a mean), a posterior: nothing panics.
#[test]
fn broken_files_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.safetensors");
    let check = |whole: Vec<u8>, load: &dyn Fn() -> Result<f64, Error>| {
        for n in 0..whole.len() {
            std::fs::write(&path, &whole[..n]).unwrap();
            assert!(matches!(load(), Err(Error::File { .. })), "cut to {n} bytes");
        }
        let mut refused = 0;
        for i in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[i] ^= 0xff;
            std::fs::write(&path, &bytes).unwrap();
            match load() {
                Err(e) => {
                    assert!(matches!(e, Error::File { .. }), "byte {i}: {e}");
                    refused += 1;
                }
                Ok(entropy) => assert!(entropy.is_finite(), "byte {i}"),
            }
        }
        assert!(refused > whole.len() / 4, "{refused} of {}", whole.len());
    };
    full(0.4).save(&path).unwrap();
    check(std::fs::read(&path).unwrap(), &|| FullGaussian::load(&path).map(|q| q.entropy()));
    kronecker().save(&path).unwrap();
    check(std::fs::read(&path).unwrap(), &|| KroneckerGaussian::load(&path).map(|q| q.entropy()));
    let directions = (matrix(&[1.0, 0.5, -1.0, 2.0], &[1, 2, 2]), matrix(&[0.5], &[1]));
    let [(a, mean), (b, scalar)] = means();
    let entries = [(a, mean.copy(), mean.square(), directions.0), (b, scalar.copy(), scalar.square(), directions.1)];
    LowRankGaussian::new(entries).unwrap().save(&path).unwrap();
    check(std::fs::read(&path).unwrap(), &|| LowRankGaussian::load(&path).map(|q| q.entropy()));
}

#[test]
fn samples_and_means_go_into_models() {
    for (mean, sample, q) in [
        (full(0.4).mean("a").unwrap(), full(0.4).sample(1).unwrap(), None),
        (kronecker().mean("a").unwrap().copy(), kronecker().sample(1).unwrap(), Some(kronecker())),
    ] {
        // In f32, so that values are converted.
        let variable = |t: &Tensor| t.zeros_like().to_kind(Kind::Float).set_requires_grad(true);
        let vars: Vec<(String, Tensor)> = sample.iter().map(|(name, t)| (name.clone(), variable(t))).collect();
        let model = || Params::named(vars.iter().map(|(n, t)| (n.clone(), t.shallow_clone()))).unwrap();
        let w = &vars[0].1;
        let guard = match &q {
            None => full(0.4).perturb(model(), 1),
            Some(q) => q.perturb(model(), 1),
        };
        let guard = guard.unwrap();
        assert_eq!(*w, sample[0].1.to_kind(Kind::Float));
        drop(guard);
        assert_eq!(w.abs().max().double_value(&[]), 0.0);
        let outputs = match &q {
            None => full(0.4).predict_samples(model(), 3, || w.shallow_clone()),
            Some(q) => q.predict_samples(model(), 3, || w.shallow_clone()),
        };
        assert_eq!(outputs.unwrap().get(1), sample[0].1.to_kind(Kind::Float));
        let p = match &q {
            None => full(0.4).predict(model(), 3, || w.softmax(-1, Kind::Float)),
            Some(q) => q.predict(model(), 3, || w.softmax(-1, Kind::Float)),
        };
        assert_eq!(p.unwrap().samples, 3);
        match &q {
            None => full(0.4).copy_mean_to(model()),
            Some(q) => q.copy_mean_to(model()),
        }
        .unwrap();
        assert_eq!(*w, mean.to_kind(Kind::Float));
    }
}

#[test]
fn what_is_no_posterior_is_refused() {
    let refused = |means: Vec<(&'static str, Tensor)>, p: Tensor| FullGaussian::new(means, &p).unwrap_err().to_string();
    let one = || Tensor::from_slice(&[1.0, 2.0]);
    let p = || matrix(&[2.0, 0.5, 0.5, 2.0], &[2, 2]);
    assert!(refused(vec![], p()).contains("no parameter"));
    assert!(refused(vec![("a", one()), ("a", one())], p()).contains("twice"));
    assert!(refused(vec![("a", one())], precision(3, 0.0)).contains("[2, 2]"));
    assert!(refused(vec![("a", Tensor::from_slice(&[1.0, f64::NAN]))], p()).contains("not finite"));
    assert!(refused(vec![("a", Tensor::from_slice(&[1i64, 2]))], p()).contains("Int64"));
    assert!(refused(vec![("a", one())], matrix(&[2.0, 0.5, 0.4, 2.0], &[2, 2])).contains("transpose"));
    assert!(refused(vec![("a", one())], matrix(&[1.0, 2.0, 2.0, 1.0], &[2, 2])).contains("positive definite"));

    let parameter = |left: Option<Tensor>, s: [f64; 2]| KroneckerParameter {
        name: "a".to_owned(),
        mean: matrix(&[1.0, 2.0], &[2, 1]),
        left,
        right: None,
        precision: matrix(&s, &[2, 1]),
    };
    let refused = |p: Vec<KroneckerParameter>| KroneckerGaussian::new(p).unwrap_err().to_string();
    assert!(refused(vec![]).contains("no parameter"));
    assert!(refused(vec![parameter(None, [1.0, 1.0]), parameter(None, [1.0, 1.0])]).contains("twice"));
    assert!(refused(vec![parameter(None, [1.0, 0.0])]).contains("smallest precision"));
    assert!(refused(vec![parameter(None, [1.0, f64::INFINITY])]).contains("not finite"));
    assert!(refused(vec![parameter(Some(p()), [1.0, 1.0])]).contains("not orthogonal"));
    assert!(refused(vec![parameter(Some(precision(3, 0.0)), [1.0, 1.0])]).contains("[2, 2]"));
    let indefinite = matrix(&[1.0, 2.0, 2.0, 1.0], &[2, 2]);
    let factor = KroneckerParameter::from_factors("a", one().reshape([2, 1]), &indefinite, &matrix(&[1.0], &[1, 1]));
    assert!(matches!(factor.unwrap_err(), Error::NotPositiveDefinite { .. }));
}

/// Of all diagonal Gaussians, the one with the diagonal of the precision is nearest in KL(q ‖ self), the marginals in
/// KL(self ‖ q): the gradient of the divergence in each ln s and each mean is zero there, by central differences, and
/// not at the other one.
#[test]
fn the_diagonal_and_the_marginals_are_the_nearest_diagonals() {
    let p = full(0.4);
    let (diagonal, marginals) = (p.diagonal().unwrap(), p.marginals().unwrap());
    let s = Tensor::cat(&["a", "b"].map(|n| diagonal.precision(n).unwrap().reshape([-1])), 0);
    assert_eq!(values(&s), values(&p.precision_matrix().diagonal(0, 0, 1)));
    let divergence = |q: &DiagonalGaussian, reversed: bool| {
        let q = q.full().unwrap();
        if reversed { p.kl(&q).unwrap() } else { q.kl(&p).unwrap() }
    };
    let slope = |q: &DiagonalGaussian, reversed: bool| {
        let step = 1e-4;
        let moved = |i: i64, by: f64, mean: bool| {
            let at = |n: &str| {
                let (m, s) = (q.mean(n).unwrap().copy(), q.precision(n).unwrap().copy());
                let j = if n == "a" { i } else { i - 4 };
                if (0..m.numel() as i64).contains(&j) {
                    let _ = if mean {
                        m.view([-1]).get(j).g_add_scalar_(by)
                    } else {
                        s.view([-1]).get(j).g_mul_scalar_(by.exp())
                    };
                }
                (n.to_owned(), m, s)
            };
            divergence(&DiagonalGaussian::new(["a", "b"].map(at)).unwrap(), reversed)
        };
        let each = (0..5).flat_map(|i| [true, false].map(|mean| (i, mean)));
        each.map(|(i, mean)| ((moved(i, step, mean) - moved(i, -step, mean)) / (2.0 * step)).abs()).fold(0.0, f64::max)
    };
    assert!(slope(&diagonal, false) < 1e-7 && slope(&marginals, true) < 1e-7);
    assert!(slope(&marginals, false) > 0.1 && slope(&diagonal, true) > 0.1);
}

/// The conversions agree: a Kronecker posterior's diagonal is that of its dense form, a diagonal posterior written out
/// has its own diagonal back, and blocks and variances are those of the dense matrices.
#[test]
fn conversions_agree_with_the_dense_matrices() {
    let k = kronecker().with_seed(3);
    let whole = k.full().unwrap();
    let dense = whole.precision_matrix();
    let (ours, theirs) = (k.diagonal().unwrap(), whole.diagonal().unwrap());
    let back = ours.full().unwrap().diagonal().unwrap();
    for (name, first, n) in [("a", 0, 6), ("b", 6, 2)] {
        let block = dense.narrow(0, first, n).narrow(1, first, n);
        assert!(difference(&ours.precision(name).unwrap().reshape([-1]), &block.diagonal(0, 0, 1)) < 1e-13);
        assert!(difference(&ours.precision(name).unwrap(), &theirs.precision(name).unwrap()) < 1e-13);
        assert_eq!(ours.mean(name), k.mean(name));
        assert_eq!((back.mean(name), back.precision(name)), (ours.mean(name), ours.precision(name)));
        assert_eq!(whole.precision(name).unwrap(), block);
        let variance = whole.covariance_matrix().unwrap().diagonal(0, 0, 1).narrow(0, first, n);
        assert!(difference(&whole.variance(name).unwrap().reshape([-1]), &variance) < 1e-14);
        assert!(difference(&k.variance(name).unwrap().reshape([-1]), &variance) < 1e-13);
        assert_eq!(k.precision(name).unwrap(), k.parameter(name).unwrap().precision);
    }
    // With a basis on one side only.
    for sides in [[true, false], [false, true]] {
        let p = k.parameter("a").unwrap();
        let [left, right] = [(&p.left, sides[0]), (&p.right, sides[1])].map(|(q, on)| q.as_ref().filter(|_| on));
        let [left, right] = [left, right].map(|q| q.map(Tensor::copy));
        let one = KroneckerParameter {
            name: "a".to_owned(),
            mean: p.mean.copy(),
            left,
            right,
            precision: p.precision.copy(),
        };
        let q = KroneckerGaussian::new([one]).unwrap();
        let (ours, theirs) = (q.diagonal().unwrap(), q.full().unwrap().diagonal().unwrap());
        assert!(difference(&ours.precision("a").unwrap(), &theirs.precision("a").unwrap()) < 1e-13);
    }
    // In f32 the sums are in f64 still.
    let half = |t: &Tensor| t.to_kind(Kind::Float);
    let p = k.parameter("a").unwrap();
    let single = KroneckerParameter {
        name: "a".to_owned(),
        mean: half(&p.mean),
        left: p.left.as_ref().map(half),
        right: p.right.as_ref().map(half),
        precision: half(&p.precision),
    };
    let s = KroneckerGaussian::new([single]).unwrap().diagonal().unwrap().precision("a").unwrap();
    assert!(s.kind() == Kind::Float && difference(&(s / ours.precision("a").unwrap()), &Tensor::from(1.0)) < 1e-6);
}

/// KL of Kronecker posteriors, in one basis and in two, is that of the dense ones; so is KL of diagonal ones.
#[test]
fn divergences_agree_with_the_dense_ones() {
    let other = |a: f64, b: f64| {
        let mean = matrix(&[0.5, -1.0, 0.25, 2.0, 1.0, -2.0], &[2, 3]);
        let first = KroneckerParameter::from_factors("a", mean, &precision(2, a), &precision(3, b)).unwrap();
        let second = KroneckerParameter {
            name: "b".to_owned(),
            mean: Tensor::from_slice(&[1.0, 0.5]),
            left: None,
            right: Some(first.left.as_ref().unwrap().copy()),
            precision: Tensor::from_slice(&[0.7, 5.0]),
        };
        // In another order, which does not matter.
        KroneckerGaussian::new([second, first]).unwrap()
    };
    let (q, p, far) = (kronecker(), other(0.3, 0.9), other(1.4, 2.3));
    let dense = |q: &KroneckerGaussian| {
        let ordered = ["a", "b"].map(|n| {
            let p = q.parameter(n).unwrap();
            let [mean, precision] = [&p.mean, &p.precision].map(Tensor::copy);
            let [left, right] = [&p.left, &p.right].map(|q| q.as_ref().map(Tensor::copy));
            KroneckerParameter { name: n.to_owned(), mean, left, right, precision }
        });
        KroneckerGaussian::new(ordered).unwrap().full().unwrap()
    };
    for (q, p) in [(&q, &p), (&p, &q), (&q, &far), (&far, &q), (&far, &p)] {
        let expected = dense(q).kl(&dense(p)).unwrap();
        close(q.kl(p).unwrap(), expected, 1e-12 * expected.abs().max(1.0));
    }
    assert!(q.kl(&q).unwrap().abs() < 1e-14);
    let (a, b) = (q.diagonal().unwrap(), p.marginals().unwrap());
    let ordered = DiagonalGaussian::new(["a", "b"].map(|n| (n, b.mean(n).unwrap(), b.precision(n).unwrap()))).unwrap();
    let expected = a.full().unwrap().kl(&ordered.full().unwrap()).unwrap();
    close(a.kl(&b).unwrap(), expected, 1e-12 * expected);
    let alone = KroneckerGaussian::new([KroneckerParameter::from_factors(
        "a",
        Tensor::zeros([2, 3], (Kind::Double, Device::Cpu)),
        &precision(2, 0.3),
        &precision(3, 0.9),
    )
    .unwrap()])
    .unwrap();
    assert!(q.kl(&alone).unwrap_err().to_string().contains('b'), "it names what is missing");
}

/// Every family behind one type: moments are those of many samples, and what goes into a model, is predicted and is
/// saved is what the concrete type does.
#[test]
fn every_posterior_can_stand_behind_one_type() {
    let diagonal = |m: f64| {
        let s = matrix(&[1.0, 2.0, 3.0, 4.0], &[2, 2]);
        let mean = matrix(&[1.0, -2.0, 0.5, 3.0], &[2, 2]) * m;
        DiagonalGaussian::new([("a", mean, s), ("b", Tensor::from(m), Tensor::from(0.5))]).unwrap()
    };
    let bits = [("a", matrix(&[0.5, -1.0, 0.0, 2.0], &[2, 2])), ("b", Tensor::from(-0.25))];
    let mean = matrix(&[1.0, -2.0, 0.5, 3.0], &[2, 2]);
    let factored = KroneckerParameter::from_factors("a", mean, &precision(2, 0.3), &precision(2, 0.9)).unwrap();
    let scalar = KroneckerParameter {
        name: "b".to_owned(),
        mean: Tensor::from(0.25),
        left: None,
        right: None,
        precision: Tensor::from(2.0),
    };
    let direction = (matrix(&[1.0, 0.5, -1.0, 2.0], &[1, 2, 2]), matrix(&[0.5], &[1]));
    let [a, b] = [diagonal(1.0).mean("a"), diagonal(1.0).mean("b")].map(Option::unwrap);
    let low_rank = [("a", a.copy(), a.square(), direction.0), ("b", b.copy(), b.square(), direction.1)];
    let all: [Box<dyn Posterior>; 6] = [
        Box::new(LowRankGaussian::new(low_rank).unwrap()),
        Box::new(diagonal(1.0)),
        Box::new(full(0.4)),
        Box::new(KroneckerGaussian::new([factored, scalar]).unwrap()),
        Box::new(MeanFieldBernoulli::new(bits).unwrap()),
        Box::new(Mixture::new([(1.0, diagonal(1.0)), (3.0, diagonal(-2.0))]).unwrap()),
    ];
    let dir = tempfile::tempdir().unwrap();
    for mut q in all {
        q.set_seed(4);
        assert_eq!((q.names().collect::<Vec<_>>(), q.len(), q.is_empty()), (vec!["a", "b"], 5, false), "{q:?}");
        assert!(q.mean("c").is_none() && q.variance("c").is_none());
        let k = 2000;
        let draws = Tensor::stack(&(0..k).map(|k| flat(q.sample(k).unwrap())).collect::<Vec<_>>(), 0);
        let join = |f: &dyn Fn(&str) -> Tensor| Tensor::cat(&["a", "b"].map(|n| f(n).reshape([-1])), 0);
        let (mean, variance) = (join(&|n| q.mean(n).unwrap()), join(&|n| q.variance(n).unwrap()));
        let d = (draws.mean_dim(0, false, None::<Kind>) - mean) / (&variance / k as f64).sqrt();
        assert!(d.abs().max().double_value(&[]) < 4.5, "{q:?}");
        // The standard error of a variance by the fourth moment of the samples.
        let squares = (&draws - draws.mean_dim(0, true, None::<Kind>)).square();
        let error = (squares.var_dim(0, true, false) / k as f64).sqrt() + 1e-12;
        let d = (squares.mean_dim(0, false, None::<Kind>) - variance) / error;
        assert!(d.abs().max().double_value(&[]) < 4.5, "{q:?}");

        let theta = q.sample(7).unwrap();
        let variables = theta.iter().map(|(n, t)| (n.clone(), t.copy().set_requires_grad(true))).collect::<Vec<_>>();
        let model = || Params::named(variables.iter().map(|(n, t)| (n.clone(), t.shallow_clone()))).unwrap();
        let (w, b) = (&variables[0].1, &variables[1].1);
        {
            let _guard = q.perturb(model(), 2).unwrap();
            let expected = q.sample(2).unwrap();
            assert_eq!((w, b), (&expected[0].1, &expected[1].1));
        }
        assert_eq!(*w, theta[0].1);
        let outputs = q.predict_samples(model(), 3, || w * 2.0).unwrap();
        assert_eq!(outputs.get(2), q.sample(2).unwrap().remove(0).1 * 2.0);
        let p = q.predict(model(), 2, || w.softmax(-1, Kind::Double)).unwrap();
        assert_eq!(p.samples, 2 * q.strata().len());
        q.copy_mean_to(model()).unwrap();
        assert_eq!(*w, q.mean("a").unwrap());
        q.save(dir.path().join("q.safetensors")).unwrap();
        let stored = Tensor::read_safetensors(dir.path().join("q.safetensors")).unwrap();
        assert!(!stored.is_empty());
    }
}

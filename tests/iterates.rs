//! Posteriors of a covariance of low rank, against dense matrices and their own samples; and what is made of the
//! iterates of any optimizer.

use support::{close, mean_and_error, refused, values};
use tch::{Device, Kind, Tensor};
use tch_blr::{DiagonalGaussian, Error, FullGaussian, Ivon, LowRankGaussian, Params, Posterior, Prior};

const F64: (Kind, Device) = (Kind::Double, Device::Cpu);

fn wave(size: &[i64], phase: f64) -> Tensor {
    (Tensor::arange(size.iter().product::<i64>(), F64) * 1.7 + phase).sin().reshape(size)
}

/// `a` [2, 2] and `b` [], with so many directions.
fn low_rank(rank: i64, phase: f64) -> LowRankGaussian {
    let entry = |name: &'static str, size: &[i64], phase: f64| {
        let u = wave(&[&[rank], size].concat(), phase + 0.3);
        (name, wave(size, phase), wave(size, phase + 2.0).exp() * 0.5, u)
    };
    LowRankGaussian::new([entry("a", &[2, 2], phase), entry("b", &[], phase + 1.0)]).unwrap()
}

fn covariance(q: &LowRankGaussian) -> Tensor {
    let join = |part: &dyn Fn(&str) -> Tensor| Tensor::cat(&["a", "b"].map(part), -1);
    let d = join(&|name| q.independent(name).unwrap().reshape([-1]));
    let u = join(&|name| {
        let u = q.directions(name).unwrap();
        u.reshape([q.rank() as i64, q.mean(name).unwrap().numel() as i64])
    });
    d.diag(0) + u.tr().matmul(&u)
}

fn flat(values: Vec<(String, Tensor)>) -> Tensor {
    Tensor::cat(&values.into_iter().map(|(_, t)| t.reshape([-1])).collect::<Vec<_>>(), 0)
}

fn params(values: &[(String, Tensor)]) -> Params {
    Params::named(values.iter().map(|(name, t)| (name.clone(), t.copy().set_requires_grad(true)))).unwrap()
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

/// With fewer directions than weights, with more of them, with one and with none.
#[test]
fn every_number_is_that_of_the_dense_covariance() {
    for rank in [0, 1, 3, 7] {
        let (q, p) = (low_rank(rank, 0.4).with_seed(3), low_rank(2, 1.1));
        assert_eq!((q.len(), q.rank()), (5, rank as usize));
        let (sigma, other) = (covariance(&q), covariance(&p));
        let dense = |q: &LowRankGaussian, sigma: &Tensor| {
            let means = ["a", "b"].map(|name| (name, q.mean(name).unwrap()));
            let precision = sigma.inverse();
            FullGaussian::new(means, &((&precision + precision.tr()) * 0.5)).unwrap()
        };
        let (full, far) = (dense(&q, &sigma), dense(&p, &other));
        assert!(difference(q.full().unwrap().precision_matrix(), full.precision_matrix()) < 1e-12);
        close(q.entropy(), full.entropy(), 1e-12);
        let theta = p.sample(7).unwrap();
        close(q.log_prob(params(&theta)).unwrap(), full.log_prob(params(&theta)).unwrap(), 1e-11);
        close(q.kl(&p).unwrap(), full.kl(&far).unwrap(), 1e-11);
        close(p.kl(&q).unwrap(), far.kl(&full).unwrap(), 1e-11);
        assert!(q.kl(&q).unwrap().abs() < 1e-14);
        let variance = flat(["a", "b"].map(|n| (n.to_owned(), q.variance(n).unwrap())).into());
        assert!(difference(&variance, &sigma.diagonal(0, 0, 1)) < 1e-14);
        // The nearest diagonals, as of the full posterior; and the divergences between the families.
        let (marginals, diagonal) = (q.marginals().unwrap(), q.diagonal().unwrap());
        for (ours, theirs) in [(&marginals, full.marginals().unwrap()), (&diagonal, full.diagonal().unwrap())] {
            for name in ["a", "b"] {
                assert!(difference(&ours.precision(name).unwrap(), &theirs.precision(name).unwrap()) < 1e-12);
            }
            let (alone, dense) = (ours.low_rank().unwrap(), theirs.full().unwrap());
            close(q.kl(&alone).unwrap(), full.kl(&dense).unwrap(), 1e-11);
            close(alone.kl(&q).unwrap(), dense.kl(&full).unwrap(), 1e-11);
        }
        let hot = q.temper(3.0).unwrap();
        assert!(difference(&covariance(&hot), &(sigma * 3.0)) < 1e-14);
        close(hot.entropy(), q.entropy() + 2.5 * 3f64.ln(), 1e-13);
    }
}

/// Mean and all second moments of 10,000 samples are within 4.5 standard errors √((Σᵢⱼ² + ΣᵢᵢΣⱼⱼ)/K), and averages of
/// densities within 4.
#[test]
fn samples_have_the_covariance() {
    let (q, p) = (low_rank(2, 0.4).with_seed(1), low_rank(3, 1.1));
    let sigma = covariance(&q);
    let mean = flat(["a", "b"].map(|n| (n.to_owned(), q.mean(n).unwrap())).into());
    let k = 10_000;
    let draws: Vec<_> = (0..k).map(|k| q.sample(k).unwrap()).collect();
    let log = |q: &LowRankGaussian, theta: &[(String, Tensor)]| q.log_prob(params(theta)).unwrap();
    let ratios = draws.iter().map(|theta| log(&q, theta) - log(&p, theta)).collect::<Vec<_>>();
    let (average, error) = mean_and_error(&ratios);
    close(average, q.kl(&p).unwrap(), 4.0 * error);
    let d = Tensor::stack(&draws.into_iter().map(flat).collect::<Vec<_>>(), 0) - mean;
    let (n, variance) = (k as f64, sigma.diagonal(0, 0, 1));
    let sd = ((sigma.square() + variance.outer(&variance)) / n).sqrt();
    let worst = ((d.tr().matmul(&d) / n - &sigma) / sd).abs().max().double_value(&[]);
    let shift = (d.mean_dim(0, false, None::<Kind>) / (variance / n).sqrt()).abs().max().double_value(&[]);
    assert!(worst < 4.5 && shift < 4.5, "{worst} {shift}");
    assert_eq!(q.sample(3).unwrap(), low_rank(2, 0.4).with_seed(1).sample(3).unwrap());
    assert_ne!(q.sample(3).unwrap(), low_rank(2, 0.4).with_seed(2).sample(3).unwrap());
}

/// Without directions it is the diagonal posterior, sample for sample; variances are powers of four, so that roots and
/// reciprocals are exact.
#[test]
fn no_direction_is_a_diagonal_posterior() {
    let t = |x: [f32; 3]| Tensor::from_slice(&x);
    let diagonal = DiagonalGaussian::new([("w", t([1.0, -2.0, 0.0]), t([4.0, 1.0, 0.25]))]).unwrap().with_seed(5);
    let q = diagonal.low_rank().unwrap();
    assert_eq!((q.rank(), q.sample(2).unwrap()), (0, diagonal.sample(2).unwrap()));
    assert_eq!(q.marginals().unwrap().precision("w"), diagonal.precision("w"));
    assert_eq!(q.diagonal().unwrap().precision("w"), diagonal.precision("w"));
    assert_eq!(q.full().unwrap().mean_vector().size(), [3]);
}

/// d is 10³⁰ times smaller than the directions' squares: the quadratic form keeps its digits, which the difference of
/// two large numbers would not.
#[test]
fn tiny_independent_variances_lose_no_digits() {
    let t = |x: &[f64]| Tensor::from_slice(x);
    let u = t(&[1.0, 2.0, 2.0]).reshape([1, 3]);
    let q = LowRankGaussian::new([("w", t(&[0.0; 3]), t(&[1e-15; 3]), u)]).unwrap();
    // Along the direction: x = 1.5 u with ‖u‖² = 9, xᵀΣ⁻¹x = 1.5²·9/(9+1e-15).
    let theta = [("w".to_owned(), t(&[1.5, 3.0, 3.0]))];
    let log_det = 2.0 * 1e-15f64.ln() + (9.0f64 + 1e-15).ln();
    let expected = -0.5 * (3.0 * std::f64::consts::TAU.ln() + log_det + 2.25);
    close(q.log_prob(params(&theta)).unwrap(), expected, 1e-9);
}

#[test]
fn directions_that_depend_on_each_other_and_parameters_without_weights() {
    let t = |x: &[f64]| Tensor::from_slice(x);
    let zero = t(&[1.0, 0.0, 2.0, 0.0, 0.0, 0.0]).reshape([3, 2]);
    let empty = (("e", t(&[])), Tensor::zeros([3, 0], F64));
    let q =
        LowRankGaussian::new([("w", t(&[0.0; 2]), t(&[1.0; 2]), zero), (empty.0.0, t(&[]), t(&[]), empty.1)]).unwrap();
    assert_eq!((values(&q.variance("w").unwrap()), q.len()), (vec![6.0, 1.0], 2));
    close(q.entropy(), 1.0 + std::f64::consts::TAU.ln() + 0.5 * 6f64.ln(), 1e-14);
    assert_eq!(q.sample(0).unwrap()[1].1.size(), [0]);
    assert!(q.kl(&q).unwrap().abs() < 1e-15);
}

#[test]
fn what_is_no_covariance_is_refused() {
    let t = |x: &[f64]| Tensor::from_slice(x);
    let u = |k: i64| Tensor::ones([k, 2], F64);
    let of = |m: &[f64], d: &[f64], u: Tensor| LowRankGaussian::new([("w", t(m), t(d), u)]);
    let (m, d) = ([0.0, 1.0], [1.0, 1.0]);
    refused(LowRankGaussian::new(Vec::<(&str, Tensor, Tensor, Tensor)>::new()), &["no parameter"]);
    refused(of(&m, &[1.0, 0.0], u(2)), &["`w`", "smallest variance is 0", "clamp"]);
    refused(of(&m, &[1.0, -1.0], u(0)), &["`w`", "-1"]);
    refused(of(&m, &[1.0, f64::NAN], u(1)), &["`w`", "variance is not finite"]);
    refused(of(&[f64::INFINITY, 0.0], &d, u(1)), &["`w`", "mean is not finite"]);
    refused(of(&m, &d, u(1) * f64::NAN), &["`w`", "directions is not finite"]);
    refused(of(&m, &d, u(1) * 1e200), &["`w`", "variance with its directions"]);
    refused(of(&m, &[1.0], u(1)), &["`w`", "expected the same"]);
    refused(of(&m, &d, t(&[1.0, 1.0])), &["`w`", "[K, …]"]);
    refused(of(&m, &d, Tensor::ones([2, 3], F64)), &["`w`", "[2, 3]"]);
    refused(of(&m, &d, u(1).to_kind(Kind::Float)), &["`w`", "Float"]);
    refused(of(&m, &d, Tensor::new()), &["`w`", "undefined"]);
    let two = |k: i64| LowRankGaussian::new([("v", t(&m), t(&d), u(2)), ("w", t(&m), t(&d), u(k))]);
    refused(two(3), &["`w`", "3 directions and `v` 2"]);
    // (1, 1) and (1, -1), of lengths that leave nothing of the identity beside them in f64.
    let apart = Tensor::from_slice(&[1.0, 1.0, 1.0, 1.0]).reshape([2, 2]) * 1e10;
    let e = of(&m, &[1e-10, 1e-10], apart).unwrap_err();
    assert!(matches!(e, Error::NotPositiveDefinite { .. }), "{e}");
    let q = of(&m, &d, u(2)).unwrap();
    refused(q.temper(0.0), &["tau"]);
    refused(q.sample(1 << 32), &["4294967296"]);
    let other = LowRankGaussian::new([("v", t(&m), t(&d), u(2))]).unwrap();
    refused(q.kl(&other), &["w"]);
    refused(Prior::try_from(&q as &dyn Posterior), &["marginals"]);
    let w = Tensor::zeros([2], F64).set_requires_grad(true);
    let model = || Params::named([("w", w.shallow_clone())]).unwrap();
    Ivon::default().ess(10.0).prior(q.marginals().unwrap().temper(10.0).unwrap()).build(model(), 0.1).unwrap();
}

#[test]
fn a_saved_low_rank_posterior_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.safetensors");
    for rank in [0, 3] {
        let q = low_rank(rank, 0.4).with_seed(9);
        q.save(&path).unwrap();
        let back = LowRankGaussian::load(&path).unwrap();
        assert_eq!((back.names().collect::<Vec<_>>(), back.rank()), (vec!["a", "b"], rank as usize));
        assert_eq!((back.sample(2).unwrap(), back.entropy()), (q.sample(2).unwrap(), q.entropy()));
        refused(DiagonalGaussian::load(&path), &["low-rank Gaussian posterior"]);
    }
    let names = ["w", "w.variance"].map(|name| {
        let t = Tensor::ones([2], F64);
        (name, t.copy(), t.copy(), t.reshape([1, 2]))
    });
    refused(LowRankGaussian::new(names).unwrap().save(&path), &["two tensors", "w.variance"]);
}

//! What averaged predictions say about uncertainty, to the digits that they have.

use support::{close, refused, values, weight};
use tch::{Device, Kind, Tensor};
use tch_blr::{
    DiagonalGaussian, KroneckerGaussian, KroneckerParameter, MeanFieldBernoulli, Mixture, Params, Posterior,
};

fn posterior(w: &Tensor, precision: f64) -> (Params, DiagonalGaussian) {
    let q = DiagonalGaussian::new([("w", w.detach(), w.detach().full_like(precision))]).unwrap();
    (Params::named([("w", w.shallow_clone())]).unwrap(), q)
}

/// Samples that all say the same have no information in common, whatever digits their rows have to sum to one.
#[test]
fn samples_that_agree_have_no_mutual_information() {
    let w = weight(&[1.0]);
    let (params, q) = posterior(&w, 4.0);
    for (kind, classes) in [(Kind::BFloat16, 1000), (Kind::Half, 10), (Kind::Float, 10), (Kind::Double, 3)] {
        let logits = Tensor::arange(classes, (Kind::Double, Device::Cpu)).sin().unsqueeze(0);
        let p = logits.softmax(-1, Kind::Double).to_kind(kind);
        let predicted = q.predict(&params, 7, || p.shallow_clone()).unwrap();
        let expected = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        assert_eq!((predicted.mean.kind(), predicted.entropy.kind()), (expected, expected));
        assert!(predicted.mutual_information.double_value(&[0]) < 1e-12, "{kind:?}");
        close(predicted.mean.sum(Kind::Double).double_value(&[]), 1.0, 1e-6);
    }
}

/// ln 2 less some 10⁻⁹, in f32: against the same samples in f64.
#[test]
fn small_mutual_information_has_digits() {
    let w = weight(&[0.0]);
    let (params, q) = posterior(&w, 1e8);
    let samples = 20;
    let outputs = || Tensor::stack(&[w.shallow_clone(), -&w], 1).to_kind(Kind::Float).softmax(-1, Kind::Float);
    let predicted = q.predict(&params, samples, outputs).unwrap();
    let all = q.predict_samples(&params, samples, outputs).unwrap().to_kind(Kind::Double);
    let all = &all / all.sum_dim_intlist(-1, true, Kind::Double);
    let entropy = |p: &Tensor| values(&-(p * p.log()).sum_dim_intlist(-1, false, Kind::Double));
    let each: f64 = entropy(&all).iter().sum::<f64>() / samples as f64;
    let expected = entropy(&all.mean_dim(0, false, Kind::Double))[0] - each;
    let found = predicted.mutual_information.double_value(&[0]);
    assert!(expected > 1e-10 && expected < 1e-7 && (found / expected - 1.0).abs() < 1e-4, "{found:e} {expected:e}");
}

/// A seed has 2³² samples, in every family; of a mixture, of all components together.
#[test]
fn samples_beyond_a_seeds_are_refused() {
    let q = |x: f64| DiagonalGaussian::new([("w", Tensor::from_slice(&[x]), Tensor::from_slice(&[2.0]))]).unwrap();
    let last = u64::from(u32::MAX);
    let [mean, precision] = [1.0, 2.0].map(|x| Tensor::from_slice(&[x]));
    let one = KroneckerParameter { name: "w".to_owned(), mean, left: None, right: None, precision };
    let kronecker = KroneckerGaussian::new([one]).unwrap();
    let bernoulli = MeanFieldBernoulli::new([("w", Tensor::from_slice(&[0.5]))]).unwrap();
    let all: [(Box<dyn Posterior>, u64); 5] = [
        (Box::new(q(1.0)), last),
        (Box::new(q(1.0).full().unwrap()), last),
        (Box::new(kronecker), last),
        (Box::new(bernoulli), last),
        (Box::new(Mixture::new([(1.0, q(1.0)), (1.0, q(2.0))]).unwrap()), last / 2),
    ];
    for (q, last) in all {
        q.sample(last).unwrap();
        for k in [last + 1, u64::MAX] {
            refused(q.sample(k), &["2³²", "with_seed", "was asked for"]);
        }
    }
}

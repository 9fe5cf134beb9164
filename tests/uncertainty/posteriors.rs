//! Forecasts by a posterior: `predict_regression`.

use super::{rows, t};
use support::{all_close, bits, close, refused, seeded, values, weight};
use tch::{Device, Kind, Tensor};
use tch_blr::metrics::Forecast;
use tch_blr::{DiagonalGaussian, Error, Mixture, Params, Posterior};

fn posterior(w: &Tensor, precision: f64) -> (Params, DiagonalGaussian) {
    let q = DiagonalGaussian::new([("w", w.detach(), w.detach().full_like(precision))]).unwrap();
    (Params::named([("w", w.shallow_clone())]).unwrap(), q)
}

/// A mixture over the samples, whose means are those of `predict_samples`.
#[test]
fn a_posterior_forecasts_numbers() {
    let w = weight(&[1.0, -2.0]);
    let (params, q) = posterior(&w, 4.0);
    let x = rows(&[1.0, 0.5, 2.0, -1.0, 0.0, 3.0], 2);
    let outputs = || x.matmul(&w.unsqueeze(1));
    let before = bits(&w);
    let f = q.predict_regression(&params, 50, || (outputs(), 0.3)).unwrap();
    assert_eq!(bits(&w), before);
    let z = q.predict_samples(&params, 50, outputs).unwrap();
    assert_eq!((f.components(), f.size()), (50, &[3_i64, 1][..]));
    all_close(&values(&f.mean().unwrap()), &values(&z.mean_dim(0, false, Kind::Double)), 1e-14);
    let spread = z.var_dim([0].as_slice(), false, false);
    all_close(&values(&f.epistemic().unwrap()), &values(&spread), 1e-13);
    all_close(&values(&f.noise().unwrap()), &[0.3; 3], 1e-15);
    all_close(&values(&f.variance().unwrap()), &values(&(spread + 0.3)), 1e-13);
    // The mixture of N(z_k, 0.3), by its definition.
    let y = x.matmul(&w.detach().unsqueeze(1)) + 0.7;
    let each = (&z - &y).square() / -0.6 - 0.5 * (std::f64::consts::TAU * 0.3).ln() - 50_f64.ln();
    close(f.nll(&y).unwrap(), -each.logsumexp(0, false).mean(Kind::Double).double_value(&[]), 1e-13);
    // In batches, through the trait, with the variance as a tensor, and with a Result: the same numbers.
    let dynamic: &dyn Posterior = &q;
    let batches = || x.split(2, 0);
    let forecast = |x: &Tensor| -> Result<(Tensor, f64), Error> { Ok((x.matmul(&w.unsqueeze(1)), 0.3)) };
    let others = [
        q.predict_regression_batches(&params, 50, batches, |x| forecast(&x)).unwrap(),
        dynamic.predict_regression(&params, 50, || forecast(&x)).unwrap(),
        q.predict_regression(&params, 50, || (outputs(), outputs().full_like(0.3))).unwrap(),
    ];
    for other in others {
        assert_eq!(bits(&other.mean().unwrap()), bits(&f.mean().unwrap()));
        assert_eq!(other.crps(&y).unwrap(), f.crps(&y).unwrap());
    }
}

/// y = w with w ~ N(1, 1/4) and noise of variance 0.75 is N(1, 1): within five standard errors of 4000 samples.
#[test]
fn the_forecast_is_the_posterior_predictive() {
    let w = weight(&[1.0]);
    let (params, q) = posterior(&w, 4.0);
    // The output is the variable itself, which does not stay at its sample.
    let f = q.predict_regression(&params, 4000, || (w.shallow_clone(), 0.75)).unwrap();
    let error = (1.0 / 4000_f64).sqrt();
    close(values(&f.mean().unwrap())[0], 1.0, 5.0 * 0.5 * error);
    close(values(&f.epistemic().unwrap())[0], 0.25, 5.0 * 0.25 * 2_f64.sqrt() * error);
    let exact = Forecast::gaussian(&t(&[1.0]), &t(&[1.0])).unwrap();
    for p in [0.05, 0.5, 0.9] {
        let [ours, theirs] = [&f, &exact].map(|f| values(&f.quantile(p).unwrap())[0]);
        // Its error is below √(p(1-p)/4000) over the density at the quantile, which is above 0.1 here.
        close(ours, theirs, 5.0 * (p * (1.0 - p)).sqrt() * error / 0.1);
        close(values(&f.pit(&t(&[theirs])).unwrap())[0], p, 5.0 * 0.5 * error);
    }
}

#[test]
fn noise_may_depend_on_the_input_and_the_weights() {
    let w = weight(&[0.5, 1.0]);
    let (params, q) = posterior(&w, 16.0);
    let f = q.predict_regression(&params, 20, || (&w * 2.0, w.exp())).unwrap();
    let noise = q.predict_samples(&params, 20, || w.exp()).unwrap().mean_dim(0, false, Kind::Double);
    all_close(&values(&f.noise().unwrap()), &values(&noise), 1e-14);
    // Other kinds than f64 come as they are.
    let half = q.predict_regression(&params, 20, || (w.to_kind(Kind::BFloat16), 0.5)).unwrap();
    assert_eq!(half.mean().unwrap().kind(), Kind::Double);
}

/// `samples` of each component, by the component's weight.
#[test]
fn components_of_a_posterior_count_by_their_weight() {
    let w = weight(&[0.0]);
    let q = |m: f64| DiagonalGaussian::new([("w", t(&[m]), t(&[1e12]))]).unwrap();
    let params = Params::named([("w", w.shallow_clone())]).unwrap();
    let two = Mixture::new([(1.0, q(0.0)), (3.0, q(4.0))]).unwrap();
    let f = two.predict_regression(&params, 5, || (w.shallow_clone(), 0.5)).unwrap();
    assert_eq!(f.components(), 10);
    close(values(&f.mean().unwrap())[0], 3.0, 1e-5);
    close(values(&f.epistemic().unwrap())[0], 3.0, 1e-5);
}

#[test]
fn what_a_closure_must_not_return_is_named() {
    let _seeded = seeded(0);
    let w = weight(&[1.0, 2.0]);
    let (params, q) = posterior(&w, 4.0);
    let before = bits(&w);
    let predict = |mean: &dyn Fn() -> Tensor, v: f64| q.predict_regression(&params, 3, || (mean(), v));
    let good = || &w * 1.0;
    refused(predict(&good, -0.1), &["variances[0, 0] = -0.1"]);
    refused(predict(&good, f64::NAN), &["variances[0, 0] = NaN"]);
    refused(predict(&|| &w * f64::NAN, 0.1), &["means[0, 0] = NaN"]);
    refused(predict(&Tensor::new, 0.1), &["undefined tensor"]);
    refused(predict(&|| w.narrow(0, 0, 0), 0.1), &["at least one"]);
    refused(q.predict_regression(&params, 0, || (good(), 0.1)), &["samples"]);
    refused(q.predict_regression(&params, 3, || (good(), good().unsqueeze(1))), &["mean of shape [2]", "[2, 1]"]);
    let count = std::cell::Cell::new(0);
    let shrinking = || {
        count.set(count.get() + 1);
        w.narrow(0, 0, if count.get() > 1 { 1 } else { 2 })
    };
    refused(predict(&shrinking, 0.1), &["shape [1] after [2]"]);
    let failing = || -> Result<(Tensor, f64), Error> { Err(Error::Metric("mine".into())) };
    refused(q.predict_regression(&params, 3, failing), &["the closure failed", "mine"]);
    let none = std::iter::empty::<Tensor>;
    refused(q.predict_regression_batches(&params, 3, none, |x| (x, 0.1)), &["no batches"]);
    assert_eq!(bits(&w), before);
    // Batch normalization in training mode moves its buffers.
    let vs = tch::nn::VarStore::new(Device::Cpu);
    let norm = tch::nn::batch_norm1d(vs.root() / "norm", 2, tch::nn::BatchNormConfig::default());
    let q = DiagonalGaussian::new([("norm.weight", t(&[1.0, 1.0]), t(&[4.0, 4.0]))]).unwrap();
    let x = Tensor::randn([4, 2], (Kind::Float, Device::Cpu));
    let train = q.predict_regression(&vs, 2, || (tch::nn::ModuleT::forward_t(&norm, &x, true), 0.1));
    refused(train, &["buffer `norm.running_mean`"]);
}

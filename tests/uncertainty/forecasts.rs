//! Forecasts of numbers and their scores.

use super::{labels, rows, t};
use support::{all_close, close, refused, values};
use tch::{Device, Kind, Tensor};
use tch_blr::metrics::{Forecast, Interval, ks_uniform, rmse};
use tch_blr_examples::random::Rng;

#[test]
fn the_forecast_scores_of_the_reference() {
    let standard = Forecast::gaussian(&t(&[0.0]), &t(&[1.0])).unwrap();
    close(standard.crps(&t(&[0.0])).unwrap(), 0.233_694_977_255_109_13, 1e-15);
    let wide = Forecast::gaussian(&t(&[1.0]), &t(&[4.0])).unwrap();
    close(wide.crps(&t(&[2.5])).unwrap(), 0.896_288_504_393_100_6, 1e-15);
    close(wide.nll(&t(&[2.5])).unwrap(), 1.893_335_713_764_618, 1e-15);
    let two = Forecast::mixture(&[0.5, 0.5], &rows(&[0.0, 2.0], 1), &rows(&[1.0, 0.25], 1)).unwrap();
    close(two.crps(&t(&[1.0])).unwrap(), 0.367_782_807_285_651_7, 1e-15);
    close(two.nll(&t(&[1.0])).unwrap(), 1.743_104_578_363_302_3, 1e-15);
    let samples = Forecast::samples(&rows(&[0.0, 1.0, 3.0], 1)).unwrap();
    close(samples.crps(&t(&[1.0])).unwrap(), 1.0 / 3.0, 1e-15);
    close(samples.crps_fair(&t(&[1.0])).unwrap(), 0.0, 1e-15);
}

#[test]
fn a_mixture_has_its_moments_and_quantiles() {
    let f = Forecast::mixture(&[3.0, 1.0], &rows(&[0.0, 10.0, 4.0, 10.0], 2), &rows(&[1.0, 4.0, 9.0, 4.0], 2)).unwrap();
    assert_eq!((f.components(), f.size()), (2, &[2_i64][..]));
    all_close(&values(&f.mean().unwrap()), &[1.0, 10.0], 1e-15);
    all_close(&values(&f.epistemic().unwrap()), &[3.0, 0.0], 1e-14);
    all_close(&values(&f.noise().unwrap()), &[3.0, 4.0], 1e-14);
    all_close(&values(&f.variance().unwrap()), &[6.0, 4.0], 1e-14);
    // 0.95 quantile of a standard normal, to 16 digits.
    let z = 1.644_853_626_951_472_7;
    let interval = f.moment_matched().unwrap().interval(0.9).unwrap();
    all_close(&values(interval.upper()), &[1.0 + z * 6_f64.sqrt(), 10.0 + 2.0 * z], 1e-13);
    // Equal components are one Gaussian; elsewhere the CDF at the quantile is the level.
    let interval = f.interval(0.9).unwrap();
    close(values(interval.lower())[1], 10.0 - 2.0 * z, 1e-13);
    all_close(&values(&f.pit(interval.lower()).unwrap()), &[0.05, 0.05], 1e-14);
    all_close(&values(&f.pit(interval.upper()).unwrap()), &[0.95, 0.95], 1e-14);
    // Of samples, the smallest that so many are not above.
    let samples = Forecast::samples(&rows(&[5.0, 1.0, 2.0, 3.0], 1)).unwrap();
    close(values(&samples.quantile(0.6).unwrap())[0], 3.0, 1e-14);
    all_close(&values(&samples.pit(&t(&[2.0])).unwrap()), &[0.375], 1e-15);
}

/// The noise on top of what is not known; to each its part, in other units and as a Gaussian of its own too.
#[test]
fn a_gaussian_around_an_uncertain_number_has_both_variances() {
    let f = Forecast::around(&t(&[1.0, -2.0]), &t(&[0.5, 0.0]), &t(&[0.25, 4.0])).unwrap();
    let of = |f: &Forecast| [f.mean(), f.epistemic(), f.noise(), f.variance()].map(|x| values(&x.unwrap()));
    let whole = Forecast::gaussian(&t(&[1.0, -2.0]), &t(&[0.75, 4.0])).unwrap();
    for f in [&f, &f.moment_matched().unwrap()] {
        assert_eq!(of(f), [[1.0, -2.0], [0.5, 0.0], [0.25, 4.0], [0.75, 4.0]].map(Vec::from));
        let y = t(&[0.0, 0.5]);
        assert_eq!(f.nll(&y).unwrap(), whole.nll(&y).unwrap());
        assert_eq!(f.interval(0.9).unwrap().coverage(&y).unwrap(), whole.interval(0.9).unwrap().coverage(&y).unwrap());
    }
    // A noise far below what is not known is not lost in their sum.
    let vague = Forecast::around(&t(&[0.0]), &t(&[1e9]), &t(&[1e-9])).unwrap();
    assert_eq!(of(&vague.moment_matched().unwrap())[2], [1e-9]);
    let doubled = f.denormalize(1.0, 2.0).unwrap();
    assert_eq!(of(&doubled), [[3.0, -3.0], [2.0, 0.0], [1.0, 16.0], [3.0, 16.0]].map(Vec::from));
}

/// ∫ (P(y' ≤ x) - 𝟙[y ≤ x])² dx by the trapezoidal rule, apart at y, where the integrand jumps.
#[test]
fn crps_is_the_integral() {
    let (m, v, w) = ([0.0, 1.5, -2.0], [1.0, 0.25, 2.0], [0.2, 0.5, 0.3]);
    let f = Forecast::mixture(&w, &rows(&m, 1), &rows(&v, 1)).unwrap();
    for y in [-3.0, 0.4, 2.0] {
        let n = 20_001;
        let part = |from: f64, to: f64, of: f64| {
            let x = Tensor::linspace(from, to, n, (Kind::Double, Device::Cpu));
            let components: Vec<Tensor> = (0..3).map(|k| ((&x - m[k]) / v[k].sqrt()).special_ndtr() * w[k]).collect();
            let squares = (Tensor::stack(&components, 0).sum_dim_intlist(0, false, Kind::Double) - of).square();
            Tensor::trapezoid_x(&squares, &x, -1).double_value(&[])
        };
        close(f.crps(&t(&[y])).unwrap(), part(-25.0, y, 0.0) + part(y, 25.0, 1.0), 1e-7);
    }
}

#[test]
fn a_sure_forecast_is_an_absolute_error() {
    let f = Forecast::gaussian(&t(&[1.0, 2.0]), &t(&[0.0, 0.0])).unwrap();
    close(f.crps(&t(&[1.5, 2.0])).unwrap(), 0.25, 1e-15);
    // The floor of the variance, 10⁻¹².
    close(f.nll(&t(&[1.0, 2.0])).unwrap(), 0.5 * (std::f64::consts::TAU * 1e-12).ln(), 1e-12);
    assert_eq!(values(&f.pit(&t(&[1.5, 2.0])).unwrap()), [1.0, 0.5]);
    let interval = f.interval(0.9).unwrap();
    assert_eq!((interval.width().unwrap(), interval.coverage(&t(&[1.5, 2.0])).unwrap()), (0.0, 0.5));
}

#[test]
fn intervals_are_scored() {
    let interval = Interval::new(&t(&[0.0, 0.0, 0.0]), &t(&[2.0, 2.0, 1.0]), 0.8).unwrap();
    let y = t(&[2.0, 3.0, -0.5]);
    assert_eq!(interval.coverage(&y).unwrap(), 1.0 / 3.0);
    close(interval.width().unwrap(), 5.0 / 3.0, 1e-15);
    // α = 0.2: ten for each unit outside.
    close(interval.score(&y).unwrap(), (2.0 + (2.0 + 10.0) + (1.0 + 5.0)) / 3.0, 1e-13);
    close(rmse(&t(&[1.0, 2.0]), &t(&[4.0, 6.0])).unwrap(), 12.5_f64.sqrt(), 1e-15);
}

/// Right predictions cover as they say at every level, with PIT values that are uniform: 2000 numbers, five standard
/// errors, and the bound of Dvoretzky, Kiefer, Wolfowitz and Massart at 10⁻⁶. Those that are too narrow do not.
#[test]
fn right_forecasts_cover_what_they_say() {
    let n = 2000_u32;
    let mut rng = Rng::new(2, 0);
    let (mut m, mut s, mut y) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..n {
        let (centre, sd) = (rng.between(-3.0, 3.0), rng.between(0.2, 2.0));
        y.push(centre + sd * rng.normal());
        m.push(centre);
        s.push(sd);
    }
    let (m, s, y) = (t(&m), t(&s), t(&y));
    let right = Forecast::gaussian(&m, &s.square()).unwrap();
    for level in [0.5, 0.8, 0.9, 0.95] {
        let error = (level * (1.0 - level) / f64::from(n)).sqrt();
        close(right.interval(level).unwrap().coverage(&y).unwrap(), level, 5.0 * error);
    }
    let bound = ((2.0 / 1e-6_f64).ln() / (2.0 * f64::from(n))).sqrt();
    let distance = |f: &Forecast| ks_uniform(&f.pit(&y).unwrap()).unwrap();
    let narrow = Forecast::gaussian(&m, &(s.square() * 0.25)).unwrap();
    assert!(distance(&right) < bound && distance(&narrow) > bound, "{} {}", distance(&right), distance(&narrow));
    // Both scores prefer the truth.
    assert!(right.crps(&y).unwrap() < narrow.crps(&y).unwrap() && right.nll(&y).unwrap() < narrow.nll(&y).unwrap());
}

#[test]
fn scores_in_the_unit_of_the_data() {
    let (mean, sd) = (5.0, 3.0_f64);
    let f = Forecast::mixture(&[0.4, 0.6], &rows(&[0.0, 1.0, 2.0, -1.0], 2), &rows(&[1.0, 2.0, 0.5, 0.2], 2)).unwrap();
    let (y, there) = (t(&[0.3, -0.2]), f.denormalize(mean, sd).unwrap());
    let of_data = &y * sd + mean;
    close(there.nll(&of_data).unwrap(), f.nll(&y).unwrap() + sd.ln(), 1e-14);
    close(there.crps(&of_data).unwrap(), f.crps(&y).unwrap() * sd, 1e-14);
    all_close(&values(&there.pit(&of_data).unwrap()), &values(&f.pit(&y).unwrap()), 1e-15);
    let [a, b] = [(&f, &y), (&there, &of_data)].map(|(f, y)| rmse(&f.mean().unwrap(), y).unwrap());
    close(b, a * sd, 1e-14);
    let [a, b] = [&f, &there].map(|f| f.interval(0.9).unwrap().width().unwrap());
    close(b, a * sd, 1e-12);
}

#[test]
fn forecasts_refuse_what_they_cannot_be() {
    let one = t(&[1.0, 2.0]);
    refused(Forecast::gaussian(&one, &t(&[1.0, -0.5])), &["variance[1] = -0.5", "≥ 0"]);
    refused(Forecast::gaussian(&t(&[1.0, f64::NAN]), &one), &["mean[1] = NaN"]);
    refused(Forecast::gaussian(&one, &t(&[1.0, f64::INFINITY])), &["variance[1] = inf"]);
    refused(Forecast::gaussian(&one, &one.unsqueeze(1)), &["variance has shape [2, 1]", "[2]"]);
    refused(Forecast::gaussian(&t(&[]), &t(&[])), &["mean has shape [0]", "at least one"]);
    refused(Forecast::around(&one, &t(&[-0.5, 1.0]), &one), &["epistemic[0] = -0.5", "≥ 0"]);
    refused(Forecast::around(&one, &one, &t(&[1.0, f64::NAN])), &["noise[1] = NaN"]);
    refused(Forecast::around(&one, &one, &t(&[1.0])), &["noise has shape [1]", "epistemic"]);
    refused(Forecast::gaussian(&labels(&[1]), &t(&[1.0])), &["mean is Int64"]);
    refused(Forecast::gaussian(&Tensor::new(), &one), &["mean is an undefined tensor"]);
    let (m, v) = (rows(&[0.0, 1.0, 2.0, 3.0], 2), Tensor::ones([2, 2], (Kind::Double, Device::Cpu)));
    refused(Forecast::mixture(&[1.0], &m, &v), &["1 weights for 2 components"]);
    refused(Forecast::mixture(&[1.0, -1.0], &m, &v), &["weights[1] = -1"]);
    refused(Forecast::mixture(&[0.0, 0.0], &m, &v), &["the sum 0"]);
    refused(Forecast::mixture(&[1.0, 1.0], &m, &(v * -1.0)), &["variances[0, 0] = -1"]);
    refused(Forecast::samples(&t(&[1.0]).squeeze()), &["a single number"]);
    refused(Forecast::samples(&t(&[0.0, 1.0]).unsqueeze(1)).unwrap().nll(&t(&[1.0])), &["no density", "crps"]);
    let f = Forecast::gaussian(&one.unsqueeze(1), &one.unsqueeze(1)).unwrap();
    // Not broadcast to [2, 2].
    refused(f.nll(&one), &["y has shape [2]", "[2, 1]"]);
    refused(f.crps(&one), &["y has shape [2]"]);
    refused(f.pit(&t(&[f64::NAN, 0.0]).unsqueeze(1)), &["y[0, 0] = NaN"]);
    refused(f.crps_fair(&one.unsqueeze(1)), &["1 components", "crps(..)"]);
    let unequal = Forecast::mixture(&[1.0, 2.0], &m, &m).unwrap();
    refused(unequal.crps_fair(&one), &["of the same weight"]);
    for bad in [0.0, 1.0, 1.5, f64::NAN] {
        refused(f.interval(bad), &["level = "]);
        refused(f.quantile(bad), &["p = "]);
        refused(Interval::new(&one, &one, bad), &["level = "]);
    }
    refused(f.denormalize(0.0, 0.0), &["sd = 0"]);
    refused(f.denormalize(f64::NAN, 1.0), &["mean = NaN"]);
    refused(Interval::new(&t(&[f64::NAN]), &t(&[1.0]), 0.5), &["lower[0] = NaN"]);
    refused(Interval::new(&one, &t(&[1.0]), 0.5), &["upper has shape [1]", "that of lower"]);
    refused(Interval::new(&one, &one, 0.5).unwrap().score(&t(&[1.0])), &["y has shape [1]"]);
    refused(rmse(&one, &one.unsqueeze(1)), &["y has shape [2, 1]"]);
    refused(ks_uniform(&t(&[0.5, 1.5])), &["values[1] = 1.5"]);
}

//! What must hold for every input: positivity, the algebra of posteriors, round trips, equal back-ends.

use proptest::prelude::*;
use support::{close, mean_and_error, values};
use tch::{Kind, Tensor};
use tch_blr::rows::{Momentum, PrecisionInStep, PriorPull, StepLength};
use tch_blr::rule::{Row, Rule, Site, When};
use tch_blr::{
    Adam, AdamW, BayesianSam, DiagonalGaussian, Evon, Expectation, Ivon, Labels, Params, RmsProp, Sam, SamRmsProp,
    Schedule, Sgd, Statistic, Von, combine,
};

/// S before and after a step whose curvature estimate is f, and a bound on the rounding of S after it.
fn retract<R>(rule: R, h: f64, delta: f64, r: f64, curvature: f64, f: f64) -> (f64, f64, f64)
where
    R: Rule<State<f64> = [f64; 3]>,
{
    let site = Site { mean: 0.0, gradient: 0.0, curvature, prior_mean: 0.0, delta };
    let (mean, [_, new, _]) = rule.update(rule.coefficients(When { t: 1, lr: 0.0 }), site, [0.0, h, 0.0]);
    assert_eq!(mean, 0.0, "with a learning rate of 0 the mean stays");
    let s = h + delta;
    let terms = h.abs() + delta + r * (f - h).abs() + 0.5 * (r * (f - h)).powi(2) / s;
    (s, new + delta, 8.0 * f64::EPSILON * terms)
}

/// The improved rules with S = h+δ, given f.
fn improved(h: f64, delta: f64, r: f64, f: f64) -> [(f64, f64, f64); 3] {
    let ivon = Ivon::default().ess(1.0).beta2(1.0 - r);
    let square = ivon.hessian(Statistic::SquaredGradient).square_scale(1.0);
    let von = Von::default().ess(1.0).beta2(1.0 - r).hessian(Statistic::Price);
    let price = f / (h + delta);
    [retract(ivon, h, delta, r, price, f), retract(square, h, delta, r, f, f), retract(von, h, delta, r, price, f)]
}

/// 10ˣ
fn magnitude(exponents: std::ops::Range<f64>) -> impl Strategy<Value = f64> {
    exponents.prop_map(|x| 10f64.powf(x))
}

proptest! {
    /// The retraction is (S + (S+r(f-h))²/S)/2, which is at least S/2.
    #[test]
    fn the_precision_never_falls_below_half(
        s in magnitude(-8.0..8.0),
        delta in magnitude(-8.0..8.0),
        r in magnitude(-6.0..-1e-3),
        f in magnitude(-8.0..12.0),
        sign in prop::sample::select(vec![-1.0, 1.0]),
    ) {
        for (old, new, rounding) in improved(s - delta, delta, r, sign * f) {
            // δ may swallow S altogether.
            prop_assume!(old > 0.0);
            prop_assert!(new >= 0.5 * old - rounding, "{old} → {new}");
        }
    }

    /// The worst case r(f-h) = -S reaches the bound.
    #[test]
    fn half_is_reached(s in magnitude(-3.0..3.0), delta in magnitude(-3.0..3.0), r in magnitude(-6.0..-1e-3)) {
        let h = s - delta;
        for (old, new, rounding) in improved(h, delta, r, h - s / r) {
            prop_assert!((new - 0.5 * old).abs() <= rounding + 1e-12 * old, "{old} → {new}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// φ(x) = 1 + x + ½x² of x = r(f-h)/(h+δ), which rises from x = -1 on.
    #[test]
    fn a_clipped_price_bounds_the_change_of_the_precision(
        kappa in magnitude(-2.0..2.0),
        share in 0.0..1.0,
        price in magnitude(-4.0..8.0),
        sign in prop::sample::select(vec![-1.0, 1.0]),
        s in magnitude(-3.0..3.0),
        prior in prop_oneof![Just(0.0), 0.0..1.0],
    ) {
        // S = h + δ
        let (h, delta) = (s * (1.0 - prior), s * prior);
        prop_assume!(h > 0.0);
        let s = h + delta;
        let beta2 = 1.0 - share / (1.0 + kappa);
        // As the row has it.
        let r: f64 = 1.0 - beta2;
        let w = Tensor::zeros([1, 1], (Kind::Double, tch::Device::Cpu)).set_requires_grad(true);
        let params = Params::named([("w", w.shallow_clone())]).unwrap();
        let rule = Evon::default().ess(7.0).hess_init(h).weight_decay(delta).beta2(beta2).hess_clip(kappa);
        let mut opt = rule.noise(tch_blr::Given(vec![vec![vec![Tensor::ones([1, 1], (Kind::Double, tch::Device::Cpu))]]]))
            .build(params, 0.1).unwrap();
        // e = 1/√(λS), so that f = e g λS.
        opt.step(|| (&w * (sign * price)).sum(Kind::Double)).unwrap();
        let factor = (opt.state("w", "hess").unwrap().double_value(&[0, 0]) + delta) / s;
        let phi = |x: f64| 1.0 + x + 0.5 * x * x;
        let rounding = 1e-13 * (1.0 + kappa);
        prop_assert!(factor >= phi(-r * (1.0 + kappa)) - rounding, "{factor}");
        prop_assert!(factor <= phi(r * kappa) + rounding, "{factor}");
        prop_assert!(prior > 0.0 || factor <= phi(r * (kappa - 1.0)) + rounding, "{factor}");
        let f = (sign * price * (7.0 / s).sqrt()).clamp(-kappa, kappa);
        prop_assert!((factor - phi(r * (f - h / s))).abs() <= rounding, "{factor}");
    }
}

/// h = 1, δ = 0.1, r = ½ (reference): far outliers of either sign make a large precision, never a negative one.
#[test]
fn outliers_make_a_large_precision() {
    for (f, expected) in [(-5.0, 2.190_909), (-50.0, 271.168), (50.0, 298.441)] {
        for (_, new, _) in improved(1.0, 0.1, 0.5, f) {
            // To the digits of the reference.
            close(new / expected, 1.0, 2e-6);
        }
    }
}

type Numbers = Vec<(f64, f64)>;

/// Means and precisions of a posterior over two parameters with four and one weights.
fn numbers() -> impl Strategy<Value = Numbers> {
    prop::collection::vec((-10.0..10.0, magnitude(-3.0..3.0)), 5)
}

fn posterior(numbers: &Numbers) -> DiagonalGaussian {
    let (mean, precision): (Vec<f64>, Vec<f64>) = numbers.iter().copied().unzip();
    let (mean, precision) = (Tensor::from_slice(&mean), Tensor::from_slice(&precision));
    let part = |t: &Tensor, at: i64, shape: &[i64]| t.narrow(0, at, shape.iter().product()).reshape(shape);
    let entry = |name, at, shape: &[i64]| (name, part(&mean, at, shape), part(&precision, at, shape));
    DiagonalGaussian::new([entry("a", 0, &[2, 2]), entry("b", 4, &[1])]).unwrap()
}

fn of(q: &DiagonalGaussian) -> Numbers {
    let all = |t: &dyn Fn(&str) -> Vec<f64>| [t("a"), t("b")].concat();
    let means = all(&|n| values(&q.mean(n).unwrap()));
    means.into_iter().zip(all(&|n| values(&q.precision(n).unwrap()))).collect()
}

/// Compares natural parameters s·m and s with the rounding of sums of numbers as large as `scale`.
fn same(a: &DiagonalGaussian, b: &DiagonalGaussian, scale: f64) -> Result<(), TestCaseError> {
    for ((m, s), (n, t)) in of(a).into_iter().zip(of(b)) {
        prop_assert!((s - t).abs() <= 1e-14 * scale && (s * m - t * n).abs() <= 1e-13 * scale, "{a:?} {b:?}");
    }
    Ok(())
}

fn scale(numbers: &[&Numbers]) -> f64 {
    numbers.iter().flat_map(|q| q.iter()).map(|(_, s)| *s).fold(0.0, f64::max)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn combining_adds_natural_parameters(a in numbers(), b in numbers(), u in 0.1..3.0, v in 0.1..3.0) {
        let sum = combine(&[(u, &posterior(&a)), (v, &posterior(&b))]).unwrap();
        for ((m, s), ((ma, sa), (mb, sb))) in of(&sum).into_iter().zip(a.into_iter().zip(b)) {
            let expected = u * sa + v * sb;
            prop_assert!((s - expected).abs() <= 1e-14 * expected);
            prop_assert!((m - (u * sa * ma + v * sb * mb) / expected).abs() <= 1e-13);
        }
    }

    #[test]
    fn combining_is_an_abelian_group(x in numbers(), y in numbers(), z in numbers(), w in 0.1..3.0) {
        let [a, b, c] = [&x, &y, &z].map(posterior);
        let scale = 10.0 * scale(&[&x, &y, &z]);
        let plus = |a: &DiagonalGaussian, b: &DiagonalGaussian| combine(&[(1.0, a), (1.0, b)]).unwrap();
        let all = combine(&[(1.0, &a), (1.0, &b), (1.0, &c)]).unwrap();
        same(&plus(&a, &b), &plus(&b, &a), scale)?;
        same(&plus(&plus(&a, &b), &c), &all, scale)?;
        same(&plus(&a, &plus(&b, &c)), &all, scale)?;
        // Removal undoes addition.
        same(&combine(&[(1.0, &plus(&a, &b)), (-1.0, &b)]).unwrap(), &a, scale)?;
        let weighted = combine(&[(1.0, &a), (w, &b)]).unwrap();
        same(&combine(&[(1.0, &weighted), (-w, &b)]).unwrap(), &a, scale)?;
    }

    #[test]
    fn weights_that_sum_to_one_keep_equal_posteriors(x in numbers(), u in 0.0..1.0, v in 0.0..1.0) {
        let q = posterior(&x);
        let (v, rest) = (v * (1.0 - u), (1.0 - u) * (1.0 - v));
        same(&combine(&[(u, &q), (v, &q), (rest, &q)]).unwrap(), &q, 10.0 * scale(&[&x]))?;
    }

    /// Merging fine-tunes qₖ of q₀ adds their differences to it: θ̄ = θ₀ + Σ aₖ H̄⁻¹ Hₖ (θₖ-θ₀), H̄ = H₀ + Σ aₖ (Hₖ-H₀)
    /// (Daheim et al. 2024).
    #[test]
    fn merging_matches_gradients(x in numbers(), y in numbers(), z in numbers(), a in 0.0..0.5, b in 0.0..0.5) {
        let [q0, q1, q2] = [&x, &y, &z].map(posterior);
        let merged = combine(&[(1.0 - a - b, &q0), (a, &q1), (b, &q2)]).unwrap();
        for (i, (m, s)) in of(&merged).into_iter().enumerate() {
            let ((m0, h0), (m1, h1), (m2, h2)) = (x[i], y[i], z[i]);
            let total = h0 + a * (h1 - h0) + b * (h2 - h0);
            let expected = m0 + (a * h1 * (m1 - m0) + b * h2 * (m2 - m0)) / total;
            prop_assert!((m - expected).abs() <= 1e-11 && (s / total - 1.0).abs() <= 1e-12, "{m} {expected}");
        }
    }

    #[test]
    fn divergence_entropy_and_density_are_those_of_normals(x in numbers(), y in numbers(), tau in 0.1..10.0) {
        let (q, p) = (posterior(&x), posterior(&y));
        prop_assert_eq!(q.kl(&q).unwrap(), 0.0);
        // KL(N(m,σ²) ‖ N(n,τ²)) = ln τ/σ + (σ² + (m-n)²)/2τ² - ½
        let kl: f64 = x.iter().zip(&y).map(|((m, s), (n, t))| {
            let (sigma, tau) = (s.sqrt().recip(), t.sqrt().recip());
            (tau / sigma).ln() + (sigma * sigma + (m - n).powi(2)) / (2.0 * tau * tau) - 0.5
        }).sum();
        let ours = q.kl(&p).unwrap();
        prop_assert!(ours >= 0.0 && (ours - kl).abs() <= 1e-12 * (1.0 + kl), "{ours} {kl}");

        let e = std::f64::consts::E;
        let entropy: f64 = x.iter().map(|(_, s)| 0.5 * (std::f64::consts::TAU * e / s).ln()).sum();
        prop_assert!((q.entropy() - entropy).abs() <= 1e-12);

        let point = Params::named(["a", "b"].map(|n| (n, p.mean(n).unwrap().copy().set_requires_grad(true)))).unwrap();
        let density: f64 = x.iter().zip(&y).map(|((m, s), (n, _))| {
            let sigma = s.sqrt().recip();
            -((n - m) / sigma).powi(2) / 2.0 - (sigma * std::f64::consts::TAU.sqrt()).ln()
        }).sum();
        let ours = q.log_prob(point).unwrap();
        prop_assert!((ours - density).abs() <= 1e-12 * (1.0 + density.abs()), "{ours} {density}");

        let warm = q.temper(tau).unwrap();
        same(&warm, &combine(&[(1.0 / tau, &q)]).unwrap(), 100.0 * scale(&[&x]))?;
        prop_assert!((warm.entropy() - q.entropy() - 2.5 * tau.ln()).abs() <= 1e-12);
    }
}

/// The mean of ln q - ln p over 400 samples of 2000 weights, within four standard errors.
#[test]
fn divergence_is_the_expected_log_ratio() {
    let n = 2000;
    let line = |a: f64, b: f64| Tensor::linspace(a, b, n, (Kind::Double, tch::Device::Cpu));
    let q = DiagonalGaussian::new([("w", line(-1.0, 1.0), line(-1.0, 2.0).exp())]).unwrap();
    let p = DiagonalGaussian::new([("w", line(0.5, -1.0), line(1.0, -1.0).exp())]).unwrap();
    let w = Tensor::zeros([n], (Kind::Double, tch::Device::Cpu)).set_requires_grad(true);
    let params = || Params::named([("w", w.shallow_clone())]).unwrap();
    let ratios: Vec<f64> = (0..400)
        .map(|k| {
            let _guard = q.perturb(params(), k).unwrap();
            q.log_prob(params()).unwrap() - p.log_prob(params()).unwrap()
        })
        .collect();
    let (mean, error) = mean_and_error(&ratios);
    close(mean, q.kl(&p).unwrap(), 4.0 * error);
    assert!(error < 0.01 * mean, "{mean} ± {error}");
}

fn round_trip<R: Row + PartialEq>(rule: R) -> Result<(), TestCaseError> {
    let text = serde_json::to_string(&rule).unwrap();
    prop_assert_eq!(serde_json::from_str::<R>(&text).unwrap(), rule);
    Ok(())
}

fn schedule() -> impl Strategy<Value = Schedule> {
    let ends = || (0..1000_u64, 1..1000_u64, 0.0..=1.0).prop_map(|(warmup, rest, end)| (warmup, warmup + rest, end));
    prop_oneof![
        Just(Schedule::Constant),
        ends().prop_map(|(warmup, total, end)| Schedule::Cosine { warmup, total, end }),
        (ends(), 0..1000_u64).prop_map(|((warmup, rest, end), stable)| {
            Schedule::Linear { warmup, stable, total: stable + rest, end }
        }),
        (ends(), 1..4_u64)
            .prop_map(|((warmup, period, end), growth)| { Schedule::CosineRestarts { warmup, period, growth, end } }),
        (1..100_u64, 0.0..=1.0).prop_map(|(every, factor)| Schedule::Step { every, factor }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn configurations_survive_serialization(
        x in prop::array::uniform8(prop::num::f64::NORMAL),
        ess in prop::option::of(prop::num::f64::NORMAL),
        on in prop::array::uniform4(any::<bool>()),
        samples in 1..10_usize,
        steps in any::<u64>(),
    ) {
        let expectation = match samples % 3 {
            0 => Expectation::Delta,
            1 => Expectation::MonteCarlo { samples },
            _ => Expectation::Antithetic { pairs: samples },
        };
        let step_length = if on[0] { StepLength::Newton } else { StepLength::Adam { beta: x[0] } };
        round_trip(Sgd { momentum: x[1], dampening: x[2], nesterov: on[0], weight_decay: x[3], ess })?;
        round_trip(RmsProp {
            alpha: x[1], eps: x[2], momentum: x[3], centered: on[0], weight_decay: x[4], ess,
        })?;
        round_trip(Adam { beta1: x[1], beta2: x[2], eps: x[3], amsgrad: on[0], weight_decay: x[4], ess })?;
        round_trip(AdamW { beta1: x[1], beta2: x[2], eps: x[3], amsgrad: on[0], weight_decay: x[4], ess })?;
        round_trip(Ivon {
            ess, hess_init: x[1], beta1: x[2], beta2: x[3], weight_decay: x[4], expectation,
            hessian: if on[0] { Statistic::Price } else { Statistic::SquaredGradient }, square_scale: ess, clip_radius: ess, debias: on[2], rescale_lr: on[3],
            relative_noise: ess, max_growth: ess, step_length,
            prior_pull: if on[1] { PriorPull::Precision } else { PriorPull::Unit },
        })?;
        round_trip(Evon {
            ess, weight_decay: x[1], hess_init: x[2], beta1: x[3], beta2: x[4], beta_basis: x[5], frequency: steps,
            max_dim: steps as i64, merge_dims: on[0], rotate_vectors: on[1], expectation, hess_clip: ess, clip_radius: ess,
            debias: on[2], relative_noise: ess, max_growth: ess, phased: on[3], whiten: !on[0], step_length,
        })?;
        round_trip(Von {
            ess, weight_decay: x[1], hess_init: x[2], hess_from_first_batch: on[0], beta1: x[3], beta2: x[4],
            damping: x[5], expectation,
            hessian: if on[1] { Statistic::Fisher(Labels::Observed) } else { Statistic::Price },
            momentum: if on[2] { Momentum::Average } else { Momentum::HeavyBall },
            debias: on[3], prior_in_momentum: !on[0],
            precision_in_step: if on[1] { PrecisionInStep::New } else { PrecisionInStep::Old },
            temperature: x[6], warmup_from: x[7], warmup_steps: steps, augmentation: -x[0], relative_noise: ess, step_length,
        })?;
        round_trip(Sam { rho: x[1], momentum: x[2], weight_decay: x[3], ess })?;
        round_trip(SamRmsProp { rho: x[1], alpha: x[2], eps: x[3], weight_decay: x[4], ess })?;
        round_trip(BayesianSam {
            ess, rho: x[1], hess_init: x[2], beta1: x[3], beta2: x[4], weight_decay: x[5], damping: x[6],
            precision_in_step: if on[1] { PrecisionInStep::New } else { PrecisionInStep::Old },
            relative_noise: ess, step_length,
        })?;
    }

    #[test]
    fn schedules_only_lower_the_learning_rate(schedule in schedule(), at in 0..3000_u64) {
        let factor = schedule.factor(at);
        prop_assert!((0.0..=1.0).contains(&factor), "{factor}");
        let text = serde_json::to_string(&schedule).unwrap();
        prop_assert_eq!(serde_json::from_str::<Schedule>(&text).unwrap(), schedule);
    }
}

#[test]
fn what_a_file_does_not_say_is_the_default() {
    fn default_of<R: Row + PartialEq + Default>() {
        assert_eq!(serde_json::from_str::<R>("{}").unwrap(), R::default());
    }
    default_of::<Sgd>();
    default_of::<RmsProp>();
    default_of::<Adam>();
    default_of::<AdamW>();
    default_of::<Ivon>();
    default_of::<Von>();
    default_of::<Evon>();
    default_of::<Sam>();
    default_of::<SamRmsProp>();
    default_of::<BayesianSam>();
}

const STEPS: usize = 4;

/// Mean and state after a few steps. A transposed layout is not contiguous, so libtorch's operations take it, where
/// otherwise one pass over memory does.
fn run<R: Rule>(rule: R, kind: Kind, transposed: bool, random: &[f64]) -> Vec<Vec<f64>> {
    let shape = [3, 4];
    let tensor = |x: &[f64]| {
        let t = Tensor::from_slice(x).to_kind(kind).reshape(shape);
        if transposed { t.tr().contiguous().tr() } else { t }
    };
    let (start, gradients) = random.split_at(12);
    let w = tensor(start).set_requires_grad(true);
    assert_eq!(w.is_contiguous(), !transposed);
    let noise: Vec<&[f64]> = gradients.chunks(12).collect();
    let noise = (0..STEPS)
        .map(|step| (0..2).map(|k| vec![Tensor::from_slice(noise[step + k]).reshape(shape)]).collect())
        .collect();
    let params = Params::named([("w", w.shallow_clone())]).unwrap();
    let mut opt = rule.builder().noise(tch_blr::Given(noise)).build(params, 0.1).unwrap();
    for gradient in gradients.chunks(24).take(STEPS) {
        // Linear losses of two examples, so that libtorch's own arithmetic is the same in both layouts.
        let losses = || gradient.chunks(12).map(|g| (&w * tensor(g)).sum(kind)).collect::<Vec<_>>();
        opt.step(|| Tensor::stack(&losses(), 0)).unwrap();
    }
    let state = R::STATE.iter().filter_map(|name| Some(values(&opt.state("w", name)?)));
    std::iter::once(values(&w)).chain(state).collect()
}

/// How far the two back-ends may be apart, in units of the last place of 1 + |x|.
///
/// libtorch's square root is MKL's, which is one unit off in a sixth (f32) or a hundredth (f64) of all cases; rows that
/// take none on the way must agree in every bit.
#[derive(Clone, Copy, PartialEq)]
enum Roots {
    None,
    /// One per step, the first of which the later steps carry on.
    Some,
}

fn same_on_both<R: Rule>(rule: R, roots: Roots, random: &[f64]) -> Result<(), TestCaseError> {
    let [single, double] = [f64::from(f32::EPSILON), f64::EPSILON];
    // Of the state, and of one rounding of a weight.
    let kinds = [
        (Kind::Float, single, 32.0 * single),
        (Kind::Double, double, 32.0 * double),
        (Kind::BFloat16, single, 2f64.powi(-8)),
        (Kind::Half, single, 2f64.powi(-11)),
    ];
    for (kind, epsilon, rounding) in kinds {
        let (lanes, tensors) = (run(rule, kind, false, random), run(rule, kind, true, random));
        for (i, (lanes, tensors)) in lanes.iter().zip(&tensors).enumerate() {
            let tolerance = match roots {
                Roots::None => 0.0,
                Roots::Some => {
                    if i == 0 {
                        rounding
                    } else {
                        32.0 * epsilon
                    }
                }
            };
            for (a, b) in lanes.iter().zip(tensors) {
                prop_assert!((a - b).abs() <= tolerance * (1.0 + a.abs()), "{rule:?} {kind:?} {i}: {a} {b}");
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn every_row_is_the_same_on_memory_and_on_tensors(random in prop::collection::vec(-2.0..2.0, 12 + 24 * STEPS)) {
        same_on_both(Sgd::default().momentum(0.9).nesterov(true).weight_decay(0.1), Roots::None, &random)?;
        same_on_both(Sgd::default().momentum(0.9).dampening(0.3), Roots::None, &random)?;
        for centered in [false, true] {
            same_on_both(RmsProp::default().momentum(0.9).centered(centered).weight_decay(0.1), Roots::Some, &random)?;
        }
        for amsgrad in [false, true] {
            same_on_both(Adam::default().amsgrad(amsgrad).weight_decay(0.1), Roots::Some, &random)?;
            same_on_both(AdamW::default().amsgrad(amsgrad).weight_decay(0.1), Roots::Some, &random)?;
        }
        let ivon = Ivon::default().ess(10.0).beta2(0.9);
        same_on_both(ivon.clip_radius(0.1), Roots::Some, &random)?;
        same_on_both(ivon.samples(2).expectation(Expectation::Antithetic { pairs: 1 }).rescale_lr(false).debias(false), Roots::Some, &random)?;
        same_on_both(ivon.hessian(Statistic::SquaredGradient).square_scale(3.0), Roots::Some, &random)?;
        let adam = StepLength::Adam { beta: 0.9 };
        same_on_both(ivon.step_length(adam).max_growth(1.5).relative_noise(0.1), Roots::Some, &random)?;
        same_on_both(ivon.prior_pull(PriorPull::Unit), Roots::Some, &random)?;
        same_on_both(Von::default().ess(10.0).beta2(0.9).step_length(adam), Roots::Some, &random)?;
        same_on_both(BayesianSam::default().ess(10.0).beta2(0.9).step_length(adam), Roots::Some, &random)?;
        let von = Von::default().ess(10.0).beta2(0.9).damping(0.1).temperature(0.5).warmup_from(0.1).warmup_steps(3);
        same_on_both(von, Roots::Some, &random)?;
        same_on_both(von.expectation(Expectation::Delta).hess_from_first_batch(true), Roots::None, &random)?;
        same_on_both(von.hessian(Statistic::Price).precision_in_step(PrecisionInStep::Old), Roots::Some, &random)?;
        let heavy = von.momentum(Momentum::HeavyBall).debias(false).prior_in_momentum(true);
        same_on_both(heavy.expectation(Expectation::Antithetic { pairs: 1 }), Roots::Some, &random)?;
        same_on_both(Sam::default().weight_decay(0.1), Roots::None, &random)?;
        same_on_both(SamRmsProp::default().weight_decay(0.1), Roots::Some, &random)?;
        same_on_both(BayesianSam::iclr2023().ess(10.0).beta2(0.9), Roots::Some, &random)?;
        same_on_both(BayesianSam::released().ess(10.0).beta2(0.9), Roots::Some, &random)?;
    }
}

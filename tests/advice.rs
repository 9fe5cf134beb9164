//! `Diagnostics::advice`: a run for each sentence, and one that there is nothing to say about.

use support::{F64, Net, close, params, weight};
use tch::{Kind, Tensor};
use tch_blr::{Adam, Advice, Builder, DiagonalGaussian, Ivon, Philox, Schedule, Von, rule::Row};

/// What is said after some steps on the small regression.
fn after<R: Row>(steps: usize, lr: f64, builder: Builder<R>) -> Vec<Advice> {
    let net = Net::new(F64);
    let mut opt = builder.noise(Philox { seed: 5 }).build(&net.vs, lr).unwrap();
    for _ in 0..steps {
        opt.step(|| net.losses()).unwrap();
    }
    opt.diagnostics().unwrap().advice()
}

/// Small noise, half of it learned, and a prior that the data outweigh.
fn healthy() -> Ivon {
    Ivon::default().ess(1e4).hess_init(0.5).beta2(0.98).weight_decay(1e-6)
}

#[test]
fn nothing_is_said_about_a_healthy_run() {
    assert_eq!(after(40, 0.05, healthy().builder()), []);
    assert_eq!(after(40, 0.01, Adam::default().builder()), [], "and rows of points");
}

#[test]
fn the_start_without_a_search_is_healthy() {
    assert_eq!(after(40, 0.01, Ivon::auto(1e4, 60)), []);
    assert_eq!(after(40, 0.01, Von::auto(1e4, 60)), []);
}

#[test]
fn a_precision_that_was_not_learned() {
    let advice = after(40, 0.05, healthy().beta2(0.999).builder());
    let [Advice::NotLearned { learned }] = advice[..] else { panic!("{advice:?}") };
    // The retraction keeps ½·0.001² more of h₀ in a step.
    close(learned, 1.0 - 0.999_000_5_f64.powi(40), 1e-12);
    assert!(advice[0].to_string().starts_with("only 3.9 % of the precision was learned"), "{}", advice[0]);
}

/// σ = 1/√(10·0.5), and the weights are of the size 0.5.
#[test]
fn noise_as_wide_as_the_weights() {
    let advice = after(40, 0.05, healthy().ess(10.0).builder());
    let found = advice.iter().find_map(|a| match a {
        Advice::NoiseDominates { name, ratio } => Some((name.as_str(), *ratio)),
        _ => None,
    });
    let (name, ratio) = found.unwrap_or_else(|| panic!("{advice:?}"));
    assert!(name.ends_with("weight") && ratio > 0.3 && ratio < 3.0, "{name} {ratio}");
}

/// λ = 10⁹: whatever h is, σ is far below a thousandth of the weights.
#[test]
fn noise_that_nobody_can_see() {
    let advice = after(40, 0.05, healthy().ess(1e9).weight_decay(1e-9).builder());
    let [Advice::NoNoise { ratio }] = advice[..] else { panic!("{advice:?}") };
    assert!(ratio > 0.0 && advice[0].to_string().contains(&format!("{ratio:.1e}")), "{ratio}");
}

/// A prior of σ = 0.001 beside 10⁴ examples whose curvature is of the size 1.
#[test]
fn a_prior_that_outweighs_the_data() {
    let net = Net::new(F64);
    let of = |(name, w): (String, Tensor)| (name, w.zeros_like(), w.full_like(1e6));
    let prior = DiagonalGaussian::new(net.vs.variables().into_iter().map(of)).unwrap();
    let mut opt = Ivon::auto(1e4, 60).prior(&prior).build(&net.vs, 0.001).unwrap();
    for _ in 0..30 {
        opt.step(|| net.losses()).unwrap();
    }
    let (q, diagnostics) = (opt.posterior().unwrap(), opt.diagnostics().unwrap());
    let advice = diagnostics.advice();
    let share = advice.iter().find_map(|a| if let Advice::PriorDominates { share } = a { Some(*share) } else { None });
    let share = share.unwrap_or_else(|| panic!("{diagnostics:?}"));
    let variances = q.names().map(|name| q.variance(name).unwrap().sum(Kind::Double).double_value(&[]));
    close(share, 1e6 * variances.sum::<f64>() / q.len() as f64, 1e-12);
    assert_eq!(diagnostics.prior_share, Some(share));
}

#[test]
fn steps_that_were_left_out() {
    let w = weight(&[1.0]);
    let builder = healthy().builder().skip_non_finite().noise(Philox { seed: 5 });
    let mut opt = builder.build(params(&w), 0.05).unwrap();
    for step in 0..40 {
        let factor = if step == 7 || step == 9 { f64::NAN } else { 1.0 };
        opt.step(|| w.square().sum(Kind::Double) * factor).unwrap();
    }
    assert_eq!(opt.diagnostics().unwrap().advice(), [Advice::Skipped { skipped: 2 }]);
}

/// 92 of 100 gradients are above the limit, or none.
#[test]
fn gradients_that_are_nearly_all_cut() {
    let run = |max: f64| {
        let w = weight(&[1.0]);
        // Without the check that computes the norm as well.
        let builder = Adam::default().builder().clip_grad_norm(max).check_finite(false);
        let mut opt = builder.build(params(&w), 0.0).unwrap();
        assert!(opt.diagnostics().is_err());
        for step in 0..100 {
            let slope = if step < 92 { 3.0 } else { 1.0 };
            opt.step(|| (&w * slope).sum(Kind::Double)).unwrap();
        }
        opt.diagnostics().unwrap()
    };
    let often = run(2.0);
    assert_eq!(often.clipped, Some(0.92));
    assert_eq!(often.advice(), [Advice::Clipped { share: 0.92 }, Advice::Stopped]);
    assert!(often.advice()[0].to_string().starts_with("92 % of the gradients were cut"));
    assert_eq!((run(4.0).clipped, run(4.0).advice()), (Some(0.0), vec![Advice::Stopped]));
}

#[test]
fn a_schedule_shorter_than_the_training() {
    let schedule = Schedule::Step { every: 1, factor: 1e-300 };
    let advice = after(40, 0.05, healthy().schedule(schedule));
    assert_eq!(advice, [Advice::Stopped]);
    assert_eq!(after(60, 0.01, Ivon::auto(1e4, 60)), [], "a whole training, to its last step");
    assert_eq!(after(61, 0.01, Ivon::auto(1e4, 60)), [Advice::Stopped]);
}

/// The numbers behind the sentences, of two weights with a known posterior.
#[test]
fn spreads_are_root_mean_squares() {
    let w = weight(&[3.0, -4.0]);
    let mut opt = healthy().build(params(&w), 0.0).unwrap();
    opt.step(|| (&w * 0.0).sum(Kind::Double)).unwrap();
    let (q, diagnostics) = (opt.posterior().unwrap(), opt.diagnostics().unwrap());
    let [spread] = &diagnostics.spreads[..] else { panic!("{diagnostics:?}") };
    assert_eq!((spread.name.as_str(), spread.dimensions), ("w", 1));
    close(spread.weights, 12.5_f64.sqrt(), 1e-14);
    let variance = q.variance("w").unwrap().mean(Kind::Double).double_value(&[]);
    close(spread.sigma, variance.sqrt(), 1e-14);
    close(spread.ratio(), (variance / 12.5).sqrt(), 1e-14);
    close(diagnostics.learned.unwrap(), 0.0198, 1e-14);
}

/// A transposed weight has no rows in memory that one pass could go along.
#[test]
fn a_pass_that_takes_many_operations() {
    let vs = tch::nn::VarStore::new(tch::Device::Cpu);
    let mut w = vs.root().zeros("w", &[3, 2]);
    let x = Tensor::ones([2, 3], (Kind::Float, tch::Device::Cpu));
    let mut said = Vec::new();
    for transposed in [false, true] {
        if transposed {
            w.set_data(&Tensor::zeros([2, 3], (Kind::Float, tch::Device::Cpu)).tr());
        }
        let mut opt = Adam::default().build(&vs, 0.01).unwrap();
        opt.step(|| x.matmul(&w).sum(Kind::Float)).unwrap();
        said.push(opt.diagnostics().unwrap().advice());
    }
    let [none, some] = &said[..] else { panic!("{said:?}") };
    assert_eq!(none[..], []);
    let [Advice::Slow(fallback)] = &some[..] else { panic!("{some:?}") };
    assert_eq!((fallback.name.as_str(), fallback.parameters), ("w", 1));
    assert!(some[0].to_string().contains("`w`") && fallback.reason.contains("contiguous"), "{}", some[0]);
}

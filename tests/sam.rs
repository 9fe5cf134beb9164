//! The rows that evaluate the loss at two points: reference steps, arrows to other rows, one norm over all parameters, m-sharpness,
//! the guard.

// Digits as the reference has them.
#![allow(clippy::unreadable_literal)]

use std::cell::{Cell, RefCell};
use support::{EXAMPLES, F32, F64, Net, Snapshot, assert_close, bits, rows, wave_at};
use support::{all_close, close, given, params, state, values, weight};
use tch::{Device, Kind, Tensor};
use tch_blr::rows::{Momentum, PrecisionInStep};
use tch_blr::rule::{NoPosterior, Real, Row, Rule, Site, Start, Weights, When};
use tch_blr::{
    Adam, BayesianSam, Derivatives, Error, Expectation, Ivon, Params, Philox, RmsProp, Sam, SamRmsProp, Sgd, Statistic,
    Von,
};

/// Where the closure of one step on L = θ² from 0.5 finds the weight, and the optimizer afterwards.
fn on_a_parabola<R: Rule>(rule: R, lr: f64) -> (Vec<f64>, Tensor, tch_blr::Optimizer<R>) {
    let w = weight(&[0.5]);
    let mut opt = rule.builder().noise(given(1, &[&[0.3]])).build(params(&w), lr).unwrap();
    let mut points = Vec::new();
    let loss = opt.step(|| {
        points.extend(values(&w));
        w.square().sum(Kind::Double)
    });
    close(loss.unwrap(), points[1].powi(2), 1e-15);
    (points, w, opt)
}

#[test]
fn sam_takes_the_reference_step() {
    let (points, w, _) = on_a_parabola(Sam::default().weight_decay(0.01), 0.1);
    all_close(&points, &[0.5, 0.55], 1e-15);
    close(values(&w)[0], 0.3895, 1e-15);
}

/// s = h+δ+γ = 1 before the step. The paper's form divides by the new s instead: b = 0.1(ĝ + δm).
#[test]
fn bsam_takes_the_reference_step() {
    let setting = |c: BayesianSam| c.ess(10.0).rho(0.1).weight_decay(0.01).hess_init(1.0 - 0.01 - 0.1);
    let (points, w, opt) = on_a_parabola(setting(BayesianSam::released()), 0.5);
    all_close(&points, &[1.189737 / 2.0, 0.5 + 0.118974], 1e-6);
    close(2.0 * points[1], 1.237947, 1e-6);
    close(values(&w)[0], 0.43785263340389896, 1e-15);
    let s = 1.00029973665961;
    close(state(&opt, "hess")[0] + 0.11, s, 1e-14);
    // What is known is s without γ, and the samples have all of it.
    let q = opt.posterior().unwrap();
    close(values(&q.precision("w").unwrap())[0], 10.0 * (s - 0.1), 1e-13);
    close(q.damping("w").unwrap(), 1.0, 1e-13);

    let (_, w, _) = on_a_parabola(setting(BayesianSam::iclr2023()), 0.5);
    close(values(&w)[0], 0.5 - (0.5 - 0.43785263340389896) / s, 1e-14);
}

/// SAM over RMSprop: ĝ = 2·0.55, v = 0.01 ĝ², so the step is α/√0.01 but for η.
#[test]
fn sam_rmsprop_by_hand() {
    let (points, w, _) = on_a_parabola(SamRmsProp::default().eps(1e-30), 0.01);
    all_close(&points, &[0.5, 0.55], 1e-15);
    close(values(&w)[0], 0.4, 1e-14);
}

/// Two tensors, ∇L = (3, 4) everywhere, so ε = ρ(3, 4)/5 = (0.3, 0.4), and not (0.5, 0.5) as with a norm per tensor. With the
/// curvatures 2 and 10, ĝ = (3 + 2·0.3, 4 + 10·0.4) = (3.6, 8), v = ĝ²/4, and the step is α ĝ/(½ĝ + η).
#[test]
fn sam_rmsprop_has_one_norm_over_all_parameters() {
    let (a, b) = (weight(&[1.0]), weight(&[-2.0]));
    let named = Params::named([("a", a.shallow_clone()), ("b", b.shallow_clone())]).unwrap();
    let mut opt = SamRmsProp::default().rho(0.5).alpha(0.75).eps(0.2).build(named, 0.1).unwrap();
    let mut points = Vec::new();
    opt.step(|| {
        points.push([values(&a)[0], values(&b)[0]]);
        let (x, y) = (&a - 1.0, &b + 2.0);
        (&x * 3.0 + x.square() + &y * 4.0 + y.square() * 5.0).sum(Kind::Double)
    })
    .unwrap();
    all_close(points.as_flattened(), &[1.0, -2.0, 1.3, -1.6], 1e-15);
    all_close(
        &[opt.state("a", "square"), opt.state("b", "square")].map(|v| values(&v.unwrap())[0]),
        &[3.24, 16.0],
        1e-14,
    );
    // 0.36/(1.8 + 0.2) and 0.8/(4 + 0.2)
    all_close(&[values(&a)[0], values(&b)[0]], &[1.0 - 0.18, -2.0 - 0.8 / 4.2], 1e-15);
}

/// Weights after some steps of both.
fn paths<A: Rule, B: Rule>(a: A, b: B) -> [Vec<Vec<u8>>; 2] {
    fn path<R: Rule>(rule: R) -> Vec<Vec<u8>> {
        let net = Net::new(F32);
        let mut opt = rule.builder().build(&net.vs, 0.02).unwrap();
        (0..5).for_each(|_| _ = opt.step(|| net.losses()).unwrap());
        net.weights.iter().map(bits).collect()
    }
    [path(a), path(b)]
}

#[test]
fn without_radius_sam_is_its_base() {
    let sam = Sam::default().rho(0.0).momentum(0.9).weight_decay(0.01);
    let [a, b] = paths(sam, Sgd::default().momentum(0.9).weight_decay(0.01));
    assert_eq!(a, b);
    let [a, b] = paths(SamRmsProp::default().rho(0.0).weight_decay(0.01), RmsProp::default().weight_decay(0.01));
    assert_eq!(a, b);
    let [a, b] = paths(sam.rho(0.05), sam);
    assert_ne!(a, b, "the radius has no effect");
}

/// OGN that is handed √s·|ĝ₁| at bSAM's samples in place of per-example squares takes bSAM's path, in both forms.
#[test]
fn without_radius_bsam_is_ogn_with_another_curvature() {
    for form in [PrecisionInStep::New, PrecisionInStep::Old] {
        let (net, other) = (Net::new(F64), Net::new(F64));
        let bsam = BayesianSam::default().ess(50.0).rho(0.0).hess_init(0.4).beta2(0.9).weight_decay(0.02);
        let mut bsam = bsam.precision_in_step(form).noise(Philox { seed: 5 }).build(&net.vs, 0.1).unwrap();
        let ogn = Von::ogn().ess(50.0).hess_init(0.4).beta2(0.9).weight_decay(0.02).damping(0.1);
        let ogn = ogn.momentum(Momentum::Average).debias(false).prior_in_momentum(true).precision_in_step(form);
        let mut ogn = ogn.build(&other.vs, 0.1).unwrap();
        for _ in 0..6 {
            let gradients = RefCell::new(Vec::new());
            bsam.step(|| {
                let loss = net.losses().mean(None::<Kind>);
                gradients.borrow_mut().push(Tensor::run_backward(&[&loss], &net.weights, true, false));
                loss
            })
            .unwrap();
            let [first, second]: [Vec<Tensor>; 2] = gradients.into_inner().try_into().unwrap();
            let names: Vec<String> = ogn.params().names().map(str::to_owned).collect();
            let s = names.iter().map(|n| ogn.state(n, "hess").unwrap() + 0.02 + 0.1);
            let squares = s.zip(first).map(|(s, g)| Some(s.sqrt() * g.abs())).collect();
            let gradients = second.into_iter().map(Some).collect();
            let derivatives = Derivatives { loss: 1.0, examples: None, gradients, squares };
            ogn.perturbed().unwrap().step(derivatives).unwrap();
            for (a, b) in net.weights.iter().zip(&other.weights) {
                assert_close(a, b, 1e-13);
            }
        }
        let [p, q] = [bsam.posterior().unwrap(), ogn.posterior().unwrap()];
        assert!(p.kl(&q).unwrap() < 1e-20);
    }
}

/// ε is ρ long over all parameters together: frozen ones and those without a gradient do not count, and each group has its
/// own ρ, learning rate and decay.
#[test]
fn one_norm_over_all_parameters() {
    let vs = support::store(F64);
    let add = |name: &str, group, phase| support::variable(&vs, name, group, &wave_at(&[2, 3], phase, F64));
    let w = [add("a", 0, 0.1), add("b", 1, 0.2)];
    let (frozen, unused) = (add("frozen", 0, 0.3), add("unused", 1, 0.4));
    _ = frozen.set_requires_grad(false);
    let mut by_hand = w.each_ref().map(|t| t.detach().copy());
    // Not a sum over variables.
    let loss = |[a, b]: [&Tensor; 2]| ((a * b + &frozen).sin() + a.square() * 0.3 - b).square().mean(Kind::Double);
    let settings = [(0.05, 0.1, 0.01), (0.3, 0.02, 0.2)];
    let sam = Sam::default().rho(0.05).momentum(0.0).weight_decay(0.01).builder();
    let mut opt = sam.group(1, |c| c.rho(0.3).weight_decay(0.2)).group_lr(1, 0.02).build(&vs, 0.1).unwrap();
    for _ in 0..5 {
        let ours = opt.step(|| loss(w.each_ref())).unwrap();
        let gradient = |at: &[Tensor; 2]| {
            let leaves = at.each_ref().map(|t| t.detach().copy().set_requires_grad(true));
            let loss = loss(leaves.each_ref());
            (Tensor::run_backward(&[&loss], &leaves, false, false), loss.double_value(&[]))
        };
        let (first, _) = gradient(&by_hand);
        let norm = first.iter().map(|g| g.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt();
        let moved = [0, 1].map(|i| &by_hand[i] + &first[i] * (settings[i].0 / norm));
        let (second, expected) = gradient(&moved);
        by_hand = [0, 1].map(|i| &by_hand[i] - (&second[i] + &by_hand[i] * settings[i].2) * settings[i].1);
        close(ours, expected, 1e-12);
        for (a, b) in w.iter().zip(&by_hand) {
            assert_close(a, b, 1e-12);
        }
    }
    assert_eq!(bits(&unused), bits(&wave_at(&[2, 3], 0.4, F64)));
}

/// The second of the two points of a step on L = Σ cᵢ wᵢ from 0.
fn second_point(
    kind: Kind,
    slopes: &[f64],
    change: impl Fn(tch_blr::Builder<Sam>) -> tch_blr::Builder<Sam>,
) -> Vec<f64> {
    let w = Tensor::zeros([slopes.len() as i64], (kind, Device::Cpu)).set_requires_grad(true);
    let c = Tensor::from_slice(slopes).to_kind(kind);
    let mut opt = change(Sam::default().builder()).build(params(&w), 0.1).unwrap();
    let mut points = Vec::new();
    opt.step(|| {
        points.push(values(&w));
        (&w * &c).sum(kind)
    })
    .unwrap();
    assert!(values(&w).iter().all(|x| x.is_finite()));
    assert_eq!(points.len(), 2);
    points.remove(1)
}

#[test]
fn a_gradient_of_any_size_gives_a_direction_or_none() {
    let plain = |b| b;
    for kind in [Kind::Double, Kind::Float] {
        assert_eq!(second_point(kind, &[0.0, 0.0], plain), [0.0, 0.0], "no gradient, no perturbation");
        // Numbers whose squares are none in f32; the smallest are subnormal.
        for size in [1e-40, 1e-30, 1e-3, 1.0, 1e30] {
            all_close(&second_point(kind, &[3.0 * size, -4.0 * size], plain), &[0.03, -0.04], 1e-6);
        }
    }
    // Here the squares are none in f64.
    assert_eq!(second_point(Kind::Double, &[3e-200, -4e-200], plain), [0.0, 0.0]);
    assert_eq!(second_point(Kind::Double, &[3e200, -4e200], plain), [0.0, 0.0]);
}

/// Clipping by norm leaves the direction, clipping by value changes it; the check for finite gradients changes nothing.
#[test]
fn the_direction_is_that_of_the_clipped_gradient() {
    let slopes = [3.0, -4.0];
    all_close(&second_point(Kind::Double, &slopes, |b| b.clip_grad_norm(0.1)), &[0.03, -0.04], 1e-15);
    let side = 0.05 / 2f64.sqrt();
    all_close(&second_point(Kind::Double, &slopes, |b| b.clip_grad_value(1.0)), &[side, -side], 1e-15);
    all_close(&second_point(Kind::Double, &slopes, |b| b.check_finite(false)), &[0.03, -0.04], 1e-15);
}

/// Chunks are micro-batches with points of their own, of all rows; by their number of examples where the losses say it.
#[test]
fn chunks_are_micro_batches() {
    fn check<R: Rule>(row: &rows::Case<R>) {
        let (net, other) = (Net::new(F64), Net::new(F64));
        let mut opt = row.builder(&net.vs).build(&net.vs, row.lr).unwrap();
        let mut parts = row.builder(&other.vs).build(&other.vs, row.lr).unwrap();
        let cuts = [(0, 5), (5, 4), (9, 3)];
        for _ in 0..4 {
            let calls = RefCell::new(Vec::new());
            let loss = opt.step_chunks(3, |k| {
                calls.borrow_mut().push(k);
                net.losses_of(cuts[k].0, cuts[k].1)
            });
            parts.accumulate(|| other.losses_of(0, 5)).unwrap();
            parts.accumulate(|| other.losses_of(5, 4)).unwrap();
            let expected = parts.step(|| other.losses_of(9, 3)).unwrap();
            close(loss.unwrap(), expected, 1e-14);
            for (a, b) in net.weights.iter().zip(&other.weights) {
                assert_close(a, b, 1e-13);
            }
            let calls = calls.into_inner();
            assert!(calls.is_sorted() && calls.len() % 3 == 0 && calls.last() == Some(&2), "{calls:?}");
        }
    }
    check(&rows::sam());
    check(&rows::sam_rmsprop());
    check(&rows::bsam());
    check(&rows::bsam_released());
    check(&rows::ivon());
    check(&rows::von_price());
    check(&rows::ivon_gradsq());
    check(&rows::vogn());
    check(&rows::adam());
}

/// At the mean, chunks save memory only.
#[test]
fn chunks_at_the_mean_are_one_batch() {
    let (net, other) = (Net::new(F64), Net::new(F64));
    let mut opt = Adam::default().build(&net.vs, 0.02).unwrap();
    let mut whole = Adam::default().build(&other.vs, 0.02).unwrap();
    for _ in 0..4 {
        opt.step_chunks(2, |k| if k == 0 { net.losses_of(0, 5) } else { net.losses_of(5, EXAMPLES - 5) }).unwrap();
        whole.step(|| other.losses()).unwrap();
        for (a, b) in net.weights.iter().zip(&other.weights) {
            assert_close(a, b, 1e-12);
        }
    }
}

/// Each chunk has an ε of its own, so two chunks of different data are not one batch; two of the same data are.
#[test]
fn each_chunk_has_its_own_perturbation() {
    let run = |chunks: usize, same: bool| {
        let net = Net::new(F64);
        let mut opt = Sam::default().rho(0.5).build(&net.vs, 0.02).unwrap();
        let n = EXAMPLES / 2;
        let loss = |k: usize| match (chunks, same) {
            (1, false) => net.losses(),
            (_, false) => net.losses_of(k as i64 * n, n),
            _ => net.losses_of(0, n),
        };
        opt.step_chunks(chunks, loss).unwrap();
        net.weights[0].detach().copy()
    };
    assert_close(&run(2, true), &run(1, true), 1e-14);
    let difference = (run(2, false) - run(1, false)).abs().max().double_value(&[]);
    assert!(difference > 1e-4, "{difference:e}");
}

/// A failure in any evaluation of any chunk leaves everything as it was, noise included.
#[test]
fn a_failing_chunk_changes_nothing() {
    let (net, twin_net) = (Net::new(F64), Net::new(F64));
    let [mut opt, mut twin] =
        [&net, &twin_net].map(|n| rows::bsam().builder(&n.vs).build(&n.vs, rows::bsam().lr).unwrap());
    let before = Snapshot::of(&opt, &net.vs);
    for failing in 1..=6 {
        let calls = Cell::new(0);
        let result = opt.step_chunks(3, |_| {
            calls.set(calls.get() + 1);
            if calls.get() == failing { Err("on purpose") } else { Ok(net.losses()) }
        });
        assert!(matches!(result, Err(Error::Closure(_))), "{result:?}");
        assert_eq!(calls.get(), failing);
        assert_eq!(Snapshot::of(&opt, &net.vs), before);
    }
    for (opt, net) in [(&mut opt, &net), (&mut twin, &twin_net)] {
        opt.step_chunks(3, |k| net.losses_of(4 * k as i64, 4)).unwrap();
    }
    assert_eq!(Snapshot::of(&opt, &net.vs).values(), Snapshot::of(&twin, &twin_net.vs).values());
}

/// The two points by derivatives that were computed elsewhere, as a program of several processes has them.
#[test]
fn derivatives_from_elsewhere_take_the_same_step() {
    fn check<R: Rule>(row: &rows::Case<R>) {
        let (net, other) = (Net::new(F64), Net::new(F64));
        let mut opt = row.builder(&net.vs).build(&net.vs, row.lr).unwrap();
        let mut elsewhere = row.builder(&other.vs).build(&other.vs, row.lr).unwrap();
        let derivatives = || {
            let loss = other.losses().mean(None::<Kind>);
            let gradients = Tensor::run_backward(&[&loss], &other.weights, false, false);
            let gradients = gradients.into_iter().map(Some).collect();
            let (loss, examples) = (loss.double_value(&[]), Some(EXAMPLES as u64));
            Derivatives { loss, examples, gradients, squares: Vec::new() }
        };
        for _ in 0..3 {
            opt.step(|| net.losses()).unwrap();
            let first = elsewhere.perturbed().unwrap();
            let found = derivatives();
            let second = first.ascend(found).unwrap();
            let found = derivatives();
            second.step(found).unwrap();
            assert_eq!(Snapshot::of(&opt, &net.vs).values(), Snapshot::of(&elsewhere, &other.vs).values());
        }
    }
    check(&rows::sam());
    check(&rows::bsam());
}

/// Only rows that draw noise take a seed from libtorch's generator, which no other test of this file uses.
#[test]
fn sam_draws_nothing() {
    let net = Net::new(F64);
    let next = |build: &dyn Fn()| {
        tch::manual_seed(3);
        build();
        values(&Tensor::rand([4], (Kind::Double, Device::Cpu)))
    };
    let untouched = next(&|| ());
    assert_eq!(next(&|| _ = Sam::default().build(&net.vs, 0.1).unwrap()), untouched);
    assert_ne!(next(&|| _ = BayesianSam::default().ess(9.0).build(&net.vs, 0.1).unwrap()), untouched);
}

/// Yesterday's posterior of bSAM is today's prior: q starts with its precision.
#[test]
fn posterior_as_prior() {
    let net = Net::new(F64);
    let bsam = BayesianSam::default().ess(100.0).beta2(0.9);
    let mut opt = bsam.noise(Philox { seed: 1 }).build(&net.vs, 0.05).unwrap();
    (0..20).for_each(|_| _ = opt.step(|| net.losses()).unwrap());
    let diagnostics = opt.diagnostics().unwrap();
    assert!(diagnostics.loss > 0.0 && diagnostics.kl_per_example.unwrap() > 0.0);
    let q = opt.posterior().unwrap();
    let mut next = bsam.ess(40.0).prior(&q).noise(Philox { seed: 2 }).build(&net.vs, 0.05).unwrap();
    let start = next.posterior().unwrap();
    for name in ["first.weight", "second.bias"] {
        assert_close(&start.precision(name).unwrap(), &q.precision(name).unwrap(), 1e-12);
    }
    next.step(|| net.losses()).unwrap();
}

/// A rule that asks for what its evaluations do not give.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
struct Odd {
    adversarial: bool,
}

impl Row for Odd {
    const NAME: &'static str = "odd";
    const STATE: &'static [&'static str] = &[];
    type Arithmetic = Weights;
    type Posterior = NoPosterior;
    fn validate(&self) -> tch_blr::Result<()> {
        Ok(())
    }
    fn expectation(&self) -> Expectation {
        if self.adversarial {
            Expectation::Adversarial { sampled: false }
        } else {
            Expectation::MonteCarlo { samples: 1 }
        }
    }
    fn statistic(&self) -> Statistic {
        if self.adversarial { Statistic::Price } else { Statistic::AbsoluteGradient }
    }
}

impl Rule for Odd {
    type State<T: Real> = [T; 0];
    type Coefficients<T: Real> = [T; 0];
    const FORMED: &'static [Statistic] = &[Statistic::Price];
    fn initial(&self, _: Start) -> [f64; 0] {
        []
    }
    fn coefficients(&self, _: When) -> [f64; 0] {
        []
    }
    fn update<T: Real>(&self, _: [T; 0], x: Site<T>, _: [T; 0]) -> (T, [T; 0]) {
        (x.mean, [])
    }
}

#[test]
fn statistics_that_do_not_exist_are_refused() {
    let w = weight(&[0.5]);
    for (adversarial, statistic) in [(true, "Price"), (false, "AbsoluteGradient")] {
        let error = Odd { adversarial }.builder().build(params(&w), 0.1).unwrap_err();
        let named = matches!(&error, Error::HyperParameter { name: "statistic", value, .. } if value == statistic);
        assert!(named, "{error:?}");
    }
}

/// One sample of IVON per chunk, as m-sharpness has it for bSAM: noise\[step\]\[chunk\].
#[test]
fn chunks_draw_in_order() {
    fn points<R: Rule>(rule: R, per_chunk: usize) -> Vec<f64> {
        let w = weight(&[0.0]);
        let noise = given(1, &[&[1.0], &[2.0], &[-3.0]]);
        let mut opt = rule.builder().noise(noise).build(params(&w), 0.1).unwrap();
        let mut points = Vec::new();
        opt.step_chunks(3, |_| {
            points.extend(values(&w));
            (&w * 0.0).sum(Kind::Double)
        })
        .unwrap();
        points.into_iter().step_by(per_chunk).collect()
    }
    // σ = 1/√(ess·(h₀+δ [+γ]))
    let sigma = 1.0 / (100.0 * (1.0 + 1e-4)).sqrt();
    let expected = [1.0, 2.0, -3.0].map(|z| z * sigma);
    all_close(&points(Ivon::default().ess(100.0), 1), &expected, 1e-15);
    all_close(&points(BayesianSam::default().ess(100.0), 2), &expected, 1e-15);
}

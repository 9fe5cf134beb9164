//! The rows that tch has too take tch's own steps: two hundred of them, side by side.

use support::{F64, Place, assert_close, store, variable, wave_at};
use tch::nn::{self, OptimizerConfig, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::rule::DeltaRule;
use tch_blr::{Adam, AdamW, Optimizer, RmsProp, Sgd};

const STEPS: usize = 200;
const LR: f64 = 0.01;
/// Learning rates and weight decays of the runs by group.
const RATES: [(usize, f64); 2] = [(1, 0.003), (2, 0.02)];
const DECAYS: [(usize, f64); 2] = [(0, 0.02), (2, 0.0)];

/// A classifier 4-6-3 with mini-batches of 8 out of 24; the first layer is in group 0, then one group per variable.
struct Mlp {
    vs: VarStore,
    weights: Vec<Tensor>,
    x: Tensor,
    y: Tensor,
}

impl Mlp {
    fn new(place: Place) -> Self {
        let vs = store(place);
        let shapes: [(&str, usize, &[i64]); 4] =
            [("a.weight", 0, &[6, 4]), ("a.bias", 0, &[6]), ("b.weight", 1, &[3, 6]), ("b.bias", 2, &[3])];
        let weights =
            shapes.map(|(name, group, shape)| variable(&vs, name, group, &(wave_at(shape, 1.0, place) * 0.6)));
        let y = (Tensor::arange(24, (Kind::Int64, Device::Cpu)) * 5).remainder(3);
        let x = wave_at(&[24, 4], 0.3, place) + (y.to_kind(place.0) - 1.0).unsqueeze(1) * 0.5;
        Mlp { vs, weights: weights.into(), x, y }
    }

    fn loss(&self, step: usize) -> Tensor {
        let first = (step % 3) as i64 * 8;
        let [w1, b1, w2, b2] = &self.weights[..] else { unreachable!() };
        let hidden = (self.x.narrow(0, first, 8).matmul(&w1.tr()) + b1).tanh();
        (hidden.matmul(&w2.tr()) + b2).cross_entropy_for_logits(&self.y.narrow(0, first, 8))
    }
}

/// Runs both and compares all weights after every tenth step. `rates` and `decays` are set by group in both.
fn same<R: DeltaRule>(
    what: &str,
    ours: R,
    theirs: impl OptimizerConfig + Copy,
    rates: &[(usize, f64)],
    decays: &[(usize, f64)],
    step: impl Fn(&mut Optimizer<R>, &mut nn::Optimizer, [&Mlp; 2], usize),
) {
    for (kind, rtol) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5)] {
        let place = (kind, Device::Cpu);
        let [here, there] = [Mlp::new(place), Mlp::new(place)];
        let start: Vec<Tensor> = here.weights.iter().map(Tensor::copy).collect();
        let mut opt = ours.builder().build(&here.vs, LR).unwrap();
        let mut reference = theirs.build(&there.vs, LR).unwrap();
        for &(group, lr) in rates {
            opt.set_lr_group(group, lr).unwrap();
            reference.set_lr_group(group, lr);
        }
        for &(group, decay) in decays {
            opt.set_weight_decay_group(group, decay).unwrap();
            reference.set_weight_decay_group(group, decay);
        }
        for t in 0..STEPS {
            if t == STEPS / 2 && rates.is_empty() {
                opt.set_lr(0.5 * LR).unwrap();
                reference.set_lr(0.5 * LR);
            }
            step(&mut opt, &mut reference, [&here, &there], t);
            if t % 10 == 9 {
                println!("{what}, {kind:?}, step {t}");
                for (a, b) in here.weights.iter().zip(&there.weights) {
                    assert_close(a, b, rtol);
                }
            }
        }
        for (w, start) in here.weights.iter().zip(start) {
            assert!((w - start).abs().max().double_value(&[]) > 0.01, "{what} has hardly moved");
        }
    }
}

/// Plain steps, by closure and from a loss in turn; with and without groups.
fn same_with_and_without_groups<R: DeltaRule>(what: &str, ours: R, theirs: impl OptimizerConfig + Copy) {
    let step = |opt: &mut Optimizer<R>, reference: &mut nn::Optimizer, [here, there]: [&Mlp; 2], t: usize| {
        let loss = if t.is_multiple_of(2) {
            opt.step(|| here.loss(t)).unwrap()
        } else {
            opt.backward_step(&here.loss(t)).unwrap()
        };
        let expected = there.loss(t);
        reference.backward_step(&expected);
        assert!((loss - expected.double_value(&[])).abs() < 1e-4);
    };
    same(what, ours, theirs, &[], &[], step);
    same(&format!("{what} by group"), ours, theirs, &RATES, &DECAYS, step);
}

#[test]
fn sgd() {
    let case = |momentum, dampening, wd, nesterov| {
        let ours = Sgd::default().momentum(momentum).dampening(dampening).weight_decay(wd).nesterov(nesterov);
        let what = format!("{ours:?}");
        same_with_and_without_groups(&what, ours, nn::Sgd { momentum, dampening, wd, nesterov });
    };
    case(0.0, 0.0, 0.0, false);
    case(0.0, 0.0, 0.05, false);
    case(0.9, 0.0, 0.05, false);
    case(0.9, 0.3, 0.0, false);
    case(0.9, 0.0, 0.01, true);
}

#[test]
fn rmsprop() {
    let case = |alpha, eps, wd, momentum, centered| {
        let ours = RmsProp::default().alpha(alpha).eps(eps).weight_decay(wd).momentum(momentum).centered(centered);
        let what = format!("{ours:?}");
        same_with_and_without_groups(&what, ours, nn::RmsProp { alpha, eps, wd, momentum, centered });
    };
    case(0.99, 1e-8, 0.0, 0.0, false);
    case(0.95, 1e-6, 0.05, 0.0, false);
    case(0.95, 1e-2, 0.0, 0.7, false);
    case(0.95, 1e-3, 0.01, 0.5, true);
}

/// With this momentum and so small an ε the run oscillates, and from about step 100 on it magnifies rounding some hundred
/// times, tch's own as well: its f32 then differs from its f64 by more than 1e-5, so nothing can be asked of ours there.
/// f64 shows that the steps are the same ones all the way.
#[test]
fn rmsprop_where_rounding_grows() {
    let (alpha, eps, wd, momentum, centered) = (0.95, 1e-8, 0.0, 0.9, false);
    let ours = RmsProp::default().alpha(alpha).eps(eps).momentum(momentum);
    // All weights after each step, of both.
    let run = |kind| {
        let [here, there] = [(); 2].map(|()| Mlp::new((kind, Device::Cpu)));
        let mut opt = ours.build(&here.vs, LR).unwrap();
        let mut reference = nn::RmsProp { alpha, eps, wd, momentum, centered }.build(&there.vs, LR).unwrap();
        for (group, lr) in RATES {
            opt.set_lr_group(group, lr).unwrap();
            reference.set_lr_group(group, lr);
        }
        for (group, decay) in DECAYS {
            opt.set_weight_decay_group(group, decay).unwrap();
            reference.set_weight_decay_group(group, decay);
        }
        let mut seen = [Vec::new(), Vec::new()];
        for t in 0..STEPS {
            opt.step(|| here.loss(t)).unwrap();
            reference.backward_step(&there.loss(t));
            for (seen, net) in seen.iter_mut().zip([&here, &there]) {
                seen.extend(net.weights.iter().map(|w| w.detach().to_kind(Kind::Double).copy()));
            }
        }
        seen
    };
    let largest = |a: &[Tensor], b: &[Tensor]| {
        let relative = |(a, b): (&Tensor, &Tensor)| ((a - b).norm() / b.norm()).double_value(&[]);
        a.iter().zip(b).map(relative).fold(0.0, f64::max)
    };
    let ([ours64, theirs64], [ours32, theirs32]) = (run(Kind::Double), run(Kind::Float));
    let calm = STEPS / 2 * 4;
    assert!(largest(&ours64, &theirs64) <= 1e-12);
    assert!(largest(&ours32[..calm], &theirs32[..calm]) <= 1e-5);
    assert!(largest(&theirs32[calm..], &theirs64[calm..]) > 1e-5, "tch is calm here: ask for 1e-5 all the way");
}

#[test]
fn adam() {
    let case = |beta1, beta2, wd, eps, amsgrad| {
        let ours = Adam::default().beta1(beta1).beta2(beta2).weight_decay(wd).eps(eps).amsgrad(amsgrad);
        let what = format!("{ours:?}");
        same_with_and_without_groups(&what, ours, nn::Adam { beta1, beta2, wd, eps, amsgrad });
    };
    case(0.9, 0.999, 0.0, 1e-8, false);
    case(0.8, 0.95, 0.05, 1e-6, false);
    case(0.9, 0.99, 0.01, 1e-8, true);
}

#[test]
fn adamw() {
    let case = |beta1, beta2, wd, eps, amsgrad| {
        let ours = AdamW::default().beta1(beta1).beta2(beta2).weight_decay(wd).eps(eps).amsgrad(amsgrad);
        let what = format!("{ours:?}");
        same_with_and_without_groups(&what, ours, nn::AdamW { beta1, beta2, wd, eps, amsgrad });
    };
    case(0.9, 0.999, 0.01, 1e-8, false);
    case(0.8, 0.95, 0.3, 1e-6, false);
    case(0.9, 0.99, 0.05, 1e-8, true);
    case(0.9, 0.99, 0.0, 1e-8, false);
}

#[test]
fn clipped_by_value() {
    same("clip", Adam::default(), nn::Adam::default(), &[], &[], |opt, reference, [here, there], t| {
        opt.backward_step_clip(&here.loss(t), 0.01).unwrap();
        reference.backward_step_clip(&there.loss(t), 0.01);
    });
}

/// tch divides by norm + 1e-6 and we by the norm: with a bound of 1e-3 the difference is one part in
/// norm/1e-6, too much to compare whole trajectories; the first steps of plain SGD show the factor itself.
#[test]
fn clipped_by_norm() {
    let place = F64;
    let [here, there] = [Mlp::new(place), Mlp::new(place)];
    let mut opt = Sgd::default().build(&here.vs, 1.0).unwrap();
    let mut reference = nn::Sgd::default().build(&there.vs, 1.0).unwrap();
    for t in 0..3 {
        let before: Vec<Tensor> = here.weights.iter().map(Tensor::copy).collect();
        opt.backward_step_clip_norm(&here.loss(t), 1e-3).unwrap();
        reference.backward_step_clip_norm(&there.loss(t), 1e-3);
        let mut squares = 0.0;
        for ((a, b), before) in here.weights.iter().zip(&there.weights).zip(before) {
            let moved = tch::no_grad(|| a - &before);
            assert_close(&moved, &tch::no_grad(|| b - &before), 1e-5);
            squares += moved.square().sum(Kind::Double).double_value(&[]);
        }
        assert!((squares.sqrt() - 1e-3).abs() < 1e-12);
        // Start the next step from the same weights.
        tch::no_grad(|| here.weights.iter().zip(&there.weights).for_each(|(a, b)| b.shallow_clone().copy_(a)));
    }
}

//! What shares a weight's memory sees its samples: views that were made once, tied parts, modules and other stores. That
//! every row's evaluations are seen is in tests/conformance.rs.

use support::{F32, Snapshot, assert_close, bits, refused, seeded, wave_at};
use tch::nn::{Init, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::{Adam, DiagonalGaussian, Ema, Ivon, Params, Philox, Sam};

/// x `[64, 3]`, y = x·(1, -2, ½).
fn regression() -> (Tensor, Tensor) {
    let x = Tensor::randn([64, 3], F32);
    let y = x.matmul(&Tensor::from_slice(&[1.0f32, -2.0, 0.5]).unsqueeze(1));
    (x, y)
}

fn numbers(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.detach().to_kind(Kind::Double).contiguous().flatten(0, -1)).unwrap()
}

/// A transposed view trains as the weight itself does, and IVON's precision is that of the loss: λ(h+δ), where
/// h → (1/N) Σ x² of each column.
#[test]
fn a_transposed_tie_made_once() {
    let _seed = seeded(2);
    let (x, y) = regression();
    let run = |cached: bool| {
        let vs = VarStore::new(Device::Cpu);
        let w = vs.root().zeros("w", &[1, 3]);
        let once = w.tr();
        let config = Ivon::default().ess(64.0).hess_init(0.1).beta2(0.99);
        let mut opt = config.builder().noise(Philox { seed: 1 }).build(&vs, 0.1).unwrap();
        for _ in 0..2000 {
            let wt = || if cached { once.shallow_clone() } else { w.tr() };
            opt.step(|| (x.matmul(&wt()) - &y).square().mean(Kind::Float) * 0.5).unwrap();
        }
        (bits(&w), numbers(&opt.posterior().unwrap().precision("w").unwrap()))
    };
    let (weights, precision) = run(true);
    assert_eq!((weights, precision.clone()), run(false));
    let exact = numbers(&x.square().sum_dim_intlist([0i64].as_slice(), false, Kind::Float));
    // Price's estimate is noisy, at single samples: a factor of two is far from the 500 of an evaluation at the mean.
    assert!(precision.iter().zip(&exact).all(|(s, e)| (0.5..2.0).contains(&(s / e))), "{precision:?}, {exact:?}");
}

/// Parts of one matrix, as q, k and v; also where SAM ascends.
#[test]
fn narrowed_parts_made_once() {
    let vs = VarStore::new(Device::Cpu);
    let qkv = vs.root().var("qkv", &[6, 3], Init::Const(0.1));
    let [q, k] = [0, 2].map(|first| qkv.narrow(0, first, 2));
    let x = wave_at(&[4, 3], 0.0, F32);
    let mut opt = Sam::default().rho(1.0).build(&vs, 0.1).unwrap();
    let mut seen = Vec::new();
    opt.step(|| {
        seen.push([bits(&q), bits(&k), bits(&qkv.narrow(0, 0, 2)), bits(&qkv.narrow(0, 2, 2))]);
        (x.matmul(&q.tr()) * x.matmul(&k.tr())).square().mean(Kind::Float)
    })
    .unwrap();
    assert!(seen.iter().all(|[q, k, from_q, from_k]| q == from_q && k == from_k));
    assert!(seen[0][0] != seen[1][0] && seen[0][1] != seen[1][1], "no ascent");
}

/// Every posterior predicts through a view: at standard deviations of 10, where the classes are anyone's guess, the
/// samples disagree about as much as three classes can.
#[test]
fn predictions_through_a_view() {
    let _seed = seeded(2);
    let x = Tensor::randn([64, 3], F32);
    let vs = VarStore::new(Device::Cpu);
    let w = vs.root().zeros("w", &[3, 3]);
    let (once, before) = (w.tr(), bits(&w));
    let q = DiagonalGaussian::new([("w", Tensor::zeros([3, 3], F32), Tensor::full([3, 3], 0.01, F32))]).unwrap();
    let run = |view: &dyn Fn() -> Tensor| q.predict(&vs, 64, || x.matmul(&view()).softmax(-1, Kind::Float)).unwrap();
    let (cached, fresh) = (run(&|| once.shallow_clone()), run(&|| w.tr()));
    assert_eq!(bits(&cached.mean), bits(&fresh.mean));
    assert!(cached.mutual_information.mean(Kind::Float).double_value(&[]) > 0.8);
    assert_eq!((bits(&w), bits(&once.tr())), (before.clone(), before));
}

/// The values of a guard are in the same memory, whatever kind and layout it has, and come back bit by bit.
#[test]
fn guards_write_in_place() {
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half] {
        for transposed in [false, true] {
            let plain = wave_at(&[3, 4], 0.3, (kind, Device::Cpu));
            let w = if transposed { plain.tr().contiguous().tr() } else { plain }.set_requires_grad(true);
            let (before, address, alias) = (bits(&w), w.data_ptr(), w.detach());
            let params = || Params::named([("w", w.shallow_clone())]).unwrap();
            let f64s = |t: &Tensor| t.detach().to_kind(Kind::Double);
            let q = DiagonalGaussian::new([("w", f64s(&w), f64s(&w).ones_like() * 4.0)]).unwrap();
            let guard = q.perturb(params(), 1).unwrap();
            let sample = q.sample(1).unwrap().remove(0).1.to_kind(kind);
            assert_eq!((bits(&w), bits(&alias), w.data_ptr()), (bits(&sample), bits(&sample), address), "{kind:?}");
            drop(guard);
            assert_eq!((bits(&w), bits(&alias), w.data_ptr()), (before.clone(), before, address), "{kind:?}");
        }
    }
}

/// A tensor in two stores is one weight: what one optimizer samples, the other model computes with.
#[test]
fn stores_that_share_a_weight() {
    let [vs, other] = [(); 2].map(|()| VarStore::new(Device::Cpu));
    let w = vs.root().ones("w", &[4]);
    let tied = other.root().add("head", w.shallow_clone(), true);
    let part = other.root().add("part", w.narrow(0, 1, 2), false);
    let mut opt = Ivon::default().ess(10.0).build(&vs, 0.1).unwrap();
    let mut points = Vec::new();
    for _ in 0..2 {
        opt.step(|| {
            assert!(bits(&tied) == bits(&w) && bits(&part) == bits(&w.narrow(0, 1, 2)));
            points.push(bits(&w));
            tied.square().mean(Kind::Float)
        })
        .unwrap();
        assert!(bits(&tied) == bits(&w) && bits(&part) == bits(&w.narrow(0, 1, 2)));
    }
    assert!(points[0] != points[1]);
}

/// Averages that are swapped in, too; and tch's own steps in place are seen by views, as ever.
#[test]
fn averages_and_steps_at_the_mean() {
    let vs = VarStore::new(Device::Cpu);
    let w = vs.root().ones("w", &[2, 3]);
    let once = w.tr();
    let mut ema = Ema::new(&vs, 0.5).unwrap();
    let mut opt = Adam::default().build(&vs, 0.25).unwrap();
    for _ in 0..2 {
        opt.step(|| once.square().mean(Kind::Float)).unwrap();
        ema.update().unwrap();
    }
    let average = ema.get("w").unwrap();
    let guard = ema.swap_in().unwrap();
    assert_close(&once.tr(), &average, 0.0);
    drop(guard);
    assert!(bits(&once.tr()) == bits(&w) && bits(&w) != bits(&average));
}

/// A clamp in the closure would be gone with the sample, and is an error; a mask, which is applied again after the step,
/// and guards that put back what they change are none. At the mean a clamp stays, as in tch's own loops.
#[test]
fn weights_changed_in_the_evaluation() {
    let clamp = |w: &Tensor| tch::no_grad(|| _ = w.shallow_clone().clamp_(-0.01, 0.01));
    let vs = VarStore::new(Device::Cpu);
    let w = vs.root().var("w", &[3], Init::Const(0.5));
    let alias = w.narrow(0, 1, 2);
    let q = DiagonalGaussian::new([("w", w.detach().copy(), w.detach().ones_like())]).unwrap();
    let loss = || w.square().mean(Kind::Float);
    let mut ivon = Ivon::default().ess(10.0).build(&vs, 0.1).unwrap();
    let before = Snapshot::of(&ivon, &vs);
    for changed in [&w, &alias, &w.detach()] {
        let closure = || {
            clamp(changed);
            loss()
        };
        refused(ivon.step(closure), &["`w`", "a clamp", "after the step"]);
        assert_eq!(Snapshot::of(&ivon, &vs), before);
    }
    ivon.step(|| {
        let _ = q.predict_samples(&vs, 2, loss).unwrap();
        loss()
    })
    .unwrap();
    let mut adam = Adam::default().build(&vs, 1e-4).unwrap();
    adam.step(|| {
        clamp(&w);
        loss()
    })
    .unwrap();
    assert!(w.abs().max().double_value(&[]) < 0.0102);
}

//! Names are identity: neither the order in which a program hands its parameters over, nor that in which a model is
//! built, is seen in its noise or its files. And what is no parameter, the buffers of a store, is in a checkpoint too.

use std::collections::HashMap;
use support::{F64, bits, refused, seeded, store, values, variable, wave_at};
use tch::nn::{BatchNormConfig, ModuleT, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::rule::Row;
use tch_blr::{Evon, FullVon, Ivon, Optimizer, Params, Philox, Sgd};

const NAMES: [&str; 5] = ["z", "b", "layer.10", "layer.2", "a"];

/// Variables of these names, created in this order.
fn built(names: &[&str]) -> VarStore {
    let vs = store(F64);
    for name in names {
        let x = wave_at(&[name.len() as i64 + 1], name.len() as f64, F64);
        let _ = variable(&vs, &name.replace('.', "_"), 0, &x);
    }
    vs
}

fn loss(vs: &VarStore) -> Tensor {
    let mut all: Vec<(String, Tensor)> = vs.variables().into_iter().collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let terms = all.iter().enumerate().map(|(i, (_, w))| (w - 0.1 * i as f64).square().sum(Kind::Double));
    terms.reduce(|a, b| a + b).unwrap()
}

/// Every variable after some steps, by name.
fn after<R: Row>(vs: &VarStore, opt: &mut Optimizer<R>, steps: usize) -> HashMap<String, Vec<u8>> {
    (0..steps).for_each(|_| _ = opt.step(|| loss(vs)).unwrap());
    vs.variables().iter().map(|(name, w)| (name.clone(), bits(w))).collect()
}

/// tch gives variables out as a map, whose order is another one every time.
#[test]
fn a_map_of_variables_has_one_order() {
    let run = |order: &[&str]| {
        let vs = built(&NAMES);
        let all = vs.variables();
        let named =
            order.iter().map(|name| name.replace('.', "_")).map(|name| (name.clone(), all[&name].shallow_clone()));
        let params = Params::named(named).unwrap();
        assert_eq!(params.names().collect::<Vec<_>>(), ["a", "b", "layer_10", "layer_2", "z"]);
        let mut opt = Ivon::default().ess(50.0).noise(Philox { seed: 1 }).build(params, 0.1).unwrap();
        after(&vs, &mut opt, 3)
    };
    let sorted = run(&["a", "b", "layer.2", "layer.10", "z"]);
    assert_eq!(run(&NAMES), sorted);
    assert_eq!(run(&["z", "layer.10", "layer.2", "b", "a"]), sorted);
    // As it comes.
    let vs = built(&NAMES);
    let params = Params::named(vs.variables()).unwrap();
    let mut opt = Ivon::default().ess(50.0).noise(Philox { seed: 1 }).build(params, 0.1).unwrap();
    assert_eq!(after(&vs, &mut opt, 3), sorted);
}

/// A checkpoint of a model whose variables were created in another order: the next step is the same to the bit, with
/// the noise and within an accumulation.
#[test]
fn files_go_by_name() {
    fn check<R: Row>(row: R) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let build = |vs: &VarStore, seed| row.builder().noise(Philox { seed }).build(vs, 0.05).unwrap();
        let vs = built(&NAMES);
        let mut opt = build(&vs, 1);
        after(&vs, &mut opt, 3);
        opt.accumulate(|| loss(&vs)).unwrap();
        opt.save(&path).unwrap();
        let expected = after(&vs, &mut opt, 3);

        let mut order = NAMES;
        order.reverse();
        let other = built(&order);
        let mut resumed = build(&other, 2);
        after(&other, &mut resumed, 1);
        resumed.load(&path).unwrap();
        assert_eq!(after(&other, &mut resumed, 3), expected, "{}", R::NAME);
    }
    check(Ivon::default().ess(50.0).beta2(0.9).samples(2));
    check(Evon::default().ess(50.0).beta2(0.9));
    check(Sgd::default().momentum(0.9));
}

/// One that is created after loading draws noise that no other has.
#[test]
fn late_variables_have_noise_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let build = |vs: &VarStore| Ivon::default().ess(1e4).noise(Philox { seed: 1 }).build(vs, 0.0).unwrap();
    build(&built(&NAMES)).save(&path).unwrap();
    let vs = built(&["a", "b", "layer.2", "layer.10", "z"]);
    let mut opt = build(&vs);
    opt.load(&path).unwrap();
    let late = variable(&vs, "late", 0, &wave_at(&[9], 1.0, F64));
    let before: HashMap<String, Tensor> =
        vs.variables().iter().map(|(name, w)| (name.clone(), w.detach().copy())).collect();
    let mut noise = Vec::new();
    opt.step(|| {
        for (name, w) in vs.variables() {
            noise.extend(values(&(w.detach() - &before[&name])));
        }
        loss(&vs)
    })
    .unwrap();
    assert!(late.requires_grad() && noise.len() == vs.variables().values().map(Tensor::numel).sum::<usize>());
    for (i, z) in noise.iter().enumerate() {
        assert!(noise[..i].iter().all(|other| (other - z).abs() > 1e-9), "{z} twice");
    }
}

/// One block of all weights has one order; it says so.
#[test]
fn a_joint_block_has_an_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let build = |names: &[&str]| FullVon::default().ess(50.0).build(&built(names), 0.1).unwrap();
    build(&["a", "b"]).save(&path).unwrap();
    build(&["a", "b"]).load(&path).unwrap();
    refused(build(&["b", "a"]).load(&path), &["`a`, `b`", "`b`, `a`"]);
}

/// A network with batch normalization, a counter and a mask.
fn with_buffers() -> (VarStore, impl Fn(bool) -> Tensor) {
    let vs = VarStore::new(Device::Cpu);
    let _turn = seeded(1);
    let norm = tch::nn::batch_norm1d(vs.root() / "norm", 3, BatchNormConfig::default());
    let _ = vs.root().add("counter", Tensor::from_slice(&[(1_i64 << 53) - 1, 2]), false);
    let _ = vs.root().add("mask", Tensor::from_slice(&[f32::NEG_INFINITY, 0.0, f32::NAN]), false);
    let x = wave_at(&[6, 3], 0.3, (Kind::Float, Device::Cpu)) * 3.0 + 2.0;
    (vs, move |train| norm.forward_t(&x, train))
}

#[test]
fn a_resumed_model_answers_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let (vs, forward) = with_buffers();
    let mut opt = Ivon::default().ess(50.0).noise(Philox { seed: 1 }).build(&vs, 0.05).unwrap();
    (0..4).for_each(|_| _ = opt.step(|| forward(true).square().mean(Kind::Float)).unwrap());
    opt.save(&path).unwrap();
    let expected = bits(&forward(false));

    let (other, again) = with_buffers();
    let names = ["norm.running_mean", "norm.running_var", "counter", "mask"];
    for name in names {
        let _no_grad = tch::no_grad_guard();
        let _ = other.variables()[name].shallow_clone().fill_(7);
    }
    let mut resumed = Ivon::default().ess(50.0).build(&other, 0.05).unwrap();
    resumed.load(&path).unwrap();
    assert_eq!(bits(&again(false)), expected);
    for name in names {
        assert_eq!(bits(&other.variables()[name]), bits(&vs.variables()[name]), "{name}");
    }

    // One that is missing on either side is named, and nothing changes.
    let before = bits(&again(false));
    let _late = other.root().zeros_no_train("late", &[2]);
    refused(resumed.load(&path), &["run", "has no buffer `late`", "build the model that was saved"]);
    let (vs, _) = with_buffers();
    let named = Params::named(vs.variables().into_iter().filter(|(_, t)| t.requires_grad())).unwrap();
    let mut named = Ivon::default().ess(50.0).build(named, 0.05).unwrap();
    refused(named.load(&path), &["run", "has a buffer `", "build the same model, from its store"]);
    assert_eq!(bits(&again(false)), before);

    // What an f64 cannot hold is not written.
    let _large = vs.root().add("large", Tensor::from_slice(&[(1_i64 << 53) + 1]), false);
    let opt = Ivon::default().ess(50.0).build(&vs, 0.05).unwrap();
    refused(opt.save(&path), &["`large`", "f64"]);
    resumed.load(&path).unwrap_err();
}

//! Checkpoints and posteriors changed at random: loading one gives an error and changes nothing, or something that can
//! be used. (Files that are merged: crates/blr-merge/tests/fuzz.rs.)

#[path = "../crates/blr-merge/tests/support/mutation.rs"]
#[allow(dead_code)] // Indices are changed in the other crate.
mod mutation;

use mutation::{Parts, Random, changed};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use support::{Form, Net, bits};
use tch::{Device, Kind, Tensor};
use tch_blr::{
    AnyRow, BuildOptions, DiagonalGaussian, Ema, FullGaussian, KroneckerGaussian, KroneckerParameter, Lawa,
    LowRankGaussian, MeanFieldBernoulli, Mixture, Philox, Posterior, Prior, PrunedGaussian, Schedule, Swag, Train,
    pruning,
};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Loads so many changed files, of which some are refused and some are not. `load` says which.
fn fuzz(what: &str, seed: u64, files: &[Parts], cases: usize, mut load: impl FnMut(&Path, &Parts) -> bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("changed.safetensors");
    let mut random = Random(seed);
    let mut accepted = 0;
    for case in 0..cases {
        let file = &files[random.below(files.len())];
        let bytes = changed(file, &mut random);
        // Some file systems wait for the disk where a file is emptied and written again.
        _ = fs::remove_file(&path);
        fs::write(&path, &bytes).unwrap();
        // If its header can be read at all, for what it says.
        let parts = Parts::of(&bytes).unwrap_or_else(|| file.clone());
        let taken = catch_unwind(AssertUnwindSafe(|| load(&path, &parts)));
        let taken = taken.unwrap_or_else(|_| panic!("{what}, case {case}: {}", String::from_utf8_lossy(&bytes)));
        accepted += usize::from(taken);
        assert_eq!(fs::read(&path).unwrap(), bytes, "{what}, case {case}: the file was changed");
    }
    println!("{what}: {accepted} of {cases} accepted");
    assert!(accepted < cases, "{what}: everything is accepted");
}

/// A step of a thousand samples is a step, but not a quick one.
fn quick(file: &Parts) -> bool {
    let Some(description) = file.description() else { return false };
    let n = |kind: &str, what: &str| description["content"]["config"]["expectation"][kind][what].as_u64().unwrap_or(1);
    n("MonteCarlo", "samples").max(n("Antithetic", "pairs")) <= 8
}

/// A row by its name, with settings that need no file.
fn optimizer(name: &str, net: &Net, prior: bool) -> Option<Box<dyn Train>> {
    let default = serde_json::to_value(AnyRow::named(name).unwrap()).unwrap();
    let mut settings = serde_json::json!({});
    if default[name].get("ess").is_some() {
        settings["ess"] = 100.0.into();
    }
    if name == "newton" {
        settings["weight_decay"] = 0.1.into();
    }
    let row: AnyRow = serde_json::from_value(serde_json::json!({ name: settings })).unwrap();
    let mut options = BuildOptions { noise: Some(Philox { seed: 3 }.into()), ..BuildOptions::default() };
    options.clip_grad_norm = Some(3.0);
    options.schedule = Schedule::Cosine { warmup: 3, total: 10, end: 0.0 };
    options.prior = prior.then(|| Prior::from(support::rows::posterior(&net.vs)).elsewhere(0.1));
    row.build_with(options, &net.vs, 0.01).ok()
}

#[test]
fn changed_checkpoints_give_errors_or_optimizers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("seed");
    for (i, name) in AnyRow::NAMES.iter().enumerate() {
        let blocks = ["newton", "diagonal_newton", "full_von", "evon", "soap", "noisy_kfac"].contains(name);
        let net = || Net::of(if blocks { Form::Tapped } else { Form::Plain }, F32, 0.0);
        let mut files = Vec::new();
        for prior in [false, true] {
            let net = net();
            let Some(mut opt) = optimizer(name, &net, prior) else { continue };
            let mut keep = |opt: &dyn Train| {
                opt.save(&path).unwrap();
                files.push(Parts::of(&fs::read(&path).unwrap()).unwrap());
            };
            opt.step(&mut || Ok(net.losses())).unwrap();
            keep(&*opt);
            opt.accumulate(&mut || Ok(net.losses_of(0, 4))).unwrap();
            keep(&*opt);
        }
        let mut own = net();
        let mut opt = optimizer(name, &own, false).unwrap();
        let again = dir.path().join("again");
        let state = |opt: &dyn Train, own: &Net| {
            opt.save(&again).unwrap();
            (fs::read(&again).unwrap(), own.weights.iter().map(bits).collect::<Vec<_>>())
        };
        let mut before = state(&*opt, &own);
        fuzz(name, 0x5eed + i as u64, &files, 40, |path, parts| {
            if opt.load(path).is_err() {
                assert!(state(&*opt, &own) == before, "a load that failed has changed something");
                return false;
            }
            _ = opt.diagnostics();
            _ = opt.posterior().map(|q| q.sample(0));
            if quick(parts) {
                _ = opt.step(&mut || Ok(own.losses()));
            }
            _ = opt.save(&again);
            own = net();
            opt = optimizer(name, &own, false).unwrap();
            before = state(&*opt, &own);
            true
        });
    }
}

fn sampled(q: &dyn Posterior) {
    assert_eq!(q.sample(0).unwrap().len(), q.names().count());
    for name in q.names() {
        assert!(q.mean(name).is_some() && q.variance(name).is_some());
    }
}

#[test]
fn changed_posteriors_give_errors_or_posteriors() {
    let dir = tempfile::tempdir().unwrap();
    let (path, again) = (dir.path().join("seed"), dir.path().join("again"));
    let read = || [Parts::of(&fs::read(&path).unwrap()).unwrap()];
    let wave = |size: &[i64]| (Tensor::arange(size.iter().product::<i64>(), F32) * 1.7).sin().reshape(size);
    let diagonal = |x: f64| {
        let s = |size: &[i64]| wave(size).exp();
        DiagonalGaussian::new([("w", wave(&[2, 3]) + x, s(&[2, 3])), ("b", wave(&[3]), s(&[3]))]).unwrap()
    };
    let q = diagonal(0.0);
    q.save(&path).unwrap();
    fuzz("diagonal", 1, &read(), 400, |path, _| {
        let Ok(q) = DiagonalGaussian::load(path) else { return false };
        sampled(&q);
        _ = (q.entropy(), q.natural(), q.temper(2.0), q.kl(&diagonal(1.0)), q.full().map(|q| q.entropy()));
        q.save(&again).unwrap();
        true
    });
    let mask = pruning::prune(&q.signal_to_noise(), 0.4).unwrap();
    mask.posterior(&q).unwrap().save(&path).unwrap();
    fuzz("pruned", 7, &read(), 400, |path, _| {
        let Ok(q) = PrunedGaussian::load(path) else { return false };
        sampled(&q);
        assert!(q.pruned() <= q.len());
        q.save(&again).unwrap();
        true
    });
    MeanFieldBernoulli::new([("w", wave(&[2, 3])), ("b", wave(&[3]))]).unwrap().save(&path).unwrap();
    fuzz("Bernoulli", 2, &read(), 400, |path, _| {
        let Ok(q) = MeanFieldBernoulli::load(path) else { return false };
        sampled(&q);
        _ = (q.entropy(), q.kl(&q));
        q.save(&again).unwrap();
        true
    });
    Mixture::new([(0.3, diagonal(0.0)), (0.7, diagonal(1.0))]).unwrap().save(&path).unwrap();
    fuzz("mixture", 3, &read(), 400, |path, _| {
        let Ok(q) = Mixture::load(path) else { return false };
        sampled(&q);
        q.save(&again).unwrap();
        true
    });
    q.full().unwrap().save(&path).unwrap();
    fuzz("full", 4, &read(), 400, |path, _| {
        let Ok(q) = FullGaussian::load(path) else { return false };
        sampled(&q);
        _ = (q.entropy(), q.kl(&q), q.marginals(), q.diagonal());
        q.save(&again).unwrap();
        true
    });
    let eye = |n| Some(Tensor::eye(n, F32));
    let parameter = |name: &str, size: &[i64], left, right| KroneckerParameter {
        name: name.to_owned(),
        mean: wave(size),
        left,
        right,
        precision: wave(size).exp(),
    };
    let parameters = [parameter("w", &[2, 3], eye(2), eye(3)), parameter("b", &[3], None, eye(3))];
    KroneckerGaussian::new(parameters).unwrap().save(&path).unwrap();
    fuzz("Kronecker", 5, &read(), 400, |path, _| {
        let Ok(q) = KroneckerGaussian::load(path) else { return false };
        sampled(&q);
        _ = (q.entropy(), q.kl(&q), q.marginals(), q.diagonal(), q.full().map(|q| q.entropy()));
        q.save(&again).unwrap();
        true
    });
    let entry = |name: &'static str, size: &[i64]| (name, wave(size), wave(size).exp(), wave(&[&[2], size].concat()));
    LowRankGaussian::new([entry("w", &[2, 3]), entry("b", &[3])]).unwrap().save(&path).unwrap();
    fuzz("low rank", 7, &read(), 400, |path, _| {
        let Ok(q) = LowRankGaussian::load(path) else { return false };
        sampled(&q);
        _ = (q.entropy(), q.kl(&q), q.marginals(), q.diagonal(), q.temper(2.0), q.full().map(|q| q.entropy()));
        q.save(&again).unwrap();
        true
    });
}

#[test]
fn changed_averages_give_errors_or_averages() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("seed");
    let read = || [Parts::of(&fs::read(&path).unwrap()).unwrap()];
    let net = Net::of(Form::Plain, F32, 0.0);
    let mut ema = Ema::new(&net.vs, 0.9).unwrap();
    ema.update().unwrap();
    ema.save(&path).unwrap();
    fuzz("average", 6, &read(), 300, |path, _| {
        let before = ema.get("first.weight").map(|t| bits(&t));
        if ema.load(path).is_err() {
            assert_eq!(ema.get("first.weight").map(|t| bits(&t)), before);
            return false;
        }
        assert!(ema.get("first.weight").unwrap().isfinite().all().int64_value(&[]) != 0);
        drop(ema.swap_in().unwrap());
        ema.update().unwrap();
        true
    });
    let mut swag = Swag::new(&net.vs, 2).unwrap();
    let mut lawa = Lawa::new(&net.vs, 2, 1).unwrap();
    for _ in 0..3 {
        swag.collect().unwrap();
        lawa.update().unwrap();
    }
    swag.save(&path).unwrap();
    fuzz("SWAG", 8, &read(), 300, |path, _| {
        let before = (swag.collected(), swag.get("first.weight").map(|t| bits(&t)));
        if swag.load(path).is_err() {
            assert_eq!((swag.collected(), swag.get("first.weight").map(|t| bits(&t))), before);
            return false;
        }
        _ = swag.posterior().map(|q| sampled(&q));
        _ = swag.diagonal().map(|q| sampled(&q));
        swag.collect().unwrap();
        true
    });
    lawa.save(&path).unwrap();
    fuzz("latest weights", 9, &read(), 300, |path, _| {
        let before = (lawa.updates(), lawa.get("first.weight").map(|t| bits(&t)));
        if lawa.load(path).is_err() {
            assert_eq!((lawa.updates(), lawa.get("first.weight").map(|t| bits(&t))), before);
            return false;
        }
        _ = lawa.posterior().map(|q| sampled(&q));
        lawa.update().unwrap();
        true
    });
}

//! Files of this crate that lie, names that a file cannot hold, and what is no file. (At random: fuzz.rs; every change
//! of one checkpoint and one posterior: bad_input.rs; drafts and places: crates/blr-merge/tests.)

#[path = "../crates/blr-merge/tests/support/mutation.rs"]
#[allow(dead_code)] // Only the taking apart.
mod mutation;

use mutation::Parts;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use support::{F32, Form, Net, bits, refused};
use tch::nn::VarStore;
use tch::{Device, Tensor};
use tch_blr::{
    Adam, BayesBiNN, DiagonalGaussian, Ema, Evon, Expectation, FullGaussian, Ivon, KroneckerGaussian,
    KroneckerParameter, LowRankGaussian, MeanFieldBernoulli, Mixture, NoisyKfac, combine, pruning,
};

fn ones(size: &[i64]) -> Tensor {
    Tensor::ones(size, F32)
}

fn diagonal(name: &str) -> DiagonalGaussian {
    DiagonalGaussian::new([(name, ones(&[2]), ones(&[2]))]).unwrap()
}

fn kronecker(names: &[&str], left: bool) -> KroneckerGaussian {
    let parameter = |name: &&str| KroneckerParameter {
        name: (*name).to_owned(),
        mean: ones(&[2, 2]),
        left: left.then(|| Tensor::eye(2, F32)),
        right: None,
        precision: ones(&[2, 2]),
    };
    KroneckerGaussian::new(names.iter().map(parameter)).unwrap()
}

/// The format has an entry of its own under this name: saving refuses it, or has another name for the tensor.
#[test]
fn a_parameter_called_as_the_metadata_are() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let name = "__metadata__";
    let say = [name, "rename"];
    refused(diagonal(name).save(&path), &say);
    refused(MeanFieldBernoulli::new([(name, ones(&[2]))]).unwrap().save(&path), &say);
    refused(kronecker(&[name], true).save(&path), &say);
    refused(diagonal(name).low_rank().unwrap().save(&path), &say);
    let vs = VarStore::new(Device::Cpu);
    let w = vs.root().ones(name, &[2]);
    let mut ema = Ema::new(&vs, 0.9).unwrap();
    ema.update().unwrap();
    refused(ema.save(&path), &say);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

    diagonal(name).full().unwrap().save(&path).unwrap();
    assert_eq!(FullGaussian::load(&path).unwrap().mean(name).unwrap().size(), [2]);
    Mixture::equal([diagonal(name)]).unwrap().save(&path).unwrap();
    assert_eq!(Mixture::load(&path).unwrap().mean(name).unwrap().size(), [2]);
    let mut opt = Adam::default().build(&vs, 0.1).unwrap();
    opt.step(|| w.square().sum(tch::Kind::Float)).unwrap();
    opt.save(&path).unwrap();
    Adam::default().build(&vs, 0.1).unwrap().load(&path).unwrap();

    // Two tensors of one name: a mean where the precision, or the basis, of another goes.
    let two = DiagonalGaussian::new(["w", "w.precision"].map(|name| (name, ones(&[2]), ones(&[2])))).unwrap();
    refused(two.save(&path), &["w.precision"]);
    refused(kronecker(&["w", "w.left"], true).save(&path), &["w.left", "two tensors"]);
    kronecker(&["w", "w.left"], false).save(&path).unwrap();
    KroneckerGaussian::load(&path).unwrap();
    // Longer than is read again.
    refused(diagonal(&"n".repeat(5000)).save(&path), &["5000 bytes"]);
    // Nothing of it has replaced the file.
    KroneckerGaussian::load(&path).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// Changes the file's header and, if there is one, its description.
fn rewritten(path: &Path, change: impl Fn(&mut Value, &mut Value)) {
    let mut file = Parts::of(&fs::read(path).unwrap()).unwrap();
    let mut description = file.description().unwrap();
    change(&mut file.header, &mut description);
    file.header["__metadata__"]["tch_blr"] = description.to_string().into();
    fs::write(path, file.bytes()).unwrap();
}

/// Sizes that are negative, or whose product is too large for what counts it.
#[test]
fn shapes_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let full = DiagonalGaussian::new([("w", ones(&[2, 3]), ones(&[2, 3]))]).unwrap().full().unwrap();
    for shape in [
        json!([-2, -3]),
        json!([-1, -6]),
        json!([6, -1, -1]),
        json!([i64::MIN, i64::MIN]),
        json!([1u64 << 32, 1u64 << 32]),
        json!([0, i64::MAX, i64::MAX]),
        json!([2, 2]),
        json!([0, 6]),
    ] {
        full.save(&path).unwrap();
        rewritten(&path, |_, description| description["content"]["parameters"][0]["shape"] = shape.clone());
        refused(FullGaussian::load(&path), &["x: has a mean of shape [6] that does not fit"]);
    }
    // In the header, where they belong to a tensor without elements.
    for shape in
        [json!([0, 1u64 << 63]), json!([0, u64::MAX]), json!([1u64 << 62, 0, 4]), json!([1u64 << 32, 1u64 << 32])]
    {
        DiagonalGaussian::new([("w", ones(&[0]), ones(&[0])), ("b", ones(&[1]), ones(&[1]))])
            .unwrap()
            .save(&path)
            .unwrap();
        rewritten(&path, |header, _| header["w"]["shape"] = shape.clone());
        refused(DiagonalGaussian::load(&path), &["`w`"]);
    }
}

/// Places near the end of what 64 bits count.
#[test]
fn places_that_overflow() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let vs = VarStore::new(Device::Cpu);
    let _w = vs.root().ones("w", &[2]);
    let mut opt = Ivon::default().ess(10.0).build(&vs, 0.1).unwrap();
    for (name, offsets) in [
        ("mean.w", [u64::MAX - 7, u64::MAX]),
        ("mean.w", [0, u64::MAX]),
        ("mean.w", [u64::MAX, 7]),
        ("state.hess.w", [1 << 63, (1 << 63) + 8]),
    ] {
        opt.save(&path).unwrap();
        let before = bits(&vs.variables()["w"]);
        rewritten(&path, |header, _| header[name]["data_offsets"] = json!(offsets));
        refused(opt.load(&path), &["x: is not a whole safetensors file"]);
        assert_eq!(bits(&vs.variables()["w"]), before);
        diagonal("mean.w").save(&path).unwrap();
        rewritten(&path, |header, _| header["mean.w"]["data_offsets"] = json!(offsets));
        refused(DiagonalGaussian::load(&path), &["x: is not a whole safetensors file"]);
    }
}

/// A pipe would be waited for, a device read for ever.
#[cfg(unix)]
#[test]
fn only_regular_files_are_loaded_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let vs = VarStore::new(Device::Cpu);
    let _w = vs.root().ones("w", &[2]);
    let mut opt = Ivon::default().ess(10.0).build(&vs, 0.1).unwrap();
    let mut ema = Ema::new(&vs, 0.9).unwrap();
    for (path, what) in [(pipe.as_path(), "a pipe"), (Path::new("/dev/zero"), "a device")] {
        refused(opt.load(path), &[what, "expected a regular file"]);
        refused(ema.load(path), &[what]);
        refused(DiagonalGaussian::load(path), &[what]);
        refused(FullGaussian::load(path), &[what]);
        refused(LowRankGaussian::load(path), &[what]);
    }
    refused(opt.save(&pipe), &["pipe: cannot be written: there is a pipe"]);
    refused(diagonal("w").save(&pipe), &["there is a pipe"]);
    // A checkpoint by way of a link, as `latest` often is.
    let latest = dir.path().join("latest");
    std::os::unix::fs::symlink("step-1", &latest).unwrap();
    opt.save(&latest).unwrap();
    assert!(latest.is_symlink() && dir.path().join("step-1").is_file());
    opt.load(&latest).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
}

/// A number of samples that a file may say, and that no step would end with.
#[test]
fn steps_that_would_not_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let vs = VarStore::new(Device::Cpu);
    let _w = vs.root().ones("w", &[2]);
    let mut opt = Ivon::default().ess(10.0).build(&vs, 0.1).unwrap();
    for expectation in [
        json!({"MonteCarlo": {"samples": 1_000_000_000_000_000u64}}),
        json!({"MonteCarlo": {"samples": (1 << 20) + 1}}),
        json!({"Antithetic": {"pairs": 1u64 << 63}}),
        json!({"Antithetic": {"pairs": u64::MAX}}),
        json!({"Antithetic": {"pairs": 0}}),
    ] {
        opt.save(&path).unwrap();
        rewritten(&path, |_, description| description["content"]["config"]["expectation"] = expectation.clone());
        refused(opt.load(&path), &["x: ", "1 to 1,048,576"]);
    }
    for rows in [Expectation::MonteCarlo { samples: 1 << 60 }, Expectation::Antithetic { pairs: 1 << 63 }] {
        refused(Ivon::default().ess(10.0).expectation(rows).build(&vs, 0.1), &["1 to 1,048,576"]);
        refused(Evon::default().ess(10.0).expectation(rows).build(&vs, 0.1), &["1 to 1,048,576"]);
        refused(BayesBiNN::default().ess(10.0).expectation(rows).build(&vs, 0.1), &["1 to 1,048,576"]);
    }
}

/// Settings that f32 does not have: as a state they are refused, as a limit they are none.
#[test]
fn settings_beyond_f32() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let net = || Net::of(Form::Tapped, F32, 0.0);
    let (ours, theirs) = (net(), net());
    let evon = || Evon::default().ess(100.0);
    refused(evon().hess_init(1e39).build(&ours.vs, 0.1), &["first.weight", "`hess`", "beyond f32"]);
    refused(evon().hess_init(1e300).build(&ours.vs, 0.1), &["beyond f32"]);
    refused(NoisyKfac::default().ess(100.0).hess_init(1e300).build(&ours.vs, 0.1), &["first.weight", "beyond f32"]);
    // 1/(λ(r·rms)²)
    refused(Evon::auto(100.0, 10).map(|c| c.relative_noise(1e-30)).build(&ours.vs, 0.1), &["beyond f32"]);
    let noise = || tch_blr::Philox { seed: 1 };
    let mut wide = evon().hess_clip(1e300).clip_radius(1e39).noise(noise()).build(&ours.vs, 0.1).unwrap();
    let mut none = evon().noise(noise()).build(&theirs.vs, 0.1).unwrap();
    for _ in 0..3 {
        wide.step(|| ours.losses()).unwrap();
        none.step(|| theirs.losses()).unwrap();
    }
    for (a, b) in ours.weights.iter().zip(&theirs.weights) {
        assert_eq!(bits(a), bits(b));
    }
    // From a file: of no use to a state that is there.
    wide.save(&path).unwrap();
    rewritten(&path, |_, description| {
        description["content"]["config"]["hess_init"] = json!(1e300);
        description["content"]["config"]["clip_radius"] = json!(1e300);
    });
    wide.load(&path).unwrap();
    wide.step(|| ours.losses()).unwrap();
}

/// As many parameters as a large mixture of experts has: each is found by its name at once, and not by a search.
#[test]
fn thousands_of_parameters() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let names: Vec<String> = (0..16_000).map(|i| format!("layer.{i}.weight")).collect();
    let one = ones(&[1]);
    let entries = || names.iter().map(|name| (name.clone(), one.shallow_clone(), one.shallow_clone()));
    let q = DiagonalGaussian::new(entries()).unwrap();
    q.save(&path).unwrap();
    let loaded = DiagonalGaussian::load(&path).unwrap();
    assert_eq!((loaded.len(), loaded.kl(&q).unwrap()), (16_000, 0.0));
    assert_eq!(
        combine(&[(1.0, &q), (1.0, &loaded)]).unwrap().precision(&names[15_999]).unwrap().double_value(&[0]),
        2.0
    );
    assert!(names.iter().all(|name| loaded.variance(name).is_some()));
    let q = MeanFieldBernoulli::new(entries().map(|(name, t, _)| (name, t))).unwrap();
    q.save(&path).unwrap();
    assert_eq!(MeanFieldBernoulli::load(&path).unwrap().kl(&q).unwrap(), 0.0);
}

/// ⌊share·n⌋ as it is on paper.
#[test]
fn shares_of_weights_are_exact() {
    let importance = [("w".to_owned(), Tensor::arange(100, F32))];
    for (share, pruned) in [(0.29, 29), (0.57, 57), (0.58, 58), (0.999, 99), (1.0, 100), (0.0, 0)] {
        assert_eq!(pruning::prune(&importance, share).unwrap().pruned(), pruned, "{share}");
    }
}

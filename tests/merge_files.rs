//! Merging files: the same as merging tensors, streamed. (Headers that lie: `merge_headers.rs`.)

use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};
use tch_blr::merge::{
    Destination, Difference, FileModel, Method, Model, Rescale, Tensors, WeightFile, diff_files, merge, merge_files,
    remove_files,
};
use tch_blr::{DiagonalGaussian, Error, combine};

/// Two tensors, one of more than a chunk, of any kind, and a buffer of integers.
fn model(seed: i64, kind: Kind) -> Tensors {
    let _turn = support::seeded(seed);
    let randn = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind);
    BTreeMap::from([
        ("big".to_owned(), randn(&[(1 << 19) + 17, 2])),
        ("count".to_owned(), Tensor::from_slice(&[seed])),
        ("small".to_owned(), randn(&[3])),
    ])
}

fn dtype(kind: Kind) -> Dtype {
    match kind {
        Kind::Float => Dtype::F32,
        Kind::Double => Dtype::F64,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Half => Dtype::F16,
        Kind::Int64 => Dtype::I64,
        _ => panic!("{kind:?}"),
    }
}

fn save(path: &Path, tensors: &Tensors) {
    let views: Vec<(&String, Vec<usize>, Dtype, Vec<u8>)> = tensors
        .iter()
        .map(|(name, t)| {
            let mut bytes = vec![0; t.numel() * t.kind().elt_size_in_bytes()];
            t.contiguous().copy_data_u8(&mut bytes, t.numel());
            (name, t.size().iter().map(|n| *n as usize).collect(), dtype(t.kind()), bytes)
        })
        .collect();
    let views = views.iter().map(|(name, shape, kind, b)| (*name, TensorView::new(*kind, shape.clone(), b).unwrap()));
    serialize_to_file(views, Some(HashMap::from([("format".to_owned(), "pt".to_owned())])), path).unwrap();
}

fn quiet(_: u64, _: u64) {}

/// Saves models under their names and gives the paths.
fn files<const N: usize>(folder: &Path, models: [(&str, &Tensors); N]) -> [PathBuf; N] {
    models.map(|(name, tensors)| {
        let path = folder.join(name);
        save(&path, tensors);
        path
    })
}

fn curvature(seed: i64) -> Tensors {
    model(seed, Kind::Float)
        .into_iter()
        .map(|(n, t)| if t.kind() == Kind::Int64 { (n, t) } else { (n, t.square() + 0.01) })
        .collect()
}

#[test]
fn files_and_tensors_merge_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double] {
        let (base, a, b) = (model(0, kind), model(1, kind), model(2, kind));
        let [h0, ha, hb] = [10, 11, 12].map(curvature);
        let paths =
            files(folder.path(), [("base", &base), ("a", &a), ("b", &b), ("h0", &h0), ("ha", &ha), ("hb", &hb)]);
        let [base_file, a_file, b_file, h0_file, ha_file, hb_file] = paths;
        let out = folder.path().join("out");
        let base = Model::new("base", &base).curvature(&h0);
        let models = [Model::new("a", &a).weight(0.7).curvature(&ha), Model::new("b", &b).weight(0.4).curvature(&hb)];
        let base_file = FileModel::new(base_file).curvature(h0_file);
        let model_files = [
            FileModel::new(a_file).weight(0.7).curvature(ha_file),
            FileModel::new(b_file).weight(0.4).curvature(hb_file),
        ];
        let methods = [
            Method::linear(),
            Method::ties(1.0, 0.3),
            Method::gradient_matching(),
            Method::task_arithmetic(0.9),
            Method::Slerp { t: 0.3 },
            Method::dare(1.0, 0.3, Rescale::Density, 5),
            Method::dare_ties(1.0, 0.3, Rescale::L1Norm, 5),
            Method::Fisher,
        ];
        // The others differ in what they compute, not in how they read and write.
        for method in &methods[..if kind == Kind::BFloat16 { methods.len() } else { 3 }] {
            let method = *method;
            let expected = merge(method, Some(&base), &models).unwrap();
            let mut seen = (0, 0);
            let merged =
                merge_files(method, Some(&base_file), &model_files, &out, &mut |n, all| seen = (n, all)).unwrap();
            assert_eq!((merged.tensors, merged.copied, merged.posterior), (2, vec!["count".to_owned()], false));
            assert!(seen.0 == seen.1 && seen.0 > 0);
            save(&folder.path().join("expected"), &expected);
            let difference = diff_files(&out, folder.path().join("expected")).unwrap();
            assert!(difference.is_empty(), "{kind:?} {method:?}: {difference:?}");
        }
        assert_eq!(WeightFile::open(&out).unwrap().metadata()["format"], "pt");
    }
}

#[test]
fn shards_are_one_model() {
    let folder = tempfile::tempdir().unwrap();
    let a = model(1, Kind::Float);
    let [single] = files(folder.path(), [("single.safetensors", &a)]);
    let sharded = folder.path().join("sharded");
    fs::create_dir(&sharded).unwrap();
    for (name, t) in &a {
        save(&sharded.join(format!("{name}.safetensors")), &BTreeMap::from([(name.clone(), t.shallow_clone())]));
    }
    let index = |map: &str| fs::write(sharded.join("model.safetensors.index.json"), map).unwrap();
    let whole = r#"{"metadata": {"total_size": 1}, "weight_map":
        {"big": "big.safetensors", "count": "count.safetensors", "small": "small.safetensors"}}"#;
    index(whole);
    for path in [sharded.clone(), sharded.join("model.safetensors.index.json")] {
        assert!(diff_files(&single, &path).unwrap().is_empty());
        assert_eq!(WeightFile::open(&path).unwrap().shards().count(), 3);
    }
    let out = folder.path().join("out");
    merge_files(Method::linear(), None, &[FileModel::new(&sharded), FileModel::new(&single)], &out, &mut quiet)
        .unwrap();
    assert!(diff_files(&single, &out).unwrap().is_empty());

    for (map, says) in [
        (whole.replace("\"small.", "\"big."), "`small` is in big.safetensors, where it is not"),
        (whole.replace("\"small.safetensors\"", "\"../single.safetensors\""), "expected a file beside it"),
        (whole.replace("\"small.safetensors\"", "\"/etc/passwd\""), "expected a file beside it"),
        (whole.replace("\"small.safetensors\"", "\"none.safetensors\""), "cannot be read"),
        (whole.replace("\"small\"", "\"other\""), "`other` is in small.safetensors, where it is not"),
        (whole.replace(", \"small\": \"small.safetensors\"", ", \"big\": \"small.safetensors\""), "`big` is in"),
        ("{\"weight_map\": 3}".to_owned(), "not an index"),
    ] {
        index(&map);
        let e = WeightFile::open(&sharded).unwrap_err().to_string();
        // The error of a duplicate key may come from either side.
        assert!(e.contains(says) || map.matches("\"big\"").count() > 1, "{e}");
    }
    let e = WeightFile::open(folder.path()).unwrap_err().to_string();
    assert!(e.contains("neither model.safetensors nor"), "{e}");
}

/// Shards hold what the single file does, whatever their size, and merge like it.
#[test]
fn merges_go_to_shards() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let [a, b] = files(folder.path(), [("a", &model(1, Kind::Float)), ("b", &model(2, Kind::Float))]);
    let models = [FileModel::new(&a), FileModel::new(&b)];
    let average = |out: Destination| merge_files(Method::linear(), None, &models, out, &mut quiet);
    let one = average(at("one").into()).unwrap();
    // `big` has 4 MB, `count` 8 bytes, `small` 12.
    let big = 8 * ((1 << 19) + 17);
    for (most, shards) in [(1, 3), (12, 3), (20, 2), (big, 2), (big + 8, 2), (big + 20, 1), (u64::MAX, 1)] {
        let out = at(&format!("shards{most}"));
        let mut seen = (0, 0);
        let destination = Destination::shards(&out, most);
        let merged = merge_files(Method::linear(), None, &models, destination, &mut |n, all| seen = (n, all)).unwrap();
        assert_eq!((merged, seen), (one.clone(), (big + 20, big + 20)));
        assert!(diff_files(at("one"), &out).unwrap().is_empty());
        let file = WeightFile::open(&out).unwrap();
        assert_eq!(file.shards().count(), shards, "{most}");
        assert_eq!(file.metadata()["format"], "pt");
        // These, an index and nothing else.
        assert_eq!(fs::read_dir(&out).unwrap().count(), shards + 1);
        assert!(out.join(format!("model-00001-of-{shards:05}.safetensors")).is_file());
        let index: serde_json::Value =
            serde_json::from_slice(&fs::read(out.join("model.safetensors.index.json")).unwrap()).unwrap();
        assert_eq!(index["metadata"]["total_size"], big + 20);
        assert_eq!(index["weight_map"].as_object().unwrap().len(), 3);
    }
    let again = [FileModel::new(at("shards12")), FileModel::new(at("one"))];
    merge_files(Method::linear(), None, &again, at("again"), &mut quiet).unwrap();
    assert!(diff_files(at("one"), at("again")).unwrap().is_empty());

    // Posteriors: a weight and its precision side by side, and the description in every shard.
    posterior(1).save(at("q1")).unwrap();
    posterior(2).save(at("q2")).unwrap();
    let models = [FileModel::new(at("q1")), FileModel::new(at("q2"))];
    merge_files(Method::Fisher, None, &models, at("q"), &mut quiet).unwrap();
    merge_files(Method::Fisher, None, &models, Destination::shards(at("qs"), 24), &mut quiet).unwrap();
    assert!(diff_files(at("q"), at("qs")).unwrap().is_empty());
    for shard in WeightFile::open(at("qs")).unwrap().shards() {
        let shard = WeightFile::open(shard).unwrap();
        assert!(shard.tensors().len() == 2 && shard.metadata().contains_key("tch_blr"));
        assert_eq!(shard.tensors().keys().filter(|name| shard.is_precision(name)).count(), 1);
    }
    remove_files(at("qs"), at("q2"), 0.5, Destination::shards(at("less"), 24), &mut quiet).unwrap();
    remove_files(at("q"), at("q2"), 0.5, at("less1"), &mut quiet).unwrap();
    assert!(diff_files(at("less"), at("less1")).unwrap().is_empty());
}

/// All of a folder or nothing of it.
#[test]
fn shards_replace_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let good =
        BTreeMap::from([("v".to_owned(), Tensor::from(1f32)), ("w".to_owned(), Tensor::from_slice(&[1f32, 2.0]))]);
    let bad =
        BTreeMap::from([("v".to_owned(), Tensor::from(1f32)), ("w".to_owned(), Tensor::from_slice(&[1f32, f32::NAN]))]);
    let [a, same, b] = files(folder.path(), [("a", &good), ("same", &good), ("b", &bad)]);
    let run = |model: &PathBuf, out: &str, most| {
        let models = [FileModel::new(&a), FileModel::new(model)];
        merge_files(Method::linear(), None, &models, Destination::shards(at(out), most), &mut quiet)
    };
    fs::create_dir(at("full")).unwrap();
    fs::write(at("full").join("config.json"), "{}").unwrap();
    fs::create_dir(at("empty")).unwrap();
    for out in ["full", "a"] {
        let e = run(&same, out, 4).unwrap_err().to_string();
        assert!(e.contains("shards go to a new or empty folder"), "{e}");
    }
    assert!(run(&same, "new", 0).unwrap_err().to_string().contains("max_shard_size"));
    // The first shard is written when the second one fails.
    let e = run(&b, "new", 4).unwrap_err().to_string();
    assert!(e.contains("`w`: model `b` has NaN in element 1"), "{e}");
    let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["a", "b", "empty", "full", "same"]);
    run(&same, "empty", 4).unwrap();
    assert!(diff_files(&a, at("empty")).unwrap().is_empty());
}

fn posterior(seed: i64) -> DiagonalGaussian {
    let (mut m, mut s) = (model(seed, Kind::Float), curvature(seed + 50));
    m.remove("count");
    s.remove("count");
    DiagonalGaussian::new(m.into_iter().map(|(n, m)| (n.clone(), m, s[&n].copy()))).unwrap()
}

#[test]
fn posteriors_stay_posteriors() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let q = [posterior(0), posterior(1), posterior(2)];
    q.iter().zip(["q0", "q1", "q2"]).for_each(|(q, name)| q.save(at(name)).unwrap());
    let files = [FileModel::new(at("q1")).weight(0.5), FileModel::new(at("q2")).weight(0.3)];
    let same = |file: &str, expected: &DiagonalGaussian| {
        let found = DiagonalGaussian::load(at(file)).unwrap();
        for name in expected.names() {
            for part in [DiagonalGaussian::mean, DiagonalGaussian::precision] {
                let (x, y) = (part(&found, name).unwrap(), part(expected, name).unwrap());
                assert!(((x - y) / (y.abs() + 1e-3)).abs().max().double_value(&[]) < 1e-6);
            }
        }
    };
    let method = Method::GradientMatching { delta: 0.0 };
    let merged = merge_files(method, Some(&FileModel::new(at("q0"))), &files, at("out"), &mut quiet).unwrap();
    assert!(merged.posterior);
    same("out", &combine(&[(1.0 - 0.8, &q[0]), (0.5, &q[1]), (0.3, &q[2])]).unwrap());
    merge_files(Method::Fisher, None, &files, at("out"), &mut quiet).unwrap();
    same("out", &combine(&[(0.5, &q[1]), (0.3, &q[2])]).unwrap());

    // Removal inverts addition, and says what is possible where it is too much.
    let sum = combine(&[(1.0, &q[0]), (0.5, &q[1])]).unwrap();
    sum.save(at("sum")).unwrap();
    remove_files(at("sum"), at("q1"), 0.25, at("out"), &mut quiet).unwrap();
    same("out", &combine(&[(1.0, &sum), (-0.25, &q[1])]).unwrap());
    let before = fs::read(at("out")).unwrap();
    let expected =
        q[0].names().map(|n| (sum.precision(n).unwrap() / q[1].precision(n).unwrap()).min().double_value(&[]));
    let expected = expected.fold(f64::INFINITY, f64::min);
    match remove_files(at("sum"), at("q1"), 100.0, at("out"), &mut quiet) {
        Err(Error::Removal { weight, largest, .. }) => {
            assert!(weight == 100.0 && (largest / expected - 1.0).abs() < 1e-6, "{largest} {expected}");
            remove_files(at("sum"), at("q1"), largest * 0.9999, at("other"), &mut quiet).unwrap();
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(fs::read(at("out")).unwrap(), before);

    // A method without curvature makes weights of them.
    let merged = merge_files(Method::linear(), None, &files, at("plain"), &mut quiet).unwrap();
    let plain = WeightFile::open(at("plain")).unwrap();
    assert!(!merged.posterior && plain.tensors().len() == 2 && plain.metadata().is_empty());
}

#[test]
fn what_does_not_fit_is_named_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let a = BTreeMap::from([("w".to_owned(), Tensor::from_slice(&[1f32, 2.0])), ("v".to_owned(), Tensor::from(1f32))]);
    let change = |name: &str, t: Option<Tensor>| {
        let mut other: Tensors = a.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        other.remove(name);
        other.extend(t.map(|t| (name.to_owned(), t)));
        other
    };
    let out = folder.path().join("out");
    fs::write(&out, "old").unwrap();
    for (other, says) in [
        (change("w", None), "parameter `w`"),
        (change("w", Some(Tensor::from_slice(&[1f32, 2.0, 3.0]))), "`w`: its shape is [2] in model"),
        (change("w", Some(Tensor::from_slice(&[1f32, f32::NAN]))), "`w`: model `b` has NaN in element 1"),
        (change("w", Some(Tensor::from_slice(&[1i64, 2]))), "`w`: it is F32 in"),
    ] {
        let [a, b] = files(folder.path(), [("a", &a), ("b", &other)]);
        let models = [FileModel::new(a), FileModel::new(b)];
        let e = merge_files(Method::linear(), None, &models, &out, &mut quiet).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
        let e = merge_files(Method::Fisher, None, &models[..1], &out, &mut quiet).unwrap_err().to_string();
        assert!(e.contains("has no `v.precision`"), "{e}");
        assert_eq!(fs::read(&out).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "a draft was left behind");
    }
    // Kinds that are numbers but not ours.
    let small = folder.path().join("f8");
    let bytes = [0u8; 4];
    let view = TensorView::new(Dtype::F8_E4M3, vec![4], &bytes).unwrap();
    serialize_to_file([("q", view)], None, &small).unwrap();
    let e = merge_files(Method::linear(), None, &[FileModel::new(&small)], &out, &mut quiet).unwrap_err().to_string();
    assert!(e.contains("`q`: its kind F8_E4M3 cannot be merged"), "{e}");
    // Larger than f16 can be.
    let big = BTreeMap::from([("w".to_owned(), Tensor::full([2], 60_000.0, (Kind::Half, Device::Cpu)))]);
    let [path] = files(folder.path(), [("big", &big)]);
    let models = [FileModel::new(path).weight(2.0)];
    let e = merge_files(Method::Linear { normalize: false }, None, &models, &out, &mut quiet).unwrap_err().to_string();
    assert!(e.contains("`w`") && e.contains("too large for F16"), "{e}");
}

/// Two models in folders of their own under one file name are told apart, and where the folders are makes no difference.
#[test]
fn random_choices_do_not_depend_on_the_folder() {
    let run = |reverse: bool| {
        let folder = tempfile::tempdir().unwrap();
        let base = model(0, Kind::Float);
        let [base] = files(folder.path(), [("base", &base)]);
        let mut models = [1, 2].map(|seed| {
            let own = folder.path().join(format!("run{seed}"));
            fs::create_dir(&own).unwrap();
            let [path] = files(&own, [("model.safetensors", &model(seed, Kind::Float))]);
            FileModel::new(path)
        });
        if reverse {
            models.reverse();
        }
        let out = folder.path().join("out");
        let method = Method::dare(1.0, 0.5, Rescale::Density, 0);
        merge_files(method, Some(&FileModel::new(base)), &models, &out, &mut quiet).unwrap();
        (folder, out)
    };
    let ((_first, a), (_second, b)) = (run(false), run(true));
    // Addition in another order rounds differently.
    for difference in diff_files(a, b).unwrap().values() {
        assert!(matches!(difference, Difference::Numbers { relative, .. } if *relative < 1e-6), "{difference:?}");
    }
}

#[test]
fn differences_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let a = BTreeMap::from([
        ("same".to_owned(), Tensor::from_slice(&[1f32, f32::NAN])),
        ("x".to_owned(), Tensor::from_slice(&[3f32, 4.0])),
        ("kind".to_owned(), Tensor::from_slice(&[3f32])),
        ("count".to_owned(), Tensor::from_slice(&[3i64])),
        ("old".to_owned(), Tensor::from(0f32)),
    ]);
    let b = BTreeMap::from([
        ("same".to_owned(), Tensor::from_slice(&[1f32, f32::NAN])),
        ("x".to_owned(), Tensor::from_slice(&[3f32, 4.5])),
        ("kind".to_owned(), Tensor::from_slice(&[3f64])),
        ("count".to_owned(), Tensor::from_slice(&[4i64])),
        ("new".to_owned(), Tensor::from(0f32)),
    ]);
    let [a, b] = files(folder.path(), [("a", &a), ("b", &b)]);
    let found = diff_files(&a, &b).unwrap();
    assert_eq!(found.keys().collect::<Vec<_>>(), ["count", "kind", "new", "old", "x"]);
    assert_eq!(found["x"], Difference::Numbers { largest: 0.5, relative: 0.1 });
    assert_eq!((&found["old"], &found["new"]), (&Difference::OnlyInFirst, &Difference::OnlyInSecond));
    assert!(matches!(&found["kind"], Difference::Form(x, y) if (x.dtype, y.dtype) == (Dtype::F32, Dtype::F64)));
    assert_eq!(found["count"], Difference::Bytes);
}

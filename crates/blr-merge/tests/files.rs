//! Merging files: what is read, written, refused and told apart. (Headers that lie: `headers.rs`; that the numbers are
//! those of merging tensors: tch-blr's tests/merge_files.rs.)

mod support;

use blr_merge::{
    Destination, Difference, FileModel, Method, Rescale, WeightFile, diff_files, merge_files, remove_files,
};
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use std::fs;
use std::path::{Path, PathBuf};
use support::{Model, Stored, model, random, save, save_posterior};

/// Two tensors, one of more than a chunk, and a buffer of integers.
fn example(seed: u64) -> Model {
    let rows = (1 << 19) + 17;
    model([
        ("big", Stored::f32(&random(seed, 2 * rows)).shaped(&[rows, 2])),
        ("count", Stored::i64(&[seed as i64])),
        ("small", Stored::f32(&random(seed + 1000, 3))),
    ])
}

/// Positive numbers for the same tensors.
fn curvature(seed: u64) -> Model {
    let square = |t: &Stored| {
        let x: Vec<f32> = t.numbers().iter().map(|x| x * x + 0.01).collect();
        Stored::f32(&x).shaped(&t.shape)
    };
    let positive = |(name, t): (String, Stored)| if t.dtype == Dtype::F32 { (name, square(&t)) } else { (name, t) };
    example(seed).into_iter().map(positive).collect()
}

fn quiet(_: u64, _: u64) {}

/// Saves models under their names and gives the paths.
fn files<const N: usize>(folder: &Path, models: [(&str, &Model); N]) -> [PathBuf; N] {
    models.map(|(name, tensors)| {
        let path = folder.join(name);
        save(&path, tensors);
        path
    })
}

#[test]
fn shards_are_one_model() {
    let folder = tempfile::tempdir().unwrap();
    let a = example(1);
    let [single] = files(folder.path(), [("single.safetensors", &a)]);
    let sharded = folder.path().join("sharded");
    fs::create_dir(&sharded).unwrap();
    for (name, t) in &a {
        save(&sharded.join(format!("{name}.safetensors")), &Model::from([(name.clone(), t.clone())]));
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
    let [a, b] = files(folder.path(), [("a", &example(1)), ("b", &example(2))]);
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
    for (seed, name) in [(1, "q1"), (2, "q2")] {
        let (mut mean, mut precision) = (example(seed), curvature(seed + 50));
        mean.remove("count");
        precision.remove("count");
        save_posterior(&at(name), &mean, &precision);
    }
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
    let good = model([("v", Stored::scalar(1.0)), ("w", Stored::f32(&[1.0, 2.0]))]);
    let bad = model([("v", Stored::scalar(1.0)), ("w", Stored::f32(&[1.0, f32::NAN]))]);
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

#[test]
fn what_does_not_fit_is_named_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let a = model([("w", Stored::f32(&[1.0, 2.0])), ("v", Stored::scalar(1.0))]);
    let change = |name: &str, t: Option<Stored>| {
        let mut other = a.clone();
        other.remove(name);
        other.extend(t.map(|t| (name.to_owned(), t)));
        other
    };
    let out = folder.path().join("out");
    fs::write(&out, "old").unwrap();
    for (other, says) in [
        (change("w", None), "parameter `w`"),
        (change("w", Some(Stored::f32(&[1.0, 2.0, 3.0]))), "`w`: its shape is [2] in model"),
        (change("w", Some(Stored::f32(&[1.0, f32::NAN]))), "`w`: model `b` has NaN in element 1"),
        (change("w", Some(Stored::i64(&[1, 2]))), "`w`: it is F32 in"),
    ] {
        let [a, b] = files(folder.path(), [("a", &a), ("b", &other)]);
        let models = [FileModel::new(a), FileModel::new(b)];
        let e = merge_files(Method::linear(), None, &models, &out, &mut quiet).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
        let e = merge_files(Method::Fisher, None, &models[..1], &out, &mut quiet).unwrap_err().to_string();
        assert!(e.contains("`v`") && e.contains("is not a posterior"), "{e}");
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
    // A file of another format, by its beginning and not by its name.
    let archive = folder.path().join("archive.safetensors");
    fs::write(&archive, b"PK\x03\x04\0\0\x08\x08 and so on").unwrap();
    let e = merge_files(Method::linear(), None, &[FileModel::new(&archive)], &out, &mut quiet).unwrap_err().to_string();
    assert!(e.contains("archive.safetensors") && e.contains(".ot") && e.contains("VarStore::save"), "{e}");
    // Larger than f16 can be.
    let big = model([("w", Stored::f16(&[60_000.0; 2]))]);
    let [path] = files(folder.path(), [("big", &big)]);
    let models = [FileModel::new(path).weight(2.0)];
    let e = merge_files(Method::Linear { normalize: false }, None, &models, &out, &mut quiet).unwrap_err().to_string();
    assert!(e.contains("`w`") && e.contains("too large for F16"), "{e}");
}

/// Two models in folders of their own under one file name are told apart, and where the folders are makes no
/// difference.
#[test]
fn random_choices_do_not_depend_on_the_folder() {
    let run = |reverse: bool| {
        let folder = tempfile::tempdir().unwrap();
        let base = example(0);
        let [base] = files(folder.path(), [("base", &base)]);
        let mut models = [1, 2].map(|seed| {
            let own = folder.path().join(format!("run{seed}"));
            fs::create_dir(&own).unwrap();
            let [path] = files(&own, [("model.safetensors", &example(seed))]);
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
    let a = model([
        ("same", Stored::f32(&[1.0, f32::NAN])),
        ("x", Stored::f32(&[3.0, 4.0])),
        ("kind", Stored::f32(&[3.0])),
        ("count", Stored::i64(&[3])),
        ("old", Stored::scalar(0.0)),
    ]);
    let b = model([
        ("same", Stored::f32(&[1.0, f32::NAN])),
        ("x", Stored::f32(&[3.0, 4.5])),
        ("kind", Stored::f64(&[3.0])),
        ("count", Stored::i64(&[4])),
        ("new", Stored::scalar(0.0)),
    ]);
    let [a, b] = files(folder.path(), [("a", &a), ("b", &b)]);
    let found = diff_files(&a, &b).unwrap();
    assert_eq!(found.keys().collect::<Vec<_>>(), ["count", "kind", "new", "old", "x"]);
    assert_eq!(found["x"], Difference::Numbers { largest: 0.5, relative: 0.1 });
    assert_eq!((&found["old"], &found["new"]), (&Difference::OnlyInFirst, &Difference::OnlyInSecond));
    assert!(matches!(&found["kind"], Difference::Form(x, y) if (x.dtype, y.dtype) == (Dtype::F32, Dtype::F64)));
    assert_eq!(found["count"], Difference::Bytes);
}

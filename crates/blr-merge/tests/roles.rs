//! What a tensor is for: told by a file's metadata, by names, and by the user. And in which kind the result is.

mod support;

use blr_merge::{Destination, FileModel, Method, Recipe, WeightFile, diff_files, merge_files};
use safetensors::Dtype;
use std::fs;
use std::path::{Path, PathBuf};
use support::{Model, Stored, load, model, save, save_posterior, save_with};

fn quiet(_: u64, _: u64) {}

fn f32s<const N: usize>(tensors: [(&str, &[f32]); N]) -> Model {
    model(tensors.map(|(name, x)| (name, Stored::f32(x))))
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }
    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
    fn save(&self, name: &str, model: &Model) -> FileModel {
        save(&self.at(name), model);
        FileModel::new(self.at(name))
    }
    fn merge(&self, recipe: impl Into<Recipe>, base: Option<&FileModel>, models: &[FileModel]) -> Model {
        merge_files(recipe, base, models, self.at("out"), &mut quiet).unwrap();
        load(&self.at("out"))
    }
    fn refuses(&self, recipe: impl Into<Recipe>, base: Option<&FileModel>, models: &[FileModel]) -> String {
        _ = fs::remove_file(self.at("out"));
        let e = merge_files(recipe, base, models, self.at("out"), &mut quiet).unwrap_err().to_string();
        assert!(!self.at("out").exists());
        e
    }
}

/// `x.precision` beside `x` is a precision in a file that says it is a posterior, and a tensor like others elsewhere.
#[test]
fn metadata_say_what_a_precision_is() {
    let folder = Folder::new();
    // A head that learns a log-precision for each output, of the same shape as the output's bias.
    let head = |x: f32| f32s([("head", &[x, 2.0 * x]), ("head.precision", &[3.0 * x, -x])]);
    let models = [folder.save("a", &head(1.0)), folder.save("b", &head(3.0))];
    for path in ["a", "b"] {
        let file = WeightFile::open(folder.at(path)).unwrap();
        assert!(!file.is_posterior() && !file.is_precision("head.precision") && file.precision_of("head").is_none());
    }
    assert_eq!(folder.merge(Method::linear(), None, &models), head(2.0));
    // In one of the models only, it is missing in the other.
    let plain = folder.save("plain", &f32s([("head", &[1.0, 2.0])]));
    for models in [[models[0].clone(), plain.clone()], [plain.clone(), models[0].clone()]] {
        let e = folder.refuses(Method::linear(), None, &models);
        assert!(e.contains("`head.precision`") && e.contains("does not"), "{e}");
    }
    // A method with curvature does not take it for one either.
    let e = folder.refuses(Method::Fisher, None, &models);
    assert!(e.contains("is not a posterior that tch-blr has saved"), "{e}");

    // The same tensors in a posterior's file are mean and precision, which other methods leave out of the weights.
    let q = |name: &str, x: f32| {
        save_posterior(&folder.at(name), &f32s([("head", &[x, 2.0 * x])]), &f32s([("head", &[1.0, 3.0])]));
        FileModel::new(folder.at(name))
    };
    let posteriors = [q("q1", 1.0), q("q2", 3.0)];
    assert!(WeightFile::open(folder.at("q1")).unwrap().is_precision("head.precision"));
    assert_eq!(folder.merge(Method::linear(), None, &posteriors), f32s([("head", &[2.0, 4.0])]));
    let merged = folder.merge(Method::Combine, None, &posteriors);
    assert_eq!(merged, f32s([("head", &[2.0, 4.0]), ("head.precision", &[2.0, 6.0])]));
    // One of each: the plain one has a tensor that the posterior has not.
    let e = folder.refuses(Method::linear(), None, &[posteriors[0].clone(), models[0].clone()]);
    assert!(e.contains("`head.precision`"), "{e}");
    assert_eq!(folder.merge(Method::linear(), None, &[posteriors[1].clone(), plain]), f32s([("head", &[2.0, 4.0])]));
    // A posterior's means are no curvature.
    let wrong = models.clone().map(|m| m.curvature(folder.at("q1")));
    let e = folder.refuses(Method::Fisher, None, &wrong);
    assert!(e.contains("q1: is a posterior"), "{e}");
}

#[test]
fn files_that_hold_no_weights_are_named() {
    let folder = Folder::new();
    let a = folder.save("a", &f32s([("w", &[1.0])]));
    let state = f32s([("mean.w", &[1.0]), ("state.hess.w", &[1.0])]);
    for (form, says) in [
        ("ivon optimizer", "holds `ivon optimizer`, which is not merged"),
        ("Kronecker Gaussian posterior", "holds `Kronecker Gaussian posterior`"),
        ("full Gaussian posterior", "holds `full Gaussian posterior`"),
        ("something of next year", "holds `something of next year`"),
    ] {
        let description = format!(r#"{{"form":"{form}","version":1,"content":{{}}}}"#);
        save_with(&folder.at("other"), &state, ("tch_blr", &description));
        let other = FileModel::new(folder.at("other"));
        for models in [vec![other.clone()], vec![a.clone(), other.clone()]] {
            let e = folder.refuses(Method::linear(), None, &models);
            assert!(e.contains(says) && e.contains("other: "), "{e}");
        }
        let e = folder.refuses(Method::task_arithmetic(1.0), Some(&other), std::slice::from_ref(&a));
        assert!(e.contains(says), "{e}");
        let e = folder.refuses(Method::Fisher, None, &[a.clone().curvature(folder.at("other"))]);
        assert!(e.contains(says), "{e}");
    }
    save_with(&folder.at("other"), &state, ("tch_blr", "not JSON"));
    let e = folder.refuses(Method::linear(), None, &[FileModel::new(folder.at("other"))]);
    assert!(e.contains("a description that cannot be read"), "{e}");
    // An average over a training is weights, and the average of two no longer describes itself as one of a training.
    let average = r#"{"form":"moving average of weights","version":1,"content":{"updates":3}}"#;
    save_with(&folder.at("average"), &f32s([("w", &[3.0])]), ("tch_blr", average));
    let both = [FileModel::new(folder.at("average")), a];
    assert_eq!(folder.merge(Method::linear(), None, &both)["w"].numbers(), [2.0]);
    assert!(WeightFile::open(folder.at("out")).unwrap().metadata().is_empty());
}

/// What a training has learned of a posterior is not what the merge has.
#[test]
fn a_merge_is_no_training() {
    let folder = Folder::new();
    let text = r#"{"form":"diagonal Gaussian posterior","version":1,"content":{"seed":3,"names":["w"],"learned":0.9}}"#;
    save_with(&folder.at("q"), &f32s([("w", &[1.0]), ("w.precision", &[1.0])]), ("tch_blr", text));
    merge_files(Method::Combine, None, &[FileModel::new(folder.at("q"))], folder.at("out"), &mut quiet).unwrap();
    let description = WeightFile::open(folder.at("out")).unwrap().metadata()["tch_blr"].clone();
    let description: serde_json::Value = serde_json::from_str(&description).unwrap();
    assert_eq!(description["content"], serde_json::json!({"seed": 3, "names": ["w"]}));
}

/// By every method, of either sign of the weights.
#[test]
fn statistics_are_averaged_by_every_method() {
    let folder = Folder::new();
    let net = |x: f32| f32s([("bn.running_var", &[x]), ("w", &[x])]);
    let base = folder.save("base", &net(1.0)).curvature(folder.at("fisher"));
    folder.save("fisher", &f32s([("w", &[2.0])]));
    let models = |weights: [f64; 2]| {
        [(0.5, "a"), (0.1, "b")]
            .map(|(x, name)| folder.save(name, &net(x)).curvature(folder.at("fisher")))
            .into_iter()
            .zip(weights)
            .map(|(m, w)| m.weight(w))
            .collect::<Vec<_>>()
    };
    let variance = |method: Method, weights| {
        let merged = folder.merge(method, Some(&base), &models(weights));
        (merged["bn.running_var"].numbers()[0], merged["w"].numbers()[0])
    };
    let close = |x: f32, y: f32| assert!((x - y).abs() < 1e-6, "{x} {y}");
    for (method, weights, expected) in [
        (Method::linear(), [1.0, 3.0], 0.2),
        (Method::Linear { normalize: false }, [1.0, 3.0], 0.2),
        (Method::Linear { normalize: false }, [2.0, -1.0], 0.5),
        (Method::Linear { normalize: false }, [-2.0, -1.0], 0.3),
        (Method::Slerp { t: 0.25 }, [1.0, 1.0], 0.4),
        (Method::Slerp { t: 1.5 }, [1.0, 1.0], 0.1),
        (Method::task_arithmetic(1.0), [1.0, 1.0], 0.3),
        (Method::task_arithmetic(1.0), [0.0, 1.0], 0.1),
        (Method::ties(1.0, 0.5), [1.0, 1.0], 0.3),
        (Method::Fisher, [1.0, 3.0], 0.2),
        (Method::gradient_matching(), [1.0, 1.0], 0.3),
    ] {
        close(variance(method, weights).0, expected);
    }
    // 1 - 0.5 - 0.9: what it would be as a weight.
    close(variance(Method::task_arithmetic(1.0), [1.0, 1.0]).1, -0.4);
    // In a posterior it has a precision, and so has been learned.
    let q = |name: &str, x: f32| {
        save_posterior(&folder.at(name), &f32s([("running_mean", &[x])]), &f32s([("running_mean", &[x])]));
        FileModel::new(folder.at(name))
    };
    let merged = folder.merge(Method::Combine, None, &[q("q1", 1.0), q("q2", 3.0)]);
    assert_eq!(merged, f32s([("running_mean", &[2.5]), ("running_mean.precision", &[4.0])]));
}

#[test]
fn what_is_left_out_is_copied_and_may_differ() {
    let folder = Folder::new();
    let a = folder.save("a", &f32s([("body.w", &[1.0]), ("body.b", &[5.0]), ("head.w", &[1.0, 2.0])]));
    let b = folder.save("b", &f32s([("body.w", &[3.0]), ("body.b", &[7.0]), ("head.w", &[1.0, 2.0, 3.0])]));
    let c = folder.save("c", &f32s([("body.w", &[5.0]), ("body.b", &[9.0]), ("extra", &[1.0])]));
    let e = folder.refuses(Method::linear(), None, &[a.clone(), b.clone()]);
    assert!(e.contains("`head.w`: its shape is [2]"), "{e}");
    let all = [a.clone(), b.clone(), c];
    let head = Recipe::new(Method::linear()).exclude("head.*").exclude("extra");
    let expected = |b: f32| f32s([("body.w", &[3.0]), ("body.b", &[b]), ("head.w", &[1.0, 2.0])]);
    assert_eq!(folder.merge(head, None, &all), expected(7.0));
    let body = Recipe::new(Method::linear()).include("body.?");
    assert_eq!(folder.merge(body.clone(), None, &all), expected(7.0));
    let merged =
        merge_files(body.exclude("*.b"), None, &all, Destination::shards(folder.at("shards"), 4), &mut quiet).unwrap();
    assert_eq!((merged.tensors, merged.copied, merged.averaged), (1, vec!["body.b".into(), "head.w".into()], vec![]));
    save(&folder.at("expected"), &expected(5.0));
    assert!(diff_files(folder.at("expected"), folder.at("shards")).unwrap().is_empty());
    let e = folder.refuses(Recipe::new(Method::linear()).exclude("heads.*"), None, &all);
    assert!(e.contains("`heads.*`"), "{e}");
    // Kinds that cannot be merged can be left out.
    // Of a posterior with its precision, so that the result is a whole one.
    let q = |name: &str, x: f32| {
        let (mean, s) = (f32s([("v", &[x]), ("w", &[x])]), f32s([("v", &[1.0]), ("w", &[3.0])]));
        save_posterior(&folder.at(name), &mean, &s);
        FileModel::new(folder.at(name))
    };
    let recipe = Recipe::new(Method::Combine).exclude("v");
    let merged = folder.merge(recipe, None, &[q("q1", 1.0), q("q2", 3.0)]);
    let expected = f32s([("v", &[1.0]), ("v.precision", &[1.0]), ("w", &[2.0]), ("w.precision", &[6.0])]);
    assert_eq!(merged, expected);
}

/// A head that one file leaves out because it is the embedding.
#[test]
fn tied_tensors_that_are_not_written_again() {
    let folder = Folder::new();
    let whole = folder.save("whole", &f32s([("embed", &[1.0]), ("head", &[2.0])]));
    let short = folder.save("short", &f32s([("embed", &[3.0])]));
    for models in [[whole.clone(), short.clone()], [short.clone(), whole.clone()]] {
        let e = folder.refuses(Method::linear(), None, &models);
        assert!(e.contains("`head`") && e.contains("tied"), "{e}");
        let recipe = Recipe::new(Method::linear()).tied("head", "embed");
        assert_eq!(folder.merge(recipe, None, &models), f32s([("embed", &[2.0]), ("head", &[2.5])]));
    }
    let recipe = Recipe::new(Method::task_arithmetic(1.0)).tied("head", "embed");
    assert_eq!(folder.merge(recipe, Some(&short), &[whole]), f32s([("embed", &[1.0]), ("head", &[2.0])]));
    let e = folder.refuses(Recipe::new(Method::linear()).tied("head", "none"), None, &[short.clone(), short.name("x")]);
    assert!(e.contains("`none`"), "{e}");
}

#[test]
fn the_result_is_as_wide_as_the_widest() {
    let folder = Folder::new();
    let bf16 =
        |x: f32| Stored { dtype: Dtype::BF16, shape: vec![1], bytes: half::bf16::from_f32(x).to_le_bytes().to_vec() };
    let of = |name: &str, t: Stored| folder.save(name, &model([("w", t)]));
    let narrow = of("narrow", bf16(1.0));
    let single = of("single", Stored::f32(&[1.001]));
    let half = of("half", Stored::f16(&[1.001]));
    let double = of("double", Stored::f64(&[1.000_000_000_1]));
    let out = |models: &[&FileModel], dtype: Option<Dtype>| {
        let out = Destination::from(folder.at("out"));
        let out = dtype.map_or(out.clone(), |dtype| out.dtype(dtype));
        let models: Vec<FileModel> = models.iter().map(|m| (*m).clone()).collect();
        merge_files(Method::linear(), None, &models, out, &mut quiet).unwrap();
        load(&folder.at("out"))["w"].clone()
    };
    for (models, expected) in [
        ([&narrow, &single], Stored::f32(&[1.0005])),
        ([&single, &narrow], Stored::f32(&[1.0005])),
        ([&narrow, &half], Stored::f32(&[f32::midpoint(1.0, half::f16::from_f32(1.001).to_f32())])),
        ([&narrow, &double], Stored::f64(&[1.000_000_000_05])),
        ([&half, &single], Stored::f32(&[f32::midpoint(1.001, half::f16::from_f32(1.001).to_f32())])),
    ] {
        assert_eq!(out(&models, None), expected);
    }
    assert_eq!(out(&[&narrow, &single], Some(Dtype::BF16)), bf16(1.0005));
    assert_eq!(out(&[&half, &narrow], Some(Dtype::F16)).dtype, Dtype::F16);
    // The digits of f64 also where no input has them.
    let thirds = [of("1", Stored::f32(&[1.0])), of("2", Stored::f32(&[1.0])), of("3", Stored::f32(&[2.0]))];
    assert_eq!(out(&[&thirds[0], &thirds[1], &thirds[2]], Some(Dtype::F64)), Stored::f64(&[4.0 / 3.0]));
    let wrong = Destination::from(folder.at("none")).dtype(Dtype::I64);
    let e =
        merge_files(Method::linear(), None, std::slice::from_ref(&single), wrong, &mut quiet).unwrap_err().to_string();
    assert!(e.contains("`dtype` = I64") && !folder.at("none").exists(), "{e}");
    // What is copied as well, but no integers.
    let kept = folder.save("kept", &model([("h", Stored::f32(&[0.1])), ("n", Stored::i64(&[3])), ("w", bf16(1.0))]));
    let recipe = Recipe::new(Method::linear()).exclude("h");
    let out = Destination::from(folder.at("out")).dtype(Dtype::F64);
    merge_files(recipe, None, &[kept], out, &mut quiet).unwrap();
    let expected = [("h", Stored::f64(&[f64::from(0.1f32)])), ("n", Stored::i64(&[3])), ("w", Stored::f64(&[1.0]))];
    assert_eq!(load(&folder.at("out")), model(expected));
}

/// A precision of 0 is no precision; one that f32 holds is not written as 0 in a narrower kind.
#[test]
fn precisions_do_not_underflow() {
    let folder = Folder::new();
    let q = |name: &str, s: Stored| {
        let mean = Stored { bytes: vec![0; s.bytes.len()], ..s.clone() };
        save_posterior(&folder.at(name), &model([("w", mean)]), &model([("w", s)]));
        FileModel::new(folder.at(name))
    };
    // The smallest that f16 has, and half of it, which is rounded to zero.
    let least = 2f32.powi(-24);
    let model = |weight| q("q", Stored::f16(&[1.0, least])).weight(weight);
    let e = folder.refuses(Method::Combine, None, &[model(0.5)]);
    assert!(e.contains("`w`: its precision 2.9802322387695313e-8 of element 1 would be 0 in F16"), "{e}");
    assert!(e.contains("choose a wider kind"), "{e}");
    assert_eq!(folder.merge(Method::Combine, None, &[model(0.51)])["w.precision"], Stored::f16(&[0.51, least]));
    let out = || Destination::from(folder.at("out")).dtype(Dtype::F32);
    merge_files(Method::Combine, None, &[model(0.5)], out(), &mut quiet).unwrap();
    assert_eq!(load(&folder.at("out"))["w.precision"], Stored::f32(&[0.5, least / 2.0]));
    // f32 from f64, and bf16.
    let wide = q("wide", Stored::f64(&[1e-46]));
    let e = merge_files(Method::Combine, None, &[wide], out(), &mut quiet).unwrap_err().to_string();
    assert!(e.contains("would be 0 in F32"), "{e}");
    let narrow = q("narrow", Stored::f32(&[2e-41]));
    let out = Destination::from(folder.at("out")).dtype(Dtype::BF16);
    let e = merge_files(Method::Combine, None, &[narrow], out, &mut quiet).unwrap_err().to_string();
    assert!(e.contains("would be 0 in BF16"), "{e}");
}

/// Names given to models are what errors call them, and what random choices depend on.
#[test]
fn models_have_names() {
    let folder = Folder::new();
    let x: Vec<f32> = support::random(1, 1000);
    let base = folder.save("base", &f32s([("w", &[0.0; 1000])]));
    let a = folder.save("a", &f32s([("w", &x)]));
    let method = Method::dare(1.0, 0.5, blr_merge::Rescale::Density, 0);
    let run = |name: Option<&str>| {
        let model = name.map_or(a.clone(), |name| a.clone().name(name));
        folder.merge(method, Some(&base), &[model])
    };
    assert_eq!(run(None), run(Some("a")));
    assert!(run(None) != run(Some("b")));
    // One file twice, once named.
    let twice = [a.clone().weight(3.0), a.clone().name("again")];
    assert_eq!(folder.merge(Method::linear(), None, &twice)["w"].numbers(), x);
    let e = folder.refuses(Method::linear(), None, &[a.clone(), a.clone()]);
    assert!(e.contains("two models are") && e.contains("with a larger weight"), "{e}");
    assert!(Path::new(&folder.at("a")).exists());
}

//! Low-rank adapters as models: W + s·BA, what is read of PEFT's files, and what is refused.

#[path = "support/mutation.rs"]
mod mutation;
mod support;

use blr_merge::{FileModel, Merged, Method, Recipe, merge_files};
use mutation::{Parts, Random, changed};
use std::fs;
use std::path::PathBuf;
use support::{Model, Stored, load, model, random, save};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }
    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
    fn save(&self, name: &str, tensors: &Model) -> PathBuf {
        save(&self.at(name), tensors);
        self.at(name)
    }
    /// A folder as PEFT makes it.
    fn adapter(&self, name: &str, config: &str, tensors: &Model) -> PathBuf {
        fs::create_dir_all(self.at(name)).unwrap();
        save(&self.at(name).join("adapter_model.safetensors"), tensors);
        let path = self.at(name).join("adapter_config.json");
        if config.is_empty() {
            _ = fs::remove_file(path);
        } else {
            fs::write(path, config).unwrap();
        }
        self.at(name)
    }
    fn merge(
        &self,
        recipe: impl Into<Recipe>,
        base: Option<&FileModel>,
        models: &[FileModel],
    ) -> blr_merge::Result<Merged> {
        merge_files(recipe, base, models, self.at("out"), &mut |_, _| ())
    }
    /// The one model as it is merged.
    fn whole(&self, model: FileModel) -> Model {
        self.merge(Method::linear(), None, &[model]).unwrap();
        load(&self.at("out"))
    }
    fn refuses(&self, model: FileModel) -> String {
        _ = fs::remove_file(self.at("out"));
        let e = self.merge(Method::linear(), None, &[model]).unwrap_err().to_string();
        assert!(!self.at("out").exists());
        e
    }
}

/// Rank 2, for a 2×3 weight: BA = [[1, 2, 0], [2, 4, 1]].
fn pair(module: &str) -> Model {
    let [a, b] = ["lora_A", "lora_B"].map(|half| format!("{module}.{half}.weight"));
    model([
        (&a, Stored::f32(&[1.0, 2.0, 0.0, 0.0, 0.0, 1.0]).shaped(&[2, 3])),
        (&b, Stored::f32(&[1.0, 0.0, 2.0, 1.0]).shaped(&[2, 2])),
    ])
}

fn base() -> Model {
    model([
        ("q.bias", Stored::f32(&[7.0, 8.0])),
        ("q.weight", Stored::f32(&[10.0, 20.0, 30.0, 40.0, 50.0, 60.0]).shaped(&[2, 3])),
    ])
}

#[test]
fn products_are_added_to_weights() {
    let folder = Folder::new();
    let weights = folder.save("base", &base());
    let whole = |adapter: &PathBuf, alpha: Option<f64>| {
        let model = FileModel::new(&weights).adapter(adapter);
        let merged = folder.whole(alpha.map_or(model.clone(), |alpha| model.alpha(alpha)));
        assert_eq!(merged["q.bias"], base()["q.bias"]);
        merged["q.weight"].numbers()
    };
    let plus = |s: f32| [10.0 + s, 20.0 + 2.0 * s, 30.0, 40.0 + 2.0 * s, 50.0 + 4.0 * s, 60.0 + s];
    // α/r = 6/2, by either name of the modules; α given, in place of the configuration's; α/√r.
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"], "bias": "none", "use_rslora": null}"#;
    let peft = folder.adapter("peft", config, &pair("base_model.model.q"));
    assert_eq!(whole(&peft, None), plus(3.0));
    assert_eq!(whole(&peft, Some(1.0)), plus(0.5));
    assert_eq!(whole(&peft.join("adapter_model.safetensors"), Some(-2.0)), plus(-1.0));
    assert_eq!(whole(&folder.adapter("plain", config, &pair("q")), None), plus(3.0));
    let named = |name: &str| name.replace(".weight", ".default.weight");
    let named = pair("base_model.model.q").into_iter().map(|(name, t)| (named(&name), t)).collect();
    assert_eq!(whole(&folder.adapter("named", "", &named), Some(6.0)), plus(3.0));
    let rs = folder.adapter("rs", r#"{"r": 2, "lora_alpha": 3, "use_rslora": true}"#, &pair("q"));
    let found = whole(&rs, None);
    let far = found.iter().zip(plus(3.0 / 2f32.sqrt())).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(far < 1e-5, "{found:?}");

    // Products are merged, and not factors: two adapters with factors of opposite sign are one.
    let opposite: Model = pair("q")
        .into_iter()
        .map(|(name, t)| (name, Stored::f32(&t.numbers().iter().map(|x| -x).collect::<Vec<_>>()).shaped(&t.shape)))
        .collect();
    let other = folder.adapter("opposite", config, &opposite);
    let base_model = FileModel::new(&weights);
    let models = [&peft, &other].map(|adapter| FileModel::new(&weights).adapter(adapter));
    folder.merge(Method::linear(), None, &models).unwrap();
    assert_eq!(load(&folder.at("out"))["q.weight"].numbers(), plus(3.0));
    folder.merge(Method::task_arithmetic(1.0), Some(&base_model), &models).unwrap();
    assert_eq!(load(&folder.at("out"))["q.weight"].numbers(), plus(6.0));
    // A base may have one, too, and what is left out is that of the base or first model with it.
    folder.merge(Method::task_arithmetic(1.0), Some(&models[0]), &models).unwrap();
    assert_eq!(load(&folder.at("out"))["q.weight"].numbers(), plus(3.0));
    let kept = folder.merge(Recipe::new(Method::linear()).exclude("*.weight"), None, &models).unwrap();
    assert_eq!(kept.copied, ["q.weight"]);
    assert_eq!(load(&folder.at("out"))["q.weight"].numbers(), plus(3.0));
}

#[test]
fn embeddings_convolutions_and_transposed_layers() {
    let folder = Folder::new();
    let rank = r#"{"r": 2, "lora_alpha": 2, "fan_in_fan_out": false}"#;
    // (BA)ᵀ, where BA is 2×3.
    let turned = [1.0, 2.0, 2.0, 4.0, 0.0, 1.0];
    let zeros =
        |name: &str, shape: &[usize]| folder.save(name, &model([("q.weight", Stored::f32(&[0.0; 6]).shaped(shape))]));
    let embedding: Model = pair("q")
        .into_iter()
        .map(|(name, t)| (name.replace("lora_", "lora_embedding_").replace(".weight", ""), t))
        .collect();
    let adapter = folder.adapter("embedding", rank, &embedding);
    assert_eq!(folder.whole(FileModel::new(zeros("e", &[3, 2])).adapter(adapter))["q.weight"].numbers(), turned);
    let adapter = folder.adapter("fan", &rank.replace("false", "true"), &pair("q"));
    assert_eq!(folder.whole(FileModel::new(zeros("f", &[3, 2])).adapter(adapter))["q.weight"].numbers(), turned);
    let shaped = |(name, t): (String, Stored)| {
        let shape = if name.contains("lora_A") { [2, 3, 1, 1] } else { [2, 2, 1, 1] };
        (name, t.shaped(&shape))
    };
    let adapter = folder.adapter("conv", rank, &pair("q").into_iter().map(shaped).collect());
    let conv = folder.whole(FileModel::new(zeros("c", &[2, 3, 1, 1])).adapter(adapter));
    assert_eq!(conv["q.weight"].numbers(), [1.0, 2.0, 0.0, 2.0, 4.0, 1.0]);
    assert_eq!(conv["q.weight"].shape, [2, 3, 1, 1]);
}

/// More than one chunk, rows that no block ends with, and a base of half precision, whose kind the result has.
#[test]
fn large_products_are_those_of_f64() {
    let folder = Folder::new();
    let (rows, columns, rank) = (1031, 1033, 3);
    let w = random(1, rows * columns);
    let bf16 = Stored {
        dtype: safetensors::Dtype::BF16,
        shape: vec![rows, columns],
        bytes: w.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
    };
    let (a, b) = (random(2, rank * columns), random(3, rows * rank));
    let factors = model([
        ("x.q.lora_A.weight", Stored::f32(&a).shaped(&[rank, columns])),
        ("x.q.lora_B.weight", Stored::f32(&b).shaped(&[rows, rank])),
    ]);
    let adapter = folder.adapter("adapter", "", &factors);
    let single = folder.save("single", &model([("x.q.weight", Stored::f32(&w).shaped(&[rows, columns]))]));
    let found = folder.whole(FileModel::new(&single).adapter(&adapter).alpha(1.5))["x.q.weight"].numbers();
    for (i, found) in found.iter().enumerate() {
        let (row, column) = (i / columns, i % columns);
        let sum: f64 = (0..rank).map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * columns + column])).sum();
        let expected = f64::from(w[i]) + 0.5 * sum;
        assert!((f64::from(*found) - expected).abs() < 2e-7, "{i}: {found} instead of {expected}");
    }
    let narrow = folder.save("narrow", &model([("x.q.weight", bf16)]));
    let merged = folder.whole(FileModel::new(&narrow).adapter(&adapter).alpha(1.5));
    assert_eq!(merged["x.q.weight"].dtype, safetensors::Dtype::BF16);
}

#[test]
fn adapters_that_do_not_fit_are_refused_by_name() {
    let folder = Folder::new();
    let weights = folder.save("base", &base());
    let config = r#"{"r": 2, "lora_alpha": 6}"#;
    let with = |name: &str, t: Option<Stored>| {
        let mut tensors = pair("q");
        match t {
            Some(t) => _ = tensors.insert(name.to_owned(), t),
            None => _ = tensors.remove(name).unwrap(),
        }
        tensors
    };
    let t = |shape: &[usize]| Some(Stored::f32(&vec![1.0; shape.iter().product()]).shaped(shape));
    let [a, b] = ["q.lora_A.weight", "q.lora_B.weight"];
    for (config, tensors, says) in [
        (config, with(a, None), "has `q.lora_B.weight`, and no factor A"),
        (config, with(b, None), "has `q.lora_A.weight`, and no factor B"),
        (config, with(b, t(&[2, 3])), "whose ranks differ"),
        (config, with(a, t(&[0, 3])), "whose ranks differ"),
        (config, with(a, t(&[])), "whose ranks differ"),
        (config, with(b, t(&[2])), "whose ranks differ"),
        (config, with(a, t(&[2, 4])), "does not fit its shape [2, 3]"),
        (config, with(b, t(&[3, 2])), "does not fit its shape [2, 3]"),
        (config, with(b, t(&[2, 2, 3])), "does not fit its shape [2, 3]"),
        (r#"{"r": 2, "lora_alpha": 6, "fan_in_fan_out": true}"#, pair("q"), "does not fit its shape [2, 3]"),
        (config, pair("k"), "changes `k.weight`, which"),
        (config, with("q.bias", t(&[2])), "has `q.bias`, which is no factor"),
        (config, with("q.lora_magnitude_vector", t(&[2])), "`q.lora_magnitude_vector`, which is no factor"),
        (config, with("q.alpha", t(&[1])), "`q.alpha`, which is no factor"),
        (config, with("base_model.model.q.lora_A.weight", t(&[2, 3])), "which are one factor"),
        (config, with(a, Some(Stored::i64(&[1; 6]).shaped(&[2, 3]))), "`q.lora_A.weight` as floating-point"),
        (r#"{"r": 4, "lora_alpha": 6}"#, pair("q"), "of rank 2, and adapter_config.json says r = 4"),
        (r#"{"r": 2}"#, pair("q"), "adapter_config.json beside it does not say it"),
        ("", pair("q"), "adapter_config.json beside it is not there"),
        (r#"{"peft_type": "LOHA", "lora_alpha": 1}"#, pair("q"), "peft_type = LOHA, which is not supported"),
        (r#"{"use_dora": true, "lora_alpha": 1}"#, pair("q"), "has use_dora"),
        (r#"{"lora_alpha": 1, "alpha_pattern": {"q": 3}}"#, pair("q"), "has alpha_pattern"),
        (r#"{"lora_alpha": 1, "init_lora_weights": "pissa"}"#, pair("q"), "init_lora_weights = pissa, which changes"),
        (r#"{"lora_alpha": 1, "init_lora_weights": "pissa_niter_16"}"#, pair("q"), "pissa_niter_16"),
        (r#"{"lora_alpha": 1, "init_lora_weights": "olora"}"#, pair("q"), "path_initial_model_for_weight_conversion"),
        ("{", pair("q"), "is not an adapter's configuration"),
        (r#"{"lora_alpha": "six"}"#, pair("q"), "is not an adapter's configuration"),
    ] {
        let adapter = folder.adapter("adapter", config, &tensors);
        let e = folder.refuses(FileModel::new(&weights).adapter(adapter));
        assert!(e.contains(says) && e.contains("adapter"), "{says}: {e}");
    }
    // Ways to start that leave the base as it is.
    for start in ["true", "false", "null", "\"gaussian\"", "\"eva\"", "\"orthogonal\""] {
        let config = format!(r#"{{"r": 2, "lora_alpha": 2, "init_lora_weights": {start}}}"#);
        folder.whole(FileModel::new(&weights).adapter(folder.adapter("adapter", &config, &pair("q"))));
    }
    // A rank for each module is a rank that r does not say.
    let patterned = r#"{"r": 4, "lora_alpha": 2, "rank_pattern": {"q": 2}, "alpha_pattern": {}}"#;
    let adapter = folder.adapter("adapter", patterned, &pair("q"));
    folder.whole(FileModel::new(&weights).adapter(&adapter));
    let e = folder.refuses(FileModel::new(&weights).adapter(&adapter).alpha(f64::NAN));
    assert!(e.contains("`alpha` = NaN"), "{e}");
    let e = folder.refuses(FileModel::new(&weights).alpha(1.0));
    assert!(e.contains("without the adapter"), "{e}");
    let e = folder.refuses(FileModel::new(&weights).adapter(folder.at("none")));
    assert!(e.contains("none: cannot be read"), "{e}");
    let integers = folder.save("integers", &model([("q.weight", Stored::i64(&[1; 6]).shaped(&[2, 3]))]));
    let e = folder.refuses(FileModel::new(integers).adapter(&adapter));
    assert!(e.contains("`q.weight` as floating-point"), "{e}");
    // Numbers that are none: of the model, since the file of the weights is not to blame.
    let bad = with(a, Some(Stored::f32(&[1.0, f32::NAN, 1.0, 1.0, 1.0, 1.0]).shaped(&[2, 3])));
    let e = folder.refuses(FileModel::new(&weights).adapter(folder.adapter("bad", config, &bad)));
    assert!(e.contains("`q.weight`: model `bad` has NaN in element 1"), "{e}");
    // A posterior has a precision, which the sum has not.
    support::save_posterior(&folder.at("q"), &base(), &base());
    let model = FileModel::new(folder.at("q")).adapter(&adapter);
    let e = folder.merge(Method::Fisher, None, std::slice::from_ref(&model)).unwrap_err().to_string();
    assert!(e.contains("given with an adapter, of which it has no precision"), "{e}");
    folder.merge(Method::Fisher, None, &[model.curvature(&weights)]).unwrap();
}

#[test]
fn changed_adapters_give_errors_or_whole_files() {
    let folder = Folder::new();
    let weights = folder.save("base", &base());
    let adapter =
        folder.adapter("adapter", r#"{"r": 2, "lora_alpha": 6}"#, &pair("q")).join("adapter_model.safetensors");
    let config = adapter.with_file_name("adapter_config.json");
    let parts = Parts::of(&fs::read(&adapter).unwrap()).unwrap();
    let mut random = Random(0xada);
    let (mut refused, mut merged) = (0, 0);
    for case in 0..300 {
        fs::write(&adapter, changed(&parts, &mut random)).unwrap();
        if case % 3 == 0 {
            let text = br#"{"r": 2, "lora_alpha": 6, "use_rslora": false, "rank_pattern": {}}"#.to_vec();
            fs::write(&config, mutation::garbled(text, &mut random)).unwrap();
        }
        fs::write(folder.at("out"), "old").unwrap();
        if folder.merge(Method::linear(), None, &[FileModel::new(&weights).adapter(&adapter)]).is_ok() {
            merged += 1;
            assert_eq!(load(&folder.at("out")).len(), 2);
        } else {
            refused += 1;
            assert_eq!(fs::read(folder.at("out")).unwrap(), b"old");
        }
        assert_eq!(fs::read_dir(folder.0.path()).unwrap().count(), 3, "{case}");
        fs::write(&config, r#"{"r": 2, "lora_alpha": 6}"#).unwrap();
    }
    assert!(refused > 100 && merged > 10, "{refused} {merged}");
}

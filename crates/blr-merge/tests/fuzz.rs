//! Files and indices changed at random: merging, comparing and taking them apart gives errors or whole files, and
//! leaves what is there. (Headers by themselves, in bounded memory: headers.rs; checkpoints and posteriors: tch-blr's
//! tests/fuzz.rs.)

#[path = "support/mutation.rs"]
mod mutation;
mod support;

use blr_merge::{Destination, FileModel, Method, Recipe, Rescale, WeightFile, diff_files, merge_files, remove_files};
use mutation::{Parts, Random, change_value, changed, garbled};
use std::fs;
use std::path::{Path, PathBuf};
use support::{Stored, load, model, save, save_posterior};

fn quiet(_: u64, _: u64) {}

fn posterior(path: &Path, x: f32) {
    let tensors = |x: f32| model([("b", Stored::f32(&[x; 3])), ("w", Stored::f32(&[x; 6]).shaped(&[2, 3]))]);
    save_posterior(path, &tensors(x), &tensors(2.0));
}

/// What is left in the folder beside these is a draft.
fn names(folder: &Path) -> Vec<PathBuf> {
    let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    names.sort();
    names
}

#[test]
fn changed_files_give_errors_or_whole_files() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    posterior(&at("good"), 1.0);
    let plain = model([
        ("bn.running_var", Stored::f32(&[1.0; 3])),
        ("n", Stored::i64(&[7])),
        ("w", Stored::f16(&[1.0; 6]).shaped(&[2, 3])),
    ]);
    save(&at("plain"), &plain);
    let seeds = ["good", "plain"].map(|name| Parts::of(&fs::read(at(name)).unwrap()).unwrap());
    fs::write(at("out"), "old").unwrap();
    fs::write(at("changed"), "").unwrap();
    let before = names(folder.path());
    let methods = [
        Method::linear(),
        Method::Slerp { t: 0.3 },
        Method::task_arithmetic(0.5),
        Method::ties(1.0, 0.3),
        Method::dare(1.0, 0.5, Rescale::L1Norm, 1),
        Method::della(1.0, 0.5, 0.2, 1),
        Method::breadcrumbs(1.0, 0.3, 0.2),
        Method::ModelStock,
        Method::Karcher,
        Method::Sce { density: 0.5 },
        Method::Fisher,
        Method::gradient_matching(),
        Method::Combine,
    ];
    let mut random = Random(0x5eed);
    let (mut refused, mut merged) = (0, 0);
    for case in 0..300 {
        let (seed, good) = if case % 3 == 0 { (&seeds[1], at("plain")) } else { (&seeds[0], at("good")) };
        let bytes = changed(seed, &mut random);
        fs::write(at("changed"), &bytes).unwrap();
        let method = methods[case % methods.len()];
        let base = FileModel::new(&good);
        let models = [FileModel::new(at("changed")), base.clone().weight(0.5)];
        let recipe = Recipe::new(method);
        let recipe = if case % 3 == 0 { recipe.tied("head", "w") } else { recipe };
        match merge_files(recipe, Some(&base), &models, at("out"), &mut quiet) {
            Err(_) => {
                refused += 1;
                assert_eq!(fs::read(at("out")).unwrap(), b"old");
            }
            Ok(done) => {
                merged += 1;
                let out = load(&at("out"));
                assert!(out.len() >= done.tensors);
                assert!(WeightFile::open(at("out")).is_ok());
                fs::write(at("out"), "old").unwrap();
            }
        }
        _ = diff_files(at("changed"), &good);
        for path in [at("changed"), good] {
            if remove_files(path, at("changed"), 0.25, at("out"), &mut quiet).is_ok() {
                assert!(load(&at("out")).contains_key("w.precision"));
                fs::write(at("out"), "old").unwrap();
            }
        }
        let shards = Destination::shards(at("shards"), 8);
        if merge_files(Method::linear(), None, &models[..1], shards, &mut quiet).is_ok() {
            assert!(WeightFile::open(at("shards")).unwrap().shards().count() > 0);
            fs::remove_dir_all(at("shards")).unwrap();
        }
        assert_eq!(names(folder.path()), before, "case {case}");
        assert_eq!(fs::read(at("changed")).unwrap(), bytes);
    }
    // Both happen: neither is everything refused nor everything believed.
    assert!(refused > 100 && merged > 25, "{refused} {merged}");
}

#[test]
fn changed_indices_give_errors_or_whole_models() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    posterior(&at("good"), 1.0);
    let models = [FileModel::new(at("good"))];
    merge_files(Method::Combine, None, &models, Destination::shards(at("shards"), 8), &mut quiet).unwrap();
    let index = at("shards").join("model.safetensors.index.json");
    let text = fs::read(&index).unwrap();
    let shards = ["../good", "/etc/passwd", "", ".", "..", "a/b", "model.safetensors.index.json", "nul\0l", "none"];
    let mut random = Random(0x1dea);
    let (mut refused, mut whole) = (0, 0);
    for case in 0..1500 {
        let mut value: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let bytes = match case % 4 {
            0 => garbled(text.clone(), &mut random),
            1 => {
                value["weight_map"]["w"] = shards[random.below(shards.len())].into();
                serde_json::to_vec(&value).unwrap()
            }
            _ => {
                (0..=random.below(2)).for_each(|_| change_value(&mut value, &mut random));
                serde_json::to_vec(&value).unwrap()
            }
        };
        fs::write(&index, bytes).unwrap();
        match WeightFile::open(at("shards")) {
            Err(_) => refused += 1,
            Ok(file) => {
                whole += 1;
                assert_eq!(file.tensors().len(), 4);
                assert!(diff_files(at("shards"), at("good")).unwrap().is_empty());
            }
        }
    }
    assert!(refused > 500 && whole > 50, "{refused} {whole}");
}

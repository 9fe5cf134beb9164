//! Merging files gives what merging tensors and posteriors in memory does. (Files by themselves:
//! crates/blr-merge/tests.)

use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};
use tch_blr::merge::{
    FileModel, Method, Model, Recipe, Rescale, Tensors, WeightFile, diff_files, merge, merge_files, remove_files,
};
use tch_blr::{DiagonalGaussian, Statistic, Von, blr_merge, combine};

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
            Method::della(1.0, 0.3, 0.2, 5),
            Method::breadcrumbs(1.0, 0.3, 0.1),
            Method::ModelStock,
            Method::Karcher,
            Method::Sce { density: 0.3 },
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
        // Rules for some of the tensors, too.
        let recipe = Recipe::new(Method::linear()).method_for("*", Method::Karcher).weights_for("[bc]*", [2.0, 1.0]);
        let recipe = recipe.method_for("small", Method::task_arithmetic(0.5)).weights_for("small", [3.0, -1.0]);
        let expected = merge(recipe.clone(), Some(&base), &models).unwrap();
        merge_files(recipe, Some(&base_file), &model_files, &out, &mut quiet).unwrap();
        save(&folder.path().join("expected"), &expected);
        assert!(diff_files(&out, folder.path().join("expected")).unwrap().is_empty());
        assert_eq!(WeightFile::open(&out).unwrap().metadata()["format"], "pt");
    }
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
                assert!(((x - &y) / (y.abs() + 1e-3)).abs().max().double_value(&[]) < 1e-6);
            }
        }
    };
    let method = Method::GradientMatching { delta: 0.0, clamp: false };
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
        Err(blr_merge::Error::Removal { weight, largest, .. }) => {
            assert!(weight == 100.0 && (largest / expected - 1.0).abs() < 1e-6, "{largest} {expected}");
            remove_files(at("sum"), at("q1"), largest * 0.9999, at("other"), &mut quiet).unwrap();
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(fs::read(at("out")).unwrap(), before);

    // The damping of a training's noise, and how much of a precision it has learned, are of that training alone.
    let w = support::weight(&[2.0, 1.0]);
    let mut opt = Von::vogn().ess(8.0).hessian(Statistic::Price).damping(1.5).build(support::params(&w), 0.1).unwrap();
    opt.step(|| w.square().sum(Kind::Double)).unwrap();
    let damped = opt.posterior().unwrap();
    assert_eq!((damped.damping("w"), damped.learned().is_some()), (Some(12.0), true));
    let twice = ["damped", "again"].map(|name| {
        damped.save(at(name)).unwrap();
        FileModel::new(at(name))
    });
    merge_files(Method::Fisher, None, &twice, at("out"), &mut quiet).unwrap();
    let joint = DiagonalGaussian::load(at("out")).unwrap();
    assert_eq!((joint.damping("w"), joint.learned()), (Some(0.0), None));

    // A method without curvature makes weights of them.
    let merged = merge_files(Method::linear(), None, &files, at("plain"), &mut quiet).unwrap();
    let plain = WeightFile::open(at("plain")).unwrap();
    assert!(!merged.posterior && plain.tensors().len() == 2 && plain.metadata().is_empty());
}

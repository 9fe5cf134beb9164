//! The command `blr-merge`, run in a folder, and small models for it.
#![allow(dead_code)] // Each test file is a crate of its own and takes the part it needs.

use crate::support::{self, Stored, model};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// With the words of a line; one in single quotes may have spaces.
pub fn run(folder: &Path, arguments: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blr-merge"));
    for (i, part) in arguments.split('\'').enumerate() {
        if i % 2 == 1 {
            command.arg(part)
        } else {
            command.args(part.split_whitespace())
        };
    }
    command.current_dir(folder).output().unwrap()
}

/// What it prints.
pub fn ok(folder: &Path, arguments: &str) -> String {
    let out = run(folder, arguments);
    assert!(out.status.success(), "{arguments}: {}", String::from_utf8_lossy(&out.stderr));
    // No progress where there is no terminal.
    assert!(out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// The single line on stderr.
pub fn error(folder: &Path, arguments: &str) -> String {
    let out = run(folder, arguments);
    assert_eq!(out.status.code(), Some(2), "{arguments}");
    let text = String::from_utf8(out.stderr).unwrap();
    assert!(text.starts_with("error: ") && text.lines().count() == 1, "{text}");
    text
}

/// A model of three tensors, of a number and twice that.
pub fn save(folder: &Path, name: &str, layers: [f32; 3]) {
    let [a, b, c] = layers.map(|x| Stored::f32(&[x, 2.0 * x]));
    support::save(&folder.join(name), &model([("layers.0.w", a), ("layers.1.w", b), ("head.w", c)]));
}

/// The first numbers of the layers and the head.
pub fn load(path: &Path) -> [f32; 3] {
    let m = support::load(path);
    ["layers.0.w", "layers.1.w", "head.w"].map(|name| m[name].numbers()[0])
}

/// A base and two models in a folder `models`.
pub fn models() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("models")).unwrap();
    for (name, layers) in [("base", [0.0, 0.0, 0.0]), ("a", [1.0, 2.0, 3.0]), ("b", [10.0, 20.0, 30.0])] {
        save(&folder.path().join("models"), &format!("{name}.safetensors"), layers);
    }
    folder
}

/// What is in a folder.
pub fn names(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect()
}

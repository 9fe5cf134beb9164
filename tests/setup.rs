//! `scripts/setup.sh`, offline: whatever it cannot use, it says so in one line that tells what to do, and leaves nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Runs a copy of the script (its `.libtorch` is the copy's own) and returns the lines of stderr; it has to fail.
fn refused(dir: &Path, env: &[(&str, &str)]) -> Vec<String> {
    let repo = dir.join("re po");
    fs::create_dir_all(repo.join("scripts")).unwrap();
    fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/setup.sh"), repo.join("scripts/setup.sh")).unwrap();
    let mut command = Command::new("bash");
    command.arg(repo.join("scripts/setup.sh")).env("TCH_BLR_CACHE", dir.join("ca che"));
    for name in ["LIBTORCH", "LIBTORCH_USE_PYTORCH", "LIBTORCH_BYPASS_VERSION_CHECK", "VIRTUAL_ENV", "PIP_FIND_LINKS"] {
        command.env_remove(name);
    }
    let out = command.envs(env.iter().copied()).output().unwrap();
    let stderr = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{env:?}: {stderr}");
    assert!(!repo.join(".libtorch").exists(), "{env:?}");
    stderr.lines().map(str::to_owned).collect()
}

#[test]
fn what_the_environment_names_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let torch = dir.path().join("torch");
    for folder in ["lib", "include/torch/csrc/api/include/torch"] {
        fs::create_dir_all(torch.join(folder)).unwrap();
    }
    for file in ["lib/libtorch_cpu.so", "include/torch/csrc/api/include/torch/torch.h"] {
        fs::write(torch.join(file), "").unwrap();
    }
    fs::write(torch.join("build-version"), "2.11.0+cpu\n").unwrap();
    let python = dir.path().join("python");
    fs::create_dir_all(python.join("torch")).unwrap();
    fs::write(python.join("torch/__init__.py"), "raise ImportError('no such luck')").unwrap();

    for (env, expected) in [
        (vec![("LIBTORCH", "")], "not an absolute path"),
        (vec![("LIBTORCH", "/nonexistent")], "has no lib/libtorch_cpu.so"),
        (vec![("LIBTORCH", torch.to_str().unwrap())], "is torch 2.11.0+cpu and tch needs"),
        (vec![("LIBTORCH_USE_PYTORCH", "1"), ("PYTHONPATH", python.to_str().unwrap())], "no such luck"),
        (vec![("TCH_BLR_CACHE", "relative")], "not an absolute path"),
        (vec![("TCH_BLR_CACHE", "/proc/nonexistent")], "cannot write to"),
    ] {
        let lines = refused(dir.path(), &env);
        assert!(lines.len() == 1 && lines[0].contains(expected), "{env:?}: {lines:?}");
    }
}

#[test]
fn a_download_that_cannot_succeed_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let lines = refused(dir.path(), &[("PIP_NO_INDEX", "1")]);
    let last = lines.last().unwrap();
    assert!(last.starts_with("setup: error: "), "{lines:?}");
    let left: Vec<_> =
        fs::read_dir(dir.path().join("ca che")).into_iter().flatten().map(|f| f.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == "lock"), "{left:?}");
}

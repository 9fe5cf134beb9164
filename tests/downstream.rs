//! `examples/downstream` is a crate of its own: it builds against ours and starts without `LD_LIBRARY_PATH`.

use std::path::Path;
use std::process::Command;

#[test]
fn a_separate_crate_links_and_runs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let downstream = root.join("examples/downstream");
    // Our versions of everything and our target folder: what cargo has just built (libtorch's C++ wrapper above all) is
    // not built again.
    std::fs::copy(root.join("Cargo.lock"), downstream.join("Cargo.lock")).unwrap();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let out = Command::new(env!("CARGO"))
        // Unoptimized: whether it links is the question, and tch-blr is built again for it.
        .args(["run", "--quiet", "--config", "profile.dev.package.tch-blr.opt-level=0"])
        .args(if cfg!(debug_assertions) { None } else { Some("--release") })
        .current_dir(&downstream)
        .env("CARGO_TARGET_DIR", target)
        .env_remove("LD_LIBRARY_PATH")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "cargo run in {}: {}\n{stderr}", downstream.display(), out.status);
    let stdout = String::from_utf8_lossy(&out.stdout);
    assert!(stdout.contains("weight = ") && stdout.contains("bias = "), "stdout: {stdout}\nstderr: {stderr}");
}

//! Finds libtorch at run time: cargo does not pass the link arguments of tch on to its dependents.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // torch-sys (`links = "tch"`) tells its direct dependents where libtorch is; under `doc-only` it does not.
    let Some(lib) = std::env::var_os("DEP_TCH_LIBTORCH_LIB") else { return };
    let given = lib.to_string_lossy();
    let lib = std::fs::canonicalize(&*given).map_or(given.to_string(), |p| p.display().to_string());
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    // Once that libtorch is gone (`make setup` then fetches another), this has to run again.
    println!("cargo::rerun-if-changed={lib}/libtorch_cpu.so");
    // For dependents of this crate: DEP_TCH_BLR_LIBTORCH_LIB in their build scripts.
    println!("cargo::metadata=LIBTORCH_LIB={lib}");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() && links_cuda(&lib) {
        // The linker drops libraries that no symbol asks for, and the CUDA back-end registers itself
        // when loaded: without this, `Cuda::is_available()` is false.
        println!("cargo::rustc-link-arg=-Wl,--no-as-needed");
        println!("cargo::rustc-link-arg=-ltorch");
    }
}

/// Whether libtorch has CUDA libraries, with all that they need in turn. PyTorch's wheel has them in any case, but what
/// they need comes in other wheels, without which nothing that is linked to them starts.
fn links_cuda(lib: &str) -> bool {
    let cuda = format!("{lib}/libtorch_cuda.so");
    if !std::path::Path::new(&cuda).exists() {
        return false;
    }
    // Where there is no `ldd` to ask, they are taken to be complete.
    let Ok(listed) = std::process::Command::new("ldd").arg(&cuda).output() else { return true };
    !String::from_utf8_lossy(&listed.stdout).contains("not found")
}

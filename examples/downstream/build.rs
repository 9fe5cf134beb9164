//! Tells the program where to find libtorch when it starts; copy this file into your crate.
//!
//! cargo does not pass link arguments on to dependents, but it hands a build script what its direct dependencies
//! publish.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Ok(lib) = std::env::var("DEP_TCH_BLR_LIBTORCH_LIB") {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    }
}

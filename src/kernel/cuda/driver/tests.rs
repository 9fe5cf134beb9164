//! On a GPU, where there is one; and on a driver that is none.

use super::*;
use libloading::Library;
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCE: &str = "extern \"C\" __global__ void pass(unsigned long long* x, const unsigned long long* y,\
    unsigned long long n) {\n\
    for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < n;\n\
    i += (unsigned long long)gridDim.x * blockDim.x) x[i] = 3 * y[i];\n}\n";

/// Path of the fake driver, in the environment of [`child`].
const FAKE: &str = "TCH_BLR_TEST_FAKE_DRIVER";

fn gpu(test: &str) -> Option<Gpu> {
    open(0).map_err(|why| println!("skipped: {test}: {why}")).ok()
}

fn bytes(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

#[test]
fn what_is_missing_is_a_reason() {
    let reason = open(4096).err().expect("no GPU has this number");
    assert!(["libcuda.so.1", "driver", "NVRTC", "no GPU 4096"].iter().any(|word| reason.contains(word)), "{reason}");
    assert!(open(usize::MAX).is_err());
}

/// Growing, and more of them than tables at a time.
fn tables_and_results(gpu: &mut Gpu) {
    let kernel = gpu.compile(SOURCE).expect("a kernel");
    for n in [1usize, 1000, 100_000, 513, 0, 512, 1, 2, 3, 4, 5, 6, 300_000] {
        let numbers: Vec<u64> = (0..n as u64).map(|i| i * i + n as u64).collect();
        let table = gpu.upload(&bytes(&numbers)).expect("a table");
        let results = gpu.results(8 * n).expect("results");
        gpu.launch(kernel, n.div_ceil(BLOCK as usize) as u32, &[results, table, n as u64]).expect("a launch");
        let mut back = vec![0; 8 * n];
        gpu.download(results, &mut back).expect("results");
        let expected: Vec<u64> = numbers.iter().map(|x| 3 * x).collect();
        assert!(back == bytes(&expected), "{n}");
    }
    // Many passes before anybody waits: each has the table that it was given.
    let results = gpu.results(8 * 100).expect("results");
    for i in 0..100 {
        let table = gpu.upload(&bytes(&[1000 + i])).expect("a table");
        gpu.launch(kernel, 1, &[results + 8 * i, table, 1]).expect("a launch");
    }
    let mut back = vec![0; 8 * 100];
    gpu.download(results, &mut back).expect("results");
    let expected: Vec<u64> = (0..100).map(|i| 3 * (1000 + i)).collect();
    assert!(back == bytes(&expected));
}

#[test]
fn tables_go_there_and_results_come_back() {
    let Some(mut gpu) = gpu("tables_go_there_and_results_come_back") else { return };
    tables_and_results(&mut gpu);
}

fn no_memory(gpu: &mut Gpu) {
    for what in [gpu.results(1 << 45), gpu.results(1 << 45)] {
        let Err(Error::Device(text)) = what else { panic!("32 TiB") };
        assert!(text.contains(&(1u64 << 45).to_string()) && text.contains("no memory left"), "{text}");
    }
    // It goes on afterwards.
    assert!(gpu.results(8).is_ok() && gpu.upload(&[1]).is_ok());
}

#[test]
fn no_memory_left_names_the_bytes() {
    let Some(mut gpu) = gpu("no_memory_left_names_the_bytes") else { return };
    no_memory(&mut gpu);
}

#[test]
fn on_a_driver_that_is_none() {
    let folder = tempfile::tempdir().expect("a folder");
    // The first name that is tried, in the first folder: a driver that is there as well is not looked at.
    let (library, source) = (folder.path().join("libcuda.so"), folder.path().join("fake.c"));
    std::fs::write(&source, include_str!("fake.c")).expect("a file");
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).status();
    assert!(compiled.expect("a C compiler").success());
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child.args(["--ignored", "--exact", "kernel::cuda::driver::tests::child", "--nocapture"]);
    let others = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let folders = std::iter::once(folder.path().to_owned()).chain(std::env::split_paths(&others));
    child.env("LD_LIBRARY_PATH", std::env::join_paths(folders).expect("paths")).env_remove("LD_PRELOAD");
    child.env("TCH_BLR_CACHE", folder.path().join("cache"));
    let output = child.env(super::super::search::VARIABLE, &library).env(FAKE, &library).output().expect("a process");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
#[ignore = "on_a_driver_that_is_none runs it"]
fn child() {
    let Some(path) = std::env::var_os(FAKE).map(PathBuf::from) else { return };
    // SAFETY: it is loaded already.
    let fake = unsafe { Library::new(&path) }.expect("the fake driver");
    let count = |name: &str| {
        // SAFETY: both of its own functions have this type.
        unsafe { fake.get::<unsafe extern "C" fn() -> i32>(name).expect("a function")() }
    };
    let mut gpu = open(0).expect("a GPU");
    assert_eq!(result::ctx::get_current().expect("a driver"), None, "the context of the thread was another");
    assert_eq!(gpu.target, Target::Binary(90));
    tables_and_results(&mut gpu);
    no_memory(&mut gpu);
    assert!(gpu.launch(Kernel(0), 0, &[]).is_ok(), "no blocks are no work");

    // A kernel is compiled once, whatever becomes of the process, and again if what is kept cannot be loaded.
    let mut other = open(1).expect("another");
    tables_and_results(&mut other);
    assert_eq!(count("fakeCompiled"), 1);
    let folder = Path::new(&std::env::var_os("TCH_BLR_CACHE").expect("a folder")).join("kernels");
    assert_eq!(std::fs::read_dir(&folder).expect("kernels").count(), 1);
    let (options, target, version) = (OPTIONS.join(" "), gpu.target.option(), gpu.nvrtc.version());
    gpu.cache.put(&Key::new(&[env!("CARGO_PKG_VERSION"), &version, &options, &target, SOURCE]), b"of another driver");
    tables_and_results(&mut gpu);
    assert_eq!(count("fakeCompiled"), 2);
    tables_and_results(&mut other);
    assert_eq!(count("fakeCompiled"), 2);
    let Err(Error::Device(text)) = gpu.compile("first\n  #error second\n") else { panic!("it compiled") };
    assert!(text.contains("as it says") && text.ends_with("the line: #error second"), "{text}");

    // The context of whoever calls stays theirs, also on other threads.
    let theirs = other.context.cu_ctx();
    // SAFETY: `other` keeps it.
    unsafe { result::ctx::set_current(theirs) }.expect("a context");
    tables_and_results(&mut gpu);
    assert_eq!(result::ctx::get_current().expect("a driver"), Some(theirs));
    let mut gpu = std::thread::spawn(move || {
        tables_and_results(&mut gpu);
        gpu
    })
    .join()
    .expect("a thread");

    // Work that is on its way is waited for before memory goes.
    let (results, table) = (gpu.results(8).expect("results"), gpu.upload(&bytes(&[7])).expect("a table"));
    gpu.launch(Kernel(0), 1, &[results, table, 1]).expect("a launch");
    assert!(open(2).is_err_and(|why| why.contains("no GPU 2: 2 are visible")));
    assert!(count("fakeLive") > 0);
    drop((gpu, other));
    assert_eq!(count("fakeLive"), 0, "something was not given back");
}

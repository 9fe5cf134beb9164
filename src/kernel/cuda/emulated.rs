//! A device that is the CPU: the same source, compiled by the C++ compiler, with blocks and threads that run one after the
//! other. For tests where there is no GPU.
//!
//! It calls what it has compiled and copies from addresses, so the code here is unsafe.
#![allow(unsafe_code)]

use super::device::{Device, Kernel};
use super::{BLOCK, locked};
use crate::{Error, Result};
use libloading::Library;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

/// What CUDA has without a header.
const SHIM: &str = r#"
#define __global__
#define __device__
#define __launch_bounds__(threads)
struct Index { unsigned int x; };
static thread_local Index blockIdx, threadIdx;
template <class To, class From> static inline To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To y;
    __builtin_memcpy(&y, &x, sizeof(To));
    return y;
}
static inline float __uint_as_float(unsigned int x) { return bits_of<float>(x); }
static inline unsigned int __float_as_uint(float x) { return bits_of<unsigned int>(x); }
static inline double __longlong_as_double(long long x) { return bits_of<double>(x); }
static inline long long __double_as_longlong(double x) { return bits_of<long long>(x); }
extern "C" float sqrtf(float), fabsf(float), tanhf(float);
extern "C" double sqrt(double), fabs(double), tanh(double);
#line 1 "kernel.cu"
"#;

/// Every thread of every block.
fn calls() -> String {
    format!(
        r#"
extern "C" void emulate(unsigned int blocks, u64 chunks, u64 entries) {{
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < {BLOCK}; threadIdx.x++)
            pass((const u64*)chunks, (const u64*)entries);
}}
"#
    )
}

/// In the order of compilers: no product may be fused with a sum.
const FLAGS: [&str; 8] =
    ["-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas"];

/// A library, compiled once in this process; a message if it could not be.
type Compiled = Arc<OnceLock<std::result::Result<Library, String>>>;

/// By their sources.
static LIBRARIES: Mutex<Option<HashMap<String, Compiled>>> = Mutex::new(None);

/// Beside the program, in cargo's target folder.
fn folder() -> std::io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let folder = program.parent().unwrap_or(Path::new(".")).join("cuda-emulation");
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Compiles a source, unless an earlier run has left it.
fn compiled(source: &str) -> std::result::Result<Library, String> {
    let text = format!("{SHIM}{source}{}", calls());
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let mut hasher = DefaultHasher::new();
    (&text, &compiler, FLAGS).hash(&mut hasher);
    let said = |e: std::io::Error| e.to_string();
    let folder = folder().map_err(said)?;
    let path = folder.join(format!("{:016x}.so", hasher.finish()));
    if !path.exists() {
        // Under a name of this process alone, then renamed: another one never sees half a file.
        let own = folder.join(format!("{:016x}-{}.cpp", hasher.finish(), std::process::id()));
        let library = own.with_extension("so");
        std::fs::write(&own, text).map_err(said)?;
        let output = Command::new(&compiler).args(FLAGS).arg("-o").arg(&library).arg(&own).output();
        _ = std::fs::remove_file(&own);
        let output = output.map_err(|e| format!("the C++ compiler `{compiler}` (set CXX to another one): {e}"))?;
        if !output.status.success() {
            let all = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(all.lines().find(|line| line.contains("error")).unwrap_or(&all).to_owned());
        }
        std::fs::rename(&library, &path).map_err(said)?;
    }
    // SAFETY: it was compiled from a source above, and has no initialisers.
    unsafe { Library::new(&path) }.map_err(|e| e.to_string())
}

/// The CPU. Launches run when they are made.
#[derive(Debug, Default)]
pub(super) struct Emulated {
    kernels: Vec<Compiled>,
    tables: Vec<u64>,
    results: Vec<u64>,
}

impl Device for Emulated {
    fn compile(&mut self, source: &str) -> Result<Kernel> {
        let library = locked(&LIBRARIES).get_or_insert_default().entry(source.to_owned()).or_default().clone();
        // Outside of the lock, so that threads compile side by side.
        if let Err(message) = library.get_or_init(|| compiled(source)) {
            return Err(Error::Device(format!("a kernel was not compiled: {message}")));
        }
        self.kernels.push(library);
        Ok(Kernel(self.kernels.len() - 1))
    }

    fn upload(&mut self, bytes: &[u8]) -> Result<u64> {
        self.tables = bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
        Ok(self.tables.as_ptr().expose_provenance() as u64)
    }

    fn results(&mut self, bytes: usize) -> Result<u64> {
        self.results = vec![0; bytes.div_ceil(size_of::<u64>())];
        Ok(self.results.as_mut_ptr().expose_provenance() as u64)
    }

    fn launch(&mut self, Kernel(kernel): Kernel, blocks: u32, arguments: &[u64]) -> Result<()> {
        let Some(Ok(library)) = self.kernels[kernel].get() else { unreachable!("its number was given out") };
        let [chunks, entries] = *arguments else { unreachable!("every kernel has two arguments") };
        // SAFETY: the library has this function, of this type, from `calls`. It reads and writes what the tables say:
        // tensors that the caller has borrowed, of the lengths given there.
        unsafe {
            let emulate = library
                .get::<unsafe extern "C" fn(u32, u64, u64)>(b"emulate\0")
                .map_err(|e| Error::Device(e.to_string()))?;
            emulate(blocks, chunks, entries);
        }
        Ok(())
    }

    fn download(&mut self, address: u64, to: &mut [u8]) -> Result<()> {
        let start = self.results.as_ptr().expose_provenance() as u64;
        let from = (address - start) as usize;
        let all = self.results.iter().flat_map(|x| x.to_ne_bytes());
        to.iter_mut().zip(all.skip(from)).for_each(|(to, x)| *to = x);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_compiler_says_is_in_the_error() {
        let source = "\nextern \"C\" __global__ void pass(const u64* chunks, const u64* entries) { missing(); }";
        let error = Emulated::default().compile(source).unwrap_err().to_string();
        assert!(error.contains("kernel.cu:2") && error.contains("error"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

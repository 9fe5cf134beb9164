//! NVRTC, CUDA's compiler at run time: found beside libtorch's own ([`super::search`]), its functions bound here.
//!
//! A GPU is not needed to compile for one.
#![allow(unsafe_code)]

use super::search;
use super::source::OPTIONS;
use crate::Error;
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

/// What errors call the source.
const NAME: &CStr = c"pass.cu";

type Program = *mut c_void;
/// A code; 0 is success.
type Code = c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> Code;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> Code;

/// The functions of a library that stays loaded.
pub(super) struct Nvrtc {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Code,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Code,
    destroy: unsafe extern "C" fn(*mut Program) -> Code,
    log: (Size, Text),
    binary: (Size, Text),
    assembly: (Size, Text),
    error: unsafe extern "C" fn(Code) -> *const c_char,
    version: (c_int, c_int),
    /// Compute capabilities that it compiles for, as 10 × major + minor.
    capabilities: Vec<c_int>,
}

/// What to compile for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// A GPU of this compute capability: its machine code.
    Binary(c_int),
    /// GPUs of this compute capability and newer ones: an assembly that the driver translates.
    Assembly(c_int),
}

impl Target {
    /// The compiler's option.
    pub(super) fn option(self) -> String {
        match self {
            Target::Binary(capability) => format!("--gpu-architecture=sm_{capability}"),
            Target::Assembly(capability) => format!("--gpu-architecture=compute_{capability}"),
        }
    }
}

/// The best for a GPU with a compiler that knows these.
fn target(gpu: c_int, known: &[c_int]) -> Result<Target, String> {
    match known.iter().copied().filter(|c| *c <= gpu).max() {
        Some(capability) if capability == gpu => Ok(Target::Binary(gpu)),
        Some(capability) => Ok(Target::Assembly(capability)),
        None => Err(format!(
            "the GPU's compute capability is {}.{}, older than all that the installed NVRTC compiles for ({known:?}); an \
             older CUDA may know it",
            gpu / 10,
            gpu % 10
        )),
    }
}

impl Nvrtc {
    /// The one of the process, loaded the first time.
    ///
    /// # Errors
    /// Why there is none, and what to do.
    pub(super) fn get() -> Result<&'static Nvrtc, String> {
        static NVRTC: OnceLock<Result<Nvrtc, String>> = OnceLock::new();
        NVRTC.get_or_init(Nvrtc::find).as_ref().map_err(String::clone)
    }

    fn find() -> Result<Nvrtc, String> {
        // Where there is no such file (not on Linux), nothing is known of what is loaded.
        let maps = std::fs::read("/proc/self/maps").unwrap_or_default();
        let candidates = search::candidates(&String::from_utf8_lossy(&maps), |name| std::env::var_os(name));
        let mut problems = Vec::new();
        for path in &candidates {
            match Nvrtc::load(path) {
                Ok(nvrtc) => return Ok(nvrtc),
                Err(problem) if problem.contains("No such file") => {}
                Err(problem) => problems.push(format!(" ({problem})")),
            }
        }
        let paths: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
        Err(format!(
            "there is no NVRTC, the compiler for the GPU, as {}{}; install it beside PyTorch (`pip install \
             nvidia-cuda-nvrtc`) or with CUDA, or set {} to the path of libnvrtc.so",
            paths.join(", "),
            problems.concat(),
            search::VARIABLE
        ))
    }

    fn load(path: &Path) -> Result<Nvrtc, String> {
        let open = |path: &Path| {
            // SAFETY: the initializers of NVIDIA's libraries ask nothing of who loads them.
            unsafe { Library::new(path) }
        };
        let library = open(path).map_err(|e| words(&e))?;
        // It asks for the rest of itself by a name that resolves only if that is loaded already or on the linker's path,
        // as it is where none lies beside the library.
        for builtins in search::builtins(path) {
            _ = open(&builtins).map(std::mem::forget);
        }
        let nvrtc = Nvrtc::bind(&library).map_err(|problem| format!("{}: {problem}", path.display()));
        // The functions are its code: it stays loaded.
        std::mem::forget(library);
        nvrtc
    }

    fn bind(library: &Library) -> Result<Nvrtc, String> {
        fn function<F: Copy>(library: &Library, name: &CStr) -> Result<F, String> {
            // SAFETY: a function by this name, if there is one, has had the type that it is bound as here since NVRTC
            // first had it (11.2 at the latest): NVIDIA gives others names of their own.
            unsafe { library.get::<F>(name).map(|f| *f) }
                .map_err(|_| format!("it has no {}; NVRTC 11.2 and newer do", name.to_string_lossy()))
        }
        type Number = unsafe extern "C" fn(*mut c_int) -> Code;
        let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Code = function(library, c"nvrtcVersion")?;
        let count: Number = function(library, c"nvrtcGetNumSupportedArchs")?;
        let list: Number = function(library, c"nvrtcGetSupportedArchs")?;
        let mut nvrtc = Nvrtc {
            create: function(library, c"nvrtcCreateProgram")?,
            compile: function(library, c"nvrtcCompileProgram")?,
            destroy: function(library, c"nvrtcDestroyProgram")?,
            log: (function(library, c"nvrtcGetProgramLogSize")?, function(library, c"nvrtcGetProgramLog")?),
            binary: (function(library, c"nvrtcGetCUBINSize")?, function(library, c"nvrtcGetCUBIN")?),
            assembly: (function(library, c"nvrtcGetPTXSize")?, function(library, c"nvrtcGetPTX")?),
            error: function(library, c"nvrtcGetErrorString")?,
            version: (0, 0),
            capabilities: Vec::new(),
        };
        let mut n = 0;
        // SAFETY: places for the numbers asked for.
        let code = unsafe { version(&raw mut nvrtc.version.0, &raw mut nvrtc.version.1).max(count(&raw mut n)) };
        nvrtc.check("its version", code)?;
        nvrtc.capabilities = vec![0; usize::try_from(n).unwrap_or(0)];
        // SAFETY: there are places for as many numbers as it said that it writes.
        let code = unsafe { list(nvrtc.capabilities.as_mut_ptr()) };
        nvrtc.check("the GPUs that it compiles for", code)?;
        Ok(nvrtc)
    }

    fn check(&self, what: &str, code: Code) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: it returns a text that is part of the library, for any code.
        let text = unsafe { CStr::from_ptr((self.error)(code)) };
        Err(format!("NVRTC failed to give {what}: {}", text.to_string_lossy()))
    }

    /// What code depends on besides source and options.
    pub(super) fn version(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    /// What to compile for a GPU of this compute capability, as 10 × major + minor.
    ///
    /// # Errors
    /// It is too old.
    pub(super) fn target(&self, gpu: c_int) -> Result<Target, String> {
        target(gpu, &self.capabilities)
    }

    /// An image that a driver loads: of [`Target::Assembly`] a text that ends with a zero.
    ///
    /// # Errors
    /// [`Error::Device`] with the compiler's words and the line that they are about.
    pub(super) fn compile(&self, source: &str, target: Target) -> crate::Result<Vec<u8>> {
        let device = |problem: String| Error::Device(problem);
        let text = CString::new(source).map_err(|_| device("a kernel's source has a zero in it".into()))?;
        let options: Vec<CString> = OPTIONS
            .into_iter()
            .map(str::to_owned)
            .chain([target.option()])
            .map(|option| CString::new(option).expect("no zeros"))
            .collect();
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = Open { nvrtc: self, program: null_mut() };
        // SAFETY: texts that end with zeros and outlive the program; no headers.
        let code = unsafe { (self.create)(&raw mut program.program, text.as_ptr(), NAME.as_ptr(), 0, null(), null()) };
        self.check("a program", code).map_err(device)?;
        // SAFETY: a program that was created, and as many options as is said.
        let code = unsafe { (self.compile)(program.program, options.len() as c_int, options.as_ptr()) };
        if let Err(problem) = self.check("code", code) {
            let log = program.read("its messages", self.log).unwrap_or_default();
            return Err(device(told(&problem, &String::from_utf8_lossy(&log), source)));
        }
        let image = match target {
            Target::Binary(_) => self.binary,
            Target::Assembly(_) => self.assembly,
        };
        program.read("an image", image).map_err(device)
    }
}

/// What the dynamic linker said: libloading only has it as the source of its error.
fn words(e: &libloading::Error) -> String {
    std::error::Error::source(e).map_or_else(|| e.to_string(), ToString::to_string)
}

/// A program until it is dropped.
struct Open<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Open<'_> {
    fn read(&self, what: &str, (size, read): (Size, Text)) -> Result<Vec<u8>, String> {
        let mut n = 0;
        // SAFETY: a program that was created, and a place for a number.
        self.nvrtc.check(what, unsafe { size(self.program, &raw mut n) })?;
        let mut bytes = vec![0u8; n];
        // SAFETY: there is as much memory as it said that it writes.
        self.nvrtc.check(what, unsafe { read(self.program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: it was created, and is not used again.
            unsafe { (self.nvrtc.destroy)(&raw mut self.program) };
        }
    }
}

/// The compiler's words, and the first line of the source that they are about.
fn told(problem: &str, log: &str, source: &str) -> String {
    let log = log.trim_end_matches('\0').trim();
    let number = log.lines().filter(|line| line.contains("error")).find_map(|line| {
        let (number, _) = line.strip_prefix(&format!("{}(", NAME.to_str().ok()?))?.split_once(')')?;
        number.parse::<usize>().ok()
    });
    let line = number.and_then(|n| source.lines().nth(n.checked_sub(1)?));
    let line = line.map_or(String::new(), |line| format!("\nthe line: {}", line.trim()));
    format!("a kernel cannot be compiled ({problem}); please report this with your version of CUDA\n{log}{line}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "extern \"C\" __global__ void pass(float* x, unsigned long long n) {\n  \
        unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;\n  \
        if (i < n) x[i] = x[i] * x[i] + 1.0f;\n}\n";

    /// The compiler, if this machine has one.
    fn nvrtc(test: &str) -> Option<&'static Nvrtc> {
        Nvrtc::get().map_err(|why| println!("skipped: {test}: {why}")).ok()
    }

    #[test]
    fn the_target_is_the_gpus_own_or_the_newest_before_it() {
        let known = [75, 80, 86, 90, 100, 120];
        assert_eq!(target(90, &known), Ok(Target::Binary(90)));
        assert_eq!(target(75, &known), Ok(Target::Binary(75)));
        assert_eq!(target(89, &known), Ok(Target::Assembly(86)));
        assert_eq!(target(130, &known), Ok(Target::Assembly(120)));
        assert_eq!(Target::Binary(90).option(), "--gpu-architecture=sm_90");
        assert_eq!(Target::Assembly(120).option(), "--gpu-architecture=compute_120");
        let old = target(70, &known).unwrap_err();
        assert!(old.contains("7.0") && old.contains("75"), "{old}");
        assert!(target(90, &[]).is_err());
    }

    #[test]
    fn an_error_shows_its_line() {
        let log = "pass.cu(2): warning #1: w\npass.cu(3): error: identifier \"y\" is undefined\n\n1 error\n\0";
        let text = told("why", log, "one\ntwo\n  three y\nfour");
        assert!(text.contains("identifier \"y\" is undefined") && text.ends_with("the line: three y"), "{text:?}");
        // Words about no line, or about one that is not there.
        for log in ["error: bad option", "pass.cu(9): error: e", "pass.cu(0): error: e", "pass.cu(x): error: e", ""] {
            let text = told("why", log, "one");
            assert!(text.contains(log) && !text.contains("the line"), "{text:?}");
        }
    }

    #[test]
    fn it_compiles_for_every_gpu_that_it_knows() {
        let Some(nvrtc) = nvrtc("it_compiles_for_every_gpu_that_it_knows") else { return };
        for &capability in &nvrtc.capabilities {
            assert_eq!(nvrtc.target(capability), Ok(Target::Binary(capability)));
            let image = nvrtc.compile(SOURCE, Target::Binary(capability)).expect("machine code");
            assert!(image.starts_with(b"\x7fELF"), "sm_{capability}");
        }
        let newest = *nvrtc.capabilities.iter().max().expect("some");
        let newer = nvrtc.target(newest + 10).expect("assembly");
        assert_eq!(newer, Target::Assembly(newest));
        let text = String::from_utf8(nvrtc.compile(SOURCE, newer).expect("assembly")).expect("a text");
        assert!(text.ends_with('\0') && text.contains(".entry pass"), "{text}");
        // One operation, one rounding.
        assert!(text.contains("mul.rn.f32") && text.contains("add.rn.f32") && !text.contains("fma"), "{text}");
    }

    #[test]
    fn what_does_not_compile_is_an_error_with_its_line() {
        let Some(nvrtc) = nvrtc("what_does_not_compile_is_an_error_with_its_line") else { return };
        let target = Target::Binary(*nvrtc.capabilities.last().expect("some"));
        let broken = SOURCE.replace("+ 1.0f", "+ nothing");
        let Err(Error::Device(text)) = nvrtc.compile(&broken, target) else { panic!("it compiled") };
        assert!(text.contains("\"nothing\" is undefined") && text.ends_with("x[i] = x[i] * x[i] + nothing;"), "{text}");
        let Err(Error::Device(text)) = nvrtc.compile("a\0b", target) else { panic!("it compiled") };
        assert!(text.contains("zero"), "{text}");
        let Err(Error::Device(text)) = nvrtc.compile(SOURCE, Target::Binary(1)) else { panic!("it compiled") };
        assert!(text.contains("--gpu-architecture"), "{text}");
    }

    #[test]
    fn no_library_is_a_reason() {
        let folder = tempfile::tempdir().expect("a folder");
        let no_library = folder.path().join("libnvrtc.so.13");
        let reason = |path: &Path| Nvrtc::load(path).err().expect("no library");
        assert!(reason(&no_library).contains("libnvrtc.so.13"));
        std::fs::write(&no_library, "no library").expect("a file");
        assert!(reason(&no_library).contains("libnvrtc.so.13"));
        // A library, but not this one.
        let reason = reason(Path::new("libm.so.6"));
        assert!(reason.contains("nvrtcVersion") && reason.contains("11.2"), "{reason}");
    }
}

//! A GPU, through its driver.
//!
//! Kernels run in the device's primary context, which is the one that libtorch's memory is in, and on the null stream,
//! which is libtorch's unless somebody tells it otherwise: so they run after all that libtorch was asked for before
//! them, and before all that it is asked for later, without waiting on the CPU. Work that a program has libtorch do on
//! another stream (tch has no function for that) is not in that order: such a program has to wait for it before a step,
//! and for the step before it goes on.
//!
//! Only what depends on a GPU is here; what is compiled, and over which tensors it runs, is decided elsewhere.
#![allow(unsafe_code)]

use super::BLOCK;
use super::cache::{Cache, Key};
use super::device::{Device, Kernel};
use super::nvrtc::{Nvrtc, Target};
use super::source::OPTIONS;
use crate::Error;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, sys};
use std::ffi::c_void;
use std::ptr::{copy_nonoverlapping, from_ref, null_mut};
use std::sync::Arc;

/// The stream of libtorch.
const STREAM: sys::CUstream = null_mut();
/// Tables that may be on their way at a time: a program that reads nothing back gets this many passes ahead of the GPU.
const TABLES: usize = 4;
/// The least memory of a table, so that it does not grow with each of the first steps.
const LEAST: usize = 1 << 16;

/// Functions of the driver that are called here, all there since CUDA 11.
const FUNCTIONS: [&str; 24] = [
    "cuInit",
    "cuGetErrorString",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoH_v2",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventDestroy_v2",
    "cuStreamSynchronize",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuModuleUnload",
    "cuLaunchKernel",
];

/// A GPU with its kernels, and the memory for tables and results.
pub(super) struct Gpu {
    context: Arc<CudaContext>,
    ordinal: usize,
    nvrtc: &'static Nvrtc,
    target: Target,
    cache: Cache,
    kernels: Vec<(sys::CUmodule, sys::CUfunction)>,
    tables: [Table; TABLES],
    /// The table that is written next.
    next: usize,
    results: Memory,
}

// SAFETY: handles of the driver belong to a context, not to a thread, and each function here binds the context first.
unsafe impl Send for Gpu {}

/// Memory of the device.
#[derive(Default)]
struct Memory {
    address: sys::CUdeviceptr,
    bytes: usize,
}

/// A table on both sides.
struct Table {
    /// Memory of the CPU that the GPU reads from. A copy from any other may block until the stream is done, and whether
    /// it needs that other afterwards, the driver does not promise.
    host: *mut c_void,
    device: Memory,
    /// The last copy is done. Null at first.
    copied: sys::CUevent,
}

impl Default for Table {
    fn default() -> Self {
        Table { host: null_mut(), device: Memory::default(), copied: null_mut() }
    }
}

/// The GPU of this number, in the order of CUDA.
///
/// # Errors
/// What is missing for kernels to run there, and what to do.
pub(super) fn open(ordinal: usize) -> Result<Gpu, String> {
    driver()?;
    result::init().map_err(|e| format!("NVIDIA's driver cannot be used: {}", words(e)))?;
    let count = result::device::get_count().map_err(words)?;
    if i32::try_from(ordinal).is_ok_and(|n| n >= count) {
        return Err(format!("there is no GPU {ordinal}: {count} are visible (see CUDA_VISIBLE_DEVICES)"));
    }
    let nvrtc = Nvrtc::get()?;
    let before = result::ctx::get_current().map_err(words)?.unwrap_or(null_mut());
    let failed = |e| format!("GPU {ordinal} cannot be used: {}", words(e));
    let context = CudaContext::new(ordinal).map_err(failed)?;
    let _bound = Bound { before, ours: context.cu_ctx() };
    let (major, minor) = context.compute_capability().map_err(failed)?;
    Ok(Gpu {
        target: nvrtc.target(10 * major + minor)?,
        context,
        ordinal,
        nvrtc,
        cache: Cache::of_user(),
        kernels: Vec::new(),
        tables: Default::default(),
        next: 0,
        results: Memory::default(),
    })
}

/// Makes sure of the driver's library and its functions: cudarc panics where one is missing.
fn driver() -> Result<(), String> {
    // SAFETY: the initializers of NVIDIA's library ask nothing of who loads it.
    if !unsafe { sys::is_culib_present() } {
        return Err("NVIDIA's driver (libcuda.so.1) is not installed; it is needed on a machine with a GPU".into());
    }
    // SAFETY: as above.
    let library = unsafe { sys::culib() };
    for name in FUNCTIONS {
        // SAFETY: the address is looked at, not called.
        unsafe { library.get::<*const c_void>(name) }
            .map_err(|_| format!("NVIDIA's driver has no function {name}; install version 450 or newer"))?;
    }
    Ok(())
}

/// The name of an error, and what the driver says about it.
fn words(e: DriverError) -> String {
    let text = e.error_string().map_or_else(|_| "no description".into(), |text| text.to_string_lossy());
    format!("{text} ({:?})", e.0)
}

/// The device's context, bound to this thread until this is dropped. Then the one before is again: libtorch takes the
/// thread's context for the device that its caller chose.
struct Bound {
    before: sys::CUcontext,
    ours: sys::CUcontext,
}

impl Drop for Bound {
    fn drop(&mut self) {
        if self.before != self.ours {
            // SAFETY: it was this thread's context, or null, which is none.
            _ = unsafe { result::ctx::set_current(self.before) };
        }
    }
}

impl Memory {
    /// Makes it this large at least. What was in it is lost.
    ///
    /// # Safety
    /// The context is bound, and nothing uses the memory any more.
    unsafe fn grow(&mut self, bytes: usize) -> Result<(), DriverError> {
        // SAFETY: as the caller promises.
        unsafe { self.free() };
        // SAFETY: the kernels write it before they read it, and the type is bytes.
        self.address = unsafe { result::malloc_sync(bytes) }?;
        self.bytes = bytes;
        Ok(())
    }

    /// # Safety
    /// As of [`Memory::grow`].
    unsafe fn free(&mut self) {
        let memory = std::mem::take(self);
        if memory.bytes > 0 {
            // SAFETY: it came from `malloc_sync`, and only once; as the caller promises.
            _ = unsafe { result::free_sync(memory.address) };
        }
    }
}

impl Table {
    /// As [`Memory::grow`], on both sides.
    ///
    /// # Safety
    /// As of [`Memory::grow`].
    unsafe fn grow(&mut self, bytes: usize) -> Result<(), DriverError> {
        // SAFETY: as the caller promises.
        unsafe { self.free() };
        if self.copied.is_null() {
            self.copied = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        }
        // SAFETY: it is written before the GPU reads it.
        self.host = unsafe { result::malloc_host(bytes, 0) }?;
        // SAFETY: as the caller promises.
        unsafe { self.device.grow(bytes) }
    }

    /// # Safety
    /// As of [`Memory::grow`].
    unsafe fn free(&mut self) {
        let host = std::mem::replace(&mut self.host, null_mut());
        if !host.is_null() {
            // SAFETY: it came from `malloc_host`, and only once; as the caller promises.
            _ = unsafe { result::free_host(host) };
        }
        // SAFETY: as the caller promises.
        unsafe { self.device.free() };
    }
}

impl Gpu {
    fn bind(&self) -> crate::Result<Bound> {
        let ours = self.context.cu_ctx();
        let bind = || {
            let before = result::ctx::get_current()?.unwrap_or(null_mut());
            if before != ours {
                // SAFETY: `self` keeps the context.
                unsafe { result::ctx::set_current(ours) }?;
            }
            Ok(Bound { before, ours })
        };
        bind().map_err(|e| self.failed("cannot be used", e))
    }

    fn failed(&self, what: &str, e: DriverError) -> Error {
        Error::Device(format!("GPU {} {what}: {}", self.ordinal, words(e)))
    }

    fn no_memory(&self, bytes: usize, e: DriverError) -> Error {
        if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let ordinal = self.ordinal;
            return Error::Device(format!(
                "GPU {ordinal} has no memory left: a step wanted {bytes} bytes for its tables (take smaller batches, or \
                 another GPU; libtorch keeps to itself what tensors had before)"
            ));
        }
        self.failed(&format!("cannot give {bytes} bytes for the tables of a step"), e)
    }

    /// Waits for all that was launched.
    fn wait(&self) -> crate::Result<()> {
        // SAFETY: the null stream is that of the bound context.
        unsafe { result::stream::synchronize(STREAM) }.map_err(|e| self.failed("could not finish a kernel", e))
    }

    /// The kernel of an image, which is as the compiler made it. The context is bound.
    fn load(&self, image: &[u8]) -> crate::Result<(sys::CUmodule, sys::CUfunction)> {
        let failed = |e| self.failed("cannot load a kernel (is its driver as new as the CUDA of libtorch?)", e);
        // SAFETY: an image of NVRTC says itself where it ends, or ends with a zero; the driver copies it.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(failed)?;
        // SAFETY: the module was loaded just now.
        let function = unsafe { result::module::get_function(module, c"pass".to_owned()) };
        if function.is_err() {
            // SAFETY: nothing uses it.
            _ = unsafe { result::module::unload(module) };
        }
        Ok((module, function.map_err(failed)?))
    }
}

impl Device for Gpu {
    fn compile(&mut self, source: &str) -> crate::Result<Kernel> {
        let _bound = self.bind()?;
        let (options, target, version) = (OPTIONS.join(" "), self.target.option(), self.nvrtc.version());
        let key = Key::new(&[env!("CARGO_PKG_VERSION"), &version, &options, &target, source]);
        // A kept image that this driver does not take is compiled again, as one that is not there.
        let kept = self.cache.get(&key).and_then(|image| self.load(&image).ok());
        let kernel = if let Some(kernel) = kept {
            kernel
        } else {
            let image = self.nvrtc.compile(source, self.target)?;
            let kernel = self.load(&image)?;
            self.cache.put(&key, &image);
            kernel
        };
        self.kernels.push(kernel);
        Ok(Kernel(self.kernels.len() - 1))
    }

    fn upload(&mut self, bytes: &[u8]) -> crate::Result<u64> {
        let _bound = self.bind()?;
        self.next = (self.next + 1) % TABLES;
        let next = self.next;
        if self.tables[next].device.bytes < bytes.len().max(1) {
            let wanted = bytes.len().next_power_of_two().max(LEAST);
            self.wait()?;
            // SAFETY: the context is bound, and all that was launched is done.
            unsafe { self.tables[next].grow(wanted) }.map_err(|e| self.no_memory(wanted, e))?;
        }
        let table = &self.tables[next];
        if bytes.is_empty() {
            return Ok(table.device.address);
        }
        let copy = || {
            // SAFETY: the event was created as the table grew; one that was never recorded counts as done.
            unsafe { result::event::synchronize(table.copied) }?;
            // SAFETY: the table is as large at least; the last copy from it is done, so that only we have it.
            unsafe { copy_nonoverlapping(bytes.as_ptr(), table.host.cast(), bytes.len()) };
            // SAFETY: `host` holds as many bytes, which stay until the event says that they are copied.
            unsafe {
                let host = std::slice::from_raw_parts(table.host.cast::<u8>().cast_const(), bytes.len());
                result::memcpy_htod_async(table.device.address, host, STREAM)?;
                result::event::record(table.copied, STREAM)
            }
        };
        copy().map_err(|e| self.failed("could not be given the tables of a step", e))?;
        Ok(table.device.address)
    }

    fn results(&mut self, bytes: usize) -> crate::Result<u64> {
        if self.results.bytes < bytes.max(1) {
            let _bound = self.bind()?;
            let wanted = bytes.next_power_of_two().max(LEAST);
            self.wait()?;
            // SAFETY: the context is bound, and all that was launched is done.
            unsafe { self.results.grow(wanted) }.map_err(|e| self.no_memory(wanted, e))?;
        }
        Ok(self.results.address)
    }

    fn launch(&mut self, kernel: Kernel, blocks: u32, arguments: &[u64]) -> crate::Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let _bound = self.bind()?;
        let (_, function) = self.kernels[kernel.0];
        let mut pointers: Vec<*mut c_void> = arguments.iter().map(|a| from_ref(a).cast_mut().cast()).collect();
        let (grid, block) = ((blocks, 1, 1), (BLOCK, 1, 1));
        // SAFETY: the kernel takes these arguments, numbers of 64 bits, which the driver has copied as it returns. What
        // they point at is memory of tensors, tables and results that stays until the kernel has run: whoever frees it
        // does so in the order of the stream, as libtorch, or waits.
        unsafe { result::launch_kernel(function, grid, block, 0, STREAM, &mut pointers) }
            .map_err(|e| self.failed("cannot start a kernel", e))
    }

    fn download(&mut self, address: u64, to: &mut [u8]) -> crate::Result<()> {
        let _bound = self.bind()?;
        if to.is_empty() {
            return self.wait();
        }
        // It waits for the null stream, then for the copy.
        // SAFETY: the caller has the address from `results`, with as many bytes behind it.
        unsafe { result::memcpy_dtoh_sync(to, address) }.map_err(|e| self.failed("could not finish a kernel", e))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Without a context, as in a process that ends, there is nothing to free.
        let Ok(_bound) = self.bind() else { return };
        _ = self.wait();
        // SAFETY: the context is bound, and all that was launched is done.
        unsafe {
            self.tables.iter_mut().for_each(|table| table.free());
            self.results.free();
        }
        for table in self.tables.iter().filter(|table| !table.copied.is_null()) {
            // SAFETY: it was created, and nothing waits for it.
            _ = unsafe { result::event::destroy(table.copied) };
        }
        for (module, _) in self.kernels.drain(..) {
            // SAFETY: it was loaded, and none of its kernels runs.
            _ = unsafe { result::module::unload(module) };
        }
    }
}

#[cfg(test)]
mod tests;

//! What a fused pass asks of a device. There are two: a GPU through its driver, and the CPU that the same source was
//! compiled for, which is how it is tested where there is no GPU.

use crate::Result;

/// A compiled kernel, by its number on its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kernel(pub usize);

/// A device that runs kernels one after the other, in the order of their launches and of the work that libtorch gives it.
pub(super) trait Device: Send {
    /// Compiles the kernel of a source, which has one, named `pass`.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) with what the compiler said, and the line that it said it of.
    fn compile(&mut self, source: &str) -> Result<Kernel>;
    /// Copies tables to the device, in memory that stays as it is for all launches up to the next upload.
    ///
    /// # Errors
    /// The device has no memory left.
    fn upload(&mut self, bytes: &[u8]) -> Result<u64>;
    /// Memory for results, until the next call.
    ///
    /// # Errors
    /// The device has no memory left.
    fn results(&mut self, bytes: usize) -> Result<u64>;
    /// Starts a kernel over this many blocks of [`BLOCK`](super::BLOCK) threads, with addresses for arguments; does not
    /// wait for it.
    ///
    /// # Errors
    /// The device cannot take it.
    fn launch(&mut self, kernel: Kernel, blocks: u32, arguments: &[u64]) -> Result<()>;
    /// Waits for all that was launched, and copies memory of the device.
    ///
    /// # Errors
    /// A kernel has failed.
    fn download(&mut self, address: u64, to: &mut [u8]) -> Result<()>;
}

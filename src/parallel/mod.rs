//! Ranks that train one model together: what the driver asks of whatever connects them, and two such things that need
//! no library. MPI is in the crate `tch-blr-mpi`, so that nothing here needs one.
//!
//! What a step does with it is in the driver.

mod threads;

pub use threads::Threads;

use crate::Result;
use std::fmt::Debug;

/// Ranks that train one model together, numbered 0 to size - 1: the processes of an MPI job, or threads of one process
/// ([`Threads`]). Handed to [`Builder::parallel`](crate::Builder::parallel).
///
/// All ranks call the same methods in the same order, and those who arrive wait for the others. The driver sees to that,
/// and calls [`Collective::sum_f64`] with a buffer of a fixed length before every other call, so that ranks which do not
/// agree find out instead of waiting for each other. After an error the group is broken: an implementation returns errors
/// from then on, to all ranks, and does not wait for ever ([`Error::Collective`](crate::Error::Collective)). A rank that
/// drops its handle has left, and calls of the others are errors then. One optimizer has one handle; where handles are
/// clones of one group (MPI), optimizers take turns in the same order on all ranks.
pub trait Collective: Debug + Send {
    /// The number of this rank, from 0.
    fn rank(&self) -> usize;

    /// How many there are, at least 1.
    fn size(&self) -> usize;

    /// x ← Σ over all ranks, element by element. Every rank has the same bits then: a sum of floating-point numbers
    /// depends on its order, so that it must be the same one on all ranks. Lengths agree, and may be 0.
    ///
    /// # Errors
    /// [`Error::Collective`](crate::Error::Collective): another rank has left or does not come.
    fn sum_f32(&self, x: &mut [f32]) -> Result<()>;

    /// As [`Collective::sum_f32`], of f64.
    ///
    /// # Errors
    /// As [`Collective::sum_f32`].
    fn sum_f64(&self, x: &mut [f64]) -> Result<()>;

    /// Copies the bytes of rank `root` to all.
    ///
    /// # Errors
    /// As [`Collective::sum_f32`].
    fn broadcast(&self, root: usize, x: &mut [u8]) -> Result<()>;

    /// Waits until all ranks have come here.
    ///
    /// # Errors
    /// As [`Collective::sum_f32`].
    fn barrier(&self) -> Result<()>;
}

/// One whose kind was chosen at run time.
impl Collective for Box<dyn Collective> {
    fn rank(&self) -> usize {
        (**self).rank()
    }
    fn size(&self) -> usize {
        (**self).size()
    }
    fn sum_f32(&self, x: &mut [f32]) -> Result<()> {
        (**self).sum_f32(x)
    }
    fn sum_f64(&self, x: &mut [f64]) -> Result<()> {
        (**self).sum_f64(x)
    }
    fn broadcast(&self, root: usize, x: &mut [u8]) -> Result<()> {
        (**self).broadcast(root, x)
    }
    fn barrier(&self) -> Result<()> {
        (**self).barrier()
    }
}

/// The bytes of every rank, on every rank, in the order of the ranks. All ranks call it; lengths may differ, and be 0.
///
/// ```
/// use tch_blr::parallel::{Collective, Threads, gather};
///
/// # fn main() -> tch_blr::Result<()> {
/// let names = ["north", "so"];
/// for all in Threads::run(2, |collective| gather(&collective, names[collective.rank()].as_bytes()))? {
///     assert_eq!(all?, names.map(|name| name.as_bytes().to_vec()));
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`Collective::sum_f32`].
pub fn gather(collective: &dyn Collective, own: &[u8]) -> Result<Vec<Vec<u8>>> {
    // A buffer of the same length everywhere comes first, so that ranks which do not agree find out.
    let mut lengths = vec![0.0; collective.size()];
    lengths[collective.rank()] = own.len() as f64;
    collective.sum_f64(&mut lengths)?;
    let from = |(root, length): (usize, f64)| {
        let mut bytes = if root == collective.rank() { own.to_vec() } else { vec![0; length as usize] };
        collective.broadcast(root, &mut bytes)?;
        Ok(bytes)
    };
    lengths.into_iter().enumerate().map(from).collect()
}

/// The only rank. An optimizer that is built with it is one that was built without.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn sum_f32(&self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
    fn sum_f64(&self, _: &mut [f64]) -> Result<()> {
        Ok(())
    }
    fn broadcast(&self, _: usize, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}

//! From the calls of the trait to those of MPI's C interface.
#![allow(unsafe_code)] // calls of C

use mpi_sys::{self as ffi, MPI_Comm, MPI_Datatype, MPI_Op};
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch_blr::parallel::Collective;
use tch_blr::{Error, Result};

/// The processes of an MPI job, as ranks that train one model together.
///
/// ```no_run
/// use tch::{Device, Kind, Tensor, nn, nn::Module};
/// use tch_blr::{Ivon, parallel::Collective};
/// use tch_blr_mpi::Mpi;
///
/// # fn main() -> tch_blr::Result<()> {
/// let mpi = Mpi::new()?;
/// let vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root(), 4, 3, Default::default());
/// let mut opt = Ivon::default().ess(1e3).builder().parallel(mpi.clone()).build(&vs, 0.1)?;
/// // Each process has examples of its own, and all of them one model.
/// let x = Tensor::rand([8, 4], (Kind::Float, Device::Cpu)) + mpi.rank() as f64;
/// let y = Tensor::zeros([8], (Kind::Int64, Device::Cpu));
/// let loss = opt.step(|| net.forward(&x).cross_entropy_for_logits(&y))?;
/// # Ok(())
/// # }
/// ```
///
/// MPI is started once in the life of a process and ends with the last clone, so that one is kept until the end. A
/// clone is the same group: optimizers that have one each step in the same order on all ranks.
///
/// # Sums
/// By `MPI_Allreduce`. Every rank has the same bits afterwards, which the MPI standard requires; the payload of a NaN
/// aside. The order of the terms is the MPI library's: it depends on the number of ranks and on the length. So the last
/// digits differ from those of [`Threads`](tch_blr::parallel::Threads), and may from those of another MPI.
///
/// # Ends
/// A call of one rank that does not go with the calls of the others, or with their lengths, is an error on all of them.
/// So is a call while another rank has dropped its last clone: it has returned an error from `main`, say. A rank whose
/// last clone is dropped by a panic ends the whole job (`MPI_Abort`, exit code 101), as does one to which MPI has
/// reported an error that the others may not have seen (exit code 1). A rank that is killed ends it too: `mpirun` sees
/// to that. MPI knows no time limit: a rank that never returns from its own work keeps the others waiting.
///
/// # Threads
/// It may be used in any thread, by one at a time (`MPI_THREAD_SERIALIZED`). The thread that drops the last clone
/// should be the one that made the first, since some MPI libraries insist on it.
#[derive(Debug, Clone)]
pub struct Mpi {
    rank: usize,
    size: usize,
    world: Arc<Mutex<World>>,
}

/// What MPI was started for; dropped with the last clone.
#[derive(Debug)]
struct World {
    rank: usize,
    size: usize,
    /// Ours alone, so that nothing else that the program does with MPI meets our calls, or our error handler.
    comm: MPI_Comm,
    /// Why there will be no other call.
    broken: Option<Broken>,
}

// SAFETY: a communicator is a number or an address that means the same in every thread, and the level that was asked
// for allows calls from any, one at a time.
unsafe impl Send for World {}

#[derive(Debug, Clone)]
enum Broken {
    /// Known to every rank.
    Everywhere(String),
    /// Reported by MPI to this rank, while others may wait for it.
    Here(String),
}

/// What a rank has come for: all ranks for the same, or there is no call.
#[derive(Clone, Copy)]
enum Call {
    Leave,
    Barrier,
    SumF32(usize),
    SumF64(usize),
    Broadcast { root: usize, bytes: usize },
}

impl Call {
    /// Which, and of how many numbers.
    fn key(self) -> (i64, i64) {
        match self {
            Call::Leave => (0, 0),
            Call::Barrier => (1, 0),
            Call::SumF32(n) => (2, n as i64),
            Call::SumF64(n) => (3, n as i64),
            Call::Broadcast { root, bytes } => (4 + root as i64, bytes as i64),
        }
    }

    fn name(key: i64) -> String {
        match key {
            0 => "the end".to_owned(),
            1 => "a barrier".to_owned(),
            2 => "a sum of f32".to_owned(),
            3 => "a sum of f64".to_owned(),
            root => format!("a broadcast of rank {}", root - 4),
        }
    }
}

/// Numbers of one call of MPI: within its `int` by far, little memory beside the buffer, and they stay in the cache of
/// a core (all at once takes twice as long between processes of one machine).
const PIECE: usize = 1 << 18;

impl Mpi {
    /// Starts MPI.
    ///
    /// A process that no `mpirun` has started, or the `mpirun` of another MPI library, is rank 0 of 1.
    ///
    /// # Errors
    /// [`Error::Collective`]: MPI has been started in this process before, here (keep a clone) or otherwise,
    /// or it does not allow calls from more than one thread.
    pub fn new() -> Result<Self> {
        start()?;
        let (mut rank, mut size) = (0, 0);
        // SAFETY: a constant of MPI.
        let mut comm = unsafe { ffi::RSMPI_COMM_NULL };
        // SAFETY: MPI is started; results are written to variables of the right type.
        unsafe {
            succeed("MPI_Comm_dup", ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, &raw mut comm))?;
            succeed("MPI_Comm_set_errhandler", ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN))?;
            succeed("MPI_Comm_rank", ffi::MPI_Comm_rank(comm, &raw mut rank))?;
            succeed("MPI_Comm_size", ffi::MPI_Comm_size(comm, &raw mut size))?;
        }
        let (rank, size) = (rank as usize, size as usize);
        let world = World { rank, size, comm, broken: None };
        Ok(Mpi { rank, size, world: Arc::new(Mutex::new(world)) })
    }

    fn world(&self) -> MutexGuard<'_, World> {
        // What a panic has left is whole: it cannot come from within a call of MPI.
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `MPI_Init_thread`.
fn start() -> Result<()> {
    static STARTING: Mutex<()> = Mutex::new(());
    let _one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut started, mut level) = (0, 0);
    // SAFETY: may be called at any time, even after the end of MPI.
    unsafe { ffi::MPI_Initialized(&raw mut started) };
    if started != 0 {
        let problem = "MPI has been started before, which it can be once in a process: keep a clone of the first `Mpi`";
        return Err(Error::Collective(problem.to_owned()));
    }
    // SAFETY: MPI is not started, and no other thread does so; it accepts null for the arguments of `main`.
    let (code, wanted) = unsafe {
        let wanted = ffi::RSMPI_THREAD_SERIALIZED;
        (ffi::MPI_Init_thread(null_mut(), null_mut(), wanted, &raw mut level), wanted)
    };
    succeed("MPI_Init_thread", code)?;
    if level < wanted {
        // SAFETY: MPI is started; nothing else uses it yet.
        unsafe { ffi::MPI_Finalize() };
        let problem = format!("this MPI library gives threads level {level}, and {wanted} (serialized) is needed");
        return Err(Error::Collective(problem));
    }
    Ok(())
}

impl World {
    /// Waits for all ranks, and makes sure that they have come for the same: MPI itself would mix up what does not
    /// belong together, or wait for ever.
    fn meet(&mut self, call: Call) -> Result<()> {
        if let Some(Broken::Everywhere(problem) | Broken::Here(problem)) = &self.broken {
            return Err(Error::Collective(problem.clone()));
        }
        let (key, n) = call.key();
        let leaves = if key == 0 { self.size - self.rank } else { 0 };
        // The largest of each, and of their negatives: the smallest.
        let mut most = [key, -key, n, -n, leaves as i64];
        // SAFETY: a constant of MPI.
        self.reduce(&mut most, unsafe { ffi::RSMPI_MAX })?;
        let (keys, lengths) = ((-most[1], most[0]), (-most[3], most[2]));
        let problem = if keys.0 == 0 && keys.1 > 0 {
            format!("rank {} has left while others go on", self.size - most[4] as usize)
        } else if keys.0 != keys.1 {
            format!("one has come for {}, and another for {}", Call::name(keys.0), Call::name(keys.1))
        } else if lengths.0 != lengths.1 {
            format!("one brings {} numbers to {}, and another brings {}", lengths.0, Call::name(key), lengths.1)
        } else {
            return Ok(());
        };
        self.broken = Some(Broken::Everywhere(problem.clone()));
        Err(Error::Collective(problem))
    }

    /// Every rank has come for this.
    fn reduce<F: Number>(&mut self, x: &mut [F], op: MPI_Op) -> Result<()> {
        // rsmpi does not have MPI_IN_PLACE.
        let mut own = Vec::with_capacity(x.len().min(PIECE));
        for piece in x.chunks_mut(PIECE) {
            own.clear();
            own.extend_from_slice(piece);
            let (from, to) = (own.as_ptr().cast::<c_void>(), piece.as_mut_ptr().cast::<c_void>());
            let (n, datatype) = (piece.len() as c_int, F::datatype());
            // SAFETY: both buffers have n numbers of this type, at most PIECE, and do not overlap.
            let code = unsafe { ffi::MPI_Allreduce(from, to, n, datatype, op, self.comm) };
            self.record(succeed("MPI_Allreduce", code))?;
        }
        Ok(())
    }

    fn broadcast(&mut self, root: usize, x: &mut [u8]) -> Result<()> {
        for piece in x.chunks_mut(PIECE) {
            let (at, n) = (piece.as_mut_ptr().cast::<c_void>(), piece.len() as c_int);
            // SAFETY: the buffer has n bytes, at most PIECE; all ranks have agreed on root, which is one.
            let code = unsafe { ffi::MPI_Bcast(at, n, ffi::RSMPI_UINT8_T, root as c_int, self.comm) };
            self.record(succeed("MPI_Bcast", code))?;
        }
        Ok(())
    }

    /// Others may wait for a rank that has an error.
    fn record(&mut self, result: Result<()>) -> Result<()> {
        if let Err(Error::Collective(problem)) = &result {
            self.broken = Some(Broken::Here(problem.clone()));
        }
        result
    }

    fn abort(&self, why: &str, code: c_int) {
        // In one write: other ranks write to the same place.
        let line = format!("rank {} of {} {why}: the job ends\n", self.rank, self.size);
        eprint!("{line}");
        // SAFETY: MPI is started and has not ended.
        unsafe { ffi::MPI_Abort(self.comm, code) };
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort("has panicked", 101);
        }
        // Tells those who go on, and otherwise waits until all are here: MPI would wait for ever.
        let _ = self.meet(Call::Leave);
        if let Some(Broken::Here(problem)) = &self.broken {
            self.abort(problem, 1);
        }
        // SAFETY: this is the end of all that used MPI here; all ranks get here.
        unsafe { ffi::MPI_Finalize() };
    }
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sum_f32(&self, x: &mut [f32]) -> Result<()> {
        let mut world = self.world();
        world.meet(Call::SumF32(x.len()))?;
        // SAFETY: a constant of MPI.
        world.reduce(x, unsafe { ffi::RSMPI_SUM })
    }

    fn sum_f64(&self, x: &mut [f64]) -> Result<()> {
        let mut world = self.world();
        world.meet(Call::SumF64(x.len()))?;
        // SAFETY: a constant of MPI.
        world.reduce(x, unsafe { ffi::RSMPI_SUM })
    }

    fn broadcast(&self, root: usize, x: &mut [u8]) -> Result<()> {
        if root >= self.size {
            return Err(Error::HyperParameter { name: "root", value: root.to_string(), expected: "a rank" });
        }
        let mut world = self.world();
        world.meet(Call::Broadcast { root, bytes: x.len() })?;
        world.broadcast(root, x)
    }

    fn barrier(&self) -> Result<()> {
        self.world().meet(Call::Barrier)
    }
}

/// What MPI adds up.
trait Number: Copy {
    fn datatype() -> MPI_Datatype;
}

macro_rules! number {
    ($type:ty, $datatype:ident) => {
        impl Number for $type {
            fn datatype() -> MPI_Datatype {
                // SAFETY: a constant of MPI.
                unsafe { ffi::$datatype }
            }
        }
    };
}

number!(f32, RSMPI_FLOAT);
number!(f64, RSMPI_DOUBLE);
number!(i64, RSMPI_INT64_T);

/// Error codes of MPI, in its own words.
fn succeed(call: &str, code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let mut text = [0_u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut n = 0;
    // SAFETY: the buffer is as long as MPI asks for.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &raw mut n) };
    let text = String::from_utf8_lossy(&text[..(n.max(0) as usize).min(text.len())]);
    Err(Error::Collective(format!("{call}: {text}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process of its own, without `mpirun`.
    #[test]
    fn errors_are_in_the_words_of_mpi() {
        let mpi = Mpi::new().unwrap();
        assert_eq!((mpi.rank(), mpi.size()), (0, 1));
        // SAFETY: a constant of MPI; it has no logical operations on f32.
        let and = unsafe { ffi::RSMPI_LAND };
        let e = mpi.world().reduce(&mut [1.0_f32], and).unwrap_err().to_string();
        assert!(e.starts_with("ranks: MPI_Allreduce: ") && e.contains("MPI_ERR_OP"), "{e}");
        assert_eq!(mpi.barrier().unwrap_err().to_string(), e);
        // Others might wait: this process ends the job when it drops the last clone, so that it does not here.
        std::mem::forget(mpi);
    }
}

//! Ranks that are threads of one process: for tests, and for one process with a thread per CPU socket.

use super::Collective;
use crate::{Error, Result, check};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// One of several threads that train one model together, each with a copy of its own. Sums are taken in the order of
/// the ranks.
///
/// ```
/// use tch::{Device, Kind, Tensor, nn, nn::Module};
/// use tch_blr::{Sgd, parallel::Threads};
///
/// # fn main() -> tch_blr::Result<()> {
/// let losses = Threads::run(2, |collective| {
///     let vs = nn::VarStore::new(Device::Cpu);
///     let net = nn::linear(vs.root(), 4, 3, Default::default());
///     let x = Tensor::ones([8, 4], (Kind::Float, Device::Cpu));
///     let y = Tensor::zeros([8], (Kind::Int64, Device::Cpu));
///     // All ranks go on from the weights of rank 0, and each gives the loss of its own part of the batch.
///     let mut opt = Sgd::default().builder().parallel(collective).build(&vs, 0.1)?;
///     opt.step(|| net.forward(&x).cross_entropy_for_logits(&y))
/// })?;
/// assert_eq!(losses[0].as_ref().unwrap(), losses[1].as_ref().unwrap());
/// # Ok(())
/// # }
/// ```
///
/// A thread that ends or panics while others wait for it is an error for these at once, and one that does not come for
/// ten minutes ([`Threads::with_timeout`]) as well.
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    group: Arc<Group>,
}

/// How long a thread waits for the others: longer than rank 0 takes to look at test data, say.
const TIMEOUT: Duration = Duration::from_secs(600);

#[derive(Debug)]
struct Group {
    timeout: Duration,
    meeting: Mutex<Meeting>,
    turn: Condvar,
    singles: Table<f32>,
    doubles: Table<f64>,
    bytes: RwLock<Vec<u8>>,
}

/// Who has come to the meeting that is taking place.
#[derive(Debug)]
struct Meeting {
    number: u64,
    /// What for, and with how many numbers.
    came: Vec<Option<(&'static str, usize)>>,
    left: Vec<bool>,
    /// Why there will be no other.
    broken: Option<String>,
}

/// What each rank brings to a sum, and the part of the sum that it takes.
#[derive(Debug)]
struct Table<F> {
    given: Vec<RwLock<Vec<F>>>,
    sums: Vec<RwLock<Vec<F>>>,
}

impl<F> Table<F> {
    fn new(size: usize) -> Self {
        let all = || (0..size).map(|_| RwLock::default()).collect();
        Table { given: all(), sums: all() }
    }
}

impl Threads {
    /// The handles of `size` ≥ 1 threads, in the order of their ranks.
    ///
    /// # Errors
    /// A size of 0.
    pub fn group(size: usize) -> Result<Vec<Self>> {
        Self::with_timeout(size, TIMEOUT)
    }

    /// As [`Threads::group`], of threads that wait for each other no longer than this.
    ///
    /// # Errors
    /// A size of 0.
    pub fn with_timeout(size: usize, timeout: Duration) -> Result<Vec<Self>> {
        check::count("size", size)?;
        let meeting = Meeting { number: 0, came: vec![None; size], left: vec![false; size], broken: None };
        let group = Arc::new(Group {
            timeout,
            meeting: Mutex::new(meeting),
            turn: Condvar::new(),
            singles: Table::new(size),
            doubles: Table::new(size),
            bytes: RwLock::default(),
        });
        Ok((0..size).map(|rank| Threads { rank, group: Arc::clone(&group) }).collect())
    }

    /// Runs `train` in `size` ≥ 1 threads, each with its handle, and gives what they return, in the order of their
    /// ranks.
    ///
    /// # Errors
    /// A size of 0.
    ///
    /// # Panics
    /// If a thread does, with its message, when all have ended.
    pub fn run<T: Send>(size: usize, train: impl Fn(Self) -> T + Sync) -> Result<Vec<T>> {
        let group = Self::group(size)?;
        let train = &train;
        Ok(std::thread::scope(|scope| {
            let threads: Vec<_> = group.into_iter().map(|rank| scope.spawn(move || train(rank))).collect();
            let ended: Vec<_> = threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            ended.into_iter().map(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        }))
    }

    fn meeting(&self) -> MutexGuard<'_, Meeting> {
        // A thread that panicked has left, which the others are told; what it held is whole.
        self.group.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all ranks are here, for the same.
    fn meet(&self, call: (&'static str, usize)) -> Result<()> {
        let deadline = Instant::now() + self.group.timeout;
        let mut meeting = self.meeting();
        let number = meeting.number;
        meeting.came[self.rank] = Some(call);
        let other = meeting.came.iter().position(|came| came.is_some_and(|came| came != call));
        if let (None, Some(other)) = (&meeting.broken, other) {
            // In the order of the ranks, whoever comes last.
            let (low, high) = (self.rank.min(other), self.rank.max(other));
            let of =
                |rank: usize| meeting.came[rank].map_or(String::new(), |(what, n)| format!("{what} ({n} numbers)"));
            let problem = format!("rank {high} has come for {}, and rank {low} for {}", of(high), of(low));
            self.end(&mut meeting, problem);
        }
        if meeting.broken.is_none() && meeting.came.iter().all(Option::is_some) {
            meeting.number += 1;
            meeting.came.fill(None);
            self.group.turn.notify_all();
            return Ok(());
        }
        loop {
            if meeting.number > number {
                return Ok(());
            }
            let late = meeting.missing(|_, came| !came);
            if meeting.broken.is_none() && meeting.left.iter().any(|left| *left) {
                let left = meeting.missing(|left, _| left);
                self.end(&mut meeting, format!("{left} has left while others go on"));
            }
            if let Some(problem) = &meeting.broken {
                return Err(Error::Collective(problem.clone()));
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                let seconds = self.group.timeout.as_secs_f64();
                self.end(&mut meeting, format!("{late} has not come within {seconds} s"));
                continue;
            }
            meeting = self.group.turn.wait_timeout(meeting, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// There will be no other meeting.
    fn end(&self, meeting: &mut Meeting, problem: String) {
        meeting.broken = Some(problem);
        self.group.turn.notify_all();
    }

    fn sum<F>(&self, what: &'static str, table: &Table<F>, x: &mut [F]) -> Result<()>
    where
        F: Copy + std::ops::AddAssign,
    {
        let size = self.size();
        *write(&table.given[self.rank]) = x.to_vec();
        self.meet((what, x.len()))?;
        {
            // Each rank adds up its part.
            let given: Vec<_> = table.given.iter().map(read).collect();
            let part = part(x.len(), self.rank, size);
            let mut sum = given[0][part.clone()].to_vec();
            for theirs in &given[1..] {
                sum.iter_mut().zip(&theirs[part.clone()]).for_each(|(sum, x)| *sum += *x);
            }
            *write(&table.sums[self.rank]) = sum;
        }
        self.meet((what, x.len()))?;
        for (rank, sum) in table.sums.iter().enumerate() {
            let part = part(x.len(), rank, size);
            x[part].copy_from_slice(&read(sum));
        }
        Ok(())
    }
}

impl Meeting {
    /// "rank 2" or "rank 2, 5": those that pass.
    fn missing(&self, passes: impl Fn(bool, bool) -> bool) -> String {
        let ranks = self.left.iter().zip(&self.came).enumerate();
        let ranks = ranks.filter(|(_, (left, came))| passes(**left, came.is_some()));
        let ranks: Vec<String> = ranks.map(|(rank, _)| rank.to_string()).collect();
        format!("rank {}", ranks.join(", "))
    }
}

/// Where the part of a rank lies in a buffer of n elements.
fn part(n: usize, rank: usize, size: usize) -> Range<usize> {
    let each = n.div_ceil(size);
    (rank * each).min(n)..((rank + 1) * each).min(n)
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.meeting().left[self.rank] = true;
        self.group.turn.notify_all();
    }
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.singles.given.len()
    }

    fn sum_f32(&self, x: &mut [f32]) -> Result<()> {
        self.sum("a sum of f32", &self.group.singles, x)
    }

    fn sum_f64(&self, x: &mut [f64]) -> Result<()> {
        self.sum("a sum of f64", &self.group.doubles, x)
    }

    fn broadcast(&self, root: usize, x: &mut [u8]) -> Result<()> {
        check::that("root", root, root < self.size(), "a rank")?;
        if self.rank == root {
            *write(&self.group.bytes) = x.to_vec();
        }
        self.meet(("a broadcast", x.len()))?;
        x.copy_from_slice(&read(&self.group.bytes));
        // Nobody writes the next ones before all have read these.
        self.meet(("a broadcast", x.len()))
    }

    fn barrier(&self) -> Result<()> {
        self.meet(("a barrier", 0))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Alone, gather};
    use super::*;

    fn each<T: Send>(size: usize, work: impl Fn(&Threads) -> T + Sync) -> Vec<T> {
        Threads::run(size, |rank| work(&rank)).unwrap()
    }

    #[test]
    fn sums_in_the_order_of_the_ranks() {
        // 10⁸ + 1 + 1 … in f32: the ones are lost after the large number and not before it.
        let of = |rank: usize| if rank == 1 { 1e8_f32 } else { 3.0 };
        for size in 1..=5 {
            for n in [0, 1, 2, 3, 7, 64, 1001] {
                let found = each(size, |t| {
                    let mut x: Vec<f32> = (0..n).map(|i| of(t.rank()) + i as f32).collect();
                    let mut y: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                    t.sum_f32(&mut x).unwrap();
                    t.sum_f64(&mut y).unwrap();
                    (x, y)
                });
                for (x, y) in &found {
                    for i in 0..n {
                        let term = |rank: usize| of(rank) + i as f32;
                        assert_eq!(x[i], (1..size).fold(term(0), |sum, rank| sum + term(rank)));
                        assert_eq!(y[i], (0..size).map(|rank| f64::from(term(rank))).sum::<f64>());
                    }
                }
            }
        }
    }

    #[test]
    fn broadcasts_from_every_rank() {
        let found = each(3, |t| {
            let mut all = Vec::new();
            for root in 0..3 {
                let mut x = [t.rank() as u8; 5];
                t.broadcast(root, &mut x).unwrap();
                all.push(x);
                t.barrier().unwrap();
            }
            (all, t.broadcast(3, &mut [0; 5]).unwrap_err().to_string())
        });
        for (all, e) in found {
            assert_eq!(all, [[0; 5], [1; 5], [2; 5]]);
            assert!(e.contains("root") && e.contains('3'), "{e}");
        }
    }

    #[test]
    fn gathers_what_differs_in_length() {
        // Rank 0 has nothing, the others one byte more than the one before; then all have nothing.
        let of = |rank: usize| (0..rank).map(|i| (10 * rank + i) as u8).collect::<Vec<u8>>();
        for size in 1..=3 {
            let expected: Vec<_> = (0..size).map(of).collect();
            let nothing = vec![Vec::<u8>::new(); size];
            for found in each(size, |t| [gather(t, &of(t.rank())).unwrap(), gather(t, &[]).unwrap()]) {
                assert_eq!(found, [expected.clone(), nothing.clone()]);
            }
        }
        assert_eq!(gather(&Alone, b"own").unwrap(), [b"own"]);
        let errors = each(2, |t| if t.rank() == 0 { gather(t, b"x").map(drop) } else { t.barrier() }.unwrap_err());
        assert_eq!(errors[0].to_string(), errors[1].to_string());
    }

    #[test]
    fn those_who_leave_do_not_keep_the_others_waiting() {
        let begin = Instant::now();
        let found = each(3, |t| {
            t.barrier().unwrap();
            if t.rank() == 1 {
                return Vec::new();
            }
            (0..2).map(|_| t.sum_f32(&mut [1.0]).unwrap_err().to_string()).collect()
        });
        for e in found[0].iter().chain(&found[2]) {
            assert_eq!(e, "ranks: rank 1 has left while others go on");
        }
        let mut group = Threads::with_timeout(2, Duration::from_millis(50)).unwrap();
        let (late, waiting) = (group.pop().unwrap(), group.pop().unwrap());
        for _ in 0..2 {
            assert_eq!(waiting.barrier().unwrap_err().to_string(), "ranks: rank 1 has not come within 0.05 s");
        }
        // Too late.
        assert_eq!(late.barrier().unwrap_err().to_string(), "ranks: rank 1 has not come within 0.05 s");
        assert!(begin.elapsed() < TIMEOUT / 10 && Threads::group(0).is_err());
    }

    #[test]
    fn lengths_that_differ_are_an_error_everywhere() {
        let sums = each(3, |t| t.sum_f32(&mut vec![1.0; if t.rank() == 2 { 4 } else { 5 }]).unwrap_err().to_string());
        // Beside whichever of the others is there first.
        let with = |r| {
            format!("ranks: rank 2 has come for a sum of f32 (4 numbers), and rank {r} for a sum of f32 (5 numbers)")
        };
        assert!(sums.iter().all(|e| *e == sums[0]) && [with(0), with(1)].contains(&sums[0]), "{sums:?}");
    }

    #[test]
    fn calls_that_do_not_go_together_are_an_error_everywhere() {
        for other in
            [|t: &Threads| t.sum_f64(&mut [1.0]), |t: &Threads| t.barrier(), |t: &Threads| t.broadcast(0, &mut [1])]
        {
            let found = each(2, |t| {
                // Something of the same length lies there from before.
                t.sum_f32(&mut [1.0]).unwrap();
                let first = if t.rank() == 0 { t.sum_f32(&mut [1.0]) } else { other(t) };
                (first.unwrap_err().to_string(), t.barrier().unwrap_err().to_string())
            });
            assert!(found[0].0.starts_with("ranks: rank 1 has come for a "), "{found:?}");
            assert!(found.iter().all(|(first, next)| *first == found[0].0 && next == first), "{found:?}");
        }
    }

    #[test]
    fn a_panic_is_handed_on() {
        let panic = std::panic::catch_unwind(|| {
            each(2, |t| {
                assert!(t.rank() == 0, "of rank 1");
                t.barrier().unwrap_err()
            })
        });
        assert_eq!(panic.unwrap_err().downcast_ref::<&str>(), Some(&"of rank 1"));
    }
}

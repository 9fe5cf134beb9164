//! Work shared between threads.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Weights below which another thread costs more than it brings.
const PER_THREAD: usize = 1 << 17;

/// Positions per piece, which a thread takes at a time.
pub(super) const PIECE: usize = 1 << 15;

/// The threads beside the caller's, asleep when there is nothing to do. The pool is the crate's alone: in one that the
/// program fills with other work, a step would have to wait.
static HELPERS: LazyLock<Option<ThreadPool>> = LazyLock::new(|| {
    let helpers = std::thread::available_parallelism().map_or(0, |n| n.get() - 1);
    let pool = ThreadPoolBuilder::new().num_threads(helpers).thread_name(|i| format!("tch-blr-{i}"));
    // Where threads cannot be started, the caller does all the work.
    if helpers > 0 { pool.build().ok() } else { None }
});

/// How many threads a pass over this many weights is worth: at most as many as libtorch may use.
pub(super) fn worth(weights: usize) -> usize {
    (weights / PER_THREAD).clamp(1, tch::get_num_threads().max(1) as usize)
}

/// Where a pass over tensors of these lengths is cut: number of the tensor and first position of each piece of this size.
pub(super) fn pieces(lengths: impl Iterator<Item = usize>, size: usize) -> Vec<(usize, usize)> {
    lengths.enumerate().flat_map(move |(t, len)| (0..len).step_by(size).map(move |at| (t, at))).collect()
}

/// Calls `work` for each of 0, 1, … `count`-1, on up to `threads` threads that take the next one when they are done.
pub(super) fn share(count: usize, threads: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let take = || {
        loop {
            // Relaxed, because only the number is shared: starting and ending the scope orders all other memory.
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                break;
            }
            work(i);
        }
    };
    match HELPERS.as_ref().filter(|_| threads > 1 && count > 1) {
        None => take(),
        // In place: the caller is one of the workers. `scope` would move it into the pool, to wait there for a free
        // thread.
        Some(pool) => pool.in_place_scope(|scope| {
            for _ in 1..threads.min(count).min(pool.current_num_threads() + 1) {
                scope.spawn(|_| take());
            }
            take();
        }),
    }
}

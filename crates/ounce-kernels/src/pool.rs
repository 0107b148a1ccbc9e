//! A thread pool with static partitions, and the one place where threads share a mutable slice.
//!
//! Idea: every kernel is one call of [`Pool::run`]; thread `i` of `n` computes its part of the
//! outputs from `(i, n)` alone, or takes items of unequal size from a common counter ([`Pool::run_items`]), where each
//! item's result depends on the item alone. So there is no stealing within outputs, and a run is reproducible.
//! The caller is thread 0; the others spin for a moment, because kernels follow each other within
//! microseconds, and then sleep, because the machine may be shared.
//!
//! Invariants: `run` allocates nothing; it returns only after every thread has finished, also when
//! one of them panics (the panic is then raised in the caller); a job never starts a job.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Stack of a worker thread in bytes; the largest kernel tile on a stack is far below this.
const STACK_BYTES: usize = 512 << 10;
/// How long a thread spins before it sleeps: longer than the gap between two kernels.
const SPIN: Duration = Duration::from_micros(40);

type Job = *const (dyn Fn(usize) + Sync);

/// A fixed set of threads that run one function together.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One run at a time, whoever calls.
    turn: Mutex<()>,
}

struct Shared {
    /// The job of the current epoch; written only while no worker runs.
    job: UnsafeCell<Option<Job>>,
    /// Counts runs; a worker starts when it changes.
    epoch: AtomicUsize,
    /// Workers that have not finished the current run.
    n_running: AtomicUsize,
    stop: AtomicBool,
    /// Threads asleep on `wake` (workers) and on `done` (the caller).
    n_asleep: AtomicUsize,
    caller_asleep: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
    done: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written by the caller before it publishes a new epoch (release) and read by
// workers after they observe it (acquire); the caller writes again only after every worker has
// decremented `n_running` (acquire). All other fields are Sync by themselves.
unsafe impl Sync for Shared {}
// SAFETY: as above; the raw pointer in `job` is only followed while `run` keeps its referent alive.
unsafe impl Send for Shared {}

/// A pass over this many f32 takes about as long as waking the threads.
const SMALL_ELEMS: usize = 8192;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in a job never happens while one of our locks is held, so poison means nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Spins until `ready` or for [`SPIN`]; returns whether it became ready.
fn spin_until(ready: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..64 {
            if ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return ready();
        }
    }
}

impl Pool {
    /// A pool of `n_threads` threads, the caller included.
    ///
    /// # Panics
    /// If `n_threads` is 0 or the system refuses to start a thread.
    pub fn new(n_threads: usize) -> Self {
        Self::start(n_threads).expect("the system starts a kernel thread")
    }

    /// A pool of `n_threads` threads, the caller included (`n_threads - 1` are started).
    ///
    /// # Errors
    /// The system refuses to start a thread; those that were started have ended.
    ///
    /// # Panics
    /// If `n_threads` is 0.
    pub fn start(n_threads: usize) -> std::io::Result<Self> {
        assert!(n_threads > 0, "a pool has at least the calling thread");
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            epoch: AtomicUsize::new(0),
            n_running: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            n_asleep: AtomicUsize::new(0),
            caller_asleep: AtomicBool::new(false),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            done: Condvar::new(),
            panic: Mutex::new(None),
        });
        let workers = Vec::with_capacity(n_threads - 1);
        let mut pool = Self { shared, workers, turn: Mutex::new(()) };
        for thread_idx in 1..n_threads {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new()
                .name(format!("kernel-{thread_idx}"))
                .stack_size(STACK_BYTES)
                .spawn(move || shared.work(thread_idx))?;
            pool.workers.push(thread);
        }
        // A starting thread allocates a little; after this run all have started.
        pool.run(&|_| {});
        Ok(pool)
    }

    /// Number of threads, the caller included.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(thread_idx)` once on every thread and returns when all have finished.
    ///
    /// # Panics
    /// If `f` panicked on any thread, with the first such panic. A job must not call `run` of its
    /// own pool: that would wait forever.
    pub fn run(&self, f: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            return f(0);
        }
        let _turn = locked(&self.turn);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The pointer is followed only by workers of this run,
        // and this function returns (or unwinds) only after all of them have finished.
        let job: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(f) };
        // SAFETY: no worker runs: the previous run waited for `n_running == 0`.
        unsafe { *shared.job.get() = Some(std::ptr::from_ref(job)) };
        shared.n_running.store(self.workers.len(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        shared.wake_sleepers();
        let own = catch_unwind(AssertUnwindSafe(|| f(0)));
        shared.wait_for_workers();
        if let Err(payload) = own {
            locked(&shared.panic).take();
            resume_unwind(payload);
        }
        let worker_panic = locked(&shared.panic).take();
        if let Some(payload) = worker_panic {
            resume_unwind(payload);
        }
    }

    /// As [`Pool::run`] for a job on `n_elems` elements: a small one is not worth waking anybody for,
    /// so the caller does every thread's part itself, one after another.
    pub fn run_sized(&self, n_elems: usize, f: &(dyn Fn(usize) + Sync)) {
        if n_elems > SMALL_ELEMS {
            return self.run(f);
        }
        (0..self.n_threads()).for_each(f);
    }

    /// Hands disjoint row blocks of `dst` (rows of `row_len` elements) to the threads.
    ///
    /// `f(rows, dst_rows)` gets a range of row indices, cut at multiples of `granule` rows, and
    /// exactly those rows of `dst`. Threads without rows are not called.
    pub fn split_rows<T: Send>(
        &self,
        dst: &mut [T],
        row_len: usize,
        granule: usize,
        f: impl Fn(Range<usize>, &mut [T]) + Sync,
    ) {
        self.split_rows_sized(usize::MAX, dst, row_len, granule, f);
    }

    /// As [`Pool::split_rows`] for a job on `n_elems` elements in all, see [`Pool::run_sized`].
    pub fn split_rows_sized<T: Send>(
        &self,
        n_elems: usize,
        dst: &mut [T],
        row_len: usize,
        granule: usize,
        f: impl Fn(Range<usize>, &mut [T]) + Sync,
    ) {
        assert!(row_len > 0 && dst.len().is_multiple_of(row_len), "dst is whole rows");
        let n_rows = dst.len() / row_len;
        let n_threads = self.n_threads();
        let shared = SharedMut::new(dst);
        self.run_sized(n_elems, &|thread_idx| {
            let rows = split_by(n_rows, granule, n_threads, thread_idx);
            if rows.is_empty() {
                return;
            }
            // SAFETY: `split_by` gives every thread its own rows, and they end within `dst`.
            let part = unsafe { shared.range(rows.start * row_len..rows.end * row_len) };
            f(rows, part);
        });
    }
}

impl Pool {
    /// Calls `f(thread_idx, item)` for every item, each on whichever thread is free next.
    ///
    /// For items of uneven cost whose outputs are disjoint: who computes an item then does not
    /// show in the result. Put the dearest items first.
    pub fn run_items(&self, n_items: usize, f: impl Fn(usize, usize) + Sync) {
        let next = AtomicUsize::new(0);
        self.run(&|thread_idx| {
            loop {
                let item = next.fetch_add(1, Ordering::Relaxed);
                if item >= n_items {
                    return;
                }
                f(thread_idx, item);
            }
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        self.shared.wake_sleepers();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its jobs, so there is nothing to report here.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The life of one worker.
    fn work(&self, thread_idx: usize) {
        let mut seen = 0;
        loop {
            self.wait_for_epoch_after(seen);
            seen += 1;
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            // SAFETY: the epoch was observed with SeqCst, so the job written before it is visible,
            // and the caller keeps the closure alive until `n_running` reaches 0.
            let job = unsafe { &*(*self.job.get()).expect("a run publishes its job first") };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(thread_idx))) {
                locked(&self.panic).get_or_insert(payload);
            }
            if self.n_running.fetch_sub(1, Ordering::SeqCst) == 1
                && self.caller_asleep.load(Ordering::SeqCst)
            {
                let _guard = locked(&self.lock);
                self.done.notify_one();
            }
        }
    }

    fn wait_for_epoch_after(&self, seen: usize) {
        let changed = || self.epoch.load(Ordering::SeqCst) != seen;
        if spin_until(changed) {
            return;
        }
        let mut guard = locked(&self.lock);
        self.n_asleep.fetch_add(1, Ordering::SeqCst);
        while !changed() {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.n_asleep.fetch_sub(1, Ordering::SeqCst);
    }

    /// Wakes workers that sleep. SeqCst on `epoch` and `n_asleep` rules out that a worker goes to
    /// sleep unseen: it counts itself first and then looks at the epoch again.
    fn wake_sleepers(&self) {
        if self.n_asleep.load(Ordering::SeqCst) > 0 {
            let _guard = locked(&self.lock);
            self.wake.notify_all();
        }
    }

    fn wait_for_workers(&self) {
        let finished = || self.n_running.load(Ordering::SeqCst) == 0;
        if spin_until(finished) {
            return;
        }
        let mut guard = locked(&self.lock);
        self.caller_asleep.store(true, Ordering::SeqCst);
        while !finished() {
            guard = self.done.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_asleep.store(false, Ordering::SeqCst);
    }
}

/// Part `idx` of `n_items` items dealt to `n_parts` in contiguous, nearly equal ranges.
pub fn split(n_items: usize, n_parts: usize, idx: usize) -> Range<usize> {
    n_items * idx / n_parts..n_items * (idx + 1) / n_parts
}

/// As [`split`], with every cut at a multiple of `granule` items.
pub fn split_by(n_items: usize, granule: usize, n_parts: usize, idx: usize) -> Range<usize> {
    let range = split(n_items.div_ceil(granule), n_parts, idx);
    (range.start * granule).min(n_items)..(range.end * granule).min(n_items)
}

/// A mutable slice that several threads write at once, each its own range. A clone is the same slice.
#[derive(Clone)]
pub(crate) struct SharedMut<'a, T> {
    ptr: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `range` and `ptr`, whose callers promise disjoint elements, so
// sharing the wrapper is as safe as sending disjoint `&mut [T]`.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    pub(crate) fn ptr(&self) -> *mut T {
        self.ptr
    }

    /// # Safety
    /// No two live ranges may overlap.
    ///
    /// # Panics
    /// If the range ends beyond the slice.
    #[expect(clippy::mut_from_ref, reason = "handing out disjoint parts is this type's purpose")]
    pub(crate) unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "range lies within the slice");
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_once_and_runs_follow_each_other() {
        for n_threads in [1, 2, 3, 5] {
            let pool = Pool::new(n_threads);
            let mut hits = vec![0u32; n_threads];
            for round in 1..200 {
                if round == 100 {
                    // Long enough for the workers to fall asleep.
                    std::thread::sleep(Duration::from_millis(2));
                }
                pool.split_rows(&mut hits, 1, 1, |_, part| part[0] += 1);
                assert!(hits.iter().all(|&h| h == round));
            }
        }
    }

    #[test]
    fn a_panic_on_any_thread_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(3);
        for bad in 0..3 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|idx| assert!(idx != bad, "thread {bad} fails"));
            }));
            assert!(caught.is_err());
        }
        let count = AtomicUsize::new(0);
        pool.run(&|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 3);
    }

    #[test]
    fn parts_cover_all_items_in_order_and_are_cut_at_granules() {
        for n_items in [0, 1, 63, 64, 65, 1000] {
            for n_parts in [1, 2, 3, 7] {
                for granule in [1, 64] {
                    let mut next = 0;
                    for idx in 0..n_parts {
                        let range = split_by(n_items, granule, n_parts, idx);
                        assert_eq!(range.start, next);
                        assert!(range.start == n_items || range.start.is_multiple_of(granule));
                        next = range.end;
                    }
                    assert_eq!(next, n_items);
                }
            }
        }
    }
}

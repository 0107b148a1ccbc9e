//! Jobs that are read, worked on by several threads, and handed on in the order in which they were read.
//!
//! Idea: one thread reads jobs and hands finished ones on; while it can do neither it works on a job itself, so that
//! no thread waits while there is work, and one thread alone needs no other. Threads live as long as the work, and each
//! keeps tools of its own, such as words that it has seen.
//!
//! Invariants:
//! * at most [`JOBS_PER_THREAD`] jobs per thread exist, whose buffers go round, and no job is read while those on their
//!   way weigh [`MAX_BYTES`];
//! * what is handed on does not depend on the number of threads;
//! * of several faults the one that comes first in the data is returned, since jobs that were read before a fault are
//!   handed on before it is told.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Jobs that are being read, worked on, or waiting, per thread: enough for the others while one thread works on a long
/// one.
const JOBS_PER_THREAD: usize = 4;
/// While jobs on their way weigh so much, none is read.
pub(crate) const MAX_BYTES: usize = 512 << 10;

/// Reads jobs with `fill`, works on them with `work` on `n_threads` threads, and hands them on in order.
///
/// `fill` gets a job as it was when it was handed on, or a new one, and says whether there is more to read. The job is
/// worked on in any case, also where it says that there is no more or fails. `n_bytes` is what a job weighs that was
/// just read.
///
/// # Errors
/// The first error of `fill` or `hand_on`, in the order of the data.
pub(crate) fn in_order<Job: Default + Send, Tools: Default, E>(
    n_threads: usize,
    n_bytes: impl Fn(&Job) -> usize,
    mut fill: impl FnMut(&mut Job) -> Result<bool, E>,
    work: impl Fn(&mut Job, &mut Tools) + Sync,
    mut hand_on: impl FnMut(&mut Job) -> Result<(), E>,
) -> Result<(), E> {
    let n_threads = n_threads.max(1);
    // One thread alone has nobody to read ahead for.
    let n_most = if n_threads == 1 { 1 } else { JOBS_PER_THREAD * n_threads };
    let belt = Belt::default();
    std::thread::scope(|scope| {
        // Also where this thread or another one panics: nobody waits for ever.
        let _stop = StopOnDrop(&belt);
        for _ in 1..n_threads {
            scope.spawn(|| {
                let _stop = StopOnDrop(&belt);
                let mut tools = Tools::default();
                while let Some((number, mut job)) = belt.next_job() {
                    work(&mut job, &mut tools);
                    belt.put_back(number, job);
                }
            });
        }
        let mut tools = Tools::default();
        let mut end = None;
        loop {
            match belt.next_turn(end.is_none(), n_most) {
                Turn::HandOn(mut job) => {
                    hand_on(&mut job)?;
                    belt.reuse(job);
                }
                Turn::Fill(mut job) => {
                    match fill(&mut job) {
                        Ok(true) => {}
                        Ok(false) => end = Some(Ok(())),
                        Err(fault) => end = Some(Err(fault)),
                    }
                    let n_bytes = n_bytes(&job);
                    belt.append(job, n_bytes);
                }
                Turn::Work(number, mut job) => {
                    work(&mut job, &mut tools);
                    belt.put_back(number, job);
                }
                Turn::End => return end.unwrap_or(Ok(())),
            }
        }
    })
}

/// What the reading thread does next.
enum Turn<Job> {
    HandOn(Job),
    Fill(Job),
    Work(u64, Job),
    End,
}

/// Jobs on their way.
struct Belt<Job> {
    jobs: Mutex<Jobs<Job>>,
    /// There is a new job, or an end.
    is_new: Condvar,
    /// A job is finished, or there is an end.
    is_done: Condvar,
}

struct Jobs<Job> {
    /// Nobody has begun with these; with their numbers.
    waiting: VecDeque<(u64, Job)>,
    /// From job `n_handed_on` on: those that are finished.
    finished: VecDeque<Option<Job>>,
    /// What each of them weighed when it was read.
    weights: VecDeque<usize>,
    n_handed_on: u64,
    spare: Vec<Job>,
    is_stopped: bool,
}

impl<Job> Default for Belt<Job> {
    fn default() -> Self {
        let jobs = Jobs {
            waiting: VecDeque::new(),
            finished: VecDeque::new(),
            weights: VecDeque::new(),
            n_handed_on: 0,
            spare: Vec::new(),
            is_stopped: false,
        };
        Self { jobs: Mutex::new(jobs), is_new: Condvar::new(), is_done: Condvar::new() }
    }
}

impl<Job: Default> Belt<Job> {
    fn lock(&self) -> MutexGuard<'_, Jobs<Job>> {
        // Nothing that is done under the lock can panic half way.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the reading thread: finished jobs first, then room for new ones, then work; else it waits.
    fn next_turn(&self, has_more: bool, n_most: usize) -> Turn<Job> {
        let mut jobs = self.lock();
        loop {
            if let Some(Some(job)) = jobs.finished.front_mut().map(Option::take) {
                jobs.finished.pop_front();
                jobs.weights.pop_front();
                jobs.n_handed_on += 1;
                return Turn::HandOn(job);
            }
            let has_room =
                jobs.finished.len() < n_most && jobs.weights.iter().sum::<usize>() < MAX_BYTES;
            if has_more && has_room {
                return Turn::Fill(jobs.spare.pop().unwrap_or_default());
            }
            if let Some((number, job)) = jobs.waiting.pop_front() {
                return Turn::Work(number, job);
            }
            if jobs.finished.is_empty() {
                return Turn::End;
            }
            assert!(!jobs.is_stopped, "a thread ended before its job");
            jobs = self.is_done.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// For the other threads: the oldest job that nobody has begun with; `None` after the last.
    fn next_job(&self) -> Option<(u64, Job)> {
        let mut jobs = self.lock();
        loop {
            if jobs.is_stopped {
                return None;
            }
            if let Some(job) = jobs.waiting.pop_front() {
                return Some(job);
            }
            jobs = self.is_new.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn append(&self, job: Job, n_bytes: usize) {
        let mut jobs = self.lock();
        jobs.weights.push_back(n_bytes);
        let number = jobs.n_handed_on + jobs.finished.len() as u64;
        jobs.finished.push_back(None);
        jobs.waiting.push_back((number, job));
        drop(jobs);
        self.is_new.notify_one();
    }

    fn put_back(&self, number: u64, job: Job) {
        let mut jobs = self.lock();
        let at = (number - jobs.n_handed_on) as usize;
        jobs.finished[at] = Some(job);
        drop(jobs);
        self.is_done.notify_one();
    }

    fn reuse(&self, job: Job) {
        self.lock().spare.push(job);
    }
}

/// Lets every thread end.
struct StopOnDrop<'a, Job: Default>(&'a Belt<Job>);

impl<Job: Default> Drop for StopOnDrop<'_, Job> {
    fn drop(&mut self) {
        self.0.lock().is_stopped = true;
        self.0.is_new.notify_all();
        self.0.is_done.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Squares `0..n` in jobs of one number; the reading fails at `bad_read`, the handing on at `bad_write`.
    fn squares(
        n_threads: usize,
        n: u64,
        bad_read: u64,
        bad_write: u64,
    ) -> (Vec<u64>, Result<(), String>) {
        let (mut next, mut found) = (0, Vec::new());
        let done = in_order(
            n_threads,
            |_| 1,
            |job: &mut Option<u64>| {
                *job = None;
                if next == bad_read {
                    return Err(format!("read {next}"));
                }
                *job = Some(next).filter(|_| next < n);
                next += 1;
                Ok(next <= n)
            },
            |job, n_seen: &mut u64| {
                *n_seen += 1;
                // The first jobs are the longest, so that later ones overtake them.
                if job.is_some_and(|x| x % 7 == 0) {
                    std::thread::sleep(std::time::Duration::from_micros(300));
                }
                *job = job.map(|x| x * x);
            },
            |job| match *job {
                Some(x) if x == bad_write * bad_write => Err(format!("write {x}")),
                Some(x) => {
                    found.push(x);
                    Ok(())
                }
                None => Ok(()),
            },
        );
        (found, done)
    }

    #[test]
    fn jobs_are_handed_on_in_the_order_in_which_they_were_read() {
        for n_threads in [0, 1, 2, 5] {
            for n in [0, 1, 3, 200] {
                let (found, done) = squares(n_threads, n, u64::MAX, 1 << 20);
                assert_eq!(done, Ok(()));
                assert!(found.iter().copied().eq((0..n).map(|x| x * x)), "{n_threads}: {found:?}");
            }
        }
    }

    #[test]
    fn the_first_fault_in_the_order_of_the_data_is_told_after_what_was_read_before_it() {
        for n_threads in [1, 3] {
            let (found, done) = squares(n_threads, 200, 50, 1 << 20);
            assert_eq!((found.len(), done), (50, Err("read 50".to_owned())));
            let (found, done) = squares(n_threads, 200, 50, 48);
            assert_eq!((found.len(), done), (48, Err("write 2304".to_owned())));
        }
    }

    #[test]
    fn no_job_is_read_while_those_on_their_way_weigh_too_much() {
        let n_alive = std::cell::Cell::new(0);
        let (mut next, mut most) = (0, 0);
        in_order(
            5,
            |_| MAX_BYTES / 2,
            |_: &mut u64| {
                n_alive.set(n_alive.get() + 1);
                most = n_alive.get().max(most);
                next += 1;
                Ok::<bool, ()>(next < 100)
            },
            |_, (): &mut ()| {},
            |_| {
                n_alive.set(n_alive.get() - 1);
                Ok(())
            },
        )
        .unwrap();
        assert_eq!((next, most), (100, 2));
    }

    #[test]
    fn a_thread_that_panics_leaves_nobody_waiting() {
        let run = || {
            in_order(
                3,
                |_| 1,
                |job: &mut u64| {
                    *job += 1;
                    Ok::<bool, ()>(true)
                },
                |_, (): &mut ()| panic!("broken"),
                |_| Ok(()),
            )
        };
        std::panic::catch_unwind(run).unwrap_err();
    }
}

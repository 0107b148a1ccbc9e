//! How much of the processors other programs took while kernels were timed.
//!
//! Idea: of the cores that n threads could have had, what was neither ours nor idle was taken:
//! `n - (own + idle) / wall`, from the kernel's counters. Of a virtual machine that includes what its host gave to
//! others.
//!
//! Costs that were timed beside other programs are too high, and not all alike. They are kept, since they may be all
//! there is, with how much was taken; once they are old and the machine is quiet they are timed again.
//!
//! Source: proc(5), `/proc/stat` and `/proc/self/stat`, in ticks of which every Linux shows 100 a second.

use std::time::{Duration, Instant};

const TICKS_PER_S: f64 = 100.0;
/// Below it, ticks are too coarse to tell.
const SHORTEST_S: f64 = 0.08;
/// Cores taken by others up to which times count as undisturbed.
pub(crate) const UNDISTURBED_CORES: f64 = 0.25;

/// The counters at one moment.
pub(crate) struct Moment {
    at: Instant,
    idle_ticks: u64,
    own_ticks: u64,
}

impl Moment {
    /// Now; `None` where the system does not tell.
    pub(crate) fn now() -> Option<Self> {
        let read = |path| std::fs::read_to_string(path).ok();
        let idle_ticks = idle_ticks(&read("/proc/stat")?)?;
        let own_ticks = own_ticks(&read("/proc/self/stat")?)?;
        Some(Self { at: Instant::now(), idle_ticks, own_ticks })
    }

    /// Cores that others took from `n_threads` threads since then; 0 where the time was too short to tell.
    pub(crate) fn cores_taken_since(&self, n_threads: usize) -> f64 {
        let Some(now) = Self::now() else { return 0.0 };
        let wall_s = now.at.duration_since(self.at).as_secs_f64();
        let ticks = now.idle_ticks.saturating_sub(self.idle_ticks)
            + now.own_ticks.saturating_sub(self.own_ticks);
        // Threads beyond the cores have none that could be taken.
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        cores_taken(n_threads.min(n_cores), wall_s, ticks as f64 / TICKS_PER_S)
    }
}

/// Whether `n_threads` threads would have their cores for themselves. Waits a tenth of a second to know.
pub(crate) fn is_quiet(n_threads: usize) -> bool {
    let Some(before) = Moment::now() else { return false };
    std::thread::sleep(Duration::from_millis(100));
    before.cores_taken_since(n_threads) <= UNDISTURBED_CORES
}

fn cores_taken(n_threads: usize, wall_s: f64, own_and_idle_s: f64) -> f64 {
    if wall_s < SHORTEST_S { 0.0 } else { (n_threads as f64 - own_and_idle_s / wall_s).max(0.0) }
}

/// Idle ticks of all processors: `cpu user nice system idle iowait ...`.
fn idle_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().skip(3);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// Ticks of this process, in user and system mode: the 12th and 13th field behind the name in brackets.
fn own_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_from_their_columns() {
        let stat = "cpu  10 20 30 400 5 6 7 8 0 0\ncpu0 1 2 3 4\n";
        assert_eq!(idle_ticks(stat), Some(405));
        assert_eq!(idle_ticks("intr 5"), None);
        let own = "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 23 45 0 0 20 0 1";
        assert_eq!(own_ticks(own), Some(68));
        assert_eq!(own_ticks("7 (a) S 1"), None);
    }

    #[test]
    fn what_is_neither_ours_nor_idle_was_taken() {
        // Of two cores in 10 s: 12 s ours, 3 s idle.
        assert!((cores_taken(2, 10.0, 15.0) - 0.5).abs() < 1e-9);
        assert!(cores_taken(2, 10.0, 60.0).abs() < 1e-9, "there are more cores than threads");
        assert!(cores_taken(2, 0.01, 0.0).abs() < 1e-9, "too short to tell");
    }

    #[test]
    fn linux_tells_and_time_goes_on() {
        let (first, second) = (Moment::now(), Moment::now());
        assert_eq!(first.is_some(), cfg!(target_os = "linux"));
        let Some((first, second)) = first.zip(second) else { return };
        assert!(first.own_ticks <= second.own_ticks);
    }
}

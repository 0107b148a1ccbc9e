//! What a run may take of the machine, and what of it the machine does not have.

use std::path::PathBuf;

use ounce_io::dataset::{data_bytes, data_bytes_at_once};
use ounce_kernels::pool::Pool;

use crate::budget::{format_bytes, memory_of_machine, resident_bytes};
use crate::settings::DataFile;
use crate::{Error, Result, Settings};

/// Lengths of the window's samples, and of its rows where they are packed.
const ROW_BYTES: u64 = 8;
/// Buffers of an open file.
const FILE_BYTES: u64 = 64 << 10;

/// The budget of a run and the threads that it may use.
pub(crate) struct Limits {
    pub(crate) budget_bytes: u64,
    pub(crate) n_threads: usize,
    /// Most that reading the data files takes, and the window of a stream, beside tokenizing.
    pub(crate) data_bytes: u64,
}

impl Limits {
    /// As the settings say; where they say nothing, as many threads as cores.
    pub(crate) fn of(settings: &Settings) -> Self {
        let data = settings.data.iter().map(DataFile::path);
        let files = data.chain(settings.eval_data.iter().map(PathBuf::as_path));
        Self {
            budget_bytes: settings.memory.resolve(),
            n_threads: settings.threads.map_or_else(n_cores, |n| n as usize),
            data_bytes: data_bytes(files),
        }
    }

    /// The same for training, which may stream its data.
    pub(crate) fn of_training(settings: &Settings) -> Self {
        let limits = Self::of(settings);
        let window_bytes = if settings.streaming { window_bytes(settings) } else { 0 };
        Self { data_bytes: limits.data_bytes + window_bytes, ..limits }
    }

    /// Warnings for a run whose plans take `peak_bytes`, before it has touched any of them, and during whose timings
    /// other programs took so many cores.
    pub(crate) fn warnings(&self, peak_bytes: u64, cores_taken: Option<f64>) -> Vec<String> {
        // What the process holds already is a part of its peak.
        let free_bytes = memory_of_machine().free_bytes + resident_bytes();
        let mut warnings = self.warnings_on(n_cores(), peak_bytes, free_bytes);
        warnings.extend(cores_taken.map(|taken| {
            format!(
                "warning: other programs took {taken:.1} of {} cores while kernels were timed: predicted times are too \
                 high, until a run on a quiet machine times them again",
                n_cores()
            )
        }));
        warnings
    }

    fn warnings_on(&self, n_cores: usize, peak_bytes: u64, free_bytes: u64) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.n_threads > n_cores {
            warnings.push(format!(
                "warning: {} threads on {n_cores} cores wait for each other; `--threads {n_cores}` is faster and \
                 gives the same result",
                self.n_threads
            ));
        }
        if peak_bytes > free_bytes {
            warnings.push(format!(
                "warning: the plan takes {}, of which only {} are free here: the system may end the run; `--memory \
                 auto` takes what is free",
                format_bytes(peak_bytes),
                format_bytes(free_bytes)
            ));
        }
        warnings
    }
}

/// Most bytes that a child holds for a window of a stream and for reading its files, whatever the tokenizer.
pub(crate) fn window_bytes(settings: &Settings) -> u64 {
    let reading_bytes = data_bytes_at_once(settings.data.iter().map(DataFile::path));
    ROW_BYTES * settings.window_rows() + FILE_BYTES * settings.data.len() as u64 + reading_bytes
}

/// Cores that this process may use.
pub(crate) fn n_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The threads that kernels run on.
///
/// # Errors
/// [`Error::Usage`] where the system refuses to start them.
pub(crate) fn start_pool(n_threads: usize) -> Result<Pool> {
    Pool::start(n_threads).map_err(|e| Error::Usage {
        message: format!("cannot start {n_threads} threads: {e}"),
        hint: "give fewer `--threads`, or raise the limit on processes or address space (`ulimit -u`, `ulimit -v`, a \
               container's)"
            .to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_warned_of_what_the_machine_does_not_have() {
        let limits = Limits { budget_bytes: 8 << 30, n_threads: 4, data_bytes: 0 };
        assert_eq!(limits.warnings_on(4, 1 << 30, 1 << 30), [""; 0]);
        let both = limits.warnings_on(2, (1 << 30) + 1, 1 << 30);
        assert_eq!(both.len(), 2);
        assert!(both[0].contains("4 threads on 2 cores"), "{both:?}");
        assert!(both[1].contains("only 1.00 GiB are free"), "{both:?}");
    }
}

//! `ounce doctor`: what this machine has, how fast it is, and what to expect of it.
//!
//! Bounded: peaks are measured for a fifth of a second each, copies go between two buffers of 64 MiB,
//! and one file of 64 MiB in the cache folder is written, read and removed. What to expect of a model
//! is what its plan for the `auto` budget predicts, from the costs of kernels that are measured here
//! and kept; no model is loaded or trained.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ounce_exec::machine_fingerprint;
use ounce_kernels::peak::{Unit, multiply_adds};
use ounce_kernels::pool::Pool;
use ounce_kernels::tier::tier;
use ounce_models::preset;
use ounce_program::StepShape;
use serde::Serialize;

use crate::budget::{AUTO_PERCENT, Memory, MemoryOfMachine, memory_of_machine};
use crate::compile::estimate;
use crate::graphs::{TrainWanted, Wanted};
use crate::limits::{Limits, n_cores, start_pool};
use crate::model::Model;
use crate::{Environment, Result, Settings};

/// Bytes of the file that is written and read.
const FILE_BYTES: u64 = 64 << 20;
/// Bytes that are copied at once: more than caches hold.
const COPY_BYTES: usize = 64 << 20;
/// A rate is measured for so long; the fastest round counts.
const TIME: Duration = Duration::from_millis(200);
/// Rounds of multiply-adds per measurement.
const N_STEPS: usize = 1_000_000;
/// Published size, rows per step, tokens per row.
const MODELS: [(&str, u64, u64); 3] =
    [("gpt2", 4, 1024), ("smollm2-135m", 4, 512), ("qwen2.5-0.5b", 1, 512)];

/// What was found. Sizes in bytes, speeds per second.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DoctorRecord {
    /// Processor, instruction set, threads, version and build: what measured costs belong to.
    pub machine: String,
    /// Cores that this process may use.
    pub cores: u64,
    /// Instruction set of the kernels.
    pub kernel_tier: String,
    /// What all cores together can do at most.
    pub peak: PeakRecord,
    /// Memory of the machine and of the cgroups that this process is in.
    pub memory: MemoryOfMachine,
    /// What `--memory auto` would be now.
    pub auto_budget_bytes: u64,
    /// Its share of what is free; the rest is for what other programs do next.
    pub auto_percent: u64,
    /// The disk below the cache folder.
    pub disk: DiskRecord,
    /// What to expect of models.
    pub models: Vec<ModelRecord>,
}

/// Measured rates of all cores together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PeakRecord {
    /// FLOP/s of fused f32 multiply-adds that never leave registers; `None` without a vector unit.
    /// f16, and bf16 without an instruction of its own, are widened and have the same.
    pub f32_flop_per_s: Option<f64>,
    /// FLOP/s of the instruction that adds pairs of bf16 products, where there is one.
    pub bf16_flop_per_s: Option<f64>,
    /// Bytes read and written by a copy that no cache holds.
    pub copy_bytes_per_s: f64,
}

/// Speed of a disk.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DiskRecord {
    /// Where the file was.
    pub dir: PathBuf,
    /// What the file system has free.
    pub free_bytes: u64,
    /// Bytes of the file that was written and read.
    pub file_bytes: u64,
    /// Whether the page cache was left out.
    pub is_direct: bool,
    /// Written and flushed.
    pub write_bytes_per_s: f64,
    /// Read back.
    pub read_bytes_per_s: f64,
}

/// What to expect of a model in f32 with AdamW.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelRecord {
    /// A published size.
    pub model: String,
    /// Rows per step.
    pub batch_size: u64,
    /// Tokens per row.
    pub max_length: u64,
    /// Less than this is refused.
    pub smallest_budget_bytes: u64,
    /// Predicted for the `auto` budget; `None` where that is too small.
    pub tokens_per_s: Option<f64>,
}

/// Looks at this machine.
///
/// # Errors
/// A disk that cannot be written.
pub fn doctor(env: &Environment) -> Result<DoctorRecord> {
    let cores = n_cores();
    let limits = Limits { budget_bytes: Memory::Auto.resolve(), n_threads: cores, data_bytes: 0 };
    let disk = disk(&env.cache_dir)?;
    let peak = peak(&start_pool(cores)?);
    let models = MODELS.iter().map(|&(name, n_rows, length)| {
        let (smallest_budget_bytes, tokens_per_s) = expect(name, n_rows, length, &limits, env)?;
        Ok(ModelRecord {
            model: name.to_owned(),
            batch_size: n_rows,
            max_length: length,
            smallest_budget_bytes,
            tokens_per_s,
        })
    });
    let models = models.collect::<Result<_>>()?;
    Ok(DoctorRecord {
        machine: machine_fingerprint(cores),
        cores: cores as u64,
        kernel_tier: tier().to_string(),
        peak,
        memory: memory_of_machine(),
        auto_budget_bytes: limits.budget_bytes,
        auto_percent: AUTO_PERCENT,
        disk,
        models,
    })
}

/// Smallest budget of a published size, and its tokens per second within the limits.
fn expect(
    name: &str,
    n_rows: u64,
    max_length: u64,
    limits: &Limits,
    env: &Environment,
) -> Result<(u64, Option<f64>)> {
    let config = preset(name).expect("a name of this file is a published size");
    let model = Model::without_files(name, config);
    let shape = StepShape::new(n_rows, max_length);
    let settings = Settings::default();
    let train = TrainWanted::of(&settings, shape);
    let policy = settings.policy();
    let wanted = Wanted { train: Some(train), max_length, policy, ..Wanted::default() };
    let (smallest_bytes, step_s) = estimate(&model, &wanted, limits, env)?;
    Ok((smallest_bytes, step_s.map(|s| (n_rows * max_length) as f64 / s)))
}

/// Rates that no kernel exceeds.
fn peak(pool: &Pool) -> PeakRecord {
    let n_threads = pool.n_threads();
    let flop_per_s = |unit| {
        multiply_adds(unit, 1)?;
        let all = || {
            pool.run(&|_| {
                multiply_adds(unit, N_STEPS);
            });
        };
        let flop = multiply_adds(unit, N_STEPS)? * n_threads as f64;
        Some(fastest(flop, all))
    };
    let (from, mut to) = (vec![1_u8; COPY_BYTES], vec![0_u8; COPY_BYTES]);
    let part = COPY_BYTES.div_ceil(n_threads);
    let copy = || {
        std::thread::scope(|scope| {
            for (to, from) in to.chunks_mut(part).zip(from.chunks(part)) {
                scope.spawn(|| to.copy_from_slice(from));
            }
        });
    };
    PeakRecord {
        copy_bytes_per_s: fastest(2.0 * COPY_BYTES as f64, copy),
        f32_flop_per_s: flop_per_s(Unit::F32),
        bf16_flop_per_s: flop_per_s(Unit::Bf16Pairs),
    }
}

/// `amount` per second of the fastest of the rounds that fit into [`TIME`].
fn fastest(amount: f64, mut round: impl FnMut()) -> f64 {
    let (begin, mut best) = (Instant::now(), 0.0_f64);
    while best == 0.0 || begin.elapsed() < TIME {
        let start = Instant::now();
        round();
        best = best.max(amount / start.elapsed().as_secs_f64());
    }
    best
}

fn disk(dir: &Path) -> Result<DiskRecord> {
    let speed = ounce_io::disk_speed(dir, FILE_BYTES)?;
    let ounce_io::DiskSpeed {
        file_bytes,
        write_bytes_per_s,
        read_bytes_per_s,
        is_direct,
        free_bytes,
    } = speed;
    Ok(DiskRecord {
        dir: dir.to_path_buf(),
        free_bytes,
        file_bytes,
        is_direct,
        write_bytes_per_s,
        read_bytes_per_s,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_those_of_machines_that_exist() {
        let peak = peak(&Pool::new(1));
        let between = |x: f64, least: f64, most: f64| x > least && x < most;
        assert!(peak.f32_flop_per_s.is_none_or(|x| between(x, 1e9, 1e12)), "{peak:?}");
        assert!(peak.bf16_flop_per_s.is_none_or(|x| between(x, 1e9, 4e12)), "{peak:?}");
        assert!(between(peak.copy_bytes_per_s, 1e8, 1e12), "{peak:?}");
    }

    #[test]
    fn memory_of_this_machine_is_told() {
        let memory = memory_of_machine();
        assert!(memory.available_bytes <= memory.total_bytes && memory.free_bytes > 0);
        assert!(memory.free_bytes <= memory.available_bytes);
    }
}

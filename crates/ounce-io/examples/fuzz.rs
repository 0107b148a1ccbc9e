//! Fuzzes one parser for as long as you like.
//!
//! ```text
//! cargo run --release -p ounce-io --example fuzz -- safetensors --seconds 3600
//! cargo run --release -p ounce-io --example fuzz -- safetensors --input finding.bin
//! ```
//!
//! A finding is kept as `fuzz-TARGET-SEED.bin` in the current directory. Seconds are of processor time, so that an hour
//! means the same on a machine with other work. The last line is a JSON object.

#![expect(clippy::print_stdout, reason = "a program that reports")]

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use ounce_io::testing::{FuzzCase, Target};
use peak_alloc::PeakAlloc;
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Files that one thread tries.
const BATCH_FILES: u64 = 1000;

struct Request {
    target: Target,
    /// Of processor time.
    seconds: u64,
    seed: u64,
    input: Option<String>,
    /// Files to begin from, besides the built-in ones.
    valid: Vec<String>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let request = parse(std::env::args().skip(1))?;
    let dir = tempfile::tempdir()?;
    let mut case = FuzzCase::new(request.target, dir.path())?;
    for path in &request.valid {
        case.add_valid(&std::fs::read(path)?);
    }
    if let Some(path) = &request.input {
        let bytes = case.damage(&std::fs::read(path)?);
        println!("{path}: a file of {} bytes, accepted: {}", bytes.len(), case.try_file(&bytes));
        return Ok(());
    }
    let limit = Duration::from_secs(request.seconds);
    let (mut n_runs, mut worst) = (0_u64, 0.0_f64);
    // The tokenizer library reports malformed files by panics, which are caught.
    std::panic::set_hook(Box::new(|_| ()));
    while processor_time() < limit {
        // It also keeps, for as long as a thread lives, a table for every tokenizer that this one has loaded.
        let first = request.seed.wrapping_add(n_runs);
        let batch =
            std::thread::scope(|s| s.spawn(|| try_batch(&case, request.target, first)).join());
        worst = worst.max(batch.expect("panics are caught where they may happen")?);
        n_runs += BATCH_FILES;
    }
    let report = json!({
        "target": request.target.name(),
        "n_files": n_runs,
        "seed": request.seed,
        "processor_s": processor_time().as_secs_f64(),
        "memory_share_of_bound": worst,
    });
    println!("{report}");
    Ok(())
}

/// Tries as many files from this seed on as a thread may; the largest share of its bound that one took in memory.
fn try_batch(case: &FuzzCase, target: Target, first: u64) -> Result<f64, String> {
    let mut worst = 0.0_f64;
    for seed in (0..BATCH_FILES).map(|i| first.wrapping_add(i)) {
        let data = random_bytes(seed);
        let bytes = case.damage(&data);
        let before_bytes = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| case.try_file(&bytes)));
        let grown_bytes = ALLOCATOR.peak_usage() - before_bytes;
        let share = grown_bytes as f64 / target.bound_bytes(bytes.len()) as f64;
        worst = worst.max(share);
        if run.is_err() || share > 1.0 {
            let name = format!("fuzz-{}-{seed}.bin", target.name());
            std::fs::write(Path::new(&name), &data).map_err(|e| format!("{name}: {e}"))?;
            let what = run.err().map_or(format!("{grown_bytes} bytes of memory"), |panic| {
                let text = panic.downcast_ref::<String>().cloned();
                text.or(panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
            });
            return Err(format!("{name}: {what}"));
        }
    }
    Ok(worst)
}

/// What this process has used so far, on all its threads.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Request, Box<dyn Error>> {
    let names = Target::ALL.map(Target::name).join("|");
    let name = args.next().ok_or(format!("which target? {names}"))?;
    let target = Target::ALL.into_iter().find(|target| target.name() == name);
    let target = target.ok_or(format!("no target `{name}`; there are {names}"))?;
    let mut request = Request { target, seconds: 60, seed: 0, input: None, valid: Vec::new() };
    while let Some(flag) = args.next() {
        let value = args.next().ok_or(format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--seconds" => request.seconds = value.parse()?,
            "--seed" => request.seed = value.parse()?,
            "--input" => request.input = Some(value),
            "--valid" => request.valid.push(value),
            _ => return Err(format!("no flag {flag}").into()),
        }
    }
    Ok(request)
}

/// Up to 512 random bytes, often few (SplitMix64).
fn random_bytes(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0xD134_2543_DE82_EF95);
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let n_words = 1 + next() % (1 << (next() % 7));
    (0..n_words).flat_map(|_| next().to_le_bytes()).collect()
}

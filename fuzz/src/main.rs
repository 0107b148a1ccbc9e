//! One parser under libFuzzer, which keeps what reaches new code and damages it further.
//!
//! Idea: the bodies are those of the tests (`ounce_io::testing::FuzzCase`); what libFuzzer adds is coverage,
//! comparisons seen at run time, and a corpus. Every other file is damaged by our own edits, which know the words that
//! such formats stumble over, and make checksums right again. Two variables say what runs, since libFuzzer owns the
//! arguments: `OUNCE_FUZZ` is the parser (or `list`), `OUNCE_FUZZ_SECONDS` the processor time after which the run ends
//! with a line of JSON.

#![no_main]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use ounce_io::testing::{FuzzCase, Target};
use peak_alloc::PeakAlloc;
use rustix::process::{Signal, getpid, kill_process};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use tempfile::TempDir;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

static RUN: OnceLock<Run> = OnceLock::new();

/// Files between two looks at the clock that ends the run.
const CLOCK_FILES: u64 = 256;
/// Processor time that a file may take; libFuzzer stops those that do not end.
const MAX_FILE_SECONDS: f64 = 10.0;

struct Run {
    target: Target,
    case: FuzzCase,
    /// Of processor time.
    seconds: f64,
    n_files: AtomicU64,
    /// Most memory that a file took, in millionths of its bound.
    memory_millionths: AtomicU64,
    _dir: TempDir,
}

fuzz_target!(init: start(), |bytes: &[u8]| try_file(run(), bytes));

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed.is_multiple_of(2) {
        return fuzzer_mutate(data, size, max_size);
    }
    let damaged = run().case.damage_more(&data[..size], &random_bytes(seed));
    let n_bytes = damaged.len().min(max_size);
    data[..n_bytes].copy_from_slice(&damaged[..n_bytes]);
    n_bytes
});

fn run() -> &'static Run {
    RUN.get().expect("started before the first file")
}

/// Makes the valid files; puts them into the corpus, the first argument that is no flag.
fn start() {
    // The libraries report some malformed files by panics, which are caught; ours are looked at in `try_file`.
    std::panic::set_hook(Box::new(|_| ()));
    let name = std::env::var("OUNCE_FUZZ").unwrap_or_default();
    if name == "list" {
        Target::ALL.iter().for_each(|target| println!("{}", target.name()));
        std::process::exit(0);
    }
    let target = Target::ALL.into_iter().find(|target| target.name() == name);
    let Some(target) = target else {
        give_up("OUNCE_FUZZ names no parser; OUNCE_FUZZ=list prints them")
    };
    let seconds =
        std::env::var("OUNCE_FUZZ_SECONDS").map_or(Some(f64::INFINITY), |s| s.parse().ok());
    let Some(seconds) = seconds else { give_up("OUNCE_FUZZ_SECONDS is a number") };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let case = FuzzCase::new(target, dir.path()).expect("valid files can be written");
    let corpus = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    if let Some(corpus) = corpus.map(std::path::PathBuf::from).filter(|path| path.is_dir()) {
        for (i, valid) in case.valid().iter().enumerate() {
            std::fs::write(corpus.join(format!("valid-{i}")), valid)
                .expect("the corpus can be written");
        }
    }
    let zero = || AtomicU64::new(0);
    let run = Run { target, case, seconds, n_files: zero(), memory_millionths: zero(), _dir: dir };
    assert!(RUN.set(run).is_ok(), "libFuzzer starts once");
}

fn give_up(what: &str) -> ! {
    eprintln!("{what}");
    std::process::exit(2);
}

fn try_file(run: &'static Run, bytes: &[u8]) {
    let n_files = run.n_files.fetch_add(1, Ordering::Relaxed);
    let seconds = processor_seconds();
    if n_files.is_multiple_of(CLOCK_FILES) && seconds > run.seconds {
        end(run, n_files, seconds);
    }
    let before_bytes = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let try_it = || catch_unwind(AssertUnwindSafe(|| run.case.try_file(bytes)));
    // The tokenizers library keeps, as long as a thread lives, a table for every tokenizer that it has loaded.
    let tried = match run.target {
        Target::Gguf | Target::Tokenizer | Target::VocabMerges => {
            std::thread::scope(|s| s.spawn(try_it).join()).and_then(|tried| tried)
        }
        _ => try_it(),
    };
    let file_seconds = processor_seconds() - seconds;
    let grown_bytes = ALLOCATOR.peak_usage() - before_bytes;
    let share = grown_bytes as f64 / run.target.bound_bytes(bytes.len()) as f64;
    run.memory_millionths.fetch_max((share * 1e6) as u64, Ordering::Relaxed);
    let finding = match tried {
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            text.or(panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
        }
        Ok(_) if share > 1.0 => format!("{grown_bytes} bytes of memory"),
        Ok(_) if file_seconds > MAX_FILE_SECONDS => format!("{file_seconds:.1} s"),
        Ok(_) => return,
    };
    eprintln!("{}: {finding}", run.target.name());
    std::process::abort();
}

/// Ends the run the way that libFuzzer takes for no finding.
fn end(run: &Run, n_files: u64, seconds: f64) {
    let share = run.memory_millionths.load(Ordering::Relaxed) as f64 / 1e6;
    let report = json!({
        "target": run.target.name(),
        "n_files": n_files,
        "processor_s": seconds,
        "memory_share_of_bound": share,
    });
    println!("{report}");
    kill_process(getpid(), Signal::INT).expect("a process may interrupt itself");
}

/// What this process has used so far, on all its threads.
fn processor_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Up to 512 random bytes, often few (SplitMix64).
fn random_bytes(seed: u32) -> Vec<u8> {
    let mut state = u64::from(seed).wrapping_mul(0xD134_2543_DE82_EF95);
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

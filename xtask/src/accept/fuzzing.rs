//! The demonstration `fuzzing`: every parser under libFuzzer, for an hour of processor time each.
//!
//! Idea: fourteen hours are more than one sitting has. Each call gives every parser `--times N` seconds of processor
//! time (60 where it is not given), as many parsers at once as there are threads, and goes on with the corpus that the
//! calls before have left in the target directory. The claims are of all kept calls together. What was found lies
//! there, too, and each call begins with it, so that a finding is named until it is mended.
//!
//! The harness is a workspace of its own, `fuzz/`, built with the compiler's coverage counters, which need no nightly
//! compiler where no sanitizer is asked for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde_json::Value;

use crate::Result;
use crate::bench::last_object;
use crate::demonstration::{Outcome, Setting};
use crate::numbers::number;
use crate::record::kept;
use crate::shell::{capture, cargo, metadata, output_with, run_with};

const WANTED_S: f64 = 3600.0;
/// Seconds on the clock after which a file counts as one without end. The harness itself looks at processor time, which
/// other work beside it does not lengthen, once a file has ended.
const TIMEOUT: &str = "-timeout=600";
/// What libFuzzer calls slow goes by the clock as well.
const NO_SLOW_UNITS: &str = "-report_slow_units=600";
/// What libFuzzer calls a finding, in the names of the files that it leaves behind a parser's name.
const KINDS: [&str; 4] = ["crash", "timeout", "oom", "slow-unit"];
/// What is passed to rustc: counters per edge, comparisons seen by the fuzzer.
const RUSTFLAGS: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// What the calls so far have done for one parser.
#[derive(Default)]
struct Total {
    n_files: u64,
    processor_s: f64,
}

/// The demonstration.
pub(crate) fn fuzzing(s: &Setting<'_>) -> Result<Outcome> {
    let mut outcome = Outcome { is_kept: true, ..Outcome::default() };
    let folder =
        Path::new(metadata()?["target_directory"].as_str().unwrap_or("target")).join("fuzz");
    let fuzz = build(&folder)?;
    let mut totals = BTreeMap::new();
    for record in kept("accept fuzzing") {
        add(&mut totals, &record["result"]);
    }
    let targets = targets(&fuzz)?;
    for finding in try_again(&fuzz, &folder, &targets)? {
        outcome.claim(false, finding);
    }
    let slices = slices(&targets, &totals, s.times.unwrap_or(60));
    let waiting = Mutex::new(slices.iter().rev().collect::<Vec<_>>());
    let found = Mutex::new(Vec::new());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let n_threads = s.n_threads(cores)?;
    std::thread::scope(|scope| {
        for _ in 0..n_threads {
            scope.spawn(|| {
                loop {
                    // In the head of the loop the lock would be held while the parser runs.
                    let next = lock(&waiting).pop();
                    let Some((target, seconds)) = next else { break };
                    // Before the lock is taken, for the same reason.
                    let result = fuzz_one(&fuzz, &folder, target, *seconds);
                    lock(&found).push((target, result));
                }
            });
        }
    });
    for (target, result) in found.into_inner().unwrap_or_default() {
        match result {
            Ok(report) => {
                add(&mut totals, &report);
                outcome.runs.push(("ounce", target.clone(), report));
            }
            Err(finding) => outcome.claim(false, format!("{target}: {finding}")),
        }
    }
    judge(&mut outcome, &targets, &totals);
    Ok(outcome)
}

/// Builds the harness with coverage counters.
fn build(folder: &Path) -> Result<PathBuf> {
    let rustc = capture("rustc", &["-vV"])?;
    let host = rustc.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.ok_or("rustc -vV names no host")?;
    let target_dir = folder.to_string_lossy();
    // With a target named, build scripts and macros go without the counters.
    let args = ["build", "--release", "--locked", "--manifest-path", "fuzz/Cargo.toml"];
    let args = [&args[..], &["--target", host, "--target-dir", &target_dir]].concat();
    run_with(&cargo(), &args, &[("RUSTFLAGS", RUSTFLAGS)])?;
    Ok(folder.join(host).join("release/ounce-fuzz"))
}

/// The parsers that the harness knows.
fn targets(fuzz: &Path) -> Result<Vec<String>> {
    let output = output_with(&fuzz.to_string_lossy(), &[], &[("OUNCE_FUZZ", "list")])?;
    let names = String::from_utf8_lossy(&output.stdout);
    let names: Vec<String> = names.lines().map(str::to_owned).collect();
    if names.is_empty() { Err("the harness lists no parser".to_owned()) } else { Ok(names) }
}

/// The parsers of one call, each with its seconds: no more than its hour lacks, and all of `asked` where no hour lacks
/// any.
fn slices(targets: &[String], totals: &BTreeMap<String, Total>, asked: u64) -> Vec<(String, u64)> {
    let lacks = |target: &String| {
        let done_s = totals.get(target).map_or(0.0, |total| total.processor_s);
        (WANTED_S - done_s).max(0.0).ceil() as u64
    };
    let is_any_short = targets.iter().any(|target| lacks(target) > 0);
    let seconds = |target: &String| if is_any_short { lacks(target).min(asked) } else { asked };
    let slices = targets.iter().map(|target| (target.clone(), seconds(target)));
    slices.filter(|(_, seconds)| *seconds > 0).collect()
}

/// Gives what earlier calls have found to its parser again: what is still a finding. What is none any more is removed.
fn try_again(fuzz: &Path, folder: &Path, targets: &[String]) -> Result<Vec<String>> {
    let files = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut paths: Vec<PathBuf> = files.flatten().map(|file| file.path()).collect();
    paths.sort();
    let mut left = Vec::new();
    for path in paths.iter().filter(|path| path.is_file()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_of = |target: &&String| {
            KINDS.iter().any(|kind| name.starts_with(&format!("{target}-{kind}-")))
        };
        let Some(target) = targets.iter().find(is_of) else { continue };
        let args = [TIMEOUT, &path.to_string_lossy()];
        let output = output_with(&fuzz.to_string_lossy(), &args, &[("OUNCE_FUZZ", target)])?;
        if output.status.success() {
            println!("mended: {}", path.display());
            std::fs::remove_file(path).map_err(|e| format!("{}: {e}", path.display()))?;
        } else {
            let stderr = String::from_utf8_lossy(&output.stderr);
            left.push(format!("{}: {}", path.display(), what_was_found(target, &stderr)));
        }
    }
    Ok(left)
}

/// The lines that say what was found: the harness's, libFuzzer's, and where the file lies.
fn what_was_found(target: &str, stderr: &str) -> String {
    let ours = format!("{target}: ");
    let says = |line: &&str| {
        line.starts_with(&ours) || line.starts_with("SUMMARY: ") || line.contains("written to ")
    };
    stderr.lines().filter(says).collect::<Vec<_>>().join("; ")
}

/// Runs one parser; its report, or what was found.
fn fuzz_one(fuzz: &Path, folder: &Path, target: &str, seconds: u64) -> Result<Value> {
    let corpus = folder.join("corpus").join(target);
    std::fs::create_dir_all(&corpus).map_err(|e| format!("{}: {e}", corpus.display()))?;
    let findings = format!("-artifact_prefix={}/{target}-", folder.display());
    let args = [TIMEOUT, NO_SLOW_UNITS, "-rss_limit_mb=3000", &findings, &corpus.to_string_lossy()];
    let env = [("OUNCE_FUZZ", target), ("OUNCE_FUZZ_SECONDS", &seconds.to_string())];
    let output = output_with(&fuzz.to_string_lossy(), &args, &env)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    // A run that found nothing ends with its report; the exit code says that it was interrupted, which it does itself.
    let Ok(mut report) = last_object(&String::from_utf8_lossy(&output.stdout)) else {
        return Err(what_was_found(target, &stderr));
    };
    // A line such as `#187333 NEW    cov: 1218 ft: 2256 corp: 458/87Kb ...`.
    let last = stderr.lines().rev().find(|line| line.contains(" cov: ")).unwrap_or_default();
    report["edges"] = after(last, " cov: ").into();
    report["corpus_files"] = after(last, " corp: ").into();
    Ok(report)
}

/// The number behind a word in a line of libFuzzer's.
fn after(line: &str, word: &str) -> Option<u64> {
    let rest = line.split_once(word)?.1;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Adds one call's report, if it is one that was guided by coverage.
fn add(totals: &mut BTreeMap<String, Total>, report: &Value) {
    let (Some(target), Some(_), Ok(seconds)) =
        (report["target"].as_str(), report["edges"].as_u64(), number(report, "processor_s"))
    else {
        return;
    };
    let total = totals.entry(target.to_owned()).or_default();
    total.n_files += report["n_files"].as_u64().unwrap_or(0);
    total.processor_s += seconds;
}

fn judge(outcome: &mut Outcome, targets: &[String], totals: &BTreeMap<String, Total>) {
    for target in targets {
        let none = Total::default();
        let total = totals.get(target).unwrap_or(&none);
        let minutes = total.processor_s / 60.0;
        let what = format!("{target}: {} files in {minutes:.1} min, 60 asked", total.n_files);
        outcome.claim(total.processor_s >= WANTED_S, what);
    }
    let sum = |of: fn(&Total) -> f64| totals.values().map(of).fold(0.0, |a, b| a + b);
    println!(
        "{:.0} files in {:.1} hours",
        sum(|t| t.n_files as f64),
        sum(|t| t.processor_s) / 3600.0
    );
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn calls_add_up_and_those_without_coverage_are_not_counted() {
        let mut totals = BTreeMap::new();
        for n_files in [10, 5] {
            let report =
                json!({"target": "rows", "n_files": n_files, "processor_s": 1800.5, "edges": 7});
            add(&mut totals, &report);
        }
        add(&mut totals, &json!({"target": "rows", "n_files": 1, "processor_s": 1.0}));
        add(&mut totals, &json!({"verdict": "0 of 14 claims"}));
        assert_eq!((totals["rows"].n_files, totals.len()), (15, 1));
        let mut outcome = Outcome::default();
        judge(&mut outcome, &["rows", "text"].map(str::to_owned), &totals);
        assert_eq!(outcome.claims.iter().filter(|(_, holds)| *holds).count(), 1);
    }

    #[test]
    fn a_full_hour_waits_for_the_others() {
        let targets = ["rows", "text"].map(str::to_owned);
        let total = |processor_s| Total { n_files: 1, processor_s };
        let slices = |rows_s, text_s, asked| {
            let totals = [("rows".to_owned(), total(rows_s)), ("text".to_owned(), total(text_s))];
            let slices = slices(&targets, &BTreeMap::from(totals), asked);
            slices.into_iter().map(|(_, seconds)| seconds).collect::<Vec<_>>()
        };
        assert_eq!(slices(0.0, 3589.5, 60), [60, 11]);
        assert_eq!(slices(3600.0, 3589.5, 60), [11]);
        assert_eq!(slices(3600.0, 3700.0, 60), [60, 60]);
    }

    #[test]
    fn a_finding_is_told_without_the_noise_around_it() {
        let stderr = "INFO: Seed: 7\n#12 NEW cov: 3\nrows: 5470749613 bytes of memory\n==9== ERROR: libFuzzer\n\
            SUMMARY: libFuzzer: deadly signal\nartifact_prefix='t/rows-'; Test unit written to t/rows-crash-1\n";
        let expected = "rows: 5470749613 bytes of memory; SUMMARY: libFuzzer: deadly signal; \
            artifact_prefix='t/rows-'; Test unit written to t/rows-crash-1";
        assert_eq!(what_was_found("rows", stderr), expected);
    }

    #[test]
    fn numbers_are_read_from_a_line_of_libfuzzer() {
        let line = "#187333\tNEW    cov: 1218 ft: 2256 corp: 458/87Kb lim: 4096";
        assert_eq!((after(line, " cov: "), after(line, " corp: ")), (Some(1218), Some(458)));
        assert_eq!(after("INFO: seed corpus", " cov: "), None);
    }
}

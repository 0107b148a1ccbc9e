//! The demonstration `fuzzing`: every parser on damaged files, for an hour of processor time each.
//!
//! Idea: fourteen hours are more than one sitting has. Each call goes on where the kept results end: with the
//! seeds after the last ones, for `--times N` seconds of processor time per parser (60 where it is not given), as
//! many parsers at once as there are cores. The claims are of all calls together.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use serde_json::Value;

use crate::Result;
use crate::accept::{Outcome, Setting, number};
use crate::bench::last_object;
use crate::record::kept;
use crate::shell::{capture, cargo, run};

const TARGETS: [&str; 14] = [
    "safetensors",
    "index",
    "gguf",
    "config",
    "tokenizer",
    "vocab-merges",
    "text",
    "rows",
    "array",
    "parquet",
    "template",
    "token-cache",
    "manifest",
    "state",
];
const WANTED_S: f64 = 3600.0;

/// What the calls so far have done for one parser.
#[derive(Default)]
struct Total {
    n_files: u64,
    processor_s: f64,
    /// The first that was never tried.
    next_seed: u64,
}

/// The demonstration.
pub(crate) fn fuzzing(s: &Setting<'_>) -> Result<Outcome> {
    let mut outcome = Outcome { is_kept: true, ..Outcome::default() };
    let build = ["build", "--release", "--package", "ounce-io", "--example", "fuzz", "--locked"];
    run(&cargo(), &[&build[..], &["--all-features"]].concat())?;
    let fuzz = Path::new(&s.binary).with_file_name("examples").join("fuzz");
    let mut totals = BTreeMap::new();
    for record in kept("accept fuzzing") {
        add(&mut totals, &record["result"]);
    }
    let seconds = s.times.unwrap_or(60).to_string();
    let waiting = Mutex::new(TARGETS.iter().rev().copied().collect::<Vec<_>>());
    let found = Mutex::new(Vec::new());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let n_threads = s.n_threads(cores)?;
    std::thread::scope(|scope| {
        for _ in 0..n_threads {
            scope.spawn(|| {
                loop {
                    // In the head of the loop the lock would be held while the parser runs.
                    let next = lock(&waiting).pop();
                    let Some(target) = next else { break };
                    let seed = totals.get(target).map_or(0, |t: &Total| t.next_seed).to_string();
                    let args = [target, "--seconds", &seconds, "--seed", &seed];
                    let result = capture(&fuzz.to_string_lossy(), &args);
                    lock(&found).push((target, result));
                }
            });
        }
    });
    for (target, result) in found.into_inner().unwrap_or_default() {
        match result {
            Ok(text) => {
                let report = last_object(&text)?;
                add(&mut totals, &report);
                outcome.runs.push(("ounce", target.to_owned(), report));
            }
            Err(finding) => outcome.claim(false, format!("{target}: {finding}")),
        }
    }
    judge(&mut outcome, &totals);
    Ok(outcome)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Adds one call's report, if it is one.
fn add(totals: &mut BTreeMap<String, Total>, report: &Value) {
    let (Some(target), Ok(seconds)) = (report["target"].as_str(), number(report, "processor_s"))
    else {
        return;
    };
    let whole = |key: &str| report[key].as_u64().unwrap_or(0);
    let total = totals.entry(target.to_owned()).or_default();
    total.n_files += whole("n_files");
    total.processor_s += seconds;
    total.next_seed = total.next_seed.max(whole("seed") + whole("n_files"));
}

fn judge(outcome: &mut Outcome, totals: &BTreeMap<String, Total>) {
    for target in TARGETS {
        let none = Total::default();
        let total = totals.get(target).unwrap_or(&none);
        let minutes = total.processor_s / 60.0;
        let what = format!("{target}: {} files in {minutes:.1} min, 60 asked", total.n_files);
        outcome.claim(total.processor_s >= WANTED_S, what);
    }
    let sum = |of: fn(&Total) -> f64| totals.values().map(of).sum::<f64>();
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
    fn a_call_goes_on_behind_the_last_seed() {
        let mut totals = BTreeMap::new();
        for (seed, n_files) in [(0, 10), (10, 5)] {
            let report =
                json!({"target": "rows", "seed": seed, "n_files": n_files, "processor_s": 1800.5});
            add(&mut totals, &report);
        }
        add(&mut totals, &json!({"verdict": "0 of 14 claims"}));
        let rows = &totals["rows"];
        assert_eq!((rows.n_files, rows.next_seed, totals.len()), (15, 15, 1));
        let mut outcome = Outcome::default();
        judge(&mut outcome, &totals);
        assert_eq!(outcome.claims.iter().filter(|(_, holds)| *holds).count(), 1);
    }
}

//! Results of measurements, kept in history: `bench/runs/<date>-<machine>/`.
//!
//! `raw.jsonl` holds one object per run as it was measured; `summary.md` is a table made from all of
//! it. Runs of the same day and machine go into the same folder.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::Result;
use crate::shell::{capture, json_lines, root};

/// One run.
pub(crate) struct Record<'a> {
    /// The chore, such as `bench step`.
    pub(crate) what: &'a str,
    /// Who ran: `ounce` or `torch`.
    pub(crate) engine: &'a str,
    /// What was run, such as `gpt2 4x1024 f32, 2 threads`.
    pub(crate) setting: &'a str,
    /// `keys` of `result` that go into the table, if they are there.
    pub(crate) result: &'a Value,
}

/// Keys of a result that the table shows.
const COLUMNS: &[(&str, &str)] = &[
    ("tok_per_s", "tok/s"),
    ("step_s_median", "step s"),
    ("predicted_step_s", "predicted s"),
    ("peak_rss_mib", "peak MiB"),
    ("plan_peak_mib", "planned MiB"),
    ("budget_mib", "budget MiB"),
    ("eval_loss", "eval loss"),
    ("verdict", "verdict"),
    ("n_files", "files"),
    ("processor_s", "processor s"),
    ("edges", "edges"),
    ("kernel", "kernel"),
    ("gflop_per_s", "GFLOP/s"),
    ("gb_per_s", "GB/s"),
    ("share", "share of the peak"),
];

/// Appends records to today's folder and writes the table anew; returns the folder.
pub(crate) fn keep(records: &[Record<'_>]) -> Result<PathBuf> {
    let folder = root().join("bench/runs").join(format!("{}-{}", today(), machine()));
    let commit = capture("git", &["describe", "--always", "--dirty"]).unwrap_or_default();
    let mut lines = String::new();
    for r in records {
        let line = json!({
            "what": r.what, "engine": r.engine, "setting": r.setting, "commit": commit.trim(),
            "result": r.result,
        });
        lines.push_str(&line.to_string());
        lines.push('\n');
    }
    let raw = folder.join("raw.jsonl");
    let before = std::fs::read_to_string(&raw).unwrap_or_default();
    let all = before + &lines;
    let write = |path: PathBuf, text: &str| {
        std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))
    };
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    write(raw, &all)?;
    write(folder.join("summary.md"), &summary(&json_lines(&all)))?;
    println!("kept in {}", folder.strip_prefix(root()).unwrap_or(&folder).display());
    Ok(folder)
}

/// The records of a chore on all days and machines, in no order.
pub(crate) fn kept(what: &str) -> Vec<Value> {
    let folders = std::fs::read_dir(root().join("bench/runs")).into_iter().flatten().flatten();
    let texts = folders.filter_map(|f| std::fs::read_to_string(f.path().join("raw.jsonl")).ok());
    texts.flat_map(|text| json_lines(&text)).filter(|record| record["what"] == what).collect()
}

fn summary(records: &[Value]) -> String {
    let mut text = format!("# Runs of {} on {}\n\n", today(), cpu_model());
    text.push_str(
        "From `raw.jsonl`, in order of measurement.\n\n| what | engine | setting | commit |",
    );
    let shown: Vec<_> = COLUMNS
        .iter()
        .filter(|(key, _)| records.iter().any(|r| !r["result"][key].is_null()))
        .collect();
    for (_, title) in &shown {
        let _ = write!(text, " {title} |");
    }
    let _ = writeln!(text, "\n|---|---|---|---|{}", "---|".repeat(shown.len()));
    for r in records {
        let word = |key: &str| r[key].as_str().unwrap_or("").to_owned();
        let (what, engine, setting, commit) =
            (word("what"), word("engine"), word("setting"), word("commit"));
        let _ = write!(text, "| {what} | {engine} | {setting} | {commit} |");
        for (key, _) in &shown {
            let _ = write!(text, " {} |", cell(&r["result"][key]));
        }
        text.push('\n');
    }
    text
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(s) => s.clone(),
        Value::Number(n) => match n.as_f64() {
            Some(x) if n.is_f64() && x.abs() >= 100.0 => format!("{x:.1}"),
            Some(x) if n.is_f64() => format!("{x:.4}"),
            _ => n.to_string(),
        },
        other => other.to_string(),
    }
}

/// Today in UTC, as `2026-11-22`.
fn today() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (y, m, d) = civil_date(since.as_secs() / 86_400);
    format!("{y}-{m:02}-{d:02}")
}

/// Year, month and day of a day counted from 1970-01-01, by counting.
fn civil_date(mut day: u64) -> (u64, usize, u64) {
    let is_leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let mut year = 1970;
    while day >= 365 + u64::from(is_leap(year)) {
        day -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let months = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= months[month] {
        day -= months[month];
        month += 1;
    }
    (year, month + 1, day + 1)
}

fn cpu_model() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {cores} cores", model.map_or(std::env::consts::ARCH, |(_, name)| name))
}

/// The processor's name as a folder name, such as `amd-epyc-9r14-2-cores`.
fn machine() -> String {
    let words: Vec<String> = cpu_model()
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|w| !w.is_empty() && *w != "Processor")
        .map(str::to_ascii_lowercase)
        .collect();
    words.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(civil_date(0), (1970, 1, 1));
        assert_eq!(civil_date(59), (1970, 3, 1));
        assert_eq!(civil_date(11_016), (2000, 2, 29));
        assert_eq!(civil_date(20_779), (2026, 11, 22));
    }

    #[test]
    fn the_table_shows_the_columns_that_have_numbers() {
        let records = [
            json!({"what": "bench step", "engine": "ounce", "setting": "gpt2", "commit": "abc",
                "result": {"tok_per_s": 140.25, "peak_rss_mib": 1900}}),
            json!({"what": "bench step", "engine": "torch", "setting": "gpt2", "commit": "abc",
                "result": {"tok_per_s": 112.0}}),
        ];
        let text = summary(&records);
        assert!(
            text.contains("| what | engine | setting | commit | tok/s | peak MiB |\n"),
            "{text}"
        );
        assert!(text.contains("| bench step | ounce | gpt2 | abc | 140.2 | 1900 |"), "{text}");
        assert!(text.contains("| bench step | torch | gpt2 | abc | 112.0 |  |"), "{text}");
    }
}

//! Instructions per kernel, where seconds are too noisy to tell a regression.
//!
//! Valgrind's callgrind runs every kernel once on one thread and counts what that call executes: the
//! same number each time, whatever else the machine does. Valgrind has no AVX-512, so the kernels
//! run on tier avx2 there; a regression of one tier only does not show. Counts belong to a compiler:
//! `bench/instructions.json` names the one that made it, and counts of another are shown, not judged.

use serde_json::{Map, Value, json};

use crate::Result;
use crate::shell::{capture, cargo, output, root};

/// Counts that are kept.
const KEPT: &str = "bench/instructions.json";
/// More than so many per cent above what is kept is a regression.
const MOST_GROWTH: f64 = 3.0;

/// `bench instructions [--keep]`: counts beside those kept; `--keep` puts them in their place.
pub(crate) fn instructions(args: &[&str]) -> Result {
    let keeps = match args {
        [] => false,
        ["--keep"] => true,
        _ => return Err("bench instructions takes --keep or nothing".to_owned()),
    };
    let (program, compiler) = (build()?, capture("rustc", &["--version"])?.trim().to_owned());
    let names = capture(&program, &[])?;
    let path = root().join(KEPT);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|_| "{}".to_owned());
    let kept: Value = serde_json::from_str(&text).map_err(|e| format!("{KEPT}: {e}"))?;
    let is_comparable = kept["compiler"] == json!(compiler);
    let mut counts = Map::new();
    let mut grown = Vec::new();
    for name in names.lines() {
        let n = count(&program, name)?;
        let change = kept["counts"][name].as_f64().map(|old| 100.0 * (n as f64 / old - 1.0));
        let shown = change.map_or_else(|| "new".to_owned(), |change| format!("{change:+.2} %"));
        println!("{name:<24} {n:>12} instructions {shown:>10}");
        if change.is_some_and(|change| change > MOST_GROWTH) {
            grown.push(format!("{name} {shown}"));
        }
        counts.insert(name.to_owned(), json!(n));
    }
    if keeps {
        let all = json!({"compiler": compiler, "tier": "avx2", "counts": counts});
        let text = serde_json::to_string_pretty(&all).expect("a map of numbers is JSON") + "\n";
        return std::fs::write(&path, text).map_err(|e| format!("{KEPT}: {e}"));
    }
    if !is_comparable {
        println!("not judged: {KEPT} was made by {}, this is {compiler}", kept["compiler"]);
        return Ok(());
    }
    if grown.is_empty() {
        return Ok(());
    }
    let grown = grown.join(", ");
    Err(format!(
        "more than {MOST_GROWTH} % above {KEPT}: {grown}\nhint: if it is worth it, \
         `cargo xtask bench instructions --keep`"
    ))
}

/// Builds the program of the kernels and returns its path.
fn build() -> Result<String> {
    let args = ["build", "--release", "--locked", "--package", "ounce-kernels"];
    let args = [&args[..], &["--example", "kernel_count", "--message-format", "json"]].concat();
    let messages = capture(&cargo(), &args)?;
    let built = crate::shell::json_lines(&messages);
    let path = built.iter().rev().find_map(|m| m["executable"].as_str());
    path.map(str::to_owned).ok_or_else(|| "cargo names no executable".to_owned())
}

/// Instructions of one call.
fn count(program: &str, name: &str) -> Result<u64> {
    let args = [
        "--tool=callgrind",
        "--callgrind-out-file=/dev/null",
        "--collect-atstart=no",
        "--toggle-collect=*counted_region*",
        program,
        name,
    ];
    let done = output("valgrind", &args)
        .map_err(|e| format!("{e}\nhint: install valgrind, `apt-get install valgrind`"))?;
    let said = String::from_utf8_lossy(&done.stderr);
    let found = said.lines().find_map(collected);
    match found {
        Some(n) if done.status.success() && n > 0 => Ok(n),
        _ => Err(format!("valgrind counted nothing for {name}: {}\n{said}", done.status)),
    }
}

/// The number in callgrind's last line but one: `==7== Collected : 1234`.
fn collected(line: &str) -> Option<u64> {
    line.split_once("Collected : ")?.1.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_read_from_what_valgrind_says() {
        assert_eq!(collected("==7== Collected : 1234"), Some(1234));
        assert_eq!(collected("==7== I   refs:      1,234"), None);
    }
}

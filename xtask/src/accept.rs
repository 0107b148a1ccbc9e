//! Demonstrations: each runs the release binary as a user would, reads its JSON lines, and judges
//! claims. What was measured and whether the claims held is kept under `bench/runs`.
//!
//! To add one: a function that returns claims and results, and a line in [`DEMONSTRATIONS`].

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::Result;
use crate::budgets::gpt2_budgets;
use crate::cgroup_runs::cgroup_runs;
use crate::finetuning::finetuning;
use crate::fuzzing::fuzzing;
use crate::grid::grid;
use crate::killed::killed;
use crate::nanogpt::nanogpt;
use crate::plan_times::plan_times;
use crate::record::{Record, keep};
use crate::shell::{capture, flag, release_binary, root};
use crate::smoke::smoke;
use crate::smollm2::smollm2;
use crate::speed::speed;
use crate::tokenising::tokenising;

const FLAGS: &[&str] = &[
    "--python",
    "--threads",
    "--times",
    "--seed",
    "--precision",
    "--model",
    "--gguf",
    "--data",
    "--llama-python",
];

pub(crate) const MIB: f64 = 1024.0 * 1024.0;

/// Name, what it shows, and the function.
type Demonstration = (&'static str, &'static str, fn(&Setting<'_>) -> Result<Outcome>);

const DEMONSTRATIONS: &[Demonstration] = &[
    ("smoke", "init, plan, train, eval and generate in a small budget, in seconds", smoke),
    ("nanogpt", "nanoGPT's CPU recipe on tinyshakespeare in 48 MiB: loss and time", nanogpt),
    (
        "gpt2-budgets",
        "GPT-2 124M, 4 x 1024, from unconstrained to the smallest budget",
        gpt2_budgets,
    ),
    (
        "speed",
        "training steps of three models beside PyTorch: speed, memory, share of the peak",
        speed,
    ),
    ("grid", "GPT-2 124M in f32 and bf16, from everything kept to the smallest budget", grid),
    ("plan-times", "predicted and measured time of many plans of a small GPT-2", plan_times),
    ("killed", "kill -9 at random moments of a run that saves, then the same bits", killed),
    ("smollm2", "SmolLM2-135M-Instruct as GGUF: loss and tokens as in other engines", smollm2),
    ("finetuning", "SmolLM2-135M on GSM8K in bf16, in 2 GiB, and the result elsewhere", finetuning),
    ("tokenising", "JSONL of growing length: peak, throughput, ids of the peer", tokenising),
    ("fuzzing", "every parser on damaged files, an hour of processor time each", fuzzing),
    ("cgroup-runs", "random models in memory cgroups of their budgets' sizes", cgroup_runs),
];

/// What a demonstration runs with.
pub(crate) struct Setting<'a> {
    /// The release binary of this commit: results are recorded under it.
    pub(crate) binary: String,
    /// A Python with torch or tokenizers, for the other side.
    pub(crate) python: Option<&'a str>,
    pub(crate) threads: Option<&'a str>,
    /// Of training, where a demonstration has more than one.
    pub(crate) precision: Option<&'a str>,
    /// How often, in a demonstration that repeats; a whole one where it is not given.
    pub(crate) times: Option<u64>,
    /// Of random choices; from the clock where it is not given.
    pub(crate) seed: Option<u64>,
    /// One of the models of a demonstration that has several.
    pub(crate) model: Option<&'a str>,
    /// A pretrained model.
    pub(crate) gguf: Option<&'a str>,
    /// A data set.
    pub(crate) data: Option<&'a str>,
    /// A Python with llama-cpp-python.
    pub(crate) llama_python: Option<&'a str>,
}

/// What a demonstration found.
#[derive(Default)]
pub(crate) struct Outcome {
    /// What was claimed, with numbers, and whether it held.
    pub(crate) claims: Vec<(String, bool)>,
    /// Engine, setting and result of each run.
    pub(crate) runs: Vec<(&'static str, String, Value)>,
    /// Whether the runs are worth keeping.
    pub(crate) is_kept: bool,
}

impl Outcome {
    /// Claims that something never happened; `cases` are those where it did.
    pub(crate) fn claim_none(&mut self, what: &str, cases: &[String]) {
        let shown = &cases[..cases.len().min(3)];
        let shown =
            if shown.is_empty() { String::new() } else { format!(" ({})", shown.join("; ")) };
        self.claim(cases.is_empty(), format!("{what}: {}{shown}", cases.len()));
    }

    pub(crate) fn claim(&mut self, holds: bool, what: String) {
        println!("{} {what}", if holds { "holds:" } else { "DOES NOT HOLD:" });
        self.claims.push((what, holds));
    }
}

/// `cargo xtask accept NAME`
pub(crate) fn accept(args: &[&str]) -> Result {
    let Some((name, flags)) = args.split_first() else {
        for (name, what, _) in DEMONSTRATIONS {
            println!("{name:<14} {what}");
        }
        return Ok(());
    };
    let found = DEMONSTRATIONS.iter().find(|(n, _, _)| n == name);
    let (_, what, run) = found.ok_or_else(|| format!("no demonstration is called {name}"))?;
    let setting = Setting {
        python: flag(flags, "--python", FLAGS)?,
        threads: flag(flags, "--threads", FLAGS)?,
        precision: flag(flags, "--precision", FLAGS)?,
        times: whole(flag(flags, "--times", FLAGS)?)?,
        seed: whole(flag(flags, "--seed", FLAGS)?)?,
        model: flag(flags, "--model", FLAGS)?,
        gguf: flag(flags, "--gguf", FLAGS)?,
        data: flag(flags, "--data", FLAGS)?,
        llama_python: flag(flags, "--llama-python", FLAGS)?,
        binary: release_binary()?,
    };
    println!("{name}: {what}");
    let mut outcome = run(&setting)?;
    let broken: Vec<&str> =
        outcome.claims.iter().filter(|(_, holds)| !holds).map(|(what, _)| what.as_str()).collect();
    let verdict =
        format!("{} of {} claims", outcome.claims.len() - broken.len(), outcome.claims.len());
    if outcome.is_kept {
        let claims: Vec<Value> = outcome
            .claims
            .iter()
            .map(|(what, holds)| json!({"what": what, "holds": holds}))
            .collect();
        let judged = json!({"verdict": verdict, "claims": claims});
        outcome.runs.push(("ounce", (*what).to_owned(), judged));
        let label = format!("accept {name}");
        let records: Vec<Record<'_>> = outcome
            .runs
            .iter()
            .map(|(engine, setting, result)| Record { what: &label, engine, setting, result })
            .collect();
        keep(&records)?;
    }
    println!("{name}: {verdict} hold");
    if broken.is_empty() { Ok(()) } else { Err(format!("does not hold: {}", broken.join("; "))) }
}

/// A flag's whole number.
fn whole(text: Option<&str>) -> Result<Option<u64>> {
    let parse = |text: &str| text.parse().map_err(|_| format!("{text:?} is not a whole number"));
    text.map(parse).transpose()
}

impl Setting<'_> {
    /// Runs `ounce` with these arguments; it must succeed. Returns standard output.
    pub(crate) fn ounce(&self, args: &[&str]) -> Result<String> {
        capture(&self.binary, args)
    }

    /// `--threads N`, else `cores`.
    pub(crate) fn n_threads(&self, cores: usize) -> Result<usize> {
        Ok(whole(self.threads)?.map_or(cores, |n| n as usize))
    }

    /// `--threads N`, if N was given.
    pub(crate) fn thread_args(&self) -> Vec<&str> {
        self.threads.into_iter().flat_map(|n| ["--threads", n]).collect()
    }
}

pub(crate) fn number(value: &Value, key: &str) -> Result<f64> {
    value[key].as_f64().ok_or_else(|| format!("no number {key:?} in {value}"))
}

pub(crate) fn path(p: &Path) -> &str {
    p.to_str().expect("the path of a scratch folder is UTF-8")
}

/// The text that ships with the repository: its first 90 % of characters for training, the rest for evaluation.
pub(crate) fn shakespeare(folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let source = root().join("data/tinyshakespeare.txt");
    let text =
        std::fs::read_to_string(&source).map_err(|e| format!("{}: {e}", source.display()))?;
    let n_train = text.chars().count() * 9 / 10;
    let cut = text.char_indices().nth(n_train).map_or(text.len(), |(at, _)| at);
    let (train, validation) = (folder.join("train.txt"), folder.join("validation.txt"));
    for (file, part) in [(&train, &text[..cut]), (&validation, &text[cut..])] {
        std::fs::write(file, part).map_err(|e| format!("{}: {e}", file.display()))?;
    }
    Ok((train, validation))
}

/// A small GPT-2 with random weights and a character tokenizer of that text.
pub(crate) fn fresh_model(s: &Setting<'_>, folder: &Path, text: &Path) -> Result<PathBuf> {
    let fresh = folder.join("fresh");
    let sizes = ["--n-layers", "1", "--hidden-size", "32", "--context-length", "64"];
    let init = ["init", "--arch", "gpt2", "--tokenizer", "char", "--data", path(text)];
    s.ounce(&[&init[..], &sizes, &["--output-dir", path(&fresh)]].concat())?;
    Ok(fresh)
}

/// The figure after `smallest feasible budget: ` as an argument of `--memory`.
pub(crate) fn smallest_budget(stderr: &str) -> Option<String> {
    let (_, rest) = stderr.split_once("smallest feasible budget: ")?;
    let mut words = rest.split_whitespace();
    let amount = words.next()?.trim_end_matches([',', ';', '.']);
    let unit = words.next().unwrap_or_default();
    // `61.5 MiB` or `61.5MiB`.
    let has_unit = amount.ends_with('B');
    let unit = unit.trim_end_matches(|c: char| !c.is_ascii_alphabetic());
    Some(if has_unit { amount.to_owned() } else { format!("{amount}{unit}") })
}

pub(crate) fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    match numbers.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => numbers[n / 2],
        n => f64::midpoint(numbers[n / 2 - 1], numbers[n / 2]),
    }
}

/// A figure such as `1800MiB` or `2GiB` in MiB.
pub(crate) fn mib(memory: &str) -> Result<f64> {
    let digits = memory.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let amount: f64 = digits.trim().parse().map_err(|_| format!("{memory:?} is not an amount"))?;
    match &memory[digits.len()..] {
        "GiB" => Ok(amount * 1024.0),
        "MiB" => Ok(amount),
        "KiB" => Ok(amount / 1024.0),
        "B" => Ok(amount / MIB),
        unit => Err(format!("{unit:?} is not a unit")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_budget_is_read_from_the_message() {
        let told = |text: &str| smallest_budget(text);
        assert_eq!(told("x\nsmallest feasible budget: 61 MiB\n"), Some("61MiB".to_owned()));
        assert_eq!(
            told("smallest feasible budget: 61.5 MiB (planned)"),
            Some("61.5MiB".to_owned())
        );
        assert_eq!(
            told("smallest feasible budget: 64000000B, of which"),
            Some("64000000B".to_owned())
        );
        assert_eq!(told("nothing"), None);
    }

    #[test]
    fn amounts_are_read_in_mib() {
        assert_eq!(mib("2GiB"), Ok(2048.0));
        assert_eq!(mib("61.5MiB"), Ok(61.5));
        assert_eq!(mib("1048576B"), Ok(1.0));
        assert!(mib("12 parsecs").is_err());
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
    }
}

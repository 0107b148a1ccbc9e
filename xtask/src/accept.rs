//! Demonstrations: each runs the release binary as a user would, reads its JSON lines, and judges
//! claims. What was measured and whether the claims held is kept under `bench/runs`.
//!
//! To add one: a function that returns claims and results, and a line in [`DEMONSTRATIONS`].

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::Result;
use crate::bench::last_object;
use crate::budgets::gpt2_budgets;
use crate::cgroup_runs::cgroup_runs;
use crate::finetuning::finetuning;
use crate::fuzzing::fuzzing;
use crate::grid::grid;
use crate::killed::killed;
use crate::plan_times::plan_times;
use crate::record::{Record, keep};
use crate::shell::{capture, flag, json_lines, output, release_binary, root, scratch_folder};
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
    let parse = |text: &str| text.parse().map_err(|_| format!("{text:?} is no whole number"));
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

// ---- smoke ---------------------------------------------------------------------------------

/// A tiny model through every command. Seconds; part of CI.
fn smoke(s: &Setting<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let folder = scratch_folder("accept-smoke")?;
    let (train, validation) = shakespeare(&folder)?;
    let (fresh, trained) = (folder.join("fresh"), folder.join("trained"));
    let sizes =
        ["--n-layers", "2", "--n-heads", "2", "--hidden-size", "64", "--context-length", "64"];
    let init = ["init", "--arch", "gpt2", "--tokenizer", "char", "--data", path(&train)];
    s.ounce(&[&init[..], &sizes, &["--output-dir", path(&fresh)]].concat())?;
    let recipe = ["--model", path(&fresh), "--data", path(&train), "--max-length", "64"];
    let budget = ["--per-device-train-batch-size", "8", "--memory", "64MiB", "--json"];
    let recipe = [&recipe[..], &budget].concat();

    let plan = last_object(&s.ounce(&[&["plan"], &recipe[..]].concat())?)?;
    let planned = number(&plan, "peak_bytes")?;
    outcome.claim(planned <= 64.0 * MIB, format!("planned peak {:.1} MiB of 64", planned / MIB));

    let more = ["--eval-data", path(&validation), "--output-dir", path(&trained)];
    let steps = ["--max-steps", "40", "--learning-rate", "1e-3", "--lr-scheduler-type", "constant"];
    let lines = json_lines(&s.ounce(&[&["train"], &recipe[..], &more, &steps].concat())?);
    let losses: Vec<f64> = lines.iter().filter_map(|l| l["loss"].as_f64()).collect();
    let (first, last) = (losses.first().copied().unwrap_or(0.0), losses.last().copied());
    let last = last.unwrap_or(f64::INFINITY);
    outcome.claim(losses.len() == 40, format!("{} of 40 steps printed", losses.len()));
    outcome.claim(last < first - 0.5, format!("loss falls from {first:.3} to {last:.3}"));
    let done = lines.last().ok_or("train printed nothing")?;
    let peak = number(done, "rss_peak_bytes")?;
    outcome.claim(peak <= 64.0 * MIB, format!("measured peak {:.1} MiB of 64", peak / MIB));

    let eval =
        ["eval", "--model", path(&trained), "--data", path(&validation), "--max-length", "64"];
    let eval = last_object(&s.ounce(&[&eval[..], &["--json"]].concat())?)?;
    let (said, found) = (number(done, "eval_loss")?, number(&eval, "loss")?);
    outcome.claim(said == found, format!("train says eval loss {said}, eval says {found}"));

    let prompt = ["--prompt", "ROMEO:", "--temperature", "0", "--max-new-tokens", "20"];
    let text = s.ounce(&[&["generate", "--model", path(&trained)], &prompt[..]].concat())?;
    let chars = text.strip_suffix('\n').unwrap_or(&text).chars().count();
    outcome.claim(chars == 20, format!("a continuation of {chars} characters, 20 asked for"));
    let doctor = last_object(&s.ounce(&["doctor", "--json"])?)?;
    let speeds: Vec<f64> = doctor["models"]
        .as_array()
        .map(|models| models.iter().filter_map(|m| m["tokens_per_s"].as_f64()).collect())
        .unwrap_or_default();
    let what = format!("doctor expects {speeds:.0?} tokens/s of known models");
    outcome.claim(!speeds.is_empty() && speeds.iter().all(|&x| x > 0.0), what);
    smoke_smallest(s, &mut outcome, &[&recipe[..6], &recipe[6..8], &steps[2..]].concat(), &losses)?;
    Ok(outcome)
}

/// A far too small budget is refused with the smallest feasible one; that very figure works, and
/// gives the same losses on one thread.
fn smoke_smallest(s: &Setting<'_>, o: &mut Outcome, recipe: &[&str], losses: &[f64]) -> Result {
    let folder = scratch_folder("accept-smoke-smallest")?;
    let steps = ["--max-steps", "5", "--output-dir", path(&folder), "--json"];
    let train = [&["train"], recipe, &steps].concat();
    let refused = output(&s.binary, &[&train[..], &["--memory", "1MiB"]].concat())?;
    let code = refused.status.code();
    o.claim(code == Some(3), format!("a budget of 1 MiB exits with {code:?}, 3 is right"));
    let stderr = String::from_utf8_lossy(&refused.stderr);
    let Some(smallest) = smallest_budget(&stderr) else {
        o.claim(false, format!("the smallest feasible budget is told in {stderr:?}"));
        return Ok(());
    };
    let lines = s.ounce(&[&train[..], &["--memory", &smallest, "--threads", "1"]].concat())?;
    let lines = json_lines(&lines);
    let tight: Vec<f64> = lines.iter().filter_map(|l| l["loss"].as_f64()).collect();
    let same = tight.len() == 5 && losses.starts_with(&tight);
    o.claim(same, format!("{smallest} on one thread: the same losses, {tight:?}"));
    let peak = number(lines.last().ok_or("train printed nothing")?, "rss_peak_bytes")? / MIB;
    o.claim(peak <= mib(&smallest)?, format!("{smallest}: measured peak {peak:.2} MiB"));
    Ok(())
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

// ---- nanogpt -------------------------------------------------------------------------------

const NANOGPT_STEPS: &str = "2000";
/// What f16 begins with here: it overflows, and the run must find its way down by itself.
const TOO_LARGE_SCALE: &str = "16777216";

/// Three seeds of nanoGPT's recipe; if a Python with torch is given, its time per step beside it. In
/// 16 bits each seed runs in f32 too, and the losses are compared; f16 begins with a loss scale of 2^24.
fn nanogpt(s: &Setting<'_>) -> Result<Outcome> {
    let mut outcome = Outcome { is_kept: true, ..Outcome::default() };
    let folder = scratch_folder("accept-nanogpt")?;
    let (train, validation) = shakespeare(&folder)?;
    let precision = s.precision.unwrap_or("f32");
    let (mut losses, mut wide_losses) = (Vec::new(), Vec::new());
    let mut step_s = Vec::new();
    let mut peer_s = Vec::new();
    for seed in ["1337", "1338", "1339"] {
        let (fresh, trained) = (folder.join(format!("fresh-{seed}")), folder.join(seed));
        nanogpt_init(s, &fresh, &train, seed)?;
        let files =
            ["--model", path(&fresh), "--data", path(&train), "--eval-data", path(&validation)];
        let run = |precision: &str, out: &Path| -> Result<Vec<Value>> {
            let own = ["--output-dir", path(out), "--seed", seed, "--precision", precision];
            let scale: &[&str] =
                if precision == "f16" { &["--init-loss-scale", TOO_LARGE_SCALE] } else { &[] };
            let args = [&["train"], &files[..], NANOGPT, &own, scale, &s.thread_args()].concat();
            Ok(json_lines(&s.ounce(&args)?))
        };
        let lines = run(precision, &trained)?;
        let mut done = lines.last().cloned().ok_or("train printed nothing")?;
        let peak = number(&done, "rss_peak_bytes")?;
        outcome.claim(peak <= 48.0 * MIB, format!("seed {seed}: peak {:.2} MiB of 48", peak / MIB));
        losses.push(number(&done, "eval_loss")?);
        if precision == "f16" {
            let skipped = number(&done, "skipped_steps")?;
            let what = format!("seed {seed}: {skipped} steps skipped from a loss scale of 2^24 on");
            outcome.claim((1.0..=40.0).contains(&skipped), what);
        }
        if precision != "f32" {
            let wide = run("f32", &folder.join(format!("{seed}-f32")))?;
            let wide = wide.last().cloned().ok_or("train printed nothing")?;
            wide_losses.push(number(&wide, "eval_loss")?);
            outcome.runs.push(("ounce", format!("nanoGPT recipe, seed {seed}, f32"), wide));
        }
        let times: Vec<f64> = lines.iter().filter_map(|l| l["step_s"].as_f64()).collect();
        step_s.push(median(times));
        done["step_s_median"] = json!(step_s.last());
        done["peak_rss_mib"] = json!(peak / MIB);
        done["budget_mib"] = json!(48);
        outcome.runs.push(("ounce", format!("nanoGPT recipe, seed {seed}, {precision}"), done));
        if let Some(python) = s.python {
            let peer = ["bench/peer_nanogpt.py", "--iters", "400", "--no-eval", "--seed", seed];
            let text = capture(python, &[&peer[..], &s.thread_args()].concat())?;
            let mut result = last_object(&text)?;
            peer_s.push(number(&result, "ms_per_iter_median")? / 1e3);
            result["step_s_median"] = json!(peer_s.last());
            outcome.runs.push(("torch", format!("nanoGPT recipe, seed {seed}"), result));
        }
    }
    let mean = losses.iter().sum::<f64>() / losses.len() as f64;
    outcome.claim(mean <= 1.90, format!("mean validation loss {mean:.4}, at most 1.90"));
    if precision != "f32" {
        let (holds, what) = compare_losses(precision, &losses, &wide_losses);
        outcome.claim(holds, what);
    }
    if peer_s.is_empty() {
        println!("time is not judged: no --python with torch was given");
    } else {
        let (ours, theirs) = (median(step_s) * 1e3, median(peer_s) * 1e3);
        let share = 100.0 * ours / theirs;
        let what =
            format!("{ours:.1} ms per step, {theirs:.1} in PyTorch: {share:.0} %, at most 80 %");
        outcome.claim(share <= 80.0, what);
    }
    Ok(outcome)
}

/// Whether the mean validation loss in 16 bits is that in f32 within 0.01, with the seeds' own.
fn compare_losses(precision: &str, narrow: &[f64], wide: &[f64]) -> (bool, String) {
    let apart: Vec<f64> = narrow.iter().zip(wide).map(|(n, w)| n - w).collect();
    let mean = apart.iter().sum::<f64>() / apart.len() as f64;
    let seeds: Vec<String> = apart.iter().map(|d| format!("{d:+.4}")).collect();
    let what = format!(
        "mean validation loss in {precision} less that in f32: {mean:+.4} ({}), within 0.01",
        seeds.join(", ")
    );
    (mean.abs() <= 0.01, what)
}

/// The recipe, as flags.
const NANOGPT: &[&str] = &[
    "--memory",
    "48MiB",
    "--max-length",
    "64",
    "--per-device-train-batch-size",
    "12",
    "--max-steps",
    NANOGPT_STEPS,
    "--learning-rate",
    "1e-3",
    "--lr-scheduler-type",
    "cosine",
    "--min-lr-ratio",
    "0.1",
    "--warmup-steps",
    "100",
    "--weight-decay",
    "0.1",
    "--adam-beta2",
    "0.99",
    "--max-grad-norm",
    "1.0",
    "--json",
];

fn nanogpt_init(s: &Setting<'_>, fresh: &Path, data: &Path, seed: &str) -> Result {
    let config = fresh.with_extension("json");
    let text = json!({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu",
        "n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 64, "vocab_size": 65,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": true,
        "bos_token_id": null, "eos_token_id": null,
    });
    std::fs::write(&config, text.to_string()).map_err(|e| format!("{}: {e}", config.display()))?;
    let args = ["init", "--config", path(&config), "--tokenizer", "char", "--data", path(data)];
    s.ounce(&[&args[..], &["--output-dir", path(fresh), "--seed", seed]].concat()).map(|_| ())
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
    let amount: f64 = digits.trim().parse().map_err(|_| format!("{memory:?} is no amount"))?;
    match &memory[digits.len()..] {
        "GiB" => Ok(amount * 1024.0),
        "MiB" => Ok(amount),
        "KiB" => Ok(amount / 1024.0),
        "B" => Ok(amount / MIB),
        unit => Err(format!("{unit:?} is no unit")),
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

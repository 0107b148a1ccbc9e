//! Speed: whole training steps side by side with PyTorch, and kernels beside the machine's peak.
//!
//! Sides alternate (A B A B), so that a disturbance of the machine hits both.

use serde_json::Value;

use crate::Result;
use crate::demonstration::Setting;
use crate::numbers::{median, number, smallest_budget};
use crate::record::{Record, keep};
use crate::shell::{capture, cargo, flag, json_lines, output, release_binary};

const FLAGS: &[&str] = &[
    "--model",
    "--batch-size",
    "--max-length",
    "--steps",
    "--rounds",
    "--memory",
    "--threads",
    "--python",
    "--precision",
    "--peers",
];

/// Ounce's presets and their names in `bench/peer_torch.py`.
const PEER_MODELS: &[(&str, &str)] = &[
    ("gpt2", "gpt2"),
    ("smollm2-135m", "smollm2"),
    ("qwen2.5-0.5b", "qwen05"),
    ("tinyllama-1.1b", "tinyllama"),
];

/// Ways to run PyTorch, with their flags. In bf16 the first four train f32 weights under autocast, which
/// is what `--precision bf16` is beside (exact f32 masters); the last two hold weights, gradients and
/// moments in bf16 alone, where small updates are lost.
const PEERS: &[(&str, &[&str])] = &[
    ("eager", &[]),
    ("compiled", &["--compile"]),
    ("eager-checkpointed", &["--checkpoint", "full"]),
    ("compiled-checkpointed", &["--compile", "--checkpoint", "full"]),
    ("eager-pure", &["--dtype", "bf16-pure"]),
    ("compiled-pure", &["--compile", "--dtype", "bf16-pure"]),
];

/// A step to measure.
pub(crate) struct StepRun<'a> {
    pub(crate) model: &'a str,
    pub(crate) batch_size: &'a str,
    pub(crate) max_length: &'a str,
    pub(crate) steps: &'a str,
    pub(crate) precision: &'a str,
    pub(crate) threads: Option<&'a str>,
}

impl StepRun<'_> {
    /// In words, for the table.
    pub(crate) fn setting(&self) -> String {
        let threads = self.threads.map_or_else(String::new, |n| format!(", {n} threads"));
        let Self { model, batch_size, max_length, precision, .. } = self;
        format!("{model} {batch_size}x{max_length} {precision}{threads}")
    }

    /// The arguments of `ounce` for this run.
    pub(crate) fn ounce_args(&self, memory: Option<&str>) -> Vec<String> {
        let mut args =
            vec!["bench", "step", "--model", self.model, "--batch-size", self.batch_size];
        args.extend(["--max-length", self.max_length, "--steps", self.steps, "--json"]);
        args.extend(["--precision", self.precision]);
        args.extend(memory.into_iter().flat_map(|m| ["--memory", m]));
        args.extend(self.threads.into_iter().flat_map(|n| ["--threads", n]));
        args.into_iter().map(str::to_owned).collect()
    }

    /// The smallest feasible budget, as the run names it when it is refused.
    pub(crate) fn smallest(&self, s: &Setting<'_>) -> Result<String> {
        let args = self.ounce_args(Some("8MiB"));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let refused = output(&s.binary, &args)?;
        let stderr = String::from_utf8_lossy(&refused.stderr);
        smallest_budget(&stderr).ok_or_else(|| format!("no smallest feasible budget in {stderr:?}"))
    }

    /// Runs PyTorch on the same step, one way of [`PEERS`]; its line of JSON.
    pub(crate) fn peer(&self, python: &str, way: &str) -> Result<Value> {
        let peer = PEER_MODELS.iter().find(|(ours, _)| *ours == self.model);
        let (_, peer) = peer.ok_or_else(|| format!("the peer has no model {}", self.model))?;
        let mut args = vec!["bench/peer_torch.py", "--model", peer, "--batch", self.batch_size];
        args.extend(["--seq", self.max_length, "--steps", self.steps, "--max-seconds", "600"]);
        args.extend(["--dtype", if self.precision == "f32" { "fp32" } else { "bf16-autocast" }]);
        let ways = PEERS.iter().find(|(name, _)| *name == way);
        args.extend(ways.ok_or_else(|| format!("PyTorch has no way {way:?} to run"))?.1);
        args.extend(self.threads.into_iter().flat_map(|n| ["--threads", n]));
        last_object(&capture(python, &args)?)
    }
}

/// The last JSON object that a program printed.
pub(crate) fn last_object(text: &str) -> Result<Value> {
    json_lines(text).pop().ok_or_else(|| format!("no line of JSON in {text:?}"))
}

/// `bench step`: rounds of Ounce and, if a Python with torch is given, PyTorch.
pub(crate) fn step(args: &[&str]) -> Result {
    let get = |name: &str, default: &'static str| -> Result<&str> {
        Ok(flag(args, name, FLAGS)?.unwrap_or(default))
    };
    let run = StepRun {
        model: get("--model", "gpt2")?,
        batch_size: get("--batch-size", "4")?,
        max_length: get("--max-length", "1024")?,
        steps: get("--steps", "3")?,
        precision: get("--precision", "f32")?,
        threads: flag(args, "--threads", FLAGS)?,
    };
    let (memory, python) = (flag(args, "--memory", FLAGS)?, flag(args, "--python", FLAGS)?);
    let rounds: usize = get("--rounds", "2")?.parse().map_err(|_| "--rounds is a number")?;
    let peers: Vec<&str> = get("--peers", "eager")?.split(',').collect();
    if python.is_none() && flag(args, "--peers", FLAGS)?.is_some() {
        return Err("--peers needs --python with torch".to_owned());
    }
    let binary = release_binary()?;
    let ounce_args = run.ounce_args(memory);
    let ounce_args: Vec<&str> = ounce_args.iter().map(String::as_str).collect();
    let mut results: Vec<(String, Value)> = Vec::new();
    let mut add = |engine: String, result: Value| {
        println!("{engine}: {} tok/s, peak {} MiB", result["tok_per_s"], result["peak_rss_mib"]);
        results.push((engine, result));
    };
    for _ in 0..rounds {
        add("ounce".to_owned(), last_object(&capture(&binary, &ounce_args)?)?);
        for (python, way) in python.iter().flat_map(|python| peers.iter().map(move |w| (python, w)))
        {
            add(format!("torch {way}"), run.peer(python, way)?);
        }
    }
    ratios(&results)?;
    let setting = run.setting();
    let records: Vec<Record<'_>> = results
        .iter()
        .map(|(engine, result)| Record { what: "bench step", engine, setting: &setting, result })
        .collect();
    keep(&records).map(|_| ())
}

/// Prints the medians of every engine, and ours over theirs.
fn ratios(results: &[(String, Value)]) -> Result {
    let of = |engine: &str, key: &str| -> Result<f64> {
        let own = results.iter().filter(|(e, _)| e == engine);
        Ok(median(own.map(|(_, r)| number(r, key)).collect::<Result<_>>()?))
    };
    let mut engines: Vec<&str> = results.iter().map(|(e, _)| e.as_str()).collect();
    engines.sort_unstable();
    engines.dedup();
    for engine in engines {
        let (speed, peak) = (of(engine, "tok_per_s")?, of(engine, "peak_rss_mib")?);
        println!(
            "{engine}: median {speed:.1} tok/s, {peak:.0} MiB; ounce has {:.2} times the speed in {:.0} % of that",
            of("ounce", "tok_per_s")? / speed,
            100.0 * of("ounce", "peak_rss_mib")? / peak
        );
    }
    Ok(())
}

/// `bench kernels`: every product of two models, attention, head and what is bound by memory, each as
/// a share of what the machine could do in the same run.
pub(crate) fn kernels(args: &[&str]) -> Result {
    let mut command = vec!["run", "--release", "--locked", "--package", "ounce-kernels"];
    command.extend(["--example", "kernel_bench", "--"]);
    command.extend(args);
    command.push("--json");
    let kernels = json_lines(&capture(&cargo(), &command)?);
    for k in &kernels {
        let name = k["kernel"].as_str().unwrap_or("");
        let rate = ["gflop_per_s", "gb_per_s"].into_iter().find_map(|key| k[key].as_f64());
        let unit = if k["gb_per_s"].is_null() { "GFLOP/s" } else { "GB/s" };
        let share = k["share"].as_f64().map_or(String::new(), |s| format!("{:4.0} %", 100.0 * s));
        println!("{name:52} {:8.1} {unit:8} {share}", rate.unwrap_or(f64::NAN));
    }
    let setting = args.join(" ");
    let records: Vec<Record<'_>> = kernels
        .iter()
        .map(|result| Record { what: "bench kernels", engine: "ounce", setting: &setting, result })
        .collect();
    keep(&records).map(|_| ())
}

//! Speed: whole training steps side by side with PyTorch, and kernels beside the machine's peak.
//!
//! Sides alternate (A B A B), so that a disturbance of the machine hits both.

use serde_json::{Value, json};

use crate::Result;
use crate::record::{Record, keep};
use crate::shell::{capture, cargo, flag, json_lines, release_binary};

const FLAGS: &[&str] = &[
    "--model",
    "--batch-size",
    "--max-length",
    "--steps",
    "--rounds",
    "--memory",
    "--threads",
    "--python",
];

/// Ounce's presets and their names in `bench/peer_torch.py`.
const PEER_MODELS: &[(&str, &str)] = &[
    ("gpt2", "gpt2"),
    ("smollm2-135m", "smollm2"),
    ("qwen2.5-0.5b", "qwen05"),
    ("tinyllama-1.1b", "tinyllama"),
];

/// A step to measure.
pub(crate) struct StepRun<'a> {
    pub(crate) model: &'a str,
    pub(crate) batch_size: &'a str,
    pub(crate) max_length: &'a str,
    pub(crate) steps: &'a str,
    pub(crate) threads: Option<&'a str>,
}

impl StepRun<'_> {
    /// In words, for the table.
    pub(crate) fn setting(&self) -> String {
        let threads = self.threads.map_or_else(String::new, |n| format!(", {n} threads"));
        format!("{} {}x{} f32{threads}", self.model, self.batch_size, self.max_length)
    }

    /// The arguments of `ounce` for this run.
    pub(crate) fn ounce_args(&self, memory: Option<&str>) -> Vec<String> {
        let mut args =
            vec!["bench", "step", "--model", self.model, "--batch-size", self.batch_size];
        args.extend(["--max-length", self.max_length, "--steps", self.steps, "--json"]);
        args.extend(memory.into_iter().flat_map(|m| ["--memory", m]));
        args.extend(self.threads.into_iter().flat_map(|n| ["--threads", n]));
        args.into_iter().map(str::to_owned).collect()
    }

    /// Runs PyTorch on the same step; its line of JSON.
    pub(crate) fn peer(&self, python: &str) -> Result<Value> {
        let peer = PEER_MODELS.iter().find(|(ours, _)| *ours == self.model);
        let (_, peer) = peer.ok_or_else(|| format!("the peer has no model {}", self.model))?;
        let mut args = vec!["bench/peer_torch.py", "--model", peer, "--batch", self.batch_size];
        args.extend(["--seq", self.max_length, "--steps", self.steps, "--max-seconds", "600"]);
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
        threads: flag(args, "--threads", FLAGS)?,
    };
    let (memory, python) = (flag(args, "--memory", FLAGS)?, flag(args, "--python", FLAGS)?);
    let rounds: usize = get("--rounds", "2")?.parse().map_err(|_| "--rounds is a number")?;
    let binary = release_binary()?;
    let ounce_args = run.ounce_args(memory);
    let ounce_args: Vec<&str> = ounce_args.iter().map(String::as_str).collect();
    let mut results: Vec<(&str, Value)> = Vec::new();
    for _ in 0..rounds {
        results.push(("ounce", last_object(&capture(&binary, &ounce_args)?)?));
        if let Some(python) = python {
            results.push(("torch", run.peer(python)?));
        }
        for (engine, r) in &results[results.len() - (1 + usize::from(python.is_some()))..] {
            println!("{engine}: {} tok/s, peak {} MiB", r["tok_per_s"], r["peak_rss_mib"]);
        }
    }
    let setting = run.setting();
    let records: Vec<Record<'_>> = results
        .iter()
        .map(|(engine, result)| Record { what: "bench step", engine, setting: &setting, result })
        .collect();
    keep(&records).map(|_| ())
}

/// `bench kernels`: the table of ounce-kernels' own measurement.
pub(crate) fn kernels(args: &[&str]) -> Result {
    let mut command = vec!["run", "--release", "--locked", "--package", "ounce-kernels"];
    command.extend(["--example", "kernel_bench", "--"]);
    command.extend(args);
    let table = capture(&cargo(), &command)?;
    print!("{table}");
    let result = json!({ "table": table });
    let record = Record {
        what: "bench kernels",
        engine: "ounce",
        setting: &args.join(" "),
        result: &result,
    };
    keep(&[record]).map(|_| ())
}

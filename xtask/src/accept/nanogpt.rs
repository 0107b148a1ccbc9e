//! `accept nanogpt`: nanoGPT's CPU recipe, loss and time, beside PyTorch.

use std::path::Path;

use serde_json::{Value, json};

use crate::Result;
use crate::bench::last_object;
use crate::demonstration::{Outcome, Setting, path, shakespeare};
use crate::numbers::{MIB, median, number};
use crate::shell::{capture, json_lines, scratch_folder};

/// What f16 begins with here: it overflows, and the run must find its way down by itself.
const TOO_LARGE_SCALE: &str = "16777216";

/// Three seeds of nanoGPT's recipe; if a Python with torch is given, its time per step beside it. In
/// 16 bits each seed runs in f32 too, and the losses are compared; f16 begins with a loss scale of 2^24.
pub(crate) fn nanogpt(s: &Setting<'_>) -> Result<Outcome> {
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
            let rate = ["--learning-rate", "1e-3", "--json"];
            let scale: &[&str] =
                if precision == "f16" { &["--init-loss-scale", TOO_LARGE_SCALE] } else { &[] };
            let args =
                [&["train"], &files[..], RECIPE, &rate, &own, scale, &s.thread_args()].concat();
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

/// The recipe, as flags; the README's first command runs it too, at another learning rate.
pub(crate) const RECIPE: &[&str] = &[
    "--memory",
    "48MiB",
    "--max-length",
    "64",
    "--per-device-train-batch-size",
    "12",
    "--max-steps",
    "2000",
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

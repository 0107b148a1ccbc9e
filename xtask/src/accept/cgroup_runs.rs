//! The demonstration `cgroup-runs`: small random models, each in a memory cgroup of its budget's size.
//!
//! For every model: 3 % less than the smallest feasible budget is refused; the smallest itself trains,
//! evaluates, samples and saves; a random larger one does the same; a run that goes on from its
//! checkpoint, in the smallest again, ends in the same bits. Tokenizing is part of the first run, whose
//! cache is empty. Nothing may be killed, and `VmHWM` may not exceed the budget. Without the right to
//! make cgroups the last is still judged, and the demonstration says that nothing else was.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use crate::Result;
use crate::cgroup::Cgroup;
use crate::demonstration::{Outcome, Setting, path, shakespeare};
use crate::numbers::{MIB, mib, number, smallest_budget};
use crate::random::Random;
use crate::shell::{json_lines, output, scratch_folder};

/// Models of the whole demonstration, three runs each.
const N_MODELS: u64 = 100;

/// What all models together have shown.
#[derive(Default)]
struct Seen {
    n_runs: u64,
    n_in_cgroup: u64,
    /// Of those, killed by the kernel or ended otherwise.
    failed: Vec<String>,
    above_budget: Vec<String>,
    not_refused: Vec<String>,
    different: Vec<String>,
    /// Peak over budget of every run, in percent.
    shares: Vec<f64>,
    budgets_mib: Vec<f64>,
}

/// The demonstration.
pub(crate) fn cgroup_runs(s: &Setting<'_>) -> Result<Outcome> {
    let mut outcome = Outcome { is_kept: s.times.is_none(), ..Outcome::default() };
    let folder = scratch_folder("accept-cgroup-runs")?;
    let texts = texts(&folder)?;
    let (mut random, mut seen) = (Random::new(s.seed), Seen::default());
    let n_models = s.times.unwrap_or(N_MODELS);
    let begin = Instant::now();
    for number in 0..n_models {
        let place = folder.join(format!("model-{number}"));
        one_model(s, &place, &texts, &mut random, &mut seen)?;
        std::fs::remove_dir_all(&place).map_err(|e| format!("{}: {e}", place.display()))?;
    }
    let n_runs = seen.n_runs;
    if seen.n_in_cgroup == n_runs {
        let what = format!(
            "{n_runs} runs in cgroups of their budgets, {n_models} models: killed or failed"
        );
        outcome.claim_none(&what, &seen.failed);
    } else {
        println!("no memory cgroup could be made: survival in one is not judged");
        outcome.claim_none(&format!("{n_runs} runs, {n_models} models: failed"), &seen.failed);
    }
    outcome.claim_none("peak above the budget", &seen.above_budget);
    outcome.claim_none("3 % less than the smallest budget not refused", &seen.not_refused);
    outcome.claim_none("other weights in another budget or after a resume", &seen.different);
    let sorted = |mut x: Vec<f64>| {
        x.sort_by(f64::total_cmp);
        let at = |share: f64| x.get((share * (x.len() as f64 - 1.0)) as usize).copied();
        json!({ "least": at(0.0), "median": at(0.5), "most": at(1.0) })
    };
    let result = json!({
        "models": n_models, "runs": n_runs, "in_cgroup": seen.n_in_cgroup,
        "peak_percent_of_budget": sorted(seen.shares), "budget_mib": sorted(seen.budgets_mib),
        "seconds": begin.elapsed().as_secs(),
    });
    println!("{result}");
    outcome.runs.push(("ounce", "random models in random budgets".to_owned(), result));
    Ok(outcome)
}

/// Short texts to train and evaluate on: plain, and as rows.
fn texts(folder: &Path) -> Result<[PathBuf; 3]> {
    let (train, validation) = shakespeare(folder)?;
    let read =
        |file: &Path| std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()));
    let (plain, rows, eval) =
        (folder.join("plain.txt"), folder.join("rows.jsonl"), folder.join("eval.txt"));
    let text = read(&train)?;
    let text = &text[..60_000];
    let lines: Vec<String> =
        text.lines().map(|line| json!({ "text": format!("{line}\n") }).to_string()).collect();
    let write = |file: &Path, text: &str| {
        std::fs::write(file, text).map_err(|e| format!("{}: {e}", file.display()))
    };
    write(&plain, text)?;
    write(&rows, &(lines.join("\n") + "\n"))?;
    write(&eval, &read(&validation)?[..3_000])?;
    Ok([plain, rows, eval])
}

/// One random model: refused, smallest, random, resumed.
fn one_model(
    s: &Setting<'_>,
    place: &Path,
    [plain, rows, eval]: &[PathBuf; 3],
    random: &mut Random,
    seen: &mut Seen,
) -> Result {
    let (fresh, cache) = (place.join("fresh"), place.join("cache"));
    let init = init_flags(random);
    let made = ["init", "--data", path(plain), "--output-dir", path(&fresh)];
    s.ounce(&[&made[..], &words(&init)].concat())?;
    let data = random.pick(&[plain, rows]);
    let files = ["--model", path(&fresh), "--data", path(data), "--eval-data", path(eval)];
    let flags = train_flags(random, init.contains("gpt2"));
    let recipe = [&files[..], &words(&flags)].concat();
    let name = format!("{init} {flags}");

    let cache_variable = format!("OUNCE_CACHE_DIR={}", cache.display());
    let train = |out: &Path, memory: &str, more: &[&str]| -> Vec<String> {
        let args = ["env", &cache_variable, &s.binary, "train", "--memory", memory, "--json"];
        let out = ["--output-dir", path(out)];
        [&args[..], &recipe, &out, more].concat().into_iter().map(str::to_owned).collect()
    };
    let refused = output_of(&train(&place.join("no"), "1MiB", &[]))?;
    let stderr = String::from_utf8_lossy(&refused.stderr);
    let smallest = smallest_budget(&stderr);
    let smallest = smallest.ok_or_else(|| format!("{name}: no smallest budget in {stderr:?}"))?;
    let smallest_bytes = mib(&smallest)? * MIB;
    let less = format!("{}B", (smallest_bytes * 0.97) as u64);
    let code = output_of(&train(&place.join("no"), &less, &[]))?.status.code();
    if code != Some(3) {
        seen.not_refused.push(format!("{name}: {less} of {smallest} exits with {code:?}"));
    }
    let larger = format!("{}B", (smallest_bytes * (1.0 + 2.0 * random.share())) as u64);
    let (tight, loose, resumed) = (place.join("tight"), place.join("loose"), place.join("on"));
    let checkpoint = loose.join("checkpoint-2");
    let on = ["--resume-from-checkpoint", path(&checkpoint)];
    for (out, memory, more) in
        [(&tight, &smallest, &[][..]), (&loose, &larger, &[]), (&resumed, &smallest, &on)]
    {
        one_run(&train(out, memory, more), memory, &name, seen)?;
    }
    let weights = |out: &Path| std::fs::read(out.join("model.safetensors")).unwrap_or_default();
    let expected = weights(&tight);
    if expected.is_empty() || weights(&loose) != expected || weights(&resumed) != expected {
        seen.different.push(name);
    }
    Ok(())
}

/// Runs in a cgroup of the budget, if one can be made.
fn one_run(command: &[String], memory: &str, name: &str, seen: &mut Seen) -> Result {
    let bytes = (mib(memory)? * MIB) as u64;
    let group = Cgroup::new(bytes);
    let (program, args) = command.split_first().expect("a command has a program");
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let run = match &group {
        Some(group) => group.run(program, &args)?,
        None => output(program, &args)?,
    };
    let n_killed = group.as_ref().and_then(Cgroup::n_killed).unwrap_or(0);
    seen.n_runs += 1;
    seen.n_in_cgroup += u64::from(group.is_some());
    if !run.status.success() || n_killed > 0 {
        let stderr = String::from_utf8_lossy(&run.stderr);
        let last: Vec<&str> = stderr.lines().rev().take(3).collect();
        seen.failed.push(format!("{name} in {memory}: {}, {last:?}", run.status));
        return Ok(());
    }
    let lines = json_lines(&String::from_utf8_lossy(&run.stdout));
    let done: &Value = lines.last().ok_or("train printed nothing")?;
    let peak = number(done, "rss_peak_bytes")?;
    seen.shares.push(100.0 * peak / bytes as f64);
    seen.budgets_mib.push(bytes as f64 / MIB);
    if peak > bytes as f64 {
        seen.above_budget.push(format!("{name}: {:.2} MiB in {memory}", peak / MIB));
    }
    Ok(())
}

fn output_of(command: &[String]) -> Result<std::process::Output> {
    let args: Vec<&str> = command[1..].iter().map(String::as_str).collect();
    output(&command[0], &args)
}

/// A random architecture and tokenizer.
fn init_flags(random: &mut Random) -> String {
    let n_heads = random.pick(&[1, 2, 4]);
    let hidden = n_heads * random.pick(&[8, 16, 32]);
    let n_layers = random.pick(&[1, 2, 3, 4]);
    let arch = random.pick(&["gpt2", "llama"]);
    let kv = if arch == "llama" && random.share() < 0.5 { " --n-kv-heads 1" } else { "" };
    let tokenizer = random.pick(&["char", "bpe --vocab-size 300", "bpe --vocab-size 1024"]);
    let context = random.pick(&[32, 65, 128, 256]);
    format!(
        "--arch {arch} --n-layers {n_layers} --n-heads {n_heads}{kv} --hidden-size {hidden} \
         --context-length {context} --tokenizer {tokenizer}"
    )
}

/// A random recipe of four steps that saves after two.
fn train_flags(random: &mut Random, has_dropout: bool) -> String {
    let rows = random.pick(&[1, 2, 5, 8]);
    let optimizer = random.pick(&["adamw", "sgd"]);
    let norm = random.pick(&["0", "1"]);
    let dropout = if has_dropout { random.pick(&["0", "0.1"]) } else { "0" };
    let threads = random.pick(&["1", "2"]);
    format!(
        "--max-steps 4 --save-steps 2 --sample-tokens 8 --eval-steps 2 --sample-steps 2 \
         --per-device-train-batch-size {rows} --optimizer {optimizer} --max-grad-norm {norm} \
         --dropout {dropout} --threads {threads}"
    )
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

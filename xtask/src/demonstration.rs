//! What every demonstration is given, what it returns, and the data that several of them use.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::Result;
use crate::shell::{capture, root};

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

/// A flag's whole number.
pub(crate) fn whole(text: Option<&str>) -> Result<Option<u64>> {
    let parse = |text: &str| text.parse().map_err(|_| format!("{text:?} is not a whole number"));
    text.map(parse).transpose()
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

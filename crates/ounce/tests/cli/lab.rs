//! Drives the binary in a folder of its own.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

/// The real text that ships with the repository.
pub(crate) const SHAKESPEARE: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/tinyshakespeare.txt");

/// A folder with a tiny fresh model `model` and texts `train.txt` and `eval.txt`.
pub(crate) struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    /// An empty folder.
    pub(crate) fn empty() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// With a model made by `ounce init` and these sizes.
    pub(crate) fn with_model(arch: &[&str]) -> Self {
        let lab = Self::empty();
        let text = std::fs::read_to_string(SHAKESPEARE).unwrap();
        std::fs::write(lab.path("train.txt"), &text[..20_000]).unwrap();
        std::fs::write(lab.path("eval.txt"), &text[20_000..22_100]).unwrap();
        let mut args = vec!["init", "--output-dir", "model", "--tokenizer", "char"];
        args.extend(["--data", SHAKESPEARE]);
        args.extend(arch);
        lab.succeed(&args);
        lab
    }

    /// A small Llama.
    pub(crate) fn llama() -> Self {
        let sizes = "--arch llama --n-layers 2 --n-heads 4 --n-kv-heads 2 --hidden-size 32";
        Self::with_model(&words(&format!("{sizes} --context-length 96")))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ounce"));
        command.args(args).current_dir(self.dir.path());
        command.env("OUNCE_CACHE_DIR", self.path("cache"));
        command.env("HF_HOME", self.path("hf")).env_remove("HF_HUB_CACHE");
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Standard output of a run that must succeed.
    pub(crate) fn succeed(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {}\n{error}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    /// Standard error of a run that must fail with that code, and whose error ends with a hint.
    pub(crate) fn fail(&self, code: i32, args: &[&str]) -> String {
        let output = self.run(args);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}\n{error}");
        let last = error.trim_end().lines().last().unwrap();
        assert!(last.starts_with("hint: "), "{args:?}\n{error}");
        error
    }

    /// JSON lines of a run that must succeed.
    pub(crate) fn json(&self, args: &[&str]) -> Vec<Value> {
        let out = self.succeed(&[args, &["--json"]].concat());
        out.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    }

    /// Trains to `out`; losses and gradient norms of the steps, and the bytes of the weights.
    pub(crate) fn train(&self, flags: &str, out: &str) -> Trained {
        let fixed = format!("train --model model --data train.txt --output-dir {out} {flags}");
        let lines = self.json(&words(&fixed));
        let column =
            |key: &str| -> Vec<f64> { lines.iter().filter_map(|l| l[key].as_f64()).collect() };
        Trained {
            losses: column("loss"),
            grad_norms: column("grad_norm"),
            weights: std::fs::read(self.path(out).join("model.safetensors")).unwrap(),
            done: lines.last().unwrap().clone(),
        }
    }
}

/// What a training run left.
#[derive(Debug, PartialEq)]
pub(crate) struct Trained {
    pub(crate) losses: Vec<f64>,
    pub(crate) grad_norms: Vec<f64>,
    pub(crate) weights: Vec<u8>,
    pub(crate) done: Value,
}

impl Trained {
    pub(crate) fn assert_same_bits(&self, other: &Self, what: &str) {
        assert_eq!(self.losses, other.losses, "losses of {what}");
        assert_eq!(self.grad_norms, other.grad_norms, "gradient norms of {what}");
        assert!(self.weights == other.weights, "weights of {what}");
    }
}

/// The words of a command line without quotes.
pub(crate) fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// The smallest budget that an error names, as the flag takes it.
pub(crate) fn smallest_budget(error: &str) -> String {
    let rest = error.split("smallest feasible budget: ").nth(1).expect("the error names a budget");
    rest.lines().next().unwrap().replace(' ', "")
}

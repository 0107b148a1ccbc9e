//! Files that are cut, damaged or something else: the right exit code, the file named, a hint, no panic,
//! bounded memory.

use std::process::Command;

use crate::lab::{Lab, words};

const TRAIN: &str = "train --model model --data train.txt --max-length 64 --max-steps 1 \
    --sample-steps 0 --memory 64MiB --output-dir out";

/// What is done to a file.
enum Damage {
    /// Its first share, in percent, is left.
    Cut(usize),
    /// This is all it holds.
    Holds(Vec<u8>),
    /// Of its text, the first is replaced by the second.
    Replace(&'static str, &'static str),
    /// The byte at this share, in percent, is another one.
    Flip(usize),
}

use Damage::{Cut, Flip, Holds, Replace};

fn text(text: &str) -> Damage {
    Holds(text.as_bytes().to_vec())
}

fn deep() -> Damage {
    Holds("[".repeat(1 << 16).into_bytes())
}

impl Damage {
    fn of(&self, before: &[u8]) -> Vec<u8> {
        match self {
            Cut(percent) => before[..before.len() * percent / 100].to_vec(),
            Holds(bytes) => bytes.clone(),
            Replace(from, to) => {
                let text = std::str::from_utf8(before).unwrap();
                assert!(text.contains(from), "{from}");
                text.replacen(from, to, 1).into_bytes()
            }
            Flip(percent) => {
                let mut bytes = before.to_vec();
                let at = (bytes.len() - 1) * percent / 100;
                bytes[at] ^= 0x11;
                bytes
            }
        }
    }
}

/// Runs in 2 GB of address space; exit code and standard error.
fn run(lab: &Lab, line: &str) -> (Option<i32>, String) {
    let limited = format!("ulimit -v 2000000 && exec {} {line}", env!("CARGO_BIN_EXE_ounce"));
    let mut command = Command::new("sh");
    command.args(["-c", &limited]).current_dir(lab.path(""));
    let output = command.env("OUNCE_CACHE_DIR", lab.path("cache")).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// Damages one file, runs, and puts it back. The error names `named` and holds `part`.
fn check(lab: &Lab, line: &str, code: i32, file: &str, damage: &Damage, named: &str, part: &str) {
    let path = lab.path(file);
    let before = std::fs::read(&path).unwrap_or_default();
    std::fs::write(&path, damage.of(&before)).unwrap();
    let (found, error) = run(lab, line);
    std::fs::write(&path, before).unwrap();
    let shown: String = error.chars().take(2000).collect();
    assert_eq!(found, Some(code), "{file}: {shown}");
    assert!(!error.contains("panicked") && error.len() < 4000, "{file}: {shown}");
    assert!(error.contains(named) && error.contains(part), "{file}, {named}, {part}: {shown}");
    assert!(error.trim_end().lines().last().unwrap().starts_with("hint: "), "{file}: {shown}");
    assert!(!lab.path("out/model.safetensors").exists(), "{file}");
}

fn gpt2() -> Lab {
    Lab::with_model(&words("--arch gpt2 --n-layers 1 --hidden-size 32 --context-length 64"))
}

#[test]
fn damaged_models_are_refused_by_file() {
    let lab = gpt2();
    let weights = "model/model.safetensors";
    let pointer = text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n");
    check(&lab, TRAIN, 4, weights, &pointer, weights, "is a pointer of Git LFS");
    let header =
        |text: &str| Holds([&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat());
    let cases = [
        ("model/config.json", text(""), ""),
        ("model/config.json", Cut(60), "config.json:"),
        ("model/config.json", text("{}"), "(none given)"),
        ("model/config.json", text("[1, 2]"), "no JSON object"),
        ("model/config.json", Holds(vec![0; 100]), ""),
        ("model/config.json", Holds(b"{\"model_type\": \"\xff\"}".to_vec()), ""),
        ("model/config.json", deep(), ""),
        ("model/config.json", Replace("\"n_embd\": 32", "\"n_embd\": 1e18"), "n_embd"),
        ("model/config.json", Replace("\"n_embd\": 32", "\"n_embd\": -32"), "n_embd"),
        ("model/config.json", Replace("\"n_embd\": 32", "\"n_embd\": \"32\""), "n_embd"),
        ("model/config.json", Replace("\"n_embd\": 32", "\"n_embd\": 33"), ""),
        ("model/config.json", Replace("\"gpt2\"", "\"gpt9\""), "gpt9"),
        (weights, text(""), ""),
        (weights, Cut(1), ""),
        (weights, Cut(50), ""),
        (weights, Cut(99), ""),
        (weights, Holds(vec![0xff; 64]), ""),
        (weights, header("{\"w\": 1}"), ""),
        (
            weights,
            header("{\"w\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 9]}}"),
            "",
        ),
        (
            weights,
            header("{\"w\": {\"dtype\": \"X9\", \"shape\": [1], \"data_offsets\": [0, 4]}}"),
            "",
        ),
        (weights, Flip(0), ""),
        ("model/tokenizer.json", text(""), ""),
        ("model/tokenizer.json", Cut(50), ""),
        ("model/tokenizer.json", text("{}"), ""),
        ("model/tokenizer.json", Holds(vec![0xff; 100]), ""),
        ("model/tokenizer.json", deep(), ""),
    ];
    for (file, damage, part) in &cases {
        let name = file.strip_prefix("model/").unwrap();
        check(&lab, TRAIN, 4, file, damage, name, part);
    }
}

#[test]
fn shards_and_pickles_are_refused_by_file() {
    let lab = gpt2();
    let weights = lab.path("model/model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::remove_file(&weights).unwrap();
    let index = "model/model.safetensors.index.json";
    let map = |shard: &str| text(&format!("{{\"weight_map\": {{\"w\": \"{shard}\"}}}}"));
    let name = "model.safetensors.index.json";
    for (damage, named) in [
        (text(""), name),
        (text("{\"weight_map\": 3}"), name),
        (deep(), name),
        (map("../../etc/passwd"), name),
        (map("/etc/passwd"), name),
        (map("model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors"),
    ] {
        check(&lab, TRAIN, 4, index, &damage, named, "");
    }
    std::fs::remove_file(lab.path(index)).unwrap();
    check(&lab, TRAIN, 4, "model/pytorch_model.bin", &Holds(bytes.clone()), "model", "safetensors");
    // A link that leads out of the directory is not followed as if it were a model's own file.
    std::fs::write(&weights, bytes).unwrap();
}

#[test]
fn damaged_data_is_refused_by_line() {
    let lab = gpt2();
    let rows = TRAIN.replace("train.txt", "rows.jsonl");
    std::fs::write(lab.path("rows.jsonl"), "{\"text\": \"to be or not to be\"}\n".repeat(20))
        .unwrap();
    let row =
        |row: &[u8]| Holds([b"{\"text\": \"to be\"}\n", row, b"\n{\"text\": \"x\"}\n"].concat());
    let long = [&b"{\"text\": \""[..], &vec![b'a'; 17 << 20], b"\"}"].concat();
    let nested = format!("{{\"text\": \"a\", \"x\": {}1}}", "[".repeat(100_000));
    let cases = [
        ("train.txt", Holds(b"to be\nor \0not\n".to_vec()), "train.txt:2", "NUL"),
        ("train.txt", Holds(b"to be\nor \xffnot\n".to_vec()), "train.txt:2", "UTF-8"),
        (
            "train.txt",
            Holds(b"\xff\xfet\0o\0 \0b\0e\0".to_vec()),
            "train.txt:1",
            "the file is UTF-16",
        ),
        // What a hint said that was not meant for it.
        (
            "train.txt",
            Holds("\u{ff}\u{fe}t\0o\0".as_bytes().to_vec()),
            "train.txt:1",
            "as it was before",
        ),
        ("train.txt", text(""), "train.txt", "0 tokens"),
        ("train.txt", text("to be\nor 9\n"), "train.txt:2", ""),
        ("rows.jsonl", row(b"{\"text\": \"\\ud800\"}"), "rows.jsonl:2", ""),
        ("rows.jsonl", row(b"{\"text\": \"a\\u0000b\"}"), "rows.jsonl:2", "NUL"),
        ("rows.jsonl", row(b"{\"text\": 3}"), "rows.jsonl:2", ""),
        ("rows.jsonl", row(b"{\"content\": \"a\"}"), "rows.jsonl:2", "text"),
        ("rows.jsonl", row(b"to be or not to be"), "rows.jsonl:2", "JSON"),
        ("rows.jsonl", row(b"{\"text\": \"a"), "rows.jsonl:2", "JSON"),
        ("rows.jsonl", row(b"[]"), "rows.jsonl:2", ""),
        ("rows.jsonl", row(nested.as_bytes()), "rows.jsonl:2", ""),
        ("rows.jsonl", row(&long), "rows.jsonl:2", "MiB"),
    ];
    for (file, damage, named, part) in &cases {
        let line = if *file == "train.txt" { TRAIN } else { &rows };
        check(&lab, line, 4, file, damage, named, part);
    }
    // A byte order mark and blank lines are no damage.
    let row = "{\"text\": \"to be or not to be\"}\n";
    let marked = format!("\u{feff}{row}\n{}", row.repeat(20));
    std::fs::write(lab.path("rows.jsonl"), marked).unwrap();
    lab.succeed(&words(&rows));
}

#[test]
fn damaged_settings_are_refused_by_line() {
    let lab = gpt2();
    let line = format!("{TRAIN} --config run.yaml");
    let cases = [
        ("max_steps: 1\nlerning_rate: 1\n", "run.yaml:2", "learning_rate"),
        ("max_steps: [1\n", "run.yaml", ""),
        ("max_steps: many\n", "run.yaml", "max_steps"),
        ("- max_steps\n", "run.yaml", ""),
        ("memory: 64\n", "run.yaml", "64MiB"),
        ("a: &a [1]\nb: [*a, *a]\n", "run.yaml:1", ""),
        ("max_steps: 1\n\tseed: 2\n", "run.yaml", ""),
    ];
    for (yaml, named, part) in cases {
        check(&lab, &line, 2, "run.yaml", &text(yaml), named, part);
    }
    check(&lab, &line, 2, "run.yaml", &Holds(vec![0xff; 20]), "run.yaml", "");
    check(&lab, &line, 2, "run.yaml", &deep(), "run.yaml", "");
}

#[test]
fn damaged_checkpoints_are_refused_by_file_and_passed_over_by_auto() {
    let lab = gpt2();
    let save = TRAIN.replace("--max-steps 1", "--max-steps 2").replace("-dir out", "-dir from");
    lab.succeed(&words(&format!("{save} --save-steps 1")));
    let resume = format!(
        "{} --resume-from-checkpoint from/checkpoint-2",
        save.replace("-dir from", "-dir out")
    );
    let (manifest, state) =
        ("from/checkpoint-2/manifest.json", "from/checkpoint-2/trainer_state.json");
    let cases = [
        (manifest, text(""), "manifest.json"),
        (manifest, Cut(50), "manifest.json"),
        (manifest, deep(), "manifest.json"),
        (manifest, Replace("config.json", "../config.json"), "manifest.json"),
        (state, Flip(50), "trainer_state.json"),
        (state, Cut(50), "trainer_state.json"),
        ("from/checkpoint-2/config.json", Flip(10), "config.json"),
        ("from/checkpoint-2/model.safetensors", Flip(90), "model.safetensors"),
        ("from/checkpoint-2/optimizer.safetensors", Cut(90), "optimizer.safetensors"),
    ];
    for (file, damage, named) in &cases {
        check(&lab, &resume, 4, file, damage, named, "");
    }
    std::fs::write(lab.path(manifest), "").unwrap();
    let (code, error) = run(&lab, &format!("{save} --resume-from-checkpoint auto"));
    assert_eq!(code, Some(0), "{error}");
    assert!(error.contains("checkpoint-2 is passed over: ") && error.contains("manifest.json"));
}

#[test]
fn a_damaged_cache_is_made_again() {
    let lab = gpt2();
    lab.succeed(&words(TRAIN));
    let expected = std::fs::read(lab.path("out/model.safetensors")).unwrap();
    let files = || {
        let dirs = ["cache/tokens", "cache"].map(|dir| std::fs::read_dir(lab.path(dir)));
        let entries = dirs.into_iter().flatten().flatten().flatten();
        entries.map(|e| e.path()).filter(|path| path.is_file()).collect::<Vec<_>>()
    };
    assert!(files().len() >= 2, "{:?}", files());
    for damage in [Cut(0), Cut(50), Cut(99), Flip(5), Flip(95), Holds(vec![0xff; 200])] {
        for path in files() {
            let before = std::fs::read(&path).unwrap();
            std::fs::write(&path, damage.of(&before)).unwrap();
        }
        lab.succeed(&words(TRAIN));
        assert!(std::fs::read(lab.path("out/model.safetensors")).unwrap() == expected);
    }
}

#[test]
fn a_model_directory_that_points_outside_itself_is_refused() {
    let lab = Lab::llama();
    let (inside, outside) = (lab.path("model/model.safetensors"), lab.path("other.safetensors"));
    std::fs::rename(&inside, &outside).unwrap();
    let eval = words("eval --model model --data eval.txt --max-length 64");
    std::os::unix::fs::symlink(&outside, &inside).unwrap();
    let error = lab.fail(4, &eval);
    assert!(error.contains("model/model.safetensors: "), "{error}");
    std::fs::remove_file(&inside).unwrap();
    for shard in ["../other.safetensors", outside.to_str().unwrap()] {
        let index = serde_json::json!({ "weight_map": { "model.embed_tokens.weight": shard } });
        std::fs::write(lab.path("model/model.safetensors.index.json"), index.to_string()).unwrap();
        let error = lab.fail(4, &eval);
        assert!(error.contains("model/model.safetensors.index.json: "), "{error}");
    }
}

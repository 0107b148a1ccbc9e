//! The child process that tokenizes: what it takes is what the plan says, whatever the data are like.

use std::io::Write;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::lab::{Lab, words};

/// Rows of JSON of this length have room in every budget.
const ROW_BYTES: usize = 256 << 10;

/// Models with a tokenizer of characters and with one of the library, and a text.
fn lab() -> (Lab, String) {
    let lab = Lab::empty();
    let text = std::fs::read_to_string(crate::lab::SHAKESPEARE).unwrap();
    std::fs::write(lab.path("train.txt"), &text).unwrap();
    let sizes = "--arch llama --n-layers 1 --n-heads 2 --hidden-size 32 --context-length 64";
    for (name, tokenizer) in [("chars", "char"), ("words", "bpe --vocab-size 300")] {
        lab.succeed(&words(&format!(
            "init --output-dir {name} {sizes} --tokenizer {tokenizer} --data train.txt"
        )));
    }
    (lab, text)
}

/// Peak of the child while it tokenizes `file`, and the peak that the plan says, in bytes.
fn peaks(lab: &Lab, model: &str, file: &str) -> (u64, u64) {
    let flags =
        format!("--model {model} --data {file} --max-length 64 --memory 128MiB --threads 2");
    let plan = lab.json(&words(&format!("plan {flags}"))).remove(0);
    let phase = &plan["phases"][0];
    assert_eq!(phase["phase"], "tokenize");
    let rows = json!({
        "format": null, "columns": [], "skips_bad_rows": false, "max_length": 64, "row_bytes": ROW_BYTES,
    });
    let request = json!({ "kind": "tokenize", "request": {
        "tokenizer": lab.path(model), "cache_dir": lab.path("tokens"), "streams": [[lab.path(file)]],
        "rows": rows, "prompt": null, "n_threads": 2, "now_s": 0,
    } });
    let mut child = lab.command(&["__tokenize"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(request.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    let peak = said["Done"]["rss_peak_bytes"].as_u64().unwrap_or_else(|| panic!("{said}"));
    std::fs::remove_dir_all(lab.path("tokens")).unwrap();
    (peak, phase["peak_bytes"].as_u64().unwrap())
}

fn lines(rows: impl Iterator<Item = Value>) -> String {
    rows.map(|row| row.to_string() + "\n").collect()
}

#[test]
fn tokenizing_takes_no_more_than_the_plan_says_whatever_the_data_are() {
    let (lab, text) = lab();
    let part = |i: usize, n: usize| text.get(i * 37 % 1000..).unwrap().get(..n).unwrap_or(&text);
    let message = |role: &str, content: &str| json!({ "role": role, "content": content });
    let talk = |i: usize, n: usize| {
        let messages = [message("user", part(i, 10)), message("assistant", part(i, n))];
        json!({ "messages": messages })
    };
    let long = 240_000;
    // Words that never come again, in a script without spaces.
    let strange = |i: usize| -> String {
        let scatter = |k: usize| 0x4e00 + (((i * 4000 + k) * 7919) % 20_000) as u32;
        (0..4000)
            .map(|k| if k % 40 == 0 { '\u{3002}' } else { char::from_u32(scatter(k)).unwrap() })
            .collect()
    };
    let array: Vec<Value> = (0..30).map(|i| talk(i, 50_000)).collect();
    let files = [
        ("plain.txt", text.repeat(3)),
        ("long.jsonl", lines((0..12).map(|i| json!({ "text": part(i, long) })))),
        ("talks.jsonl", lines((0..12).map(|i| talk(i, long)))),
        ("short.jsonl", lines((0..20_000).map(|i| talk(i, 20)))),
        ("talks.json", Value::Array(array).to_string()),
        ("strange.jsonl", lines((0..150).map(|i| json!({ "text": strange(i) })))),
    ];
    for (file, content) in files {
        std::fs::write(lab.path(file), content).unwrap();
        let models: &[&str] =
            if file == "strange.jsonl" { &["words"] } else { &["words", "chars"] };
        for model in models {
            let (taken, planned) = peaks(&lab, model, file);
            assert!(taken <= planned, "{model}, {file}: {taken} bytes, planned {planned}");
        }
    }
}

#[test]
fn a_row_that_the_budget_has_no_room_for_is_named_and_has_room_in_a_larger_one() {
    let (lab, text) = lab();
    let rows = [json!({ "text": &text[..300] }), json!({ "text": &text[..300_000] })];
    std::fs::write(lab.path("long.jsonl"), lines(rows.into_iter())).unwrap();
    let numbers =
        format!("{{\"text\": \"to be or not to be\", \"ids\": [{}0]}}\n", "1,".repeat(60_000));
    std::fs::write(lab.path("numbers.jsonl"), numbers).unwrap();
    let run = "eval --model words --max-length 64 --threads 1 --on-bad-row skip";
    for (file, what) in [
        ("long.jsonl", "long.jsonl:2: the row is longer than "),
        ("numbers.jsonl", "numbers.jsonl:1: the row has over "),
    ] {
        let error = lab.fail(3, &words(&format!("{run} --data {file} --memory 4MiB")));
        let least = crate::lab::smallest_budget(&error);
        let error = lab.fail(4, &words(&format!("{run} --data {file} --memory {least}")));
        assert!(error.contains(what) && error.contains("hint: raise `--memory`"), "{error}");
        lab.succeed(&words(&format!("{run} --data {file} --memory 128MiB")));
    }
}

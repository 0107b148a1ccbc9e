//! Conversations through the binary: what is supervised, packing, mixtures, and what is said of them.

use serde_json::{Value, json};

use crate::lab::{Lab, words};

/// A small model with a byte-level tokenizer, and rows to train on.
fn lab() -> Lab {
    let lab = Lab::empty();
    let text = std::fs::read_to_string(crate::lab::SHAKESPEARE).unwrap();
    std::fs::write(lab.path("train.txt"), &text[..20_000]).unwrap();
    lab.succeed(&words(
        "init --output-dir model --tokenizer bpe --vocab-size 300 --data train.txt --arch llama --n-layers 2 \
         --n-heads 2 --hidden-size 32 --context-length 256",
    ));
    let rows: Vec<Value> = (0..40)
        .map(|i| json!({ "question": text[i * 50..i * 50 + 20 + i].to_owned(), "answer": format!("{i} it is.") }))
        .collect();
    write_rows(&lab, "chat.jsonl", &rows);
    lab
}

fn write_rows(lab: &Lab, name: &str, rows: &[Value]) {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    std::fs::write(lab.path(name), lines.join("\n")).unwrap();
}

const EVAL: &str = "eval --model model --max-length 192 --per-device-train-batch-size 3";
const TRAIN: &str = "train --model model --data chat.jsonl --max-length 192 --max-steps 6 \
    --per-device-train-batch-size 4 --learning-rate 1e-2 --sample-steps 0";

fn eval(lab: &Lab, flags: &str) -> (f64, u64) {
    let record = lab.json(&words(&format!("{EVAL} {flags}"))).remove(0);
    (record["loss"].as_f64().unwrap(), record["tokens"].as_u64().unwrap())
}

#[test]
fn the_loss_of_packed_rows_is_the_token_weighted_loss_of_the_samples_one_by_one() {
    let lab = lab();
    let (packed, n_packed) = eval(&lab, "--data chat.jsonl --packing");
    let rows = std::fs::read_to_string(lab.path("chat.jsonl")).unwrap();
    let (mut sum, mut n) = (0.0, 0);
    for row in rows.lines().take(6) {
        std::fs::write(lab.path("one.jsonl"), row).unwrap();
        let (loss, tokens) = eval(&lab, "--data one.jsonl");
        (sum, n) = (sum + loss * tokens as f64, n + tokens);
    }
    std::fs::write(lab.path("six.jsonl"), rows.lines().take(6).collect::<Vec<_>>().join("\n"))
        .unwrap();
    let (six, n_six) = eval(&lab, "--data six.jsonl --packing");
    assert_eq!(n_six, n);
    // The same numbers, added in another order.
    assert!((six - sum / n as f64).abs() < 1e-12, "{six} for {}", sum / n as f64);
    let (single, n_single) = eval(&lab, "--data chat.jsonl");
    assert_eq!(n_packed, n_single);
    assert!((packed - single).abs() < 1e-12, "{packed} for {single}");
}

/// A template may write the date: a run that goes on another day, without its token cache, has the rows it began with.
#[test]
fn a_run_goes_on_with_the_date_it_began_with() {
    let lab = lab();
    let template = "{{ strftime_now('%Y-%m-%d %H:%M') }}{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}";
    std::fs::write(lab.path("model/chat_template.jinja"), template).unwrap();
    lab.succeed(&words(&format!("{TRAIN} --save-steps 2 --output-dir whole")));
    let state = lab.path("whole/checkpoint-2/trainer_state.json");
    let state: Value = serde_json::from_slice(&std::fs::read(state).unwrap()).unwrap();
    assert_eq!(
        state["state"]["rows_made_s"].as_u64().unwrap() % 86400,
        0,
        "the day, not the second"
    );
    std::fs::remove_dir_all(lab.path("cache/tokens")).unwrap();
    lab.succeed(&words(&format!(
        "{TRAIN} --resume-from-checkpoint whole/checkpoint-2 --output-dir rest"
    )));
    let weights = |dir: &str| std::fs::read(lab.path(dir).join("model.safetensors")).unwrap();
    assert!(weights("rest") == weights("whole"));
}

#[test]
fn held_out_data_that_is_named_is_what_is_evaluated() {
    let lab = lab();
    std::fs::write(lab.path("run.yaml"), "data: [train.txt]\n").unwrap();
    let text = std::fs::read_to_string(lab.path("train.txt")).unwrap();
    std::fs::write(lab.path("held.txt"), &text[..2000]).unwrap();
    let (loss, n) = eval(&lab, "--data held.txt");
    assert_eq!(eval(&lab, "--config run.yaml --eval-data held.txt"), (loss, n));
    std::fs::write(lab.path("run.yaml"), "data: [train.txt]\neval_data: [train.txt]\n").unwrap();
    assert_eq!(eval(&lab, "--config run.yaml --data held.txt"), (loss, n));
}

#[test]
fn a_packed_run_that_is_resumed_ends_in_the_same_bits() {
    let lab = lab();
    let whole = lab.json(&words(&format!("{TRAIN} --packing --output-dir whole --save-steps 2")));
    let rest = lab.json(&words(&format!(
        "{TRAIN} --packing --output-dir rest --resume-from-checkpoint whole/checkpoint-4 --threads 1 \
         --per-device-train-batch-size 2 --gradient-accumulation-steps 2"
    )));
    let losses =
        |lines: &[Value]| -> Vec<f64> { lines.iter().filter_map(|l| l["loss"].as_f64()).collect() };
    assert_eq!(losses(&rest), losses(&whole)[4..]);
    let weights = |dir: &str| std::fs::read(lab.path(dir).join("model.safetensors")).unwrap();
    assert!(weights("rest") == weights("whole"));
}

#[test]
fn several_files_are_mixed_by_their_weights_and_the_settings_are_kept() {
    let lab = lab();
    write_rows(
        &lab,
        "more.jsonl",
        &[json!({ "text": "only this" }), json!({ "text": "and this" })],
    );
    let yaml = "data:\n  - path: chat.jsonl\n    weight: 0.5\n  - {path: chat2.jsonl, weight: 2}\n";
    std::fs::copy(lab.path("chat.jsonl"), lab.path("chat2.jsonl")).unwrap();
    std::fs::write(lab.path("run.yaml"), yaml).unwrap();
    let line = "train --config run.yaml --model model --max-length 192 --num-train-epochs 1 \
                --per-device-train-batch-size 10 --output-dir out --sample-steps 0";
    let lines = lab.json(&words(line));
    // Half of forty rows and forty rows twice, ten a step.
    assert_eq!(lines.last().unwrap()["steps"], 10);
    let kept = std::fs::read_to_string(lab.path("out/run.yaml")).unwrap();
    assert!(kept.contains("\"weight\":0.5"), "{kept}");
    std::fs::write(
        lab.path("run.yaml"),
        "data:\n  - {path: train.txt, weight: 1}\n  - {path: train.txt, weight: 0}\n",
    )
    .unwrap();
    lab.json(&words(&format!("{line} --max-steps 1")));
}

#[test]
fn data_without_anything_to_learn_broken_rows_and_unknown_formats_are_refused() {
    let lab = lab();
    let train =
        |data: &str| format!("train --model model --output-dir out --max-length 64 --data {data}");
    write_rows(&lab, "users.jsonl", &[json!({ "messages": [{ "role": "user", "content": "q" }] })]);
    let error = lab.fail(4, &words(&train("users.jsonl")));
    assert!(error.contains("has a token to learn"), "{error}");
    write_rows(
        &lab,
        "broken.jsonl",
        &[json!({ "prompt": "a", "completion": "b" }), json!({ "prompt": "a" })],
    );
    let error = lab.fail(4, &words(&train("broken.jsonl")));
    assert!(
        error.contains("broken.jsonl:2: missing key `completion` in `{\"prompt\":\"a\"}`"),
        "{error}"
    );
    let error = lab.fail(2, &words(&format!("{} --dataset-format chat", train("broken.jsonl"))));
    assert!(
        error.contains("`dataset_format` is `chat`")
            && error.contains("it may be preference, messages"),
        "{error}"
    );
    let error = lab.fail(4, &words(&format!("{} --data train.txt", train("chat.jsonl"))));
    assert!(error.contains("plain text cannot be mixed"), "{error}");
    let skipped = lab.run(&words(&format!(
        "{} --on-bad-row skip --max-steps 1 --sample-steps 0",
        train("broken.jsonl")
    )));
    let said = String::from_utf8_lossy(&skipped.stderr).into_owned();
    assert!(skipped.status.success() && said.contains("1 broken rows were passed over"), "{said}");
}

#[test]
fn inspect_shows_format_counts_lengths_and_what_is_supervised() {
    let lab = lab();
    let text = lab.succeed(&words(
        "data inspect chat.jsonl train.txt --model model --max-length 64 --samples 1",
    ));
    assert!(text.contains("chat.jsonl: 40 rows read as `question-answer`"), "{text}");
    assert!(text.contains("train.txt: 1 rows of text"), "{text}");
    // Beside conversations, rows of text are samples, in a run and here; plain text is refused there.
    std::fs::write(lab.path("texts.jsonl"), "{\"text\": \"a\"}\n{\"text\": \"b\"}\n").unwrap();
    let mixed =
        lab.run(&words("data inspect chat.jsonl texts.jsonl --model model --max-length 64"));
    let shown = [mixed.stdout, mixed.stderr].concat();
    let shown = String::from_utf8(shown).unwrap();
    assert!(shown.contains("texts.jsonl: 2 rows read as `text`; 2 samples"), "{shown}");
    assert!(text.contains("tokens") && text.contains("####"), "{text}");
    assert!(text.contains("[0\u{b7} ") || text.contains("[0"), "{text}");
    let lines = lab.json(&words("data inspect chat.jsonl --model model --samples 1"));
    let shown = lines[0]["shown"][0].as_array().unwrap();
    let supervised: String = shown
        .iter()
        .filter(|t| t["supervised"] == true)
        .map(|t| t["text"].as_str().unwrap())
        .collect();
    assert!(supervised.starts_with("0 it is."), "{supervised}");
    assert_eq!(lines[0]["samples"], 40);
}

//! The whole way of a model: made, planned, trained, evaluated, continued, all by the binary.

use crate::lab::{Lab, words};

/// A template or tokenizer of the model that was there before would be taken for the new one's.
#[test]
fn a_model_that_takes_the_place_of_another_leaves_none_of_its_files() {
    let lab = Lab::llama();
    lab.train("--max-length 64 --max-steps 1", "out");
    std::fs::write(lab.path("out/chat_template.jinja"), "{{ broken").unwrap();
    std::fs::write(lab.path("out/special_tokens_map.json"), "{}").unwrap();
    std::fs::write(lab.path("out/notes.md"), "mine").unwrap();
    lab.train("--max-length 64 --max-steps 1", "out");
    let is_there = |name: &str| lab.path("out").join(name).exists();
    assert!(!is_there("chat_template.jinja") && !is_there("special_tokens_map.json"));
    assert!(is_there("notes.md") && is_there("run.yaml") && is_there("tokenizer.json"));
}

#[test]
fn a_model_is_made_planned_trained_evaluated_and_continued() {
    let lab = Lab::llama();
    let run = "--model model --data train.txt --max-length 65 --per-device-train-batch-size 4";
    let budget: u64 = 24 << 20;
    let plan = lab.json(&words(&format!("plan {run} --eval-data eval.txt --memory 24MiB")));
    let peak = plan[0]["peak_bytes"].as_u64().unwrap();
    assert!(peak <= budget && peak == plan[0]["step_peak_bytes"].as_u64().unwrap());

    let train = format!(
        "train {run} --memory 24MiB --max-steps 12 --learning-rate 1e-2 --warmup-steps 0.2 \
         --lr-scheduler-type cosine --eval-data eval.txt --output-dir out"
    );
    let lines = lab.json(&words(&train));
    let (done, steps) = lines.split_last().unwrap();
    assert_eq!(steps.len(), 12);
    let keys = "step loss learning_rate grad_norm tokens step_s tokens_per_s rss_peak_bytes";
    for (i, step) in steps.iter().enumerate() {
        assert!(words(keys).iter().all(|&k| step[k].is_number()), "{step}");
        assert_eq!(
            (step["step"].as_u64(), step["tokens"].as_u64()),
            (Some(i as u64 + 1), Some(260))
        );
    }
    let loss = |i: usize| steps[i]["loss"].as_f64().unwrap();
    // A fresh model predicts its 65 characters alike.
    assert!((loss(0) - 65_f64.ln()).abs() < 0.1, "{}", loss(0));
    assert!(loss(11) < loss(0) - 0.5, "{} after {}", loss(11), loss(0));
    assert_eq!((done["done"].as_bool(), done["steps"].as_u64()), (Some(true), Some(12)));
    assert_eq!(done["budget_bytes"].as_u64(), Some(budget));
    assert!(done["rss_peak_bytes"].as_u64().unwrap() <= budget, "{done}");
    assert_eq!(done["plan_peak_bytes"].as_u64(), Some(peak));

    // `eval_loss` is what `ounce eval` says, whatever the number of rows at once.
    for rows in [1, 3, 16] {
        let eval = format!(
            "eval --model out --data eval.txt --max-length 65 --per-device-train-batch-size {rows}"
        );
        let eval = &lab.json(&words(&eval))[0];
        assert_eq!(eval["loss"], done["eval_loss"], "{rows} rows");
        // 2100 characters: 32 blocks of 65 and one of 20, each predicting one less.
        assert_eq!(eval["tokens"].as_u64(), Some(2100 - 33));
    }

    for name in [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "run.yaml",
        "plan.html",
        "loss.svg",
    ] {
        assert!(lab.path("out").join(name).is_file(), "{name}");
    }
    let metrics = std::fs::read_to_string(lab.path("out/metrics.jsonl")).unwrap();
    // A line per step, and one for the evaluation.
    assert_eq!(metrics.lines().count(), 13);

    let generate = words("generate --model out --prompt ROMEO: --max-new-tokens 20");
    let text = lab.succeed(&generate);
    assert_eq!(text.chars().count(), 21, "{text:?}");
    assert_eq!(text, lab.succeed(&generate));
    let drawn =
        |seed| lab.succeed(&[&generate[..], &["--temperature", "1", "--seed", seed]].concat());
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
}

#[test]
fn a_settings_file_does_what_its_flags_do_and_flags_win() {
    let lab = Lab::llama();
    let flags = "--max-length 64 --per-device-train-batch-size 2 --max-steps 2 --memory 32MiB";
    let by_flags = lab.train(flags, "flags");
    let yaml = "max_length: 64\nper_device_train_batch_size: 2\nmax_steps: 9\nmemory: 32MiB\n";
    std::fs::write(lab.path("run.yaml"), yaml).unwrap();
    let by_file = lab.train("--config run.yaml --max-steps 2", "file");
    by_file.assert_same_bits(&by_flags, "the settings file");
    // What a run leaves behind repeats it.
    let again = lab.train("--config flags/run.yaml", "again");
    again.assert_same_bits(&by_flags, "the resolved settings");
}

#[test]
fn a_trained_model_goes_on_from_its_own_directory() {
    let lab =
        Lab::with_model(&words("--arch gpt2 --n-layers 1 --hidden-size 32 --context-length 64"));
    let flags = "--per-device-train-batch-size 2 --max-steps 3 --learning-rate 1e-2";
    let first = lab.train(flags, "out");
    let args = format!("train --model out --data train.txt --output-dir out {flags}");
    let lines = lab.json(&words(&args));
    assert!(lines[0]["loss"].as_f64().unwrap() < first.losses[0]);
}

#[test]
fn the_pretrained_model_tells_its_published_story() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/stories260k-hf");
    let lab = Lab::empty();
    let expected = std::fs::read_to_string(format!("{model}/expected.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&expected).unwrap();
    let args = ["generate", "--model", model, "--prompt", "", "--max-new-tokens", "60"];
    let record = &lab.json(&args)[0];
    let ids: Vec<_> = expected["greedy_ids"].as_array().unwrap()[1..=60].to_vec();
    assert_eq!(record["token_ids"].as_array().unwrap(), &ids);
    let text = record["text"].as_str().unwrap();
    assert!(text.trim_start().starts_with("Once upon a time, there was a little girl"), "{text}");
}

#[test]
fn a_bpe_model_is_made_and_measured() {
    let lab = Lab::empty();
    let text = std::fs::read_to_string(crate::lab::SHAKESPEARE).unwrap();
    std::fs::write(lab.path("train.txt"), &text[..50_000]).unwrap();
    let config = r#"{"model_type": "llama", "vocab_size": 320, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 64, "tie_word_embeddings": false}"#;
    std::fs::write(lab.path("config.json"), config).unwrap();
    let init = "init --output-dir model --config config.json --tokenizer bpe --data train.txt";
    let made = &lab.json(&words(init))[0];
    assert_eq!(made["vocab_size"].as_u64(), Some(320));

    let bench = "bench step --model model --batch-size 2 --max-length 64 --steps 3 --memory 64MiB";
    let record = &lab.json(&words(&format!("{bench} --profile"))).pop().unwrap();
    for key in ["tok_per_s", "step_s_median", "peak_rss_mib", "plan_peak_mib", "predicted_step_s"] {
        assert!(record[key].as_f64().unwrap() > 0.0, "{key}: {record}");
    }
    let profile = &record["profile"];
    let classes = profile["classes"].as_array().unwrap();
    let shares: f64 = classes.iter().map(|c| c["share"].as_f64().unwrap()).sum();
    assert!(classes.len() >= 8 && shares > 0.0 && shares <= 1.0, "{profile}");
    let outside = profile["outside_products_share"].as_f64().unwrap();
    assert!(outside > 0.0 && outside < 1.0, "{profile}");
    let losses = record["losses"].as_array().unwrap();
    assert!(losses.len() == 4 && losses[3].as_f64() < losses[0].as_f64(), "{losses:?}");
}

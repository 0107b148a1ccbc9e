//! What is refused, with which exit code, and that nothing is left behind.

use serde_json::Value;

use crate::lab::{Lab, smallest_budget, words};

#[test]
fn what_is_not_built_is_refused_as_such() {
    let lab = Lab::empty();
    for line in [
        "chat --model x",
        "serve --model x --port 1",
        "search",
        "prune",
        "export --model x --format gguf --output-dir y --merge",
        "train --use-peft --lora-r 8",
    ] {
        let error = lab.fail(2, &words(line));
        assert!(error.contains("not built yet"), "{line}: {error}");
    }
}

#[test]
fn wrong_usage_names_the_nearest_match() {
    let lab = Lab::empty();
    let hints = [
        ("train --lerning-rate 1", "`--learning-rate`"),
        ("trian", "`train`"),
        ("train --batch-size 4", "`--per-device-train-batch-size`"),
        ("train --lr 1e-3", "`--learning-rate`"),
        ("train --precision BF16", "`bf16`"),
        ("train --precision bfloat16", "`bf16`"),
        ("train --precision fp16", "`f16`"),
        ("export --model x --format GGUF --output-dir y", "`gguf`"),
        ("tokenize", "see `ounce --help`"),
        ("init --output-dir m --tokenizer char --data abc.txt", "`--arch gpt2`"),
        ("train --learning-rate -1", "at least 0"),
        ("train --optimizer adam", "`adamw`"),
        ("train --memory 64", "`64MiB`"),
        ("train --memory 2gb", "`2GiB`"),
        ("train --max-steps 0", "at least 1"),
        ("plan --data x", "`--model DIR`"),
        ("init --output-dir m --arch gpt2 --tokenizer char", "`--data FILE`"),
        (
            "init --output-dir m --arch gpt2 --tokenizer char --data abc.txt --vocab-size 2",
            "--vocab-size 3",
        ),
        (
            "init --output-dir m --arch gpt2 --tokenizer char --data abc.txt --n-kv-heads 2",
            "leave it out",
        ),
        (
            "init --output-dir m --config c.json --n-layers 2 --tokenizer char --data abc.txt",
            "change the file",
        ),
        (
            "init --output-dir m --arch gpt2 --tokenizer bpe --data abc.txt --vocab-size 99999999999",
            "at most 4194304",
        ),
        ("train --warmup-steps 2.5", "a share of them below 1"),
        ("train --column-mapping mesages=x", "`messages`"),
        ("train --f16-demote", "`--precision f16`"),
        ("bench step --model gpt3", "tinyllama-1.1b"),
    ];
    std::fs::write(lab.path("abc.txt"), "abc").unwrap();
    for (line, hint) in hints {
        let error = lab.fail(2, &words(line));
        assert!(error.lines().last().unwrap().contains(hint), "{line}: {error}");
    }
    for number in ["nan", "inf", "fast"] {
        let error = lab.fail(2, &words(&format!("train --learning-rate {number}")));
        assert!(error.contains(&format!("`{number}` is not a finite number")), "{error}");
    }
    std::fs::write(lab.path("run.yaml"), "dataset_format: text\ndata: 5\n").unwrap();
    let error = lab.fail(2, &words("train --config run.yaml"));
    assert!(error.contains("run.yaml:2: `data`: expected a path"), "{error}");
    std::fs::write(lab.path("run.yaml"), "max_steps: 3\ndropout: 1.5\n").unwrap();
    let error = lab.fail(2, &words("train --config run.yaml"));
    assert!(error.contains("run.yaml:2: `dropout` is out of range: 1.5"), "{error}");
    let error = lab.fail(2, &words("train --config run.yaml --dropout 2"));
    assert!(error.contains("error: `dropout` is out of range: 2"), "{error}");
    std::fs::write(lab.path("run.yaml"), "max_steps: 3\nlr: 1e-3\n").unwrap();
    let error = lab.fail(2, &words("train --config run.yaml"));
    assert!(error.contains("run.yaml:2: unknown setting `lr`"), "{error}");
}

#[test]
fn wrong_models_and_data_are_named() {
    let lab = Lab::llama();
    let run = "--max-length 64 --max-steps 1 --output-dir out";
    let missing = lab.fail(4, &words(&format!("train --model nope --data train.txt {run}")));
    assert!(missing.contains("nope"), "{missing}");
    assert!(missing.contains("`ounce pull ORG/NAME`"), "{missing}");
    let file = "--model model/model.safetensors --data train.txt";
    let file = lab.fail(4, &words(&format!("train {file} {run}")));
    assert!(file.contains("model.safetensors is a file of weights"), "{file}");
    let missing = lab.fail(4, &words(&format!("train --model model --data nope.txt {run}")));
    assert!(missing.contains("nope.txt"), "{missing}");
    std::fs::write(lab.path("run.yaml"), "data: nope.txt\nmodel: model\n").unwrap();
    let planned = lab.fail(4, &words("plan --config run.yaml --max-length 64"));
    assert!(planned.contains("nope.txt"), "{planned}");

    // The last digit does not occur in the tokenizer's text.
    std::fs::write(lab.path("strange.txt"), "to be\nor not 9 to be\n".repeat(50)).unwrap();
    let strange = lab.fail(4, &words(&format!("train --model model --data strange.txt {run}")));
    assert!(strange.contains("strange.txt:2"), "{strange}");
    std::fs::write(lab.path("short.txt"), "to be").unwrap();
    let short = lab.fail(4, &words(&format!("train --model model --data short.txt {run}")));
    assert!(short.contains("short.txt"), "{short}");

    let weights = lab.path("model/model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let broken = lab.fail(4, &words(&format!("train --model model --data train.txt {run}")));
    assert!(broken.contains("model.safetensors"), "{broken}");
    assert!(!lab.path("out").exists());
}

/// Two changes together, where neither clipping off nor shorter rows are enough.
/// A text of one line, and so a vocabulary without the line feed that samples begin with.
#[test]
fn a_text_of_one_line_is_trained_on() {
    let lab = Lab::empty();
    std::fs::write(lab.path("dna.txt"), "ACGTTGCAAC".repeat(100)).unwrap();
    let sizes = "--n-layers 1 --hidden-size 16 --n-heads 2 --context-length 64";
    lab.succeed(&words(&format!(
        "init --output-dir dna --arch llama {sizes} --tokenizer char --data dna.txt"
    )));
    let run = "train --model dna --data dna.txt --max-steps 1 --output-dir out";
    for flags in ["", "--sample-steps 0 --sample-prompt x"] {
        lab.succeed(&words(&format!("{run} {flags}")));
    }
    let error = lab.fail(4, &words(&format!("{run} --sample-prompt x")));
    assert!(error.contains("`--sample-prompt`: character `x`"), "{error}");
}

#[test]
fn a_format_of_rows_is_none_of_plain_text() {
    let lab = Lab::llama();
    let run = "train --model model --output-dir out --max-steps 1 --data train.txt";
    let error = lab.fail(4, &words(&format!("{run} --dataset-format messages")));
    assert!(error.contains("train.txt: is plain text by its name"), "{error}");
    std::fs::write(lab.path("rows.jsonl"), "{\"question\": \"a\", \"answer\": \"b\"}\n").unwrap();
    let init = "init --output-dir m --arch gpt2 --tokenizer bpe --data rows.jsonl";
    let error = lab.fail(4, &words(init));
    assert!(
        error.contains("rows.jsonl: holds conversations") && error.contains("`--tokenizer DIR`"),
        "{error}"
    );
    let rows = run.replace("train.txt", "rows.jsonl");
    let error = lab.fail(4, &words(&format!("{rows} --column-mapping answer=solution")));
    assert!(error.contains("rows.jsonl:1: ") && error.contains("no key `solution`"), "{error}");
}

#[test]
fn a_budget_that_is_too_small_is_told_what_would_fit() {
    let arch = "--arch llama --n-layers 2 --hidden-size 256 --context-length 256";
    let lab = Lab::with_model(&words(arch));
    let plan = "plan --model model --data train.txt --per-device-train-batch-size 1";
    let refused =
        |mib: f64, flags: &str| lab.fail(3, &words(&format!("{plan} --memory {mib}MiB {flags}")));
    let smallest = |flags: &str| -> f64 {
        smallest_budget(&refused(1.0, flags)).strip_suffix("MiB").unwrap().parse().unwrap()
    };
    let [whole, unclipped] = ["", "--max-grad-norm 0"].map(smallest);
    let hint = |mib: f64| refused(mib, "").trim_end().lines().last().unwrap().to_owned();
    assert_eq!(
        hint(f64::midpoint(unclipped, whole)),
        format!("hint: `--max-grad-norm 0` needs {unclipped} MiB")
    );
    let shorter = smallest("--max-grad-norm 0 --max-length 128");
    assert!(shorter < unclipped && unclipped < smallest("--max-length 64"));
    assert_eq!(
        hint(f64::midpoint(shorter, unclipped)),
        format!("hint: `--max-grad-norm 0 --max-length 128` needs {shorter} MiB")
    );
    lab.succeed(&words(&format!(
        "{plan} --memory {shorter}MiB --max-grad-norm 0 --max-length 128"
    )));
}

/// Timing kernels is a phase of the first run on a machine, and of no later one.
#[test]
fn timing_kernels_is_told_as_a_phase_where_it_takes_place() {
    let lab = Lab::llama();
    let plan = "plan --model model --data train.txt --max-length 64 --memory 64MiB";
    let phases = |plan: &Value| -> Vec<String> {
        let phases = plan["phases"].as_array().unwrap();
        phases.iter().map(|p| p["phase"].as_str().unwrap().to_owned()).collect()
    };
    let [first, second] = [0, 1].map(|_| lab.json(&words(plan)).remove(0));
    let timed = first["phases"].as_array().unwrap().iter().find(|p| p["phase"] == "time kernels");
    assert!(timed.unwrap()["peak_bytes"].as_u64().unwrap() <= 64 << 20, "{first}");
    let mut before = phases(&first);
    before.retain(|phase| phase != "time kernels");
    assert_eq!(before, phases(&second));
}

#[test]
fn rows_beyond_learned_positions_are_refused_by_the_number_given() {
    let arch = "--arch gpt2 --n-layers 1 --hidden-size 32 --context-length 96";
    let lab = Lab::with_model(&words(arch));
    for command in
        ["generate --prompt a --max-new-tokens 3", "eval --data eval.txt", "plan --data train.txt"]
    {
        let line = format!("{command} --model model --max-length 500");
        let error = lab.fail(2, &words(&line));
        assert!(error.contains("max_length 500 exceeds the 96 positions"), "{line}: {error}");
    }
}

#[test]
fn what_the_machine_does_not_have_is_warned_of() {
    let lab = Lab::llama();
    let plan = "plan --model model --data train.txt --max-length 64 --memory 256MiB";
    let n_cores = std::thread::available_parallelism().unwrap().get();
    let quiet = lab.run(&words(&format!("{plan} --threads 1")));
    let said = String::from_utf8(quiet.stderr).unwrap();
    assert!(quiet.status.success() && !said.contains(" threads on "), "{said}");
    let many = lab.run(&words(&format!("{plan} --threads {}", n_cores + 1)));
    let said = String::from_utf8(many.stderr).unwrap();
    assert!(many.status.success() && said.contains(&format!(" on {n_cores} cores")), "{said}");
}

#[test]
fn a_diverging_run_stops_and_leaves_the_former_result() {
    let lab = Lab::llama();
    lab.train("--max-length 64 --max-steps 1", "out");
    let read = |name| std::fs::read(lab.path("out").join(name)).unwrap();
    let files = ["model.safetensors", "run.yaml", "metrics.jsonl"];
    let before = files.map(read);
    // Without clipping some parameters are updated before the gradients of others are known.
    for (norm, kept) in [(0, "nothing of the step is saved"), (1, "those before the step")] {
        let wild = format!(
            "train --model model --data train.txt --output-dir out --max-length 64 --max-steps 50 \
             --optimizer sgd --learning-rate 1e30 --max-grad-norm {norm} \
             --lr-scheduler-type constant"
        );
        let error = lab.fail(5, &words(&wild));
        for part in ["step 2: the ", "learning rate 1e30, ", "blocks ", kept] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
    assert!(files.map(read) == before);
    // A finite loss whose gradient is not finite: the step is not saved, what was saved before is whole.
    let run = "train --model model --data train.txt --max-length 64 --optimizer sgd \
        --learning-rate 1e30 --max-grad-norm 0 --lr-scheduler-type constant --save-steps 1";
    lab.succeed(&words(&format!("{run} --max-steps 1 --output-dir one")));
    let error = lab.fail(5, &words(&format!("{run} --max-steps 50 --output-dir wild")));
    assert!(error.contains("step 2: the loss is ") && error.contains("gradient norm"), "{error}");
    let saved = |out: &str| std::fs::read(lab.path(out).join("model.safetensors")).unwrap();
    assert!(saved("wild/checkpoint-1") == saved("one/checkpoint-1"));
    assert!(!lab.path("wild/checkpoint-2").exists() && !lab.path("wild/config.json").exists());
    assert!(
        !std::fs::read_dir(lab.path("out"))
            .unwrap()
            .any(|e| { e.unwrap().file_name().to_string_lossy().starts_with('.') })
    );
}

/// An update after which nothing is finite, and no later step that could notice.
#[test]
fn weights_that_the_last_update_broke_are_not_published() {
    let lab = Lab::llama();
    lab.train("--max-length 64 --max-steps 1", "out");
    let before = std::fs::read(lab.path("out/model.safetensors")).unwrap();
    let wild = "train --model model --data train.txt --output-dir out --max-length 64 --max-steps 1 \
        --optimizer sgd --learning-rate 1e38 --lr-scheduler-type constant";
    let evaluated = format!("{wild} --weight-decay 1e38 --eval-data eval.txt");
    let saved = format!("{wild} --weight-decay 1e38 --save-steps 1");
    for line in [format!("{wild} --weight-decay 1e38"), evaluated, saved] {
        let error = lab.fail(5, &words(&line));
        assert!(
            error.contains("step 1: after its update ") && error.contains("no model"),
            "{error}"
        );
    }
    assert!(std::fs::read(lab.path("out/model.safetensors")).unwrap() == before);
    assert!(!lab.path("out/checkpoint-1").exists());
}

/// Weights of 1e30 are finite, and so is a checkpoint of them; what they give is not.
#[test]
fn the_last_good_checkpoint_is_one_whose_weights_gave_a_loss() {
    let lab =
        Lab::with_model(&words("--arch gpt2 --n-layers 1 --hidden-size 32 --context-length 64"));
    let run = "train --model model --data train.txt --max-length 64 --max-steps 9 --sample-steps 0 \
        --learning-rate 1e30 --max-grad-norm 0 --warmup-steps 2 --save-steps 1 --save-total-limit 1";
    // The first update is of rate 0.
    let error = lab.fail(5, &words(&format!("{run} --output-dir out")));
    assert!(
        error.contains("step 3: ") && error.contains("last good checkpoint is out/checkpoint-1\n"),
        "{error}"
    );
    let on =
        "--resume-from-checkpoint out/checkpoint-1 --override --learning-rate 1e-3 --output-dir on";
    lab.succeed(&words(&format!("{run} {on}").replacen("--learning-rate 1e30 ", "", 1)));
    let evaluated =
        "--warmup-steps 0 --lr-scheduler-type constant --eval-data eval.txt --eval-steps 1";
    let run = run.replace("--warmup-steps 2", evaluated);
    let error = lab.fail(5, &words(&format!("{run} --output-dir bad")));
    assert!(error.contains("loss of the evaluation") && !error.contains("checkpoint"), "{error}");
}

#[test]
fn a_model_whose_weights_are_broken_generates_nothing() {
    let lab = Lab::llama();
    let path = lab.path("model/model.safetensors");
    let mut file = std::fs::read(&path).unwrap();
    let header_bytes = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    file[8 + header_bytes..].fill(0xff);
    std::fs::write(&path, file).unwrap();
    let error = lab.fail(5, &words("generate --model model --prompt a --max-new-tokens 3"));
    assert!(error.contains("not finite"), "{error}");
}

/// What a former run recorded beside its model, its precision above all, is not said of one that replaces it.
#[test]
fn a_model_of_no_run_has_no_settings_of_one() {
    let lab = Lab::empty();
    std::fs::create_dir(lab.path("m")).unwrap();
    std::fs::write(lab.path("m/run.yaml"), "precision: bf16\n").unwrap();
    std::fs::write(lab.path("abc.txt"), "abc").unwrap();
    let sizes = "--n-layers 1 --hidden-size 32 --n-heads 2";
    lab.succeed(&words(&format!(
        "init --output-dir m --arch gpt2 {sizes} --tokenizer char --data abc.txt"
    )));
    assert!(lab.path("m/model.safetensors").exists() && !lab.path("m/run.yaml").exists());
}

#[test]
fn an_export_takes_the_place_of_an_export_but_of_nothing_that_was_trained() {
    let lab = Lab::llama();
    lab.train("--max-length 64 --max-steps 1", "out");
    let export = "export --model out --format hf --output-dir exported";
    lab.succeed(&words(export));
    lab.succeed(&words(export));
    for (from, to) in [("model", "out"), ("out", "out"), ("exported", "./exported")] {
        let error =
            lab.fail(2, &words(&format!("export --model {from} --format hf --output-dir {to}")));
        assert!(error.contains(to) && error.contains("another `--output-dir`"), "{error}");
    }
}

/// Numbers of a configuration that no kernel can work with.
#[test]
fn a_configuration_that_cannot_be_computed_is_refused_by_name() {
    let lab = Lab::llama();
    let config = std::fs::read_to_string(lab.path("model/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    for (key, value) in [
        ("rms_norm_eps", serde_json::json!(0.0)),
        ("rms_norm_eps", serde_json::json!(1e-50)),
        ("rope_theta", serde_json::json!(-5.0)),
        ("head_dim", serde_json::json!(1100)),
    ] {
        let mut changed = config.clone();
        changed[key] = value;
        std::fs::write(lab.path("model/config.json"), changed.to_string()).unwrap();
        let error = lab.fail(4, &words("plan --model model --data train.txt --max-length 64"));
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn a_path_that_is_no_text_is_refused() {
    use std::os::unix::ffi::OsStrExt;
    let lab = Lab::empty();
    let path = std::ffi::OsStr::from_bytes(b"m\xff");
    let output = lab.command(&["train", "--output-dir", "out", "--model"]).arg(path).output();
    let output = output.unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && error.contains("UTF-8"), "{error}");
}

#[test]
fn output_that_has_no_room_is_a_failed_write() {
    let lab = Lab::llama();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let line = words("eval --model model --data eval.txt --max-length 64 --json");
    let output = lab.command(&line).stdout(full).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(6) && error.contains("standard output"), "{error}");
}

#[test]
fn a_failed_write_has_its_own_code() {
    let lab = Lab::llama();
    std::fs::write(lab.path("file"), "").unwrap();
    let run = "train --model model --data train.txt --max-length 64 --max-steps 1";
    let error = lab.fail(6, &words(&format!("{run} --output-dir file/out")));
    assert!(error.contains("cannot write file"), "{error}");
}

#[test]
fn a_fresh_model_takes_the_place_of_a_fresh_one_but_not_of_a_trained_one() {
    let lab = Lab::llama();
    let init = "init --output-dir model --tokenizer char --data train.txt --arch llama \
        --n-layers 1 --hidden-size 32 --seed 3";
    lab.succeed(&words(init));
    lab.train("--max-length 64 --max-steps 1", "out");
    let weights = || std::fs::read(lab.path("out/model.safetensors")).unwrap();
    let before = weights();
    let error = lab.fail(2, &words(&init.replace("-dir model", "-dir out")));
    assert!(error.contains("out: holds a model whose weights are not fresh"), "{error}");
    assert!(weights() == before);
}

/// Goal: the smallest budget is one for all plans and their tables. Method: so many rows that training and evaluation
/// have more instructions than the process declares room for.
#[test]
fn the_smallest_budget_of_many_rows_works_and_less_does_not() {
    let lab = Lab::with_model(&words(
        "--arch gpt2 --n-layers 2 --n-heads 2 --hidden-size 32 --context-length 64",
    ));
    let plan = |rows: u64, memory: &str| {
        format!(
            "plan --model model --data train.txt --eval-data eval.txt --max-length 64 \
             --per-device-train-batch-size {rows} --memory {memory}"
        )
    };
    for rows in [512, 1024] {
        let error = lab.fail(3, &words(&plan(rows, "1MiB")));
        let smallest = smallest_budget(&error);
        let mib: f64 = smallest.strip_suffix("MiB").unwrap().parse().unwrap();
        let with = |mib: f64| plan(rows, &format!("{}KiB", (mib * 1024.0) as u64));
        for more in [0.0, 0.0625, 0.5, 1.0, 2.0, 4.0, 7.5, 12.0] {
            lab.succeed(&words(&with(mib + more)));
        }
        for less in [0.0625, 0.5, 1.0] {
            let error = lab.fail(3, &words(&with(mib - less)));
            assert_eq!(smallest_budget(&error), smallest);
        }
    }
}

#[test]
fn numbers_that_leave_their_range_are_refused_by_name() {
    let lab = Lab::llama();
    let most = u64::MAX;
    for (line, name) in [
        (
            format!("bench step --model model --batch-size 1 --max-length 64 --warmup {most}"),
            "warmup",
        ),
        (format!("plan --model model --max-length 64 --sample-tokens {most}"), "sample_tokens"),
        ("eval --model model --eval-data eval.txt --learning-rate -1".to_owned(), "learning_rate"),
        ("bench step --model model --learning-rate -1".to_owned(), "learning_rate"),
    ] {
        let error = lab.fail(2, &words(&line));
        assert!(error.contains(&format!("`{name}` is out of range")), "{line}: {error}");
    }
}

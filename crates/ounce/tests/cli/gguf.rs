//! Models as GGUF files: written, evaluated, trained, continued, and turned back.

use crate::lab::{Lab, SHAKESPEARE, words};

/// A fresh model `model` with a byte-level tokenizer, and texts.
fn lab(arch: &str) -> Lab {
    let lab = Lab::empty();
    let text = std::fs::read_to_string(SHAKESPEARE).unwrap();
    std::fs::write(lab.path("train.txt"), &text[..20_000]).unwrap();
    std::fs::write(lab.path("eval.txt"), &text[20_000..22_100]).unwrap();
    lab.succeed(&words(&format!(
        "init --output-dir model --tokenizer bpe --vocab-size 300 --data train.txt --arch {arch} \
         --n-layers 2 --n-heads 2 --hidden-size 32 --context-length 64"
    )));
    lab
}

fn loss(lab: &Lab, model: &str) -> f64 {
    let eval = lab.json(&words(&format!("eval --model {model} --data eval.txt")));
    eval[0]["loss"].as_f64().unwrap()
}

#[test]
fn a_gguf_file_is_the_same_model_as_the_directory_it_came_from() {
    for arch in ["llama", "gpt2"] {
        let lab = lab(arch);
        let export = "export --model model --format gguf --dtype f32 --output-dir f32";
        let record = &lab.json(&words(export))[0];
        assert_eq!(record["dtype"], "f32");
        let modelfile = std::fs::read_to_string(lab.path("f32/Modelfile")).unwrap();
        assert!(modelfile.contains("num_ctx 64\nPARAMETER stop \"<|endoftext|>\""), "{modelfile}");
        let want = loss(&lab, "model");
        assert_eq!(loss(&lab, "f32/model.gguf"), want, "{arch}");

        lab.succeed(&words("export --model f32/model.gguf --format hf --output-dir back"));
        assert_eq!(loss(&lab, "back"), want, "{arch}");
        lab.succeed(&words("export --model model --format gguf --dtype q8_0 --output-dir q8"));
        let error = (loss(&lab, "q8/model.gguf") - want).abs();
        assert!(error > 0.0 && error < 0.01, "{arch}: {error}");

        let generate = |model: &str| {
            let args = format!("generate --model {model} --prompt the --max-new-tokens 8");
            lab.succeed(&words(&args))
        };
        assert_eq!(generate("f32/model.gguf"), generate("model"));
    }
}

#[test]
fn training_starts_from_a_gguf_file_and_ends_in_a_directory() {
    let lab = lab("llama");
    lab.succeed(&words("export --model model --format gguf --dtype f32 --output-dir gguf"));
    let run = "--data train.txt --max-steps 3 --per-device-train-batch-size 2 --memory 64MiB";
    let losses = |model: &str, out: &str| -> Vec<f64> {
        let args = format!("train --model {model} --output-dir {out} {run}");
        lab.json(&words(&args)).iter().filter_map(|l| l["loss"].as_f64()).collect()
    };
    assert_eq!(losses("gguf/model.gguf", "a"), losses("model", "b"));
    let bytes = |dir: &str| std::fs::read(lab.path(dir).join("model.safetensors")).unwrap();
    assert!(bytes("a") == bytes("b"));
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        assert!(lab.path("a").join(name).is_file(), "{name}");
    }
}

#[test]
fn weights_are_written_in_the_type_that_is_asked_for() {
    let lab = lab("llama");
    for (dtype, name, share) in
        [("bf16", "bfloat16", 2), ("f16", "float16", 2), ("f32", "float32", 1)]
    {
        let args = format!("export --model model --format hf --dtype {dtype} --output-dir {dtype}");
        lab.succeed(&words(&args));
        let config = std::fs::read_to_string(lab.path(dtype).join("config.json")).unwrap();
        assert!(config.contains(&format!("\"torch_dtype\": \"{name}\"")), "{config}");
        let size = |dir: &str| lab.path(dir).join("model.safetensors").metadata().unwrap().len();
        let (found, whole) = (size(dtype), size("model"));
        // The headers differ by what they say of the making.
        assert!((found * share).abs_diff(whole) < 8192, "{found} of {whole}");
        assert!((loss(&lab, dtype) - loss(&lab, "model")).abs() < 1e-2);
    }
}

#[test]
fn a_file_is_not_exported_over_itself() {
    let lab = Lab::llama();
    lab.succeed(&words(
        "init --output-dir m --arch llama --tokenizer bpe --vocab-size 300 --data train.txt",
    ));
    lab.succeed(&words("export --model m --format gguf --dtype f32 --output-dir g"));
    let before = std::fs::read(lab.path("g/model.gguf")).unwrap();
    std::os::unix::fs::symlink(lab.path("g"), lab.path("link")).unwrap();
    for (model, out) in [("g/model.gguf", "g"), ("link/model.gguf", "g"), ("g/model.gguf", "link")]
    {
        let line = format!("export --model {model} --format gguf --dtype q8_0 --output-dir {out}");
        let error = lab.fail(2, &words(&line));
        assert!(error.contains(&format!("{out} holds the file that is exported")), "{error}");
    }
    assert!(std::fs::read(lab.path("g/model.gguf")).unwrap() == before);
}

#[test]
fn what_cannot_be_exported_is_refused_and_leaves_nothing() {
    // A tokenizer of characters.
    let chars = Lab::llama();
    let error = chars.fail(4, &words("export --model model --format gguf --output-dir out"));
    assert!(error.contains("has a tokenizer of type \"WordLevel\""), "{error}");
    assert!(!chars.path("out").exists());
    let error =
        chars.fail(2, &words("export --model model --format hf --dtype q8_0 --output-dir out"));
    assert!(error.contains("no type q8_0") && !chars.path("out").exists(), "{error}");
    // A file that only begins like one.
    std::fs::write(chars.path("bad.gguf"), b"GGUF\x03\0\0\0\x01").unwrap();
    let error = chars.fail(4, &words("eval --model bad.gguf --data eval.txt"));
    assert!(error.contains("bad.gguf: the number of tensors at byte 8"), "{error}");
}

#[test]
fn a_name_that_is_not_in_the_cache_says_how_to_fetch_it() {
    let lab = Lab::llama();
    let error = lab.fail(4, &words("eval --model nobody/nothing --data eval.txt"));
    assert!(error.contains("hint: `ounce pull nobody/nothing` fetches it"), "{error}");
    // One that is there needs no path.
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let folder = lab.path("hf/hub/models--some--one");
    std::fs::create_dir_all(folder.join("refs")).unwrap();
    std::fs::create_dir_all(folder.join("snapshots")).unwrap();
    std::fs::write(folder.join("refs/main"), commit).unwrap();
    std::fs::rename(lab.path("model"), folder.join("snapshots").join(commit)).unwrap();
    assert!(loss(&lab, "some/one") > 0.0);
}

#[test]
fn a_hub_that_does_not_answer_is_no_fault_of_the_model() {
    let lab = Lab::empty();
    // Nobody listens there.
    let mut command = lab.command(&words("pull some/one"));
    let output = command.env("HF_ENDPOINT", "http://127.0.0.1:9").output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(6), "{error}");
    assert!(
        error.contains("127.0.0.1:9/api/models/some/one") && error.contains("hint: "),
        "{error}"
    );
    lab.fail(2, &words("pull not-a-name"));
}

//! 16 bits: what is stored, what is scaled, what is skipped, and what a model in them says of itself.

use serde_json::Value;

use crate::lab::{Lab, SHAKESPEARE, smallest_budget, words};

const RUN: &str = "train --model model --data train.txt --eval-data eval.txt --max-length 64 \
    --per-device-train-batch-size 4 --learning-rate 1e-2 --sample-steps 0";

fn gpt2() -> Lab {
    Lab::with_model(&words("--arch gpt2 --n-layers 2 --n-heads 2 --hidden-size 32"))
}

/// The header of a safetensors file.
fn header(lab: &Lab, file: &str) -> Value {
    let bytes = std::fs::read(lab.path(file)).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    serde_json::from_slice(&bytes[8..8 + n]).unwrap()
}

/// The type of the tensor whose name ends so.
fn dtype_of(header: &Value, end: &str) -> String {
    let (_, tensor) = header.as_object().unwrap().iter().find(|(n, _)| n.ends_with(end)).unwrap();
    tensor["dtype"].as_str().unwrap().to_owned()
}

fn config(lab: &Lab, dir: &str) -> Value {
    serde_json::from_slice(&std::fs::read(lab.path(dir).join("config.json")).unwrap()).unwrap()
}

/// The head's scratch follows what its gradient is stored in, also where the tokens are f32.
#[test]
fn a_class_in_f32_before_a_large_head_is_planned_and_runs() {
    let sizes = "--arch gpt2 --n-layers 1 --hidden-size 64 --n-heads 2 --context-length 64";
    let lab = Lab::with_model(&words(sizes));
    let bpe = format!(
        "init --output-dir bpe --tokenizer bpe --vocab-size 2500 --data {SHAKESPEARE} {sizes}"
    );
    lab.succeed(&words(&bpe));
    for flags in ["bf16 --precision-overrides norm=f32", "f16 --f16-demote"] {
        let run = "train --model bpe --data train.txt --max-length 64 --max-steps 2 --sample-steps 0 \
            --output-dir out --precision";
        lab.succeed(&words(&format!("{run} {flags}")));
    }
}

#[test]
fn a_bf16_run_ends_in_a_bf16_model_and_keeps_exact_masters_in_its_checkpoints() {
    let lab = gpt2();
    let lines = lab.json(&words(&format!(
        "{RUN} --precision bf16 --max-steps 20 --save-steps 10 --output-dir out"
    )));
    let done = lines.last().unwrap();
    let first = lines[0]["loss"].as_f64().unwrap();
    assert!(done["eval_loss"].as_f64().unwrap() < first - 0.3, "{done}");
    assert_eq!(done["skipped_steps"], 0);
    assert!(lines.iter().all(|l| l.get("loss_scale").is_none()));
    for dir in ["out", "out/checkpoint-10"] {
        let weights = header(&lab, &format!("{dir}/model.safetensors"));
        assert_eq!(dtype_of(&weights, "wte.weight"), "BF16");
        assert_eq!(config(&lab, dir)["torch_dtype"], "bfloat16");
    }
    let states = header(&lab, "out/checkpoint-10/optimizer.safetensors");
    let halves = states.as_object().unwrap().iter().filter(|(n, _)| n.contains("master_lo"));
    assert!(halves.clone().count() > 0 && halves.clone().all(|(_, t)| t["dtype"] == "I16"));
    // What is read in the precision of its run says what the run said.
    let run_yaml = std::fs::read_to_string(lab.path("out/run.yaml")).unwrap();
    assert!(run_yaml.contains("precision: \"bf16\""), "{run_yaml}");
    let eval = "eval --model out --data eval.txt --max-length 64";
    assert_eq!(lab.json(&words(eval))[0]["loss"], done["eval_loss"]);
    let in_f32 = &lab.json(&words(&format!("{eval} --precision f32")))[0]["loss"];
    let apart = (in_f32.as_f64().unwrap() - done["eval_loss"].as_f64().unwrap()).abs();
    assert!(0.0 < apart && apart < 0.05, "{apart}");
    lab.succeed(&words("generate --model out --prompt ROMEO: --max-new-tokens 3"));
    // The lower halves of the masters are gone in any other precision.
    let line = format!(
        "{RUN} --max-steps 20 --output-dir on --resume-from-checkpoint out/checkpoint-10 --override"
    );
    let error = lab.fail(2, &words(&line));
    assert!(error.contains("begun in precision bf16 and cannot go on in f32"), "{error}");
}

#[test]
fn f16_recovers_from_a_scale_that_is_too_large_and_says_what_it_skipped() {
    let lab = gpt2();
    let line =
        format!("{RUN} --precision f16 --init-loss-scale 16777216 --max-steps 30 --output-dir out");
    let output = lab.run(&words(&format!("{line} --json")));
    let (out, notes) = (String::from_utf8(output.stdout).unwrap(), output.stderr);
    let notes = String::from_utf8(notes).unwrap();
    assert!(output.status.success(), "{notes}");
    let lines: Vec<Value> = out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let (done, steps) = lines.split_last().unwrap();
    assert_eq!(steps.len(), 30, "a skipped step counts as a step and prints its line");
    let skipped: Vec<&Value> = steps.iter().filter(|l| l["skipped"] == true).collect();
    assert!(!skipped.is_empty() && skipped.len() < 20, "{} skipped", skipped.len());
    assert_eq!(done["skipped_steps"], skipped.len());
    let scale = |l: &Value| l["loss_scale"].as_f64().unwrap();
    assert_eq!(scale(&steps[0]), 16_777_216.0);
    assert_eq!(scale(&steps[29]), 16_777_216.0 / 2.0_f64.powi(skipped.len() as i32));
    assert!(notes.contains("overflowed first; loss scale 16777216.0 -> 8388608.0"), "{notes}");
    let loss = |i: usize| steps[i]["loss"].as_f64().unwrap();
    assert!(loss(29) < loss(0) - 0.3, "{} to {}", loss(0), loss(29));
    // Parameters are their own masters: the model is f32.
    assert_eq!(dtype_of(&header(&lab, "out/model.safetensors"), "wte.weight"), "F32");
    let metrics = std::fs::read_to_string(lab.path("out/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().next().unwrap(), out.lines().next().unwrap());
}

#[test]
fn f16_with_demotion_takes_a_class_that_overflows_back_to_f32() {
    let lab = gpt2();
    // No scale helps against this one: it overflows three times before it has come down.
    let line = format!(
        "{RUN} --precision f16 --f16-demote --init-loss-scale 1099511627776 --max-steps 8 \
         --output-dir out"
    );
    let output = lab.run(&words(&line));
    let notes = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && notes.contains("is f32 from here on"), "{notes}");
    // Without it the run ends, and says where.
    let stops = line.replace(
        "--f16-demote --init-loss-scale 1099511627776 ",
        "--learning-rate 1e5 --max-grad-norm 0 ",
    );
    let error = lab.fail(5, &words(&stops));
    assert!(error.contains(" left the range of f16 (`--f16-demote` takes it out"), "{error}");
    let plain = lab.json(&words("plan --model model --max-length 64 --precision f16"));
    let demoting = "plan --model model --max-length 64 --precision f16 --f16-demote";
    let peak = |plan: &Value| plan["peak_bytes"].as_u64().unwrap();
    let demoting = lab.json(&words(demoting));
    assert!(peak(&demoting[0]) > peak(&plain[0]), "the variants count in the peak");
}

/// Multiplies a tensor of a model.
fn scale(lab: &Lab, file: &str, name: &str, factor: f32) {
    let path = lab.path(file);
    let mut bytes = std::fs::read(&path).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    let offsets = &header[name]["data_offsets"];
    let at = |i: usize| start + offsets[i].as_u64().unwrap() as usize;
    for x in bytes[at(0)..at(1)].chunks_exact_mut(4) {
        let scaled = f32::from_le_bytes(x.try_into().unwrap()) * factor;
        x.copy_from_slice(&scaled.to_le_bytes());
    }
    std::fs::write(path, bytes).unwrap();
}

/// Goal: what has overflowed in training does not overflow in the evaluations and samples of the same run, nor in an
/// evaluation of its model.
#[test]
fn a_run_that_takes_classes_out_of_f16_evaluates_without_them() {
    let lab = gpt2();
    let file = "model/model.safetensors";
    scale(&lab, file, "transformer.h.0.mlp.c_fc.weight", 3e6);
    scale(&lab, file, "transformer.h.0.mlp.c_proj.weight", 1e-6);
    let run = RUN.replace("--sample-steps 0", "");
    let line = format!(
        "{run} --learning-rate 1e-5 --precision f16 --f16-demote --max-steps 12 --eval-data eval.txt --output-dir out"
    );
    let output = lab.run(&words(&line));
    let notes = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && notes.contains("is f32 from here on"), "{notes}");
    lab.succeed(&words("eval --model out --eval-data eval.txt --max-length 64"));
}

#[test]
fn a_step_that_is_not_finite_stops_the_run_or_is_skipped() {
    let lab = gpt2();
    for precision in ["f32", "bf16"] {
        let good = format!("{RUN} --precision {precision} --save-steps 2 --output-dir {precision}");
        lab.succeed(&words(&format!("{good} --max-steps 2")));
        // Weights of 1e30 make the next loss infinite or not a number.
        let bad = format!(
            "{good} --learning-rate 1e30 --max-grad-norm 0 --max-steps 6 --override \
             --resume-from-checkpoint {precision}/checkpoint-2"
        );
        let error = lab.fail(5, &words(&bad));
        let named = format!("the last good checkpoint is {precision}/checkpoint-");
        assert!(error.contains(&named), "{error}");
        let out = format!("{precision}-skip");
        // An evaluation of such weights would end the run.
        let skip = bad.replace("--eval-data eval.txt", "");
        let skip =
            skip.replace(&format!("--output-dir {precision}"), &format!("--output-dir {out}"));
        let lines = lab.json(&words(&format!("{skip} --on-nonfinite skip")));
        let (done, steps) = lines.split_last().unwrap();
        let skipped = steps.iter().filter(|l| l["skipped"] == true).count();
        assert!(skipped > 0 && done["skipped_steps"] == skipped, "{done}");
        assert!(steps.iter().all(|l| l["skipped"] == true || l["loss"].is_number()));
    }
}

#[test]
fn explain_precision_prints_the_table_of_the_model_with_its_overrides() {
    let lab = gpt2();
    let plan = "plan --model model --max-length 64 --precision bf16 --explain precision";
    let table = lab.succeed(&words(plan));
    assert!(table.contains("norm        stores bf16"), "{table}");
    assert!(table.contains("autocast: f32 (the widest input)"), "{table}");
    assert!(!table.contains("\nrope "), "GPT-2 has no rotary positions: {table}");
    let rows = lab.json(&words(&format!("{plan} --precision-overrides norm=f32,head=f32")));
    let stored = |class: &str| {
        let row = rows.iter().find(|r| r["class"] == class).unwrap();
        row["stored"].as_str().unwrap().to_owned()
    };
    assert_eq!([stored("norm"), stored("head"), stored("linear")], ["f32", "f32", "bf16"]);
    let error = lab.fail(2, &words(&format!("{plan} --precision-overrides norms=f32")));
    assert!(error.contains("hint: the nearest class is `norm`"), "{error}");
    std::fs::write(lab.path("run.yaml"), "precision: bf16\nprecision_overrides: {norm: f32}\n")
        .unwrap();
    let from_file = "plan --model model --max-length 64 --explain precision --config run.yaml";
    assert!(lab.succeed(&words(from_file)).contains("norm        stores f32"));
}

/// Goal: half the bytes for what is saved, in the plan and in the process. Method: a model whose
/// activations dwarf everything else, each precision in its smallest budget, which no timing of
/// kernels has a part in.
#[test]
fn bf16_activations_take_half_the_bytes_in_the_plan_and_in_the_process() {
    let lab = Lab::with_model(&words(
        "--arch llama --n-layers 1 --n-heads 4 --hidden-size 128 --context-length 8192",
    ));
    let run = "train --model model --data train.txt --max-length 8192 --max-steps 1 \
        --per-device-train-batch-size 1 --sample-steps 0 --threads 2";
    let [wide, narrow] = ["f32", "bf16"].map(|precision| {
        let flags = format!("{run} --precision {precision} --output-dir {precision}");
        let budget = smallest_budget(&lab.fail(3, &words(&format!("{flags} --memory 16MiB"))));
        let lines = lab.json(&words(&format!("{flags} --memory {budget}")));
        let done = lines.last().unwrap().clone();
        [done["plan_peak_bytes"].as_u64().unwrap(), done["rss_peak_bytes"].as_u64().unwrap()]
    });
    for (which, (wide, narrow)) in ["planned", "resident"].iter().zip(wide.iter().zip(narrow)) {
        // Both carry the process, parameters, moments and f32 sums, about 20 MiB.
        let share = (narrow - (15 << 20)) as f64 / (*wide - (15 << 20)) as f64;
        assert!(share < 0.62, "{which}: {narrow} of {wide} bytes");
    }
}

//! Nothing is lost: a run that was stopped goes on with the bits of one that never was.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::lab::{Lab, words};

const RUN: &str = "train --model model --data train.txt --max-length 64 --max-steps 8 \
    --per-device-train-batch-size 6 --learning-rate 1e-2 --dropout 0.1 --sample-steps 0";

fn gpt2() -> Lab {
    Lab::with_model(&words("--arch gpt2 --n-layers 1 --hidden-size 32 --context-length 64"))
}

fn weights(lab: &Lab, dir: &str) -> Vec<u8> {
    std::fs::read(lab.path(dir).join("model.safetensors")).unwrap()
}

/// The steps that a run printed.
fn steps(lines: &[serde_json::Value]) -> Vec<(u64, f64)> {
    let steps = lines.iter().filter_map(|l| l["step"].as_u64().zip(l["loss"].as_f64()));
    steps.collect()
}

#[test]
fn every_checkpoint_leads_to_the_same_end() {
    check_checkpoints("f32", 1..=20);
}

/// Masters are in the checkpoint whole, in two halves; so is the loss scale, which changes here.
#[test]
fn every_checkpoint_leads_to_the_same_end_in_16_bits() {
    check_checkpoints("bf16", [1, 4, 7]);
    check_checkpoints("f16 --init-loss-scale 67108864", [1, 4, 7]);
}

fn check_checkpoints(precision: &str, steps_to_try: impl IntoIterator<Item = usize>) {
    let lab = gpt2();
    let run = RUN.replace("--max-steps 8", "--max-steps 20");
    let run = format!("{run} --precision {precision}");
    let whole = lab.json(&words(&format!("{run} --output-dir whole --save-steps 1")));
    for k in steps_to_try {
        // Another budget, other threads, other batches: the same run.
        let line = format!(
            "{run} --output-dir from{k} --resume-from-checkpoint whole/checkpoint-{k} \
             --memory 20MiB --threads 1 --per-device-train-batch-size 2 \
             --gradient-accumulation-steps 3"
        );
        let rest = lab.json(&words(&line));
        assert_eq!(steps(&rest), steps(&whole)[k..]);
        assert!(weights(&lab, &format!("from{k}")) == weights(&lab, "whole"), "checkpoint {k}");
    }
    // A checkpoint is a model directory of its own.
    lab.succeed(&words("generate --model whole/checkpoint-3 --prompt ROMEO: --max-new-tokens 3"));
}

/// The length of gpt2's rows is 64 in the model already.
#[test]
fn a_length_that_is_the_model_s_is_the_same_whether_it_is_given_or_not() {
    let lab = gpt2();
    let run = RUN.replace("--max-length 64 --max-steps 8", "--max-steps 2");
    lab.succeed(&words(&format!("{run} --output-dir out --save-steps 1")));
    let settings = std::fs::read_to_string(lab.path("out/run.yaml")).unwrap();
    assert!(settings.contains("max_length: 64"), "{settings}");
    let resume = format!("{run} --output-dir on --resume-from-checkpoint out/checkpoint-1");
    lab.succeed(&words(&format!("{resume} --max-length 64")));
    lab.fail(2, &words(&format!("{resume} --max-length 32")));
}

#[test]
fn the_model_of_a_run_is_the_one_it_began_from() {
    let lab = gpt2();
    lab.succeed(&words(&format!("{RUN} --output-dir out --save-steps 4")));
    let resume = RUN.replace("--model model", "--model elsewhere");
    let line = format!(
        "{resume} --output-dir on --resume-from-checkpoint out/checkpoint-4 --save-steps 4"
    );
    let output = lab.run(&words(&line));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("`--model elsewhere` is not read"), "{said}");
    let settings = std::fs::read_to_string(lab.path("on/run.yaml")).unwrap();
    // By its full path: the run may go on in another working directory.
    let begun = lab.path("model").canonicalize().unwrap();
    assert!(settings.starts_with(&format!("model: {begun:?}\n")), "{settings}");
    let state = std::fs::read_to_string(lab.path("on/checkpoint-8/trainer_state.json")).unwrap();
    assert!(!state.contains("elsewhere"), "{state}");
}

#[test]
fn an_interrupted_run_ends_with_the_signal_s_code_and_goes_on_by_itself() {
    let lab = gpt2();
    let run = RUN.replace("--max-steps 8", "--max-steps 300");
    lab.succeed(&words(&format!("{run} --output-dir whole")));
    let auto = format!("{run} --output-dir out --resume-from-checkpoint auto --json");
    // Under `nohup`, which a child inherits, a closed terminal ends nothing.
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    let is_ignored = u64::from_str_radix(mask.trim(), 16).unwrap() & 1 == 1;
    let hangs_up = (!is_ignored).then_some(("HUP", 129));
    for (signal, code) in [("INT", 130), ("TERM", 143)].into_iter().chain(hangs_up) {
        let mut child = lab
            .command(&words(&auto))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut first = String::new();
        lines.read_line(&mut first).unwrap();
        assert!(first.contains("\"step\":"), "{first}");
        // Who watches sees the run, and nobody takes it for a model.
        let metrics = std::fs::read_to_string(lab.path("out/metrics.jsonl")).unwrap();
        assert!(metrics.contains(first.trim_end()), "{metrics}");
        assert!(lab.path("out/run.yaml").exists() && !lab.path("out/config.json").exists());
        let kill = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status();
        assert!(kill.unwrap().success());
        std::io::copy(&mut lines, &mut std::io::sink()).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code));
        assert!(!lab.path("out/model.safetensors").exists());
    }
    let rest = lab.json(&words(&auto[..auto.len() - " --json".len()]));
    assert!(steps(&rest)[0].0 > 2, "the run goes on where it was stopped");
    assert!(weights(&lab, "out") == weights(&lab, "whole"));
    // The metrics are those of one run.
    let metrics = std::fs::read_to_string(lab.path("out/metrics.jsonl")).unwrap();
    let numbers: Vec<_> = metrics
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["step"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, (1..=300).collect::<Vec<_>>());
}

#[test]
fn killed_runs_go_on_with_the_same_bits() {
    let lab = gpt2();
    let run = RUN.replace("--max-steps 8", "--max-steps 40");
    lab.succeed(&words(&format!("{run} --output-dir whole")));
    let auto =
        format!("{run} --output-dir out --save-steps 3 --resume-from-checkpoint auto --json");
    for n_lines in [2, 5, 9] {
        let mut child = lab
            .command(&words(&auto))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.by_ref().take(n_lines).count(), n_lines);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    lab.succeed(&words(&auto));
    assert!(weights(&lab, "out") == weights(&lab, "whole"));
}

#[test]
fn old_checkpoints_go_and_damaged_ones_are_passed_over() {
    let lab = gpt2();
    let run = format!("{RUN} --output-dir out --save-steps 2 --save-total-limit 2");
    lab.succeed(&words(&run));
    let there = |k: u64| lab.path(&format!("out/checkpoint-{k}")).is_dir();
    assert_eq!([2, 4, 6, 8].map(there), [false, false, true, true]);

    let damaged = lab.path("out/checkpoint-8/optimizer.safetensors");
    let mut bytes = std::fs::read(&damaged).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    let rest = lab.json(&words(&format!("{RUN} --output-dir out --resume-from-checkpoint auto")));
    assert_eq!(steps(&rest)[0].0, 7);
    let named = format!("{RUN} --output-dir o --resume-from-checkpoint out/checkpoint-8");
    assert!(lab.fail(4, &words(&named)).contains("optimizer.safetensors"));
    assert!(!Path::exists(&lab.path("o")));
}

/// A checkpoint that may be whole is not lost to a run that starts afresh over it.
#[test]
fn auto_starts_afresh_over_what_is_damaged_but_not_over_a_newer_format() {
    let lab = gpt2();
    let run = format!("{RUN} --output-dir out --resume-from-checkpoint auto");
    lab.succeed(&words(&format!("{run} --save-steps 8")));
    let manifest = lab.path("out/checkpoint-8/manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let newer = text.replace("\"format\": 1,", "\"format\": 2, \"more\": 3,");
    assert_ne!(text, newer);
    std::fs::write(&manifest, newer).unwrap();
    let error = lab.fail(4, &words(&run));
    assert!(error.contains("manifest.json: has format 2, but this program reads"), "{error}");
    std::fs::write(&manifest, &text[..40]).unwrap();
    assert_eq!(steps(&lab.json(&words(&run))).len(), 8);
}

/// A higher number is not newer where the run has gone back, or begun again, since.
#[test]
fn auto_goes_on_with_the_course_that_was_taken_last() {
    let lab = gpt2();
    let run = RUN.replace("--max-steps 8", "--lr-scheduler-type constant --save-steps 2");
    let run = format!("{run} --output-dir out");
    lab.succeed(&words(&format!("{run} --max-steps 8")));
    let lower = run.replace("1e-2", "1e-3");
    let back = "--resume-from-checkpoint out/checkpoint-2 --override";
    lab.succeed(&words(&format!("{lower} --max-steps 4 {back}")));
    let auto = |run: &str, n: u64| {
        let line = format!("{run} --max-steps {n} --resume-from-checkpoint auto");
        steps(&lab.json(&words(&line)))[0].0
    };
    assert_eq!(auto(&lower, 6), 5);
    // The same course goes on under its own number.
    assert_eq!(auto(&lower, 7), 7);
    let anew = format!("{run} --seed 7");
    lab.succeed(&words(&format!("{anew} --max-steps 2")));
    assert_eq!(auto(&anew, 3), 3);
}

/// The losses that `metrics.jsonl` has, and its evaluations.
fn metrics(lab: &Lab, dir: &str) -> (Vec<f64>, usize) {
    let text = std::fs::read_to_string(lab.path(dir).join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    let lines: Vec<serde_json::Value> = lines.collect();
    let losses = lines.iter().filter_map(|line| line["loss"].as_f64()).collect();
    (losses, lines.iter().filter(|line| !line["eval_loss"].is_null()).count())
}

/// Wherever it goes on, and whatever was done there meanwhile, the metrics are those of the run.
#[test]
fn metrics_go_on_from_those_of_the_checkpoint() {
    let lab = gpt2();
    lab.succeed(&words(&format!("{RUN} --output-dir one --save-steps 4")));
    lab.succeed(&words(&format!("{RUN} --output-dir other --seed 5")));
    let whole = metrics(&lab, "one");
    assert_ne!(metrics(&lab, "other"), whole);
    let on = "--resume-from-checkpoint one/checkpoint-4";
    lab.succeed(&words(&format!("{RUN} --output-dir other {on}")));
    assert_eq!(metrics(&lab, "other"), whole);
    // Begun anew by mistake, and then gone on with.
    let short = RUN.replace("--max-steps 8", "--max-steps 1");
    lab.succeed(&words(&format!("{short} --output-dir one --seed 5")));
    assert_eq!(metrics(&lab, "one").0.len(), 1);
    lab.succeed(&words(&format!("{RUN} --output-dir one {on}")));
    assert_eq!(metrics(&lab, "one"), whole);
}

#[test]
fn a_run_that_goes_on_at_its_end_records_no_second_evaluation() {
    let lab = gpt2();
    let run = format!(
        "{RUN} --output-dir out --save-steps 4 --eval-data eval.txt --resume-from-checkpoint auto"
    );
    let first = lab.json(&words(&run)).pop().unwrap();
    for _ in 0..2 {
        let again = lab.json(&words(&run)).pop().unwrap();
        assert_eq!(again["eval_loss"], first["eval_loss"]);
        assert_eq!(metrics(&lab, "out").1, 1);
    }
}

#[test]
fn settings_that_would_change_the_run_are_refused_by_name() {
    let lab = gpt2();
    lab.succeed(&words(&format!("{RUN} --output-dir out --save-steps 4")));
    let from = "--output-dir o --resume-from-checkpoint out/checkpoint-4";
    let changes = [
        ("--seed 7", "seed", "seed was 42 and is 7"),
        ("--weight-decay 0.1", "weight_decay", "weight_decay was 0.0 and is 0.1"),
        ("--max-steps 9", "max_steps", " and is 9"),
        (
            "--per-device-train-batch-size 5",
            "per_device_train_batch_size times gradient_accumulation_steps",
            "gradient_accumulation_steps was 6 and is 5",
        ),
    ];
    for (flag, name, values) in changes {
        let error = lab.fail(2, &words(&format!("{RUN} {from} {flag}")));
        assert!(error.contains(&format!("other settings: {name}\n")), "{error}");
        assert!(error.contains(values), "{error}");
    }
    // Who insists goes on, with a warning, and ends elsewhere.
    let on = lab.run(&words(&format!("{RUN} {from} --seed 7 --override --json")));
    assert!(on.status.success());
    let error = String::from_utf8(on.stderr).unwrap();
    assert!(error.contains("other settings: seed; it goes on with the new ones"), "{error}");
    assert!(error.contains("resuming after step 4 from out/checkpoint-4"), "{error}");
    assert!(weights(&lab, "o") != weights(&lab, "out"));
    // Another rate, and another optimizer, whose states begin at zero.
    for (flags, note) in [
        ("--learning-rate 1e-3", "other settings: learning_rate; "),
        ("--optimizer sgd", "its states begin at zero"),
    ] {
        let on = lab.run(&words(&format!("{RUN} {from} {flags} --override")));
        let error = String::from_utf8(on.stderr).unwrap();
        assert!(on.status.success() && error.contains(note), "{flags}: {error}");
        assert!(weights(&lab, "o") != weights(&lab, "out"), "{flags}");
    }
    lab.succeed(&words(&format!("{RUN} --output-dir s --save-steps 4 --optimizer sgd")));
    let adamw = "--output-dir o --resume-from-checkpoint s/checkpoint-4 --override";
    lab.succeed(&words(&format!("{RUN} {adamw}")));
    assert!(
        lab.fail(2, &words(&format!("{RUN} --output-dir p --override")))
            .contains("--resume-from-checkpoint")
    );
    // A constant rate does not depend on the length of the run.
    let constant = RUN.replace("train ", "train --lr-scheduler-type constant ");
    lab.succeed(&words(&format!("{constant} --output-dir c --save-steps 4 --max-steps 4")));
    let longer = format!("{constant} --output-dir c --resume-from-checkpoint auto");
    assert_eq!(steps(&lab.json(&words(&longer))).len(), 4);
}

/// The learning rates of a run by epochs depend on their number as those of a run by steps do.
#[test]
fn a_run_of_epochs_keeps_its_schedule_and_no_run_ends_before_its_checkpoint() {
    let lab = gpt2();
    let run = "train --model model --data train.txt --max-length 64 --per-device-train-batch-size 4 \
        --learning-rate 1e-2 --sample-steps 0";
    lab.succeed(&words(&format!("{run} --num-train-epochs 0.1 --save-steps 2 --output-dir out")));
    let resume = format!("{run} --resume-from-checkpoint out/checkpoint-4 --output-dir rest");
    let error = lab.fail(2, &words(&format!("{resume} --num-train-epochs 1")));
    assert!(error.contains("other settings: num_train_epochs"), "{error}");
    let error = lab.fail(2, &words(&format!("{resume} --max-steps 3 --override")));
    assert!(error.contains("4 steps are done, and the run is to have 3"), "{error}");
    lab.succeed(&words(&format!("{resume} --num-train-epochs 0.1")));
    let weights = |dir: &str| weights(&lab, dir);
    assert!(weights("rest") == weights("out"));
}

/// AdamW that goes on without states corrects its bias from its own first step on, and so does the run that resumes it.
#[test]
fn another_optimizer_counts_its_own_updates() {
    let lab = gpt2();
    let run = "train --model model --data train.txt --max-length 64 --per-device-train-batch-size 4 \
        --lr-scheduler-type constant --sample-steps 0";
    lab.succeed(&words(&format!(
        "{run} --optimizer sgd --learning-rate 0 --max-steps 3 --save-steps 3 --output-dir sgd"
    )));
    let adamw = format!("{run} --learning-rate 1e-3 --max-steps 6");
    let over =
        format!("{adamw} --save-steps 5 --resume-from-checkpoint sgd/checkpoint-3 --override");
    lab.succeed(&words(&format!("{over} --output-dir adamw")));
    let first = std::fs::read(lab.path("adamw/checkpoint-5/trainer_state.json")).unwrap();
    let first: serde_json::Value = serde_json::from_slice(&first).unwrap();
    assert_eq!(first["state"]["n_updates"], 2, "steps 4 and 5");
    let rest = format!("{adamw} --resume-from-checkpoint adamw/checkpoint-5 --output-dir rest");
    lab.succeed(&words(&rest));
    assert!(weights(&lab, "rest") == weights(&lab, "adamw"));
}

/// A scale of 65536 that nothing divides out again would make the first update of f32 that much too large.
#[test]
fn a_run_that_leaves_f16_leaves_its_scale_behind() {
    let lab = gpt2();
    let run = "train --model model --data train.txt --max-length 64 --per-device-train-batch-size 4 --optimizer sgd \
        --learning-rate 1e-3 --lr-scheduler-type constant --max-grad-norm 0 --sample-steps 0 --output-dir out";
    lab.succeed(&words(&format!("{run} --precision f16 --max-steps 3 --save-steps 3")));
    let over =
        format!("{run} --precision f32 --max-steps 6 --resume-from-checkpoint auto --override");
    let losses = steps(&lab.json(&words(&over)));
    assert!(losses.iter().all(|&(_, loss)| loss < 5.0), "{losses:?}");
}

/// The lower halves of bf16's masters belong to the weights, not to the optimizer that has changed.
#[test]
fn another_optimizer_keeps_the_exact_masters() {
    let lab = gpt2();
    let run = "train --model model --data train.txt --max-length 64 --per-device-train-batch-size 4 --precision bf16 \
        --lr-scheduler-type constant --sample-steps 0 --output-dir out --save-steps 1";
    lab.succeed(&words(&format!("{run} --learning-rate 1e-3 --max-steps 1")));
    let sgd = format!("{run} --optimizer sgd --learning-rate 0 --max-steps 2");
    lab.succeed(&words(&format!("{sgd} --resume-from-checkpoint auto --override")));
    // SGD has no other state.
    let file = std::fs::read(lab.path("out/checkpoint-2/optimizer.safetensors")).unwrap();
    let header_bytes = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let halves = &file[8 + header_bytes..];
    let n_set = halves.chunks_exact(2).filter(|half| **half != [0, 0]).count();
    assert!(n_set * 4 > halves.len(), "{n_set} of {} halves are not zero", halves.len() / 2);
}

#[test]
fn two_runs_in_one_directory_are_refused_and_so_is_a_checkpoint_as_one() {
    let lab = gpt2();
    let run = RUN.replace("--max-steps 8", "--max-steps 3000 --save-steps 1");
    let mut first = lab
        .command(&words(&format!("{run} --output-dir out --json")))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(first.stdout.take().unwrap());
    lines.read_line(&mut String::new()).unwrap();
    lines.read_line(&mut String::new()).unwrap();
    let error = lab.fail(2, &words(&format!("{RUN} --output-dir out")));
    assert!(error.contains("another run is writing to out"), "{error}");
    first.kill().unwrap();
    first.wait().unwrap();
    let error = lab.fail(2, &words(&format!("{RUN} --output-dir out/checkpoint-1")));
    assert!(error.contains("is a checkpoint"), "{error}");
    lab.succeed(&words(&format!("{RUN} --output-dir out")));
}

#[test]
fn data_that_changed_under_a_run_is_noticed() {
    let lab = gpt2();
    let run = "train --model model --data train.txt --max-length 64 --max-steps 4 --save-steps 2 \
        --sample-steps 0 --output-dir out";
    lab.succeed(&words(run));
    let text = std::fs::read_to_string(lab.path("train.txt")).unwrap();
    std::fs::write(lab.path("train.txt"), text.replacen("the", "eht", 1)).unwrap();
    let resume = format!("{run} --resume-from-checkpoint out/checkpoint-2");
    let error = lab.fail(4, &words(&resume));
    assert!(error.contains("train.txt: the data is not what it was"), "{error}");
    lab.succeed(&words(&format!("{resume} --override")));
    std::fs::write(lab.path("train.txt"), &text).unwrap();
    lab.succeed(&words(&resume));
}

#[test]
fn another_spelling_of_the_data_s_path_is_the_same_data() {
    let lab = gpt2();
    let run =
        "train --model model --max-length 64 --sample-steps 0 --save-steps 2 --output-dir out";
    lab.succeed(&words(&format!("{run} --data train.txt --max-steps 3")));
    let full = lab.path("train.txt");
    let resume = format!("{run} --max-steps 3 --resume-from-checkpoint out/checkpoint-2");
    for spelling in ["./train.txt", "model/../train.txt", full.to_str().unwrap()] {
        lab.succeed(&words(&format!("{resume} --data {spelling}")));
    }
    let error = lab.fail(2, &words(&format!("{resume} --data eval.txt")));
    assert!(error.contains("begun with other settings: data\n"), "{error}");
}

#[test]
fn a_run_that_goes_on_with_other_rows_per_step_goes_on_in_its_data() {
    let lab = gpt2();
    // With a rate of zero the loss says which rows a step has.
    let run = RUN.replace("--learning-rate 1e-2 --dropout 0.1", "--learning-rate 0");
    let rows = |n: u64| run.replace("batch-size 6", &format!("batch-size {n}"));
    lab.succeed(&words(&format!("{} --save-steps 3 --output-dir o", rows(6))));
    for (n, from) in [(2, 18), (9, 18)] {
        let go_on = format!(
            "{} --output-dir o{n} --resume-from-checkpoint o/checkpoint-3 --override --max-steps 6",
            rows(n)
        );
        let losses: Vec<f64> = steps(&lab.json(&words(&go_on))).into_iter().map(|s| s.1).collect();
        let line = rows(1).replace("--max-steps 8", "--max-steps 45");
        let single = steps(&lab.json(&words(&format!("{line} --output-dir one{n}"))));
        assert_eq!(losses.len(), 3);
        for (i, loss) in losses.iter().enumerate() {
            let first = from + i * n as usize;
            let of_rows = single[first..first + n as usize].iter().map(|s| s.1);
            let mean = of_rows.sum::<f64>() / n as f64;
            assert!((loss - mean).abs() < 1e-5, "{n} rows, step {}: {loss}, {mean}", i + 4);
        }
    }
}

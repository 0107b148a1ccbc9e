//! Streamed data through the binary: the rows of a cached run, any step found again, bounds that hold.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::lab::{Lab, SHAKESPEARE, smallest_budget, words};
use crate::signals::{first_step, stop};

/// A model, a text, and questions with answers.
fn lab() -> Lab {
    let lab = Lab::with_model(&words(
        "--arch gpt2 --n-layers 1 --n-heads 2 --hidden-size 32 --context-length 128",
    ));
    let text = std::fs::read_to_string(lab.path("train.txt")).unwrap();
    let row = |i: usize| json!({ "question": &text[i * 40..i * 40 + 25 + i % 9], "answer": "so" });
    for (name, rows) in [("chat.jsonl", 0..90), ("more.jsonl", 90..110)] {
        let lines: Vec<String> = rows.map(|i| row(i).to_string()).collect();
        std::fs::write(lab.path(name), lines.join("\n")).unwrap();
    }
    std::fs::write(lab.path("train.txt"), &text[..5_000]).unwrap();
    lab
}

const RUN: &str = "train --model model --max-length 64 --per-device-train-batch-size 6 \
    --learning-rate 1e-2 --dropout 0.1 --sample-steps 0";

/// Losses of the steps, and the bytes of the weights.
fn train(lab: &Lab, out: &str, flags: &str) -> (Vec<f64>, Vec<u8>) {
    let lines = lab.json(&words(&format!("{RUN} {flags} --output-dir {out}")));
    let losses = lines.iter().filter_map(|l| l["loss"].as_f64()).collect();
    (losses, std::fs::read(lab.path(out).join("model.safetensors")).unwrap())
}

#[test]
fn a_stream_that_fits_into_one_window_is_the_cached_run_bit_by_bit() {
    let lab = lab();
    // The text has 78 blocks, the chat 90 rows: both runs come into their second epoch.
    for (name, flags) in [
        ("text", "--data train.txt --max-steps 15"),
        ("chat", "--data chat.jsonl --max-steps 17"),
        ("packed", "--data chat.jsonl --max-steps 9 --packing --max-length 128"),
    ] {
        let cached = train(&lab, &format!("cached-{name}"), flags);
        let streamed = train(&lab, &format!("streamed-{name}"), &format!("{flags} --streaming"));
        assert_eq!(streamed.0, cached.0, "{name}");
        assert!(streamed.1 == cached.1, "{name}");
    }
    let kept = std::fs::read_to_string(lab.path("streamed-text/run.yaml")).unwrap();
    assert!(kept.contains("\nstreaming: true\n"), "{kept}");
}

/// Goal: any step of a stream is found again, with the same bits. Method: windows of 25 rows over epochs of 78 blocks,
/// six rows a step, so that steps, windows and epochs end in different places; every checkpoint near such an end, in
/// another budget, with other threads and workers, in other batches. The same with two files of chat rows, packed.
#[test]
fn every_checkpoint_of_a_stream_leads_to_the_same_end() {
    let lab = lab();
    std::fs::write(
        lab.path("mixed.yaml"),
        "data: [{path: chat.jsonl, weight: 0.5}, {path: more.jsonl, weight: 2}]\npacking: true\n",
    )
    .unwrap();
    for (name, data, windows, steps) in [
        ("text", "--data train.txt", 25, vec![1, 4, 5, 12, 13, 14, 17, 26, 27]),
        ("chat", "--config mixed.yaml --max-length 128", 32, vec![1, 2, 3, 5, 9, 14]),
    ] {
        let flags = format!("{data} --streaming --shuffle-buffer-size {windows} --max-steps 28");
        let whole = train(&lab, name, &format!("{flags} --save-steps 1"));
        assert_eq!(whole.0.len(), 28);
        for k in steps {
            let rest = train(
                &lab,
                &format!("{name}-{k}"),
                &format!(
                    "{flags} --resume-from-checkpoint {name}/checkpoint-{k} --memory 32MiB --threads 1 \
                     --dataloader-num-workers 3 --per-device-train-batch-size 2 \
                     --gradient-accumulation-steps 3"
                ),
            );
            assert_eq!(rest.0, whole.0[k..], "{name}, checkpoint {k}");
            assert!(rest.1 == whole.1, "{name}, checkpoint {k}");
        }
        // Another window is another order: comparing says something.
        let other = flags.replace(&format!("-size {windows}"), "-size 40");
        assert_ne!(train(&lab, &format!("{name}-other"), &other).0, whole.0);
    }
    let state = std::fs::read(lab.path("text/checkpoint-14/trainer_state.json")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    // 84 rows of epochs of 78.
    assert_eq!(state["state"]["cursor"], json!({ "epoch": 1, "row": 6 }));
}

#[test]
fn a_stream_that_was_killed_goes_on_with_the_same_bits_and_leaves_nothing_behind() {
    let lab = lab();
    let flags =
        "--data chat.jsonl --data more.jsonl --streaming --shuffle-buffer-size 20 --max-steps 40";
    let whole = train(&lab, "whole", flags);
    let auto = format!(
        "{RUN} {flags} --output-dir out --save-steps 3 --resume-from-checkpoint auto --json"
    );
    for n_lines in [2, 4, 7] {
        let mut command = lab.command(&words(&auto));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.by_ref().take(n_lines).count(), n_lines);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    lab.succeed(&words(&auto));
    assert!(std::fs::read(lab.path("out/model.safetensors")).unwrap() == whole.1);
    let left: Vec<_> = std::fs::read_dir(lab.path("cache/tokens"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("stream") || name.contains("window"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Steps of twelve windows each, stopped while one of them is awaited.
#[test]
fn a_stream_that_is_stopped_within_a_step_goes_on_with_the_same_bits() {
    let lab = lab();
    let flags = "--data train.txt --streaming --shuffle-buffer-size 4 --max-steps 6 \
        --per-device-train-batch-size 48";
    let whole = train(&lab, "whole", flags);
    for (i, signal) in ["TERM", "INT", "TERM"].into_iter().enumerate() {
        let out = format!("stopped-{i}");
        let run = format!("{RUN} {flags} --json --output-dir {out}");
        let (code, error) = stop(&lab, &run, signal, first_step);
        assert_eq!(code, Some(if signal == "INT" { 130 } else { 143 }), "{error}");
        let rest = train(&lab, &out, &format!("{flags} --resume-from-checkpoint auto"));
        assert_eq!(rest.0, whole.0[whole.0.len() - rest.0.len()..], "{error}");
        assert!(rest.1 == whole.1 && rest.0.len() < 6, "{error}");
    }
    // Steps of another size have other rows: the stream begins anew instead of counting below zero.
    let begun = "--save-steps 2 --max-steps 2 --output-dir begun";
    lab.succeed(&words(&format!("{RUN} {flags} {begun}")));
    let other = "--per-device-train-batch-size 2 --max-steps 4 --override --output-dir begun \
        --resume-from-checkpoint auto";
    let output = lab.run(&words(&format!("{RUN} {flags} {other}")));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("starts over"), "{said}");
}

#[test]
fn data_that_changed_between_save_and_resume_is_noticed() {
    let lab = lab();
    let flags = "--data chat.jsonl --streaming --shuffle-buffer-size 30 --max-steps 8";
    train(&lab, "out", &format!("{flags} --save-steps 4"));
    let resume =
        format!("{RUN} {flags} --output-dir again --resume-from-checkpoint out/checkpoint-4");
    let text = std::fs::read_to_string(lab.path("chat.jsonl")).unwrap();
    let change = |text: &str| std::fs::write(lab.path("chat.jsonl"), text).unwrap();
    change(&format!("{text}\n"));
    let error = lab.fail(4, &words(&resume));
    assert!(error.contains("chat.jsonl: changed from"), "{error}");
    // Of the same length, in the window that the run is in.
    change(&text.replacen("so", "no", 20));
    let error = lab.fail(4, &words(&resume));
    assert!(error.contains("window 0 of the stream is not what it was"), "{error}");
    let insists = lab.run(&words(&format!("{resume} --override")));
    let said = String::from_utf8(insists.stderr).unwrap();
    assert!(insists.status.success() && said.contains("warning: chat.jsonl: window 0"), "{said}");
    // Written again as it was.
    change(&text);
    let on = lab.run(&words(&resume));
    let said = String::from_utf8(on.stderr).unwrap();
    assert!(on.status.success() && said.contains("was written since the run began"), "{said}");
    let other = resume.replace("chat.jsonl", "more.jsonl");
    assert!(lab.fail(2, &words(&other)).contains("other settings: data"));
    let anew = lab.run(&words(&format!("{other} --override")));
    let said = String::from_utf8(anew.stderr).unwrap();
    assert!(anew.status.success() && said.contains("the stream starts over"), "{said}");
}

#[test]
fn the_plan_counts_what_streaming_takes_and_the_smallest_budget_holds_it() {
    let lab = lab();
    let flags = "--data chat.jsonl --threads 2";
    let plan = |flags: &str| lab.json(&words(&format!("plan --model model {flags}"))).remove(0);
    let (cached, streamed) = (plan(flags), plan(&format!("{flags} --streaming")));
    let bytes = |plan: &Value, key: &str| plan[key].as_u64().unwrap();
    let streaming = bytes(&streamed, "streaming_bytes");
    assert!(streaming > 1 << 20 && bytes(&cached, "streaming_bytes") == 0);
    let grown = bytes(&streamed, "baseline_bytes") - bytes(&cached, "baseline_bytes");
    assert_eq!(grown, streaming);
    let workers = plan(&format!("{flags} --streaming --dataloader-num-workers 4"));
    assert!(bytes(&workers, "streaming_bytes") > streaming);
    let table = lab.succeed(&words(&format!("plan --model model {flags} --streaming")));
    assert!(table.contains("data: streamed; ") && table.contains("two windows on disk"), "{table}");

    let run = format!("{flags} --streaming --shuffle-buffer-size 20 --max-steps 9");
    let tiny = format!("{RUN} {run} --output-dir x --memory 1MiB");
    let error = lab.fail(3, &words(&tiny));
    assert!(error.contains("  for streaming"), "{error}");
    let smallest = smallest_budget(&error);
    let tight = train(&lab, "tight", &format!("{run} --memory {smallest}"));
    assert!(tight == train(&lab, "free", &run));
}

/// A budget has more or fewer threads for the first window; none of them may make it too small for itself.
#[test]
fn the_smallest_budget_of_a_long_window_works_and_so_does_more() {
    let lab = Lab::empty();
    let init = "init --output-dir model --arch gpt2 --n-layers 1 --hidden-size 32 --context-length 64 \
        --tokenizer bpe --vocab-size 1024 --data";
    lab.succeed(&[&words(init)[..], &[SHAKESPEARE]].concat());
    let plan = "plan --model model --streaming --shuffle-buffer-size 1000000 --max-steps 3 --max-length 64 \
        --per-device-train-batch-size 2 --sample-steps 0 --threads 4 --data";
    let plan = [&words(plan)[..], &[SHAKESPEARE]].concat();
    let smallest = smallest_budget(&lab.fail(3, &[&plan[..], &["--memory", "1MiB"]].concat()));
    let least: f64 = smallest.strip_suffix("MiB").unwrap().parse().unwrap();
    for more in [0.0, 0.5, 1.5, 2.5, 4.0, 8.0] {
        let memory = format!("{}MiB", least + more);
        lab.succeed(&[&plan[..], &["--memory", &memory]].concat());
    }
    let less = format!("{}MiB", least - 1.0);
    let refused = lab.fail(3, &[&plan[..], &["--memory", &less]].concat());
    assert_eq!(smallest_budget(&refused), smallest);
}

/// Goal: what the plan declares for the process that tokenizes beside the steps holds, and both together
/// keep the budget. Method: both are looked at all the while that they live, in a run over windows of a
/// long text in its smallest budget. The program's pages are the same in both and counted once.
#[cfg(target_os = "linux")]
#[test]
fn the_process_beside_the_steps_takes_no_more_than_is_declared() {
    let lab = lab();
    std::fs::copy(SHAKESPEARE, lab.path("long.txt")).unwrap();
    let flags = "--data long.txt --streaming --shuffle-buffer-size 600 --max-steps 200 --threads 2";
    let plan = lab.json(&words(&format!("plan --model model {flags}"))).remove(0);
    let declared = plan["streaming_bytes"].as_u64().unwrap();
    let tiny = lab.fail(3, &words(&format!("{RUN} {flags} --output-dir out --memory 1MiB")));
    let smallest = smallest_budget(&tiny);
    let mib: f64 = smallest.strip_suffix("MiB").unwrap().parse().unwrap();
    let args = format!("{RUN} {flags} --output-dir out --json --memory {smallest}");
    let mut run = lab.command(&words(&args));
    let mut run = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let (mut most, mut together) = (0, 0);
    let status = loop {
        if let Some(status) = run.try_wait().unwrap() {
            break status;
        }
        let child = held_by_children(run.id());
        let own = std::fs::read_to_string(format!("/proc/{}/status", run.id()));
        let own = own.ok().and_then(|status| kib(&status, "VmHWM:")).unwrap_or(0) * 1024;
        (most, together) = (most.max(child), together.max(own + child));
        std::thread::sleep(std::time::Duration::from_millis(1));
    };
    assert!(status.success());
    assert!(most > 1 << 20, "the process was seen: {most} bytes");
    assert!(most <= declared, "{most} bytes of {declared} declared");
    assert!(together as f64 <= mib * 1048576.0, "{together} bytes in a budget of {smallest}");
}

/// The number after `key` in a file of `/proc`.
#[cfg(target_os = "linux")]
fn kib(status: &str, key: &str) -> Option<u64> {
    status.split_once(key)?.1.split_whitespace().next()?.parse().ok()
}

/// The bytes that a process which `parent` has started to tokenize holds by itself now.
#[cfg(target_os = "linux")]
fn held_by_children(parent: u32) -> u64 {
    let parent = format!("PPid:\t{parent}\n");
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let of = |process: std::fs::DirEntry| -> Option<u64> {
        let status = std::fs::read_to_string(process.path().join("status")).ok()?;
        // Until it runs the program anew, a child is a copy of its parent in every respect.
        let line = std::fs::read_to_string(process.path().join("cmdline")).ok()?;
        let is_child = status.contains(&parent) && line.contains("\0__");
        kib(&status, "RssAnon:").filter(|_| is_child)
    };
    processes.filter_map(of).max().unwrap_or(0) * 1024
}

#[test]
fn what_a_stream_cannot_do_is_refused_by_name() {
    let lab = lab();
    let train = format!("{RUN} --data train.txt --output-dir out");
    let error = lab.fail(2, &words(&format!("{train} --streaming")));
    assert!(error.contains("`--streaming` cannot count epochs"), "{error}");
    let error = lab.fail(2, &words(&format!("{train} --shuffle-buffer-size 9")));
    assert!(error.contains("`shuffle_buffer_size` says nothing without `--streaming`"), "{error}");
    std::fs::write(lab.path("broken.jsonl"), "{\"text\": \"a\"}\n{\"text\": 1}\n").unwrap();
    let broken = train.replace("train.txt", "broken.jsonl");
    let error = lab.fail(4, &words(&format!("{broken} --streaming --max-steps 1")));
    assert!(error.contains("broken.jsonl:2: "), "{error}");
    assert!(!lab.path("out").exists());
}

#[test]
fn a_broken_row_of_a_stream_ends_the_run_but_not_its_steps() {
    let lab = lab();
    let whole = std::fs::read_to_string(lab.path("chat.jsonl")).unwrap();
    let mut lines: Vec<&str> = whole.lines().collect();
    lines[60] = "{\"question\": 1}";
    std::fs::write(lab.path("broken.jsonl"), lines.join("\n")).unwrap();
    let run = format!(
        "{RUN} --data broken.jsonl --streaming --shuffle-buffer-size 20 --max-steps 12 --output-dir o"
    );
    let error = lab.fail(4, &words(&run));
    assert!(error.contains("broken.jsonl:61: "), "{error}");
    assert!(error.contains("the steps that were done are in o/checkpoint-"), "{error}");
    // As its hint says.
    lab.succeed(&words(&format!("{run} --resume-from-checkpoint auto --on-bad-row skip")));
    let skipped = format!("{run} --on-bad-row skip").replace("--output-dir o", "--output-dir p");
    lab.succeed(&words(&skipped));
    let weights = |out: &str| std::fs::read(lab.path(out).join("model.safetensors")).unwrap();
    assert!(weights("o") == weights("p"));
}

#[test]
fn the_settings_of_a_streamed_run_serve_an_evaluation_and_a_resume_that_says_a_default() {
    let lab = lab();
    let run =
        format!("{RUN} --data train.txt --streaming --max-steps 4 --save-steps 2 --output-dir o");
    lab.succeed(&words(&run));
    let resume = "--resume-from-checkpoint o/checkpoint-2 --shuffle-buffer-size 1000";
    lab.succeed(&words(&format!("{} {resume}", run.replace("--output-dir o", "--output-dir p"))));
    let evaluated = lab.json(&words("eval --config o/run.yaml --model o --eval-data eval.txt"));
    assert!(
        evaluated.last().unwrap()["eval_loss"].is_number()
            || evaluated.last().unwrap()["loss"].is_number()
    );
}

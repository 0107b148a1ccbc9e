//! SIGINT and SIGTERM in every phase: the exit code, what is saved, and that a second one ends at once.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::lab::{Lab, words};

const RUN: &str = "train --model model --data train.txt --max-length 64 --learning-rate 1e-2 \
    --per-device-train-batch-size 4 --json";

fn send(child: &Child, signal: &str) {
    let sent = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status();
    assert!(sent.unwrap().success());
}

/// Starts a run, sends the signal when `is_time`, and returns exit code and standard error.
pub(crate) fn stop(
    lab: &Lab,
    line: &str,
    signal: &str,
    is_time: impl Fn(&mut dyn BufRead) -> bool,
) -> (Option<i32>, String) {
    let mut command = lab.command(&words(line));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let begin = Instant::now();
    while !is_time(&mut stdout) {
        assert!(child.try_wait().unwrap().is_none(), "{line}: done before it was time");
        assert!(begin.elapsed() < Duration::from_secs(90), "{line}: it is never time");
        std::thread::sleep(Duration::from_millis(1));
    }
    send(&child, signal);
    // Somebody reads on: where nobody does, `generate` is done.
    let reader = std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
    let output = child.wait_with_output().unwrap();
    reader.join().unwrap().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// After the first step is printed, what comes next has begun.
pub(crate) fn first_step(stdout: &mut dyn BufRead) -> bool {
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    line.contains("\"step\":1,")
}

#[test]
fn stopped_while_evaluating_sampling_or_saving_a_run_is_saved_and_goes_on_with_the_same_bits() {
    let lab = Lab::with_model(&words("--arch gpt2 --n-layers 1 --hidden-size 32"));
    let text = std::fs::read_to_string(crate::lab::SHAKESPEARE).unwrap();
    std::fs::write(lab.path("long.txt"), &text[..400_000]).unwrap();
    let weights = |out: &str| std::fs::read(lab.path(out).join("model.safetensors")).unwrap();
    lab.succeed(&words(&format!("{RUN} --sample-steps 0 --output-dir whole --max-steps 3")));
    let phases = [
        ("evaluating", "TERM", 143, "--eval-data long.txt --eval-steps 1 --sample-steps 0"),
        ("sampling", "INT", 130, "--sample-steps 1 --sample-tokens 4000"),
        ("saving", "TERM", 143, "--save-steps 1 --sample-steps 0"),
    ];
    for (out, signal, code, flags) in phases {
        let run = format!("{RUN} --output-dir {out} --max-steps 3");
        let (found, error) = stop(&lab, &format!("{run} {flags}"), signal, first_step);
        assert_eq!(found, Some(code), "{out}: {error}");
        let last = error.trim_end().lines().last().unwrap();
        assert!(last.starts_with("hint: go on with `--resume-from-checkpoint "), "{out}: {error}");
        assert!(!lab.path(out).join("config.json").exists(), "{out}: this looks like a model");
        let resume = "--resume-from-checkpoint auto --sample-steps 0";
        let rest = lab.json(&words(&format!("{run} {resume}").replace(" --json", "")));
        assert!(rest[0]["step"].as_u64().is_some_and(|step| step > 1), "{out}: {rest:?}");
        assert!(weights(out) == weights("whole"), "{out}");
    }
}

/// What was shown of the run whole: each evaluation that was due, and a point of the curve for every step.
#[test]
fn an_evaluation_that_was_interrupted_is_made_up_for_and_no_event_is_lost() {
    let lab = Lab::with_model(&words("--arch gpt2 --n-layers 1 --hidden-size 32"));
    let text = std::fs::read_to_string(crate::lab::SHAKESPEARE).unwrap();
    std::fs::write(lab.path("long.txt"), &text[..400_000]).unwrap();
    // The directory holds a model: until the run is done its own files wait in a hidden one.
    lab.succeed(&words(&format!("{RUN} --sample-steps 0 --output-dir out --max-steps 1")));
    let run = format!(
        "{RUN} --sample-steps 0 --output-dir out --max-steps 3 --eval-data long.txt --eval-steps 1 \
         --resume-from-checkpoint auto"
    );
    let before = std::fs::read_to_string(lab.path("out/metrics.jsonl")).unwrap();
    let (code, error) = stop(&lab, &run, "TERM", first_step);
    assert_eq!(code, Some(143), "{error}");
    let metrics = std::fs::read_to_string(lab.path("out/metrics.jsonl")).unwrap();
    assert_eq!(metrics, before, "they are the model's, which is still there");
    lab.succeed(&words(&run));
    let metrics = std::fs::read_to_string(lab.path("out/metrics.jsonl")).unwrap();
    assert_eq!(metrics.matches("\"eval_loss\"").count(), 3, "{metrics}");
    let events: Vec<u8> = std::fs::read_dir(lab.path("out"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().contains("tfevents"))
        .flat_map(|path| std::fs::read(path).unwrap())
        .collect();
    let count = |tag: &[u8]| events.windows(tag.len()).filter(|w| *w == tag).count();
    // One of the run before, which stays, and one for each step and evaluation of this one.
    assert_eq!((count(b"train/loss"), count(b"eval/loss")), (1 + 3, 3));
}

/// Configuration and tokenizer are those that the run began with.
#[test]
fn a_model_that_is_made_anew_while_it_is_trained_changes_nothing() {
    let lab = Lab::with_model(&words("--arch gpt2 --n-layers 1 --hidden-size 32"));
    let config = std::fs::read(lab.path("model/config.json")).unwrap();
    let run = format!("{RUN} --sample-steps 0 --output-dir out --lr-scheduler-type constant");
    let make_anew = || {
        let init = "init --output-dir model --arch gpt2 --hidden-size 64 --tokenizer char --data train.txt";
        lab.succeed(&words(init));
    };
    let is_time = |stdout: &mut dyn BufRead| {
        let is_time = first_step(stdout);
        if is_time {
            make_anew();
        }
        is_time
    };
    let (code, error) = stop(&lab, &format!("{run} --max-steps 100000"), "TERM", is_time);
    assert_eq!(code, Some(143), "{error}");
    let step = error.rsplit_once("checkpoint-").unwrap().1;
    let step: u64 = step.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap();
    let end = step + 2;
    lab.succeed(&words(&format!("{run} --max-steps {end} --resume-from-checkpoint auto")));
    assert!(std::fs::read(lab.path("out/config.json")).unwrap() == config);
}

/// A stop before the first step of a run that goes on: the checkpoint it stands on is not written again.
#[test]
fn a_run_that_is_stopped_on_its_checkpoint_writes_no_second_one() {
    use std::os::unix::fs::MetadataExt;
    let lab = Lab::with_model(&words("--arch gpt2 --n-layers 1 --hidden-size 32"));
    let text = std::fs::read_to_string(crate::lab::SHAKESPEARE).unwrap();
    std::fs::write(lab.path("long.txt"), &text[..400_000]).unwrap();
    let run = format!("{RUN} --sample-steps 0 --output-dir out --save-steps 2");
    let (code, _) = stop(&lab, &format!("{run} --max-steps 100000"), "TERM", first_step);
    assert_eq!(code, Some(143));
    let newest = || {
        let entries =
            std::fs::read_dir(lab.path("out")).unwrap().map(|entry| entry.unwrap().path());
        let step = |path: &std::path::Path| {
            path.to_str()?.rsplit_once("checkpoint-")?.1.parse::<u64>().ok()
        };
        entries.filter_map(|path| Some((step(&path)?, path))).max().unwrap()
    };
    let (step, path) = newest();
    let inode = || std::fs::metadata(path.join("optimizer.safetensors")).unwrap().ino();
    let before = inode();
    // The evaluation of that step is made up for, which takes long enough to be stopped in.
    let events = || {
        let entries = std::fs::read_dir(lab.path("out")).unwrap();
        entries
            .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().contains("tfevents"))
            .count()
    };
    let resume = format!(
        "{run} --max-steps 100000 --eval-data long.txt --eval-steps {step} --resume-from-checkpoint auto"
    );
    let (code, error) = stop(&lab, &resume, "TERM", |_| events() == 2);
    assert_eq!(code, Some(143), "{error}");
    assert_eq!((newest().0, inode()), (step, before), "{error}");
}

#[test]
fn stopped_while_tokenizing_nothing_is_left() {
    let lab = Lab::empty();
    let text = std::fs::read_to_string(crate::lab::SHAKESPEARE).unwrap();
    std::fs::write(lab.path("train.txt"), text.repeat(20)).unwrap();
    std::fs::write(lab.path("short.txt"), &text[..20_000]).unwrap();
    let sizes = "--arch gpt2 --n-layers 1 --hidden-size 32 --context-length 64";
    let tokenizer = "--tokenizer bpe --vocab-size 300 --data short.txt";
    lab.succeed(&words(&format!("init --output-dir model {sizes} {tokenizer}")));
    let names = || {
        let entries = std::fs::read_dir(lab.path("cache/tokens")).into_iter().flatten().flatten();
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    let is_writing = || names().iter().any(|name| name.starts_with('.'));
    let lines = [
        (format!("{RUN} --output-dir out --max-steps 1"), "INT", 130),
        ("eval --model model --data train.txt".to_owned(), "TERM", 143),
    ];
    for (line, signal, code) in lines {
        let (found, error) = stop(&lab, &line, signal, |_| is_writing());
        assert_eq!(found, Some(code), "{error}");
        assert!(!lab.path("out").exists());
        // No token file looks finished.
        let visible = |name: &str| name.starts_with("tokens-");
        assert!(!names().iter().any(|name| visible(name)), "{:?}", names());
        std::fs::remove_dir_all(lab.path("cache/tokens")).unwrap();
    }
}

#[test]
fn commands_that_save_nothing_end_with_the_signal_s_code() {
    let lab = Lab::with_model(&words("--arch gpt2 --n-layers 1 --hidden-size 32"));
    let generate = "generate --model model --prompt ROMEO: --max-new-tokens 100000";
    let is_talking = |stdout: &mut dyn BufRead| !stdout.fill_buf().unwrap().is_empty();
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let (found, error) = stop(&lab, generate, signal, is_talking);
        assert_eq!(found, Some(code), "{error}");
    }
}

#[test]
fn generating_ends_where_nobody_reads_on() {
    let lab = Lab::with_model(&words("--arch gpt2 --n-layers 1 --hidden-size 32"));
    let line = words("generate --model model --prompt ROMEO: --max-new-tokens 100000000");
    let mut child = lab.command(&line).stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0];
    // The pipe is closed behind its first byte.
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// Hundredths of a second that a process has used, on all its threads.
fn processor_ticks(child: &Child) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    // Behind the name, which stands in parentheses: user and system time are fields 14 and 15.
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

#[test]
fn a_second_signal_ends_the_run_at_once() {
    let lab = Lab::with_model(&words("--arch gpt2 --n-layers 2 --hidden-size 128"));
    // One step takes a while, and so does what the first signal asks for.
    let run = "train --model model --data train.txt --max-length 256 --max-steps 2 \
        --per-device-train-batch-size 1024 --sample-steps 0 --output-dir out";
    let mut child = lab.command(&words(run)).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let is_planned = |line: String| line.starts_with("peak of the whole process");
    assert!(lines.by_ref().any(|line| is_planned(line.unwrap())));
    while !lab.path("out/metrics.jsonl").exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Nothing but the step takes a tenth of a second of processor time from here on.
    let ticks = processor_ticks(&child);
    while processor_ticks(&child) < ticks + 10 {
        std::thread::sleep(Duration::from_millis(1));
    }
    send(&child, "INT");
    std::thread::sleep(Duration::from_millis(50));
    // Another one counts as a second one, too.
    send(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(!lab.path("out/checkpoint-1").exists(), "the run ended before its step was done");
}

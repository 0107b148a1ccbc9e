//! A disk that fails while a run saves: exit code 6, the bytes needed, and nothing lost.
//!
//! Requests fail inside the library, through the seam below all writing, and inside the kernel, by a limit
//! on the size of a file.

use std::path::Path;
use std::sync::Arc;

use ounce_io::Disk;
use ounce_io::testing::{Fault, FaultyDisk};
use ounce_train::{Environment, Error, Observer, Settings, StepRecord};

use crate::lab::{Lab, words};

const RUN: &str = "train --model model --data train.txt --max-length 64 --max-steps 3 \
    --per-device-train-batch-size 4 --learning-rate 1e-2 --sample-steps 0 --save-steps 1";

fn gpt2() -> Lab {
    Lab::with_model(&words("--arch gpt2 --n-layers 1 --hidden-size 32 --context-length 64"))
}

fn weights(lab: &Lab, out: &str) -> Vec<u8> {
    std::fs::read(lab.path(out).join("model.safetensors")).unwrap()
}

/// The settings of [`RUN`] that goes on in `out`.
fn settings(lab: &Lab, out: &str) -> Settings {
    let value = serde_json::json!({
        "model": lab.path("model"), "data": [lab.path("train.txt")], "output_dir": lab.path(out),
        "max_length": 64, "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "sample_steps": 0, "save_steps": 1, "resume_from_checkpoint": "auto", "memory": "64MiB",
    });
    Settings::resolve(None, value.as_object().unwrap()).unwrap()
}

/// Counts steps.
#[derive(Default)]
struct Steps(u64);

impl Observer for Steps {
    fn step(&mut self, _: &StepRecord) {
        self.0 += 1;
    }
}

/// Trains in this process on a disk of the test's choice; steps that were done.
fn train(lab: &Lab, out: &str, disk: Arc<dyn Disk>) -> (u64, Result<(), Error>) {
    let worker = env!("CARGO_BIN_EXE_ounce").into();
    let env = Environment { disk, ..Environment::new(worker, lab.path("cache")) };
    let mut steps = Steps::default();
    let done = ounce_train::train(&settings(lab, out), &env, &mut steps).map(|_| ());
    (steps.0, done)
}

#[test]
fn a_request_that_fails_anywhere_in_a_run_loses_no_checkpoint_and_the_run_goes_on() {
    let lab = gpt2();
    train(&lab, "whole", ounce_io::real_disk()).1.unwrap();
    let whole = weights(&lab, "whole");
    let begin = |out: &str, fault, at| {
        // Begun before: what is there must not be lost.
        let out = lab.path(out);
        std::fs::create_dir(&out).unwrap();
        copy(&lab.path("whole/checkpoint-1"), &out.join("checkpoint-1"));
        Arc::new(FaultyDisk::new(&out, fault, at).unwrap())
    };
    let disk = begin("undisturbed", Fault::None, 0);
    train(&lab, "undisturbed", disk.clone()).1.unwrap();
    let n = disk.n_requests();
    assert!(n > 60, "{n} requests of two checkpoints and a model");
    // `ounce-io` tries every fault at every request; here is tried that the run above it bears them.
    let faults = [Fault::Io, Fault::Full, Fault::Short].into_iter().cycle();
    for (at, fault) in (1..=n).step_by(5).zip(faults) {
        let (out, what) = (format!("out-{at}"), format!("{fault:?} at request {at} of {n}"));
        let disk = begin(&out, fault, at);
        let (_, done) = train(&lab, &out, disk);
        if let Err(error) = done {
            assert!(matches!(error, Error::Files { .. }), "{what}: {error}");
            let text = error.to_string();
            assert!(text.contains(" bytes") && text.contains("\nhint: "), "{what}: {text}");
            assert!(!lab.path(&out).join("config.json").exists(), "{what}: looks like a model");
            let (steps, done) = train(&lab, &out, ounce_io::real_disk());
            assert!(done.is_ok() && steps <= 2, "{what}: {steps} steps, {done:?}");
        } else {
            // The last three requests take away what the publication has left behind.
            assert!(fault != Fault::Full || at + 3 > n, "{what}");
        }
        assert!(weights(&lab, &out) == whole, "{what}");
    }
}

#[test]
fn a_run_whose_result_has_no_room_is_refused_before_its_first_step() {
    #[derive(Debug)]
    struct Small;
    impl Disk for Small {
        fn free_bytes(&self, _: &Path) -> std::io::Result<u64> {
            Ok(100_000)
        }
    }
    let lab = gpt2();
    let (steps, done) = train(&lab, "out", Arc::new(Small));
    let error = done.unwrap_err();
    assert!(matches!(error, Error::Files { .. }) && steps == 0, "{error}");
    let text = error.to_string();
    for part in ["out/model.safetensors (", " bytes are needed in all): the disk has 100000 bytes"]
    {
        assert!(text.contains(part), "{text}");
    }
    assert!(!lab.path("out").exists());
}

#[test]
fn a_file_that_may_not_grow_ends_the_run_with_6_and_what_was_saved_before_goes_on() {
    let lab = gpt2();
    lab.succeed(&words(&format!("{RUN} --output-dir whole")));
    copy(&lab.path("whole/checkpoint-2"), &lab.path("out/checkpoint-2"));
    let run = format!("{RUN} --output-dir out --resume-from-checkpoint auto");
    // 64 blocks of 512 or 1024 bytes, as the shell has it: less than the weights.
    let limited =
        format!("ulimit -f 64 && exec {} {run} --max-steps 3", env!("CARGO_BIN_EXE_ounce"));
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &limited]).current_dir(lab.path(""));
    let output = command.env("OUNCE_CACHE_DIR", lab.path("cache")).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(6), "{error}");
    for part in ["cannot save ", "checkpoint-3", " bytes are needed in all", "`ulimit -f`"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!lab.path("out/model.safetensors").exists());
    let rest = lab.json(&words(&run));
    assert_eq!(rest[0]["step"].as_u64(), Some(3));
    assert!(weights(&lab, "out") == weights(&lab, "whole"));
}

#[test]
fn eval_completes_a_publication_that_a_crash_interrupted() {
    let lab = gpt2();
    lab.succeed(&words(&format!("{RUN} --output-dir out")));
    let eval = words("eval --model out --data eval.txt --max-length 64");
    let before = lab.json(&eval);
    // As a crash between the two halves of a publication leaves it.
    let names = ["config.json", "model.safetensors"];
    std::fs::create_dir(lab.path("out/.publishing")).unwrap();
    for name in names {
        std::fs::rename(lab.path("out").join(name), lab.path("out/.publishing").join(name))
            .unwrap();
    }
    let there = std::fs::read_dir(lab.path("out")).unwrap();
    let there = there.map(|e| e.unwrap().file_name().into_string().unwrap());
    let all: Vec<String> = there.filter(|n| n.starts_with("tok") || n.starts_with("gen")).collect();
    let all = all.iter().map(String::as_str).chain(names).collect::<Vec<_>>();
    std::fs::write(lab.path("out/.publishing/.files"), all.join("\n")).unwrap();
    assert_eq!(lab.json(&eval), before);
    assert!(!lab.path("out/.publishing").exists());
}

/// Copies a directory of files.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

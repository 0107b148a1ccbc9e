//! Every request of a save fails once, in every way, and the power is cut after each.
//!
//! Method: the requests of one undisturbed save are counted; then the save is repeated with a fault at request 1, 2,
//! and so on to the last, each time in a fresh directory that holds a good checkpoint or model already.

#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ounce_io::checkpoint::newest_valid;
use ounce_io::testing::{Fault, FaultyDisk, SmallRun, Survival};
use ounce_io::{AtomicFile, Disk, ErrorKind, IoError, StagingDir, complete_publication};

const SURVIVALS: [Survival; 3] = [Survival::Nothing, Survival::All, Survival::Torn(1)];

/// A directory for one attempt, with a model to begin from.
struct Arena {
    dir: tempfile::TempDir,
    run: SmallRun,
    out: PathBuf,
}

impl Arena {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        fs::create_dir(&model).unwrap();
        let run = SmallRun::new(&model).unwrap();
        let out = dir.path().join("out");
        Self { dir, run, out }
    }

    fn disk(&self, fault: Fault, at: u64) -> Arc<FaultyDisk> {
        Arc::new(FaultyDisk::new(self.dir.path(), fault, at).unwrap())
    }

    fn good_disk(&self) -> Arc<dyn Disk> {
        self.disk(Fault::None, 0)
    }

    /// With a checkpoint of step 1 already there.
    fn with_checkpoint() -> Self {
        let arena = Self::new();
        arena.run.save(arena.good_disk(), &arena.out, 1).unwrap();
        arena
    }

    fn hidden_names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.out).into_iter().flatten();
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with('.')).collect()
    }

    /// The newest checkpoint is whole and of one of these steps; a further save and resume work.
    fn check_checkpoints(&self, may_be: &[u64], what: &str) {
        let newest = newest_valid(&self.out).unwrap();
        assert!(newest.skipped.is_empty(), "{what}: half a checkpoint: {:?}", newest.skipped);
        let checkpoint = newest.checkpoint.unwrap_or_else(|| panic!("{what}: lost"));
        let step = checkpoint.state().step;
        assert!(may_be.contains(&step), "{what}: found step {step}");
        self.run.check(&checkpoint, step);
        self.run.save(self.good_disk(), &self.out, 3).unwrap();
        self.run.check(&newest_valid(&self.out).unwrap().checkpoint.unwrap(), 3);
        assert!(self.hidden_names().is_empty(), "{what}: {:?}", self.hidden_names());
    }
}

/// Requests of one undisturbed `action`.
fn n_requests(arena: &Arena, action: impl Fn(&Arena, Arc<dyn Disk>)) -> u64 {
    let disk = arena.disk(Fault::None, 0);
    action(arena, disk.clone());
    disk.n_requests()
}

fn check_error(error: &IoError, names: &str, what: &str) {
    assert_eq!(error.kind(), ErrorKind::WriteFailed, "{what}");
    let message = error.to_string();
    let own_temp = format!(".{}-", std::process::id());
    let is_clear =
        message.contains(names) && message.contains(" bytes") && !message.contains(&own_temp);
    assert!(is_clear && message.contains("\nhint: "), "{what}: {message}");
}

#[test]
fn a_save_that_fails_anywhere_leaves_the_last_checkpoint_and_says_what_it_needs() {
    let n = n_requests(&Arena::with_checkpoint(), |a, disk| {
        a.run.save(disk, &a.out, 2).unwrap();
    });
    assert!(n > 30, "{n} requests");
    for at in 1..=n {
        for fault in [Fault::Io, Fault::Full, Fault::Short] {
            let what = format!("{fault:?} at request {at} of {n}");
            let arena = Arena::with_checkpoint();
            let saved = arena.run.save(arena.disk(fault, at), &arena.out, 2);
            match saved {
                Ok(_) => assert!(fault != Fault::Io || at == n, "{what}"),
                Err(error) => {
                    check_error(&error, "checkpoint-2", &what);
                    assert!(error.to_string().contains("are needed in all"), "{what}: {error}");
                    assert!(arena.hidden_names().is_empty(), "{what}: {:?}", arena.hidden_names());
                }
            }
            arena.check_checkpoints(&[1, 2], &what);
        }
    }
}

#[test]
fn a_power_cut_anywhere_in_a_save_leaves_a_whole_checkpoint() {
    let n = n_requests(&Arena::with_checkpoint(), |a, disk| {
        a.run.save(disk, &a.out, 2).unwrap();
    });
    for at in 1..=n + 1 {
        for survival in SURVIVALS {
            let what = format!("crash at request {at} of {n}, {survival:?}");
            let arena = Arena::with_checkpoint();
            let disk = arena.disk(Fault::Crash, at);
            let saved = arena.run.save(disk.clone(), &arena.out, 2);
            disk.power_cut(survival).unwrap();
            // Once a save has reported success it must be there.
            arena.check_checkpoints(if saved.is_ok() { &[2] } else { &[1, 2] }, &what);
        }
    }
}

#[test]
fn a_power_cut_while_a_step_is_saved_again_leaves_one_of_the_two() {
    let arena = Arena::with_checkpoint();
    let n = n_requests(&arena, |a, disk| {
        a.run.save(disk, &a.out, 1).unwrap();
    });
    for at in 1..=n + 1 {
        for survival in SURVIVALS {
            let arena = Arena::with_checkpoint();
            let disk = arena.disk(Fault::Crash, at);
            let saved = arena.run.save(disk.clone(), &arena.out, 1);
            disk.power_cut(survival).unwrap();
            arena.check_checkpoints(&[1], &format!("crash at {at}, {survival:?}, {saved:?}"));
        }
    }
}

#[test]
fn the_first_checkpoint_survives_with_the_directories_that_lead_to_it() {
    let arena = Arena::new();
    let disk = arena.disk(Fault::None, 0);
    let deep = arena.dir.path().join("a/b");
    arena.run.save(disk.clone(), &deep, 1).unwrap();
    disk.power_cut(Survival::Nothing).unwrap();
    arena.run.check(&newest_valid(&deep).unwrap().checkpoint.unwrap(), 1);
}

/// Which step's model lies in a directory, as any loader would see it; `None` where it would refuse.
fn model_in(dir: &Path, what: &str) -> Option<String> {
    let read = |name: &str| fs::read_to_string(dir.join(name)).ok();
    let weights = read("model.safetensors")?;
    let step = weights.strip_prefix("model.safetensors ").unwrap().to_owned();
    for name in ["config.json", "tokenizer.json"] {
        let found = read(name)?;
        assert_eq!(found, format!("{name} {step}"), "{what}: {name} beside weights of {step}");
    }
    Some(step)
}

/// A model of step 1 at the top of the output directory, with what else people keep there.
fn with_model() -> Arena {
    let arena = Arena::with_checkpoint();
    arena.run.publish(arena.good_disk(), &arena.out, 1).unwrap();
    fs::write(arena.out.join("notes.txt"), "mine").unwrap();
    fs::write(arena.out.join("model-00001-of-00002.safetensors"), "stale").unwrap();
    arena
}

#[test]
fn a_publication_that_fails_anywhere_leaves_the_old_model() {
    let n = n_requests(&with_model(), |a, disk| a.run.publish(disk, &a.out, 2).unwrap());
    for at in 1..=n {
        for fault in [Fault::Io, Fault::Full] {
            let what = format!("{fault:?} at request {at} of {n}");
            let arena = with_model();
            let before = fs::read_dir(&arena.out).unwrap().count();
            match arena.run.publish(arena.disk(fault, at), &arena.out, 2) {
                Ok(()) => assert_eq!(model_in(&arena.out, &what).unwrap(), "2"),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WriteFailed, "{what}");
                    assert_eq!(model_in(&arena.out, &what).unwrap(), "1");
                    assert_eq!(fs::read_dir(&arena.out).unwrap().count(), before, "{what}");
                }
            }
            arena.run.publish(arena.good_disk(), &arena.out, 3).unwrap();
            assert_eq!(model_in(&arena.out, &what).unwrap(), "3");
            assert!(arena.hidden_names().is_empty(), "{what}: {:?}", arena.hidden_names());
            assert_eq!(fs::read(arena.out.join("notes.txt")).unwrap(), b"mine");
        }
    }
}

#[test]
fn a_power_cut_anywhere_in_a_publication_never_mixes_models_and_loses_none() {
    let n = n_requests(&with_model(), |a, disk| a.run.publish(disk, &a.out, 2).unwrap());
    let mut n_refused = 0;
    for at in 1..=n + 1 {
        for survival in SURVIVALS {
            let what = format!("crash at request {at} of {n}, {survival:?}");
            let arena = with_model();
            let disk = arena.disk(Fault::Crash, at);
            let published = arena.run.publish(disk.clone(), &arena.out, 2);
            disk.power_cut(survival).unwrap();
            let found = model_in(&arena.out, &what);
            if found.is_none() {
                n_refused += 1;
                let said = ounce_io::SafetensorsDir::open(&arena.out).map(|_| ());
                let config = ounce_io::read_config(&arena.out).map(|_| ());
                let is_named = |e: IoError| e.to_string().contains("crash interrupted");
                assert!(said.is_err_and(is_named) || config.is_err_and(is_named), "{what}");
            }
            let completed = complete_publication(&arena.out).unwrap();
            let after = model_in(&arena.out, &what).unwrap_or_else(|| panic!("{what}: lost"));
            match found {
                None => assert!(completed && after == "2", "{what}"),
                Some(found) if !completed => assert_eq!(found, after, "{what}"),
                Some(_) => assert_eq!(after, "2", "{what}"),
            }
            assert!(published.is_err() || after == "2", "{what}");
            let has_stale = arena.out.join("model-00001-of-00002.safetensors").exists();
            assert_eq!(has_stale, after == "1", "{what}");
            arena.run.publish(arena.good_disk(), &arena.out, 3).unwrap();
            assert!(arena.hidden_names().is_empty(), "{what}: {:?}", arena.hidden_names());
            assert_eq!(model_in(&arena.out, &what).unwrap(), "3");
            arena.run.check(&newest_valid(&arena.out).unwrap().checkpoint.unwrap(), 1);
        }
    }
    assert!(n_refused > 0, "some cuts fall between the old model and the new");
}

#[test]
fn an_interrupted_publication_is_completed_by_hand_as_the_hint_says() {
    let arena = with_model();
    let n = n_requests(&with_model(), |a, disk| a.run.publish(disk, &a.out, 2).unwrap());
    let interrupted = (1..=n).find(|&at| {
        let arena = with_model();
        let disk = arena.disk(Fault::Crash, at);
        arena.run.publish(disk.clone(), &arena.out, 2).unwrap_err();
        disk.power_cut(Survival::All).unwrap();
        model_in(&arena.out, "").is_none()
    });
    let disk = arena.disk(Fault::Crash, interrupted.unwrap() + 2);
    arena.run.publish(disk.clone(), &arena.out, 2).unwrap_err();
    disk.power_cut(Survival::All).unwrap();
    let script = "mv \"$0\"/.publishing/* \"$0\"";
    let status = std::process::Command::new("sh").args(["-c", script]).arg(&arena.out).status();
    assert!(status.unwrap().success());
    assert_eq!(model_in(&arena.out, "by hand").unwrap(), "2");
}

#[test]
fn a_model_published_where_nothing_was_is_there_or_not_there() {
    let n = n_requests(&Arena::new(), |a, disk| a.run.publish(disk, &a.out, 1).unwrap());
    for at in 1..=n {
        let what = format!("request {at} of {n}");
        for fault in [Fault::Io, Fault::Full] {
            let arena = Arena::new();
            if arena.run.publish(arena.disk(fault, at), &arena.out, 1).is_err() {
                assert!(!arena.out.exists(), "{what}, {fault:?}: looks finished after a failure");
            }
        }
        for survival in SURVIVALS {
            let arena = Arena::new();
            let disk = arena.disk(Fault::Crash, at);
            let published = arena.run.publish(disk.clone(), &arena.out, 1);
            disk.power_cut(survival).unwrap();
            if arena.out.exists() {
                assert_eq!(model_in(&arena.out, &what).unwrap(), "1", "{what}, {survival:?}");
            } else {
                assert!(published.is_err(), "{what}, {survival:?}");
            }
        }
    }
}

#[test]
fn a_model_is_published_beside_checkpoints_that_came_after_its_staging() {
    let arena = Arena::new();
    let staging = StagingDir::create_on(arena.good_disk(), &arena.out).unwrap();
    arena.run.save(arena.good_disk(), &arena.out, 1).unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        fs::write(staging.path().join(name), format!("{name} 2")).unwrap();
    }
    staging.publish().unwrap();
    assert_eq!(model_in(&arena.out, "").unwrap(), "2");
    arena.run.check(&newest_valid(&arena.out).unwrap().checkpoint.unwrap(), 1);
    assert_eq!(fs::read_dir(arena.dir.path()).unwrap().count(), 2, "the model and the output");
}

#[test]
fn an_atomic_file_is_the_old_one_or_the_new_one_whatever_happens() {
    let write = |disk: Arc<dyn Disk>, path: &Path| -> Result<(), IoError> {
        let mut file = AtomicFile::create_on(disk, path)?;
        file.write_all(b"new ")?;
        file.write_all(b"bytes")?;
        file.finish()
    };
    for at in 1..=6 {
        for fault in [Fault::Io, Fault::Full, Fault::Short, Fault::Crash] {
            for survival in SURVIVALS {
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("a");
                fs::write(&path, "old").unwrap();
                let disk = Arc::new(FaultyDisk::new(dir.path(), fault, at).unwrap());
                let written = write(disk.clone(), &path);
                disk.power_cut(survival).unwrap();
                let found = fs::read(&path).unwrap();
                let what = format!("{fault:?} at {at}, {survival:?}");
                assert!(found == b"new bytes" || (written.is_err() && found == b"old"), "{what}");
                if let Err(error) = written {
                    check_error(&error, "/a (", &what);
                }
            }
        }
    }
}

//! Checkpoints: everything comes back, and what is not whole is not taken.

#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ounce_io::checkpoint::{
    CheckpointWriter, checkpoint_bytes, checkpoint_path, newest_valid, open, rotate,
};
use ounce_io::testing::{Fault, FaultyDisk, SmallRun};
use ounce_io::{Disk, ErrorKind, SafetensorsDir};
use tempfile::TempDir;

struct Setup {
    run: SmallRun,
    out: PathBuf,
    dir: TempDir,
}

fn setup() -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    Setup { run: SmallRun::new(&model).unwrap(), out: dir.path().join("deep/out"), dir }
}

fn disk(setup: &Setup) -> Arc<dyn Disk> {
    Arc::new(FaultyDisk::new(setup.dir.path(), Fault::None, 0).unwrap())
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_saved_checkpoint_comes_back_whole_and_is_a_model_directory() {
    let s = setup();
    let path = s.run.save(disk(&s), &s.out, 12).unwrap();
    assert_eq!(path, checkpoint_path(&s.out, 12));
    assert_eq!(names(&s.out), ["checkpoint-12"]);
    assert_eq!(
        names(&path),
        [
            "config.json",
            "manifest.json",
            "model.safetensors",
            "optimizer.safetensors",
            "run.yaml",
            "tokenizer.json",
            "trainer_state.json"
        ]
    );
    s.run.check(&open(&path).unwrap(), 12);
    let newest = newest_valid(&s.out).unwrap();
    assert!(newest.skipped.is_empty());
    s.run.check(&newest.checkpoint.unwrap(), 12);
    assert_eq!(SafetensorsDir::open(&path).unwrap().tensors().len(), 3);
    assert_eq!(ounce_io::read_config(&path).unwrap()["model_type"], "gpt2");
    // Under another name it can be opened, but it is not found.
    fs::rename(&path, s.out.join("best")).unwrap();
    s.run.check(&open(&s.out.join("best")).unwrap(), 12);
    assert!(newest_valid(&s.out).unwrap().checkpoint.is_none());
    assert!(newest_valid(&s.out.join("nowhere")).unwrap().checkpoint.is_none());
}

#[test]
fn damage_to_any_file_at_any_byte_makes_the_one_before_the_newest() {
    let s = setup();
    s.run.save(disk(&s), &s.out, 1).unwrap();
    let path = s.run.save(disk(&s), &s.out, 2).unwrap();
    for name in names(&path) {
        let file = path.join(&name);
        let good = fs::read(&file).unwrap();
        let check = |bytes: &[u8], what: &str| {
            fs::write(&file, bytes).unwrap();
            let newest = newest_valid(&s.out).unwrap();
            s.run.check(newest.checkpoint.as_ref().expect(what), 1);
            let [skipped] = &newest.skipped[..] else { panic!("{name}: {what}") };
            assert_eq!(skipped.path, path);
            let message = skipped.reason.to_string();
            assert!(message.contains("checkpoint-2") && message.contains("hint: "), "{message}");
        };
        for at in (0..good.len()).step_by(good.len() / 20 + 1) {
            check(&good[..at], "truncated");
            // In a manifest blanks mean nothing.
            if name != "manifest.json" || !good[at].is_ascii_whitespace() {
                let mut bytes = good.clone();
                bytes[at] ^= 0x10;
                check(&bytes, &format!("byte {at} changed"));
            }
        }
        fs::remove_file(&file).unwrap();
        assert_eq!(newest_valid(&s.out).unwrap().skipped.len(), 1, "{name} removed");
        std::os::unix::fs::symlink(s.out.join("checkpoint-1").join(&name), &file).unwrap();
        assert_eq!(newest_valid(&s.out).unwrap().skipped.len(), 1, "{name} is a link");
        fs::remove_file(&file).unwrap();
        fs::write(&file, &good).unwrap();
    }
    s.run.check(&newest_valid(&s.out).unwrap().checkpoint.unwrap(), 2);
}

#[test]
fn names_that_lie_and_links_are_skipped_with_the_reason() {
    let s = setup();
    let path = s.run.save(disk(&s), &s.out, 5).unwrap();
    fs::create_dir(s.out.join("checkpoint-8")).unwrap();
    fs::write(s.out.join("checkpoint-7"), "a file").unwrap();
    std::os::unix::fs::symlink(&path, s.out.join("checkpoint-6")).unwrap();
    let newest = newest_valid(&s.out).unwrap();
    assert_eq!(newest.checkpoint.unwrap().path(), path);
    let reasons: Vec<String> = newest.skipped.iter().map(|s| s.reason.to_string()).collect();
    assert!(reasons[0].contains("manifest.json: is missing"), "{reasons:?}");
    assert!(reasons[1].contains("checkpoint-7: is not a directory"), "{reasons:?}");
    assert!(reasons[2].contains("checkpoint-6: is not a directory"), "{reasons:?}");
    fs::rename(&path, s.out.join("checkpoint-9")).unwrap();
    let newest = newest_valid(&s.out).unwrap();
    assert!(newest.checkpoint.is_none());
    let reasons = newest.skipped.iter().map(|s| s.reason.to_string());
    assert!(reasons.into_iter().any(|reason| reason.contains("checkpoint-9: holds step 5")));
}

#[test]
fn a_manifest_cannot_lead_out_of_its_directory() {
    let s = setup();
    let path = s.run.save(disk(&s), &s.out, 5).unwrap();
    let manifest = path.join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    for name in ["../x", "/etc/passwd", "", ".hidden", "a\\\\b"] {
        fs::write(&manifest, text.replace("run.yaml", name)).unwrap();
        let message = open(&path).unwrap_err().to_string();
        assert!(message.contains("is not a plain file name"), "{message}");
    }
    let without = text.replace("optimizer.safetensors", "run2.yaml");
    fs::write(&manifest, without).unwrap();
    assert!(open(&path).unwrap_err().to_string().contains("does not list optimizer.safetensors"));
}

#[test]
fn a_second_save_of_a_step_takes_the_place_of_the_first() {
    let s = setup();
    let path = s.run.save(disk(&s), &s.out, 3).unwrap();
    fs::write(path.join("config.json"), "damaged").unwrap();
    s.run.save(disk(&s), &s.out, 3).unwrap();
    s.run.check(&open(&path).unwrap(), 3);
    assert_eq!(names(&s.out), ["checkpoint-3"]);
}

#[test]
fn a_disk_without_room_is_refused_before_anything_is_written() {
    let s = setup();
    let error = CheckpointWriter::begin(&s.out, 4, u64::MAX).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WriteFailed);
    let message = error.to_string();
    assert!(message.contains("checkpoint-4 (18446744073709551615 bytes are needed"), "{message}");
    assert!(message.contains("the disk has ") && message.contains("\nhint: free space"));
    assert!(names(&s.out).is_empty());
}

#[test]
fn the_bytes_said_to_be_needed_suffice_and_are_not_many_more() {
    let s = setup();
    let path = s.run.save(disk(&s), &s.out, 4).unwrap();
    let real: u64 = names(&path).iter().map(|n| fs::metadata(path.join(n)).unwrap().len()).sum();
    let said = checkpoint_bytes(&[], &[], &s.dir.path().join("model")).unwrap();
    assert!(real <= said && said < real + (128 << 10), "{real} of {said}");
}

#[test]
fn an_abandoned_save_and_a_killed_one_leave_nothing() {
    let s = setup();
    let writer = CheckpointWriter::begin(&s.out, 4, 0).unwrap();
    assert_eq!(names(&s.out).len(), 1);
    assert!(names(&s.out)[0].starts_with(".checkpoint-4."));
    fs::create_dir(s.out.join(".checkpoint-3.999999-0.tmp")).unwrap();
    s.run.save(disk(&s), &s.out, 5).unwrap();
    assert_eq!(names(&s.out).len(), 2, "the living one stays: {:?}", names(&s.out));
    drop(writer);
    assert_eq!(names(&s.out), ["checkpoint-5"]);
}

#[test]
fn the_one_resumed_from_and_the_one_just_saved_are_spared() {
    let s = setup();
    for step in [10, 20, 30] {
        s.run.save(disk(&s), &s.out, step).unwrap();
    }
    // Resumed from 10 and saved 15 while 20 and 30 of another course are there.
    let saved = s.run.save(disk(&s), &s.out, 15).unwrap();
    let resumed = s.out.join("./checkpoint-10");
    let removed = rotate(&s.out, 15, 1, [&*resumed, &*saved]).unwrap();
    assert_eq!(removed, [30, 20].map(|step| checkpoint_path(&s.out, step)));
    assert_eq!(names(&s.out), ["checkpoint-10", "checkpoint-15"]);
    assert!(rotate(&s.out, 15, 2, None).unwrap().is_empty());
    let removed = rotate(&s.out, 15, 0, None).unwrap();
    assert_eq!(removed, [checkpoint_path(&s.out, 10)], "the newest that is whole stays");
}

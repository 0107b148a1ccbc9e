//! A process that saves and rotates all the time is killed at random moments.
//!
//! Method: the test runs itself again as that process, kills it, looks for the newest checkpoint as a resumed run
//! would, and lets the next process go on from there.

#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use ounce_io::checkpoint::{newest_valid, rotate};
use ounce_io::testing::{Fault, FaultyDisk, SmallRun};

const DIR_VARIABLE: &str = "OUNCE_IO_KILLED_DIR";
const N_KILLS: u64 = 20;

#[test]
fn a_killed_process_loses_nothing_that_it_had_saved() {
    if let Some(dir) = std::env::var_os(DIR_VARIABLE) {
        save_for_ever(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("model")).unwrap();
    let run = SmallRun::new(&dir.path().join("model")).unwrap();
    let mut last_step = 0;
    for i in 0..N_KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_killed_process_loses_nothing_that_it_had_saved"])
            .env(DIR_VARIABLE, dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Different moments of a save of a few milliseconds.
        std::thread::sleep(Duration::from_micros(20_000 + i * 7919 % 20_000));
        child.kill().unwrap();
        child.wait().unwrap();

        let newest = newest_valid(&dir.path().join("out")).unwrap();
        assert!(newest.skipped.is_empty(), "half a checkpoint: {:?}", newest.skipped);
        let Some(checkpoint) = newest.checkpoint else {
            assert_eq!(last_step, 0, "kill {i}: everything is lost");
            continue;
        };
        let step = checkpoint.state().step;
        assert!(step >= last_step, "kill {i}: step {step} after {last_step}");
        run.check(&checkpoint, step);
        last_step = step;
    }
    assert!(last_step > N_KILLS, "the processes got somewhere: step {last_step}");
}

/// Resumes, then saves and rotates until killed.
fn save_for_ever(dir: &Path) -> ! {
    let out = dir.join("out");
    let run = SmallRun::new(&dir.join("model")).unwrap();
    let resumed = newest_valid(&out).unwrap().checkpoint;
    let mut step = resumed.map_or(0, |checkpoint| checkpoint.state().step);
    loop {
        step += 1;
        // The kernel keeps what a killed process wrote, so syncing would only cost time.
        let disk = FaultyDisk::new(dir, Fault::None, 0).unwrap();
        run.save(Arc::new(disk), &out, step).unwrap();
        rotate(&out, step, 2, None).unwrap();
    }
}

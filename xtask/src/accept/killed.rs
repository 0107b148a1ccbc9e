//! The demonstration `killed`: runs that are killed (SIGKILL) at random moments, and what becomes of
//! them.
//!
//! In each round a run that saves after every step is killed after a random time. In every other round
//! the run that goes on from there (`--resume-from-checkpoint auto`) is killed as well. Then it is left
//! alone, and its weights must be, byte for byte, those of the run without interruption. Rounds go on until so
//! many runs were killed alive.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Result;
use crate::demonstration::{Outcome, Setting, fresh_model, path, shakespeare};
use crate::random::Random;
use crate::shell::scratch_folder;

/// Kills of the whole demonstration.
const N_KILLS: u64 = 300;

/// What the rounds saw.
#[derive(Default)]
struct Seen {
    rounds: u64,
    /// Of living runs.
    kills: u64,
    /// The run was done before it could be killed.
    late: u64,
    /// Before the first checkpoint.
    before_any: u64,
    /// While a checkpoint was written.
    in_save: u64,
    different: u64,
}

/// The demonstration.
pub(crate) fn killed(s: &Setting<'_>) -> Result<Outcome> {
    let mut outcome = Outcome { is_kept: s.times.is_none(), ..Outcome::default() };
    let folder = scratch_folder("accept-killed")?;
    let (train, _) = shakespeare(&folder)?;
    let fresh = fresh_model(s, &folder, &train)?;
    let files = ["train", "--model", path(&fresh), "--data", path(&train)];
    let steps = ["--max-steps", "12", "--max-length", "64", "--sample-steps", "0"];
    let rest =
        ["--per-device-train-batch-size", "4", "--learning-rate", "1e-2", "--dropout", "0.1"];
    let saves = ["--save-steps", "1", "--save-total-limit", "2"];
    let run = [&files[..], &steps, &rest, &saves, &s.thread_args()].concat();
    let n_kills = s.times.unwrap_or(N_KILLS);
    let begin = Instant::now();
    let seen = rounds(&s.binary, &run, &folder, n_kills, &mut Random::new(s.seed))?;
    outcome.claim(
        seen.different == 0,
        format!(
            "{} kills of a living run in {} rounds: {} ended with other weights",
            seen.kills, seen.rounds, seen.different
        ),
    );
    let result = json!({
        "rounds": seen.rounds, "kills": seen.kills, "done_before_the_kill": seen.late,
        "killed_before_the_first_checkpoint": seen.before_any,
        "killed_while_saving": seen.in_save, "seconds": begin.elapsed().as_secs(),
    });
    println!("{result}");
    outcome.runs.push(("ounce", run[5..].join(" "), result));
    Ok(outcome)
}

fn rounds(
    binary: &str,
    run: &[&str],
    folder: &Path,
    n_kills: u64,
    random: &mut Random,
) -> Result<Seen> {
    let (whole, out) = (folder.join("whole"), folder.join("out"));
    // The first run fills the cache of tokens and costs, the second says how long one takes.
    let mut whole_time = Duration::ZERO;
    for _ in 0..2 {
        clear(&whole)?;
        let start = Instant::now();
        wait(spawn(binary, &[run, &["--output-dir", path(&whole)]].concat())?)?;
        whole_time = start.elapsed();
    }
    println!("a whole run takes {:.2} s", whole_time.as_secs_f64());
    let expected = weights(&whole)?;
    let resumed = [run, &["--output-dir", path(&out), "--resume-from-checkpoint", "auto"]].concat();
    let mut seen = Seen::default();
    while seen.kills < n_kills {
        clear(&out)?;
        for _ in 0..=seen.rounds % 2 {
            let mut child = spawn(binary, &resumed)?;
            std::thread::sleep(whole_time.mul_f64(random.share()));
            let is_done = child.try_wait().map_err(|e| e.to_string())?.is_some();
            child.kill().and_then(|()| child.wait()).map_err(|e| format!("killing: {e}"))?;
            seen.late += u64::from(is_done);
            seen.kills += u64::from(!is_done);
            let names = names(&out);
            let any = |prefix: &str| names.iter().any(|name| name.starts_with(prefix));
            seen.before_any += u64::from(!any("checkpoint-"));
            seen.in_save += u64::from(any(".checkpoint-"));
        }
        wait(spawn(binary, &resumed)?)?;
        seen.different += u64::from(weights(&out)? != expected);
        seen.rounds += 1;
    }
    Ok(seen)
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn clear(dir: &Path) -> Result {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("{}: {e}", dir.display()))
        }
        _ => Ok(()),
    }
}

fn weights(dir: &Path) -> Result<Vec<u8>> {
    let file = dir.join("model.safetensors");
    std::fs::read(&file).map_err(|e| format!("{}: {e}", file.display()))
}

fn spawn(binary: &str, args: &[&str]) -> Result<Child> {
    let mut command = Command::new(binary);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().map_err(|e| format!("cannot start {binary}: {e}"))
}

fn wait(mut child: Child) -> Result {
    let status = child.wait().map_err(|e| e.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("a run that was left alone: {status}")) }
}

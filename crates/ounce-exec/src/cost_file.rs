//! The file that keeps measured costs: one line per measurement, for one machine.
//!
//! ```text
//! ounce costs 6
//! machine Intel(R) Xeon(R) Processor 6.143, avx512, 2 threads, 0.1.0, optimised
//! taken 0.12
//! linear 0 1 0 0 0 0 768 589824 768 768 0 0 0 0 0 0 64 = 4.1e-4
//! ```
//! `taken` are the cores that other programs took meanwhile (`contention.rs`).
//!
//! Costs are only estimates and can be measured again, so a file that cannot be read, or was written
//! on another machine, counts as empty; so does one that has grown beyond what the process declares for it. It is
//! replaced as a whole, never half.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

const HEADER: &str = "ounce costs 6";
/// Longest file that is read: some thousand costs, of which a model has about a hundred.
const MAX_BYTES: u64 = 1 << 18;

/// Seconds by what was measured.
pub(crate) type Costs = BTreeMap<String, f64>;

/// What the file holds.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Kept {
    pub(crate) costs: Costs,
    /// Cores that other programs took while some of the costs were measured, at most.
    pub(crate) cores_taken: f64,
}

/// The costs in the file that were measured on this machine.
pub(crate) fn load(path: &Path, fingerprint: &str) -> Kept {
    let is_small = path.metadata().is_ok_and(|metadata| metadata.len() <= MAX_BYTES);
    let text =
        if is_small { std::fs::read_to_string(path).unwrap_or_default() } else { String::new() };
    let mut lines = text.lines();
    if lines.next() != Some(HEADER) || lines.next() != Some(&machine_line(fingerprint)) {
        return Kept::default();
    }
    let taken = lines.next().and_then(|line| line.strip_prefix("taken ")?.parse().ok());
    let Some(cores_taken) = taken else { return Kept::default() };
    Kept { costs: lines.filter_map(parse_line).collect(), cores_taken }
}

/// Time since the file was written; none where there is no file, or its clock was another.
pub(crate) fn age(path: &Path) -> Duration {
    let written = path.metadata().and_then(|metadata| metadata.modified()).ok();
    written.and_then(|at| at.elapsed().ok()).unwrap_or_default()
}

/// Replaces the file.
pub(crate) fn save(path: &Path, fingerprint: &str, kept: &Kept) -> std::io::Result<()> {
    let machine = machine_line(fingerprint);
    let mut text = format!("{HEADER}\n{machine}\ntaken {:.2}\n", kept.cores_taken);
    for (key, seconds) in &kept.costs {
        writeln!(text, "{key} = {seconds:e}").expect("writing to a string succeeds");
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // Beside the target, so that the rename stays within one file system; with the process's
    // number, so that two runs do not write to one file.
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let fresh = path.with_file_name(name);
    let done = std::fs::write(&fresh, text).and_then(|()| std::fs::rename(&fresh, path));
    if done.is_err() {
        let _ = std::fs::remove_file(&fresh);
    }
    done
}

fn machine_line(fingerprint: &str) -> String {
    format!("machine {fingerprint}")
}

fn parse_line(line: &str) -> Option<(String, f64)> {
    let (key, seconds) = line.split_once(" = ")?;
    let seconds: f64 = seconds.parse().ok()?;
    (seconds.is_finite() && seconds > 0.0).then(|| (key.to_owned(), seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_come_back_as_they_were_and_only_on_their_machine() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("new/costs.txt");
        let costs =
            Costs::from([("add 64".to_owned(), 1.25e-6), ("gelu 64".to_owned(), 0.1 + 0.2)]);
        let kept = Kept { costs, cores_taken: 0.25 };
        save(&path, "one", &kept).expect("saved");
        assert_eq!(load(&path, "one"), kept);
        assert_eq!(load(&path, "other"), Kept::default());
        let folder_of = |path: &Path| path.parent().expect("a folder").to_path_buf();
        assert_eq!(std::fs::read_dir(folder_of(&path)).expect("listed").count(), 1);
        // A folder in the file's place: nothing is left of the attempt.
        let taken = folder.path().join("taken/costs.txt");
        std::fs::create_dir_all(taken.join("x")).expect("made");
        save(&taken, "one", &kept).expect_err("no file can be there");
        assert_eq!(std::fs::read_dir(folder_of(&taken)).expect("listed").count(), 1);
    }

    #[test]
    fn damaged_lines_are_passed_over_and_a_damaged_head_empties_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("costs.txt");
        let body = "add 1 = 1e-6\nadd 2 = NaN\nadd 3 = -1\nadd 4 = 1e\nadd 5\n\u{0}\nadd 6 = 2e-6";
        std::fs::write(&path, format!("{HEADER}\nmachine m\ntaken 0\n{body}")).expect("written");
        assert_eq!(load(&path, "m").costs.len(), 2);
        std::fs::write(&path, format!("{HEADER}\nmachine m\n{body}")).expect("written");
        assert_eq!(load(&path, "m"), Kept::default());
        std::fs::write(&path, format!("x{HEADER}\nmachine m\ntaken 0\n{body}")).expect("written");
        assert_eq!(load(&path, "m"), Kept::default());
        std::fs::write(&path, [0xff, 0xfe, 0]).expect("written");
        assert_eq!(load(&path, "m"), Kept::default());
        assert_eq!(load(&folder.path().join("missing"), "m"), Kept::default());
        let long = "add 1 = 1e-6\n".repeat(30_000);
        std::fs::write(&path, format!("{HEADER}\nmachine m\ntaken 0\n{long}")).expect("written");
        assert_eq!(load(&path, "m"), Kept::default(), "longer than is read");
    }
}

//! Removing old checkpoints.
//!
//! Invariants: the `n_keep` newest by step stay, and so do those that the caller names and the newest one that is
//! whole, however old it is. Those of later steps than the run has reached are of another course and count as older
//! than all of its own. What goes is first renamed to a temporary, so that no half of it is ever called a
//! checkpoint, and a process killed meanwhile leaves something that the next save removes.
//!
//! Complexity: reads the newest checkpoint once, where there is anything to remove: an old one goes only after a newer
//! one was read back whole.

use std::fs;
use std::path::{Path, PathBuf};

use super::list;
use super::read::open_step;
use crate::disk::{Disk, RealDisk};
use crate::error::IoError;
use crate::temp::temp_path;

/// Removes all checkpoints of `output_dir` but the `n_keep` newest of a run that has reached `step`, those in `never`
/// (the one resumed from, the one just saved) and the newest that is whole. Returns what it removed, oldest last.
///
/// # Errors
/// `Read`, `Write`; what was to be removed may then still be there.
pub fn rotate<'a>(
    output_dir: &Path,
    step: u64,
    n_keep: usize,
    never: impl IntoIterator<Item = &'a Path>,
) -> Result<Vec<PathBuf>, IoError> {
    let never: Vec<PathBuf> = never.into_iter().map(real_path).collect();
    rotate_on(&RealDisk, output_dir, step, n_keep, &never)
}

pub(crate) fn rotate_on(
    disk: &dyn Disk,
    output_dir: &Path,
    step: u64,
    n_keep: usize,
    never: &[PathBuf],
) -> Result<Vec<PathBuf>, IoError> {
    let mut all = list(output_dir)?;
    all.sort_by_key(|&(saved, _)| saved > step);
    let is_old = |at: usize, path: &Path| at >= n_keep && !never.contains(&real_path(path));
    if !all.iter().enumerate().any(|(at, (_, path))| is_old(at, path)) {
        return Ok(Vec::new());
    }
    let newest_whole = all.iter().position(|(step, path)| open_step(path, *step).is_ok());
    let mut removed = Vec::new();
    for (at, (_, path)) in all.iter().enumerate() {
        if is_old(at, path) && newest_whole != Some(at) {
            remove(disk, output_dir, path)?;
            removed.push(path.clone());
        }
    }
    Ok(removed)
}

/// Removes what is called `path`; of a link the link only.
fn remove(disk: &dyn Disk, output_dir: &Path, path: &Path) -> Result<(), IoError> {
    let failed = |e| IoError::writing(path, 0, e);
    let is_dir = fs::symlink_metadata(path).map_err(failed)?.is_dir();
    if !is_dir {
        return disk.remove_file(path).map_err(failed);
    }
    let name = path.file_name().and_then(|name| name.to_str()).expect("named like a checkpoint");
    let temp = temp_path(output_dir, name);
    disk.rename(path, &temp).and_then(|()| disk.remove_dir_all(&temp)).map_err(failed)
}

/// The path by which two names of one directory are the same.
fn real_path(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.into())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use super::*;
    use crate::checkpoint::{checkpoint_path, newest_valid};
    use crate::disk::real_disk;
    use crate::testing::{Fault, FaultyDisk, SmallRun, Survival};

    #[test]
    fn what_rotation_spares_stays_and_everything_else_goes() {
        let model = tempfile::tempdir().unwrap();
        let run = SmallRun::new(model.path()).unwrap();
        arbtest::arbtest(|u| {
            let dir = tempfile::tempdir().unwrap();
            let n_keep = u.int_in_range(0..=3)?;
            let steps: BTreeSet<u64> = (0..u.int_in_range(0..=4)?)
                .map(|_| u.int_in_range(1..=30))
                .collect::<arbtest::arbitrary::Result<_>>()?;
            let mut broken = BTreeSet::new();
            for &step in &steps {
                run.save(real_disk(), dir.path(), step).unwrap();
                if u.ratio(1, 3)? {
                    broken.insert(step);
                    fs::write(checkpoint_path(dir.path(), step).join("config.json"), "[]").unwrap();
                }
            }
            let never = if steps.is_empty() { 7 } else { *u.choose_iter(&steps)? };
            let never_path = checkpoint_path(dir.path(), never);
            let reached = u.int_in_range(0..=30)?;
            rotate(dir.path(), reached, n_keep, Some(&*never_path)).unwrap();

            let left: BTreeSet<u64> =
                list(dir.path()).unwrap().iter().map(|(step, _)| *step).collect();
            let (own, other): (Vec<u64>, Vec<u64>) =
                steps.iter().rev().partition(|&&step| step <= reached);
            let by_age = [own, other].concat();
            let newest_whole = by_age.iter().find(|step| !broken.contains(step));
            let expected: BTreeSet<u64> = by_age
                .iter()
                .take(n_keep)
                .chain(newest_whole)
                .chain(steps.get(&never))
                .copied()
                .collect();
            assert_eq!(
                left, expected,
                "of {steps:?}, broken {broken:?}, keeping {n_keep} at {reached}"
            );
            Ok(())
        })
        .budget_ms(500);
    }

    #[test]
    fn a_rotation_that_fails_or_dies_leaves_no_half_of_a_checkpoint() {
        let model = tempfile::tempdir().unwrap();
        let run = SmallRun::new(model.path()).unwrap();
        for at in 1..=4 {
            for (fault, survival) in [
                (Fault::Io, Survival::All),
                (Fault::Crash, Survival::Nothing),
                (Fault::Crash, Survival::All),
            ] {
                let dir = tempfile::tempdir().unwrap();
                for step in 1..=3 {
                    run.save(real_disk(), dir.path(), step).unwrap();
                }
                let disk = Arc::new(FaultyDisk::new(dir.path(), fault, at).unwrap());
                rotate_on(&*disk, dir.path(), 3, 1, &[]).unwrap_err();
                disk.power_cut(survival).unwrap();
                for (step, path) in list(dir.path()).unwrap() {
                    open_step(&path, step).unwrap();
                }
                let newest = newest_valid(dir.path()).unwrap().checkpoint.unwrap();
                run.check(&newest, 3);
            }
        }
    }
}

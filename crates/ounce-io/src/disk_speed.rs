//! How fast a disk is, past the system's cache.
//!
//! Idea: one file is written, flushed, read and removed with direct I/O, which leaves the page cache out. Where a file
//! system has none (one in memory, for instance), ordinary requests are timed, and the result says so. Direct I/O wants
//! buffers, offsets and lengths in whole blocks: the buffer is cut to such a place out of a larger one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;

use rustix::fs::OFlags;

use crate::disk::{Disk, RealDisk, create_dirs};
use crate::error::IoError;
use crate::temp::temp_path;

/// Bytes of one request.
const PIECE_BYTES: usize = 1 << 20;
/// A multiple of the block of every disk.
const ALIGN_BYTES: usize = 4096;

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DiskSpeed {
    /// Length of the file that was written and read.
    pub file_bytes: u64,
    /// Written and flushed, per second.
    pub write_bytes_per_s: f64,
    /// Read back, per second.
    pub read_bytes_per_s: f64,
    /// Whether the page cache was left out.
    pub is_direct: bool,
    /// What the file system has free.
    pub free_bytes: u64,
}

/// Measures the disk below `dir`, which is made if it is not there, with a file of at most `most_bytes` and at most a
/// tenth of what is free.
///
/// # Errors
/// `Write` where the directory cannot be written.
pub fn disk_speed(dir: &Path, most_bytes: u64) -> Result<DiskSpeed, IoError> {
    create_dirs(&RealDisk, dir)?;
    let free_bytes = RealDisk.free_bytes(dir).map_err(|e| IoError::writing(dir, 0, e))?;
    let n_pieces = (most_bytes.min(free_bytes / 10) / PIECE_BYTES as u64).max(1);
    let path = temp_path(dir, "disk-speed");
    let direct = measure(&path, n_pieces, OFlags::DIRECT);
    let is_direct = direct.is_ok();
    let measured = direct.or_else(|_| measure(&path, n_pieces, OFlags::empty()));
    let file_bytes = n_pieces * PIECE_BYTES as u64;
    let (write_bytes_per_s, read_bytes_per_s) =
        measured.map_err(|e| IoError::writing(&path, file_bytes, e))?;
    Ok(DiskSpeed { file_bytes, write_bytes_per_s, read_bytes_per_s, is_direct, free_bytes })
}

/// Bytes per second of writing and of reading a file that is there for so long only.
fn measure(path: &Path, n_pieces: u64, flags: OFlags) -> io::Result<(f64, f64)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).custom_flags(flags.bits().cast_signed());
    let file = options.open(path)?;
    let speeds = write_and_read(&file, n_pieces);
    std::fs::remove_file(path)?;
    speeds
}

fn write_and_read(file: &File, n_pieces: u64) -> io::Result<(f64, f64)> {
    // No zeros: a file system may store those as nothing.
    let mut room: Vec<u8> = (0..(PIECE_BYTES + ALIGN_BYTES) as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let at = room.as_ptr().align_offset(ALIGN_BYTES);
    let piece = &mut room[at..at + PIECE_BYTES];
    let offset = |i: u64| i * PIECE_BYTES as u64;
    let rate = |start: Instant| offset(n_pieces) as f64 / start.elapsed().as_secs_f64();
    let start = Instant::now();
    (0..n_pieces).try_for_each(|i| file.write_all_at(piece, offset(i)))?;
    file.sync_all()?;
    let write = rate(start);
    let start = Instant::now();
    (0..n_pieces).try_for_each(|i| file.read_exact_at(piece, offset(i)))?;
    Ok((write, rate(start)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_measured_and_nothing_stays_on_it() {
        let dir = tempfile::tempdir().unwrap();
        let new = dir.path().join("new");
        let speed = disk_speed(&new, 4 << 20).unwrap();
        assert!(speed.write_bytes_per_s > 0.0 && speed.read_bytes_per_s > 0.0);
        assert!(speed.file_bytes == 4 << 20 && speed.free_bytes > 0);
        assert_eq!(std::fs::read_dir(&new).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = disk_speed(&file.join("below"), 4 << 20).unwrap_err();
        assert!(error.to_string().contains(&file.display().to_string()), "{error}");
    }
}

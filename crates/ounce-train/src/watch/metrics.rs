//! `metrics.jsonl`: one JSON object per line, for whatever reads the run later.
//!
//! A line is made in one fixed buffer and handed to the system in one write, so that a reader which
//! follows the file sees whole lines and a crash tears at most the last one. Resuming from step `k`
//! cuts the file where the steps after `k` begin: they are about to be done again.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Longest line, the line feed included.
pub const MAX_LINE_BYTES: usize = 16 * 1024;

/// Appends lines to `metrics.jsonl`.
#[derive(Debug)]
pub struct MetricsWriter {
    file: File,
    path: PathBuf,
    buffer: Box<[u8]>,
}

impl MetricsWriter {
    /// A new, empty file at `path`.
    ///
    /// # Errors
    /// Creating the file failed.
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self::new(File::create(path)?, path))
    }

    /// Goes on with the file at `path` after step `last_step`: a torn last line is cut off, and so is
    /// everything from the first line on whose `step` is above `last_step`. A missing file is created.
    ///
    /// # Errors
    /// Reading or writing failed.
    pub fn resume(path: &Path, last_step: u64) -> io::Result<Self> {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let kept_bytes = kept_bytes(&mut file, last_step)?;
        file.set_len(kept_bytes)?;
        file.seek(SeekFrom::Start(kept_bytes))?;
        Ok(Self::new(file, path))
    }

    fn new(file: File, path: &Path) -> Self {
        Self { file, path: path.to_owned(), buffer: vec![0; MAX_LINE_BYTES].into_boxed_slice() }
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends one object; numbers that are not finite become `null`, as JSON has none.
    ///
    /// # Errors
    /// `InvalidInput` if the line would be longer than [`MAX_LINE_BYTES`] or is not an object (nothing
    /// is written then); or writing failed.
    pub fn append(&mut self, object: &impl Serialize) -> io::Result<()> {
        let mut rest = &mut self.buffer[..MAX_LINE_BYTES - 1];
        serde_json::to_writer(&mut rest, object).map_err(|e| {
            let what = if e.is_io() {
                format!("a line of metrics is longer than {MAX_LINE_BYTES} bytes")
            } else {
                format!("a line of metrics cannot be written as JSON: {e}")
            };
            io::Error::new(io::ErrorKind::InvalidInput, what)
        })?;
        let n = MAX_LINE_BYTES - 1 - rest.len();
        if self.buffer[0] != b'{' {
            let what = "a line of metrics is not a JSON object";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        self.buffer[n] = b'\n';
        self.file.write_all(&self.buffer[..=n])
    }
}

/// Hands the beginning of every whole line of a file to `see`, [`MAX_LINE_BYTES`] of it at most.
///
/// # Errors
/// Reading failed.
pub fn for_each_line(path: &Path, mut see: impl FnMut(&[u8])) -> io::Result<()> {
    let mut reader = BufReader::new(File::open(path)?);
    let mut head = Vec::with_capacity(MAX_LINE_BYTES);
    while let (_, true) = read_line(&mut reader, &mut head)? {
        see(&head);
    }
    Ok(())
}

/// Bytes up to the first line of a step after `last_step`, or to the end of the last whole line.
/// Lines without a step, or that are not ours, are kept.
fn kept_bytes(file: &mut File, last_step: u64) -> io::Result<u64> {
    #[derive(Deserialize)]
    struct Line {
        step: Option<u64>,
    }
    let mut reader = BufReader::new(file);
    let mut head = Vec::with_capacity(MAX_LINE_BYTES);
    let mut kept = 0;
    loop {
        let (n_bytes, is_whole) = read_line(&mut reader, &mut head)?;
        let step = serde_json::from_slice(&head).ok().and_then(|l: Line| l.step);
        if !is_whole || step.is_some_and(|s| s > last_step) {
            return Ok(kept);
        }
        kept += n_bytes;
    }
}

/// Reads a line of any length and keeps its first [`MAX_LINE_BYTES`] in `head`. Gives its length and
/// whether it ends with a line feed; at the end of the file `(0, false)`.
fn read_line(reader: &mut impl BufRead, head: &mut Vec<u8>) -> io::Result<(u64, bool)> {
    head.clear();
    let mut n_bytes = 0;
    loop {
        let chunk = reader.fill_buf()?;
        let end = chunk.iter().position(|&b| b == b'\n');
        let n = end.map_or(chunk.len(), |i| i + 1);
        head.extend_from_slice(&chunk[..n.min(MAX_LINE_BYTES - head.len())]);
        reader.consume(n);
        n_bytes += n as u64;
        if end.is_some() || n == 0 {
            return Ok((n_bytes, end.is_some()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[derive(Serialize)]
    struct Row<'a> {
        step: u64,
        loss: f64,
        note: &'a str,
    }

    fn file_with(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, text).unwrap();
        (dir, path)
    }

    fn after_resume(text: &str, last_step: u64) -> String {
        let (_dir, path) = file_with(text);
        MetricsWriter::resume(&path, last_step).unwrap();
        fs::read_to_string(&path).unwrap()
    }

    #[test]
    fn every_line_is_there_as_soon_as_it_is_appended() {
        let (_dir, path) = file_with("what an older run left\n");
        let mut metrics = MetricsWriter::create(&path).unwrap();
        metrics.append(&Row { step: 1, loss: 2.5, note: "a\nb" }).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{\"step\":1,\"loss\":2.5,\"note\":\"a\\nb\"}\n"
        );
        metrics.append(&Row { step: 2, loss: f64::NAN, note: "" }).unwrap();
        assert!(fs::read_to_string(&path).unwrap().ends_with("\"loss\":null,\"note\":\"\"}\n"));
    }

    #[test]
    fn a_line_beyond_the_buffer_is_refused_and_leaves_no_trace() {
        let (_dir, path) = file_with("");
        let mut metrics = MetricsWriter::create(&path).unwrap();
        let note = "x".repeat(MAX_LINE_BYTES);
        let e = metrics.append(&Row { step: 1, loss: 0.0, note: &note }).unwrap_err();
        assert_eq!(e.to_string(), "a line of metrics is longer than 16384 bytes");
        assert_eq!(metrics.append(&[1, 2]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        metrics.append(&Row { step: 2, loss: 0.0, note: &note[..MAX_LINE_BYTES - 40] }).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 1);
    }

    #[test]
    fn resuming_cuts_the_steps_that_are_done_again() {
        let text =
            "{\"step\":1}\n{\"eval_loss\":3}\n{\"step\":2}\n{\"step\":3}\n{\"eval_loss\":2}\n";
        assert_eq!(after_resume(text, 2), "{\"step\":1}\n{\"eval_loss\":3}\n{\"step\":2}\n");
        assert_eq!(after_resume(text, 9), text);
        assert_eq!(after_resume(text, 0), "");
    }

    #[test]
    fn resuming_cuts_a_torn_line_and_keeps_strange_ones() {
        assert_eq!(after_resume("{\"step\":1}\n{\"step\":2", 2), "{\"step\":1}\n");
        assert_eq!(after_resume("hello\n\n{\"step\":1}\n", 1), "hello\n\n{\"step\":1}\n");
        let long = "y".repeat(3 * MAX_LINE_BYTES);
        assert_eq!(after_resume(&format!("{long}\n{{\"step\":1}}\n"), 1).len(), long.len() + 12);
        assert_eq!(after_resume(&long, 1), "");
    }

    #[test]
    fn a_resumed_file_goes_on_where_it_was_cut() {
        let (_dir, path) = file_with("{\"step\":1}\n{\"step\":2}\n");
        let mut metrics = MetricsWriter::resume(&path, 1).unwrap();
        metrics.append(&Row { step: 2, loss: 1.0, note: "" }).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{\"step\":1}\n{\"step\":2,\"loss\":1.0,\"note\":\"\"}\n"
        );
    }
}

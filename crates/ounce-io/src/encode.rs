//! Training text to ids on several threads, in the order of the text.
//!
//! Idea: pieces are gathered into a batch of [`BATCH_BYTES`] of text per thread, cut into jobs of at least
//! [`JOB_BYTES`], so that short rows are not handed out one by one. Threads take the next job when they are done with
//! one. The ids of the jobs are then handed on in order, and the next batch goes through the same buffers.
//!
//! Invariants: the ids do not depend on the number of threads, and of several faults in the text the first one is told.
//! Memory: one batch of text and its ids, whatever the length of the data.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::IoError;
use crate::text::{Piece, PieceStart, RowOptions, SourceHash, TextPieces};
use crate::tokenizer::Tokenizer;

/// Text that is in memory at once, per thread.
const BATCH_BYTES: usize = 64 << 10;
/// A job is handed out when it has so much text. Threads wait for each other's last one at the end of a batch.
const JOB_BYTES: usize = 4 << 10;

/// Hands the ids of `files` to `take`, in order, with the end-of-text token before each row that needs it. Returns
/// what became of every file.
pub(crate) fn encode_files(
    files: &[PathBuf],
    options: &RowOptions,
    tokenizer: &Tokenizer,
    n_threads: usize,
    mut take: impl FnMut(&[u32]) -> Result<(), IoError>,
) -> Result<Encoded, IoError> {
    let mut pieces = TextPieces::open_with(files, options)?;
    let mut batch = Batch { file_tokens: vec![0; files.len()], ..Batch::default() };
    loop {
        // What was read before a fault comes first: it may hold an earlier one.
        let is_more = batch.fill(&mut pieces, BATCH_BYTES * n_threads.max(1));
        batch.encode(tokenizer, n_threads);
        batch.hand_on(&mut take)?;
        if !is_more? {
            let hashes = pieces.hashes().to_vec();
            return Ok(Encoded { hashes, file_tokens: batch.file_tokens, n_bad: pieces.n_bad() });
        }
    }
}

/// What became of the files, besides their ids.
#[derive(Debug)]
pub(crate) struct Encoded {
    /// Length and hash of each file.
    pub(crate) hashes: Vec<SourceHash>,
    /// Ids of each file.
    pub(crate) file_tokens: Vec<u64>,
    /// Broken rows that were passed over.
    pub(crate) n_bad: u64,
}

/// Pieces that are encoded together.
#[derive(Debug, Default)]
struct Batch {
    /// Ids of each file, so far.
    file_tokens: Vec<u64>,
    /// The first `n_jobs` are in use; the others keep their memory.
    jobs: Vec<Mutex<Job>>,
    n_jobs: usize,
    /// Files of the pieces.
    paths: Vec<PathBuf>,
}

/// Pieces for one thread.
#[derive(Debug, Default)]
struct Job {
    text: String,
    parts: Vec<Part>,
    ids: Vec<u32>,
    fault: Option<IoError>,
}

/// A piece whose text ends at `end`, where the next one begins.
#[derive(Debug)]
struct Part {
    end: usize,
    start: PieceStart,
    line: u64,
    path: usize,
    /// Number of the file among all.
    file: usize,
    /// Where its ids end.
    ids_end: usize,
}

impl Batch {
    /// Reads pieces until there are `most_bytes`; false after the last.
    fn fill(&mut self, pieces: &mut TextPieces, most_bytes: usize) -> Result<bool, IoError> {
        let mut n_bytes = 0;
        self.n_jobs = 0;
        // Of the pieces to come, those of the file at hand are the next ones.
        self.paths.drain(..self.paths.len().saturating_sub(1));
        while n_bytes < most_bytes {
            let Some(piece) = pieces.next_piece()? else { return Ok(false) };
            if self.paths.last().is_none_or(|path| path != piece.path) {
                self.paths.push(piece.path.to_path_buf());
            }
            let path = self.paths.len() - 1;
            let job = self.job_with_room();
            job.text.push_str(piece.text);
            let (end, start, line) = (job.text.len(), piece.start, piece.line);
            // An empty row costs something, too.
            n_bytes += piece.text.len() + size_of::<Part>();
            let file = pieces.file_index();
            job.parts.push(Part { end, start, line, path, file, ids_end: 0 });
        }
        Ok(true)
    }

    /// The last job, or a new one if that is full.
    fn job_with_room(&mut self) -> &mut Job {
        let is_full = |job: &mut Mutex<Job>| {
            let job = job.get_mut().unwrap_or_else(PoisonError::into_inner);
            job.text.len() + job.parts.len() * size_of::<Part>() >= JOB_BYTES
        };
        if self.jobs[..self.n_jobs].last_mut().is_none_or(is_full) {
            self.n_jobs += 1;
            if self.jobs.len() < self.n_jobs {
                self.jobs.push(Mutex::default());
            }
            let job = self.jobs[self.n_jobs - 1].get_mut().unwrap_or_else(PoisonError::into_inner);
            job.text.clear();
            job.parts.clear();
        }
        self.jobs[self.n_jobs - 1].get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Encodes every job, on this thread and as many others as it takes.
    fn encode(&self, tokenizer: &Tokenizer, n_threads: usize) {
        let jobs = &self.jobs[..self.n_jobs];
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                let mut job = job.lock().unwrap_or_else(PoisonError::into_inner);
                job.encode(tokenizer, &self.paths);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..n_threads.min(jobs.len()) {
                scope.spawn(work);
            }
            work();
        });
    }

    /// Hands on the ids, up to the first fault.
    fn hand_on(
        &mut self,
        take: &mut impl FnMut(&[u32]) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        for job in &mut self.jobs[..self.n_jobs] {
            let job = job.get_mut().unwrap_or_else(PoisonError::into_inner);
            take(&job.ids)?;
            let mut start = 0;
            for part in &job.parts {
                self.file_tokens[part.file] += (part.ids_end - start) as u64;
                start = part.ids_end;
            }
            if let Some(fault) = job.fault.take() {
                return Err(fault);
            }
        }
        Ok(())
    }
}

impl Job {
    fn encode(&mut self, tokenizer: &Tokenizer, paths: &[PathBuf]) {
        self.ids.clear();
        self.fault = None;
        let mut from = 0;
        for part in &mut self.parts {
            part.ids_end = self.ids.len();
            if part.start == (PieceStart::Row { joined: true }) {
                self.ids.extend(tokenizer.eos_id());
            }
            let piece = Piece {
                text: &self.text[from..part.end],
                start: part.start,
                path: &paths[part.path],
                line: part.line,
            };
            if let Err(fault) = tokenizer.encode_piece(&piece, &mut self.ids) {
                self.fault = Some(fault);
                return;
            }
            part.ids_end = self.ids.len();
            from = part.end;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::train_char;

    /// Rows, plain text and rows again, several batches long.
    fn files(dir: &std::path::Path) -> Vec<PathBuf> {
        let rows = |n: usize| -> String {
            let lines = (0..n).map(|i| format!("{{\"text\": \"row {i} of many\"}}\n"));
            lines.collect::<Vec<_>>().concat()
        };
        let texts = [rows(40_000), "All the world\n".repeat(60_000), rows(10), String::new()];
        let names = ["a.jsonl", "b.txt", "c.jsonl", "d.jsonl"];
        let write = |(name, text): (&&str, &String)| {
            fs::write(dir.join(name), text).unwrap();
            dir.join(name)
        };
        names.iter().zip(&texts).map(write).collect()
    }

    #[test]
    fn the_ids_are_those_of_the_pieces_one_by_one_on_any_number_of_threads() {
        let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
        for name in ["bpe512", "stories260k"] {
            let dir = tempfile::tempdir().unwrap();
            let files = files(dir.path());
            let tokenizer = Tokenizer::load(&data.join(name)).unwrap();
            let (mut expected, mut pieces) = (Vec::new(), TextPieces::open(&files).unwrap());
            while let Some(piece) = pieces.next_piece().unwrap() {
                if piece.start == (PieceStart::Row { joined: true }) {
                    expected.extend(tokenizer.eos_id());
                }
                tokenizer.encode_piece(&piece, &mut expected).unwrap();
            }
            for n_threads in [1, 2, 5] {
                let mut ids = Vec::new();
                let take = |part: &[u32]| {
                    ids.extend_from_slice(part);
                    Ok(())
                };
                let done =
                    encode_files(&files, &RowOptions::default(), &tokenizer, n_threads, take)
                        .unwrap();
                assert_eq!(done.hashes, pieces.hashes());
                assert_eq!(done.file_tokens.iter().sum::<u64>(), expected.len() as u64);
                assert!(ids == expected, "{name}, {n_threads} threads");
            }
        }
    }

    #[test]
    fn of_several_faults_the_first_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let known = dir.path().join("known.txt");
        fs::write(&known, "abc\n").unwrap();
        train_char(std::slice::from_ref(&known)).unwrap().save(dir.path()).unwrap();
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let mut text = "abc\n".repeat(60_000).into_bytes();
        // Characters that the tokenizer does not know on lines 30,001 and 50,001; later, bytes that are no text.
        (text[120_000], text[200_000]) = (b'x', b'y');
        text[230_000] = 0xff;
        let file = dir.path().join("text.txt");
        fs::write(&file, &text).unwrap();
        for n_threads in [1, 3] {
            let (files, options) = (std::slice::from_ref(&file), RowOptions::default());
            let error = encode_files(files, &options, &tokenizer, n_threads, |_| Ok(()));
            let error = error.unwrap_err().to_string();
            assert!(error.contains("text.txt:30001: "), "{error}");
        }
    }
}

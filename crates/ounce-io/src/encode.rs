//! Training text to ids on several threads, in the order of the text.
//!
//! Idea: pieces are gathered into jobs of at least [`JOB_BYTES`], so that short rows are not handed out one by one;
//! `pipeline.rs` has them encoded and hands their ids on in order.
//!
//! Invariants: the ids do not depend on the number of threads, and of several faults in the text the first one is told.
//! Memory: a few jobs per thread, each with its text and ids, whatever the length of the data.

use std::path::PathBuf;

use crate::dataset::RowOptions;
use crate::error::IoError;
use crate::hash::SourceHash;
use crate::pipeline;
use crate::text::{Piece, PieceStart, TextPieces};
use crate::tokenizer::{Tokenizer, Words};

/// A job has at least so much text, and at most a piece more.
const JOB_BYTES: usize = 16 << 10;

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
    let mut file_tokens = vec![0; files.len()];
    pipeline::in_order(
        n_threads,
        |job: &Job| job.text.len(),
        |job: &mut Job| job.fill(&mut pieces),
        |job, words| job.encode(tokenizer, files, words),
        |job| {
            if let Some(fault) = job.fault.take() {
                return Err(fault);
            }
            job.count(&mut file_tokens);
            take(&job.ids)
        },
    )?;
    Ok(Encoded { hashes: pieces.hashes().to_vec(), file_tokens, n_bad: pieces.n_bad() })
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
    /// Number of the file among all.
    file: usize,
    /// Where its ids end.
    ids_end: usize,
}

impl Job {
    /// Reads pieces until there are enough; false after the last.
    fn fill(&mut self, pieces: &mut TextPieces) -> Result<bool, IoError> {
        self.text.clear();
        self.parts.clear();
        // An empty row costs something, too.
        while self.text.len() + self.parts.len() * size_of::<Part>() < JOB_BYTES {
            let Some(piece) = pieces.next_piece()? else { return Ok(false) };
            self.text.push_str(piece.text);
            let (end, start, line) = (self.text.len(), piece.start, piece.line);
            let file = pieces.file_index();
            self.parts.push(Part { end, start, line, file, ids_end: 0 });
        }
        Ok(true)
    }

    fn encode(&mut self, tokenizer: &Tokenizer, files: &[PathBuf], words: &mut Words) {
        self.ids.clear();
        self.fault = None;
        let mut from = 0;
        for part in &mut self.parts {
            if part.start == (PieceStart::Row { joined: true }) {
                self.ids.extend(tokenizer.eos_id());
            }
            let text = &self.text[from..part.end];
            let piece = Piece { text, start: part.start, path: &files[part.file], line: part.line };
            if let Err(fault) = tokenizer.encode_piece(&piece, words, &mut self.ids) {
                self.fault = Some(fault);
                return;
            }
            part.ids_end = self.ids.len();
            from = part.end;
        }
    }

    /// Adds the ids of each file to those that it has.
    fn count(&self, file_tokens: &mut [u64]) {
        let mut start = 0;
        for part in &self.parts {
            file_tokens[part.file] += (part.ids_end - start) as u64;
            start = part.ids_end;
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
            let (mut expected, mut words) = (Vec::new(), Words::default());
            let mut pieces = TextPieces::open(&files).unwrap();
            while let Some(piece) = pieces.next_piece().unwrap() {
                if piece.start == (PieceStart::Row { joined: true }) {
                    expected.extend(tokenizer.eos_id());
                }
                tokenizer.encode_piece(&piece, &mut words, &mut expected).unwrap();
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

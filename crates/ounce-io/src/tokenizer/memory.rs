//! How much memory tokenizing takes, before it is begun.
//!
//! What a loaded tokenizer takes grows with the files that it is read from, and with every thread, because each has its
//! own tables of regular expressions and of words (`words.rs`). It does not grow with the text. What reading rows takes
//! beside it is in `dataset/`. Measured beside code and libraries, on one thread and on two: 1.2 and 4.6 MiB for
//! characters; with the library 11.6 and 22.4 MiB for a vocabulary of 1,024 (20 KiB of JSON), 20 MiB for GPT-2's (1.4
//! MiB in two files), 50 and 50 MiB for 49,152 tokens with their merges (1.5 MiB of JSON), while it is parsed. The
//! bounds below say 5 and 6, 21 and 29, 91, 92 and 100 MiB.

use std::path::Path;

use super::chars::CharTable;
use super::{FilesKind, TokenizerFiles};
use crate::json::read_small_file;

/// A table of characters, and the batch of text that is encoded at once.
const CHARS_BYTES: u64 = 4 << 20;
/// The library with nothing in it, words that it has seen, and the batch.
const LIBRARY_BYTES: u64 = 12 << 20;
/// Of each thread that looks up characters: its share of the heap.
const CHARS_THREAD_BYTES: u64 = 1 << 20;
/// Of each thread that runs the library: tables of regular expressions.
const LIBRARY_THREAD_BYTES: u64 = 8 << 20;
/// Bytes per byte of the tokenizer's files.
const FILE_SHARE: u64 = 48;
/// No table of characters is looked for in a longer file.
const MAX_CHARS_BYTES: u64 = 4 << 20;

/// Most bytes that tokenizing on `n_threads` threads takes besides code and libraries; 0 without a tokenizer.
pub fn tokenizing_bytes(dir_or_file: &Path, n_threads: usize) -> u64 {
    let Ok(files) = TokenizerFiles::find(dir_or_file) else { return 0 };
    let bytes_of = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let (file_bytes, is_chars) = match &files.kind {
        FilesKind::Json(path) => {
            let json = read_small_file(path, MAX_CHARS_BYTES);
            let is_chars = json.is_ok_and(|json| CharTable::recognise(&json).is_some());
            (bytes_of(path), is_chars)
        }
        FilesKind::VocabMerges(vocab, merges) => (bytes_of(vocab) + bytes_of(merges), false),
    };
    let (fixed, per_thread) = if is_chars {
        (CHARS_BYTES, CHARS_THREAD_BYTES)
    } else {
        (LIBRARY_BYTES, LIBRARY_THREAD_BYTES)
    };
    fixed + FILE_SHARE * file_bytes + per_thread * n_threads as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn larger_tokenizers_take_more_and_none_takes_nothing() {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("text.txt"), "abc").unwrap();
        let chars = crate::train_char(&[dir.path().join("text.txt")]).unwrap();
        chars.save(dir.path()).unwrap();
        let bytes = |path: &Path| tokenizing_bytes(path, 2);
        assert_eq!(bytes(&dir.path().join("nowhere")), 0);
        assert!(bytes(dir.path()) > 0 && bytes(dir.path()) < bytes(&data.join("bpe512")));
        assert!(bytes(&data.join("bpe512")) < bytes(&data.join("metaspace-like")));
    }
}

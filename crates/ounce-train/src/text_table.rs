//! Ids to text without a tokenizer: one byte vector with offsets, made by the tokenizing child.
//!
//! Text is the concatenation of the tokens' bytes. Special tokens have none. The file is: number of
//! tokens (u32), end of each token's bytes (u32 each), the bytes; all little endian.

use std::path::Path;

use ounce_io::{IdTable, write_file};

use crate::{Error, Result};

/// The bytes of every token.
#[derive(Debug)]
pub(crate) struct TextTable {
    /// Token `id` is `bytes[ends[id - 1]..ends[id]]`.
    ends: Vec<u32>,
    bytes: Vec<u8>,
}

impl TextTable {
    /// Writes the table of a tokenizer.
    pub(crate) fn write(path: &Path, table: &IdTable) -> Result<()> {
        let n = table.vocab_size() as u32;
        let mut ends: Vec<u32> = Vec::with_capacity(n as usize);
        let mut bytes = Vec::new();
        for id in 0..n {
            let mut text = String::new();
            let mut stream = table.stream(false);
            stream.push(id, &mut text);
            stream.finish(&mut text);
            // A special token leaves no text, whatever its bytes.
            if !text.is_empty() {
                bytes.extend_from_slice(table.token_bytes(id));
            }
            ends.push(bytes.len() as u32);
        }
        let mut file = n.to_le_bytes().to_vec();
        for end in ends {
            file.extend_from_slice(&end.to_le_bytes());
        }
        file.extend_from_slice(&bytes);
        Ok(write_file(path, &file)?)
    }

    /// Reads a table back.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let file = std::fs::read(path).map_err(|e| Error::file(path, &e))?;
        Self::parse(&file).ok_or_else(|| Error::Files {
            message: format!("{}: not a table of tokens", path.display()),
            hint: "delete the file; it is made again".to_owned(),
        })
    }

    fn parse(file: &[u8]) -> Option<Self> {
        let (n, rest) = file.split_first_chunk::<4>()?;
        let n = u32::from_le_bytes(*n) as usize;
        let (ends, bytes) = rest.split_at_checked(n.checked_mul(4)?)?;
        let ends: Vec<u32> =
            ends.as_chunks::<4>().0.iter().map(|&end| u32::from_le_bytes(end)).collect();
        let whole = ends.is_sorted() && ends.last().copied().unwrap_or(0) as usize == bytes.len();
        whole.then(|| Self { ends, bytes: bytes.to_vec() })
    }

    /// Ids that have an entry.
    pub(crate) fn vocab_size(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of a token; none for an id beyond the table.
    fn token(&self, id: u32) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

/// Bytes of a growing text; hands out whole characters only.
#[derive(Debug, Default)]
pub(crate) struct TextStream {
    pending: Vec<u8>,
}

impl TextStream {
    /// Adds a token and returns the text that is complete now.
    pub(crate) fn push(&mut self, table: &TextTable, id: u32) -> String {
        self.pending.extend_from_slice(table.token(id));
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(complete) => {
                    text.push_str(complete);
                    self.pending.clear();
                    return text;
                }
                Err(e) => {
                    let n_valid = e.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[..n_valid]));
                    // None: the end of the input, where a character may still be completed.
                    let Some(n_bad) = e.error_len() else {
                        self.pending.drain(..n_valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..n_valid + n_bad);
                }
            }
        }
    }

    /// Ends the text: half a character becomes a replacement character.
    pub(crate) fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(tokens: &[&[u8]]) -> TextTable {
        let (mut ends, mut bytes) = (Vec::new(), Vec::new());
        for token in tokens {
            bytes.extend_from_slice(token);
            ends.push(bytes.len() as u32);
        }
        TextTable { ends, bytes }
    }

    #[test]
    fn half_a_character_waits_for_its_other_half() {
        let table = table(&[b"a\xf0\x9f", b"\x99\x82!", b"\xff."]);
        let mut stream = TextStream::default();
        assert_eq!(stream.push(&table, 0), "a");
        assert_eq!(stream.push(&table, 1), "\u{1f642}!");
        assert_eq!(stream.push(&table, 2), "\u{fffd}.");
        assert_eq!(stream.push(&table, 0), "a");
        assert_eq!(stream.finish(), "\u{fffd}");
        assert_eq!(stream.push(&table, 99), "");
    }

    #[test]
    fn files_that_are_no_tables_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        for bytes in [&b""[..], b"\x01\0\0\0", b"\xff\xff\xff\xff", b"\x01\0\0\0\x02\0\0\0a"] {
            std::fs::write(&path, bytes).unwrap();
            assert!(TextTable::read(&path).is_err(), "{bytes:?}");
        }
        std::fs::write(&path, b"\x01\0\0\0\x01\0\0\0a").unwrap();
        assert_eq!(TextTable::read(&path).unwrap().token(0), b"a");
    }
}

//! Files as they are read: hashed on the way, line by line, each line bounded.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{IoError, excerpt};
use crate::hash::{SourceHash, Xxh64};
use crate::json::open_regular;

pub(crate) const BOM: &[u8] = b"\xef\xbb\xbf";
/// What to do with text of another encoding; `head`: how the file begins, if it is that which is not UTF-8.
pub(crate) fn encoding_hint(head: &[u8]) -> &'static str {
    if head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff") {
        "the file is UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`"
    } else {
        "convert the file from the encoding that it has, with `iconv -f LATIN1 -t UTF-8` for instance"
    }
}

/// Most bytes that are read at once, and of text in one piece.
pub const PIECE_BYTES: usize = 32 << 10;

/// A file that hashes what is read from it.
#[derive(Debug)]
pub(crate) struct Source {
    file: File,
    hash: Xxh64,
    n_bytes: u64,
}

impl Source {
    /// Begins at a byte of the file; length and hash are those from there on.
    pub(crate) fn open_at(path: &Path, at: u64) -> Result<Self, IoError> {
        let mut file = open_regular(path)?;
        file.seek(SeekFrom::Start(at)).map_err(|e| IoError::reading(path, e))?;
        Ok(Self { file, hash: Xxh64::new(), n_bytes: 0 })
    }

    /// Bytes read so far.
    pub(crate) fn n_read(&self) -> u64 {
        self.n_bytes
    }

    /// Bytes of the file.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.len())
    }

    /// Length and hash of what was read so far.
    pub(crate) fn fingerprint(&self) -> SourceHash {
        SourceHash { n_bytes: self.n_bytes, hash: self.hash.digest() }
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.hash.update(&buffer[..n]);
        self.n_bytes += n as u64;
        Ok(n)
    }
}

/// Where a row begins, so that reading can go on from there. The default is the start of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RowPlace {
    /// A byte of a file of text or JSON, the number of a row of a Parquet file.
    pub(crate) at: u64,
    /// Lines before it.
    pub(crate) lines: u64,
    pub(crate) layout: Layout,
}

/// What stands on a line, or between the commas of an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Item {
    /// A row; its bytes are at hand.
    Row,
    /// A row that is longer than it may be; its start is at hand, the rest was passed over.
    TooLong,
    /// The end of the file.
    End,
}

/// Rows of JSON, one a line or the elements of one array, as bytes.
///
/// Which of the two it is says the first character of the file. Elements of an array are told apart by counting
/// brackets outside of strings, so that one that is no JSON leaves the others readable.
#[derive(Debug)]
pub(crate) struct JsonItems {
    path: PathBuf,
    source: BufReader<Source>,
    /// Longest row.
    row_bytes: usize,
    /// The byte of the file that reading began at.
    first_byte: u64,
    bytes: Vec<u8>,
    /// Line on which the current row begins, from 1.
    line: u64,
    /// Lines before the reading position.
    n_lines: u64,
    layout: Layout,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Layout {
    #[default]
    Unknown,
    Lines,
    /// Before an element or the closing bracket. `first`: no comma is due.
    Array {
        first: bool,
    },
    /// Behind the closing bracket.
    Closed,
}

impl JsonItems {
    /// Opens a file that holds JSON, in rows of at most `row_bytes`, to be read from `place` on.
    pub(crate) fn open_at(path: &Path, place: RowPlace, row_bytes: usize) -> Result<Self, IoError> {
        Ok(Self {
            path: path.into(),
            source: BufReader::with_capacity(PIECE_BYTES, Source::open_at(path, place.at)?),
            row_bytes,
            first_byte: place.at,
            bytes: Vec::new(),
            line: 0,
            n_lines: place.lines,
            layout: place.layout,
        })
    }

    /// Behind the row that was read last.
    pub(crate) fn place(&self) -> RowPlace {
        let n_ahead = self.source.buffer().len() as u64;
        let at = self.first_byte + self.source.get_ref().n_read() - n_ahead;
        RowPlace { at, lines: self.n_lines, layout: self.layout }
    }

    /// Bytes of the file.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.source.get_ref().file_bytes()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Longest row that is read.
    pub(crate) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    pub(crate) fn line(&self) -> u64 {
        self.line
    }

    /// The bytes of the current row.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn fingerprint(&self) -> SourceHash {
        self.source.get_ref().fingerprint()
    }

    /// Goes to the next row that is not blank.
    ///
    /// # Errors
    /// `Read`; `BadLine` where an array is not one.
    pub(crate) fn advance(&mut self) -> Result<Item, IoError> {
        self.bytes.clear();
        // One very long row must not keep its memory for the rest of the file.
        self.bytes.shrink_to(4 * PIECE_BYTES);
        if self.layout == Layout::Unknown {
            self.skip_bom()?;
            self.layout = match self.peek_past_space()? {
                Some(b'[') => {
                    self.source.consume(1);
                    Layout::Array { first: true }
                }
                _ => Layout::Lines,
            };
        }
        match self.layout {
            Layout::Array { first } => self.next_element(first),
            Layout::Closed => self.expect_end(),
            Layout::Unknown | Layout::Lines => self.next_line(),
        }
    }

    fn next_line(&mut self) -> Result<Item, IoError> {
        loop {
            self.bytes.clear();
            let mut line = (&mut self.source).take(self.row_bytes as u64 + 1);
            let n = line
                .read_until(b'\n', &mut self.bytes)
                .map_err(|e| IoError::reading(&self.path, e))?;
            self.line = self.n_lines + 1;
            if n == 0 {
                return Ok(Item::End);
            }
            if n > self.row_bytes {
                if self.bytes.last() == Some(&b'\n') {
                    self.n_lines += 1;
                } else {
                    self.skip_line()?;
                }
                self.keep_start();
                return Ok(Item::TooLong);
            }
            self.n_lines += 1;
            if !self.bytes.iter().all(u8::is_ascii_whitespace) {
                return Ok(Item::Row);
            }
        }
    }

    /// Of a row that is too long, as much as a message shows.
    fn keep_start(&mut self) {
        self.bytes.truncate(PIECE_BYTES);
        self.bytes.shrink_to_fit();
    }

    /// Passes over the rest of a line through the reader's own buffer.
    fn skip_line(&mut self) -> Result<(), IoError> {
        loop {
            let buffer = self.source.fill_buf().map_err(|e| IoError::reading(&self.path, e))?;
            // Counting is faster than searching.
            let has_end = count_newlines(buffer) > 0;
            let end = if has_end { buffer.iter().position(|&b| b == b'\n') } else { None };
            let n_passed = end.map_or(buffer.len(), |at| at + 1);
            self.source.consume(n_passed);
            self.n_lines += u64::from(end.is_some());
            if end.is_some() || n_passed == 0 {
                return Ok(());
            }
        }
    }

    fn next_element(&mut self, first: bool) -> Result<Item, IoError> {
        let mut next = self.peek_past_space()?;
        if next == Some(b']') {
            self.next_byte()?;
            self.layout = Layout::Closed;
            return self.expect_end();
        }
        if !first {
            if next != Some(b',') {
                return Err(self.broken("a comma or `]` is missing between two rows"));
            }
            self.next_byte()?;
            next = self.peek_past_space()?;
        }
        self.line = self.n_lines + 1;
        self.layout = Layout::Array { first: false };
        if matches!(next, None | Some(b',' | b']')) {
            return Err(self.broken("a row is missing"));
        }
        self.take_element()
    }

    /// Collects bytes up to the comma or bracket that ends the element.
    fn take_element(&mut self) -> Result<Item, IoError> {
        let (mut depth, mut in_string, mut escaped, mut too_long) = (0_u64, false, false, false);
        loop {
            let Some(byte) = self.peek()? else {
                return Err(self.broken("the file ends before the array does"));
            };
            if !in_string && depth == 0 && matches!(byte, b',' | b']' | b'}') {
                if byte == b'}' {
                    return Err(self.broken("`}` closes nothing"));
                }
                return Ok(if too_long { Item::TooLong } else { Item::Row });
            }
            self.next_byte()?;
            match byte {
                _ if escaped => escaped = false,
                b'\\' if in_string => escaped = true,
                b'"' => in_string = !in_string,
                b'[' | b'{' if !in_string => depth += 1,
                b']' | b'}' if !in_string => depth -= 1,
                _ => {}
            }
            if !too_long && self.bytes.len() == self.row_bytes {
                too_long = true;
                self.keep_start();
            }
            if !too_long {
                self.bytes.push(byte);
            }
            if !in_string && depth == 0 && matches!(byte, b']' | b'}') {
                return Ok(if too_long { Item::TooLong } else { Item::Row });
            }
        }
    }

    fn expect_end(&mut self) -> Result<Item, IoError> {
        match self.peek_past_space()? {
            None => Ok(Item::End),
            Some(_) => Err(self.broken("there is more behind the array's closing bracket")),
        }
    }

    fn broken(&self, what: &str) -> IoError {
        let near = excerpt(&self.bytes, self.bytes.len());
        let near = if near.is_empty() { String::new() } else { format!(" near `{near}`") };
        let reason = format!("not a JSON array of rows: {what}{near}");
        let hint = "the file is `[row, row, ...]`, or one row per line";
        IoError::bad_line(&self.path, self.n_lines + 1, reason, hint)
    }

    fn skip_bom(&mut self) -> Result<(), IoError> {
        let buffer = self.source.fill_buf().map_err(|e| IoError::reading(&self.path, e))?;
        if buffer.starts_with(BOM) {
            self.source.consume(BOM.len());
        }
        Ok(())
    }

    fn peek_past_space(&mut self) -> Result<Option<u8>, IoError> {
        loop {
            match self.peek()? {
                Some(byte) if byte.is_ascii_whitespace() => self.next_byte()?,
                other => return Ok(other),
            };
        }
    }

    fn peek(&mut self) -> Result<Option<u8>, IoError> {
        let buffer = self.source.fill_buf().map_err(|e| IoError::reading(&self.path, e))?;
        Ok(buffer.first().copied())
    }

    fn next_byte(&mut self) -> Result<Option<u8>, IoError> {
        let byte = self.peek()?;
        if byte.is_some() {
            self.source.consume(1);
        }
        self.n_lines += u64::from(byte == Some(b'\n'));
        Ok(byte)
    }
}

pub(crate) fn count_newlines(bytes: &[u8]) -> u64 {
    bytes.iter().map(|&byte| u64::from(byte == b'\n')).sum()
}

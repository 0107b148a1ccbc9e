//! Training text as a stream of pieces, in bounded memory.
//!
//! Idea: data files are read through one small buffer and handed out as pieces of at most [`PIECE_BYTES`], cut where a
//! tokenizer would cut anyway, so that encoding piece by piece gives the ids of encoding the whole.
//!
//! Where pieces are cut, best place first:
//! 1. before a line feed that follows a plain letter or digit. Pre-tokenizers of the GPT-2 and the newer families end
//!    a pre-token there whatever stands around it, and SentencePiece vocabularies never merge across a line feed;
//! 2. before a space between a plain letter or digit and a plain letter, for the same reason;
//! 3. anywhere between two characters, where 32 KiB hold neither (no guarantee then).
//!
//! What a file must satisfy, or the error names `FILE:LINE`: UTF-8, no NUL; a byte order mark at the start is
//! skipped. A row (of `.jsonl`, `.json` or `.parquet`, see `dataset/`) is an object with a string `text`, of at most
//! [`MAX_LINE_BYTES`]; other keys are ignored, blank lines are skipped. Any other file is one text.
//!
//! Memory: one piece buffer; for rows one row and its decoded text besides.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::dataset::source::{BOM, PIECE_BYTES, RowPlace, Source, count_newlines, encoding_hint};
use crate::dataset::{
    ColumnMapping, FileKind, OnBadRow, Place, RowFormat, RowOptions, RowReader, Sample, samples,
};
use crate::error::{IoError, excerpt};
use crate::hash::SourceHash;
use crate::json::open_regular;

/// What stands before a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PieceStart {
    /// The start of a row or file. `joined`: an end-of-text token belongs between it and what came before.
    Row {
        /// False for the very first row, and between two plain text files.
        joined: bool,
    },
    /// The piece goes on with a line feed.
    Newline,
    /// The piece goes on with a single space.
    Space,
    /// The piece goes on in the middle of something.
    Forced,
}

/// Where a piece of plain text or the row of a piece begins, so that reading can go on from there. The default is the
/// start of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TextPlace {
    /// Number of the file.
    pub(crate) file: usize,
    pub(crate) at: RowPlace,
    start: PieceStart,
    /// What came before it.
    before: Option<FileKind>,
}

impl Default for TextPlace {
    fn default() -> Self {
        Self { file: 0, at: RowPlace::default(), start: FILE_START, before: None }
    }
}

/// What a file begins with.
const FILE_START: PieceStart = PieceStart::Row { joined: false };

/// A piece of text and where it comes from.
#[derive(Debug)]
pub struct Piece<'a> {
    /// The text, possibly empty at the start of a row.
    pub text: &'a str,
    /// What stands before it.
    pub start: PieceStart,
    /// The file.
    pub path: &'a Path,
    /// The line on which the piece starts, from 1.
    pub line: u64,
}

/// The pieces of several files, in order.
#[derive(Debug)]
pub struct TextPieces {
    paths: Vec<PathBuf>,
    options: RowOptions,
    next_path: usize,
    current: Option<Reader>,
    hashes: Vec<SourceHash>,
    /// Whether anything came before, and whether it was a row.
    before: Option<FileKind>,
    /// The same for what the current piece is a part of.
    row_before: Option<FileKind>,
    n_bad: u64,
}

#[derive(Debug)]
enum Reader {
    Plain(PlainReader),
    Rows(Box<TextRows>),
}

impl TextPieces {
    /// Starts at the first file. Nothing is read yet, but every path is checked.
    ///
    /// # Errors
    /// `Missing`, `BadFile` for a directory, a pipe or a format that holds no plain text.
    pub fn open(paths: &[PathBuf]) -> Result<Self, IoError> {
        Self::open_with(paths, &RowOptions::default())
    }

    /// The same, with rows read as `options` say.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(paths: &[PathBuf], options: &RowOptions) -> Result<Self, IoError> {
        Self::open_at(paths, options, TextPlace::default())
    }

    /// The same, from `place` on.
    pub(crate) fn open_at(
        paths: &[PathBuf],
        options: &RowOptions,
        place: TextPlace,
    ) -> Result<Self, IoError> {
        for path in paths {
            FileKind::of(path)?;
            open_regular(path)?;
        }
        // In the middle of a file its progress counts before its first piece.
        let current = match paths.get(place.file) {
            Some(path) if place != TextPlace::default() => {
                Some(Reader::open_at(path, options, place)?)
            }
            _ => None,
        };
        Ok(Self {
            paths: paths.to_vec(),
            options: options.clone(),
            next_path: place.file + usize::from(current.is_some()),
            current,
            hashes: Vec::new(),
            before: place.before,
            row_before: place.before,
            n_bad: 0,
        })
    }

    /// The next piece, or `None` after the last one.
    ///
    /// # Errors
    /// `Read`; `BadLine` for what the module's opening comment lists.
    pub fn next_piece(&mut self) -> Result<Option<Piece<'_>>, IoError> {
        loop {
            if self.current.is_none() {
                let Some(path) = self.paths.get(self.next_path) else { return Ok(None) };
                self.current = Some(Reader::open_at(path, &self.options, TextPlace::default())?);
                self.next_path += 1;
            }
            let reader = self.current.as_mut().expect("opened above");
            let Some(mut start) = reader.advance()? else {
                self.hashes.push(reader.finish()?);
                self.n_bad += reader.n_bad();
                self.current = None;
                continue;
            };
            if let PieceStart::Row { joined } = &mut start {
                let kind = reader.kind();
                self.row_before = self.before;
                *joined =
                    self.before.is_some_and(|b| b == FileKind::Rows || kind == FileKind::Rows);
                self.before = Some(kind);
            }
            // The reader is looked up again because the borrow checker cannot follow it through the loop.
            let reader = self.current.as_ref().expect("opened above");
            return Ok(Some(reader.piece(start)));
        }
    }

    /// Length and hash of every file read to its end, in order.
    pub fn hashes(&self) -> &[SourceHash] {
        &self.hashes
    }

    /// The number of the file that the last piece came from.
    pub fn file_index(&self) -> usize {
        self.next_path.saturating_sub(1)
    }

    /// Where the last piece begins, or the row that it is a part of.
    pub(crate) fn place(&self) -> TextPlace {
        let (at, start) =
            self.current.as_ref().map_or((RowPlace::default(), FILE_START), Reader::place);
        let before =
            if matches!(start, PieceStart::Row { .. }) { self.row_before } else { self.before };
        TextPlace { file: self.file_index(), at, start, before }
    }

    /// How much of the data was handed out, from 0 to below 1.
    pub(crate) fn progress(&self) -> f64 {
        let within = self.current.as_ref().map_or(0.0, Reader::progress);
        (self.file_index() as f64 + within) / self.paths.len() as f64
    }

    /// Broken rows that were passed over.
    pub fn n_bad(&self) -> u64 {
        self.n_bad + self.current.as_ref().map_or(0, Reader::n_bad)
    }
}

/// A share of a file: what is read but not known to be the end is below 1.
pub(crate) fn share(done: u64, end: u64) -> f64 {
    done.min(end.saturating_sub(1)) as f64 / end.max(1) as f64
}

impl Reader {
    fn open_at(path: &Path, options: &RowOptions, place: TextPlace) -> Result<Self, IoError> {
        Ok(match FileKind::of(path)? {
            FileKind::Text => Self::Plain(PlainReader::open_at(path, place)?),
            _ => Self::Rows(Box::new(TextRows::open_at(path, options, place.at)?)),
        })
    }

    /// Where the piece or its row begins, and with what.
    fn place(&self) -> (RowPlace, PieceStart) {
        match self {
            Self::Plain(reader) => (reader.place(), reader.start),
            Self::Rows(reader) => (reader.row_place, FILE_START),
        }
    }

    /// How much of the file was handed out, from 0 to below 1.
    fn progress(&self) -> f64 {
        match self {
            Self::Plain(reader) => {
                share(reader.offset + reader.n_piece as u64, reader.source.file_bytes())
            }
            Self::Rows(reader) => share(reader.rows.place().at, reader.rows.end()),
        }
    }

    /// Text, or rows of any kind.
    fn kind(&self) -> FileKind {
        match self {
            Self::Plain(_) => FileKind::Text,
            Self::Rows(_) => FileKind::Rows,
        }
    }

    fn n_bad(&self) -> u64 {
        match self {
            Self::Plain(_) => 0,
            Self::Rows(reader) => reader.n_bad,
        }
    }

    fn advance(&mut self) -> Result<Option<PieceStart>, IoError> {
        match self {
            Self::Plain(reader) => reader.advance(),
            Self::Rows(reader) => reader.advance(),
        }
    }

    fn piece(&self, start: PieceStart) -> Piece<'_> {
        match self {
            Self::Plain(r) => Piece { text: r.text(), start, path: &r.path, line: r.line },
            Self::Rows(r) => Piece { text: r.text(), start, path: &r.path, line: r.line },
        }
    }

    fn finish(&self) -> Result<SourceHash, IoError> {
        match self {
            Self::Plain(reader) => Ok(reader.source.fingerprint()),
            Self::Rows(reader) => reader.rows.fingerprint(),
        }
    }
}

/// One plain text file. The buffer holds the current piece, then what was read beyond it.
#[derive(Debug)]
struct PlainReader {
    path: PathBuf,
    source: Source,
    /// The byte of the file that the buffer begins with.
    offset: u64,
    buffer: Vec<u8>,
    n_filled: usize,
    n_piece: usize,
    at_end: bool,
    line: u64,
    start: PieceStart,
    next_start: PieceStart,
}

impl PlainReader {
    fn open_at(path: &Path, place: TextPlace) -> Result<Self, IoError> {
        Ok(Self {
            path: path.into(),
            source: Source::open_at(path, place.at.at)?,
            offset: place.at.at,
            buffer: vec![0; PIECE_BYTES],
            n_filled: 0,
            n_piece: 0,
            at_end: false,
            line: place.at.lines + 1,
            start: place.start,
            next_start: place.start,
        })
    }

    /// Where the current piece begins.
    fn place(&self) -> RowPlace {
        RowPlace { at: self.offset, lines: self.line - 1, ..RowPlace::default() }
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.buffer[..self.n_piece]).expect("checked by advance")
    }

    /// Drops the current piece and finds the next; says what stands before it.
    fn advance(&mut self) -> Result<Option<PieceStart>, IoError> {
        let is_first = matches!(self.next_start, PieceStart::Row { .. });
        let may_have_bom = self.offset == 0 && self.n_piece == 0;
        self.line += count_newlines(&self.buffer[..self.n_piece]);
        self.buffer.copy_within(self.n_piece..self.n_filled, 0);
        self.offset += self.n_piece as u64;
        self.n_filled -= self.n_piece;
        self.n_piece = 0;
        self.fill()?;
        if may_have_bom && self.buffer[..self.n_filled].starts_with(BOM) {
            self.buffer.copy_within(BOM.len()..self.n_filled, 0);
            self.n_filled -= BOM.len();
            self.offset += BOM.len() as u64;
            self.fill()?;
        }
        let start = self.next_start;
        self.start = start;
        let text = self.valid_text()?;
        let (n_piece, next_start) =
            if self.at_end { (text.len(), PieceStart::Forced) } else { find_cut(text) };
        (self.n_piece, self.next_start) = (n_piece, next_start);
        // An empty file is an empty row; later on nothing left means the end.
        Ok((is_first || n_piece > 0).then_some(start))
    }

    fn fill(&mut self) -> Result<(), IoError> {
        while !self.at_end && self.n_filled < self.buffer.len() {
            let room = &mut self.buffer[self.n_filled..];
            let n = self.source.read(room).map_err(|e| IoError::reading(&self.path, e))?;
            self.at_end = n == 0;
            self.n_filled += n;
        }
        Ok(())
    }

    /// What the buffer holds, less a last character that is not read completely.
    fn valid_text(&self) -> Result<&str, IoError> {
        let bytes = &self.buffer[..self.n_filled];
        let (text, bad_at) = match std::str::from_utf8(bytes) {
            Ok(text) => (text, None),
            Err(e) => {
                let (good, _) = bytes.split_at(e.valid_up_to());
                let text = std::str::from_utf8(good).expect("valid up to here");
                let is_cut_short = e.error_len().is_none() && !self.at_end;
                (text, (!is_cut_short).then_some(e.valid_up_to()))
            }
        };
        // The first fault counts: a NUL before broken UTF-8 says more about the file.
        if let Some(at) = text.bytes().position(|byte| byte == 0) {
            return Err(self.fault(
                at,
                "holds a NUL byte",
                "this is not a text file, or UTF-16: convert it, as it was before any other conversion, with `iconv -f \
                 UTF-16 -t UTF-8`",
            ));
        }
        match bad_at {
            None => Ok(text),
            Some(at) => {
                let reason = format!("is not UTF-8 (byte 0x{:02x})", bytes[at]);
                let hint = encoding_hint(if at == 0 && self.line == 1 { bytes } else { &[] });
                Err(self.fault(at, &reason, hint))
            }
        }
    }

    fn fault(&self, at: usize, reason: &str, hint: &'static str) -> IoError {
        let line = self.line + count_newlines(&self.buffer[..at]);
        let near = excerpt(&self.buffer[..self.n_filled], at);
        IoError::bad_line(&self.path, line, format!("{reason} near `{near}`"), hint)
    }
}

/// One file of rows, each a text.
#[derive(Debug)]
struct TextRows {
    path: PathBuf,
    rows: RowReader,
    on_bad_row: OnBadRow,
    n_bad: u64,
    columns: ColumnMapping,
    line: u64,
    /// Where the row begins.
    row_place: RowPlace,
    row: String,
    /// The current piece is `row[piece_start..piece_end]`.
    piece_start: usize,
    piece_end: usize,
    next_start: PieceStart,
}

impl TextRows {
    fn open_at(path: &Path, options: &RowOptions, place: RowPlace) -> Result<Self, IoError> {
        Ok(Self {
            path: path.into(),
            rows: RowReader::open_at(path, place, options.row_bytes)?,
            on_bad_row: options.on_bad_row,
            n_bad: 0,
            columns: options.columns.clone(),
            line: 0,
            row_place: place,
            row: String::new(),
            piece_start: 0,
            piece_end: 0,
            next_start: PieceStart::Forced,
        })
    }

    fn text(&self) -> &str {
        &self.row[self.piece_start..self.piece_end]
    }

    fn advance(&mut self) -> Result<Option<PieceStart>, IoError> {
        let mut start = self.next_start;
        self.piece_start = self.piece_end;
        if self.piece_start == self.row.len() {
            if !self.next_row()? {
                return Ok(None);
            }
            start = PieceStart::Row { joined: false };
            self.piece_start = 0;
        }
        let (n_piece, next_start) = first_piece(&self.row[self.piece_start..]);
        self.piece_end = self.piece_start + n_piece;
        self.next_start = next_start;
        Ok(Some(start))
    }

    /// Reads the next row that holds a text; false at the end of the file.
    fn next_row(&mut self) -> Result<bool, IoError> {
        // Not beside the next one.
        self.row = String::new();
        loop {
            self.row_place = self.rows.place();
            let Some(row) = self.rows.next_row()? else { return Ok(false) };
            let text = row.and_then(|row| {
                let samples = samples(&self.path, &row, RowFormat::Text, &self.columns)?;
                Ok((row.place, samples))
            });
            match text {
                Ok((place, samples)) => {
                    let (Place::Line(n) | Place::Row(n)) = place;
                    self.line = n;
                    for sample in samples {
                        if let Sample::Text(text) = sample {
                            self.row = text;
                        }
                    }
                    return Ok(true);
                }
                Err(_) if self.on_bad_row == OnBadRow::Skip => self.n_bad += 1,
                Err(fault) => return Err(fault),
            }
        }
    }
}

/// Length of the next piece of `text`, and what the one behind it starts with.
pub(crate) fn first_piece(text: &str) -> (usize, PieceStart) {
    if text.len() <= PIECE_BYTES {
        return (text.len(), PieceStart::Forced);
    }
    find_cut(&text[..char_boundary(text, PIECE_BYTES)])
}

/// Length of the longest prefix of `text` to hand out now, and what the next piece starts with.
pub(crate) fn find_cut(text: &str) -> (usize, PieceStart) {
    let bytes = text.as_bytes();
    // A character before the cut, and one after it, are looked at.
    for at in (1..bytes.len()).rev() {
        if bytes[at] == b'\n' && text[..at].chars().next_back().is_some_and(is_plain) {
            return (at, PieceStart::Newline);
        }
    }
    for at in (1..bytes.len().saturating_sub(1)).rev() {
        if bytes[at] == b' '
            && text[..at].chars().next_back().is_some_and(is_plain)
            && text[at + 1..].chars().next().is_some_and(|c| is_plain(c) && !c.is_numeric())
        {
            return (at, PieceStart::Space);
        }
    }
    (text.len(), PieceStart::Forced)
}

/// Letters and digits of the large scripts: all of them in the classes `\p{L}` or `\p{N}`, none of them a mark.
fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric()
        || matches!(c,
            '\u{c0}'..='\u{d6}' | '\u{d8}'..='\u{f6}' | '\u{f8}'..='\u{17f}' // Latin
            | '\u{391}'..='\u{3a1}' | '\u{3a3}'..='\u{3c9}'                  // Greek
            | '\u{410}'..='\u{44f}'                                          // Cyrillic
            | '\u{5d0}'..='\u{5ea}' | '\u{620}'..='\u{63f}'                  // Hebrew, Arabic
            | '\u{905}'..='\u{939}'                                          // Devanagari
            | '\u{3041}'..='\u{3096}' | '\u{30a1}'..='\u{30fa}'              // kana
            | '\u{4e00}'..='\u{9fff}' | '\u{ac00}'..='\u{d7a3}') // Han, Hangul
}

/// The last character boundary of `text` at or before byte `at`.
fn char_boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::MAX_LINE_BYTES;

    /// Writes `bytes` to a file called `name` and reads it back: rows of pieces, or the error with the path cut off.
    fn rows(name: &str, bytes: &[u8]) -> Result<Vec<String>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        read_rows(&[path]).map_err(|e| e.replace(&format!("{}/", dir.path().display()), ""))
    }

    fn read_rows(paths: &[PathBuf]) -> Result<Vec<String>, String> {
        let mut pieces = TextPieces::open(paths).map_err(|e| e.to_string())?;
        let mut rows: Vec<String> = Vec::new();
        while let Some(piece) = pieces.next_piece().map_err(|e| e.to_string())? {
            match piece.start {
                PieceStart::Row { joined } if joined || rows.is_empty() => rows.push(String::new()),
                PieceStart::Newline => assert!(piece.text.starts_with('\n')),
                PieceStart::Space => assert!(piece.text.starts_with(' ')),
                PieceStart::Row { .. } | PieceStart::Forced => {}
            }
            rows.last_mut().unwrap().push_str(piece.text);
        }
        Ok(rows)
    }

    #[test]
    fn pieces_join_to_the_file_whatever_it_holds() {
        arbtest::arbtest(|u| {
            let alphabet = ["a", "Z", "9", " ", "\n", "é", "漢", "🙂", ".", "\r\n", "word word\n"];
            let mut text = String::new();
            let n_bytes = u.int_in_range(0..=3 * PIECE_BYTES)?;
            let unit: Vec<usize> = (0..u.int_in_range(1..=40)?)
                .map(|_| u.choose_index(alphabet.len()))
                .collect::<Result<_, _>>()?;
            while text.len() < n_bytes {
                text.extend(unit.iter().map(|&i| alphabet[i]));
            }
            assert_eq!(rows("t.txt", text.as_bytes()).unwrap(), [text.clone()]);
            let row = serde_json::json!({ "text": text }).to_string();
            assert_eq!(rows("t.jsonl", row.as_bytes()).unwrap(), [text]);
            Ok(())
        })
        .budget_ms(1500);
    }

    #[test]
    fn a_cut_is_before_a_newline_or_space_that_follows_a_letter() {
        assert_eq!(find_cut("one\ntwo.\n\n"), (3, PieceStart::Newline));
        assert_eq!(find_cut("one two.\n3 4"), (3, PieceStart::Space));
        assert_eq!(find_cut("...\n... 9"), (9, PieceStart::Forced));
        assert_eq!(find_cut("né\n"), (3, PieceStart::Newline));
    }

    #[test]
    fn a_byte_order_mark_is_skipped_at_the_start_only() {
        assert_eq!(rows("a.txt", b"\xef\xbb\xbfhi\xef\xbb\xbf").unwrap(), ["hi\u{feff}"]);
        assert_eq!(rows("a.jsonl", b"\xef\xbb\xbf{\"text\":\"hi\"}").unwrap(), ["hi"]);
        assert_eq!(rows("a.txt", b"").unwrap(), [""]);
    }

    #[test]
    fn rows_are_joined_and_plain_files_follow_each_other_directly() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let a = write("a.txt", "A");
        let b = write("b.txt", "B");
        let rows = write(
            "c.jsonl",
            "{\"text\": \"C\", \"id\": 7}\n\n  \r\n{\"text\": \"\"}\r\n{\"text\":\"D\"}",
        );
        let starts = |paths: &[PathBuf]| {
            let mut pieces = TextPieces::open(paths).unwrap();
            let mut starts = Vec::new();
            while let Some(piece) = pieces.next_piece().unwrap() {
                let joined = piece.start == PieceStart::Row { joined: true };
                starts.push(format!(
                    "{}{}:{}",
                    if joined { "+" } else { "" },
                    piece.text,
                    piece.line
                ));
            }
            assert_eq!(pieces.hashes().len(), paths.len());
            starts
        };
        assert_eq!(starts(&[a.clone(), b.clone()]), ["A:1", "B:1"]);
        assert_eq!(starts(&[rows.clone(), a]), ["C:1", "+:4", "+D:5", "+A:1"]);
        assert_eq!(starts(&[b, rows]), ["B:1", "+C:1", "+:4", "+D:5"]);
    }

    #[test]
    fn faults_of_plain_text_name_the_line() {
        let fault = |bytes: &[u8]| rows("a.txt", bytes).unwrap_err();
        let broken = fault(b"fine\nstill fine\nbad \xff here\n");
        assert!(broken.starts_with("a.txt:3: is not UTF-8 (byte 0xff) near `"), "{broken}");
        assert!(broken.contains("bad ") && broken.contains("\nhint: convert"), "{broken}");
        assert!(fault(b"one\ntwo\0").starts_with("a.txt:2: holds a NUL byte near"));
        // A character cut off by the end of the file.
        assert!(fault(b"caf\xc3").starts_with("a.txt:1: is not UTF-8"));
        let mut late = b"line\n".repeat(PIECE_BYTES);
        late.extend(b"\xc0");
        assert!(fault(&late).starts_with(&format!("a.txt:{}: ", PIECE_BYTES + 1)));
    }

    #[test]
    fn faults_of_rows_name_the_line() {
        let fault = |second: &[u8]| {
            let text = [b"{\"text\":\"ok\"}\n", second].concat();
            let message = rows("a.jsonl", &text).unwrap_err();
            assert!(message.starts_with("a.jsonl:2: "), "{message}");
            assert!(message.contains("\nhint: "), "{message}");
            message
        };
        assert!(fault(b"{\"txt\": 1}").contains("missing key `text` in `{\"txt\":1}`"));
        assert!(fault(b"{\"text\": 5}").contains("`text` is a number, but must be a string"));
        assert!(fault(b"{\"text\": \"a\", \"text\": \"b\"}").contains("key `text` appears twice"));
        assert!(fault(b"[1]").contains("the row is not an object"));
        assert!(fault(b"{\"text\": \"half").contains("not valid JSON: EOF"));
        assert!(fault(b"{\"text\": \"\\ud800\"}").contains("not valid JSON: "));
        assert!(fault(b"{\"text\": \"a\\u0000b\"}").contains("NUL"));
        assert!(fault(b"{\"text\": \"\xff\"}").contains("is not UTF-8"));
        let deep = format!("{{\"text\": {}", "[".repeat(1_000_000));
        assert!(fault(deep.as_bytes()).contains("64 levels deep"));
    }

    #[test]
    fn over_long_lines_are_refused() {
        let mut line = b"{\"text\":\"".to_vec();
        line.resize(MAX_LINE_BYTES + 10, b'a');
        assert!(
            rows("a.jsonl", &line)
                .unwrap_err()
                .contains("a.jsonl:1: the row is longer than 16 MiB")
        );
    }

    #[test]
    fn formats_without_plain_text_and_directories_are_refused() {
        assert!(rows("a.csv", b"a,b").unwrap_err().contains(".csv files is not read"));
        let dir = tempfile::tempdir().unwrap();
        let error = TextPieces::open(&[dir.path().into()]).unwrap_err().to_string();
        assert!(error.contains("is a directory"), "{error}");
        let error = TextPieces::open(&[dir.path().join("no.txt")]).unwrap_err();
        assert!(error.to_string().contains("no.txt does not exist"), "{error}");
        assert_eq!(error.kind(), crate::ErrorKind::BadInput);
    }
}

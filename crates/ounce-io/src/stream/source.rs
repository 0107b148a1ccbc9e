//! One source of a stream: what is read from it, and where that begins.

use std::collections::VecDeque;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::dataset::source::RowPlace;
use crate::dataset::{RawRow, RowFormat, RowOptions, RowReader};
use crate::error::IoError;
use crate::row_tokens::RowCounts;
use crate::text::{PieceStart, TextPieces, TextPlace, share};

/// Where a source is read on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SourcePlace {
    /// Passes over the source that are complete.
    pub(super) pass: u64,
    pub(super) at: At,
    /// Samples of the row, or ids of the text from there on, that went into the windows before.
    pub(super) skip: u64,
}

/// A row, or a piece of text or its row.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum At {
    Row(RowPlace),
    Text(TextPlace),
}

impl SourcePlace {
    /// The start of a source of rows, or of text.
    pub(super) fn start(is_row: bool) -> Self {
        let at = if is_row { At::Row(RowPlace::default()) } else { At::Text(TextPlace::default()) };
        Self { pass: 0, at, skip: 0 }
    }

    pub(super) fn is_row(&self) -> bool {
        matches!(self.at, At::Row(_))
    }

    /// Whether the numbers are such as `n_files` files have.
    pub(super) fn is_possible(&self, n_files: usize) -> bool {
        let (file, place) = match self.at {
            At::Row(place) => (0, place),
            At::Text(place) => (place.file, place.at),
        };
        file < n_files && [place.at, place.lines, self.skip].iter().all(|&n| n < 1 << 56)
    }
}

/// What is read at once.
pub(super) enum Unit {
    Row {
        row: Result<RawRow, IoError>,
        before: RowPlace,
        after: RowPlace,
    },
    Piece {
        text: String,
        start: PieceStart,
        line: u64,
        /// Of the files of the source.
        file: usize,
        /// Where the piece or its row begins.
        place: TextPlace,
        /// Broken rows that were passed over since the source was opened.
        n_bad: u64,
    },
    /// The same of a text.
    EndOfPass {
        n_bad: Option<u64>,
    },
}

impl Unit {
    /// Bytes that it holds, as far as they are known.
    pub(super) fn n_bytes(&self) -> usize {
        match self {
            Self::Row { row, .. } => row.as_ref().map_or(0, |row| row.n_bytes),
            Self::Piece { text, .. } => text.len(),
            Self::EndOfPass { .. } => 0,
        }
    }
}

#[derive(Debug)]
enum Reader {
    Rows(RowReader),
    Text(Box<TextPieces>),
}

/// What the rows of a source are.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub(super) files: Vec<PathBuf>,
    /// How rows are read; of text nothing is known.
    pub(super) format: Option<RowFormat>,
}

/// A source that is being read.
#[derive(Debug)]
pub(super) struct Source {
    files: Vec<PathBuf>,
    weight: f64,
    reader: Reader,
    /// Passes that were read.
    pass: u64,
    first_pass: u64,
    /// Broken rows of the passes of a text that were read.
    n_bad: u64,
    /// Behind what went into windows.
    pub(super) place: SourcePlace,
    pub(super) blocks: Blocks,
    pub(super) counts: RowCounts,
}

impl Source {
    /// Opens the source at `place`.
    pub(super) fn open(
        files: Vec<PathBuf>,
        weight: f64,
        options: &RowOptions,
        place: &SourcePlace,
    ) -> Result<Self, IoError> {
        Ok(Self {
            reader: Reader::open(&files, options, place.at)?,
            files,
            weight,
            pass: place.pass,
            first_pass: place.pass,
            n_bad: 0,
            place: place.clone(),
            blocks: Blocks::new(place.skip),
            counts: RowCounts::default(),
        })
    }

    /// Passes that were read, the current one in part, divided by the weight.
    pub(super) fn time(&self) -> f64 {
        // Without a weight it is never its turn, and the epoch does not wait for it.
        if self.weight == 0.0 {
            return f64::INFINITY;
        }
        let within = match &self.reader {
            Reader::Rows(rows) => share(rows.place().at, rows.end()),
            Reader::Text(pieces) => pieces.progress(),
        };
        (self.pass as f64 + within) / self.weight
    }

    /// Whether all of it was read since it was opened.
    pub(super) fn went_round(&self) -> bool {
        self.weight == 0.0 || self.pass >= self.first_pass + 2
    }

    /// Reads on.
    pub(super) fn next(&mut self, options: &RowOptions) -> Result<Unit, IoError> {
        let unit = match &mut self.reader {
            Reader::Rows(rows) => {
                let before = rows.place();
                let row = rows.next_row()?;
                row.map(|row| Unit::Row { row, before, after: rows.place() })
            }
            Reader::Text(pieces) => {
                let piece = pieces.next_piece()?;
                let piece = piece.map(|piece| (piece.text.to_owned(), piece.start, piece.line));
                piece.map(|(text, start, line)| {
                    let (file, place) = (pieces.file_index(), pieces.place());
                    let n_bad = self.n_bad + pieces.n_bad();
                    Unit::Piece { text, start, line, file, place, n_bad }
                })
            }
        };
        if let Some(unit) = unit {
            return Ok(unit);
        }
        let n_bad = match &self.reader {
            Reader::Rows(_) => None,
            Reader::Text(pieces) => {
                self.n_bad += pieces.n_bad();
                Some(self.n_bad)
            }
        };
        self.pass += 1;
        let start = SourcePlace::start(self.place.is_row());
        self.reader = Reader::open(&self.files, options, start.at)?;
        Ok(Unit::EndOfPass { n_bad })
    }

    /// A pass is over: what is left of its text is in no block.
    pub(super) fn end_pass(&mut self, n_bad: Option<u64>) {
        self.counts.n_bad = n_bad.unwrap_or(self.counts.n_bad);
        let start = SourcePlace::start(self.place.is_row());
        self.place = SourcePlace { pass: self.place.pass + 1, ..start };
        self.blocks = Blocks { pass_ids: self.blocks.ids_seen, ..Blocks::new(0) };
    }

    /// Where the next window reads on.
    pub(super) fn next_place(&self) -> SourcePlace {
        match self.blocks.place() {
            Some((at, skip)) => SourcePlace { pass: self.place.pass, at: At::Text(at), skip },
            None => self.place.clone(),
        }
    }
}

impl Reader {
    fn open(files: &[PathBuf], options: &RowOptions, at: At) -> Result<Self, IoError> {
        Ok(match at {
            At::Row(place) => Self::Rows(RowReader::open_at(&files[0], place, options.row_bytes)?),
            At::Text(place) => Self::Text(Box::new(TextPieces::open_at(files, options, place)?)),
        })
    }
}

/// Ids on their way into blocks, and where they came from.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    /// Ids that are in no block yet.
    pending: Vec<u32>,
    /// Where ids come from: a place and the ids from there to the next.
    marks: VecDeque<(TextPlace, u64)>,
    /// Ids from the first mark on that are in a block.
    n_done: u64,
    /// Ids still to come that are in a block of a window before.
    to_skip: u64,
    /// Ids of this pass, and of the one before.
    ids_seen: u64,
    pub(super) pass_ids: u64,
}

impl Blocks {
    /// `skip` ids of what comes next are in blocks already.
    fn new(skip: u64) -> Self {
        Self { n_done: skip, to_skip: skip, ..Self::default() }
    }

    /// Adds the ids of a piece that begins, or whose row begins, at `place`.
    pub(super) fn push(&mut self, place: TextPlace, ids: &[u32]) {
        match self.marks.back_mut() {
            Some((last, n)) if *last == place => *n += ids.len() as u64,
            _ => self.marks.push_back((place, ids.len() as u64)),
        }
        self.ids_seen += ids.len() as u64;
        let n_skipped = (ids.len() as u64).min(self.to_skip);
        self.to_skip -= n_skipped;
        self.pending.extend(&ids[n_skipped as usize..]);
        self.drop_marks();
    }

    /// The next block, if it is complete.
    pub(super) fn take(&mut self, max_length: usize) -> Option<Vec<u32>> {
        if self.pending.len() < max_length {
            return None;
        }
        let block = self.pending.drain(..max_length).collect();
        self.n_done += max_length as u64;
        self.drop_marks();
        Some(block)
    }

    /// Forgets places all of whose ids are in blocks. The last stays: more of its row may come.
    fn drop_marks(&mut self) {
        while self.marks.len() > 1 && self.marks[0].1 <= self.n_done {
            self.n_done -= self.marks[0].1;
            self.marks.pop_front();
        }
    }

    /// Where the first id that is in no block comes from, and how many of the ids from there on are in blocks.
    fn place(&self) -> Option<(TextPlace, u64)> {
        self.marks.front().map(|&(place, _)| (place, self.n_done))
    }
}

//! The largest row that the pages of one column unfold to, found without unfolding it.
//!
//! Idea: a list may hold one long text of a dictionary, or nothing, a billion times in a few bytes of a page, and the
//! library assembles a row as a whole before anybody can look at it. So where a page claims more values than its bytes
//! would hold one by one (`pages.rs` says which pages those are), levels, indices and lengths are walked, run by run,
//! and what each row takes is added up. Pages that hold their values one by one are passed over: their rows are no
//! longer than they.
//!
//! Complexity: time by runs and by values that are packed in bits; memory for one page and the lengths of the
//! dictionary's entries.
//! Source: the Parquet format's descriptions of data pages, levels, and the hybrid of runs and packed bits.

use ::parquet::basic::{Encoding, Type};
use ::parquet::column::page::{Page, PageReader};
use ::parquet::errors::ParquetError;
use ::parquet::schema::types::ColumnDescriptor;

use super::pages::{COPIES, PageKind};

/// What a value takes beside its text, as the library's and as ours, the structure and the names around it included.
pub(super) const VALUE_BYTES: u64 = 400;
/// Largest row, with its copies.
const MAX_ROW_BYTES: u64 = 256 << 20;
/// What fixed values are counted as: none is longer but those of a length of their own.
const FIXED_BYTES: u64 = 8;

/// Bytes that the largest row of this column takes while it is read, beyond what the pages themselves take, of which
/// `kinds` says what they are.
pub(super) fn largest_row(
    pages: &mut dyn PageReader,
    column: &ColumnDescriptor,
    kinds: &[PageKind],
) -> Result<u64, String> {
    // Without lists a row has one value, which is a part of its page or of a dictionary.
    let is_flat = column.max_rep_level() == 0;
    if is_flat && kinds.first() != Some(&PageKind::Dictionary) {
        return Ok(0);
    }
    let library = |e: ParquetError| e.to_string();
    let mut rows = Rows::default();
    let mut entries = Vec::new();
    for &kind in kinds {
        if kind == PageKind::Dense {
            pages.skip_next_page().map_err(library)?;
            rows.end();
            continue;
        }
        match pages.get_next_page().map_err(library)?.ok_or("a page is missing")? {
            Page::DictionaryPage { buf, num_values, .. } => {
                entries = lengths(&buf, num_values, column)?;
                if is_flat {
                    let longest = entries.iter().copied().max().unwrap_or(0);
                    return Ok(COPIES * u64::from(longest));
                }
            }
            page => Walk::new(&page, column, &entries)?.add_to(&mut rows)?,
        }
    }
    rows.end();
    Ok(rows.largest_bytes)
}

/// The lengths of a dictionary's entries.
fn lengths(bytes: &[u8], n: u32, column: &ColumnDescriptor) -> Result<Vec<u32>, String> {
    let mut values = Values::plain(bytes, column);
    (0..n).map(|_| values.next_length().map(|length| length as u32)).collect()
}

/// Sizes of rows, as their values come.
#[derive(Default)]
struct Rows {
    current_bytes: u64,
    largest_bytes: u64,
}

impl Rows {
    fn end(&mut self) {
        self.largest_bytes = self.largest_bytes.max(self.current_bytes);
        self.current_bytes = 0;
    }

    fn add(&mut self, bytes: u64) -> Result<(), String> {
        self.current_bytes = self.current_bytes.saturating_add(bytes);
        if self.current_bytes > MAX_ROW_BYTES {
            let mib = MAX_ROW_BYTES >> 20;
            return Err(format!("a row unfolds to more than {mib} MiB"));
        }
        Ok(())
    }
}

/// The levels and values of one page.
struct Walk<'a> {
    n_values: u64,
    repetition: Runs<'a>,
    definition: Runs<'a>,
    /// The level at which there is a value.
    present: u32,
    values: Values<'a>,
    entries: &'a [u32],
}

impl<'a> Walk<'a> {
    fn new(page: &'a Page, column: &ColumnDescriptor, entries: &'a [u32]) -> Result<Self, String> {
        let (max_repetition, max_definition) = (column.max_rep_level(), column.max_def_level());
        let (n_values, encoding, repetition, definition, values) = match page {
            Page::DataPage {
                buf,
                num_values,
                encoding,
                def_level_encoding,
                rep_level_encoding,
                ..
            } => {
                let of = |rest, max, encoding| prefixed(rest, max, encoding);
                let (repetition, rest) = of(&buf[..], max_repetition, *rep_level_encoding)?;
                let (definition, rest) = of(rest, max_definition, *def_level_encoding)?;
                (*num_values, *encoding, repetition, definition, rest)
            }
            Page::DataPageV2 {
                buf,
                num_values,
                encoding,
                def_levels_byte_len,
                rep_levels_byte_len,
                ..
            } => {
                let cut = |bytes: &'a [u8], n: u32| bytes.split_at_checked(n as usize).ok_or(SHORT);
                let (repetition, rest) = cut(buf, *rep_levels_byte_len)?;
                let (definition, rest) = cut(rest, *def_levels_byte_len)?;
                (*num_values, *encoding, repetition, definition, rest)
            }
            Page::DictionaryPage { .. } => return Err("a second dictionary".into()),
        };
        let values = match encoding {
            Encoding::RLE_DICTIONARY | Encoding::PLAIN_DICTIONARY => Values::indices(values),
            Encoding::PLAIN => Values::plain(values, column),
            _ => Values::Fixed(FIXED_BYTES.max(column.type_length().max(0) as u64)),
        };
        Ok(Self {
            n_values: n_values.into(),
            repetition: Runs::new(repetition, width(max_repetition)),
            definition: Runs::new(definition, width(max_definition)),
            present: max_definition as u32,
            values,
            entries,
        })
    }

    fn add_to(mut self, rows: &mut Rows) -> Result<(), String> {
        while self.n_values > 0 {
            let (repetition, n_alike) = self.repetition.peek()?;
            let (definition, n_defined) = self.definition.peek()?;
            let mut n = self.n_values.min(n_alike).min(n_defined);
            let mut bytes = VALUE_BYTES;
            if definition == self.present {
                let (length, n_equal) = self.values.peek(self.entries)?;
                n = n.min(n_equal);
                bytes += COPIES * length;
                self.values.pass(n);
            }
            if repetition == 0 {
                rows.end();
                rows.add(bytes)?;
            } else {
                rows.add(bytes.saturating_mul(n))?;
            }
            self.repetition.pass(n);
            self.definition.pass(n);
            self.n_values -= n;
        }
        Ok(())
    }
}

const SHORT: &str = "a page is shorter than its levels";

/// Levels behind their length, if there are any, and what follows them.
fn prefixed(bytes: &[u8], max_level: i16, encoding: Encoding) -> Result<(&[u8], &[u8]), String> {
    if max_level == 0 {
        return Ok((&[], bytes));
    }
    if encoding != Encoding::RLE {
        return Err(format!("levels encoded as {encoding} are not read"));
    }
    let (n, rest) = bytes.split_first_chunk::<4>().ok_or(SHORT)?;
    Ok(rest.split_at_checked(u32::from_le_bytes(*n) as usize).ok_or(SHORT)?)
}

/// Bits of a level that is at most `max`.
fn width(max: i16) -> u32 {
    i16::BITS - max.max(0).leading_zeros()
}

/// The values of a page, as far as their lengths go.
enum Values<'a> {
    /// Entries of the dictionary.
    Indices(Runs<'a>),
    /// Texts, each behind its length.
    Texts(&'a [u8]),
    /// All of one length.
    Fixed(u64),
}

impl<'a> Values<'a> {
    fn plain(bytes: &'a [u8], column: &ColumnDescriptor) -> Self {
        match column.physical_type() {
            Type::BYTE_ARRAY => Self::Texts(bytes),
            Type::FIXED_LEN_BYTE_ARRAY => Self::Fixed(column.type_length().max(0) as u64),
            _ => Self::Fixed(FIXED_BYTES),
        }
    }

    fn indices(bytes: &'a [u8]) -> Self {
        let (&width, rest) = bytes.split_first().unwrap_or((&0, &[]));
        Self::Indices(Runs::new(rest, width.into()))
    }

    /// The length of the next value, and how many from there on are of the same run.
    fn peek(&self, entries: &[u32]) -> Result<(u64, u64), String> {
        match self {
            Self::Indices(runs) => {
                let (index, n) = runs.peek()?;
                let length = entries.get(index as usize);
                let length = *length.ok_or("a value beyond the end of the dictionary")?;
                Ok((length.into(), n))
            }
            Self::Texts(bytes) => {
                let (length, rest) = bytes.split_first_chunk().ok_or(CUT)?;
                let length = u64::from(u32::from_le_bytes(*length));
                if length > rest.len() as u64 { Err(CUT.into()) } else { Ok((length, 1)) }
            }
            Self::Fixed(bytes) => Ok((*bytes, u64::MAX)),
        }
    }

    fn next_length(&mut self) -> Result<u64, String> {
        let (length, _) = self.peek(&[])?;
        self.pass(1);
        Ok(length)
    }

    /// Goes on by `n` of the run that was peeked at.
    fn pass(&mut self, n: u64) {
        match self {
            Self::Indices(runs) => runs.pass(n),
            Self::Texts(bytes) => {
                if let Some((length, rest)) = bytes.split_first_chunk() {
                    *bytes = rest.get(u32::from_le_bytes(*length) as usize..).unwrap_or(&[]);
                }
            }
            Self::Fixed(_) => {}
        }
    }
}

const CUT: &str = "a text is cut off";

/// Numbers in the hybrid of runs and packed bits.
struct Runs<'a> {
    /// Behind the current run.
    bytes: &'a [u8],
    width: u32,
    run: Run<'a>,
}

enum Run<'a> {
    /// One number, so many times.
    Repeated { value: u32, n: u64 },
    /// So many numbers, packed, the next of them from bit `at` on.
    Packed { bits: &'a [u8], at: usize, n: u64 },
    /// The bytes are at an end, or no numbers.
    Broken,
}

impl<'a> Runs<'a> {
    fn new(bytes: &'a [u8], width: u32) -> Self {
        let mut runs = Self { bytes, width, run: Run::Repeated { value: 0, n: u64::MAX } };
        if width > 0 {
            runs.advance();
        }
        runs
    }

    /// The next number and how many times it comes, at least.
    fn peek(&self) -> Result<(u32, u64), String> {
        match self.run {
            Run::Repeated { value, n } => Ok((value, n)),
            Run::Packed { bits, at, .. } => Ok((unpack(bits, at, self.width), 1)),
            Run::Broken => Err("a page ends before its values do".into()),
        }
    }

    /// Goes on by at most as many as were peeked at.
    fn pass(&mut self, by: u64) {
        match &mut self.run {
            Run::Repeated { n, .. } => *n -= by,
            Run::Packed { at, n, .. } => {
                *at += self.width as usize;
                *n -= by;
            }
            Run::Broken => {}
        }
        if matches!(self.run, Run::Repeated { n: 0, .. } | Run::Packed { n: 0, .. }) {
            self.advance();
        }
    }

    fn advance(&mut self) {
        self.run = self.next_run().unwrap_or(Run::Broken);
    }

    /// The next run that is not empty.
    fn next_run(&mut self) -> Option<Run<'a>> {
        if self.width > u32::BITS {
            return None;
        }
        loop {
            let header = self.varint()?;
            let n = header >> 1;
            if n == 0 {
                continue;
            }
            if header & 1 == 0 {
                let (bytes, rest) = self.bytes.split_at_checked(self.width.div_ceil(8) as usize)?;
                self.bytes = rest;
                let value = bytes.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte));
                return Some(Run::Repeated { value, n });
            }
            // Groups of eight; writers leave away bytes that the last group does not need.
            let n_bytes = usize::try_from(n).ok()?.checked_mul(self.width as usize)?;
            let (bits, rest) = self.bytes.split_at(n_bytes.min(self.bytes.len()));
            self.bytes = rest;
            let n = (8 * bits.len() as u64 / u64::from(self.width)).min(8 * n);
            return (n > 0).then_some(Run::Packed { bits, at: 0, n });
        }
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.bytes.split_first()?;
            self.bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
}

/// `width` bits from bit `at` on, the lowest first.
fn unpack(bits: &[u8], at: usize, width: u32) -> u32 {
    let first = at / 8;
    let bytes = bits[first..].iter().take(8).enumerate();
    let word = bytes.fold(0, |word, (i, &byte)| word | u64::from(byte) << (8 * i));
    ((word >> (at % 8)) & ((1 << width) - 1)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8], width: u32, n: usize) -> Vec<u32> {
        let mut runs = Runs::new(bytes, width);
        (0..n)
            .map(|_| {
                let (value, _) = runs.peek().expect("a number");
                runs.pass(1);
                value
            })
            .collect()
    }

    #[test]
    fn packed_bits_and_runs_are_read_as_the_format_describes_them() {
        // The example of the format: 0 to 7 in three bits each.
        let packed = [0b11, 0b1000_1000, 0b1100_0110, 0b1111_1010];
        assert_eq!(all(&packed, 3, 8), [0, 1, 2, 3, 4, 5, 6, 7]);
        let run_and_packed = [10, 4, 0b11, 0b1000_1000, 0b1100_0110, 0b1111_1010];
        assert_eq!(all(&run_and_packed, 3, 8), [4, 4, 4, 4, 4, 0, 1, 2]);
        assert_eq!(all(&[4, 0x34, 0x12], 13, 2), [0x1234, 0x1234]);
        assert_eq!(all(&[], 0, 3), [0, 0, 0], "what has no bits is zero");
    }

    #[test]
    fn a_run_is_passed_at_once() {
        let mut runs = Runs::new(&[0xfe, 0xff, 0xff, 0xff, 0x0f, 1], 1);
        assert_eq!(runs.peek(), Ok((1, (1 << 31) - 1)));
        let (_, n) = runs.peek().expect("a run");
        runs.pass(n);
        assert!(runs.peek().is_err());
    }

    #[test]
    fn widths_are_those_of_the_largest_level() {
        assert_eq!([0, 1, 2, 3, 4].map(width), [0, 1, 2, 2, 3]);
    }
}

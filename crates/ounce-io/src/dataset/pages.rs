//! The sizes that a Parquet file's pages claim, checked before anything is decompressed.
//!
//! Idea: a reader allocates what a page's header says that it unpacks to, so one header of twenty bytes can ask for
//! 2 GiB. Here every header of every column chunk is read, in Thrift's compact encoding, and refused where the page
//! would be larger than [`MAX_PAGE_BYTES`], than what a packed page of its length may become, or than its chunk, where
//! a dictionary claims more entries than it has bytes, and where texts are encoded in a way that says only inside the
//! page how many they are. What is accepted tells how much memory reading the chunk takes.
//!
//! Complexity: one small read per page; nothing of the data itself is touched.
//! Source: the Parquet format's `parquet.thrift` (PageHeader) and Thrift's compact protocol.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::row_sizes::VALUE_BYTES;

/// Largest page that is unpacked. Writers aim at 1 MiB, but some put a thousand rows into one however long they are.
const MAX_PAGE_BYTES: i64 = 512 << 20;
/// A page above this size must be packed to more than a hundredth, which texts are: otherwise it is a bomb.
const SMALL_PAGE_BYTES: u64 = 64 << 20;
const MAX_RATIO: u64 = 100;
/// Longest header that is read; statistics with long strings are in it.
const MAX_HEADER_BYTES: usize = 1 << 20;
/// Bytes of a header that are read at first.
const FIRST_READ_BYTES: usize = 256;
/// Deepest nesting of structures in a header.
const MAX_DEPTH: u32 = 8;
/// What a reader keeps for an entry of a dictionary.
const ENTRY_BYTES: u64 = 40;
/// A page unpacked, the one before it as far as a row reaches back, and the row that is made of them, as the library's,
/// as ours, as messages and as text.
pub(super) const COPIES: u64 = 6;
/// What a reader of a column takes beside pages and values.
const READER_BYTES: u64 = 32 << 10;
/// Encodings as indices of the dictionary's entries.
const BY_DICTIONARY: [i64; 2] = [2, 8];
/// Encodings of lengths, and of lengths and common starts, as differences.
const DELTA_TEXT: [i64; 2] = [6, 7];

/// Pages of a chunk that hold at most so many packed bytes for an unpacked one are ordinary texts.
const ORDINARY_RATIO: u64 = 20;

/// What the pages of a column chunk claim.
pub(super) struct ChunkClaims {
    /// Bytes of memory that it takes to read them one after the other.
    pub(super) memory_bytes: u64,
    pub(super) pages: Vec<PageKind>,
}

/// How the values of a page lie on it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PageKind {
    /// Entries of a dictionary.
    Dictionary,
    /// So that a row may be larger than the page: repeated, as indices, or packed a lot.
    Folded,
    /// One by one.
    Dense,
}

/// Checks the pages in `start..start + n_bytes` of a file, which must claim `n_claimed` values together; says what is
/// wrong with them.
pub(super) fn check_chunk(
    file: &File,
    start: u64,
    n_bytes: u64,
    n_claimed: i64,
) -> Result<ChunkClaims, String> {
    let file_bytes = file.metadata().map_err(|e| e.to_string())?.len();
    let end = start.checked_add(n_bytes).filter(|&end| end <= file_bytes);
    let end = end.ok_or("a column reaches beyond the end of the file")?;
    let mut at = start;
    let mut buffer = Vec::new();
    let (mut dictionary_bytes, mut page_bytes, mut n_found) = (0, 0, 0_u64);
    let mut pages = Vec::new();
    while at < end {
        let (header_bytes, page) = read_header(file, at, end, &mut buffer)?;
        if !(0..=MAX_PAGE_BYTES).contains(&page.unpacked_bytes) {
            return Err(format!(
                "a page claims to unpack to {} bytes, over the limit of {MAX_PAGE_BYTES}",
                page.unpacked_bytes
            ));
        }
        let packed = u64::try_from(page.packed_bytes).map_err(|_| "a page has a negative size")?;
        let (unpacked, n_values) = (page.unpacked_bytes as u64, page.n_values.max(0) as u64);
        if unpacked > SMALL_PAGE_BYTES && unpacked / MAX_RATIO > packed {
            return Err(format!("a page of {packed} bytes claims to unpack to {unpacked} bytes"));
        }
        if DELTA_TEXT.contains(&page.encoding) {
            return Err("texts encoded as differences are not read".into());
        }
        if page.is_dictionary {
            if n_values > unpacked {
                return Err(format!("a dictionary claims {n_values} entries in {unpacked} bytes"));
            }
            dictionary_bytes += unpacked + ENTRY_BYTES * n_values;
            pages.push(PageKind::Dictionary);
        } else if !page.is_index {
            page_bytes = page_bytes.max(COPIES * unpacked);
            n_found = n_found.saturating_add(n_values);
            let is_dense = n_values.saturating_mul(VALUE_BYTES) <= COPIES * unpacked
                && !BY_DICTIONARY.contains(&page.encoding)
                && unpacked <= ORDINARY_RATIO * packed;
            pages.push(if is_dense { PageKind::Dense } else { PageKind::Folded });
        }
        page_bytes = page_bytes.max(packed + unpacked);
        at = (at + header_bytes as u64)
            .checked_add(packed)
            .filter(|&next| next <= end)
            .ok_or("a page reaches beyond its column")?;
    }
    if u64::try_from(n_claimed) != Ok(n_found) {
        return Err(format!("the footer says {n_claimed} values, the pages {n_found}"));
    }
    Ok(ChunkClaims { memory_bytes: READER_BYTES + dictionary_bytes + page_bytes, pages })
}

/// The header at `at` and its length, read in parts that grow until it is whole.
fn read_header(
    file: &File,
    at: u64,
    end: u64,
    buffer: &mut Vec<u8>,
) -> Result<(usize, PageClaims), String> {
    let mut n = FIRST_READ_BYTES;
    loop {
        let n_there = n.min((end - at) as usize);
        buffer.resize(n_there, 0);
        file.read_exact_at(buffer, at).map_err(|e| e.to_string())?;
        let mut input = Compact { bytes: buffer, at: 0 };
        if let Some(page) = page_header(&mut input) {
            return Ok((input.at, page));
        }
        if n_there < n || n >= MAX_HEADER_BYTES {
            return Err("a page has a broken header".into());
        }
        n *= 4;
    }
}

/// What a page's header says.
#[derive(Default)]
struct PageClaims {
    /// A page that readers pass over.
    is_index: bool,
    is_dictionary: bool,
    unpacked_bytes: i64,
    packed_bytes: i64,
    n_values: i64,
    encoding: i64,
}

const I32: u8 = 5;
const STRUCT: u8 = 12;
/// Fields of a header that are structures: of a data page, of a dictionary, and of a data page of the second version.
const DATA: i64 = 5;
const DICTIONARY: i64 = 7;
const DATA_2: i64 = 8;

fn page_header(input: &mut Compact<'_>) -> Option<PageClaims> {
    let mut page = PageClaims { unpacked_bytes: -1, packed_bytes: -1, ..PageClaims::default() };
    let mut id = 0;
    while let Some(kind) = input.field(&mut id)? {
        match (id, kind) {
            (1, I32) => page.is_index = input.number()? == 1,
            (2, I32) => page.unpacked_bytes = input.number()?,
            (3, I32) => page.packed_bytes = input.number()?,
            (DATA | DICTIONARY | DATA_2, STRUCT) => {
                page.is_dictionary |= id == DICTIONARY;
                values_header(input, if id == DATA_2 { 4 } else { 2 }, &mut page)?;
            }
            _ => input.skip(kind, 0)?,
        }
    }
    Some(page)
}

/// How many values a page claims, and how they are encoded, which is its field `encoding_id`.
fn values_header(input: &mut Compact<'_>, encoding_id: i64, page: &mut PageClaims) -> Option<()> {
    let mut id = 0;
    while let Some(kind) = input.field(&mut id)? {
        match (id, kind) {
            (1, I32) => page.n_values = input.number()?,
            (id, I32) if id == encoding_id => page.encoding = input.number()?,
            _ => input.skip(kind, 1)?,
        }
    }
    Some(())
}

/// Thrift's compact encoding, as far as skipping goes.
struct Compact<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Compact<'_> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    /// A number in zigzag form.
    fn number(&mut self) -> Option<i64> {
        let n = self.varint()?;
        Some((n >> 1) as i64 ^ -((n & 1) as i64))
    }

    /// The type of the next field of a structure, whose number goes to `id`; `Some(None)` at its end.
    #[expect(clippy::option_option, reason = "broken, ended, or a field")]
    fn field(&mut self, id: &mut i64) -> Option<Option<u8>> {
        let byte = self.byte()?;
        if byte == 0 {
            return Some(None);
        }
        *id = match byte >> 4 {
            0 => self.number()?,
            delta => *id + i64::from(delta),
        };
        Some(Some(byte & 0x0f))
    }

    fn skip(&mut self, kind: u8, depth: u32) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        match kind {
            1 | 2 => {}
            3 => self.at += 1,
            4..=6 => {
                self.varint()?;
            }
            7 => self.at += 8,
            8 => {
                let n = usize::try_from(self.varint()?).ok()?;
                self.at = self.at.checked_add(n)?;
            }
            9 | 10 => {
                let byte = self.byte()?;
                let n = if byte >> 4 == 15 { self.varint()? } else { u64::from(byte >> 4) };
                for _ in 0..n {
                    // In lists a truth value takes a byte of its own.
                    if matches!(byte & 0x0f, 1 | 2) {
                        self.byte()?;
                    } else {
                        self.skip(byte & 0x0f, depth + 1)?;
                    }
                    if self.at >= self.bytes.len() {
                        return None;
                    }
                }
            }
            12 => {
                let mut id = 0;
                while let Some(kind) = self.field(&mut id)? {
                    self.skip(kind, depth + 1)?;
                }
            }
            _ => return None,
        }
        (self.at <= self.bytes.len()).then_some(())
    }
}

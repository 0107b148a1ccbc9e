//! The sizes that a Parquet file's pages claim, checked before anything is decompressed.
//!
//! Idea: a reader allocates what a page's header says that it unpacks to, so one header of twenty bytes can ask for
//! 2 GiB. Here every header of every column chunk is read (`thrift.rs`), and refused where the page
//! would be larger than [`MAX_PAGE_BYTES`], than what a packed page of its length may become, or than its chunk, where
//! a dictionary claims more entries than it has bytes, and where texts are encoded in a way that says only inside the
//! page how many they are. What is accepted tells how much memory reading the chunk takes.
//!
//! Complexity: one small read per page; nothing of the data itself is touched.
//! Source: the Parquet format's `parquet.thrift` (PageHeader).

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::row_sizes::VALUE_BYTES;
use super::thrift::Shape::{Bool, I32, Struct};
use super::thrift::{Compact, Field, Seen};

/// Largest page that is unpacked. Writers aim at 1 MiB, but some put a thousand rows into one however long they are.
const MAX_PAGE_BYTES: i64 = 512 << 20;
/// A page above this size must be packed to more than a hundredth, which texts are: otherwise it is a bomb.
const SMALL_PAGE_BYTES: u64 = 64 << 20;
const MAX_RATIO: u64 = 100;
/// Longest header that is read; statistics with long strings are in it.
const MAX_HEADER_BYTES: usize = 1 << 20;
/// Bytes of a header that are read at first.
const FIRST_READ_BYTES: usize = 256;
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
        let mut input = Compact::new(buffer);
        if let Some(page) = page_header(&mut input) {
            return Ok((input.n_read(), page));
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

const HEADER: [Field; 8] = [
    Field(1, "type", I32),
    Field(2, "uncompressed_page_size", I32),
    Field(3, "compressed_page_size", I32),
    Field(4, "crc", I32),
    Field(5, DATA, Struct(&DATA_PAGE)),
    Field(6, INDEX, Struct(&[])),
    Field(7, DICTIONARY, Struct(&DICTIONARY_PAGE)),
    Field(8, DATA_V2, Struct(&DATA_PAGE_V2)),
];
const DATA: &str = "data_page_header";
const INDEX: &str = "index_page_header";
const DICTIONARY: &str = "dictionary_page_header";
const DATA_V2: &str = "data_page_header_v2";
/// The header that goes with each type of page.
const TYPES: [&str; 4] = [DATA, INDEX, DICTIONARY, DATA_V2];
const DATA_PAGE: [Field; 4] = [
    Field(1, "num_values", I32),
    Field(2, "encoding", I32),
    Field(3, "definition_level_encoding", I32),
    Field(4, "repetition_level_encoding", I32),
];
const DICTIONARY_PAGE: [Field; 3] =
    [Field(1, "num_values", I32), Field(2, "encoding", I32), Field(3, "is_sorted", Bool)];
const DATA_PAGE_V2: [Field; 7] = [
    Field(1, "num_values", I32),
    Field(2, "num_nulls", I32),
    Field(3, "num_rows", I32),
    Field(4, "encoding", I32),
    Field(5, "definition_levels_byte_length", I32),
    Field(6, "repetition_levels_byte_length", I32),
    Field(7, "is_compressed", Bool),
];

/// Reads a header, which must be of its type and no other.
fn page_header(input: &mut Compact<'_>) -> Option<PageClaims> {
    let mut page = PageClaims { unpacked_bytes: -1, packed_bytes: -1, ..PageClaims::default() };
    let (mut page_type, mut headers) = (-1, Vec::new());
    input.structure(&HEADER, &mut |name, seen| match (name, seen) {
        ("type", Seen::Number(n)) => page_type = n,
        ("uncompressed_page_size", Seen::Number(n)) => page.unpacked_bytes = n,
        ("compressed_page_size", Seen::Number(n)) => page.packed_bytes = n,
        ("num_values", Seen::Number(n)) => page.n_values = n,
        ("encoding", Seen::Number(n)) => page.encoding = n,
        (name, Seen::Begin) => headers.push(name),
        _ => {}
    })?;
    let expected = *TYPES.get(usize::try_from(page_type).ok()?)?;
    (page.is_index, page.is_dictionary) = (expected == INDEX, expected == DICTIONARY);
    // Writers leave out the empty header of an index.
    (headers == [expected] || page.is_index && headers.is_empty()).then_some(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of type `page_type` whose fields from 5 on are `rest`.
    fn header(page_type: u8, rest: &[u8]) -> Option<PageClaims> {
        let bytes = [&[0x15, 2 * page_type, 0x15, 80, 0x15, 40][..], rest, &[0]].concat();
        page_header(&mut Compact::new(&bytes))
    }

    #[test]
    fn a_page_has_the_header_of_its_type_and_no_other() {
        // 7 values, encoding 3; one as a list; a dictionary of 5 entries.
        let (data, list) = ([0x2c, 0x15, 14, 0x15, 6, 0], [0x29, 0x15, 14]);
        let dictionary = [0x4c, 0x15, 10, 0x15, 4, 0];
        let both = [&data[..], &[0x2c], &dictionary[1..]].concat();
        let page = header(0, &data).unwrap_or_default();
        assert_eq!((page.unpacked_bytes, page.packed_bytes, page.n_values), (40, 20, 7));
        assert!(!page.is_dictionary && !page.is_index && page.encoding == 3);
        assert!(
            header(2, &dictionary).is_some_and(|page| page.is_dictionary && page.n_values == 5)
        );
        assert!(header(1, &[]).is_some_and(|page| page.is_index));
        for (page_type, rest) in [
            (0, &[][..]),
            (0, &both),
            (0, &list),
            (0, &dictionary),
            (1, &data),
            (2, &data),
            (3, &data),
            (4, &data),
        ] {
            assert!(header(page_type, rest).is_none(), "{page_type}: {rest:?}");
        }
    }
}

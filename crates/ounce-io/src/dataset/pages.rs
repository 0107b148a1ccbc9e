//! The sizes that a Parquet file's pages claim, checked before anything is decompressed.
//!
//! Idea: a reader allocates what a page's header says that it unpacks to, so one header of twenty bytes can ask for
//! 2 GiB. Here every header of every column chunk is read, in Thrift's compact encoding, and refused where the page
//! would be larger than [`MAX_PAGE_BYTES`] or than its chunk.
//!
//! Complexity: one small read per page; nothing of the data itself is touched.
//! Source: the Parquet format's `parquet.thrift` (PageHeader) and Thrift's compact protocol.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Largest page that is unpacked; writers aim at 1 MiB.
pub(super) const MAX_PAGE_BYTES: i64 = 64 << 20;
/// Longest header that is read; statistics with long strings are in it.
const MAX_HEADER_BYTES: usize = 1 << 20;
/// Bytes of a header that are read at first.
const FIRST_READ_BYTES: usize = 256;
/// Deepest nesting of structures in a header.
const MAX_DEPTH: u32 = 8;

/// Checks the pages in `start..start + n_bytes` of a file; what is wrong with them, if anything is.
pub(super) fn check_chunk(file: &File, start: u64, n_bytes: u64) -> Result<(), String> {
    let file_bytes = file.metadata().map_err(|e| e.to_string())?.len();
    let end = start.checked_add(n_bytes).filter(|&end| end <= file_bytes);
    let end = end.ok_or("a column reaches beyond the end of the file")?;
    let mut at = start;
    let mut buffer = Vec::new();
    while at < end {
        let (header_bytes, page) = read_header(file, at, end, &mut buffer)?;
        if !(0..=MAX_PAGE_BYTES).contains(&page.unpacked_bytes) {
            return Err(format!(
                "a page claims to unpack to {} bytes, over the limit of {MAX_PAGE_BYTES}",
                page.unpacked_bytes
            ));
        }
        let packed = u64::try_from(page.packed_bytes).map_err(|_| "a page has a negative size")?;
        at = (at + header_bytes as u64)
            .checked_add(packed)
            .filter(|&next| next <= end)
            .ok_or("a page reaches beyond its column")?;
    }
    Ok(())
}

/// The header at `at` and its length, read in parts that grow until it is whole.
fn read_header(
    file: &File,
    at: u64,
    end: u64,
    buffer: &mut Vec<u8>,
) -> Result<(usize, PageSizes), String> {
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

/// What a page's header says of its size.
struct PageSizes {
    unpacked_bytes: i64,
    packed_bytes: i64,
}

fn page_header(input: &mut Compact<'_>) -> Option<PageSizes> {
    let mut page = PageSizes { unpacked_bytes: -1, packed_bytes: -1 };
    let mut id = 0;
    while let Some(kind) = input.field(&mut id)? {
        match (id, kind) {
            (2, I32) => page.unpacked_bytes = input.number()?,
            (3, I32) => page.packed_bytes = input.number()?,
            _ => input.skip(kind, 0)?,
        }
    }
    Some(page)
}

const I32: u8 = 5;

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

//! Rows of a Parquet file, nested lists and structures included, one at a time.
//!
//! Idea: the `parquet` crate assembles records from pages; around it stand a check of what the footer claims before the
//! crate sees it (`footer.rs`), one of what the pages of a row group claim before any of them is read (`pages.rs`), one
//! of what their rows unfold to (`row_sizes.rs`), a count of the rows against what the footer says, and a guard, since
//! the crate panics on some broken files. Compression: none, snappy, zstd.
//!
//! Memory: the footer, and per column its dictionary, a page or two and the largest row ([`memory_of`]). The crate
//! reads ahead a batch of rows of each column, whose pages stay; so a batch is one row. Complexity: to go on from a row
//! takes reading its row group up to there.
//!
//! Files in reading order: this one, `thrift.rs` (the encoding of what a file says about itself), `footer.rs`,
//! `pages.rs`, `row_sizes.rs`.

mod footer;
mod pages;
mod row_sizes;
mod thrift;

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use ::parquet::basic::Compression;
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use ::parquet::record::reader::{ReaderIter, TreeBuilder};
use ::parquet::record::{Field, Row};
use serde_json::{Map, Number, Value};

use super::{Place, RawRow};
use crate::error::IoError;
use crate::hash::{SourceHash, hash_file};
use crate::json::open_regular;

const HINT: &str = "write the file again, for instance with pyarrow or `datasets`";
/// Longest footer that is read.
const MAX_FOOTER_BYTES: u64 = 64 << 20;
/// Values, nulls among them, that a file may claim to hold: so many, and so many more for each of its bytes. Runs of
/// equal values take no room, but each takes time.
const FREE_VALUES: u64 = 1 << 24;
const VALUES_PER_BYTE: u64 = 1024;

/// The rows of one file.
pub(super) struct ParquetRows {
    path: PathBuf,
    reader: SerializedFileReader<File>,
    /// Rows of the current row group.
    rows: Option<ReaderIter>,
    next_group: usize,
    n_read: u64,
    n_claimed: u64,
}

impl std::fmt::Debug for ParquetRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ParquetRows")
            .field("path", &self.path)
            .field("n_read", &self.n_read)
            .finish_non_exhaustive()
    }
}

impl ParquetRows {
    /// Opens a file, checks what it says about itself, and goes to row `at` (from 0).
    ///
    /// # Errors
    /// `Missing`, `Read`, `BadFile`.
    pub(super) fn open_at(path: &Path, at: u64) -> Result<Self, IoError> {
        let file = open_regular(path)?;
        let (reader, claims) = check(file).map_err(|reason| unreadable(path, &reason))?;
        let n_claimed = claims.n_rows;
        let mut rows =
            Self { path: path.into(), reader, rows: None, next_group: 0, n_read: 0, n_claimed };
        for group in rows.reader.metadata().row_groups() {
            let n_rows = group.num_rows() as u64;
            if rows.n_read + n_rows > at {
                break;
            }
            rows.n_read += n_rows;
            rows.next_group += 1;
        }
        if rows.next_group < rows.reader.num_row_groups() {
            rows.rows = Some(rows.open_group()?);
            rows.next_group += 1;
        }
        while rows.n_read < at && rows.next_row()?.is_some() {}
        Ok(rows)
    }

    /// Rows read, or passed over, so far.
    pub(super) fn n_read(&self) -> u64 {
        self.n_read
    }

    /// Rows that the file claims to hold.
    pub(super) fn n_claimed(&self) -> u64 {
        self.n_claimed
    }

    /// The next row.
    ///
    /// # Errors
    /// `BadFile`, naming the row; nothing can be read behind it.
    pub(super) fn next_row(&mut self) -> Result<Option<RawRow>, IoError> {
        let number = self.n_read + 1;
        let bad = |path: &Path, reason: String| IoError::bad_file(path, reason, HINT);
        loop {
            if let Some(rows) = &mut self.rows {
                let row = guard(|| rows.next().transpose())
                    .map_err(|reason| bad(&self.path, format!("row {number}: {reason}")))?;
                if let Some(row) = row {
                    self.n_read = number;
                    let (value, place) = (object(&row), Place::Row(number));
                    let n_bytes = super::memory_of(&value);
                    return Ok(Some(RawRow { value, place, n_bytes }));
                }
                self.rows = None;
            }
            if self.next_group < self.reader.num_row_groups() {
                self.rows = Some(self.open_group()?);
                self.next_group += 1;
            } else if self.n_read == self.n_claimed {
                return Ok(None);
            } else {
                let (n, found) = (self.n_claimed, self.n_read);
                let reason = format!("the footer says {n} rows, the columns hold {found}");
                return Err(bad(&self.path, reason));
            }
        }
    }

    /// The rows of the next row group.
    fn open_group(&self) -> Result<ReaderIter, IoError> {
        let Self { reader, next_group, .. } = self;
        let metadata = reader.metadata();
        let number = self.n_read + 1;
        guard(|| {
            let schema = metadata.file_metadata().schema_descr_ptr();
            let group = reader.get_row_group(*next_group)?;
            TreeBuilder::new().with_batch_size(1).as_iter(schema, &*group)
        })
        .map_err(|reason| IoError::bad_file(&self.path, format!("row {number}: {reason}"), HINT))
    }

    pub(super) fn fingerprint(&self) -> Result<SourceHash, IoError> {
        let (n_bytes, hash) = hash_file(&self.path)?;
        Ok(SourceHash { n_bytes, hash })
    }
}

/// Most bytes that reading the rows of a file takes; what is wrong with the file, if anything is.
pub(super) fn memory_of(path: &Path) -> Result<u64, String> {
    let file = open_regular(path).map_err(|e| e.to_string())?;
    check(file).map(|(_, claims)| claims.memory_bytes)
}

/// What a file says about itself, as far as it was found possible.
struct Claims {
    n_rows: u64,
    /// That reading takes.
    memory_bytes: u64,
}

/// Opens a file and checks its footer and its pages.
fn check(file: File) -> Result<(SerializedFileReader<File>, Claims), String> {
    let n_bytes = file.metadata().map_err(|e| e.to_string())?.len();
    let footer_bytes = footer::check_footer(&read_footer(&file, n_bytes)?)?;
    let for_pages = file.try_clone().map_err(|e| e.to_string())?;
    let reader = guard(|| SerializedFileReader::new(file))?;
    check_values(&reader, n_bytes)?;
    let mut claims = guard_plain(|| check_chunks(&reader, &for_pages))?;
    claims.memory_bytes += footer_bytes;
    Ok((reader, claims))
}

/// The footer of a file of `n_bytes`, whose length is checked before it is believed.
fn read_footer(file: &File, n_bytes: u64) -> Result<Vec<u8>, String> {
    use std::os::unix::fs::FileExt;
    if n_bytes < 12 {
        return Err(format!("{n_bytes} bytes are too few"));
    }
    let mut tail = [0; 8];
    file.read_exact_at(&mut tail, n_bytes - 8).map_err(|e| e.to_string())?;
    let (length, magic) = tail.split_first_chunk::<4>().expect("eight bytes");
    let length = u64::from(u32::from_le_bytes(*length));
    if magic != b"PAR1" {
        return Err("it does not end in `PAR1`".into());
    }
    if length > (n_bytes - 12).min(MAX_FOOTER_BYTES) {
        return Err(format!("the footer claims {length} bytes of {n_bytes}"));
    }
    let mut footer = vec![0; length as usize];
    file.read_exact_at(&mut footer, n_bytes - 8 - length).map_err(|e| e.to_string())?;
    Ok(footer)
}

/// Checks that going through all rows takes a time that the file's length bounds.
fn check_values(reader: &SerializedFileReader<File>, n_bytes: u64) -> Result<(), String> {
    let groups = reader.metadata().row_groups().iter();
    let n_values = groups.fold(0_u64, |n, group| {
        let columns = group.columns().iter().map(|column| column.num_values().max(0) as u64);
        columns.fold(n.saturating_add(group.num_rows().max(0) as u64), u64::saturating_add)
    });
    if n_values > n_bytes.saturating_mul(VALUES_PER_BYTE).saturating_add(FREE_VALUES) {
        return Err(format!("it claims {n_values} values in {n_bytes} bytes"));
    }
    Ok(())
}

/// The error for a file that is broken as a whole.
fn unreadable(path: &Path, reason: &str) -> IoError {
    IoError::bad_file(path, format!("not a Parquet file that can be read: {reason}"), HINT)
}

/// Checks every page of every column, and the number of rows that the row groups claim.
fn check_chunks(reader: &SerializedFileReader<File>, file: &File) -> Result<Claims, String> {
    let mut n_rows = 0_u64;
    // A group is begun while the one before is still there.
    let (mut before_bytes, mut memory_bytes) = (0_u64, 0_u64);
    for (group_index, group) in reader.metadata().row_groups().iter().enumerate() {
        let n = u64::try_from(group.num_rows())
            .map_err(|_| "a row group has a negative count of rows")?;
        n_rows = n_rows.checked_add(n).ok_or("the row groups claim too many rows")?;
        let mut group_bytes = 0_u64;
        let group_reader = reader.get_row_group(group_index).map_err(|e| e.to_string())?;
        for column in 0..group.num_columns() {
            let bytes = check_column(&*group_reader, column, file)?;
            group_bytes = group_bytes.saturating_add(bytes);
        }
        memory_bytes = memory_bytes.max(before_bytes.saturating_add(group_bytes));
        before_bytes = group_bytes;
    }
    let said = reader.metadata().file_metadata().num_rows();
    if u64::try_from(said) != Ok(n_rows) {
        return Err(format!("the footer says {said} rows, its row groups {n_rows}"));
    }
    Ok(Claims { n_rows, memory_bytes })
}

/// Checks the pages of one column of a row group; bytes of memory that reading it takes.
fn check_column(group: &dyn RowGroupReader, i: usize, file: &File) -> Result<u64, String> {
    let column = group.metadata().column(i);
    let compression = column.compression();
    if !matches!(
        compression,
        Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_)
    ) {
        return Err(format!("compression {compression} is not read; snappy and zstd are"));
    }
    let (start, n_bytes) = column.byte_range();
    let in_column = |reason| format!("column `{}`: {reason}", column.column_path().string());
    let n_values = column.num_values();
    let chunk = pages::check_chunk(file, start, n_bytes, n_values).map_err(in_column)?;
    // Of lists a row may have any number.
    let n_rows = group.metadata().num_rows();
    if column.column_descr().max_rep_level() == 0 && n_values != n_rows {
        return Err(in_column(format!("{n_values} values in {n_rows} rows")));
    }
    let mut pages = group.get_column_page_reader(i).map_err(|e| e.to_string())?;
    let row_bytes = row_sizes::largest_row(&mut *pages, column.column_descr(), &chunk.pages)
        .map_err(in_column)?;
    Ok(chunk.memory_bytes.saturating_add(row_bytes))
}

/// Runs the library, whose panics on broken files are the files' fault.
fn guard<T>(read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    guard_plain(|| read().map_err(|e| e.to_string()))
}

fn guard_plain<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(result) => result,
        Err(_) => Err("its structure is broken".into()),
    }
}

fn object(row: &Row) -> Value {
    let fields = row.get_column_iter().map(|(name, field)| (name.clone(), value(field)));
    Value::Object(fields.collect::<Map<_, _>>())
}

/// A field as JSON. Bytes that are no text and numbers that JSON does not have become null.
fn value(field: &Field) -> Value {
    let float = |x: f64| Number::from_f64(x).map_or(Value::Null, Value::Number);
    match field {
        Field::Null => Value::Null,
        Field::Bool(x) => (*x).into(),
        Field::Byte(x) => (*x).into(),
        Field::Short(x) => (*x).into(),
        Field::Int(x) | Field::Date(x) | Field::TimeMillis(x) => (*x).into(),
        Field::Long(x)
        | Field::TimeMicros(x)
        | Field::TimestampMillis(x)
        | Field::TimestampMicros(x) => (*x).into(),
        Field::UByte(x) => (*x).into(),
        Field::UShort(x) => (*x).into(),
        Field::UInt(x) => (*x).into(),
        Field::ULong(x) => (*x).into(),
        Field::Float16(x) => float(f64::from(*x)),
        Field::Float(x) => float(f64::from(*x)),
        Field::Double(x) => float(*x),
        Field::Decimal(_) => field.to_string().into(),
        Field::Str(text) => text.as_str().into(),
        Field::Bytes(bytes) => bytes.as_utf8().map_or(Value::Null, Value::from),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let entry = |(key, content): &(Field, Field)| {
                let name = value(key).as_str().map_or_else(|| key.to_string(), str::to_owned);
                (name, value(content))
            };
            Value::Object(map.entries().iter().map(entry).collect())
        }
    }
}

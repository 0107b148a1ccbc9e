//! What data files say about themselves: memory that is declared and kept to, claims that are not true, and lines
//! without end.

#![cfg(feature = "parquet")]
#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use ounce_io::dataset::{RowReader, data_bytes};
use ounce_io::{ErrorKind, IoError, TextPieces};
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::metadata::{
    ParquetMetaData, ParquetMetaDataReader, ParquetMetaDataWriter, RowGroupMetaData,
};
use parquet::file::properties::{
    EnabledStatistics, WriterProperties, WriterPropertiesBuilder, WriterVersion,
};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// One test at a time, so that the bytes counted are its own.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// How a file is written.
#[derive(Clone, Copy)]
struct Layout {
    compression: Compression,
    /// Encoding of texts without a dictionary; with one where there is none.
    plain: Option<Encoding>,
    page_bytes: usize,
    rows_per_group: usize,
}

const SMALL: Layout = Layout {
    compression: Compression::UNCOMPRESSED,
    plain: Some(Encoding::PLAIN),
    page_bytes: 1 << 20,
    rows_per_group: 40,
};

/// What both kinds of files are written with.
fn properties(layout: Layout) -> WriterPropertiesBuilder {
    WriterProperties::builder()
        .set_compression(layout.compression)
        .set_dictionary_enabled(layout.plain.is_none())
        .set_encoding(layout.plain.unwrap_or(Encoding::PLAIN))
        .set_data_page_size_limit(layout.page_bytes)
        .set_dictionary_page_size_limit(layout.page_bytes)
}

/// Writes `n_rows` texts of `text_bytes` each to `path`.
fn write_texts(path: &Path, n_rows: usize, text_bytes: usize, layout: Layout) {
    let schema =
        Arc::new(parse_message_type("message m { required binary text (UTF8); }").unwrap());
    let properties = properties(layout).set_write_batch_size(1).build();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    let numbers: Vec<usize> = (0..n_rows).collect();
    for group in numbers.chunks(layout.rows_per_group) {
        let mut rows = writer.next_row_group().unwrap();
        let mut column = rows.next_column().unwrap().unwrap();
        for &i in group {
            let mut text = format!("{i} ").repeat(text_bytes / 2);
            text.truncate(text_bytes);
            let values = [ByteArray::from(text.into_bytes())];
            column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        }
        column.close().unwrap();
        rows.close().unwrap();
    }
    writer.close().unwrap();
}

/// Reads all rows; how many there are.
fn count_rows(path: &Path) -> Result<usize, IoError> {
    let (mut rows, mut n) = (RowReader::open(path)?, 0);
    while let Some(row) = rows.next_row()? {
        row?;
        n += 1;
    }
    Ok(n)
}

#[test]
fn reading_takes_no_more_memory_than_the_file_declares() {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("texts.parquet");
    let zstd = Compression::ZSTD(ZstdLevel::default());
    let (plain, no) = (Some(Encoding::PLAIN), Compression::UNCOMPRESSED);
    // Compression, encoding, bytes of a page, rows, bytes of a text.
    for (compression, plain, page_bytes, n_rows, text_bytes) in [
        (no, plain, 1 << 20, 400, 40_000),
        (Compression::SNAPPY, plain, 8 << 20, 400, 40_000),
        (zstd, plain, 16 << 20, 400, 40_000),
        (zstd, plain, 1 << 20, 12, 1_500_000),
        (zstd, None, 4 << 20, 3000, 1_000),
        (zstd, plain, 1 << 20, 20_000, 50),
    ] {
        let layout = Layout { compression, plain, page_bytes, rows_per_group: n_rows / 2 };
        write_texts(&path, n_rows, text_bytes, layout);
        let declared = data_bytes([path.as_path()]) as usize;
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        assert_eq!(count_rows(&path).unwrap(), n_rows);
        let taken = ALLOCATOR.peak_usage() - before;
        let what = format!("{n_rows} rows of {text_bytes} in pages of {page_bytes}");
        assert!(taken <= declared, "{what}: {taken} bytes, declared {declared}");
        // A bound that says nothing would hold, too.
        assert!(declared <= 20 * page_bytes.max(text_bytes), "{what}: declared {declared}");
    }
}

/// Rows of `message m { list<optional text> }`: how often each holds which text, `None` for null.
/// Groups of one row are written in pages of the second version.
fn write_lists(path: &Path, rows: &[&[(usize, Option<&str>)]], layout: Layout) {
    let list =
        "required group texts (LIST) { repeated group list { optional binary element (UTF8); } }";
    let schema = Arc::new(parse_message_type(&format!("message m {{ {list} }}")).unwrap());
    let version = if layout.rows_per_group == 1 {
        WriterVersion::PARQUET_2_0
    } else {
        WriterVersion::PARQUET_1_0
    };
    let properties = properties(layout)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_writer_version(version)
        .build();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    for group in rows.chunks(layout.rows_per_group) {
        let mut out = writer.next_row_group().unwrap();
        let mut column = out.next_column().unwrap().unwrap();
        let (mut values, mut definition, mut repetition) = (vec![], vec![], vec![]);
        for row in group {
            let first = repetition.len();
            for &(n, text) in *row {
                definition.resize(definition.len() + n, if text.is_some() { 2 } else { 1 });
                repetition.resize(repetition.len() + n, 1);
                let text = text.map(|text| ByteArray::from(text.as_bytes().to_vec()));
                values.extend(text.into_iter().flat_map(|text| vec![text; n]));
            }
            repetition[first] = 0;
        }
        let writer = column.typed::<ByteArrayType>();
        writer.write_batch(&values, Some(&definition), Some(&repetition)).unwrap();
        column.close().unwrap();
        out.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn lists_that_repeat_a_text_are_declared_or_refused() {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lists.parquet");
    let zstd = Compression::ZSTD(ZstdLevel::default());
    let by_dictionary = Layout { compression: zstd, plain: None, ..SMALL };
    let (long, role, other) = ("abcdefgh".repeat(10_000), Some("user"), Some("assistant"));
    let long = Some(long.as_str());
    let chat: &[(usize, Option<&str>)] = &[(1, role), (1, other), (1, role), (1, other)];
    let many = vec![chat; 5000];
    let folded: &[(usize, Option<&str>)] = &[(300, long)];
    let nulls: &[(usize, Option<&str>)] = &[(100_000, None)];
    let single: &[(usize, Option<&str>)] = &[(1, long)];
    // What, the rows, and the most that may be declared.
    let accepted: [(&str, Vec<&[_]>, usize); 4] = [
        ("roles", many, 1 << 20),
        ("a text 300 times", vec![chat, folded, chat], 200 << 20),
        ("nulls", vec![nulls, chat], 60 << 20),
        ("single texts", vec![single; 300], 3 << 20),
    ];
    for (what, rows, most) in accepted {
        for (rows_per_group, plain) in [(1, None), (5000, None), (5000, Some(Encoding::PLAIN))] {
            // Plain pages hold every text, so that there the page is what counts.
            let most = if plain.is_some() { 400 << 20 } else { most };
            let rows = if rows_per_group == 1 { &rows[..rows.len().min(20)] } else { &rows[..] };
            write_lists(&path, rows, Layout { plain, rows_per_group, ..by_dictionary });
            let declared = data_bytes([path.as_path()]) as usize;
            let before = ALLOCATOR.current_usage();
            ALLOCATOR.reset_peak_usage();
            assert_eq!(count_rows(&path).unwrap(), rows.len(), "{what}");
            let taken = ALLOCATOR.peak_usage() - before;
            assert!(taken <= declared, "{what}: {taken} bytes, declared {declared}");
            assert!(declared <= most, "{what}: {declared} bytes declared");
        }
    }
    let bomb: &[(usize, Option<&str>)] = &[(500_000, long)];
    let nothing: &[(usize, Option<&str>)] = &[(1_000_000, None)];
    for rows_per_group in [1, 2] {
        for rows in [[chat, bomb], [chat, nothing]] {
            write_lists(&path, &rows, Layout { rows_per_group, ..by_dictionary });
            assert!(std::fs::metadata(&path).unwrap().len() < 50_000, "the file is small");
            let before = ALLOCATOR.current_usage();
            ALLOCATOR.reset_peak_usage();
            let error = count_rows(&path).unwrap_err();
            let taken = ALLOCATOR.peak_usage() - before;
            assert_eq!(error.kind(), ErrorKind::BadInput);
            let message = error.to_string();
            let what = "column `texts.list.element`: a row unfolds to more than 256 MiB";
            assert!(message.contains("lists.parquet: ") && message.contains(what), "{message}");
            assert!(taken <= 2 << 20, "{taken} bytes");
        }
    }
}

/// A small file with another footer, changed by `change`.
fn with_footer(path: &Path, change: impl Fn(ParquetMetaData) -> ParquetMetaData) {
    write_texts(path, 100, 30, SMALL);
    let file = std::fs::File::open(path).unwrap();
    let metadata = ParquetMetaDataReader::new().parse_and_finish(&file).unwrap();
    let bytes = std::fs::read(path).unwrap();
    let footer_bytes = u32::from_le_bytes(bytes[bytes.len() - 8..][..4].try_into().unwrap());
    let mut changed = bytes[..bytes.len() - 8 - footer_bytes as usize].to_vec();
    ParquetMetaDataWriter::new(&mut changed, &change(metadata)).finish().unwrap();
    std::fs::File::create(path).unwrap().write_all(&changed).unwrap();
}

/// The footer with one more or fewer rows in the first group, or another claim about its column.
fn with_group(
    metadata: ParquetMetaData,
    change: impl Fn(RowGroupMetaData) -> RowGroupMetaData,
) -> ParquetMetaData {
    let mut groups = metadata.row_groups().to_vec();
    groups[0] = change(groups[0].clone());
    metadata.into_builder().set_row_groups(groups).build()
}

#[test]
fn a_footer_that_lies_is_refused_by_name() {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lies.parquet");
    let rows = |n: i64| {
        move |g: RowGroupMetaData| {
            let n_rows = g.num_rows() + n;
            g.into_builder().set_num_rows(n_rows).build().unwrap()
        }
    };
    let column = |what: &'static str, n: i64| {
        move |g: RowGroupMetaData| {
            let old = g.columns()[0].clone();
            let (size, at) = (old.compressed_size() + n, old.data_page_offset() + n);
            let n_values = old.num_values() + n;
            let new = old.into_builder();
            let new = match what {
                "values" => new.set_num_values(n_values),
                "size" => new.set_total_compressed_size(size),
                _ => new.set_data_page_offset(at),
            };
            let columns = vec![new.build().unwrap()];
            g.into_builder().set_column_metadata(columns).build().unwrap()
        }
    };
    with_footer(&path, |m| m);
    assert_eq!(count_rows(&path).unwrap(), 100);
    let refused = |what: &str| {
        let error = count_rows(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadInput, "{what}");
        let message = error.to_string();
        assert!(message.contains("lies.parquet: ") && message.contains("\nhint: "), "{message}");
        message
    };
    for n in [1, -1, 1 << 40, -1000] {
        with_footer(&path, |m| with_group(m, rows(n)));
        let of_rows = refused(&format!("{n} rows more"));
        with_footer(&path, |m| with_group(m, column("values", n)));
        let of_values = refused(&format!("{n} values more"));
        for message in [of_rows, of_values] {
            assert_eq!(message.contains("it claims 10995116"), n > 1 << 30, "{message}");
        }
        with_footer(&path, |m| with_group(m, column("size", n)));
        refused(&format!("{n} bytes longer"));
        with_footer(&path, |m| with_group(m, column("offset", n)));
        refused(&format!("{n} bytes later"));
    }
    write_texts(&path, 100, 30, Layout { plain: Some(Encoding::DELTA_BYTE_ARRAY), ..SMALL });
    assert!(refused("delta").contains("texts encoded as differences are not read"));
}

/// Thrift's encoding of a number below 2^63.
fn number(n: u64) -> Vec<u8> {
    varint(n << 1)
}

fn varint(mut n: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while n >= 0x80 {
        bytes.push(n as u8 | 0x80);
        n >>= 7;
    }
    bytes.push(n as u8);
    bytes
}

/// An element of a schema: a group of so many children, or a column of texts.
fn element(name: &str, n_children: u64) -> Vec<u8> {
    let kind = if n_children > 0 { &[0x35, 0][..] } else { &[0x15, 12, 0x25, 0] };
    let name = [&[0x18][..], &varint(name.len() as u64), name.as_bytes()].concat();
    let children = [&[0x15][..], &number(n_children)].concat();
    let children = if n_children > 0 { children } else { Vec::new() };
    [kind, &name, &children, &[0]].concat()
}

/// Elements in the order of a walk that visits parents before their children.
type Schema = Vec<Vec<u8>>;

/// A file of nothing but a footer: a schema, no rows, and `more` at its end.
fn write_footer(path: &Path, schema: &[Vec<u8>], more: &[u8]) {
    let n = varint(schema.len() as u64);
    let start = [&[0x15, 2, 0x19, 0xfc][..], &n].concat();
    let footer = [&start, &schema.concat()[..], &[0x16, 0, 0x19, 0x0c], more, &[0]].concat();
    let length = (footer.len() as u32).to_le_bytes();
    std::fs::write(path, [b"PAR1", &footer[..], &length, b"PAR1"].concat()).unwrap();
}

#[test]
fn a_footer_can_make_the_library_neither_allocate_nor_loop_nor_overflow_the_stack() {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("footer.parquet");
    let chain = |depth: usize| {
        let mut schema = vec![element("g", 1); depth];
        schema.push(element("text", 0));
        schema
    };
    let wide = |name: &str, n: u64| {
        let columns = (0..n).map(|i| element(&i.to_string(), 0));
        [element("root", 1), element(name, n)].into_iter().chain(columns).collect::<Schema>()
    };
    for (n_rows, schema) in [(0, chain(64)), (0, wide("group", 3000)), (2000, vec![])] {
        write_footer(&path, &schema, &[]);
        if n_rows > 0 {
            write_texts(&path, n_rows, 10, Layout { rows_per_group: 1, ..SMALL });
        }
        let declared = data_bytes([path.as_path()]) as usize;
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        assert_eq!(count_rows(&path).unwrap(), n_rows);
        let taken = ALLOCATOR.peak_usage() - before;
        assert!(taken <= declared, "{n_rows} rows: {taken} bytes, declared {declared}");
    }
    let truths = [&[0x99, 0xf1][..], &varint(i32::MAX as u64)].concat();
    let lists = [&[0x99, 0xf9][..], &varint(100), &truths[1..].repeat(100)].concat();
    let (two, nothing): (Schema, &[u8]) = (chain(1), &[]);
    let cases: [(&str, Schema, &[u8]); 8] = [
        ("its schema lacks 2147483647 elements", vec![element("root", i32::MAX as u64)], nothing),
        (
            "its schema lacks 1 elements",
            vec![element("root", 3), two[1].clone(), two[1].clone()],
            nothing,
        ),
        ("its schema has more than one root", [two.clone(), two.clone()].concat(), nothing),
        ("its schema is nested deeper than 64", chain(65), nothing),
        ("its schema is nested deeper than 64", chain(200_000), nothing),
        ("its footer would take", wide(&"x".repeat(1 << 20), 1000), nothing),
        ("its footer is broken", two.clone(), &truths),
        ("its footer is broken", two.clone(), &lists),
    ];
    for (what, schema, more) in cases {
        write_footer(&path, &schema, more);
        let n_bytes = std::fs::metadata(&path).unwrap().len() as usize;
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let error = count_rows(&path).unwrap_err();
        let taken = ALLOCATOR.peak_usage() - before;
        assert_eq!(error.kind(), ErrorKind::BadInput);
        let message = error.to_string();
        assert!(message.contains("footer.parquet: ") && message.contains(what), "{message}");
        assert!(taken <= 2 * n_bytes + 10_000, "{what}: {taken} bytes");
    }
}

#[test]
fn no_byte_of_the_headers_can_make_reading_take_more_memory_than_a_page_may() {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let print = std::panic::take_hook();
    // The library reports malformed files by panics, which are caught and need not be printed.
    std::panic::set_hook(Box::new(|_| {}));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.parquet");
    let zstd = Compression::ZSTD(ZstdLevel::default());
    let mut worst = (0, String::new());
    for layout in [SMALL, Layout { plain: None, compression: zstd, ..SMALL }] {
        write_texts(&path, 20, 12, Layout { rows_per_group: 20, ..layout });
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            for byte in [0, 0x7f, 0x80, 0xff, whole[at] ^ 1, whole[at] ^ 0x40, whole[at] ^ 0x80] {
                let mut bytes = whole.clone();
                bytes[at] = byte;
                std::fs::write(&path, &bytes).unwrap();
                let before = ALLOCATOR.current_usage();
                ALLOCATOR.reset_peak_usage();
                let read = count_rows(&path);
                let taken = ALLOCATOR.peak_usage() - before;
                if taken > worst.0 {
                    worst = (taken, format!("byte {at} as {byte}: {taken} bytes, {read:?}"));
                }
                if let Err(error) = read {
                    assert!(error.to_string().contains("small.parquet: "), "{error}");
                }
            }
        }
    }
    std::panic::set_hook(print);
    assert!(worst.0 <= 256 << 20, "{}", worst.1);
}

#[test]
fn a_line_of_a_gib_is_passed_over_in_bounded_memory() {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    for name in ["rows.jsonl", "text.txt"] {
        // A hole: the file takes no room on the disk.
        let path = dir.path().join(name);
        let mut file = std::fs::File::create(&path).unwrap();
        file.write_all(b"{\"text\": \"").unwrap();
        file.set_len(1 << 30).unwrap();
        let mut file = std::fs::File::options().append(true).open(&path).unwrap();
        file.write_all(b"\n{\"text\": \"b\"}\n").unwrap();
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let error = if name == "text.txt" {
            let mut pieces = TextPieces::open(std::slice::from_ref(&path)).unwrap();
            pieces.next_piece().unwrap_err().to_string()
        } else {
            let mut rows = RowReader::open(&path).unwrap();
            let error = rows.next_row().unwrap().unwrap().unwrap_err().to_string();
            // It is one broken row: the next one is read.
            assert_eq!(rows.next_row().unwrap().unwrap().unwrap().value["text"], "b");
            assert!(rows.next_row().unwrap().is_none());
            error
        };
        let taken = ALLOCATOR.peak_usage() - before;
        let what = if name == "text.txt" { "holds a NUL" } else { "the row is longer than 16 MiB" };
        assert!(error.contains(&format!("{name}:1: {what}")), "{error}");
        assert!(taken <= 50 << 20, "{name}: {taken} bytes");
    }
}

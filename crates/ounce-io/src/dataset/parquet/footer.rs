//! What a Parquet file's footer claims, checked before the library reads it.
//!
//! Idea: the footer is walked by the format's grammar (`thrift.rs`), which makes sure that every entry of a list is
//! there; what remains is what the library makes out of little: a schema in which an element claims two billion
//! children, or whose nesting overflows the stack of whoever goes through it, and columns whose paths repeat long names
//! of what they lie in.
//!
//! Memory: per entry of a list what the library keeps for it, and every column's path. Complexity: linear in the bytes.
//! Source: the Parquet format's `parquet.thrift` (FileMetaData).

use super::thrift::Shape::{Bool, Byte, Bytes, Double, I16, I32, I64, List, Struct};
use super::thrift::{Compact, Field, Seen};

/// What a footer takes in memory, in its own lengths.
const FOOTER_SHARE: u64 = 8;
/// What the library keeps for an element of the schema, a row group, a column of one, or a key, beside their texts; for
/// other entries it keeps no more than their bytes in the footer's share.
const ENTRY_BYTES: u64 = 640;
/// Largest footer in memory.
const MAX_BYTES: u64 = 512 << 20;
/// Deepest nesting of a schema: functions that go through it call themselves.
const MAX_NESTING: usize = 64;

const FILE: [Field; 7] = [
    Field(1, "version", I32),
    Field(2, "schema", List(&Struct(&SCHEMA_ELEMENT))),
    Field(3, "num_rows", I64),
    Field(4, "row_groups", List(&Struct(&ROW_GROUP))),
    Field(5, "key_value_metadata", List(&Struct(&KEY_VALUE))),
    Field(6, "created_by", Bytes),
    Field(7, "column_orders", List(&Struct(&COLUMN_ORDER))),
];
const SCHEMA_ELEMENT: [Field; 10] = [
    Field(1, "type", I32),
    Field(2, "type_length", I32),
    Field(3, "repetition_type", I32),
    Field(4, "name", Bytes),
    Field(5, "num_children", I32),
    Field(6, "converted_type", I32),
    Field(7, "scale", I32),
    Field(8, "precision", I32),
    Field(9, "field_id", I32),
    Field(10, "logicalType", Struct(&LOGICAL_TYPE)),
];
const LOGICAL_TYPE: [Field; 17] = [
    Field(1, "STRING", Struct(&[])),
    Field(2, "MAP", Struct(&[])),
    Field(3, "LIST", Struct(&[])),
    Field(4, "ENUM", Struct(&[])),
    Field(5, "DECIMAL", Struct(&[Field(1, "scale", I32), Field(2, "precision", I32)])),
    Field(6, "DATE", Struct(&[])),
    Field(7, "TIME", Struct(&TIME)),
    Field(8, "TIMESTAMP", Struct(&TIME)),
    Field(10, "INTEGER", Struct(&[Field(1, "bitWidth", Byte), Field(2, "isSigned", Bool)])),
    Field(11, "UNKNOWN", Struct(&[])),
    Field(12, "JSON", Struct(&[])),
    Field(13, "BSON", Struct(&[])),
    Field(14, "UUID", Struct(&[])),
    Field(15, "FLOAT16", Struct(&[])),
    Field(16, "VARIANT", Struct(&[Field(1, "specification_version", Byte)])),
    Field(17, "GEOMETRY", Struct(&[Field(1, "crs", Bytes)])),
    Field(18, "GEOGRAPHY", Struct(&[Field(1, "crs", Bytes), Field(2, "algorithm", I32)])),
];
const TIME: [Field; 2] = [Field(1, "isAdjustedToUTC", Bool), Field(2, "unit", Struct(&TIME_UNIT))];
const TIME_UNIT: [Field; 3] = [
    Field(1, "MILLIS", Struct(&[])),
    Field(2, "MICROS", Struct(&[])),
    Field(3, "NANOS", Struct(&[])),
];
const KEY_VALUE: [Field; 2] = [Field(1, "key", Bytes), Field(2, "value", Bytes)];
const COLUMN_ORDER: [Field; 3] = [
    Field(1, "TYPE_ORDER", Struct(&[])),
    Field(2, "IEEE_754_TOTAL_ORDER", Struct(&[])),
    Field(3, "INT96_TIMESTAMP_ORDER", Struct(&[])),
];
const ROW_GROUP: [Field; 7] = [
    Field(1, "columns", List(&Struct(&COLUMN_CHUNK))),
    Field(2, "total_byte_size", I64),
    Field(3, "num_rows", I64),
    Field(4, "sorting_columns", List(&Struct(&SORTING_COLUMN))),
    Field(5, "file_offset", I64),
    Field(6, "total_compressed_size", I64),
    Field(7, "ordinal", I16),
];
const SORTING_COLUMN: [Field; 3] =
    [Field(1, "column_idx", I32), Field(2, "descending", Bool), Field(3, "nulls_first", Bool)];
const COLUMN_CHUNK: [Field; 7] = [
    Field(1, "file_path", Bytes),
    Field(2, "file_offset", I64),
    Field(3, "meta_data", Struct(&COLUMN_META_DATA)),
    Field(4, "offset_index_offset", I64),
    Field(5, "offset_index_length", I32),
    Field(6, "column_index_offset", I64),
    Field(7, "column_index_length", I32),
];
const COLUMN_META_DATA: [Field; 17] = [
    Field(1, "type", I32),
    Field(2, "encodings", List(&I32)),
    Field(3, "path_in_schema", List(&Bytes)),
    Field(4, "codec", I32),
    Field(5, "num_values", I64),
    Field(6, "total_uncompressed_size", I64),
    Field(7, "total_compressed_size", I64),
    Field(8, "key_value_metadata", List(&Struct(&KEY_VALUE))),
    Field(9, "data_page_offset", I64),
    Field(10, "index_page_offset", I64),
    Field(11, "dictionary_page_offset", I64),
    Field(12, "statistics", Struct(&STATISTICS)),
    Field(13, "encoding_stats", List(&Struct(&PAGE_ENCODING_STATS))),
    Field(14, "bloom_filter_offset", I64),
    Field(15, "bloom_filter_length", I32),
    Field(16, "size_statistics", Struct(&SIZE_STATISTICS)),
    Field(17, "geospatial_statistics", Struct(&GEOSPATIAL_STATISTICS)),
];
const PAGE_ENCODING_STATS: [Field; 3] =
    [Field(1, "page_type", I32), Field(2, "encoding", I32), Field(3, "count", I32)];
const STATISTICS: [Field; 9] = [
    Field(1, "max", Bytes),
    Field(2, "min", Bytes),
    Field(3, "null_count", I64),
    Field(4, "distinct_count", I64),
    Field(5, "max_value", Bytes),
    Field(6, "min_value", Bytes),
    Field(7, "is_max_value_exact", Bool),
    Field(8, "is_min_value_exact", Bool),
    Field(9, "nan_count", I64),
];
const SIZE_STATISTICS: [Field; 3] = [
    Field(1, "unencoded_byte_array_data_bytes", I64),
    Field(2, "repetition_level_histogram", List(&I64)),
    Field(3, "definition_level_histogram", List(&I64)),
];
const GEOSPATIAL_STATISTICS: [Field; 2] =
    [Field(1, "bbox", Struct(&BOUNDING_BOX)), Field(2, "geospatial_types", List(&I32))];
const BOUNDING_BOX: [Field; 8] = [
    Field(1, "xmin", Double),
    Field(2, "xmax", Double),
    Field(3, "ymin", Double),
    Field(4, "ymax", Double),
    Field(5, "zmin", Double),
    Field(6, "zmax", Double),
    Field(7, "mmin", Double),
    Field(8, "mmax", Double),
];

/// Checks a footer; bytes that it takes in memory.
pub(super) fn check_footer(bytes: &[u8]) -> Result<u64, String> {
    let mut schema = Schema::default();
    let mut n_entries = 0_u64;
    let (mut name_bytes, mut n_children) = (0, 0);
    let walked = Compact::new(bytes).structure(&FILE, &mut |name, seen| match (name, seen) {
        ("name", Seen::Bytes(n)) => name_bytes = n as u64,
        ("num_children", Seen::Number(n)) => n_children = n,
        ("schema", Seen::End) => {
            schema.add(name_bytes, n_children);
            (name_bytes, n_children) = (0, 0);
            n_entries += 1;
        }
        ("row_groups" | "columns" | "key_value_metadata", Seen::End) => n_entries += 1,
        _ => {}
    });
    walked.ok_or("its footer is broken")?;
    let path_bytes = schema.path_bytes()?;
    let in_memory = FOOTER_SHARE * bytes.len() as u64 + ENTRY_BYTES * n_entries + path_bytes;
    if in_memory > MAX_BYTES {
        let mib = MAX_BYTES >> 20;
        return Err(format!(
            "its footer would take {in_memory} bytes of memory, over the limit of {mib} MiB"
        ));
    }
    Ok(in_memory)
}

/// A schema, whose elements come in the order of a walk that visits parents before their children.
#[derive(Default)]
struct Schema {
    /// The groups that the next element lies in: children that each still has, and the bytes of its path.
    open: Vec<(u64, u64)>,
    n_elements: usize,
    /// Paths of all columns together.
    path_bytes: u64,
    broken: Option<String>,
}

/// What a part of a path takes beside its letters.
const PART_BYTES: u64 = 48;

impl Schema {
    fn add(&mut self, name_bytes: u64, n_children: i64) {
        let parent_bytes = match self.open.last_mut() {
            Some((n_left, bytes)) => {
                *n_left -= 1;
                *bytes
            }
            None if self.n_elements == 0 => 0,
            None => return self.fail("its schema has more than one root".into()),
        };
        self.n_elements += 1;
        let bytes = parent_bytes + name_bytes + PART_BYTES;
        match u64::try_from(n_children) {
            Err(_) => self.fail(format!("its schema has an element with {n_children} children")),
            Ok(0) => self.path_bytes = self.path_bytes.saturating_add(bytes),
            Ok(n) if self.open.len() < MAX_NESTING => self.open.push((n, bytes)),
            Ok(_) => self.fail(format!("its schema is nested deeper than {MAX_NESTING}")),
        }
        while self.open.last().is_some_and(|&(n_left, _)| n_left == 0) {
            self.open.pop();
        }
    }

    fn fail(&mut self, reason: String) {
        self.broken.get_or_insert(reason);
    }

    fn path_bytes(self) -> Result<u64, String> {
        match (self.broken, self.open.last()) {
            (Some(reason), _) => Err(reason),
            (None, Some((n, _))) => Err(format!("its schema lacks {n} elements at its end")),
            (None, None) => Ok(self.path_bytes),
        }
    }
}

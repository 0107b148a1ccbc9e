//! The header of a safetensors file, validated before anything believes it.
//!
//! Invariants of an accepted header (each refused case has a test):
//! * the header is at most [`MAX_HEADER_BYTES`] long and ends inside the file, checked before it is read; it starts
//!   with `{`, is UTF-8 JSON and holds at most [`MAX_TENSORS`] tensors, no name and no key twice;
//! * shape times element size is computed without overflow and equals the length of `data_offsets`;
//! * sorted by offset, the tensors cover the data exactly: no overlap, no hole, nothing before, between or after.
//!
//! Complexity: O(n log n) in the number of tensors; the JSON is parsed from a stream, never held as a whole.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::BufReader;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use crate::error::IoError;
use crate::window::Window;

/// Longest header accepted, the limit of the format.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most tensors accepted in one file.
pub const MAX_TENSORS: usize = 1_000_000;

/// Most dims of a tensor, twice those of any known model.
const MAX_DIMS: usize = 8;

const DAMAGED: &str = "the file is damaged or was not copied completely: fetch or save it again";

/// Element types of the format that Ounce knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
#[expect(missing_docs, reason = "the format's own names")]
pub enum Dtype {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
    #[serde(rename = "F8_E4M3")]
    F8E4m3,
    #[serde(rename = "F8_E5M2")]
    F8E5m2,
}

impl Dtype {
    /// Bytes of one element.
    pub fn elem_bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 | Self::U16 => 2,
            Self::I8 | Self::U8 | Self::Bool | Self::F8E4m3 | Self::F8E5m2 => 1,
        }
    }

    /// The format's name, as it stands in a header.
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U64 => "U64",
            Self::U32 => "U32",
            Self::U16 => "U16",
            Self::U8 => "U8",
            Self::Bool => "BOOL",
            Self::F8E4m3 => "F8_E4M3",
            Self::F8E5m2 => "F8_E5M2",
        }
    }
}

/// Where one tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, as Hugging Face has it.
    pub name: String,
    /// Element type on disk.
    pub dtype: Dtype,
    /// Sizes of the dims, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Index into [`crate::SafetensorsDir::file_path`].
    pub file: usize,
    /// Where the data starts, counted from the start of the file.
    pub offset: u64,
    /// Length of the data: elements times [`Dtype::elem_bytes`].
    pub bytes: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn n_elems(&self) -> usize {
        (self.bytes / self.dtype.elem_bytes() as u64) as usize
    }
}

/// What a validated header says.
pub(super) struct Header {
    /// Sorted by offset.
    pub(super) tensors: Vec<TensorInfo>,
    pub(super) metadata: BTreeMap<String, String>,
}

/// Reads and validates the header of an open file, which becomes number `file_idx`.
///
/// # Errors
/// `Read`, `BadFile`, `BadTensor`.
pub(super) fn read_header(file: &File, path: &Path, file_idx: usize) -> Result<Header, IoError> {
    let file_bytes = file.metadata().map_err(|e| IoError::reading(path, e))?.len();
    if file_bytes < 8 {
        let reason = format!("{file_bytes} bytes are too few for a safetensors file");
        return Err(IoError::bad_file(path, reason, DAMAGED));
    }
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).map_err(|e| IoError::reading(path, e))?;
    if &length == b"version " {
        return Err(IoError::bad_file(
            path,
            "is a pointer of Git LFS, not the file itself",
            "fetch the file with `git lfs pull`, or the model with `ounce pull ORG/NAME`",
        ));
    }
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES || header_bytes > file_bytes - 8 {
        let reason = format!(
            "the header claims {header_bytes} bytes, of a file of {file_bytes} bytes and at most \
             {MAX_HEADER_BYTES} bytes"
        );
        return Err(IoError::bad_file(path, reason, DAMAGED));
    }
    let raw = parse_header(file, path, header_bytes)?;
    let data_start = 8 + header_bytes;
    let tensors = place_tensors(raw.tensors, path, file_idx, data_start, file_bytes - data_start)?;
    Ok(Header { tensors, metadata: raw.metadata })
}

/// The header as written, not yet believed.
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: Dtype,
    #[serde(deserialize_with = "read_shape")]
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A shape of at most [`MAX_DIMS`] sizes, none of which is kept before they are known to be so few.
fn read_shape<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    struct Sizes;
    impl<'de> serde::de::Visitor<'de> for Sizes {
        type Value = Vec<u64>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "at most {MAX_DIMS} sizes")
        }

        fn visit_seq<A: serde::de::SeqAccess<'de>>(
            self,
            mut list: A,
        ) -> Result<Vec<u64>, A::Error> {
            let mut sizes = Vec::new();
            while let Some(size) = list.next_element()? {
                if sizes.len() == MAX_DIMS {
                    return Err(serde::de::Error::invalid_length(MAX_DIMS + 1, &self));
                }
                sizes.push(size);
            }
            Ok(sizes)
        }
    }
    deserializer.deserialize_seq(Sizes)
}

/// Parses the JSON from the file, with one small buffer.
fn parse_header(file: &File, path: &Path, header_bytes: u64) -> Result<RawHeader, IoError> {
    let mut first = [0];
    if header_bytes > 0 {
        file.read_exact_at(&mut first, 8).map_err(|e| IoError::reading(path, e))?;
    }
    if first != *b"{" {
        return Err(IoError::bad_file(path, "the header does not start with `{`", DAMAGED));
    }
    let text = BufReader::with_capacity(64 << 10, Window { file, at: 8, end: 8 + header_bytes });
    let mut deserializer = serde_json::Deserializer::from_reader(text);
    RawHeader::deserialize(&mut deserializer)
        .and_then(|raw| deserializer.end().map(|()| raw))
        .map_err(|error| match error.io_error_kind() {
            Some(kind) => IoError::reading(path, kind.into()),
            None => IoError::bad_file(path, format!("bad header: {error}"), DAMAGED),
        })
}

/// Checks every tensor against shape, type and neighbours; returns them sorted by offset.
fn place_tensors(
    mut raw: Vec<(String, RawTensor)>,
    path: &Path,
    file_idx: usize,
    data_start: u64,
    data_bytes: u64,
) -> Result<Vec<TensorInfo>, IoError> {
    raw.sort_by(|a, b| (a.1.data_offsets, &a.0).cmp(&(b.1.data_offsets, &b.0)));
    let mut tensors = Vec::with_capacity(raw.len());
    let mut covered_bytes = 0;
    for (name, tensor) in raw {
        let (start, end) = tensor.data_offsets;
        let bad = |reason: String| IoError::bad_tensor(path, &name, reason, DAMAGED);
        let bytes = tensor
            .shape
            .iter()
            .try_fold(tensor.dtype.elem_bytes() as u64, |n, &dim| n.checked_mul(dim))
            .ok_or_else(|| bad(format!("shape {:?} overflows", tensor.shape)))?;
        if end.checked_sub(start) != Some(bytes) {
            return Err(bad(format!(
                "data_offsets {start}..{end} do not hold the {bytes} bytes of shape {:?} in {}",
                tensor.shape,
                tensor.dtype.name()
            )));
        }
        if start != covered_bytes {
            let what = if start < covered_bytes { "overlaps the data" } else { "leaves a hole" };
            return Err(bad(format!(
                "starts at byte {start} and {what} before it, which ends at byte {covered_bytes}"
            )));
        }
        if end > data_bytes {
            return Err(bad(format!("ends at byte {end} of only {data_bytes} bytes of data")));
        }
        covered_bytes = end;
        let shape = tensor.shape.iter().map(|&dim| dim as usize).collect();
        let offset = data_start + start;
        tensors.push(TensorInfo {
            name,
            dtype: tensor.dtype,
            shape,
            file: file_idx,
            offset,
            bytes,
        });
    }
    if covered_bytes != data_bytes {
        let reason = format!("{} bytes after the last tensor", data_bytes - covered_bytes);
        return Err(IoError::bad_file(path, reason, DAMAGED));
    }
    refuse_duplicates(&tensors, path)?;
    Ok(tensors)
}

/// JSON allows a name twice, and readers would disagree on which one counts.
fn refuse_duplicates(tensors: &[TensorInfo], path: &Path) -> Result<(), IoError> {
    let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => {
            Err(IoError::bad_tensor(path, pair[0], "appears twice in the header", DAMAGED))
        }
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tensor names to dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut tensors = Vec::new();
                let mut metadata = None;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if metadata.is_some() {
                            return Err(de::Error::custom("`__metadata__` appears twice"));
                        }
                        metadata = Some(map.next_value::<UniqueStrings>()?.0);
                    } else if tensors.len() == MAX_TENSORS {
                        let message = format!("more than {MAX_TENSORS} tensors");
                        return Err(de::Error::custom(message));
                    } else {
                        tensors.push((name, map.next_value()?));
                    }
                }
                Ok(RawHeader { tensors, metadata: metadata.unwrap_or_default() })
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// A map of strings without duplicate keys.
struct UniqueStrings(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for UniqueStrings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StringsVisitor;

        impl<'de> Visitor<'de> for StringsVisitor {
            type Value = UniqueStrings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueStrings, A::Error> {
                let mut strings = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if strings.insert(key.clone(), value).is_some() {
                        return Err(de::Error::custom(format!("key `{key}` appears twice")));
                    }
                }
                Ok(UniqueStrings(strings))
            }
        }

        deserializer.deserialize_map(StringsVisitor)
    }
}

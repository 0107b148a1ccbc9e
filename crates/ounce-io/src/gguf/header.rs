//! The header of a GGUF file, validated before anything believes it.
//!
//! Layout: magic, version, number of tensors, number of keys; each key with a typed value; each tensor with name,
//! sizes (innermost first), type and offset; padding to the alignment; data. Little endian.
//!
//! Invariants of an accepted header (each refused case has a test):
//! * version 2 or 3, at most [`MAX_KEYS`] keys and [`MAX_TENSORS`] tensors, no key and no name twice;
//! * every count and length is checked against the bytes that are left in the file before anything is allocated or
//!   skipped for it; arrays are not read but located, so that a vocabulary costs nothing until it is asked for;
//! * elements times bytes is computed without overflow, rows are whole blocks, and the tensors lie one after another,
//!   each at the next multiple of the alignment, all of them inside the file.
//!
//! Complexity: one pass through one small buffer. Source: the GGUF specification of ggml, version 3.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::block::GgmlType;
use crate::error::IoError;
use crate::safetensors::MAX_TENSORS;
use crate::window::Window;

/// Most keys accepted.
const MAX_KEYS: u64 = 1 << 16;
/// Longest name of a key or tensor in bytes.
const MAX_NAME_BYTES: u64 = 1 << 10;
/// Longest text value in bytes: chat templates are tens of KiB.
const MAX_TEXT_BYTES: u64 = 4 << 20;
/// Most bytes that the elements of one array may take once they are read.
const MAX_ARRAY_BYTES: u64 = 128 << 20;
/// Largest alignment of the data in bytes.
const MAX_ALIGNMENT_BYTES: u64 = 1 << 16;
/// Most dims of a tensor, the limit of the format.
const MAX_DIMS: u32 = 4;
/// Alignment without the key `general.alignment`.
pub(super) const ALIGNMENT_BYTES: u64 = 32;

const DAMAGED: &str = "the file is damaged or was not copied completely: fetch it again";

/// The value of a key.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// Any float; of an f32 the shortest decimal number that gives it.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A text.
    Text(String),
    /// Where an array lies.
    Array(GgufArray),
}

/// An array in the header, not yet read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GgufArray {
    pub(super) kind: Kind,
    pub(super) n: u64,
    pub(super) start: u64,
    pub(super) end: u64,
}

/// Types of values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Unsigned(usize),
    Signed(usize),
    Float(usize),
    Bool,
    Text,
}

impl Kind {
    /// The scalar type with the format's number `code`.
    fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::Unsigned(1),
            1 => Self::Signed(1),
            2 => Self::Unsigned(2),
            3 => Self::Signed(2),
            4 => Self::Unsigned(4),
            5 => Self::Signed(4),
            6 => Self::Float(4),
            7 => Self::Bool,
            8 => Self::Text,
            10 => Self::Unsigned(8),
            11 => Self::Signed(8),
            12 => Self::Float(8),
            _ => return None,
        })
    }

    /// Least bytes of one element.
    fn least_bytes(self) -> u64 {
        match self {
            Self::Unsigned(n) | Self::Signed(n) | Self::Float(n) => n as u64,
            Self::Bool => 1,
            // The length.
            Self::Text => 8,
        }
    }
}

/// Where one tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Name, as llama.cpp has it.
    pub name: String,
    /// Element type on disk.
    pub dtype: GgmlType,
    /// Sizes of the dims, outermost first (the file has them innermost first).
    pub shape: Vec<usize>,
    /// Where the data starts, counted from the start of the file.
    pub offset: u64,
    /// Length of the data in bytes.
    pub bytes: u64,
}

impl GgufTensor {
    /// Number of elements.
    pub fn n_elems(&self) -> usize {
        self.shape.iter().product()
    }
}

/// What a validated header says.
pub(super) struct Header {
    pub(super) values: BTreeMap<String, GgufValue>,
    /// In the order in which they lie in the file.
    pub(super) tensors: Vec<GgufTensor>,
    /// Length of the header in bytes, without padding.
    pub(super) bytes: u64,
}

/// Reads and validates the header of an open file.
///
/// # Errors
/// `Read`, `BadFile`, `BadTensor`.
pub(super) fn read_header(file: &File, path: &Path) -> Result<Header, IoError> {
    let file_bytes = file.metadata().map_err(|e| IoError::reading(path, e))?.len();
    let mut scan = Scan::new(file, path, 0, file_bytes);
    if scan.array::<4>("the magic")? != *b"GGUF" {
        let hint = "name a GGUF file, as llama.cpp and Ollama use them";
        return Err(IoError::bad_file(path, "does not start with `GGUF`", hint));
    }
    let version = scan.u32("the version")?;
    if version != 2 && version != 3 {
        let what = if version.swap_bytes() == 3 { "big endian" } else { "not 2 or 3" };
        let reason = format!("has version {version}, which is {what}");
        return Err(IoError::bad_file(
            path,
            reason,
            "convert the model again with a new llama.cpp",
        ));
    }
    let n_tensors = scan.u64("the number of tensors")?;
    let n_keys = scan.u64("the number of keys")?;
    if n_tensors > MAX_TENSORS as u64 || n_keys > MAX_KEYS {
        let reason = format!(
            "claims {n_tensors} tensors and {n_keys} keys, at most {MAX_TENSORS} and {MAX_KEYS} are read"
        );
        return Err(IoError::bad_file(path, reason, DAMAGED));
    }
    let mut values = BTreeMap::new();
    for _ in 0..n_keys {
        let key = scan.text("a key", MAX_NAME_BYTES)?;
        let value = scan.value(&key)?;
        if values.contains_key(&key) {
            return Err(scan.bad(format!("key `{key}` appears twice")));
        }
        values.insert(key, value);
    }
    let alignment_bytes = alignment(&values, path)?;
    let mut tensors = Vec::new();
    for _ in 0..n_tensors {
        tensors.push(scan.tensor()?);
    }
    let bytes = scan.at();
    place_tensors(&mut tensors, path, bytes, alignment_bytes, file_bytes)?;
    tensors.shrink_to_fit();
    Ok(Header { values, tensors, bytes })
}

fn alignment(values: &BTreeMap<String, GgufValue>, path: &Path) -> Result<u64, IoError> {
    let bytes = match values.get("general.alignment") {
        None => return Ok(ALIGNMENT_BYTES),
        Some(GgufValue::Unsigned(n)) => *n,
        Some(_) => 0,
    };
    if bytes.is_power_of_two() && (8..=MAX_ALIGNMENT_BYTES).contains(&bytes) {
        return Ok(bytes);
    }
    let reason = format!(
        "`general.alignment` is {bytes}, not a power of two from 8 to {MAX_ALIGNMENT_BYTES}"
    );
    Err(IoError::bad_file(path, reason, DAMAGED))
}

/// Turns offsets from the start of the data into offsets from the start of the file, after checking that the tensors
/// lie one after another inside the file.
fn place_tensors(
    tensors: &mut [GgufTensor],
    path: &Path,
    header_bytes: u64,
    alignment_bytes: u64,
    file_bytes: u64,
) -> Result<(), IoError> {
    let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(IoError::bad_tensor(path, pair[0], "appears twice in the header", DAMAGED));
    }
    let data_start = header_bytes.next_multiple_of(alignment_bytes);
    tensors.sort_by_key(|t| t.offset);
    let mut due = 0;
    for tensor in tensors {
        let bad = |reason: String| Err(IoError::bad_tensor(path, &tensor.name, reason, DAMAGED));
        if tensor.offset != due {
            return bad(format!("starts at byte {} of the data, not at {due}", tensor.offset));
        }
        let end = data_start.checked_add(due).and_then(|start| start.checked_add(tensor.bytes));
        if end.is_none_or(|end| end > file_bytes) {
            return bad(format!(
                "takes {} bytes from byte {due} of the data on, which begins at byte {data_start} of a file of \
                 {file_bytes} bytes",
                tensor.bytes
            ));
        }
        // Both are below the length of the file.
        due = (due + tensor.bytes).next_multiple_of(alignment_bytes);
        tensor.offset += data_start;
    }
    Ok(())
}

/// Reads through a file with one small buffer, and never past `end`.
pub(super) struct Scan<'a> {
    reader: BufReader<Window<'a>>,
    path: &'a Path,
}

impl<'a> Scan<'a> {
    pub(super) fn new(file: &'a File, path: &'a Path, at: u64, end: u64) -> Self {
        Self { reader: BufReader::with_capacity(64 << 10, Window { file, at, end }), path }
    }

    /// Where the next byte lies.
    fn at(&self) -> u64 {
        self.reader.get_ref().at - self.reader.buffer().len() as u64
    }

    /// Bytes that are left.
    fn left(&self) -> u64 {
        self.reader.get_ref().end - self.at()
    }

    fn bad(&self, reason: String) -> IoError {
        IoError::bad_file(self.path, reason, DAMAGED)
    }

    /// Checks that `n_bytes` are left for `what`.
    fn expect(&self, n_bytes: Option<u64>, what: &str) -> Result<u64, IoError> {
        n_bytes.filter(|&n| n <= self.left()).ok_or_else(|| {
            let (at, left) = (self.at(), self.left());
            self.bad(format!("{what} at byte {at} is longer than the {left} bytes that are left"))
        })
    }

    fn fill(&mut self, bytes: &mut [u8], what: &str) -> Result<(), IoError> {
        self.expect(Some(bytes.len() as u64), what)?;
        self.reader.read_exact(bytes).map_err(|e| IoError::reading(self.path, e))
    }

    fn skip(&mut self, n_bytes: u64) {
        let buffered = self.reader.buffer().len() as u64;
        if n_bytes <= buffered {
            self.reader.consume(n_bytes as usize);
            return;
        }
        let window = self.reader.get_ref();
        let (file, at, end) = (window.file, window.at + (n_bytes - buffered), window.end);
        self.reader = BufReader::with_capacity(64 << 10, Window { file, at, end });
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], IoError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, IoError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, IoError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A text of at most `most_bytes`.
    pub(super) fn text(&mut self, what: &str, most_bytes: u64) -> Result<String, IoError> {
        let n_bytes = self.u64(what)?;
        if n_bytes > most_bytes {
            return Err(self.bad(format!(
                "{what} before byte {} claims {n_bytes} bytes, at most {most_bytes} are read",
                self.at()
            )));
        }
        self.expect(Some(n_bytes), what)?;
        let mut bytes = vec![0; n_bytes as usize];
        self.fill(&mut bytes, what)?;
        String::from_utf8(bytes)
            .map_err(|_| self.bad(format!("{what} before byte {} is not UTF-8", self.at())))
    }

    fn value(&mut self, key: &str) -> Result<GgufValue, IoError> {
        let code = self.u32("the type of a value")?;
        if let Some(kind) = Kind::from_code(code) {
            return self.scalar(kind, key);
        }
        const ARRAY: u32 = 9;
        if code != ARRAY {
            return Err(self.bad(format!("key `{key}` has a value of unknown type {code}")));
        }
        let elem = self.u32("the type of an array")?;
        let n = self.u64("the length of an array")?;
        let kind = Kind::from_code(elem)
            .ok_or_else(|| self.bad(format!("key `{key}` is an array of unknown type {elem}")))?;
        let start = self.at();
        let n_bytes = self.expect(n.checked_mul(kind.least_bytes()), "an array")?;
        if n_bytes > MAX_ARRAY_BYTES {
            return Err(self.bad(format!("key `{key}` is an array of {n} elements, too many")));
        }
        if kind == Kind::Text {
            for _ in 0..n {
                let n_bytes = self.u64("a text")?;
                let n_bytes = self.expect(Some(n_bytes), "a text")?;
                self.skip(n_bytes);
            }
        } else {
            self.skip(n_bytes);
        }
        let end = self.at();
        if end - start > MAX_ARRAY_BYTES {
            return Err(self.bad(format!("key `{key}` is an array of {} bytes", end - start)));
        }
        Ok(GgufValue::Array(GgufArray { kind, n, start, end }))
    }

    /// One value, or one element of an array.
    pub(super) fn scalar(&mut self, kind: Kind, what: &str) -> Result<GgufValue, IoError> {
        let mut bytes = [0; 8];
        Ok(match kind {
            Kind::Unsigned(n) => {
                self.fill(&mut bytes[..n], what)?;
                GgufValue::Unsigned(u64::from_le_bytes(bytes))
            }
            Kind::Signed(n) => {
                self.fill(&mut bytes[..n], what)?;
                let unused_bits = 8 * (8 - n) as u32;
                GgufValue::Signed(i64::from_le_bytes(bytes) << unused_bits >> unused_bits)
            }
            Kind::Float(4) => {
                let x = f32::from_le_bytes(self.array(what)?);
                // 1e-5 was meant where 9.999999747378752e-6 is stored.
                GgufValue::Float(x.to_string().parse().unwrap_or_else(|_| f64::from(x)))
            }
            Kind::Float(_) => GgufValue::Float(f64::from_le_bytes(self.array(what)?)),
            Kind::Bool => GgufValue::Bool(self.array::<1>(what)? != [0]),
            Kind::Text => GgufValue::Text(self.text(what, MAX_TEXT_BYTES)?),
        })
    }

    fn tensor(&mut self) -> Result<GgufTensor, IoError> {
        let name = self.text("the name of a tensor", MAX_NAME_BYTES)?;
        let path = self.path;
        let bad = |reason: String, hint: &'static str| {
            Err(IoError::bad_tensor(path, &name, reason, hint))
        };
        let n_dims = self.u32("the number of dims")?;
        if n_dims == 0 || n_dims > MAX_DIMS {
            return bad(format!("has {n_dims} dims, 1 to {MAX_DIMS} are possible"), DAMAGED);
        }
        let mut shape = vec![0; n_dims as usize];
        for dim in shape.iter_mut().rev() {
            *dim = self.u64("a size")? as usize;
        }
        let code = self.u32("the type of a tensor")?;
        let offset = self.u64("the offset of a tensor")?;
        let Some(dtype) = GgmlType::from_code(code) else {
            return bad(
                format!("has ggml type {code}, which is not read"),
                "take a file in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K or Q6_K",
            );
        };
        let inner = shape.last().copied().unwrap_or(0);
        let n_elems = shape.iter().try_fold(1_usize, |n, &dim| n.checked_mul(dim));
        let n_bytes = n_elems.and_then(|n| {
            ((n / dtype.block_elems()) as u64).checked_mul(dtype.block_bytes() as u64)
        });
        let Some(bytes) = n_bytes.filter(|_| inner.is_multiple_of(dtype.block_elems())) else {
            return bad(
                format!("of shape {shape:?} cannot be held in blocks of {}", dtype.name()),
                DAMAGED,
            );
        };
        Ok(GgufTensor { name, dtype, shape, offset, bytes })
    }
}

/// The bytes of the header, for a hash.
pub(super) fn for_each_chunk(
    file: &File,
    path: &Path,
    n_bytes: u64,
    mut see: impl FnMut(&[u8]),
) -> Result<(), IoError> {
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    while at < n_bytes {
        let n = (n_bytes - at).min(buffer.len() as u64) as usize;
        file.read_exact_at(&mut buffer[..n], at).map_err(|e| IoError::reading(path, e))?;
        see(&buffer[..n]);
        at += n as u64;
    }
    Ok(())
}

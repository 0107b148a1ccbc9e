//! Reading a GGUF file: values of keys, arrays, and tensors as f32, piece by piece into buffers of the caller.
//!
//! A quantised tensor is decoded block by block through one small buffer on the stack; a piece that begins or ends
//! inside a block decodes that block into a second one. Nothing is mapped.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::block::MAX_BLOCK_ELEMS;
use super::header::{GgufArray, GgufTensor, GgufValue, Kind, Scan, for_each_chunk, read_header};
use crate::error::IoError;
use crate::hash::Xxh64;
use crate::json::open_regular;

/// Bytes of the buffer through which elements are decoded.
const CHUNK_BYTES: usize = 16 << 10;
/// Longest element of an array of texts in bytes.
const MAX_ELEM_BYTES: u64 = 1 << 16;

/// Whether an existing file begins as a GGUF file does.
///
/// # Errors
/// `Read`, `BadFile` where it is no regular file.
pub fn is_gguf(path: &Path) -> Result<bool, IoError> {
    let mut magic = [0; 4];
    match open_regular(path)?.read_exact_at(&mut magic, 0) {
        Ok(()) => Ok(magic == *b"GGUF"),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(IoError::reading(path, e)),
    }
}

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: File,
    values: BTreeMap<String, GgufValue>,
    tensors: Vec<GgufTensor>,
    /// Indices into `tensors`, sorted by name.
    by_name: Vec<u32>,
    header_hash: u64,
}

impl Gguf {
    /// Opens a file and validates its header.
    ///
    /// # Errors
    /// `Missing`, `Read`, `BadFile`, `BadTensor`.
    pub fn open(path: &Path) -> Result<Self, IoError> {
        let file = open_regular(path)?;
        let header = read_header(&file, path)?;
        let mut hash = Xxh64::new();
        for_each_chunk(&file, path, header.bytes, |bytes| hash.update(bytes))?;
        let tensors = header.tensors;
        let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
        by_name.sort_by(|&a, &b| tensors[a as usize].name.cmp(&tensors[b as usize].name));
        Ok(Self {
            path: path.into(),
            file,
            values: header.values,
            tensors,
            by_name,
            header_hash: hash.digest(),
        })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Hash of the header: keys, vocabulary, and where which tensor lies.
    pub fn header_hash(&self) -> u64 {
        self.header_hash
    }

    /// Every key with its value, in the order of the keys.
    pub fn values(&self) -> &BTreeMap<String, GgufValue> {
        &self.values
    }

    /// Every tensor, in the order in which they lie in the file.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The tensor called `name` (llama.cpp's name), if there is one.
    pub fn get(&self, name: &str) -> Option<&GgufTensor> {
        self.by_name
            .binary_search_by(|&i| self.tensors[i as usize].name.as_str().cmp(name))
            .ok()
            .map(|at| &self.tensors[self.by_name[at] as usize])
    }

    /// The text of a key.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        match self.values.get(key)? {
            GgufValue::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The truth value of a key.
    pub(super) fn bool(&self, key: &str) -> Option<bool> {
        match self.values.get(key)? {
            GgufValue::Bool(x) => Some(*x),
            _ => None,
        }
    }

    /// The integer of a key.
    pub(super) fn u64(&self, key: &str) -> Option<u64> {
        match self.values.get(key)? {
            GgufValue::Unsigned(n) => Some(*n),
            GgufValue::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// The number of a key.
    pub(super) fn f64(&self, key: &str) -> Option<f64> {
        match self.values.get(key)? {
            GgufValue::Float(x) => Some(*x),
            _ => self.u64(key).map(|n| n as f64),
        }
    }

    /// The array of a key.
    fn array(&self, key: &str) -> Option<GgufArray> {
        match self.values.get(key)? {
            GgufValue::Array(array) => Some(*array),
            _ => None,
        }
    }

    /// Elements of the array `key`, none where there is no such array.
    pub(super) fn array_len(&self, key: &str) -> usize {
        self.array(key).map_or(0, |array| array.n as usize)
    }

    /// Hands every element of the array `key` to `see`; nothing happens where there is no such array.
    pub(super) fn for_each(
        &self,
        key: &str,
        mut see: impl FnMut(GgufValue) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        let Some(array) = self.array(key) else { return Ok(()) };
        let mut scan = Scan::new(&self.file, &self.path, array.start, array.end);
        for _ in 0..array.n {
            see(match array.kind {
                Kind::Text => GgufValue::Text(scan.text(key, MAX_ELEM_BYTES)?),
                kind => scan.scalar(kind, key)?,
            })?;
        }
        Ok(())
    }

    /// The array of texts `key`, where there is one.
    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<String>>, IoError> {
        if self.array(key).is_none_or(|array| array.kind != Kind::Text) {
            return Ok(None);
        }
        let mut texts = Vec::new();
        self.for_each(key, |value| {
            if let GgufValue::Text(text) = value {
                texts.push(text);
            }
            Ok(())
        })?;
        Ok(Some(texts))
    }

    /// Reads elements `start..start + dst.len()` of a tensor as f32.
    ///
    /// # Errors
    /// `BadTensor` where the tensor is shorter, `Read`.
    pub fn read_f32_at(
        &self,
        tensor: &GgufTensor,
        start: usize,
        dst: &mut [f32],
    ) -> Result<(), IoError> {
        let n_elems = tensor.n_elems();
        if start.checked_add(dst.len()).is_none_or(|end| end > n_elems) {
            let reason = format!("{} elements from {start} on are not in its {n_elems}", dst.len());
            return Err(self.bad_tensor(&tensor.name, reason));
        }
        let (block_elems, block_bytes) = (tensor.dtype.block_elems(), tensor.dtype.block_bytes());
        let mut buffer = [0; CHUNK_BYTES];
        let mut whole = [0.0; MAX_BLOCK_ELEMS];
        let (mut at, mut rest) = (start, dst);
        while !rest.is_empty() {
            let (block, within) = (at / block_elems, at % block_elems);
            let is_part = within != 0 || rest.len() < block_elems;
            let n_blocks =
                if is_part { 1 } else { (rest.len() / block_elems).min(CHUNK_BYTES / block_bytes) };
            let bytes = &mut buffer[..n_blocks * block_bytes];
            let offset = tensor.offset + (block * block_bytes) as u64;
            let read = self.file.read_exact_at(bytes, offset);
            read.map_err(|e| IoError::reading(&self.path, e))?;
            let n = if is_part {
                let n = rest.len().min(block_elems - within);
                tensor.dtype.decode(bytes, &mut whole[..block_elems]);
                rest[..n].copy_from_slice(&whole[within..within + n]);
                n
            } else {
                let n = n_blocks * block_elems;
                tensor.dtype.decode(bytes, &mut rest[..n]);
                n
            };
            at += n;
            rest = &mut rest[n..];
        }
        Ok(())
    }

    pub(super) fn bad_tensor(&self, name: &str, reason: impl Into<String>) -> IoError {
        let hint = "the tensors and keys of the file must belong to one model";
        IoError::bad_tensor(&self.path, name, reason, hint)
    }

    /// A key that is missing, wrong or not supported.
    pub(super) fn bad_key(&self, key: &str, reason: &str, hint: &'static str) -> IoError {
        IoError::bad_file(&self.path, format!("key `{key}` {reason}"), hint)
    }
}

//! Writing a GGUF file as a stream: keys and sizes first, then the tensors in declared order through a small buffer.
//!
//! The file appears under its name when it is complete (see `atomic.rs`). Types are as llama.cpp chooses them: vectors
//! stay F32; a matrix whose rows are no whole blocks of Q8_0 becomes F16.

use std::path::Path;

use super::block::GgmlType;
use super::header::ALIGNMENT_BYTES;
use crate::atomic::AtomicFile;
use crate::error::IoError;

/// The format's version.
const VERSION: u32 = 3;
/// Elements that are encoded at a time: whole blocks of every type.
const CHUNK_ELEMS: usize = 4 << 10;

/// The value of a key to be written.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum GgufField {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct GgufSpec {
    pub(super) name: String,
    pub(super) dtype: GgmlType,
    /// Outermost first.
    pub(super) shape: Vec<usize>,
}

impl GgufSpec {
    /// A tensor in the type that is wanted, or the one that takes its place.
    pub(super) fn new(name: String, wanted: GgmlType, shape: Vec<usize>) -> Self {
        let inner = shape.last().copied().unwrap_or(0);
        let dtype = if shape.len() < 2 {
            GgmlType::F32
        } else if inner.is_multiple_of(wanted.block_elems()) {
            wanted
        } else {
            GgmlType::F16
        };
        Self { name, dtype, shape }
    }

    fn n_elems(&self) -> usize {
        self.shape.iter().product()
    }

    fn n_bytes(&self) -> u64 {
        (self.n_elems() / self.dtype.block_elems() * self.dtype.block_bytes()) as u64
    }
}

/// Writes the tensors of one file in declared order. Dropped before `finish`, it leaves nothing behind.
#[derive(Debug)]
pub(super) struct GgufWriter {
    file: AtomicFile,
    specs: Vec<GgufSpec>,
    /// The tensor that is due, and how many of its elements are written.
    current: usize,
    n_written: usize,
    buffer: Vec<u8>,
}

impl GgufWriter {
    /// Opens the file and writes its header.
    ///
    /// # Errors
    /// `Write`.
    pub(super) fn create(
        path: &Path,
        fields: &[(String, GgufField)],
        specs: Vec<GgufSpec>,
    ) -> Result<Self, IoError> {
        let mut file = AtomicFile::create(path)?;
        let mut header = Vec::new();
        header.extend_from_slice(b"GGUF");
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(specs.len() as u64).to_le_bytes());
        header.extend_from_slice(&(fields.len() as u64).to_le_bytes());
        for (key, field) in fields {
            put_text(&mut header, key);
            put_field(&mut header, field);
        }
        let mut offset = 0;
        for spec in &specs {
            put_text(&mut header, &spec.name);
            header.extend_from_slice(&(spec.shape.len() as u32).to_le_bytes());
            for &dim in spec.shape.iter().rev() {
                header.extend_from_slice(&(dim as u64).to_le_bytes());
            }
            header.extend_from_slice(&spec.dtype.code().to_le_bytes());
            header.extend_from_slice(&u64::to_le_bytes(offset));
            offset = (offset + spec.n_bytes()).next_multiple_of(ALIGNMENT_BYTES);
        }
        file.write_all(&header)?;
        let buffer = vec![0; CHUNK_ELEMS * 4];
        let mut writer = Self { file, specs, current: 0, n_written: 0, buffer };
        writer.pad()?;
        Ok(writer)
    }

    /// Writes the next elements of the tensor that is due: whole blocks.
    ///
    /// # Errors
    /// `Write`; `BadTensor` for a number that is too large for its type, named by `path` as where it comes from.
    ///
    /// # Panics
    /// If no tensor is due, or it has no room for `data`.
    pub(super) fn append(&mut self, path: &Path, data: &[f32]) -> Result<(), IoError> {
        let spec = &self.specs[self.current];
        assert!(self.n_written + data.len() <= spec.n_elems(), "`{}` is too long", spec.name);
        for part in data.chunks(CHUNK_ELEMS) {
            let n_bytes = part.len() / spec.dtype.block_elems() * spec.dtype.block_bytes();
            let bytes = &mut self.buffer[..n_bytes];
            spec.dtype.encode(part, bytes).map_err(|at| {
                let reason = format!("holds {}, too large for {}", part[at], spec.dtype.name());
                IoError::bad_tensor(path, &spec.name, reason, "use `--dtype bf16` or `--dtype f32`")
            })?;
            self.file.write_all(bytes)?;
        }
        self.n_written += data.len();
        if self.n_written == spec.n_elems() {
            self.current += 1;
            self.n_written = 0;
            self.pad()?;
        }
        Ok(())
    }

    /// Flushes the file to the disk and gives it its name.
    ///
    /// # Errors
    /// `Write`.
    ///
    /// # Panics
    /// If a tensor is missing or incomplete.
    pub(super) fn finish(self) -> Result<(), IoError> {
        assert_eq!(self.current, self.specs.len(), "every tensor is written before finish");
        self.file.finish()
    }

    /// Zeros up to the alignment.
    fn pad(&mut self) -> Result<(), IoError> {
        let n_bytes = self.file.n_written_bytes();
        let n_zeros = n_bytes.next_multiple_of(ALIGNMENT_BYTES) - n_bytes;
        self.file.write_all(&[0; ALIGNMENT_BYTES as usize][..n_zeros as usize])
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend_from_slice(&(text.len() as u64).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
}

/// A value with its type.
fn put_field(bytes: &mut Vec<u8>, field: &GgufField) {
    const ARRAY: u32 = 9;
    let kind = |field: &GgufField| -> u32 {
        match field {
            GgufField::U32(_) => 4,
            GgufField::I32s(_) => 5,
            GgufField::F32(_) | GgufField::F32s(_) => 6,
            GgufField::Bool(_) => 7,
            GgufField::Text(_) | GgufField::Texts(_) => 8,
        }
    };
    let mut put = |part: &[u8]| bytes.extend_from_slice(part);
    let n = match field {
        GgufField::Texts(x) => Some(x.len()),
        GgufField::I32s(x) => Some(x.len()),
        GgufField::F32s(x) => Some(x.len()),
        _ => None,
    };
    if n.is_some() {
        put(&ARRAY.to_le_bytes());
    }
    put(&kind(field).to_le_bytes());
    if let Some(n) = n {
        put(&(n as u64).to_le_bytes());
    }
    match field {
        GgufField::U32(x) => put(&x.to_le_bytes()),
        GgufField::F32(x) => put(&x.to_le_bytes()),
        GgufField::Bool(x) => put(&[u8::from(*x)]),
        GgufField::Text(x) => put_text(bytes, x),
        GgufField::Texts(texts) => texts.iter().for_each(|x| put_text(bytes, x)),
        GgufField::I32s(numbers) => numbers.iter().for_each(|x| put(&x.to_le_bytes())),
        GgufField::F32s(numbers) => numbers.iter().for_each(|x| put(&x.to_le_bytes())),
    }
}

//! Writing a safetensors file as a stream.
//!
//! Idea: names, types and shapes are known beforehand, so the header goes first and the data follows in declared
//! order through one small buffer. The file appears under its name when it is complete (see `atomic.rs`).
//!
//! Invariants: the header is padded with spaces to a multiple of 8 bytes, so that the data is aligned;
//! `__metadata__` always says `format: pt`, without which `transformers` refuses the file.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};

use super::header::{Dtype, MAX_HEADER_BYTES};
use crate::atomic::AtomicFile;
use crate::disk::{Disk, real_disk};
use crate::error::IoError;

/// Bytes of the buffer through which elements are converted.
const CHUNK_BYTES: usize = 16 << 10;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name, as Hugging Face has it.
    pub name: String,
    /// Element type on disk.
    pub dtype: Dtype,
    /// Sizes of the dims, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Bytes of the tensor's data.
    fn n_bytes(&self) -> u64 {
        self.shape.iter().map(|&dim| dim as u64).product::<u64>() * self.dtype.elem_bytes() as u64
    }
}

/// Where the bytes of a file go.
pub trait ByteSink {
    /// Appends `bytes`.
    ///
    /// # Errors
    /// Where they cannot be written.
    fn write_all(&mut self, bytes: &[u8]) -> Result<(), IoError>;

    /// Ends the file and flushes it to the disk.
    ///
    /// # Errors
    /// Where that fails.
    fn finish(self) -> Result<(), IoError>;
}

impl ByteSink for AtomicFile {
    fn write_all(&mut self, bytes: &[u8]) -> Result<(), IoError> {
        self.write_all(bytes)
    }

    fn finish(self) -> Result<(), IoError> {
        self.finish()
    }
}

/// Bytes of a file of these tensors.
///
/// # Errors
/// As [`SafetensorsWriter::create`].
pub(crate) fn safetensors_bytes(specs: &[TensorSpec]) -> Result<u64, IoError> {
    let header = header_text(Path::new("a safetensors file"), specs, &[])?;
    Ok(8 + header.len() as u64 + specs.iter().map(TensorSpec::n_bytes).sum::<u64>())
}

/// Writes the tensors of one file in declared order. Dropped before `finish`, it leaves nothing behind.
#[derive(Debug)]
pub struct SafetensorsWriter<F = AtomicFile> {
    file: F,
    specs: Vec<TensorSpec>,
    /// The tensor being written, and the bytes of it that are still missing.
    current: usize,
    n_missing_bytes: u64,
}

impl SafetensorsWriter<AtomicFile> {
    /// Opens the file and writes its header.
    ///
    /// # Errors
    /// `Usage` for a name that is empty, reserved or used twice, or a header over the format's limit; `Write`.
    pub fn create(
        path: &Path,
        specs: &[TensorSpec],
        metadata: &[(&str, &str)],
    ) -> Result<Self, IoError> {
        Self::create_on(real_disk(), path, specs, metadata)
    }

    /// The same on a disk of the caller's choice.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_on(
        disk: Arc<dyn Disk>,
        path: &Path,
        specs: &[TensorSpec],
        metadata: &[(&str, &str)],
    ) -> Result<Self, IoError> {
        Self::begin(AtomicFile::create_on(disk, path)?, path, specs, metadata)
    }
}

impl<F: ByteSink> SafetensorsWriter<F> {
    /// Writes the header of `path` to `file`.
    pub(crate) fn begin(
        mut file: F,
        path: &Path,
        specs: &[TensorSpec],
        metadata: &[(&str, &str)],
    ) -> Result<Self, IoError> {
        let header = header_text(path, specs, metadata)?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        let n_missing_bytes = specs.first().map_or(0, TensorSpec::n_bytes);
        Ok(Self { file, specs: specs.to_vec(), current: 0, n_missing_bytes })
    }

    /// Writes one whole tensor, the next in declared order, rounding to its type on disk.
    ///
    /// # Errors
    /// `Write`.
    ///
    /// # Panics
    /// If `name` is not the next tensor, `data` has another length, or the type on disk is not a float.
    pub fn write_tensor_f32(&mut self, name: &str, data: &[f32]) -> Result<(), IoError> {
        self.append_f32(name, data)?;
        assert_eq!(self.n_missing_bytes_of(name), 0, "tensor `{name}` is incomplete");
        Ok(())
    }

    /// Writes the next part of the next tensor in declared order, rounding to its type on disk.
    ///
    /// # Errors
    /// `Write`.
    ///
    /// # Panics
    /// If `name` is not the tensor that is due, it has no room for `data`, or its type on disk is not a float.
    pub fn append_f32(&mut self, name: &str, data: &[f32]) -> Result<(), IoError> {
        let dtype = self.due(name, |dtype| (data.len() * dtype.elem_bytes()) as u64);
        let mut buffer = [0; CHUNK_BYTES];
        for part in data.chunks(CHUNK_BYTES / dtype.elem_bytes()) {
            let bytes = &mut buffer[..part.len() * dtype.elem_bytes()];
            if dtype == Dtype::F16
                && let Some(x) =
                    part.iter().find(|x| x.is_finite() && f16::from_f32(**x).is_infinite())
            {
                return Err(IoError::Usage {
                    what: format!("tensor `{name}` holds {x:e}, beyond the {} of f16", f16::MAX),
                    hint: "write it as bf16 or f32".into(),
                });
            }
            match dtype {
                Dtype::F32 => convert(bytes, part, f32::to_le_bytes),
                Dtype::F16 => convert(bytes, part, |x| f16::from_f32(x).to_le_bytes()),
                Dtype::Bf16 => convert(bytes, part, |x| bf16::from_f32(x).to_le_bytes()),
                other => panic!("f32 values are not written as {}", other.name()),
            }
            self.file.write_all(bytes)?;
        }
        Ok(())
    }

    /// Writes one whole I16 tensor, the next in declared order.
    ///
    /// # Errors
    /// `Write`.
    ///
    /// # Panics
    /// If `name` is not the next tensor, `data` has another length, or the type on disk is not I16.
    pub fn write_tensor_i16(&mut self, name: &str, data: &[i16]) -> Result<(), IoError> {
        let dtype = self.due(name, |_| size_of_val(data) as u64);
        assert_eq!(dtype, Dtype::I16, "type on disk of tensor `{name}`");
        let mut buffer = [0; CHUNK_BYTES];
        for part in data.chunks(CHUNK_BYTES / 2) {
            let bytes = &mut buffer[..part.len() * 2];
            convert(bytes, part, i16::to_le_bytes);
            self.file.write_all(bytes)?;
        }
        assert_eq!(self.n_missing_bytes_of(name), 0, "tensor `{name}` is incomplete");
        Ok(())
    }

    /// Writes the next bytes of the next tensor in declared order, whatever its type.
    ///
    /// # Errors
    /// `Write`.
    ///
    /// # Panics
    /// If `name` is not the tensor that is due, or it has no room for `bytes`.
    pub fn append_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<(), IoError> {
        self.due(name, |_| bytes.len() as u64);
        self.file.write_all(bytes)
    }

    /// Flushes the file to the disk and gives it its name.
    ///
    /// # Errors
    /// `Write`; the old file, if any, is then still there.
    ///
    /// # Panics
    /// If a tensor is missing or incomplete.
    pub fn finish(mut self) -> Result<(), IoError> {
        self.skip_complete(|_| true);
        assert_eq!(
            self.current,
            self.specs.len(),
            "every declared tensor is written before finish"
        );
        self.file.finish()
    }

    /// Takes `n_bytes(dtype)` bytes off the tensor `name`, which must be the one due; returns its type.
    fn due(&mut self, name: &str, n_bytes: impl Fn(Dtype) -> u64) -> Dtype {
        self.skip_complete(|next| next != name);
        let spec = self.specs.get(self.current).expect("all declared tensors are already written");
        assert_eq!(spec.name, name, "tensors are written in declared order");
        let n = n_bytes(spec.dtype);
        self.n_missing_bytes = self
            .n_missing_bytes
            .checked_sub(n)
            .unwrap_or_else(|| panic!("tensor `{name}` is {n} bytes too long"));
        spec.dtype
    }

    /// Moves on over tensors that lack no bytes, as empty ones never do, while their names are such as may be passed.
    fn skip_complete(&mut self, may_pass: impl Fn(&str) -> bool) {
        while self.n_missing_bytes == 0
            && self.specs.get(self.current).is_some_and(|spec| may_pass(&spec.name))
        {
            self.current += 1;
            self.n_missing_bytes = self.specs.get(self.current).map_or(0, TensorSpec::n_bytes);
        }
    }

    fn n_missing_bytes_of(&self, name: &str) -> u64 {
        if self.specs[self.current].name == name { self.n_missing_bytes } else { 0 }
    }
}

/// The header, padded so that the data starts at a multiple of 8 bytes.
fn header_text(
    path: &Path,
    specs: &[TensorSpec],
    metadata: &[(&str, &str)],
) -> Result<String, IoError> {
    let usage = |what: String| IoError::Usage {
        what: format!("cannot write {}: {what}", path.display()),
        hint: "give every tensor a name of its own".into(),
    };
    let mut names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    names.sort_unstable();
    if let Some([name, ..]) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(usage(format!("two tensors are called `{name}`")));
    }
    if let Some(name) = names.iter().find(|name| ["", "__metadata__"].contains(*name)) {
        return Err(usage(format!("no tensor can be called `{name}`")));
    }
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let mut header = String::from("{\"__metadata__\":{\"format\":\"pt\"");
    for (key, value) in metadata.iter().filter(|(key, _)| *key != "format") {
        write!(header, ",{}:{}", quoted(key), quoted(value)).expect("strings take every write");
    }
    header.push('}');
    let mut start = 0;
    for spec in specs {
        let end = start + spec.n_bytes();
        let (name, dtype) = (quoted(&spec.name), spec.dtype.name());
        let shape = &spec.shape;
        write!(
            header,
            ",{name}:{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}"
        )
        .expect("strings take every write");
        start = end;
    }
    header.push('}');
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    if header.len() as u64 > MAX_HEADER_BYTES {
        return Err(usage(format!(
            "a header of {} bytes is over the format's limit",
            header.len()
        )));
    }
    Ok(header)
}

/// Converts to little-endian elements of `N` bytes.
fn convert<T: Copy, const N: usize>(bytes: &mut [u8], src: &[T], narrow: impl Fn(T) -> [u8; N]) {
    let (elems, rest) = bytes.as_chunks_mut::<N>();
    debug_assert!(rest.is_empty() && elems.len() == src.len());
    for (elem, &x) in elems.iter_mut().zip(src) {
        *elem = narrow(x);
    }
}

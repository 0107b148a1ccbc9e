//! Reading tensors, one at a time, into buffers of the caller.
//!
//! Idea: headers are read and validated once; after that a tensor is a range of a file, read by `pread` through one
//! fixed buffer on the stack. Nothing is mapped, because mapped pages would count against the memory budget.
//!
//! A directory may hold one `model.safetensors` or shards with `model.safetensors.index.json`. Shard names come from
//! a file that someone else wrote, so they must be plain names, and what they name must lie inside the directory
//! after following links. (One exception: the Hugging Face cache keeps `snapshots/REV/NAME` as a link to `blobs/`.)

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::Value;

use super::header::{Dtype, TensorInfo, read_header};
use crate::error::IoError;
use crate::json::{open_regular, read_json};
use crate::model_files::{is_plain_name, stay_inside};
use crate::publication::{interrupted_hint, is_interrupted};

/// Longest `model.safetensors.index.json`.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Bytes of the buffer through which elements are converted.
const CHUNK_BYTES: usize = 16 << 10;
const BELONG_TOGETHER: &str = "config.json and the weights must belong to the same model";

/// The tensors of a model directory (or of one safetensors file), ready to be read.
#[derive(Debug)]
pub struct SafetensorsDir {
    files: Vec<(PathBuf, File)>,
    /// By file, then by offset: the order in which to read them all.
    tensors: Vec<TensorInfo>,
    /// Indices into `tensors`, sorted by name.
    by_name: Vec<u32>,
    metadata: BTreeMap<String, String>,
}

impl SafetensorsDir {
    /// Opens a model directory, or a single safetensors file, and validates every header.
    ///
    /// # Errors
    /// `Missing`, `Read`, `BadFile`, `BadLine`, `BadTensor`.
    pub fn open(path: &Path) -> Result<Self, IoError> {
        let metadata = std::fs::metadata(path).map_err(|e| IoError::reading(path, e))?;
        if metadata.is_file() {
            return Self::from_files(vec![path.into()], None);
        }
        let single = path.join("model.safetensors");
        if single.exists() {
            stay_inside(path, &single)?;
            return Self::from_files(vec![single], None);
        }
        let index_path = path.join("model.safetensors.index.json");
        if index_path.exists() {
            let index = ShardIndex::read(path, &index_path)?;
            return Self::from_files(index.shards.clone(), Some(&index));
        }
        Err(no_weights(path))
    }

    fn from_files(paths: Vec<PathBuf>, index: Option<&ShardIndex>) -> Result<Self, IoError> {
        let mut files = Vec::with_capacity(paths.len());
        let mut tensors = Vec::new();
        let mut metadata = BTreeMap::new();
        for (file_idx, path) in paths.into_iter().enumerate() {
            let file = open_regular(&path)?;
            let header = read_header(&file, &path, file_idx)?;
            // Of a sharded model only the tensors that the index assigns to a shard count.
            let listed =
                |t: &TensorInfo| index.is_none_or(|i| i.shard_of(&t.name) == Some(file_idx));
            tensors.extend(header.tensors.into_iter().filter(listed));
            metadata.extend(header.metadata);
            files.push((path, file));
        }
        tensors.shrink_to_fit();
        let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
        by_name.sort_by(|&a, &b| tensors[a as usize].name.cmp(&tensors[b as usize].name));
        let dir = Self { files, tensors, by_name, metadata };
        if let Some(index) = index {
            index.check_complete(&dir)?;
        }
        Ok(dir)
    }

    /// Every tensor, in the order in which they lie on disk.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name
            .binary_search_by(|&i| self.tensors[i as usize].name.as_str().cmp(name))
            .ok()
            .map(|at| &self.tensors[self.by_name[at] as usize])
    }

    /// Path of the file that [`TensorInfo::file`] names.
    pub fn file_path(&self, file: usize) -> &Path {
        &self.files[file].0
    }

    /// The `__metadata__` strings of the headers.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Reads a whole F32, F16 or BF16 tensor as f32.
    ///
    /// # Shapes
    /// `dst` has as many elements as the tensor, in row-major order.
    ///
    /// # Errors
    /// `BadTensor` where it is missing, of another type or length; `Read`.
    pub fn read_f32(&self, name: &str, dst: &mut [f32]) -> Result<(), IoError> {
        self.require_elems(name, dst.len())?;
        self.read_f32_at(name, 0, dst)
    }

    /// Reads a whole I16 tensor.
    ///
    /// # Errors
    /// `BadTensor` where it is missing, of another type or length; `Read`.
    pub fn read_i16(&self, name: &str, dst: &mut [i16]) -> Result<(), IoError> {
        let info = self.require_elems(name, dst.len())?;
        if info.dtype != Dtype::I16 {
            let reason = format!("has type {}, but I16 is needed", info.dtype.name());
            return Err(self.bad_tensor(info, reason, BELONG_TOGETHER));
        }
        let mut buffer = [0; CHUNK_BYTES];
        for (i, part) in dst.chunks_mut(CHUNK_BYTES / 2).enumerate() {
            let bytes = &mut buffer[..part.len() * 2];
            self.read_exact_bytes(name, (i * CHUNK_BYTES) as u64, bytes)?;
            convert(part, bytes, i16::from_le_bytes);
        }
        Ok(())
    }

    /// Reads elements `start_elem..start_elem + dst.len()` of an F32, F16 or BF16 tensor as f32.
    ///
    /// # Errors
    /// As [`Self::read_f32`].
    pub fn read_f32_at(
        &self,
        name: &str,
        start_elem: usize,
        dst: &mut [f32],
    ) -> Result<(), IoError> {
        let info = self.require(name)?;
        let elem_bytes = info.dtype.elem_bytes();
        self.check_range(info, start_elem, dst.len(), info.n_elems())?;
        let (path, file) = &self.files[info.file];
        let mut offset = info.offset + (start_elem * elem_bytes) as u64;
        let mut buffer = [0; CHUNK_BYTES];
        for part in dst.chunks_mut(CHUNK_BYTES / elem_bytes) {
            let bytes = &mut buffer[..part.len() * elem_bytes];
            file.read_exact_at(bytes, offset).map_err(|e| IoError::reading(path, e))?;
            offset += bytes.len() as u64;
            match info.dtype {
                Dtype::F32 => convert(part, bytes, f32::from_le_bytes),
                Dtype::F16 => convert(part, bytes, |b| f16::from_le_bytes(b).to_f32()),
                Dtype::Bf16 => convert(part, bytes, |b| bf16::from_le_bytes(b).to_f32()),
                other => {
                    let reason = format!("has type {}, which is not read as f32", other.name());
                    let hint = "weights must be F32, F16 or BF16";
                    return Err(self.bad_tensor(info, reason, hint));
                }
            }
        }
        Ok(())
    }

    /// Reads bytes `start..start + dst.len()` of a tensor's data, whatever its type.
    ///
    /// # Errors
    /// `BadTensor` where it is missing or shorter, `Read`.
    pub fn read_exact_bytes(&self, name: &str, start: u64, dst: &mut [u8]) -> Result<(), IoError> {
        let info = self.require(name)?;
        self.check_range(info, start as usize, dst.len(), info.bytes as usize)?;
        let (path, file) = &self.files[info.file];
        file.read_exact_at(dst, info.offset + start).map_err(|e| IoError::reading(path, e))
    }

    /// The tensor, if it has that many elements.
    fn require_elems(&self, name: &str, n_elems: usize) -> Result<&TensorInfo, IoError> {
        let info = self.require(name)?;
        if info.n_elems() == n_elems {
            return Ok(info);
        }
        let (n, shape) = (info.n_elems(), &info.shape);
        let reason = format!("has {n} elements (shape {shape:?}), but {n_elems} are needed");
        Err(self.bad_tensor(info, reason, BELONG_TOGETHER))
    }

    fn require(&self, name: &str) -> Result<&TensorInfo, IoError> {
        self.get(name).ok_or_else(|| {
            let reason = format!("is missing among {} tensors", self.tensors.len());
            IoError::bad_tensor(&self.files[0].0, name, reason, BELONG_TOGETHER)
        })
    }

    fn check_range(
        &self,
        info: &TensorInfo,
        start: usize,
        n: usize,
        of: usize,
    ) -> Result<(), IoError> {
        if start.checked_add(n).is_some_and(|end| end <= of) {
            return Ok(());
        }
        let reason = format!("{n} from {start} on do not lie within its {of}");
        Err(self.bad_tensor(info, reason, BELONG_TOGETHER))
    }

    fn bad_tensor(&self, info: &TensorInfo, reason: String, hint: &'static str) -> IoError {
        IoError::bad_tensor(&self.files[info.file].0, &info.name, reason, hint)
    }
}

/// Converts little-endian elements of `N` bytes.
fn convert<T, const N: usize>(dst: &mut [T], bytes: &[u8], widen: impl Fn([u8; N]) -> T) {
    let (elems, rest) = bytes.as_chunks::<N>();
    debug_assert!(rest.is_empty() && elems.len() == dst.len());
    for (x, &elem) in dst.iter_mut().zip(elems) {
        *x = widen(elem);
    }
}

/// `model.safetensors.index.json`: which shard holds which tensor.
struct ShardIndex {
    path: PathBuf,
    /// Sorted by name.
    shards: Vec<PathBuf>,
    /// Tensor name to index into `shards`.
    weight_map: BTreeMap<String, usize>,
}

impl ShardIndex {
    fn read(dir: &Path, index_path: &Path) -> Result<Self, IoError> {
        let bad = |reason: String| {
            IoError::bad_file(
                index_path,
                reason,
                "fetch the index and its shards again from one place",
            )
        };
        let index = read_json(index_path, MAX_INDEX_BYTES)?;
        let Some(Value::Object(map)) = index.get("weight_map") else {
            return Err(bad("has no object `weight_map`".into()));
        };
        let mut names = BTreeMap::new();
        for (tensor, shard) in map {
            let Value::String(shard) = shard else {
                return Err(bad(format!("`weight_map` of `{tensor}` is not a string")));
            };
            if !is_shard_name(shard) {
                return Err(bad(format!(
                    "`weight_map` sends `{tensor}` to `{shard}`, which is not a plain .safetensors file name"
                )));
            }
            names.insert(shard.as_str(), 0);
        }
        if names.is_empty() {
            return Err(bad("`weight_map` is empty".into()));
        }
        let mut shards = Vec::with_capacity(names.len());
        for (shard, idx) in &mut names {
            *idx = shards.len();
            let shard_path = dir.join(shard);
            stay_inside(dir, &shard_path)?;
            shards.push(shard_path);
        }
        let weight_map = map
            .iter()
            .filter_map(|(tensor, shard)| Some((tensor.clone(), names[shard.as_str()?])))
            .collect();
        Ok(Self { path: index_path.into(), shards, weight_map })
    }

    fn shard_of(&self, tensor: &str) -> Option<usize> {
        self.weight_map.get(tensor).copied()
    }

    /// Every tensor of the index must have been found in its shard.
    fn check_complete(&self, dir: &SafetensorsDir) -> Result<(), IoError> {
        match self.weight_map.iter().find(|(tensor, _)| dir.get(tensor).is_none()) {
            None => Ok(()),
            Some((tensor, &shard)) => {
                let reason = format!("is not in its shard {}", self.shards[shard].display());
                let hint = "fetch the index and its shards again from one place";
                Err(IoError::bad_tensor(&self.path, tensor, reason, hint))
            }
        }
    }
}

/// A safetensors file's name without any way out of its directory.
fn is_shard_name(name: &str) -> bool {
    name.ends_with(".safetensors") && is_plain_name(name) && !name.contains("..")
}

/// The error for a directory without safetensors, which tells apart what people usually have there.
fn no_weights(dir: &Path) -> IoError {
    if is_interrupted(dir) {
        return IoError::bad_file(dir, "holds no complete model", interrupted_hint(dir));
    }
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    let is_pickle = |name: &&String| {
        let path = Path::new(name.as_str());
        path.extension().is_some_and(|e| e == "bin" || e == "pt" || e == "pth" || e == "ckpt")
    };
    match names.iter().find(is_pickle) {
        Some(pickle) => IoError::bad_file(
            dir,
            format!("holds `{pickle}` but no model.safetensors"),
            "pickle files can run code and are never read: save the model again with \
             `model.save_pretrained(dir, safe_serialization=True)`",
        ),
        None => IoError::bad_file(
            dir,
            "holds neither model.safetensors nor model.safetensors.index.json",
            "name a Hugging Face model directory, or make a fresh one with `ounce init`",
        ),
    }
}

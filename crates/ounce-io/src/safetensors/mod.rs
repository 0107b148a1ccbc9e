//! Safetensors: the file format in which models come and go.
//!
//! A file is `u64` header length, little endian; the header, a JSON object from tensor name to `dtype`, `shape` and
//! `data_offsets`; then the data. Neither side ever holds more than one small buffer of data.
//!
//! Files in reading order: `header.rs` (what a header must satisfy), `read.rs`, `write.rs`.
//! Source: the format description in the safetensors repository's README.

mod header;
mod read;
mod write;

pub use header::{Dtype, MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo};
pub use read::SafetensorsDir;
pub(crate) use write::safetensors_bytes;
pub use write::{ByteSink, SafetensorsWriter, TensorSpec};

//! GGUF: the file format of llama.cpp and Ollama, in and out.
//!
//! A file is a header (keys with typed values, the vocabulary among them, and the sizes of the tensors) and the data,
//! often quantised. [`GgufModel`] reads it as a Hugging Face model, [`GgufExport`] writes one. Nothing holds a tensor:
//! blocks are decoded and encoded through small buffers.
//!
//! Files in reading order: `block.rs` (element types), `header.rs` (what a header must satisfy), `read.rs`; `arch.rs`
//! (names of keys and tensors), `layout.rs` (rows that lie in another order), `config.rs`, `pre.rs` (pre-tokenizers),
//! `vocab.rs`, `model.rs`; `write.rs`, `vocab_fields.rs`, `export.rs`.
//! Source: the GGUF specification of ggml, version 3.

mod arch;
mod block;
mod config;
mod export;
mod header;
mod layout;
mod model;
mod pre;
mod read;
mod vocab;
mod vocab_fields;
mod write;

pub use block::GgmlType;
pub use export::{GGUF_FILE, GgufExport};
pub use header::{GgufArray, GgufTensor, GgufValue};
pub use model::GgufModel;
pub use read::{Gguf, is_gguf};

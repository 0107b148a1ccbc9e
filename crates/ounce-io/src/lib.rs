//! Bytes on disk: safetensors, tokenizers, datasets, token cache, training checkpoints.
//!
//! Everything that Ounce reads comes from somebody else and is checked before it is believed; everything that it
//! writes appears under its name only when it is complete. Nothing here holds a whole file, tensor or data set: data
//! goes by `pread` through small fixed buffers into buffers of the caller, because every byte of the process counts
//! against the user's budget. No file is mapped into memory, for the same reason.
//!
//! ```no_run
//! use std::path::Path;
//! use ounce_io::{BlockSampler, SafetensorsDir, TokenCache};
//!
//! # fn main() -> Result<(), ounce_io::IoError> {
//! let weights = SafetensorsDir::open(Path::new("model"))?;
//! let mut wte_vc = vec![0.0; 65 * 128];
//! weights.read_f32("transformer.wte.weight", &mut wte_vc)?;
//!
//! let cache = TokenCache::open_or_build(Path::new("out"), &["text.txt".into()], Path::new("model"))?;
//! let sampler = BlockSampler::new(cache, 64, 42)?;
//! let mut ids_bt = vec![0; 12 * 64];
//! sampler.fill_rows(0, 12, &mut ids_bt)?;
//! # Ok(())
//! # }
//! ```
//!
//! Files in reading order: `error.rs`; `json.rs` (strict, bounded), `hash.rs`, `window.rs`; `disk.rs` (the seam below
//! all writing), `temp.rs`, `atomic.rs` (one file), `model_files.rs` (names of a model's files), `staging.rs` and
//! `publication.rs` (a model directory); `safetensors/`; `gguf/`; `hf_dir.rs` (a model directory's side files),
//! `hub_cache.rs`; `checkpoint/`; `tokenizer/`; `dataset/` (rows and what they mean), `chat_template/` (conversations
//! to text), `text.rs` (training text in pieces), `pipeline.rs` (work on several threads, in order), `encode.rs` (text
//! to ids), `token_cache.rs`, `row_tokens.rs` (conversations to tokens), `shuffle.rs`, `mixture.rs` (several files
//! with weights), `packs.rs` (several samples in a row), `batches.rs`, `stream/` (data that is never tokenized whole);
//! `disk_speed.rs`; `testing/` (faults and fuzzing, for tests).

#![forbid(unsafe_code)]

mod atomic;
mod batches;
pub mod chat_template;
pub mod checkpoint;
pub mod dataset;
mod disk;
mod disk_speed;
mod encode;
mod error;
mod gguf;
mod hash;
mod hf_dir;
mod hub_cache;
mod json;
mod mixture;
mod model_files;
mod packs;
mod pipeline;
mod publication;
mod row_tokens;
mod safetensors;
mod shuffle;
mod staging;
mod stream;
mod temp;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod text;
mod token_cache;
mod tokenizer;
mod window;
pub use atomic::{AtomicFile, write_file};
pub use batches::{BlockSampler, EvalBlocks, RowSampler};
pub use dataset::source::PIECE_BYTES;
pub use dataset::{MAX_LINE_BYTES, RowOptions};
pub use disk::{Disk, check_room, real_disk};
pub use disk_speed::{DiskSpeed, disk_speed};
pub use error::{ErrorKind, IoError};
pub use gguf::{
    GGUF_FILE, GgmlType, Gguf, GgufArray, GgufExport, GgufModel, GgufTensor, GgufValue, is_gguf,
};
pub use hash::SourceHash;
pub use hf_dir::{
    MAX_CONFIG_BYTES, copy_side_files, copy_tokenizer_files, read_config, write_json,
};
pub use hub_cache::{DEFAULT_REVISION, HubName, cached_snapshot, hub_name, is_commit};
pub use json::{MAX_DEPTH, check_readable, parse_json, read_json};
pub use mixture::Mixture;
pub use packs::{PackNotes, pack_samples};
pub use publication::complete_publication;
pub use row_tokens::{EncodedRow, FileNotes, RowCounts, RowNotes, RowTokens, data_fingerprint};
pub use safetensors::{
    ByteSink, Dtype, MAX_HEADER_BYTES, MAX_TENSORS, SafetensorsDir, SafetensorsWriter, TensorInfo,
    TensorSpec,
};
pub use shuffle::Permutation;
pub use staging::StagingDir;
pub use stream::{
    StreamCursor, StreamDir, StreamEncoder, StreamOptions, StreamPlace, StreamWindow, WindowNotes,
    window_disk_bytes, write_window,
};
pub use text::{Piece, PieceStart, TextPieces};
pub use token_cache::{
    StreamNotes, TokenCache, cache_path, tokenize_to_cache, tokenize_to_cache_with,
};
pub use tokenizer::{
    END_OF_TEXT, IdStream, IdTable, MIN_BPE_VOCAB_SIZE, Tokenizer, TrainedTokenizer, Words,
    tokenizer_fingerprint, tokenizing_bytes, train_bpe, train_char,
};

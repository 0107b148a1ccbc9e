//! A Hugging Face `config.json` becomes a forward graph, under the parameter names that
//! `transformers` saves.
//!
//! [`ModelConfig::from_json`] reads a configuration and refuses every key that would change the
//! mathematics and is not supported; [`build()`] writes the model down with
//! [`ounce_ir::GraphBuilder`], a stage per embedding, attention half, MLP half and head.
//!
//! Files, in reading order: [`config`] (the union of the families, what is common to them),
//! `json` (typed look-ups that remember which keys were read), [`gpt2`], [`decoder`] (what the
//! Llama-like families share), a file per such family (`llama`, `mistral`, `qwen2`, `qwen3`,
//! `gemma2`, `gemma3`, `phi3`, `smollm3`, `olmo2`), [`rope`] (rotary frequencies and their scaling
//! variants), [`mod@preset`] (published sizes, for measurements).
//!
//! ```
//! use ounce_models::{ModelConfig, Purpose, build};
//! let config = ModelConfig::from_json(
//!     r#"{"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97}"#,
//! )?;
//! let graph = build(&config, Purpose::Loss, 0.1)?;
//! // Embedding, two layers of two halves, head.
//! assert_eq!(graph.stages.len(), 6);
//! # Ok::<(), ounce_models::ModelError>(())
//! ```
#![forbid(unsafe_code)]

pub mod config;
mod json;

pub mod decoder;
pub mod gpt2;

mod gemma2;
mod gemma3;
mod llama;
mod mistral;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod smollm3;

pub mod preset;
pub mod rope;

pub use config::{
    Family, ModelConfig, ModelError, Purpose, SpecialTokens, alternative_name, build,
    build_for_length, is_ignored_tensor,
};
pub use decoder::{DecoderConfig, Layer};
pub use gpt2::Gpt2Config;
pub use preset::{PRESETS, preset};
pub use rope::{RopeConfig, RopeScaling};

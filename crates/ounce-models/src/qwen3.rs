//! Qwen3 (dense): Llama with a norm of every head of queries and keys, heads of a size of their own,
//! and perhaps windows in the upper layers.
//!
//! Source: `[Yang25]`; names as `Qwen3ForCausalLM`.

use serde_json::json;

use crate::decoder::{Blocks, Defaults, Definition, QkNorm};
use crate::qwen2::{DEFAULTS, read_windows, write_windows};

pub(crate) const QWEN3: Definition = Definition {
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    blocks: Blocks { qk_norm: QkNorm::PerHead, ..Blocks::LLAMA },
    defaults: Defaults { head_dim: Some(128), ..DEFAULTS },
    harmless: &[],
    read: |r, c| {
        c.attention_bias = r.bool("attention_bias", false)?;
        read_windows(r, c)?;
        c.read_rope(r)
    },
    write: |c, map| {
        map.insert("attention_bias".to_owned(), json!(c.attention_bias));
        write_windows(c, map);
    },
};

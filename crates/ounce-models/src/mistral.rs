//! Mistral: Llama whose every layer looks back no further than a window.
//!
//! Source: `[Jiang23]`; names as `MistralForCausalLM`.

use ounce_ir::Gate;
use serde_json::json;

use crate::decoder::{Blocks, Defaults, Definition};

pub(crate) const MISTRAL: Definition = Definition {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    blocks: Blocks::LLAMA,
    defaults: Defaults {
        vocab_size: 32000,
        max_positions: 131_072,
        n_kv_heads: Some(8),
        head_dim: None,
        rms_norm_eps: 1e-6,
        theta: 10000.0,
        tied: false,
        bos: Some(1),
        eos: Some(2),
        activation: ("hidden_act", Gate::Silu),
    },
    harmless: &[],
    read: |r, c| {
        c.window = r.window("sliding_window", Some(4096))?;
        for layer in &mut c.layers {
            layer.windowed = c.window.is_some();
        }
        c.read_rope(r)
    },
    write: |c, map| {
        map.insert("sliding_window".to_owned(), json!(c.window));
    },
};

//! Llama 1 to 3.x, SmolLM and SmolLM2: RMS norms before each half, rotary positions, grouped heads,
//! SwiGLU, perhaps biases.
//!
//! Source: `[Touvron23]`; names as `LlamaForCausalLM`.

use ounce_ir::Gate;
use serde_json::json;

use crate::decoder::{Blocks, Defaults, Definition};

pub(crate) const LLAMA: Definition = Definition {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    blocks: Blocks::LLAMA,
    defaults: Defaults {
        vocab_size: 32000,
        max_positions: 2048,
        n_kv_heads: None,
        head_dim: None,
        rms_norm_eps: 1e-6,
        theta: 10000.0,
        tied: false,
        bos: Some(1),
        eos: Some(2),
        activation: ("hidden_act", Gate::Silu),
    },
    // How a matrix product was split in training; a note of SmolLM2.
    harmless: &["pretraining_tp", "is_llama_config"],
    read: |r, c| {
        c.attention_bias = r.bool("attention_bias", false)?;
        c.mlp_bias = r.bool("mlp_bias", false)?;
        r.only("rope_interleaved", &json!(false), "only rotation by halves is built")?;
        c.read_rope(r)
    },
    write: |c, map| {
        map.insert("attention_bias".to_owned(), json!(c.attention_bias));
        map.insert("mlp_bias".to_owned(), json!(c.mlp_bias));
    },
};

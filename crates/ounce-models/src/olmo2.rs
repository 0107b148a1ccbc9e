//! OLMo 2: Llama with norms behind each half instead of before it, and of all queries and all keys.
//!
//! Source: `[OLMoTeam24]`; names as `Olmo2ForCausalLM`.

use ounce_ir::Gate;
use serde_json::json;

use crate::decoder::{Blocks, Defaults, Definition, Norms, QkNorm};

pub(crate) const OLMO2: Definition = Definition {
    model_type: "olmo2",
    architecture: "Olmo2ForCausalLM",
    blocks: Blocks { norms: Norms::BEHIND, qk_norm: QkNorm::Whole, ..Blocks::LLAMA },
    defaults: Defaults {
        vocab_size: 50304,
        max_positions: 2048,
        n_kv_heads: None,
        head_dim: None,
        rms_norm_eps: 1e-5,
        theta: 10000.0,
        tied: false,
        bos: None,
        eos: Some(50279),
        activation: ("hidden_act", Gate::Silu),
    },
    harmless: &[],
    read: |r, c| {
        c.attention_bias = r.bool("attention_bias", false)?;
        c.read_rope(r)
    },
    write: |c, map| {
        map.insert("attention_bias".to_owned(), json!(c.attention_bias));
    },
};

//! Phi-3 and Phi-4-mini: Llama with one matrix for queries, keys and values and one for gate and up,
//! perhaps a window in every layer, and positions that may turn a part of each head and be stretched
//! by `longrope`.
//!
//! Source: `[Abdin24]`; names as `Phi3ForCausalLM`.

use ounce_ir::Gate;
use serde_json::{Value, json};

use crate::decoder::{Blocks, Defaults, Definition};
use crate::rope::{RopeConfig, RopeScaling};

pub(crate) const PHI3: Definition = Definition {
    model_type: "phi3",
    architecture: "Phi3ForCausalLM",
    blocks: Blocks { packed: true, ..Blocks::LLAMA },
    defaults: Defaults {
        vocab_size: 32064,
        max_positions: 4096,
        n_kv_heads: None,
        head_dim: None,
        rms_norm_eps: 1e-5,
        theta: 10000.0,
        tied: false,
        bos: Some(1),
        eos: Some(32000),
        activation: ("hidden_act", Gate::Silu),
    },
    // Dropout belongs to a run, not to a model.
    harmless: &["embd_pdrop", "resid_pdrop"],
    read: |r, c| {
        let no = Value::Bool(false);
        for key in ["attention_bias", "mlp_bias", "lm_head_bias"] {
            r.only(key, &no, "Phi-3 has no biases")?;
        }
        for key in ["full_attn_mod", "interpolate_factor"] {
            r.only(key, &json!(1), "only layers that are all alike are built")?;
        }
        c.window = r.window("sliding_window", None)?;
        for layer in &mut c.layers {
            layer.windowed = c.window.is_some();
        }
        let original = r.size("original_max_position_embeddings", Some(4096))?;
        c.rope = RopeConfig::read(r, c.head_dim, c.max_position_embeddings, c.rope.theta)?;
        match &mut c.rope.scaling {
            RopeScaling::Default => Ok(()),
            RopeScaling::LongRope { original_max_position_embeddings, .. } => {
                // Phi-3 has this beside its other rotary keys, also by default.
                *original_max_position_embeddings = original;
                Ok(())
            }
            _ => Err(r.unsupported("rope_type", "of another kind", "Phi-3 knows longrope")),
        }
    },
    write: |c, map| {
        if let RopeScaling::LongRope { original_max_position_embeddings, .. } = c.rope.scaling {
            let original = json!(original_max_position_embeddings);
            map.insert("original_max_position_embeddings".to_owned(), original);
        }
        map.insert("partial_rotary_factor".to_owned(), json!(c.rope.partial_rotary_factor));
        map.insert("sliding_window".to_owned(), json!(c.window));
        for key in ["embd_pdrop", "resid_pdrop"] {
            map.insert(key.to_owned(), json!(0.0));
        }
    },
};

//! SmolLM3: Llama in which every fourth layer does not know positions (NoPE), and such layers may
//! have a window.
//!
//! Sources: `[Bakouch25]`; `[Yang25b]` (layers without positions); names as `SmolLM3ForCausalLM`.

use ounce_ir::Gate;
use serde_json::json;

use crate::config::ModelError;
use crate::decoder::{Blocks, Defaults, Definition};

pub(crate) const SMOLLM3: Definition = Definition {
    model_type: "smollm3",
    architecture: "SmolLM3ForCausalLM",
    blocks: Blocks::LLAMA,
    defaults: Defaults {
        vocab_size: 128_256,
        max_positions: 32768,
        n_kv_heads: Some(4),
        head_dim: None,
        rms_norm_eps: 1e-6,
        theta: 2_000_000.0,
        tied: true,
        bos: Some(128_000),
        eos: Some(128_001),
        activation: ("hidden_act", Gate::Silu),
    },
    // How a matrix product was split in training; a number of Qwen2 that nothing reads.
    harmless: &["pretraining_tp", "max_window_layers"],
    read: |r, c| {
        c.attention_bias = r.bool("attention_bias", false)?;
        c.mlp_bias = r.bool("mlp_bias", false)?;
        let every = r.size("no_rope_layer_interval", Some(4))?;
        for (i, layer) in c.layers.iter_mut().enumerate() {
            layer.rotary = !(i as u64 + 1).is_multiple_of(every);
        }
        if let Some(rotary) = r.optional_numbers("no_rope_layers")? {
            if rotary.len() < c.layers.len() {
                let what = format!(
                    "no_rope_layers has {} entries, num_hidden_layers is {}",
                    rotary.len(),
                    c.layers.len()
                );
                return Err(ModelError::Inconsistent { what });
            }
            for (layer, rotary) in c.layers.iter_mut().zip(rotary) {
                layer.rotary = rotary != 0.0;
            }
        }
        let is_on = r.bool("use_sliding_window", false)?;
        c.window = r.window("sliding_window", None)?.filter(|_| is_on);
        let windowed: Vec<bool> =
            c.layers.iter().map(|layer| c.window.is_some() && !layer.rotary).collect();
        c.read_layer_types(r, |i| windowed[i])?;
        c.read_rope(r)
    },
    write: |c, map| {
        let rotary: Vec<u8> = c.layers.iter().map(|layer| u8::from(layer.rotary)).collect();
        map.insert("attention_bias".to_owned(), json!(c.attention_bias));
        map.insert("mlp_bias".to_owned(), json!(c.mlp_bias));
        map.insert("no_rope_layers".to_owned(), json!(rotary));
        map.insert("use_sliding_window".to_owned(), json!(c.window.is_some()));
        map.insert("sliding_window".to_owned(), json!(c.window));
        map.insert("layer_types".to_owned(), json!(c.layer_types()));
    },
};

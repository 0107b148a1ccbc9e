//! Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and perhaps windows in the
//! upper layers.
//!
//! Source: `[Yang24]`; names as `Qwen2ForCausalLM`.

use ounce_ir::Gate;
use serde_json::{Map, Value, json};

use crate::config::ModelError;
use crate::decoder::{Blocks, DecoderConfig, Defaults, Definition};
use crate::json::Reader;

pub(crate) const QWEN2: Definition = Definition {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    blocks: Blocks { o_bias: false, ..Blocks::LLAMA },
    defaults: DEFAULTS,
    harmless: &[],
    read: |r, c| {
        c.attention_bias = true;
        read_windows(r, c)?;
        c.read_rope(r)
    },
    write: write_windows,
};

/// Defaults of Qwen2, and but for the size of a head of Qwen3.
pub(crate) const DEFAULTS: Defaults = Defaults {
    vocab_size: 151_936,
    max_positions: 32768,
    n_kv_heads: Some(32),
    head_dim: None,
    rms_norm_eps: 1e-6,
    theta: 10000.0,
    tied: false,
    bos: None,
    eos: None,
    activation: ("hidden_act", Gate::Silu),
};

/// Windows as Qwen2 and Qwen3 have them: off unless `use_sliding_window`, and then from layer
/// `max_window_layers` on, or in the layers that `layer_types` says.
pub(crate) fn read_windows(r: &mut Reader<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    let is_on = r.bool("use_sliding_window", false)?;
    let window = r.window("sliding_window", Some(4096))?;
    c.window = window.filter(|_| is_on);
    let first = r.optional_u64("max_window_layers")?.unwrap_or(28);
    let has_window = c.window.is_some();
    c.read_layer_types(r, |i| has_window && i as u64 >= first)
}

/// The keys of [`read_windows`].
pub(crate) fn write_windows(c: &DecoderConfig, map: &mut Map<String, Value>) {
    map.insert("use_sliding_window".to_owned(), json!(c.window.is_some()));
    map.insert("sliding_window".to_owned(), json!(c.window));
    // Older versions of transformers read this number and not the list.
    let first = c.layers.iter().position(|layer| layer.windowed).unwrap_or(c.layers.len());
    map.insert("max_window_layers".to_owned(), json!(first));
    map.insert("layer_types".to_owned(), json!(c.layer_types()));
}

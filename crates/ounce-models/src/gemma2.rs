//! Gemma 2: norms around each half that multiply with `1 + w`, GeGLU, scaled embeddings, soft caps
//! on scores and logits, and windows in every other layer.
//!
//! Source: `[GemmaTeam24]`; names as `Gemma2ForCausalLM`.

use ounce_ir::{Gate, GeluKind};
use serde_json::{Map, Value, json};

use crate::config::ModelError;
use crate::decoder::{Blocks, DecoderConfig, Defaults, Definition, Norms, QkNorm};
use crate::json::Reader;

/// Keys of Gemma that `transformers` does not read either: the activation is `hidden_activation`,
/// and how a cache is laid out changes no result.
pub(crate) const HARMLESS: &[&str] = &["hidden_act", "cache_implementation"];

pub(crate) const GEMMA2: Definition = Definition {
    model_type: "gemma2",
    architecture: "Gemma2ForCausalLM",
    blocks: BLOCKS,
    defaults: DEFAULTS,
    harmless: HARMLESS,
    read: |r, c| {
        read_common(r, c)?;
        c.score_cap = r.soft_cap("attn_logit_softcapping", Some(50.0))?;
        c.logit_cap = r.soft_cap("final_logit_softcapping", Some(30.0))?;
        c.read_layer_types(r, |i| i % 2 == 0)?;
        c.read_rope(r)
    },
    write: write_common,
};

/// The wiring of Gemma 2, and but for norms of queries and keys of Gemma 3.
pub(crate) const BLOCKS: Blocks = Blocks {
    norms: Norms::AROUND,
    qk_norm: QkNorm::None,
    unit_offset: true,
    scaled_embedding: true,
    packed: false,
    o_bias: true,
};

/// Defaults of Gemma 2; Gemma 3 has some others.
pub(crate) const DEFAULTS: Defaults = Defaults {
    vocab_size: 256_000,
    max_positions: 8192,
    n_kv_heads: Some(4),
    head_dim: Some(256),
    rms_norm_eps: 1e-6,
    theta: 10000.0,
    tied: true,
    bos: Some(2),
    eos: Some(1),
    activation: ("hidden_activation", Gate::Gelu(GeluKind::Tanh)),
};

/// What both Gemmas read.
pub(crate) fn read_common(r: &mut Reader<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    c.attention_bias = r.bool("attention_bias", false)?;
    c.query_scalar = r.f64("query_pre_attn_scalar", 256.0)?;
    c.window = r.window("sliding_window", Some(4096))?;
    let no = json!(false);
    r.only("use_bidirectional_attention", &no, "only causal attention is built")
}

/// What both Gemmas write.
pub(crate) fn write_common(c: &DecoderConfig, map: &mut Map<String, Value>) {
    map.insert("attention_bias".to_owned(), json!(c.attention_bias));
    // Saved models have a whole number here, and some readers insist.
    let scalar = c.query_scalar;
    let whole = scalar.fract() == 0.0 && scalar < 1e15;
    let scalar = if whole { json!(scalar as u64) } else { json!(scalar) };
    map.insert("query_pre_attn_scalar".to_owned(), scalar);
    map.insert("sliding_window".to_owned(), json!(c.window));
    map.insert("layer_types".to_owned(), json!(c.layer_types()));
    map.insert("attn_logit_softcapping".to_owned(), json!(c.score_cap));
    map.insert("final_logit_softcapping".to_owned(), json!(c.logit_cap));
}

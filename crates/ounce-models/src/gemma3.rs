//! Gemma 3 (text): Gemma 2 with norms of every head of queries and keys instead of soft caps, and
//! windows in five of six layers, which have a rotary base of their own.
//!
//! Source: `[GemmaTeam25]`; names as `Gemma3ForCausalLM`.

use serde_json::{Map, Value, json};

use crate::config::ModelError;
use crate::decoder::{Blocks, DecoderConfig, Defaults, Definition, QkNorm};
use crate::gemma2::{BLOCKS, DEFAULTS, HARMLESS, read_common, write_common};
use crate::json::Reader;
use crate::rope::{RopeConfig, RopeScaling};

pub(crate) const GEMMA3: Definition = Definition {
    model_type: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    blocks: Blocks { qk_norm: QkNorm::PerHead, ..BLOCKS },
    defaults: Defaults {
        vocab_size: 262_208,
        max_positions: 131_072,
        theta: 1_000_000.0,
        ..DEFAULTS
    },
    harmless: HARMLESS,
    read: |r, c| {
        read_common(r, c)?;
        // `transformers` has the key and does not apply it.
        let hint = "no Gemma 3 has it: its queries and keys are normed instead";
        r.only("attn_logit_softcapping", &Value::Null, hint)?;
        c.logit_cap = r.soft_cap("final_logit_softcapping", None)?;
        let every = r.size("sliding_window_pattern", Some(6))?;
        c.read_layer_types(r, |i| !(i as u64 + 1).is_multiple_of(every))?;
        read_ropes(r, c)
    },
    write: |c, map: &mut Map<String, Value>| {
        write_common(c, map);
        map.insert("rope_local_base_freq".to_owned(), json!(c.local_theta));
    },
};

/// Two sets of rotary keys: `rope_theta` and `rope_scaling` for layers that see everything,
/// `rope_local_base_freq` for the others; or one under the name of each kind of layer.
fn read_ropes(r: &mut Reader<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    let local_theta = r.f64("rope_local_base_freq", 10000.0)?;
    c.local_theta = Some(local_theta);
    let is_nested = |map: &Map<String, Value>| map.contains_key("full_attention");
    let Some(map) = r.object("rope_parameters")?.filter(|map| is_nested(map)) else {
        return c.read_rope(r);
    };
    let mut nested = Reader::new(map, GEMMA3.model_type, "rope_parameters.");
    let (d, n) = (c.head_dim, c.max_position_embeddings);
    if let Some(full) = nested.object("full_attention")? {
        c.rope = RopeConfig::read_parameters(full, d, n, c.rope.theta)?;
    }
    if let Some(local) = nested.object("sliding_attention")? {
        let local = RopeConfig::read_parameters(local, d, n, local_theta)?;
        if local.scaling != RopeScaling::Default {
            let hint = "only default is built for layers with a window";
            return Err(nested.unsupported("sliding_attention", "another rope_type", hint));
        }
        c.local_theta = Some(local.theta);
    }
    nested.finish(&[])
}

//! The keys of a GGUF file as a `config.json`, and the other way round.
//!
//! Nothing is ignored: a key of the architecture that is neither in the tables of `arch.rs` nor known to change nothing
//! is refused by name, in both directions, because it may change what the model computes.
//!
//! Rotary positions: linear and YaRN stretching are keys in both formats. Llama 3's stretching is three numbers in
//! `config.json` but a factor for each pair of elements, the tensor `rope_freqs.weight`, in GGUF; the published models
//! share all numbers but one, so that one is looked for.

use serde_json::{Map, Value, json};

use super::arch::{ARCHITECTURES, Arch, KeyKind, known};
use super::read::Gguf;
use super::write::GgufField;
use crate::error::IoError;

/// The tensor of Llama 3's factors.
pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";

/// Keys of an architecture that are read elsewhere or change nothing.
const OTHER_KEYS: &[&str] = &[
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.attn_factor",
    "vocab_size",
    "tensor_data_layout",
];

/// Keys that say nothing if they have this value.
const NEUTRAL_KEYS: &[(&str, u64)] = &[("expert_count", 0), ("expert_used_count", 0)];

/// The numbers that all models with Llama 3's stretching share, and the factors that they have.
const LLAMA3_LOW: f64 = 1.0;
const LLAMA3_HIGH: f64 = 4.0;
const LLAMA3_CONTEXT: u64 = 8192;
const LLAMA3_FACTORS: [f64; 5] = [8.0, 32.0, 4.0, 16.0, 2.0];

const DAMAGED: &str = "the file is damaged: fetch it again";

/// The architecture of a file.
pub(super) fn arch_of(gguf: &Gguf) -> Result<&'static Arch, IoError> {
    let key = "general.architecture";
    let hint = "take a model of another family";
    let name = gguf.text(key).ok_or_else(|| gguf.bad_key(key, "is missing", hint))?;
    ARCHITECTURES.iter().find(|arch| arch.gguf == name).ok_or_else(|| {
        let reason = format!("is `{name}`; supported are {}", known(|arch| arch.gguf));
        gguf.bad_key(key, &reason, hint)
    })
}

/// The `config.json` of a file.
///
/// # Errors
/// `BadFile` for a key that is missing, wrong or not supported; `BadTensor` without an embedding.
pub(super) fn to_config(gguf: &Gguf, arch: &Arch) -> Result<Value, IoError> {
    refuse_unknown_keys(gguf, arch)?;
    let n_tensors = gguf.tensors().len() as u64;
    let mut map = Map::new();
    map.insert("architectures".into(), json!([arch.class]));
    map.insert("model_type".into(), json!(arch.model_type));
    for key in arch.keys {
        let name = format!("{}.{}", arch.gguf, key.gguf);
        let value = match key.kind {
            KeyKind::Number => gguf.f64(&name).filter(|x| x.is_finite()).map(|x| json!(x)),
            KeyKind::Size | KeyKind::OptionalSize => gguf.u64(&name).map(|n| json!(n)),
        };
        match value {
            // A graph is built from it, so no number of layers is believed that cannot be there.
            Some(n) if key.gguf == "block_count" && n.as_u64() > Some(n_tensors) => {
                let reason = format!("is {n}, but the file has {n_tensors} tensors");
                return Err(gguf.bad_key(&name, &reason, DAMAGED));
            }
            Some(value) => {
                map.insert(key.hf.into(), value);
            }
            None if key.kind == KeyKind::OptionalSize && !gguf.values().contains_key(&name) => {}
            None => {
                let hint = "convert the model again with a new llama.cpp";
                return Err(gguf.bad_key(&name, "is missing or no number", hint));
            }
        }
    }
    let embedding = gguf.get("token_embd.weight");
    let embedding = embedding
        .ok_or_else(|| gguf.bad_tensor("token_embd.weight", "is missing: there is no model"))?;
    map.insert("vocab_size".into(), json!(embedding.shape[0]));
    map.insert("tie_word_embeddings".into(), json!(gguf.get("output.weight").is_none()));
    for (key, name) in [("bos", "bos"), ("eos", "eos"), ("pad", "padding")] {
        let id = gguf.u64(&format!("tokenizer.ggml.{name}_token_id"));
        map.insert(format!("{key}_token_id"), json!(id));
    }
    let has = |name: &str| gguf.get(name).is_some();
    match arch.model_type {
        "llama" => {
            map.insert("hidden_act".into(), json!("silu"));
            map.insert("attention_bias".into(), json!(has("blk.0.attn_q.bias")));
            map.insert("mlp_bias".into(), json!(has("blk.0.ffn_gate.bias")));
        }
        "gpt2" => {
            map.insert("activation_function".into(), json!("gelu_new"));
        }
        _ => {
            map.insert("hidden_act".into(), json!("silu"));
        }
    }
    if arch.is_rotary {
        rotary_config(gguf, arch, &mut map)?;
    }
    Ok(Value::Object(map))
}

fn refuse_unknown_keys(gguf: &Gguf, arch: &Arch) -> Result<(), IoError> {
    for key in gguf.values().keys() {
        let Some(name) = key.strip_prefix(arch.gguf).and_then(|rest| rest.strip_prefix('.')) else {
            continue;
        };
        let is_known = arch.keys.iter().any(|k| k.gguf == name) || OTHER_KEYS.contains(&name);
        let is_neutral = NEUTRAL_KEYS.iter().any(|&(k, n)| k == name && gguf.u64(key) == Some(n));
        if !is_known && !is_neutral {
            let hint = "it may change what the model computes: take a model without it";
            return Err(gguf.bad_key(key, "is not supported", hint));
        }
    }
    Ok(())
}

/// Adds head size, base and stretching of rotary positions.
fn rotary_config(gguf: &Gguf, arch: &Arch, map: &mut Map<String, Value>) -> Result<(), IoError> {
    let key = |name: &str| format!("{}.{name}", arch.gguf);
    let heads = map["num_attention_heads"].as_u64().unwrap_or(0);
    let hidden = map["hidden_size"].as_u64().unwrap_or(0);
    let by_default = hidden.checked_div(heads).unwrap_or(0);
    let head_dim = map.get("head_dim").and_then(Value::as_u64).unwrap_or(by_default);
    // Not every family has the key.
    if head_dim == by_default && !matches!(arch.model_type, "llama" | "qwen3") {
        map.remove("head_dim");
    } else {
        map.insert("head_dim".into(), json!(head_dim));
    }
    let hint = "take a model that rotates whole heads";
    for name in ["rope.dimension_count", "attention.value_length"] {
        if gguf.u64(&key(name)).is_some_and(|n| n != head_dim) {
            let reason = format!("is not the {head_dim} elements of a head");
            return Err(gguf.bad_key(&key(name), &reason, hint));
        }
    }
    map.insert("rope_theta".into(), json!(gguf.f64(&key("rope.freq_base")).unwrap_or(10000.0)));
    let attention = key("rope.scaling.attn_factor");
    if gguf.f64(&attention).is_some_and(|x| x != 1.0) {
        let hint = "it changes what attention computes: take a model without it";
        return Err(gguf.bad_key(&attention, "is not 1, which is not supported", hint));
    }
    let factor = gguf.f64(&key("rope.scaling.factor"));
    // Llama.cpp's default, and no stretching by its word.
    let kind = gguf.text(&key("rope.scaling.type")).unwrap_or("linear");
    let scaling = match (kind, factor) {
        ("none", _) | ("linear", None | Some(0.0 | 1.0)) => Value::Null,
        ("linear", Some(factor)) => json!({"rope_type": "linear", "factor": factor}),
        ("yarn", Some(factor)) => {
            let original = gguf.u64(&key("rope.scaling.original_context_length"));
            let context = original.map_or(map["max_position_embeddings"].clone(), Value::from);
            json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": context,
            })
        }
        (other, _) => {
            let reason = format!("is `{other}`, which is not supported with these numbers");
            let hint = "supported are none, linear and yarn with a factor";
            return Err(gguf.bad_key(&key("rope.scaling.type"), &reason, hint));
        }
    };
    let scaling = match gguf.get(ROPE_FREQS) {
        None => scaling,
        Some(tensor) => {
            let unlike = || gguf.bad_tensor(ROPE_FREQS, "holds factors that are not Llama 3's");
            // Before a table is made whose length the file says.
            if tensor.n_elems() as u64 != head_dim / 2 {
                return Err(unlike());
            }
            let mut found = vec![0.0; tensor.n_elems()];
            gguf.read_f32_at(tensor, 0, &mut found)?;
            let theta = map["rope_theta"].as_f64().unwrap_or(0.0);
            let fits = |factor: &f64| is_close(&found, &llama3_factors(theta, head_dim, *factor));
            let factor = LLAMA3_FACTORS.into_iter().find(fits).filter(|_| scaling.is_null());
            let factor = factor.ok_or_else(unlike)?;
            json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": LLAMA3_CONTEXT,
            })
        }
    };
    if !scaling.is_null() {
        map.insert("rope_scaling".into(), scaling);
    }
    Ok(())
}

fn is_close(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-3 * b.abs())
}

/// What each pair's frequency is divided by: short wavelengths stay, long ones are stretched, those between blended.
/// Source: Meta's Llama 3.1 reference.
fn llama3_factors(theta: f64, head_dim: u64, factor: f64) -> Vec<f32> {
    let context = LLAMA3_CONTEXT as f64;
    let pair = |i: u64| {
        let wavelength =
            std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim.max(1) as f64);
        let turns = context / wavelength;
        if turns > LLAMA3_HIGH {
            1.0
        } else if turns < LLAMA3_LOW {
            factor as f32
        } else {
            let smooth = (turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW);
            (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
        }
    };
    (0..head_dim / 2).map(pair).collect()
}

/// What a `config.json` becomes in a GGUF file.
#[derive(Debug)]
pub(super) struct FromConfig {
    pub(super) arch: &'static Arch,
    pub(super) fields: Vec<(String, GgufField)>,
    /// The tensor [`ROPE_FREQS`].
    pub(super) rope_freqs: Option<Vec<f32>>,
    pub(super) n_heads: usize,
    pub(super) n_kv_heads: usize,
}

/// The keys of a GGUF file for the model of `config`.
///
/// # Errors
/// What a message says about `config.json`: a key that is missing or that llama.cpp has nothing for.
pub(super) fn from_config(config: &Value) -> Result<FromConfig, String> {
    let model_type = config["model_type"].as_str().unwrap_or_default();
    let arch =
        ARCHITECTURES.iter().find(|arch| arch.model_type == model_type).ok_or_else(|| {
            let known = known(|arch| arch.model_type);
            format!("`model_type` {model_type:?} is not written as GGUF; written are {known}")
        })?;
    refuse_unsupported(config)?;
    let mut fields = vec![("general.architecture".to_owned(), GgufField::Text(arch.gguf.into()))];
    let mut put = |name: &str, field| fields.push((format!("{}.{name}", arch.gguf), field));
    let is_gpt2 = arch.model_type == "gpt2";
    let size = |key: &str| config[key].as_u64();
    let (heads, hidden) =
        if is_gpt2 { ("n_head", "n_embd") } else { ("num_attention_heads", "hidden_size") };
    let (n_heads, hidden) = (size(heads).unwrap_or(0), size(hidden).unwrap_or(0));
    let head_dim = size("head_dim").unwrap_or(hidden.checked_div(n_heads).unwrap_or(0));
    for key in arch.keys {
        let by_default = match key.hf {
            "n_inner" => Some(4 * hidden),
            "num_key_value_heads" => Some(n_heads),
            "head_dim" => Some(head_dim),
            _ => None,
        };
        let missing = || format!("lacks a number {:?}", key.hf);
        let field = match key.kind {
            KeyKind::Number => GgufField::F32(config[key.hf].as_f64().ok_or_else(missing)? as f32),
            KeyKind::Size | KeyKind::OptionalSize => {
                let n = size(key.hf).or(by_default).ok_or_else(missing)?;
                GgufField::U32(u32::try_from(n).map_err(|_| missing())?)
            }
        };
        put(key.gguf, field);
    }
    let vocab_size = size("vocab_size").ok_or("lacks a number \"vocab_size\"")?;
    put("vocab_size", GgufField::U32(vocab_size as u32));
    let mut rope_freqs = None;
    if arch.is_rotary {
        put("attention.value_length", GgufField::U32(head_dim as u32));
        put("rope.dimension_count", GgufField::U32(head_dim as u32));
        rope_freqs = rotary_fields(config, head_dim, &mut put)?;
    }
    let n_kv_heads = size("num_key_value_heads").unwrap_or(n_heads);
    Ok(FromConfig {
        arch,
        fields,
        rope_freqs,
        n_heads: n_heads as usize,
        n_kv_heads: n_kv_heads as usize,
    })
}

/// Refuses what llama.cpp computes otherwise than the configuration says.
fn refuse_unsupported(config: &Value) -> Result<(), String> {
    let only = |key: &str, allowed: &[Value]| {
        let value = &config[key];
        if value.is_null() || allowed.contains(value) {
            return Ok(());
        }
        Err(format!("{key:?} = {value} cannot be said in GGUF for this architecture"))
    };
    only("hidden_act", &[json!("silu")])?;
    only("activation_function", &[json!("gelu_new"), json!("gelu_pytorch_tanh")])?;
    only("use_sliding_window", &[json!(false)])?;
    only("scale_attn_by_inverse_layer_idx", &[json!(false)])?;
    only("scale_attn_weights", &[json!(true)])?;
    let window = config["sliding_window"].as_u64();
    let is_used = config["use_sliding_window"] != json!(false);
    let context = config["max_position_embeddings"].as_u64().unwrap_or(0);
    if let Some(window) = window.filter(|&w| is_used && w < context) {
        return Err(format!("\"sliding_window\" = {window} is below the context of {context}"));
    }
    Ok(())
}

/// Adds base and stretching of rotary positions; returns Llama 3's factors where it has them.
fn rotary_fields(
    config: &Value,
    head_dim: u64,
    put: &mut impl FnMut(&str, GgufField),
) -> Result<Option<Vec<f32>>, String> {
    let parameters = &config["rope_parameters"];
    let scaling =
        if config["rope_scaling"].is_null() { parameters } else { &config["rope_scaling"] };
    let theta = [&scaling["rope_theta"], &parameters["rope_theta"], &config["rope_theta"]];
    let theta = theta.into_iter().find_map(Value::as_f64).unwrap_or(10000.0);
    put("rope.freq_base", GgufField::F32(theta as f32));
    let kind = scaling["rope_type"].as_str().or_else(|| scaling["type"].as_str());
    let kind = kind.unwrap_or("default");
    if kind == "default" {
        return Ok(None);
    }
    let cannot = || format!("\"rope_scaling\" = {scaling} cannot be said in GGUF");
    let factor = scaling["factor"].as_f64().ok_or_else(cannot)?;
    let original = scaling["original_max_position_embeddings"]
        .as_u64()
        .or_else(|| config["original_max_position_embeddings"].as_u64());
    match kind {
        "linear" => {}
        "yarn" => {
            let context = original.or_else(|| config["max_position_embeddings"].as_u64());
            let context = context.ok_or_else(cannot)?;
            let is_usual = |key: &str, usual: f64| scaling[key].as_f64().is_none_or(|x| x == usual);
            let others = ["attention_factor", "mscale", "mscale_all_dim"];
            if !is_usual("beta_fast", 32.0)
                || !is_usual("beta_slow", 1.0)
                || others.iter().any(|key| !scaling[*key].is_null())
            {
                return Err(cannot());
            }
            put("rope.scaling.original_context_length", GgufField::U32(context as u32));
        }
        "llama3"
            if scaling["low_freq_factor"].as_f64() == Some(LLAMA3_LOW)
                && scaling["high_freq_factor"].as_f64() == Some(LLAMA3_HIGH)
                && original == Some(LLAMA3_CONTEXT) =>
        {
            return Ok(Some(llama3_factors(theta, head_dim, factor)));
        }
        _ => return Err(cannot()),
    }
    put("rope.scaling.type", GgufField::Text(kind.into()));
    put("rope.scaling.factor", GgufField::F32(factor as f32));
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_3_factors_leave_short_wavelengths_and_stretch_long_ones() {
        let factors = llama3_factors(500_000.0, 128, 8.0);
        assert_eq!((factors.len(), factors[0], factors[63]), (64, 1.0, 8.0));
        assert!(factors.windows(2).all(|pair| pair[0] <= pair[1]));
        assert!(factors.iter().any(|&x| x > 1.0 && x < 8.0));
    }

    #[test]
    fn what_gguf_cannot_say_is_refused_by_key() {
        let base = json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5, "vocab_size": 100,
        });
        assert!(from_config(&base).is_ok());
        for (key, value) in [
            ("hidden_act", json!("gelu")),
            ("model_type", json!("bert")),
            ("sliding_window", json!(64)),
            ("rope_scaling", json!({"rope_type": "longrope", "factor": 2.0})),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0, "mscale": 2.0})),
            ("rms_norm_eps", Value::Null),
        ] {
            let mut config = base.clone();
            config[key] = value;
            let message = from_config(&config).unwrap_err();
            assert!(message.contains(key), "{message}");
        }
    }
}

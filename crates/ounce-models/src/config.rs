//! What is common to the families: the union of their configurations, errors, tensor names.

use ounce_ir::{Graph, InferError};
use serde_json::{Map, Value, json};

use crate::decoder::{DecoderConfig, Definition};
use crate::gpt2::Gpt2Config;
use crate::json::Reader;
use crate::{gemma2, gemma3, llama, mistral, olmo2, phi3, qwen2, qwen3, smollm3};

/// Why a configuration cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ModelError {
    /// The text is no JSON object.
    #[error(
        "config.json is not a JSON object: {what}\n\
         hint: it should start with {{ and hold keys such as \"model_type\""
    )]
    NotAnObject {
        /// What the JSON parser says, with line and column.
        what: String,
    },
    /// A family that is not built.
    #[error(
        "model type {model_type:?} is not supported\n\
         hint: supported are {}",
        Family::ALL.map(Family::name).join(", ")
    )]
    UnknownFamily {
        /// `model_type`, or the architecture.
        model_type: String,
    },
    /// A required key is absent.
    #[error("config.json lacks {key:?}\nhint: a {family} configuration needs it")]
    Missing {
        /// The key.
        key: String,
        /// The family.
        family: &'static str,
    },
    /// A key has a value of the wrong type or out of range.
    #[error(
        "config.json: {key:?} is {found}, needs {want}\n\
         hint: compare with the config.json of a model of this family"
    )]
    WrongType {
        /// The key.
        key: String,
        /// The value found.
        found: String,
        /// What is needed.
        want: &'static str,
    },
    /// A key that changes the mathematics in a way that is not built.
    #[error("config.json: {key:?} = {value} is not supported\nhint: {hint}")]
    Unsupported {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What is supported.
        hint: String,
    },
    /// A key that is neither read nor known to be harmless.
    #[error(
        "config.json: unknown key {key:?} for a {family} model\n\
         hint: it may change what the model computes; remove it if it does not"
    )]
    UnknownKey {
        /// The key.
        key: String,
        /// The family.
        family: &'static str,
    },
    /// Two keys contradict each other.
    #[error("config.json: {what}\nhint: these sizes must fit together")]
    Inconsistent {
        /// Which, with their values.
        what: String,
    },
    /// More positions than the model has.
    #[error(
        "max_length {max_length} exceeds the {max_positions} positions of the model\n\
         hint: lower max_length; learned positions cannot be extended"
    )]
    TooLong {
        /// Asked for, in tokens.
        max_length: u64,
        /// What the model has.
        max_positions: u64,
    },
    /// A dropout probability outside [0, 1), or for a model that has no dropout.
    #[error("dropout {p} is not possible here\nhint: {hint}")]
    Dropout {
        /// Asked for.
        p: f32,
        /// What would be possible.
        hint: &'static str,
    },
    /// The graph does not fit together: an inconsistency that no check above found.
    #[error("the model cannot be built: {0}")]
    Graph(#[from] InferError),
}

/// Families of models, each in a file of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each family's file says what it is")]
pub enum Family {
    Gpt2,
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma2,
    Gemma3,
    Phi3,
    SmolLm3,
    Olmo2,
}

impl Family {
    /// All families.
    pub const ALL: [Self; 10] = [
        Self::Gpt2,
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Gemma2,
        Self::Gemma3,
        Self::Phi3,
        Self::SmolLm3,
        Self::Olmo2,
    ];

    /// What distinguishes a Llama-like family; `None` for GPT-2, which is not like Llama.
    pub(crate) fn definition(self) -> Option<&'static Definition> {
        Some(match self {
            Self::Gpt2 => return None,
            Self::Llama => &llama::LLAMA,
            Self::Mistral => &mistral::MISTRAL,
            Self::Qwen2 => &qwen2::QWEN2,
            Self::Qwen3 => &qwen3::QWEN3,
            Self::Gemma2 => &gemma2::GEMMA2,
            Self::Gemma3 => &gemma3::GEMMA3,
            Self::Phi3 => &phi3::PHI3,
            Self::SmolLm3 => &smollm3::SMOLLM3,
            Self::Olmo2 => &olmo2::OLMO2,
        })
    }

    /// The name in `model_type`.
    pub fn name(self) -> &'static str {
        self.definition().map_or("gpt2", |def| def.model_type)
    }

    /// Names that [`Family::from_name`] knows, in order of [`Family::ALL`].
    pub const NAMES: [&'static str; 10] = [
        "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3",
        "olmo2",
    ];

    /// The family of that short name.
    pub fn from_name(name: &str) -> Option<Self> {
        let at = Self::NAMES.iter().position(|n| *n == name)?;
        Some(Self::ALL[at])
    }

    /// The class in `architectures`.
    fn architecture(self) -> &'static str {
        self.definition().map_or("GPT2LMHeadModel", |def| def.architecture)
    }
}

/// What a graph is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Training and evaluation: ends in the loss of every token.
    Loss,
    /// Decoding: ends in the logits of the selected rows.
    Decode,
}

/// Ids of tokens with a meaning, carried along for `config.json`; the graph does not use them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SpecialTokens {
    /// Begin of text.
    pub bos: Option<u64>,
    /// End of text; some models have several.
    pub eos: Vec<u64>,
    /// Padding.
    pub pad: Option<u64>,
}

impl SpecialTokens {
    pub(crate) fn read(
        r: &mut Reader<'_>,
        bos: Option<u64>,
        eos: Option<u64>,
    ) -> Result<Self, ModelError> {
        let eos =
            if r.has("eos_token_id") { r.ids("eos_token_id")? } else { eos.into_iter().collect() };
        let bos = if r.has("bos_token_id") { r.optional_u64("bos_token_id")? } else { bos };
        Ok(Self { bos, eos, pad: r.optional_u64("pad_token_id")? })
    }

    pub(crate) fn write(&self, map: &mut Map<String, Value>) {
        let eos = match self.eos[..] {
            [] => Value::Null,
            [one] => json!(one),
            _ => json!(self.eos),
        };
        map.insert("bos_token_id".to_owned(), json!(self.bos));
        map.insert("eos_token_id".to_owned(), eos);
        map.insert("pad_token_id".to_owned(), json!(self.pad));
    }
}

/// The configuration of a model.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelConfig {
    /// GPT-2.
    Gpt2(Gpt2Config),
    /// Llama and the families like it.
    Decoder(DecoderConfig),
}

impl ModelConfig {
    /// Reads a Hugging Face `config.json`. A `null` is read as an absent key.
    ///
    /// # Errors
    /// [`ModelError`], naming the key: of an unsupported family, absent, of the wrong type, with an
    /// unsupported effect on the mathematics, or unknown.
    pub fn from_json(text: &str) -> Result<Self, ModelError> {
        let value: Value = serde_json::from_str(text)
            .map_err(|e| ModelError::NotAnObject { what: e.to_string() })?;
        let Value::Object(map) = value else {
            return Err(ModelError::NotAnObject { what: "another JSON value".to_owned() });
        };
        match family_of(&map)? {
            Family::Gpt2 => Gpt2Config::read(&map).map(Self::Gpt2),
            family => DecoderConfig::read(family, &map).map(Self::Decoder),
        }
    }

    /// The `config.json` of this model as `transformers` (4 and 5) reads it, for f32 weights.
    pub fn to_json(&self) -> String {
        let mut map = match self {
            Self::Gpt2(c) => c.write(),
            Self::Decoder(c) => c.write(),
        };
        map.insert("torch_dtype".to_owned(), json!("float32"));
        map.insert("use_cache".to_owned(), json!(true));
        let mut text = serde_json::to_string_pretty(&Value::Object(map))
            .expect("a map with string keys is always JSON");
        text.push('\n');
        text
    }

    /// The family.
    pub const fn family(&self) -> Family {
        match self {
            Self::Gpt2(_) => Family::Gpt2,
            Self::Decoder(c) => c.family,
        }
    }

    /// `V`, rows of the embedding.
    pub const fn vocab_size(&self) -> u64 {
        match self {
            Self::Gpt2(c) => c.vocab_size,
            Self::Decoder(c) => c.vocab_size,
        }
    }

    /// The dropout that `config.json` names, the largest of its keys; 0 in families that have none.
    pub fn dropout(&self) -> f64 {
        match self {
            Self::Gpt2(c) => c.dropout.into_iter().fold(0.0, f64::max),
            Self::Decoder(_) => 0.0,
        }
    }

    /// Ids of tokens with a meaning.
    pub const fn special_tokens(&self) -> &SpecialTokens {
        match self {
            Self::Gpt2(c) => &c.special_tokens,
            Self::Decoder(c) => &c.special_tokens,
        }
    }

    /// Replaces the ids of tokens with a meaning.
    pub fn set_special_tokens(&mut self, special_tokens: SpecialTokens) {
        match self {
            Self::Gpt2(c) => c.special_tokens = special_tokens,
            Self::Decoder(c) => c.special_tokens = special_tokens,
        }
    }

    /// Positions that the model was made for, in tokens. Rotary models compute beyond them, GPT-2
    /// cannot.
    pub const fn max_positions(&self) -> u64 {
        match self {
            Self::Gpt2(c) => c.n_positions,
            Self::Decoder(c) => c.max_position_embeddings,
        }
    }

    /// `L`, layers (each an attention half and an MLP half).
    pub const fn n_layers(&self) -> u64 {
        match self {
            Self::Gpt2(c) => c.n_layers,
            Self::Decoder(c) => c.layers.len() as u64,
        }
    }

    /// `C`, channels of the residual stream.
    pub const fn hidden(&self) -> u64 {
        match self {
            Self::Gpt2(c) => c.hidden,
            Self::Decoder(c) => c.hidden,
        }
    }

    /// Whether the head is the embedding.
    pub const fn is_tied(&self) -> bool {
        match self {
            Self::Gpt2(c) => c.tied,
            Self::Decoder(c) => c.tied,
        }
    }
}

/// The family by `model_type`, or by the architecture where that key is absent.
fn family_of(map: &Map<String, Value>) -> Result<Family, ModelError> {
    let architectures: Vec<&str> = map
        .get("architectures")
        .and_then(Value::as_array)
        .map(|a| a.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    let find = |is_it: &dyn Fn(Family) -> bool| Family::ALL.into_iter().find(|f| is_it(*f));
    let unknown = |name: &str| ModelError::UnknownFamily { model_type: name.to_owned() };
    let by_architecture = match architectures[..] {
        [] => None,
        [name] => Some(find(&|f| f.architecture() == name).ok_or_else(|| unknown(name))?),
        [first, ..] => return Err(unknown(first)),
    };
    let by_type = match map.get("model_type").and_then(Value::as_str) {
        None => None,
        Some(name) => Some(find(&|f| f.name() == name).ok_or_else(|| unknown(name))?),
    };
    match (by_type, by_architecture) {
        (Some(t), Some(a)) if t != a => Err(ModelError::Inconsistent {
            what: format!("model_type is {:?}, architectures are {architectures:?}", t.name()),
        }),
        (Some(family), _) | (None, Some(family)) => Ok(family),
        (None, None) => Err(unknown("(none given)")),
    }
}

/// The forward graph for rows of up to [`ModelConfig::max_positions`] tokens.
///
/// `dropout` is the probability of GPT-2's embedding and residual dropout. Dropout of attention
/// probabilities (`attn_pdrop`) does not exist in fused attention; the key is ignored.
///
/// # Errors
/// As [`build_for_length`].
pub fn build(config: &ModelConfig, purpose: Purpose, dropout: f32) -> Result<Graph, ModelError> {
    build_for_length(config, purpose, dropout, config.max_positions())
}

/// As [`build`], for rows of up to `max_length` tokens: rotary frequencies of the `dynamic` and
/// `longrope` variants depend on that length.
///
/// # Errors
/// [`ModelError::TooLong`] for learned positions, [`ModelError::Dropout`], or
/// [`ModelError::Inconsistent`].
pub fn build_for_length(
    config: &ModelConfig,
    purpose: Purpose,
    dropout: f32,
    max_length: u64,
) -> Result<Graph, ModelError> {
    if !(0.0..1.0).contains(&dropout) {
        return Err(ModelError::Dropout { p: dropout, hint: "give a probability in [0, 1)" });
    }
    match config {
        ModelConfig::Gpt2(c) => c.build(purpose, dropout, max_length),
        ModelConfig::Decoder(c) => c.build(purpose, dropout, max_length),
    }
}

/// The name under which some files hold the tensor `name`: those saved from a model without its
/// head lack the prefix of the body (`transformer.` in GPT-2, `model.` in the others).
pub fn alternative_name(name: &str) -> Option<&str> {
    name.strip_prefix("transformer.").or_else(|| name.strip_prefix("model."))
}

/// Whether files of this family hold a tensor of this name that is no parameter: constant buffers
/// of old versions, and the copy of the embedding that some files keep for a tied head.
pub fn is_ignored_tensor(config: &ModelConfig, name: &str) -> bool {
    let buffer = match config.family() {
        Family::Gpt2 => name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias"),
        _ => name.ends_with(".rotary_emb.inv_freq"),
    };
    buffer || (config.is_tied() && name == "lm_head.weight")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_family_is_found_by_type_or_architecture() {
        for text in [
            r#"{"model_type": "gpt2"}"#,
            r#"{"architectures": ["GPT2LMHeadModel"]}"#,
            r#"{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}"#,
        ] {
            assert_eq!(ModelConfig::from_json(text).unwrap().family(), Family::Gpt2, "{text}");
        }
    }

    #[test]
    fn every_family_has_a_short_name_and_is_found_by_its_own() {
        for (family, name) in Family::ALL.into_iter().zip(Family::NAMES) {
            assert_eq!(Family::from_name(name), Some(family));
            assert!(family.name().starts_with(name), "{name}");
        }
    }

    #[test]
    fn what_is_not_a_supported_model_is_named() {
        let error = |text: &str| ModelConfig::from_json(text).unwrap_err().to_string();
        assert!(error("[1]").starts_with("config.json is not a JSON object"));
        assert!(error("{").contains("line 1 column 1"));
        assert!(error("{}").contains("none given"));
        assert!(error(r#"{"model_type": "bert"}"#).contains("\"bert\""));
        assert!(
            error(r#"{"architectures": ["GPT2DoubleHeadsModel"]}"#).contains("GPT2DoubleHeads")
        );
        let both = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "gpt2"}"#;
        assert!(error(both).contains("LlamaForCausalLM"));
    }

    #[test]
    fn names_without_the_prefix_of_the_body_are_offered() {
        assert_eq!(alternative_name("transformer.wte.weight"), Some("wte.weight"));
        assert_eq!(alternative_name("model.norm.weight"), Some("norm.weight"));
        assert_eq!(alternative_name("lm_head.weight"), None);
    }

    #[test]
    fn buffers_and_tied_heads_are_no_parameters() {
        let config = ModelConfig::from_json(r#"{"model_type": "gpt2"}"#).unwrap();
        for name in ["h.0.attn.bias", "transformer.h.3.attn.masked_bias", "lm_head.weight"] {
            assert!(is_ignored_tensor(&config, name), "{name}");
        }
        for name in ["h.0.attn.c_attn.bias", "h.0.ln_1.bias", "wte.weight"] {
            assert!(!is_ignored_tensor(&config, name), "{name}");
        }
    }
}

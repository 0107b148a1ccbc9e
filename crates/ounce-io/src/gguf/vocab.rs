//! The vocabulary of a GGUF file as `tokenizer.json` and `tokenizer_config.json`.
//!
//! Two kinds exist here. `gpt2` is byte-level BPE: tokens and merges as they are, and the pre-tokenizer by its name.
//! `llama` is SentencePiece's BPE: tokens with scores, where of two neighbours the pair with the best score is joined.
//! That is BPE whose merges are all splits of every token into two tokens, the best score first; splits of one token
//! in the order of their ids, as `transformers` converts it.
//!
//! Every token is in the model's vocabulary under its own id; control tokens and user-defined ones are added tokens
//! besides. Complexity of `llama`: the sum of the tokens' lengths, times a look-up.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::header::GgufValue;
use super::pre::Pre;
use super::read::Gguf;
use crate::error::IoError;
use crate::tokenizer::MAX_IDS;

/// Most merges that are read or made: four times those of the largest published tokenizers.
const MAX_MERGES: usize = 2_000_000;
/// Longest token of a `llama` vocabulary that is split into merges, in characters.
const MAX_MERGED_CHARS: usize = 64;

const DAMAGED: &str = "the file is damaged: fetch it again";

/// Types of tokens.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;

/// The files of a tokenizer.
#[derive(Debug)]
pub(super) struct TokenizerFiles {
    pub(super) tokenizer: Value,
    pub(super) config: Value,
}

/// Reads the tokenizer of a file.
///
/// # Errors
/// `BadFile` for a kind that is not supported, or parts that do not fit together.
pub(super) fn tokenizer_files(gguf: &Gguf, context: u64) -> Result<TokenizerFiles, IoError> {
    let vocab = Vocab::read(gguf)?;
    let (model, normalizer, pre_tokenizer, decoder, adds_bos) =
        match gguf.text("tokenizer.ggml.model") {
            Some("gpt2") => vocab.byte_level(gguf)?,
            Some("llama") => vocab.sentence_piece(gguf)?,
            other => {
                let reason = format!("is {other:?}; supported are \"gpt2\" and \"llama\"");
                let hint = "take the tokenizer from the model's Hugging Face directory";
                return Err(gguf.bad_key("tokenizer.ggml.model", &reason, hint));
            }
        };
    let adds_bos = gguf.bool("tokenizer.ggml.add_bos_token").unwrap_or(adds_bos);
    let adds_eos = gguf.bool("tokenizer.ggml.add_eos_token").unwrap_or(false);
    let (bos, eos) = (vocab.named(gguf, "bos")?, vocab.named(gguf, "eos")?);
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocab.added_tokens(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(bos.filter(|_| adds_bos), eos.filter(|_| adds_eos)),
        "decoder": decoder,
        "model": model,
    });
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "model_max_length": context,
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
    });
    for (key, name) in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")] {
        if let Some((_, token)) = vocab.named(gguf, name)? {
            config[format!("{key}_token")] = json!(token);
        }
    }
    if let Some(template) = gguf.text("tokenizer.chat_template") {
        config["chat_template"] = json!(template);
    }
    Ok(TokenizerFiles { tokenizer, config })
}

/// Puts tokens around a text.
fn post_processor(bos: Option<(usize, &str)>, eos: Option<(usize, &str)>) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let special = |token: Option<(usize, &str)>, kind: u32| {
        token.map(|(_, name)| json!({"SpecialToken": {"id": name, "type_id": kind}}))
    };
    let around = |name: &str, kind: u32| -> Vec<Value> {
        let text = json!({"Sequence": {"id": name, "type_id": kind}});
        let parts = special(bos, kind).into_iter().chain([text]);
        parts.chain(special(eos, kind)).collect()
    };
    let mut tokens = Map::new();
    for (id, name) in bos.into_iter().chain(eos) {
        tokens.insert(name.into(), json!({"id": name, "ids": [id], "tokens": [name]}));
    }
    let pair = [around("A", 0), around("B", 1)].concat();
    json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": pair,
        "special_tokens": tokens,
    })
}

/// Model, normalizer, pre-tokenizer, decoder, and whether texts begin with a token by default.
type Parts = (Value, Value, Value, Value, bool);

/// The tokens, by id.
struct Vocab {
    tokens: Vec<String>,
    /// Empty where the file does not say: all are ordinary.
    kinds: Vec<i64>,
    ids: HashMap<String, usize>,
}

impl Vocab {
    fn read(gguf: &Gguf) -> Result<Self, IoError> {
        let key = "tokenizer.ggml.tokens";
        let n_tokens = gguf.array_len(key);
        if n_tokens > MAX_IDS {
            let reason = format!("holds {n_tokens} tokens, 1 to {MAX_IDS} are read");
            return Err(gguf.bad_key(key, &reason, DAMAGED));
        }
        let tokens = gguf.texts(key)?;
        let hint = "take the tokenizer from the model's Hugging Face directory";
        let tokens = tokens.ok_or_else(|| gguf.bad_key(key, "is missing", hint))?;
        if tokens.is_empty() {
            return Err(gguf.bad_key(key, "holds no tokens", DAMAGED));
        }
        let mut kinds = Vec::new();
        gguf.for_each("tokenizer.ggml.token_type", |value| {
            kinds.push(match value {
                GgufValue::Signed(kind) => kind,
                GgufValue::Unsigned(kind) => kind as i64,
                _ => 0,
            });
            Ok(())
        })?;
        if !kinds.is_empty() && kinds.len() != tokens.len() {
            let reason = format!("has {} entries for {} tokens", kinds.len(), tokens.len());
            return Err(gguf.bad_key("tokenizer.ggml.token_type", &reason, DAMAGED));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if let Some(first) = ids.insert(token.clone(), id) {
                let reason = format!("has `{token}` twice, as {first} and {id}");
                return Err(gguf.bad_key(key, &reason, DAMAGED));
            }
        }
        Ok(Self { tokens, kinds, ids })
    }

    fn kind(&self, id: usize) -> i64 {
        self.kinds.get(id).copied().unwrap_or(0)
    }

    /// The token that the key for `name` gives.
    fn named(&self, gguf: &Gguf, name: &str) -> Result<Option<(usize, &str)>, IoError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = gguf.u64(&key) else { return Ok(None) };
        if let Some(token) = self.tokens.get(id as usize) {
            return Ok(Some((id as usize, token)));
        }
        let reason = format!("is {id}, there are {} tokens", self.tokens.len());
        Err(gguf.bad_key(&key, &reason, DAMAGED))
    }

    fn added_tokens(&self) -> Vec<Value> {
        let is_added = |id: &usize| {
            matches!(self.kind(*id), CONTROL | USER_DEFINED) && !self.tokens[*id].is_empty()
        };
        let added = |id: usize| {
            json!({
                "id": id,
                "content": self.tokens[id],
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": self.kind(id) == CONTROL,
            })
        };
        (0..self.tokens.len()).filter(is_added).map(added).collect()
    }

    /// Token to id, without what only fills the embedding up.
    fn entries(&self) -> Map<String, Value> {
        let is_used = |(id, _): &(usize, &String)| self.kind(*id) != UNUSED;
        let entries = self.tokens.iter().enumerate().filter(is_used);
        entries.map(|(id, token)| (token.clone(), json!(id))).collect()
    }

    /// Byte-level BPE.
    fn byte_level(&self, gguf: &Gguf) -> Result<Parts, IoError> {
        let key = "tokenizer.ggml.pre";
        let name = gguf.text(key).unwrap_or("default");
        let pre = Pre::by_name(name).ok_or_else(|| {
            let reason = format!("is `{name}`; supported are {}", Pre::known());
            let hint = "take the tokenizer from the model's Hugging Face directory";
            gguf.bad_key(key, &reason, hint)
        })?;
        let key = "tokenizer.ggml.merges";
        if gguf.array_len(key) > MAX_MERGES {
            return Err(gguf.bad_key(key, &too_many_merges(), DAMAGED));
        }
        let mut merges = Vec::new();
        gguf.for_each(key, |value| {
            let GgufValue::Text(text) = &value else {
                return Err(gguf.bad_key(key, "is not a list of texts", DAMAGED));
            };
            // A space may be a token itself in the first place.
            let cut = text.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at);
            let pair = cut.map(|at| (&text[..at], &text[at + 1..]));
            let is_known = |(a, b): &(&str, &str)| {
                let joined = [*a, *b].concat();
                [*a, *b, &joined].iter().all(|token| self.ids.contains_key(*token))
            };
            let (a, b) = pair.filter(is_known).ok_or_else(|| {
                let reason = format!("number {} (`{text}`) joins no two tokens", merges.len());
                gguf.bad_key(key, &reason, DAMAGED)
            })?;
            // A merge to what only fills the embedding up has no entry to lead to.
            if [a, b, &[a, b].concat()].iter().all(|token| self.kind(self.ids[*token]) != UNUSED) {
                merges.push(json!([a, b]));
            }
            Ok(())
        })?;
        let model = json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre.ignores_merges,
            "vocab": self.entries(),
            "merges": merges,
        });
        let decoder = json!({
            "type": "ByteLevel",
            "add_prefix_space": true,
            "trim_offsets": true,
            "use_regex": true,
        });
        Ok((model, pre.normalizer(), pre.pre_tokenizer(), decoder, pre.adds_bos))
    }

    /// SentencePiece's BPE.
    fn sentence_piece(&self, gguf: &Gguf) -> Result<Parts, IoError> {
        let key = "tokenizer.ggml.scores";
        let mut scores = Vec::new();
        gguf.for_each(key, |value| {
            scores.push(if let GgufValue::Float(x) = value { x } else { 0.0 });
            Ok(())
        })?;
        if scores.len() != self.tokens.len() {
            let reason = format!("has {} scores for {} tokens", scores.len(), self.tokens.len());
            return Err(gguf.bad_key(key, &reason, DAMAGED));
        }
        let unknown = self.named(gguf, "unknown")?.map(|(_, token)| token);
        let model = json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": self.entries(),
            "merges": self.merges(&scores).map_err(|reason| gguf.bad_key(key, &reason, DAMAGED))?,
        });
        let prepends = gguf.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
        let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
        let normalizer = if prepends {
            let prepend = json!({"type": "Prepend", "prepend": "\u{2581}"});
            json!({"type": "Sequence", "normalizers": [prepend, spaces]})
        } else {
            spaces
        };
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prepends {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let decoder = json!({"type": "Sequence", "decoders": decoders});
        Ok((model, normalizer, Value::Null, decoder, true))
    }

    /// Every split of a token into two tokens, by score of the token and ids of the parts.
    fn merges(&self, scores: &[f64]) -> Result<Vec<Value>, String> {
        let mut splits: Vec<(usize, usize, usize)> = Vec::new();
        let used = |part: &str| self.ids.get(part).copied().filter(|&id| self.kind(id) != UNUSED);
        for (id, token) in self.tokens.iter().enumerate() {
            let is_made = !matches!(self.kind(id), CONTROL | UNUSED);
            if !is_made || token.chars().count() > MAX_MERGED_CHARS {
                continue;
            }
            let cuts = token.char_indices().skip(1);
            splits.extend(cuts.filter_map(|(at, _)| {
                let (left, right) = token.split_at(at);
                Some((id, used(left)?, used(right)?))
            }));
            if splits.len() > MAX_MERGES {
                return Err(too_many_merges());
            }
        }
        splits
            .sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then((a.1, a.2).cmp(&(b.1, b.2))));
        let pair = |&(_, left, right): &(usize, usize, usize)| {
            json!([self.tokens[left], self.tokens[right]])
        };
        Ok(splits.iter().map(pair).collect())
    }
}

fn too_many_merges() -> String {
    format!("makes more than {MAX_MERGES} merges, as no real vocabulary does")
}

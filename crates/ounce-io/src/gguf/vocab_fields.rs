//! A Hugging Face tokenizer as the keys of a GGUF file.
//!
//! Byte-level BPE becomes `gpt2` with the name of its pre-tokenizer; BPE with byte fallback becomes `llama`, whose
//! scores are the order of the merges: llama.cpp joins the pair with the best score where Hugging Face joins the pair
//! of the earliest merge. Other kinds have no name in llama.cpp here and are refused. Ids that the embedding has and
//! the tokenizer does not are filled up with unused tokens.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::{Value, json};

use super::pre::Pre;
use super::write::GgufField;
use crate::error::IoError;
use crate::json::{read_json, read_small_file};
use crate::tokenizer::{MAX_IDS, Tokenizer};

/// Longest template or configuration file.
const MAX_SIDE_FILE_BYTES: u64 = 16 << 20;

/// Types of tokens.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The keys of the tokenizer in `dir`, for an embedding of `vocab_size` rows.
///
/// # Errors
/// As loading a tokenizer; `BadFile` for a kind that cannot be written.
pub(super) fn tokenizer_fields(
    dir: &Path,
    vocab_size: usize,
) -> Result<Vec<(String, GgufField)>, IoError> {
    let loaded = Tokenizer::load(dir)?;
    let refuse = |reason: String| {
        let hint = "llama.cpp reads byte-level BPE with a known pre-tokenizer, and BPE with byte fallback; \
                    `--format hf` takes every tokenizer";
        IoError::bad_file(dir, reason, hint)
    };
    let tokenizer = loaded.to_json();
    let model = &tokenizer["model"];
    if model["type"] != "BPE" {
        return Err(refuse(format!(
            "has a tokenizer of type {}, which GGUF has no name for",
            model["type"]
        )));
    }
    let is_llama = model["byte_fallback"] == json!(true);
    let allowed: &[&str] = if is_llama { &["Prepend", "Replace"] } else { &["NFC"] };
    if let Some(step) = unknown_step(&tokenizer["normalizer"], allowed) {
        return Err(refuse(format!(
            "has a tokenizer that changes text by {step} first, which llama.cpp does not"
        )));
    }
    let vocab = Vocab::of(&tokenizer, vocab_size.min(MAX_IDS)).map_err(&refuse)?;
    let merges = merges(model);
    let mut fields = Vec::new();
    let mut put = |name: &str, field| fields.push((format!("tokenizer.ggml.{name}"), field));
    if is_llama {
        put("model", GgufField::Text("llama".into()));
        put("pre", GgufField::Text("default".into()));
        put("scores", GgufField::F32s(vocab.scores(&merges)));
        put("add_space_prefix", GgufField::Bool(prepends_space(&tokenizer)));
    } else {
        let pre = Pre::of(&tokenizer);
        let pre = pre.ok_or_else(|| {
            refuse("has a tokenizer whose pre-tokenizer llama.cpp has no name for".into())
        })?;
        put("model", GgufField::Text("gpt2".into()));
        put("pre", GgufField::Text(pre.names[0].into()));
        put("merges", GgufField::Texts(merges.iter().map(|(a, b)| format!("{a} {b}")).collect()));
    }
    put("token_type", GgufField::I32s(vocab.kinds(&tokenizer, is_llama)));
    put("tokens", GgufField::Texts(vocab.tokens));
    put("add_bos_token", GgufField::Bool(loaded.adds_bos()));
    for (name, id) in [("bos", loaded.bos_id()), ("eos", loaded.eos_id())] {
        if let Some(id) = id {
            put(&format!("{name}_token_id"), GgufField::U32(id));
        }
    }
    if let Some(&end_of_turn) = loaded.stop_ids().iter().find(|&&id| Some(id) != loaded.eos_id()) {
        put("eot_token_id", GgufField::U32(end_of_turn));
    }
    let config = dir.join("tokenizer_config.json");
    let config =
        if config.exists() { read_json(&config, MAX_SIDE_FILE_BYTES)? } else { Value::Null };
    for (key, name) in [("unk_token", "unknown"), ("pad_token", "padding")] {
        let token = config[key].as_str().or_else(|| config[key]["content"].as_str());
        let id = token.and_then(|token| vocab.ids.get(token));
        if let Some(&id) = id {
            put(&format!("{name}_token_id"), GgufField::U32(id as u32));
        }
    }
    if let Some(template) = chat_template(dir, &config)? {
        fields.push(("tokenizer.chat_template".into(), GgufField::Text(template)));
    }
    Ok(fields)
}

/// The template in its own file, or in the tokenizer's configuration.
pub(super) fn chat_template(dir: &Path, config: &Value) -> Result<Option<String>, IoError> {
    let path = dir.join("chat_template.jinja");
    if path.exists() {
        let bytes = read_small_file(&path, MAX_SIDE_FILE_BYTES)?;
        let text = String::from_utf8(bytes);
        return text.map(Some).map_err(|_| {
            IoError::bad_file(&path, "is not UTF-8", "save the template again as UTF-8")
        });
    }
    let template = &config["chat_template"];
    let named = template.as_array().and_then(|all| all.iter().find(|t| t["name"] == "default"));
    let text = template.as_str().or_else(|| named?["template"].as_str());
    Ok(text.map(str::to_owned))
}

/// The first step of a normalizer that is not of these types.
fn unknown_step<'a>(normalizer: &'a Value, allowed: &[&str]) -> Option<&'a str> {
    let all = normalizer["normalizers"].as_array();
    let all = all.map_or(std::slice::from_ref(normalizer), Vec::as_slice);
    let mut kinds = all.iter().filter(|s| !s.is_null()).map(|s| s["type"].as_str().unwrap_or("?"));
    kinds.find(|kind| !allowed.contains(kind))
}

/// Whether a text begins with a space that is not part of it.
fn prepends_space(tokenizer: &Value) -> bool {
    let has = |value: &Value, what: &str| value.to_string().contains(what);
    has(&tokenizer["normalizer"], "Prepend")
        || has(&tokenizer["pre_tokenizer"], "\"prepend_scheme\":\"first\"")
        || has(&tokenizer["pre_tokenizer"], "\"prepend_scheme\":\"always\"")
}

/// Merges in order, in either spelling: pairs, or texts with a space between.
fn merges(model: &Value) -> Vec<(&str, &str)> {
    let all = model["merges"].as_array().map_or(&[][..], Vec::as_slice);
    all.iter()
        .filter_map(|merge| match merge {
            Value::String(text) => text.split_once(' '),
            _ => Some((merge[0].as_str()?, merge[1].as_str()?)),
        })
        .collect()
}

/// The tokens, by id.
struct Vocab {
    tokens: Vec<String>,
    ids: HashMap<String, usize>,
    /// Added tokens, and whether they are special.
    added: BTreeMap<usize, bool>,
}

impl Vocab {
    fn of(tokenizer: &Value, vocab_size: usize) -> Result<Self, String> {
        let mut tokens = vec![None; vocab_size];
        let mut put = |id: Option<u64>, token: &str| {
            let slot = id.and_then(|id| tokens.get_mut(id as usize));
            let slot = slot.ok_or_else(|| {
                format!("`{token}` has id {id:?}, the embedding has {vocab_size} rows")
            })?;
            *slot = Some(token.to_owned());
            Ok::<(), String>(())
        };
        for (token, id) in tokenizer["model"]["vocab"].as_object().into_iter().flatten() {
            put(id.as_u64(), token)?;
        }
        let mut added = BTreeMap::new();
        for token in tokenizer["added_tokens"].as_array().into_iter().flatten() {
            put(token["id"].as_u64(), token["content"].as_str().unwrap_or_default())?;
            let id = token["id"].as_u64().unwrap_or(0) as usize;
            added.insert(id, token["special"] == json!(true));
        }
        let fill =
            |(id, token): (usize, Option<String>)| token.unwrap_or_else(|| format!("[PAD{id}]"));
        let is_used: Vec<bool> = tokens.iter().map(Option::is_some).collect();
        let tokens: Vec<String> = tokens.into_iter().enumerate().map(fill).collect();
        let used = tokens.iter().enumerate().filter(|(id, _)| is_used[*id]);
        let ids = used.map(|(id, token)| (token.clone(), id)).collect();
        Ok(Self { tokens, ids, added })
    }

    /// The type of every token.
    fn kinds(&self, tokenizer: &Value, is_llama: bool) -> Vec<i32> {
        let unknown = tokenizer["model"]["unk_token"].as_str();
        let is_byte = |token: &str| token.len() == 6 && token.starts_with("<0x");
        let kind = |(id, token): (usize, &String)| match self.added.get(&id) {
            _ if is_llama && Some(token.as_str()) == unknown => UNKNOWN,
            Some(true) => CONTROL,
            Some(false) => USER_DEFINED,
            None if !self.ids.contains_key(token) => UNUSED,
            None if is_llama && is_byte(token) => BYTE,
            None => NORMAL,
        };
        self.tokens.iter().enumerate().map(kind).collect()
    }

    /// Scores that make llama.cpp join in the order of the merges: of a token, its earliest merge.
    fn scores(&self, merges: &[(&str, &str)]) -> Vec<f32> {
        // Last of all: tokens that no merge makes.
        let mut scores = vec![-1e9; self.tokens.len()];
        for (rank, (left, right)) in merges.iter().enumerate().rev() {
            if let Some(&id) = self.ids.get(&[*left, *right].concat()) {
                scores[id] = -(rank as f32) - 1.0;
            }
        }
        scores
    }
}

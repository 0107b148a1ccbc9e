//! Which ids begin and end a text.
//!
//! Rule: the tokenizer's own configuration decides (`tokenizer_config.json`, then `special_tokens_map.json`). The
//! model's files (`generation_config.json`, `config.json`) are believed only where their id is a special token of this
//! tokenizer: a fresh model's config may carry its family's default ids, which mean `"` or `!` to a small tokenizer.
//! Without any configuration the usual names are looked for among the special tokens.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer as Library};

use crate::error::IoError;
use crate::json::read_json;

/// The files that are read, in order of precedence.
pub(super) const CONFIG_FILES: [&str; 4] =
    ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"];

/// Tokens with their ids beside `vocab.json`.
pub(super) const ADDED_TOKENS: &str = "added_tokens.json";

/// Tokenizer configurations carry chat templates and token lists.
const MAX_BYTES: u64 = 16 << 20;

const BOS_NAMES: [&str; 3] = ["<s>", "<|begin_of_text|>", "<|endoftext|>"];
const EOS_NAMES: [&str; 3] = ["<|endoftext|>", "</s>", "<|end_of_text|>"];

/// The special ids of a tokenizer.
#[derive(Debug, Default)]
pub(super) struct SpecialIds {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    /// Ascending, with `eos` among them.
    pub(super) stop: Vec<u32>,
    pub(super) add_bos_token: Option<bool>,
}

impl SpecialIds {
    /// Reads the configuration files in `dir` that exist.
    ///
    /// # Errors
    /// `Read`, `BadFile`, `BadLine`.
    pub(super) fn read(dir: &Path, library: &Library) -> Result<Self, IoError> {
        let mut configs = Vec::new();
        for name in CONFIG_FILES {
            let path = dir.join(name);
            configs.push(if path.exists() { read_json(&path, MAX_BYTES)? } else { Value::Null });
        }
        let (named, numbered) = configs.split_at(2);
        let eos = find(library, named, numbered, "eos_token", &EOS_NAMES);
        let mut stop: Vec<u32> = eos.into_iter().collect();
        stop.extend(
            numbered.iter().flat_map(|config| special_ids(library, &config["eos_token_id"])),
        );
        stop.sort_unstable();
        stop.dedup();
        Ok(Self {
            bos: find(library, named, numbered, "bos_token", &BOS_NAMES),
            eos,
            stop,
            add_bos_token: named[0]["add_bos_token"].as_bool(),
        })
    }
}

/// Adds the tokens of `added_tokens.json` and of `added_tokens_decoder` in `tokenizer_config.json`, which `vocab.json`
/// does not have. Special are those that the latter calls so, or that a configuration names.
///
/// # Errors
/// `BadFile` where an id is not the next one: the ids of the model would be others. `Read`, `BadLine`.
pub(super) fn add_tokens(dir: &Path, library: &mut Library) -> Result<(), IoError> {
    let read = |name: &str| {
        let path = dir.join(name);
        if path.exists() { read_json(&path, MAX_BYTES) } else { Ok(Value::Null) }
    };
    let configs = [read(CONFIG_FILES[0])?, read(CONFIG_FILES[1])?];
    let mut tokens = BTreeMap::new();
    for (content, id) in read(ADDED_TOKENS)?.as_object().into_iter().flatten() {
        let is_special = configs.iter().any(|config| names(config, content));
        tokens.extend(id.as_u64().map(|id| (id, (content.clone(), is_special))));
    }
    for (id, token) in configs[0]["added_tokens_decoder"].as_object().into_iter().flatten() {
        let content = token["content"].as_str().map(str::to_owned);
        let is_special = token["special"] == true;
        tokens.extend(id.parse().ok().zip(content).map(|(id, c)| (id, (c, is_special))));
    }
    for (id, (content, is_special)) in tokens {
        let next = library.get_vocab_size(true) as u64;
        let known = library.token_to_id(&content).map_or(next, u64::from);
        if known != id {
            let reason = format!("gives `{content}` the id {id}, where it is {known}");
            let hint =
                "save it again with `AutoTokenizer.save_pretrained`, which writes tokenizer.json";
            return Err(IoError::bad_file(&dir.join(ADDED_TOKENS), reason, hint));
        }
        let token = AddedToken::from(content, is_special).normalized(false);
        let added = library.add_tokens([token]);
        added.map_err(|e| IoError::bad_file(dir, e.to_string(), "fetch the files again"))?;
    }
    Ok(())
}

/// Whether a configuration has `token` as one of its special tokens.
fn names(config: &Value, token: &str) -> bool {
    let is_it = |value: &Value| value.as_str().or_else(|| value["content"].as_str()) == Some(token);
    config.as_object().is_some_and(|all| {
        all.iter().filter(|(key, _)| key.ends_with("_token")).any(|(_, value)| is_it(value))
    }) || config["additional_special_tokens"].as_array().is_some_and(|list| list.iter().any(is_it))
}

/// The id for `key` (`eos_token` or `bos_token`).
fn find(
    library: &Library,
    named: &[Value],
    numbered: &[Value],
    key: &str,
    usual: &[&str],
) -> Option<u32> {
    let by_name = |config: &Value| {
        let token = &config[key];
        library.token_to_id(token.as_str().or_else(|| token["content"].as_str())?)
    };
    let by_number = |config: &Value| special_ids(library, &config[format!("{key}_id")]).next();
    let by_usual_name =
        |name: &&str| library.token_to_id(name).filter(|&id| is_special(library, id));
    named
        .iter()
        .find_map(by_name)
        .or_else(|| numbered.iter().find_map(by_number))
        .or_else(|| usual.iter().find_map(by_usual_name))
}

/// The ids of a number or a list of numbers that are special tokens.
fn special_ids<'a>(library: &'a Library, value: &'a Value) -> impl Iterator<Item = u32> + 'a {
    let numbers = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    numbers
        .iter()
        .filter_map(|number| u32::try_from(number.as_u64()?).ok())
        .filter(|&id| is_special(library, id))
}

/// Whether `id` is a token that no ordinary text produces.
pub(super) fn is_special(library: &Library, id: u32) -> bool {
    library.get_added_vocabulary().get_added_tokens_decoder().get(&id).is_some_and(|t| t.special)
}

//! Which ids begin and end a text.
//!
//! Rule: the tokenizer's own configuration decides (`tokenizer_config.json`, then `special_tokens_map.json`). The
//! model's files (`generation_config.json`, `config.json`) are believed only where their id is a special token of this
//! tokenizer: a fresh model's config may carry its family's default ids, which mean `"` or `!` to a small tokenizer.
//! Without any configuration the usual names are looked for among the special tokens.

use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer as Library;

use crate::error::IoError;
use crate::json::read_json;

/// The files that are read, in order of precedence.
pub(super) const CONFIG_FILES: [&str; 4] =
    ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"];

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

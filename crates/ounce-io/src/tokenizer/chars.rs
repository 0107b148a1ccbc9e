//! The character tokenizer: one token per distinct character, in code point order, nothing else.
//!
//! On disk it is a `tokenizer.json` that every Hugging Face program reads: a WordLevel model behind a pre-tokenizer
//! that isolates each character, and a decoder that joins without spaces. Here it is a sorted table.
//! Complexity: O(1) per ASCII character, O(log V) per other one.

use serde::Deserialize;
use serde_json::{Value, json};

use super::Fault;

/// Matches any one character in the regular expressions of both engines of the `tokenizers` library.
const ANY_CHAR: &str = r"[\s\S]";

/// The characters by id.
#[derive(Debug)]
pub(super) struct CharTable {
    chars: Vec<char>,
    /// (character, id), sorted.
    by_char: Vec<(char, u32)>,
    ascii: [Option<u32>; 128],
}

/// As much of a `tokenizer.json` as tells its kind; the vocabulary is skipped without being stored.
#[derive(Deserialize)]
struct KindProbe {
    model: ModelProbe,
}

#[derive(Deserialize)]
struct ModelProbe {
    #[serde(rename = "type")]
    kind: Option<String>,
}

impl CharTable {
    /// The table whose ids are the positions in `chars`.
    fn new(chars: Vec<char>) -> Self {
        let mut by_char: Vec<(char, u32)> = chars.iter().copied().zip(0..).collect();
        by_char.sort_unstable();
        let mut ascii = [None; 128];
        for &(c, id) in by_char.iter().filter(|(c, _)| c.is_ascii()) {
            ascii[c as usize] = Some(id);
        }
        Self { chars, by_char, ascii }
    }

    /// The table of a `tokenizer.json` that is a character tokenizer in every part, `None` for any other.
    pub(super) fn recognise(json: &[u8]) -> Option<Self> {
        let probe: KindProbe = serde_json::from_slice(json).ok()?;
        if probe.model.kind.as_deref() != Some("WordLevel") {
            return None;
        }
        let mut found: Value = serde_json::from_slice(json).ok()?;
        let vocab = found["model"]["vocab"].take();
        let mut chars = vec![None; vocab.as_object()?.len()];
        for (token, id) in vocab.as_object()? {
            let mut token = token.chars();
            let (Some(c), None) = (token.next(), token.next()) else { return None };
            *chars.get_mut(id.as_u64()? as usize)? = Some(c);
        }
        let chars: Vec<char> = chars.into_iter().collect::<Option<_>>()?;
        let mut expected = tokenizer_json(&chars);
        expected["model"]["vocab"].take();
        (found == expected).then(|| Self::new(chars))
    }

    pub(super) fn len(&self) -> usize {
        self.chars.len()
    }

    /// Its `tokenizer.json`.
    pub(super) fn to_json(&self) -> Value {
        tokenizer_json(&self.chars)
    }

    pub(super) fn char(&self, id: u32) -> Option<char> {
        self.chars.get(id as usize).copied()
    }

    /// Appends the ids of `text`.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), Fault> {
        ids.reserve(text.len());
        for (at, c) in text.char_indices() {
            let id = if let Some(&id) = self.ascii.get(c as usize) {
                id
            } else {
                let found = self.by_char.binary_search_by_key(&c, |&(c, _)| c);
                found.ok().map(|at| self.by_char[at].1)
            };
            ids.push(id.ok_or_else(|| Fault {
                at,
                reason: format!(
                    "character `{}` (U+{:04X}) is not among the tokenizer's {} characters",
                    c.escape_debug(),
                    c as u32,
                    self.len()
                ),
            })?);
        }
        Ok(())
    }
}

/// The `tokenizer.json` of the character tokenizer with these characters.
pub(super) fn tokenizer_json(chars: &[char]) -> Value {
    let vocab: serde_json::Map<String, Value> =
        chars.iter().zip(0..).map(|(c, id): (&char, u32)| (c.to_string(), id.into())).collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": ANY_CHAR},
            "behavior": "Isolated",
            "invert": false
        },
        "post_processor": null,
        "decoder": {"type": "Fuse"},
        // The format wants the name of an unknown token; without such a token unknown characters are errors.
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    })
}

//! How much longer the steps of a tokenizer may make a text.
//!
//! Idea: a `tokenizer.json` may replace a letter by a text as long as it likes, and the letters of that one by others,
//! so that six lines of it ask for more memory than there is; bytes written as letters (`ByteLevel`) double each time.
//! A step's growth is the most bytes that it makes of one; steps in a row multiply. Published tokenizers stay below
//! 1,000 (ALBERT: NFKD, lower case and SentencePiece's table one after the other), and texts are encoded in pieces, so
//! that this bounds memory.
//!
//! Source: the steps of the `tokenizers` crate; the layout of SentencePiece's `precompiled_charsmap`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::Value;

/// Most bytes or tokens that one may become.
const MAX_GROWTH: u64 = 4096;
/// Of U+FDFA, whose compatibility form has 18 letters, rounded up.
const COMPATIBILITY_GROWTH: u64 = 12;
/// Of every other step: none makes more of a byte than a letter.
const PLAIN_GROWTH: u64 = 4;

/// What is read of a `tokenizer.json`.
#[derive(Deserialize)]
struct Steps {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
}

/// Says what in a `tokenizer.json` makes a text too long, if anything does. The library must not have loaded it: it
/// normalizes tokens at once.
pub(super) fn check(json: &[u8]) -> Result<(), String> {
    let steps: Steps = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    let named = [
        ("normalizer", &steps.normalizer),
        ("pre_tokenizer", &steps.pre_tokenizer),
        ("post_processor", &steps.post_processor),
        ("decoder", &steps.decoder),
    ];
    for (name, step) in named {
        let n = growth(step);
        if n > MAX_GROWTH {
            return Err(format!(
                "its {name} may make {n} bytes or tokens of one, at most {MAX_GROWTH} are"
            ));
        }
    }
    Ok(())
}

/// Most bytes that a step makes of one. What it is made of says what it is: the library reads steps without a type.
fn growth(step: &Value) -> u64 {
    let bytes = |key: &str| step[key].as_str().map(|text| text.len() as u64);
    let lists = ["normalizers", "pretokenizers", "processors", "decoders"];
    let steps = lists.into_iter().filter_map(|key| step[key].as_array());
    let mut n = steps.flatten().map(growth).fold(1, u64::saturating_mul);
    if let Some(content) = bytes("content") {
        n = n.saturating_mul(match step["pattern"]["String"].as_str() {
            Some(pattern) if !pattern.is_empty() => content.div_ceil(pattern.len() as u64).max(1),
            // It may match nothing, before every letter.
            _ => 1 + content,
        });
    }
    if let Some(prepended) = bytes("prepend") {
        // Before every piece, however short.
        n = n.saturating_mul(1 + prepended);
    }
    if let Some(table) = step.get("precompiled_charsmap") {
        n = n.saturating_mul(longest_entry(table.as_str().unwrap_or("")));
    }
    if let Some(single) = step.get("single") {
        n = n.saturating_mul(parts(single) * longest_token(&step["special_tokens"]));
    }
    n.saturating_mul(match step["type"].as_str() {
        None | Some("Sequence" | "Replace" | "Prepend" | "Precompiled" | "TemplateProcessing") => 1,
        // These cut and remove only.
        Some("Split" | "Digits" | "Punctuation" | "Whitespace" | "WhitespaceSplit") => 1,
        Some("UnicodeScripts" | "BertPreTokenizer" | "CharDelimiterSplit" | "FixedLength") => 1,
        Some("NFKC" | "NFKD" | "Nmt") => COMPATIBILITY_GROWTH,
        Some("NFC" | "Strip" | "StripAccents" | "Lowercase" | "ByteLevel") => 2,
        Some(_) => PLAIN_GROWTH,
    })
}

/// Parts of a template around a text, which may be one of them more than once.
fn parts(template: &Value) -> u64 {
    let n = match template {
        Value::String(text) => text.split_whitespace().count(),
        other => other.as_array().map_or(1, Vec::len),
    };
    n.max(1) as u64
}

/// Most ids that a special token of a template stands for.
fn longest_token(tokens: &Value) -> u64 {
    let n_ids = |token: &Value| token["ids"].as_array().map_or(1, Vec::len);
    let longest = match tokens {
        Value::Object(tokens) => tokens.values().map(n_ids).max(),
        other => other.as_array().and_then(|tokens| tokens.iter().map(n_ids).max()),
    };
    longest.unwrap_or(1).max(1) as u64
}

/// The longest text of SentencePiece's table: behind the length of its trie and the trie, each ends with a zero.
fn longest_entry(table: &str) -> u64 {
    let Ok(bytes) = STANDARD.decode(table) else { return u64::MAX };
    let Some((n_trie, rest)) = bytes.split_first_chunk::<4>() else { return u64::MAX };
    let texts = rest.get(u32::from_le_bytes(*n_trie) as usize..).unwrap_or(rest);
    texts.split(|&byte| byte == 0).map(|text| text.len() as u64).max().unwrap_or(1).max(1)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn replace(pattern: &Value, content: &str) -> Value {
        json!({"type": "Replace", "pattern": pattern, "content": content})
    }

    #[test]
    fn growth_is_that_of_the_steps_in_a_row() {
        let (space, spaces) = (json!({"String": " "}), json!({"Regex": " {2,}"}));
        let llama =
            [json!({"type": "Prepend", "prepend": "\u{2581}"}), replace(&space, "\u{2581}")];
        let table = STANDARD.encode([&[2, 0, 0, 0, 9, 9][..], b"ab\0abcdefghij\0c\0"].concat());
        let nested = json!({"type": "Sequence", "normalizers": [
            {"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "Lowercase"}]},
            {"type": "Precompiled", "precompiled_charsmap": table},
        ]});
        for (step, expected) in [
            (Value::Null, 1),
            (json!({"type": "Sequence", "normalizers": llama}), 12),
            (replace(&space, ""), 1),
            (replace(&spaces, "\u{2581}"), 4),
            (replace(&json!({"String": "``"}), "abc"), 2),
            (nested, 240),
            (json!({"single": "<s> $A $A", "special_tokens": {"<s>": {"ids": [1, 2]}}}), 6),
            (json!({"single": [{"Sequence": {}}], "special_tokens": [{"ids": [1]}]}), 1),
            (
                json!({"processors": [{"single": vec![json!({"Sequence": {}}); 50]}, {"single": "$A $A"}]}),
                100,
            ),
            (json!({"pretokenizers": vec![json!({"type": "Split"}); 70]}), 1),
            (json!({"pretokenizers": vec![json!({"type": "ByteLevel"}); 13]}), 8192),
            (json!({"pattern": {"String": "a"}, "content": "bcd"}), 3),
            (json!({"normalizers": [{"type": "NFC"}, {"prepend": "ab"}]}), 6),
            (json!({"type": "Precompiled", "precompiled_charsmap": "?"}), u64::MAX),
            (
                json!({"type": "Sequence", "decoders": vec![replace(&space, &"x".repeat(1000)); 9]}),
                u64::MAX,
            ),
        ] {
            assert_eq!(growth(&step), expected, "{step}");
        }
    }
}

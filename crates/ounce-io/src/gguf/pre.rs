//! Pre-tokenizers of byte-level BPE: llama.cpp's names for what `tokenizer.json` spells out.
//!
//! A name stands for regular expressions compiled into llama.cpp; here each is the `tokenizer.json` of the model that
//! the name comes from. A name that is not in the table is refused: the ids would be others, quietly.
//! Source: llama.cpp, `src/llama-vocab.cpp`; the published `tokenizer.json` of each model.

use serde_json::{Value, json};

/// How text is cut before merging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "one per switch of tokenizer.json")]
pub(super) struct Pre {
    /// Names in `tokenizer.ggml.pre`; the first is written.
    pub(super) names: &'static [&'static str],
    /// A regular expression, or none for GPT-2's own.
    pattern: Option<&'static str>,
    /// Whether every digit is a piece.
    single_digits: bool,
    /// Whether text is brought into Unicode's form C.
    normalizes: bool,
    /// Whether a piece that is a token is taken as it is.
    pub(super) ignores_merges: bool,
    /// Whether texts begin with the beginning-of-text token where the file does not say.
    pub(super) adds_bos: bool,
}

const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

const GPT2: Pre = Pre {
    names: &["gpt-2", "phi-2", "olmo", "mpt"],
    pattern: None,
    single_digits: false,
    normalizes: false,
    ignores_merges: false,
    adds_bos: false,
};

const ALL: &[Pre] = &[
    GPT2,
    Pre {
        names: &["smollm", "codeshell", "starcoder", "refact", "command-r"],
        single_digits: true,
        ..GPT2
    },
    Pre { names: &["qwen2", "deepseek-r1-qwen"], pattern: Some(QWEN2), normalizes: true, ..GPT2 },
    Pre { names: &["stablelm2"], pattern: Some(QWEN2), ..GPT2 },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3"],
        pattern: Some(LLAMA3),
        ignores_merges: true,
        adds_bos: true,
        ..GPT2
    },
    Pre { names: &["dbrx", "smaug-bpe"], pattern: Some(LLAMA3), ..GPT2 },
];

impl Pre {
    /// The pre-tokenizer that llama.cpp calls `name`.
    pub(super) fn by_name(name: &str) -> Option<Self> {
        ALL.iter().find(|pre| pre.names.contains(&name)).copied()
    }

    /// The names of all, for a message.
    pub(super) fn known() -> String {
        let names: Vec<&str> = ALL.iter().flat_map(|pre| pre.names).copied().collect();
        names.join(", ")
    }

    /// The one that a `tokenizer.json` has.
    pub(super) fn of(tokenizer: &Value) -> Option<Self> {
        let ignores_merges = tokenizer["model"]["ignore_merges"] == json!(true);
        let steps = steps(&tokenizer["pre_tokenizer"]);
        // A normalizer to form C is dropped by llama.cpp where it has the name of a model without one.
        let normalizes = tokenizer["normalizer"]["type"] == "NFC";
        let fits = |pre: &&Pre| {
            pre.ignores_merges == ignores_merges && steps == self::steps(&pre.pre_tokenizer())
        };
        let found: Vec<&Pre> = ALL.iter().filter(fits).collect();
        let exact = found.iter().find(|pre| pre.normalizes == normalizes);
        exact.or(found.first()).map(|pre| **pre)
    }

    /// `pre_tokenizer` of `tokenizer.json`.
    pub(super) fn pre_tokenizer(self) -> Value {
        let byte_level = json!({
            "type": "ByteLevel",
            "add_prefix_space": false,
            "trim_offsets": true,
            "use_regex": self.pattern.is_none(),
        });
        let first = match self.pattern {
            Some(pattern) => json!({
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": false,
            }),
            None if self.single_digits => json!({"type": "Digits", "individual_digits": true}),
            None => return byte_level,
        };
        json!({"type": "Sequence", "pretokenizers": [first, byte_level]})
    }

    /// `normalizer` of `tokenizer.json`.
    pub(super) fn normalizer(self) -> Value {
        if self.normalizes { json!({"type": "NFC"}) } else { Value::Null }
    }
}

/// What matters of a pre-tokenizer, in order.
fn steps(pre_tokenizer: &Value) -> Vec<String> {
    let all = pre_tokenizer["pretokenizers"].as_array();
    let all = all.map_or(std::slice::from_ref(pre_tokenizer), Vec::as_slice);
    let step = |step: &Value| match step["type"].as_str() {
        Some("ByteLevel") if step["add_prefix_space"] != json!(true) => {
            format!("bytes {}", step["use_regex"] != json!(false))
        }
        Some("Digits") => format!("digits {}", step["individual_digits"]),
        Some("Split") if step["invert"] != json!(true) => {
            format!("{} {}", step["behavior"], step["pattern"])
        }
        _ => format!("another: {step}"),
    };
    all.iter().map(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pre_tokenizer_is_found_by_what_it_writes() {
        for pre in ALL {
            let tokenizer = json!({
                "pre_tokenizer": pre.pre_tokenizer(),
                "normalizer": pre.normalizer(),
                "model": {"ignore_merges": pre.ignores_merges},
            });
            assert_eq!(Pre::of(&tokenizer), Some(*pre));
            assert_eq!(Pre::by_name(pre.names[0]), Some(*pre));
        }
        assert_eq!(Pre::of(&json!({"pre_tokenizer": {"type": "Whitespace"}})), None);
        assert_eq!(Pre::by_name("no such"), None);
    }
}

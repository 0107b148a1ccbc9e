//! Making small tokenizers from text: characters, or byte-level BPE.
//!
//! Both give the same files for the same text, whatever the machine. Memory is bounded: at most [`MAX_CHARS`]
//! characters are collected, and BPE counts the words of at most [`MAX_BPE_BYTES`] of text, taken evenly from all of
//! it where there is more.
//! Source of BPE: `[Sennrich16]`; byte-level: `[Radford19]` (GPT-2).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as Library};

use super::MAX_IDS;
use super::chars::tokenizer_json;
use crate::atomic::write_file;
use crate::dataset::{RowOptions, has_conversations};
use crate::error::IoError;
use crate::hf_dir::write_json;
use crate::text::TextPieces;

/// The end-of-text token of a trained BPE tokenizer, and of GPT-2.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// Least vocabulary of a byte-level BPE tokenizer: every byte and the end-of-text token.
pub const MIN_BPE_VOCAB_SIZE: usize = 257;
/// Most distinct characters of a character tokenizer.
const MAX_CHARS: usize = 1 << 16;
/// Most text that BPE merges are counted on.
const MAX_BPE_BYTES: u64 = 64 << 20;

/// A fresh tokenizer, ready to be saved.
#[derive(Debug)]
pub struct TrainedTokenizer {
    json: String,
    config: Value,
    n_tokens: usize,
}

impl TrainedTokenizer {
    /// Number of tokens. BPE gives fewer than asked for where the text has no more pairs to merge.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` into an existing directory.
    ///
    /// # Errors
    /// `Write`.
    pub fn save(&self, dir: &Path) -> Result<(), IoError> {
        write_file(&dir.join("tokenizer.json"), self.json.as_bytes())?;
        write_json(&dir.join("tokenizer_config.json"), &self.config)
    }
}

/// A character tokenizer for the text of `files`: its distinct characters in code point order, no special tokens.
///
/// # Errors
/// As reading the text; `BadFile` without any text or with more than 65,536 distinct characters.
pub fn train_char(files: &[PathBuf]) -> Result<TrainedTokenizer, IoError> {
    refuse_conversations(files)?;
    let mut pieces = TextPieces::open(files)?;
    let mut ascii = [false; 128];
    let mut others = BTreeSet::new();
    while let Some(piece) = pieces.next_piece()? {
        for c in piece.text.chars() {
            match ascii.get_mut(c as usize) {
                Some(seen) => *seen = true,
                None => {
                    others.insert(c);
                }
            }
        }
        if others.len() > MAX_CHARS {
            let reason = format!("more than {MAX_CHARS} distinct characters");
            return Err(IoError::bad_file(piece.path, reason, "use `--tokenizer bpe`"));
        }
    }
    let ascii = (0..128u8).map(char::from).filter(|&c| ascii[c as usize]);
    let chars: Vec<char> = ascii.chain(others).collect();
    if chars.is_empty() {
        return Err(no_text(files));
    }
    let mut json = tokenizer_json(&chars).to_string();
    json.push('\n');
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false
    });
    Ok(TrainedTokenizer { json, config, n_tokens: chars.len() })
}

/// A byte-level BPE tokenizer of at most `vocab_size` tokens for the text of `files`, with [`END_OF_TEXT`] as id 0.
///
/// # Errors
/// `Usage` for a vocabulary below [`MIN_BPE_VOCAB_SIZE`] or beyond what is read; as reading the text; `BadFile` without
/// any text.
pub fn train_bpe(files: &[PathBuf], vocab_size: usize) -> Result<TrainedTokenizer, IoError> {
    if vocab_size < MIN_BPE_VOCAB_SIZE {
        return Err(IoError::Usage {
            what: format!("a byte-level BPE vocabulary of {vocab_size} tokens is too small"),
            hint: format!("use at least {MIN_BPE_VOCAB_SIZE}: 256 bytes and the end-of-text token")
                .into(),
        });
    }
    if vocab_size > MAX_IDS {
        return Err(IoError::Usage {
            what: format!("a byte-level BPE vocabulary of {vocab_size} tokens is too large"),
            hint: format!("use at most {MAX_IDS}; 32000 to 128000 are usual").into(),
        });
    }
    // The library's thread pool would add memory that no one planned; the result does not depend on it.
    tokenizers::parallelism::set_parallelism(false);
    let failed = |e: tokenizers::Error| {
        IoError::bad_file(&files[0], format!("cannot train a tokenizer: {e}"), "report this text")
    };
    let sample = Sample::open(files)?;
    let mut library = Library::new(BPE::default());
    library.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)));
    library.with_decoder(Some(ByteLevel::default()));
    let bpe_trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocab_size)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .build();
    let mut trainer = TrainerWrapper::from(bpe_trainer);
    let state = Mutex::new(sample);
    let texts = std::iter::from_fn(|| state.lock().ok()?.next_text());
    library.train(&mut trainer, texts).map_err(failed)?;
    let sample = state.into_inner().map_err(|_| no_text(files))?;
    if let Some(error) = sample.failure {
        return Err(error);
    }
    if sample.n_text_bytes == 0 {
        return Err(no_text(files));
    }
    let n_tokens = library.get_vocab_size(true);
    let json = library.to_string(false).map_err(failed)?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "add_prefix_space": false,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT
    });
    Ok(TrainedTokenizer { json, config, n_tokens })
}

/// The pieces that BPE is counted on: every one, or every k-th of a large text.
struct Sample {
    pieces: TextPieces,
    take_every: u64,
    n_seen: u64,
    n_text_bytes: u64,
    failure: Option<IoError>,
}

impl Sample {
    fn open(files: &[PathBuf]) -> Result<Self, IoError> {
        refuse_conversations(files)?;
        let pieces = TextPieces::open(files)?;
        let mut n_bytes = 0;
        for path in files {
            n_bytes += std::fs::metadata(path).map_err(|e| IoError::reading(path, e))?.len();
        }
        let take_every = n_bytes.div_ceil(MAX_BPE_BYTES).max(1);
        Ok(Self { pieces, take_every, n_seen: 0, n_text_bytes: 0, failure: None })
    }

    /// The next text of the sample; `None` at the end or after a failure, which is kept.
    fn next_text(&mut self) -> Option<String> {
        loop {
            match self.pieces.next_piece() {
                Ok(Some(piece)) => {
                    self.n_seen += 1;
                    if (self.n_seen - 1).is_multiple_of(self.take_every) {
                        self.n_text_bytes += piece.text.len() as u64;
                        return Some(piece.text.to_owned());
                    }
                }
                Ok(None) => return None,
                Err(error) => {
                    self.failure = Some(error);
                    return None;
                }
            }
        }
    }
}

/// Refuses rows of conversations: what is written between their messages is a template's to say.
fn refuse_conversations(files: &[PathBuf]) -> Result<(), IoError> {
    for path in files {
        if has_conversations(std::slice::from_ref(path), &RowOptions::default())? {
            let reason = "holds conversations, and a tokenizer is made from a text";
            let hint = "give a text with `--data FILE`, or the tokenizer of a chat model with `--tokenizer DIR`";
            return Err(IoError::bad_file(path, reason, hint));
        }
    }
    Ok(())
}

fn no_text(files: &[PathBuf]) -> IoError {
    let path = files.first().map_or(Path::new("--data"), PathBuf::as_path);
    IoError::bad_file(path, "no text to make a tokenizer from", "give text with `--data FILE`")
}

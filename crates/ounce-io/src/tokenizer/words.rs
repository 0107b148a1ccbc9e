//! Text to ids with the library's parts, and a table of words that were seen.
//!
//! Idea: the library normalizes a text and cuts it into words; most of them come again and again, so the tokens of a
//! word are kept. The library keeps such a table itself, but counts its entries, not their bytes: 10,000 words are
//! 2 MiB of English and up to 80 MiB of a script without spaces. So its table is switched off, and this one, which is
//! emptied when it holds [`MAX_TABLE_BYTES`], stands before the model. Ids are taken from it as they are, without the
//! strings that the library puts beside them, which is also faster.
//!
//! Invariants: a table belongs to one tokenizer and one thread; the ids never depend on what it holds.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

use tokenizers::models::ModelWrapper;
use tokenizers::tokenizer::{OffsetReferential, OffsetType, PreTokenizedString};
use tokenizers::{Model, PreTokenizer, Token, Tokenizer as Library};

/// Bytes of a table, after which it is emptied.
const MAX_TABLE_BYTES: usize = 2 << 20;
/// Longer words hardly come again.
const MAX_WORD_BYTES: usize = 128;
/// What an entry takes besides its word and tokens: its place in the table, and the heap's own bookkeeping.
const ENTRY_BYTES: usize = 80;

/// Words of one tokenizer, with their tokens.
#[derive(Debug, Default)]
pub struct Words {
    tokens: HashMap<Box<str>, Box<[WordToken]>>,
    n_bytes: usize,
}

/// A token and the bytes of its word that it stands for.
#[derive(Debug, Clone, Copy)]
struct WordToken {
    id: u32,
    start: u32,
    end: u32,
}

impl Words {
    /// Appends the ids of `text`.
    pub(super) fn encode(
        &mut self,
        library: &Library,
        text: &str,
        ids: &mut Vec<u32>,
    ) -> tokenizers::Result<()> {
        let parts = cut(library, text)?;
        for (word, _, tokens) in parts.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            match tokens {
                // A token that was added to the vocabulary is found while the text is cut.
                Some(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                None => self.each_token(library.get_model(), word, |token| ids.push(token.id))?,
            }
        }
        Ok(())
    }

    /// The ids of `text`, and the bytes of it that each stands for.
    pub(super) fn encode_with_places(
        &mut self,
        library: &Library,
        text: &str,
    ) -> tokenizers::Result<(Vec<u32>, Vec<Range<usize>>)> {
        let mut parts = cut(library, text)?;
        let words = RefCell::new(self);
        parts.tokenize(|word| {
            let mut tokens = Vec::new();
            words.borrow_mut().each_token(library.get_model(), word.get(), |t| {
                let place = (t.start as usize, t.end as usize);
                tokens.push(Token::new(t.id, String::new(), place));
            })?;
            Ok(tokens)
        })?;
        let encoding = parts.into_encoding(None, 0, OffsetType::Byte)?;
        // Some trim the space from what a token stands for.
        let encoding = library.post_process(encoding, None, false)?;
        let places = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok((encoding.get_ids().to_vec(), places))
    }

    /// Hands out the tokens of a word.
    fn each_token(
        &mut self,
        model: &ModelWrapper,
        word: &str,
        take: impl FnMut(&WordToken),
    ) -> tokenizers::Result<()> {
        if let Some(tokens) = self.tokens.get(word) {
            tokens.iter().for_each(take);
            return Ok(());
        }
        let narrow = |token: Token| WordToken {
            id: token.id,
            start: token.offsets.0 as u32,
            end: token.offsets.1 as u32,
        };
        let tokens: Box<[WordToken]> = model.tokenize(word)?.into_iter().map(narrow).collect();
        tokens.iter().for_each(take);
        if word.len() <= MAX_WORD_BYTES {
            if self.n_bytes >= MAX_TABLE_BYTES {
                self.tokens.clear();
                self.n_bytes = 0;
            }
            self.n_bytes += word.len() + size_of_val(&*tokens) + ENTRY_BYTES;
            self.tokens.insert(word.into(), tokens);
        }
        Ok(())
    }
}

/// The words of a text, and tokens where they are tokens of their own.
fn cut(library: &Library, text: &str) -> tokenizers::Result<PreTokenizedString> {
    let vocabulary = library.get_added_vocabulary();
    let mut parts = vocabulary.extract_and_normalize(library.get_normalizer(), text);
    if let Some(cutter) = library.get_pre_tokenizer() {
        cutter.pre_tokenize(&mut parts)?;
    }
    Ok(parts)
}

/// Makes a loaded tokenizer's model one that keeps no words, and draws no random numbers.
pub(super) fn without_cache(library: &mut Library) {
    let mut model = library.get_model().clone();
    model.resize_cache(0);
    match &mut model {
        ModelWrapper::BPE(model) => model.dropout = None,
        ModelWrapper::Unigram(model) => model.alpha = None,
        ModelWrapper::WordPiece(_) | ModelWrapper::WordLevel(_) => {}
    }
    library.with_model(model);
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_table_stays_small_whatever_words_come() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/bpe512");
        let library = Library::from_file(dir.join("tokenizer.json")).unwrap();
        let (mut words, mut ids, mut most) = (Words::default(), Vec::new(), 0);
        for i in 0..16_000_u32 {
            // A word of its own each time, without many merges.
            let word: String =
                (0..50).map(|k| char::from(b'a' + (i >> (k % 15) & 1) as u8)).collect();
            ids.clear();
            words.encode(&library, &format!("{word}{i}"), &mut ids).unwrap();
            most = most.max(words.n_bytes);
            let entries = words.tokens.iter().map(|(w, t)| w.len() + size_of_val(&**t));
            assert!(i % 1000 > 0 || entries.sum::<usize>() <= words.n_bytes);
        }
        let entry_bytes = MAX_WORD_BYTES * (1 + size_of::<WordToken>()) + ENTRY_BYTES;
        let (least, limit) = (MAX_TABLE_BYTES / 10 * 9, MAX_TABLE_BYTES + entry_bytes);
        assert!(most > least && most <= limit, "{most}");
    }
}

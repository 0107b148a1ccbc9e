//! A table from id to bytes: all that is needed to turn ids into text once the tokenizer itself is gone.
//!
//! Idea: in every supported tokenizer a token stands for fixed bytes (of a piece of UTF-8), whatever is around it;
//! text is their concatenation. So the vocabulary becomes one byte vector with offsets, and a stream of ids is decoded
//! by appending bytes and letting out what is complete UTF-8.
//!
//! Memory: the tokens' bytes plus 4 bytes per token; a stream holds at most 3 bytes.
//! What it does not do: a run of byte tokens that is no UTF-8 gives one replacement character per broken sequence,
//! where Hugging Face's byte fallback gives one per byte.

use serde_json::Value;

use super::{Backend, Tokenizer, special};
use crate::error::IoError;

/// How the strings of a vocabulary spell bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TokenForm {
    /// Each character stands for a byte, as in GPT-2.
    byte_level: bool,
    /// `<0x0A>` stands for a byte, as in SentencePiece.
    byte_fallback: bool,
    /// This character stands for a space.
    space: Option<char>,
    /// A text begins with a space that is not part of it.
    strips_first_space: bool,
}

impl TokenForm {
    /// Reads the form off the tokenizer's decoder.
    ///
    /// # Errors
    /// `Token` for a decoder that works on whole texts only.
    pub(super) fn of(tokenizer: &Tokenizer) -> Result<Self, IoError> {
        let mut form = Self {
            byte_level: false,
            byte_fallback: false,
            space: None,
            strips_first_space: false,
        };
        let Backend::Library(library) = &tokenizer.backend else { return Ok(form) };
        let decoder = serde_json::to_value(library.get_decoder()).unwrap_or(Value::Null);
        let steps =
            decoder["decoders"].as_array().map_or(std::slice::from_ref(&decoder), Vec::as_slice);
        for step in steps {
            match step["type"].as_str() {
                Some("ByteLevel") => form.byte_level = true,
                Some("ByteFallback") => form.byte_fallback = true,
                Some("Fuse") => {}
                Some("Metaspace") => {
                    form.space = step["replacement"].as_str().and_then(|r| r.chars().next());
                    form.strips_first_space = step["prepend_scheme"] != "never";
                }
                Some("Replace")
                    if step["content"] == " " && one_char(&step["pattern"]).is_some() =>
                {
                    form.space = one_char(&step["pattern"]);
                }
                Some("Strip")
                    if step["content"] == " " && step["stop"] == 0 && step["start"] == 1 =>
                {
                    form.strips_first_space = true;
                }
                _ => {
                    return Err(IoError::Token {
                        reason: format!("the tokenizer's decoder `{step}` has no bytes per token"),
                        hint: "use a byte-level, byte-fallback or character tokenizer".into(),
                    });
                }
            }
        }
        Ok(form)
    }

    /// The bytes of token `id`; none for an unused id.
    pub(super) fn bytes(self, tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
        let library = match &tokenizer.backend {
            Backend::Chars(chars) => {
                return chars.char(id).map_or(Vec::new(), |c| c.to_string().into_bytes());
            }
            Backend::Library(library) => library,
        };
        let Some(token) = library.id_to_token(id) else { return Vec::new() };
        if library.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id) {
            return token.into_bytes();
        }
        if self.byte_level {
            return byte_level_bytes(&token).unwrap_or_else(|| token.into_bytes());
        }
        match fallback_byte(&token).filter(|_| self.byte_fallback) {
            Some(byte) => vec![byte],
            None => match self.space {
                Some(space) => token.replace(space, " ").into_bytes(),
                None => token.into_bytes(),
            },
        }
    }
}

/// The character of a `{"String": "x"}` pattern of one character.
fn one_char(pattern: &Value) -> Option<char> {
    let mut chars = pattern["String"].as_str()?.chars();
    chars.next().filter(|_| chars.next().is_none())
}

/// The byte of a token like `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// Undoes GPT-2's spelling of bytes: printable Latin-1 stands for itself, and the 68 other bytes, in ascending order,
/// are the characters from U+0100 on.
fn byte_level_bytes(token: &str) -> Option<Vec<u8>> {
    let is_itself = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    token
        .chars()
        .map(|c| match u32::from(c) {
            code @ 0..=0xff => Some(code as u8).filter(is_itself),
            code => (0..=0xff).filter(|b| !is_itself(b)).nth(code as usize - 0x100),
        })
        .collect()
}

/// The bytes of every token, without the tokenizer.
#[derive(Debug, Clone)]
pub struct IdTable {
    bytes: Vec<u8>,
    /// Token `id` is `bytes[ends[id - 1]..ends[id]]`.
    ends: Vec<u32>,
    /// Ascending; they leave no text.
    special: Vec<u32>,
    strips_first_space: bool,
}

impl IdTable {
    /// Copies the bytes of every token.
    ///
    /// # Errors
    /// `Token` where the tokenizer's decoder works on whole texts only.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, IoError> {
        let form = TokenForm::of(tokenizer)?;
        let mut table = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(tokenizer.vocab_size),
            special: Vec::new(),
            strips_first_space: form.strips_first_space,
        };
        for id in 0..tokenizer.vocab_size as u32 {
            table.bytes.extend(form.bytes(tokenizer, id));
            table.ends.push(table.bytes.len() as u32);
            if let Backend::Library(library) = &tokenizer.backend
                && special::is_special(library, id)
            {
                table.special.push(id);
            }
        }
        table.bytes.shrink_to_fit();
        Ok(table)
    }

    /// Number of ids.
    pub fn vocab_size(&self) -> usize {
        self.ends.len()
    }

    /// Bytes of memory that the table takes.
    pub fn n_bytes(&self) -> usize {
        self.bytes.capacity() + 4 * (self.ends.capacity() + self.special.capacity())
    }

    /// The bytes of one token; none for an id outside the table, which a model with a larger vocabulary may produce.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// Decodes a stream of ids. `at_start`: the stream is a whole text, so that a space which the tokenizer puts
    /// before every text is taken off; false for the continuation of a prompt.
    pub fn stream(&self, at_start: bool) -> IdStream<'_> {
        let strip = at_start && self.strips_first_space;
        IdStream { table: self, pending: [0; 4], n_pending: 0, strip }
    }

    /// The text of all of `ids`, as a stream would give it.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut text = String::new();
        let mut stream = self.stream(true);
        for &id in ids {
            stream.push(id, &mut text);
        }
        stream.finish(&mut text);
        text
    }
}

/// Text from ids, one id at a time; never half a character.
#[derive(Debug)]
pub struct IdStream<'a> {
    table: &'a IdTable,
    /// The bytes of a character that is not complete yet.
    pending: [u8; 4],
    n_pending: usize,
    strip: bool,
}

impl IdStream<'_> {
    /// Appends what `id` completes to `text`. Special tokens leave no text.
    pub fn push(&mut self, id: u32, text: &mut String) {
        if self.table.special.binary_search(&id).is_ok() {
            return;
        }
        let mut bytes = self.table.token_bytes(id);
        if self.strip && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.strip = false;
        }
        for &byte in bytes {
            self.push_byte(byte, text);
        }
    }

    /// Ends the text: half a character becomes a replacement character.
    pub fn finish(&mut self, text: &mut String) {
        if self.n_pending > 0 {
            text.push(char::REPLACEMENT_CHARACTER);
            self.n_pending = 0;
        }
    }

    fn push_byte(&mut self, byte: u8, text: &mut String) {
        self.pending[self.n_pending] = byte;
        self.n_pending += 1;
        match std::str::from_utf8(&self.pending[..self.n_pending]) {
            Ok(complete) => {
                text.push_str(complete);
                self.n_pending = 0;
            }
            Err(error) => {
                if error.error_len().is_some() {
                    text.push(char::REPLACEMENT_CHARACTER);
                    // The offending byte may begin a character of its own, unless it stood alone.
                    let stood_alone = self.n_pending == 1;
                    self.n_pending = 0;
                    if !stood_alone {
                        self.push_byte(byte, text);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(tokens: &[&[u8]]) -> IdTable {
        let mut table = IdTable {
            bytes: Vec::new(),
            ends: Vec::new(),
            special: Vec::new(),
            strips_first_space: false,
        };
        for token in tokens {
            table.bytes.extend_from_slice(token);
            table.ends.push(table.bytes.len() as u32);
        }
        table
    }

    #[test]
    fn any_cut_of_any_bytes_streams_as_the_standard_library_decodes_the_whole() {
        arbtest::arbtest(|u| {
            let text: String = u.arbitrary()?;
            let mut bytes = text.into_bytes();
            bytes.extend(u.arbitrary::<Vec<u8>>()?);
            let at = u.choose_index(bytes.len() + 1)?;
            let tokens: Vec<&[u8]> = vec![&bytes[..at], &bytes[at..]];
            assert_eq!(table(&tokens).decode(&[0, 1]), String::from_utf8_lossy(&bytes));
            let single: Vec<&[u8]> = bytes.chunks(1).collect();
            let ids: Vec<u32> = (0..single.len() as u32).collect();
            assert_eq!(table(&single).decode(&ids), String::from_utf8_lossy(&bytes));
            Ok(())
        });
    }

    #[test]
    fn half_a_character_is_held_back() {
        let table = table(&[b"a\xf0\x9f", b"\x99\x82!"]);
        let mut stream = table.stream(true);
        let mut text = String::new();
        stream.push(0, &mut text);
        assert_eq!(text, "a");
        stream.push(1, &mut text);
        assert_eq!(text, "a🙂!");
        stream.push(0, &mut text);
        stream.finish(&mut text);
        assert_eq!(text, "a🙂!a\u{fffd}");
    }

    #[test]
    fn ids_beyond_the_table_leave_no_text() {
        assert_eq!(table(&[b"a"]).decode(&[0, 7, u32::MAX, 0]), "aa");
    }

    #[test]
    fn byte_level_spelling_is_undone_for_all_256_bytes() {
        assert_eq!(byte_level_bytes("Ġhello"), Some(b" hello".to_vec()));
        assert_eq!(byte_level_bytes("ĊĀÃ©"), Some(vec![b'\n', 0, 0xc3, 0xa9]));
        assert_eq!(byte_level_bytes("漢"), None);
        let spelled = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut bytes: Vec<u8> =
            spelled.iter().flat_map(|c| byte_level_bytes(&c.to_string()).unwrap()).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn byte_fallback_tokens_have_two_digits() {
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        assert_eq!(fallback_byte("<0x0>"), None);
        assert_eq!(fallback_byte("<0xZZ>"), None);
    }
}

//! Tokenizers: text to ids and back, by the files that Hugging Face models come with.
//!
//! Idea: the `tokenizers` crate does the work for every published tokenizer. It is heavy (tens of MiB for 50,000
//! tokens), so it is loaded only while text is tokenized; afterwards an [`IdTable`] of a few hundred KiB turns ids
//! back into text. Character tokenizers, recognised by their structure, never load it at all.
//!
//! Files in reading order: this one (load, encode, decode), `special.rs` (which ids begin and end a text),
//! `chars.rs` (the character tokenizer), `growth.rs` (what a text may become), `words.rs` (the library, word by word),
//! `pieces.rs` (encoding a text in pieces), `memory.rs`, `id_table.rs`, `train.rs`.

mod chars;
mod growth;
mod id_table;
mod memory;
mod pieces;
mod special;
mod train;
mod words;

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as Library};

pub use id_table::{IdStream, IdTable};
pub use memory::tokenizing_bytes;
pub use train::{END_OF_TEXT, MIN_BPE_VOCAB_SIZE, TrainedTokenizer, train_bpe, train_char};
pub use words::Words;

use crate::dataset::source::count_newlines;
use crate::error::{IoError, excerpt};
use crate::hash::Xxh64;
use crate::json::{open_regular, read_small_file};
use crate::text::{Piece, PieceStart, first_piece};
use chars::CharTable;
use pieces::PieceRules;
use special::SpecialIds;

/// Most ids accepted; the largest published vocabularies have a quarter of it.
pub(crate) const MAX_IDS: usize = 1 << 22;
/// Longest tokenizer file accepted.
const MAX_TOKENIZER_BYTES: u64 = 128 << 20;

/// A loaded tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    backend: Backend,
    vocab_size: usize,
    special: SpecialIds,
    adds_bos: bool,
    rules: PieceRules,
    fingerprint: u64,
}

#[derive(Debug)]
enum Backend {
    Chars(Box<CharTable>),
    Library(Box<Library>),
}

impl Tokenizer {
    /// Loads a tokenizer from a model directory (`tokenizer.json`, else `vocab.json` with `merges.txt`) or from a
    /// `tokenizer.json` of any name. Special ids come from the configuration files beside it.
    ///
    /// # Errors
    /// `Missing`, `Read`, `BadFile`, `BadLine`.
    pub fn load(dir_or_file: &Path) -> Result<Self, IoError> {
        let files = TokenizerFiles::find(dir_or_file)?;
        let mut backend = match &files.kind {
            FilesKind::Json(path) => {
                let json = read_small_file(path, MAX_TOKENIZER_BYTES)?;
                match CharTable::recognise(&json) {
                    Some(chars) => Backend::Chars(Box::new(chars)),
                    None => Backend::Library(Box::new(load_json(path, json)?)),
                }
            }
            FilesKind::VocabMerges(vocab, merges) => {
                Backend::Library(Box::new(load_vocab_merges(&files.dir, vocab, merges)?))
            }
        };
        if let Backend::Library(library) = &mut backend {
            words::without_cache(library);
        }
        let vocab_size = match &backend {
            Backend::Chars(chars) => chars.len(),
            // Ids may have gaps: the largest id decides how many rows an embedding needs.
            Backend::Library(library) => {
                library.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
            }
        };
        if vocab_size > MAX_IDS {
            // A table by id would take its size from one number in the file.
            let reason =
                format!("has the id {}, but at most {MAX_IDS} ids are read", vocab_size - 1);
            return Err(IoError::bad_file(files.main(), reason, "fetch the file again"));
        }
        let special = match &backend {
            Backend::Chars(_) => SpecialIds::default(),
            Backend::Library(library) => SpecialIds::read(&files.dir, library)?,
        };
        let mut tokenizer = Self {
            backend,
            vocab_size,
            adds_bos: false,
            special,
            rules: PieceRules::default(),
            fingerprint: files.fingerprint()?,
        };
        tokenizer.adds_bos = tokenizer.find_adds_bos();
        tokenizer.rules = PieceRules::find(&tokenizer);
        Ok(tokenizer)
    }

    /// The ids of `text`, without any token that is not in it.
    ///
    /// # Errors
    /// `Token` for a character that a tokenizer without byte fallback does not know.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, IoError> {
        let mut ids = Vec::new();
        let encoded = self.encode_into(text, &mut Words::default(), &mut ids);
        encoded.map_err(|fault| fault.without_place(text))?;
        Ok(ids)
    }

    /// Hands out the ids of `text` and the bytes of it that each stands for. Special tokens that are written out in the
    /// text are those tokens; none is added. A long text is encoded in pieces, as [`Self::encode_piece`] does.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_with_places(
        &self,
        text: &str,
        words: &mut Words,
        mut take: impl FnMut(u32, Range<usize>),
    ) -> Result<(), IoError> {
        let (mut from, mut start) = (0, PieceStart::Row { joined: false });
        while from < text.len() {
            let (n_piece, next_start) = first_piece(&text[from..]);
            let part = &text[from..from + n_piece];
            let encoded = self.rules.encode_with_places(self, part, start, words);
            let (ids, places) = encoded.map_err(|fault| fault.without_place(part))?;
            for (id, place) in ids.into_iter().zip(places) {
                take(id, from + place.start..from + place.end);
            }
            (from, start) = (from + n_piece, next_start);
        }
        Ok(())
    }

    /// The id of a token that was added to the vocabulary, as special tokens are.
    pub fn added_token_id(&self, token: &str) -> Option<u32> {
        let Backend::Library(library) = &self.backend else { return None };
        let added = library.get_added_vocabulary().get_vocab();
        added.get(token).copied()
    }

    /// The name of token `id`.
    pub fn token_name(&self, id: u32) -> Option<String> {
        match &self.backend {
            Backend::Library(library) => library.id_to_token(id),
            Backend::Chars(chars) => chars.char(id).map(|c| c.to_string()),
        }
    }

    /// The ids of a prompt: those of `text`, after the beginning-of-text token where this tokenizer puts one.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, IoError> {
        let mut ids: Vec<u32> = self.special.bos.filter(|_| self.adds_bos).into_iter().collect();
        let encoded = self.encode_into(text, &mut Words::default(), &mut ids);
        encoded.map_err(|fault| fault.without_place(text))?;
        Ok(ids)
    }

    /// Appends the ids of one piece of a longer text. All pieces of a text give the ids of the whole, as far as
    /// `text.rs` says.
    ///
    /// # Errors
    /// `BadLine`, naming the place in the data file.
    pub fn encode_piece(
        &self,
        piece: &Piece<'_>,
        words: &mut Words,
        ids: &mut Vec<u32>,
    ) -> Result<(), IoError> {
        let fault = match self.rules.encode(self, piece, words, ids) {
            Ok(()) => return Ok(()),
            Err(fault) => fault,
        };
        let before = &piece.text.as_bytes()[..fault.at.min(piece.text.len())];
        let line = piece.line + count_newlines(before);
        let near = excerpt(piece.text.as_bytes(), fault.at);
        let reason = format!("{} near `{near}`", fault.reason);
        Err(IoError::bad_line(piece.path, line, reason, UNKNOWN_HINT))
    }

    /// The text of `ids`, without special tokens. Broken UTF-8 becomes replacement characters.
    ///
    /// # Errors
    /// `Token` for an id outside the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String, IoError> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(IoError::Token {
                reason: format!("id {id} is outside the tokenizer's {} tokens", self.vocab_size),
                hint: "the model and the tokenizer must belong together".into(),
            });
        }
        match &self.backend {
            Backend::Chars(chars) => Ok(ids.iter().filter_map(|&id| chars.char(id)).collect()),
            Backend::Library(library) => {
                guard(|| library.decode(ids, true)).map_err(|e| IoError::Token {
                    reason: format!("cannot decode: {e}"),
                    hint: "check the tokenizer's `decoder`".into(),
                })
            }
        }
    }

    /// One more than the largest id: the least `vocab_size` a model needs for this tokenizer.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The bytes that one id stands for inside a text: of a special token its name, of an unused id none.
    ///
    /// # Errors
    /// `Token` where the tokenizer's decoder is of a kind that works on whole texts only.
    pub fn token_bytes(&self, id: u32) -> Result<Vec<u8>, IoError> {
        Ok(id_table::TokenForm::of(self)?.bytes(self, id))
    }

    /// The token that begins a text, if there is one.
    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos
    }

    /// The end-of-text token, if there is one: it joins the rows of a `.jsonl` file.
    pub fn eos_id(&self) -> Option<u32> {
        self.special.eos
    }

    /// Every id at which generation ends, ascending.
    pub fn stop_ids(&self) -> &[u32] {
        &self.special.stop
    }

    /// Whether prompts begin with the beginning-of-text token.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// Hash of the files that decide which ids a text gets.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Its `tokenizer.json`, also where it was loaded from other files.
    pub(crate) fn to_json(&self) -> Value {
        match &self.backend {
            Backend::Chars(chars) => chars.to_json(),
            Backend::Library(library) => serde_json::to_value(library).unwrap_or(Value::Null),
        }
    }

    /// Appends the ids of `text` as it stands.
    fn encode_into(&self, text: &str, words: &mut Words, ids: &mut Vec<u32>) -> Result<(), Fault> {
        match &self.backend {
            Backend::Chars(chars) => chars.encode(text, ids),
            Backend::Library(library) => {
                let encoded = guard(|| words.encode(library, text, ids));
                encoded.map_err(|reason| Fault { at: 0, reason })
            }
        }
    }

    /// The ids of `text` as it stands, and the bytes of it that each stands for.
    fn encode_places(
        &self,
        text: &str,
        words: &mut Words,
    ) -> Result<(Vec<u32>, Vec<Range<usize>>), Fault> {
        match &self.backend {
            Backend::Chars(chars) => {
                let mut ids = Vec::new();
                chars.encode(text, &mut ids)?;
                let places = text.char_indices().map(|(at, c)| at..at + c.len_utf8());
                Ok((ids, places.collect()))
            }
            Backend::Library(library) => guard(|| words.encode_with_places(library, text))
                .map_err(|reason| Fault { at: 0, reason }),
        }
    }

    /// What the configuration says, else what the post-processor does.
    fn find_adds_bos(&self) -> bool {
        let (Some(bos), Backend::Library(library)) = (self.special.bos, &self.backend) else {
            return false;
        };
        self.special.add_bos_token.unwrap_or_else(|| {
            let starts_with_bos = |special| {
                guard(|| library.encode_fast("a", special))
                    .is_ok_and(|e| e.get_ids().first() == Some(&bos))
            };
            starts_with_bos(true) && !starts_with_bos(false)
        })
    }
}

const UNKNOWN_HINT: &str =
    "remove the character, or make a model that knows all of them: `ounce init --tokenizer bpe`";

/// Text that cannot be encoded: where, in bytes, and why.
#[derive(Debug)]
struct Fault {
    at: usize,
    reason: String,
}

impl Fault {
    /// The error for a text that comes from no file.
    fn without_place(self, text: &str) -> IoError {
        let near = excerpt(text.as_bytes(), self.at);
        let reason = format!("{} near `{near}`", self.reason);
        IoError::Token { reason, hint: UNKNOWN_HINT.into() }
    }
}

/// Hash of the files of a tokenizer, without loading it. Equal to [`Tokenizer::fingerprint`].
///
/// # Errors
/// `Missing`, `Read`, `BadFile`.
pub fn tokenizer_fingerprint(dir_or_file: &Path) -> Result<u64, IoError> {
    TokenizerFiles::find(dir_or_file)?.fingerprint()
}

/// Where the files of a tokenizer lie.
struct TokenizerFiles {
    dir: PathBuf,
    kind: FilesKind,
}

enum FilesKind {
    Json(PathBuf),
    VocabMerges(PathBuf, PathBuf),
}

impl TokenizerFiles {
    fn find(path: &Path) -> Result<Self, IoError> {
        if !path.is_dir() {
            open_regular(path)?;
            let dir = path.parent().unwrap_or(Path::new("")).to_path_buf();
            return Ok(Self { dir, kind: FilesKind::Json(path.into()) });
        }
        let json = path.join("tokenizer.json");
        let (vocab, merges) = (path.join("vocab.json"), path.join("merges.txt"));
        if json.exists() {
            Ok(Self { dir: path.into(), kind: FilesKind::Json(json) })
        } else if vocab.exists() && merges.exists() {
            Ok(Self { dir: path.into(), kind: FilesKind::VocabMerges(vocab, merges) })
        } else if path.join("tokenizer.model").exists() {
            Err(IoError::bad_file(
                path,
                "holds a SentencePiece tokenizer.model, but no tokenizer.json",
                "save it again with `AutoTokenizer.from_pretrained(dir).save_pretrained(dir)`",
            ))
        } else {
            Err(IoError::bad_file(
                path,
                "holds neither tokenizer.json nor vocab.json with merges.txt",
                "name a directory with a tokenizer, or make a model with `ounce init`",
            ))
        }
    }

    /// The file that holds the vocabulary.
    fn main(&self) -> &Path {
        match &self.kind {
            FilesKind::Json(path) | FilesKind::VocabMerges(path, _) => path,
        }
    }

    fn fingerprint(&self) -> Result<u64, IoError> {
        let mut paths = match &self.kind {
            FilesKind::Json(path) => vec![path.clone()],
            FilesKind::VocabMerges(vocab, merges) => {
                vec![vocab.clone(), merges.clone(), self.dir.join(special::ADDED_TOKENS)]
            }
        };
        // Whether and with which id rows are joined is said in these.
        paths.extend(special::CONFIG_FILES.map(|name| self.dir.join(name)));
        let mut hash = Xxh64::new();
        for path in paths.iter().filter(|path| path.exists()) {
            let bytes = read_small_file(path, MAX_TOKENIZER_BYTES)?;
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(&bytes);
        }
        Ok(hash.digest())
    }
}

/// Loads a `tokenizer.json` with the library.
fn load_json(path: &Path, json: Vec<u8>) -> Result<Library, IoError> {
    let bad = |reason: String| {
        IoError::bad_file(
            path,
            format!("not a tokenizer that can be read: {reason}"),
            "fetch the file again, or save it again with `AutoTokenizer.save_pretrained`",
        )
    };
    growth::check(&json).map_err(bad)?;
    let mut library = guard(|| Library::from_bytes(json)).map_err(bad)?;
    // Limits meant for other uses would cut the training text short.
    library.with_padding(None).with_truncation(None).map_err(|e| bad(e.to_string()))?;
    Ok(library)
}

/// Runs the library. It panics on some malformed tokenizers; that is the file's fault, and no reason to fall over.
fn guard<T, E: ToString>(read: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("the tokenizer's structure is broken".into()),
    }
}

/// Builds the GPT-2 tokenizer from its two published files, and the tokens that others in `dir` add.
fn load_vocab_merges(dir: &Path, vocab: &Path, merges: &Path) -> Result<Library, IoError> {
    for path in [vocab, merges] {
        let n_bytes = open_regular(path)?.metadata().map_err(|e| IoError::reading(path, e))?.len();
        if n_bytes > MAX_TOKENIZER_BYTES {
            let reason = format!("{n_bytes} bytes are over the limit of {MAX_TOKENIZER_BYTES}");
            return Err(IoError::bad_file(path, reason, "this does not look like the right file"));
        }
    }
    let bpe = BPE::from_file(&vocab.to_string_lossy(), &merges.to_string_lossy());
    let bpe = guard(|| bpe.build()).map_err(|e| {
        let reason = format!("not a vocabulary that goes with {}: {e}", merges.display());
        IoError::bad_file(vocab, reason, "fetch both files again from one place")
    })?;
    let mut library = Library::new(bpe);
    library.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)));
    library.with_decoder(Some(ByteLevel::default()));
    if library.token_to_id(END_OF_TEXT).is_some() {
        let added = library.add_special_tokens([AddedToken::from(END_OF_TEXT, true)]);
        added.map_err(|e| IoError::bad_file(vocab, e.to_string(), "fetch the file again"))?;
    }
    special::add_tokens(dir, &mut library)?;
    Ok(library)
}

//! One body for every parser: it puts a damaged file where the parser looks for it and checks what comes of it.
//!
//! What must hold for every input: no panic; an error is of the class "the input is wrong", names the file and ends
//! with a hint, in a message that fits a screen; what is accepted can be used to its end. That memory stays bounded
//! is for the caller to watch, who owns the allocator.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::mutate::{Choices, mutate};
use super::small_run::SmallRun;
use crate::chat_template::ChatTemplate;
use crate::checkpoint;
use crate::dataset::{ColumnMapping, Conversation, RowFormat, RowReader, samples};
use crate::disk::RealDisk;
use crate::error::{ErrorKind, IoError};
use crate::hash::hash_file;
use crate::{
    Dtype, GGUF_FILE, GgmlType, GgufExport, GgufModel, IdTable, RowOptions, SafetensorsDir,
    SafetensorsWriter, TensorSpec, TextPieces, TokenCache, Tokenizer, read_config, token_cache,
    tokenize_to_cache, train_bpe, train_char,
};

/// Longest message of an error.
const MAX_MESSAGE_BYTES: usize = 2000;
const TEXT: &str = "All the world is but a stage, and all\nthe men and women merely players\n";

/// What is fuzzed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A safetensors file.
    Safetensors,
    /// `model.safetensors.index.json`.
    Index,
    /// A GGUF file: header, tensors, vocabulary.
    Gguf,
    /// `config.json`.
    Config,
    /// `tokenizer.json`.
    Tokenizer,
    /// `vocab.json` and `merges.txt`.
    VocabMerges,
    /// A text file.
    Text,
    /// A file of JSON rows.
    Rows,
    /// A JSON array of conversations.
    Array,
    /// A Parquet file.
    Parquet,
    /// A chat template.
    Template,
    /// A token cache, also with its checksums made right again.
    TokenCache,
    /// `manifest.json` of a checkpoint.
    Manifest,
    /// `trainer_state.json`, with its checksum made right again.
    State,
}

impl Target {
    /// Every target.
    pub const ALL: [Self; 14] = [
        Self::Safetensors,
        Self::Index,
        Self::Gguf,
        Self::Config,
        Self::Tokenizer,
        Self::VocabMerges,
        Self::Text,
        Self::Rows,
        Self::Array,
        Self::Parquet,
        Self::Template,
        Self::TokenCache,
        Self::Manifest,
        Self::State,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Index => "index",
            Self::Gguf => "gguf",
            Self::Config => "config",
            Self::Tokenizer => "tokenizer",
            Self::VocabMerges => "vocab-merges",
            Self::Text => "text",
            Self::Rows => "rows",
            Self::Array => "array",
            Self::Parquet => "parquet",
            Self::Template => "template",
            Self::TokenCache => "token-cache",
            Self::Manifest => "manifest",
            Self::State => "state",
        }
    }

    /// Bytes of memory that parsing a file of `n_bytes` takes at most.
    pub fn bound_bytes(self, n_bytes: usize) -> usize {
        match self {
            // A table of the most ids accepted, as it grows; the library's tables, several for each token; the
            // compiled expressions.
            Self::Gguf | Self::Tokenizer | Self::VocabMerges => (64 << 20) + 400 * n_bytes,
            // Two pages as large as they may be, and what the library makes of them.
            Self::Parquet => (512 << 20) + 64 * n_bytes,
            // The instructions that a template may take pay for 64 bytes each.
            Self::Template => (512 << 20) + 64 * n_bytes,
            _ => (1 << 20) + 64 * n_bytes,
        }
    }

    /// The file that is damaged.
    fn file_name(self) -> &'static str {
        match self {
            Self::Safetensors => "model.safetensors",
            Self::Index => "model.safetensors.index.json",
            Self::Gguf => GGUF_FILE,
            Self::Config => "config.json",
            Self::Tokenizer => "tokenizer.json",
            Self::VocabMerges => "merges.txt",
            Self::Text => "text.txt",
            Self::Rows => "rows.jsonl",
            Self::Array => "rows.json",
            Self::Parquet => "rows.parquet",
            Self::Template => "chat_template.jinja",
            Self::TokenCache => "tokens.bin",
            Self::Manifest => "manifest.json",
            Self::State => "trainer_state.json",
        }
    }
}

/// A target with valid files to begin from.
#[derive(Debug)]
pub struct FuzzCase {
    target: Target,
    /// The directory in which the damaged file lies, among valid ones.
    dir: PathBuf,
    valid: Vec<Vec<u8>>,
}

impl FuzzCase {
    /// Writes valid files into `dir`, which must be empty and belong to this case alone.
    ///
    /// # Errors
    /// `Write`, `Read`.
    pub fn new(target: Target, dir: &Path) -> Result<Self, IoError> {
        let mut case = Self { target, dir: dir.into(), valid: Vec::new() };
        match target {
            Target::Safetensors => write_tensors(&dir.join("model.safetensors"), &["a", "b"])?,
            Target::Index => {
                write_tensors(&dir.join("x.safetensors"), &["a"])?;
                write_tensors(&dir.join("y.safetensors"), &["b", "c"])?;
                let map = json!({"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors"});
                case.write(json!({"weight_map": map}).to_string().as_bytes());
            }
            Target::Gguf => {
                write_gguf(dir, GgmlType::F16)?;
                case.add_valid(&read(&case.path()));
                write_gguf(dir, GgmlType::Q8_0)?;
            }
            Target::Config => {
                case.write(br#"{"model_type": "gpt2", "n_embd": 32, "rope": {"theta": 1e5}}"#);
            }
            Target::Tokenizer => {
                let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
                for name in ["metaspace-like", "llama3-like", "stories260k"] {
                    case.add_valid(&read(&data.join(name).join("tokenizer.json")));
                }
                let text = dir.join("text.txt");
                crate::write_file(&text, TEXT.as_bytes())?;
                for tokenizer in
                    [train_char(std::slice::from_ref(&text))?, train_bpe(&[text], 270)?]
                {
                    tokenizer.save(dir)?;
                    case.add_valid(&read(&case.path()));
                }
            }
            Target::VocabMerges => {
                let vocab = json!({"a": 0, "b": 1, "ab": 2, "\u{120}": 3, "abab": 4});
                crate::write_json(&dir.join("vocab.json"), &vocab)?;
                case.write(b"#version: 0.2\na b\nab ab\n");
            }
            Target::Text => case.write("caf\u{e9} \u{1f600}\r\nline two\n\nend".as_bytes()),
            Target::Rows => case.write(
                b"{\"text\": \"caf\\u00e9 \\ud83d\\ude00\", \"id\": [1]}\n\n{\"text\":\"\"}\r\n",
            ),
            Target::Array => case.write(
                b"[{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]},\n {\"messages\": [{\"from\": \"gpt\", \
                  \"value\": \"caf\\u00e9 ]}\"}], \"tools\": \"[]\"}]\n",
            ),
            Target::Parquet => {
                let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
                for name in ["messages.snappy.parquet", "messages.zstd.parquet", "text.parquet"] {
                    case.add_valid(&read(&data.join(name)));
                }
                case.write(&read(&data.join("messages.none.parquet")));
            }
            Target::Template => {
                let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat_templates");
                for name in ["chatml", "generation", "markup", "raw", "reasoning", "strict"] {
                    case.add_valid(&read(&data.join(name).with_extension("jinja")));
                }
                case.write(&read(&data.join("tools.jinja")));
            }
            Target::TokenCache => {
                let text = dir.join("text.txt");
                crate::write_file(&text, TEXT.as_bytes())?;
                train_char(std::slice::from_ref(&text))?.save(dir)?;
                tokenize_to_cache(&[text], &Tokenizer::load(dir)?, &case.path(), 1)?;
            }
            Target::Manifest | Target::State => {
                let run = SmallRun::new(dir)?;
                let path = run.save(Arc::new(RealDisk), &dir.join("out"), 7)?;
                case.dir = path;
            }
        }
        let bytes = read(&case.path());
        case.add_valid(&bytes);
        Ok(case)
    }

    fn add_valid(&mut self, bytes: &[u8]) {
        self.valid.push(bytes.to_vec());
    }

    /// The valid files to begin from.
    pub fn valid(&self) -> &[Vec<u8>] {
        &self.valid
    }

    /// The damaged file that the random bytes `data` describe: a valid one with a few edits, or `data` alone.
    pub fn damage(&self, data: &[u8]) -> Vec<u8> {
        let mut choices = Choices(data);
        if choices.byte() < 16 {
            return self.finish(choices.0.to_vec(), &mut choices);
        }
        let valid = self.valid[choices.below(self.valid.len())].clone();
        self.finish(mutate(valid, &mut choices), &mut choices)
    }

    /// `bytes` with a few edits more, which the random bytes `data` describe.
    pub fn damage_more(&self, bytes: &[u8], data: &[u8]) -> Vec<u8> {
        let mut choices = Choices(data);
        self.finish(mutate(bytes.to_vec(), &mut choices), &mut choices)
    }

    /// Every other time, checksums are made right again, to get behind them.
    fn finish(&self, mut bytes: Vec<u8>, choices: &mut Choices<'_>) -> Vec<u8> {
        if self.target == Target::TokenCache && choices.byte() & 1 == 0 {
            token_cache::reseal(&mut bytes);
        }
        bytes
    }

    /// Gives a file to the parser; says whether it was accepted.
    ///
    /// # Panics
    /// If the parser does what it must not do.
    pub fn try_file(&self, bytes: &[u8]) -> bool {
        self.write(bytes);
        let path = self.path();
        let used = match self.target {
            Target::Safetensors => SafetensorsDir::open(&path).and_then(|file| read_all(&file)),
            Target::Index => SafetensorsDir::open(&self.dir).and_then(|dir| read_all(&dir)),
            Target::Gguf => use_gguf(&path, &self.dir.join("side")),
            Target::Config => read_config(&self.dir).map(|_| ()),
            Target::Tokenizer => Tokenizer::load(&path).and_then(|t| use_tokenizer(&t)),
            Target::VocabMerges => Tokenizer::load(&self.dir).and_then(|t| use_tokenizer(&t)),
            Target::Text | Target::Rows => read_pieces(&path, bytes.len()),
            Target::Array | Target::Parquet => read_rows(&path),
            Target::Template => {
                ChatTemplate::load(&self.dir, 0, false, |_| false).map(|t| use_template(&t))
            }
            Target::TokenCache => TokenCache::open(&path).and_then(|cache| read_ids(&cache)),
            Target::Manifest => checkpoint::open(&self.dir).map(|_| ()),
            Target::State => {
                self.seal_state();
                checkpoint::open(&self.dir).map(|_| ())
            }
        };
        match used {
            Ok(()) => true,
            Err(error) => {
                self.check_error(&error);
                false
            }
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.join(self.target.file_name())
    }

    fn write(&self, bytes: &[u8]) {
        fs::write(self.path(), bytes).expect("the directory can be written");
    }

    fn check_error(&self, error: &IoError) {
        let message = error.to_string();
        let shown: String = message.chars().take(MAX_MESSAGE_BYTES).collect();
        assert_eq!(error.kind(), ErrorKind::BadInput, "{shown}");
        assert!(message.len() <= MAX_MESSAGE_BYTES, "{} bytes: {shown}", message.len());
        assert!(message.contains("\nhint: "), "{shown}");
        // What a tokenizer cannot encode comes from no file.
        let has_file = !matches!(error, IoError::Token { .. });
        assert!(!has_file || message.contains(&*self.dir.to_string_lossy()), "{shown}");
    }

    /// Puts length and checksum of the state into the manifest.
    fn seal_state(&self) {
        let path = self.dir.join("manifest.json");
        let mut manifest: Value = serde_json::from_slice(&read(&path)).expect("our own manifest");
        let (n_bytes, hash) = hash_file(&self.path()).expect("just written");
        let files = manifest["files"].as_array_mut().expect("a list of files");
        let record = files.iter_mut().find(|f| f["name"] == self.target.file_name());
        let record = record.expect("the state is in the manifest");
        record["bytes"] = n_bytes.into();
        record["xxh64"] = format!("{hash:016x}").into();
        fs::write(path, manifest.to_string()).expect("the directory can be written");
    }
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).expect("written before")
}

/// A small file with every float type.
fn write_tensors(path: &Path, names: &[&str]) -> Result<(), IoError> {
    let dtypes = [Dtype::F32, Dtype::Bf16, Dtype::F16];
    let spec = |(name, dtype): (&&str, Dtype)| TensorSpec {
        name: (*name).to_owned(),
        dtype,
        shape: vec![2, 3],
    };
    let specs: Vec<TensorSpec> = names.iter().zip(dtypes).map(spec).collect();
    let mut file = SafetensorsWriter::create(path, &specs, &[("made by", "fuzz")])?;
    for name in names {
        file.write_tensor_f32(name, &[1.0, -2.0, 0.5, 0.0, 3.0, 4.0])?;
    }
    file.finish()
}

/// A small Llama model with a byte-level tokenizer.
fn write_gguf(dir: &Path, dtype: GgmlType) -> Result<(), IoError> {
    let side = dir.join("side");
    let text = dir.join("text.txt");
    crate::write_file(&text, TEXT.as_bytes())?;
    fs::create_dir_all(&side).map_err(|e| IoError::writing(&side, 0, e))?;
    train_bpe(&[text], 258)?.save(&side)?;
    let config = json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "vocab_size": 258,
    });
    let tensors = [
        ("model.embed_tokens.weight".to_owned(), vec![258, 32]),
        ("model.layers.0.self_attn.q_proj.weight".to_owned(), vec![32, 32]),
        ("model.norm.weight".to_owned(), vec![32]),
    ];
    let export =
        GgufExport { name: dir, config: &config, tokenizer: &side, tensors: &tensors, dtype };
    export.write(dir, |i, start, dst| {
        for (j, x) in dst.iter_mut().enumerate() {
            *x = ((i + start + j) % 7) as f32;
        }
        Ok::<(), IoError>(())
    })
}

/// Reads every tensor of a GGUF file through a small buffer, and loads its tokenizer.
fn use_gguf(path: &Path, side: &Path) -> Result<(), IoError> {
    let model = GgufModel::open(path)?;
    let names: Vec<String> = model.tensor_names().collect();
    for name in names {
        // A tensor without a name in Hugging Face's format is no part of the model.
        let Some(shape) = model.shape(&name) else { continue };
        let n_elems: usize = shape.iter().product();
        let row_elems = shape.iter().skip(1).product::<usize>().max(1);
        let panel_elems = (256 / row_elems).max(1) * row_elems;
        let mut floats = vec![0.0; panel_elems.min(n_elems)];
        for start in (0..n_elems).step_by(panel_elems) {
            let part = &mut floats[..panel_elems.min(n_elems - start)];
            model.read_f32_at(&name, start, part)?;
        }
    }
    model.write_side_files(side)?;
    use_tokenizer(&Tokenizer::load(side)?)
}

/// Reads every tensor to its end through a small buffer.
fn read_all(file: &SafetensorsDir) -> Result<(), IoError> {
    let (mut floats, mut raw) = ([0.0; 256], [0; 1024]);
    for tensor in file.tensors() {
        let is_float = matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16);
        let n_elems = tensor.n_elems();
        for start in (0..n_elems).step_by(floats.len()).filter(|_| is_float) {
            let part = &mut floats[..(n_elems - start).min(256)];
            file.read_f32_at(&tensor.name, start, part)?;
        }
        for start in (0..tensor.bytes).step_by(raw.len()).filter(|_| !is_float) {
            let part = &mut raw[..(tensor.bytes - start).min(1024) as usize];
            file.read_exact_bytes(&tensor.name, start, part)?;
        }
    }
    Ok(())
}

/// Encodes a text, decodes what came out, and decodes by table.
fn use_tokenizer(tokenizer: &Tokenizer) -> Result<(), IoError> {
    // What not every tokenizer knows may be refused, but not with a panic.
    let _ = tokenizer.encode_prompt("<s> caf\u{e9} \u{1f600}\r\n");
    let ids = tokenizer.encode("but a stage, and all\n")?;
    tokenizer.decode(&ids)?;
    IdTable::new(tokenizer)?.decode(&ids);
    Ok(())
}

/// Reads all rows, finds out what they mean, and takes those that can be taken.
fn read_rows(path: &Path) -> Result<(), IoError> {
    let columns = ColumnMapping::default();
    let mut rows = RowReader::open(path)?;
    let mut n_rows = 0;
    while let Some(row) = rows.next_row()? {
        n_rows += 1;
        if let Ok(row) = row {
            for name in RowFormat::names() {
                let format = RowFormat::parse(name).expect("names are those of formats");
                let _ = samples(path, &row, format, &columns);
            }
        }
        // More rows than a file of this size can tell apart are made up by it.
        if n_rows > 100_000 {
            break;
        }
    }
    RowFormat::detect(path, &RowOptions::default()).map(|_| ())
}

/// Renders a few conversations and looks for the answers.
fn use_template(template: &ChatTemplate) {
    let say = |role: &str, content: &str| json!({"role": role, "content": content});
    let messages = vec![
        say("system", "s"),
        say("user", "u"),
        say("assistant", "<think>\nt\n</think>\n\na"),
        say("user", "caf\u{e9}"),
        say("assistant", " b "),
    ];
    let conversation = Conversation { messages, ..Conversation::default() };
    let end = template.end_of_turn(|text| text == "<|im_end|>");
    if let Ok(text) = template.supervised_text(&conversation, &end) {
        assert!(text.supervised.iter().all(|s| text.text.get(s.clone()).is_some()), "{text:?}");
    }
}

/// Reads all pieces, which are never longer than what they are cut from.
fn read_pieces(path: &Path, n_bytes: usize) -> Result<(), IoError> {
    let mut pieces = TextPieces::open(&[path.into()])?;
    let mut n_text = 0;
    while let Some(piece) = pieces.next_piece()? {
        assert!(piece.text.len() <= crate::PIECE_BYTES, "a piece of {} bytes", piece.text.len());
        n_text += piece.text.len();
    }
    assert!(n_text <= n_bytes, "{n_text} bytes of text out of {n_bytes} bytes");
    Ok(())
}

/// Reads all ids through a small buffer.
fn read_ids(cache: &TokenCache) -> Result<(), IoError> {
    let mut ids = [0; 256];
    for start in (0..cache.n_tokens()).step_by(ids.len()) {
        cache.read(start, &mut ids[..(cache.n_tokens() - start).min(256) as usize])?;
    }
    Ok(())
}

//! `init`: a fresh model directory from a configuration or a few sizes, with a tokenizer.

use std::path::{Path, PathBuf};

use ounce_io::{StagingDir, Tokenizer, write_file, write_json};
use ounce_models::{Family, ModelConfig, Purpose, SpecialTokens, build};
use serde::Serialize;
use serde_json::json;

use crate::error::message_and_hint;
use crate::model::{model_error, read_config};
use crate::output::forget_run;
use crate::{Error, Result, weights};

/// Vocabulary of a `bpe` tokenizer, if neither flag nor configuration says.
const DEFAULT_BPE_VOCAB: u64 = 1024;

/// The shape of a fresh model.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelShape {
    /// As in a `config.json`.
    Config(PathBuf),
    /// From sizes.
    Sizes {
        /// Family.
        family: Family,
        /// `L`.
        n_layers: u64,
        /// `H`.
        n_heads: u64,
        /// Key and value heads; `H` if not given.
        n_kv_heads: Option<u64>,
        /// `C`.
        hidden_size: u64,
        /// `F`; the family's usual multiple of `C` if not given.
        intermediate_size: Option<u64>,
        /// Longest row in tokens.
        context_length: u64,
    },
}

/// What to make.
#[derive(Debug, Clone, PartialEq)]
pub struct InitSettings {
    /// Where the model goes.
    pub output_dir: PathBuf,
    /// Its shape.
    pub model: ModelShape,
    /// `char`, `bpe`, a model directory, or a `tokenizer.json`.
    pub tokenizer: String,
    /// Most ids of a `bpe` tokenizer; with another tokenizer those of the model, which may be more than it has.
    pub vocab_size: Option<u64>,
    /// Text that the tokenizer is trained on.
    pub data: Vec<PathBuf>,
    /// Seed of the weights.
    pub seed: u64,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct InitRecord {
    /// Where it is.
    pub output_dir: PathBuf,
    /// Parameters, tied ones once.
    pub n_params: u64,
    /// `V`.
    pub vocab_size: u64,
    /// Longest row in tokens.
    pub context_length: u64,
}

/// The command: writes the directory, all of it or nothing.
///
/// # Errors
/// A directory that holds a trained model; a configuration or a tokenizer that is wrong; a failed write.
pub fn init(wanted: &InitSettings) -> Result<InitRecord> {
    check_target(&wanted.output_dir)?;
    let given = match &wanted.model {
        ModelShape::Config(path) => Some(read_config(path)?),
        ModelShape::Sizes { .. } => None,
    };
    let staging = StagingDir::create(&wanted.output_dir)?;
    let dir = staging.path();
    write_tokenizer(dir, wanted, given.as_ref().map(ModelConfig::vocab_size))?;
    let tokenizer = load_tokenizer(dir, &wanted.tokenizer)?;
    let n_ids = tokenizer.vocab_size() as u64;
    let mut config = match given {
        Some(config) => config,
        None => from_sizes(&wanted.model, model_vocab(wanted, n_ids))?,
    };
    check_vocab(wanted, n_ids, config.vocab_size())?;
    config.set_special_tokens(SpecialTokens {
        bos: tokenizer.bos_id().map(u64::from),
        eos: tokenizer.eos_id().map(u64::from).into_iter().collect(),
        pad: None,
    });
    let graph =
        build(&config, Purpose::Loss, 0.0).map_err(|e| model_error(&wanted.output_dir, &e))?;
    write_file(&dir.join("config.json"), config.to_json().as_bytes())?;
    let generation = serde_json::json!({
        "_from_model_config": true,
        "bos_token_id": tokenizer.bos_id(),
        "eos_token_id": tokenizer.eos_id(),
    });
    write_json(&dir.join("generation_config.json"), &generation)?;
    weights::write_fresh(dir, &graph, wanted.seed)?;
    forget_run(&wanted.output_dir)?;
    staging.publish()?;
    Ok(InitRecord {
        output_dir: wanted.output_dir.clone(),
        n_params: graph.n_params_elems(),
        vocab_size: config.vocab_size(),
        context_length: config.max_positions(),
    })
}

/// Refuses to put random weights in the place of others; fresh ones may be made anew.
fn check_target(dir: &Path) -> Result<()> {
    let names = ["model.safetensors", "model.safetensors.index.json"];
    if !names.iter().any(|name| dir.join(name).exists()) || weights::are_fresh(dir) {
        return Ok(());
    }
    Err(Error::Usage {
        message: format!("{}: holds a model whose weights are not fresh", dir.display()),
        hint: "choose another `--output-dir`, or remove the model first".to_owned(),
    })
}

/// Ids of a model from sizes whose tokenizer has `n_ids`.
fn model_vocab(wanted: &InitSettings, n_ids: u64) -> u64 {
    // A text may have fewer pairs to merge than a `bpe` tokenizer was allowed.
    wanted.vocab_size.filter(|_| wanted.tokenizer != "bpe").unwrap_or(n_ids)
}

/// Refuses a vocabulary of the model that is smaller than its tokenizer's, or another one than was asked for.
fn check_vocab(wanted: &InitSettings, n_ids: u64, vocab_size: u64) -> Result<()> {
    let is_given = matches!(wanted.model, ModelShape::Config(_));
    let usage = |message, hint| Err(Error::Usage { message, hint });
    match wanted.vocab_size {
        Some(asked) if is_given && wanted.tokenizer != "bpe" && asked != vocab_size => usage(
            format!("`--vocab-size {asked}`: the configuration's vocab_size is {vocab_size}"),
            "the configuration decides; leave out one of them".to_owned(),
        ),
        Some(asked) if !is_given && n_ids > vocab_size => usage(
            format!("`--vocab-size {asked}`: the tokenizer has {n_ids} ids"),
            format!("give at least `--vocab-size {n_ids}`, or leave it out"),
        ),
        _ if n_ids > vocab_size => Err(Error::Input {
            message: format!(
                "the tokenizer has {n_ids} ids, the configuration's vocab_size is {vocab_size}"
            ),
            hint: format!("set vocab_size to at least {n_ids} in the configuration"),
        }),
        _ => Ok(()),
    }
}

/// Trains or copies the tokenizer into `dir`.
fn write_tokenizer(dir: &Path, wanted: &InitSettings, config_vocab: Option<u64>) -> Result<()> {
    let trained = matches!(wanted.tokenizer.as_str(), "char" | "bpe");
    if trained && wanted.data.is_empty() {
        return Err(Error::Usage {
            message: format!("a `{}` tokenizer is made from a text", wanted.tokenizer),
            hint: "give `--data FILE`".to_owned(),
        });
    }
    match wanted.tokenizer.as_str() {
        "char" => Ok(ounce_io::train_char(&wanted.data)?.save(dir)?),
        "bpe" => {
            let n_ids = wanted.vocab_size.or(config_vocab).unwrap_or(DEFAULT_BPE_VOCAB);
            Ok(ounce_io::train_bpe(&wanted.data, n_ids as usize)?.save(dir)?)
        }
        other => copy_tokenizer(Path::new(other), dir),
    }
}

/// Loads the tokenizer in `dir`; what is wrong with it is wrong with the one it was copied from.
fn load_tokenizer(dir: &Path, source: &str) -> Result<Tokenizer> {
    Tokenizer::load(dir).map_err(|e| {
        let (message, hint) = message_and_hint(&e);
        let copy = dir.join("tokenizer.json").display().to_string();
        Error::Input { message: message.replace(&copy, source), hint }
    })
}

/// Copies the tokenizer of a model directory, or one file.
fn copy_tokenizer(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        ounce_io::copy_tokenizer_files(from, to)?;
        return Ok(());
    }
    let bytes = std::fs::read(from).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::Usage {
            message: format!("`{}` is not a tokenizer", from.display()),
            hint: "`--tokenizer` takes char, bpe, a model directory or a tokenizer.json".to_owned(),
        },
        _ => Error::file(from, &e),
    })?;
    Ok(write_file(&to.join("tokenizer.json"), &bytes)?)
}

/// The configuration of a family from its sizes; the rest is as `transformers` has it.
fn from_sizes(shape: &ModelShape, vocab_size: u64) -> Result<ModelConfig> {
    let ModelShape::Sizes {
        family,
        n_layers,
        n_heads,
        n_kv_heads,
        hidden_size,
        intermediate_size,
        context_length,
    } = *shape
    else {
        unreachable!("a configuration was read as one")
    };
    if n_heads == 0 || hidden_size == 0 || !hidden_size.is_multiple_of(n_heads) {
        return Err(Error::Usage {
            message: format!("hidden size {hidden_size} is not a multiple of {n_heads} heads"),
            hint: "choose `--hidden-size` as heads times 32 or 64".to_owned(),
        });
    }
    let config = if family == Family::Gpt2 {
        if n_kv_heads.is_some_and(|n| n != n_heads) {
            return Err(Error::Usage {
                message: "`--n-kv-heads`: every head of gpt2 has keys and values of its own"
                    .to_owned(),
                hint: "leave it out, or choose another `--arch`".to_owned(),
            });
        }
        json!({
            "model_type": "gpt2", "vocab_size": vocab_size, "n_positions": context_length,
            "n_embd": hidden_size, "n_layer": n_layers, "n_head": n_heads,
            "n_inner": intermediate_size,
        })
    } else {
        // 8/3 C, as in `[Touvron23]`, in whole cache lines.
        let usual = (hidden_size * 8 / 3).next_multiple_of(32);
        let head_dim = hidden_size / n_heads;
        let mut config = json!({
            "model_type": family.name(), "vocab_size": vocab_size, "hidden_size": hidden_size,
            "intermediate_size": intermediate_size.unwrap_or(usual),
            "num_hidden_layers": n_layers, "num_attention_heads": n_heads,
            "num_key_value_heads": n_kv_heads.unwrap_or(n_heads), "head_dim": head_dim,
            "max_position_embeddings": context_length, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": true, "bos_token_id": null, "eos_token_id": null,
        });
        if matches!(family, Family::Gemma2 | Family::Gemma3) {
            config["query_pre_attn_scalar"] = json!(head_dim);
        }
        config
    };
    // Reading it checks the sizes against each other.
    ModelConfig::from_json(&config.to_string()).map_err(|e| {
        let (message, hint) = message_and_hint(&e);
        Error::Usage { message, hint }
    })
}

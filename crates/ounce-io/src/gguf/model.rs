//! A GGUF file seen as a Hugging Face model: its tensors under Hugging Face's names and in its layout, its keys and
//! vocabulary as the files of a model directory.

use std::path::Path;

use serde_json::{Value, json};

use super::arch::Arch;
use super::config::{ROPE_FREQS, arch_of, to_config};
use super::header::GgufTensor;
use super::layout::Direction;
use super::read::Gguf;
use super::vocab::tokenizer_files;
use crate::error::IoError;
use crate::hf_dir::write_json;

/// An open GGUF file of a supported architecture.
#[derive(Debug)]
pub struct GgufModel {
    gguf: Gguf,
    arch: &'static Arch,
    config: Value,
    n_heads: usize,
    n_kv_heads: usize,
}

impl GgufModel {
    /// Opens a file, and reads its configuration.
    ///
    /// # Errors
    /// `Missing`, `Read`; `BadFile`, `BadTensor` for a file that is damaged or not supported.
    pub fn open(path: &Path) -> Result<Self, IoError> {
        let gguf = Gguf::open(path)?;
        let arch = arch_of(&gguf)?;
        let config = to_config(&gguf, arch)?;
        let count = |keys: [&str; 2]| keys.iter().find_map(|key| config[*key].as_u64());
        let n_heads = count(["num_attention_heads", "n_head"]).unwrap_or(0) as usize;
        let n_kv_heads = count(["num_key_value_heads", ""]).unwrap_or(n_heads as u64) as usize;
        let model = Self { gguf, arch, config, n_heads, n_kv_heads };
        for tensor in model.gguf.tensors() {
            if let Some(name) = model.hf_name(tensor) {
                let layout = arch.layout(&name, n_heads, n_kv_heads);
                if !layout.fits(&tensor.shape) {
                    let reason = format!(
                        "has shape {:?}, which {n_heads} heads ({n_kv_heads} for k and v) do not divide",
                        tensor.shape
                    );
                    return Err(model.gguf.bad_tensor(&tensor.name, reason));
                }
            }
        }
        Ok(model)
    }

    /// What Hugging Face has as `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Hash of keys and vocabulary: what the side files are made from.
    pub fn header_hash(&self) -> u64 {
        self.gguf.header_hash()
    }

    /// Hugging Face's names of all tensors, in the order in which they lie in the file. A tensor that has none there
    /// keeps its own.
    pub fn tensor_names(&self) -> impl Iterator<Item = String> {
        let tensors = self.gguf.tensors().iter().filter(|t| t.name != ROPE_FREQS);
        tensors.map(|t| self.hf_name(t).unwrap_or_else(|| t.name.clone()))
    }

    /// Shape of the tensor that Hugging Face calls `name`, outermost first.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let layout = self.arch.layout(name, self.n_heads, self.n_kv_heads);
        Some(layout.other_shape(&self.find(name)?.shape))
    }

    /// Reads elements `start..start + dst.len()` of the tensor that Hugging Face calls `name`, in its layout.
    ///
    /// # Errors
    /// `BadTensor` where it is missing or shorter, `Read`.
    pub fn read_f32_at(&self, name: &str, start: usize, dst: &mut [f32]) -> Result<(), IoError> {
        let tensor = self.find(name);
        let tensor = tensor.ok_or_else(|| self.gguf.bad_tensor(name, "is missing"))?;
        let layout = self.arch.layout(name, self.n_heads, self.n_kv_heads);
        let shape = layout.other_shape(&tensor.shape);
        if start.checked_add(dst.len()).is_none_or(|end| end > tensor.n_elems()) {
            let reason = format!("holds no {} elements from {start} on", dst.len());
            return Err(self.gguf.bad_tensor(name, reason));
        }
        layout.read(Direction::ToHuggingFace, &shape, start, dst, |start, dst| {
            self.gguf.read_f32_at(tensor, start, dst)
        })
    }

    /// Writes `config.json`, `generation_config.json` and the tokenizer's files into an existing directory.
    ///
    /// # Errors
    /// `BadFile` for a tokenizer that is not supported; `Read`, `Write`.
    pub fn write_side_files(&self, dir: &Path) -> Result<(), IoError> {
        let context = ["max_position_embeddings", "n_positions"];
        let context = context.iter().find_map(|key| self.config[*key].as_u64()).unwrap_or(0);
        let files = tokenizer_files(&self.gguf, context)?;
        write_json(&dir.join("config.json"), &self.config)?;
        write_json(&dir.join("generation_config.json"), &self.generation_config())?;
        // As others write it: not indented, which would double a large vocabulary.
        crate::write_file(&dir.join("tokenizer.json"), files.tokenizer.to_string().as_bytes())?;
        write_json(&dir.join("tokenizer_config.json"), &files.config)
    }

    /// Where generation begins and ends: a turn may end with a token of its own.
    fn generation_config(&self) -> Value {
        let eos = self.config["eos_token_id"].as_u64();
        let end_of_turn = self.gguf.u64("tokenizer.ggml.eot_token_id");
        let mut ends: Vec<u64> = eos.into_iter().chain(end_of_turn).collect();
        ends.dedup();
        let ends = if let [one] = ends[..] { json!(one) } else { json!(ends) };
        let mut config = json!({"_from_model_config": true});
        for (key, value) in [
            ("bos_token_id", self.config["bos_token_id"].clone()),
            ("eos_token_id", ends),
            ("pad_token_id", self.config["pad_token_id"].clone()),
        ] {
            if !value.is_null() && value != json!([]) {
                config[key] = value;
            }
        }
        config
    }

    fn find(&self, name: &str) -> Option<&GgufTensor> {
        self.gguf.get(&self.arch.gguf_name(name)?)
    }

    fn hf_name(&self, tensor: &GgufTensor) -> Option<String> {
        self.arch.hf_name(&tensor.name)
    }
}

//! A Hugging Face model as a GGUF file, with an Ollama `Modelfile` beside it.
//!
//! Tensors are written in the order in which they are given, through one buffer of [`PANEL_ELEMS`] elements (or one
//! row of a transposed matrix, where that is longer), so memory does not grow with the model.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use super::block::GgmlType;
use super::config::{ROPE_FREQS, from_config};
use super::layout::Direction;
use super::vocab_fields::tokenizer_fields;
use super::write::{GgufField, GgufSpec, GgufWriter};
use crate::atomic::write_file;
use crate::error::IoError;

/// Name of the file in its directory.
pub const GGUF_FILE: &str = "model.gguf";
/// Elements of the buffer through which a tensor goes: 1 MiB.
const PANEL_ELEMS: usize = 256 << 10;

/// What is to be written.
#[derive(Debug)]
pub struct GgufExport<'a> {
    /// Where the model comes from, for messages.
    pub name: &'a Path,
    /// Its `config.json`.
    pub config: &'a Value,
    /// The directory of its tokenizer.
    pub tokenizer: &'a Path,
    /// Names and shapes of its tensors, as Hugging Face has them.
    pub tensors: &'a [(String, Vec<usize>)],
    /// Type of its matrices; vectors are F32.
    pub dtype: GgmlType,
}

impl GgufExport<'_> {
    /// Writes [`GGUF_FILE`] and `Modelfile` into `dir`. `read(i, start, dst)` reads elements of tensor `i`.
    ///
    /// # Errors
    /// `BadFile` for a model or tokenizer that llama.cpp has no words for, `BadTensor` for a number that does not fit
    /// its type; those of `read`; `Write`.
    ///
    /// # Panics
    /// If `dtype` is one that is only read.
    pub fn write<E: From<IoError>>(
        &self,
        dir: &Path,
        mut read: impl FnMut(usize, usize, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let hint = "`--format hf` writes every model";
        let refuse = |reason: String| IoError::bad_file(self.name, reason, hint);
        let model = from_config(self.config).map_err(refuse)?;
        let vocab_size = self.config["vocab_size"].as_u64().unwrap_or(0) as usize;
        let mut fields = model.fields;
        fields.extend(self.general_fields());
        let tokenizer = tokenizer_fields(self.tokenizer, vocab_size)?;
        let stop = stop_texts(&tokenizer);
        fields.extend(tokenizer);
        let mut specs = Vec::with_capacity(self.tensors.len() + 1);
        let mut layouts = Vec::with_capacity(self.tensors.len());
        for (name, shape) in self.tensors {
            let gguf_name = model.arch.gguf_name(name);
            let gguf_name =
                gguf_name.ok_or_else(|| refuse(format!("tensor `{name}` has no name in GGUF")))?;
            let layout = model.arch.layout(name, model.n_heads, model.n_kv_heads);
            if !layout.fits(shape) {
                return Err(refuse(format!("tensor `{name}` has shape {shape:?}")).into());
            }
            specs.push(GgufSpec::new(gguf_name, self.dtype, layout.other_shape(shape)));
            layouts.push(layout);
        }
        if let Some(factors) = &model.rope_freqs {
            let shape = vec![factors.len()];
            specs.push(GgufSpec::new(ROPE_FREQS.into(), GgmlType::F32, shape));
        }
        let mut file = GgufWriter::create(&dir.join(GGUF_FILE), &fields, specs.clone())?;
        let mut panel = Vec::new();
        for (i, (spec, layout)) in specs.iter().zip(layouts).enumerate() {
            let row_elems = spec.shape[1..].iter().product::<usize>().max(1);
            let n_elems: usize = spec.shape.iter().product();
            // Whole rows, so that blocks are whole too.
            let panel_elems = (PANEL_ELEMS / row_elems).max(1) * row_elems;
            for start in (0..n_elems).step_by(panel_elems) {
                panel.resize(panel_elems.min(n_elems - start), 0.0);
                layout.read(Direction::ToGguf, &spec.shape, start, &mut panel, |at, dst| {
                    read(i, at, dst)
                })?;
                file.append(self.name, &panel)?;
            }
        }
        if let Some(factors) = &model.rope_freqs {
            file.append(self.name, factors)?;
        }
        file.finish()?;
        let context = ["max_position_embeddings", "n_positions"];
        let context = context.iter().find_map(|key| self.config[*key].as_u64());
        let text = modelfile(context, &stop);
        Ok(write_file(&dir.join("Modelfile"), text.as_bytes())?)
    }

    fn general_fields(&self) -> Vec<(String, GgufField)> {
        // Llama.cpp's numbers of "mostly F16" and the like.
        let file_type = match self.dtype {
            GgmlType::F16 => 1,
            GgmlType::Q8_0 => 7,
            GgmlType::Bf16 => 32,
            _ => 0,
        };
        let name = self.name.file_name().map_or_else(String::new, |n| n.to_string_lossy().into());
        vec![
            ("general.type".into(), GgufField::Text("model".into())),
            ("general.name".into(), GgufField::Text(name)),
            ("general.file_type".into(), GgufField::U32(file_type)),
            ("general.quantization_version".into(), GgufField::U32(2)),
        ]
    }
}

/// The texts of the tokens at which generation ends.
fn stop_texts(fields: &[(String, GgufField)]) -> Vec<String> {
    let find = |key: &str| {
        let key = format!("tokenizer.ggml.{key}");
        fields.iter().find(|(k, _)| *k == key).map(|(_, field)| field)
    };
    let Some(GgufField::Texts(tokens)) = find("tokens") else { return Vec::new() };
    let ids = [find("eos_token_id"), find("eot_token_id")].into_iter().flatten();
    let text = |field: &GgufField| match field {
        GgufField::U32(id) => tokens.get(*id as usize).cloned(),
        _ => None,
    };
    ids.filter_map(text).collect()
}

/// What `ollama create NAME -f Modelfile` reads. The chat template is in the GGUF file.
fn modelfile(context: Option<u64>, stop: &[String]) -> String {
    let mut text = format!("FROM ./{GGUF_FILE}\n");
    if let Some(n) = context {
        writeln!(text, "PARAMETER num_ctx {n}").expect("strings take every write");
    }
    for stop in stop {
        let quoted = Value::from(stop.as_str());
        writeln!(text, "PARAMETER stop {quoted}").expect("strings take every write");
    }
    text
}

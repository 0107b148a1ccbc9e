//! A model in another format: a Hugging Face directory with weights of some type, or a GGUF file.
//!
//! The model is read as for a run: every parameter must be there in its shape, and nothing else. Tensors go from file
//! to file through one buffer; the new directory appears when all of it is complete.

use std::path::{Path, PathBuf};

use ounce_io::{
    Dtype, GgmlType, GgufExport, SafetensorsWriter, StagingDir, TensorSpec, copy_side_files,
    write_file,
};
use ounce_ir::{DType, Graph, ParamId};
use ounce_models::{Purpose, build};
use serde::Serialize;

use crate::model::{Model, model_error};
use crate::output::holds_run;
use crate::precision::config_with_dtype;
use crate::weights::{Source, specs};
use crate::{Environment, Error, Observer, Result};

/// Elements of the buffer through which a tensor goes: 1 MiB.
const PANEL_ELEMS: usize = 256 << 10;

/// Formats of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportFormat {
    /// A directory that `transformers` loads.
    Hf,
    /// `model.gguf`, that llama.cpp loads, with an Ollama `Modelfile`.
    Gguf,
}

/// Types of weights in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the formats' own names")]
pub enum ExportDtype {
    F32,
    Bf16,
    F16,
    /// Blocks of 32 numbers of 8 bits with a common scale; GGUF only.
    #[serde(rename = "q8_0")]
    Q8_0,
}

/// What is to be exported, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportSettings {
    /// A directory, a GGUF file, or ORG/NAME in the hub's cache.
    pub model: PathBuf,
    /// Where it goes.
    pub output_dir: PathBuf,
    /// As what.
    pub format: ExportFormat,
    /// Type of the weights; by default F32 in a directory and F16 in a GGUF file.
    pub dtype: Option<ExportDtype>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExportRecord {
    /// Where it is.
    pub output_dir: PathBuf,
    /// As what.
    pub format: ExportFormat,
    /// Type of the weights.
    pub dtype: ExportDtype,
    /// Parameters, tied ones once.
    pub n_params: u64,
    /// Bytes of all files.
    pub bytes: u64,
}

/// The command: writes the directory, all of it or nothing.
///
/// # Errors
/// A model that is wrong or that the format has no words for; a failed write; a request to stop.
pub fn export(
    wanted: &ExportSettings,
    env: &Environment,
    observer: &mut dyn Observer,
) -> Result<ExportRecord> {
    let by_default = match wanted.format {
        ExportFormat::Hf => ExportDtype::F32,
        ExportFormat::Gguf => ExportDtype::F16,
    };
    let dtype = wanted.dtype.unwrap_or(by_default);
    let model = Model::find(&wanted.model, env)?;
    let graph =
        build(&model.config, Purpose::Loss, 0.0).map_err(|e| model_error(&model.path, &e))?;
    let source = Source::open(&model.path, &model.config, &graph)?;
    check_target(&wanted.output_dir, &model.path)?;
    let staging = StagingDir::create(&wanted.output_dir)?;
    let dir = staging.path();
    let job = Job { model: &model, graph: &graph, source: &source };
    match wanted.format {
        ExportFormat::Hf => job.write_hf(dir, dtype, observer)?,
        ExportFormat::Gguf => job.write_gguf(dir, dtype, observer)?,
    }
    let bytes = bytes_of_files(dir)?;
    staging.publish()?;
    Ok(ExportRecord {
        output_dir: wanted.output_dir.clone(),
        format: wanted.format,
        dtype,
        n_params: graph.n_params_elems(),
        bytes,
    })
}

/// Refuses to write over the model that is exported, or over the result of a run.
fn check_target(dir: &Path, model: &Path) -> Result<()> {
    let full = |path: &Path| path.canonicalize().ok();
    let (target, source) = (full(dir), full(model));
    let what = match (target, source.as_deref()) {
        (Some(target), Some(source)) if target == source => "is the model that is exported",
        (Some(target), Some(source)) if source.parent() == Some(&*target) && source.is_file() => {
            "holds the file that is exported"
        }
        _ if holds_run(dir) => "holds the result of a training run",
        _ => return Ok(()),
    };
    Err(Error::Usage {
        message: format!("{} {what}", dir.display()),
        hint: "choose another `--output-dir`".to_owned(),
    })
}

/// An opened model.
struct Job<'a> {
    model: &'a Model,
    graph: &'a Graph,
    source: &'a Source,
}

impl Job<'_> {
    /// Side files as they are but for the type of the weights, then the weights.
    fn write_hf(&self, dir: &Path, dtype: ExportDtype, observer: &mut dyn Observer) -> Result<()> {
        let (dtype, said) = match dtype {
            ExportDtype::F32 => (Dtype::F32, DType::F32),
            ExportDtype::Bf16 => (Dtype::Bf16, DType::Bf16),
            ExportDtype::F16 => (Dtype::F16, DType::F16),
            ExportDtype::Q8_0 => {
                return Err(Error::Usage {
                    message: "safetensors have no type q8_0".to_owned(),
                    hint: "use `--dtype bf16`, or `--format gguf`".to_owned(),
                });
            }
        };
        copy_side_files(&self.model.dir, dir)?;
        if let Some(config) = config_with_dtype(&self.model.dir, said)? {
            write_file(&dir.join("config.json"), config.as_bytes())?;
        }
        let specs: Vec<TensorSpec> =
            specs(self.graph).into_iter().map(|spec| TensorSpec { dtype, ..spec }).collect();
        let mut file = SafetensorsWriter::create(&dir.join("model.safetensors"), &specs, &[])?;
        let mut panel = Vec::new();
        for (id, param) in self.graph.params.iter() {
            let n_elems = param.shape.row_elems() as usize;
            let row_elems = param.shape.dims.iter().skip(1).product::<u64>().max(1) as usize;
            let panel_elems = (PANEL_ELEMS / row_elems).max(1) * row_elems;
            for start in (0..n_elems).step_by(panel_elems) {
                panel.resize(panel_elems.min(n_elems - start), 0.0);
                self.read(id, start, &mut panel, observer)?;
                file.append_f32(&param.name, &panel)?;
            }
        }
        Ok(file.finish()?)
    }

    fn write_gguf(
        &self,
        dir: &Path,
        dtype: ExportDtype,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let dtype = match dtype {
            ExportDtype::F32 => GgmlType::F32,
            ExportDtype::Bf16 => GgmlType::Bf16,
            ExportDtype::F16 => GgmlType::F16,
            ExportDtype::Q8_0 => GgmlType::Q8_0,
        };
        let ids: Vec<ParamId> = self.graph.params.ids().collect();
        let tensors: Vec<(String, Vec<usize>)> =
            specs(self.graph).into_iter().map(|spec| (spec.name, spec.shape)).collect();
        // As it was read, with keys that the graph does not need, and with what its family has where it says nothing.
        let mut config = ounce_io::read_config(&self.model.dir)?;
        let resolved: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(&self.model.config.to_json()).expect("an object");
        let read = config.as_object_mut().expect("a configuration is an object");
        resolved.into_iter().for_each(|(key, value)| {
            read.entry(key).or_insert(value);
        });
        let export = GgufExport {
            name: &self.model.path,
            config: &config,
            tokenizer: &self.model.dir,
            tensors: &tensors,
            dtype,
        };
        export.write(dir, |i, start, dst| self.read(ids[i], start, dst, observer))
    }

    fn read(
        &self,
        id: ParamId,
        start: usize,
        dst: &mut [f32],
        observer: &mut dyn Observer,
    ) -> Result<()> {
        if observer.stop_requested() {
            return Err(Error::Interrupted { step: 0, checkpoint: None });
        }
        self.source.read(id, start, dst)
    }
}

fn bytes_of_files(dir: &Path) -> Result<u64> {
    let failed = |e: std::io::Error| Error::file(dir, &e);
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        bytes += entry.and_then(|entry| entry.metadata()).map_err(failed)?.len();
    }
    Ok(bytes)
}

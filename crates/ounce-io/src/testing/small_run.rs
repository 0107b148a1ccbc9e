//! A run of a model with a handful of numbers, whose checkpoints take a millisecond to save.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::checkpoint::{
    Checkpoint, CheckpointWriter, DataCursor, ScalerState, TrainerState, checkpoint_bytes,
    state_name,
};
use crate::disk::Disk;
use crate::error::IoError;
use crate::safetensors::{ByteSink, Dtype, SafetensorsWriter, TensorSpec};
use crate::staging::StagingDir;

const PARAMS: [(&str, usize); 3] = [("wte.weight", 12), ("empty", 0), ("norm.weight", 3)];
const STATES: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// The run: a model directory to begin from, and tensors that are functions of the step.
#[derive(Debug)]
pub struct SmallRun {
    model_dir: PathBuf,
    weights: Vec<TensorSpec>,
    optimizer: Vec<TensorSpec>,
}

impl SmallRun {
    /// Writes the side files of the model into `model_dir`.
    ///
    /// # Errors
    /// `Write`.
    pub fn new(model_dir: &Path) -> Result<Self, IoError> {
        for name in ["config.json", "tokenizer.json"] {
            write(&model_dir.join(name), "{\"model_type\": \"gpt2\"}\n")?;
        }
        let spec = |name: String, n| TensorSpec { name, dtype: Dtype::F32, shape: vec![n] };
        let weights = PARAMS.map(|(name, n)| spec(name.into(), n)).to_vec();
        let optimizer = STATES
            .iter()
            .flat_map(|state| PARAMS.map(|(param, n)| spec(state_name(state, param), n)))
            .collect();
        Ok(Self { model_dir: model_dir.into(), weights, optimizer })
    }

    /// Saves the checkpoint after `step` steps.
    ///
    /// # Errors
    /// As [`CheckpointWriter`].
    pub fn save(
        &self,
        disk: Arc<dyn Disk>,
        output_dir: &Path,
        step: u64,
    ) -> Result<PathBuf, IoError> {
        let needed_bytes = checkpoint_bytes(&self.weights, &self.optimizer, &self.model_dir)?;
        let mut writer = CheckpointWriter::begin_on(disk, output_dir, step, needed_bytes)?;
        writer.copy_side_files(&self.model_dir)?;
        writer.write_file("run.yaml", format!("max_steps: {step}\n").as_bytes())?;
        write_tensors(writer.weights(&self.weights)?, &self.weights, step)?;
        write_tensors(writer.optimizer(&self.optimizer)?, &self.optimizer, step)?;
        writer.publish(&self.state(step))
    }

    /// Publishes the model after `step` steps, at the top of `output_dir`.
    ///
    /// # Errors
    /// As [`StagingDir`].
    pub fn publish(
        &self,
        disk: Arc<dyn Disk>,
        output_dir: &Path,
        step: u64,
    ) -> Result<(), IoError> {
        let staging = StagingDir::create_on(disk, output_dir)?;
        for name in ["config.json", "tokenizer.json", "model.safetensors"] {
            write(&staging.path().join(name), &format!("{name} {step}"))?;
        }
        staging.publish()
    }

    /// Compares all of a checkpoint with what was saved after `step` steps.
    ///
    /// # Panics
    /// If anything differs.
    pub fn check(&self, checkpoint: &Checkpoint, step: u64) {
        assert_eq!(*checkpoint.state(), self.state(step));
        for (param, n) in PARAMS {
            let mut read = vec![0.0; n];
            checkpoint.read_weight(param, &mut read).expect("the parameter is there");
            assert_eq!(read, values(param, n, step));
            for state in STATES {
                checkpoint.read_state(state, param, &mut read).expect("the state is there");
                assert_eq!(read, values(&state_name(state, param), n, step));
            }
        }
        let yaml = std::fs::read_to_string(checkpoint.path().join("run.yaml"));
        assert_eq!(yaml.expect("side files are there"), format!("max_steps: {step}\n"));
    }

    /// The state after `step` steps.
    pub fn state(&self, step: u64) -> TrainerState {
        TrainerState {
            step,
            course: 0,
            n_updates: step - step / 8,
            cursor: DataCursor { epoch: step / 5, row: step % 5 },
            data_hash: None,
            rows_made_s: None,
            stream: None,
            seed: 42,
            schedule: Map::from_iter([("warmup_steps".to_owned(), Value::from(3))]),
            settings: Map::from_iter([("learning_rate".to_owned(), Value::from(1e-3))]),
            kernel_tier: "portable".into(),
            code_version: env!("CARGO_PKG_VERSION").into(),
            tokens_seen: step * 64,
            scaler: Some(ScalerState {
                scale: 65536.0,
                n_good_steps: step,
                n_skipped_steps: step / 8,
                strikes: BTreeMap::new(),
            }),
        }
    }
}

/// Writes a file without waiting for the disk.
fn write(path: &Path, text: &str) -> Result<(), IoError> {
    std::fs::write(path, text).map_err(|e| IoError::writing(path, text.len() as u64, e))
}

fn write_tensors<F: ByteSink>(
    mut file: SafetensorsWriter<F>,
    specs: &[TensorSpec],
    step: u64,
) -> Result<(), IoError> {
    for spec in specs {
        file.write_tensor_f32(&spec.name, &values(&spec.name, spec.shape[0], step))?;
    }
    file.finish()
}

/// Numbers that are different for every tensor and step.
fn values(name: &str, n: usize, step: u64) -> Vec<f32> {
    (0..n).map(|i| (name.len() * 1000 + i) as f32 + step as f32 / 64.0).collect()
}

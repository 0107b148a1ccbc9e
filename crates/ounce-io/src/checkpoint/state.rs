//! `trainer_state.json`: where a run stands, apart from its tensors.
//!
//! Randomness needs no state of its own: every random number is a function of the seed and the place where it is used
//! (step, row, position), and so is the order of the data. Numbers are written in the shortest form that reads back
//! as the same bits.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::FORMAT;
use super::manifest::{DAMAGED, check_format};
use crate::error::IoError;
use crate::json::{MAX_DEPTH, read_json};
use crate::stream::StreamCursor;

/// Longest `trainer_state.json`.
const MAX_STATE_BYTES: u64 = 16 << 20;

/// Where the next step takes its data from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataCursor {
    /// Passes over the data that are complete.
    pub epoch: u64,
    /// Rows of the current pass that were trained on, in its shuffled order.
    pub row: u64,
}

/// Where the dynamic loss scale of f16 stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScalerState {
    /// The factor of the loss.
    pub scale: f32,
    /// Steps without overflow since the scale last changed.
    pub n_good_steps: u64,
    /// Steps that were skipped since the run began.
    pub n_skipped_steps: u64,
    /// Overflows by class of ops.
    #[serde(default)]
    pub strikes: BTreeMap<String, u32>,
}

/// Where a run stands, apart from its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainerState {
    /// Steps done.
    pub step: u64,
    /// Course that the run takes in its output directory, counted from 0: one that leaves newer checkpoints of another
    /// course behind has a higher number, so that those are not taken for the newest ([`super::course`]).
    #[serde(default)]
    pub course: u64,
    /// Steps that updated the weights: fewer than `step` where a number was not finite or another optimizer took over.
    /// The optimizer corrects its bias by it.
    pub n_updates: u64,
    /// Where the next step takes its data from.
    pub cursor: DataCursor,
    /// What the data files held, in hexadecimal digits; of a stream `stream` says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_hash: Option<String>,
    /// The time that chat templates wrote into the rows, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_made_s: Option<u64>,
    /// Where a stream stands, with the hash of what its files held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<StreamCursor>,
    /// The run's seed.
    pub seed: u64,
    /// The learning rate's schedule.
    pub schedule: Map<String, Value>,
    /// Every setting of the run, resolved, by its name in `run.yaml`.
    pub settings: Map<String, Value>,
    /// Which kernels ran: on others the bits differ.
    pub kernel_tier: String,
    /// Which version of the program ran.
    pub code_version: String,
    /// Tokens trained on since the run began.
    pub tokens_seen: u64,
    /// The dynamic loss scale, in f16.
    pub scaler: Option<ScalerState>,
}

/// What is in the file: the state after the version of its layout.
#[derive(Serialize, Deserialize)]
struct Stored<S> {
    format: u32,
    state: S,
}

impl TrainerState {
    /// The file's text.
    ///
    /// # Errors
    /// `Usage` for a number that is not finite or settings too long or deep to be read back.
    pub(super) fn to_json(&self, path: &Path) -> Result<String, IoError> {
        let unusable = |what: String| IoError::Usage {
            what: format!("cannot write {}: {what}", path.display()),
            hint: "a checkpoint is saved while all numbers are finite and its settings short"
                .into(),
        };
        if self.scaler.as_ref().is_some_and(|scaler| !scaler.scale.is_finite()) {
            return Err(unusable("a number is not finite".into()));
        }
        let text = serde_json::to_string_pretty(&Stored { format: FORMAT, state: self });
        let text = text.map_err(|e| unusable(e.to_string()))? + "\n";
        if text.len() as u64 > MAX_STATE_BYTES {
            let n_bytes = text.len();
            return Err(unusable(format!("{n_bytes} bytes, more than {MAX_STATE_BYTES}")));
        }
        // Three levels are the file's own.
        if depth(self.schedule.values().chain(self.settings.values())) > MAX_DEPTH - 3 {
            return Err(unusable(format!("settings nested deeper than {}", MAX_DEPTH - 3)));
        }
        Ok(text)
    }

    /// Reads the file.
    ///
    /// # Errors
    /// `Missing`, `Read`, `BadFile`, `BadLine`.
    pub(super) fn read(path: &Path) -> Result<Self, IoError> {
        let value = read_json(path, MAX_STATE_BYTES)?;
        check_format(path, &value)?;
        match serde_json::from_value::<Stored<Self>>(value) {
            Ok(stored) => Ok(stored.state),
            Err(e) => Err(IoError::bad_file(path, e.to_string(), DAMAGED)),
        }
    }
}

/// How deep values are nested.
fn depth<'a>(values: impl Iterator<Item = &'a Value>) -> usize {
    let below = |value: &Value| match value {
        Value::Array(values) => 1 + depth(values.iter()),
        Value::Object(map) => 1 + depth(map.values()),
        _ => 0,
    };
    values.map(below).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn state() -> TrainerState {
        let Value::Object(settings) = json!({"learning_rate": 0.1 + 0.2, "seed": u64::MAX}) else {
            unreachable!("an object")
        };
        TrainerState {
            step: 12,
            course: 2,
            n_updates: 11,
            cursor: DataCursor { epoch: 1, row: 3 },
            data_hash: Some("0123456789abcdef".into()),
            rows_made_s: Some(1_795_824_000),
            stream: None,
            seed: u64::MAX,
            schedule: Map::new(),
            settings,
            kernel_tier: "avx2".into(),
            code_version: "0.1.0".into(),
            tokens_seen: 1 << 40,
            scaler: Some(scaler(0.1)),
        }
    }

    fn scaler(scale: f32) -> ScalerState {
        ScalerState {
            scale,
            n_good_steps: 1,
            n_skipped_steps: 1,
            strikes: BTreeMap::from([("linear".to_owned(), 2)]),
        }
    }

    #[test]
    fn every_bit_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(super::super::STATE);
        std::fs::write(&path, state().to_json(&path).unwrap()).unwrap();
        assert_eq!(TrainerState::read(&path).unwrap(), state());
        arbtest::arbtest(|u| {
            let scale =
                Some(f32::from_bits(u.arbitrary()?)).filter(|x| x.is_finite()).unwrap_or(1.0);
            let state = TrainerState { scaler: Some(scaler(scale)), ..state() };
            std::fs::write(&path, state.to_json(&path).unwrap()).unwrap();
            let back = TrainerState::read(&path).unwrap();
            assert_eq!(back.scaler.unwrap().scale.to_bits(), scale.to_bits());
            Ok(())
        })
        .budget_ms(200);
    }

    #[test]
    fn a_state_that_could_not_be_read_back_is_not_written() {
        let path = Path::new("trainer_state.json");
        let bad = TrainerState { scaler: Some(scaler(f32::NAN)), ..state() };
        assert!(bad.to_json(path).unwrap_err().to_string().contains("not finite"));
        let mut deep = json!(1);
        for _ in 0..MAX_DEPTH - 2 {
            deep = json!([deep]);
        }
        let mut bad = state();
        bad.settings.insert("deep".into(), deep);
        assert!(bad.to_json(path).unwrap_err().to_string().contains("nested deeper"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.json");
        let Some(Value::Array(inner)) = bad.settings["deep"].as_array().map(|a| a[0].clone())
        else {
            panic!("an array")
        };
        bad.settings.insert("deep".into(), Value::Array(inner));
        std::fs::write(&path, bad.to_json(&path).unwrap()).unwrap();
        assert_eq!(TrainerState::read(&path).unwrap(), bad);
    }

    #[test]
    fn another_format_and_unknown_fields_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trainer_state.json");
        let text = state().to_json(&path).unwrap();
        for (from, to, said) in [
            ("\"format\": 1", "\"format\": 2", "format 2"),
            ("\"n_updates\"", "\"n_upgrades\"", "n_upgrades"),
            ("\"step\": 12", "\"step\": -12", "-12"),
        ] {
            std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
            let message = TrainerState::read(&path).unwrap_err().to_string();
            assert!(message.contains("trainer_state.json") && message.contains(said), "{message}");
        }
    }
}

//! Precision in settings, beside a model, and in reports; the loss scale of f16.
//!
//! What a precision *is* stands in ounce-passes: dtypes by a table of op classes. Here is who chooses
//! it. A model that was trained in 16 bits is evaluated and sampled in them too: the run's settings lie
//! beside it, in `run.yaml` or, in a checkpoint, in `trainer_state.json`.
//!
//! Dynamic loss scaling (`[Micikevicius18]`; the constants of PyTorch's `GradScaler`): gradients in f16
//! are multiplied with a power of two. A step whose gradient overflows is skipped and the scale
//! halved, after 2000 good steps it is doubled. It may fall below 1.

use std::fmt::Write;
use std::io::Read;
use std::path::Path;

use ounce_io::checkpoint::ScalerState;
use ounce_ir::{DType, Graph};
use ounce_models::Purpose;
use ounce_passes::{OpClass, Precision, PrecisionPolicy, TABLE};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::model::{Model, model_error};
use crate::{Environment, Result, Settings};

/// A `run.yaml` is not longer.
const MAX_RUN_YAML_BYTES: u64 = 1 << 20;
/// Good steps after which the loss scale is doubled.
const GROWTH_STEPS: u64 = 2000;
/// The loss scale is not halved below it: what overflows then is no matter of scale.
const LEAST_SCALE: f32 = 1.0 / 4294967296.0;
/// The loss scale is not doubled above it, so that its square stays finite in f32.
const MOST_SCALE: f32 = 9.223_372e18;
/// Overflows of an op class after which `--f16-demote` takes it out of f16.
const STRIKES: u32 = 3;

/// A line of `ounce plan --explain precision`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PrecisionRow {
    /// The class of ops.
    pub class: &'static str,
    /// What the values that its ops write are stored in.
    pub stored: String,
    /// Which values that is.
    pub values: &'static str,
    /// What its ops compute in, and what that covers.
    pub computes: String,
    /// What `torch.autocast` does.
    pub autocast: &'static str,
    /// Whether that differs, and why.
    pub note: &'static str,
}

/// What `ounce plan --explain precision` shows: the op classes of the model under the settings.
///
/// # Errors
/// Settings or a configuration that are wrong.
pub fn explain_precision(settings: &Settings, env: &Environment) -> Result<Vec<PrecisionRow>> {
    let model = Model::open(settings, env)?;
    let max_length = model.max_length(settings);
    let graph = ounce_models::build_for_length(
        &model.config,
        Purpose::Loss,
        settings.dropout as f32,
        max_length,
    )
    .map_err(|e| model_error(&model.dir, &e))?;
    let (policy, present) = (settings.policy(), classes(&graph));
    let row = |line: &ounce_passes::ClassPrecision| PrecisionRow {
        class: line.class.name(),
        stored: policy.stored(line.class).to_string(),
        values: line.stores,
        computes: format!("f32: {}", line.computes),
        autocast: line.autocast,
        note: if policy.stored(line.class) == DType::F32 { IN_F32 } else { line.note },
    };
    let shown = |line: &&ounce_passes::ClassPrecision| {
        line.class == OpClass::Update || present.contains(&line.class)
    };
    Ok(TABLE.iter().filter(shown).map(row).collect())
}

/// What there is to say of a class that is in f32.
const IN_F32: &str = "f32, as without autocast";

/// The rows as a table for people.
pub fn precision_table(precision: Precision, rows: &[PrecisionRow]) -> String {
    let masters = match precision {
        Precision::F32 => "parameters f32",
        Precision::Bf16 => "parameters bf16, with the lower halves of their f32 masters as i16",
        Precision::F16 => "parameters f32, the loss scaled by a power of two",
    };
    let mut text = format!("precision {precision}: {masters}\n");
    for row in rows {
        let PrecisionRow { class, stored, values, computes, autocast, note } = row;
        let _ = write!(
            text,
            "{class:<11} stores {stored:<5} {values:<28} computes {computes}\n\
             {:<11} autocast: {autocast}; {note}\n",
            ""
        );
    }
    text
}

/// The classes of a graph's ops whose dtype may be chosen, in the order of the table.
pub(crate) fn classes(graph: &Graph) -> Vec<OpClass> {
    let has = |class: &OpClass| graph.ops.values().any(|op| OpClass::of(&op.kind) == *class);
    OpClass::CHOSEN.into_iter().filter(has).collect()
}

/// The precision to evaluate or sample a model in: as set, else as recorded beside it, else f32.
pub(crate) fn policy_for(settings: &Settings, dir: &Path) -> PrecisionPolicy {
    let policy = |settings: &Settings| {
        let policy = settings.policy();
        if settings.f16_demote { all_demoted(&policy) } else { policy }
    };
    if settings.precision.is_some() {
        return policy(settings);
    }
    let begun = recorded(dir).and_then(|map| serde_json::from_value(Value::Object(map)).ok());
    begun.as_ref().map_or_else(PrecisionPolicy::default, policy)
}

/// What a run that may take classes of ops out of f16 evaluates and samples in: none of them is in it.
pub(crate) fn all_demoted(policy: &PrecisionPolicy) -> PrecisionPolicy {
    let mut policy = policy.clone();
    policy.keep_f32.extend(OpClass::CHOSEN);
    policy
}

/// The precision settings of the run that made the model in `dir`, if it says so. What is not ours to
/// read says nothing.
fn recorded(dir: &Path) -> Option<Map<String, Value>> {
    let mut all = match std::fs::File::open(dir.join("run.yaml")) {
        Ok(file) => {
            let mut text = String::new();
            file.take(MAX_RUN_YAML_BYTES).read_to_string(&mut text).ok()?;
            serde_yaml_ng::from_str(&text).ok()?
        }
        Err(_) => match ounce_io::read_config(&dir.join("trainer_state.json")).ok()? {
            Value::Object(mut file) => match file.get_mut("state")?.get_mut("settings")?.take() {
                Value::Object(settings) => settings,
                _ => return None,
            },
            _ => return None,
        },
    };
    all.retain(|key, _| key.starts_with("precision") || key == "f16_demote");
    Some(all)
}

/// `config.json` of `dir` as text, if it must say another dtype than it does now for weights that
/// are stored in `dtype`.
///
/// # Errors
/// A configuration that cannot be read.
pub(crate) fn config_with_dtype(dir: &Path, dtype: DType) -> Result<Option<String>> {
    let name = match dtype {
        DType::Bf16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    };
    let mut config = ounce_io::read_config(dir)?;
    let map = config.as_object_mut().expect("a configuration is an object");
    // The second is the name since transformers 5.
    let mut keys: Vec<&str> = vec!["torch_dtype", "dtype"];
    if keys.iter().any(|key| map.contains_key(*key)) {
        keys.retain(|key| map.contains_key(*key));
    } else if dtype == DType::F32 {
        return Ok(None);
    }
    if keys.iter().all(|key| map.get(*key).is_some_and(|v| v == name)) {
        return Ok(None);
    }
    for key in keys {
        map.insert(key.to_owned(), name.into());
    }
    Ok(Some(format!("{config:#}\n")))
}

/// The dynamic loss scale of a run, and what it remembers of overflows. Without f16 the scale is 1
/// and stays.
#[derive(Debug, Clone)]
pub(crate) struct Scaler {
    state: ScalerState,
    scales: bool,
}

/// What an overflow means for a class of ops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strike {
    /// Its count so far.
    Counted(u32),
    /// It has just overflowed once too often.
    Out,
}

impl Scaler {
    /// At the start of a run, or where a checkpoint left it.
    pub(crate) fn new(settings: &Settings, resumed: Option<ScalerState>) -> Self {
        let scales = settings.policy().precision.scales_loss();
        let scale = if scales { settings.init_loss_scale as f32 } else { 1.0 };
        let fresh = ScalerState {
            scale,
            n_good_steps: 0,
            n_skipped_steps: 0,
            strikes: std::collections::BTreeMap::new(),
        };
        Self { state: resumed.unwrap_or(fresh), scales }
    }

    /// What gradients are multiplied with.
    pub(crate) fn scale(&self) -> f32 {
        // That of a checkpoint in f16 is kept, but scales nothing in a precision without a scale.
        if self.scales { self.state.scale } else { 1.0 }
    }

    /// Whether there is a scale to speak of.
    pub(crate) fn scales(&self) -> bool {
        self.scales
    }

    /// For a checkpoint.
    pub(crate) fn state(&self) -> &ScalerState {
        &self.state
    }

    /// Steps that were skipped so far.
    pub(crate) fn n_skipped(&self) -> u64 {
        self.state.n_skipped_steps
    }

    /// A step updated the weights.
    pub(crate) fn good_step(&mut self) {
        if !self.scales {
            return;
        }
        self.state.n_good_steps += 1;
        if self.state.n_good_steps == GROWTH_STEPS {
            self.state.scale = (self.state.scale * 2.0).min(MOST_SCALE);
            self.state.n_good_steps = 0;
        }
    }

    /// A gradient overflowed: halves the scale and counts the step as skipped. False, and nothing
    /// changes, if no smaller scale can help.
    pub(crate) fn back_off(&mut self) -> bool {
        let helps = self.scales && self.state.scale > LEAST_SCALE;
        if helps {
            self.state.scale *= 0.5;
            self.state.n_good_steps = 0;
            self.skip();
        }
        helps
    }

    /// A step is skipped that no scale is to blame for.
    pub(crate) fn skip(&mut self) {
        self.state.n_skipped_steps += 1;
    }

    /// A class of ops overflowed.
    pub(crate) fn strike(&mut self, class: OpClass) -> Strike {
        let count = self.state.strikes.entry(class.name().to_owned()).or_default();
        *count = count.saturating_add(1);
        if *count == STRIKES { Strike::Out } else { Strike::Counted(*count) }
    }

    /// The classes that have overflowed too often, in the order of the table.
    pub(crate) fn demoted(&self) -> Vec<OpClass> {
        let is_out = |class: &OpClass| {
            self.state.strikes.get(class.name()).is_some_and(|&count| count >= STRIKES)
        };
        OpClass::CHOSEN.into_iter().filter(is_out).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f16() -> Settings {
        Settings { precision: Some(Precision::F16), ..Settings::default() }
    }

    #[test]
    fn the_scale_halves_on_overflow_and_doubles_after_2000_good_steps() {
        let mut scaler = Scaler::new(&f16(), None);
        assert_eq!(scaler.scale(), 65536.0);
        (0..1999).for_each(|_| scaler.good_step());
        assert!(scaler.back_off());
        assert_eq!((scaler.scale(), scaler.n_skipped()), (32768.0, 1));
        (0..1999).for_each(|_| scaler.good_step());
        assert_eq!(scaler.scale(), 32768.0, "an overflow starts the count anew");
        scaler.good_step();
        assert_eq!(scaler.scale(), 65536.0);
        let again = Scaler::new(&f16(), Some(scaler.state().clone()));
        assert_eq!(again.scale(), 65536.0, "a run goes on with the scale of its checkpoint");
        let other = Scaler::new(&Settings::default(), Some(scaler.state().clone()));
        assert_eq!(other.scale(), 1.0, "f32 has no scale to divide out again");
    }

    #[test]
    fn the_scale_falls_below_1_but_not_for_ever_and_is_none_without_f16() {
        let mut scaler = Scaler::new(&f16(), None);
        let mut n = 0;
        while scaler.back_off() {
            n += 1;
        }
        assert_eq!((n, scaler.scale()), (16 + 32, LEAST_SCALE));
        assert_eq!(scaler.n_skipped(), 48, "an overflow that is not skipped is not counted");
        let mut none = Scaler::new(&Settings::default(), None);
        assert!(!none.back_off());
        assert_eq!((none.scale(), none.n_skipped()), (1.0, 0));
    }

    #[test]
    fn three_strikes_of_one_class_are_too_many() {
        let mut scaler = Scaler::new(&f16(), None);
        assert_eq!(scaler.strike(OpClass::Linear), Strike::Counted(1));
        assert_eq!(scaler.strike(OpClass::Norm), Strike::Counted(1));
        assert_eq!(scaler.strike(OpClass::Linear), Strike::Counted(2));
        assert_eq!(scaler.demoted(), []);
        assert_eq!(scaler.strike(OpClass::Linear), Strike::Out);
        assert_eq!(scaler.demoted(), [OpClass::Linear]);
    }

    #[test]
    fn a_model_is_read_in_the_precision_of_its_run() {
        let dir = tempfile::tempdir().unwrap();
        let policy = || policy_for(&Settings::default(), dir.path());
        assert_eq!(policy(), PrecisionPolicy::default());
        let state = r#"{"format": 1, "state": {"settings": {"precision": "f16", "seed": 1}}}"#;
        std::fs::write(dir.path().join("trainer_state.json"), state).unwrap();
        assert_eq!(policy(), PrecisionPolicy::new(Precision::F16));
        let path = dir.path().join("run.yaml");
        let run = "precision: bf16\nnew_key: 1\nprecision_overrides: {\"norm\":\"f32\"}\n";
        std::fs::write(&path, run).unwrap();
        let keep_f32 = vec![OpClass::Norm];
        assert_eq!(policy(), PrecisionPolicy { precision: Precision::Bf16, keep_f32 });
        assert_eq!(policy_for(&f16(), dir.path()), PrecisionPolicy::new(Precision::F16));
        for other in ["", "precision: 12\n", "- a list\n", "\u{0}\n"] {
            std::fs::write(&path, other).unwrap();
            assert_eq!(policy(), PrecisionPolicy::default(), "{other:?}");
        }
    }

    #[test]
    fn config_json_says_what_the_weights_are_stored_in() {
        let dir = tempfile::tempdir().unwrap();
        let said = |config: &str, dtype| {
            std::fs::write(dir.path().join("config.json"), config).unwrap();
            let text = config_with_dtype(dir.path(), dtype).unwrap()?;
            Some(serde_json::from_str::<Value>(&text).unwrap())
        };
        let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(said(r#"{"n": 1}"#, DType::F32), None);
        assert_eq!(said(r#"{"torch_dtype": "float32"}"#, DType::F32), None);
        assert_eq!(
            said(r#"{"n": 1}"#, DType::Bf16),
            Some(json(r#"{"n": 1, "torch_dtype": "bfloat16", "dtype": "bfloat16"}"#))
        );
        assert_eq!(
            said(r#"{"dtype": "bfloat16", "x": null}"#, DType::F32),
            Some(json(r#"{"dtype": "float32", "x": null}"#))
        );
    }
}

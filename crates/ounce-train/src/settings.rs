//! Settings of a run under Hugging Face's names: YAML keys in `snake_case`, flags in `--kebab-case`.
//!
//! Values come from three layers, later ones winning: the defaults below (those of transformers'
//! `TrainingArguments` where it has the setting), the YAML file of `--config`, the flags. The layers
//! are JSON objects that are merged and then read once, so that a key has one name and one type. Keys
//! are checked before: an unknown one is an error with the nearest match, a value of the wrong type is
//! reported with its line.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use ounce_io::dataset::{ColumnMapping, RowFormat, nearest};
pub use ounce_passes::Precision;
use ounce_passes::{OpClass, PrecisionPolicy};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::budget::Memory;
use crate::schedule::SchedulerType;
use crate::{Error, Result};

/// Rows of a window if not given: the buffer of Hugging Face's `IterableDataset.shuffle`.
const WINDOW_ROWS: u64 = 1000;

/// What to do with a step whose loss or gradient is infinite or not a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNonfinite {
    /// The run ends before the update.
    Stop,
    /// The step updates nothing and counts as skipped.
    Skip,
}

/// Which update rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// AdamW, decoupled weight decay.
    Adamw,
    /// Plain stochastic gradient descent.
    Sgd,
}

/// What to do with a row that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BadRows {
    /// Stop, naming it.
    Error,
    /// Pass it over and count it.
    Skip,
}

/// A data file: its path, in YAML also `{path, weight}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, try_from = "Value")]
pub enum DataFile {
    /// Passed over once in an epoch.
    Path(PathBuf),
    /// Passed over `weight` times in an epoch.
    Weighted(WeightedFile),
}

/// A data file with its weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightedFile {
    /// The file.
    pub path: PathBuf,
    /// Passes over it in one epoch.
    pub weight: f64,
}

impl TryFrom<Value> for DataFile {
    type Error = String;

    /// Says which key is wrong, where serde would say that no variant matches.
    fn try_from(value: Value) -> std::result::Result<Self, String> {
        match value {
            Value::String(path) => Ok(Self::Path(path.into())),
            Value::Object(_) => {
                serde_json::from_value(value).map(Self::Weighted).map_err(|e| e.to_string())
            }
            _ => Err("expected a path or {path, weight}".to_owned()),
        }
    }
}

impl DataFile {
    /// The file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Path(path) => path,
            Self::Weighted(file) => &file.path,
        }
    }

    /// Passes over it in one epoch.
    pub fn weight(&self) -> f64 {
        match self {
            Self::Path(_) => 1.0,
            Self::Weighted(file) => file.weight,
        }
    }
}

/// Keys of a format and the file's keys for them: a mapping in YAML, `prompt=QUESTION,completion=ANSWER` as a flag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected `KEY: KEY_OF_THE_FILE` pairs")]
pub enum Columns {
    /// As a flag has it.
    Flag(String),
    /// As YAML has it.
    Map(BTreeMap<String, String>),
}

impl Columns {
    /// The pairs; a word without `=` stands for itself.
    pub fn pairs(&self) -> Vec<(String, String)> {
        let own = |(a, b): (&str, &str)| (a.trim().to_owned(), b.trim().to_owned());
        match self {
            Self::Flag(text) => text
                .split(',')
                .map(|pair| own(pair.split_once('=').unwrap_or((pair, pair))))
                .collect(),
            Self::Map(map) => map.iter().map(|(a, b)| own((a, b))).collect(),
        }
    }
}

/// Every setting of `plan`, `train`, `eval` and `generate`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "a bare flag is a bool")]
pub struct Settings {
    /// Model directory.
    pub model: Option<PathBuf>,
    /// Text or rows to train on, or to evaluate; several texts are one stream.
    pub data: Vec<DataFile>,
    /// Held-out text or rows.
    pub eval_data: Vec<PathBuf>,
    /// What the rows of the data mean; found out from the first of them if not given.
    pub dataset_format: Option<String>,
    /// Which of the file's keys stand for those of the format.
    pub column_mapping: Option<Columns>,
    /// What to do with rows that cannot be read.
    pub on_bad_row: BadRows,
    /// Several samples per row, by best fit.
    pub packing: bool,
    /// Tokenizes training data as it is needed, window by window, instead of all of it before step 1.
    pub streaming: bool,
    /// Rows of a window of streamed data, within which they are shuffled; 1000 if not given.
    pub shuffle_buffer_size: Option<u64>,
    /// Threads that tokenize streamed data beside the steps; 1 if not given.
    pub dataloader_num_workers: Option<u64>,
    /// Where the result goes.
    pub output_dir: Option<PathBuf>,
    /// Tokens per row; the model's context, at most 1024, if not given.
    pub max_length: Option<u64>,

    /// Rows per step are this times `gradient_accumulation_steps`; the planner cuts them anew.
    pub per_device_train_batch_size: u64,
    /// See `per_device_train_batch_size`.
    pub gradient_accumulation_steps: u64,
    /// Steps; wins over `num_train_epochs`.
    pub max_steps: Option<u64>,
    /// Passes over the data.
    pub num_train_epochs: f64,
    /// Update rule.
    pub optimizer: Optimizer,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Schedule after the warm-up.
    pub lr_scheduler_type: SchedulerType,
    /// Steps, or a share of all steps if below 1.
    pub warmup_steps: f64,
    /// The learning rate falls to this share of the peak.
    pub min_lr_ratio: f64,
    /// Decoupled decay of weight matrices; norms and biases never decay.
    pub weight_decay: f64,
    /// Decay of AdamW's first moment.
    pub adam_beta1: f64,
    /// Decay of AdamW's second moment.
    pub adam_beta2: f64,
    /// Added to the root of AdamW's second moment.
    pub adam_epsilon: f64,
    /// Gradients are scaled down to this norm; 0 is off.
    pub max_grad_norm: f64,
    /// Dropout of embedding and residual branches, whatever the configuration says.
    pub dropout: f64,

    /// Budget of the whole process.
    pub memory: Memory,
    /// Threads; all cores if not given.
    pub threads: Option<u32>,
    /// Seed of data order, dropout and sampling.
    pub seed: u64,
    /// What values are stored in; f32 if not given, or what `run.yaml` beside the model says where a
    /// model is only read.
    #[serde(with = "by_name")]
    pub precision: Option<Precision>,
    /// Op classes that keep f32 all the same: `{norm: f32}`.
    pub precision_overrides: BTreeMap<String, String>,
    /// First loss scale of f16, a power of two.
    pub init_loss_scale: f64,
    /// Takes a class of ops out of f16 that overflows again and again.
    pub f16_demote: bool,
    /// What to do with a step that is not finite.
    pub on_nonfinite: OnNonfinite,

    /// Steps between lines of progress; a sensible interval if not given.
    pub logging_steps: Option<u64>,
    /// Steps between evaluations; at the end only if not given.
    pub eval_steps: Option<u64>,
    /// Steps between sample texts; at the end only if not given, never if 0.
    pub sample_steps: Option<u64>,
    /// What sample texts continue.
    pub sample_prompt: String,
    /// Tokens of a sample text.
    pub sample_tokens: u64,

    /// Steps between checkpoints.
    pub save_steps: Option<u64>,
    /// Checkpoints that are kept; all if not given.
    pub save_total_limit: Option<u64>,
    /// Checkpoint to go on from; `auto` is the newest in the output directory, if there is one.
    pub resume_from_checkpoint: Option<String>,
    /// Go on from a checkpoint even if that changes the run. A flag only: `run.yaml` does not keep it.
    #[serde(rename = "override", skip_serializing)]
    pub override_begun: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            model: None,
            data: Vec::new(),
            eval_data: Vec::new(),
            dataset_format: None,
            column_mapping: None,
            on_bad_row: BadRows::Error,
            packing: false,
            streaming: false,
            shuffle_buffer_size: None,
            dataloader_num_workers: None,
            output_dir: None,
            max_length: None,
            per_device_train_batch_size: 8,
            gradient_accumulation_steps: 1,
            max_steps: None,
            num_train_epochs: 3.0,
            optimizer: Optimizer::Adamw,
            learning_rate: 5e-5,
            lr_scheduler_type: SchedulerType::Linear,
            warmup_steps: 0.0,
            min_lr_ratio: 0.0,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            dropout: 0.0,
            memory: Memory::Auto,
            threads: None,
            seed: 42,
            precision: None,
            precision_overrides: BTreeMap::new(),
            init_loss_scale: 65536.0,
            f16_demote: false,
            on_nonfinite: OnNonfinite::Stop,
            logging_steps: None,
            eval_steps: None,
            sample_steps: None,
            sample_prompt: "\n".to_owned(),
            sample_tokens: 100,
            save_steps: None,
            save_total_limit: None,
            resume_from_checkpoint: None,
            override_begun: false,
        }
    }
}

impl Settings {
    /// Defaults, then the YAML file, then the flags (a JSON object of those that were given).
    ///
    /// # Errors
    /// Unknown keys, values of the wrong type or out of range, features that are not built.
    pub fn resolve(config: Option<&Path>, flags: &Map<String, Value>) -> Result<Self> {
        let (mut layers, text) = config.map(read_yaml).transpose()?.unwrap_or_default();
        layers.extend(flags.clone());
        check_built(&layers)?;
        layers.retain(|key, _| !NOT_BUILT.contains(&key.as_str()));
        // Each key was checked on its own by `read_yaml`, each flag by the command line.
        let settings: Self = serde_json::from_value(Value::Object(layers))
            .map_err(|e| usage(format!("settings: {e}"), "see `ounce train --help`"))?;
        settings.check_ranges().map_err(|e| match (config, e) {
            (Some(path), Error::Usage { message, hint }) => {
                // Of the setting that it names first, unless a flag has given that one.
                let named = message.split('`').nth(1).filter(|key| !flags.contains_key(*key));
                let line = named.and_then(|key| lines_of(&text, key).next());
                let place = line.map_or_else(String::new, |l| format!("{}:{l}: ", path.display()));
                Error::Usage { message: place + &message, hint }
            }
            (_, e) => e,
        })?;
        Ok(settings)
    }

    /// Whether texts are sampled from the model on the way.
    pub(crate) fn samples(&self) -> bool {
        self.sample_steps != Some(0) && self.sample_tokens > 0
    }

    /// Rows per step.
    pub fn n_rows(&self) -> u64 {
        self.per_device_train_batch_size * self.gradient_accumulation_steps
    }

    /// The settings by name; a precision that is not given is f32.
    pub fn to_map(&self) -> Map<String, Value> {
        let Ok(Value::Object(mut map)) = serde_json::to_value(self) else {
            unreachable!("a struct of plain fields serializes to an object")
        };
        map.insert("precision".to_owned(), self.policy().precision.name().into());
        if self.streaming {
            map.insert("shuffle_buffer_size".to_owned(), self.window_rows().into());
        }
        map
    }

    /// Rows, or blocks, of a window of a stream.
    pub(crate) fn window_rows(&self) -> u64 {
        self.shuffle_buffer_size.unwrap_or(WINDOW_ROWS)
    }

    /// What values are stored in, class by class.
    pub(crate) fn policy(&self) -> PrecisionPolicy {
        let keeps = |class: &OpClass| self.precision_overrides.contains_key(class.name());
        PrecisionPolicy {
            precision: self.precision.unwrap_or_default(),
            keep_f32: OpClass::CHOSEN.into_iter().filter(keeps).collect(),
        }
    }

    /// The settings as a YAML file that [`Settings::resolve`] reads back; what is not set is left out.
    pub fn to_yaml(&self) -> String {
        let mut map = self.to_map();
        // Whoever repeats a run begins it.
        map.remove("resume_from_checkpoint");
        // A JSON value is a YAML value, but for characters that YAML allows as escapes only.
        let is_escaped = |c: char| {
            matches!(
                c,
                '\u{7f}'
                    ..='\u{9f}' | '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}'
            )
        };
        let mut text = String::new();
        for (key, value) in map.iter().filter(|(_, v)| !v.is_null()) {
            writeln!(text, "{key}: {value}").expect("writing to a string cannot fail");
        }
        let mut escaped = String::with_capacity(text.len());
        for c in text.chars() {
            if is_escaped(c) {
                write!(escaped, "\\u{:04x}", u32::from(c))
                    .expect("writing to a string cannot fail");
            } else {
                escaped.push(c);
            }
        }
        escaped
    }

    /// Refuses values that make no sense.
    pub(crate) fn check_ranges(&self) -> Result<()> {
        self.check_rows()?;
        self.check_numbers()?;
        self.check_overrides()
    }

    /// Refuses formats and keys of rows that there are not.
    fn check_rows(&self) -> Result<()> {
        if let Some(name) = &self.dataset_format
            && RowFormat::parse(name).is_none()
        {
            let names: Vec<&str> = RowFormat::names().collect();
            let hint = format!("it may be {}", names.join(", "));
            return Err(usage(format!("`dataset_format` is `{name}`"), &hint));
        }
        let pairs = self.column_mapping.as_ref().map(Columns::pairs).unwrap_or_default();
        let known = ColumnMapping::KEYS;
        if let Some((key, _)) = pairs.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            let hint = nearest(key, known.into_iter()).map_or_else(
                || format!("the keys are {}", known.join(", ")),
                |name| format!("the nearest key is `{name}`"),
            );
            return Err(usage(format!("`column_mapping`: no format has a key `{key}`"), &hint));
        }
        Ok(())
    }

    /// Refuses settings of training without the one that they belong to; where they have a default, other values than
    /// that. Where nothing is trained, they change nothing anyway.
    ///
    /// # Errors
    /// [`Error::Usage`] with both names.
    pub(crate) fn check_company(&self) -> Result<()> {
        let is_f16 = self.policy().precision == Precision::F16;
        let is_constant = self.lr_scheduler_type == SchedulerType::Constant;
        let (is_adamw, default) = (self.optimizer == Optimizer::Adamw, Self::default());
        let of_adam = |s: &Self| [s.adam_beta1, s.adam_beta2, s.adam_epsilon];
        let alone = [
            (
                self.shuffle_buffer_size.is_some(),
                "shuffle_buffer_size",
                self.streaming,
                "--streaming",
            ),
            (
                self.dataloader_num_workers.is_some(),
                "dataloader_num_workers",
                self.streaming,
                "--streaming",
            ),
            (self.f16_demote, "f16_demote", is_f16, "--precision f16"),
            (
                self.init_loss_scale != default.init_loss_scale,
                "init_loss_scale",
                is_f16,
                "--precision f16",
            ),
            (of_adam(self) != of_adam(&default), "adam_*", is_adamw, "--optimizer adamw"),
            (
                self.min_lr_ratio != default.min_lr_ratio,
                "min_lr_ratio",
                !is_constant,
                "--lr-scheduler-type linear` or `cosine",
            ),
        ];
        match alone.iter().find(|(given, _, has_other, _)| *given && !has_other) {
            Some((_, name, _, other)) => {
                let message = format!("`{name}` says nothing without `{other}`");
                Err(usage(message, &format!("give `{other}` too, or leave it out")))
            }
            None => Ok(()),
        }
    }

    /// Refuses numbers that are out of range.
    fn check_numbers(&self) -> Result<()> {
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let not_negative = |x: f64| x.is_finite() && x >= 0.0;
        // As the kernels have it: what becomes 1 in f32 is no share.
        let share = |x: f64| (0.0..1.0).contains(&(x as f32)) && x >= 0.0;
        let rows = self.per_device_train_batch_size.checked_mul(self.gradient_accumulation_steps);
        let rules = [
            (
                rows.is_some_and(|n| (1..=1 << 24).contains(&n)),
                "per_device_train_batch_size` times `gradient_accumulation_steps",
                "from 1 to 16777216 rows per step",
            ),
            (self.max_steps != Some(0), "max_steps", "at least 1"),
            (
                self.shuffle_buffer_size.is_none_or(|n| (1..=1 << 24).contains(&n)),
                "shuffle_buffer_size",
                "from 1 to 16777216",
            ),
            (
                self.dataloader_num_workers.is_none_or(|n| (1..=256).contains(&n)),
                "dataloader_num_workers",
                "from 1 to 256",
            ),
            (
                self.data
                    .iter()
                    .all(|f| f.weight().is_finite() && (0.0..=1e3).contains(&f.weight())),
                "weight of a data file",
                "from 0 to 1000",
            ),
            (positive(self.num_train_epochs), "num_train_epochs", "above 0"),
            (not_negative(self.learning_rate), "learning_rate", "at least 0"),
            (
                not_negative(self.warmup_steps)
                    && (self.warmup_steps < 1.0 || self.warmup_steps.fract() == 0.0),
                "warmup_steps",
                "a whole number of steps, or a share of them below 1",
            ),
            ((0.0..=1.0).contains(&self.min_lr_ratio), "min_lr_ratio", "from 0 to 1"),
            (not_negative(self.weight_decay), "weight_decay", "at least 0"),
            (share(self.adam_beta1), "adam_beta1", "from 0 to below 1, also in f32"),
            (share(self.adam_beta2), "adam_beta2", "from 0 to below 1, also in f32"),
            (
                positive(self.adam_epsilon) && self.adam_epsilon as f32 > 0.0,
                "adam_epsilon",
                "above 0, also in f32",
            ),
            (not_negative(self.max_grad_norm), "max_grad_norm", "at least 0 (0 is off)"),
            (share(self.dropout), "dropout", "from 0 to below 1"),
            (
                is_power_of_two(self.init_loss_scale),
                "init_loss_scale",
                "a power of two from 2^-32 to 2^63",
            ),
            (self.threads.is_none_or(|n| (1..=1024).contains(&n)), "threads", "from 1 to 1024"),
            (
                self.max_length.is_none_or(|n| (2..=1 << 24).contains(&n)),
                "max_length",
                "from 2 to 16777216",
            ),
            (self.sample_tokens <= 1 << 24, "sample_tokens", "at most 16777216"),
            (self.logging_steps != Some(0), "logging_steps", "at least 1"),
            (self.eval_steps != Some(0), "eval_steps", "at least 1"),
            (self.save_steps != Some(0), "save_steps", "at least 1"),
            (self.save_total_limit != Some(0), "save_total_limit", "at least 1"),
        ];
        match rules.iter().find(|(fine, ..)| !fine) {
            Some((_, name, range)) => {
                let found = self.to_map().get(*name).map_or_else(String::new, |x| format!(": {x}"));
                Err(usage(
                    format!("`{name}` is out of range{found}"),
                    &format!("it may be {range}"),
                ))
            }
            None => Ok(()),
        }
    }

    /// Refuses classes that there are not, and dtypes that nothing can be overridden to.
    fn check_overrides(&self) -> Result<()> {
        for (class, dtype) in &self.precision_overrides {
            let names = || OpClass::CHOSEN.iter().map(|c| c.name());
            if OpClass::from_name(class).is_none() {
                let hint = nearest(class, names()).map_or_else(
                    || format!("the classes are {}", names().collect::<Vec<_>>().join(", ")),
                    |name| format!("the nearest class is `{name}`"),
                );
                return Err(usage(format!("precision_overrides: no class `{class}`"), &hint));
            }
            if dtype != "f32" {
                let message = format!("precision_overrides: `{class}` cannot be `{dtype}`");
                return Err(usage(message, "a class may be overridden to f32"));
            }
        }
        Ok(())
    }
}

/// Whether a loss scale is what it may be.
fn is_power_of_two(x: f64) -> bool {
    (-32..=63).any(|power| x == 2.0_f64.powi(power))
}

/// Longest settings file that is read.
const MAX_YAML_BYTES: u64 = 1 << 20;

/// What is meant by a name that other programs have for a setting, where it is spelt too differently to be found.
pub fn usual_name(given: &str) -> Option<&'static str> {
    Some(match given {
        "batch_size" => "per_device_train_batch_size",
        "lr" => "learning_rate",
        "epochs" => "num_train_epochs",
        "steps" => "max_steps",
        "seq_len" | "context_length" | "block_size" => "max_length",
        "output" | "out" => "output_dir",
        _ => return None,
    })
}

/// A usage error with its hint.
fn usage(message: String, hint: &str) -> Error {
    Error::Usage { message, hint: hint.to_owned() }
}

/// Settings of features that are to come: refused by name, so that nothing that was asked for is ignored.
const NOT_BUILT: [&str; 7] = [
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "scratch_dir",
    "scratch_limit",
];

fn check_built(settings: &Map<String, Value>) -> Result<()> {
    let is_asked_for = |key: &&&str| {
        settings.get(**key).is_some_and(|value| !matches!(value, Value::Null | Value::Bool(false)))
    };
    match NOT_BUILT.iter().find(is_asked_for) {
        Some(key) => Err(Error::NotBuilt { what: format!("--{}", key.replace('_', "-")) }),
        None => Ok(()),
    }
}

/// Reads a YAML file of settings, checking every key and value on its own; returns its text too.
fn read_yaml(path: &Path) -> Result<(Map<String, Value>, String)> {
    let file = path.display();
    let refuse = |what: String| usage(what, "`--config` takes a YAML file of settings");
    let n_bytes = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    if n_bytes > MAX_YAML_BYTES {
        let what = format!("{file}: {n_bytes} bytes are more than a settings file has");
        return Err(refuse(what));
    }
    let text = std::fs::read_to_string(path).map_err(|e| refuse(format!("{file}: {e}")))?;
    let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
    if text.trim().is_empty() {
        return Ok((Map::new(), text));
    }
    let mut map: Map<String, Value> = serde_yaml_ng::from_str(&text).map_err(|e| {
        let line = e.location().map_or(1, |l| l.line());
        usage(format!("{file}:{line}: {e}"), "the file is a mapping of settings, `key: value`")
    })?;
    // That map holds the last of a key's values; YAML's own refuses a second one.
    if let Err(e) = serde_yaml_ng::from_str::<serde_yaml_ng::Mapping>(&text) {
        let second = map.keys().find_map(|key| lines_of(&text, key).nth(1));
        let line = second.or(e.location().map(|l| l.line())).unwrap_or(1);
        return Err(usage(format!("{file}:{line}: {e}"), "give each key once"));
    }
    let known = Settings::default().to_map();
    for (key, value) in &mut map {
        let line = lines_of(&text, key).next().unwrap_or(1);
        // One file needs no list.
        if known.get(key).is_some_and(Value::is_array) && !value.is_array() {
            *value = Value::Array(vec![value.take()]);
        }
        if NOT_BUILT.contains(&key.as_str()) {
            continue;
        }
        if !known.contains_key(key) {
            let near = || nearest(key, known.keys().map(String::as_str));
            let hint = usual_name(key).or_else(near).map_or_else(
                || "see `ounce train --help` for the settings".to_owned(),
                |name| format!("the nearest setting is `{name}`"),
            );
            return Err(usage(format!("{file}:{line}: unknown setting `{key}`"), &hint));
        }
        let alone = Map::from_iter([(key.clone(), value.clone())]);
        if let Err(e) = serde_json::from_value::<Settings>(Value::Object(alone)) {
            let default = match &known[key] {
                Value::Number(_) | Value::String(_) => format!("the default is `{}`", known[key]),
                _ => "see `ounce train --help` for what it takes".to_owned(),
            };
            let reason = e.to_string();
            let reason = reason
                .replace("expected f64", "expected a number")
                .replace("expected u64", "expected a whole number")
                .replace("expected a boolean", "expected `true` or `false`");
            let (reason, hint) = reason.split_once("\nhint: ").unwrap_or((&reason, &default));
            return Err(usage(format!("{file}:{line}: `{key}`: {reason}"), hint));
        }
    }
    Ok((map, text))
}

/// The lines on which a top-level key stands.
fn lines_of<'a>(text: &'a str, key: &'a str) -> impl Iterator<Item = usize> + 'a {
    let quotes = ['"', '\''];
    let starts = move |l: &str| {
        let behind = l.trim_start_matches(quotes).strip_prefix(key);
        behind.is_some_and(|rest| rest.trim_start_matches(quotes).trim_start().starts_with(':'))
    };
    text.lines().enumerate().filter(move |(_, l)| starts(l)).map(|(i, _)| i + 1)
}

/// The precision as a word in settings.
mod by_name {
    use ounce_passes::Precision;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[expect(
        clippy::trivially_copy_pass_by_ref,
        clippy::ref_option,
        reason = "the signature is serde's"
    )]
    pub(super) fn serialize<S: Serializer>(p: &Option<Precision>, s: S) -> Result<S::Ok, S::Error> {
        match p {
            Some(p) => s.serialize_str(p.name()),
            None => s.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D>(d: D) -> Result<Option<Precision>, D::Error>
    where
        D: Deserializer<'de>,
    {
        let Some(name) = Option::<String>::deserialize(d)? else { return Ok(None) };
        let unknown = || D::Error::custom(format!("`{name}` is not f32, bf16 or f16"));
        Precision::from_name(&name).map(Some).ok_or_else(unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn resolve(yaml: &str, flags: Value) -> Result<Settings> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), yaml).unwrap();
        let Value::Object(flags) = flags else { panic!("flags are an object") };
        Settings::resolve(Some(file.path()), &flags)
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_the_defaults() {
        let yaml = "learning_rate: 1e-3\nmax_steps: 7\nmemory: 48MiB\nwarmup_steps: 0.1\n";
        let s = resolve(yaml, json!({ "max_steps": 9 })).unwrap();
        assert_eq!((s.learning_rate, s.max_steps), (1e-3, Some(9)));
        assert_eq!((s.memory, s.warmup_steps), (Memory::Bytes(48 << 20), 0.1));
        assert_eq!(s.max_grad_norm, 1.0);
    }

    #[test]
    fn an_unknown_key_names_its_line_and_the_nearest_match() {
        let e = resolve("max_steps: 7\nlerning_rate: 1\n", json!({})).unwrap_err().to_string();
        assert!(e.contains(":2: unknown setting `lerning_rate`"), "{e}");
        assert!(e.ends_with("hint: the nearest setting is `learning_rate`"), "{e}");
    }

    #[test]
    fn a_value_that_cannot_be_read_says_what_could() {
        let cases = [
            ("memory:\n", "expected `64MiB`"),
            ("column_mapping: [promt]\n", "expected `KEY: KEY_OF_THE_FILE` pairs"),
            (
                "data: [{path: mine.txt, weigth: 2}]\n",
                "unknown field `weigth`, expected `path` or `weight`",
            ),
            ("data: [7]\n", "expected a path or {path, weight}"),
            ("max_length: sixty\n", "hint: see `ounce train --help`"),
            ("lr: 1e-3\n", "the nearest setting is `learning_rate`"),
            ("batch_size: 4\n", "the nearest setting is `per_device_train_batch_size`"),
        ];
        for (yaml, part) in cases {
            let e = resolve(yaml, json!({})).unwrap_err().to_string();
            assert!(e.contains(":1: ") && e.contains(part), "{yaml}: {e}");
        }
        // As editors on Windows write it.
        assert_eq!(resolve("\u{feff}max_steps: 7\r\n", json!({})).unwrap().max_steps, Some(7));
    }

    #[test]
    fn a_key_that_is_given_twice_is_refused() {
        let e =
            resolve("max_steps: 7\nseed: 1\nmax_steps: 9\n", json!({})).unwrap_err().to_string();
        assert!(e.contains(":3: duplicate entry with key \"max_steps\""), "{e}");
        let e =
            resolve("seed: 1\ndata: [{path: a, path: b}]\n", json!({})).unwrap_err().to_string();
        assert!(e.contains(":2: data[0]: duplicate entry with key \"path\""), "{e}");
    }

    #[test]
    fn a_value_of_the_wrong_type_names_its_line() {
        let e = resolve("seed: 1\nmax_steps: many\n", json!({})).unwrap_err().to_string();
        assert!(e.contains(":2: `max_steps`"), "{e}");
    }

    #[test]
    fn a_feature_that_is_not_built_is_refused_as_such() {
        let e = resolve("", json!({ "use_peft": true })).unwrap_err().to_string();
        assert!(e.contains("--use-peft is not built yet"), "{e}");
        let e = resolve("lora_r: 8\n", json!({})).unwrap_err().to_string();
        assert!(e.contains("--lora-r is not built yet"), "{e}");
        resolve("use_peft: false\n", json!({})).unwrap();
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for flags in [
            json!({ "learning_rate": -1.0 }),
            json!({ "dropout": 1.0 }),
            json!({ "adam_beta2": 0.999_999_99 }),
            json!({ "adam_epsilon": 1e-50 }),
            json!({ "warmup_steps": 2.5 }),
            json!({ "per_device_train_batch_size": 0 }),
            json!({ "max_length": 1 }),
            json!({ "threads": 0 }),
            json!({ "precision": "f8" }),
            json!({ "init_loss_scale": 3.0 }),
            json!({ "shuffle_buffer_size": 10 }),
            json!({ "streaming": true, "shuffle_buffer_size": 0 }),
            json!({ "streaming": true, "dataloader_num_workers": 1000 }),
            json!({ "f16_demote": true, "precision": "bf16" }),
            json!({ "init_loss_scale": 1024.0 }),
            json!({ "adam_beta1": 0.5, "optimizer": "sgd" }),
            json!({ "min_lr_ratio": 0.1, "lr_scheduler_type": "constant" }),
            json!({ "precision_overrides": { "norms": "f32" } }),
            json!({ "precision_overrides": { "norm": "f16" } }),
        ] {
            let resolved = resolve("", flags.clone()).and_then(|s| s.check_company());
            assert!(resolved.is_err(), "{flags}");
        }
    }

    #[test]
    fn the_resolved_file_reads_back_as_the_same_settings() {
        let flags = json!({
            "model": "m",
            "data": ["a b.txt"],
            "memory": "48MiB",
            "dropout": 0.2,
            "precision": "bf16",
            "precision_overrides": { "rope": "f32" },
            "sample_prompt": "a\u{7f}\u{85}\u{2028}\u{feff}\n\u{1}b: \"é\"",
        });
        let s = resolve("", flags).unwrap();
        assert_eq!(resolve(&s.to_yaml(), json!({})).unwrap(), s);
    }
}

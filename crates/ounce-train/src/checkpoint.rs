//! Checkpoints of a run: what is in them, when they are found, and what must not change on the way.
//!
//! A resumed run goes on with the same bits, because everything that the next step depends on is in
//! the checkpoint or is a function of the step's number: parameters and optimizer states are stored,
//! data order, dropout and learning rate are functions of (seed, step). Budget, threads, micro-batches
//! and how rows are split into batch and accumulation may change; what else would change the run is
//! refused by name unless the user insists. Tensors stream from their planned places; nothing is copied in memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ounce_io::checkpoint::{
    Checkpoint, CheckpointWriter, ScalerState, Skipped, TrainerState, checkpoint_bytes, course,
    list, newest_valid, open, rotate, state_name,
};
use ounce_io::{Disk, TensorSpec, check_room};
use ounce_ir::{DType, Graph, Param, ParamId};
use ounce_kernels::tier::tier;
use serde_json::{Map, Value};

use crate::data::{Data, TrainRows};
use crate::error::message_and_hint;
use crate::graphs::states;
use crate::model::missing;
use crate::output::METRICS;
use crate::same_data::{by_full_path, changed_data};
use crate::schedule::Schedule;
use crate::session::Session;
use crate::{Environment, Error, Observer, Result, Settings, weights};

/// Settings that change how a run is done or reported, never its bits. The rows per step and the
/// length of the schedule are compared as such.
const FREE: [&str; 21] = [
    "dataloader_num_workers",
    "init_loss_scale",
    // Whether there were broken rows is a matter of the data, which are compared.
    "on_bad_row",
    "on_nonfinite",
    "model",
    "output_dir",
    "eval_data",
    "memory",
    "threads",
    "logging_steps",
    "eval_steps",
    "sample_steps",
    "sample_prompt",
    "sample_tokens",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
];

/// The checkpoint that the settings name: `auto` is the newest whole one in the output directory, if
/// there is one.
///
/// # Errors
/// A path that is no whole checkpoint; settings to override where there is none.
pub(crate) fn find(
    settings: &Settings,
    output_dir: &Path,
    observer: &mut dyn Observer,
) -> Result<Option<Checkpoint>> {
    match settings.resume_from_checkpoint.as_deref() {
        None if settings.override_begun => Err(missing("--resume-from-checkpoint auto|PATH")),
        None => {
            note_earlier_run(output_dir, observer);
            Ok(None)
        }
        Some("auto") => {
            let newest = newest_valid(output_dir)?;
            if let Some(checkpoint) = &newest.checkpoint {
                note_skipped(&newest.skipped, observer);
                note_going_on(checkpoint, settings, observer);
                return Ok(newest.checkpoint);
            }
            // What is lost for good does not stand in the way of a new run; what is not would be lost by it.
            let (readable, damaged): (Vec<_>, Vec<_>) =
                newest.skipped.into_iter().partition(Skipped::may_be_whole);
            note_skipped(&damaged, observer);
            if !damaged.is_empty() && readable.is_empty() {
                observer.note("warning: none is whole: this run starts afresh");
            }
            readable.into_iter().next().map_or(Ok(None), |skipped| Err(skipped.reason.into()))
        }
        Some(path) => {
            let checkpoint = open(Path::new(path)).map_err(|e| of_directory(path, e.into()))?;
            note_going_on(&checkpoint, settings, observer);
            Ok(Some(checkpoint))
        }
    }
}

/// The error of a path that is no checkpoint; where it holds some, that is what is said.
fn of_directory(path: &str, e: Error) -> Error {
    match list(Path::new(path)).unwrap_or_default().first() {
        None => e,
        Some((_, newest)) => Error::Input {
            message: format!("{path} is no checkpoint, but holds some"),
            hint: format!("give `--resume-from-checkpoint {}`", newest.display()),
        },
    }
}

/// Says which newer checkpoints do not count.
fn note_skipped(skipped: &[Skipped], observer: &mut dyn Observer) {
    for Skipped { path, reason } in skipped {
        let (reason, _) = message_and_hint(reason);
        observer.note(&format!("warning: {} is passed over: {reason}", path.display()));
    }
}

/// The model that the run of a checkpoint began from.
pub(crate) fn model_begun_from(checkpoint: &Checkpoint) -> Option<PathBuf> {
    checkpoint.state().settings.get("model").and_then(Value::as_str).map(PathBuf::from)
}

/// Says that another model than that of the checkpoint is not read.
fn note_other_model(checkpoint: &Checkpoint, settings: &Settings, observer: &mut dyn Observer) {
    let full = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    if let (Some(begun), Some(given)) = (model_begun_from(checkpoint), &settings.model)
        && full(&begun) != full(given)
    {
        observer.note(&format!(
            "warning: the run was begun from {} and goes on from its checkpoint; `--model {}` is not read",
            begun.display(),
            given.display()
        ));
    }
}

/// Says where a run goes on.
fn note_going_on(checkpoint: &Checkpoint, settings: &Settings, observer: &mut dyn Observer) {
    note_other_model(checkpoint, settings, observer);
    let (path, step) = (checkpoint.path().display(), checkpoint.state().step);
    observer.note(&format!("resuming after step {step} from {path}"));
}

/// Says of a run that starts afresh that its output directory holds the checkpoints of another.
fn note_earlier_run(output_dir: &Path, observer: &mut dyn Observer) {
    if let Some((_, newest)) = list(output_dir).unwrap_or_default().first() {
        let path = newest.display();
        observer.note(&format!(
            "warning: this run starts afresh, but {path} of an earlier run is there\n\
             hint: `--resume-from-checkpoint auto` goes on from it; another `--output-dir` keeps both"
        ));
    }
}

/// What is compared in the place of the two settings whose product it is.
const ROWS_PER_STEP: &str = "per_device_train_batch_size times gradient_accumulation_steps";
/// What the state's schedule calls the steps of the whole run.
const N_STEPS: &str = "n_steps";

/// The state of a run after `step` of `n_steps` steps.
pub(crate) fn state(
    settings: &Settings,
    (step, n_steps): (u64, u64),
    n_updates: u64,
    tokens_seen: u64,
    data: &Data,
    scaler: ScalerState,
    course: u64,
) -> TrainerState {
    let (cursor, stream) = data.train.cursor(step * settings.n_rows());
    TrainerState {
        step,
        course,
        n_updates,
        cursor,
        data_hash: data.train.contents(),
        rows_made_s: Some(data.rows_made_s),
        stream,
        seed: settings.seed,
        schedule: Map::from_iter([(N_STEPS.to_owned(), n_steps.into())]),
        settings: by_full_path(settings).to_map(),
        kernel_tier: tier().to_string(),
        code_version: env!("CARGO_PKG_VERSION").to_owned(),
        tokens_seen,
        scaler: Some(scaler),
    }
}

/// Checks that the run which goes on is the run that was begun.
///
/// # Errors
/// [`Error::Usage`] with the names of the settings that differ, unless they are to override those that
/// the run was begun with.
pub(crate) fn check_settings(
    checkpoint: &Checkpoint,
    settings: &Settings,
    n_steps: u64,
    observer: &mut dyn Observer,
) -> Result<()> {
    let state = checkpoint.state();
    let begun: Settings =
        serde_json::from_value(Value::Object(state.settings.clone())).map_err(|e| {
            Error::Input {
                message: format!(
                    "{}: settings of another version: {e}",
                    checkpoint.path().display()
                ),
                hint: "start the run again".to_owned(),
            }
        })?;
    let (then, now) = (begun.policy().precision, settings.policy().precision);
    if then.param_dtype() != now.param_dtype() {
        return Err(Error::Usage {
            message: format!(
                "{}: the run was begun in precision {then} and cannot go on in {now}",
                checkpoint.path().display()
            ),
            hint: format!("give `--precision {then}`, or start a new run from these weights"),
        });
    }
    let (mut then, mut now) = (by_full_path(&begun).to_map(), by_full_path(settings).to_map());
    for (map, settings) in [(&mut then, &begun), (&mut now, settings)] {
        map.insert(ROWS_PER_STEP.to_owned(), settings.n_rows().into());
    }
    let differs = |key: &&String| then[*key] != now[*key] && !FREE.contains(&key.as_str());
    let mut names: Vec<&str> = now.keys().filter(differs).map(String::as_str).collect();
    // Another length is fine as long as the steps that were done had the same learning rates.
    if let Some(n) = state.schedule.get(N_STEPS).and_then(Value::as_u64).or(begun.max_steps)
        && n != n_steps
        && !same_rates(&Schedule::of(&begun, n), &Schedule::of(settings, n_steps), state.step)
    {
        let by_epochs = begun.max_steps.is_none() && settings.max_steps.is_none();
        names.push(if by_epochs { "num_train_epochs" } else { "max_steps" });
    }
    if !names.is_empty() {
        let message = format!(
            "{}: the run was begun with other settings: {}",
            checkpoint.path().display(),
            names.join(", ")
        );
        if !settings.override_begun {
            let value = |name: &&str| {
                let (then, now) = (then.get(*name)?, now.get(*name)?);
                (then != now).then(|| format!("{name} was {then} and is {now}"))
            };
            let values: Vec<String> = names.iter().filter_map(value).collect();
            let same =
                if values.is_empty() { String::new() } else { format!(" ({})", values.join("; ")) };
            let hint =
                format!("give the same values{same}, or `--override` to go on with the new ones");
            return Err(Error::Usage { message, hint });
        }
        observer.note(&format!("warning: {message}; it goes on with the new ones"));
    }
    if state.code_version != env!("CARGO_PKG_VERSION") {
        let (then, now) = (&state.code_version, env!("CARGO_PKG_VERSION"));
        observer.note(&format!(
            "warning: the run was begun by version {then} and goes on with {now}: its last bits may differ"
        ));
    }
    if state.kernel_tier != tier().to_string() {
        let (then, now) = (&state.kernel_tier, tier());
        observer.note(&format!(
            "warning: the run was begun with {then} kernels and goes on with {now}: \
             its last bits may differ"
        ));
    }
    Ok(())
}

/// Checks that the data files hold what they held when the checkpoint was saved.
///
/// # Errors
/// [`Error::Input`] if they do not, unless the run is to go on all the same.
pub(crate) fn check_data(
    checkpoint: &Checkpoint,
    settings: &Settings,
    data: &TrainRows,
    observer: &mut dyn Observer,
) -> Result<()> {
    let (then, now) = (checkpoint.state().data_hash.as_ref(), data.contents());
    // Other files are told of as other settings; a stream looks for itself.
    let given = by_full_path(settings).to_map();
    let same_files = checkpoint.state().settings.get("data") == given.get("data");
    if !same_files || then.is_none() || now.is_none() || then == now.as_ref() {
        return Ok(());
    }
    changed_data("the data", "the data has changed", settings, observer)
}

/// Refuses a run that is to end before the place where the checkpoint stands.
///
/// # Errors
/// [`Error::Usage`] with both steps.
pub(crate) fn check_end(checkpoint: &Checkpoint, n_steps: u64) -> Result<()> {
    let step = checkpoint.state().step;
    if step <= n_steps {
        return Ok(());
    }
    Err(Error::Usage {
        message: format!(
            "{}: {step} steps are done, and the run is to have {n_steps}",
            checkpoint.path().display()
        ),
        hint: "give a larger --max-steps (or --num-train-epochs), or resume from an earlier checkpoint".to_owned(),
    })
}

/// Whether the checkpoint holds states of the optimizer that the settings name.
pub(crate) fn has_states_of(checkpoint: &Checkpoint, settings: &Settings) -> bool {
    checkpoint.state().settings.get("optimizer") == settings.to_map().get("optimizer")
}

/// Whether the first `n` steps have the same learning rates.
fn same_rates(a: &Schedule, b: &Schedule, n: u64) -> bool {
    (1..=n).all(|step| a.learning_rate(step) == b.learning_rate(step))
}

/// Writes checkpoints of one run.
pub(crate) struct Saver {
    disk: Arc<dyn Disk>,
    output_dir: PathBuf,
    /// Configuration and tokenizer as they were when the run began, whatever becomes of the model's directory.
    side_files: PathBuf,
    n_keep: Option<usize>,
    resumed_from: Option<PathBuf>,
    weights: Vec<TensorSpec>,
    optimizer: Vec<TensorSpec>,
    needed_bytes: u64,
    course: u64,
    /// What the model at the end takes.
    model_bytes: u64,
}

impl Saver {
    /// For the run that `session` is planned for, whose configuration and tokenizer lie in `side_files`.
    ///
    /// # Errors
    /// Files or an output directory that cannot be read.
    pub(crate) fn new(
        settings: &Settings,
        env: &Environment,
        side_files: &Path,
        session: &Session,
        from: Option<&Checkpoint>,
    ) -> Result<Self> {
        let program = session.train.as_ref().expect("a training run has a training plan");
        let (weights, optimizer) = (weights::specs(&program.graph), state_specs(&program.graph));
        let output_dir = settings.output_dir.clone().unwrap_or_default();
        Ok(Self {
            disk: env.disk.clone(),
            course: course(&output_dir, from)?,
            output_dir,
            side_files: side_files.to_path_buf(),
            n_keep: settings.save_total_limit.map(|n| n as usize),
            resumed_from: from.map(|c| c.path().to_path_buf()),
            needed_bytes: checkpoint_bytes(&weights, &optimizer, side_files)?,
            model_bytes: checkpoint_bytes(&weights, &[], side_files)?,
            weights,
            optimizer,
        })
    }

    /// Refuses to begin a run whose result the disk has no room for, with a checkpoint where it saves.
    ///
    /// # Errors
    /// [`Error::Files`] with the bytes needed and free.
    pub(crate) fn check_room(&self, settings: &Settings) -> Result<()> {
        let saves = settings.save_steps.is_some_and(|n| n > 0);
        self.room_for(self.model_bytes + if saves { self.needed_bytes } else { 0 })
    }

    /// The same before the result is written.
    pub(crate) fn check_room_for_model(&self) -> Result<()> {
        self.room_for(self.model_bytes)
    }

    fn room_for(&self, bytes: u64) -> Result<()> {
        let model = self.output_dir.join("model.safetensors");
        Ok(check_room(&*self.disk, &self.output_dir, &model, bytes)?)
    }

    /// The course of the run, for the state of its checkpoints.
    pub(crate) fn course(&self) -> u64 {
        self.course
    }

    /// Writes a checkpoint, with the run's metrics so far.
    ///
    /// # Errors
    /// A failed write; the checkpoints that were there before are untouched.
    pub(crate) fn save(
        &self,
        session: &mut Session,
        state: &TrainerState,
        metrics: &Path,
    ) -> Result<PathBuf> {
        let metrics_bytes = std::fs::metadata(metrics).map_err(|e| Error::file(metrics, &e))?.len();
        let Session { train, arena, .. } = session;
        let program = train.as_ref().expect("a training run has a training plan");
        let (graph, mut buffers) = (&program.graph, program.executor.buffers(arena));
        let (disk, step) = (self.disk.clone(), state.step);
        let mut writer = CheckpointWriter::begin_on(
            disk,
            &self.output_dir,
            step,
            self.needed_bytes + metrics_bytes,
        )?;
        writer.copy_side_files(&self.side_files)?;
        writer.copy_file(metrics, METRICS)?;
        let mut file = writer.weights(&self.weights)?;
        weights::append_params(&mut file, graph, &mut buffers)?;
        file.finish()?;
        let mut file = writer.optimizer(&self.optimizer)?;
        for (id, param, k) in states(graph) {
            let name = state_name(&graph.states[k].name, &param.name);
            match graph.states[k].dtype {
                DType::I16 => file.write_tensor_i16(&name, buffers.state_i16(id, k as u32))?,
                _ => file.write_tensor_f32(&name, buffers.state(id, k as u32))?,
            }
        }
        file.finish()?;
        Ok(writer.publish(state)?)
    }

    /// Removes the checkpoints that are too many, of a run that has reached `step` and saved `last`; none before it has
    /// saved one itself.
    ///
    /// # Errors
    /// A failed write.
    pub(crate) fn rotate(&self, step: u64, last: &Path) -> Result<()> {
        if let Some(n_keep) = self.n_keep
            && self.resumed_from.as_deref() != Some(last)
        {
            let never = self.resumed_from.iter().map(PathBuf::as_path).chain([last]);
            rotate(&self.output_dir, step, n_keep, never)?;
        }
        Ok(())
    }
}

/// The optimizer's states as tensors of a file.
fn state_specs(graph: &Graph) -> Vec<TensorSpec> {
    let spec = |(_, param, k): (ParamId, &Param, usize)| TensorSpec {
        name: state_name(&graph.states[k].name, &param.name),
        dtype: weights::on_disk(graph.states[k].dtype),
        shape: param.shape.dims.iter().map(|&d| d as usize).collect(),
    };
    states(graph).map(spec).collect()
}

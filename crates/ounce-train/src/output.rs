//! The output directory of a run.
//!
//! It is a Hugging Face directory with the run's own files beside: `run.yaml` (every setting),
//! `metrics.jsonl` and TensorBoard events, which are there from step 1 on for whoever watches, and
//! `plan.html` and `loss.svg`. What makes it a model comes at the end, all at once
//! ([`Output::publish`]): after a failure the directory does not look like a finished model. Where it
//! holds a model already, nothing of that may change before the new one is complete, so there all
//! files wait in a hidden directory. What is kept in memory for the curve is bounded: when it is full,
//! every other point goes.

use std::fs::{File, TryLockError};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ounce_exec::Arena;
use ounce_io::checkpoint::{Checkpoint, list};
use ounce_io::{Disk, StagingDir, write_file};
use ounce_ir::DType;
use serde::{Deserialize, Serialize};

use crate::model::Model;
use crate::precision::config_with_dtype;
use crate::program::Program;
use crate::watch::{EventWriter, MetricsWriter, for_each_line, loss_svg};
use crate::{Environment, Error, EvalRecord, Observer, Result, Settings, StepRecord, weights};

/// Points of the loss curve that are kept.
const MAX_POINTS: usize = 4096;
/// Between two flushes of the events, for whoever watches.
const FLUSH_EVERY: Duration = Duration::from_secs(10);
/// How long the directory of another run is waited for: one that is being stopped saves a checkpoint yet.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// The file of the numbers of every step, in the output directory and in each checkpoint.
pub(crate) const METRICS: &str = "metrics.jsonl";

/// The output directory before step 1: nothing is in it yet.
pub(crate) struct Staged {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    // Removed before the directory that it may be in.
    staging: StagingDir,
    _made: Made,
    /// Held as long as the run lasts: two runs in one directory would remove each other's checkpoints.
    _lock: File,
}

/// An output directory that we made. Removed when dropped, unless something is in it.
struct Made(Option<PathBuf>);

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(dir) = &self.0 {
            // A directory that is not empty stays, which is what is wanted.
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// The files of a run.
pub(crate) struct Output {
    staged: Staged,
    metrics: MetricsWriter,
    events: EventWriter,
    flushed: Instant,
    losses: Curve,
    eval_losses: Curve,
    /// The step of the last evaluation.
    evaluated: Option<u64>,
}

/// A line of `metrics.jsonl` for an evaluation.
#[derive(Serialize)]
struct EvalLine {
    step: u64,
    eval_loss: f64,
    eval_tokens: u64,
}

/// A line of `metrics.jsonl`.
#[derive(Deserialize)]
struct AnyLine {
    step: u64,
    loss: Option<f64>,
    eval_loss: Option<f64>,
}

impl Staged {
    /// Makes the directory and a hidden one in it for what is published at the end: a model whose
    /// weights are `stored` so. `lock` is the directory's, if it was there before.
    ///
    /// # Errors
    /// A failed write.
    pub(crate) fn create(
        env: &Environment,
        dir: &Path,
        model: &Model,
        (stored, plan_html): (DType, &str),
        lock: Option<File>,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        let is_new = !dir.exists();
        // A failure is told by what follows.
        let made = Made((is_new && std::fs::create_dir_all(dir).is_ok()).then(|| dir.to_owned()));
        let staging = StagingDir::create_on(env.disk.clone(), dir)?;
        let lock = lock.map_or_else(|| take(dir, observer), Ok)?;
        ounce_io::copy_side_files(&model.dir, staging.path())?;
        if let Some(config) = config_with_dtype(&model.dir, stored)? {
            write_file(&staging.path().join("config.json"), config.as_bytes())?;
        }
        write_file(&staging.path().join("plan.html"), plan_html.as_bytes())?;
        Ok(Self {
            disk: env.disk.clone(),
            dir: dir.to_path_buf(),
            staging,
            _made: made,
            _lock: lock,
        })
    }

    /// Configuration and tokenizer of the model, as they were when the run began.
    pub(crate) fn side_files(&self) -> &Path {
        self.staging.path()
    }

    /// Opens the files that grow from step to step, for a run that goes on from a checkpoint, if from any.
    ///
    /// # Errors
    /// A failed write.
    pub(crate) fn begin(
        self,
        settings: &Settings,
        from: Option<&Checkpoint>,
        observer: &mut dyn Observer,
    ) -> Result<Output> {
        let mut place = self.dir.as_path();
        if holds_model(place) {
            place = self.staging.path();
            observer.note(&format!(
                "{} holds a model, which stays until this run is done and is then replaced; until then its metrics are \
                 in {}",
                self.dir.display(),
                place.join(METRICS).display()
            ));
        }
        write_file(&place.join("run.yaml"), settings.to_yaml().as_bytes())?;
        let path = place.join(METRICS);
        let last_step = from.map_or(0, |checkpoint| checkpoint.state().step);
        let metrics = match from {
            Some(checkpoint) => metrics_so_far(checkpoint.path(), &self.dir, &path)
                .and_then(|()| MetricsWriter::resume(&path, last_step)),
            None => MetricsWriter::create(&path),
        };
        let metrics = metrics.map_err(|e| Error::file(&path, &e))?;
        let events = EventWriter::create(place).map_err(|e| Error::file(place, &e))?;
        let (losses, eval_losses) = (Curve::default(), Curve::default());
        let flushed = Instant::now();
        let evaluated = None;
        let mut output =
            Output { staged: self, metrics, events, flushed, losses, eval_losses, evaluated };
        output.restart(last_step + 1)?;
        output.read_curves()?;
        Ok(output)
    }
}

/// Puts the metrics of the steps before a checkpoint at `path`: those in the output directory if they go on from what
/// the checkpoint holds, and know what came after it; else those of the checkpoint.
fn metrics_so_far(checkpoint: &Path, dir: &Path, path: &Path) -> std::io::Result<()> {
    let (saved, live) = (checkpoint.join(METRICS), dir.join(METRICS));
    let source = if begins_with(&live, &saved)? { live } else { saved };
    // A copy of a file onto itself would leave nothing of it.
    if source == path {
        return Ok(());
    }
    match std::fs::copy(&source, path) {
        // An earlier build has left none in the checkpoint.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Whether a file is there and begins with all of another, if that is there.
fn begins_with(path: &Path, head: &Path) -> std::io::Result<bool> {
    let open = |path: &Path| File::open(path).map(BufReader::new);
    let Ok(mut file) = open(path) else { return Ok(false) };
    let Ok(mut head) = open(head) else { return Ok(true) };
    loop {
        let (found, wanted) = (file.fill_buf()?, head.fill_buf()?);
        let n = found.len().min(wanted.len());
        if n == 0 || found[..n] != wanted[..n] {
            return Ok(wanted.is_empty());
        }
        file.consume(n);
        head.consume(n);
    }
}

/// Takes an output directory that is there for this run alone, before it is looked for checkpoints.
///
/// # Errors
/// [`Error::Usage`] where another run is writing to it and does not end.
pub(crate) fn lock(dir: &Path, observer: &mut dyn Observer) -> Result<Option<File>> {
    dir.is_dir().then(|| take(dir, observer)).transpose()
}

fn take(dir: &Path, observer: &mut dyn Observer) -> Result<File> {
    let file = File::open(dir).map_err(|e| Error::file(dir, &e))?;
    let begun = Instant::now();
    let mut locked = file.try_lock();
    if matches!(locked, Err(TryLockError::WouldBlock)) {
        observer.note(&format!("waiting for another run that is writing to {}", dir.display()));
    }
    while matches!(locked, Err(TryLockError::WouldBlock)) && begun.elapsed() < LOCK_PATIENCE {
        std::thread::sleep(LOCK_PATIENCE / 100);
        locked = file.try_lock();
    }
    match locked {
        Err(TryLockError::WouldBlock) => Err(Error::Usage {
            message: format!("another run is writing to {}", dir.display()),
            hint: "wait for it or stop it, or give another `--output-dir`".to_owned(),
        }),
        // Not every file system has locks.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

/// Removes the settings of a run whose model is replaced by one of no run, of which they would be taken to speak.
///
/// # Errors
/// A failed removal.
pub(crate) fn forget_run(dir: &Path) -> Result<()> {
    let path = dir.join("run.yaml");
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::file(&path, &e)),
        _ => Ok(()),
    }
}

/// Whether a run has written its result or a checkpoint there.
pub(crate) fn holds_run(dir: &Path) -> bool {
    dir.join("run.yaml").exists() || list(dir).is_ok_and(|checkpoints| !checkpoints.is_empty())
}

/// Whether a loader would take the directory for a model.
fn holds_model(dir: &Path) -> bool {
    ["config.json", "model.safetensors", "model.safetensors.index.json"]
        .iter()
        .any(|name| dir.join(name).exists())
}

impl Output {
    /// Records a step.
    ///
    /// # Errors
    /// A failed write.
    pub(crate) fn step(&mut self, r: &StepRecord) -> Result<()> {
        if r.loss.is_finite() {
            self.losses.add(r.step, r.loss);
        }
        let metrics = self.metrics.path().to_path_buf();
        self.metrics.append(r).map_err(|e| Error::file(&metrics, &e))?;
        let scalars = [
            ("train/loss", r.loss),
            ("train/learning_rate", r.learning_rate),
            ("train/grad_norm", r.grad_norm),
            ("train/tokens_per_s", r.tokens_per_s),
        ];
        let scale = r.loss_scale.map(|scale| ("train/loss_scale", f64::from(scale)));
        let mut all = scalars.into_iter().chain(scale);
        all.try_for_each(|(tag, value)| self.scalar(r.step, tag, value))?;
        if self.flushed.elapsed() >= FLUSH_EVERY { self.flush() } else { Ok(()) }
    }

    /// Records an evaluation after `step` steps.
    ///
    /// # Errors
    /// A failed write.
    pub(crate) fn evaluated(&mut self, step: u64, r: &EvalRecord) -> Result<()> {
        self.eval_losses.add(step, r.loss);
        self.evaluated = Some(step);
        let line = EvalLine { step, eval_loss: r.loss, eval_tokens: r.tokens };
        let metrics = self.metrics.path().to_path_buf();
        self.metrics.append(&line).map_err(|e| Error::file(&metrics, &e))?;
        self.scalar(step, "eval/loss", r.loss)?;
        self.flush()
    }

    /// Whether this run, or the one it goes on from, was evaluated after `step` steps.
    pub(crate) fn is_evaluated(&self, step: u64) -> bool {
        self.evaluated == Some(step)
    }

    /// Hands the events so far to whoever watches.
    fn flush(&mut self) -> Result<()> {
        self.flushed = Instant::now();
        self.events.flush().map_err(|e| Error::file(self.events.path(), &e))
    }

    /// Tells TensorBoard that points of this step and later ones, which a run before has left, are done again.
    fn restart(&mut self, step: u64) -> Result<()> {
        let written = self.events.restart(step, wall_time_s());
        written.map_err(|e| Error::file(self.events.path(), &e))
    }

    /// The file of the metrics so far.
    pub(crate) fn metrics(&self) -> &Path {
        self.metrics.path()
    }

    /// Flushes, and copies the events so far, whose file has a name of its own, into the output directory, if they are
    /// not there: whoever watches a run that goes on sees what came before.
    ///
    /// # Errors
    /// A failed write.
    pub(crate) fn keep_events(&mut self) -> Result<()> {
        self.flush()?;
        let (dir, written) = (&self.staged.dir, self.events.path());
        let path = dir.join(written.file_name().expect("a file"));
        if written == path {
            return Ok(());
        }
        let hidden = dir.join(".events.tmp");
        let copied = std::fs::copy(written, &hidden);
        copied.and_then(|_| std::fs::rename(&hidden, &path)).map_err(|e| Error::file(&path, &e))
    }

    /// Takes the curves of the steps before this run from its metrics.
    fn read_curves(&mut self) -> Result<()> {
        let path = self.metrics.path().to_path_buf();
        for_each_line(&path, |line| {
            // Lines of another make have no curve.
            let Ok(line) = serde_json::from_slice::<AnyLine>(line) else { return };
            line.loss.into_iter().for_each(|x| self.losses.add(line.step, x));
            line.eval_loss.into_iter().for_each(|x| self.eval_losses.add(line.step, x));
            self.evaluated = line.eval_loss.map(|_| line.step).or(self.evaluated);
        })
        .map_err(|e| Error::file(&path, &e))
    }

    fn scalar(&mut self, step: u64, tag: &str, value: f64) -> Result<()> {
        let written = self.events.scalar(step, tag, value as f32, wall_time_s());
        written.map_err(|e| Error::file(self.events.path(), &e))
    }

    /// Writes the weights and the curve, and moves everything into place.
    ///
    /// # Errors
    /// A failed write; no model appears then, and one that was there is as it was.
    pub(crate) fn publish(mut self, program: &Program, arena: &mut Arena) -> Result<()> {
        let path = self.staged.staging.path().to_path_buf();
        let mut buffers = program.executor.buffers(arena);
        weights::write(&self.staged.disk, &path, &program.graph, &mut buffers)?;
        let curve = loss_svg(&self.losses.points, &self.eval_losses.points);
        write_file(&path.join("loss.svg"), curve.as_bytes())?;
        self.flush()?;
        Ok(self.staged.staging.publish()?)
    }
}

/// Seconds since 1970.
fn wall_time_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Points of a curve, evenly thinned out so that they never grow beyond a bound.
#[derive(Debug)]
struct Curve {
    points: Vec<(u64, f64)>,
    /// One point in this many is kept.
    stride: u64,
    n_seen: u64,
}

impl Default for Curve {
    fn default() -> Self {
        Self { points: Vec::new(), stride: 1, n_seen: 0 }
    }
}

impl Curve {
    fn add(&mut self, step: u64, value: f64) {
        let is_kept = self.n_seen.is_multiple_of(self.stride);
        self.n_seen += 1;
        if !is_kept {
            return;
        }
        if self.points.len() == MAX_POINTS {
            let mut i = 0;
            self.points.retain(|_| {
                i += 1;
                i % 2 == 1
            });
            self.stride *= 2;
        }
        self.points.push((step, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_curve_keeps_its_shape_in_bounded_memory() {
        let mut curve = Curve::default();
        for step in 1..=100_000 {
            curve.add(step, step as f64);
        }
        assert!(curve.points.len() <= MAX_POINTS && curve.points.len() >= MAX_POINTS / 2);
        assert_eq!(curve.points[0], (1, 1.0));
        let gaps = curve.points.windows(2).map(|w| w[1].0 - w[0].0);
        assert!(gaps.clone().all(|g| g == curve.stride), "{:?}", gaps.max());
    }
}

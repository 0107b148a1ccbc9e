//! The output directory in the making: nothing of it is visible before [`Output::publish`].
//!
//! It is a Hugging Face directory with the run's own files beside: `run.yaml` (every setting),
//! `metrics.jsonl`, TensorBoard events, `plan.html` and `loss.svg`. What is kept in memory for the
//! curve is bounded: when it is full, every other point goes.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use ounce_exec::Arena;
use ounce_io::{StagingDir, write_file};
use serde::{Deserialize, Serialize};

use crate::model::Model;
use crate::session::Program;
use crate::watch::{EventWriter, MetricsWriter, loss_svg};
use crate::{Error, EvalRecord, Result, Settings, StepRecord, weights};

/// Points of the loss curve that are kept.
const MAX_POINTS: usize = 4096;
/// The file of the numbers of every step.
const METRICS: &str = "metrics.jsonl";

/// The files of a run.
pub(crate) struct Output {
    dir: PathBuf,
    staging: StagingDir,
    metrics: MetricsWriter,
    events: EventWriter,
    losses: Curve,
    eval_losses: Curve,
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

/// The metrics of a run that begins at `first_step`: those of the steps before it, if it goes on in the
/// directory where it was begun.
fn open_metrics(dir: &Path, path: &Path, first_step: u64) -> Result<MetricsWriter> {
    let before = dir.join(METRICS);
    if first_step > 1 && before.is_file() {
        std::fs::copy(&before, path).map_err(|e| Error::file(&before, &e))?;
    }
    MetricsWriter::resume(path, first_step - 1).map_err(|e| Error::file(path, &e))
}

impl Output {
    /// Makes the directory beside (or within) its final place and writes what is known before step 1.
    ///
    /// # Errors
    /// A failed write.
    pub(crate) fn create(
        dir: &Path,
        model: &Model,
        settings: &Settings,
        plan_html: &str,
        first_step: u64,
    ) -> Result<Self> {
        let staging = StagingDir::create(dir)?;
        let path = staging.path().to_path_buf();
        ounce_io::copy_side_files(&model.dir, &path)?;
        write_file(&path.join("run.yaml"), settings.to_yaml().as_bytes())?;
        write_file(&path.join("plan.html"), plan_html.as_bytes())?;
        let (losses, eval_losses) = (Curve::default(), Curve::default());
        let events = EventWriter::create(&path).map_err(|e| Error::file(&path, &e))?;
        let metrics = open_metrics(dir, &path.join(METRICS), first_step)?;
        let mut output =
            Self { dir: dir.to_path_buf(), staging, metrics, events, losses, eval_losses };
        if first_step > 1 {
            output.read_curves()?;
        }
        Ok(output)
    }

    /// Records a step.
    ///
    /// # Errors
    /// A failed write.
    pub(crate) fn step(&mut self, r: &StepRecord) -> Result<()> {
        self.losses.add(r.step, r.loss);
        let metrics = self.metrics.path().to_path_buf();
        self.metrics.append(r).map_err(|e| Error::file(&metrics, &e))?;
        let scalars = [
            ("train/loss", r.loss),
            ("train/learning_rate", r.learning_rate),
            ("train/grad_norm", r.grad_norm),
            ("train/tokens_per_s", r.tokens_per_s),
        ];
        scalars.into_iter().try_for_each(|(tag, value)| self.scalar(r.step, tag, value))
    }

    /// Records an evaluation after `step` steps.
    ///
    /// # Errors
    /// A failed write.
    pub(crate) fn evaluated(&mut self, step: u64, r: &EvalRecord) -> Result<()> {
        self.eval_losses.add(step, r.loss);
        let line = EvalLine { step, eval_loss: r.loss, eval_tokens: r.tokens };
        let metrics = self.metrics.path().to_path_buf();
        self.metrics.append(&line).map_err(|e| Error::file(&metrics, &e))?;
        self.scalar(step, "eval/loss", r.loss)
    }

    /// Copies the metrics so far to where a run that goes on finds them.
    ///
    /// # Errors
    /// A failed write.
    pub(crate) fn keep_metrics(&self) -> Result<()> {
        let (path, hidden) = (self.dir.join(METRICS), self.dir.join(".metrics.tmp"));
        let copied = std::fs::copy(self.metrics.path(), &hidden);
        copied.and_then(|_| std::fs::rename(&hidden, &path)).map_err(|e| Error::file(&path, &e))
    }

    /// Takes the curves of the steps before this run from its metrics.
    fn read_curves(&mut self) -> Result<()> {
        let path = self.metrics.path().to_path_buf();
        let file = File::open(&path).map_err(|e| Error::file(&path, &e))?;
        for line in BufReader::new(file).lines() {
            let line = line.map_err(|e| Error::file(&path, &e))?;
            // Lines of another make have no curve.
            let Ok(line) = serde_json::from_str::<AnyLine>(&line) else { continue };
            line.loss.into_iter().for_each(|x| self.losses.add(line.step, x));
            line.eval_loss.into_iter().for_each(|x| self.eval_losses.add(line.step, x));
        }
        Ok(())
    }

    fn scalar(&mut self, step: u64, tag: &str, value: f64) -> Result<()> {
        let wall_time_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let written = self.events.scalar(step, tag, value as f32, wall_time_s.as_secs_f64());
        written.map_err(|e| Error::file(self.events.path(), &e))
    }

    /// Writes the weights and the curve, and moves everything into place.
    ///
    /// # Errors
    /// A failed write; the final directory is then as it was.
    pub(crate) fn publish(mut self, program: &Program, arena: &mut Arena) -> Result<()> {
        let path: PathBuf = self.staging.path().to_path_buf();
        weights::write(&path, &program.graph, &mut program.executor.buffers(arena))?;
        let curve = loss_svg(&self.losses.points, &self.eval_losses.points);
        write_file(&path.join("loss.svg"), curve.as_bytes())?;
        self.events.flush().map_err(|e| Error::file(self.events.path(), &e))?;
        Ok(self.staging.publish()?)
    }
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

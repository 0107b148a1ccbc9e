//! `bench step`: full training steps on one fixed random batch, from random weights.
//!
//! The keys of the record are those of `bench/peer_torch.py`, so that both can be put side by side.
//! Like there, the batch never changes, so the loss must fall.

use std::path::Path;

use ounce_exec::TimeClass;
use ounce_kernels::philox::philox4x32_10;
use ounce_models::{PRESETS, preset};
use ounce_program::StepShape;
use serde::Serialize;

use crate::batch::Row;
use crate::budget::{Memory, peak_resident_bytes};
use crate::compile::compile;
use crate::graphs::{TrainWanted, Wanted};
use crate::limits::Limits;
use crate::model::Model;
use crate::planning::ONE_ROW_FLAGS;
use crate::schedule::SchedulerType;
use crate::settings::{Optimizer, Precision};
use crate::step::{Rows, Trainer};
use crate::{Environment, Error, Observer, Result, Settings};

/// Most steps of a bench, which keeps the time of each.
const MAX_STEPS: u64 = 1 << 20;

/// What to measure.
#[derive(Debug, Clone, PartialEq)]
pub struct BenchSettings {
    /// A directory with a `config.json`, or a published size.
    pub model: String,
    /// Rows per step.
    pub n_rows: u64,
    /// Tokens per row.
    pub max_length: u64,
    /// Measured steps.
    pub n_steps: u64,
    /// Steps before the measured ones.
    pub n_warmup_steps: u64,
    /// Budget of the whole process.
    pub memory: Memory,
    /// Threads; all cores if not given.
    pub threads: Option<u32>,
    /// Seed of weights and batch.
    pub seed: u64,
    /// What values are stored in.
    pub precision: Precision,
    /// Update rule.
    pub optimizer: Optimizer,
    /// Learning rate.
    pub learning_rate: f64,
    /// Gradients are scaled down to this norm; 0 is off.
    pub max_grad_norm: f64,
    /// Whether to time every class of op.
    pub profile: bool,
    /// Whether to take the fastest plan that fits, which keeps everything where there is room for it,
    /// instead of the one that gives up the last per cent of speed for memory.
    pub fastest: bool,
}

/// What was measured. Sizes in MiB, times in seconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "the keys are those of bench/peer_torch.py")]
pub struct BenchRecord {
    pub engine: String,
    pub model: String,
    pub params: u64,
    pub batch: u64,
    pub seq: u64,
    pub dtype: String,
    pub optimizer: Optimizer,
    pub threads: u64,
    pub tok_per_s: f64,
    pub step_s_median: f64,
    pub step_s_min: f64,
    pub step_s_all: Vec<f64>,
    pub first_step_s: f64,
    pub peak_rss_mib: f64,
    pub losses: Vec<f64>,
    pub plan_peak_mib: f64,
    pub predicted_step_s: f64,
    pub unconstrained_step_s: f64,
    pub budget_mib: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<BenchProfile>,
}

/// Where the time of the measured steps went.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchProfile {
    /// Every class of op that ran.
    pub classes: Vec<ClassTime>,
    /// Share of the steps that was spent neither in matrix products (the head's among them) nor in
    /// attention: other ops, and what lies between ops.
    pub outside_products_share: f64,
}

/// Time of one class of op.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClassTime {
    /// Name of the class.
    pub class: &'static str,
    /// Milliseconds per step.
    pub ms_per_step: f64,
    /// Share of the step.
    pub share: f64,
    /// The same of every kind of op in it, by the op's name; the longest first.
    pub ops: Vec<KindTime>,
}

/// Time of one kind of op.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KindTime {
    /// The op's name in the graph's text form.
    pub op: &'static str,
    /// Runs per step.
    pub runs_per_step: u64,
    /// Milliseconds per step.
    pub ms_per_step: f64,
    /// What the plan predicted of them.
    pub predicted_ms_per_step: f64,
}

/// The command: plans, runs and times the steps.
///
/// # Errors
/// Wrong settings or configuration; a budget that does not fit; a request to stop.
pub fn bench_step(
    wanted: &BenchSettings,
    env: &Environment,
    observer: &mut dyn Observer,
) -> Result<BenchRecord> {
    let model = open_model(&wanted.model, env)?;
    let settings = settings(wanted);
    settings.check_ranges()?;
    for (name, n, least) in [("steps", wanted.n_steps, 1), ("warmup", wanted.n_warmup_steps, 0)] {
        if !(least..=MAX_STEPS).contains(&n) {
            return Err(Error::Usage {
                message: format!("`{name}` is out of range: {n}"),
                hint: format!("it may be from {least} to {MAX_STEPS}"),
            });
        }
    }
    let shape = StepShape::new(wanted.n_rows, wanted.max_length);
    let plans = Wanted {
        train: Some(TrainWanted { fastest: wanted.fastest, ..TrainWanted::of(&settings, shape) }),
        max_length: wanted.max_length,
        policy: settings.policy(),
        ..Wanted::default()
    };
    let limits = Limits::of(&settings);
    let mut session = compile(&model, &plans, &limits, env).map_err(with_own_flags)?;
    drop(session.take_picture());
    session.check_baseline()?;
    let n_steps = settings.max_steps.expect("a bench sets its length");
    let plan = session.record();
    observer.planned(&plan, n_steps);
    session.load_fresh(wanted.seed);
    let mut rows = RandomRows {
        seed: wanted.seed,
        vocab_size: model.config.vocab_size(),
        row_tokens: wanted.max_length as usize,
    };
    let mut trainer = Trainer::new(&settings, &mut session, n_steps, None, true);
    let (mut losses, mut times) = (Vec::new(), Vec::new());
    for step in 1..=n_steps {
        if observer.stop_requested() {
            return Err(Error::Interrupted { step: step - 1, checkpoint: None });
        }
        if wanted.profile && step == wanted.n_warmup_steps + 1 {
            session.train.as_mut().expect("a bench has a training plan").executor.start_profile();
        }
        let record = trainer.step(&mut session, &mut rows, step, observer)?;
        observer.step(&record);
        losses.push(record.loss);
        times.push(record.step_s);
    }
    let measured = &times[wanted.n_warmup_steps as usize..];
    let step_s_median = median(measured);
    let mib = |bytes: u64| bytes as f64 / 1048576.0;
    Ok(BenchRecord {
        engine: format!("ounce {}", env!("CARGO_PKG_VERSION")),
        model: wanted.model.clone(),
        params: plan.n_params,
        batch: wanted.n_rows,
        seq: wanted.max_length,
        dtype: match wanted.precision {
            Precision::F32 => "fp32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "fp16",
        }
        .to_owned(),
        optimizer: wanted.optimizer,
        threads: limits.n_threads as u64,
        tok_per_s: (wanted.n_rows * wanted.max_length) as f64 / step_s_median,
        step_s_median,
        step_s_min: measured.iter().copied().fold(f64::INFINITY, f64::min),
        step_s_all: measured.to_vec(),
        first_step_s: times[0],
        peak_rss_mib: mib(peak_resident_bytes()),
        losses,
        plan_peak_mib: mib(plan.peak_bytes),
        predicted_step_s: plan.step_s,
        unconstrained_step_s: plan.unconstrained_step_s,
        budget_mib: mib(plan.budget_bytes),
        profile: wanted.profile.then(|| profile(&session, measured)),
    })
}

/// The hint of a budget that is too small, in the flags of this command.
fn with_own_flags(mut e: Error) -> Error {
    if let Error::DoesNotFit { hint, .. } = &mut e {
        *hint = hint.replace(ONE_ROW_FLAGS, "--batch-size 1");
    }
    e
}

/// A published size by name, else a model or a file with a configuration.
fn open_model(name: &str, env: &Environment) -> Result<Model> {
    if let Some(config) = preset(name) {
        return Ok(Model::without_files(name, config));
    }
    let path = Path::new(name);
    if !path.exists() && ounce_io::hub_name(path).is_none() {
        return Err(Error::Usage {
            message: format!("`{name}` is neither a directory nor a published size"),
            hint: format!("published sizes are {}", PRESETS.join(", ")),
        });
    }
    Model::find(path, env)
}

/// The settings of a run that does what `bench/peer_torch.py` does.
fn settings(wanted: &BenchSettings) -> Settings {
    Settings {
        per_device_train_batch_size: wanted.n_rows,
        max_length: Some(wanted.max_length),
        max_steps: Some(wanted.n_warmup_steps.saturating_add(wanted.n_steps)),
        optimizer: wanted.optimizer,
        learning_rate: wanted.learning_rate,
        lr_scheduler_type: SchedulerType::Constant,
        weight_decay: if wanted.optimizer == Optimizer::Adamw { 0.1 } else { 0.0 },
        adam_beta2: 0.95,
        max_grad_norm: wanted.max_grad_norm,
        memory: wanted.memory,
        threads: wanted.threads,
        seed: wanted.seed,
        precision: Some(wanted.precision),
        ..Settings::default()
    }
}

/// The same random ids in every step.
struct RandomRows {
    seed: u64,
    vocab_size: u64,
    row_tokens: usize,
}

impl Rows for RandomRows {
    fn read(
        &mut self,
        _step: u64,
        _n_rows: u64,
        row: u64,
        to: &mut Row,
        _observer: &mut dyn Observer,
    ) -> Result<()> {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        for (i, group) in to.ids[..self.row_tokens].chunks_mut(4).enumerate() {
            let words = philox4x32_10([i as u32, row as u32, 0, 0x0062_656e], key);
            for (id, word) in group.iter_mut().zip(words) {
                *id = ((u64::from(word) * self.vocab_size) >> 32) as i32;
            }
        }
        to.is_text(self.row_tokens);
        Ok(())
    }

    fn name(&self, _step: u64, n_rows: u64) -> String {
        format!("the {n_rows} random rows")
    }
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mid = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[mid] } else { f64::midpoint(sorted[mid - 1], sorted[mid]) }
}

/// Time by class of op over the measured steps, which took `step_s`.
fn profile(session: &crate::session::Session, step_s: &[f64]) -> BenchProfile {
    let train = session.train.as_ref().expect("a bench has a training plan");
    let times = train.executor.profile();
    let (n_steps, step_ms) = (step_s.len() as f64, 1e3 * step_s.iter().sum::<f64>());
    let step_ms = step_ms / n_steps;
    let mut classes = Vec::new();
    for class in TimeClass::ALL {
        let kinds = times.iter().filter(|t| t.class == class).map(|t| KindTime {
            op: t.op,
            runs_per_step: t.n_runs / step_s.len() as u64,
            ms_per_step: 1e3 * t.total.as_secs_f64() / n_steps,
            predicted_ms_per_step: 1e3 * train.predicted_s.get(t.op).copied().unwrap_or(0.0),
        });
        let ops: Vec<KindTime> = kinds.collect();
        let ms_per_step = ops.iter().map(|t| t.ms_per_step).sum::<f64>();
        if !ops.is_empty() {
            let share = ms_per_step / step_ms;
            classes.push(ClassTime { class: class.name(), ms_per_step, share, ops });
        }
    }
    let products = TimeClass::ALL.into_iter().filter(|c| c.is_product()).map(TimeClass::name);
    let products: Vec<&str> = products.collect();
    let inside = classes.iter().filter(|c| products.contains(&c.class)).map(|c| c.share);
    BenchProfile { outside_products_share: 1.0 - inside.sum::<f64>(), classes }
}

impl BenchProfile {
    /// A table for people: a line per class with its ops below it, and the sum that matters.
    pub fn table(&self) -> String {
        let mut table = String::new();
        let mut line = |text: String| {
            table.push_str(&text);
            table.push('\n');
        };
        for c in &self.classes {
            let share = 100.0 * c.share;
            line(format!("{:<26} {:>10.3} ms/step {share:>5.1} %", c.class, c.ms_per_step));
            for t in &c.ops {
                let runs = format!("{:>6} runs", t.runs_per_step);
                let predicted = format!("{:>10.3} predicted", t.predicted_ms_per_step);
                line(format!("  {:<24} {:>10.3} ms/step {runs} {predicted}", t.op, t.ms_per_step));
            }
        }
        let outside = 100.0 * self.outside_products_share;
        line(format!("outside GEMM and attention: {outside:.1} %"));
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_between_the_two_middle_ones() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn random_rows_are_the_same_every_time_and_below_the_vocabulary() {
        let mut rows = RandomRows { seed: 1, vocab_size: 97, row_tokens: 33 };
        let mut read = |step, row| {
            let mut to = Row { ids: vec![0; 64], supervised: vec![false; 64], lengths: Vec::new() };
            rows.read(step, 4, row, &mut to, &mut crate::Silent).unwrap();
            assert_eq!(to.lengths, [33]);
            to.ids
        };
        assert_eq!(read(1, 0), read(2, 0));
        assert_ne!(read(1, 0), read(1, 1));
        assert!(read(1, 0).iter().all(|&id| (0..97).contains(&id)));
    }
}

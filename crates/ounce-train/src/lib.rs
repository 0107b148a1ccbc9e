//! The training session: from a model directory, text and a budget to a trained model directory.
//!
//! A library: no globals, no exits, no signal handlers, nothing printed. What a run tells goes to an
//! [`Observer`], which may also ask it to stop. The flow, each verb a crate or a file:
//! build, differentiate, attach the optimizer, plan, check, resolve (from `compile`), then load,
//! step, evaluate, sample, save.
//!
//! Files, in reading order: [`error`], [`budget`] (bytes stated, free and used), `baseline` (the
//! declared size of the process), [`settings`], [`schedule`], [`report`] (what is told), `child` (a process that works
//! for this one), `model` (the directory that a run starts from), [`precision`] (who chooses it; the loss scale),
//! `tokenize`, `text_table`, `same_data`, `stream`, `worker` (the child's side of them) and `data`, `weights`, `batch`
//! (rows on the token axis), `graphs`, `together`, `planning`, `limits` (what a run may take),
//! `program`, `session`, `compile` (where all of it meets), `plan_record`, `output` (the directory in the making),
//! `checkpoint`, `step`, [`train_loop`], [`mod@evaluate`], [`mod@generate`], [`mod@bench`],
//! [`mod@init`], [`mod@export`], [`mod@doctor`],
//! [`mod@inspect`], [`watch`].
//!
//! ```
//! use ounce_train::{Memory, Settings};
//! let mut flags = serde_json::Map::new();
//! flags.insert("memory".to_owned(), "48MiB".into());
//! let settings = Settings::resolve(None, &flags)?;
//! assert_eq!(settings.memory, Memory::Bytes(48 << 20));
//! # Ok::<(), ounce_train::Error>(())
//! ```
#![forbid(unsafe_code)]

pub mod error;

pub mod budget;

mod baseline;

pub mod settings;

pub mod schedule;

pub mod report;

mod child;

mod model;

pub mod precision;

mod tokenize;

mod text_table;

mod same_data;

mod stream;

mod worker;

mod data;

mod weights;

mod batch;

mod graphs;

mod together;

mod planning;

mod limits;

mod program;

mod session;

mod compile;

mod plan_record;

mod output;

mod checkpoint;

mod step;

pub mod train_loop;

pub mod evaluate;

pub mod generate;

pub mod bench;

pub mod init;

pub mod export;

pub mod doctor;

pub mod inspect;

pub mod watch;

use std::path::PathBuf;
use std::sync::Arc;

use ounce_io::Disk;

pub use bench::{BenchProfile, BenchRecord, BenchSettings, ClassTime, KindTime, bench_step};
pub use budget::{Memory, format_bytes};
pub use doctor::{DiskRecord, DoctorRecord, ModelRecord, PeakRecord, doctor};
pub use error::{Error, ErrorClass, Result, message_and_hint};
pub use evaluate::evaluate;
pub use export::{ExportDtype, ExportFormat, ExportRecord, ExportSettings, export};
pub use generate::{GenerateRecord, GenerateSettings, generate};
pub use init::{InitRecord, InitSettings, ModelShape, init};
pub use inspect::{FileRecord, InspectRecord, InspectSettings, TokenRecord, inspect};
pub use ounce_models::Family;
pub use precision::{PrecisionRow, explain_precision, precision_table};
pub use report::{DoneRecord, EvalRecord, Observer, PhaseRecord, PlanRecord, Silent, StepRecord};
pub use settings::{
    BadRows, Columns, DataFile, OnNonfinite, Optimizer, Precision, Settings, WeightedFile,
    usual_name,
};
pub use train_loop::{plan, train};
pub use worker::answer_tokenize_request;

/// What the library may know of the process that it runs in.
#[derive(Debug, Clone)]
pub struct Environment {
    /// A program that hands `__tokenize` requests to [`answer_tokenize_request`]: the caller itself.
    pub worker: PathBuf,
    /// Folder for token files, measured costs, and what is taken out of GGUF files.
    pub cache_dir: PathBuf,
    /// The cache of models that Hugging Face's tools share.
    pub hub_dir: PathBuf,
    /// Through which checkpoints and models are written, so that a test can let it fail.
    pub disk: Arc<dyn Disk>,
}

impl Environment {
    /// With the disk of this machine, and a cache of models of our own.
    pub fn new(worker: PathBuf, cache_dir: PathBuf) -> Self {
        let hub_dir = cache_dir.join("hub");
        Self { worker, cache_dir, hub_dir, disk: ounce_io::real_disk() }
    }
}

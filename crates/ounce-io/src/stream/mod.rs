//! Training data that is never tokenized whole: a stream that is cut into windows, each shuffled within itself.
//!
//! What people know: Hugging Face's `datasets` with `streaming=True` reads rows in the order of the files and shuffles
//! them through a buffer of so many rows; the buffer's content is lost when a run is resumed, and the length of the
//! data is not known. Here the buffer is a **window**: as many consecutive rows (samples, or blocks of a text) as the
//! buffer would hold are tokenized into a small token cache. Its rows are taken in an order keyed by the seed and the
//! number of the window; then the next window takes its place. So a row moves as far as in such a buffer, and a run is
//! resumed in the middle of a window with the same bits.
//!
//! Which rows come next: every file is a source of its own; plain texts without weights are one source, in their order,
//! as in a token cache. The next row is read from the source that is the least far, counted in passes over it divided
//! by its weight, so that a weight counts passes per epoch whatever the files' lengths. An epoch is over when every
//! source has made its passes; a window is over when it is full or the epoch is. A text is cut into blocks, pass by
//! pass; what is left of a pass is not trained on.
//!
//! Invariants:
//! - A window is a function of the options, the files and its [`StreamPlace`]. Threads, budgets and clocks have no part
//!   in it (a chat template that writes the date takes that of the first window's place). Making the next window while
//!   this one is in use, making it later, or making it again after a kill is the same.
//! - The place of the window behind it is in a window's notes: for each source the byte (or Parquet row) at which a row
//!   or piece begins and how much of it went into the windows before. So any window is made without reading what came
//!   before it: O(1) of the data.
//! - With weights of one every epoch has the rows that a token cache has. Where an epoch of one source fits into a
//!   window, their order is the same, too.
//! - What was read is noticed when it changes: a file of another length is refused, and whoever resumes compares
//!   [`WindowNotes::ids_hash`].
//!
//! Memory: a batch of rows and their ids, 8 bytes per row of a window, a buffer per source. Disk: a window, see
//! [`window_disk_bytes`].
//!
//! Files in reading order: this one (options, places), `source.rs` (rows and pieces of one source), `write.rs` (a
//! window in the making), `window.rs` (a window in use).

mod source;
mod window;
mod write;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::dataset::{RowOptions, has_conversations};
use crate::disk::Disk;
use crate::error::IoError;
use crate::row_tokens::FileNotes;
use crate::temp::{TempDir, remove_stale_temps};
pub use window::StreamWindow;
pub use write::{StreamEncoder, write_window};

use source::SourcePlace;

/// Most sources: each has a file open and a buffer.
const MAX_SOURCES: usize = 64;
/// No run comes so far.
const MAX_WINDOWS: u64 = 1 << 48;
/// Bytes per row of a window beside its ids: its place, and its number where samples are packed.
const ROW_BYTES: u64 = 8 + 4 + 8;
/// Heads and notes of a window and its packs.
const NOTES_BYTES: u64 = 64 << 10;

/// What a stream is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamOptions {
    /// Files and their weights: passes per epoch.
    pub files: Vec<(PathBuf, f64)>,
    /// Ids per row, at most.
    pub max_length: usize,
    /// Samples or blocks of a window.
    pub window_rows: u64,
    /// Whether several samples share a row.
    pub packs: bool,
    /// Seed of the order.
    pub seed: u64,
    /// Goes on where the files have changed.
    pub insists: bool,
}

/// Where a window begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamPlace {
    /// Number of the window, from 0.
    pub window: u64,
    /// Epochs that are over.
    pub epoch: u64,
    /// What chat templates take for today, in seconds since 1970.
    pub now_s: u64,
    files: Vec<FileStamp>,
    sources: Vec<SourcePlace>,
}

/// A data file as it was when the run began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileStamp {
    n_bytes: u64,
    mtime_ns: u64,
}

/// What a window notes about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WindowNotes {
    /// Where it begins.
    pub place: StreamPlace,
    /// Where the next one does.
    pub next: StreamPlace,
    /// The epoch of its rows, from 0.
    pub epoch: u64,
    /// Hash of its rows, in their order.
    pub ids_hash: u64,
    /// What was counted in it, file by file; of texts nothing but broken rows.
    pub files: Vec<FileNotes>,
    /// What is said about template and tokenizer, and of files that have changed.
    pub remarks: Vec<String>,
}

/// Where a run stands in a stream: what a checkpoint keeps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamCursor {
    /// Rows of the run before the current window.
    pub first_row: u64,
    /// Rows of the current epoch before it.
    pub epoch_row: u64,
    /// What the window holds, see [`WindowNotes::ids_hash`].
    pub ids_hash: u64,
    /// Where it begins.
    pub place: StreamPlace,
}

impl StreamPlace {
    /// The start of the data.
    ///
    /// # Errors
    /// Files that are missing or of no known format; `Usage` for weights that leave nothing, or too many files.
    pub fn start(options: &StreamOptions, rows: &RowOptions, now_s: u64) -> Result<Self, IoError> {
        if options.files.iter().all(|(_, weight)| *weight == 0.0) {
            return Err(IoError::Usage {
                what: "the weights of the data files leave nothing to train on".into(),
                hint: "give at least one file a weight of 1".into(),
            });
        }
        let are_rows = has_conversations(&options.paths(), rows)?;
        let n_sources = options.groups(are_rows).len();
        if n_sources > MAX_SOURCES {
            return Err(IoError::Usage {
                what: format!("{n_sources} data files cannot be streamed side by side"),
                hint: format!("join them into at most {MAX_SOURCES}").into(),
            });
        }
        let files = options.files.iter().map(|(path, _)| FileStamp::of(path));
        let files = files.collect::<Result<_, _>>()?;
        let sources = vec![SourcePlace::start(are_rows); n_sources];
        Ok(Self { window: 0, epoch: 0, now_s, files, sources })
    }

    /// Whether rows are taken one by one, as conversations are.
    pub fn has_rows(&self) -> bool {
        self.sources.first().is_some_and(SourcePlace::is_row)
    }

    /// Compares the files with what they were: their stamps as they are now, and what is worth a line.
    fn check_files(
        &self,
        options: &StreamOptions,
    ) -> Result<(Vec<FileStamp>, Vec<String>), IoError> {
        if self.files.len() != options.files.len()
            || self.sources.len() != options.groups(self.has_rows()).len()
        {
            return Err(IoError::Usage {
                what: "the stream was begun with other data files".into(),
                hint: "give the files and weights that the run was begun with".into(),
            });
        }
        self.check_passes(options)?;
        let (mut stamps, mut remarks) = (Vec::new(), Vec::new());
        for ((path, _), then) in options.files.iter().zip(&self.files) {
            let now = FileStamp::of(path)?;
            let what = if now.n_bytes != then.n_bytes {
                format!(
                    "changed from {} to {} bytes since the run began",
                    then.n_bytes, now.n_bytes
                )
            } else if now.mtime_ns == then.mtime_ns {
                String::new()
            } else {
                "was written since the run began; it is as long as it was".to_owned()
            };
            if now.n_bytes != then.n_bytes && !options.insists {
                let hint = "a stream goes on where it was: leave its files as they are, begin a new run, or \
                            `--override` to resume with the file as it is now";
                return Err(IoError::bad_file(path, what, hint));
            }
            if !what.is_empty() {
                remarks.push(format!("warning: {} {what}", path.display()));
            }
            stamps.push(now);
        }
        Ok((stamps, remarks))
    }

    /// Refuses passes that no run can have made by this epoch.
    fn check_passes(&self, options: &StreamOptions) -> Result<(), IoError> {
        let groups = options.groups(self.has_rows());
        let is_possible = |(source, (files, weight)): (&SourcePlace, &(Vec<_>, f64))| {
            let most = (self.epoch as f64 + 1.0) * weight + 2.0;
            source.is_possible(files.len())
                && source.is_row() == self.has_rows()
                && source.pass as f64 <= most
        };
        let counts = self.window.max(self.epoch);
        if counts < MAX_WINDOWS && self.sources.iter().zip(&groups).all(is_possible) {
            return Ok(());
        }
        Err(IoError::Usage {
            what: format!("the place of window {} in the stream is impossible", self.window),
            hint: "resume from another checkpoint".into(),
        })
    }
}

impl FileStamp {
    fn of(path: &Path) -> Result<Self, IoError> {
        let metadata = fs::metadata(path).map_err(|e| IoError::reading(path, e))?;
        // Wraps for times before 1970: only equality matters.
        let mtime_ns = (metadata.mtime() as u64)
            .wrapping_mul(1_000_000_000)
            .wrapping_add(metadata.mtime_nsec() as u64);
        Ok(Self { n_bytes: metadata.len(), mtime_ns })
    }
}

impl StreamOptions {
    fn paths(&self) -> Vec<PathBuf> {
        self.files.iter().map(|(path, _)| path.clone()).collect()
    }

    /// The files of each source, and its weight.
    fn groups(&self, are_rows: bool) -> Vec<(Vec<PathBuf>, f64)> {
        if !are_rows && self.files.iter().all(|(_, weight)| *weight == 1.0) {
            return vec![(self.paths(), 1.0)];
        }
        self.files.iter().map(|(path, weight)| (vec![path.clone()], *weight)).collect()
    }
}

/// Most bytes that a window takes on disk, packs included.
pub fn window_disk_bytes(window_rows: u64, max_length: u64) -> u64 {
    window_rows.saturating_mul(4 * max_length + ROW_BYTES).saturating_add(NOTES_BYTES)
}

/// A folder for the windows of one run, removed at its end; those of killed runs go when the next one begins.
#[derive(Debug)]
pub struct StreamDir(TempDir);

impl StreamDir {
    /// Makes one within `dir`.
    ///
    /// # Errors
    /// `Write`.
    pub fn create(disk: Arc<dyn Disk>, dir: &Path) -> Result<Self, IoError> {
        const NAME: &str = "stream";
        fs::create_dir_all(dir).map_err(|e| IoError::writing(dir, 0, e))?;
        remove_stale_temps(&*disk, dir, |name| name == NAME);
        let made = TempDir::create(disk, dir, NAME);
        made.map(Self).map_err(|e| IoError::writing(dir, 0, e))
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.0.path
    }
}

//! Data that is tokenized as it is needed: windows of a stream, made by a child process beside the steps.
//!
//! The first window is made before planning. From the first row of a window on, a child makes the next
//! one, so that training waits only where it is faster than tokenizing. The child's memory is counted in
//! every plan (`baseline.rs`); a window lies in a folder that goes with the run, and loses its name when
//! it is opened.

use std::path::{Path, PathBuf};

use ounce_io::checkpoint::{Checkpoint, DataCursor};
use ounce_io::{
    FileNotes, RowTokens, StreamCursor, StreamDir, StreamEncoder, StreamOptions, StreamPlace,
    StreamWindow, Tokenizer, check_room, window_disk_bytes, write_window,
};
use serde::{Deserialize, Serialize};

use crate::batch::Row;
use crate::child::Working;
use crate::limits::{Limits, window_bytes};
use crate::model::Model;
use crate::same_data::{by_full_path, changed_data};
use crate::settings::DataFile;
use crate::tokenize::{self, RowRequest, file_lines, load_template, now_s};
use crate::{Environment, Error, Observer, Result, Settings};

/// The kind of the child's work.
pub(crate) const WORK: &str = "window";

/// The child's own stack, heap and libraries' data; its code is shared with this process.
const CHILD_BYTES: u64 = 4 << 20;

/// What a stream takes beside the steps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamWanted {
    /// Threads of the child that tokenizes.
    pub(crate) n_workers: usize,
    /// Most bytes that it holds for the window and for reading the files, whatever the tokenizer.
    pub(crate) window_bytes: u64,
    /// Most bytes of a window on disk.
    pub(crate) window_disk_bytes: u64,
}

impl StreamWanted {
    /// What the settings say, if they say anything.
    pub(crate) fn of(settings: &Settings, max_length: u64) -> Option<Self> {
        let n_workers = settings.dataloader_num_workers.unwrap_or(1) as usize;
        let window_bytes = window_bytes(settings);
        let window_disk_bytes = window_disk_bytes(settings.window_rows(), max_length);
        settings.streaming.then_some(Self { n_workers, window_bytes, window_disk_bytes })
    }
}

/// Most bytes of the child that tokenizes beside the steps.
pub(crate) fn streaming_bytes(tokenizer: &Path, stream: StreamWanted) -> u64 {
    CHILD_BYTES + stream.window_bytes + ounce_io::tokenizing_bytes(tokenizer, stream.n_workers)
}

/// A window that a child is asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct WindowRequest {
    tokenizer: PathBuf,
    rows: RowRequest,
    stream: StreamOptions,
    /// Where it begins; at the start of the data if not given.
    place: Option<StreamPlace>,
    path: PathBuf,
    n_workers: usize,
}

/// The child's work: one window.
pub(crate) fn make_window(request: &WindowRequest) -> Result<()> {
    let WindowRequest { stream, path, n_workers, .. } = request;
    let (options, n_workers) = (request.rows.options(), *n_workers);
    let tokenizer = Tokenizer::load(&request.tokenizer)?;
    let place = match &request.place {
        Some(place) => place.clone(),
        None => StreamPlace::start(stream, &options, now_s())?,
    };
    if !place.has_rows() {
        let encoder = StreamEncoder::Text { tokenizer: &tokenizer, options: &options, n_workers };
        return Ok(write_window(stream, &encoder, &place, path)?);
    }
    let template = load_template(&request.tokenizer, &tokenizer, place.now_s)?;
    let (tokenizer, template, options) = (&tokenizer, &template, &options);
    let max_length = stream.max_length;
    let rows = RowTokens { tokenizer, template, options, max_length, n_workers };
    Ok(write_window(stream, &StreamEncoder::Rows(rows), &place, path)?)
}

/// The rows of a stream, one after the other.
pub(crate) struct TrainStream {
    worker: PathBuf,
    request: WindowRequest,
    dir: StreamDir,
    window: StreamWindow,
    cursor: StreamCursor,
    /// Epochs and cursors of the windows that the step being read has passed: if it is never done, the run stands in
    /// the first of them.
    passed: Vec<(u64, StreamCursor)>,
    /// Makes the next window.
    next: Option<Working>,
    /// Rows of the whole run.
    n_rows: u64,
}

impl TrainStream {
    /// Makes the window that a run begins with, or that it was in when a checkpoint was saved.
    ///
    /// # Errors
    /// Data that is missing, wrong, or not what it was; no room for two windows.
    pub(crate) fn open(
        settings: &Settings,
        env: &Environment,
        model: &Model,
        limits: &Limits,
        from: Option<&Checkpoint>,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        let max_length = model.max_length(settings);
        let n_steps = settings.max_steps.ok_or_else(|| Error::Usage {
            message: "`--streaming` cannot count epochs: how many rows one has is not known"
                .to_owned(),
            hint: "give the length of the run as `--max-steps N`".to_owned(),
        })?;
        let dir = StreamDir::create(env.disk.clone(), &tokenize::cache_dir(env))?;
        let disk_bytes = 2 * window_disk_bytes(settings.window_rows(), max_length);
        check_room(&*env.disk, dir.path(), dir.path(), disk_bytes)?;
        let begun = from.and_then(|checkpoint| cursor_of(checkpoint, settings));
        if let (Some(_), None) = (from, &begun) {
            observer.note(
                "warning: the run began with other data or another number of rows per step: the stream starts over",
            );
        }
        let mut request = WindowRequest {
            tokenizer: model.dir.clone(),
            rows: RowRequest::of(settings, max_length).beside_the_steps(),
            stream: StreamOptions {
                files: settings.data.iter().map(file_and_weight).collect(),
                max_length: max_length as usize,
                window_rows: settings.window_rows(),
                packs: settings.packing,
                seed: settings.seed,
                insists: settings.override_begun,
            },
            place: begun.as_ref().map(|cursor| cursor.place.clone()),
            path: dir.path().join("window-0.bin"),
            // Nothing else runs yet.
            n_workers: tokenize::n_threads(&model.dir, limits),
        };
        Working::start(&env.worker, WORK, &request)?.finish::<()>(observer)?;
        let window = StreamWindow::open(&request.path, &request.stream)?;
        request.n_workers = StreamWanted::of(settings, max_length).map_or(1, |s| s.n_workers);
        let notes = window.notes();
        if let Some(cursor) = &begun {
            check_rows(cursor, notes.ids_hash, settings, observer)?;
        }
        let first_row = from.map_or(0, |c| c.state().step * settings.n_rows());
        let cursor = begun.unwrap_or_else(|| StreamCursor {
            first_row,
            epoch_row: 0,
            ids_hash: notes.ids_hash,
            place: notes.place.clone(),
        });
        let stream = Self {
            worker: env.worker.clone(),
            request,
            dir,
            window,
            cursor,
            passed: Vec::new(),
            next: None,
            n_rows: n_steps.saturating_mul(settings.n_rows()),
        };
        stream.say_first(observer);
        Ok(stream)
    }

    /// What is worth a line about the first window.
    fn say_first(&self, observer: &mut dyn Observer) {
        let Self { window, request, .. } = self;
        let (notes, most) = (window.notes(), request.stream.window_rows);
        let what = if notes.place.has_rows() { "samples" } else { "blocks" };
        observer.note(&format!(
            "data is streamed: shuffled in windows of {most} {what}; this one makes {} rows",
            window.n_rows()
        ));
        for remark in &notes.remarks {
            observer.note(remark);
        }
        for file in &notes.files {
            for line in window_lines(file, &request.stream) {
                observer.note(&line);
            }
        }
    }

    /// Begins a step: the rows before it are not asked for again.
    pub(crate) fn begin_step(&mut self) {
        self.passed.clear();
    }

    /// Row `number` of the run. The rows before its step are not asked for again.
    ///
    /// # Errors
    /// Data that is wrong or has changed; a request to stop while the next window is made.
    pub(crate) fn read(
        &mut self,
        number: u64,
        to: &mut Row,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        while number >= self.end() {
            self.advance(observer)?;
        }
        if self.next.is_none() && self.end() < self.n_rows {
            self.start_next()?;
        }
        let row = number - self.cursor.first_row;
        Ok(self.window.read(row, &mut to.ids, &mut to.supervised, &mut to.lengths)?)
    }

    /// The first row of the run that is not in the window.
    fn end(&self) -> u64 {
        self.cursor.first_row + self.window.n_rows()
    }

    fn start_next(&mut self) -> Result<()> {
        let place = self.window.notes().next.clone();
        self.request.path = self.dir.path().join(format!("window-{}.bin", place.window));
        self.request.place = Some(place);
        self.next = Some(Working::start(&self.worker, WORK, &self.request)?);
        Ok(())
    }

    /// Takes the next window in the place of this one.
    fn advance(&mut self, observer: &mut dyn Observer) -> Result<()> {
        if self.next.is_none() {
            self.start_next()?;
        }
        if let Some(child) = self.next.take() {
            child.finish::<()>(observer)?;
        }
        let window = StreamWindow::open(&self.request.path, &self.request.stream)?;
        let (before, notes) = (self.window.notes(), window.notes());
        let epoch_row = if notes.epoch > before.epoch {
            0
        } else {
            self.cursor.epoch_row + self.window.n_rows()
        };
        for remark in &notes.remarks {
            observer.note(remark);
        }
        for file in notes.files.iter().filter(|file| file.counts.n_bad > 0) {
            let (name, counts) = (file.path.display(), &file.counts);
            let first =
                counts.first_bad.as_deref().and_then(|fault| fault.split("\nhint: ").next());
            let first = first.map_or_else(String::new, |fault| format!(", the first: {fault}"));
            observer.note(&format!(
                "warning: {name}: {} broken rows were passed over in window {}{first}",
                counts.n_bad, notes.place.window
            ));
        }
        let cursor = StreamCursor {
            first_row: self.end(),
            epoch_row,
            ids_hash: notes.ids_hash,
            place: notes.place.clone(),
        };
        let passed = std::mem::replace(&mut self.cursor, cursor);
        self.passed.push((before.epoch, passed));
        self.window = window;
        Ok(())
    }

    /// Where the run stands after `n_rows` rows.
    pub(crate) fn cursor(&self, n_rows: u64) -> (DataCursor, StreamCursor) {
        let current = (self.window.notes().epoch, self.cursor.clone());
        let mut from_the_last = std::iter::once(&current).chain(self.passed.iter().rev());
        let holds_it = |(_, cursor): &&(u64, StreamCursor)| cursor.first_row <= n_rows;
        let (epoch, cursor) = from_the_last.find(holds_it).expect("its step began in a window");
        let row = cursor.epoch_row + n_rows - cursor.first_row;
        (DataCursor { epoch: *epoch, row }, cursor.clone())
    }

    /// Which rows these are, in words.
    pub(crate) fn name(&self, rows: std::ops::Range<u64>) -> String {
        let window = self.cursor.place.window;
        format!("rows {} to {} of the stream, up to its window {window}", rows.start, rows.end - 1)
    }
}

fn file_and_weight(file: &DataFile) -> (PathBuf, f64) {
    (file.path().to_path_buf(), file.weight())
}

/// The cursor of a checkpoint, if its run streamed the same data in steps of as many rows.
fn cursor_of(checkpoint: &Checkpoint, settings: &Settings) -> Option<StreamCursor> {
    let state = checkpoint.state();
    let is_same = state.settings.get("data") == by_full_path(settings).to_map().get("data");
    let size = |key: &str| state.settings.get(key).and_then(serde_json::Value::as_u64);
    let n_rows = size("per_device_train_batch_size")? * size("gradient_accumulation_steps")?;
    let begun = |cursor: &StreamCursor| {
        is_same && n_rows == settings.n_rows() && cursor.first_row <= state.step * n_rows
    };
    state.stream.clone().filter(begun)
}

/// Compares a window that was made again with what it was.
fn check_rows(
    cursor: &StreamCursor,
    ids_hash: u64,
    settings: &Settings,
    observer: &mut dyn Observer,
) -> Result<()> {
    if cursor.ids_hash == ids_hash {
        return Ok(());
    }
    let what = format!("window {} of the stream", cursor.place.window);
    let why = "the data, the tokenizer or the chat template has changed";
    changed_data(&what, why, settings, observer)
}

/// What is said of a file of the first window.
fn window_lines(file: &FileNotes, stream: &StreamOptions) -> Vec<String> {
    if file.format == "text" {
        let n = stream.files.len();
        let name = if n == 1 { String::new() } else { format!("{n} files from ") };
        let name = format!("{name}{}", file.path.display());
        let bad = format!("warning: {name}: {} broken rows were passed over", file.counts.n_bad);
        let bad = (file.counts.n_bad > 0).then_some(bad);
        return std::iter::once(format!("{name}: read as text")).chain(bad).collect();
    }
    let mut lines = file_lines(file, stream.max_length);
    lines[0].insert_str(0, "in the window, ");
    lines
}

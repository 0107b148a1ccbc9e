//! What a run tells, as JSON lines on stdout or as text for people on stderr.
//!
//! On a terminal the last line is a progress bar that each step redraws; elsewhere there are plain
//! lines: one at step 1, then one every `logging_steps`, or every few seconds if that is not given.

use std::io::{ErrorKind, IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ounce_train::{Error, EvalRecord, Observer, PlanRecord, Result, StepRecord, format_bytes};
use serde::Serialize;

/// Cells of the progress bar.
const BAR_CELLS: usize = 24;
/// Between two plain lines, if the user gave no interval.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Prints one JSON object as a line on stdout.
pub(crate) fn print_json(record: &impl Serialize) {
    let line = serde_json::to_string(record).expect("records have string keys");
    print_out(&format!("{line}\n"));
}

/// Why standard output could not be written, if it could not.
static OUTPUT_FAULT: OnceLock<String> = OnceLock::new();

/// Prints text on stdout.
pub(crate) fn print_out(text: &str) {
    let _ = print_while_read(text);
}

/// Prints text on stdout, and breaks off where nobody takes it. A closed pipe is no failure of ours; anything else is
/// told at the end.
pub(crate) fn print_while_read(text: &str) -> ControlFlow<()> {
    let mut out = std::io::stdout().lock();
    let Err(e) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) else {
        return ControlFlow::Continue(());
    };
    if e.kind() != ErrorKind::BrokenPipe {
        OUTPUT_FAULT.get_or_init(|| e.to_string());
    }
    ControlFlow::Break(())
}

/// Whether all that was printed on stdout arrived.
///
/// # Errors
/// [`Error::Files`] with the system's reason.
pub(crate) fn check_output() -> Result<()> {
    match OUTPUT_FAULT.get() {
        None => Ok(()),
        Some(fault) => Err(Error::Files {
            message: format!("cannot write standard output: {fault}"),
            hint: "what it is directed to has no room, or cannot be written; files are written all the same".to_owned(),
        }),
    }
}

/// Prints text on stderr.
pub(crate) fn print_err(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// The observer that prints.
pub(crate) struct Console {
    json: bool,
    bar: bool,
    logging_steps: Option<u64>,
    signal: Arc<AtomicUsize>,
    budget_bytes: u64,
    start: Option<Instant>,
    last_line: Option<Instant>,
    progress: Progress,
}

/// How fast a run goes.
#[derive(Debug, Default)]
struct Progress {
    n_steps: u64,
    /// Of this process: a run that goes on has more behind it.
    n_done: u64,
    /// Tokens and seconds of the steps since the last line.
    since: (f64, f64),
    /// Tokens per second up to the last line.
    rate: f64,
}

impl Progress {
    fn add(&mut self, r: &StepRecord) {
        self.n_done += 1;
        self.since.0 += r.tokens_per_s * r.step_s;
        self.since.1 += r.step_s;
    }

    /// Begins a new line: the rate becomes that of the steps since the last one.
    fn begin_line(&mut self) {
        self.rate = self.since.0 / self.since.1;
        self.since = (0.0, 0.0);
    }

    /// Seconds that the steps behind `step` take if they go on as those of this process did.
    fn left_s(&self, step: u64, elapsed_s: f64) -> f64 {
        elapsed_s / self.n_done.max(1) as f64 * self.n_steps.saturating_sub(step) as f64
    }
}

impl Console {
    /// Prints for a run whose stop signal is `signal`.
    pub(crate) fn new(json: bool, logging_steps: Option<u64>, signal: Arc<AtomicUsize>) -> Self {
        let bar = !json && std::io::stderr().is_terminal();
        Self {
            json,
            bar,
            logging_steps,
            signal,
            budget_bytes: 0,
            start: None,
            last_line: None,
            progress: Progress::default(),
        }
    }

    /// A line on stderr that does not disturb the bar.
    fn line(&self, text: &str) {
        let clear = if self.bar { "\r\x1b[K" } else { "" };
        print_err(&format!("{clear}{text}\n"));
    }

    fn is_due(&self, step: u64) -> bool {
        let first_or_last = self.progress.n_done == 1 || step == self.progress.n_steps;
        first_or_last
            || match self.logging_steps {
                Some(n) => step.is_multiple_of(n),
                None => self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY),
            }
    }

    fn text(&self, r: &StepRecord) -> String {
        let elapsed_s = self.start.map_or(0.0, |start| start.elapsed().as_secs_f64());
        let left_s = self.progress.left_s(r.step, elapsed_s);
        let scale = match (r.loss_scale, r.skipped) {
            (Some(scale), true) => format!("  scale {scale:?} (skipped)"),
            (Some(scale), false) => format!("  scale {scale:?}"),
            (None, true) => "  (skipped)".to_owned(),
            (None, false) => String::new(),
        };
        format!(
            "step {}/{}  loss {:.4}{scale}  {} tok/s  ETA {}  peak {}/{}",
            r.step,
            self.progress.n_steps,
            r.loss,
            thousands(self.progress.rate),
            duration(left_s),
            format_bytes(r.rss_peak_bytes),
            format_bytes(self.budget_bytes),
        )
    }
}

impl Observer for Console {
    fn note(&mut self, text: &str) {
        self.line(text);
    }

    fn planned(&mut self, plan: &PlanRecord, n_steps: u64) {
        self.progress.n_steps = n_steps;
        self.budget_bytes = plan.budget_bytes;
        self.line(plan.table.trim_end());
        plan.warnings.iter().for_each(|warning| self.line(warning));
    }

    fn step(&mut self, r: &StepRecord) {
        let start = Duration::from_secs_f64(r.step_s);
        self.start
            .get_or_insert_with(|| Instant::now().checked_sub(start).unwrap_or_else(Instant::now));
        if self.json {
            print_json(r);
            return;
        }
        self.progress.add(r);
        if self.is_due(r.step) {
            self.last_line = Some(Instant::now());
            self.progress.begin_line();
            if !self.bar || self.logging_steps.is_some() {
                self.line(&self.text(r));
            }
        }
        if self.bar {
            let n_full = (r.step as usize * BAR_CELLS) / self.progress.n_steps.max(1) as usize;
            let bar = "=".repeat(n_full) + &" ".repeat(BAR_CELLS - n_full);
            let end = if r.step == self.progress.n_steps { "\n" } else { "" };
            print_err(&format!("\r\x1b[K[{bar}] {}{end}", self.text(r)));
        }
    }

    fn evaluated(&mut self, step: u64, r: &EvalRecord) {
        self.line(&format!(
            "step {step}  eval loss {:.4}  perplexity {:.2}  over {} predictions",
            r.loss, r.perplexity, r.tokens
        ));
    }

    fn sample(&mut self, step: u64, text: &str) {
        self.line(&format!("--- sample after step {step}\n{}\n---", text.trim_matches('\n')));
    }

    fn stop_requested(&self) -> bool {
        self.signal.load(Ordering::Relaxed) != 0
    }
}

/// `1842.3` as `1,842`.
fn thousands(x: f64) -> String {
    let digits = format!("{x:.0}");
    let mut text = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(c);
    }
    text
}

/// Seconds as `1:02:03` or `2:03`.
fn duration(s: f64) -> String {
    let s = s.round() as u64;
    match s / 3600 {
        0 => format!("{}:{:02}", s / 60, s % 60),
        h => format!("{h}:{:02}:{:02}", s / 60 % 60, s % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, tokens_per_s: f64, step_s: f64) -> StepRecord {
        StepRecord {
            step,
            loss: 1.0,
            learning_rate: 0.0,
            grad_norm: 1.0,
            tokens: (tokens_per_s * step_s) as u64,
            step_s,
            tokens_per_s,
            rss_peak_bytes: 0,
            loss_scale: None,
            skipped: false,
        }
    }

    #[test]
    fn a_line_tells_the_mean_rate_of_the_steps_since_the_last_one() {
        let mut progress = Progress { n_steps: 4, ..Progress::default() };
        progress.add(&step(1, 10.0, 1.0));
        progress.begin_line();
        // 300 tokens in 2 s, then 100 in 2 s.
        progress.add(&step(2, 150.0, 2.0));
        progress.add(&step(3, 50.0, 2.0));
        progress.begin_line();
        assert!((progress.rate - 100.0).abs() < 1e-9, "{progress:?}");
    }

    #[test]
    fn what_is_left_is_told_from_the_steps_of_this_process() {
        let mut progress = Progress { n_steps: 1100, ..Progress::default() };
        progress.add(&step(1001, 1.0, 3.0));
        assert!((progress.left_s(1001, 3.0) - 297.0).abs() < 1e-9, "a run that went on at 1000");
        assert!(progress.left_s(1100, 300.0).abs() < 1e-9);
    }

    #[test]
    fn numbers_are_grouped_and_times_are_clocks() {
        assert_eq!(thousands(999.4), "999");
        assert_eq!(thousands(1842.3), "1,842");
        assert_eq!(thousands(1234567.0), "1,234,567");
        assert_eq!(duration(59.6), "1:00");
        assert_eq!(duration(3723.0), "1:02:03");
    }
}

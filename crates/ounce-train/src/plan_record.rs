//! The plans of a session in numbers and words: what is printed before step 1.

use crate::budget::format_bytes;
use crate::program::Program;
use crate::session::Session;
use crate::{PhaseRecord, PlanRecord};

impl Session {
    /// The plans in numbers; the table is the training plan's, or that of the only one.
    pub(crate) fn record(&self) -> PlanRecord {
        let main = self.main();
        let (c, choice) = (&main.certificate, &main.choice);
        PlanRecord {
            budget_bytes: self.budget_bytes,
            peak_bytes: self.peak_bytes,
            step_peak_bytes: c.peak_bytes,
            arena_bytes: self.arena_bytes,
            baseline_bytes: self.baseline.bytes(),
            max_load_bytes: c.max_load_bytes,
            step_s: c.step_s,
            step_bound_s: c.step_bound_s,
            unconstrained_step_s: c.unconstrained_step_s,
            n_params: main.graph.n_params_elems(),
            rows: main.shape.n_rows,
            max_length: main.shape.row_tokens,
            micro_batches: choice.n_micro_batches,
            loop_order: choice.loop_order.to_string(),
            head_chunk_tokens: choice.head_chunk_tokens,
            release_gradients: choice.release_gradients,
            kept_values: choice.n_kept,
            recomputed_ops: choice.n_recomputed,
            streaming_bytes: self.baseline.streaming_bytes(),
            table: [main.table.trim_end(), &phases_line(&self.phases()), &self.data_line()]
                .join("\n"),
            phases: self.phases(),
            warnings: self.warnings.clone(),
        }
    }

    /// What the data takes beside and before the steps, for people; of a run that trains.
    fn data_line(&self) -> String {
        let Some(stream) = self.stream else {
            return match &self.train {
                Some(_) if self.tokenizes => {
                    "data: tokenized to disk before step 1, then read row by row".to_owned()
                }
                _ => String::new(),
            };
        };
        format!(
            "data: streamed; {} of every phase are for the child process that tokenizes beside the steps; two \
             windows on disk of at most {} each",
            format_bytes(self.baseline.streaming_bytes()),
            format_bytes(stream.window_disk_bytes)
        )
    }

    /// What timing kernels took, if they were timed, which is once on a machine.
    fn timed_peak_bytes(&self) -> Option<u64> {
        (self.touched_bytes > 0).then(|| self.baseline.bytes() + self.touched_bytes)
    }

    /// Peak of the process over all plans, and over timing kernels before them.
    pub(crate) fn whole_peak_bytes(&self) -> u64 {
        self.peak_bytes.max(self.timed_peak_bytes().unwrap_or(0))
    }

    /// What each phase takes. Saving streams from where training has left the tensors: nothing is added.
    fn phases(&self) -> Vec<PhaseRecord> {
        // The tables of all plans are there all the time.
        let peak = |p: &Program| p.certificate.peak_bytes - p.tables_bytes + self.tables_bytes;
        let timed = self.timed_peak_bytes();
        let loaded = self.baseline.bytes() + self.main().stored_bytes;
        [
            ("tokenize", self.tokenizes.then(|| self.baseline.tokenizing_peak_bytes())),
            ("time kernels", timed),
            ("load", Some(loaded)),
            ("train", self.train.as_ref().map(peak)),
            ("evaluate", self.eval.as_ref().map(peak)),
            ("sample", self.sample.as_ref().map(peak)),
            ("save", self.train.as_ref().map(peak)),
        ]
        .into_iter()
        .filter_map(|(phase, bytes)| Some(PhaseRecord { phase, peak_bytes: bytes? }))
        .collect()
    }
}

/// The phases for people.
fn phases_line(phases: &[PhaseRecord]) -> String {
    let one = |p: &PhaseRecord| format!("{} {}", p.phase, format_bytes(p.peak_bytes));
    let all: Vec<String> = phases.iter().map(one).collect();
    format!("peak of the whole process in each phase: {}", all.join(", "))
}

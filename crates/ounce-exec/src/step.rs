//! The executor: runs a resolved plan's tasks in order.
//!
//! Invariants: a run allocates nothing and starts no threads; everything was looked up and checked
//! by [`Executor::new`]. Complexity: one pass over the tasks.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Instant;

use ounce_ir::{Graph, OpId, OpKind, ValueId};
use ounce_kernels::attention::RowSpan;
use ounce_kernels::elementwise;
use ounce_kernels::optim::any_nonfinite;
use ounce_kernels::pool::Pool;
use ounce_kernels::view::ViewMut;
use ounce_program::{GRANULE_TOKENS, Plan};

use crate::arena::Operands;
use crate::dispatch::{Context, dispatch};
use crate::gate::Gates;
use crate::inputs::StepInputs;
use crate::profile::Profile;
use crate::resolve::{Resolved, Task, resolve};
use crate::scratch::scratch_bytes;
use crate::spec::Extent;
use crate::{Arena, Buffers, ExecError, NonFinite, OpTime};

/// A plan, ready to run on a pool of threads.
pub struct Executor {
    resolved: Resolved,
    gates: Gates,
    pool: Arc<Pool>,
    /// Rows of one task, counted from its first token; capacity for the most that can be.
    rows: RefCell<Vec<RowSpan>>,
    profile: Option<Profile>,
}

impl std::fmt::Debug for Executor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Executor")
            .field("n_tasks", &self.resolved.tasks.len())
            .field("n_threads", &self.pool.n_threads())
            .finish_non_exhaustive()
    }
}

impl Executor {
    /// Resolves `plan`, which need not be kept.
    ///
    /// # Errors
    /// [`ExecError`] if the pool is not the plan's, or an instruction cannot be executed as it is.
    pub fn new(graph: &Graph, plan: &Plan, pool: Arc<Pool>) -> Result<Self, ExecError> {
        let resolved = resolve(graph, plan, pool.n_threads())?;
        let n_rows_max = resolved.n_tokens / GRANULE_TOKENS;
        let rows = RefCell::new(Vec::with_capacity(n_rows_max as usize));
        let gates = Gates::of(graph, &resolved);
        Ok(Self { resolved, gates, pool, rows, profile: None })
    }

    /// Measures the time of every op from now on, from zero.
    pub fn start_profile(&mut self) {
        self.profile = Some(Profile::new(self.resolved.ops.len()));
    }

    /// Time per kind of op since [`Executor::start_profile`], the longest first.
    pub fn profile(&self) -> Vec<OpTime> {
        self.profile.as_ref().map_or_else(Vec::new, |p| p.report(&self.resolved.ops))
    }

    /// Bytes of arena that a run needs.
    pub fn arena_bytes(&self) -> u64 {
        self.resolved.arena_bytes
    }

    /// The resident buffers of the plan in `arena`.
    ///
    /// # Panics
    /// If the arena is smaller than the plan's.
    pub fn buffers<'a>(&'a self, arena: &'a mut Arena) -> Buffers<'a> {
        self.assert_fits(arena);
        Buffers { arena, resolved: &self.resolved }
    }

    /// Runs one step.
    ///
    /// # Errors
    /// [`NonFinite`] if the losses, or in graphs that clip the gradient's norm, are not finite. No
    /// parameter and no state has been touched then.
    ///
    /// # Panics
    /// If the arena is smaller than the plan's, if rows overlap or cross a cut of the token axis, or
    /// if a token id or target is not below the vocabulary's size.
    pub fn run(&self, arena: &mut Arena, inputs: &StepInputs<'_>) -> Result<(), NonFinite> {
        self.assert_fits(arena);
        assert_rows(inputs.rows, self.resolved.n_tokens);
        let mut rows = self.rows.borrow_mut();
        for (i, &task) in self.resolved.tasks.iter().enumerate() {
            self.gates.check(arena, i)?;
            let start = self.profile.is_some().then(Instant::now);
            let op = self.run_task(arena, inputs, &mut rows, task);
            if let (Some(profile), Some(start)) = (&self.profile, start) {
                profile.add(op, start.elapsed());
            }
        }
        Ok(())
    }

    /// After a step that was not finite: the first op of the graph, in the graph's order, that wrote
    /// an infinite number or a NaN to an activation, a gradient or a sum, and that value.
    ///
    /// Runs the step once more, up to but without its updates, so data, parameters and `inputs` must
    /// still be those of the step. The answer does not depend on the plan: whatever the plan's order,
    /// the lowest op counts. A step whose losses alone are not finite has none.
    ///
    /// # Panics
    /// As [`Executor::run`].
    pub fn first_overflow(
        &self,
        arena: &mut Arena,
        inputs: &StepInputs<'_>,
    ) -> Option<(OpId, ValueId)> {
        self.assert_fits(arena);
        let mut rows = self.rows.borrow_mut();
        let mut first: Option<(OpId, ValueId)> = None;
        for &task in &self.resolved.tasks {
            let updates = |op: u32| self.resolved.ops[op as usize].is_update();
            if matches!(task, Task::Run { op, .. } if updates(op)) {
                continue;
            }
            let Some(op) = self.run_task(arena, inputs, &mut rows, task).map(OpId) else {
                continue;
            };
            if first.is_none_or(|(lowest, _)| op < lowest) {
                first = self.overflowed(arena, task).map(|v| (op, v)).or(first);
            }
        }
        first
    }

    /// The first value a task has just written that holds an infinite number or a NaN.
    fn overflowed(&self, arena: &mut Arena, task: Task) -> Option<ValueId> {
        let Task::Run { op, n_tokens, offsets, .. } = task else { return None };
        let spec = &self.resolved.ops[op as usize];
        let extent = Extent { n_tokens: u64::from(n_tokens), n_selected: self.resolved.n_selected };
        let offsets = &self.resolved.offsets[offsets as usize..];
        for (i, &value) in spec.written.iter().enumerate() {
            let may_overflow = i < spec.n_sums || spec.kind.may_round(i - spec.n_sums);
            let operand = spec.n_reads() + i;
            if may_overflow {
                let written = arena.view(offsets[operand], &spec.operands[operand], extent);
                if any_nonfinite(&self.pool, written) {
                    return Some(value);
                }
            }
        }
        None
    }

    /// Runs one task and returns its op.
    fn run_task(
        &self,
        arena: &mut Arena,
        inputs: &StepInputs<'_>,
        rows: &mut Vec<RowSpan>,
        task: Task,
    ) -> Option<u32> {
        let resolved = &self.resolved;
        match task {
            Task::Zero { at, n_elems } => {
                elementwise::zero(&self.pool, ViewMut::F32(arena.slice_mut(at, n_elems)));
                None
            }
            Task::Run { op, first_token, n_tokens, offsets } => {
                let spec = &resolved.ops[op as usize];
                let extent =
                    Extent { n_tokens: u64::from(n_tokens), n_selected: resolved.n_selected };
                let scratch = scratch_bytes(spec, extent.n_tokens, self.pool.n_threads());
                let n_operands = spec.operands.len() + usize::from(scratch > 0);
                let offsets = &resolved.offsets[offsets as usize..][..n_operands];
                if matches!(spec.kind, OpKind::Attention(_) | OpKind::AttentionGrad(_)) {
                    rows_within(rows, inputs.rows, first_token as usize, n_tokens as usize);
                }
                let cx = Context {
                    pool: &self.pool,
                    rope_tables: &resolved.rope_tables,
                    inputs,
                    first_token,
                    n_tokens,
                    rows,
                };
                dispatch(spec, Operands::new(arena, spec, offsets, extent, scratch), &cx);
                Some(op)
            }
        }
    }

    fn assert_fits(&self, arena: &Arena) {
        let (have, need) = (arena.bytes(), self.resolved.arena_bytes);
        assert!(have >= need, "the arena has {have} bytes, the plan needs {need}");
    }
}

/// Rows ascend, do not overlap, and lie on the axis.
fn assert_rows(rows: &[RowSpan], n_tokens: u64) {
    let mut end = 0;
    for row in rows {
        assert!(row.start >= end, "row at token {} starts before token {end}", row.start);
        end = row.start + row.len;
    }
    assert!(end as u64 <= n_tokens, "rows end at token {end} of {n_tokens}");
}

/// Fills `dst` with the rows within `n_tokens` tokens from `first_token` on, counted from there.
fn rows_within(dst: &mut Vec<RowSpan>, rows: &[RowSpan], first_token: usize, n_tokens: usize) {
    dst.clear();
    let end = first_token + n_tokens;
    let first = rows.partition_point(|row| row.start + row.len <= first_token);
    for row in rows[first..].iter().take_while(|row| row.start < end) {
        let whole = row.start >= first_token && row.start + row.len <= end;
        assert!(whole, "row {row:?} lies within tokens {first_token}..{end}");
        dst.push(RowSpan { start: row.start - first_token, len: row.len });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: usize, len: usize) -> RowSpan {
        RowSpan { start, len }
    }

    #[test]
    fn a_task_sees_its_own_rows_counted_from_its_first_token() {
        let rows = [span(0, 10), span(64, 64), span(128, 1), span(192, 3)];
        let mut dst = Vec::new();
        rows_within(&mut dst, &rows, 64, 128);
        assert_eq!(dst, [span(0, 64), span(64, 1)]);
        rows_within(&mut dst, &rows, 192, 64);
        assert_eq!(dst, [span(0, 3)]);
        rows_within(&mut dst, &rows, 256, 64);
        assert_eq!(dst, []);
    }

    #[test]
    #[should_panic(expected = "lies within tokens")]
    fn a_row_across_a_cut_is_refused() {
        rows_within(&mut Vec::new(), &[span(0, 65)], 0, 64);
    }

    #[test]
    #[should_panic(expected = "starts before token")]
    fn overlapping_rows_are_refused() {
        assert_rows(&[span(0, 65), span(64, 1)], 128);
    }
}

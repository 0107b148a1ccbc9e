//! Plan and graph to tasks: everything that can be looked up before the first step.
//!
//! Idea: a task is 24 bytes and four per operand, because a step has thousands. Sizes are not in it:
//! they follow from the op (one table entry per op of the graph) and the number of tokens. Offsets
//! are in units of 64 bytes, which is what plans align to.
//!
//! Invariants: every operand of every task was checked once, with the code that checks it again
//! whenever the task runs: right sizes, within the arena, no illegal overlap.
//!
//! Complexity: O(instructions x operands).

use std::ops::Range;

use ounce_ir::{DType, EntityId, Graph, MASTER_LO, OpId, ParamId, RopeTable, Table, ValueId};
use ounce_program::{BufferId, BufferRef, BufferRole, Instr, Plan, Tier};

use crate::ExecError;
use crate::arena::{UNIT_BYTES, check_operands};
use crate::scratch::scratch_bytes;
use crate::spec::{Extent, OpSpec};

/// One instruction, resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Task {
    /// Runs an op.
    Run {
        /// Index into [`Resolved::ops`].
        op: u32,
        /// First token on the step's axis.
        first_token: u32,
        n_tokens: u32,
        /// First of its entries in [`Resolved::offsets`].
        offsets: u32,
    },
    /// Zeros a sum.
    Zero {
        /// In units of 64 bytes.
        at: u32,
        n_elems: u64,
    },
}

/// Where the session finds a resident buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// In units of 64 bytes.
    pub(crate) at: u32,
    pub(crate) n_elems: u64,
    pub(crate) dtype: DType,
}

/// A plan that needs its graph no more.
#[derive(Debug)]
pub(crate) struct Resolved {
    pub(crate) tasks: Vec<Task>,
    pub(crate) offsets: Vec<u32>,
    /// One entry per op of the graph.
    pub(crate) ops: Vec<OpSpec>,
    pub(crate) rope_tables: Vec<RopeTable>,
    pub(crate) params: Vec<Option<Place>>,
    /// State `k` of parameter `p` at `p * n_states + k`.
    pub(crate) states: Vec<Option<Place>>,
    pub(crate) n_states: usize,
    /// The state that completes bf16 parameters to their masters.
    pub(crate) master_lo: Option<u32>,
    pub(crate) session: Vec<Option<Place>>,
    pub(crate) arena_bytes: u64,
    pub(crate) n_tokens: u64,
    pub(crate) n_selected: u64,
}

/// Resolves a plan for a pool of `n_threads` threads.
pub(crate) fn resolve(graph: &Graph, plan: &Plan, n_threads: usize) -> Result<Resolved, ExecError> {
    if plan.n_threads as usize != n_threads {
        return Err(ExecError::Threads { plan: plan.n_threads, pool: n_threads });
    }
    let n_tokens = plan.shape.n_tokens();
    if n_tokens > u64::from(u32::MAX) {
        return Err(ExecError::TooManyTokens { n_tokens });
    }
    let mut resolved = Resolved {
        tasks: Vec::with_capacity(plan.instrs.len()),
        offsets: Vec::with_capacity(plan.instrs.iter().map(n_operands).sum()),
        ops: graph.ops.values().map(|op| OpSpec::new(graph, op)).collect(),
        rope_tables: graph.rope_tables.values().cloned().collect(),
        params: vec![None; graph.params.len()],
        states: vec![None; graph.params.len() * graph.states.len()],
        n_states: graph.states.len(),
        master_lo: (0..).zip(&graph.states).find(|(_, s)| s.name == MASTER_LO).map(|(k, _)| k),
        session: vec![None; graph.values.len()],
        arena_bytes: plan.arena_bytes,
        n_tokens,
        n_selected: plan.shape.n_selected,
    };
    resolve_buffers(graph, plan, &mut resolved)?;
    for (i, instr) in plan.instrs.iter().enumerate() {
        resolve_instr(graph, plan, n_threads, i, instr, &mut resolved)?;
    }
    Ok(resolved)
}

fn n_operands(instr: &Instr) -> usize {
    match instr {
        Instr::Run { operands, .. } => operands.len(),
        Instr::Zero { .. } | Instr::Copy { .. } | Instr::Wait { .. } => 0,
    }
}

/// Checks where buffers lie and notes the places of those that the session sees.
fn resolve_buffers(graph: &Graph, plan: &Plan, resolved: &mut Resolved) -> Result<(), ExecError> {
    for (id, buffer) in plan.buffers.iter() {
        let fail = |what: String| Err(ExecError::Buffer { buffer: id.0, what });
        if buffer.tier != Tier::Host {
            return fail(format!(
                "lies on tier {:?}, this executor has the host only",
                buffer.tier
            ));
        }
        let end = buffer.offset.checked_add(buffer.bytes);
        if !buffer.offset.is_multiple_of(UNIT_BYTES) || end.is_none_or(|end| end > plan.arena_bytes)
        {
            return fail(format!(
                "{} bytes at {} are not aligned to 64 within {} bytes",
                buffer.bytes, buffer.offset, plan.arena_bytes
            ));
        }
        let (slot, n_elems, dtype) = match buffer.role {
            BufferRole::Param(p) => {
                let param = &graph.params[p];
                (&mut resolved.params[p.index()], param.shape.row_elems(), param.dtype)
            }
            BufferRole::State(p, k) => {
                let index = p.index() * resolved.n_states + k as usize;
                let dtype = graph.states[k as usize].dtype;
                (&mut resolved.states[index], graph.params[p].shape.row_elems(), dtype)
            }
            BufferRole::Session(v) => {
                let value = &graph.values[v];
                let n_rows = match value.shape.lead {
                    ounce_ir::Lead::Selected => resolved.n_selected,
                    ounce_ir::Lead::Fixed | ounce_ir::Lead::Tokens => resolved.n_tokens,
                };
                (&mut resolved.session[v.index()], value.shape.elems(n_rows), value.dtype)
            }
            BufferRole::Sum(_) | BufferRole::Value(_) | BufferRole::Scratch(_) => continue,
        };
        if dtype.bytes(n_elems) > buffer.bytes {
            let need = dtype.bytes(n_elems);
            return fail(format!("{:?} needs {need} bytes, has {}", buffer.role, buffer.bytes));
        }
        *slot = Some(Place { at: unit(buffer.offset), n_elems, dtype });
    }
    Ok(())
}

/// Appends the task of one instruction.
fn resolve_instr(
    graph: &Graph,
    plan: &Plan,
    n_threads: usize,
    index: usize,
    instr: &Instr,
    resolved: &mut Resolved,
) -> Result<(), ExecError> {
    match instr {
        Instr::Run { op, tokens, operands } => {
            let name = graph.ops[*op].kind.name();
            let wrong = |what| ExecError::Operand { instr: index, op: name, what };
            if tokens.start > tokens.end || tokens.end > resolved.n_tokens {
                return Err(wrong(format!("tokens {tokens:?} of {}", resolved.n_tokens)));
            }
            let task = resolve_run(&plan.buffers, n_threads, *op, tokens, operands, resolved);
            resolved.tasks.push(task.map_err(wrong)?);
        }
        Instr::Zero { value, dst } => {
            let wrong = |what| ExecError::Operand { instr: index, op: "zero", what };
            let at = locate(&plan.buffers, dst).map_err(wrong)?;
            let value = &graph.values[*value];
            let need = value.bytes(resolved.n_tokens);
            if dst.bytes < need || value.dtype != DType::F32 {
                return Err(wrong(format!("{} needs {need} bytes, has {}", value.name, dst.bytes)));
            }
            resolved.tasks.push(Task::Zero { at, n_elems: need / 4 });
        }
        Instr::Copy { .. } | Instr::Wait { .. } => {
            return Err(ExecError::Transfer { instr: index });
        }
    }
    Ok(())
}

/// The task of a run, or what is wrong with its operands.
fn resolve_run(
    buffers: &Table<BufferId, ounce_program::Buffer>,
    n_threads: usize,
    op: OpId,
    tokens: &Range<u64>,
    operands: &[BufferRef],
    resolved: &mut Resolved,
) -> Result<Task, String> {
    let spec = &resolved.ops[op.index()];
    let n_tokens = tokens.end - tokens.start;
    let extent = Extent { n_tokens, n_selected: resolved.n_selected };
    let scratch = scratch_bytes(spec, n_tokens, n_threads);
    let start = resolved.offsets.len();
    for (i, operand) in operands.iter().enumerate() {
        let need = spec.operands.get(i).map_or(scratch, |o| o.bytes(extent));
        if operand.bytes < need || operand.bytes > need.next_multiple_of(UNIT_BYTES) {
            return Err(format!("operand {i} has {} bytes, needs {need}", operand.bytes));
        }
        resolved.offsets.push(locate(buffers, operand)?);
    }
    check_operands(spec, &resolved.offsets[start..], extent, scratch, resolved.arena_bytes)?;
    let n_written = operands.len() - spec.n_reads();
    assert!(n_written <= 64, "an op writes at most 64 operands");
    Ok(Task::Run {
        op: op.0,
        first_token: tokens.start as u32,
        n_tokens: n_tokens as u32,
        offsets: u32::try_from(start).map_err(|_| "has an index above 2^32".to_owned())?,
    })
}

/// The offset of an operand in units of 64 bytes.
fn locate(
    buffers: &Table<BufferId, ounce_program::Buffer>,
    operand: &BufferRef,
) -> Result<u32, String> {
    let buffer = buffers.get(operand.buffer).ok_or_else(|| format!("no {}", operand.buffer))?;
    let end = operand.at.checked_add(operand.bytes);
    if !operand.at.is_multiple_of(UNIT_BYTES) || end.is_none_or(|end| end > buffer.bytes) {
        return Err(format!("{operand} is not aligned to 64 within {} bytes", buffer.bytes));
    }
    Ok(unit(buffer.offset + operand.at))
}

/// The most bytes of an arena that offsets of 32 bits, in units of 64 bytes, reach.
pub const MAX_ARENA_BYTES: u64 = (1 << 32) * UNIT_BYTES;

/// Bytes in units of 64.
fn unit(bytes: u64) -> u32 {
    u32::try_from(bytes / UNIT_BYTES).expect("the arena is at most MAX_ARENA_BYTES")
}

impl Resolved {
    /// Where a parameter lies.
    pub(crate) fn param(&self, p: ParamId) -> Option<Place> {
        self.params.get(p.index()).copied().flatten()
    }

    /// Where state `k` of a parameter lies.
    pub(crate) fn state(&self, p: ParamId, k: u32) -> Option<Place> {
        let k = k as usize;
        let index = (k < self.n_states).then(|| p.index() * self.n_states + k)?;
        self.states.get(index).copied().flatten()
    }

    /// Where a value lies that the session reads or writes.
    pub(crate) fn session(&self, v: ValueId) -> Option<Place> {
        self.session.get(v.index()).copied().flatten()
    }
}

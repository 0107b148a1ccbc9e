//! What an op demands of its operands: which bytes of what, in which order, read or written.
//!
//! The order is the one of ounce-ir's op table: inputs, uses, sums, outputs, then the updated
//! parameter and its states. Scratch comes last and is the machine's to say. Operands with a token
//! lead cover exactly the tokens of the run; all others are whole.

use std::ops::Range;

use ounce_ir::{Graph, Lead, Op, ParamId, ValueId, ValueKind};
use ounce_program::StepShape;

/// What an operand is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// A value that is written, never added to; the rows of an embedding's gradient among them.
    Value(ValueId),
    /// A sum that starts at zero and is added to.
    Sum(ValueId),
    /// A parameter.
    Param(ParamId),
    /// The n-th optimizer state of a parameter.
    State(ParamId, u32),
    /// Working memory of the kernel.
    Scratch,
}

/// What the op does with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Reads all of it.
    Read,
    /// Overwrites all of it without reading.
    Write,
    /// Reads all of it and overwrites it.
    Update,
}

/// One operand that a run must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Operand {
    /// What it is.
    pub(crate) what: What,
    /// What happens to it.
    pub(crate) access: Access,
    /// Its first byte, counted from the start of the whole value.
    pub(crate) first_byte: u64,
    /// Its length in bytes.
    pub(crate) bytes: u64,
}

/// Whether `v` is a sum that starts at zero; the rows of an embedding's gradient are not.
pub(crate) fn is_dense_sum(graph: &Graph, v: ValueId) -> bool {
    let value = &graph.values[v];
    matches!(value.kind, ValueKind::Sum(_)) && value.shape.lead == Lead::Fixed
}

/// Whether `op` reads or writes rows of selected tokens, which are never cut.
pub(crate) fn has_selected_rows(graph: &Graph, op: &Op) -> bool {
    op.inputs.iter().chain(&op.outputs).any(|&v| graph.values[v].shape.lead == Lead::Selected)
}

/// Bytes of the `k`-th optimizer state of `p`.
pub(crate) fn state_bytes(graph: &Graph, p: ParamId, k: u32) -> u64 {
    graph.params[p].shape.bytes(graph.states[k as usize].dtype, 0)
}

/// Bytes of all of `v` in a step of that shape.
pub(crate) fn whole_bytes(graph: &Graph, shape: &StepShape, v: ValueId) -> u64 {
    let value = &graph.values[v];
    value.bytes(if value.shape.lead == Lead::Selected {
        shape.n_selected
    } else {
        shape.n_tokens()
    })
}

/// The operands of `op` on `tokens`, in order, scratch excepted.
pub(crate) fn operands(
    graph: &Graph,
    shape: &StepShape,
    op: &Op,
    tokens: &Range<u64>,
) -> Vec<Operand> {
    let value = |v: ValueId, access: Access| {
        let what = if is_dense_sum(graph, v) { What::Sum(v) } else { What::Value(v) };
        let row_bytes = graph.values[v].bytes(1);
        let (first_byte, bytes) = match graph.values[v].shape.lead {
            Lead::Tokens => (tokens.start * row_bytes, (tokens.end - tokens.start) * row_bytes),
            Lead::Selected | Lead::Fixed => (0, whole_bytes(graph, shape, v)),
        };
        Operand { what, access, first_byte, bytes }
    };
    let whole = |what, access, bytes| Operand { what, access, first_byte: 0, bytes };
    let mut all = Vec::with_capacity(8);
    all.extend(op.inputs.iter().map(|&v| value(v, Access::Read)));
    all.extend(op.uses.iter().map(|&u| {
        let p = graph.param_of(u);
        whole(What::Param(p), Access::Read, graph.params[p].bytes())
    }));
    all.extend(
        op.sums.iter().map(|&v| {
            value(v, if is_dense_sum(graph, v) { Access::Update } else { Access::Write })
        }),
    );
    all.extend(op.outputs.iter().map(|&v| value(v, Access::Write)));
    if let Some(p) = op.updates {
        all.push(whole(What::Param(p), Access::Update, graph.params[p].bytes()));
        let n_states = graph.states.len() as u32;
        all.extend(
            (0..n_states)
                .map(|k| whole(What::State(p, k), Access::Update, state_bytes(graph, p, k))),
        );
    }
    all
}

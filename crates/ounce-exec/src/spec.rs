//! An op without its graph: its attributes and the size of every operand.

use ounce_ir::{DType, Graph, Lead, Op, OpKind, Shape, ValueId};

/// How many entries the symbolic leading dimensions have in one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Tokens of the run.
    pub(crate) n_tokens: u64,
    /// Selected tokens of the step.
    pub(crate) n_selected: u64,
}

/// The size of one operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OperandSpec {
    /// The leading dimension.
    pub(crate) lead: Lead,
    /// Elements per entry of it.
    pub(crate) row_elems: u64,
    /// Stored element type.
    pub(crate) dtype: DType,
}

impl OperandSpec {
    fn new(shape: &Shape, dtype: DType) -> Self {
        Self { lead: shape.lead, row_elems: shape.row_elems(), dtype }
    }

    /// Bytes in a run of that extent.
    pub(crate) fn bytes(&self, extent: Extent) -> u64 {
        self.n_rows(extent) * self.dtype.bytes(self.row_elems)
    }

    /// Elements in a run of that extent.
    pub(crate) fn elems(&self, extent: Extent) -> u64 {
        self.n_rows(extent) * self.row_elems
    }

    fn n_rows(&self, extent: Extent) -> u64 {
        match self.lead {
            Lead::Fixed => 1,
            Lead::Tokens => extent.n_tokens,
            Lead::Selected => extent.n_selected,
        }
    }
}

/// An op with the sizes of its operands, in the order of ounce-ir's op table (scratch excepted).
#[derive(Debug, Clone)]
pub(crate) struct OpSpec {
    pub(crate) kind: OpKind,
    /// Whether weight decay applies to the updated parameter.
    pub(crate) decay: bool,
    pub(crate) n_inputs: usize,
    pub(crate) n_uses: usize,
    pub(crate) n_sums: usize,
    pub(crate) n_outputs: usize,
    /// Inputs, uses, sums, outputs, then the updated parameter and its states.
    pub(crate) operands: Box<[OperandSpec]>,
    /// The values of the sums and outputs.
    pub(crate) written: Box<[ValueId]>,
}

impl OpSpec {
    pub(crate) fn new(graph: &Graph, op: &Op) -> Self {
        let value = |&v: &ounce_ir::ValueId| {
            OperandSpec::new(&graph.values[v].shape, graph.values[v].dtype)
        };
        let param =
            |p: ounce_ir::ParamId| OperandSpec::new(&graph.params[p].shape, graph.params[p].dtype);
        let mut operands: Vec<OperandSpec> = op.inputs.iter().map(value).collect();
        operands.extend(op.uses.iter().map(|&u| param(graph.param_of(u))));
        operands.extend(op.sums.iter().chain(&op.outputs).map(value));
        if let Some(p) = op.updates {
            operands.push(param(p));
            let shape = &graph.params[p].shape;
            operands.extend(graph.states.iter().map(|s| OperandSpec::new(shape, s.dtype)));
        }
        Self {
            kind: op.kind,
            decay: op.updates.is_some_and(|p| graph.params[p].decay),
            n_inputs: op.inputs.len(),
            n_uses: op.uses.len(),
            n_sums: op.sums.len(),
            n_outputs: op.outputs.len(),
            operands: operands.into(),
            written: op.sums.iter().chain(&op.outputs).copied().collect(),
        }
    }

    /// Operands that are only read; all others are written.
    pub(crate) fn n_reads(&self) -> usize {
        self.n_inputs + self.n_uses
    }

    /// Index of output 0 among the operands.
    pub(crate) fn first_output(&self) -> usize {
        self.n_reads() + self.n_sums
    }

    /// Index of the updated parameter among the operands.
    pub(crate) fn first_updated(&self) -> usize {
        self.first_output() + self.n_outputs
    }

    /// Whether the op changes a parameter.
    pub(crate) fn is_update(&self) -> bool {
        self.first_updated() < self.operands.len()
    }

    /// Index of the input that the op before has just written, if there is one: the last activation or
    /// gradient. Ops read the saved values before the gradient that flows back.
    pub(crate) fn flowing_input(&self) -> Option<usize> {
        let flows = |o: &OperandSpec| o.lead == Lead::Tokens && o.dtype.is_float();
        let found = self.operands[..self.n_inputs].iter().rposition(flows);
        found.filter(|_| self.kind != OpKind::EmbedScatter)
    }

    /// Whether the op works on the selected tokens.
    pub(crate) fn is_selected(&self) -> bool {
        self.operands.iter().any(|o| o.lead == Lead::Selected)
    }
}

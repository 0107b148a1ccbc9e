//! The questions a planner may ask of a machine.

use ounce_ir::{AttentionSpec, Graph, OpId, OpKind, WeightLayout};

use crate::StepShape;

/// What a planner may ask: bytes are exact promises, times are estimates.
pub trait Machine {
    /// Threads that kernels run on.
    fn n_threads(&self) -> u32;
    /// Bytes of scratch that `op` needs when it runs on `n_tokens` tokens.
    fn scratch_bytes(&self, graph: &Graph, op: OpId, n_tokens: u64) -> u64;
    /// Seconds that `op` takes on `n_tokens` tokens of rows as in `shape`.
    fn cost_s(&self, graph: &Graph, op: OpId, shape: &StepShape, n_tokens: u64) -> f64;
    /// Declared bytes of the process outside the arena: code, stacks, heap, page tables.
    fn baseline_bytes(&self) -> u64;
}

/// A machine with fixed arithmetic speed and memory bandwidth: the same answers everywhere, for the smallest feasible
/// budget, for ops too large to time, and for tests.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FixedMachine {
    /// Threads.
    pub n_threads: u32,
    /// Floating point operations per second of matrix products.
    pub flop_per_s: f64,
    /// Bytes per second of everything else.
    pub bytes_per_s: f64,
    /// Seconds per instruction.
    pub overhead_s: f64,
    /// The process.
    pub baseline_bytes: u64,
}

impl Default for FixedMachine {
    fn default() -> Self {
        Self {
            n_threads: 2,
            flop_per_s: 200e9,
            bytes_per_s: 10e9,
            overhead_s: 2e-6,
            baseline_bytes: 0,
        }
    }
}

impl Machine for FixedMachine {
    fn n_threads(&self) -> u32 {
        self.n_threads
    }

    fn scratch_bytes(&self, graph: &Graph, op: OpId, n_tokens: u64) -> u64 {
        let op = &graph.ops[op];
        let width = |i: usize| graph.params[graph.param_of(op.uses[i])].shape.dims[0];
        match op.kind {
            // Logits of the chunk.
            OpKind::CrossEntropy { .. } | OpKind::CrossEntropyTrain { .. } => {
                4 * n_tokens * width(0) + 4096
            }
            OpKind::Linear { .. }
            | OpKind::LinearGradInput { .. }
            | OpKind::LinearGradWeight { .. }
            | OpKind::Attention(_)
            | OpKind::AttentionGrad(_) => 4096 * u64::from(self.n_threads),
            OpKind::LayerNormGrad { .. } | OpKind::RmsNormGrad { .. } => 8 * n_tokens,
            OpKind::EmbedScatter => 8 * n_tokens,
            OpKind::SumSquares => 1024,
            _ => 0,
        }
    }

    fn cost_s(&self, graph: &Graph, op: OpId, shape: &StepShape, n_tokens: u64) -> f64 {
        let flop = flop(graph, op, shape, n_tokens);
        let bytes = bytes_moved(graph, op, n_tokens);
        self.overhead_s + flop / self.flop_per_s + bytes / self.bytes_per_s
    }

    fn baseline_bytes(&self) -> u64 {
        self.baseline_bytes
    }
}

/// Floating point operations of the matrix products in `op` on `n_tokens` tokens.
pub fn flop(graph: &Graph, op: OpId, shape: &StepShape, n_tokens: u64) -> f64 {
    let op = &graph.ops[op];
    let n = n_tokens as f64;
    let weight = || graph.params[graph.param_of(op.uses[0])].shape.row_elems() as f64;
    match op.kind {
        OpKind::Linear { layout: WeightLayout::OutIn | WeightLayout::InOut, .. }
        | OpKind::LinearGradInput { .. }
        | OpKind::CrossEntropy { .. } => 2.0 * n * weight(),
        OpKind::CrossEntropyTrain { .. } => 6.0 * n * weight(),
        OpKind::LinearGradWeight { .. } => {
            2.0 * n * graph.values[op.sums[0]].shape.row_elems() as f64
        }
        // Two products per key that a query sees; five backward.
        OpKind::Attention(a) => 4.0 * n * mean_keys(&a, shape) * a.q_width() as f64,
        OpKind::AttentionGrad(a) => 10.0 * n * mean_keys(&a, shape) * a.q_width() as f64,
        _ => 0.0,
    }
}

/// Keys that a query of a full row sees on average: half of the row, or nearly the window.
fn mean_keys(spec: &AttentionSpec, shape: &StepShape) -> f64 {
    let row = shape.row_tokens as f64;
    let window = spec.window.map_or(row, |w| f64::from(w).min(row));
    window * (row - 0.5 * window) / row
}

/// Bytes that `op` reads and writes on `n_tokens` tokens, sums twice.
pub fn bytes_moved(graph: &Graph, op: OpId, n_tokens: u64) -> f64 {
    let op = &graph.ops[op];
    let value = |&v: &ounce_ir::ValueId| graph.values[v].bytes(n_tokens);
    let values: u64 = op.inputs.iter().chain(&op.outputs).map(value).sum();
    let sums: u64 = op.sums.iter().map(|v| 2 * value(v)).sum();
    // An embedding reads only its rows, which its output counts.
    let uses: u64 = match op.kind {
        OpKind::Embed => 0,
        _ => op.uses.iter().map(|&u| graph.params[graph.param_of(u)].bytes()).sum(),
    };
    let updated = op.updates.map_or(0, |p| graph.params[p].bytes());
    let states = 2 * (1 + graph.states.len() as u64);
    (values + sums + uses + states * updated) as f64
}

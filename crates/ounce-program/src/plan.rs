//! Buffers, instructions and the plan.
//!
//! ```text
//! bytes    |  i7    |  i8    |  i9    |
//! 64..96   |     logits      |  d_x   |   logits lives [7, 9), d_x [9, 10): same bytes
//! 32..64   |        |    d_logits     |
//!  0..32   |            x             |   kept: i9 reads it
//! ```
//! A buffer is a range of bytes with a lifetime `[start, end)` in instructions. An in-place op hands
//! its input's buffer on to its output, so one buffer may hold several values one after another.

use std::ops::Range;

use ounce_ir::{OpId, ParamId, Table, ValueId, entity};

use crate::StepShape;

entity! {
    /// A planned range of bytes.
    BufferId "b",
}

/// Where bytes live. On a machine without a GPU the host is the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// A GPU's memory.
    Device,
    /// RAM.
    Host,
    /// A scratch file.
    Disk,
}

/// Why a buffer exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BufferRole {
    /// A parameter; resident.
    Param(ParamId),
    /// The n-th optimizer state of a parameter; resident.
    State(ParamId, u32),
    /// Data, loss, scalars and results that the session reads or writes between steps; resident.
    Session(ValueId),
    /// A gradient sum.
    Sum(ValueId),
    /// A forward or backward value (the first one, if in-place ops hand the buffer on).
    Value(ValueId),
    /// Scratch of one op.
    Scratch(OpId),
}

/// The rows of the table that `explain` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Category {
    /// Parameters.
    Weights,
    /// Optimizer state.
    OptimizerState,
    /// Gradient sums.
    Gradients,
    /// Forward values that wait for their backward op.
    Saved,
    /// Values that live within one stage.
    Working,
    /// Scratch of kernels: packing buffers, logits of a head chunk.
    Scratch,
    /// Token ids, targets, losses.
    Data,
    /// The process itself: code, stacks, tables outside the arena.
    Process,
}

impl Category {
    /// All categories, in the order in which they are printed.
    pub const ALL: [Self; 8] = [
        Self::Weights,
        Self::OptimizerState,
        Self::Gradients,
        Self::Saved,
        Self::Working,
        Self::Scratch,
        Self::Data,
        Self::Process,
    ];
    /// The name for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::OptimizerState => "optimizer state",
            Self::Gradients => "gradients",
            Self::Saved => "saved values",
            Self::Working => "working values",
            Self::Scratch => "kernel scratch",
            Self::Data => "data",
            Self::Process => "process",
        }
    }
}

/// A planned range of bytes with a lifetime.
#[derive(Debug, Clone, PartialEq)]
pub struct Buffer {
    /// Why it exists.
    pub role: BufferRole,
    /// The row of the table it is counted in.
    pub category: Category,
    /// Where it lives.
    pub tier: Tier,
    /// Bytes from the start of the tier's arena; a multiple of 64.
    pub offset: u64,
    /// Size; a multiple of 64.
    pub bytes: u64,
    /// Lifetime in instruction indices, half open.
    pub live: Range<u32>,
}

/// Bytes `at .. at + bytes` of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BufferRef {
    /// The buffer.
    pub buffer: BufferId,
    /// Bytes from the start of the buffer.
    pub at: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// A transfer in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u32);

/// One instruction.
#[derive(Debug, Clone, PartialEq)]
pub enum Instr {
    /// Runs an op on tokens `tokens` of the step's token axis.
    ///
    /// Operands in the order of ounce-ir's op table: inputs, uses, sums, outputs, then the updated
    /// parameter and its states, then scratch (if the machine asks for any). An operand with a
    /// token lead covers exactly `tokens`; of a data input, loss or embedding-rows sum, which span
    /// the whole step, it is the part for `tokens`. Update ops run over the whole axis.
    Run {
        /// The op.
        op: OpId,
        /// Tokens of the step's axis.
        tokens: Range<u64>,
        /// Resolved operands.
        operands: Vec<BufferRef>,
    },
    /// Fills a gradient sum with zeros before its first addition.
    Zero {
        /// The sum.
        value: ValueId,
        /// All of its bytes.
        dst: BufferRef,
    },
    /// Starts a copy between tiers.
    Copy {
        /// From.
        src: BufferRef,
        /// To; not read before [`Instr::Wait`].
        dst: BufferRef,
        /// Names the transfer.
        tag: Tag,
    },
    /// Waits for a copy.
    Wait {
        /// The transfer.
        tag: Tag,
    },
}

/// Order of the two loops of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoopOrder {
    /// Every layer for one micro-batch, then the next micro-batch.
    TokenMajor,
    /// Every micro-batch (chunk of tokens) for one layer, then the next layer.
    LayerMajor,
}

impl std::fmt::Display for LoopOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::TokenMajor => "token-major",
            Self::LayerMajor => "layer-major",
        })
    }
}

/// What the planner chose, in words for the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Order of the loops.
    pub loop_order: LoopOrder,
    /// Micro-batches per step (outer loop of token-major order).
    pub n_micro_batches: u64,
    /// Tokens of the largest chunk that the head takes at once.
    pub head_chunk_tokens: u64,
    /// Whether gradients go into the update as soon as they are complete.
    pub release_gradients: bool,
    /// Forward values that are kept until their backward reads them.
    pub n_kept: u64,
    /// Runs of forward ops that are repeated.
    pub n_recomputed: u64,
}

/// What is proved about a plan, and by how much it could be better.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Certificate {
    /// The budget it was made for: the whole process.
    pub budget_bytes: u64,
    /// Peak of the process: arena and declared baseline.
    pub peak_bytes: u64,
    /// Largest sum of live bytes at any moment, plus the baseline: no placement can need less.
    pub max_load_bytes: u64,
    /// Predicted time of a step.
    pub step_s: f64,
    /// No schedule of this graph within the budget is faster, by the same costs.
    pub step_bound_s: f64,
    /// Predicted time of the fastest plan of any size.
    pub unconstrained_step_s: f64,
}

/// A step, unrolled.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The token axis it is made for.
    pub shape: StepShape,
    /// Threads that its scratch is sized for.
    pub n_threads: u32,
    /// Planned bytes.
    pub buffers: Table<BufferId, Buffer>,
    /// Instructions in order.
    pub instrs: Vec<Instr>,
    /// Height of the host arena.
    pub arena_bytes: u64,
    /// Declared bytes of the process outside the arena.
    pub baseline_bytes: u64,
    /// What was chosen.
    pub choice: Choice,
    /// What is proved.
    pub certificate: Certificate,
}

impl Plan {
    /// The resident buffer of that role, if any.
    pub fn find_buffer(&self, role: BufferRole) -> Option<BufferId> {
        self.buffers.iter().find(|(_, b)| b.role == role).map(|(id, _)| id)
    }
}

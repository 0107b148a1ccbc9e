//! The nouns: graph, values, parameters and their uses, stages, optimizer state.

use crate::op::{Op, OpId};
use crate::{DType, Shape, Table, entity};

entity! {
    /// An edge of the graph.
    ValueId "v",
    /// A parameter: named storage, whatever the number of its uses.
    ParamId "p",
    /// One place where a parameter is read.
    UseId "u",
    /// A piece of the model between two cut values.
    StageId "s",
    /// A table of rotary frequencies.
    RopeTableId "t",
    /// A random op: part of the key of its random numbers, equal in the original and the recomputed run.
    RandomSite "r",
}

/// When in the step an op runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// From tokens to the loss.
    Forward,
    /// From the loss to gradient sums.
    Backward,
    /// From gradient sums to new parameters; once per step.
    Update,
}

/// Data of the step, filled in by the session before the step runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum InputKind {
    /// Token ids `[N]` i32; negative in gaps.
    TokenIds,
    /// Position of each token in its row `[N]` i32; 0 in gaps.
    Positions,
    /// The id that each token should predict `[N]` i32; negative where there is no supervision.
    Targets,
    /// Indices of selected tokens `[R]` i32.
    SelectedRows,
}

impl InputKind {
    /// All kinds, in declaration order.
    pub const ALL: [Self; 4] = [Self::TokenIds, Self::Positions, Self::Targets, Self::SelectedRows];

    /// The name in the textual form.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TokenIds => "token_ids",
            Self::Positions => "positions",
            Self::Targets => "targets",
            Self::SelectedRows => "selected_rows",
        }
    }
}

/// What a value is, hence how long it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueKind {
    /// Data of the step: `[N]` over the whole step, resident.
    Input(InputKind),
    /// Written by a forward op.
    Activation,
    /// Written by a backward op.
    Gradient,
    /// A gradient sum over the tokens of the step, starting at zero: f32, of the parameter's shape;
    /// or `[N, C]` over the whole step for the rows of an embedding's gradient, of its dtype.
    Sum(UseId),
    /// A few numbers of the update: norm parts, the clip scale. Resident through the update.
    Scalar,
    /// The loss of every token of the step `[N]`: resident, read by the session.
    Loss,
    /// A result that the session reads after the step (decoding's logits): resident.
    Result,
}

/// An edge of the graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Value {
    /// A name for reports, such as `h.3.mlp.c_fc`.
    pub name: String,
    /// Shape, with the symbolic leading dimension.
    pub shape: Shape,
    /// Stored element type.
    pub dtype: DType,
    /// What it is.
    pub kind: ValueKind,
}

impl Value {
    /// Bytes when the leading dimension is `n`.
    pub fn bytes(&self, n: u64) -> u64 {
        self.shape.bytes(self.dtype, n)
    }
}

/// How a fresh parameter is filled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Normal with mean 0 and this standard deviation.
    Normal(f32),
    /// All zero.
    Zeros,
    /// All one.
    Ones,
}

/// A parameter under its Hugging Face name.
#[derive(Debug, Clone, PartialEq)]
pub struct Param {
    /// Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Shape; the lead is fixed.
    pub shape: Shape,
    /// Stored element type.
    pub dtype: DType,
    /// Whether weight decay applies (not to norms and biases).
    pub decay: bool,
    /// Whether it is trained.
    pub trainable: bool,
    /// How a fresh one is filled.
    pub init: Init,
}

impl Param {
    /// Bytes of storage.
    pub fn bytes(&self) -> u64 {
        self.shape.bytes(self.dtype, 0)
    }
}

/// One place where a parameter is read. A tied head and its embedding are two uses of one parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Use {
    /// The storage.
    pub param: ParamId,
}

/// Rotary frequencies: `angle = position * inv_freq[i]`, cos and sin multiplied with `scale`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTable {
    /// One per pair of rotated elements, radians per position; the rotary width is twice its length.
    pub inv_freq: Vec<f32>,
    /// Attention factor of the scaling variant (1 for plain RoPE).
    pub scale: f32,
}

/// A piece of the model between two cut values. A model is a chain of stages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// A name for reports, such as `attn.3`.
    pub name: String,
    /// The type's name: stages of one kind are usually alike (`embed`, `attn`, `mlp`, `head`).
    pub kind: String,
    /// The cut value it reads from the stage before (`None` for the first).
    pub input: Option<ValueId>,
    /// The cut value it hands to the next stage (`None` for the last, which ends in the loss).
    pub output: Option<ValueId>,
    /// The gradient of `output` that its backward reads, once differentiated.
    pub d_output: Option<ValueId>,
    /// The gradient of `input` that its backward writes, once differentiated.
    pub d_input: Option<ValueId>,
}

/// One tensor of optimizer state per trained parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateSpec {
    /// Name as in PyTorch's state dict, such as `exp_avg`.
    pub name: String,
    /// Stored element type; the shape is the parameter's.
    pub dtype: DType,
}

/// The name of the optimizer state that completes a bf16 parameter to its f32 master: with `bits`
/// the master's, the parameter is `hi = (bits + 0x8000) >> 16` and the state `bits - (hi << 16)` as
/// i16. Ties go away from zero, so that the split can be undone.
pub const MASTER_LO: &str = "master_lo";

/// Which update rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptimizerKind {
    /// AdamW with decoupled weight decay.
    AdamW,
    /// Plain stochastic gradient descent.
    Sgd,
}

impl OptimizerKind {
    /// The state it keeps per trained parameter that is stored in `dtype`: its moments, and of a
    /// bf16 parameter the lower half of the f32 master ([`MASTER_LO`]).
    pub fn states(self, dtype: DType) -> Vec<StateSpec> {
        let state = |name: &str, dtype| StateSpec { name: name.to_owned(), dtype };
        let mut states = match self {
            Self::AdamW => vec![state("exp_avg", DType::F32), state("exp_avg_sq", DType::F32)],
            Self::Sgd => Vec::new(),
        };
        if dtype == DType::Bf16 {
            states.push(state(MASTER_LO, DType::I16));
        }
        states
    }
}

/// A transformer step over one symbolic micro-batch of `N` tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Graph {
    /// Storage.
    pub params: Table<ParamId, Param>,
    /// Places where storage is read, in the order in which their gradients are added.
    pub uses: Table<UseId, Use>,
    /// Edges.
    pub values: Table<ValueId, Value>,
    /// Ops in program order.
    pub ops: Table<OpId, Op>,
    /// The chain.
    pub stages: Table<StageId, Stage>,
    /// Rotary frequency tables.
    pub rope_tables: Table<RopeTableId, RopeTable>,
    /// Optimizer state per trained parameter; empty before `attach_optimizer`.
    pub states: Vec<StateSpec>,
    /// Lanes that the tokens of a step are dealt to; each lane sums on its own (1: one sequential sum).
    pub reduction_lanes: u32,
    /// Random ops so far; the next [`RandomSite`].
    pub n_random_sites: u32,
}

impl Graph {
    /// An empty graph with one reduction lane.
    pub fn new() -> Self {
        Self {
            params: Table::default(),
            uses: Table::default(),
            values: Table::default(),
            ops: Table::default(),
            stages: Table::default(),
            rope_tables: Table::default(),
            states: Vec::new(),
            reduction_lanes: 1,
            n_random_sites: 0,
        }
    }

    /// Elements of all parameters, tied ones counted once.
    pub fn n_params_elems(&self) -> u64 {
        self.params.values().map(|p| p.shape.row_elems()).sum()
    }

    /// The first value of that kind.
    pub fn find_value(&self, kind: ValueKind) -> Option<ValueId> {
        self.values.iter().find(|(_, v)| v.kind == kind).map(|(id, _)| id)
    }

    /// The parameter that a use reads.
    pub fn param_of(&self, u: UseId) -> ParamId {
        self.uses[u].param
    }

    /// Pairs (input, output) of `op` whose buffers may be the same: those of [`in_place`](crate::OpKind::in_place)
    /// whose elements are stored alike.
    pub fn in_place<'a>(&'a self, op: &'a Op) -> impl Iterator<Item = (usize, usize)> + 'a {
        let dtype = |v: ValueId| self.values[v].dtype;
        let pairs = op.kind.in_place().iter().copied();
        pairs.filter(move |&(i, o)| dtype(op.inputs[i]) == dtype(op.outputs[o]))
    }

    /// The dtype that trained parameters are stored in (f32 if none is trained). `verify` sees to it
    /// that they all have the same.
    pub fn trained_dtype(&self) -> DType {
        let mut trained = self.params.values().filter(|p| p.trainable);
        trained.next().map_or(DType::F32, |p| p.dtype)
    }
}

impl Default for Graph {
    fn default() -> Self {
        Self::new()
    }
}

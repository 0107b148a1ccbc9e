//! Every op: its attributes, what it reads and writes, and the few facts a planner may ask.
//!
//! Operand order is the same everywhere (text form, plan, executor):
//! inputs, uses, sums, outputs, then the updated parameter and its optimizer states, then scratch.
//!
//! | op | inputs | uses | sums | outputs |
//! |---|---|---|---|---|
//! | `embed` | idx `[N]` | table `[V,C]` | | y `[N,C]`; a negative index gives a zero row |
//! | `linear` | x `[N,K]` | w, (b `[M]`) | | y `[N,M]` |
//! | `layer_norm` | x `[N,C]` | w `[C]`, (b `[C]`) | | y `[N,C]` |
//! | `rms_norm` | x `[N,G*C]` | w `[C]` | | y `[N,G*C]`: every C channels are normalized on their own |
//! | `rope` | x `[N,W]`, pos `[N]` | | | y: the first H*D columns turned, the others copied; `inverse` turns back |
//! | `attention` | q `[N,H*D]`, k, v `[N,Hkv*D]`, or qkv side by side in one | | | o `[N,H*D]`, lse `[N,H]` |
//! | `gelu` | x | | | y |
//! | `glu` | gate, up `[N,F]`, or both side by side in one | | | act(gate) * up |
//! | `add` | a, b | | | a + b |
//! | `scale` | x | | | factor * x; the same op is its own gradient |
//! | `soft_cap` | x | | | cap * tanh(x / cap) |
//! | `dropout` | x | | | x * mask / (1 - p); the same op is its own gradient |
//! | `take_rows` | x `[N,C]`, idx `[R]` | | | y `[R,C]` |
//! | `cross_entropy` | x `[N,C]`, targets `[N]` | w `[V,C]` | | loss `[N]`; 0 where target < 0; perhaps a soft cap |
//! | `cross_entropy_train` | x, targets | w | dw, if w is trained | loss `[N]`, dx `[N,C]` |
//! | `linear_grad_input` | dy `[N,M]` | w | | dx `[N,K]` |
//! | `linear_grad_weight` | x, dy | | dw | |
//! | `bias_grad` | dy | | db | |
//! | `layer_norm_grad` | x, dy | w | (dw, (db)) | dx |
//! | `rms_norm_grad` | x, dy | w | (dw) | dx |
//! | `attention_grad` | q, k, v (or qkv), o, lse, d_o | | | dq, dk, dv (or dqkv) |
//! | `gelu_grad` | x, dy | | | dx |
//! | `glu_grad` | gate, up (or both in one), dy | | | dgate, dup (or both in one) |
//! | `soft_cap_grad` | x, dy | | | dx |
//! | `embed_grad_rows` | dy `[N,C]` | | rows `[N,C]`, of dy's dtype | (copies dy into its place on the token axis) |
//! | `embed_scatter` | idx `[N]`, rows `[N,C]` | | dw `[V,C]` | runs once, over the whole step |
//! | `sum_squares` | dw | | | part `[1]` f64 |
//! | `clip_scale` | all parts | | | scale `[1]` f32 |
//! | `adamw`, `sgd` | dw, (scale) | | | | updates the parameter and its states
//!
//! An input or output without a dtype is f32, bf16 or f16, each on its own: an op widens what it
//! reads, computes in f32 and rounds each output once, to nearest even, to the dtype of its value.
//! The loss, lse, sums and scalars are not rounded: f32, or as the table says.

use crate::entity;
use crate::graph::{ParamId, Phase, RandomSite, RopeTableId, StageId, UseId, ValueId};

entity! {
    /// An op of the graph, in program order.
    OpId "op",
}

/// How a linear layer's weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightLayout {
    /// `[out, in]`, as `torch.nn.Linear`.
    OutIn,
    /// `[in, out]`, as GPT-2's `Conv1D`.
    InOut,
}

/// Which GELU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GeluKind {
    /// The tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    Tanh,
    /// The exact form with erf (`gelu`).
    Erf,
}

/// What the gate of a gated linear unit goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Gate {
    /// `x * sigmoid(x)`: SwiGLU.
    Silu,
    /// GELU: GeGLU.
    Gelu(GeluKind),
}

/// Causal grouped-query attention within the rows of the token axis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// `H`, query heads.
    pub n_heads: u32,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: u32,
    /// `D`, elements per head.
    pub head_dim: u32,
    /// What scores are multiplied with, usually `1/sqrt(D)`.
    pub scale: f32,
    /// Whether q, k and v stand side by side in one value `[N, (H + 2 Hkv) * D]`.
    pub packed: bool,
    /// Keys that a query sees, itself included; `None` is all of its row up to itself.
    pub window: Option<u32>,
    /// Scores `s` become `cap * tanh(s / cap)` before the softmax.
    pub soft_cap: Option<f32>,
}

impl AttentionSpec {
    /// `H * D`.
    pub fn q_width(&self) -> u64 {
        u64::from(self.n_heads) * u64::from(self.head_dim)
    }
    /// `Hkv * D`.
    pub fn kv_width(&self) -> u64 {
        u64::from(self.n_kv_heads) * u64::from(self.head_dim)
    }
}

/// What an op computes. See the table at the top of this file.
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "the table at the top of the file documents every op")]
pub enum OpKind {
    Embed,
    Linear {
        layout: WeightLayout,
        bias: bool,
    },
    LayerNorm {
        eps: f32,
        bias: bool,
    },
    /// `unit_offset`: the factor is `1 + w` instead of `w`.
    RmsNorm {
        eps: f32,
        unit_offset: bool,
    },
    Rope {
        table: RopeTableId,
        n_heads: u32,
        head_dim: u32,
        inverse: bool,
    },
    Attention(AttentionSpec),
    Gelu(GeluKind),
    Glu {
        gate: Gate,
        packed: bool,
    },
    Add,
    Scale {
        factor: f32,
    },
    SoftCap {
        cap: f32,
    },
    Dropout {
        p: f32,
        site: RandomSite,
    },
    TakeRows,
    CrossEntropy {
        soft_cap: Option<f32>,
    },
    CrossEntropyTrain {
        soft_cap: Option<f32>,
    },
    LinearGradInput {
        layout: WeightLayout,
    },
    LinearGradWeight {
        layout: WeightLayout,
    },
    BiasGrad,
    LayerNormGrad {
        eps: f32,
        bias: bool,
    },
    RmsNormGrad {
        eps: f32,
        unit_offset: bool,
    },
    AttentionGrad(AttentionSpec),
    GeluGrad(GeluKind),
    GluGrad {
        gate: Gate,
        packed: bool,
    },
    SoftCapGrad {
        cap: f32,
    },
    EmbedGradRows,
    EmbedScatter,
    SumSquares,
    ClipScale,
    AdamW,
    Sgd,
}

impl OpKind {
    /// The name in the textual form.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Linear { .. } => "linear",
            Self::LayerNorm { .. } => "layer_norm",
            Self::RmsNorm { .. } => "rms_norm",
            Self::Rope { .. } => "rope",
            Self::Attention(_) => "attention",
            Self::Gelu(_) => "gelu",
            Self::Glu { .. } => "glu",
            Self::Add => "add",
            Self::Scale { .. } => "scale",
            Self::SoftCap { .. } => "soft_cap",
            Self::Dropout { .. } => "dropout",
            Self::TakeRows => "take_rows",
            Self::CrossEntropy { .. } => "cross_entropy",
            Self::CrossEntropyTrain { .. } => "cross_entropy_train",
            Self::LinearGradInput { .. } => "linear_grad_input",
            Self::LinearGradWeight { .. } => "linear_grad_weight",
            Self::BiasGrad => "bias_grad",
            Self::LayerNormGrad { .. } => "layer_norm_grad",
            Self::RmsNormGrad { .. } => "rms_norm_grad",
            Self::AttentionGrad(_) => "attention_grad",
            Self::GeluGrad(_) => "gelu_grad",
            Self::GluGrad { .. } => "glu_grad",
            Self::SoftCapGrad { .. } => "soft_cap_grad",
            Self::EmbedGradRows => "embed_grad_rows",
            Self::EmbedScatter => "embed_scatter",
            Self::SumSquares => "sum_squares",
            Self::ClipScale => "clip_scale",
            Self::AdamW => "adamw",
            Self::Sgd => "sgd",
        }
    }

    /// Whether the op mixes tokens of one row, so that a cut of the token axis must fall between rows.
    /// Every other op over tokens may be cut at any granule.
    pub const fn needs_whole_rows(&self) -> bool {
        matches!(self, Self::Attention(_) | Self::AttentionGrad(_))
    }

    /// Whether output `output` may be stored in 16 bits: activations and gradients may, the loss,
    /// attention's lse and scalars may not.
    pub const fn may_round(&self, output: usize) -> bool {
        match self {
            Self::Attention(_) => output == 0,
            Self::CrossEntropyTrain { .. } => output == 1,
            Self::CrossEntropy { .. } | Self::SumSquares | Self::ClipScale => false,
            Self::Embed
            | Self::Linear { .. }
            | Self::LayerNorm { .. }
            | Self::RmsNorm { .. }
            | Self::Rope { .. }
            | Self::Gelu(_)
            | Self::Glu { .. }
            | Self::Add
            | Self::Scale { .. }
            | Self::SoftCap { .. }
            | Self::Dropout { .. }
            | Self::TakeRows
            | Self::LinearGradInput { .. }
            | Self::LayerNormGrad { .. }
            | Self::RmsNormGrad { .. }
            | Self::AttentionGrad(_)
            | Self::GeluGrad(_)
            | Self::GluGrad { .. }
            | Self::SoftCapGrad { .. } => true,
            // No outputs.
            Self::LinearGradWeight { .. }
            | Self::BiasGrad
            | Self::EmbedGradRows
            | Self::EmbedScatter
            | Self::AdamW
            | Self::Sgd => false,
        }
    }

    /// Pairs (input, output) whose buffers may be the same, if their dtypes are
    /// ([`crate::Graph::in_place`]): the op reads each element of the input before it writes that
    /// element of the output, and reads it no more afterwards.
    pub const fn in_place(&self) -> &'static [(usize, usize)] {
        match self {
            Self::Gelu(_)
            | Self::Rope { .. }
            | Self::Dropout { .. }
            | Self::Scale { .. }
            | Self::SoftCap { .. } => &[(0, 0)],
            Self::Add => &[(0, 0), (1, 0)],
            Self::GeluGrad(_) | Self::SoftCapGrad { .. } => &[(1, 0)],
            Self::GluGrad { packed: false, .. } => &[(0, 0), (1, 1)],
            Self::Embed
            | Self::Linear { .. }
            | Self::LayerNorm { .. }
            | Self::RmsNorm { .. }
            | Self::Attention(_)
            | Self::Glu { .. }
            | Self::TakeRows
            | Self::CrossEntropy { .. }
            | Self::CrossEntropyTrain { .. }
            | Self::LinearGradInput { .. }
            | Self::LinearGradWeight { .. }
            | Self::BiasGrad
            | Self::LayerNormGrad { .. }
            | Self::RmsNormGrad { .. }
            | Self::AttentionGrad(_)
            | Self::GluGrad { packed: true, .. }
            | Self::EmbedGradRows
            | Self::EmbedScatter
            | Self::SumSquares
            | Self::ClipScale
            | Self::AdamW
            | Self::Sgd => &[],
        }
    }
}

/// An op with its operands.
#[derive(Debug, Clone, PartialEq)]
pub struct Op {
    /// What it computes.
    pub kind: OpKind,
    /// When in the step it runs.
    pub phase: Phase,
    /// The stage it belongs to; `None` for the update.
    pub stage: Option<StageId>,
    /// Values read.
    pub inputs: Vec<ValueId>,
    /// Parameters read.
    pub uses: Vec<UseId>,
    /// Gradient sums that are read and added to.
    pub sums: Vec<ValueId>,
    /// Values written.
    pub outputs: Vec<ValueId>,
    /// The parameter (and its optimizer states) that is updated.
    pub updates: Option<ParamId>,
}

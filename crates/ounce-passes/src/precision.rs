//! From f32 to mixed precision: which values are stored in 16 bits.
//!
//! Idea. No op is added. Every op widens what it reads, computes in f32 and rounds what it writes
//! once, to the dtype of the value it writes; so a precision is nothing but a choice of dtypes, made
//! per class of ops. [`TABLE`] is that choice, as data.
//!
//! ```text
//!              f32 inside                  f32 inside
//! x ── 16 ──> [ linear ] ── 16 ── y ──> [ gelu, add, norm ] ── 16 ──> ...  ──> [ head ] ── f32 loss
//!                 ^ hi of w (bf16) or w (f16: f32)                               |
//! sums, states, masters: f32 <──────────────────────────────────────────────────┘
//! ```
//!
//! Invariants
//! - Only activations, gradients and parameters change their dtype. The loss, attention's lse, sums
//!   in a parameter's shape, norms, scales and results that the session reads stay as they are; the
//!   rows of an embedding's gradient are copies and take the gradient's dtype.
//! - bf16: every f32 parameter is stored as the rounded half of its master; `attach_optimizer` adds
//!   the other half. f16: parameters stay f32 and are their own masters.
//! - A factor, Gemma's `sqrt(C)`, is rounded as parameters are: `transformers` rounds it to the dtype
//!   that a model is stored in, and so did those who trained Gemma (34 in bf16 for 33.94, 0.2 % off).
//!
//! Complexity: linear in the number of ops. Sources: `[Micikevicius18]` (f32 masters, loss
//! scaling); PyTorch's autocast op lists, which the table is compared with.

use std::fmt;

use half::bf16;
use ounce_ir::{DType, Graph, OpKind, ValueKind};

/// What values are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Precision {
    /// Everything in f32.
    #[default]
    F32,
    /// Activations, gradients and the parameters that ops read in bf16; f32 masters.
    Bf16,
    /// Activations and gradients in f16, parameters in f32; the loss is scaled.
    F16,
}

impl Precision {
    /// All precisions, in declaration order.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

    /// The name in settings.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// The precision of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.name() == name)
    }

    /// What activations and gradients are stored in.
    pub const fn value_dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::Bf16,
            Self::F16 => DType::F16,
        }
    }

    /// What parameters are stored in.
    pub const fn param_dtype(self) -> DType {
        match self {
            Self::F32 | Self::F16 => DType::F32,
            Self::Bf16 => DType::Bf16,
        }
    }

    /// Whether gradients may leave the range of what they are stored in, so that the loss is scaled.
    pub const fn scales_loss(self) -> bool {
        matches!(self, Self::F16)
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Ops whose values are stored alike; forward ops and their gradients are in one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OpClass {
    /// Rows of a table, and the rows of its gradient.
    Embed,
    /// Matrix products with a weight.
    Linear,
    /// Layer and RMS norms.
    Norm,
    /// Rotary positions.
    Rope,
    /// Attention.
    Attention,
    /// GELU, gated units.
    Activation,
    /// The residual stream and its scale, and where gradients meet.
    Residual,
    /// Dropout.
    Dropout,
    /// The head: loss and the gradient of its input.
    Head,
    /// The update: always f32 and f64.
    Update,
}

impl OpClass {
    /// The classes whose dtype may be chosen.
    pub const CHOSEN: [Self; 9] = [
        Self::Embed,
        Self::Linear,
        Self::Norm,
        Self::Rope,
        Self::Attention,
        Self::Activation,
        Self::Residual,
        Self::Dropout,
        Self::Head,
    ];

    /// The class of an op.
    pub const fn of(kind: &OpKind) -> Self {
        match kind {
            OpKind::Embed | OpKind::EmbedGradRows => Self::Embed,
            OpKind::Linear { .. }
            | OpKind::LinearGradInput { .. }
            | OpKind::LinearGradWeight { .. }
            | OpKind::BiasGrad => Self::Linear,
            OpKind::LayerNorm { .. }
            | OpKind::LayerNormGrad { .. }
            | OpKind::RmsNorm { .. }
            | OpKind::RmsNormGrad { .. } => Self::Norm,
            OpKind::Rope { .. } => Self::Rope,
            OpKind::Attention(_) | OpKind::AttentionGrad(_) => Self::Attention,
            OpKind::Gelu(_) | OpKind::GeluGrad(_) | OpKind::Glu { .. } | OpKind::GluGrad { .. } => {
                Self::Activation
            }
            OpKind::Add | OpKind::Scale { .. } => Self::Residual,
            OpKind::Dropout { .. } => Self::Dropout,
            OpKind::TakeRows
            | OpKind::SoftCap { .. }
            | OpKind::SoftCapGrad { .. }
            | OpKind::CrossEntropy { .. }
            | OpKind::CrossEntropyTrain { .. } => Self::Head,
            OpKind::EmbedScatter
            | OpKind::SumSquares
            | OpKind::ClipScale
            | OpKind::AdamW
            | OpKind::Sgd => Self::Update,
        }
    }

    /// The name in settings and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Linear => "linear",
            Self::Norm => "norm",
            Self::Rope => "rope",
            Self::Attention => "attention",
            Self::Activation => "activation",
            Self::Residual => "residual",
            Self::Dropout => "dropout",
            Self::Head => "head",
            Self::Update => "update",
        }
    }

    /// The class of that name, if its dtype may be chosen.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::CHOSEN.into_iter().find(|c| c.name() == name)
    }
}

impl fmt::Display for OpClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A line of the table: what a class does in 16 bits, and what PyTorch does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassPrecision {
    /// The class.
    pub class: OpClass,
    /// What is stored in 16 bits, for people.
    pub stores: &'static str,
    /// What stays f32 inside, for people.
    pub computes: &'static str,
    /// What `torch.autocast` does.
    pub autocast: &'static str,
    /// How and why this differs, or that it does not.
    pub note: &'static str,
}

/// Every class, in the order in which they are printed.
pub const TABLE: [ClassPrecision; 10] = [
    ClassPrecision {
        class: OpClass::Embed,
        stores: "rows; rows of the gradient",
        computes: "sum over tokens",
        autocast: "f32 rows",
        note: "differs: the residual stream starts in 16 bits, half the bytes between stages",
    },
    ClassPrecision {
        class: OpClass::Linear,
        stores: "y, dx",
        computes: "products, dw, db",
        autocast: "16 bits; dw rounded to 16",
        note: "differs: dw and db are f32 sums, so that micro-batches never change them",
    },
    ClassPrecision {
        class: OpClass::Norm,
        stores: "y, dx",
        computes: "mean, variance, dw, db",
        autocast: "f32 in and out",
        note: "differs: f32 inside and one rounding; the product behind it would round anyway",
    },
    ClassPrecision {
        class: OpClass::Rope,
        stores: "y, dx",
        computes: "angles, rotation",
        autocast: "rounds each product and the sum",
        note: "differs: one rounding instead of three",
    },
    ClassPrecision {
        class: OpClass::Attention,
        stores: "o, dq, dk, dv",
        computes: "scores, softmax, lse, sums over keys",
        autocast: "16 bits, softmax f32 inside",
        note: "same; probabilities are not rounded before they meet the values",
    },
    ClassPrecision {
        class: OpClass::Activation,
        stores: "y, dx",
        computes: "gelu, silu and its product",
        autocast: "dtype of the input; silu rounded before the product",
        note: "differs: one rounding",
    },
    ClassPrecision {
        class: OpClass::Residual,
        stores: "sum",
        computes: "addition",
        autocast: "f32 (the widest input)",
        note: "differs: added in f32, stored in 16 bits, half the bytes of every cut value; \
               Gemma's sqrt(C) has the weights' dtype (in bf16 up to 0.2 % off), as in a bf16 model",
    },
    ClassPrecision {
        class: OpClass::Dropout,
        stores: "y, dx",
        computes: "scale",
        autocast: "dtype of the input",
        note: "same",
    },
    ClassPrecision {
        class: OpClass::Head,
        stores: "dx",
        computes: "logits, softmax, loss, dw",
        autocast: "16-bit logits, f32 loss",
        note: "differs: logits are never rounded (nor stored), their gradient is before its products",
    },
    ClassPrecision {
        class: OpClass::Update,
        stores: "nothing",
        computes: "norm (f64), moments, masters",
        autocast: "f32",
        note: "same: the masters are f32, in bf16 stored as two halves",
    },
];

/// A precision, and the classes that keep f32 all the same.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PrecisionPolicy {
    /// The precision of all other classes.
    pub precision: Precision,
    /// Classes whose values stay f32.
    pub keep_f32: Vec<OpClass>,
}

impl PrecisionPolicy {
    /// A precision without exceptions.
    pub const fn new(precision: Precision) -> Self {
        Self { precision, keep_f32: Vec::new() }
    }

    /// What the values that ops of `class` write are stored in.
    pub fn stored(&self, class: OpClass) -> DType {
        if class == OpClass::Update || self.keep_f32.contains(&class) {
            DType::F32
        } else {
            self.precision.value_dtype()
        }
    }
}

/// `graph` with the dtypes of a policy. Runs on the forward graph or after `differentiate`, before
/// `attach_optimizer`, which looks at the dtype of the parameters.
pub fn lower_precision(graph: &Graph, policy: &PrecisionPolicy) -> Graph {
    let mut lowered = graph.clone();
    let param_dtype = policy.precision.param_dtype();
    for p in graph.params.ids().filter(|&p| graph.params[p].dtype == DType::F32) {
        lowered.params[p].dtype = param_dtype;
    }
    for id in graph.ops.ids() {
        if let OpKind::Scale { factor } = &mut lowered.ops[id].kind
            && param_dtype == DType::Bf16
        {
            *factor = bf16::from_f32(*factor).to_f32();
        }
    }
    for op in graph.ops.values() {
        let stored = policy.stored(OpClass::of(&op.kind));
        for (i, &v) in op.outputs.iter().enumerate() {
            let is_flowing =
                matches!(graph.values[v].kind, ValueKind::Activation | ValueKind::Gradient);
            if is_flowing && op.kind.may_round(i) {
                lowered.values[v].dtype = stored;
            }
        }
        if op.kind == OpKind::EmbedGradRows {
            lowered.values[op.sums[0]].dtype = lowered.values[op.inputs[0]].dtype;
        }
    }
    lowered
}

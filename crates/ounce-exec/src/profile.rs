//! Where the time of steps goes, per kind of op and per class of kinds.

use std::cell::Cell;
use std::time::Duration;

use ounce_ir::OpKind;

use crate::spec::OpSpec;

/// Ops whose time is looked at together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TimeClass {
    /// Products with a weight, forward and backward.
    Linear,
    /// Attention, forward and backward.
    Attention,
    /// Logits, cross entropy and their gradients.
    Head,
    /// Norms and their gradients.
    Norm,
    /// Activation functions and their gradients.
    Activation,
    /// Additions, rotations, dropout, bias gradients.
    Elementwise,
    /// Norm of the gradient, clip scale, update.
    Optimizer,
    /// Rows of tables, forward and backward.
    Embedding,
    /// Sums set to zero.
    Zeroing,
}

impl TimeClass {
    /// All classes, in the order in which they are shown.
    pub const ALL: [Self; 9] = [
        Self::Linear,
        Self::Attention,
        Self::Head,
        Self::Norm,
        Self::Activation,
        Self::Elementwise,
        Self::Optimizer,
        Self::Embedding,
        Self::Zeroing,
    ];

    /// The class of an op.
    pub const fn of(kind: &OpKind) -> Self {
        match kind {
            OpKind::Linear { .. }
            | OpKind::LinearGradInput { .. }
            | OpKind::LinearGradWeight { .. } => Self::Linear,
            OpKind::Attention(_) | OpKind::AttentionGrad(_) => Self::Attention,
            OpKind::CrossEntropy { .. } | OpKind::CrossEntropyTrain { .. } => Self::Head,
            OpKind::LayerNorm { .. }
            | OpKind::LayerNormGrad { .. }
            | OpKind::RmsNorm { .. }
            | OpKind::RmsNormGrad { .. } => Self::Norm,
            OpKind::Gelu(_)
            | OpKind::GeluGrad(_)
            | OpKind::Glu { .. }
            | OpKind::GluGrad { .. }
            | OpKind::SoftCap { .. }
            | OpKind::SoftCapGrad { .. } => Self::Activation,
            OpKind::Add
            | OpKind::Scale { .. }
            | OpKind::Rope { .. }
            | OpKind::Dropout { .. }
            | OpKind::BiasGrad => Self::Elementwise,
            OpKind::SumSquares | OpKind::ClipScale | OpKind::AdamW | OpKind::Sgd => Self::Optimizer,
            OpKind::Embed | OpKind::TakeRows | OpKind::EmbedGradRows | OpKind::EmbedScatter => {
                Self::Embedding
            }
        }
    }

    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Attention => "attention",
            Self::Head => "head",
            Self::Norm => "norm",
            Self::Activation => "activation",
            Self::Elementwise => "elementwise",
            Self::Optimizer => "optimizer",
            Self::Embedding => "embedding",
            Self::Zeroing => "zeroing",
        }
    }

    /// Whether matrix products or attention are what it does.
    pub const fn is_product(self) -> bool {
        matches!(self, Self::Linear | Self::Attention | Self::Head)
    }
}

/// Time spent in one kind of op since profiling was switched on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpTime {
    /// The op's name in the graph's textual form, or `zero`.
    pub op: &'static str,
    /// Its class.
    pub class: TimeClass,
    /// Runs.
    pub n_runs: u64,
    /// Their sum.
    pub total: Duration,
}

/// One preallocated cell per op, and one for zeroing sums.
#[derive(Debug)]
pub(crate) struct Profile {
    cells: Vec<Cell<(u64, Duration)>>,
}

impl Profile {
    pub(crate) fn new(n_ops: usize) -> Self {
        Self { cells: vec![Cell::default(); n_ops + 1] }
    }

    /// Counts one run of op `op` (`None`: zeroing).
    pub(crate) fn add(&self, op: Option<u32>, time: Duration) {
        let index = op.map_or(self.cells.len() - 1, |op| op as usize);
        let (n_runs, total) = self.cells[index].get();
        self.cells[index].set((n_runs + 1, total + time));
    }

    /// Sums per kind of op, the longest first.
    pub(crate) fn report(&self, ops: &[OpSpec]) -> Vec<OpTime> {
        let mut kinds: Vec<OpTime> = Vec::new();
        let names = ops.iter().map(|op| (op.kind.name(), TimeClass::of(&op.kind)));
        let names = names.chain([("zero", TimeClass::Zeroing)]);
        for ((op, class), cell) in names.zip(&self.cells) {
            let (n_runs, total) = cell.get();
            match kinds.iter_mut().find(|k| k.op == op) {
                Some(kind) => {
                    kind.n_runs += n_runs;
                    kind.total += total;
                }
                None => kinds.push(OpTime { op, class, n_runs, total }),
            }
        }
        kinds.retain(|k| k.n_runs > 0);
        kinds.sort_by_key(|k| std::cmp::Reverse(k.total));
        kinds
    }
}

//! Scratch of every op: what a planner is promised and what dispatch slices, from one function.

use ounce_ir::{AttentionSpec, DType, OpKind};
use ounce_kernels::attention::{
    AttentionDims, attention_backward_scratch_elems, attention_forward_scratch_elems,
};
use ounce_kernels::embed::embed_scatter_scratch_u64;
use ounce_kernels::gemm::gemm_scratch_elems;
use ounce_kernels::head::head_scratch_elems;
use ounce_kernels::norm::{layer_norm_backward_scratch_elems, rms_norm_backward_scratch_elems};
use ounce_kernels::optim::sum_squares_scratch_f64;
use ounce_kernels::view::FloatType;

use crate::arena::UNIT_BYTES;
use crate::spec::OpSpec;

/// Bytes of scratch of one run of `op` over `n_tokens` tokens, a multiple of 64.
pub(crate) fn scratch_bytes(op: &OpSpec, n_tokens: u64, n_threads: usize) -> u64 {
    let n = n_tokens as usize;
    let width = |operand: usize| op.operands[operand].row_elems as usize;
    let output = |i: usize| width(op.first_output() + i);
    let f32s = |n_elems: usize| 4 * n_elems;
    let bytes = match op.kind {
        OpKind::Linear { .. } | OpKind::LinearGradInput { .. } => {
            let y = float_type(op.operands[op.first_output()].dtype);
            f32s(gemm_scratch_elems(n, output(0), width(0), y, n_threads))
        }
        OpKind::LinearGradWeight { layout } => {
            let (rows, cols) = match layout {
                ounce_ir::WeightLayout::OutIn => (width(1), width(0)),
                ounce_ir::WeightLayout::InOut => (width(0), width(1)),
            };
            f32s(gemm_scratch_elems(rows, cols, n, FloatType::F32, n_threads))
        }
        OpKind::CrossEntropy { .. } | OpKind::CrossEntropyTrain { .. } => {
            let n_channels = width(0);
            // That of the tokens' gradient where there is one: a class in f32 may stand between.
            let trains = matches!(op.kind, OpKind::CrossEntropyTrain { .. });
            let operand = if trains { op.first_output() + 1 } else { 0 };
            let dx = float_type(op.operands[operand].dtype);
            f32s(head_scratch_elems(n, width(op.n_inputs) / n_channels, n_channels, dx, n_threads))
        }
        OpKind::LayerNormGrad { .. } => {
            f32s(layer_norm_backward_scratch_elems(n, n_threads) + frozen_dw_elems(op))
        }
        OpKind::RmsNormGrad { .. } => {
            let n_groups = n * (width(0) / width(op.n_inputs));
            f32s(rms_norm_backward_scratch_elems(n_groups, n_threads) + frozen_dw_elems(op))
        }
        OpKind::Attention(spec) => {
            f32s(attention_forward_scratch_elems(attention_dims(&spec), n_threads))
        }
        OpKind::AttentionGrad(spec) => {
            f32s(attention_backward_scratch_elems(attention_dims(&spec), n, n_threads))
        }
        OpKind::EmbedScatter => 8 * embed_scatter_scratch_u64(n),
        OpKind::SumSquares => 8 * sum_squares_scratch_f64(width(0)),
        OpKind::Embed
        | OpKind::LayerNorm { .. }
        | OpKind::RmsNorm { .. }
        | OpKind::Rope { .. }
        | OpKind::Gelu(_)
        | OpKind::Glu { .. }
        | OpKind::Add
        | OpKind::Scale { .. }
        | OpKind::SoftCap { .. }
        | OpKind::Dropout { .. }
        | OpKind::TakeRows
        | OpKind::BiasGrad
        | OpKind::GeluGrad(_)
        | OpKind::GluGrad { .. }
        | OpKind::SoftCapGrad { .. }
        | OpKind::EmbedGradRows
        | OpKind::ClipScale
        | OpKind::AdamW
        | OpKind::Sgd => 0,
    };
    (bytes as u64).next_multiple_of(UNIT_BYTES)
}

/// The kernels' name for a type of floating-point elements.
fn float_type(dtype: DType) -> FloatType {
    match dtype {
        DType::Bf16 => FloatType::Bf16,
        DType::F16 => FloatType::F16,
        _ => FloatType::F32,
    }
}

/// The kernels of norm gradients always add to `dw`; a frozen norm lends them scratch for it.
pub(crate) fn frozen_dw_elems(op: &OpSpec) -> usize {
    if op.n_sums == 0 { op.operands[op.n_inputs].row_elems as usize } else { 0 }
}

/// The kernels' name for the sizes of an attention.
pub(crate) fn attention_dims(spec: &AttentionSpec) -> AttentionDims {
    AttentionDims {
        n_heads: spec.n_heads as usize,
        n_kv_heads: spec.n_kv_heads as usize,
        head_dim: spec.head_dim as usize,
        scale: spec.scale,
        window: spec.window.map(|window| window as usize),
        soft_cap: spec.soft_cap,
    }
}

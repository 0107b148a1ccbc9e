//! A task to its kernel: one exhaustive match over what ops compute.
//!
//! Everything numeric is in the kernels; here operands meet parameters of kernels, and the few
//! scalars of the update are worked out.

use ounce_ir::{AttentionSpec, Gate, GeluKind, OpKind, RopeTable, WeightLayout};
use ounce_kernels::attention::{
    HeadsMut, HeadsRef, RowSpan, attention_backward, attention_forward,
};
use ounce_kernels::gemm::{MatMut, MatRef, Start, gemm};
use ounce_kernels::inout::InOut;
use ounce_kernels::optim::{AdamwHyper, adamw, sgd, sum_squares};
use ounce_kernels::philox::PhiloxKey;
use ounce_kernels::pool::Pool;
use ounce_kernels::view::ViewMut;
use ounce_kernels::{activation, elementwise, embed, head, norm, rope};

use crate::arena::Operands;
use crate::inputs::StepInputs;
use crate::scratch::{attention_dims, frozen_dw_elems};
use crate::spec::OpSpec;

/// What every task of a step shares, and the place of this one.
pub(crate) struct Context<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) rope_tables: &'a [RopeTable],
    pub(crate) inputs: &'a StepInputs<'a>,
    /// The first token of the task on the step's axis.
    pub(crate) first_token: u32,
    /// Tokens of the task.
    pub(crate) n_tokens: u32,
    /// The rows within the task's tokens, counted from its first token; filled for attention only.
    pub(crate) rows: &'a [RowSpan],
}

/// Runs one op.
pub(crate) fn dispatch(op: &OpSpec, mut o: Operands<'_>, cx: &Context<'_>) {
    let pool = cx.pool;
    match op.kind {
        OpKind::Embed => {
            let (ids, table, c) = (o.input(0), o.weight(0), o.output_width(0));
            embed::embed_forward(pool, o.output_view(0), ids, table, c);
        }
        OpKind::TakeRows => {
            let (idx, x, c) = (o.input(1), o.input_view(0), o.output_width(0));
            embed::embed_forward(pool, o.output_view(0), idx, x, c);
        }
        OpKind::Linear { layout, .. } => linear(pool, &mut o, layout),
        OpKind::LinearGradInput { layout } => linear_grad_input(pool, &mut o, layout),
        OpKind::LinearGradWeight { layout } => linear_grad_weight(pool, &mut o, layout),
        OpKind::BiasGrad => {
            let (db, dy, c) = (o.sum(), o.input_view(0), o.input_width(0));
            elementwise::bias_grad(pool, db, dy, c);
        }
        OpKind::LayerNorm { eps, .. } => {
            let (x, w, b) = (o.input_view(0), o.weight(0), o.weight_if_any(1));
            norm::layer_norm_forward(pool, o.output_view(0), x, w, b, eps, o.input_width(0));
        }
        OpKind::RmsNorm { eps, unit_offset } => {
            let (x, w) = (o.input_view(0), o.weight(0));
            let offset = f32::from(unit_offset);
            norm::rms_norm_forward(pool, o.output_view(0), x, w, eps, offset, w.len());
        }
        OpKind::LayerNormGrad { eps, .. } => {
            let NormGrads { dx, dw, db, scratch } = NormGrads::new(op, &mut o);
            let (x, dy, w) = (o.input_view(0), o.input_view(1), o.weight(0));
            let c = o.input_width(0);
            norm::layer_norm_backward(pool, dx, dw, db, dy, x, w, eps, c, scratch);
        }
        OpKind::RmsNormGrad { eps, unit_offset } => {
            let NormGrads { dx, dw, scratch, .. } = NormGrads::new(op, &mut o);
            let (x, dy, w) = (o.input_view(0), o.input_view(1), o.weight(0));
            let offset = f32::from(unit_offset);
            norm::rms_norm_backward(pool, dx, dw, dy, x, w, eps, offset, w.len(), scratch);
        }
        OpKind::Rope { table, n_heads, head_dim, inverse } => {
            let RopeTable { inv_freq, scale } = &cx.rope_tables[table.0 as usize];
            let (y, positions, h, d) =
                (o.in_out(0, 0), o.input(1), n_heads as usize, head_dim as usize);
            rope::rope(pool, y, positions, inv_freq, *scale, h, d, inverse);
        }
        OpKind::Attention(spec) => attention(&mut o, cx, &spec),
        OpKind::AttentionGrad(spec) => attention_grad(&mut o, cx, &spec),
        OpKind::Gelu(kind) => activation::gelu_forward(pool, o.in_out(0, 0), gelu(kind)),
        OpKind::GeluGrad(kind) => {
            activation::gelu_backward(pool, o.in_out(0, 1), o.input_view(0), gelu(kind));
        }
        OpKind::Glu { gate, packed } => glu(pool, &mut o, gate, packed),
        OpKind::GluGrad { gate, packed } => glu_grad(pool, &mut o, gate, packed),
        OpKind::Scale { factor } => elementwise::scale(pool, o.in_out(0, 0), factor),
        OpKind::SoftCap { cap } => activation::soft_cap_forward(pool, o.in_out(0, 0), cap),
        OpKind::SoftCapGrad { cap } => {
            activation::soft_cap_backward(pool, o.in_out(0, 1), o.input_view(0), cap);
        }
        OpKind::Add => {
            // Addition commutes bit for bit, so either input may hand on its place.
            let (kept, other) = if o.in_place(0, 1) { (1, 0) } else { (0, 1) };
            elementwise::add(pool, o.in_out(0, kept), o.input_view(other));
        }
        OpKind::Dropout { p, site } => {
            let inputs = cx.inputs;
            let key = PhiloxKey { seed: inputs.seed, step: inputs.step as u32, site: site.0 };
            let (c, first) = (o.output_width(0), cx.first_token as usize);
            elementwise::dropout(pool, o.in_out(0, 0), c, p, key, first);
        }
        OpKind::CrossEntropy { soft_cap } => head_forward(&mut o, cx, soft_cap),
        OpKind::CrossEntropyTrain { soft_cap } => head_train(&mut o, cx, soft_cap),
        OpKind::EmbedGradRows => elementwise::copy(pool, o.sum_view(), o.input_view(0)),
        OpKind::EmbedScatter => {
            let (ids, rows, c) = (o.input(0), o.input_view(1), o.input_width(1));
            embed::embed_scatter(pool, o.sum(), ids, rows, c, o.scratch());
        }
        OpKind::SumSquares => {
            let scratch = o.scratch();
            o.output::<f64>(0)[0] = sum_squares(pool, o.input(0), scratch);
        }
        OpKind::ClipScale => {
            let parts = (0..op.n_inputs).map(|i| o.input::<f64>(i)[0]);
            let scale = clip_scale(parts, cx.inputs);
            o.output::<f32>(0)[0] = scale;
        }
        OpKind::AdamW => {
            let hyper = adamw_hyper(cx.inputs, op.decay, clip_factor(op, &o));
            let (w, m, v) = (o.master(), o.state(0), o.state(1));
            adamw(pool, w, o.input(0), m, v, &hyper);
        }
        OpKind::Sgd => {
            let decay = if op.decay { cx.inputs.hyper.weight_decay } else { 0.0 };
            let factor = clip_factor(op, &o);
            sgd(pool, o.master(), o.input(0), cx.inputs.lr, decay, factor);
        }
    }
}

/// `y = x W + b`.
fn linear(pool: &Pool, o: &mut Operands<'_>, layout: WeightLayout) {
    let (k, m) = (o.input_width(0), o.output_width(0));
    let x = o.input_view(0);
    let n = x.len() / k;
    let w = match layout {
        WeightLayout::OutIn => MatRef::new(o.weight(0), m, k).t(),
        WeightLayout::InOut => MatRef::new(o.weight(0), k, m),
    };
    let (y, bias) = (MatMut::new(o.output_view(0), n, m), o.weight_if_any(1));
    gemm(pool, y, MatRef::new(x, n, k), w, Start::Zero, bias, o.scratch());
}

/// `dx = dy W^T`.
fn linear_grad_input(pool: &Pool, o: &mut Operands<'_>, layout: WeightLayout) {
    let (m, k) = (o.input_width(0), o.output_width(0));
    let dy = o.input_view(0);
    let n = dy.len() / m;
    let w = match layout {
        WeightLayout::OutIn => MatRef::new(o.weight(0), m, k),
        WeightLayout::InOut => MatRef::new(o.weight(0), k, m).t(),
    };
    let dx = MatMut::new(o.output_view(0), n, k);
    gemm(pool, dx, MatRef::new(dy, n, m), w, Start::Zero, None, o.scratch());
}

/// `dW += x^T dy`, along ascending tokens from what is stored.
fn linear_grad_weight(pool: &Pool, o: &mut Operands<'_>, layout: WeightLayout) {
    let (k, m) = (o.input_width(0), o.input_width(1));
    let (x, dy) = (o.input_view(0), o.input_view(1));
    let n = x.len() / k;
    let (x, dy) = (MatRef::new(x, n, k), MatRef::new(dy, n, m));
    let (dw, scratch) = (o.sum(), o.scratch());
    match layout {
        WeightLayout::OutIn => {
            gemm(pool, MatMut::new(dw, m, k), dy.t(), x, Start::FromC, None, scratch);
        }
        WeightLayout::InOut => {
            gemm(pool, MatMut::new(dw, k, m), x.t(), dy, Start::FromC, None, scratch);
        }
    }
}

/// What the gradient of a norm writes.
struct NormGrads<'a> {
    dx: ViewMut<'a>,
    /// The sum, or scratch if the norm is frozen.
    dw: &'a mut [f32],
    db: Option<&'a mut [f32]>,
    scratch: &'a mut [f32],
}

impl<'a> NormGrads<'a> {
    fn new(op: &OpSpec, o: &mut Operands<'a>) -> Self {
        let (unused_dw, scratch) = o.scratch().split_at_mut(frozen_dw_elems(op));
        // Left from another op it might hold numbers that are slow to add to.
        unused_dw.fill(0.0);
        let dw = o.sum_if_any(0).unwrap_or(unused_dw);
        Self { dx: o.output_view(0), dw, db: o.sum_if_any(1), scratch }
    }
}

fn attention(o: &mut Operands<'_>, cx: &Context<'_>, spec: &AttentionSpec) {
    let [q, k, v] = heads(o, spec);
    let (y, lse, scratch) = (o.output_view(0), o.output(1), o.scratch());
    attention_forward(cx.pool, y, lse, q, k, v, cx.rows, attention_dims(spec), scratch);
}

fn attention_grad(o: &mut Operands<'_>, cx: &Context<'_>, spec: &AttentionSpec) {
    let [q, k, v] = heads(o, spec);
    let n = if spec.packed { 1 } else { 3 };
    let (y, lse, dy) = (o.input_view(n), o.input(n + 1), o.input_view(n + 2));
    let (offsets, widths, row_stride) = columns(spec);
    let [dq, dk, dv] = if spec.packed {
        HeadsMut::packed(o.output_view(0), row_stride, offsets, widths)
    } else {
        let heads = [spec.n_heads, spec.n_kv_heads, spec.n_kv_heads].map(|n| n as usize);
        [0, 1, 2].map(|i| HeadsMut::dense(o.output_view(i), heads[i], spec.head_dim as usize))
    };
    let (dims, scratch) = (attention_dims(spec), o.scratch());
    attention_backward(cx.pool, dq, dk, dv, dy, q, k, v, y, lse, cx.rows, dims, scratch);
}

/// q, k and v: three inputs, or three column ranges of one.
fn heads<'a>(o: &Operands<'a>, spec: &AttentionSpec) -> [HeadsRef<'a>; 3] {
    let (offsets, widths, row_stride) = columns(spec);
    if spec.packed {
        let data = o.input_view(0);
        offsets.map(|col_offset| HeadsRef { data, row_stride, col_offset })
    } else {
        [0, 1, 2].map(|i| HeadsRef { data: o.input_view(i), row_stride: widths[i], col_offset: 0 })
    }
}

/// First columns and widths of q, k and v where they are one matrix, and the width of that.
fn columns(spec: &AttentionSpec) -> ([usize; 3], [usize; 3], usize) {
    let (q, kv) = (spec.q_width() as usize, spec.kv_width() as usize);
    ([0, q, q + kv], [q, kv, kv], q + 2 * kv)
}

fn glu(pool: &Pool, o: &mut Operands<'_>, kind: Gate, packed: bool) {
    if packed {
        let (y, x, width) = (o.output_view(0), o.input_view(0), o.output_width(0));
        activation::glu_packed_forward(pool, y, x, width, gate(kind));
    } else {
        let y = InOut::separate(o.output_view(0), o.input_view(0));
        activation::glu_forward(pool, y, o.input_view(1), gate(kind));
    }
}

fn glu_grad(pool: &Pool, o: &mut Operands<'_>, kind: Gate, packed: bool) {
    if packed {
        let (dx, x, dy) = (o.output_view(0), o.input_view(0), o.input_view(1));
        let width = o.input_width(1);
        activation::glu_packed_backward(pool, dx, dy, x, width, gate(kind));
    } else {
        let (dgate, dup) = (o.in_out(0, 0), o.in_out(1, 1));
        activation::glu_backward(pool, dgate, dup, o.input_view(2), gate(kind));
    }
}

fn head_forward(o: &mut Operands<'_>, cx: &Context<'_>, soft_cap: Option<f32>) {
    let (x, targets, w) = (o.input_view(0), o.input(1), o.weight(0));
    let chunk = cx.n_tokens as usize;
    head::head_forward(cx.pool, o.output(0), x, w, targets, soft_cap, chunk, o.scratch());
}

fn head_train(o: &mut Operands<'_>, cx: &Context<'_>, soft_cap: Option<f32>) {
    let (loss, dx, dw, scratch) = (o.output(0), o.output_view(1), o.sum_if_any(0), o.scratch());
    let (x, targets, w) = (o.input_view(0), o.input(1), o.weight(0));
    let scale = cx.inputs.grad_scale * cx.inputs.loss_scale;
    let chunk = cx.n_tokens as usize;
    head::head_train(cx.pool, loss, dx, dw, x, w, targets, soft_cap, scale, chunk, scratch);
}

fn gelu(kind: GeluKind) -> activation::GeluKind {
    match kind {
        GeluKind::Tanh => activation::GeluKind::Tanh,
        GeluKind::Erf => activation::GeluKind::Erf,
    }
}

fn gate(kind: Gate) -> activation::Gate {
    match kind {
        Gate::Silu => activation::Gate::Silu,
        Gate::Gelu(kind) => activation::Gate::Gelu(gelu(kind)),
    }
}

/// `min(1, max_norm / (norm + 1e-6))` as PyTorch clips, over the loss scale: what the update
/// multiplies the scaled gradient with. The loss scale is a power of two, so it leaves no trace.
fn clip_scale(parts: impl Iterator<Item = f64>, inputs: &StepInputs<'_>) -> f32 {
    let loss_scale = f64::from(inputs.loss_scale);
    let norm = parts.sum::<f64>().sqrt() / loss_scale;
    let factor = f64::from(inputs.max_grad_norm) / (norm + 1e-6);
    // `f64::min` would turn a gradient that is not a number into a factor of 1.
    let clip = if factor > 1.0 { 1.0 } else { factor as f32 };
    (f64::from(clip) / loss_scale) as f32
}

/// What the update multiplies the gradient with: the clip scale, if the op reads one.
fn clip_factor(op: &OpSpec, o: &Operands<'_>) -> f32 {
    if op.n_inputs == 2 { o.input::<f32>(1)[0] } else { 1.0 }
}

/// The step's constants of AdamW; bias corrections in f64, where `beta^t` keeps its digits.
fn adamw_hyper(inputs: &StepInputs<'_>, decay: bool, grad_scale: f32) -> AdamwHyper {
    let hyper = inputs.hyper;
    let correction = |beta: f32| (1.0 - libm::pow(f64::from(beta), inputs.update as f64)) as f32;
    AdamwHyper {
        lr: inputs.lr,
        beta1: hyper.beta1,
        beta2: hyper.beta2,
        eps: hyper.eps,
        weight_decay: if decay { hyper.weight_decay } else { 0.0 },
        bias_correction1: correction(hyper.beta1),
        bias_correction2: correction(hyper.beta2),
        grad_scale,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_scale_leaves_no_trace_in_the_scaled_gradient() {
        for (norm, max_grad_norm) in [(3.7_f64, 1.0), (0.2, 1.0), (5.1, f32::INFINITY)] {
            let scale = |loss_scale: f32| {
                let inputs = StepInputs { loss_scale, max_grad_norm, ..StepInputs::forward(&[]) };
                let part = norm * f64::from(loss_scale);
                clip_scale(std::iter::once(part * part), &inputs)
            };
            let plain = scale(1.0);
            for power in [-20, -1, 3, 24] {
                let loss_scale = 2.0_f32.powi(power);
                assert_eq!(scale(loss_scale) * loss_scale, plain, "2^{power}, {norm}");
            }
        }
    }
}

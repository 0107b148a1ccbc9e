//! One call of one kernel, for a program that counts instructions: `cargo xtask bench instructions`.
//!
//! `kernel_count` prints the names, `kernel_count NAME` runs that kernel once inside a function of
//! its own ([`counted_region`]), so that nothing else is counted. One thread; sizes are small, odd
//! where an edge costs something, and never change, or counts could not be compared.
#![expect(clippy::print_stdout, reason = "it prints the names of its kernels")]

use half::bf16;
use ounce_kernels::activation::{Gate, GeluKind, gelu_backward, gelu_forward, glu_forward};
use ounce_kernels::attention::{
    AttentionDims, HeadsMut, HeadsRef, RowSpan, attention_backward,
    attention_backward_scratch_elems, attention_forward, attention_forward_scratch_elems,
};
use ounce_kernels::convert::round_bf16;
use ounce_kernels::elementwise;
use ounce_kernels::embed::embed_forward;
use ounce_kernels::gemm::{MatMut, MatRef, Start, gemm, gemm_scratch_elems};
use ounce_kernels::head::{head_scratch_elems, head_train};
use ounce_kernels::inout::InOut;
use ounce_kernels::master::MasterMut;
use ounce_kernels::norm::{layer_norm_backward, layer_norm_forward, rms_norm_forward};
use ounce_kernels::optim::{AdamwHyper, adamw, sum_squares, sum_squares_scratch_f64};
use ounce_kernels::philox::PhiloxKey;
use ounce_kernels::pool::Pool;
use ounce_kernels::rope::rope;
use ounce_kernels::view::{FloatType, View, ViewMut};

/// A kernel's name and what calls it, with everything it needs made before.
type Kernel = (&'static str, fn());

const KERNELS: &[Kernel] = &[
    ("gemm f32 forward", || product(FloatType::F32, false, true)),
    ("gemm f32 dX", || product(FloatType::F32, false, false)),
    ("gemm f32 dW", || product(FloatType::F32, true, false)),
    ("gemm bf16 forward", || product(FloatType::Bf16, false, true)),
    ("gemm bf16 dX", || product(FloatType::Bf16, false, false)),
    ("gemm bf16 dW", || product(FloatType::Bf16, true, false)),
    ("attention forward", || attention(false)),
    ("attention backward", || attention(true)),
    ("head train f32", || head(FloatType::F32)),
    ("head train bf16", || head(FloatType::Bf16)),
    ("layer norm forward", layer_norm),
    ("layer norm backward", layer_norm_grad),
    ("rms norm forward", rms_norm),
    ("gelu tanh forward", || gelu(GeluKind::Tanh)),
    ("gelu erf forward", || gelu(GeluKind::Erf)),
    ("gelu tanh backward", gelu_grad),
    ("swiglu forward", swiglu),
    ("rope", rotate),
    ("add", add),
    ("bias grad", bias_grad),
    ("dropout", dropout),
    ("embed", embed),
    ("adamw", update),
    ("sum of squares", norm_of_gradient),
];

fn main() {
    let Some(name) = std::env::args().nth(1) else {
        for (name, _) in KERNELS {
            println!("{name}");
        }
        return;
    };
    let found = KERNELS.iter().find(|(n, _)| *n == name);
    found.expect("the argument is the name of a kernel").1();
}

/// What is counted.
#[inline(never)]
fn counted_region(f: &mut dyn FnMut(&Pool), pool: &Pool) {
    f(pool);
}

fn count(mut f: impl FnMut(&Pool)) {
    counted_region(&mut f, &Pool::new(1));
}

/// Tokens, channels and words of what is not a product.
const N: usize = 192;
const C: usize = 320;
const V: usize = 1031;

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1013) as f32 / 1013.0 - 0.5).collect()
}

fn narrow(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| round_bf16(x)).collect()
}

/// Numbers as f32 and as bf16, of which a kernel takes one.
struct Both(Vec<f32>, Vec<bf16>);

impl Both {
    fn new(n: usize) -> Self {
        let wide = numbers(n);
        let narrow = narrow(&wide);
        Self(wide, narrow)
    }

    fn view(&self, float_type: FloatType) -> View<'_> {
        if float_type == FloatType::F32 { View::F32(&self.0) } else { View::Bf16(&self.1) }
    }

    fn view_mut(&mut self, float_type: FloatType) -> ViewMut<'_> {
        if float_type == FloatType::F32 {
            ViewMut::F32(&mut self.0)
        } else {
            ViewMut::Bf16(&mut self.1)
        }
    }
}

fn product(float_type: FloatType, a_transposed: bool, b_transposed: bool) {
    let (m, n, k) = (187, 261, 393);
    let (a, b, mut c) = (Both::new(m * k), Both::new(k * n), Both::new(m * n));
    let (a, b) = (a.view(float_type), b.view(float_type));
    let a = if a_transposed { MatRef::new(a, k, m).t() } else { MatRef::new(a, m, k) };
    let b = if b_transposed { MatRef::new(b, n, k).t() } else { MatRef::new(b, k, n) };
    // Gradients of weights are f32 sums that are added to.
    let (c_type, start) =
        if a_transposed { (FloatType::F32, Start::FromC) } else { (float_type, Start::Zero) };
    let mut scratch = vec![0.0; gemm_scratch_elems(m, n, k, c_type, 1)];
    count(|pool| {
        let c = MatMut::new(c.view_mut(c_type), m, n);
        gemm(pool, c, a, b, start, None, &mut scratch);
    });
}

fn attention(is_backward: bool) {
    let (n_heads, n_kv_heads, head_dim) = (4, 2, 64);
    let (scale, window, soft_cap) = (0.125, None, None);
    let dims = AttentionDims { n_heads, n_kv_heads, head_dim, scale, window, soft_cap };
    let rows = [RowSpan { start: 0, len: 150 }];
    let n = 192;
    let widths = [n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim];
    let offsets = [0, widths[0], widths[0] + widths[1]];
    let width = offsets[2] + widths[2];
    let (qkv, d_o) = (numbers(n * width), numbers(n * widths[0]));
    let data = View::F32(&qkv);
    let [q, k, v] = offsets.map(|col_offset| HeadsRef { data, row_stride: width, col_offset });
    let (mut o, mut lse, mut dqkv) = (d_o.clone(), vec![0.0; n * n_heads], qkv.clone());
    let scratch_elems =
        attention_forward_scratch_elems(dims, 1).max(attention_backward_scratch_elems(dims, n, 1));
    let mut scratch = vec![0.0; scratch_elems];
    let mut forward = |pool: &Pool, o: &mut [f32], scratch: &mut [f32]| {
        attention_forward(pool, o.into(), &mut lse, q, k, v, &rows, dims, scratch);
    };
    if !is_backward {
        return count(|pool| forward(pool, &mut o, &mut scratch));
    }
    forward(&Pool::new(1), &mut o, &mut scratch);
    count(|pool| {
        let [dq, dk, dv] = HeadsMut::packed(ViewMut::F32(&mut dqkv), width, offsets, widths);
        let (d_o, o) = (View::F32(&d_o), View::F32(&o));
        attention_backward(pool, dq, dk, dv, d_o, q, k, v, o, &lse, &rows, dims, &mut scratch);
    });
}

fn head(float_type: FloatType) {
    let (x, w, mut dx) = (Both::new(N * C), Both::new(V * C), Both::new(N * C));
    let targets: Vec<i32> = (0..N).map(|i| (i * 37 % V) as i32).collect();
    let (mut loss, mut dw) = (vec![0.0; N], vec![0.0; V * C]);
    let mut scratch = vec![0.0; head_scratch_elems(N, V, C, float_type, 1)];
    let (x, w) = (x.view(float_type), w.view(float_type));
    count(|pool| {
        let (dx, dw) = (dx.view_mut(float_type), Some(&mut dw[..]));
        head_train(pool, &mut loss, dx, dw, x, w, &targets, None, 1e-3, N, &mut scratch);
    });
}

fn layer_norm() {
    let (x, w, mut y) = (numbers(N * C), numbers(C), vec![0.0; N * C]);
    let (x, w) = (View::F32(&x), View::F32(&w));
    count(|pool| layer_norm_forward(pool, (&mut y).into(), x, w, Some(w), 1e-5, C));
}

fn layer_norm_grad() {
    let (x, dy, w, mut dx) = (numbers(N * C), numbers(N * C), numbers(C), vec![0.0; N * C]);
    let (mut dw, mut db, mut stats) = (vec![0.0; C], vec![0.0; C], vec![0.0; 2 * N]);
    let (x, dy, w) = (View::F32(&x), View::F32(&dy), View::F32(&w));
    count(|pool| {
        let db = Some(&mut db[..]);
        layer_norm_backward(pool, (&mut dx).into(), &mut dw, db, dy, x, w, 1e-5, C, &mut stats);
    });
}

fn rms_norm() {
    let (x, w, mut y) = (numbers(N * C), numbers(C), vec![0.0; N * C]);
    let (x, w) = (View::F32(&x), View::F32(&w));
    count(|pool| rms_norm_forward(pool, (&mut y).into(), x, w, 1e-5, 0.0, C));
}

fn gelu(kind: GeluKind) {
    let (x, mut y) = (numbers(N * C), vec![0.0; N * C]);
    count(|pool| gelu_forward(pool, InOut::separate(&mut y, &x), kind));
}

fn gelu_grad() {
    let (x, dy, mut dx) = (numbers(N * C), numbers(N * C), vec![0.0; N * C]);
    let x = View::F32(&x);
    count(|pool| gelu_backward(pool, InOut::separate(&mut dx, &dy), x, GeluKind::Tanh));
}

fn swiglu() {
    let (gate, up, mut y) = (numbers(N * C), numbers(N * C), vec![0.0; N * C]);
    let up = View::F32(&up);
    count(|pool| glu_forward(pool, InOut::separate(&mut y, &gate), up, Gate::Silu));
}

fn rotate() {
    let (x, mut y) = (numbers(N * C), vec![0.0; N * C]);
    let positions: Vec<i32> = (0..N as i32).collect();
    let freqs: Vec<f32> = (0..32).map(|i| 0.75f32.powi(i)).collect();
    count(|pool| {
        rope(pool, InOut::separate(&mut y, &x), &positions, &freqs, 1.0, C / 64, 64, false);
    });
}

fn add() {
    let (a, b, mut y) = (numbers(N * C), numbers(N * C), vec![0.0; N * C]);
    count(|pool| elementwise::add(pool, InOut::separate(&mut y, &a), View::F32(&b)));
}

fn bias_grad() {
    let (dy, mut db) = (numbers(N * C), vec![0.0; C]);
    count(|pool| elementwise::bias_grad(pool, &mut db, View::F32(&dy), C));
}

fn dropout() {
    let (x, mut y) = (numbers(N * C), vec![0.0; N * C]);
    let key = PhiloxKey { seed: 1, step: 2, site: 3 };
    count(|pool| elementwise::dropout(pool, InOut::separate(&mut y, &x), C, 0.1, key, 0));
}

fn embed() {
    let (table, mut y) = (numbers(V * C), vec![0.0; N * C]);
    let ids: Vec<i32> = (0..N).map(|i| (i * 37 % V) as i32).collect();
    count(|pool| embed_forward(pool, (&mut y).into(), &ids, View::F32(&table), C));
}

fn update() {
    let (mut w, gradient) = (numbers(N * C), numbers(N * C));
    let (mut m, mut v) = (vec![0.0; N * C], vec![0.0; N * C]);
    let hyper = AdamwHyper::default();
    count(|pool| adamw(pool, MasterMut::F32(&mut w), &gradient, &mut m, &mut v, &hyper));
}

fn norm_of_gradient() {
    let x = numbers(N * C);
    let mut sums = vec![0.0; sum_squares_scratch_f64(N * C)];
    count(|pool| {
        std::hint::black_box(sum_squares(pool, &x, &mut sums));
    });
}

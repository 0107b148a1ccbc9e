//! Causal attention with grouped heads, in tiles: never a T x T matrix.
//!
//! Shapes: N tokens, H query heads, K key-value heads (H a multiple of K), D head dim. Rows are
//! spans of the token axis; tokens attend within their span, to themselves and before.
//! Source: Dao et al. 2022 (arXiv:2205.14135), Dao 2023 (arXiv:2307.08691).

use crate::math::exp;
use crate::pool::{Pool, SharedMut, split};
use std::marker::PhantomData;

/// One row: tokens `start .. start + len` of the token axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowSpan {
    /// First token.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
}

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionDims {
    /// H.
    pub n_heads: usize,
    /// K, a divisor of H; query head `h` reads key-value head `h / (H / K)`.
    pub n_kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Multiplies `q k`, usually `1 / sqrt(D)`.
    pub scale: f32,
}

/// Heads that are read: element (token, head, d) is
/// `data[token * row_stride + col_offset + head * D + d]`.
#[derive(Clone, Copy, Debug)]
pub struct HeadsRef<'a> {
    /// The matrix of which the heads are columns.
    pub data: &'a [f32],
    /// Elements from one token to the next.
    pub row_stride: usize,
    /// Column of head 0.
    pub col_offset: usize,
}

impl HeadsRef<'_> {
    #[inline(always)]
    fn row(&self, token: usize, head: usize, head_dim: usize) -> &[f32] {
        &self.data[token * self.row_stride + self.col_offset + head * head_dim..][..head_dim]
    }
}

/// Heads that are written, laid out as in [`HeadsRef`].
#[derive(Debug)]
pub struct HeadsMut<'a> {
    ptr: *mut f32,
    len: usize,
    row_stride: usize,
    col_offset: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: as `&mut [f32]`, of which this is a set of columns that nobody else holds.
unsafe impl Send for HeadsMut<'_> {}
// SAFETY: threads write through `row`, whose callers promise disjoint rows.
unsafe impl Sync for HeadsMut<'_> {}

impl<'a> HeadsMut<'a> {
    /// Heads that are columns of `data` from `col_offset` on.
    pub fn new(data: &'a mut [f32], row_stride: usize, col_offset: usize) -> Self {
        let (ptr, len) = (data.as_mut_ptr(), data.len());
        Self { ptr, len, row_stride, col_offset, life: PhantomData }
    }

    /// Three column ranges `[offset, offset + width)` of one matrix: `dq`, `dk`, `dv` in `dqkv`.
    ///
    /// # Panics
    /// If the ranges overlap or leave a row.
    pub fn packed(
        data: &'a mut [f32],
        row_stride: usize,
        offsets: [usize; 3],
        widths: [usize; 3],
    ) -> [Self; 3] {
        for i in 0..3 {
            assert!(offsets[i] + widths[i] <= row_stride, "columns {i} lie within a row");
            for j in 0..i {
                let apart =
                    offsets[i] + widths[i] <= offsets[j] || offsets[j] + widths[j] <= offsets[i];
                assert!(apart, "columns {i} and {j} do not overlap");
            }
        }
        let (ptr, len) = (data.as_mut_ptr(), data.len());
        offsets.map(|col_offset| Self { ptr, len, row_stride, col_offset, life: PhantomData })
    }

    /// # Safety
    /// No two live rows may be the same, and head and head_dim stay within this matrix's columns.
    #[expect(clippy::mut_from_ref, reason = "handing out disjoint rows is this type's purpose")]
    unsafe fn row(&self, token: usize, head: usize, head_dim: usize) -> &mut [f32] {
        let at = token * self.row_stride + self.col_offset + head * head_dim;
        assert!(at + head_dim <= self.len, "head {head} of token {token} lies within the data");
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(at), head_dim) }
    }
}

/// Scratch of [`attention_forward`] in elements.
pub fn attention_forward_scratch_elems(dims: AttentionDims, n_threads: usize) -> usize {
    n_threads * dims.head_dim
}

/// Scratch of [`attention_backward`] in elements.
pub fn attention_backward_scratch_elems(dims: AttentionDims, n_threads: usize) -> usize {
    n_threads * dims.head_dim * 2
}

/// `o = softmax(scale q k^T, causal) v` per row and head, and `lse = log(sum(exp(scale q k)))`.
///
/// # Shapes
/// `o` (N, H, D), `lse` (N, H), `q` (N, H, D), `k`, `v` (N, K, D). `rows` ascend and do not
/// overlap; tokens outside of them get zeros.
pub fn attention_forward(
    pool: &Pool,
    o: &mut [f32],
    lse: &mut [f32],
    q: HeadsRef<'_>,
    k: HeadsRef<'_>,
    v: HeadsRef<'_>,
    rows: &[RowSpan],
    dims: AttentionDims,
    _scratch: &mut [f32],
) {
    let AttentionDims { n_heads: h, head_dim: d, scale, .. } = dims;
    let group = h / dims.n_kv_heads;
    o.fill(0.0);
    lse.fill(0.0);
    let (o, lse) = (SharedMut::new(o), SharedMut::new(lse));
    pool.run(&|thread_idx| {
        for head in split(h, pool.n_threads(), thread_idx) {
            for row in rows {
                for i in row.start..row.start + row.len {
                    // SAFETY: every thread has its own heads.
                    let (o, lse) = unsafe {
                        (
                            o.range((i * h + head) * d..(i * h + head + 1) * d),
                            lse.range(i * h + head..i * h + head + 1),
                        )
                    };
                    let q_i = q.row(i, head, d);
                    let score = |j: usize| scale * dot(q_i, k.row(j, head / group, d));
                    let max = (row.start..=i).map(score).fold(f32::NEG_INFINITY, f32::max);
                    let sum: f32 = (row.start..=i).map(|j| exp(score(j) - max)).sum();
                    for j in row.start..=i {
                        let p = exp(score(j) - max) / sum;
                        axpy(o, p, v.row(j, head / group, d));
                    }
                    lse[0] = max + sum.ln();
                }
            }
        }
    });
}

/// Gradients of [`attention_forward`]: overwrites `dq`, `dk`, `dv`.
///
/// # Shapes
/// `dq` (N, H, D), `dk`, `dv` (N, K, D), `d_o`, `o` (N, H, D) dense, `lse` (N, H).
pub fn attention_backward(
    pool: &Pool,
    dq: HeadsMut<'_>,
    dk: HeadsMut<'_>,
    dv: HeadsMut<'_>,
    d_o: &[f32],
    q: HeadsRef<'_>,
    k: HeadsRef<'_>,
    v: HeadsRef<'_>,
    o: &[f32],
    lse: &[f32],
    rows: &[RowSpan],
    dims: AttentionDims,
    _scratch: &mut [f32],
) {
    let AttentionDims { n_heads: h, n_kv_heads, head_dim: d, scale } = dims;
    let group = h / n_kv_heads;
    let n_tokens = lse.len() / h;
    pool.run(&|thread_idx| {
        for kv in split(n_kv_heads, pool.n_threads(), thread_idx) {
            for n in 0..n_tokens {
                // SAFETY: every thread has its own heads; one row at a time.
                unsafe {
                    dk.row(n, kv, d).fill(0.0);
                    dv.row(n, kv, d).fill(0.0);
                    (kv * group..(kv + 1) * group).for_each(|head| dq.row(n, head, d).fill(0.0));
                }
            }
            for head in kv * group..(kv + 1) * group {
                for row in rows {
                    for i in row.start..row.start + row.len {
                        let at = (i * h + head) * d;
                        let (d_o, o) = (&d_o[at..at + d], &o[at..at + d]);
                        let delta = dot(d_o, o);
                        for j in row.start..=i {
                            let p =
                                exp(scale * dot(q.row(i, head, d), k.row(j, kv, d))
                                    - lse[i * h + head]);
                            let ds = p * (dot(d_o, v.row(j, kv, d)) - delta) * scale;
                            // SAFETY: as above.
                            unsafe {
                                axpy(dv.row(j, kv, d), p, d_o);
                                axpy(dk.row(j, kv, d), ds, q.row(i, head, d));
                                axpy(dq.row(i, head, d), ds, k.row(j, kv, d));
                            }
                        }
                    }
                }
            }
        }
    });
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |sum, (&a, &b)| a.mul_add(b, sum))
}

fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = a.mul_add(x, *y);
    }
}

//! The tiled attention against the definition in f64, and its bits against themselves.

use super::*;
use crate::pool::Pool;
use crate::testing::{Stored, assert_close, noise};
use crate::tier::{Tier, set_tier};
use crate::view::FloatType;

const GAP: f32 = 9.0;

/// A problem: q, k and v are columns of one matrix.
#[derive(Clone)]
struct Case {
    dims: AttentionDims,
    rows: Vec<RowSpan>,
    n_tokens: usize,
    qkv: Vec<f32>,
    d_o: Vec<f32>,
    /// How all but `lse` is stored.
    float_type: FloatType,
    /// Whether the kernels see one matrix, or three.
    packed: bool,
}

/// Everything the two kernels write, widened.
#[derive(PartialEq, Debug)]
struct Output {
    o: Vec<f32>,
    lse: Vec<f32>,
    dqkv: Vec<f32>,
}

impl Case {
    fn new(n_heads: usize, n_kv_heads: usize, head_dim: usize, rows: &[(usize, usize)]) -> Self {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let rows: Vec<_> = rows.iter().map(|&(start, len)| RowSpan { start, len }).collect();
        let n_tokens = rows.last().map_or(0, |row| row.start + row.len) + 5;
        let width = (n_heads + 2 * n_kv_heads) * head_dim;
        Self {
            dims: AttentionDims {
                n_heads,
                n_kv_heads,
                head_dim,
                scale,
                window: None,
                soft_cap: None,
            },
            rows,
            n_tokens,
            qkv: noise(n_tokens * width, 1).iter().map(|x| 2.0 * x).collect(),
            d_o: noise(n_tokens * n_heads * head_dim, 2),
            float_type: FloatType::F32,
            packed: true,
        }
    }

    fn with(mut self, window: Option<usize>, soft_cap: Option<f32>) -> Self {
        self.dims = AttentionDims { window, soft_cap, ..self.dims };
        self
    }

    /// The same problem in 16 bits, and in f32 on the numbers that remain.
    fn rounded(&self, float_type: FloatType) -> (Self, Self) {
        let keep = |x: &[f32]| Stored::new(x, float_type).wide();
        let in_f32 = Self { qkv: keep(&self.qkv), d_o: keep(&self.d_o), ..self.clone() };
        (Self { float_type, ..in_f32.clone() }, in_f32)
    }

    /// Columns of q, k, v and the row stride.
    fn columns(&self) -> ([usize; 3], [usize; 3], usize) {
        let AttentionDims { n_heads, n_kv_heads, head_dim, .. } = self.dims;
        let widths = [n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim];
        ([0, widths[0], widths[0] + widths[1]], widths, widths.iter().sum())
    }

    /// Columns of q, k or v of a matrix like `qkv`, as a matrix.
    fn part(&self, qkv: &[f32], i: usize) -> Vec<f32> {
        let (offsets, widths, row_stride) = self.columns();
        let columns = offsets[i]..offsets[i] + widths[i];
        qkv.chunks_exact(row_stride).flat_map(|row| &row[columns.clone()]).copied().collect()
    }

    fn run(&self, pool: &Pool) -> Output {
        self.run_rounding_o(pool, FloatType::F32)
    }

    /// Runs both kernels; the backward gets `o` rounded to `o_type`.
    fn run_rounding_o(&self, pool: &Pool, o_type: FloatType) -> Output {
        let (offsets, widths, row_stride) = self.columns();
        let stored = |x: &[f32]| Stored::new(x, self.float_type);
        let (whole, d_o) = (stored(&self.qkv), stored(&self.d_o));
        let parts = [0, 1, 2].map(|i| stored(&self.part(&self.qkv, i)));
        let [q, k, v] = [0, 1, 2].map(|i| {
            if self.packed {
                HeadsRef { data: whole.view(), row_stride, col_offset: offsets[i] }
            } else {
                HeadsRef { data: parts[i].view(), row_stride: widths[i], col_offset: 0 }
            }
        });
        let n_out = self.n_tokens * self.dims.n_heads;
        let mut o = stored(&vec![GAP; n_out * self.dims.head_dim]);
        let mut lse = vec![GAP; n_out];
        let n_threads = pool.n_threads();
        let (dims, rows) = (self.dims, &self.rows);
        let mut scratch = vec![f32::NAN; attention_forward_scratch_elems(dims, n_threads)];
        attention_forward(pool, o.view_mut(), &mut lse, q, k, v, rows, dims, &mut scratch);
        let o_read = stored(&Stored::new(&o.wide(), o_type).wide());
        let (o_view, d_o) = (o_read.view(), d_o.view());
        let backward = |[dq, dk, dv]: [HeadsMut<'_>; 3]| {
            let needed = attention_backward_scratch_elems(dims, self.n_tokens, n_threads);
            let scratch = &mut vec![f32::NAN; needed];
            attention_backward(pool, dq, dk, dv, d_o, q, k, v, o_view, &lse, rows, dims, scratch);
        };
        let mut dqkv = stored(&vec![GAP; self.qkv.len()]);
        if self.packed {
            backward(HeadsMut::packed(dqkv.view_mut(), row_stride, offsets, widths));
            return Output { o: o.wide(), dqkv: dqkv.wide(), lse };
        }
        let mut grads = [0, 1, 2].map(|i| stored(&vec![GAP; self.n_tokens * widths[i]]));
        let [dq, dk, dv] = grads.each_mut();
        let heads = [(dq, dims.n_heads), (dk, dims.n_kv_heads), (dv, dims.n_kv_heads)];
        backward(heads.map(|(grad, n)| HeadsMut::dense(grad.view_mut(), n, dims.head_dim)));
        let [dq, dk, dv] = grads.map(|grad| grad.wide());
        let tokens = dq.chunks_exact(widths[0]).zip(dk.chunks_exact(widths[1]));
        let tokens = tokens.zip(dv.chunks_exact(widths[2]));
        let dqkv = tokens.flat_map(|((dq, dk), dv)| [dq, dk, dv].concat()).collect();
        Output { o: o.wide(), lse, dqkv }
    }

    /// The definition, one query at a time in f64: (o, lse, dqkv).
    fn reference(&self) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let AttentionDims { n_heads: h, n_kv_heads, head_dim: d, scale, window, soft_cap } =
            self.dims;
        // A score and its slope.
        let score = |x: f64| match soft_cap.map(f64::from) {
            None => (f64::from(scale) * x, f64::from(scale)),
            Some(cap) => {
                let t = (f64::from(scale) * x / cap).tanh();
                (cap * t, f64::from(scale) * (1.0 - t * t))
            }
        };
        let (offsets, _, stride) = self.columns();
        let at = |part: usize, token: usize, head: usize| token * stride + offsets[part] + head * d;
        let x = |i: usize| f64::from(self.qkv[i]);
        let dot = |a: usize, b: usize| (0..d).map(|c| x(a + c) * x(b + c)).sum::<f64>();
        let mut o = vec![0.0; self.n_tokens * h * d];
        let mut lse = vec![0.0; self.n_tokens * h];
        let mut dqkv = vec![0.0; self.qkv.len()];
        for row in &self.rows {
            for i in row.start..row.start + row.len {
                for head in 0..h {
                    let kv = head / (h / n_kv_heads);
                    let q = at(0, i, head);
                    let first = (i + 1).saturating_sub(window.unwrap_or(usize::MAX)).max(row.start);
                    let scores: Vec<(f64, f64)> =
                        (first..=i).map(|j| score(dot(q, at(1, j, kv)))).collect();
                    let sum: f64 = scores.iter().map(|s| s.0.exp()).sum();
                    lse[i * h + head] = sum.ln();
                    let p: Vec<f64> = scores.iter().map(|s| s.0.exp() / sum).collect();
                    let out = (i * h + head) * d;
                    for (j, p) in (first..).zip(&p) {
                        (0..d).for_each(|c| o[out + c] += p * x(at(2, j, kv) + c));
                    }
                    let d_o = |c: usize| f64::from(self.d_o[out + c]);
                    let delta: f64 = (0..d).map(|c| d_o(c) * o[out + c]).sum();
                    for ((j, p), (_, slope)) in (first..).zip(&p).zip(&scores) {
                        let (k, v) = (at(1, j, kv), at(2, j, kv));
                        let dp: f64 = (0..d).map(|c| d_o(c) * x(v + c)).sum();
                        let ds = p * (dp - delta) * slope;
                        for c in 0..d {
                            dqkv[v + c] += p * d_o(c);
                            dqkv[k + c] += ds * x(q + c);
                            dqkv[q + c] += ds * x(k + c);
                        }
                    }
                }
            }
        }
        (o, lse, dqkv)
    }
}

/// Odd lengths, gaps, groups, head dims that do not fill a register tile. The tolerance covers
/// f32 sums of a few hundred terms of size one.
#[test]
fn outputs_and_gradients_agree_with_the_definition_in_f64() {
    for case in [
        Case::new(2, 2, 16, &[(0, 1), (64, 70)]),
        Case::new(4, 2, 40, &[(0, 64), (64, 129), (256, 63)]),
        Case::new(3, 1, 64, &[(3, 330)]),
        Case::new(2, 1, 40, &[(0, 1), (64, 300)]).with(Some(1), None),
        Case::new(4, 2, 24, &[(0, 330), (384, 70)]).with(Some(64), Some(1.5)),
        Case::new(2, 2, 80, &[(0, 410)]).with(Some(100), None),
        Case::new(2, 1, 96, &[(0, 200)]).with(None, Some(0.7)),
    ] {
        let got = case.run(&Pool::new(2));
        let (o, lse, dqkv) = case.reference();
        assert_close(&got.o, &o, 5e-6);
        assert_close(&got.lse, &lse, 5e-6);
        assert_close(&got.dqkv, &dqkv, 5e-5);
    }
}

/// One pass or two, whichever thread takes a block, whichever tier: one result.
#[test]
fn threads_tiers_and_passes_do_not_change_the_bits() {
    assert!(
        super::backward::one_pass_is_cheaper(4, 2) && !super::backward::one_pass_is_cheaper(4, 7)
    );
    let case = || Case::new(4, 2, 48, &[(0, 300), (320, 65)]);
    for case in [case(), case().with(Some(130), Some(2.0))] {
        let want = case.run(&Pool::new(1));
        for n_threads in [2, 3, 7] {
            assert!(case.run(&Pool::new(n_threads)) == want, "{n_threads} threads");
        }
        for tier in Tier::available() {
            set_tier(Some(tier));
            assert!(case.run(&Pool::new(2)) == want, "tier {tier}");
        }
        set_tier(None);
    }
}

/// Both types and layouts, one pass and two, odd sizes, gaps, groups, windows and soft caps.
#[test]
fn in_16_bits_everything_is_the_rounded_f32_result_of_the_same_numbers() {
    for case in [
        Case::new(1, 1, 16, &[(0, 1), (64, 70)]),
        Case::new(6, 2, 40, &[(0, 64), (64, 129), (256, 63)]),
        Case::new(3, 1, 64, &[(3, 330)]).with(Some(100), None),
        Case::new(4, 4, 24, &[(0, 270), (320, 70)]).with(Some(64), Some(1.5)),
        Case::new(4, 2, 80, &[(5, 150)]).with(None, Some(0.7)),
    ] {
        for float_type in [FloatType::Bf16, FloatType::F16] {
            let (narrow, wide) = case.rounded(float_type);
            let want = wide.run_rounding_o(&Pool::new(1), float_type);
            let round = |x: &[f32]| Stored::new(x, float_type).wide();
            let want = Output { o: round(&want.o), lse: want.lse, dqkv: round(&want.dqkv) };
            for (n_threads, packed) in [(1, false), (2, true), (5, false), (7, true)] {
                let case = Case { packed, ..narrow.clone() };
                let got = case.run(&Pool::new(n_threads));
                assert!(got == want, "{float_type:?}, {n_threads} threads, {:?}", case.dims);
            }
        }
    }
}

#[test]
fn one_matrix_or_three_give_the_same_bits() {
    let packed = Case::new(4, 2, 40, &[(0, 64), (64, 129)]);
    let want = packed.run(&Pool::new(2));
    let apart = Case { packed: false, ..packed };
    assert!(apart.run(&Pool::new(2)) == want);
}

/// Windows of every length around the tiles' edges: one key too many or too few would show.
#[test]
fn a_window_sees_exactly_its_keys() {
    for window in [2, 63, 64, 65, 66, 127, 128, 129, 191, 193] {
        let case = Case::new(1, 1, 16, &[(0, 200)]).with(Some(window), None);
        let got = case.run(&Pool::new(1));
        let (o, lse, dqkv) = case.reference();
        assert_close(&got.o, &o, 5e-6);
        assert_close(&got.lse, &lse, 5e-6);
        assert_close(&got.dqkv, &dqkv, 5e-5);
    }
}

/// Scores so far apart that all of a query's attention is on its best key, and so large that they round to whole
/// thousands.
#[test]
fn the_best_key_takes_all_however_large_the_scores_are() {
    let mut case = Case::new(2, 1, 32, &[(0, 150)]);
    let (width, d) = (4 * 32, 32);
    for token in case.qkv.chunks_exact_mut(width) {
        // Queries and keys, not values.
        token[..3 * d].iter_mut().for_each(|x| *x *= 1e5);
    }
    let got = case.run(&Pool::new(2));
    let x = |token: usize, col: usize| case.qkv[token * width + col];
    for i in 0..150 {
        for head in 0..2 {
            let score = |j: &usize| {
                let terms =
                    (0..d).map(|c| f64::from(x(i, head * d + c)) * f64::from(x(*j, 2 * d + c)));
                terms.sum::<f64>()
            };
            let best = (0..=i).max_by(|a, b| score(a).total_cmp(&score(b))).unwrap();
            let value = &case.qkv[best * width + 3 * d..][..d];
            assert_eq!(&got.o[(i * 2 + head) * d..][..d], value, "query {i}, key {best}");
        }
    }
    assert!(got.dqkv[..150 * width].iter().all(|x| x.is_finite()));
}

#[test]
fn a_window_as_long_as_the_row_changes_no_bit() {
    let whole = Case::new(2, 1, 32, &[(0, 150)]);
    let want = whole.run(&Pool::new(2));
    let windowed = whole.with(Some(150), None);
    assert!(windowed.run(&Pool::new(2)) == want);
}

#[test]
fn a_row_gives_the_same_bits_wherever_it_lies() {
    let alone = Case::new(2, 1, 32, &[(0, 200)]);
    let want = alone.run(&Pool::new(2));
    let mut shifted = Case::new(2, 1, 32, &[(0, 64), (128, 200)]);
    let width = 4 * 32;
    shifted.qkv[128 * width..328 * width].copy_from_slice(&alone.qkv[..200 * width]);
    shifted.d_o[128 * 64..328 * 64].copy_from_slice(&alone.d_o[..200 * 64]);
    let got = shifted.run(&Pool::new(2));
    assert_eq!(got.o[128 * 64..328 * 64], want.o[..200 * 64]);
    assert_eq!(got.dqkv[128 * width..328 * width], want.dqkv[..200 * width]);
}

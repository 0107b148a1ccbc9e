//! Layer norm and RMS norm, forward and backward.
//!
//! Idea: a row's statistics are two or three cheap passes over a row that is in L1, so backward
//! recomputes them from `x` and saves nothing. N tokens, C channels.
//!
//! Operands stored in 16 bits are widened block by block; each pass over a row widens again, which
//! costs less than the memory it reads.
//!
//! Invariants: a row's sums go over 16 fixed lanes and then a fixed tree, so they do not depend on
//! threads or vector width. `dw` and `db` are one sequential f32 sum per column along ascending
//! tokens, started from what is stored; threads split columns. Cutting the tokens into several
//! calls therefore changes nothing.
//!
//! Sources: `[Ba16]` (layer norm), `[ZhangSennrich19]` (RMS norm).

use crate::inout::load_all;
use crate::math::{LANES, add_to_lanes, fold_lanes};
use crate::pool::{Pool, SharedMut, split_by};
use crate::view::{BLOCK, View, ViewMut, blocks};

/// Where a block of 16-bit numbers is widened.
type Block = [f32; BLOCK];

/// Rows that a thread takes at least.
const ROW_GRANULE: usize = 4;
/// Columns that a thread takes at least: one cache line.
const COL_GRANULE: usize = 16;

/// `y = (x - mean(x)) / sqrt(var(x) + eps) * w + b`, per token.
///
/// # Shapes
/// `x`, `y` (N, C); `w`, `b` (C); `n_channels` is C.
pub fn layer_norm_forward(
    pool: &Pool,
    y: ViewMut<'_>,
    x: View<'_>,
    w: View<'_>,
    b: Option<View<'_>>,
    eps: f32,
    n_channels: usize,
) {
    assert_shapes(y.len(), x, w, n_channels);
    assert!(b.is_none_or(|b| b.len() == n_channels), "length of b");
    pool.split_view_rows(usize::MAX, y, n_channels, ROW_GRANULE, |rows, y| {
        layer_norm_rows(y, x.slice(rows.start * n_channels..rows.end * n_channels), w, b, eps);
    });
}

/// `y = x / sqrt(mean(x^2) + eps) * (offset + w)`, per token, or per head: a row is what `w` is as
/// wide as.
///
/// # Shapes
/// `x`, `y` (N, C); `w` (C); `n_channels` is C.
pub fn rms_norm_forward(
    pool: &Pool,
    y: ViewMut<'_>,
    x: View<'_>,
    w: View<'_>,
    eps: f32,
    offset: f32,
    n_channels: usize,
) {
    assert_shapes(y.len(), x, w, n_channels);
    pool.split_view_rows(usize::MAX, y, n_channels, ROW_GRANULE, |rows, y| {
        rms_norm_rows(y, x.slice(rows.start * n_channels..rows.end * n_channels), w, eps, offset);
    });
}

/// Scratch of [`layer_norm_backward`] in elements: mean and 1/std of every token.
pub fn layer_norm_backward_scratch_elems(n_tokens: usize, _n_threads: usize) -> usize {
    2 * n_tokens
}

/// Scratch of [`rms_norm_backward`] in elements: 1/rms of every token.
pub fn rms_norm_backward_scratch_elems(n_tokens: usize, _n_threads: usize) -> usize {
    2 * n_tokens
}

/// Gradients of [`layer_norm_forward`]: overwrites `dx`, adds to `dw` and `db`.
///
/// # Shapes
/// `dx`, `dy`, `x` (N, C); `dw`, `db`, `w` (C).
/// # Memory
/// [`layer_norm_backward_scratch_elems`] elements.
pub fn layer_norm_backward(
    pool: &Pool,
    dx: ViewMut<'_>,
    dw: &mut [f32],
    db: Option<&mut [f32]>,
    dy: View<'_>,
    x: View<'_>,
    w: View<'_>,
    eps: f32,
    n_channels: usize,
    scratch: &mut [f32],
) {
    assert!(db.as_ref().is_none_or(|db| db.len() == n_channels), "length of db");
    backward(pool, dx, dw, db, dy, x, w, n_channels, scratch, |dx, stats, dy, x, w| {
        layer_norm_dx_rows(dx, stats, dy, x, w, eps);
    });
}

/// Gradients of [`rms_norm_forward`]: overwrites `dx`, adds to `dw`.
///
/// # Shapes
/// `dx`, `dy`, `x` (N, C); `dw`, `w` (C).
/// # Memory
/// [`rms_norm_backward_scratch_elems`] elements.
pub fn rms_norm_backward(
    pool: &Pool,
    dx: ViewMut<'_>,
    dw: &mut [f32],
    dy: View<'_>,
    x: View<'_>,
    w: View<'_>,
    eps: f32,
    offset: f32,
    n_channels: usize,
    scratch: &mut [f32],
) {
    backward(pool, dx, dw, None, dy, x, w, n_channels, scratch, |dx, stats, dy, x, w| {
        rms_norm_dx_rows(dx, stats, dy, x, w, eps, offset);
    });
}

fn assert_shapes(y_len: usize, x: View<'_>, w: View<'_>, n_channels: usize) {
    assert_eq!(y_len, x.len(), "output and x have the same length");
    assert_eq!(w.len(), n_channels, "length of w");
    assert!(x.len().is_multiple_of(n_channels), "x is whole tokens");
}

/// Both backward passes: first rows (dx, and each row's statistics into scratch), then columns.
fn backward(
    pool: &Pool,
    dx: ViewMut<'_>,
    dw: &mut [f32],
    db: Option<&mut [f32]>,
    dy: View<'_>,
    x: View<'_>,
    w: View<'_>,
    n_channels: usize,
    scratch: &mut [f32],
    dx_rows: impl Fn(ViewMut<'_>, &mut [f32], View<'_>, View<'_>, View<'_>) + Sync,
) {
    assert_shapes(dx.len(), x, w, n_channels);
    assert_eq!(dy.len(), x.len(), "length of dy");
    assert_eq!(dw.len(), n_channels, "length of dw");
    let stats = &mut scratch[..2 * (x.len() / n_channels)];
    let shared_stats = SharedMut::new(stats);
    pool.split_view_rows(usize::MAX, dx, n_channels, ROW_GRANULE, |rows, dx| {
        let elems = rows.start * n_channels..rows.end * n_channels;
        // SAFETY: `split_view_rows` hands every row to one thread.
        let stats = unsafe { shared_stats.range(2 * rows.start..2 * rows.end) };
        dx_rows(dx, stats, dy.slice(elems.clone()), x.slice(elems), w);
    });
    let has_db = db.is_some();
    let (shared_dw, shared_db) = (SharedMut::new(dw), SharedMut::new(db.unwrap_or_default()));
    pool.run(&|thread_idx| {
        let cols = split_by(n_channels, COL_GRANULE, pool.n_threads(), thread_idx);
        // SAFETY: every thread has its own columns.
        let dw = unsafe { shared_dw.range(cols.clone()) };
        // SAFETY: as above; without db the range is empty.
        let db = unsafe { shared_db.range(if has_db { cols.clone() } else { 0..0 }) };
        column_sums(dw, db, stats, dy, x, cols.start, n_channels);
    });
}

tiered! {
    fn layer_norm_rows(y: ViewMut<'_>, x: View<'_>, w: View<'_>, b: Option<View<'_>>, eps: f32) {
        let (mut y, n) = (y, w.len());
        let (mut bufs, mut buf_b, mut buf_y) = ([[0.0; BLOCK]; 2], [0.0; BLOCK], [0.0; BLOCK]);
        for row in (0..x.len()).step_by(n) {
            let x = x.slice(row..row + n);
            let (mean, rstd) = mean_rstd(x, eps, &mut bufs);
            for cols in blocks(0..n) {
                let [x, w] = load_all([x, w], cols.clone(), &mut bufs);
                let y = y.begin(row + cols.start..row + cols.end, &mut buf_y);
                if let Some(b) = b {
                    let b = b.load(cols, &mut buf_b);
                    for (((y, &x), &w), &b) in y.out.iter_mut().zip(x).zip(w).zip(b) {
                        *y = ((x - mean) * rstd).mul_add(w, b);
                    }
                } else {
                    for ((y, &x), &w) in y.out.iter_mut().zip(x).zip(w) {
                        *y = (x - mean) * rstd * w;
                    }
                }
                y.end();
            }
        }
    }
}

tiered! {
    fn rms_norm_rows(y: ViewMut<'_>, x: View<'_>, w: View<'_>, eps: f32, offset: f32) {
        let (mut y, n) = (y, w.len());
        let (mut bufs, mut buf_y) = ([[0.0; BLOCK]; 2], [0.0; BLOCK]);
        for row in (0..x.len()).step_by(n) {
            let x = x.slice(row..row + n);
            let rrms = reciprocal_rms(x, eps, &mut bufs);
            for cols in blocks(0..n) {
                let [x, w] = load_all([x, w], cols.clone(), &mut bufs);
                let y = y.begin(row + cols.start..row + cols.end, &mut buf_y);
                for ((y, &x), &w) in y.out.iter_mut().zip(x).zip(w) {
                    *y = x * rrms * (offset + w);
                }
                y.end();
            }
        }
    }
}

tiered! {
    /// With `x̂ = (x - mean) rstd` and `g = dy w`: `dx = rstd (g - mean(g) - x̂ mean(g x̂))`.
    fn layer_norm_dx_rows(dx: ViewMut<'_>, stats: &mut [f32], dy: View<'_>, x: View<'_>, w: View<'_>, eps: f32) {
        let (mut dx, n) = (dx, w.len());
        let (mut bufs, mut buf_dx) = ([[0.0; BLOCK]; 3], [0.0; BLOCK]);
        for (row, stats) in (0..x.len()).step_by(n).zip(stats.chunks_exact_mut(2)) {
            let [dy, x] = [dy, x].map(|v| v.slice(row..row + n));
            let (mean, rstd) = mean_rstd(x, eps, &mut bufs);
            let mean_g = row_sum([dy, w], &mut bufs, |[dy, w]| dy * w) / n as f32;
            let mean_gx = row_sum([dy, w, x], &mut bufs, |[dy, w, x]| dy * w * ((x - mean) * rstd));
            let mean_gx = mean_gx / n as f32;
            for cols in blocks(0..n) {
                let [dy, x, w] = load_all([dy, x, w], cols.clone(), &mut bufs);
                let dx = dx.begin(row + cols.start..row + cols.end, &mut buf_dx);
                for (((dx, &dy), &x), &w) in dx.out.iter_mut().zip(dy).zip(x).zip(w) {
                    let x_hat = (x - mean) * rstd;
                    *dx = rstd * (-x_hat).mul_add(mean_gx, dy.mul_add(w, -mean_g));
                }
                dx.end();
            }
            stats.copy_from_slice(&[mean, rstd]);
        }
    }
}

tiered! {
    /// As the layer norm without the mean; stores 0 as the mean, so that the columns are the same.
    fn rms_norm_dx_rows(
        dx: ViewMut<'_>,
        stats: &mut [f32],
        dy: View<'_>,
        x: View<'_>,
        w: View<'_>,
        eps: f32,
        offset: f32,
    ) {
        let (mut dx, n) = (dx, w.len());
        let (mut bufs, mut buf_dx) = ([[0.0; BLOCK]; 3], [0.0; BLOCK]);
        for (row, stats) in (0..x.len()).step_by(n).zip(stats.chunks_exact_mut(2)) {
            let [dy, x] = [dy, x].map(|v| v.slice(row..row + n));
            let rrms = reciprocal_rms(x, eps, &mut bufs);
            let mean_gx = row_sum([dy, w, x], &mut bufs, |[dy, w, x]| {
                dy * (offset + w) * (x * rrms)
            }) / n as f32;
            for cols in blocks(0..n) {
                let [dy, x, w] = load_all([dy, x, w], cols.clone(), &mut bufs);
                let dx = dx.begin(row + cols.start..row + cols.end, &mut buf_dx);
                for (((dx, &dy), &x), &w) in dx.out.iter_mut().zip(dy).zip(x).zip(w) {
                    *dx = rrms * (-(x * rrms)).mul_add(mean_gx, dy * (offset + w));
                }
                dx.end();
            }
            stats.copy_from_slice(&[0.0, rrms]);
        }
    }
}

tiered! {
    /// Adds `dy x̂` to `dw` and `dy` to `db` (when it is there), tokens ascending, for the columns
    /// from `first_col` on.
    fn column_sums(
        dw: &mut [f32],
        db: &mut [f32],
        stats: &[f32],
        dy: View<'_>,
        x: View<'_>,
        first_col: usize,
        n_channels: usize,
    ) {
        let mut bufs = [[0.0; BLOCK]; 2];
        for cols in blocks(0..dw.len()) {
            let dw = &mut dw[cols.clone()];
            let db = if db.is_empty() { &mut [] } else { &mut db[cols.clone()] };
            for (token, stats) in stats.chunks_exact(2).enumerate() {
                let (mean, rstd) = (stats[0], stats[1]);
                let at = token * n_channels + first_col;
                let [dy, x] = load_all([dy, x], at + cols.start..at + cols.end, &mut bufs);
                for ((dw, &dy), &x) in dw.iter_mut().zip(dy).zip(x) {
                    *dw = dy.mul_add((x - mean) * rstd, *dw);
                }
                for (db, &dy) in db.iter_mut().zip(dy) {
                    *db += dy;
                }
            }
        }
    }
}

/// Mean and `1 / sqrt(variance + eps)`, in two passes, so that a large mean costs no precision.
#[inline(always)]
fn mean_rstd(x: View<'_>, eps: f32, bufs: &mut [Block]) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = row_sum([x], bufs, |[x]| x) / n;
    let var = row_sum([x], bufs, |[x]| (x - mean) * (x - mean)) / n;
    (mean, 1.0 / (var + eps).sqrt())
}

#[inline(always)]
fn reciprocal_rms(x: View<'_>, eps: f32, bufs: &mut [Block]) -> f32 {
    let mean_square = row_sum([x], bufs, |[x]| x * x) / x.len() as f32;
    1.0 / (mean_square + eps).sqrt()
}

/// The sum of `f` over a row, as [`crate::math::lane_sum`].
#[inline(always)]
fn row_sum<const S: usize>(
    row: [View<'_>; S],
    bufs: &mut [Block],
    f: impl Fn([f32; S]) -> f32,
) -> f32 {
    let mut sums = [0.0; LANES];
    for cols in blocks(0..row[0].len()) {
        add_to_lanes(&mut sums, load_all(row, cols, bufs), &f);
    }
    fold_lanes(sums, |a, b| a + b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, noise};

    const EPS: f32 = 1e-5;
    const C: usize = 50;
    const N: usize = 200;

    struct Gradients {
        dx: Vec<f32>,
        dw: Vec<f32>,
        db: Vec<f32>,
    }

    /// Backward of tokens cut at `cuts`; `dw` and `db` start from 1.
    fn layer_norm_gradients(pool: &Pool, cuts: &[usize], rms: bool) -> Gradients {
        let (x, dy, w) = (noise(N * C, 1), noise(N * C, 2), noise(C, 3));
        let (mut dx, mut dw, mut db) = (vec![9.0; N * C], vec![1.0; C], vec![1.0; C]);
        let mut begin = 0;
        for &end in cuts {
            let range = begin * C..end * C;
            let mut scratch = vec![f32::NAN; layer_norm_backward_scratch_elems(end - begin, 3)];
            let dx = ViewMut::F32(&mut dx[range.clone()]);
            let [dy, x, w] = [&dy[range.clone()], &x[range], &w].map(View::F32);
            if rms {
                rms_norm_backward(pool, dx, &mut dw, dy, x, w, EPS, 0.0, C, &mut scratch);
            } else {
                let db = Some(&mut db[..]);
                layer_norm_backward(pool, dx, &mut dw, db, dy, x, w, EPS, C, &mut scratch);
            }
            begin = end;
        }
        Gradients { dx, dw, db }
    }

    /// `(y, dx, dw, db)` in f64 straight from the formulas; `rms` leaves out the mean.
    fn reference(x: &[f32], dy: &[f32], w: &[f32], rms: bool) -> [Vec<f64>; 4] {
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let (x, dy, w) = (wide(x), wide(dy), wide(w));
        let [mut y, mut dx] = [vec![], vec![]];
        let [mut dw, mut db] = [vec![0.0; C], vec![0.0; C]];
        for (x, dy) in x.chunks_exact(C).zip(dy.chunks_exact(C)) {
            let mean = |f: &dyn Fn(usize) -> f64| (0..C).map(f).sum::<f64>() / C as f64;
            let mu = if rms { 0.0 } else { mean(&|i| x[i]) };
            let rstd = 1.0 / (mean(&|i| (x[i] - mu).powi(2)) + f64::from(EPS)).sqrt();
            let x_hat = |i: usize| (x[i] - mu) * rstd;
            let mean_g = if rms { 0.0 } else { mean(&|i| dy[i] * w[i]) };
            let mean_gx = mean(&|i| dy[i] * w[i] * x_hat(i));
            for i in 0..C {
                y.push(x_hat(i) * w[i]);
                dx.push(rstd * (dy[i] * w[i] - mean_g - x_hat(i) * mean_gx));
                dw[i] += dy[i] * x_hat(i);
                db[i] += dy[i];
            }
        }
        [y, dx, dw, db]
    }

    #[test]
    fn values_and_gradients_agree_with_the_formulas_in_f64() {
        let (x, dy, w, bias) = (noise(N * C, 1), noise(N * C, 2), noise(C, 3), noise(C, 4));
        let pool = Pool::new(2);
        for rms in [false, true] {
            let [y_want, dx, dw, db] = reference(&x, &dy, &w, rms);
            let mut y = vec![9.0; N * C];
            let [x, w] = [&x, &w].map(View::from);
            if rms {
                rms_norm_forward(&pool, (&mut y).into(), x, w, EPS, 0.0, C);
            } else {
                layer_norm_forward(&pool, (&mut y).into(), x, w, None, EPS, C);
                assert_close(&y, &y_want, 2e-6);
                let b = Some(View::F32(&bias));
                layer_norm_forward(&pool, (&mut y).into(), x, w, b, EPS, C);
                y.iter_mut().zip(bias.iter().cycle()).for_each(|(y, b)| *y -= b);
            }
            assert_close(&y, &y_want, 2e-6);
            let got = layer_norm_gradients(&pool, &[N], rms);
            assert_close(&got.dx, &dx, 5e-6);
            let plus_one = |v: &[f64]| v.iter().map(|v| v + 1.0).collect::<Vec<_>>();
            assert_close(&got.dw, &plus_one(&dw), 2e-5);
            if !rms {
                assert_close(&got.db, &plus_one(&db), 2e-5);
            }
        }
    }

    #[test]
    fn threads_and_token_cuts_do_not_change_the_bits() {
        for rms in [false, true] {
            let want = layer_norm_gradients(&Pool::new(1), &[N], rms);
            for (n_threads, cuts) in [(2, vec![64, N]), (3, vec![64, 192, N])] {
                let got = layer_norm_gradients(&Pool::new(n_threads), &cuts, rms);
                assert_eq!(
                    (got.dx, got.dw, got.db),
                    (want.dx.clone(), want.dw.clone(), want.db.clone())
                );
            }
        }
    }

    /// With weights that are one less and an offset of one, everything is as before.
    #[test]
    fn an_offset_is_added_to_the_weight() {
        let (x, dy) = (noise(N * C, 1), noise(N * C, 2));
        let w: Vec<f32> = noise(C, 3).iter().map(|w| (w * 64.0).round() / 64.0).collect();
        let less: Vec<f32> = w.iter().map(|w| w - 1.0).collect();
        let pool = Pool::new(2);
        let run = |w: &[f32], offset: f32| {
            let (mut y, mut dx, mut dw) = (vec![9.0; N * C], vec![9.0; N * C], vec![1.0; C]);
            let mut scratch = vec![f32::NAN; rms_norm_backward_scratch_elems(N, 2)];
            let [x, dy, w] = [&x[..], &dy, w].map(View::F32);
            rms_norm_forward(&pool, (&mut y).into(), x, w, EPS, offset, C);
            let out = (&mut dx).into();
            rms_norm_backward(&pool, out, &mut dw, dy, x, w, EPS, offset, C, &mut scratch);
            (y, dx, dw)
        };
        assert_eq!(run(&less, 1.0), run(&w, 0.0));
    }

    #[test]
    fn a_large_mean_costs_no_precision() {
        let x: Vec<f32> = noise(C, 1).iter().map(|x| x + 1000.0).collect();
        let (w, dy) = (vec![1.0; C], vec![0.0; C]);
        let mut y = vec![0.0; C];
        layer_norm_forward(&Pool::new(1), (&mut y).into(), (&x).into(), (&w).into(), None, EPS, C);
        assert_close(&y, &reference(&x, &dy, &w, false)[0], 2e-4);
    }
}

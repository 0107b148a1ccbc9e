//! Products against their definition, on every tier this machine can run.

use super::*;
use crate::testing::{FLOAT_TYPES, Stored, noise};
use crate::tier::{Tier, set_tier};

/// Calls `f` with every tier this machine can run.
fn on_every_tier(mut f: impl FnMut(Tier)) {
    for tier in Tier::available() {
        set_tier(Some(tier));
        f(tier);
    }
    set_tier(None);
}

/// Element `(i, j)`.
fn at(x: MatRef<'_>, i: usize, j: usize) -> f32 {
    let place = i * x.row_stride + j * x.col_stride;
    let mut value = [0.0];
    x.data.slice(place..place + 1).widen(&mut value);
    value[0]
}

/// The definition: one fused chain over ascending k, then the bias.
fn reference(c: &mut [f32], a: MatRef, b: MatRef, start: Start, bias: Option<&[f32]>) {
    for i in 0..a.rows {
        for j in 0..b.cols {
            let mut sum = if start == Start::Zero { 0.0 } else { c[i * b.cols + j] };
            for p in 0..a.cols {
                sum = at(a, i, p).mul_add(at(b, p, j), sum);
            }
            c[i * b.cols + j] = sum + bias.map_or(0.0, |bias| bias[j]);
        }
    }
}

fn run<'a>(
    pool: &Pool,
    c: impl Into<ViewMut<'a>>,
    a: MatRef,
    b: MatRef,
    start: Start,
    bias: Option<View<'_>>,
) {
    let c = MatMut::new(c, a.rows, b.cols);
    let c_type = c.data.float_type();
    let needed = gemm_scratch_elems(a.rows, b.cols, a.cols, c_type, pool.n_threads());
    // What is left over from another op must not matter.
    let mut scratch = vec![f32::NAN; needed];
    gemm(pool, c, a, b, start, bias, &mut scratch);
}

/// An (m, k) or, transposed, a (k, m) matrix, seen as (m, k).
fn laid_out(data: View<'_>, m: usize, k: usize, transposed: bool) -> MatRef<'_> {
    if transposed { MatRef::new(data, k, m).t() } else { MatRef::new(data, m, k) }
}

/// Every tier, number of threads, transpose, start and edge gives exactly the bits of the
/// definition: stronger than a tolerance, since the order of additions is part of the contract.
#[test]
fn all_tiers_threads_and_transposes_give_the_bits_of_the_definition() {
    let pools = [Pool::new(1), Pool::new(2), Pool::new(3)];
    let shapes = [
        (1, 1, 1),
        (3, 5, 2),
        (7, 67, 33),
        (33, 130, 70),
        (15, 64, 400),
        (70, 3, 0),
        (13, 33, 1601),
        (400, 70, 9),
    ];
    for (m, n, k) in shapes {
        let (a, b, bias) = (noise(m * k, 1), noise(k * n, 2), noise(n, 3));
        for case in 0..8 {
            let a = laid_out(View::F32(&a), m, k, case & 1 != 0);
            let b = laid_out(View::F32(&b), k, n, case & 2 != 0);
            let (start, bias) =
                if case & 4 == 0 { (Start::Zero, Some(&bias[..])) } else { (Start::FromC, None) };
            let mut want = noise(m * n, 4);
            reference(&mut want, a, b, start, bias);
            on_every_tier(|tier| {
                for pool in &pools {
                    let mut got = noise(m * n, 4);
                    run(pool, &mut got, a, b, start, bias.map(View::from));
                    assert_eq!(got, want, "{m} {n} {k} case {case} {tier}");
                }
            });
        }
    }
}

/// Whether this product takes pairs of bf16, which is another chain.
fn takes_pairs(tier: Tier, a: FloatType, b: FloatType) -> bool {
    tier == Tier::Avx512Bf16 && (a, b) == (FloatType::Bf16, FloatType::Bf16)
}

/// 16-bit operands are widened exactly, so a product of any mix of types has the bits of the product
/// of the widened operands, and a 16-bit result those of the rounded f32 result. The one exception
/// is compared with f64: a chain of k terms, each rounded to f32 once or twice, is off by at most
/// `2 k 2^-24` times the sum of the magnitudes of its terms.
#[test]
fn any_mix_of_types_gives_the_rounded_bits_of_the_widened_product() {
    let pool = Pool::new(2);
    for (m, n, k) in [(1, 1, 1), (7, 67, 33), (27, 130, 71), (14, 40, 1603)] {
        for case in 0..9 * 4 {
            let (a_type, b_type) = (FLOAT_TYPES[case % 3], FLOAT_TYPES[case / 3 % 3]);
            let a = Stored::new(&noise(m * k, 1), a_type);
            let b = Stored::new(&noise(k * n, 2), b_type);
            let bias = Stored::new(&noise(n, 3), a_type);
            let a_mat = laid_out(a.view(), m, k, (case / 9) & 1 != 0);
            let b_mat = laid_out(b.view(), k, n, (case / 9) & 2 != 0);
            let (a_wide, b_wide, bias_wide) = (a.wide(), b.wide(), bias.wide());
            let wide_a = MatRef { data: View::F32(&a_wide), ..a_mat };
            let wide_b = MatRef { data: View::F32(&b_wide), ..b_mat };
            on_every_tier(|tier| {
                let what = format!("{m} {n} {k}, {a_type:?} x {b_type:?}, case {case}, {tier}");
                let mut sums = vec![9.0; m * n];
                run(&pool, &mut sums, a_mat, b_mat, Start::Zero, Some(bias.view()));
                if takes_pairs(tier, a_type, b_type) {
                    assert_near_f64(&sums, wide_a, wide_b, &bias_wide);
                } else {
                    let mut want = vec![0.0; m * n];
                    let bias = Some(View::F32(&bias_wide));
                    run(&pool, &mut want, wide_a, wide_b, Start::Zero, bias);
                    assert_eq!(sums, want, "{what}");
                }
                for c_type in [FloatType::Bf16, FloatType::F16] {
                    let mut got = Stored::new(&vec![9.0; m * n], c_type);
                    run(&pool, got.view_mut(), a_mat, b_mat, Start::Zero, Some(bias.view()));
                    assert!(got == Stored::new(&sums, c_type), "{what} to {c_type:?}");
                }
            });
        }
    }
}

#[track_caller]
fn assert_near_f64(got: &[f32], a: MatRef<'_>, b: MatRef<'_>, bias: &[f32]) {
    let (n, k) = (b.cols, a.cols);
    for (place, &got) in got.iter().enumerate() {
        let (i, j) = (place / n, place % n);
        let terms = (0..k).map(|p| f64::from(at(a, i, p)) * f64::from(at(b, p, j)));
        let (sum, magnitude) =
            terms.fold((0.0, 0.0), |(sum, magnitude), t| (sum + t, magnitude + t.abs()));
        let want = sum + f64::from(bias[j]);
        let tolerance = (2 * k + 1) as f64 * (magnitude + want.abs()) / f64::from(1 << 24);
        assert!((f64::from(got) - want).abs() <= tolerance, "({i}, {j}): {got}, want {want}");
    }
}

/// However the sums of a 16-bit result wait for the next block: not at all, per thread, per part.
#[test]
fn sixteen_bit_results_are_rounded_once_however_deep_the_product() {
    let pools = [Pool::new(1), Pool::new(2)];
    for (m, n, k) in [(30, 70, 768), (500, 70, 1700), (40, 3072, 1600), (1300, 3000, 800)] {
        let a = Stored::new(&noise(m * k, 1), FloatType::Bf16);
        let b = Stored::new(&noise(k * n, 2), FloatType::Bf16);
        for tier in [Tier::detect(), Tier::available().last().expect("portable at least")] {
            set_tier(Some(tier));
            let (a, b) = (MatRef::new(a.view(), m, k), MatRef::new(b.view(), k, n));
            let mut sums = vec![9.0; m * n];
            run(&pools[1], &mut sums, a, b, Start::Zero, None);
            let want = Stored::new(&sums, FloatType::Bf16);
            for pool in &pools {
                let mut got = Stored::new(&vec![9.0; m * n], FloatType::Bf16);
                run(pool, got.view_mut(), a, b, Start::Zero, None);
                assert!(got == want, "{m} {n} {k} {tier}, {} threads", pool.n_threads());
            }
        }
        set_tier(None);
    }
}

/// `x` from element `begin` on.
fn from(x: View<'_>, begin: usize) -> View<'_> {
    x.slice(begin..x.len())
}

#[test]
fn cutting_any_axis_into_calls_does_not_change_the_bits() {
    let (m, n, k) = (200, 90, 1000);
    let pool = Pool::new(2);
    for float_type in FLOAT_TYPES {
        let dy = Stored::new(&noise(k * m, 1), float_type);
        let x = Stored::new(&noise(k * n, 2), float_type);
        let (dy, x) = (dy.view(), x.view());
        on_every_tier(|tier| {
            let (a, b) = (MatRef::new(dy, k, m).t(), MatRef::new(x, k, n));
            let mut whole = vec![0.0; m * n];
            run(&pool, &mut whole, a, b, Start::Zero, None);
            for cuts in [vec![64, 1000], vec![448, 960, 1000]] {
                let (mut got, mut begin) = (vec![0.0; m * n], 0);
                for end in cuts {
                    let a = MatRef::new(from(dy, begin * m), end - begin, m).t();
                    let b = MatRef::new(from(x, begin * n), end - begin, n);
                    run(&pool, &mut got, a, b, Start::FromC, None);
                    begin = end;
                }
                assert!(got == whole, "depth, {float_type:?}, {tier}");
            }
            for (begin, end) in [(0, 1), (1, 6), (6, 130), (130, 200)] {
                let a = MatRef::with_stride(from(dy, begin), k, end - begin, m).t();
                let mut got = vec![0.0; (end - begin) * n];
                run(&pool, &mut got, a, b, Start::Zero, None);
                assert!(got == whole[begin * n..end * n], "rows, {float_type:?}, {tier}");
            }
            for (begin, end) in [(0, 1), (1, 40), (40, 90)] {
                let b = MatRef::with_stride(from(x, begin), k, end - begin, n);
                let mut got = vec![0.0; m * (end - begin)];
                run(&pool, &mut got, a, b, Start::Zero, None);
                for (got, whole) in got.chunks(end - begin).zip(whole.chunks(n)) {
                    assert_eq!(got, &whole[begin..end], "columns, {float_type:?}, {tier}");
                }
            }
        });
    }
}

#[test]
fn strided_operands_leave_their_neighbours_alone() {
    let (m, n, k) = (20, 30, 10);
    let pool = Pool::new(2);
    let (a, b) = (noise(m * 50, 1), noise(k * 70, 2));
    let (a, b) = (MatRef::with_stride(&a, m, k, 50), MatRef::with_stride(&b[5..], k, n, 70));
    let mut want = vec![0.0; m * n];
    reference(&mut want, a, b, Start::Zero, None);
    for c_type in FLOAT_TYPES {
        let mut got = Stored::new(&vec![7.0; m * 40], c_type);
        let mut scratch = vec![0.0; gemm_scratch_elems(m, n, k, c_type, 2)];
        let c = MatMut::with_stride(got.view_mut().slice(3..m * 40), m, n, 40);
        gemm(&pool, c, a, b, Start::Zero, None, &mut scratch);
        let (got, want) = (got.wide(), Stored::new(&want, c_type).wide());
        for i in 0..m {
            assert_eq!(got[i * 40 + 3..i * 40 + 3 + n], want[i * n..(i + 1) * n]);
            assert!(got[i * 40 + 3 + n..(i + 1) * 40].iter().all(|&v| v == 7.0));
        }
    }
}

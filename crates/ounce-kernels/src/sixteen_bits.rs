//! A kernel on 16-bit operands gives what it gives on the same numbers as f32, rounded once: to the
//! bit, in both types, in place or not, on every tier. Sums in f32 are the same bits.

use crate::activation::{
    Gate, GeluKind, gelu_backward, gelu_forward, glu_backward, glu_forward, glu_packed_backward,
    soft_cap_backward, soft_cap_forward,
};
use crate::elementwise;
use crate::embed::{embed_forward, embed_scatter, embed_scatter_scratch_u64};
use crate::inout::InOut;
use crate::norm::{
    layer_norm_backward, layer_norm_backward_scratch_elems, layer_norm_forward, rms_norm_backward,
    rms_norm_forward,
};
use crate::philox::PhiloxKey;
use crate::pool::Pool;
use crate::rope::rope;
use crate::testing::{Stored, noise};
use crate::tier::{Tier, set_tier};
use crate::view::{FloatType, View};

// N tokens, C channels: more than a block of 1024 and no multiple of anything; D per head.
const N: usize = 9;
const C: usize = 1050;
const D: usize = 210;
const EPS: f32 = 1e-5;
const KEY: PhiloxKey = PhiloxKey { seed: 5, step: 6, site: 7 };

/// Numbers in [-4, 4).
fn loud(n: usize, seed: u32) -> Vec<f32> {
    noise(n, seed).iter().map(|x| 4.0 * x).collect()
}

/// Runs a kernel on inputs of `sizes` in 16 bits and in f32 on the same numbers; `run` writes its
/// outputs, as long as the first `n_outputs` inputs, and returns its f32 sums. Outputs start as those
/// inputs, so that a kernel may work in place.
#[track_caller]
fn check<const I: usize>(
    name: &str,
    sizes: [usize; I],
    n_outputs: usize,
    run: impl Fn(&Pool, &mut [Stored], [View<'_>; I]) -> Vec<f32>,
) {
    for tier in Tier::available() {
        set_tier(Some(tier));
        for float_type in [FloatType::Bf16, FloatType::F16] {
            let mut seed = 0;
            let inputs = sizes.map(|n| {
                seed += 1;
                Stored::new(&loud(n, seed), float_type)
            });
            let as_f32 = inputs.clone().map(|x| Stored::F32(x.wide()));
            let mut want = as_f32[..n_outputs].to_vec();
            let want_sums = run(&Pool::new(1), &mut want, as_f32.each_ref().map(Stored::view));
            let mut got = inputs[..n_outputs].to_vec();
            let got_sums = run(&Pool::new(3), &mut got, inputs.each_ref().map(Stored::view));
            for (got, want) in got.iter().zip(want) {
                assert_eq!(
                    got,
                    &Stored::new(&want.wide(), float_type),
                    "{name} {float_type:?} {tier}"
                );
            }
            assert_eq!(got_sums, want_sums, "sums of {name} {float_type:?} {tier}");
        }
    }
    set_tier(None);
}

#[test]
fn norms_round_once() {
    check("layer norm", [N * C, C, C], 1, |pool, y, [x, w, b]| {
        layer_norm_forward(pool, y[0].view_mut(), x, w, Some(b), EPS, C);
        vec![]
    });
    check("rms norm", [N * C, C], 1, |pool, y, [x, w]| {
        rms_norm_forward(pool, y[0].view_mut(), x, w, EPS, 1.0, C);
        vec![]
    });
    check("layer norm gradient", [N * C, N * C, C], 1, |pool, dx, [dy, x, w]| {
        let (mut dw, mut db) = (vec![1.0; C], vec![2.0; C]);
        let mut scratch = vec![0.0; layer_norm_backward_scratch_elems(N, pool.n_threads())];
        let (dx, db_sum) = (dx[0].view_mut(), Some(&mut db[..]));
        layer_norm_backward(pool, dx, &mut dw, db_sum, dy, x, w, EPS, C, &mut scratch);
        [dw, db].concat()
    });
    check("rms norm gradient", [N * C, N * C, C], 1, |pool, dx, [dy, x, w]| {
        let mut dw = vec![1.0; C];
        let mut scratch = vec![0.0; layer_norm_backward_scratch_elems(N, pool.n_threads())];
        let dx = dx[0].view_mut();
        rms_norm_backward(pool, dx, &mut dw, dy, x, w, EPS, 1.0, C, &mut scratch);
        dw
    });
}

#[test]
fn activations_round_once_also_in_place() {
    for kind in [GeluKind::Tanh, GeluKind::Erf] {
        check("gelu", [N * C], 1, |pool, y, [x]| {
            gelu_forward(pool, InOut::separate(y[0].view_mut(), x), kind);
            vec![]
        });
        check("gelu gradient in place", [N * C, N * C], 1, |pool, dx, [_, x]| {
            gelu_backward(pool, InOut::in_place(dx[0].view_mut()), x, kind);
            vec![]
        });
    }
    check("swiglu", [N * C, N * C], 1, |pool, y, [gate, up]| {
        glu_forward(pool, InOut::separate(y[0].view_mut(), gate), up, Gate::Silu);
        vec![]
    });
    check("swiglu gradient in place", [N * C; 3], 2, |pool, out, [_, _, dy]| {
        let [gate, up] = out else { unreachable!("two outputs") };
        let (dgate, dup) = (InOut::in_place(gate.view_mut()), InOut::in_place(up.view_mut()));
        glu_backward(pool, dgate, dup, dy, Gate::Silu);
        vec![]
    });
    check("packed geglu gradient", [N * C, N * C / 2], 1, |pool, out, [x, dy]| {
        let gate = Gate::Gelu(GeluKind::Tanh);
        glu_packed_backward(pool, out[0].view_mut(), dy, x, C / 2, gate);
        vec![]
    });
    check("soft cap", [N * C], 1, |pool, y, [x]| {
        soft_cap_forward(pool, InOut::separate(y[0].view_mut(), x), 0.7);
        vec![]
    });
    check("soft cap gradient", [N * C; 2], 1, |pool, dx, [x, dy]| {
        soft_cap_backward(pool, InOut::separate(dx[0].view_mut(), dy), x, 0.7);
        vec![]
    });
}

#[test]
fn elementwise_kernels_round_once() {
    check("add", [N * C, N * C], 1, |pool, y, [a, b]| {
        elementwise::add(pool, InOut::separate(y[0].view_mut(), a), b);
        vec![]
    });
    check("scale in place", [N * C], 1, |pool, y, [_]| {
        elementwise::scale(pool, InOut::in_place(y[0].view_mut()), 0.3);
        vec![]
    });
    check("dropout in place", [N * C], 1, |pool, y, [_]| {
        elementwise::dropout(pool, InOut::in_place(y[0].view_mut()), C, 0.3, KEY, 64);
        vec![]
    });
    let positions: Vec<i32> = (0..N as i32).map(|i| 977 * i).collect();
    let freqs: Vec<f32> = (0..D / 2 - 2).map(|i| 0.9f32.powi(i as i32)).collect();
    check("rope", [N * C], 1, |pool, y, [x]| {
        let y = InOut::separate(y[0].view_mut(), x);
        rope(pool, y, &positions, &freqs, 1.1, C / D, D, false);
        vec![]
    });
    check("rope back in place", [N * C], 1, |pool, y, [_]| {
        let y = InOut::in_place(y[0].view_mut());
        rope(pool, y, &positions, &freqs, 1.1, C / D, D, true);
        vec![]
    });
}

#[test]
fn gathered_rows_and_sums_over_tokens_are_those_of_f32() {
    let ids: Vec<i32> = (0..N as i32).map(|i| i * 5 % 4 - 1).collect();
    check("embedding", [N * C, 3 * C], 1, |pool, y, [_, table]| {
        embed_forward(pool, y[0].view_mut(), &ids, table, C);
        vec![]
    });
    check("embedding gradient", [N * C], 0, |pool, _, [rows]| {
        let mut dtable = vec![1.0; 3 * C];
        let mut scratch = vec![0; embed_scatter_scratch_u64(N)];
        embed_scatter(pool, &mut dtable, &ids, rows, C, &mut scratch);
        dtable
    });
    check("bias gradient", [N * C], 0, |pool, _, [dy]| {
        let mut db = vec![1.0; C];
        elementwise::bias_grad(pool, &mut db, dy, C);
        db
    });
}

/// What `lower_precision` mixes: f32 parameters with 16-bit values, 16-bit inputs with an f32 output.
#[test]
fn operands_of_one_call_may_differ_in_type() {
    let (x, w) = (Stored::new(&loud(N * C, 1), FloatType::F16), loud(C, 2));
    let mut want = vec![0.0; N * C];
    rms_norm_forward(
        &Pool::new(1),
        (&mut want).into(),
        (&x.wide()).into(),
        (&w).into(),
        EPS,
        1.0,
        C,
    );
    let mut got = vec![0.0; N * C];
    rms_norm_forward(&Pool::new(2), (&mut got).into(), x.view(), (&w).into(), EPS, 1.0, C);
    assert_eq!(got, want);
    let mut got = Stored::new(&vec![0.0; N * C], FloatType::Bf16);
    rms_norm_forward(&Pool::new(2), got.view_mut(), x.view(), (&w).into(), EPS, 1.0, C);
    assert_eq!(got, Stored::new(&want, FloatType::Bf16));
}

//! One measurement: an op's time on operands as a step finds them.
//!
//! In a step an op finds its weights and saved values where they were left long ago: in memory, not in
//! a cache. What flows (the activation or gradient that the op before has just written) it finds in
//! the caches as far as it fits, and its scratch where the op before had its own. Timed over and over on
//! the same operands, ops bound by memory would look up to twice as fast: on a Xeon with 2 MiB of L2 per
//! core an addition of 4.5 MiB ran at 29 GB/s on the operands of the run before, and at 15 GB/s on
//! others, whether these were 64 MiB or 1.2 GiB ago. So every run has operands of its own, one set after
//! another through the arena, and one scratch at its end; before the first run all of the arena is
//! written, and before a product on operands of which only a few sets fit the rest of it is read. Before
//! each run what flows is written as a product leaves it: every thread some columns of all rows, of
//! which other threads read a part (a GELU of 128 tokens by 3,072 took 0.24 ms in the steps of a Zen 5,
//! and 0.11 ms where every thread found its own rows in its own cache). Where the budget allows less
//! than that, the steps of such a budget live in the caches as well.
//!
//! Disturbances only ever add time, so the lower quartile of the runs counts. Measuring uses the
//! executor's own dispatch.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use half::{bf16, f16};
use ounce_ir::{DType, RopeTable};
use ounce_kernels::attention::RowSpan;
use ounce_kernels::elementwise;
use ounce_kernels::pool::{Pool, split};
use ounce_kernels::view::ViewMut;

use crate::arena::{Operands, UNIT_BYTES};
use crate::dispatch::{Context, dispatch};
use crate::problem::Problem;
use crate::scratch::scratch_bytes;
use crate::{Arena, OptimizerHyper, StepInputs};

/// Time that the runs of one measurement should take together, and a run that is not repeated often.
const TARGET: Duration = Duration::from_millis(16);
const LONG_RUN: Duration = Duration::from_millis(150);
/// So many sets of operands one after another do not meet their own traces in the caches.
const SETS_BEYOND_CACHES: u64 = 8;
/// Runs of one measurement at most, the one that warms up not counted.
const MAX_RUNS: usize = 15;

/// Seconds of one run: the lower quartile of a few, each on operands of its own.
pub(crate) fn measure(
    arena: &mut Arena,
    pool: &Pool,
    problem: &Problem,
    tables: &[RopeTable],
    n_tokens: u64,
) -> f64 {
    let spec = &problem.spec;
    let (offsets, set_bytes) = problem.layout(n_tokens);
    let set_bytes = set_bytes.max(UNIT_BYTES);
    // The scratch lies at the end, for all sets.
    let scratch_at =
        arena.bytes() / UNIT_BYTES * UNIT_BYTES - problem.scratch_bytes(n_tokens, pool.n_threads());
    let n_sets = (scratch_at / set_bytes).clamp(1, MAX_RUNS as u64 + 1);
    fill(arena, problem, &offsets, n_tokens);
    // The other sets are copies; what is left is written to, so that nothing of them stays cached.
    let words = arena.slice_mut::<u64>(0, arena.bytes() / 8);
    let (sets, rest) = words.split_at_mut((n_sets * set_bytes / 8) as usize);
    for set in 1..n_sets {
        sets.copy_within(..(set_bytes / 8) as usize, (set * set_bytes / 8) as usize);
    }
    rest.fill(0);
    let n_rows = n_tokens / problem.unit_tokens;
    let rows: Vec<RowSpan> = (0..n_rows)
        .map(|i| (i * problem.unit_tokens) as usize)
        .map(|start| RowSpan { start, len: problem.row_tokens as usize })
        .collect();
    let hyper = OptimizerHyper::default();
    let inputs = StepInputs {
        grad_scale: 1e-3,
        lr: 1e-6,
        hyper,
        max_grad_norm: 1.0,
        ..StepInputs::forward(&rows)
    };
    let cx = Context {
        pool,
        rope_tables: tables,
        inputs: &inputs,
        first_token: 0,
        n_tokens: n_tokens as u32,
        rows: &rows,
    };
    let extent = problem.extent(n_tokens);
    let scratch = scratch_bytes(spec, n_tokens, pool.n_threads());
    let mut run = |i: u64| {
        let first = i % n_sets * set_bytes / UNIT_BYTES;
        let of_set = offsets.iter().map(|at| at + first as u32);
        let of_scratch = (scratch > 0).then_some((scratch_at / UNIT_BYTES) as u32);
        let offsets: Vec<u32> = of_set.chain(of_scratch).collect();
        if problem.waits_for_weights() && n_sets < SETS_BEYOND_CACHES {
            let own = (i % n_sets * set_bytes / 8) as usize..;
            let own = own.start..own.start + (set_bytes / 8) as usize;
            sweep(pool, arena.slice_mut(0, arena.bytes() / 8), own);
        }
        if let Some(operand) = spec.flowing_input() {
            let flows = &spec.operands[operand];
            let n_words = flows.bytes(extent) / 8;
            let row_words = spec.operands[operand].dtype.bytes(flows.row_elems) / 8;
            hand_over(pool, arena.slice_mut(offsets[operand], n_words), row_words as usize);
        }
        let start = Instant::now();
        let operands = Operands::new(arena, spec, &offsets, extent, scratch);
        dispatch(spec, operands, &cx);
        if spec.is_update() {
            // The next step sets the sum to zero; no other op's cost could say so.
            let dw = &spec.operands[0];
            let dw = arena.slice_mut::<f32>(offsets[0], dw.elems(extent));
            elementwise::zero(pool, ViewMut::F32(dw));
        }
        start.elapsed()
    };
    let warm_up = run(0);
    let n_runs = match TARGET.as_nanos() / warm_up.as_nanos().max(1) {
        _ if warm_up > LONG_RUN => 1,
        n => n.clamp(6, MAX_RUNS as u128) as u64,
    };
    let mut times: Vec<Duration> = (1..=n_runs).map(&mut run).collect();
    times.sort_unstable();
    // A clock of coarse steps may show none; costs are positive.
    times[times.len() / 4].as_secs_f64().max(1e-9)
}

/// Reads every cache line of `words` outside `own`, so that what caches hold is of that.
fn sweep(pool: &Pool, words: &mut [u64], own: Range<usize>) {
    let words = &*words;
    pool.run(&|thread_idx| {
        for part in [&words[..own.start], &words[own.end..]] {
            let range = split(part.len(), pool.n_threads(), thread_idx);
            let lines = part[range].iter().step_by(UNIT_BYTES as usize / 8);
            std::hint::black_box(lines.fold(0, |sum: u64, &word| sum.wrapping_add(word)));
        }
    });
}

/// Writes what is there, as the threads of a product do: each its columns of all rows.
fn hand_over(pool: &Pool, words: &mut [u64], row_words: usize) {
    // SAFETY: an atomic word has the size and alignment of a word, and the words are exclusively ours.
    let words = unsafe { &*(std::ptr::from_mut(words) as *const [AtomicU64]) };
    pool.run(&|thread_idx| {
        let own = split(row_words, pool.n_threads(), thread_idx);
        for row in words.chunks_exact(row_words.max(1)) {
            for word in &row[own.clone()] {
                word.store(word.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
    });
}

/// Fills the operands with ordinary numbers: no denormals, ids in range.
fn fill(arena: &mut Arena, problem: &Problem, offsets: &[u32], n_tokens: u64) {
    let n_ids = problem.n_ids().max(1);
    for (operand, &at) in problem.spec.operands.iter().zip(offsets) {
        let bytes = operand.bytes(problem.extent(n_tokens));
        match operand.dtype {
            DType::F64 => arena.slice_mut::<f64>(at, bytes / 8).fill(1.0),
            DType::I32 => {
                for (i, x) in arena.slice_mut::<i32>(at, bytes / 4).iter_mut().enumerate() {
                    *x = (i as u64 * 7919 % n_ids) as i32;
                }
            }
            DType::I16 => fill_with(arena.slice_mut(at, bytes / 2), |x| (x * 65536.0) as i16),
            DType::Bf16 => fill_with(arena.slice_mut(at, bytes / 2), bf16::from_f32_const),
            DType::F16 => fill_with(arena.slice_mut(at, bytes / 2), f16::from_f32_const),
            // Quantized types have no kernels and so never get here.
            _ => fill_with(arena.slice_mut(at, bytes / 4), |x| x),
        }
    }
}

/// Numbers between 0.25 and 0.75, unlike their neighbours.
fn fill_with<T>(dst: &mut [T], convert: impl Fn(f32) -> T) {
    for (i, x) in dst.iter_mut().enumerate() {
        let noise = (i as u32).wrapping_mul(0x9E37_79B9) >> 9;
        *x = convert(f32::from_bits(0x3F00_0000 | noise) - 0.25);
    }
}

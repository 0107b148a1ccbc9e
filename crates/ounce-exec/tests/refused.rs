//! Plans that cannot run as they are: refused with the instruction or buffer and the numbers.

mod support;

use std::sync::Arc;

use ounce_exec::{Arena, ExecError, Executor, MeasuredMachine, StepInputs};
use ounce_ir::{Graph, OpKind, OptimizerKind};
use ounce_kernels::pool::Pool;
use ounce_program::{BufferId, BufferRef, Instr, Plan, StepShape, Tag, Tier};
use support::{Cut, ROW_TOKENS, Session, llama_like, naive_plan, training};

fn plan() -> (Graph, Plan, Arc<Pool>) {
    let graph = training(&llama_like(), OptimizerKind::AdamW, true);
    let pool = Arc::new(Pool::new(1));
    let machine = MeasuredMachine::new(Arc::clone(&pool), 0, 0, None);
    let plan = naive_plan(&graph, &machine, StepShape::new(1, ROW_TOKENS), Cut::NONE);
    (graph, plan, pool)
}

/// The error for a plan that was changed in one place.
fn refused(change: impl FnOnce(&Graph, &mut Plan)) -> ExecError {
    let (graph, mut plan, pool) = plan();
    change(&graph, &mut plan);
    Executor::new(&graph, &plan, pool).expect_err("a plan that cannot run")
}

/// Operands of the first run of an op, its index and name.
fn first<'a>(
    graph: &Graph,
    plan: &'a mut Plan,
    kind: impl Fn(&OpKind) -> bool,
) -> (usize, &'a mut Vec<BufferRef>) {
    let found = plan.instrs.iter_mut().enumerate().find_map(|(i, instr)| match instr {
        Instr::Run { op, operands, .. } if kind(&graph.ops[*op].kind) => Some((i, operands)),
        _ => None,
    });
    found.expect("the op runs")
}

#[test]
fn a_pool_of_another_size_is_refused() {
    let error = refused(|_, plan| plan.n_threads = 5);
    assert!(matches!(error, ExecError::Threads { plan: 5, pool: 1 }), "{error}");
}

#[test]
fn overlapping_operands_are_refused_by_instruction() {
    let mut at = 0;
    let error = refused(|graph, plan| {
        let (i, operands) = first(graph, plan, |k| matches!(k, OpKind::Glu { .. }));
        operands[2] = operands[0];
        at = i;
    });
    let ExecError::Operand { instr, op: "glu", what } = error else { panic!("{error}") };
    assert_eq!(instr, at);
    assert!(what.contains("overlaps"), "{what}");
}

#[test]
fn only_whole_inputs_are_taken_over() {
    // `add` may write over one of its inputs, but not over both, nor over a part of one.
    let both = refused(|graph, plan| {
        let (_, operands) = first(graph, plan, |k| matches!(k, OpKind::Add));
        operands[1] = operands[0];
        operands[2] = operands[0];
    });
    assert!(both.to_string().contains("overlaps"), "{both}");
    let part = refused(|graph, plan| {
        let (_, operands) = first(graph, plan, |k| matches!(k, OpKind::Add));
        let (buffer, bytes) = (operands[0].buffer, operands[0].bytes);
        operands[2] = BufferRef { buffer, at: 64, bytes };
        plan.buffers[buffer].bytes += 64;
    });
    assert!(part.to_string().contains("overlaps"), "{part}");
}

#[test]
fn operands_of_the_wrong_size_or_number_are_refused() {
    let short = refused(|graph, plan| {
        first(graph, plan, |k| matches!(k, OpKind::RmsNorm { .. })).1[2].bytes -= 64;
    });
    assert!(short.to_string().contains("needs"), "{short}");
    let missing = refused(|graph, plan| {
        first(graph, plan, |k| matches!(k, OpKind::Linear { .. })).1.pop();
    });
    assert!(missing.to_string().contains("operands, needs"), "{missing}");
    let tokens = refused(|_, plan| {
        for instr in &mut plan.instrs {
            if let Instr::Run { tokens, .. } = instr {
                *tokens = 0..64_000;
            }
        }
    });
    assert!(tokens.to_string().contains("tokens 0..64000 of 128"), "{tokens}");
}

#[test]
fn buffers_outside_the_arena_or_off_the_grid_are_refused() {
    let last = |plan: &Plan| BufferId(plan.buffers.len() as u32 - 1);
    for change in [
        (|plan, id| plan.buffers[id].offset += 64) as fn(&mut Plan, BufferId),
        |plan, id| plan.buffers[id].offset -= 4,
        |plan, id| plan.buffers[id].offset = u64::MAX - 63,
        |plan, id| plan.buffers[id].tier = Tier::Disk,
    ] {
        let error = refused(|_, plan| change(plan, last(plan)));
        assert!(matches!(error, ExecError::Buffer { .. }), "{error}");
    }
    let beyond = refused(|_, plan| {
        let id = BufferId(plan.buffers.len() as u32);
        let Some(Instr::Run { operands, .. }) = plan.instrs.last_mut() else { panic!("a run") };
        operands[0].buffer = id;
    });
    assert!(beyond.to_string().contains("no b"), "{beyond}");
}

#[test]
fn transfers_are_refused() {
    let error = refused(|_, plan| plan.instrs.push(Instr::Wait { tag: Tag(0) }));
    assert!(matches!(error, ExecError::Transfer { .. }), "{error}");
    assert!(error.to_string().contains("\nhint: "), "{error}");
}

#[test]
fn an_arena_larger_than_the_address_space_is_refused() {
    let error = Arena::reserve(u64::MAX / 2).expect_err("no such memory");
    assert!(error.to_string().contains("9223372036854775807 bytes"), "{error}");
}

#[test]
#[should_panic(expected = "the plan needs")]
fn a_smaller_arena_than_the_plan_s_is_not_run_in() {
    let shape = StepShape::new(1, ROW_TOKENS);
    let graph = training(&llama_like(), OptimizerKind::AdamW, true);
    let session = Session::new(&graph, shape, Cut::NONE, 1);
    let mut small = Arena::reserve(session.exec.arena_bytes() - 64).expect("memory");
    let _ = session.exec.run(&mut small, &StepInputs::forward(&[]));
}

/// Reserving is free: a step touches its buffers, and nothing else becomes resident.
#[test]
#[cfg(target_os = "linux")]
fn an_arena_becomes_resident_only_where_it_is_written() {
    let resident_bytes = || {
        let status = std::fs::read_to_string("/proc/self/statm").expect("statm");
        let pages: u64 = status.split(' ').nth(1).expect("a field").parse().expect("a number");
        4096 * pages
    };
    let graph = training(&llama_like(), OptimizerKind::AdamW, true);
    let shape = StepShape::new(1, ROW_TOKENS);
    let mut session = Session::new(&graph, shape, Cut::NONE, 1);
    let before = resident_bytes();
    let mut huge = Arena::reserve(1 << 36).expect("64 GiB of address space");
    session.exec.run(&mut huge, &StepInputs::forward(&[])).expect("finite numbers");
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes became resident");
    assert!(session.exec.buffers(&mut session.arena).has_param(ounce_ir::ParamId(0)));
}

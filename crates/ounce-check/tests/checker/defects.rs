//! One broken plan per defect that the mutations of `plans.rs` do not reach, and what is found.

use crate::common::{Model, Style, machine, plan};
use ounce_check::{CheckError, check};
use ounce_ir::{Graph, OpId, OptimizerKind, ParamId, Phase, ValueId, ValueKind};
use ounce_program::{
    Buffer, BufferId, BufferRef, BufferRole, Category, Instr, Machine, Plan, StepShape, Tag, Tier,
};

fn training() -> (Graph, Plan) {
    let graph = Model::llama().training(OptimizerKind::AdamW, false);
    let style = Style { rows: 1, ..Style::plain() };
    let plan = plan(&graph, StepShape::new(2, 100), &machine(), style);
    (graph, plan)
}

/// What the checker finds in the training plan after `edit`.
fn defect(edit: impl FnOnce(&Graph, &mut Plan)) -> CheckError {
    let (graph, mut plan) = training();
    edit(&graph, &mut plan);
    check(&graph, &plan, &machine()).expect_err("the plan is broken")
}

/// The first run of an op that `keep` likes, as (instruction, operands).
fn run_of(
    graph: &Graph,
    plan: &Plan,
    keep: impl Fn(&ounce_ir::Op) -> bool,
) -> (usize, Vec<BufferRef>) {
    let run = |(i, instr): (usize, &Instr)| match instr {
        Instr::Run { op, operands, .. } if keep(&graph.ops[*op]) => Some((i, operands.clone())),
        _ => None,
    };
    plan.instrs.iter().enumerate().find_map(run).expect("the plan has such a run")
}

fn operand(plan: &mut Plan, instr: usize, n: usize) -> &mut BufferRef {
    let Instr::Run { operands, .. } = &mut plan.instrs[instr] else { panic!("not a run") };
    &mut operands[n]
}

fn set_tokens(plan: &mut Plan, instr: usize, to: std::ops::Range<u64>) {
    let Instr::Run { tokens, .. } = &mut plan.instrs[instr] else { panic!("not a run") };
    *tokens = to;
}

/// Inserts instructions; the plan's buffers all live through all of it.
fn insert(plan: &mut Plan, at: usize, instrs: Vec<Instr>) {
    plan.instrs.splice(at..at, instrs);
    let n = plan.instrs.len() as u32;
    for id in plan.buffers.ids() {
        plan.buffers[id].live = 0..n;
    }
}

/// A buffer on disk as long as `like`.
fn disk(plan: &mut Plan, like: BufferRef) -> BufferRef {
    let offset = plan.buffers.values().filter(|b| b.tier == Tier::Disk).map(|b| b.bytes).sum();
    let buffer = plan.buffers.push(Buffer {
        role: BufferRole::Value(ValueId(0)),
        category: Category::Working,
        tier: Tier::Disk,
        offset,
        bytes: like.bytes.next_multiple_of(64),
        live: 0..plan.instrs.len() as u32,
    });
    BufferRef { buffer, at: 0, bytes: like.bytes }
}

fn copy(src: BufferRef, dst: BufferRef, tag: u32) -> Instr {
    Instr::Copy { src, dst, tag: Tag(tag) }
}

fn wait(tag: u32) -> Instr {
    Instr::Wait { tag: Tag(tag) }
}

macro_rules! assert_defect {
    ($pattern:pat, $edit:expr) => {{
        let found = defect($edit);
        assert!(matches!(found, $pattern), "found {found:?}");
    }};
}

#[test]
fn what_a_plan_names_must_exist() {
    assert_defect!(CheckError::UnknownRole { .. }, |_, p| {
        p.buffers[BufferId(0)].role = BufferRole::Param(ParamId(999));
    });
    assert_defect!(CheckError::UnknownBuffer { .. }, |g, p| {
        let (i, _) = run_of(g, p, |op| op.phase == Phase::Backward);
        operand(p, i, 0).buffer = BufferId(99_999);
    });
    assert_defect!(CheckError::UnknownOp { .. }, |g, p| {
        let (i, _) = run_of(g, p, |op| op.phase == Phase::Backward);
        if let Instr::Run { op, .. } = &mut p.instrs[i] {
            *op = OpId(999);
        }
    });
}

#[test]
fn operands_lie_inside_their_buffers_at_aligned_bytes_in_memory() {
    assert_defect!(CheckError::OutsideBuffer { .. }, |g, p| {
        let (i, _) = run_of(g, p, |op| op.phase == Phase::Forward);
        operand(p, i, 0).at = u64::MAX - 63;
    });
    assert_defect!(CheckError::Misaligned { .. }, |g, p| {
        let (i, _) = run_of(g, p, |op| op.phase == Phase::Forward);
        operand(p, i, 0).at = 4;
    });
    assert_defect!(CheckError::WrongTier { tier: Tier::Disk, .. }, |g, p| {
        let (_, operands) = run_of(g, p, |op| op.kind.name() == "glu");
        p.buffers[operands[0].buffer].tier = Tier::Disk;
    });
}

#[test]
fn cuts_fall_where_the_op_allows_them() {
    assert_defect!(CheckError::CutInRow { row_stride: 128, .. }, |g, p| {
        let (i, _) = run_of(g, p, |op| op.kind.needs_whole_rows());
        set_tokens(p, i, 0..64);
    });
    assert_defect!(CheckError::NotAllTokens { n_tokens: 256, .. }, |g, p| {
        let (i, _) = run_of(g, p, |op| op.phase == Phase::Update);
        set_tokens(p, i, 0..64);
    });
    assert_defect!(CheckError::Tokens { n_tokens: 256, .. }, |g, p| {
        let (i, _) = run_of(g, p, |op| op.phase == Phase::Forward);
        set_tokens(p, i, 256..320);
    });
}

#[test]
fn a_backward_op_without_a_sum_may_not_run_again_either() {
    assert_defect!(CheckError::RunsTwice { start: 0, end: 128, .. }, |g, p| {
        let (i, _) = run_of(g, p, |op| op.kind.name() == "glu_grad");
        let again = p.instrs[i].clone();
        insert(p, i, vec![again]);
    });
}

#[test]
fn only_sums_are_zeroed() {
    assert_defect!(CheckError::NotASum { .. }, |g, p| {
        let loss = g.find_value(ValueKind::Loss).unwrap();
        let zero = p.instrs.iter_mut().find_map(|i| match i {
            Instr::Zero { value, .. } => Some(value),
            _ => None,
        });
        *zero.unwrap() = loss;
    });
}

#[test]
fn residents_lie_in_memory_and_are_large_enough() {
    assert_defect!(CheckError::ResidentTier { .. }, |g, p| {
        let loss = BufferRole::Session(g.find_value(ValueKind::Loss).unwrap());
        let loss = p.find_buffer(loss).unwrap();
        p.buffers[loss].tier = Tier::Disk;
    });
    assert_defect!(CheckError::ResidentTooSmall { bytes: 64, .. }, |_, p| {
        p.buffers[BufferId(0)].bytes = 64;
    });
}

#[test]
fn the_process_outside_the_arena_is_counted() {
    assert_defect!(CheckError::Baseline { plan_bytes: 0, .. }, |_, p| {
        let bytes = std::mem::take(&mut p.baseline_bytes);
        p.certificate.peak_bytes -= bytes;
        p.certificate.max_load_bytes -= bytes;
    });
    assert!(machine().baseline_bytes() > 0);
}

#[test]
fn the_loss_must_be_written_for_all_tokens() {
    let graph = Model::gpt2().evaluation();
    let style = Style { rows: 1, ..Style::plain() };
    let mut plan = plan(&graph, StepShape::new(2, 64), &machine(), style);
    plan.instrs.pop();
    insert(&mut plan, 0, Vec::new());
    let found = check(&graph, &plan, &machine());
    // The first half was written: byte 256 is that of token 64.
    let Err(CheckError::NotWritten { wanted, .. }) = &found else { panic!("found {found:?}") };
    assert_eq!(wanted, "byte 256 of head.wte");
}

#[test]
fn a_value_that_was_overwritten_before_its_last_read_is_found_though_buffers_are_right() {
    let (graph, mut plan) = training();
    let backward = graph.ops.values().filter(|op| op.phase == Phase::Backward);
    let mut kept: Vec<ValueId> = backward.flat_map(|op| op.inputs.clone()).collect();
    kept.retain(|&v| {
        let value = &graph.values[v];
        value.kind == ValueKind::Activation && value.shape.dims == [16]
    });
    let [first, .., last] = kept[..] else { panic!("backward reads several values") };
    let of = |v| plan.find_buffer(BufferRole::Value(v)).unwrap();
    let (from, to) = (of(first), of(last));
    assert_ne!(from, to);
    for instr in &mut plan.instrs {
        if let Instr::Run { operands, .. } = instr {
            operands.iter_mut().filter(|o| o.buffer == from).for_each(|o| o.buffer = to);
        }
    }
    let found = check(&graph, &plan, &machine());
    assert!(matches!(found, Err(CheckError::Misread { .. })), "found {found:?}");
}

#[test]
fn a_sum_may_travel_to_disk_and_back_but_not_fall_behind() {
    let (graph, mut plan) = training();
    let (i, operands) = run_of(&graph, &plan, |op| op.kind.name() == "linear_grad_weight");
    let sum = operands[2];
    let away = disk(&mut plan, sum);
    let trip = vec![copy(sum, away, 0), wait(0), copy(away, sum, 1), wait(1)];
    insert(&mut plan, i + 1, trip);
    assert_eq!(check(&graph, &plan, &machine()).map(|p| p.n_instrs), Ok(plan.instrs.len()));

    // Fetched again after the next addition, it is one addition behind.
    let next = (i + 5..plan.instrs.len())
        .find(
            |&n| matches!(&plan.instrs[n], Instr::Run { operands, .. } if operands.contains(&sum)),
        )
        .unwrap();
    insert(&mut plan, next + 1, vec![copy(away, sum, 2), wait(2)]);
    let found = check(&graph, &plan, &machine());
    let Err(CheckError::Misread { wanted, found, .. }) = &found else { panic!("found {found:?}") };
    assert!(wanted.ends_with("(2 added so far)") && found.ends_with("(1 added so far)"));
}

#[test]
fn transfers_are_waited_for_and_keep_their_bytes_to_themselves() {
    assert_defect!(CheckError::NeverWaited { tag: 7 }, |g, p| {
        let (_, operands) = run_of(g, p, |op| op.phase == Phase::Forward);
        let away = disk(p, operands[0]);
        let end = p.instrs.len();
        insert(p, end, vec![copy(operands[0], away, 7)]);
    });
    assert_defect!(CheckError::InFlight { tag: 0, .. }, |g, p| {
        let (i, operands) = run_of(g, p, |op| op.kind.name() == "glu");
        let away = disk(p, operands[2]);
        insert(p, i + 1, vec![wait(0)]);
        insert(p, i, vec![copy(operands[2], away, 0)]);
    });
    assert_defect!(CheckError::TagInUse { tag: 3, .. }, |g, p| {
        let (i, operands) = run_of(g, p, |op| op.kind.name() == "glu");
        let away = [disk(p, operands[2]), disk(p, operands[2])];
        let twice = away.map(|to| copy(operands[2], to, 3));
        insert(p, i + 1, twice.into_iter().chain([wait(3)]).collect());
    });
}

#[test]
fn a_message_says_what_where_and_the_numbers() {
    let found = defect(|g, p| {
        let (i, operands) = run_of(g, p, |op| op.kind.name() == "glu");
        operand(p, i, 0).buffer = operands[1].buffer;
    });
    let message = expect_test::expect![[r"
        instruction 13 (glu) reads byte 0 of mlp.0.gate_proj at byte 327616, but finds byte 0 of mlp.0.up_proj
        hint: the plan is wrong and was not run; please report the model, the budget and this message"]];
    message.assert_eq(&found.to_string());
}

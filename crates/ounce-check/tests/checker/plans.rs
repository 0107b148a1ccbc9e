//! The checker accepts right plans of every kind of graph, and rejects every broken variant of them.

use std::collections::{BTreeMap, BTreeSet};

use crate::common::{Choices, Model, Style, machine, plan};
use expect_test::expect;
use ounce_check::{check, mutate::mutations};
use ounce_ir::{Graph, OptimizerKind};
use ounce_program::{Plan, StepShape};

fn accepted(graph: &Graph, shape: StepShape, style: Style) -> Plan {
    let plan = plan(graph, shape, &machine(), style);
    match check(graph, &plan, &machine()) {
        Ok(proof) => {
            assert_eq!(proof.peak_bytes, plan.certificate.peak_bytes);
            assert_eq!(proof.max_load_bytes, plan.certificate.max_load_bytes);
            assert_eq!(proof.n_instrs, plan.instrs.len());
        }
        Err(e) => panic!("{style:?} is right, but: {e}\n{plan}"),
    }
    plan
}

/// The defects that the mutations of a plan are found by, per kind of mutation.
fn defects(graph: &Graph, plan: &Plan) -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, mutant) in mutations(graph, plan) {
        let kind = name.split(':').next().unwrap_or(&name).to_owned();
        let Err(e) = check(graph, &mutant, &machine()) else {
            panic!("accepted a plan that is wrong: {name}\n{mutant}")
        };
        let variant = format!("{e:?}");
        let variant = variant.split([' ', '(']).next().unwrap_or_default().to_owned();
        found.entry(kind).or_default().insert(variant);
    }
    found
}

fn random_graph(c: &mut Choices) -> (Graph, StepShape) {
    let model = Model::random(c);
    let mut shape = StepShape::new(1 + c.below(4), 1 + c.below(150));
    let graph = match c.below(4) {
        0 => model.evaluation(),
        1 => {
            shape.n_selected = 1 + c.below(shape.n_rows);
            model.decoding()
        }
        _ => model.training(c.one_of(&[OptimizerKind::AdamW, OptimizerKind::Sgd]), c.coin()),
    };
    (graph, shape)
}

#[test]
fn keep_everything_plans_of_all_kinds_of_graphs_are_accepted() {
    let shape = StepShape::new(2, 100);
    for model in [Model::gpt2(), Model::llama()] {
        accepted(&model.evaluation(), shape, Style::plain());
        accepted(&model.decoding(), StepShape { n_selected: 2, ..shape }, Style::plain());
        for clip in [false, true] {
            accepted(&model.training(OptimizerKind::AdamW, clip), shape, Style::plain());
        }
    }
}

#[test]
fn random_plans_are_accepted_and_every_mutation_of_them_is_rejected() {
    let mut n_mutants = 0;
    for seed in 0..150 {
        let mut c = Choices(seed);
        let (graph, shape) = random_graph(&mut c);
        let plan = accepted(&graph, shape, Style::random(&mut c));
        n_mutants += defects(&graph, &plan).len();
    }
    assert!(n_mutants > 150 * 20, "{n_mutants} kinds of mutants are too few to mean anything");
}

#[test]
fn a_plan_of_a_hundred_thousand_instructions_is_accepted() {
    let graph = Model { n_blocks: 12, ..Model::gpt2() }.training(OptimizerKind::AdamW, true);
    let plan = accepted(&graph, StepShape::new(250, 64), Style { rows: 1, ..Style::plain() });
    assert!(plan.instrs.len() > 90_000 && plan.buffers.len() > 20_000);
}

/// Where every buffer lives all the time, each kind of mutation must be found for its own reason.
#[test]
fn every_kind_of_mutation_finds_victims_and_is_rejected_for_its_own_reason() {
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for model in [Model::gpt2(), Model::llama()] {
        for (clip, page) in [(false, false), (true, true)] {
            let graph = model.training(OptimizerKind::AdamW, clip);
            let style =
                Style { rows: 1, chunk_tokens: 64, page, recompute: page, ..Style::plain() };
            let plan = accepted(&graph, StepShape::new(3, 100), style);
            for (kind, variants) in defects(&graph, &plan) {
                all.entry(kind).or_default().extend(variants);
            }
        }
    }
    let line = |(kind, variants): (&String, &BTreeSet<String>)| {
        let variants: Vec<&str> = variants.iter().map(String::as_str).collect();
        [kind, ": ", &variants.join(", "), "\n"].concat()
    };
    let table: String = all.iter().map(line).collect();
    expect![[r"
        a bound above the predicted time: TimeBound
        a buffer that ends before its last use: NotLive, ResidentLifetime
        a buffer that is not aligned: BufferMisaligned
        a buffer that outlives the step: BufferLifetime
        a buffer that starts after its first use: NotLive, ResidentLifetime
        a copy onto itself: CopyOverlap
        a copy that is cut short: CopyBytes
        a load that is certified too high: MaxLoad
        a load that is certified too low: MaxLoad
        a peak over the budget: OverBudget
        a peak that is certified too low: Peak
        a resident that starts late: ResidentLifetime
        a resident twice: ResidentTwice
        a resident without its role: ResidentMissing
        an arena that is too small: BufferOutsideArena
        cut the tokens of a run: CutInGranule
        drop a backward or update run: NotRun, SumOrder
        drop a copy: UnknownTag
        drop a needed run: Misread, SumOrder
        drop a wait: InFlight, Misread
        drop a zero: Misread
        exchange two operands: Misread, OperandBytes
        move the tokens of a run: Misread, SumOrder, Tokens
        no scratch: OperandCount
        one operand too many: OperandCount
        other threads: Threads
        read a parameter after its update: Misread
        repeat a backward or update run: SumAfterUpdate, SumOrder
        repeat a zero: ZeroedTwice
        run another op of this kind: Misread, OperandBytes, SumAfterUpdate, SumOrder
        scratch on top of a parameter: Misread, NotWritten
        scratch on top of data: NotWritten
        shift an operand down by 64 bytes: Misread
        shift an operand up by 64 bytes: Misread, OutsideBuffer
        swap a run with its first reader: Misread, SumOrder
        swap a zero with the first addition: Misread
        swap the chunks of a sum: SumOrder
        swap the last addition with a reader of the sum: SumIncomplete
        swap the uses of a tied sum: SumIncomplete
        take the operands of another chunk: Misread
        too little scratch: OperandBytes
        too much scratch: OperandBytes
        two live buffers on one place: BuffersOverlap
        update before the last reader of the parameter: SumIncomplete
        update before the norm of the gradient: Misread, SumAfterUpdate
        wait before the copy: UnknownTag
        work in place where the op cannot: OperandsOverlap
        write a value into another buffer: Misread
        zero the bytes of another sum: Misread
    "]]
    .assert_eq(&table);
}

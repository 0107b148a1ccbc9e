//! A plan as at most a given number of columns: what a picture shows of it.
//!
//! Long plans have 100,000 instructions and a screen 1,200 pixels. A column stands for a run of
//! consecutive instructions and shows the bytes at the one with the largest load, so the peak of the
//! plan is the peak of the picture, whatever the resolution.

use ounce_ir::{Graph, Phase, StageId};
use ounce_plan::timeline;
use ounce_program::{Category, Instr, LoopOrder, Plan};

/// What instructions do: the lanes under the picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    Forward,
    Recompute,
    Backward,
    Update,
}

impl Work {
    pub(super) const ALL: [Self; 4] =
        [Self::Forward, Self::Recompute, Self::Backward, Self::Update];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Recompute => "recompute",
            Self::Backward => "backward",
            Self::Update => "update",
        }
    }
}

/// Bytes per category, in the order of [`Category::ALL`].
pub(super) type Bytes = [u64; Category::ALL.len()];

/// Consecutive instructions of one stage or micro-batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) name: String,
    /// First instruction.
    pub(super) start: usize,
    /// One past the last instruction.
    pub(super) end: usize,
}

/// A plan made ready for drawing.
#[derive(Debug, Clone)]
pub(super) struct Columns {
    pub(super) n_instrs: usize,
    /// Per column, the instruction with the largest load.
    pub(super) instr: Vec<usize>,
    /// Per column, the bytes at that instruction.
    pub(super) bytes: Vec<Bytes>,
    /// Per column, what that instruction does.
    pub(super) doing: Vec<Work>,
    /// Per column and lane, whether any of its instructions does that work.
    pub(super) work: Vec<[bool; Work::ALL.len()]>,
    /// The column with the largest load; the first of several.
    pub(super) peak: usize,
    /// Instructions by stage; those without one belong to the stage around them, or to `update`.
    pub(super) stages: Vec<Span>,
    /// Instructions by micro-batch; empty if there is one only.
    pub(super) micro_batches: Vec<Span>,
}

impl Columns {
    /// At most `n_max` columns of `plan`, which was made for `graph`.
    pub(super) fn new(graph: &Graph, plan: &Plan, n_max: usize) -> Self {
        let rows = timeline(plan);
        let load = |i: usize| rows[i].iter().sum::<u64>();
        let work = work_of_instrs(graph, plan);
        let n_instrs = plan.instrs.len();
        let n = n_instrs.min(n_max);
        let mut columns = Self {
            n_instrs,
            instr: Vec::with_capacity(n),
            bytes: Vec::with_capacity(n),
            doing: Vec::with_capacity(n),
            work: Vec::with_capacity(n),
            peak: 0,
            stages: stage_spans(graph, plan),
            micro_batches: micro_batch_spans(graph, plan, &work),
        };
        for c in 0..n {
            let range = c * n_instrs / n..(c + 1) * n_instrs / n;
            let top = range.clone().rev().max_by_key(|&i| load(i)).expect("n is at most n_instrs");
            columns.instr.push(top);
            columns.bytes.push(rows[top]);
            columns.doing.push(work[top]);
            columns.work.push(Work::ALL.map(|w| range.clone().any(|i| work[i] == w)));
        }
        columns.peak = (0..n).rev().max_by_key(|&c| load(columns.instr[c])).unwrap_or(0);
        columns
    }

    /// Sum of the bytes of a column.
    pub(super) fn load(&self, column: usize) -> u64 {
        self.bytes[column].iter().sum()
    }
}

/// The lane of each instruction. A forward op on tokens that it has seen before is a recomputation;
/// what runs no op goes with the next op.
fn work_of_instrs(graph: &Graph, plan: &Plan) -> Vec<Work> {
    let mut seen_tokens = vec![0; graph.ops.len()];
    let mut work = vec![Work::Update; plan.instrs.len()];
    for (i, instr) in plan.instrs.iter().enumerate() {
        let Instr::Run { op, tokens, .. } = instr else { continue };
        let seen = &mut seen_tokens[op.0 as usize];
        work[i] = match graph.ops[*op].phase {
            Phase::Forward if tokens.start < *seen => Work::Recompute,
            Phase::Forward => Work::Forward,
            Phase::Backward => Work::Backward,
            Phase::Update => Work::Update,
        };
        *seen = tokens.end.max(*seen);
    }
    for i in (0..plan.instrs.len().saturating_sub(1)).rev() {
        if !matches!(plan.instrs[i], Instr::Run { .. }) {
            work[i] = work[i + 1];
        }
    }
    work
}

fn stage_of(graph: &Graph, instr: &Instr) -> Option<StageId> {
    match instr {
        Instr::Run { op, .. } => graph.ops[*op].stage,
        _ => None,
    }
}

fn stage_spans(graph: &Graph, plan: &Plan) -> Vec<Span> {
    let stages: Vec<_> = plan.instrs.iter().map(|i| stage_of(graph, i)).collect();
    let mut spans: Vec<(StageId, usize, usize)> = Vec::new();
    for (i, stage) in stages.iter().enumerate() {
        let Some(stage) = *stage else { continue };
        match spans.last_mut() {
            Some((last, _, end)) if *last == stage => *end = i + 1,
            // Zeroing and copies before a stage belong to it, updates between to the one before.
            last => {
                let is_update = |i: &usize| matches!(plan.instrs[*i], Instr::Run { .. });
                let before = last.map_or(0, |l| l.2);
                let start = (before..i).rev().take_while(|i| !is_update(i)).last().unwrap_or(i);
                if let Some((_, _, end)) = spans.last_mut() {
                    *end = start;
                }
                spans.push((stage, if spans.is_empty() { 0 } else { start }, i + 1));
            }
        }
    }
    let tail = spans.last().map_or(0, |s| s.2);
    let mut named: Vec<_> = spans
        .into_iter()
        .map(|(stage, start, end)| Span { name: graph.stages[stage].name.clone(), start, end })
        .collect();
    if tail < plan.instrs.len() {
        named.push(Span { name: "update".to_owned(), start: tail, end: plan.instrs.len() });
    }
    named
}

/// A micro-batch of a token-major plan begins where the first stage runs forward after anything else.
fn micro_batch_spans(graph: &Graph, plan: &Plan, work: &[Work]) -> Vec<Span> {
    if plan.choice.loop_order != LoopOrder::TokenMajor || plan.choice.n_micro_batches < 2 {
        return Vec::new();
    }
    let mut starts = Vec::new();
    let mut was_backward = true;
    for (i, instr) in plan.instrs.iter().enumerate() {
        let is_first_stage = stage_of(graph, instr).is_some_and(|s| s.0 == 0);
        match work[i] {
            Work::Forward if was_backward && is_first_stage => {
                starts.push(i);
                was_backward = false;
            }
            Work::Backward => was_backward = true,
            _ => {}
        }
    }
    let last_end = work.iter().rposition(|&w| w != Work::Update).map_or(0, |i| i + 1);
    let ends = starts.iter().copied().skip(1).chain([last_end]);
    let span = |(i, (&start, end)): (usize, (&usize, usize))| Span {
        name: format!("micro-batch {}", i + 1),
        start,
        end,
    };
    starts.iter().zip(ends).enumerate().map(span).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use ounce_ir::OptimizerKind;
    use ounce_models::{ModelConfig, Purpose};
    use ounce_plan::{Frontier, PlanOptions};
    use ounce_program::{FixedMachine, StepShape};

    /// Trains two layers of width 32 on a step of 4 rows of 256 tokens. `budget_bytes`: none, or that
    /// many bytes on top of the smallest feasible budget.
    fn planned(above_smallest_bytes: Option<u64>, options: PlanOptions) -> (Graph, Plan) {
        let config = r#"{"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4,
                         "n_positions": 256, "vocab_size": 97}"#;
        let config = ModelConfig::from_json(config).unwrap();
        let forward = ounce_models::build(&config, Purpose::Loss, 0.0).unwrap();
        let both = ounce_passes::differentiate(&forward).unwrap();
        let graph = ounce_passes::attach_optimizer(&both, OptimizerKind::AdamW, true).unwrap();
        let machine = FixedMachine { baseline_bytes: 1 << 20, ..FixedMachine::default() };
        let frontier = Frontier::solve(&graph, &StepShape::new(4, 256), &machine, &options);
        let budget = above_smallest_bytes.map_or(u64::MAX, |b| frontier.smallest_bytes() + b);
        let plan = frontier.plan(budget).unwrap();
        drop(frontier);
        (graph, plan)
    }

    pub(in super::super) fn small(above_smallest_bytes: Option<u64>) -> (Graph, Plan) {
        planned(above_smallest_bytes, PlanOptions::default())
    }

    pub(in super::super) fn micro_batched() -> (Graph, Plan) {
        let order = Some(LoopOrder::TokenMajor);
        planned(
            None,
            PlanOptions { micro_batches: Some(4), loop_order: order, ..Default::default() },
        )
    }

    #[test]
    fn the_peak_is_the_same_at_every_resolution() {
        let (graph, plan) = small(Some(0));
        assert!(plan.instrs.len() > 300, "{}", plan.instrs.len());
        for n_max in [1, 7, 100, 10_000] {
            let c = Columns::new(&graph, &plan, n_max);
            assert_eq!(c.bytes.len(), n_max.min(plan.instrs.len()));
            assert_eq!(c.load(c.peak), plan.certificate.max_load_bytes);
        }
    }

    #[test]
    fn a_column_shows_the_largest_load_of_its_instructions() {
        let (graph, plan) = small(Some(0));
        let rows = timeline(&plan);
        let n = rows.len();
        let c = Columns::new(&graph, &plan, 10);
        for (i, &at) in c.instr.iter().enumerate() {
            let range = i * n / 10..(i + 1) * n / 10;
            assert!(range.contains(&at));
            assert_eq!(c.bytes[i], rows[at]);
            assert_eq!(c.load(i), range.map(|r| rows[r].iter().sum::<u64>()).max().unwrap());
        }
    }

    #[test]
    fn spans_cover_every_instruction_once_and_in_order() {
        for (graph, plan) in [small(None), small(Some(0)), micro_batched()] {
            let spans = Columns::new(&graph, &plan, 100).stages;
            assert_eq!(spans[0].start, 0);
            assert_eq!(spans.last().unwrap().end, plan.instrs.len());
            assert!(spans.windows(2).all(|w| w[0].end == w[1].start && w[0].name != w[1].name));
        }
    }

    #[test]
    fn a_step_goes_through_the_stages_forth_and_back() {
        let (graph, plan) = small(None);
        let spans = Columns::new(&graph, &plan, 100).stages;
        let names: Vec<_> = spans.iter().map(|s| s.name.as_str()).collect();
        let forth = ["embed", "attn.0", "mlp.0", "attn.1", "mlp.1", "head"];
        let back = ["mlp.1", "attn.1", "mlp.0", "attn.0", "embed", "update"];
        assert_eq!(names, [forth, back].concat());
    }

    #[test]
    fn work_is_told_apart() {
        let count = |plan: &Plan, work: &[Work], w| {
            let is = |(i, x): (&Instr, &Work)| *x == w && matches!(i, Instr::Run { .. });
            plan.instrs.iter().zip(work).filter(|&p| is(p)).count() as u64
        };
        for (graph, plan) in [small(None), small(Some(0)), micro_batched()] {
            let work = work_of_instrs(&graph, &plan);
            let n_updates = graph.ops.values().filter(|o| o.phase == Phase::Update).count();
            assert_eq!(count(&plan, &work, Work::Update), n_updates as u64);
            assert!(count(&plan, &work, Work::Backward) > 0);
            let recomputes = plan.choice.n_recomputed > 0;
            assert_eq!(count(&plan, &work, Work::Recompute) > 0, recomputes);
        }
    }

    #[test]
    fn micro_batches_are_found_in_token_major_plans() {
        let (graph, plan) = micro_batched();
        let spans = Columns::new(&graph, &plan, 100).micro_batches;
        let names: Vec<_> = spans.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["micro-batch 1", "micro-batch 2", "micro-batch 3", "micro-batch 4"]);
        assert!(spans.windows(2).all(|w| w[0].end == w[1].start));
        let (graph, plan) = small(Some(0));
        assert_eq!(Columns::new(&graph, &plan, 100).micro_batches, []);
    }
}

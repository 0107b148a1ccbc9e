//! A thousand random models and budgets: losses, norms and weights after two steps are the same bits
//! as those of the keep-everything plan, whatever the budget, micro-batches, loop order and threads,
//! in every precision.

use std::sync::Arc;

use ounce_exec::{Arena, Executor, MeasuredMachine, OptimizerHyper, RowSpan, StepInputs};
use ounce_ir::{Graph, InputKind, OpId, OpKind, OptimizerKind, ValueKind};
use ounce_kernels::pool::Pool;
use ounce_oracle::{RandomCase, TestRng, random_case};
use ounce_passes::{Precision, PrecisionPolicy};
use ounce_plan::{Frontier, PlanOptions};
use ounce_program::{FixedMachine, LoopOrder, Machine, Plan, StepShape};

const N_CASES: u64 = 1000;
const N_STEPS: u64 = 2;

/// Real scratch bytes, fixed costs: plans that do not depend on the weather.
struct TestMachine {
    kernels: MeasuredMachine,
    costs: FixedMachine,
}

impl Machine for TestMachine {
    fn n_threads(&self) -> u32 {
        self.kernels.n_threads()
    }
    fn scratch_bytes(&self, graph: &Graph, op: OpId, n_tokens: u64) -> u64 {
        self.kernels.scratch_bytes(graph, op, n_tokens)
    }
    fn cost_s(&self, graph: &Graph, op: OpId, shape: &StepShape, n_tokens: u64) -> f64 {
        self.costs.cost_s(graph, op, shape, n_tokens)
    }
    fn baseline_bytes(&self) -> u64 {
        0
    }
}

/// Everything a run leaves behind, as bits.
type Trace = Vec<u32>;

fn run(case: &RandomCase, graph: &Graph, plan: &Plan, pool: Arc<Pool>, seed: u64) -> Trace {
    let executor = Executor::new(graph, plan, pool).expect("an accepted plan resolves");
    let mut arena = Arena::reserve(executor.arena_bytes()).expect("a small reservation");
    let mut rng = TestRng::new(seed);
    let mut buffers = executor.buffers(&mut arena);
    for (p, param) in graph.params.iter() {
        let values = (0..param.shape.row_elems()).map(|_| rng.symmetric() as f32 * 0.5);
        buffers.write_master(p, 0, &values.collect::<Vec<_>>());
    }
    // The clip scale takes it out again.
    let clips = graph.ops.values().any(|op| op.kind == OpKind::ClipScale);
    let loss_scale = if clips { 256.0 } else { 1.0 };
    let mut trace = Trace::new();
    for step in 1..=N_STEPS {
        let rows = fill_data(case, graph, &executor, &mut arena, &mut rng);
        let hyper = OptimizerHyper { weight_decay: 0.1, ..OptimizerHyper::default() };
        let supervised: u64 = rows.iter().map(|r| r.len as u64 - 1).sum();
        let done = executor.run(
            &mut arena,
            &StepInputs {
                seed,
                step,
                update: step,
                grad_scale: 1.0 / supervised as f32,
                loss_scale,
                lr: 0.01,
                hyper,
                max_grad_norm: 0.5,
                rows: &rows,
            },
        );
        done.expect("finite numbers");
        let mut buffers = executor.buffers(&mut arena);
        for (v, value) in graph.values.iter() {
            match value.kind {
                ValueKind::Loss => trace.extend(buffers.session_f32(v).iter().map(|x| x.to_bits())),
                ValueKind::Scalar if value.dtype == ounce_ir::DType::F64 => {
                    let bits = buffers.session_f64(v)[0].to_bits();
                    trace.extend([bits as u32, (bits >> 32) as u32]);
                }
                _ => {}
            }
        }
    }
    let mut buffers = executor.buffers(&mut arena);
    for (p, param) in graph.params.iter() {
        let mut values = vec![0.0; param.shape.row_elems() as usize];
        buffers.read_master(p, 0, &mut values);
        trace.extend(values.iter().map(|x| x.to_bits()));
    }
    trace
}

/// Random rows of random lengths, each token predicting the next.
fn fill_data(
    case: &RandomCase,
    graph: &Graph,
    executor: &Executor,
    arena: &mut Arena,
    rng: &mut TestRng,
) -> Vec<RowSpan> {
    let shape = case.shape;
    let n = shape.n_tokens() as usize;
    let (mut ids, mut positions, mut targets) = (vec![-1; n], vec![0; n], vec![-1; n]);
    let mut rows = Vec::new();
    for r in 0..shape.n_rows {
        let start = shape.tokens_of_rows(r..r + 1).start as usize;
        let len = 2 + rng.below(shape.row_tokens - 1) as usize;
        for t in 0..len {
            ids[start + t] = rng.below(case.vocab) as i32;
            positions[start + t] = t as i32;
        }
        for t in 0..len - 1 {
            targets[start + t] = ids[start + t + 1];
        }
        rows.push(RowSpan { start, len });
    }
    let mut buffers = executor.buffers(arena);
    for (v, value) in graph.values.iter() {
        let data = match value.kind {
            ValueKind::Input(InputKind::TokenIds) => &ids,
            ValueKind::Input(InputKind::Positions) => &positions,
            ValueKind::Input(InputKind::Targets) => &targets,
            _ => continue,
        };
        buffers.session_i32(v).copy_from_slice(data);
    }
    rows
}

fn machine(pool: &Arc<Pool>) -> TestMachine {
    let kernels = MeasuredMachine::new(Arc::clone(pool), 0, 0, None);
    let costs = FixedMachine { n_threads: pool.n_threads() as u32, ..FixedMachine::default() };
    TestMachine { kernels, costs }
}

#[test]
fn every_plan_gives_the_bits_of_keeping_everything() {
    let pools: Vec<Arc<Pool>> = (1..=3).map(|n| Arc::new(Pool::new(n))).collect();
    for seed in 0..N_CASES {
        let mut rng = TestRng::new(seed ^ 0x5A3E);
        let case = random_case(seed, 4);
        let both = ounce_passes::differentiate(&case.graph).expect("every op has a gradient");
        let policy = PrecisionPolicy::new(rng.pick(&Precision::ALL));
        let both = ounce_passes::lower_precision(&both, &policy);
        let graph = ounce_passes::attach_optimizer(&both, OptimizerKind::AdamW, rng.coin())
            .expect("the optimizer attaches");
        let keep_all = PlanOptions {
            micro_batches: Some(1),
            n_halvings: 0,
            max_points: 64,
            ..PlanOptions::default()
        };
        let m = machine(&pools[0]);
        let plan = Frontier::solve(&graph, &case.shape, &m, &keep_all).plan(u64::MAX);
        let plan = plan.expect("no budget");
        let expected = run(&case, &graph, &plan, Arc::clone(&pools[0]), seed);

        let pool = &pools[rng.below(3) as usize];
        let m = machine(pool);
        let order = rng.pick(&[None, Some(LoopOrder::TokenMajor), Some(LoopOrder::LayerMajor)]);
        let n_halvings = rng.below(3) as u32;
        let options = PlanOptions {
            loop_order: order,
            n_halvings,
            max_points: 128,
            ..PlanOptions::default()
        };
        let frontier = Frontier::solve(&graph, &case.shape, &m, &options);
        let smallest = frontier.smallest_bytes();
        let largest = frontier.points().last().expect("a frontier has points").0;
        let budget = smallest + rng.below(largest.saturating_sub(smallest) + 1) / 2;
        let plan = frontier.plan(budget).expect("at least the smallest budget");
        ounce_check::check(&graph, &plan, &m).expect("the checker accepts the plan");
        let got = run(&case, &graph, &plan, Arc::clone(pool), seed);
        assert!(expected == got, "seed {seed}: other bits at {budget} bytes, {:?}", plan.choice);
    }
}

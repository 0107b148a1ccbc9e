//! A program: a graph with its plan, checked and resolved, so that it can run.
//!
//! The plan that the checker accepts is the plan that runs.

use std::collections::BTreeMap;
use std::sync::Arc;

use ounce_exec::{Executor, MeasuredMachine};
use ounce_ir::{Graph, OpId, ValueId, ValueKind};
use ounce_kernels::pool::Pool;
use ounce_passes::OpClass;
use ounce_program::{Buffer, BufferRole, Certificate, Choice, Instr, Machine, Plan, StepShape};

use crate::baseline::INSTR_BYTES;
use crate::batch::DataInputs;
use crate::budget::format_bytes;
use crate::graphs::{Job, PerPurpose, states};
use crate::model::Model;
use crate::watch::plan_html;
use crate::{Error, Result};

/// A graph with its plan, checked and resolved.
pub(crate) struct Program {
    pub(crate) graph: Graph,
    pub(crate) shape: StepShape,
    pub(crate) inputs: DataInputs,
    /// Loss of every token, or logits of the selected ones.
    pub(crate) output: ValueId,
    pub(crate) executor: Executor,
    /// Ids are below it.
    pub(crate) vocab_size: u64,
    pub(crate) certificate: Certificate,
    /// Predicted seconds of a step by kind of op, by the op's name.
    pub(crate) predicted_s: BTreeMap<&'static str, f64>,
    pub(crate) choice: Choice,
    /// Where the bytes are at the peak, for people.
    pub(crate) table: String,
    /// `plan.html` of a training step.
    pub(crate) picture: Option<String>,
    /// (offset, bytes) of every parameter, by `ParamId`.
    params: Vec<(u64, u64)>,
    /// (offset, bytes) of every optimizer state, by parameter.
    states: Vec<(u64, u64)>,
    /// Parameters and optimizer states: what loading fills and saving reads.
    pub(crate) stored_bytes: u64,
    /// Where anything else begins.
    working_at: u64,
    /// What its many instructions take beside the baseline.
    pub(crate) tables_bytes: u64,
}

/// An op whose numbers left the range of what they are stored in.
pub(crate) struct Overflow {
    pub(crate) class: OpClass,
    /// The op and the value that it wrote.
    pub(crate) name: String,
}

impl Program {
    /// What there is to say of an op that overflowed.
    pub(crate) fn overflow(&self, (op, value): (OpId, ValueId)) -> Overflow {
        let kind = &self.graph.ops[op].kind;
        let name = format!("{} ({})", kind.name(), self.graph.values[value].name);
        Overflow { class: OpClass::of(kind), name }
    }
}

/// Checks a plan and makes it runnable.
///
/// # Errors
/// [`Error::Bug`] for a plan that is not the one that was asked for; an arena beyond what is addressed.
pub(crate) fn resolve(
    model: &Model,
    job: &Job,
    plan: &Plan,
    machine: &MeasuredMachine,
    pool: &Arc<Pool>,
    budget_bytes: u64,
) -> Result<Program> {
    let graph = &job.graph;
    check(job, plan, machine, budget_bytes)?;
    let trains = graph.ops.values().any(|op| op.updates.is_some());
    let title = format!("{}: one training step", model.path.display());
    let output = graph
        .find_value(ValueKind::Loss)
        .or_else(|| graph.find_value(ValueKind::Result))
        .expect("a model ends in a loss or in logits");
    let place = |role| {
        let buffer = plan.find_buffer(role).expect("parameters and states are resident");
        (plan.buffers[buffer].offset, plan.buffers[buffer].bytes)
    };
    let is_stored = |b: &&Buffer| matches!(b.role, BufferRole::Param(_) | BufferRole::State(_, _));
    let working = plan.buffers.values().filter(|b| !is_stored(b));
    Ok(Program {
        shape: job.shape,
        inputs: DataInputs::of(graph),
        output,
        executor: Executor::new(graph, plan, pool.clone())?,
        vocab_size: model.config.vocab_size(),
        certificate: plan.certificate,
        predicted_s: predicted_s(graph, plan, machine),
        choice: plan.choice.clone(),
        table: ounce_plan::explain(plan),
        picture: trains.then(|| plan_html(graph, plan, &title)),
        params: graph.params.ids().map(|p| place(BufferRole::Param(p))).collect(),
        states: states(graph).map(|(p, _, k)| place(BufferRole::State(p, k as u32))).collect(),
        stored_bytes: plan.buffers.values().filter(is_stored).map(|b| b.bytes).sum(),
        tables_bytes: plan.baseline_bytes - machine.baseline_bytes(),
        working_at: working.map(|b| b.offset).min().unwrap_or(u64::MAX),
        graph: graph.clone(),
    })
}

/// Proves the plan, and that it is for this step and this budget, whatever it says of itself.
fn check(job: &Job, plan: &Plan, machine: &MeasuredMachine, budget_bytes: u64) -> Result<()> {
    let bug = |message| Err(Error::Bug { message });
    let proof = match ounce_check::check(&job.graph, plan, machine) {
        Ok(proof) => proof,
        Err(e) => return bug(format!("the checker refuses the plan: {e}")),
    };
    // The checker knows what the machine declares, not what instructions take.
    let n_instrs = plan.instrs.len() as u64;
    let tables_bytes = INSTR_BYTES.beside_baseline(&job.graph, n_instrs);
    if plan.baseline_bytes != machine.baseline_bytes() + tables_bytes {
        let declared = format_bytes(plan.baseline_bytes);
        return bug(format!("the plan declares {declared} for {n_instrs} instructions"));
    }
    if plan.shape != job.shape {
        return bug(format!("the plan is for {:?}", plan.shape));
    }
    if proof.peak_bytes > budget_bytes {
        let peak = format_bytes(proof.peak_bytes);
        return bug(format!("the plan's peak of {peak} is over the budget"));
    }
    if plan.arena_bytes > ounce_exec::MAX_ARENA_BYTES {
        return Err(Error::Usage {
            message: format!(
                "the plan takes an arena of {}, and {} are the most that this version addresses",
                format_bytes(plan.arena_bytes),
                format_bytes(ounce_exec::MAX_ARENA_BYTES)
            ),
            hint: "give less `--memory`, or take a smaller model or step".to_owned(),
        });
    }
    Ok(())
}

/// Predicted seconds of a step by kind of op.
fn predicted_s(
    graph: &Graph,
    plan: &Plan,
    machine: &MeasuredMachine,
) -> BTreeMap<&'static str, f64> {
    // A cost is looked up once for all runs on as many tokens.
    let mut n_runs: BTreeMap<(OpId, u64), u64> = BTreeMap::new();
    for instr in &plan.instrs {
        if let Instr::Run { op, tokens, .. } = instr {
            *n_runs.entry((*op, tokens.end - tokens.start)).or_default() += 1;
        }
    }
    let mut predicted_s = BTreeMap::new();
    for ((op, n_tokens), n_runs) in n_runs {
        let cost_s = machine.cost_s(graph, op, &plan.shape, n_tokens);
        *predicted_s.entry(graph.ops[op].kind.name()).or_default() += n_runs as f64 * cost_s;
    }
    predicted_s
}

/// Every plan must find the same parameters, and every training step the same states, in the same
/// place; no plan writes anything else there.
pub(crate) fn check_shared_params(programs: &PerPurpose<Program>) {
    let names = |p: &Program| -> Vec<String> {
        p.graph.params.values().map(|param| param.name.clone()).collect()
    };
    for (one, next) in programs.iter().zip(programs.iter().skip(1)) {
        assert_eq!(names(one), names(next), "graphs of one model have one parameter list");
        assert_eq!(one.params, next.params, "plans of one run place parameters alike");
        let both_train = !one.states.is_empty() && !next.states.is_empty();
        assert!(!both_train || one.states == next.states, "and training steps their states");
    }
    let stored = programs.iter().flat_map(|p| p.params.iter().chain(&p.states));
    let end = stored.map(|(offset, bytes)| offset + bytes).max().unwrap_or(0);
    let is_apart = programs.iter().all(|p| p.working_at >= end);
    assert!(is_apart, "no plan of a run works where another keeps parameters or states");
}

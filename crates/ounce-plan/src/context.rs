//! What the planner derives once from a graph: who produces, who reads, who adds to which sum.

use std::ops::Range;

use ounce_ir::{
    EntityId, Graph, Lead, OpId, OpKind, ParamId, Phase, Stage, StageId, ValueId, ValueKind,
};
use ounce_program::{Machine, StepShape};

/// Groups of a stage (the outputs of an op that the backward reads) that may be kept, whose subsets are enumerated. No
/// family has as many; the later ones of a larger stage, in a graph of one's own, are always recomputed.
pub(crate) const MAX_KEEPABLE_GROUPS: usize = 12;

/// A graph with its step shape, its machine and the tables that emission needs.
pub(crate) struct Context<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) shape: StepShape,
    pub(crate) machine: &'a dyn Machine,
    /// Micro-batches per step.
    pub(crate) n_micro: u64,
    /// Forward ops of each stage, in program order.
    pub(crate) forward: Vec<Vec<OpId>>,
    /// Backward ops of each stage, in program order.
    pub(crate) backward: Vec<Vec<OpId>>,
    /// Update ops, in program order.
    pub(crate) update: Vec<OpId>,
    /// Update ops that read or complete a sum of the stage.
    pub(crate) stage_updates: Vec<Vec<OpId>>,
    /// Groups of values of each stage that can be kept: outputs of one forward op stand or fall
    /// together. Only values that the stage's backward reads, never its input or output.
    pub(crate) keepable: Vec<Vec<Vec<ValueId>>>,
    /// The op that writes a value.
    pub(crate) producer: Vec<Option<OpId>>,
    /// Tokens still to be added to a sum by token ops, over the whole step; scatters count one.
    pub(crate) contributions: Vec<u64>,
    /// Sums that outlive the stage in which they start.
    pub(crate) held: Vec<bool>,
    /// The stage whose backward starts a sum; `None` for sums that only scatters add to.
    pub(crate) starts: Vec<Option<usize>>,
}

impl<'a> Context<'a> {
    pub(crate) fn new(
        graph: &'a Graph,
        shape: StepShape,
        machine: &'a dyn Machine,
        n_micro: u64,
    ) -> Self {
        let n_stages = graph.stages.len();
        let mut cx = Self {
            graph,
            shape,
            machine,
            n_micro,
            forward: vec![Vec::new(); n_stages],
            backward: vec![Vec::new(); n_stages],
            update: Vec::new(),
            stage_updates: vec![Vec::new(); n_stages],
            keepable: Vec::new(),
            producer: vec![None; graph.values.len()],
            contributions: vec![0; graph.values.len()],
            held: vec![false; graph.values.len()],
            starts: vec![None; graph.values.len()],
        };
        for (id, op) in graph.ops.iter() {
            match (op.phase, op.stage) {
                (Phase::Forward, Some(s)) => cx.forward[s.index()].push(id),
                (Phase::Backward, Some(s)) => cx.backward[s.index()].push(id),
                _ => cx.update.push(id),
            }
            for v in &op.outputs {
                cx.producer[v.index()] = Some(id);
            }
            for v in &op.sums {
                let n = if op.phase == Phase::Update { 1 } else { shape.n_tokens() };
                cx.contributions[v.index()] += n;
            }
        }
        cx.find_held_sums();
        cx.find_stage_updates();
        cx.keepable = (0..n_stages).map(|s| cx.keepable_groups(s)).collect();
        cx
    }

    fn find_stage_updates(&mut self) {
        let graph = self.graph;
        // The last stage (in program order: the first to run backward last) that adds to each sum.
        let mut stage_of = vec![None; graph.values.len()];
        for op in graph.ops.values() {
            for v in &op.sums {
                if op.stage.is_some() {
                    stage_of[v.index()] = op.stage;
                }
            }
        }
        for &id in &self.update {
            let op = &graph.ops[id];
            // What a scatter completes belongs to the stage of its rows.
            // What waits for the clip scale does not run within a stage.
            if op.updates.is_some() && op.inputs.len() > 1 {
                continue;
            }
            let stage = op.inputs.iter().find_map(|v| stage_of[v.index()]);
            for v in &op.sums {
                stage_of[v.index()] = stage_of[v.index()].or(stage);
            }
            if let Some(s) = stage {
                self.stage_updates[s.index()].push(id);
            }
        }
    }

    fn keepable_groups(&self, stage: usize) -> Vec<Vec<ValueId>> {
        let output = self.stage(stage).output;
        let read = |v: &&ValueId| {
            let reads = |&op: &OpId| self.graph.ops[op].inputs.contains(v);
            Some(**v) != output && self.backward[stage].iter().any(reads)
        };
        let group = |&op: &OpId| -> Vec<ValueId> {
            self.graph.ops[op].outputs.iter().filter(read).copied().collect()
        };
        let mut groups: Vec<_> = self.forward[stage].iter().map(group).collect();
        groups.retain(|g| !g.is_empty());
        groups.truncate(MAX_KEEPABLE_GROUPS);
        groups
    }

    /// The values of the groups in a mask.
    pub(crate) fn kept(&self, stage: usize, keep: u32) -> Vec<ValueId> {
        let groups = self.keepable[stage].iter().enumerate();
        groups.filter(|(i, _)| keep & (1 << i) != 0).flat_map(|(_, g)| g).copied().collect()
    }

    /// The `s`-th stage.
    pub(crate) fn stage(&self, s: usize) -> &'a Stage {
        &self.graph.stages[StageId::from_index(s)]
    }

    /// A sum is held if more than one micro-batch, stage or the clip scale stand before its update.
    fn find_held_sums(&mut self) {
        let graph = self.graph;
        let clipped = graph.ops.values().any(|op| op.kind == OpKind::ClipScale);
        for (v, value) in graph.values.iter() {
            if !matches!(value.kind, ValueKind::Sum(_)) {
                continue;
            }
            let adders = graph.ops.values().filter(|op| op.sums.contains(&v));
            let stages: Vec<Option<StageId>> = adders.map(|op| op.stage).collect();
            // Backward runs from the last stage to the first.
            self.starts[v.index()] = stages.iter().flatten().max().map(|s| s.index());
            // A rows sum and the dense sum it is scattered into end with the embedding's stage,
            // the last one to run backward; a dense sum that the head adds to does not.
            let only_scattered = stages.iter().all(Option::is_none);
            let across = !only_scattered && stages.iter().any(|s| *s != stages[0]);
            let rows = value.shape.lead == Lead::Tokens;
            self.held[v.index()] = self.n_micro > 1 || across || (clipped && !rows);
        }
    }

    /// Sums that outlive a stage, in order of their ids.
    pub(crate) fn held_sums(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.graph.values.ids().filter(|&v| self.is_sum(v) && self.held[v.index()])
    }

    /// Whether a held sum is there all the time: from the second micro-batch on all of them are.
    pub(crate) fn held_throughout(&self, v: ValueId) -> bool {
        self.n_micro > 1 && self.starts[v.index()].is_some()
    }

    /// Bytes of held sums that come into being when stage `s` runs backward.
    pub(crate) fn grown_bytes(&self, s: usize) -> u64 {
        let own = |v: &ValueId| self.starts[v.index()] == Some(s) && !self.held_throughout(*v);
        self.held_sums().filter(own).map(|v| self.value_bytes(v, self.shape.n_tokens())).sum()
    }

    pub(crate) fn n_stages(&self) -> usize {
        self.graph.stages.len()
    }

    /// Whether the graph ends in an update (else it only runs forward).
    pub(crate) fn trains(&self) -> bool {
        self.backward.iter().any(|ops| !ops.is_empty())
    }

    /// Tokens of one micro-batch.
    pub(crate) fn micro_tokens(&self) -> u64 {
        self.shape.n_tokens() / self.n_micro
    }

    /// Tokens of the `i`-th micro-batch.
    pub(crate) fn micro_range(&self, i: u64) -> Range<u64> {
        i * self.micro_tokens()..(i + 1) * self.micro_tokens()
    }

    pub(crate) fn is_session(&self, v: ValueId) -> bool {
        matches!(
            self.graph.values[v].kind,
            ValueKind::Input(_) | ValueKind::Loss | ValueKind::Scalar | ValueKind::Result
        )
    }

    pub(crate) fn is_sum(&self, v: ValueId) -> bool {
        matches!(self.graph.values[v].kind, ValueKind::Sum(_))
    }

    /// Bytes of one token's row of a value; all bytes of a fixed one.
    pub(crate) fn row_bytes(&self, v: ValueId) -> u64 {
        self.graph.values[v].bytes(1)
    }

    /// Bytes of a value over `n_tokens` tokens, rounded up to the alignment of buffers.
    pub(crate) fn value_bytes(&self, v: ValueId, n_tokens: u64) -> u64 {
        let value = &self.graph.values[v];
        let n = match value.shape.lead {
            Lead::Fixed => 0,
            Lead::Tokens => n_tokens,
            Lead::Selected => self.shape.n_selected,
        };
        align(value.bytes(n))
    }

    /// Bytes of a cut value of a micro-batch (0 where a stage has none).
    pub(crate) fn cut_bytes(&self, v: Option<ValueId>) -> u64 {
        v.map_or(0, |v| self.value_bytes(v, self.micro_tokens()))
    }

    pub(crate) fn cost_s(&self, op: OpId, n_tokens: u64) -> f64 {
        self.machine.cost_s(self.graph, op, &self.shape, n_tokens)
    }

    /// Seconds of one micro-batch of `op` run in chunks.
    pub(crate) fn chunked_cost_s(&self, op: OpId, chunk_tokens: u64) -> f64 {
        let n = self.micro_tokens();
        let rest = n % chunk_tokens;
        let full = (n / chunk_tokens) as f64 * self.cost_s(op, chunk_tokens);
        full + if rest > 0 { self.cost_s(op, rest) } else { 0.0 }
    }

    /// Seconds of the whole update.
    pub(crate) fn update_s(&self) -> f64 {
        self.update.iter().map(|&op| self.cost_s(op, self.shape.n_tokens())).sum()
    }

    /// Trained parameters.
    pub(crate) fn trained(&self) -> impl Iterator<Item = ParamId> + '_ {
        self.update.iter().filter_map(|&op| self.graph.ops[op].updates)
    }

    /// Whether the stage may not be cut (it holds ops over selected rows).
    pub(crate) fn whole(&self, s: usize) -> bool {
        let selected = |v: &ValueId| self.graph.values[*v].shape.lead == Lead::Selected;
        self.forward[s].iter().any(|&op| self.graph.ops[op].outputs.iter().any(selected))
    }

    /// Where the stage may be cut: between rows if it mixes tokens, else at any granule.
    pub(crate) fn cut_tokens(&self, s: usize) -> u64 {
        let mixes = self.forward[s].iter().any(|&op| self.graph.ops[op].kind.needs_whole_rows());
        if mixes { self.shape.row_stride() } else { ounce_program::GRANULE_TOKENS }
    }
}

/// Buffers start at multiples of a cache line.
pub(crate) const ALIGN_BYTES: u64 = 64;

/// `bytes`, rounded up to the alignment.
pub(crate) fn align(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGN_BYTES)
}

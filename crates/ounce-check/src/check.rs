//! The checker: a plan is replayed on a machine whose memory holds meanings instead of numbers.
//!
//! # The idea
//!
//! A planner is large and clever, a checker can be small and obvious. As in translation validation
//! (and as regalloc2's checker does for register allocation), nothing is proved about the planner:
//! each plan is proved by itself, before it runs.
//!
//! The plan is looked at twice, and the two views share no facts.
//!
//! 1. *Packing* (`buffers`): buffers are ranges of bytes with lifetimes, whatever they hold. No two
//!    live ones share a byte, all lie inside the arena, and every operand of every instruction lies
//!    inside its buffer while that buffer lives. The arena's height then bounds what is touched.
//! 2. *Meaning* (this file): memory is a map from addresses to contents, whatever buffers there are.
//!    A content is "byte k of value v", "of parameter p, not yet updated", "of sum s after so many
//!    additions". Instructions move contents: an op demands exactly its operands' contents, for
//!    exactly its tokens, and leaves its results'; anything else it writes becomes unreadable.
//!    An offset that is wrong by one row, a buffer that was reused too early, a value that was never
//!    recomputed: all end as "reads this, but finds that".
//!
//! # What is proved
//!
//! For a graph of any kind (training, evaluation, decoding), about one step from any inputs:
//!
//! * every operand is the one that the op table and the tokens demand, scratch included, and every
//!   read finds it. Hence, by induction over the instructions, every value equals the one of the run
//!   that keeps everything and cuts nothing, since ops compute row by row (those that mix the tokens
//!   of a row are cut between rows) and a repeated op has the same operands and the same random key;
//! * every sum starts from zero and takes every token of every op that adds to it once, ascending, op
//!   after op in program order, and is complete when it is read. Rounding is thus the same for all
//!   plans of a step;
//! * every backward and update op runs exactly once per token or step; forward ops and backward ops
//!   read parameters from before the update, and afterwards data, parameters, states, loss, results
//!   and scalars lie where the session looks for them;
//! * an op writes over its own operands only where `Graph::in_place` lists the pair;
//! * a transfer's source stays as it is and its destination is left alone until the wait, and every
//!   transfer is waited for;
//! * the peak is arena plus baseline, it fits the budget, and no placement of these buffers at these
//!   times could be lower than the certificate's largest load.
//!
//! # What is not
//!
//! That the graph is the derivative of the model (`ounce-passes` and the oracle's finite differences
//! are about that; that it is well formed, `ounce_ir::verify` says, which is asked first), that
//! kernels do what the op table says and need no more scratch than the machine promises, and that
//! the predicted times are true.
//!
//! Complexity: `O((instructions x operands + buffers) log)`; no step of it looks at a whole table.

use std::collections::BTreeMap;
use std::ops::Range;

use ounce_ir::{Graph, Op, OpId, Phase, ValueId, verify};
use ounce_program::{BufferRef, GRANULE_TOKENS, Instr, Machine, Plan, Tag, Tier};

use crate::buffers::{ALIGN_BYTES, Resident, check_packing, find_residents};
use crate::memory::{Content, Memory, Piece, Place, Thing};
use crate::operands::{Access, Operand, What, has_selected_rows, is_dense_sum, operands};
use crate::{At, CheckError};

/// What was proved, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// Peak of the process: arena and declared baseline.
    pub peak_bytes: u64,
    /// Largest sum of live bytes at any moment, plus the baseline.
    pub max_load_bytes: u64,
    /// Instructions of the step.
    pub n_instrs: usize,
}

/// Proves that `plan` computes one step of `graph` within its budget.
///
/// `machine` is the one that the plan was made for: it says how much scratch each run must have, for
/// how many threads, and how large the process is outside the arena.
///
/// # Errors
/// The first defect, in the order: threads, graph, packing, resident buffers, instructions, what the step leaves
/// behind, certificate.
pub fn check(graph: &Graph, plan: &Plan, machine: &dyn Machine) -> Result<Proof, CheckError> {
    if plan.n_threads != machine.n_threads() {
        let (plan_threads, machine_threads) = (plan.n_threads, machine.n_threads());
        return Err(CheckError::Threads { plan_threads, machine_threads });
    }
    if let Some(defect) = verify(graph).err().and_then(|errors| errors.into_iter().next()) {
        return Err(CheckError::Graph(defect));
    }
    let load_bytes = check_packing(graph, plan)?;
    let residents = find_residents(graph, plan)?;
    let mut replay = Replay::new(graph, plan, machine, &residents);
    for (i, instr) in plan.instrs.iter().enumerate() {
        replay.step(i, instr)?;
    }
    replay.finish(&residents)?;
    check_certificate(plan, machine, load_bytes)
}

fn check_certificate(
    plan: &Plan,
    machine: &dyn Machine,
    load_bytes: u64,
) -> Result<Proof, CheckError> {
    let c = &plan.certificate;
    let (plan_bytes, machine_bytes) = (plan.baseline_bytes, machine.baseline_bytes());
    if plan_bytes < machine_bytes {
        return Err(CheckError::Baseline { plan_bytes, machine_bytes });
    }
    let peak_bytes = plan.arena_bytes.saturating_add(plan_bytes);
    if c.peak_bytes != peak_bytes {
        return Err(CheckError::Peak { certified_bytes: c.peak_bytes, peak_bytes });
    }
    let max_load_bytes = load_bytes + plan_bytes;
    if c.max_load_bytes != max_load_bytes {
        let certified_bytes = c.max_load_bytes;
        return Err(CheckError::MaxLoad { certified_bytes, max_load_bytes });
    }
    if peak_bytes > c.budget_bytes {
        return Err(CheckError::OverBudget { peak_bytes, budget_bytes: c.budget_bytes });
    }
    // Sums of estimates: equal up to rounding is equal. Written so that a NaN fails.
    let (step_s, bound_s) = (c.step_s, c.step_bound_s);
    let bounded = bound_s <= step_s * (1.0 + 1e-6);
    if !bounded {
        return Err(CheckError::TimeBound { step_s, bound_s });
    }
    Ok(Proof { peak_bytes, max_load_bytes, n_instrs: plan.instrs.len() })
}

/// The tokens that an op has done: disjoint ranges by their start, and how many tokens they cover.
#[derive(Debug, Default)]
struct Done {
    ranges: BTreeMap<u64, u64>,
    n_tokens: u64,
}

/// How far a gradient sum is.
#[derive(Debug, Default)]
struct Sum {
    /// The ops that add to it, in program order.
    ops: Vec<OpId>,
    zeroed: bool,
    n_additions: u32,
    /// Its parameter was updated.
    released: bool,
}

/// A transfer between its copy and its wait.
#[derive(Debug)]
struct Flight {
    tag: Tag,
    refs: [BufferRef; 2],
    src: Place,
    dst: Place,
    /// What arrives.
    pieces: Vec<Piece>,
}

/// A step in the middle of its replay.
struct Replay<'a> {
    graph: &'a Graph,
    plan: &'a Plan,
    machine: &'a dyn Machine,
    memory: Memory,
    /// Per op that runs exactly once.
    done: Vec<Done>,
    /// Per value; those that are no sums stay empty.
    sums: Vec<Sum>,
    flights: Vec<Flight>,
    at: At,
}

impl<'a> Replay<'a> {
    fn new(
        graph: &'a Graph,
        plan: &'a Plan,
        machine: &'a dyn Machine,
        residents: &[Resident],
    ) -> Self {
        let mut memory = Memory::default();
        for r in residents {
            memory.write(&r.place, r.before.map(|thing| Content::at(&r.place, thing, 0)));
        }
        let mut sums: Vec<Sum> = graph.values.values().map(|_| Sum::default()).collect();
        for (id, op) in graph.ops.iter() {
            op.sums.iter().for_each(|v| sums[v.0 as usize].ops.push(id));
        }
        let done = graph.ops.values().map(|_| Done::default()).collect();
        let at = At { instr: 0, what: "" };
        Self { graph, plan, machine, memory, done, sums, flights: Vec::new(), at }
    }

    fn step(&mut self, instr: usize, what: &Instr) -> Result<(), CheckError> {
        self.at = At { instr, what: "run" };
        match what {
            Instr::Run { op: id, tokens, operands } => {
                let (at, graph) = (self.at, self.graph);
                let op = graph.ops.get(*id).ok_or(CheckError::UnknownOp { at, op: *id })?;
                self.at.what = op.kind.name();
                self.run(*id, op, tokens, operands)
            }
            Instr::Zero { value, dst } => {
                self.at.what = "zero";
                self.zero(*value, dst)
            }
            Instr::Copy { src, dst, tag } => {
                self.at.what = "copy";
                self.copy(*src, *dst, *tag)
            }
            Instr::Wait { tag } => {
                self.at.what = "wait";
                self.wait(*tag)
            }
        }
    }

    // Runs.

    fn run(
        &mut self,
        id: OpId,
        op: &Op,
        tokens: &Range<u64>,
        refs: &[BufferRef],
    ) -> Result<(), CheckError> {
        self.check_cuts(op, tokens)?;
        let mut wanted = operands(self.graph, &self.plan.shape, op, tokens);
        let bytes = self.machine.scratch_bytes(self.graph, id, tokens.end - tokens.start);
        if bytes > 0 {
            let (what, access) = (What::Scratch, Access::Write);
            wanted.push(Operand { what, access, first_byte: 0, bytes });
        }
        let places = self.operand_places(&wanted, refs)?;
        self.check_overlaps(op, &wanted, &places)?;
        self.check_sums(id, tokens, &wanted)?;
        for (operand, place) in wanted.iter().zip(&places) {
            if operand.access != Access::Write {
                self.read(operand, place)?;
            }
            self.check_flights(place, operand.access)?;
        }
        self.mark_done(id, op, tokens)?;
        for (operand, place) in wanted.iter().zip(&places) {
            self.write(operand, place);
        }
        if op.updates.is_some() {
            op.inputs.iter().for_each(|v| self.sums[v.0 as usize].released = true);
        }
        Ok(())
    }

    /// Cuts fall on granules, for some ops between rows, for some ops nowhere.
    fn check_cuts(&self, op: &Op, tokens: &Range<u64>) -> Result<(), CheckError> {
        let (at, start, end) = (self.at, tokens.start, tokens.end);
        let n_tokens = self.plan.shape.n_tokens();
        if start >= end || end > n_tokens {
            return Err(CheckError::Tokens { at, start, end, n_tokens });
        }
        if start % GRANULE_TOKENS != 0 || end % GRANULE_TOKENS != 0 {
            return Err(CheckError::CutInGranule { at, start, end });
        }
        let whole = op.phase == Phase::Update || has_selected_rows(self.graph, op);
        if whole && *tokens != (0..n_tokens) {
            return Err(CheckError::NotAllTokens { at, start, end, n_tokens });
        }
        let row_stride = self.plan.shape.row_stride();
        if op.kind.needs_whole_rows() && (start % row_stride != 0 || end % row_stride != 0) {
            return Err(CheckError::CutInRow { at, start, end, row_stride });
        }
        Ok(())
    }

    /// Where the operands lie, after comparing their number and sizes with what the op needs.
    fn operand_places(
        &self,
        wanted: &[Operand],
        refs: &[BufferRef],
    ) -> Result<Vec<Place>, CheckError> {
        let at = self.at;
        if refs.len() != wanted.len() {
            let (found, wanted) = (refs.len(), wanted.len());
            return Err(CheckError::OperandCount { at, found, wanted });
        }
        let mut places = Vec::with_capacity(refs.len());
        for (operand, (want, &reference)) in wanted.iter().zip(refs).enumerate() {
            if want.bytes != reference.bytes {
                let (name, found, wanted) = (self.name(want.what), reference.bytes, want.bytes);
                return Err(CheckError::OperandBytes { at, operand, name, found, wanted });
            }
            let place = self.place(reference)?;
            let elsewhere = places.first().is_some_and(|first: &Place| first.tier != place.tier);
            if place.tier == Tier::Disk || elsewhere {
                return Err(CheckError::WrongTier { at, reference, tier: place.tier });
            }
            places.push(place);
        }
        Ok(places)
    }

    /// What is written shares no byte with another operand, unless the op may work in place.
    fn check_overlaps(
        &self,
        op: &Op,
        wanted: &[Operand],
        places: &[Place],
    ) -> Result<(), CheckError> {
        let first_output = op.inputs.len() + op.uses.len() + op.sums.len();
        for (written, place) in places.iter().enumerate() {
            if wanted[written].access == Access::Read {
                continue;
            }
            for (other, other_place) in places.iter().enumerate() {
                let in_place = place == other_place
                    && written.checked_sub(first_output).is_some_and(|output| {
                        self.graph.in_place(op).any(|pair| pair == (other, output))
                    });
                if other != written && place.overlaps(other_place) && !in_place {
                    return Err(CheckError::OperandsOverlap { at: self.at, written, other });
                }
            }
        }
        Ok(())
    }

    /// Additions ascend and take turns in program order; a read finds the sum complete.
    fn check_sums(
        &self,
        id: OpId,
        tokens: &Range<u64>,
        wanted: &[Operand],
    ) -> Result<(), CheckError> {
        for operand in wanted {
            let (at, What::Sum(v)) = (self.at, operand.what) else { continue };
            let sum = &self.sums[v.0 as usize];
            let name = || self.name(operand.what);
            if sum.released {
                return Err(CheckError::SumAfterUpdate { at, sum: name() });
            }
            let adds = operand.access == Access::Update;
            for &op in sum.ops.iter().take_while(|&&op| !(adds && op == id)) {
                let done_tokens = self.done[op.0 as usize].n_tokens;
                if done_tokens != self.plan.shape.n_tokens() {
                    let (sum, kind) = (name(), self.graph.ops[op].kind.name());
                    return Err(CheckError::SumIncomplete { at, sum, op, name: kind, done_tokens });
                }
            }
            // An op that adds has only ever been let through in order, so it has done `0..next`.
            let next = self.done[id.0 as usize].n_tokens;
            if adds && tokens.start != next {
                let start = tokens.start;
                return Err(CheckError::SumOrder { at, sum: name(), start, next });
            }
        }
        Ok(())
    }

    fn read(&self, operand: &Operand, place: &Place) -> Result<(), CheckError> {
        let Some(thing) = self.thing(operand.what, false) else { return Ok(()) };
        let content = Content::at(place, thing, operand.first_byte);
        self.memory.mismatch(place, content).map_or(Ok(()), |(address, found)| {
            let wanted = content.describe(self.graph, address);
            let found = self.describe(found, address);
            Err(CheckError::Misread { at: self.at, wanted, address, found })
        })
    }

    fn write(&mut self, operand: &Operand, place: &Place) {
        if operand.access == Access::Read {
            return;
        }
        if let What::Sum(v) = operand.what {
            self.sums[v.0 as usize].n_additions += 1;
        }
        let thing = self.thing(operand.what, true);
        self.memory.write(place, thing.map(|t| Content::at(place, t, operand.first_byte)));
    }

    /// Records the tokens of an op that runs exactly once.
    fn mark_done(&mut self, id: OpId, op: &Op, tokens: &Range<u64>) -> Result<(), CheckError> {
        if !self.runs_once(op) {
            return Ok(());
        }
        let done = &mut self.done[id.0 as usize];
        let (at, start, end) = (self.at, tokens.start, tokens.end);
        if done.ranges.range(..end).next_back().is_some_and(|(_, &other)| other > start) {
            return Err(CheckError::RunsTwice { at, start, end });
        }
        done.ranges.insert(start, end);
        done.n_tokens += end - start;
        Ok(())
    }

    /// Forward ops may run again, to recompute; selected rows are not worth it.
    fn runs_once(&self, op: &Op) -> bool {
        op.phase != Phase::Forward || has_selected_rows(self.graph, op)
    }

    // Zero, copy, wait.

    fn zero(&mut self, v: ValueId, dst: &BufferRef) -> Result<(), CheckError> {
        let at = self.at;
        if self.graph.values.get(v).is_none() || !is_dense_sum(self.graph, v) {
            let value = self.graph.values.get(v).map_or(v.to_string(), |value| value.name.clone());
            return Err(CheckError::NotASum { at, value });
        }
        let (what, access) = (What::Sum(v), Access::Write);
        let bytes = self.graph.values[v].bytes(0);
        let place =
            self.operand_places(&[Operand { what, access, first_byte: 0, bytes }], &[*dst])?[0];
        self.check_flights(&place, access)?;
        let sum = &mut self.sums[v.0 as usize];
        if std::mem::replace(&mut sum.zeroed, true) {
            return Err(CheckError::ZeroedTwice { at, sum: self.name(what) });
        }
        self.memory.write(&place, Some(Content::at(&place, Thing::Sum(v, 0), 0)));
        Ok(())
    }

    fn copy(&mut self, src_ref: BufferRef, dst_ref: BufferRef, tag: Tag) -> Result<(), CheckError> {
        let at = self.at;
        if src_ref.bytes != dst_ref.bytes {
            let (src_bytes, dst_bytes) = (src_ref.bytes, dst_ref.bytes);
            return Err(CheckError::CopyBytes { at, src_bytes, dst_bytes });
        }
        let (src, dst) = (self.place(src_ref)?, self.place(dst_ref)?);
        if src.overlaps(&dst) {
            return Err(CheckError::CopyOverlap { at });
        }
        if self.flights.iter().any(|f| f.tag == tag) {
            return Err(CheckError::TagInUse { at, tag: tag.0 });
        }
        self.check_flights(&src, Access::Read)?;
        self.check_flights(&dst, Access::Write)?;
        let shift = dst.start as i64 - src.start as i64;
        let moved = |p: Piece| Piece {
            start: (p.start as i64 + shift) as u64,
            end: (p.end as i64 + shift) as u64,
            content: Content { origin: p.content.origin + shift, ..p.content },
        };
        let pieces = self.memory.pieces(&src).map(moved).collect();
        self.memory.write(&dst, None);
        self.flights.push(Flight { tag, refs: [src_ref, dst_ref], src, dst, pieces });
        Ok(())
    }

    fn wait(&mut self, tag: Tag) -> Result<(), CheckError> {
        let at = self.at;
        let i = self.flights.iter().position(|f| f.tag == tag);
        let flight = self.flights.remove(i.ok_or(CheckError::UnknownTag { at, tag: tag.0 })?);
        for reference in flight.refs {
            self.place(reference)?;
        }
        for p in flight.pieces {
            let place = Place { tier: flight.dst.tier, start: p.start, end: p.end };
            self.memory.write(&place, Some(p.content));
        }
        Ok(())
    }

    /// Nobody touches the destination of a transfer in flight, nobody writes its source.
    fn check_flights(&self, place: &Place, access: Access) -> Result<(), CheckError> {
        let touched = |f: &&Flight| {
            f.dst.overlaps(place) || (access != Access::Read && f.src.overlaps(place))
        };
        self.flights.iter().find(touched).map_or(Ok(()), |f| {
            Err(CheckError::InFlight { at: self.at, address: place.start, tag: f.tag.0 })
        })
    }

    // The end of the step.

    fn finish(&self, residents: &[Resident]) -> Result<(), CheckError> {
        if let Some(flight) = self.flights.first() {
            return Err(CheckError::NeverWaited { tag: flight.tag.0 });
        }
        let n_tokens = self.plan.shape.n_tokens();
        for (id, op) in self.graph.ops.iter().filter(|(_, op)| self.runs_once(op)) {
            let done_tokens = self.done[id.0 as usize].n_tokens;
            if done_tokens != n_tokens {
                let name = op.kind.name();
                return Err(CheckError::NotRun { op: id, name, done_tokens, n_tokens });
            }
        }
        for r in residents {
            let Some(content) = r.after.map(|thing| Content::at(&r.place, thing, 0)) else {
                continue;
            };
            if let Some((address, found)) = self.memory.mismatch(&r.place, content) {
                let wanted = content.describe(self.graph, address);
                let found = self.describe(found, address);
                return Err(CheckError::NotWritten { wanted, address, found });
            }
        }
        Ok(())
    }

    // Shared by all instructions.

    /// The address of a reference, which must lie inside its buffer while that lives.
    fn place(&self, reference: BufferRef) -> Result<Place, CheckError> {
        let at = self.at;
        let b = self.plan.buffers.get(reference.buffer);
        let b = b.ok_or(CheckError::UnknownBuffer { at, reference })?;
        if reference.at.checked_add(reference.bytes).is_none_or(|end| end > b.bytes) {
            return Err(CheckError::OutsideBuffer { at, reference, buffer_bytes: b.bytes });
        }
        if !b.live.contains(&(at.instr as u32)) {
            let (start, end) = (b.live.start, b.live.end);
            return Err(CheckError::NotLive { at, reference, start, end });
        }
        if !reference.at.is_multiple_of(ALIGN_BYTES) {
            return Err(CheckError::Misaligned { at, reference });
        }
        let start = b.offset + reference.at;
        Ok(Place { tier: b.tier, start, end: start + reference.bytes })
    }

    /// What the bytes of an operand are before or after a run that writes it.
    fn thing(&self, what: What, after: bool) -> Option<Thing> {
        match what {
            What::Value(v) => Some(Thing::Value(v)),
            What::Sum(v) => Some(Thing::Sum(v, self.sums[v.0 as usize].n_additions)),
            What::Param(p) => Some(Thing::Param(p, after)),
            What::State(p, k) => Some(Thing::State(p, k, after)),
            What::Scratch => None,
        }
    }

    fn name(&self, what: What) -> String {
        match what {
            What::Value(v) | What::Sum(v) => self.graph.values[v].name.clone(),
            What::Param(p) => self.graph.params[p].name.clone(),
            What::State(p, k) => {
                format!("{}.{}", self.graph.params[p].name, self.graph.states[k as usize].name)
            }
            What::Scratch => "scratch".to_owned(),
        }
    }

    fn describe(&self, found: Option<Content>, address: u64) -> String {
        found.map_or("nothing".to_owned(), |c| c.describe(self.graph, address))
    }
}

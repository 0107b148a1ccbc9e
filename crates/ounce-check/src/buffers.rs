//! The plan as a packing of bytes: aligned, inside the arena, and never two live buffers on one byte.
//!
//! A sweep over time keeps the live buffers of each tier sorted by offset. They are disjoint, so a
//! buffer that becomes live can only collide with its two neighbours: `O(n log n)` for n buffers.
//! The sweep also gives the largest sum of live bytes, below which no placement can go.
//! Buffers of the roles that the session addresses between steps must be there once, all the time.

use std::collections::BTreeMap;

use ounce_ir::{Graph, ValueKind};
use ounce_program::{Buffer, BufferId, BufferRole, Plan, Tier};

use crate::CheckError;
use crate::memory::{Place, Thing};
use crate::operands::{state_bytes, whole_bytes};

/// Every buffer and operand starts at a multiple of this.
pub(crate) const ALIGN_BYTES: u64 = 64;

/// A buffer that the session addresses between steps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Resident {
    /// Where the session looks for it.
    pub(crate) place: Place,
    /// What the session has put there before the step.
    pub(crate) before: Option<Thing>,
    /// What it expects there after the step.
    pub(crate) after: Option<Thing>,
}

/// Checks every buffer by itself and against all others; returns the largest live bytes of the host.
pub(crate) fn check_packing(graph: &Graph, plan: &Plan) -> Result<u64, CheckError> {
    for (buffer, b) in plan.buffers.iter() {
        check_buffer(graph, plan, buffer, b)?;
    }
    let some = |&id: &BufferId| plan.buffers[id].bytes > 0;
    let mut starts: Vec<BufferId> = plan.buffers.ids().filter(some).collect();
    let mut ends = starts.clone();
    starts.sort_by_key(|&id| plan.buffers[id].live.start);
    ends.sort_by_key(|&id| plan.buffers[id].live.end);
    let mut ends = ends.into_iter().peekable();
    let mut live: [BTreeMap<u64, BufferId>; 3] = Default::default();
    let mut load_bytes = 0;
    let mut max_load_bytes = 0;
    for id in starts {
        let b = &plan.buffers[id];
        while let Some(dead) = ends.next_if(|&e| plan.buffers[e].live.end <= b.live.start) {
            let dead = &plan.buffers[dead];
            live[dead.tier as usize].remove(&dead.offset);
            load_bytes -= if dead.tier == Tier::Host { dead.bytes } else { 0 };
        }
        let neighbours = &mut live[b.tier as usize];
        let below = neighbours.range(..=b.offset).next_back();
        let above = neighbours.range(b.offset..).next();
        for (_, &other) in below.into_iter().chain(above) {
            let o = &plan.buffers[other];
            if o.offset < b.offset + b.bytes && b.offset < o.offset + o.bytes {
                let (a_role, b_role, instr) = (o.role, b.role, b.live.start);
                return Err(CheckError::BuffersOverlap { a: other, a_role, b: id, b_role, instr });
            }
        }
        neighbours.insert(b.offset, id);
        load_bytes += if b.tier == Tier::Host { b.bytes } else { 0 };
        max_load_bytes = max_load_bytes.max(load_bytes);
    }
    Ok(max_load_bytes)
}

fn check_buffer(
    graph: &Graph,
    plan: &Plan,
    buffer: BufferId,
    b: &Buffer,
) -> Result<(), CheckError> {
    let &Buffer { role, offset, bytes, ref live, tier, .. } = b;
    let known = match role {
        BufferRole::Param(p) => graph.params.get(p).is_some(),
        BufferRole::State(p, k) => {
            graph.params.get(p).is_some() && (k as usize) < graph.states.len()
        }
        BufferRole::Session(v) | BufferRole::Sum(v) | BufferRole::Value(v) => {
            graph.values.get(v).is_some()
        }
        BufferRole::Scratch(op) => graph.ops.get(op).is_some(),
    };
    if !known {
        return Err(CheckError::UnknownRole { buffer, role });
    }
    if offset % ALIGN_BYTES != 0 || bytes % ALIGN_BYTES != 0 {
        return Err(CheckError::BufferMisaligned { buffer, role, offset, bytes });
    }
    let arena_bytes = if tier == Tier::Host { plan.arena_bytes } else { u64::MAX };
    let arena_bytes = arena_bytes.min(i64::MAX as u64);
    if offset.checked_add(bytes).is_none_or(|end| end > arena_bytes) {
        return Err(CheckError::BufferOutsideArena { buffer, role, offset, bytes, arena_bytes });
    }
    let n_instrs = plan.instrs.len();
    if live.start >= live.end || live.end as usize > n_instrs {
        let (start, end) = (live.start, live.end);
        return Err(CheckError::BufferLifetime { buffer, role, start, end, n_instrs });
    }
    Ok(())
}

/// Finds the resident buffers that the graph needs: each exactly once, live all the time, large enough.
pub(crate) fn find_residents(graph: &Graph, plan: &Plan) -> Result<Vec<Resident>, CheckError> {
    let mut found: BTreeMap<(u32, u32, u32), BufferId> = BTreeMap::new();
    for (buffer, b) in plan.buffers.iter() {
        let Some(key) = resident_key(b.role) else { continue };
        let (role, live) = (b.role, b.live.clone());
        if let Some(first) = found.insert(key, buffer) {
            return Err(CheckError::ResidentTwice { role, first, second: buffer });
        }
        if live.start != 0 || live.end as usize != plan.instrs.len() {
            let (start, end, n_instrs) = (live.start, live.end, plan.instrs.len());
            return Err(CheckError::ResidentLifetime { buffer, role, start, end, n_instrs });
        }
        if b.tier != Tier::Host && matches!(role, BufferRole::Session(_)) {
            return Err(CheckError::ResidentTier { buffer, role, tier: b.tier });
        }
    }
    let mut residents = Vec::new();
    for (role, need_bytes, before, after) in needed_residents(graph, plan) {
        let buffer = resident_key(role).and_then(|key| found.get(&key).copied());
        let buffer = buffer.ok_or(CheckError::ResidentMissing { role })?;
        let b = &plan.buffers[buffer];
        if b.bytes < need_bytes {
            let bytes = b.bytes;
            return Err(CheckError::ResidentTooSmall { buffer, role, bytes, need_bytes });
        }
        let place = Place { tier: b.tier, start: b.offset, end: b.offset + need_bytes };
        residents.push(Resident { place, before, after });
    }
    Ok(residents)
}

fn resident_key(role: BufferRole) -> Option<(u32, u32, u32)> {
    match role {
        BufferRole::Param(p) => Some((0, p.0, 0)),
        BufferRole::State(p, k) => Some((1, p.0, k)),
        BufferRole::Session(v) => Some((2, v.0, 0)),
        BufferRole::Sum(_) | BufferRole::Value(_) | BufferRole::Scratch(_) => None,
    }
}

type Needed = (BufferRole, u64, Option<Thing>, Option<Thing>);

/// Role, bytes, content before and content after of everything resident that an op of the graph names.
fn needed_residents(graph: &Graph, plan: &Plan) -> Vec<Needed> {
    let mut values = vec![false; graph.values.len()];
    let mut read = vec![false; graph.params.len()];
    let mut updated = vec![false; graph.params.len()];
    for op in graph.ops.values() {
        op.inputs.iter().chain(&op.outputs).for_each(|v| values[v.0 as usize] = true);
        op.uses.iter().for_each(|&u| read[graph.param_of(u).0 as usize] = true);
        op.updates.iter().for_each(|p| updated[p.0 as usize] = true);
    }
    let mut needed = Vec::new();
    for (p, param) in graph.params.iter() {
        let is_updated = updated[p.0 as usize];
        if is_updated || read[p.0 as usize] {
            let thing = |updated| Some(Thing::Param(p, updated));
            needed.push((BufferRole::Param(p), param.bytes(), thing(false), thing(is_updated)));
        }
        for k in (0..graph.states.len() as u32).filter(|_| is_updated) {
            let thing = |updated| Some(Thing::State(p, k, updated));
            let bytes = state_bytes(graph, p, k);
            needed.push((BufferRole::State(p, k), bytes, thing(false), thing(true)));
        }
    }
    for (v, value) in graph.values.iter().filter(|(v, _)| values[v.0 as usize]) {
        let data = Some(Thing::Value(v));
        let (before, after) = match value.kind {
            ValueKind::Input(_) => (data, data),
            ValueKind::Scalar | ValueKind::Loss | ValueKind::Result => (None, data),
            ValueKind::Activation | ValueKind::Gradient | ValueKind::Sum(_) => continue,
        };
        let bytes = whole_bytes(graph, &plan.shape, v);
        needed.push((BufferRole::Session(v), bytes, before, after));
    }
    needed
}

//! The fastest schedule of a tiny graph in a number of bytes, by trying all of them.
//!
//! Idea. In the class of schedules below, what matters at a moment is which forward values are
//! resident and how far the backward has come. That is a small graph of states, in which Dijkstra's
//! algorithm finds the cheapest way from nothing to the end.
//!
//! # The class of schedules
//! - Every op runs on the whole token axis: one micro-batch, no chunks.
//! - Backward and update ops run once, in one order: backward ops in program order, and every update
//!   op at once, as soon as its sum is complete and, for the update of a parameter, no backward op
//!   reads that parameter any more. (Nor will a forward op run again that does: the backward runs
//!   against the forward and has passed everything that is made with it.)
//! - Between them forward ops run in any order and any number of times, each when its inputs are
//!   resident. Forward values may be dropped at any moment.
//! - A gradient lives from the op that writes it to its last reader; a sum from the first addition
//!   to the last update op that reads it (to the end of the step, if none does).
//! - An op may run if everything resident, its outputs and its scratch are at most the cap. An
//!   output may take the bytes of an input that dies with the op, for the pairs of
//!   [`Graph::in_place`](ounce_ir::Graph::in_place).
//! - Resident all the time: parameters, optimizer states, data, scalars, losses, results, and the
//!   process's baseline. Bytes are rounded up to 64 per value. Where bytes lie is not asked: a
//!   placement may need more.
//!
//! So for a graph that a planner cannot cut along the token axis (a step of one granule), no plan is
//! faster than what is found here, and none fits in fewer bytes than [`least_bytes`].
//!
//! Complexity: 2^values times backward ops states; at most [`MAX_VALUES`] forward values. Sources:
//! `[Dijkstra59]`; `[Sethi75]` (the game with values and slots).

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use ounce_ir::{EntityId, Graph, Lead, OpId, Phase, ValueId, ValueKind};
use ounce_program::{Machine, StepShape};

/// Most forward values that [`brute_force`] takes.
pub const MAX_VALUES: usize = 16;

/// Buffers start and end at multiples of this.
const ALIGN_BYTES: u64 = 64;

/// Seconds of the fastest schedule of a differentiated graph within `cap_bytes`; `None` if no
/// schedule of the class fits.
///
/// # Panics
/// If the graph has more than [`MAX_VALUES`] forward values.
pub fn brute_force(
    graph: &Graph,
    shape: StepShape,
    machine: &dyn Machine,
    cap_bytes: u64,
) -> Option<f64> {
    let game = Game::new(graph, shape, machine);
    let edge = |so_far: Cost, step: &Move| {
        (step.bytes <= cap_bytes).then_some(Cost(so_far.0 + step.seconds))
    };
    game.search(edge).map(|Cost(seconds)| seconds)
}

/// The least number of bytes in which a schedule of the class fits.
///
/// # Panics
/// As [`brute_force`].
pub fn least_bytes(graph: &Graph, shape: StepShape, machine: &dyn Machine) -> u64 {
    let game = Game::new(graph, shape, machine);
    // The cost of a way is its widest moment; bytes below 2^53 are exact in f64.
    let edge = |so_far: Cost, step: &Move| Some(Cost(so_far.0.max(step.bytes as f64)));
    let widest = game.search(edge).expect("without a cap there is a schedule");
    widest.0 as u64
}

/// Costs are never NaN, so they are ordered.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cost(f64);

impl Eq for Cost {}

impl PartialOrd for Cost {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Cost {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// A set of forward values, by their index in [`Game::values`].
type Resident = u32;

/// Forward values that are resident, and how many ops of the fixed order have run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct State {
    resident: Resident,
    n_run: usize,
}

/// Running one op.
struct Move {
    to: State,
    /// Everything that is resident while it runs.
    bytes: u64,
    seconds: f64,
}

/// A way to reuse bytes of dying inputs: which forward values are overwritten, and bytes saved.
#[derive(Debug, Clone, Copy, Default)]
struct InPlace {
    overwritten: Resident,
    saved_bytes: u64,
}

/// An op and what the search asks of it.
struct Piece {
    op: OpId,
    /// Forward values that it reads.
    reads: Resident,
    /// Forward values that it writes.
    writes: Resident,
    seconds: f64,
    scratch_bytes: u64,
}

/// What does not change during the search.
struct Game<'a> {
    graph: &'a Graph,
    shape: StepShape,
    /// Forward values, which may be dropped and recomputed.
    values: Vec<ValueId>,
    forward: Vec<Piece>,
    /// Backward and update ops in the order in which they run.
    fixed: Vec<Piece>,
    /// Per value: the ops of `fixed` that first write and last touch it (gradients and sums).
    lives: Vec<Option<(usize, usize)>>,
    /// Per op of `fixed`: bytes of gradients and sums that are resident before it runs.
    before_bytes: Vec<u64>,
    /// Per op of `fixed`: the same while it runs, its own outputs included.
    during_bytes: Vec<u64>,
    /// Per set of forward values.
    set_bytes: Vec<u64>,
    /// Bytes that are resident all the time.
    constant_bytes: u64,
}

impl<'a> Game<'a> {
    fn new(graph: &'a Graph, shape: StepShape, machine: &'a dyn Machine) -> Self {
        let values: Vec<ValueId> = ids_of(graph, |kind| kind == ValueKind::Activation);
        assert!(values.len() <= MAX_VALUES, "{} forward values are too many", values.len());
        let order = fixed_order(graph);
        let mut game = Self {
            graph,
            shape,
            lives: lives(graph, &order),
            values,
            forward: Vec::new(),
            fixed: Vec::new(),
            before_bytes: Vec::new(),
            during_bytes: Vec::new(),
            set_bytes: Vec::new(),
            constant_bytes: 0,
        };
        let forward = graph.ops.iter().filter(|(_, op)| op.phase == Phase::Forward);
        game.forward = forward.map(|(op, _)| game.piece(op, machine)).collect();
        game.fixed = order.iter().map(|&op| game.piece(op, machine)).collect();
        game.before_bytes = (0..order.len()).map(|at| game.live_bytes(at, false)).collect();
        game.during_bytes = (0..order.len()).map(|at| game.live_bytes(at, true)).collect();
        game.set_bytes = (0..1 << game.values.len()).map(|set| game.bytes_of_set(set)).collect();
        game.constant_bytes = machine.baseline_bytes() + game.resident_bytes();
        game
    }

    fn piece(&self, op: OpId, machine: &dyn Machine) -> Piece {
        let n_tokens = self.shape.n_tokens();
        Piece {
            op,
            reads: self.set(&self.graph.ops[op].inputs),
            writes: self.set(&self.graph.ops[op].outputs),
            seconds: machine.cost_s(self.graph, op, &self.shape, n_tokens),
            scratch_bytes: align(machine.scratch_bytes(self.graph, op, n_tokens)),
        }
    }

    /// Parameters, optimizer states and what the session reads and writes.
    fn resident_bytes(&self) -> u64 {
        let param_bytes = |(_, p): (_, &ounce_ir::Param)| {
            let state_bytes =
                |s: &ounce_ir::StateSpec| align(p.shape.bytes(s.dtype, self.shape.n_tokens()));
            let states: u64 = self.graph.states.iter().map(state_bytes).sum();
            align(p.bytes()) + if p.trainable { states } else { 0 }
        };
        let session = ids_of(self.graph, |kind| match kind {
            ValueKind::Input(_) | ValueKind::Scalar | ValueKind::Loss | ValueKind::Result => true,
            ValueKind::Activation | ValueKind::Gradient | ValueKind::Sum(_) => false,
        });
        self.graph.params.iter().map(param_bytes).sum::<u64>()
            + session.into_iter().map(|v| self.bytes(v)).sum::<u64>()
    }

    /// The least cost of a way from nothing to the end; `edge` extends a cost by a move, or forbids
    /// the move.
    fn search(&self, edge: impl Fn(Cost, &Move) -> Option<Cost>) -> Option<Cost> {
        let n_sets = 1 << self.values.len();
        let mut best = vec![vec![Cost(f64::INFINITY); n_sets]; self.fixed.len() + 1];
        let mut queue = BinaryHeap::from([Reverse((Cost(0.0), State { resident: 0, n_run: 0 }))]);
        while let Some(Reverse((cost, state))) = queue.pop() {
            if state.n_run == self.fixed.len() {
                return Some(cost);
            }
            if cost > best[state.n_run][state.resident as usize] {
                continue; // A cheaper way to this state has been followed.
            }
            for step in self.moves(state) {
                let State { resident, n_run } = step.to;
                let Some(cost) = edge(cost, &step) else { continue };
                let best = &mut best[n_run][resident as usize];
                if cost < *best {
                    *best = cost;
                    queue.push(Reverse((cost, step.to)));
                }
            }
        }
        None
    }

    /// Everything that can be done next: drop a value, run a forward op, run the next fixed op.
    fn moves(&self, state: State) -> Vec<Move> {
        let State { resident, n_run } = state;
        let drops = (0..self.values.len()).map(|i| resident & !(1 << i));
        let mut moves: Vec<Move> = drops
            .filter(|&after| after != resident)
            .map(|after| Move { to: State { resident: after, n_run }, bytes: 0, seconds: 0.0 })
            .collect();
        for piece in &self.forward {
            if piece.writes & !resident != 0 {
                self.run(piece, state, n_run, self.before_bytes[n_run], &mut moves);
            }
        }
        self.run(&self.fixed[n_run], state, n_run + 1, self.during_bytes[n_run], &mut moves);
        moves
    }

    /// Running `piece` in `state`, in place in every possible way, after which `n_run` fixed ops
    /// have run; gradients and sums take `live_bytes`.
    fn run(
        &self,
        piece: &Piece,
        state: State,
        n_run: usize,
        live_bytes: u64,
        moves: &mut Vec<Move>,
    ) {
        if piece.reads & !state.resident != 0 {
            return;
        }
        let resident = state.resident | piece.writes;
        let bytes = self.constant_bytes
            + self.set_bytes[resident as usize]
            + live_bytes
            + piece.scratch_bytes;
        for reuse in self.in_place(piece.op, state) {
            let to = State { resident: resident & !reuse.overwritten, n_run };
            moves.push(Move { to, bytes: bytes - reuse.saved_bytes, seconds: piece.seconds });
        }
    }

    /// Gradients and sums that are resident before fixed op `at` runs, or while it runs.
    fn live_bytes(&self, at: usize, while_it_runs: bool) -> u64 {
        let lives = self.graph.values.ids().zip(&self.lives);
        lives
            .filter_map(|(v, life)| life.map(|(first, last)| (v, first, last)))
            .filter(|&(_, first, last)| {
                (first < at || (while_it_runs && first == at)) && at <= last
            })
            .map(|(v, _, _)| self.bytes(v))
            .sum()
    }

    /// Every choice of inputs whose bytes go to an output, none included.
    fn in_place(&self, op: OpId, state: State) -> Vec<InPlace> {
        let inputs = &self.graph.ops[op].inputs;
        let mut choices = vec![InPlace::default()];
        for (o, &output) in self.graph.ops[op].outputs.iter().enumerate() {
            if self.set(&[output]) & state.resident != 0 {
                continue; // It has bytes already.
            }
            let pairs = self.graph.in_place(&self.graph.ops[op]).filter(|&(_, to)| to == o);
            let with_pairs: Vec<InPlace> = pairs
                .filter(|&(i, _)| self.dies(op, inputs[i], state))
                .flat_map(|(i, _)| choices.iter().map(move |c| (i, *c)))
                .filter(|(i, choice)| choice.overwritten & self.set(&[inputs[*i]]) == 0)
                .map(|(i, choice)| InPlace {
                    overwritten: choice.overwritten | self.set(&[inputs[i]]),
                    saved_bytes: choice.saved_bytes + self.bytes(output),
                })
                .collect();
            choices.extend(with_pairs);
        }
        choices
    }

    /// Whether an input may die with `op`: a forward value may always, a gradient with its last
    /// reader, data never. What the op reads twice stays.
    fn dies(&self, op: OpId, input: ValueId, state: State) -> bool {
        let reads = self.graph.ops[op].inputs.iter().filter(|&&v| v == input).count();
        let is_next = self.fixed.get(state.n_run).is_some_and(|piece| piece.op == op);
        reads == 1
            && match self.graph.values[input].kind {
                ValueKind::Activation => true,
                ValueKind::Gradient => {
                    is_next
                        && self.lives[input.index()].is_some_and(|(_, last)| last == state.n_run)
                }
                _ => false,
            }
    }

    /// The forward values among `values`.
    fn set(&self, values: &[ValueId]) -> Resident {
        let index = |v: &ValueId| self.values.iter().position(|of| of == v);
        values.iter().filter_map(index).fold(0, |set, i| set | 1 << i)
    }

    fn bytes_of_set(&self, set: Resident) -> u64 {
        let members = self.values.iter().enumerate().filter(|(i, _)| set & (1 << i) != 0);
        members.map(|(_, &v)| self.bytes(v)).sum()
    }

    fn bytes(&self, value: ValueId) -> u64 {
        let value = &self.graph.values[value];
        align(value.bytes(match value.shape.lead {
            Lead::Fixed | Lead::Tokens => self.shape.n_tokens(),
            Lead::Selected => self.shape.n_selected,
        }))
    }
}

fn align(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGN_BYTES)
}

fn ids_of(graph: &Graph, wanted: impl Fn(ValueKind) -> bool) -> Vec<ValueId> {
    graph.values.iter().filter(|(_, v)| wanted(v.kind)).map(|(id, _)| id).collect()
}

/// Backward ops in program order, each followed by the update ops that it makes possible.
fn fixed_order(graph: &Graph) -> Vec<OpId> {
    let of_phase = |phase| graph.ops.iter().filter(move |(_, op)| op.phase == phase);
    let backward: Vec<OpId> = of_phase(Phase::Backward).map(|(id, _)| id).collect();
    let mut placed: Vec<(usize, OpId)> = backward.iter().copied().enumerate().collect();
    for (id, op) in of_phase(Phase::Update) {
        let reads: Vec<ValueId> = op.inputs.iter().chain(&op.sums).copied().collect();
        let is_waited_for = |before: OpId| {
            let before = &graph.ops[before];
            before.sums.iter().chain(&before.outputs).any(|v| reads.contains(v))
                || before.uses.iter().any(|&u| op.updates == Some(graph.param_of(u)))
        };
        let at = placed.iter().filter(|(_, before)| is_waited_for(*before)).map(|(at, _)| *at);
        placed.push((at.max().unwrap_or(0), id));
    }
    // A stable sort keeps program order among the ops of one place.
    placed.sort_by_key(|&(at, _)| at);
    placed.into_iter().map(|(_, op)| op).collect()
}

/// First and last op of `fixed` that touch a gradient or sum; sums that no op reads live on.
fn lives(graph: &Graph, fixed: &[OpId]) -> Vec<Option<(usize, usize)>> {
    let mut lives: Vec<Option<(usize, usize)>> = vec![None; graph.values.len()];
    let mut is_read = vec![false; graph.values.len()];
    for (at, &op) in fixed.iter().enumerate() {
        let op = &graph.ops[op];
        for v in &op.inputs {
            is_read[v.index()] = true;
        }
        for v in op.inputs.iter().chain(&op.sums).chain(&op.outputs) {
            let first = lives[v.index()].map_or(at, |(first, _)| first);
            lives[v.index()] = Some((first, at));
        }
    }
    for (v, value) in graph.values.iter() {
        match (value.kind, &mut lives[v.index()]) {
            (ValueKind::Gradient, _) => {}
            (ValueKind::Sum(_), Some((_, last))) if !is_read[v.index()] => *last = fixed.len(),
            (ValueKind::Sum(_), _) => {}
            (_, life) => *life = None,
        }
    }
    lives
}

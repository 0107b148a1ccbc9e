//! Certainly wrong variants of a plan, for tests of planners and of the checker itself.
//!
//! A checker that accepts everything passes every test of a planner. So each plan that a test makes
//! is also broken in every way listed here, and each of the broken plans must be rejected.
//!
//! A mutation is in the list only if it breaks a promise of a plan, whatever the plan is: dropping a
//! backward run always does; dropping a forward run does so only if it is the first one for its
//! tokens and something reads what it wrote. Every kind of mutation takes up to three victims: the
//! first, the middle and the last candidate.
//! Cost: a pass over the runs per value, and a copy of the plan per mutation, of which there are about
//! a hundred: for small plans.

use std::collections::BTreeMap;
use std::ops::Range;

use ounce_ir::{Graph, Op, OpId, OpKind, Phase, ValueKind};
use ounce_program::{BufferId, BufferRef, BufferRole, GRANULE_TOKENS, Instr, Plan, Tier};

use crate::operands::{Access, Operand, What, operands};

/// Broken variants of `plan`, an accepted plan for `graph`, each with its name: `kind: victim`.
pub fn mutations(graph: &Graph, plan: &Plan) -> Vec<(String, Plan)> {
    let mut m = Mutants::new(graph, plan);
    m.missing_and_repeated_runs();
    m.wrong_order();
    m.wrong_additions();
    m.wrong_updates();
    m.wrong_operands();
    m.wrong_tokens();
    m.wrong_scratch();
    m.wrong_buffers();
    m.wrong_residents();
    m.wrong_certificate();
    m.wrong_transfers();
    m.made
}

/// A run of the plan, with what its operands must be (scratch excepted).
struct Run<'a> {
    instr: usize,
    id: OpId,
    op: &'a Op,
    tokens: &'a Range<u64>,
    refs: &'a [BufferRef],
    operands: Vec<Operand>,
}

struct Mutants<'a> {
    graph: &'a Graph,
    plan: &'a Plan,
    runs: Vec<Run<'a>>,
    made: Vec<(String, Plan)>,
}

impl<'a> Mutants<'a> {
    fn new(graph: &'a Graph, plan: &'a Plan) -> Self {
        let run = |(instr, what): (usize, &'a Instr)| match what {
            Instr::Run { op: id, tokens, operands: refs } => {
                let op = &graph.ops[*id];
                let operands = operands(graph, &plan.shape, op, tokens);
                Some(Run { instr, id: *id, op, tokens, refs, operands })
            }
            Instr::Zero { .. } | Instr::Copy { .. } | Instr::Wait { .. } => None,
        };
        let runs = plan.instrs.iter().enumerate().filter_map(run).collect();
        Self { graph, plan, runs, made: Vec::new() }
    }

    /// Adds a mutant, made by `edit` from a copy of the plan.
    fn add(&mut self, kind: &str, victim: impl std::fmt::Display, edit: impl FnOnce(&mut Plan)) {
        let mut plan = self.plan.clone();
        edit(&mut plan);
        self.made.push((format!("{kind}: {victim}"), plan));
    }

    fn swap(&mut self, kind: &str, pairs: &[(usize, usize)]) {
        for (i, j) in pick(pairs) {
            let victims = format!("{} and {}", self.show(i), self.show(j));
            self.add(kind, victims, |p| p.instrs.swap(i, j));
        }
    }

    fn drop(&mut self, kind: &str, instrs: &[usize]) {
        for i in pick(instrs) {
            self.add(kind, self.show(i), |p| remove(p, i));
        }
    }

    fn show(&self, i: usize) -> String {
        match &self.plan.instrs[i] {
            Instr::Run { op, .. } => format!("{i} {}", self.graph.ops[*op].kind.name()),
            Instr::Zero { .. } => format!("{i} zero"),
            Instr::Copy { .. } => format!("{i} copy"),
            Instr::Wait { .. } => format!("{i} wait"),
        }
    }

    /// Indices of the instructions for which `keep` holds.
    fn instrs(&self, keep: impl Fn(&Instr) -> bool) -> Vec<usize> {
        (0..self.plan.instrs.len()).filter(|&i| keep(&self.plan.instrs[i])).collect()
    }

    /// Runs that must happen exactly once.
    fn once(&self) -> impl Iterator<Item = &Run<'a>> {
        self.runs.iter().filter(|r| r.op.phase != Phase::Forward)
    }

    /// Pairs (run, the run that reads it first) where nothing else ever made what is read.
    fn producers(&self) -> Vec<(usize, usize)> {
        let mut seen: BTreeMap<OpId, Vec<&Range<u64>>> = BTreeMap::new();
        let mut pairs = Vec::new();
        for (n, run) in self.runs.iter().enumerate() {
            let before = seen.entry(run.id).or_default();
            if !before.iter().any(|tokens| overlap(tokens, run.tokens))
                && let Some(reader) = self.first_reader(run, n)
            {
                pairs.push((run.instr, reader));
            }
            before.push(run.tokens);
        }
        pairs
    }

    /// The first run that reads what `self.runs[n]` writes, if no run makes it again before.
    fn first_reader(&self, run: &Run<'_>, n: usize) -> Option<usize> {
        let written = |read: &Operand| {
            run.operands.iter().any(|w| {
                w.access == Access::Write && w.what == read.what && overlap(&bytes(w), &bytes(read))
            })
        };
        for later in &self.runs[n + 1..] {
            if later.id == run.id && overlap(later.tokens, run.tokens) {
                return None;
            }
            if later.operands.iter().any(|o| o.access == Access::Read && written(o)) {
                return Some(later.instr);
            }
        }
        None
    }

    fn missing_and_repeated_runs(&mut self) {
        let once: Vec<usize> = self.once().map(|r| r.instr).collect();
        let zeros = self.instrs(|i| matches!(i, Instr::Zero { .. }));
        let needed: Vec<usize> = self.producers().into_iter().map(|(i, _)| i).collect();
        self.drop("drop a needed run", &needed);
        self.drop("drop a backward or update run", &once);
        self.drop("drop a zero", &zeros);
        for i in pick(&once) {
            self.add("repeat a backward or update run", self.show(i), |p| repeat(p, i, i));
        }
        for i in pick(&zeros) {
            self.add("repeat a zero", self.show(i), |p| repeat(p, i, i));
        }
        for i in pick(&once) {
            let Instr::Run { op: id, .. } = self.plan.instrs[i] else { continue };
            let kind = self.graph.ops[id].kind.name();
            let others =
                self.graph.ops.iter().filter(|(other, op)| *other != id && op.kind.name() == kind);
            let others: Vec<OpId> = others.map(|(other, _)| other).collect();
            for other in pick(&others) {
                self.add("run another op of this kind", self.show(i), |p| {
                    if let Instr::Run { op, .. } = &mut p.instrs[i] {
                        *op = other;
                    }
                });
            }
        }
    }

    fn wrong_order(&mut self) {
        let pairs = self.producers();
        self.swap("swap a run with its first reader", &pairs);
    }

    fn wrong_additions(&mut self) {
        let (mut chunks, mut zeros, mut uses, mut reads) = (vec![], vec![], vec![], vec![]);
        for v in self.graph.values.ids() {
            let adds = |r: &&Run<'_>| {
                r.operands.iter().any(|o| o.what == What::Sum(v) && o.access == Access::Update)
            };
            let reads_sum = |r: &&Run<'_>| {
                r.operands.iter().any(|o| o.what == What::Sum(v) && o.access == Access::Read)
            };
            let adders: Vec<&Run<'_>> = self.runs.iter().filter(adds).collect();
            for pair in adders.windows(2) {
                let list = if pair[0].id == pair[1].id { &mut chunks } else { &mut uses };
                list.push((pair[0].instr, pair[1].instr));
            }
            let reader = self.runs.iter().find(reads_sum);
            if let (Some(last), Some(reader)) = (adders.last(), reader) {
                reads.push((last.instr, reader.instr));
            }
            let zero = self.instrs(|i| matches!(i, Instr::Zero { value, .. } if *value == v));
            if let (Some(&zero), Some(first)) = (zero.first(), adders.first()) {
                zeros.push((zero, first.instr));
            }
        }
        self.swap("swap the chunks of a sum", &chunks);
        self.swap("swap the uses of a tied sum", &uses);
        self.swap("swap a zero with the first addition", &zeros);
        self.swap("swap the last addition with a reader of the sum", &reads);
        let mut twins = Vec::new();
        for (n, &(i, _)) in zeros.iter().enumerate() {
            let same = |&&(j, _): &&(usize, usize)| self.zeroed(i).bytes == self.zeroed(j).bytes;
            twins.extend(zeros[n + 1..].iter().find(same).map(|&(j, _)| (i, j)));
        }
        for (i, j) in pick(&twins) {
            let other = self.zeroed(j);
            self.add("zero the bytes of another sum", self.show(i), |p| {
                if let Instr::Zero { dst, .. } = &mut p.instrs[i] {
                    *dst = other;
                }
            });
        }
    }

    fn zeroed(&self, zero: usize) -> BufferRef {
        match &self.plan.instrs[zero] {
            Instr::Zero { dst, .. } => *dst,
            other => panic!("instruction {zero} ({other}) is a zero"),
        }
    }

    fn wrong_updates(&mut self) {
        let (mut early, mut late, mut norms) = (vec![], vec![], vec![]);
        for update in &self.runs {
            let Some(p) = update.op.updates else { continue };
            let reads = |what: What| {
                move |r: &&Run<'_>| {
                    r.instr < update.instr && r.operands.iter().any(|o| o.what == what)
                }
            };
            let readers: Vec<&Run<'_>> = self.runs.iter().filter(reads(What::Param(p))).collect();
            early.extend(readers.last().map(|r| (r.instr, update.instr)));
            let forward = readers.iter().find(|r| r.op.phase == Phase::Forward);
            late.extend(forward.map(|r| r.instr));
            let norm = self.runs.iter().filter(|r| r.op.kind == OpKind::SumSquares);
            let norm = norm.filter(|r| r.op.inputs[0] == update.op.inputs[0]).map(|r| r.instr);
            norms.extend(norm.map(|i| (i, update.instr)));
        }
        self.swap("update before the last reader of the parameter", &early);
        self.swap("update before the norm of the gradient", &norms);
        let last = self.plan.instrs.len() - 1;
        for i in pick(&late) {
            self.add("read a parameter after its update", self.show(i), |p| repeat(p, i, last));
        }
    }

    fn wrong_operands(&mut self) {
        let outputs = self.needed_outputs();
        let mut shifts = outputs.clone();
        for run in &self.runs {
            let checked =
                run.operands.iter().enumerate().filter(|(_, o)| o.access != Access::Write);
            shifts.extend(checked.map(|(n, _)| (run.instr, n)));
        }
        for (i, n) in pick(&shifts).into_iter().chain(pick(&shifts[..outputs.len()])) {
            let victim = format!("{} operand {n}", self.show(i));
            self.add("shift an operand up by 64 bytes", &victim, |p| reference(p, i, n).at += 64);
            if self.reference(i, n).at >= 64 {
                self.add("shift an operand down by 64 bytes", &victim, |p| {
                    reference(p, i, n).at -= 64;
                });
            }
        }
        for (i, n) in pick(&outputs) {
            let old = *self.reference(i, n);
            let elsewhere = self.plan.buffers.iter().find(|(id, b)| {
                *id != old.buffer
                    && b.tier == Tier::Host
                    && b.live.contains(&(i as u32))
                    && b.bytes >= old.bytes
            });
            if let Some((buffer, _)) = elsewhere {
                let victim = format!("{} operand {n}", self.show(i));
                self.add("write a value into another buffer", victim, |p| {
                    *reference(p, i, n) = BufferRef { buffer, at: 0, ..old };
                });
            }
        }
        self.exchanged_operands();
        self.aliased_operands();
    }

    /// Outputs (run, operand) whose first byte is read by the run's first reader.
    fn needed_outputs(&self) -> Vec<(usize, usize)> {
        let run_at = |i: usize| {
            let n = self.runs.binary_search_by_key(&i, |r| r.instr);
            &self.runs[n.expect("producers and readers are runs")]
        };
        let mut outputs = Vec::new();
        for (i, k) in self.producers() {
            let needed = |o: &Operand| {
                o.access == Access::Write
                    && run_at(k).operands.iter().any(|r| {
                        r.what == o.what
                            && r.access == Access::Read
                            && bytes(r).contains(&o.first_byte)
                    })
            };
            outputs.extend(run_at(i).operands.iter().position(needed).map(|n| (i, n)));
        }
        outputs
    }

    fn exchanged_operands(&mut self) {
        let (mut same_size, mut other_size) = (vec![], vec![]);
        for run in &self.runs {
            let checked =
                run.operands.iter().enumerate().filter(|(_, o)| o.access != Access::Write);
            let checked: Vec<_> = checked.collect();
            for (n, &(a, first)) in checked.iter().enumerate() {
                for &(b, second) in checked[n + 1..].iter().filter(|(_, o)| o.what != first.what) {
                    let same = first.bytes == second.bytes;
                    let list = if same { &mut same_size } else { &mut other_size };
                    list.push((run.instr, a, b));
                }
            }
        }
        for (i, a, b) in pick(&same_size).into_iter().chain(pick(&other_size)) {
            let victim = format!("{} operands {a} and {b}", self.show(i));
            self.add("exchange two operands", victim, |p| {
                if let Instr::Run { operands, .. } = &mut p.instrs[i] {
                    operands.swap(a, b);
                }
            });
        }
    }

    fn aliased_operands(&mut self) {
        let mut aliases = Vec::new();
        for run in &self.runs {
            let (n_inputs, n_outputs) = (run.op.inputs.len(), run.op.outputs.len());
            let first_output = n_inputs + run.op.uses.len() + run.op.sums.len();
            for output in 0..n_outputs {
                let written = &run.operands[first_output + output];
                let alias = (0..n_inputs).find(|&input| {
                    run.operands[input].bytes == written.bytes
                        && !self.graph.in_place(run.op).any(|pair| pair == (input, output))
                });
                aliases.extend(alias.map(|input| (run.instr, first_output + output, input)));
            }
        }
        for (i, a, b) in pick(&aliases) {
            let victim = format!("{} operand {a} on {b}", self.show(i));
            self.add("work in place where the op cannot", victim, |p| {
                *reference(p, i, a) = *reference(p, i, b);
            });
        }
    }

    fn reference(&self, instr: usize, operand: usize) -> &BufferRef {
        match &self.plan.instrs[instr] {
            Instr::Run { operands, .. } => &operands[operand],
            other => panic!("instruction {instr} ({other}) is a run"),
        }
    }

    fn wrong_tokens(&mut self) {
        let runs: Vec<usize> = self.runs.iter().map(|r| r.instr).collect();
        for i in pick(&runs) {
            self.add("move the tokens of a run", self.show(i), |p| {
                if let Instr::Run { tokens, .. } = &mut p.instrs[i] {
                    *tokens = tokens.start + GRANULE_TOKENS..tokens.end + GRANULE_TOKENS;
                }
            });
            self.add("cut the tokens of a run", self.show(i), |p| {
                if let Instr::Run { tokens, .. } = &mut p.instrs[i] {
                    tokens.end -= GRANULE_TOKENS / 2;
                }
            });
        }
        // Data lies at one place per token all through the step, so this reads the wrong rows.
        let is_data = |o: &Operand| match o.what {
            What::Value(v) => matches!(self.graph.values[v].kind, ValueKind::Input(_)),
            _ => false,
        };
        let mut pairs = Vec::new();
        for run in self.runs.iter().filter(|r| r.operands.iter().any(is_data)) {
            let other = self.runs.iter().find(|other| {
                other.id == run.id && other.tokens != run.tokens && length(other) == length(run)
            });
            pairs.extend(other.map(|other| (run.instr, other.instr)));
        }
        for (i, j) in pick(&pairs) {
            let Instr::Run { operands: of_j, .. } = &self.plan.instrs[j] else { continue };
            let victims = format!("{} and {}", self.show(i), self.show(j));
            self.add("take the operands of another chunk", victims, |p| {
                if let Instr::Run { operands, .. } = &mut p.instrs[i] {
                    operands.clone_from(of_j);
                }
            });
        }
    }

    /// Lets the scratch of runs lie in the largest buffer of such a role.
    fn scratch_on_top_of(
        &mut self,
        what: &str,
        victims: &[usize],
        is_such: impl Fn(BufferRole) -> bool,
    ) {
        let such =
            self.plan.buffers.iter().filter(|(_, b)| is_such(b.role) && b.tier == Tier::Host);
        let Some((buffer, target)) = such.max_by_key(|(_, b)| b.bytes) else { return };
        let fits = |&i: &usize| match &self.plan.instrs[i] {
            Instr::Run { operands, .. } => {
                operands.last().is_some_and(|scratch| scratch.bytes <= target.bytes)
            }
            _ => false,
        };
        let fitting: Vec<usize> = victims.iter().copied().filter(fits).collect();
        for i in pick(&fitting) {
            self.add(&format!("scratch on top of {what}"), self.show(i), |p| {
                let scratch = last_reference(p, i);
                *scratch = BufferRef { buffer, at: 0, bytes: scratch.bytes };
            });
        }
    }

    fn wrong_scratch(&mut self) {
        let with_scratch = self.runs.iter().filter(|r| r.refs.len() > r.operands.len());
        let victims: Vec<usize> = with_scratch.map(|r| r.instr).collect();
        let without = self.runs.iter().filter(|r| r.refs.len() == r.operands.len());
        let without: Vec<usize> = without.map(|r| r.instr).collect();
        for i in pick(&victims) {
            self.add("too much scratch", self.show(i), |p| last_reference(p, i).bytes += 64);
            self.add("too little scratch", self.show(i), |p| last_reference(p, i).bytes -= 1);
            self.add("no scratch", self.show(i), |p| {
                if let Instr::Run { operands, .. } = &mut p.instrs[i] {
                    operands.pop();
                }
            });
        }
        // A parameter must survive the step, updated or not; so must the data.
        self.scratch_on_top_of("a parameter", &victims, |role| {
            matches!(role, BufferRole::Param(_))
        });
        let graph = self.graph;
        self.scratch_on_top_of("data", &victims, |role| match role {
            BufferRole::Session(v) => matches!(graph.values[v].kind, ValueKind::Input(_)),
            _ => false,
        });
        for i in pick(&without) {
            self.add("one operand too many", self.show(i), |p| {
                if let Instr::Run { operands, .. } = &mut p.instrs[i] {
                    operands.extend(operands.last().copied());
                }
            });
        }
    }

    /// First and last instruction that names each buffer.
    fn used(&self) -> Vec<(BufferId, usize, usize)> {
        let mut used: BTreeMap<BufferId, (usize, usize)> = BTreeMap::new();
        for (i, instr) in self.plan.instrs.iter().enumerate() {
            let refs: Vec<&BufferRef> = match instr {
                Instr::Run { operands, .. } => operands.iter().collect(),
                Instr::Zero { dst, .. } => vec![dst],
                Instr::Copy { src, dst, .. } => vec![src, dst],
                Instr::Wait { .. } => Vec::new(),
            };
            for r in refs {
                used.entry(r.buffer).or_insert((i, i)).1 = i;
            }
        }
        used.into_iter().map(|(b, (first, last))| (b, first, last)).collect()
    }

    fn wrong_buffers(&mut self) {
        let used = self.used();
        for (b, first, last) in pick(&used) {
            self.add("a buffer that ends before its last use", b, |p| {
                p.buffers[b].live.end = last as u32;
            });
            self.add("a buffer that starts after its first use", b, |p| {
                p.buffers[b].live.start = first as u32 + 1;
            });
            self.add("a buffer that is not aligned", b, |p| p.buffers[b].offset += 32);
            self.add("a buffer that outlives the step", b, |p| {
                p.buffers[b].live.end = p.instrs.len() as u32 + 1;
            });
        }
        let mut pairs = Vec::new();
        for (id, b) in self.plan.buffers.iter().filter(|(_, b)| b.bytes > 0) {
            let other = self.plan.buffers.iter().find(|(other_id, other)| {
                *other_id != id
                    && other.bytes > 0
                    && other.tier == b.tier
                    && other.live.start.max(b.live.start) < other.live.end.min(b.live.end)
            });
            pairs.extend(other.map(|(other, _)| (id, other)));
        }
        for (b, other) in pick(&pairs) {
            self.add("two live buffers on one place", format!("{b} and {other}"), |p| {
                p.buffers[b].offset = p.buffers[other].offset;
            });
        }
    }

    fn wrong_residents(&mut self) {
        let named: Vec<BufferId> = self.used().into_iter().map(|(b, _, _)| b).collect();
        let resident = |&b: &BufferId| {
            let role = self.plan.buffers[b].role;
            matches!(role, BufferRole::Param(_) | BufferRole::State(..) | BufferRole::Session(_))
        };
        let residents: Vec<BufferId> = named.into_iter().filter(resident).collect();
        for b in pick(&residents) {
            self.add("a resident without its role", b, |p| {
                p.buffers[b].role = BufferRole::Scratch(OpId(0));
            });
            self.add("a resident twice", b, |p| {
                let twin = p.buffers[b].clone();
                let offset = p.arena_bytes;
                p.arena_bytes += twin.bytes;
                p.buffers.push(ounce_program::Buffer { offset, ..twin });
            });
            self.add("a resident that starts late", b, |p| p.buffers[b].live.start += 1);
        }
    }

    fn wrong_certificate(&mut self) {
        let host = self.plan.buffers.values().filter(|b| b.tier == Tier::Host);
        let top = host.map(|b| b.offset + b.bytes).max().unwrap_or(0);
        let peak = self.plan.certificate.peak_bytes;
        self.add("an arena that is too small", top, |p| {
            p.arena_bytes = top - 64;
            p.certificate.peak_bytes = p.arena_bytes + p.baseline_bytes;
        });
        self.add("a peak over the budget", peak, |p| p.certificate.budget_bytes = peak - 1);
        self.add("a peak that is certified too low", peak, |p| p.certificate.peak_bytes -= 64);
        self.add("a load that is certified too low", peak, |p| p.certificate.max_load_bytes -= 64);
        self.add("a load that is certified too high", peak, |p| p.certificate.max_load_bytes += 64);
        self.add("a bound above the predicted time", peak, |p| {
            p.certificate.step_bound_s = p.certificate.step_s * 2.0 + 1.0;
        });
        self.add("other threads", peak, |p| p.n_threads += 1);
    }

    fn wrong_transfers(&mut self) {
        let copies = self.instrs(|i| matches!(i, Instr::Copy { .. }));
        let waits = self.instrs(|i| matches!(i, Instr::Wait { .. }));
        self.drop("drop a copy", &copies);
        self.drop("drop a wait", &waits);
        let pairs: Vec<(usize, usize)> = copies
            .iter()
            .filter_map(|&i| {
                let Instr::Copy { tag, .. } = self.plan.instrs[i] else { return None };
                let wait =
                    waits.iter().find(|&&w| w > i && self.plan.instrs[w] == Instr::Wait { tag });
                wait.map(|&w| (i, w))
            })
            .collect();
        self.swap("wait before the copy", &pairs);
        for i in pick(&copies) {
            self.add("a copy onto itself", self.show(i), |p| {
                if let Instr::Copy { src, dst, .. } = &mut p.instrs[i] {
                    *dst = *src;
                }
            });
            self.add("a copy that is cut short", self.show(i), |p| {
                if let Instr::Copy { dst, .. } = &mut p.instrs[i] {
                    dst.bytes -= 1;
                }
            });
        }
    }
}

/// The first, the middle and the last.
fn pick<T: Clone + PartialEq>(items: &[T]) -> Vec<T> {
    let mut picked = Vec::new();
    for i in [0, items.len() / 2, items.len().saturating_sub(1)] {
        picked.extend(items.get(i).filter(|item| !picked.contains(*item)).cloned());
    }
    picked
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// The bytes of the whole value that an operand is.
fn bytes(o: &Operand) -> Range<u64> {
    o.first_byte..o.first_byte + o.bytes
}

fn length(run: &Run<'_>) -> u64 {
    run.tokens.end - run.tokens.start
}

fn reference(plan: &mut Plan, instr: usize, operand: usize) -> &mut BufferRef {
    match &mut plan.instrs[instr] {
        Instr::Run { operands, .. } => &mut operands[operand],
        other => panic!("instruction {instr} ({other}) is a run"),
    }
}

fn last_reference(plan: &mut Plan, instr: usize) -> &mut BufferRef {
    let Instr::Run { operands, .. } = &plan.instrs[instr] else {
        panic!("instruction {instr} is a run")
    };
    let last = operands.len() - 1;
    reference(plan, instr, last)
}

/// Removes instruction `i`; lifetimes keep covering the same instructions.
fn remove(plan: &mut Plan, i: usize) {
    plan.instrs.remove(i);
    let i = i as u32;
    for id in plan.buffers.ids() {
        let live = &mut plan.buffers[id].live;
        live.start -= u32::from(live.start > i);
        live.end -= u32::from(live.end > i);
        // A buffer of that instruction only: let it live a little, elsewhere.
        live.end = live.end.max(live.start + 1).min(plan.instrs.len() as u32);
        live.start = live.start.min(live.end - 1);
    }
}

/// Repeats instruction `i` right after instruction `after`; lifetimes that reach `after` are extended.
fn repeat(plan: &mut Plan, i: usize, after: usize) {
    let again = plan.instrs[i].clone();
    plan.instrs.insert(after + 1, again);
    let after = after as u32;
    for id in plan.buffers.ids() {
        let live = &mut plan.buffers[id].live;
        live.start += u32::from(live.start > after);
        live.end += u32::from(live.end > after);
    }
}

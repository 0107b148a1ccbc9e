//! An op as it is measured: cut to a size from which time only scales, laid out in an arena.
//!
//! Idea: fewer vocabulary rows, output columns and elements, and shorter rows of attention, take time in
//! proportion to their work. What is equal but for names has the same [`Key`], and is measured once.
//!
//! Invariant: a set of operands and the scratch take at most the bytes that the problem was cut for, if
//! cutting can do that at all.

use std::fmt::Write as _;

use ounce_ir::{Gate, GeluKind, Graph, Lead, OpId, OpKind, RopeTable, WeightLayout};
use ounce_program::machine::flop;
use ounce_program::{GRANULE_TOKENS, StepShape};

use crate::TimeClass;
use crate::arena::UNIT_BYTES;
use crate::scratch::scratch_bytes;
use crate::spec::{Extent, OpSpec};

/// Work of one measured run at most.
pub(crate) const MAX_FLOP: f64 = 6e9;
/// Rows of a table, vocabulary tiles and elements beyond which time only scales.
const MAX_TABLE_ROWS: u64 = 4096;
const MAX_VOCAB: u64 = 8192;
const MAX_WEIGHT_ELEMS: u64 = 8 << 20;
const MAX_UPDATED_ELEMS: u64 = 2 << 20;

/// What one measurement measured: attributes, row length, selected tokens, widths, element types,
/// tokens.
pub(crate) type Key = (&'static str, [u64; 17]);

/// An op as it is measured: cut to a size where time only scales.
pub(crate) struct Problem {
    pub(crate) spec: OpSpec,
    /// Tokens of a row as measured, for ops that mix them; 0 otherwise.
    pub(crate) row_tokens: u64,
    n_selected: u64,
    /// Tokens of the smaller point, and what the larger is a multiple of.
    pub(crate) unit_tokens: u64,
    /// Tokens of the step, as measured.
    pub(crate) n_tokens_max: u64,
    /// Measured tokens per token of the step.
    pub(crate) tokens_ratio: f64,
    /// What a measured time is multiplied with.
    pub(crate) factor: f64,
    /// Whether the time does not depend on the number of tokens.
    pub(crate) is_constant: bool,
}

impl Problem {
    /// The op cut so far that its smaller point fits into `limit_bytes`, if cutting can do that.
    pub(crate) fn new(
        graph: &Graph,
        op: OpId,
        shape: &StepShape,
        limit_bytes: u64,
        n_threads: usize,
    ) -> Self {
        let mut part_bytes = limit_bytes;
        loop {
            let problem = Self::cut(graph, op, shape, part_bytes);
            let fits = problem.bytes(problem.unit_tokens, n_threads) <= limit_bytes;
            if fits || part_bytes < 1 << 20 {
                return problem;
            }
            // The scratch of products does not shrink with them: what is left is less.
            part_bytes /= 2;
        }
    }

    /// The op with weights, sums and states of at most half of `limit_bytes`.
    fn cut(graph: &Graph, op: OpId, shape: &StepShape, limit_bytes: u64) -> Self {
        let mut spec = OpSpec::new(graph, &graph.ops[op]);
        let factor = shrink(&mut spec, limit_bytes);
        let is_constant = spec.is_selected() || spec.operands.iter().all(|o| o.lead == Lead::Fixed);
        let n_selected = if spec.is_selected() { shape.n_selected.max(1) } else { 0 };
        let mut problem = Self {
            spec,
            row_tokens: 0,
            n_selected,
            unit_tokens: GRANULE_TOKENS.max(n_selected),
            n_tokens_max: shape.n_tokens(),
            tokens_ratio: 1.0,
            factor,
            is_constant,
        };
        if let OpKind::Attention(a) | OpKind::AttentionGrad(a) = problem.spec.kind {
            // Work grows with the square of the row: a long one is measured shorter.
            let longest = (MAX_FLOP / (5.0 * a.q_width() as f64)).sqrt() as u64;
            let row_tokens = shape.row_tokens.min(longest.next_multiple_of(GRANULE_TOKENS));
            let measured = StepShape { row_tokens, ..*shape };
            problem.row_tokens = row_tokens;
            problem.unit_tokens = measured.row_stride();
            problem.n_tokens_max = measured.n_tokens();
            problem.tokens_ratio = measured.row_stride() as f64 / shape.row_stride() as f64;
            let of_row = |shape: &StepShape| flop(graph, op, shape, shape.row_tokens);
            problem.factor = of_row(shape) / of_row(&measured);
        }
        problem
    }

    /// Work per measured token.
    pub(crate) fn flop_per_token(&self, graph: &Graph, op: OpId, shape: &StepShape) -> f64 {
        let measured = if self.row_tokens > 0 {
            StepShape { row_tokens: self.row_tokens, ..*shape }
        } else {
            *shape
        };
        let whole = flop(graph, op, &measured, self.unit_tokens) / self.unit_tokens as f64;
        if self.row_tokens > 0 { whole } else { whole / self.factor }
    }

    /// Whether the op is a product whose weights take as long to fetch as a few tokens to compute.
    pub(crate) fn waits_for_weights(&self) -> bool {
        matches!(TimeClass::of(&self.spec.kind), TimeClass::Linear | TimeClass::Head)
    }

    pub(crate) fn extent(&self, n_tokens: u64) -> Extent {
        Extent { n_tokens, n_selected: self.n_selected }
    }

    /// Offsets of the operands one after another, and the bytes of all. What may be written in the
    /// place of what flows is, as in plans.
    pub(crate) fn layout(&self, n_tokens: u64) -> (Vec<u32>, u64) {
        let mut end = 0;
        let mut offsets: Vec<u32> = Vec::new();
        for (i, operand) in self.spec.operands.iter().enumerate() {
            if let Some(input) = self.handed_on(i) {
                offsets.push(offsets[input]);
                continue;
            }
            offsets.push((end / UNIT_BYTES) as u32);
            end += operand.bytes(self.extent(n_tokens)).next_multiple_of(UNIT_BYTES);
        }
        (offsets, end)
    }

    /// The input whose place operand `i` takes.
    fn handed_on(&self, i: usize) -> Option<usize> {
        let spec = &self.spec;
        let (input, output) = (spec.flowing_input()?, i.checked_sub(spec.first_output())?);
        let alike = || spec.operands.get(i).is_some_and(|o| *o == spec.operands[input]);
        (spec.kind.in_place().contains(&(input, output)) && alike()).then_some(input)
    }

    /// Scratch of a run, in whole units.
    pub(crate) fn scratch_bytes(&self, n_tokens: u64, n_threads: usize) -> u64 {
        scratch_bytes(&self.spec, n_tokens, n_threads).next_multiple_of(UNIT_BYTES)
    }

    /// Bytes of one set of operands and the scratch.
    pub(crate) fn bytes(&self, n_tokens: u64, n_threads: usize) -> u64 {
        self.layout(n_tokens).1 + self.scratch_bytes(n_tokens, n_threads)
    }

    pub(crate) fn key(&self, tables: &[RopeTable], n_tokens: u64) -> Key {
        let mut numbers = [0; 17];
        numbers[..4].copy_from_slice(&attributes(&self.spec.kind, tables));
        numbers[4] = self.row_tokens;
        numbers[5] = self.n_selected;
        for (number, operand) in numbers[6..15].iter_mut().zip(&self.spec.operands) {
            *number = operand.row_elems;
        }
        for (i, operand) in self.spec.operands.iter().take(15).enumerate() {
            numbers[15] |= (operand.dtype as u64) << (4 * i);
        }
        numbers[16] = n_tokens;
        (self.spec.kind.name(), numbers)
    }

    /// The number that ids, targets and selected rows stay below.
    pub(crate) fn n_ids(&self) -> u64 {
        let width = |i: usize| self.spec.operands[i].row_elems;
        match self.spec.kind {
            OpKind::Embed => width(1) / width(2),
            OpKind::EmbedScatter => width(2) / width(1),
            OpKind::CrossEntropy { .. } | OpKind::CrossEntropyTrain { .. } => width(2) / width(0),
            _ => GRANULE_TOKENS,
        }
    }
}

/// Cuts the dimensions along which time only scales, also so that weights, sums and states take at
/// most half of `limit_bytes`; returns what to multiply times with.
fn shrink(spec: &mut OpSpec, limit_bytes: u64) -> f64 {
    let (n_reads, first_output) = (spec.n_reads(), spec.first_output());
    // Elements that each of `n` large f32 operands may have.
    let share = |n: usize| limit_bytes / 2 / 4 / n as u64;
    let columns_max = |k: u64| (share(1).min(MAX_WEIGHT_ELEMS) / k.max(1)).max(64) / 64 * 64;
    let operands = &mut spec.operands;
    let cut = |whole: u64, most: u64| (whole.min(most), whole as f64 / whole.min(most) as f64);
    match spec.kind {
        OpKind::Embed | OpKind::EmbedScatter => {
            let (rows, table) = if spec.kind == OpKind::Embed { (2, 1) } else { (1, 2) };
            let n_channels = operands[rows].row_elems;
            let most_rows = (share(1) / n_channels).max(GRANULE_TOKENS);
            let (n_rows, _) =
                cut(operands[table].row_elems / n_channels, MAX_TABLE_ROWS.min(most_rows));
            operands[table].row_elems = n_rows * n_channels;
            1.0
        }
        OpKind::CrossEntropy { .. } | OpKind::CrossEntropyTrain { .. } => {
            let n_channels = operands[0].row_elems;
            // The weight, its sum if there is one, and the logits.
            let most = share(first_output - 2) / (n_channels + GRANULE_TOKENS);
            let n_vocab = operands[2].row_elems / n_channels;
            let (n_vocab, factor) = cut(n_vocab, MAX_VOCAB.min(most).max(GRANULE_TOKENS));
            for operand in &mut operands[2..first_output] {
                operand.row_elems = n_vocab * n_channels;
            }
            factor
        }
        OpKind::SumSquares | OpKind::AdamW | OpKind::Sgd => {
            let most = MAX_UPDATED_ELEMS.min(share(operands.len())).max(GRANULE_TOKENS);
            let (n_elems, factor) = cut(operands[0].row_elems, most);
            operands[0].row_elems = n_elems;
            if spec.kind != OpKind::SumSquares {
                for operand in &mut operands[n_reads..] {
                    operand.row_elems = n_elems;
                }
            }
            factor
        }
        OpKind::Linear { bias, .. } => {
            let last = operands.len() - 1;
            let (k, m) = (operands[0].row_elems, operands[last].row_elems);
            let (m, factor) = cut(m, columns_max(k));
            operands[1].row_elems = k * m;
            operands[last].row_elems = m;
            if bias {
                operands[2].row_elems = m;
            }
            factor
        }
        OpKind::LinearGradInput { .. } => {
            let (m, k) = (operands[0].row_elems, operands[2].row_elems);
            let (m, factor) = cut(m, columns_max(k));
            operands[0].row_elems = m;
            operands[1].row_elems = k * m;
            factor
        }
        OpKind::LinearGradWeight { .. } => {
            let (k, m) = (operands[0].row_elems, operands[1].row_elems);
            let (m, factor) = cut(m, columns_max(k));
            operands[1].row_elems = m;
            operands[2].row_elems = k * m;
            factor
        }
        OpKind::LayerNorm { .. }
        | OpKind::RmsNorm { .. }
        | OpKind::Rope { .. }
        | OpKind::Attention(_)
        | OpKind::Gelu(_)
        | OpKind::Glu { .. }
        | OpKind::Add
        | OpKind::Scale { .. }
        | OpKind::SoftCap { .. }
        | OpKind::Dropout { .. }
        | OpKind::TakeRows
        | OpKind::BiasGrad
        | OpKind::LayerNormGrad { .. }
        | OpKind::RmsNormGrad { .. }
        | OpKind::AttentionGrad(_)
        | OpKind::GeluGrad(_)
        | OpKind::GluGrad { .. }
        | OpKind::SoftCapGrad { .. }
        | OpKind::EmbedGradRows
        | OpKind::ClipScale => 1.0,
    }
}

/// Attributes on which time depends.
fn attributes(kind: &OpKind, tables: &[RopeTable]) -> [u64; 4] {
    let layout = |l: WeightLayout| u64::from(l == WeightLayout::InOut);
    match *kind {
        OpKind::Linear { layout: l, bias } => [layout(l), u64::from(bias), 0, 0],
        OpKind::LinearGradInput { layout: l } | OpKind::LinearGradWeight { layout: l } => {
            [layout(l), 0, 0, 0]
        }
        OpKind::Rope { table, n_heads, head_dim, inverse } => {
            let n_pairs = tables[table.0 as usize].inv_freq.len() as u64;
            [n_pairs, u64::from(n_heads), u64::from(head_dim), u64::from(inverse)]
        }
        OpKind::Attention(a) | OpKind::AttentionGrad(a) => {
            let (h, k, d) = (a.n_heads, a.n_kv_heads, a.head_dim);
            // Three facts in one number: packed or not, capped or not, and the window.
            let layout = u64::from(a.packed) + 2 * u64::from(a.soft_cap.is_some());
            let window = a.window.map_or(0, u64::from);
            [u64::from(h), u64::from(k), u64::from(d), layout + 4 * window]
        }
        OpKind::Gelu(g) | OpKind::GeluGrad(g) => [u64::from(g == GeluKind::Erf), 0, 0, 0],
        OpKind::Glu { gate, packed } | OpKind::GluGrad { gate, packed } => {
            let gate = match gate {
                Gate::Silu => 0,
                Gate::Gelu(GeluKind::Tanh) => 1,
                Gate::Gelu(GeluKind::Erf) => 2,
            };
            [gate, u64::from(packed), 0, 0]
        }
        OpKind::CrossEntropy { soft_cap } | OpKind::CrossEntropyTrain { soft_cap } => {
            [u64::from(soft_cap.is_some()), 0, 0, 0]
        }
        OpKind::Embed
        | OpKind::LayerNorm { .. }
        | OpKind::RmsNorm { .. }
        | OpKind::Add
        | OpKind::Scale { .. }
        | OpKind::SoftCap { .. }
        | OpKind::Dropout { .. }
        | OpKind::TakeRows
        | OpKind::BiasGrad
        | OpKind::LayerNormGrad { .. }
        | OpKind::RmsNormGrad { .. }
        | OpKind::SoftCapGrad { .. }
        | OpKind::EmbedGradRows
        | OpKind::EmbedScatter
        | OpKind::SumSquares
        | OpKind::ClipScale
        | OpKind::AdamW
        | OpKind::Sgd => [0; 4],
    }
}

pub(crate) fn key_text((name, numbers): &Key) -> String {
    let mut text = (*name).to_owned();
    for number in numbers {
        write!(text, " {number}").expect("writing to a string succeeds");
    }
    text
}

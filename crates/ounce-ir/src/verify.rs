//! Every invariant of a graph, checked in one place.
//!
//! A pass may rely on these of its input and owes them for its output. All violations are
//! collected, each with the entity, its line of text and a message.
//!
//! **Ids**
//! 1. Every id that an entity mentions exists. (If not, nothing else is checked.)
//! 2. There is at least one reduction lane.
//!
//! **Storage**
//! 3. Parameters have names, all different; their shapes are fixed, without a zero, and their rows
//!    are whole storage blocks. So are the rows of values. Trained parameters are all f32 or all
//!    bf16.
//! 4. Rotary frequencies and scales are finite.
//! 5. A use is read by one op of the forward pass (or by the head, which runs with the backward), and
//!    besides by backward ops only.
//!
//! **Values**
//! 6. A data input is i32, of the shape of its kind, and the only one of its kind; there is at most
//!    one loss. Nothing writes data inputs and sums; every other value is written by exactly one op.
//! 7. A value is read after it is written. A sum is read as an input by update ops only, after
//!    something was added to it, and nothing is added to it afterwards.
//! 8. A sum is of a trained parameter: f32 of the parameter's shape, or rows `[N, C]` of an
//!    embedding's gradient, of its dtype. A parameter has at most one sum of its shape, and all ops that add to it
//!    add gradients of that parameter. Rows are written by one op.
//!
//! **Ops**
//! 9. Shapes and dtypes of operands and outputs are those of the op's shape rule.
//! 10. Attributes make sense: epsilons, windows and soft caps above 0, dropout between 0 and 1,
//!     finite scales.
//! 11. Phases come in order. Each kind of op runs in its phase; a forward op has no sums and reads
//!     no gradient, sum or scalar; it writes activations, a loss or a result, a backward op gradients
//!     or the loss, an update op scalars.
//! 12. Random sites are below the graph's count; no two forward ops share one, and a backward op has
//!     that of a forward op.
//!
//! **Stages**
//! 13. Forward and backward ops have a stage, update ops none. The forward runs through the stages
//!     in order, the backward against it.
//! 14. Stages are a chain: the output of one is the input of the next, and so are their gradients,
//!     the other way round; the first has no input, the last no output.
//! 15. A stage reads data, its own values, its input and the gradient of its output, nothing else of
//!     other stages. It writes its output and the gradient of its input.
//! 16. The gradient of a cut value has that value's shape.
//!
//! **Update**
//! 17. If one parameter is updated, every trained one is, exactly once, from the sum of its shape,
//!     by the same rule, and no frozen one. Optimizer states are those of the rule
//!    for the dtype of trained parameters.
//! 18. The clip scale, if there is one, reads the norm parts of all trained parameters in order, and
//!     every update takes it.

use crate::text::{op_line, param_line, stage_line, table_line, use_line, value_line};
use crate::{
    DType, EntityId, Graph, InputKind, Lead, Op, OpId, OpKind, OptimizerKind, ParamId, Phase,
    Shape, StageId, ValueId, ValueKind, infer_outputs,
};

/// A broken invariant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text}\n  {message}\nhint: this graph breaks an invariant of ounce-ir, listed in verify.rs"
)]
pub struct VerifyError {
    /// The entity, such as `op3`.
    pub entity: String,
    /// Its line of text.
    pub text: String,
    /// What is wrong with it.
    pub message: String,
}

/// Checks every invariant listed at the top of this file.
///
/// # Errors
/// All violations, in order of the list and of ids. If ids are out of range, only those.
pub fn verify(graph: &Graph) -> Result<(), Vec<VerifyError>> {
    let mut v = Verifier { graph, errors: Vec::new() };
    v.ids();
    if v.errors.is_empty() {
        v.storage();
        v.values();
        v.ops();
        v.random_sites();
        v.stages();
        v.update();
    }
    if v.errors.is_empty() { Ok(()) } else { Err(v.errors) }
}

struct Verifier<'a> {
    graph: &'a Graph,
    errors: Vec<VerifyError>,
}

impl Verifier<'_> {
    fn fail(&mut self, entity: &impl ToString, text: String, message: String) {
        self.errors.push(VerifyError { entity: entity.to_string(), text, message });
    }

    fn fail_op(&mut self, id: OpId, message: String) {
        self.fail(&id, op_line(id, &self.graph.ops[id]), message);
    }

    fn fail_value(&mut self, id: ValueId, message: String) {
        self.fail(&id, value_line(id, &self.graph.values[id]), message);
    }

    fn fail_param(&mut self, id: ParamId, message: String) {
        self.fail(&id, param_line(id, &self.graph.params[id]), message);
    }

    fn fail_stage(&mut self, id: StageId, message: String) {
        self.fail(&id, stage_line(id, &self.graph.stages[id]), message);
    }

    // ---- ids -------------------------------------------------------------------------------

    fn ids(&mut self) {
        let g = self.graph;
        if g.reduction_lanes == 0 {
            let text = format!("graph lanes 0 sites {}", g.n_random_sites);
            self.fail(&"graph", text, "there are no reduction lanes".to_owned());
        }
        for (id, u) in g.uses.iter() {
            if g.params.get(u.param).is_none() {
                self.fail(&id, use_line(g, id), format!("{} does not exist", u.param));
            }
        }
        for (id, v) in g.values.iter() {
            if let ValueKind::Sum(u) = v.kind
                && g.uses.get(u).is_none()
            {
                self.fail_value(id, format!("{u} does not exist"));
            }
        }
        for (id, s) in g.stages.iter() {
            for v in [s.input, s.output, s.d_output, s.d_input].into_iter().flatten() {
                if g.values.get(v).is_none() {
                    self.fail_stage(id, format!("{v} does not exist"));
                }
            }
        }
        for (id, op) in g.ops.iter() {
            for missing in missing_ids(g, op) {
                self.fail_op(id, format!("{missing} does not exist"));
            }
        }
    }

    // ---- storage ---------------------------------------------------------------------------

    fn storage(&mut self) {
        let g = self.graph;
        for (id, p) in g.params.iter() {
            let same_name = g.params.iter().find(|(other, q)| *other < id && q.name == p.name);
            if let Some((other, _)) = same_name {
                self.fail_param(id, format!("{other} has the same name"));
            }
            let dtype = g.trained_dtype();
            if p.trainable && !matches!(p.dtype, DType::F32 | DType::Bf16) {
                self.fail_param(id, "a trained parameter is f32 or bf16".to_owned());
            } else if p.trainable && p.dtype != dtype {
                self.fail_param(id, format!("other trained parameters are {dtype}"));
            }
            if p.name.is_empty() {
                self.fail_param(id, "the name is empty".to_owned());
            }
            if p.shape.lead != Lead::Fixed || p.shape.row_elems() == 0 {
                self.fail_param(id, "the shape is not fixed, or empty".to_owned());
            }
            if !p.shape.last().is_multiple_of(p.dtype.block_elems()) {
                self.fail_param(id, blocks_message(&p.shape, p.dtype.block_elems()));
            }
        }
        for (id, v) in g.values.iter() {
            if !v.shape.last().is_multiple_of(v.dtype.block_elems()) {
                self.fail_value(id, blocks_message(&v.shape, v.dtype.block_elems()));
            }
        }
        for (id, t) in g.rope_tables.iter() {
            if t.inv_freq.is_empty()
                || !t.scale.is_finite()
                || t.inv_freq.iter().any(|x| !x.is_finite())
            {
                let message = "the table is empty, or a number is not finite".to_owned();
                self.fail(&id, table_line(id, t), message);
            }
        }
        self.uses();
    }

    fn uses(&mut self) {
        let g = self.graph;
        let mut owner: Vec<Option<OpId>> = vec![None; g.uses.len()];
        for (id, op) in g.ops.iter() {
            if op.phase == Phase::Forward || matches!(op.kind, OpKind::CrossEntropyTrain { .. }) {
                for u in &op.uses {
                    if let Some(first) = owner[u.index()].replace(id) {
                        self.fail_op(id, format!("{u} is {first}'s already"));
                    }
                }
            }
        }
        for (id, op) in g.ops.iter() {
            for u in op.uses.iter().filter(|u| owner[u.index()].is_none()) {
                self.fail_op(id, format!("no op of the forward pass has {u}"));
            }
        }
    }

    // ---- values ----------------------------------------------------------------------------

    fn values(&mut self) {
        let g = self.graph;
        let mut n_inputs = [0; InputKind::ALL.len()];
        let mut n_losses = 0;
        for (id, v) in g.values.iter() {
            match v.kind {
                ValueKind::Input(kind) => {
                    n_inputs[kind as usize] += 1;
                    let shape = match kind {
                        InputKind::SelectedRows => Shape::selected(&[]),
                        InputKind::TokenIds | InputKind::Positions | InputKind::Targets => {
                            Shape::tokens(&[])
                        }
                    };
                    if v.shape != shape || v.dtype != DType::I32 {
                        self.fail_value(id, format!("data is i32{shape}"));
                    }
                    if n_inputs[kind as usize] == 2 {
                        self.fail_value(id, "another input has the same kind".to_owned());
                    }
                }
                ValueKind::Loss => {
                    n_losses += 1;
                    if n_losses == 2 {
                        self.fail_value(id, "there is another loss".to_owned());
                    }
                }
                ValueKind::Sum(_)
                | ValueKind::Activation
                | ValueKind::Gradient
                | ValueKind::Scalar
                | ValueKind::Result => {}
            }
        }
        self.definitions();
        self.sums();
    }

    /// One definition, before every reading.
    fn definitions(&mut self) {
        let g = self.graph;
        let mut writer: Vec<Option<OpId>> = vec![None; g.values.len()];
        for (id, op) in g.ops.iter() {
            for v in &op.outputs {
                if matches!(g.values[*v].kind, ValueKind::Input(_) | ValueKind::Sum(_)) {
                    self.fail_op(id, format!("{v} cannot be written: it is data or a sum"));
                } else if let Some(first) = writer[v.index()] {
                    self.fail_op(id, format!("{v} is written by {first} already"));
                } else {
                    writer[v.index()] = Some(id);
                }
            }
        }
        for (id, op) in g.ops.iter() {
            for v in &op.inputs {
                let kind = g.values[*v].kind;
                let is_defined = matches!(kind, ValueKind::Input(_) | ValueKind::Sum(_))
                    || writer[v.index()].is_some_and(|w| w < id);
                if !is_defined {
                    self.fail_op(id, format!("{v} is read before it is written"));
                }
            }
        }
        for (id, v) in g.values.iter() {
            if !matches!(v.kind, ValueKind::Input(_) | ValueKind::Sum(_))
                && writer[id.index()].is_none()
            {
                self.fail_value(id, "no op writes it".to_owned());
            }
        }
    }

    fn sums(&mut self) {
        let g = self.graph;
        let mut dense: Vec<Option<ValueId>> = vec![None; g.params.len()];
        for (id, v) in g.values.iter() {
            let ValueKind::Sum(u) = v.kind else { continue };
            let param = g.param_of(u);
            let p = &g.params[param];
            let rows = Shape::tokens(&[p.shape.last()]);
            let is_rows = p.shape.dims.len() == 2 && v.shape == rows;
            if !p.trainable {
                self.fail_value(id, format!("{param} is frozen and has no gradient"));
            }
            let fits = if is_rows {
                v.dtype.is_float()
            } else {
                v.dtype == DType::F32 && v.shape == p.shape
            };
            if !fits {
                self.fail_value(
                    id,
                    format!("a sum of {param} is f32{}, or rows if it is a table", p.shape),
                );
            }
            if !is_rows && let Some(first) = dense[param.index()].replace(id) {
                self.fail_value(id, format!("{first} is the sum of {param} already"));
            }
        }
        self.order_of_additions();
    }

    /// Additions come before readings, gradients of one parameter go into its own sum.
    fn order_of_additions(&mut self) {
        let g = self.graph;
        let mut added = vec![false; g.values.len()];
        let mut read = vec![false; g.values.len()];
        for (id, op) in g.ops.iter() {
            for v in &op.inputs {
                if !matches!(g.values[*v].kind, ValueKind::Sum(_)) {
                    continue;
                }
                read[v.index()] = true;
                if op.phase != Phase::Update {
                    self.fail_op(id, format!("only an update op may read the sum {v}"));
                }
                if !added[v.index()] {
                    self.fail_op(id, format!("{v} is read before anything is added to it"));
                }
            }
            for (i, v) in op.sums.iter().enumerate() {
                let ValueKind::Sum(sum_use) = g.values[*v].kind else {
                    self.fail_op(id, format!("{v} is not a sum"));
                    continue;
                };
                if read[v.index()] {
                    self.fail_op(id, format!("{v} was read before this addition"));
                }
                if op.kind == OpKind::EmbedGradRows && added[v.index()] {
                    self.fail_op(id, format!("the rows {v} are written already"));
                }
                added[v.index()] = true;
                let param = g.param_of(sum_use);
                if let Some(own) = param_of_gradient(g, op, i)
                    && own != param
                {
                    self.fail_op(id, format!("a gradient of {own} is added to a sum of {param}"));
                }
            }
        }
    }

    // ---- ops -------------------------------------------------------------------------------

    fn ops(&mut self) {
        let g = self.graph;
        let mut phase = Phase::Forward;
        for (id, op) in g.ops.iter() {
            self.shape_rule(id, op);
            if let Some(message) = bad_attribute(&op.kind) {
                self.fail_op(id, message.to_owned());
            }
            if op.phase < phase {
                self.fail_op(id, "its phase comes before that of the op before it".to_owned());
            }
            phase = phase.max(op.phase);
            if !phases_of(&op.kind).contains(&op.phase) {
                self.fail_op(id, format!("{} does not run in this phase", op.kind.name()));
            }
            self.operand_kinds(id, op);
        }
    }

    fn shape_rule(&mut self, id: OpId, op: &Op) {
        let outputs = match infer_outputs(self.graph, op) {
            Ok(outputs) => outputs,
            Err(e) => return self.fail_op(id, e.what),
        };
        if outputs.len() != op.outputs.len() {
            let message = format!("has {} outputs, needs {}", op.outputs.len(), outputs.len());
            return self.fail_op(id, message);
        }
        for (v, (shape, dtype)) in op.outputs.iter().zip(outputs) {
            let value = &self.graph.values[*v];
            if value.shape != shape || value.dtype != dtype {
                let message =
                    format!("{v} is {}{}, the op writes {dtype}{shape}", value.dtype, value.shape);
                self.fail_op(id, message);
            }
        }
    }

    fn operand_kinds(&mut self, id: OpId, op: &Op) {
        for v in &op.inputs {
            let kind = self.graph.values[*v].kind;
            let reads_ahead = match op.phase {
                Phase::Forward => {
                    matches!(kind, ValueKind::Gradient | ValueKind::Sum(_) | ValueKind::Scalar)
                }
                Phase::Backward => kind == ValueKind::Scalar,
                Phase::Update => false,
            };
            if reads_ahead {
                self.fail_op(id, format!("{v} belongs to a later phase"));
            }
        }
        for v in &op.outputs {
            let fits = match self.graph.values[*v].kind {
                ValueKind::Activation | ValueKind::Result => op.phase == Phase::Forward,
                ValueKind::Loss => op.phase != Phase::Update,
                ValueKind::Gradient => op.phase == Phase::Backward,
                ValueKind::Scalar => op.phase == Phase::Update,
                // Reported among the definitions.
                ValueKind::Input(_) | ValueKind::Sum(_) => true,
            };
            if !fits {
                self.fail_op(id, format!("an op of this phase does not write {v}"));
            }
        }
        if op.phase == Phase::Forward && !op.sums.is_empty() {
            self.fail_op(id, "a forward op adds to no sum".to_owned());
        }
        if op.updates.is_some() && !matches!(op.kind, OpKind::AdamW | OpKind::Sgd) {
            self.fail_op(id, "only adamw and sgd update a parameter".to_owned());
        }
    }

    fn random_sites(&mut self) {
        let g = self.graph;
        let mut owner: Vec<Option<OpId>> = vec![None; g.n_random_sites as usize];
        for (id, op) in g.ops.iter() {
            let OpKind::Dropout { site, .. } = op.kind else { continue };
            match (owner.get_mut(site.index()), op.phase) {
                (None, _) => {
                    let count = g.n_random_sites;
                    self.fail_op(id, format!("{site} is not below the graph's count of {count}"));
                }
                (Some(slot @ None), Phase::Forward) => *slot = Some(id),
                (Some(Some(first)), Phase::Forward) => {
                    let message = format!("{site} is {first}'s already");
                    self.fail_op(id, message);
                }
                (Some(None), _) => {
                    self.fail_op(id, format!("no forward op has {site}"));
                }
                (Some(Some(_)), _) => {}
            }
        }
    }

    // ---- stages ----------------------------------------------------------------------------

    fn stages(&mut self) {
        let g = self.graph;
        let mut last: Option<(Phase, StageId)> = None;
        for (id, op) in g.ops.iter() {
            match (op.phase, op.stage) {
                (Phase::Update, None) => {}
                (Phase::Update, Some(_)) => {
                    self.fail_op(id, "an update op has no stage".to_owned());
                }
                (_, None) => self.fail_op(id, "the op has no stage".to_owned()),
                (phase, Some(stage)) => {
                    let against = last.is_some_and(|(p, before)| {
                        p == phase
                            && if phase == Phase::Forward { stage < before } else { stage > before }
                    });
                    if against {
                        self.fail_op(id, "stages do not come in order".to_owned());
                    }
                    last = Some((phase, stage));
                }
            }
        }
        self.chain();
        self.cuts();
    }

    fn chain(&mut self) {
        let g = self.graph;
        let ids: Vec<StageId> = g.stages.ids().collect();
        let (mut output, mut d_output) = (None, None);
        for &id in &ids {
            let s = &g.stages[id];
            if s.input != output {
                self.fail_stage(id, "its input is not the output of the stage before".to_owned());
            }
            if s.d_input != d_output {
                let message = "its d_input is not the d_output of the stage before".to_owned();
                self.fail_stage(id, message);
            }
            (output, d_output) = (s.output, s.d_output);
            for (v, d) in [(s.input, s.d_input), (s.output, s.d_output)] {
                let shape = |v: Option<ValueId>| v.map(|v| g.values[v].shape.clone());
                if d.is_some() && shape(v) != shape(d) {
                    self.fail_stage(id, "a gradient has not the shape of its cut value".to_owned());
                }
            }
        }
        if let Some(&id) = ids.last()
            && (output.is_some() || d_output.is_some())
        {
            self.fail_stage(id, "the last stage has no output".to_owned());
        }
    }

    /// What each stage reads of others and writes for them.
    fn cuts(&mut self) {
        let g = self.graph;
        let mut writer: Vec<Option<StageId>> = vec![None; g.values.len()];
        for op in g.ops.values() {
            for v in &op.outputs {
                writer[v.index()] = op.stage;
            }
        }
        for (id, op) in g.ops.iter() {
            let Some(stage) = op.stage else { continue };
            let s = &g.stages[stage];
            for v in &op.inputs {
                let is_foreign = writer[v.index()].is_some_and(|w| w != stage);
                let is_cut =
                    s.input == Some(*v) || (op.phase == Phase::Backward && s.d_output == Some(*v));
                if is_foreign && !is_cut {
                    self.fail_op(
                        id,
                        format!("{v} belongs to another stage and is not a cut value"),
                    );
                }
            }
        }
        for (id, s) in g.stages.iter() {
            let own = |v: ValueId| writer[v.index()] == Some(id);
            if s.output.is_some_and(|v| !own(v)) {
                self.fail_stage(id, "its output is written elsewhere".to_owned());
            }
            if s.d_input.is_some_and(|v| !own(v) && s.d_output != Some(v)) {
                self.fail_stage(id, "its d_input is written elsewhere".to_owned());
            }
        }
    }

    // ---- update ----------------------------------------------------------------------------

    fn update(&mut self) {
        let g = self.graph;
        let mut updated: Vec<Option<OpId>> = vec![None; g.params.len()];
        let mut rule = None;
        for (id, op) in g.ops.iter() {
            let kind = match op.kind {
                OpKind::AdamW => OptimizerKind::AdamW,
                OpKind::Sgd => OptimizerKind::Sgd,
                _ => continue,
            };
            if *rule.get_or_insert(kind) != kind {
                self.fail_op(id, "another op updates by another rule".to_owned());
            }
            let Some(param) = op.updates else { continue };
            if let Some(first) = updated[param.index()].replace(id) {
                self.fail_op(id, format!("{first} updates {param} already"));
            }
            if !g.params[param].trainable {
                self.fail_op(id, format!("{param} is frozen"));
            }
            let own_sum = op.inputs.first().is_some_and(|v| match g.values[*v].kind {
                ValueKind::Sum(u) => g.param_of(u) == param,
                _ => false,
            });
            if !own_sum {
                self.fail_op(id, format!("it does not read the sum of {param}"));
            }
        }
        let Some(rule) = rule else { return };
        for (id, p) in g.params.iter() {
            if p.trainable && updated[id.index()].is_none() {
                self.fail_param(id, "it is trained and no op updates it".to_owned());
            }
        }
        if g.states != rule.states(g.trained_dtype()) {
            let text = format!("graph lanes {} sites {}", g.reduction_lanes, g.n_random_sites);
            self.fail(&"graph", text, format!("optimizer states are not those of {rule:?}"));
        }
        self.clipping();
    }

    fn clipping(&mut self) {
        let g = self.graph;
        let mut writer: Vec<Option<OpId>> = vec![None; g.values.len()];
        for (id, op) in g.ops.iter() {
            for v in &op.outputs {
                writer[v.index()] = Some(id);
            }
        }
        let mut scale = None;
        for (id, op) in g.ops.iter() {
            if op.kind != OpKind::ClipScale {
                continue;
            }
            scale = op.outputs.first().copied();
            let norm_of = |part: &ValueId| {
                let norm = &g.ops[writer[part.index()]?];
                match (norm.kind, g.values[*norm.inputs.first()?].kind) {
                    (OpKind::SumSquares, ValueKind::Sum(u)) => Some(g.param_of(u)),
                    _ => None,
                }
            };
            let parts: Vec<Option<ParamId>> = op.inputs.iter().map(norm_of).collect();
            let trained = g.params.iter().filter(|(_, p)| p.trainable).map(|(id, _)| Some(id));
            if parts != trained.collect::<Vec<_>>() {
                let message = "it does not read the norm parts of the trained parameters in order";
                self.fail_op(id, message.to_owned());
            }
        }
        for (id, op) in g.ops.iter() {
            let is_update = matches!(op.kind, OpKind::AdamW | OpKind::Sgd);
            if is_update && op.inputs.get(1).copied() != scale {
                self.fail_op(id, "clipping is for all updates or for none".to_owned());
            }
        }
    }
}

/// Ids that `op` mentions and that do not exist.
fn missing_ids(g: &Graph, op: &Op) -> Vec<String> {
    let values = op.inputs.iter().chain(&op.sums).chain(&op.outputs);
    let mut missing: Vec<String> =
        values.filter(|v| g.values.get(**v).is_none()).map(ToString::to_string).collect();
    let uses = op.uses.iter().filter(|u| g.uses.get(**u).is_none());
    missing.extend(uses.map(ToString::to_string));
    let stage = op.stage.filter(|s| g.stages.get(*s).is_none());
    missing.extend(stage.map(|s| s.to_string()));
    let param = op.updates.filter(|p| g.params.get(*p).is_none());
    missing.extend(param.map(|p| p.to_string()));
    if let OpKind::Rope { table, .. } = op.kind
        && g.rope_tables.get(table).is_none()
    {
        missing.push(table.to_string());
    }
    missing
}

fn blocks_message(shape: &Shape, block: u64) -> String {
    format!("rows of {} elements are not whole blocks of {block}", shape.last())
}

/// The parameter whose gradient `op` adds to its `i`-th sum, where its operands tell.
fn param_of_gradient(g: &Graph, op: &Op, i: usize) -> Option<ParamId> {
    match op.kind {
        OpKind::CrossEntropyTrain { .. } | OpKind::RmsNormGrad { .. } => {
            Some(g.param_of(*op.uses.first()?))
        }
        // The second sum is the bias's, which the op does not read.
        OpKind::LayerNormGrad { .. } if i == 0 => Some(g.param_of(*op.uses.first()?)),
        OpKind::EmbedScatter => match g.values[*op.inputs.get(1)?].kind {
            ValueKind::Sum(u) => Some(g.param_of(u)),
            _ => None,
        },
        _ => None,
    }
}

/// Phases in which a kind of op may run.
fn phases_of(kind: &OpKind) -> &'static [Phase] {
    use Phase::{Backward, Forward, Update};
    match kind {
        OpKind::Embed
        | OpKind::Linear { .. }
        | OpKind::LayerNorm { .. }
        | OpKind::RmsNorm { .. }
        | OpKind::Attention(_)
        | OpKind::Gelu(_)
        | OpKind::Glu { .. }
        | OpKind::SoftCap { .. }
        | OpKind::TakeRows
        | OpKind::CrossEntropy { .. } => &[Forward],
        // Their own gradients, or where gradients meet.
        OpKind::Rope { .. } | OpKind::Add | OpKind::Scale { .. } | OpKind::Dropout { .. } => {
            &[Forward, Backward]
        }
        OpKind::CrossEntropyTrain { .. }
        | OpKind::LinearGradInput { .. }
        | OpKind::LinearGradWeight { .. }
        | OpKind::BiasGrad
        | OpKind::LayerNormGrad { .. }
        | OpKind::RmsNormGrad { .. }
        | OpKind::AttentionGrad(_)
        | OpKind::GeluGrad(_)
        | OpKind::GluGrad { .. }
        | OpKind::SoftCapGrad { .. }
        | OpKind::EmbedGradRows => &[Backward],
        OpKind::EmbedScatter
        | OpKind::SumSquares
        | OpKind::ClipScale
        | OpKind::AdamW
        | OpKind::Sgd => &[Update],
    }
}

/// What is wrong with an op's attributes, if anything is.
fn bad_attribute(kind: &OpKind) -> Option<&'static str> {
    match *kind {
        OpKind::LayerNorm { eps, .. }
        | OpKind::LayerNormGrad { eps, .. }
        | OpKind::RmsNorm { eps, .. }
        | OpKind::RmsNormGrad { eps, .. } => {
            (!(eps > 0.0 && eps.is_finite())).then_some("eps is not above 0 and finite")
        }
        OpKind::Dropout { p, .. } => (!(p > 0.0 && p < 1.0)).then_some("p is not between 0 and 1"),
        OpKind::Attention(spec) | OpKind::AttentionGrad(spec) => {
            if !spec.scale.is_finite() {
                Some("the scale is not finite")
            } else if spec.window == Some(0) {
                Some("the window is empty")
            } else {
                bad_cap(spec.soft_cap)
            }
        }
        OpKind::Scale { factor } => (!factor.is_finite()).then_some("the factor is not finite"),
        OpKind::SoftCap { cap } | OpKind::SoftCapGrad { cap } => bad_cap(Some(cap)),
        OpKind::CrossEntropy { soft_cap } | OpKind::CrossEntropyTrain { soft_cap } => {
            bad_cap(soft_cap)
        }
        _ => None,
    }
}

fn bad_cap(cap: Option<f32>) -> Option<&'static str> {
    let is_good = cap.is_none_or(|cap| cap > 0.0 && cap.is_finite());
    (!is_good).then_some("the soft cap is not above 0 and finite")
}

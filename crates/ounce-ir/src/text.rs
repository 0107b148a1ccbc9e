//! A graph as text: one line per entity, in an order in which everything is defined before it is
//! mentioned, except by parameters of the chain. [`crate::parse`] reads exactly this back.
//!
//! ```text
//! graph lanes 1 sites 0
//! param p0 "wte.weight" f32[11,4] decay trained normal 0.02
//! use u0 p0
//! stage s0 "embed" kind "embed" output v1
//! value v0 "token_ids" i32[N] input token_ids
//! value v1 "embed.wte" f32[N,4] activation
//! op0 forward s0 embed inputs v0 uses u0 outputs v1
//! ```
//! Numbers print with as many digits as reading them back exactly needs. In names, `"` and `\` are
//! escaped with `\`, and a line break is `\n`.

use std::fmt::{Display, Formatter, Result, Write};

use crate::{
    AttentionSpec, EntityId, Gate, GeluKind, Graph, Init, Op, OpId, OpKind, Param, ParamId, Phase,
    RopeTable, RopeTableId, Stage, StageId, StateSpec, UseId, Value, ValueId, ValueKind,
    WeightLayout,
};

impl Display for Graph {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        writeln!(f, "graph lanes {} sites {}", self.reduction_lanes, self.n_random_sites)?;
        for state in &self.states {
            writeln!(f, "{}", state_line(state))?;
        }
        self.rope_tables.iter().try_for_each(|(id, t)| writeln!(f, "{}", table_line(id, t)))?;
        self.params.iter().try_for_each(|(id, p)| writeln!(f, "{}", param_line(id, p)))?;
        self.uses.ids().try_for_each(|id| writeln!(f, "{}", use_line(self, id)))?;
        self.stages.iter().try_for_each(|(id, s)| writeln!(f, "{}", stage_line(id, s)))?;
        self.values.iter().try_for_each(|(id, v)| writeln!(f, "{}", value_line(id, v)))?;
        self.ops.iter().try_for_each(|(id, op)| writeln!(f, "{}", op_line(id, op)))
    }
}

/// `state "exp_avg" f32`
pub(crate) fn state_line(state: &StateSpec) -> String {
    format!("state {} {}", quoted(&state.name), state.dtype)
}

/// `table t0 scale 1.0 inv_freq 1.0 0.1`
pub(crate) fn table_line(id: RopeTableId, table: &RopeTable) -> String {
    let mut line = format!("table {id} scale {:?} inv_freq", table.scale);
    for x in &table.inv_freq {
        let _ = write!(line, " {x:?}");
    }
    line
}

/// `param p0 "wte.weight" f32[11,4] decay trained normal 0.02`
pub(crate) fn param_line(id: ParamId, p: &Param) -> String {
    let decay = if p.decay { "decay" } else { "no_decay" };
    let trained = if p.trainable { "trained" } else { "frozen" };
    let init = match p.init {
        Init::Normal(std) => format!("normal {std:?}"),
        Init::Zeros => "zeros".to_owned(),
        Init::Ones => "ones".to_owned(),
    };
    format!("param {id} {} {}{} {decay} {trained} {init}", quoted(&p.name), p.dtype, p.shape)
}

/// `use u0 p0`
pub(crate) fn use_line(graph: &Graph, id: UseId) -> String {
    format!("use {id} {}", graph.uses[id].param)
}

/// `stage s1 "mlp.0" kind "mlp" input v1 output v4 d_output v9 d_input v12`
pub(crate) fn stage_line(id: StageId, s: &Stage) -> String {
    let mut line = format!("stage {id} {} kind {}", quoted(&s.name), quoted(&s.kind));
    let cuts = [
        ("input", s.input),
        ("output", s.output),
        ("d_output", s.d_output),
        ("d_input", s.d_input),
    ];
    for (key, value) in cuts {
        if let Some(v) = value {
            let _ = write!(line, " {key} {v}");
        }
    }
    line
}

/// `value v1 "embed.wte" f32[N,4] activation`
pub(crate) fn value_line(id: ValueId, v: &Value) -> String {
    let kind = match v.kind {
        ValueKind::Input(kind) => format!("input {}", kind.name()),
        ValueKind::Activation => "activation".to_owned(),
        ValueKind::Gradient => "gradient".to_owned(),
        ValueKind::Sum(u) => format!("sum {u}"),
        ValueKind::Scalar => "scalar".to_owned(),
        ValueKind::Loss => "loss".to_owned(),
        ValueKind::Result => "result".to_owned(),
    };
    format!("value {id} {} {}{} {kind}", quoted(&v.name), v.dtype, v.shape)
}

/// `op0 forward s0 embed inputs v0 uses u0 outputs v1`; empty lists are left out.
pub(crate) fn op_line(id: OpId, op: &Op) -> String {
    let mut line = format!("{id} {}", phase_name(op.phase));
    if let Some(stage) = op.stage {
        let _ = write!(line, " {stage}");
    }
    let _ = write!(line, " {}{}", op.kind.name(), attributes(&op.kind));
    list(&mut line, "inputs", &op.inputs);
    list(&mut line, "uses", &op.uses);
    list(&mut line, "sums", &op.sums);
    list(&mut line, "outputs", &op.outputs);
    if let Some(p) = op.updates {
        let _ = write!(line, " updates {p}");
    }
    line
}

fn list<K: EntityId>(line: &mut String, key: &str, ids: &[K]) {
    if !ids.is_empty() {
        line.push(' ');
        line.push_str(key);
    }
    for id in ids {
        let _ = write!(line, " {id}");
    }
}

/// The name of a phase in the text.
pub(crate) const fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Forward => "forward",
        Phase::Backward => "backward",
        Phase::Update => "update",
    }
}

/// What an op is parametrized with, as ` key=value` after its name.
fn attributes(kind: &OpKind) -> String {
    match kind {
        OpKind::Linear { layout, bias } => format!(" layout={} bias={bias}", layout_name(*layout)),
        OpKind::LinearGradInput { layout } | OpKind::LinearGradWeight { layout } => {
            format!(" layout={}", layout_name(*layout))
        }
        OpKind::LayerNorm { eps, bias } | OpKind::LayerNormGrad { eps, bias } => {
            format!(" eps={eps:?} bias={bias}")
        }
        OpKind::RmsNorm { eps, unit_offset } | OpKind::RmsNormGrad { eps, unit_offset } => {
            format!(" eps={eps:?}{}", optional("unit_offset", unit_offset.then_some(true)))
        }
        OpKind::Rope { table, n_heads, head_dim, inverse } => {
            format!(" table={table} n_heads={n_heads} head_dim={head_dim} inverse={inverse}")
        }
        OpKind::Attention(spec) | OpKind::AttentionGrad(spec) => attention(spec),
        OpKind::Gelu(kind) | OpKind::GeluGrad(kind) => format!(" kind={}", gelu_name(*kind)),
        OpKind::Glu { gate, packed } | OpKind::GluGrad { gate, packed } => {
            format!(" gate={} packed={packed}", gate_name(*gate))
        }
        OpKind::Scale { factor } => format!(" factor={factor:?}"),
        OpKind::SoftCap { cap } | OpKind::SoftCapGrad { cap } => format!(" cap={cap:?}"),
        OpKind::CrossEntropy { soft_cap } | OpKind::CrossEntropyTrain { soft_cap } => {
            optional("soft_cap", *soft_cap)
        }
        OpKind::Dropout { p, site } => format!(" p={p:?} site={site}"),
        OpKind::Embed
        | OpKind::Add
        | OpKind::TakeRows
        | OpKind::BiasGrad
        | OpKind::EmbedGradRows
        | OpKind::EmbedScatter
        | OpKind::SumSquares
        | OpKind::ClipScale
        | OpKind::AdamW
        | OpKind::Sgd => String::new(),
    }
}

fn attention(spec: &AttentionSpec) -> String {
    let AttentionSpec { n_heads, n_kv_heads, head_dim, scale, packed, window, soft_cap } = spec;
    format!(
        " n_heads={n_heads} n_kv_heads={n_kv_heads} head_dim={head_dim} scale={scale:?} \
         packed={packed}{}{}",
        optional("window", *window),
        optional("soft_cap", *soft_cap)
    )
}

/// ` key=value` if there is a value.
fn optional(key: &str, value: Option<impl std::fmt::Debug>) -> String {
    value.map_or_else(String::new, |value| format!(" {key}={value:?}"))
}

/// The name of a weight layout in the text.
pub(crate) const fn layout_name(layout: WeightLayout) -> &'static str {
    match layout {
        WeightLayout::OutIn => "out_in",
        WeightLayout::InOut => "in_out",
    }
}

/// The name of a GELU in the text.
pub(crate) const fn gelu_name(kind: GeluKind) -> &'static str {
    match kind {
        GeluKind::Tanh => "tanh",
        GeluKind::Erf => "erf",
    }
}

/// The name of a gate in the text.
pub(crate) const fn gate_name(gate: Gate) -> &'static str {
    match gate {
        Gate::Silu => "silu",
        Gate::Gelu(GeluKind::Tanh) => "gelu_tanh",
        Gate::Gelu(GeluKind::Erf) => "gelu_erf",
    }
}

fn quoted(name: &str) -> String {
    let escaped = name.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("\"{escaped}\"")
}

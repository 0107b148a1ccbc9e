//! One shape rule per op: from operands to output shapes, or what does not fit.
//!
//! Float inputs may be f32, bf16 or f16, each on its own. What an op writes has no dtype of its own
//! (`OpKind::may_round`): an output that exists keeps that of its value, a new one is f32.

use crate::{AttentionSpec, DType, Graph, Lead, Op, OpKind, Shape, WeightLayout};

/// An operand that does not fit its op.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{op}: {what}\nhint: the op table in ounce-ir's op.rs lists the shape of every operand")]
pub struct InferError {
    /// The op's name.
    pub op: &'static str,
    /// Which operand, what it is and what it should be.
    pub what: String,
}

/// What one op's rule may look at.
struct Rule<'a> {
    graph: &'a Graph,
    op: &'a Op,
}

/// Shapes and dtypes of the op's outputs, after checking every operand. Outputs that the op names
/// already keep their dtype, where it may be chosen.
///
/// # Errors
/// [`InferError`] if the number, shape or dtype of an operand is not what the op needs.
pub fn infer_outputs(graph: &Graph, op: &Op) -> Result<Vec<(Shape, DType)>, InferError> {
    let mut outputs = Rule { graph, op }.outputs()?;
    for (i, (&v, (_, dtype))) in op.outputs.iter().zip(&mut outputs).enumerate() {
        let stored = graph.values[v].dtype;
        if op.kind.may_round(i) && stored.is_float() {
            *dtype = stored;
        }
    }
    Ok(outputs)
}

impl Rule<'_> {
    fn fail<T>(&self, what: String) -> Result<T, InferError> {
        Err(InferError { op: self.op.kind.name(), what })
    }

    fn arity(&self, inputs: usize, uses: usize, sums: &[usize]) -> Result<(), InferError> {
        let op = self.op;
        if op.inputs.len() != inputs || op.uses.len() != uses || !sums.contains(&op.sums.len()) {
            return self.fail(format!(
                "has {} inputs, {} uses, {} sums; needs {inputs}, {uses} and one of {sums:?}",
                op.inputs.len(),
                op.uses.len(),
                op.sums.len()
            ));
        }
        Ok(())
    }

    fn shape(&self, input: usize) -> &Shape {
        &self.graph.values[self.op.inputs[input]].shape
    }

    fn want(&self, input: usize, shape: &Shape, dtype: DType) -> Result<(), InferError> {
        let v = &self.graph.values[self.op.inputs[input]];
        if v.shape != *shape || v.dtype != dtype {
            return self.fail(format!(
                "input {input} ({}) is {}{}, needs {dtype}{shape}",
                v.name, v.dtype, v.shape
            ));
        }
        Ok(())
    }

    /// A float input of that shape.
    fn want_float(&self, input: usize, shape: &Shape) -> Result<(), InferError> {
        let dtype = self.graph.values[self.op.inputs[input]].dtype;
        self.want(input, shape, if dtype.is_float() { dtype } else { DType::F32 })
    }

    fn want_use(&self, index: usize, dims: &[u64]) -> Result<(), InferError> {
        let p = &self.graph.params[self.graph.param_of(self.op.uses[index])];
        if p.shape != Shape::fixed(dims) {
            let need = Shape::fixed(dims);
            return self.fail(format!("use {index} ({}) is {}, needs {need}", p.name, p.shape));
        }
        Ok(())
    }

    fn want_sum(&self, index: usize, shape: &Shape) -> Result<(), InferError> {
        self.want_sum_of(index, shape, DType::F32)
    }

    fn want_sum_of(&self, index: usize, shape: &Shape, dtype: DType) -> Result<(), InferError> {
        let v = &self.graph.values[self.op.sums[index]];
        if v.shape != *shape || v.dtype != dtype {
            return self.fail(format!(
                "sum {index} ({}) is {}{}, needs {dtype}{shape}",
                v.name, v.dtype, v.shape
            ));
        }
        Ok(())
    }

    /// A `[N, c]` (or `[R, c]`) float input; returns its shape.
    fn matrix(&self, input: usize) -> Result<Shape, InferError> {
        let s = self.shape(input).clone();
        if s.lead == Lead::Fixed || s.dims.len() != 1 {
            return self.fail(format!("input {input} is {s}, needs [N,C]"));
        }
        self.want_float(input, &s)?;
        Ok(s)
    }

    fn weight(&self, index: usize) -> Result<[u64; 2], InferError> {
        let p = &self.graph.params[self.graph.param_of(self.op.uses[index])];
        match p.shape.dims[..] {
            [a, b] => Ok([a, b]),
            _ => {
                self.fail(format!("use {index} ({}) is {}, needs two dimensions", p.name, p.shape))
            }
        }
    }

    fn outputs(&self) -> Result<Vec<(Shape, DType)>, InferError> {
        match self.op.kind {
            OpKind::Embed => self.embed(),
            OpKind::Linear { layout, bias } => self.linear(layout, bias),
            OpKind::LayerNorm { bias, .. } => self.norm(1 + usize::from(bias)),
            OpKind::RmsNorm { .. } => {
                self.arity(1, 1, &[0])?;
                same(self.groups()?)
            }
            OpKind::Rope { n_heads, head_dim, table, .. } => {
                self.rope(u64::from(n_heads) * u64::from(head_dim), head_dim, table)
            }
            OpKind::Attention(spec) => self.attention(&spec),
            OpKind::Gelu(_)
            | OpKind::Dropout { .. }
            | OpKind::Scale { .. }
            | OpKind::SoftCap { .. } => {
                self.arity(1, 0, &[0])?;
                same(self.matrix(0)?)
            }
            OpKind::Glu { packed, .. } => self.glu(packed),
            OpKind::Add => {
                self.arity(2, 0, &[0])?;
                let s = self.matrix(0)?;
                self.want_float(1, &s)?;
                same(s)
            }
            OpKind::TakeRows => {
                self.arity(2, 0, &[0])?;
                let s = self.matrix(0)?;
                self.want(1, &Shape::selected(&[]), DType::I32)?;
                same(Shape::selected(&s.dims))
            }
            OpKind::CrossEntropy { .. } => self.cross_entropy(false),
            OpKind::CrossEntropyTrain { .. } => self.cross_entropy(true),
            OpKind::LinearGradInput { layout } => self.linear_grad_input(layout),
            OpKind::LinearGradWeight { layout } => self.linear_grad_weight(layout),
            OpKind::BiasGrad => {
                self.arity(1, 0, &[1])?;
                let s = self.matrix(0)?;
                self.want_sum(0, &Shape::fixed(&s.dims))?;
                Ok(Vec::new())
            }
            OpKind::LayerNormGrad { bias, .. } => self.norm_grad(1 + usize::from(bias)),
            OpKind::RmsNormGrad { .. } => self.rms_norm_grad(),
            OpKind::AttentionGrad(spec) => self.attention_grad(&spec),
            OpKind::GeluGrad(_) | OpKind::SoftCapGrad { .. } => {
                self.arity(2, 0, &[0])?;
                let s = self.matrix(0)?;
                self.want_float(1, &s)?;
                same(s)
            }
            OpKind::GluGrad { packed, .. } => self.glu_grad(packed),
            OpKind::EmbedGradRows => {
                self.arity(1, 0, &[1])?;
                let s = self.matrix(0)?;
                self.want_sum_of(0, &s, self.graph.values[self.op.inputs[0]].dtype)?;
                Ok(Vec::new())
            }
            OpKind::EmbedScatter => self.embed_scatter(),
            OpKind::SumSquares => {
                self.arity(1, 0, &[0])?;
                Ok(vec![(Shape::fixed(&[1]), DType::F64)])
            }
            OpKind::ClipScale => {
                for i in 0..self.op.inputs.len() {
                    self.want(i, &Shape::fixed(&[1]), DType::F64)?;
                }
                Ok(vec![(Shape::fixed(&[1]), DType::F32)])
            }
            OpKind::AdamW | OpKind::Sgd => self.update(),
        }
    }

    fn embed(&self) -> Result<Vec<(Shape, DType)>, InferError> {
        self.arity(1, 1, &[0])?;
        self.want(0, &Shape::tokens(&[]), DType::I32)?;
        let [_, c] = self.weight(0)?;
        same(Shape::tokens(&[c]))
    }

    fn linear(&self, layout: WeightLayout, bias: bool) -> Result<Vec<(Shape, DType)>, InferError> {
        self.arity(1, 1 + usize::from(bias), &[0])?;
        let x = self.matrix(0)?;
        let (k, m) = self.in_out(layout)?;
        self.want_float(0, &Shape { lead: x.lead, dims: vec![k] })?;
        if bias {
            self.want_use(1, &[m])?;
        }
        same(Shape { lead: x.lead, dims: vec![m] })
    }

    fn in_out(&self, layout: WeightLayout) -> Result<(u64, u64), InferError> {
        let [a, b] = self.weight(0)?;
        Ok(match layout {
            WeightLayout::OutIn => (b, a),
            WeightLayout::InOut => (a, b),
        })
    }

    fn norm(&self, uses: usize) -> Result<Vec<(Shape, DType)>, InferError> {
        self.arity(1, uses, &[0])?;
        let x = self.matrix(0)?;
        for i in 0..uses {
            self.want_use(i, &x.dims)?;
        }
        same(x)
    }

    fn norm_grad(&self, n_sums: usize) -> Result<Vec<(Shape, DType)>, InferError> {
        self.arity(2, 1, &[0, n_sums])?;
        let x = self.matrix(0)?;
        self.want_float(1, &x)?;
        self.want_use(0, &x.dims)?;
        for i in 0..self.op.sums.len() {
            self.want_sum(i, &Shape::fixed(&x.dims))?;
        }
        same(x)
    }

    /// The shape of input 0, whose channels are whole groups as wide as the first use.
    fn groups(&self) -> Result<Shape, InferError> {
        let x = self.matrix(0)?;
        let p = &self.graph.params[self.graph.param_of(self.op.uses[0])];
        match p.shape.dims[..] {
            [c] if c > 0 && x.last().is_multiple_of(c) => Ok(x),
            _ => self.fail(format!(
                "use 0 ({}) is {}, needs one dimension that divides {}",
                p.name,
                p.shape,
                x.last()
            )),
        }
    }

    fn rms_norm_grad(&self) -> Result<Vec<(Shape, DType)>, InferError> {
        self.arity(2, 1, &[0, 1])?;
        let x = self.groups()?;
        self.want_float(1, &x)?;
        if !self.op.sums.is_empty() {
            let p = &self.graph.params[self.graph.param_of(self.op.uses[0])];
            self.want_sum(0, &p.shape)?;
        }
        same(x)
    }

    /// Gate and up of a gated linear unit, from input 0 on; returns the shape of one of them.
    fn gate_and_up(&self, packed: bool) -> Result<Shape, InferError> {
        let s = self.matrix(0)?;
        if !packed {
            self.want_float(1, &s)?;
            return Ok(s);
        }
        if !s.last().is_multiple_of(2) {
            return self.fail(format!("input 0 is {s}, needs gate and up of one width"));
        }
        Ok(Shape { lead: s.lead, dims: vec![s.last() / 2] })
    }

    fn glu(&self, packed: bool) -> Result<Vec<(Shape, DType)>, InferError> {
        self.arity(2 - usize::from(packed), 0, &[0])?;
        same(self.gate_and_up(packed)?)
    }

    fn glu_grad(&self, packed: bool) -> Result<Vec<(Shape, DType)>, InferError> {
        let n = 2 - usize::from(packed);
        self.arity(n + 1, 0, &[0])?;
        self.want_float(n, &self.gate_and_up(packed)?)?;
        Ok((0..n).map(|i| (self.shape(i).clone(), DType::F32)).collect())
    }

    fn rope(
        &self,
        turned: u64,
        head_dim: u32,
        table: crate::RopeTableId,
    ) -> Result<Vec<(Shape, DType)>, InferError> {
        self.arity(2, 0, &[0])?;
        let x = self.matrix(0)?;
        if x.lead != Lead::Tokens || x.last() < turned {
            return self.fail(format!("input 0 is {x}, needs at least {turned} columns to turn"));
        }
        self.want(1, &Shape::tokens(&[]), DType::I32)?;
        match self.graph.rope_tables.get(table) {
            Some(t) if 2 * t.inv_freq.len() <= head_dim as usize => same(x),
            Some(t) => self.fail(format!(
                "table {table} rotates {} elements, the head has {head_dim}",
                2 * t.inv_freq.len()
            )),
            None => self.fail(format!("table {table} does not exist")),
        }
    }

    /// Checks q, k, v (or packed qkv) from input 0 on; returns how many inputs they take.
    fn qkv(&self, spec: &AttentionSpec) -> Result<Vec<Shape>, InferError> {
        let (q, kv) = (spec.q_width(), spec.kv_width());
        if spec.n_kv_heads == 0 || !spec.n_heads.is_multiple_of(spec.n_kv_heads) {
            return self.fail(format!(
                "{} heads are not a multiple of {} kv heads",
                spec.n_heads, spec.n_kv_heads
            ));
        }
        let shapes: Vec<Shape> = if spec.packed {
            vec![Shape::tokens(&[q + 2 * kv])]
        } else {
            vec![Shape::tokens(&[q]), Shape::tokens(&[kv]), Shape::tokens(&[kv])]
        };
        for (i, s) in shapes.iter().enumerate() {
            if i < self.op.inputs.len() {
                self.want_float(i, s)?;
            }
        }
        Ok(shapes)
    }

    fn attention(&self, spec: &AttentionSpec) -> Result<Vec<(Shape, DType)>, InferError> {
        let n = self.qkv(spec)?.len();
        self.arity(n, 0, &[0])?;
        Ok(vec![
            (Shape::tokens(&[spec.q_width()]), DType::F32),
            (Shape::tokens(&[u64::from(spec.n_heads)]), DType::F32),
        ])
    }

    fn attention_grad(&self, spec: &AttentionSpec) -> Result<Vec<(Shape, DType)>, InferError> {
        let shapes = self.qkv(spec)?;
        let n = shapes.len();
        self.arity(n + 3, 0, &[0])?;
        let o = Shape::tokens(&[spec.q_width()]);
        self.want_float(n, &o)?;
        self.want(n + 1, &Shape::tokens(&[u64::from(spec.n_heads)]), DType::F32)?;
        self.want_float(n + 2, &o)?;
        Ok(shapes.into_iter().map(|s| (s, DType::F32)).collect())
    }

    fn cross_entropy(&self, train: bool) -> Result<Vec<(Shape, DType)>, InferError> {
        self.arity(2, 1, if train { &[0, 1] } else { &[0] })?;
        let x = self.matrix(0)?;
        self.want(1, &Shape::tokens(&[]), DType::I32)?;
        let [v, c] = self.weight(0)?;
        if x.dims != [c] {
            return self.fail(format!("input 0 is {x}, the weight is [{v},{c}]"));
        }
        if !self.op.sums.is_empty() {
            self.want_sum(0, &Shape::fixed(&[v, c]))?;
        }
        let loss = (Shape::tokens(&[]), DType::F32);
        Ok(if train { vec![loss, (x, DType::F32)] } else { vec![loss] })
    }

    fn linear_grad_input(&self, layout: WeightLayout) -> Result<Vec<(Shape, DType)>, InferError> {
        self.arity(1, 1, &[0])?;
        let dy = self.matrix(0)?;
        let (k, m) = self.in_out(layout)?;
        self.want_float(0, &Shape { lead: dy.lead, dims: vec![m] })?;
        same(Shape { lead: dy.lead, dims: vec![k] })
    }

    fn linear_grad_weight(&self, layout: WeightLayout) -> Result<Vec<(Shape, DType)>, InferError> {
        self.arity(2, 0, &[1])?;
        let (k, m) = (self.matrix(0)?.last(), self.matrix(1)?.last());
        let dims = match layout {
            WeightLayout::OutIn => [m, k],
            WeightLayout::InOut => [k, m],
        };
        self.want_sum(0, &Shape::fixed(&dims))?;
        Ok(Vec::new())
    }

    fn embed_scatter(&self) -> Result<Vec<(Shape, DType)>, InferError> {
        self.arity(2, 0, &[1])?;
        self.want(0, &Shape::tokens(&[]), DType::I32)?;
        let rows = self.matrix(1)?;
        let sum = &self.graph.values[self.op.sums[0]];
        if sum.shape.lead != Lead::Fixed
            || sum.shape.dims.len() != 2
            || sum.shape.last() != rows.last()
        {
            return self.fail(format!("sum {} is {}, rows are {rows}", sum.name, sum.shape));
        }
        Ok(Vec::new())
    }

    fn update(&self) -> Result<Vec<(Shape, DType)>, InferError> {
        let Some(param) = self.op.updates else {
            return self.fail("names no parameter to update".to_owned());
        };
        let clipped = self.op.inputs.len() == 2;
        self.arity(1 + usize::from(clipped), 0, &[0])?;
        self.want(0, &self.graph.params[param].shape, DType::F32)?;
        if clipped {
            self.want(1, &Shape::fixed(&[1]), DType::F32)?;
        }
        Ok(Vec::new())
    }
}

/// One output of that shape, f32 if it is new.
#[expect(clippy::unnecessary_wraps, reason = "the last line of a rule reads better without Ok")]
fn same(shape: Shape) -> Result<Vec<(Shape, DType)>, InferError> {
    Ok(vec![(shape, DType::F32)])
}

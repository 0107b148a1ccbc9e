//! Reads the text that `text.rs` prints: `parse(print(g)) == g`, and nothing else is accepted but
//! blank lines and lines that start with `#`.
//!
//! A line is a list of words; a name in quotes is one word. Ids of definitions must count up from
//! zero. Whether the entities fit together is [`crate::verify`]'s question, not the parser's.

use crate::text::{gate_name, gelu_name, layout_name, phase_name};
use crate::{
    AttentionSpec, DType, EntityId, Gate, GeluKind, Graph, Init, InputKind, Lead, Op, OpKind,
    Param, Phase, RandomSite, RopeTable, RopeTableId, Shape, Stage, StateSpec, Table, Use, Value,
    ValueKind, WeightLayout,
};

/// A line that is no line of a graph.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}\nhint: print a graph to see the form; text.rs describes it")]
pub struct ParseError {
    /// The line, counted from 1.
    pub line: usize,
    /// What was expected and what was found.
    pub what: String,
}

impl Graph {
    /// The graph that prints as `text`.
    ///
    /// # Errors
    /// [`ParseError`] with the first line that does not read as described in `text.rs`.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut graph = Self::new();
        let mut is_first = true;
        for (i, line) in text.lines().enumerate() {
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let at_line = |what| ParseError { line: i + 1, what };
            let mut words = Words { words: split(line).map_err(at_line)?, at: 0 };
            let parsed = if is_first {
                header(&mut words, &mut graph)
            } else {
                entity(&mut words, &mut graph)
            };
            parsed.and_then(|()| words.end()).map_err(at_line)?;
            is_first = false;
        }
        if is_first {
            let what = "the text has no line `graph lanes .. sites ..`".to_owned();
            return Err(ParseError { line: 1, what });
        }
        Ok(graph)
    }
}

/// What is wrong with a line; the caller adds which.
type Parsed<T> = Result<T, String>;

/// A word of a line: bare or in quotes.
#[derive(Debug, Clone, PartialEq)]
enum Word {
    Bare(String),
    Quoted(String),
}

/// Splits at blanks; undoes the escapes in quotes.
fn split(line: &str) -> Parsed<Vec<Word>> {
    let mut words = Vec::new();
    let mut chars = line.chars().peekable();
    while let Some(&c) = chars.peek() {
        if c == ' ' {
            chars.next();
        } else if c == '"' {
            chars.next();
            let mut name = String::new();
            loop {
                match chars.next() {
                    None => return Err("a name has no closing quote".to_owned()),
                    Some('"') => break,
                    Some('\\') => match chars.next() {
                        Some('n') => name.push('\n'),
                        Some(c @ ('"' | '\\')) => name.push(c),
                        other => return Err(format!("unknown escape {other:?} in a name")),
                    },
                    Some(c) => name.push(c),
                }
            }
            words.push(Word::Quoted(name));
        } else {
            let mut word = String::new();
            while let Some(c) = chars.next_if(|&c| c != ' ') {
                word.push(c);
            }
            words.push(Word::Bare(word));
        }
    }
    Ok(words)
}

/// The words of one line, read from left to right.
struct Words {
    words: Vec<Word>,
    at: usize,
}

impl Words {
    fn peek(&self) -> Option<&str> {
        match self.words.get(self.at) {
            Some(Word::Bare(w)) => Some(w),
            Some(Word::Quoted(_)) | None => None,
        }
    }

    fn next(&mut self, want: &str) -> Parsed<String> {
        let word = self.peek().map(str::to_owned).ok_or_else(|| self.wanted(want))?;
        self.at += 1;
        Ok(word)
    }

    fn wanted(&self, want: &str) -> String {
        match self.words.get(self.at) {
            None => format!("the line ends where {want} should be"),
            Some(Word::Bare(w)) => format!("`{w}` stands where {want} should be"),
            Some(Word::Quoted(w)) => format!("\"{w}\" stands where {want} should be"),
        }
    }

    fn keyword(&mut self, keyword: &str) -> Parsed<()> {
        if self.eat(keyword) { Ok(()) } else { Err(self.wanted(&format!("`{keyword}`"))) }
    }

    fn eat(&mut self, keyword: &str) -> bool {
        let is_next = self.peek() == Some(keyword);
        self.at += usize::from(is_next);
        is_next
    }

    fn end(&self) -> Parsed<()> {
        if self.at == self.words.len() { Ok(()) } else { Err(self.wanted("the end of the line")) }
    }

    fn name(&mut self) -> Parsed<String> {
        match self.words.get(self.at) {
            Some(Word::Quoted(name)) => {
                self.at += 1;
                Ok(name.clone())
            }
            _ => Err(self.wanted("a name in quotes")),
        }
    }

    fn number<T: std::str::FromStr>(&mut self) -> Parsed<T> {
        let word = self.next("a number")?;
        word.parse().map_err(|_| format!("`{word}` is not a number that fits here"))
    }

    /// The id at this place.
    fn id<K: EntityId>(&mut self) -> Parsed<K> {
        let word = self.next("an id")?;
        id_of(&word)
    }

    /// The id after `keyword`, if that is next.
    fn optional_id<K: EntityId>(&mut self, keyword: &str) -> Parsed<Option<K>> {
        if self.eat(keyword) { self.id().map(Some) } else { Ok(None) }
    }

    /// The ids after `keyword`, if that is next.
    fn ids<K: EntityId>(&mut self, keyword: &str) -> Parsed<Vec<K>> {
        let mut ids = Vec::new();
        if self.eat(keyword) {
            ids.push(self.id()?);
            while let Some(id) = self.peek().and_then(|w| id_of(w).ok()) {
                ids.push(id);
                self.at += 1;
            }
        }
        Ok(ids)
    }

    /// The id that a definition must have: that of the table's next entity.
    fn defines<K: EntityId, T>(&mut self, table: &Table<K, T>) -> Parsed<()> {
        let id: K = self.id()?;
        if id == table.next_id() {
            return Ok(());
        }
        Err(format!("{id} is defined where {} should be", table.next_id()))
    }

    /// The text after `key=`.
    fn attribute(&mut self, key: &str) -> Parsed<String> {
        let word = self.next(&format!("`{key}=`"))?;
        let value = word.strip_prefix(key).and_then(|rest| rest.strip_prefix('='));
        value.map(str::to_owned).ok_or_else(|| format!("`{word}` stands where `{key}=` should be"))
    }

    fn value<T: std::str::FromStr>(&mut self, key: &str) -> Parsed<T> {
        let text = self.attribute(key)?;
        text.parse().map_err(|_| format!("`{text}` is not a value of {key}"))
    }

    /// The value after `key=`, if that is next.
    fn optional<T: std::str::FromStr>(&mut self, key: &str) -> Parsed<Option<T>> {
        let is_next =
            self.peek().and_then(|w| w.strip_prefix(key)).is_some_and(|rest| rest.starts_with('='));
        if is_next { self.value(key).map(Some) } else { Ok(None) }
    }

    /// One of `all`, by its printed name.
    fn one_of<T: Copy>(&mut self, key: &str, all: &[T], name: fn(T) -> &'static str) -> Parsed<T> {
        let text = self.attribute(key)?;
        let found = all.iter().copied().find(|&x| name(x) == text);
        found.ok_or_else(|| format!("`{text}` is not a value of {key}"))
    }
}

/// An id from its printed form, such as `v12`.
fn id_of<K: EntityId>(word: &str) -> Parsed<K> {
    let digits = word.trim_start_matches(|c: char| !c.is_ascii_digit());
    if let Ok(index) = digits.parse::<u32>() {
        let id = K::from_index(index as usize);
        if id.to_string() == word {
            return Ok(id);
        }
    }
    let example = K::from_index(0);
    Err(format!("`{word}` stands where an id such as `{example}` should be"))
}

/// `graph lanes 1 sites 0`
fn header(w: &mut Words, graph: &mut Graph) -> Parsed<()> {
    w.keyword("graph")?;
    w.keyword("lanes")?;
    graph.reduction_lanes = w.number()?;
    w.keyword("sites")?;
    graph.n_random_sites = w.number()?;
    Ok(())
}

fn entity(w: &mut Words, graph: &mut Graph) -> Parsed<()> {
    match w.peek() {
        Some("state") => state(w, graph),
        Some("table") => table(w, graph),
        Some("param") => param(w, graph),
        Some("use") => use_of(w, graph),
        Some("stage") => stage(w, graph),
        Some("value") => value(w, graph),
        Some(_) => op(w, graph),
        None => Err(w.wanted("the kind of an entity")),
    }
}

fn state(w: &mut Words, graph: &mut Graph) -> Parsed<()> {
    w.keyword("state")?;
    let name = w.name()?;
    let word = w.next("a dtype")?;
    let dtype = DType::from_name(&word).ok_or_else(|| format!("`{word}` is not a dtype"))?;
    graph.states.push(StateSpec { name, dtype });
    Ok(())
}

fn table(w: &mut Words, graph: &mut Graph) -> Parsed<()> {
    w.keyword("table")?;
    w.defines(&graph.rope_tables)?;
    w.keyword("scale")?;
    let scale = w.number()?;
    w.keyword("inv_freq")?;
    let mut inv_freq = Vec::new();
    while w.peek().is_some() {
        inv_freq.push(w.number()?);
    }
    graph.rope_tables.push(RopeTable { inv_freq, scale });
    Ok(())
}

fn param(w: &mut Words, graph: &mut Graph) -> Parsed<()> {
    w.keyword("param")?;
    w.defines(&graph.params)?;
    let name = w.name()?;
    let (dtype, shape) = typed_shape(w)?;
    let decay = either(w, "decay", "no_decay")?;
    let trainable = either(w, "trained", "frozen")?;
    let init = match w.next("an initialisation")?.as_str() {
        "normal" => Init::Normal(w.number()?),
        "zeros" => Init::Zeros,
        "ones" => Init::Ones,
        other => return Err(format!("`{other}` is not an initialization")),
    };
    graph.params.push(Param { name, shape, dtype, decay, trainable, init });
    Ok(())
}

fn use_of(w: &mut Words, graph: &mut Graph) -> Parsed<()> {
    w.keyword("use")?;
    w.defines(&graph.uses)?;
    graph.uses.push(Use { param: w.id()? });
    Ok(())
}

fn stage(w: &mut Words, graph: &mut Graph) -> Parsed<()> {
    w.keyword("stage")?;
    w.defines(&graph.stages)?;
    let name = w.name()?;
    w.keyword("kind")?;
    let kind = w.name()?;
    let input = w.optional_id("input")?;
    let output = w.optional_id("output")?;
    let d_output = w.optional_id("d_output")?;
    let d_input = w.optional_id("d_input")?;
    graph.stages.push(Stage { name, kind, input, output, d_output, d_input });
    Ok(())
}

fn value(w: &mut Words, graph: &mut Graph) -> Parsed<()> {
    w.keyword("value")?;
    w.defines(&graph.values)?;
    let name = w.name()?;
    let (dtype, shape) = typed_shape(w)?;
    let kind = match w.next("the kind of the value")?.as_str() {
        "input" => {
            let word = w.next("the kind of the input")?;
            let kind = InputKind::ALL.into_iter().find(|k| k.name() == word);
            ValueKind::Input(kind.ok_or_else(|| format!("`{word}` is not an input"))?)
        }
        "activation" => ValueKind::Activation,
        "gradient" => ValueKind::Gradient,
        "sum" => ValueKind::Sum(w.id()?),
        "scalar" => ValueKind::Scalar,
        "loss" => ValueKind::Loss,
        "result" => ValueKind::Result,
        other => return Err(format!("`{other}` is not a kind of value")),
    };
    graph.values.push(Value { name, shape, dtype, kind });
    Ok(())
}

fn op(w: &mut Words, graph: &mut Graph) -> Parsed<()> {
    w.defines(&graph.ops)?;
    let word = w.next("a phase")?;
    let phase = [Phase::Forward, Phase::Backward, Phase::Update];
    let phase = phase.into_iter().find(|&p| phase_name(p) == word);
    let phase = phase.ok_or_else(|| format!("`{word}` is not a phase"))?;
    let stage = match w.peek().map(id_of) {
        Some(Ok(stage)) => {
            w.at += 1;
            Some(stage)
        }
        _ => None,
    };
    let name = w.next("the name of an op")?;
    graph.ops.push(Op {
        kind: kind(w, &name)?,
        phase,
        stage,
        inputs: w.ids("inputs")?,
        uses: w.ids("uses")?,
        sums: w.ids("sums")?,
        outputs: w.ids("outputs")?,
        updates: w.optional_id("updates")?,
    });
    Ok(())
}

/// The op of that name, with its attributes.
fn kind(w: &mut Words, name: &str) -> Parsed<OpKind> {
    Ok(match name {
        "embed" => OpKind::Embed,
        "linear" => OpKind::Linear { layout: layout(w)?, bias: w.value("bias")? },
        "layer_norm" => OpKind::LayerNorm { eps: w.value("eps")?, bias: w.value("bias")? },
        "rms_norm" => OpKind::RmsNorm { eps: w.value("eps")?, unit_offset: unit_offset(w)? },
        "rope" => OpKind::Rope {
            table: id_of::<RopeTableId>(&w.attribute("table")?)?,
            n_heads: w.value("n_heads")?,
            head_dim: w.value("head_dim")?,
            inverse: w.value("inverse")?,
        },
        "attention" => OpKind::Attention(attention(w)?),
        "gelu" => OpKind::Gelu(gelu(w)?),
        "glu" => OpKind::Glu { gate: gate(w)?, packed: w.value("packed")? },
        "add" => OpKind::Add,
        "scale" => OpKind::Scale { factor: w.value("factor")? },
        "soft_cap" => OpKind::SoftCap { cap: w.value("cap")? },
        "dropout" => {
            OpKind::Dropout { p: w.value("p")?, site: id_of::<RandomSite>(&w.attribute("site")?)? }
        }
        "take_rows" => OpKind::TakeRows,
        "cross_entropy" => OpKind::CrossEntropy { soft_cap: w.optional("soft_cap")? },
        "cross_entropy_train" => OpKind::CrossEntropyTrain { soft_cap: w.optional("soft_cap")? },
        "linear_grad_input" => OpKind::LinearGradInput { layout: layout(w)? },
        "linear_grad_weight" => OpKind::LinearGradWeight { layout: layout(w)? },
        "bias_grad" => OpKind::BiasGrad,
        "layer_norm_grad" => OpKind::LayerNormGrad { eps: w.value("eps")?, bias: w.value("bias")? },
        "rms_norm_grad" => {
            OpKind::RmsNormGrad { eps: w.value("eps")?, unit_offset: unit_offset(w)? }
        }
        "attention_grad" => OpKind::AttentionGrad(attention(w)?),
        "gelu_grad" => OpKind::GeluGrad(gelu(w)?),
        "glu_grad" => OpKind::GluGrad { gate: gate(w)?, packed: w.value("packed")? },
        "soft_cap_grad" => OpKind::SoftCapGrad { cap: w.value("cap")? },
        "embed_grad_rows" => OpKind::EmbedGradRows,
        "embed_scatter" => OpKind::EmbedScatter,
        "sum_squares" => OpKind::SumSquares,
        "clip_scale" => OpKind::ClipScale,
        "adamw" => OpKind::AdamW,
        "sgd" => OpKind::Sgd,
        other => return Err(format!("`{other}` is not an op")),
    })
}

fn attention(w: &mut Words) -> Parsed<AttentionSpec> {
    Ok(AttentionSpec {
        n_heads: w.value("n_heads")?,
        n_kv_heads: w.value("n_kv_heads")?,
        head_dim: w.value("head_dim")?,
        scale: w.value("scale")?,
        packed: w.value("packed")?,
        window: w.optional("window")?,
        soft_cap: w.optional("soft_cap")?,
    })
}

fn unit_offset(w: &mut Words) -> Parsed<bool> {
    Ok(w.optional("unit_offset")?.unwrap_or(false))
}

fn gate(w: &mut Words) -> Parsed<Gate> {
    let all = [Gate::Silu, Gate::Gelu(GeluKind::Tanh), Gate::Gelu(GeluKind::Erf)];
    w.one_of("gate", &all, gate_name)
}

fn layout(w: &mut Words) -> Parsed<WeightLayout> {
    w.one_of("layout", &[WeightLayout::OutIn, WeightLayout::InOut], layout_name)
}

fn gelu(w: &mut Words) -> Parsed<GeluKind> {
    w.one_of("kind", &[GeluKind::Tanh, GeluKind::Erf], gelu_name)
}

fn either(w: &mut Words, yes: &str, no: &str) -> Parsed<bool> {
    if w.eat(yes) {
        return Ok(true);
    }
    if w.eat(no) { Ok(false) } else { Err(w.wanted(&format!("`{yes}` or `{no}`"))) }
}

/// `f32[N,4]`
fn typed_shape(w: &mut Words) -> Parsed<(DType, Shape)> {
    let word = w.next("a dtype and shape")?;
    let parsed = word.strip_suffix(']').and_then(|rest| rest.split_once('['));
    let (dtype, dims) = parsed.ok_or_else(|| format!("`{word}` is not a dtype and shape"))?;
    let dtype = DType::from_name(dtype).ok_or_else(|| format!("`{dtype}` is not a dtype"))?;
    let mut dims: Vec<&str> = dims.split(',').filter(|d| !d.is_empty()).collect();
    let lead = match dims.first() {
        Some(&"N") => Lead::Tokens,
        Some(&"R") => Lead::Selected,
        _ => Lead::Fixed,
    };
    if lead != Lead::Fixed {
        dims.remove(0);
    }
    let numbers: Result<Vec<u64>, _> = dims.iter().map(|d| d.parse()).collect();
    let dims = numbers.map_err(|_| format!("`{word}` has a dimension that is not a number"))?;
    Ok((dtype, Shape { lead, dims }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: AttentionSpec = AttentionSpec {
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 8,
        scale: 0.1,
        packed: true,
        window: None,
        soft_cap: None,
    };

    /// One op of every kind; the match fails to compile when a kind is added.
    fn every_kind() -> Vec<OpKind> {
        let (out_in, in_out) = (WeightLayout::OutIn, WeightLayout::InOut);
        let kinds = vec![
            OpKind::Embed,
            OpKind::Linear { layout: out_in, bias: true },
            OpKind::LayerNorm { eps: 1e-5, bias: false },
            OpKind::RmsNorm { eps: 3.0e-7, unit_offset: false },
            OpKind::Rope { table: RopeTableId(3), n_heads: 2, head_dim: 6, inverse: true },
            OpKind::Attention(SPEC),
            OpKind::Gelu(GeluKind::Tanh),
            OpKind::Glu { gate: Gate::Silu, packed: false },
            OpKind::Add,
            OpKind::Scale { factor: 1.5 },
            OpKind::SoftCap { cap: 30.0 },
            OpKind::Dropout { p: 0.1, site: RandomSite(7) },
            OpKind::TakeRows,
            OpKind::CrossEntropy { soft_cap: None },
            OpKind::CrossEntropyTrain { soft_cap: Some(30.0) },
            OpKind::LinearGradInput { layout: in_out },
            OpKind::LinearGradWeight { layout: out_in },
            OpKind::BiasGrad,
            OpKind::LayerNormGrad { eps: 1e-5, bias: true },
            OpKind::RmsNormGrad { eps: 1e-6, unit_offset: true },
            OpKind::AttentionGrad(AttentionSpec { packed: false, window: Some(3), ..SPEC }),
            OpKind::Attention(AttentionSpec { soft_cap: Some(50.0), ..SPEC }),
            OpKind::GeluGrad(GeluKind::Erf),
            OpKind::GluGrad { gate: Gate::Gelu(GeluKind::Tanh), packed: true },
            OpKind::SoftCapGrad { cap: 50.0 },
            OpKind::EmbedGradRows,
            OpKind::EmbedScatter,
            OpKind::SumSquares,
            OpKind::ClipScale,
            OpKind::AdamW,
            OpKind::Sgd,
        ];
        for kind in &kinds {
            match kind {
                OpKind::Embed
                | OpKind::Linear { .. }
                | OpKind::LayerNorm { .. }
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
                | OpKind::CrossEntropy { .. }
                | OpKind::CrossEntropyTrain { .. }
                | OpKind::LinearGradInput { .. }
                | OpKind::LinearGradWeight { .. }
                | OpKind::BiasGrad
                | OpKind::LayerNormGrad { .. }
                | OpKind::RmsNormGrad { .. }
                | OpKind::AttentionGrad(_)
                | OpKind::GeluGrad(_)
                | OpKind::GluGrad { .. }
                | OpKind::SoftCapGrad { .. }
                | OpKind::EmbedGradRows
                | OpKind::EmbedScatter
                | OpKind::SumSquares
                | OpKind::ClipScale
                | OpKind::AdamW
                | OpKind::Sgd => {}
            }
        }
        kinds
    }

    #[test]
    fn every_op_and_entity_reads_back() {
        let mut graph = Graph { reduction_lanes: 3, n_random_sites: 9, ..Graph::new() };
        let name = "a \"quoted\\\" name\n# with [everything] = v1".to_owned();
        graph.states.push(StateSpec { name: name.clone(), dtype: DType::Q8_0 });
        graph.rope_tables.push(RopeTable { inv_freq: vec![1.0, 0.1, 1.2345678e-8], scale: 0.3 });
        for init in [Init::Normal(0.02), Init::Zeros, Init::Ones] {
            let shape = Shape::fixed(&[3, 7]);
            let trainable = init != Init::Zeros;
            let (name, decay, dtype) = (name.clone(), init == Init::Ones, DType::Q4_1);
            graph.params.push(Param { name, shape, dtype, decay, trainable, init });
        }
        let u = graph.uses.push(Use { param: crate::ParamId(2) });
        let shapes = [Shape::fixed(&[]), Shape::tokens(&[]), Shape::selected(&[5, 6])];
        let kinds = InputKind::ALL.map(ValueKind::Input).into_iter().chain([
            ValueKind::Activation,
            ValueKind::Gradient,
            ValueKind::Sum(u),
            ValueKind::Scalar,
            ValueKind::Loss,
            ValueKind::Result,
        ]);
        for (i, kind) in kinds.enumerate() {
            let (shape, dtype) = (shapes[i % 3].clone(), DType::ALL[i % DType::ALL.len()]);
            graph.values.push(Value { name: name.clone(), shape, dtype, kind });
        }
        let v = |i: u32| Some(crate::ValueId(i));
        for cuts in 0..16u32 {
            let cut = |bit: u32| if cuts >> bit & 1 == 1 { v(bit) } else { None };
            graph.stages.push(Stage {
                name: name.clone(),
                kind: "k".to_owned(),
                input: cut(0),
                output: cut(1),
                d_output: cut(2),
                d_input: cut(3),
            });
        }
        for (i, kind) in every_kind().into_iter().enumerate() {
            let phase = [Phase::Forward, Phase::Backward, Phase::Update][i % 3];
            let stage = (i % 3 != 2).then_some(crate::StageId(i as u32));
            let values = |n: usize| (0..n as u32).map(crate::ValueId).collect::<Vec<_>>();
            graph.ops.push(Op {
                kind,
                phase,
                stage,
                inputs: values(i % 4),
                uses: vec![u; i % 2],
                sums: values(i % 3),
                outputs: values(i % 5),
                updates: (i % 7 == 0).then_some(crate::ParamId(1)),
            });
        }
        let text = graph.to_string();
        assert_eq!(Graph::parse(&text).as_ref(), Ok(&graph), "{text}");
        let commented = format!("\n# a comment\n{text}\n");
        assert_eq!(Graph::parse(&commented), Ok(graph));
    }

    #[test]
    fn a_wrong_line_is_named() {
        let error = |text: &str| {
            let e = Graph::parse(text).unwrap_err();
            (e.line, e.what)
        };
        assert!(error("").1.contains("no line `graph lanes"));
        assert_eq!(error("graph").1, "the line ends where `lanes` should be");
        for (line, want) in [
            ("param q0 \"x\" f32[1] decay trained ones", "`q0` stands where an id such as `p0`"),
            ("param p1 \"x\" f32[1] decay trained ones", "p1 is defined where p0 should be"),
            ("param p0 x f32[1] decay trained ones", "`x` stands where a name in quotes"),
            ("param p0 \"x f32[1] decay trained ones", "no closing quote"),
            ("param p0 \"x\" f99[1] decay trained ones", "`f99` is not a dtype"),
            ("param p0 \"x\" f32[y] decay trained ones", "dimension that is not a number"),
            ("param p0 \"x\" f32[1] trained ones", "`decay` or `no_decay`"),
            ("param p0 \"x\" f32[1] decay trained ones two", "`two` stands where the end"),
            ("value v0 \"x\" f32[N] input words", "`words` is not an input"),
            ("op0 forward s0 flatten", "`flatten` is not an op"),
            ("op0 forward s0 gelu kind=swish", "`swish` is not a value of kind"),
            ("op0 forward s0 rms_norm eps=much", "`much` is not a value of eps"),
            ("op0 forward s0 embed inputs u0", "`u0` stands where an id such as `v0`"),
            ("\"x\"", "\"x\" stands where the kind of an entity should be"),
        ] {
            let (at, what) = error(&format!("graph lanes 1 sites 0\n\n{line}"));
            assert!(at == 3 && what.contains(want), "{line}: {what}");
        }
    }
}

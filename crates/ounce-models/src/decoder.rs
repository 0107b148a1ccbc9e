//! What the Llama-like families share: one configuration, one way to read and write it, one writer
//! of layers.
//!
//! A family is a `Definition` in a file of its own: how its blocks are wired (`Blocks`), its
//! defaults, and the keys that it alone has. Everything else is here.
//!
//! ```text
//! x = scale embed_tokens[ids]
//! h = norm(x);  q, k, v = projections(h), q and k perhaps normed, then turned by position
//! x = x + norm(o_proj(attention(q, k, v)))                       per layer, stage attn.i
//! h = norm(x);  x = x + norm(down_proj(act(gate_proj(h)) * up_proj(h)))     stage mlp.i
//! loss = cross_entropy(norm(x), lm_head or embed_tokens)         stage head
//! ```
//! A half has a norm before it, behind it, or both; which, and their names, is the family's.

use ounce_ir::{
    AttentionSpec, Gate, GeluKind, Graph, GraphBuilder, Init, InputKind, ParamId, RopeTableId,
    Shape, ValueId, WeightLayout,
};
use serde_json::{Map, Value, json};

use crate::config::{Family, ModelError, Purpose, SpecialTokens};
use crate::json::Reader;
use crate::rope::{RopeConfig, RopeScaling};

/// What distinguishes a family, one constant per file.
pub(crate) struct Definition {
    /// `model_type`.
    pub(crate) model_type: &'static str,
    /// The class in `architectures`.
    pub(crate) architecture: &'static str,
    pub(crate) blocks: Blocks,
    pub(crate) defaults: Defaults,
    /// Keys that change nothing here, beside those of all families.
    pub(crate) harmless: &'static [&'static str],
    /// Reads the keys that only some families have; the common ones are read.
    pub(crate) read: fn(&mut Reader<'_>, &mut DecoderConfig) -> Result<(), ModelError>,
    /// Writes the keys that [`Definition::read`] reads.
    pub(crate) write: fn(&DecoderConfig, &mut Map<String, Value>),
}

/// How the blocks of a family are wired.
#[expect(clippy::struct_excessive_bools, reason = "one per difference between families")]
pub(crate) struct Blocks {
    pub(crate) norms: Norms,
    pub(crate) qk_norm: QkNorm,
    /// Whether norms multiply with `1 + w`.
    pub(crate) unit_offset: bool,
    /// Whether embeddings are multiplied with the root of `C`.
    pub(crate) scaled_embedding: bool,
    /// Whether q, k, v are one matrix, and gate and up another.
    pub(crate) packed: bool,
    /// Whether `attention_bias` includes the projection back.
    pub(crate) o_bias: bool,
}

impl Blocks {
    /// Llama's wiring.
    pub(crate) const LLAMA: Self = Self {
        norms: Norms::BEFORE,
        qk_norm: QkNorm::None,
        unit_offset: false,
        scaled_embedding: false,
        packed: false,
        o_bias: true,
    };
}

/// Names of the norms before and behind the two halves of a layer, where there are any.
pub(crate) struct Norms {
    before_attention: Option<&'static str>,
    behind_attention: Option<&'static str>,
    before_mlp: Option<&'static str>,
    behind_mlp: Option<&'static str>,
}

impl Norms {
    /// Before each half.
    pub(crate) const BEFORE: Self = Self {
        before_attention: Some("input_layernorm"),
        behind_attention: None,
        before_mlp: Some("post_attention_layernorm"),
        behind_mlp: None,
    };
    /// Behind each half, before its output joins the stream.
    pub(crate) const BEHIND: Self = Self {
        before_attention: None,
        behind_attention: Some("post_attention_layernorm"),
        before_mlp: None,
        behind_mlp: Some("post_feedforward_layernorm"),
    };
    /// Both.
    pub(crate) const AROUND: Self = Self {
        before_attention: Some("input_layernorm"),
        behind_attention: Some("post_attention_layernorm"),
        before_mlp: Some("pre_feedforward_layernorm"),
        behind_mlp: Some("post_feedforward_layernorm"),
    };
}

/// Whether queries and keys are normed before they are turned.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum QkNorm {
    None,
    /// Every head on its own.
    PerHead,
    /// All heads together.
    Whole,
}

/// What a key that is absent means; sizes without a default must be there.
pub(crate) struct Defaults {
    pub(crate) vocab_size: u64,
    pub(crate) max_positions: u64,
    /// Key and value heads; as many as query heads if `None`.
    pub(crate) n_kv_heads: Option<u64>,
    /// `D`; `C / H` if `None`.
    pub(crate) head_dim: Option<u64>,
    pub(crate) rms_norm_eps: f64,
    pub(crate) theta: f64,
    pub(crate) tied: bool,
    pub(crate) bos: Option<u64>,
    pub(crate) eos: Option<u64>,
    /// The key that names the activation of the gate, and what it is.
    pub(crate) activation: (&'static str, Gate),
}

/// What may differ from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// Whether attention looks back no further than [`DecoderConfig::window`].
    pub windowed: bool,
    /// Whether queries and keys are turned by their position.
    pub rotary: bool,
}

/// The configuration of a Llama-like model.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Which family.
    pub family: Family,
    /// `V`.
    pub vocab_size: u64,
    /// `C` (`hidden_size`).
    pub hidden: u64,
    /// `F` (`intermediate_size`).
    pub intermediate: u64,
    /// `H` (`num_attention_heads`).
    pub n_heads: u64,
    /// Key and value heads; divides `H`.
    pub n_kv_heads: u64,
    /// `D`.
    pub head_dim: u64,
    /// Positions the model was made for.
    pub max_position_embeddings: u64,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// The base of the wavelengths in windowed layers, where it is another.
    pub local_theta: Option<f64>,
    /// Layer by layer.
    pub layers: Vec<Layer>,
    /// Keys that a query of a windowed layer sees, itself included.
    pub window: Option<u64>,
    /// Scores are divided by the root of this (`query_pre_attn_scalar`, else `D`).
    pub query_scalar: f64,
    /// Scores `s` become `cap tanh(s / cap)`.
    pub score_cap: Option<f64>,
    /// Logits `l` become `cap tanh(l / cap)`.
    pub logit_cap: Option<f64>,
    /// Biases on q, k and v, and in most families on the projection back.
    pub attention_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Ids of tokens with a meaning.
    pub special_tokens: SpecialTokens,
}

impl DecoderConfig {
    /// Reads the keys of a `config.json` of that family.
    pub(crate) fn read(family: Family, map: &Map<String, Value>) -> Result<Self, ModelError> {
        let def = family.definition().expect("called for Llama-like families");
        let mut r = Reader::new(map, def.model_type, "");
        let mut config = Self::read_common(&mut r, family, def)?;
        (def.read)(&mut r, &mut config)?;
        r.finish(def.harmless)?;
        config.check()?;
        Ok(config)
    }

    fn read_common(
        r: &mut Reader<'_>,
        family: Family,
        def: &Definition,
    ) -> Result<Self, ModelError> {
        let d = &def.defaults;
        let hidden = r.size("hidden_size", None)?;
        let n_heads = r.size("num_attention_heads", None)?;
        let max_position_embeddings = r.size("max_position_embeddings", Some(d.max_positions))?;
        let head_dim = match r.optional_size("head_dim")?.or(d.head_dim) {
            Some(d) => d,
            None if hidden.is_multiple_of(n_heads) => hidden / n_heads,
            None => {
                let what = format!(
                    "hidden_size {hidden} is not a multiple of num_attention_heads {n_heads}"
                );
                return Err(ModelError::Inconsistent { what });
            }
        };
        let n_kv_heads = if r.has("num_key_value_heads") {
            r.size("num_key_value_heads", Some(n_heads))?
        } else {
            d.n_kv_heads.unwrap_or(n_heads)
        };
        let (key, gate) = d.activation;
        let name = activation_name(gate);
        r.only(key, &json!(name), &format!("only {name} is built for {}", def.model_type))?;
        let n_layers = r.size("num_hidden_layers", None)?;
        Ok(Self {
            family,
            vocab_size: r.size("vocab_size", Some(d.vocab_size))?,
            hidden,
            intermediate: r.size("intermediate_size", None)?,
            n_heads,
            n_kv_heads,
            head_dim,
            max_position_embeddings,
            rms_norm_eps: r.f64("rms_norm_eps", d.rms_norm_eps)?,
            initializer_range: r.f64("initializer_range", 0.02)?,
            rope: RopeConfig::plain(d.theta),
            local_theta: None,
            layers: vec![Layer { windowed: false, rotary: true }; layer_count(n_layers)?],
            window: None,
            query_scalar: head_dim as f64,
            score_cap: None,
            logit_cap: None,
            attention_bias: false,
            mlp_bias: false,
            tied: r.bool("tie_word_embeddings", d.tied)?,
            special_tokens: SpecialTokens::read(r, d.bos, d.eos)?,
        })
    }

    /// Reads rotary positions that turn whole heads, in every spelling.
    pub(crate) fn read_rope(&mut self, r: &mut Reader<'_>) -> Result<(), ModelError> {
        let (d, n) = (self.head_dim, self.max_position_embeddings);
        self.rope = RopeConfig::read(r, d, n, self.rope.theta)?;
        let one = self.rope.partial_rotary_factor == 1.0;
        if one { Ok(()) } else { Err(partial_rotary(r, self.rope.partial_rotary_factor)) }
    }

    /// Reads `layer_types`, if there, into [`Layer::windowed`]; else asks `is_windowed`.
    pub(crate) fn read_layer_types(
        &mut self,
        r: &mut Reader<'_>,
        is_windowed: impl Fn(usize) -> bool,
    ) -> Result<(), ModelError> {
        let types = r.strings("layer_types")?;
        let Some(types) = types else {
            for (i, layer) in self.layers.iter_mut().enumerate() {
                layer.windowed = is_windowed(i);
            }
            return Ok(());
        };
        if types.len() != self.layers.len() {
            let what = format!(
                "layer_types has {} entries, num_hidden_layers is {}",
                types.len(),
                self.layers.len()
            );
            return Err(ModelError::Inconsistent { what });
        }
        for (layer, kind) in self.layers.iter_mut().zip(types) {
            layer.windowed = match kind {
                "full_attention" => false,
                "sliding_attention" => true,
                other => {
                    let hint = "supported are full_attention and sliding_attention";
                    return Err(r.unsupported("layer_types", other, hint));
                }
            };
        }
        Ok(())
    }

    /// The names of the layers' kinds, as [`DecoderConfig::read_layer_types`] reads them.
    pub(crate) fn layer_types(&self) -> Vec<&'static str> {
        let name = |layer: &Layer| {
            if layer.windowed { "sliding_attention" } else { "full_attention" }
        };
        self.layers.iter().map(name).collect()
    }

    /// The keys of `config.json`.
    pub(crate) fn write(&self) -> Map<String, Value> {
        let def = self.family.definition().expect("a Llama-like family");
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        put("architectures", json!([def.architecture]));
        put("model_type", json!(def.model_type));
        put("vocab_size", json!(self.vocab_size));
        put("hidden_size", json!(self.hidden));
        put("intermediate_size", json!(self.intermediate));
        put("num_hidden_layers", json!(self.layers.len()));
        put("num_attention_heads", json!(self.n_heads));
        put("num_key_value_heads", json!(self.n_kv_heads));
        put("head_dim", json!(self.head_dim));
        put("max_position_embeddings", json!(self.max_position_embeddings));
        let (key, gate) = def.defaults.activation;
        put(key, json!(activation_name(gate)));
        put("rms_norm_eps", json!(self.rms_norm_eps));
        put("initializer_range", json!(self.initializer_range));
        put("tie_word_embeddings", json!(self.tied));
        self.rope.write(&mut map);
        (def.write)(self, &mut map);
        self.special_tokens.write(&mut map);
        map
    }

    fn check(&self) -> Result<(), ModelError> {
        let rotary = self.rope.rotary_dim(self.head_dim);
        let what = if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.n_heads, self.n_kv_heads
            )
        } else if !rotary.is_multiple_of(2) || rotary == 0 {
            format!(
                "head_dim {}: rotary positions turn pairs of elements, not {rotary}",
                self.head_dim
            )
        } else if self.window.is_none() && self.layers.iter().any(|layer| layer.windowed) {
            "layer_types has sliding_attention, but sliding_window is off".to_owned()
        } else if self.head_dim > MAX_HEAD_DIM {
            format!("head_dim {} is above {MAX_HEAD_DIM}", self.head_dim)
        } else {
            return self.check_numbers();
        };
        Err(ModelError::Inconsistent { what })
    }

    /// Numbers that must be above 0 and finite, in f32 too, which is what is computed in.
    fn check_numbers(&self) -> Result<(), ModelError> {
        let caps = [self.score_cap, self.logit_cap].into_iter().flatten();
        let thetas = self.local_theta.into_iter().chain([self.rope.theta]);
        let scale = ("one by the root of query_pre_attn_scalar", 1.0 / self.query_scalar.sqrt());
        let numbers = caps
            .map(|cap| ("a soft cap", cap))
            .chain(thetas.map(|theta| ("rope_theta", theta)))
            .chain([("rms_norm_eps", self.rms_norm_eps), scale]);
        check_above_zero(numbers)
    }

    /// The forward graph for rows of up to `max_length` tokens.
    pub(crate) fn build(
        &self,
        purpose: Purpose,
        dropout: f32,
        max_length: u64,
    ) -> Result<Graph, ModelError> {
        if dropout != 0.0 {
            return Err(ModelError::Dropout {
                p: dropout,
                hint: "only gpt2 models have dropout: leave it at 0",
            });
        }
        self.check()?;
        let mut m = Writer::new(self, max_length);
        let embedding = m.matrix("model.embed_tokens", self.vocab_size, self.hidden);
        let ids = m.b.input(InputKind::TokenIds);
        m.b.stage("embed", "embed");
        let mut x = m.b.embed(ids, embedding);
        if m.blocks.scaled_embedding {
            x = m.b.scale(x, (self.hidden as f64).sqrt() as f32);
        }
        for (i, layer) in self.layers.iter().enumerate() {
            x = m.attention_half(x, i, *layer);
            x = m.mlp_half(x, i);
        }
        m.b.stage("head", "head");
        let x = m.norm(x, "model.norm", self.hidden);
        let head =
            if self.tied { embedding } else { m.matrix("lm_head", self.vocab_size, self.hidden) };
        let cap = self.logit_cap.map(|cap| cap as f32);
        match purpose {
            Purpose::Loss => {
                m.b.cross_entropy_capped(x, head, cap);
            }
            Purpose::Decode => {
                let x = m.b.take_rows(x);
                let logits = m.b.linear(x, head, None, WeightLayout::OutIn);
                let logits = m.b.soft_cap(logits, cap);
                m.b.result(logits);
            }
        }
        Ok(m.b.finish()?)
    }
}

/// The error of a model that turns a part of each head, in a family that does not.
fn partial_rotary(r: &Reader<'_>, factor: f64) -> ModelError {
    let hint = "only the rotation of whole heads is built for this family";
    r.unsupported("partial_rotary_factor", &factor.to_string(), hint)
}

/// Longest head that the kernels have room for.
const MAX_HEAD_DIM: u64 = 1024;

/// Refuses numbers, by their names, that are not above 0 and finite in f32.
pub(crate) fn check_above_zero(
    numbers: impl IntoIterator<Item = (&'static str, f64)>,
) -> Result<(), ModelError> {
    let is_wrong = |x: f64| !(x as f32 > 0.0 && (x as f32).is_finite());
    match numbers.into_iter().find(|&(_, x)| is_wrong(x)) {
        None => Ok(()),
        Some((name, x)) => {
            let what = format!("{name} of {x:e} is not above 0 and finite in 32 bits");
            Err(ModelError::Inconsistent { what })
        }
    }
}

/// Layers as a length: more than any model has would only fill memory.
pub(crate) fn layer_count(n_layers: u64) -> Result<usize, ModelError> {
    if n_layers <= 4096 {
        return Ok(n_layers as usize);
    }
    Err(ModelError::WrongType {
        key: "num_hidden_layers".to_owned(),
        found: n_layers.to_string(),
        want: "a number up to 4096",
    })
}

/// The name of an activation in `config.json`.
const fn activation_name(gate: Gate) -> &'static str {
    match gate {
        Gate::Silu => "silu",
        Gate::Gelu(GeluKind::Tanh) => "gelu_pytorch_tanh",
        Gate::Gelu(GeluKind::Erf) => "gelu",
    }
}

/// Writes the layers of one model.
struct Writer<'a> {
    c: &'a DecoderConfig,
    blocks: &'static Blocks,
    gate: Gate,
    b: GraphBuilder,
    rope: RopeTableId,
    /// The table of windowed layers.
    local_rope: RopeTableId,
    /// The window, unless no row is longer.
    window: Option<u32>,
}

impl<'a> Writer<'a> {
    fn new(c: &'a DecoderConfig, max_length: u64) -> Self {
        let def = c.family.definition().expect("a Llama-like family");
        let mut b = GraphBuilder::new();
        let (inv_freq, scale) =
            c.rope.frequencies(c.head_dim, c.max_position_embeddings, max_length);
        let rope = b.rope_table(inv_freq, scale);
        let local_rope = match c.local_theta {
            Some(theta) if c.layers.iter().any(|layer| layer.windowed) => {
                let local = RopeConfig { theta, scaling: RopeScaling::Default, ..c.rope };
                let (inv_freq, scale) =
                    local.frequencies(c.head_dim, c.max_position_embeddings, max_length);
                b.rope_table(inv_freq, scale)
            }
            _ => rope,
        };
        let window = c.window.filter(|window| *window < max_length).map(|window| window as u32);
        Self {
            c,
            blocks: &def.blocks,
            gate: def.defaults.activation.1,
            b,
            rope,
            local_rope,
            window,
        }
    }

    fn matrix(&mut self, name: &str, out: u64, input: u64) -> ParamId {
        let init = Init::Normal(self.c.initializer_range as f32);
        self.b.param_init(&format!("{name}.weight"), Shape::fixed(&[out, input]), true, init)
    }

    fn linear(&mut self, x: ValueId, name: &str, input: u64, out: u64, bias: bool) -> ValueId {
        let w = self.matrix(name, out, input);
        let b = bias.then(|| {
            self.b.param_init(&format!("{name}.bias"), Shape::fixed(&[out]), false, Init::Zeros)
        });
        self.b.linear(x, w, b, WeightLayout::OutIn)
    }

    /// A norm of every `width` channels.
    fn norm(&mut self, x: ValueId, name: &str, width: u64) -> ValueId {
        let (shape, eps) = (Shape::fixed(&[width]), self.c.rms_norm_eps as f32);
        let name = format!("{name}.weight");
        if self.blocks.unit_offset {
            let w = self.b.param_init(&name, shape, false, Init::Zeros);
            self.b.rms_norm_unit_offset(x, w, eps)
        } else {
            let w = self.b.param_init(&name, shape, false, Init::Ones);
            self.b.rms_norm(x, w, eps)
        }
    }

    /// The norm of a layer before or behind a half, if there is one.
    fn layer_norm(&mut self, x: ValueId, layer: &str, name: Option<&str>) -> ValueId {
        name.map_or(x, |name| self.norm(x, &format!("{layer}.{name}"), self.c.hidden))
    }

    fn attention_half(&mut self, x: ValueId, i: usize, layer: Layer) -> ValueId {
        let (c, name) = (self.c, format!("model.layers.{i}"));
        self.b.stage(&format!("attn.{i}"), "attn");
        let h = self.layer_norm(x, &name, self.blocks.norms.before_attention);
        let spec = AttentionSpec {
            n_heads: c.n_heads as u32,
            n_kv_heads: c.n_kv_heads as u32,
            head_dim: c.head_dim as u32,
            scale: (1.0 / c.query_scalar.sqrt()) as f32,
            packed: self.blocks.packed,
            window: self.window.filter(|_| layer.windowed),
            soft_cap: c.score_cap.map(|cap| cap as f32),
        };
        let qkv = if self.blocks.packed {
            vec![self.packed_qkv(h, &name, &spec, layer)]
        } else {
            self.separate_qkv(h, &name, &spec, layer)
        };
        let o = self.b.attention(&qkv, spec);
        let bias = c.attention_bias && self.blocks.o_bias;
        let y = self.linear(o, &format!("{name}.self_attn.o_proj"), spec.q_width(), c.hidden, bias);
        let y = self.layer_norm(y, &name, self.blocks.norms.behind_attention);
        self.b.add(x, y)
    }

    fn separate_qkv(
        &mut self,
        h: ValueId,
        name: &str,
        spec: &AttentionSpec,
        layer: Layer,
    ) -> Vec<ValueId> {
        let (c, bias) = (self.c, self.c.attention_bias);
        let mut project = |part: &str, width: u64| {
            self.linear(h, &format!("{name}.self_attn.{part}_proj"), c.hidden, width, bias)
        };
        let (q, k, v) = (
            project("q", spec.q_width()),
            project("k", spec.kv_width()),
            project("v", spec.kv_width()),
        );
        let mut place = |x: ValueId, part: &str, width: u64, n_heads: u32| {
            let name = format!("{name}.self_attn.{part}_norm");
            let x = match self.blocks.qk_norm {
                QkNorm::None => x,
                QkNorm::PerHead => self.norm(x, &name, c.head_dim),
                QkNorm::Whole => self.norm(x, &name, width),
            };
            self.turn(x, n_heads, layer)
        };
        let q = place(q, "q", spec.q_width(), spec.n_heads);
        let k = place(k, "k", spec.kv_width(), spec.n_kv_heads);
        vec![q, k, v]
    }

    fn packed_qkv(
        &mut self,
        h: ValueId,
        name: &str,
        spec: &AttentionSpec,
        layer: Layer,
    ) -> ValueId {
        let (c, width) = (self.c, spec.q_width() + 2 * spec.kv_width());
        let name = format!("{name}.self_attn.qkv_proj");
        let qkv = self.linear(h, &name, c.hidden, width, c.attention_bias);
        // Queries and keys come first; values stay as they are.
        self.turn(qkv, spec.n_heads + spec.n_kv_heads, layer)
    }

    /// Turns the first `n_heads` heads by their position, if the layer does.
    fn turn(&mut self, x: ValueId, n_heads: u32, layer: Layer) -> ValueId {
        let table = if layer.windowed { self.local_rope } else { self.rope };
        if layer.rotary { self.b.rope(x, table, n_heads, self.c.head_dim as u32) } else { x }
    }

    fn mlp_half(&mut self, x: ValueId, i: usize) -> ValueId {
        let (c, name) = (self.c, format!("model.layers.{i}"));
        let (width, bias, packed) = (c.intermediate, c.mlp_bias, self.blocks.packed);
        self.b.stage(&format!("mlp.{i}"), "mlp");
        let h = self.layer_norm(x, &name, self.blocks.norms.before_mlp);
        let mut up = |part: &str, width: u64| {
            self.linear(h, &format!("{name}.mlp.{part}_proj"), c.hidden, width, bias)
        };
        let gate_and_up = if packed {
            vec![up("gate_up", 2 * width)]
        } else {
            vec![up("gate", width), up("up", width)]
        };
        let y = self.b.glu(&gate_and_up, self.gate);
        let y = self.linear(y, &format!("{name}.mlp.down_proj"), width, c.hidden, bias);
        let y = self.layer_norm(y, &name, self.blocks.norms.behind_mlp);
        self.b.add(x, y)
    }
}

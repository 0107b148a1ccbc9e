//! Llama: rotary positions, RMS norms before each half, grouped heads, SwiGLU, tied or untied head.
//!
//! ```text
//! x = embed_tokens[ids]
//! h = input_layernorm(x)                                         per layer, stage attn.i
//! x = x + o_proj(attention(rope(q_proj(h)), rope(k_proj(h)), v_proj(h)))
//! h = post_attention_layernorm(x)                                per layer, stage mlp.i
//! x = x + down_proj(silu(gate_proj(h)) * up_proj(h))
//! loss = cross_entropy(norm(x), lm_head or embed_tokens)         stage head
//! ```
//! Source: Touvron et al., "LLaMA", 2023; names and initialisation as `LlamaForCausalLM`. Qwen2 is
//! the same with biases on q, k and v alone; it exists here as a preset.

use ounce_ir::{
    AttentionSpec, Graph, GraphBuilder, Init, InputKind, ParamId, RopeTableId, Shape, ValueId,
    WeightLayout,
};
use serde_json::{Map, Value, json};

use crate::config::{ModelError, Purpose, SpecialTokens};
use crate::json::Reader;
use crate::rope::RopeConfig;

/// Keys of Llama that change nothing here: how a matrix product was split when it was trained.
const HARMLESS: &[&str] = &["pretraining_tp"];

/// The configuration of a Llama model.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "one per switch of config.json")]
pub struct LlamaConfig {
    /// `V`.
    pub vocab_size: u64,
    /// `C` (`hidden_size`).
    pub hidden: u64,
    /// `F` (`intermediate_size`).
    pub intermediate: u64,
    /// `L` (`num_hidden_layers`).
    pub n_layers: u64,
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
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention's projection back. (`attention_bias` is this and `qkv_bias`.)
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Ids of tokens with a meaning.
    pub special_tokens: SpecialTokens,
}

impl LlamaConfig {
    /// Reads the keys of a Llama `config.json`; sizes have no defaults.
    pub(crate) fn read(map: &Map<String, Value>) -> Result<Self, ModelError> {
        let mut r = Reader::new(map, "llama", "");
        let hidden = r.size("hidden_size", None)?;
        let n_heads = r.size("num_attention_heads", None)?;
        let max_position_embeddings = r.size("max_position_embeddings", Some(2048))?;
        if !r.has("head_dim") && !hidden.is_multiple_of(n_heads) {
            let what =
                format!("hidden_size {hidden} is no multiple of num_attention_heads {n_heads}");
            return Err(ModelError::Inconsistent { what });
        }
        let head_dim = r.size("head_dim", Some((hidden / n_heads).max(1)))?;
        let attention_bias = r.bool("attention_bias", false)?;
        let config = Self {
            vocab_size: r.size("vocab_size", Some(32000))?,
            hidden,
            intermediate: r.size("intermediate_size", None)?,
            n_layers: r.size("num_hidden_layers", None)?,
            n_heads,
            n_kv_heads: r.size("num_key_value_heads", Some(n_heads))?,
            head_dim,
            max_position_embeddings,
            rms_norm_eps: r.f64("rms_norm_eps", 1e-6)?,
            initializer_range: r.f64("initializer_range", 0.02)?,
            rope: RopeConfig::read(&mut r, head_dim, max_position_embeddings)?,
            qkv_bias: attention_bias,
            o_bias: attention_bias,
            mlp_bias: r.bool("mlp_bias", false)?,
            tied: r.bool("tie_word_embeddings", false)?,
            special_tokens: SpecialTokens::read(&mut r, Some(1), Some(2))?,
        };
        r.only("hidden_act", &json!("silu"), "only silu is built")?;
        r.only("rope_interleaved", &json!(false), "only rotation by halves is built")?;
        r.finish(HARMLESS)?;
        config.check()?;
        Ok(config)
    }

    /// The keys of `config.json`.
    pub(crate) fn write(&self) -> Map<String, Value> {
        let mut map = Map::new();
        let qwen2 = self.qkv_bias && !self.o_bias;
        let (architecture, model_type) =
            if qwen2 { ("Qwen2ForCausalLM", "qwen2") } else { ("LlamaForCausalLM", "llama") };
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        put("architectures", json!([architecture]));
        put("model_type", json!(model_type));
        put("vocab_size", json!(self.vocab_size));
        put("hidden_size", json!(self.hidden));
        put("intermediate_size", json!(self.intermediate));
        put("num_hidden_layers", json!(self.n_layers));
        put("num_attention_heads", json!(self.n_heads));
        put("num_key_value_heads", json!(self.n_kv_heads));
        put("head_dim", json!(self.head_dim));
        put("max_position_embeddings", json!(self.max_position_embeddings));
        put("hidden_act", json!("silu"));
        put("rms_norm_eps", json!(self.rms_norm_eps));
        put("initializer_range", json!(self.initializer_range));
        put("tie_word_embeddings", json!(self.tied));
        if !qwen2 {
            put("attention_bias", json!(self.qkv_bias));
            put("mlp_bias", json!(self.mlp_bias));
        }
        self.rope.write(&mut map);
        self.special_tokens.write(&mut map);
        map
    }

    fn check(&self) -> Result<(), ModelError> {
        let what = if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            format!(
                "num_attention_heads {} is no multiple of num_key_value_heads {}",
                self.n_heads, self.n_kv_heads
            )
        } else if !self.head_dim.is_multiple_of(2) {
            format!("head_dim {} is odd: rotary positions turn pairs of elements", self.head_dim)
        } else {
            return Ok(());
        };
        Err(ModelError::Inconsistent { what })
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
                hint: "llama models have no dropout: leave it at 0",
            });
        }
        self.check()?;
        let mut b = GraphBuilder::new();
        let (inv_freq, scale) =
            self.rope.frequencies(self.head_dim, self.max_position_embeddings, max_length);
        let rope = b.rope_table(inv_freq, scale);
        let mut m = Writer { c: self, b, rope };
        let embedding = m.matrix("model.embed_tokens", self.vocab_size, self.hidden);
        let ids = m.b.input(InputKind::TokenIds);
        m.b.stage("embed", "embed");
        let mut x = m.b.embed(ids, embedding);
        for i in 0..self.n_layers {
            x = m.attention_half(x, i);
            x = m.mlp_half(x, i);
        }
        m.b.stage("head", "head");
        let x = m.norm(x, "model.norm");
        let head =
            if self.tied { embedding } else { m.matrix("lm_head", self.vocab_size, self.hidden) };
        match purpose {
            Purpose::Loss => {
                m.b.cross_entropy(x, head);
            }
            Purpose::Decode => {
                let x = m.b.take_rows(x);
                let logits = m.b.linear(x, head, None, WeightLayout::OutIn);
                m.b.result(logits);
            }
        }
        Ok(m.b.finish()?)
    }
}

/// Writes the layers of one model.
struct Writer<'a> {
    c: &'a LlamaConfig,
    b: GraphBuilder,
    rope: RopeTableId,
}

impl Writer<'_> {
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

    fn norm(&mut self, x: ValueId, name: &str) -> ValueId {
        let shape = Shape::fixed(&[self.c.hidden]);
        let w = self.b.param_init(&format!("{name}.weight"), shape, false, Init::Ones);
        self.b.rms_norm(x, w, self.c.rms_norm_eps as f32)
    }

    fn attention_half(&mut self, x: ValueId, i: u64) -> ValueId {
        let c = self.c;
        let name = format!("model.layers.{i}");
        self.b.stage(&format!("attn.{i}"), "attn");
        let (heads, kv_heads, d) = (c.n_heads as u32, c.n_kv_heads as u32, c.head_dim as u32);
        let (q_width, kv_width) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
        let h = self.norm(x, &format!("{name}.input_layernorm"));
        let mut project = |part: &str, width: u64| {
            self.linear(h, &format!("{name}.self_attn.{part}"), c.hidden, width, c.qkv_bias)
        };
        let (q, k, v) =
            (project("q_proj", q_width), project("k_proj", kv_width), project("v_proj", kv_width));
        let q = self.b.rope(q, self.rope, heads, d);
        let k = self.b.rope(k, self.rope, kv_heads, d);
        let scale = (1.0 / f64::from(d).sqrt()) as f32;
        let spec = AttentionSpec {
            n_heads: heads,
            n_kv_heads: kv_heads,
            head_dim: d,
            scale,
            packed: false,
            window: None,
            soft_cap: None,
        };
        let o = self.b.attention(&[q, k, v], spec);
        let y = self.linear(o, &format!("{name}.self_attn.o_proj"), q_width, c.hidden, c.o_bias);
        self.b.add(x, y)
    }

    fn mlp_half(&mut self, x: ValueId, i: u64) -> ValueId {
        let c = self.c;
        let name = format!("model.layers.{i}");
        self.b.stage(&format!("mlp.{i}"), "mlp");
        let h = self.norm(x, &format!("{name}.post_attention_layernorm"));
        let gate =
            self.linear(h, &format!("{name}.mlp.gate_proj"), c.hidden, c.intermediate, c.mlp_bias);
        let up =
            self.linear(h, &format!("{name}.mlp.up_proj"), c.hidden, c.intermediate, c.mlp_bias);
        let y = self.b.swiglu(gate, up);
        let y =
            self.linear(y, &format!("{name}.mlp.down_proj"), c.intermediate, c.hidden, c.mlp_bias);
        self.b.add(x, y)
    }
}

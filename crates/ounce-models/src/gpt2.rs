//! GPT-2: learned positions, layer norms before each half, packed q, k, v, GELU, tied head.
//!
//! ```text
//! x = dropout(wte[ids] + wpe[positions])
//! x = x + dropout(c_proj(attention(c_attn(ln_1(x)))))     per layer, stage attn.i
//! x = x + dropout(c_proj(gelu(c_fc(ln_2(x)))))            per layer, stage mlp.i
//! loss = cross_entropy(ln_f(x), wte)                      stage head
//! ```
//! Weights of its linear layers are `[in, out]` (`Conv1D`). Source: `[Radford19]`; names and
//! initialisation as `GPT2LMHeadModel`.

use ounce_ir::{
    AttentionSpec, GeluKind, Graph, GraphBuilder, Init, InputKind, ParamId, Shape, ValueId,
    WeightLayout,
};
use serde_json::{Map, Value, json};

use crate::config::{ModelError, Purpose, SpecialTokens};
use crate::decoder::{check_above_zero, layer_count};
use crate::json::Reader;

/// Keys of GPT-2 that change nothing here: heads for other tasks; `n_ctx`, an old name of
/// `n_positions`; the order of operations of mixed precision; `is_decoder`, which GPT-2 does not
/// read. The dropout probabilities are not read: the run decides.
const HARMLESS: &[&str] = &[
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "n_ctx",
    "reorder_and_upcast_attn",
    "is_decoder",
    "is_encoder_decoder",
];

/// Keys of dropout: of attention probabilities, which is not built, of embeddings and of what blocks add.
const PDROPS: [&str; 3] = ["attn_pdrop", "embd_pdrop", "resid_pdrop"];

/// The configuration of a GPT-2 model.
#[derive(Debug, Clone, PartialEq)]
pub struct Gpt2Config {
    /// `V`.
    pub vocab_size: u64,
    /// Rows of the table of learned positions.
    pub n_positions: u64,
    /// `C` (`n_embd`).
    pub hidden: u64,
    /// `L` (`n_layer`).
    pub n_layers: u64,
    /// `H` (`n_head`).
    pub n_heads: u64,
    /// `F` (`n_inner`); `None` is 4 C.
    pub n_inner: Option<u64>,
    /// `activation_function`, under its Hugging Face name.
    pub activation: String,
    /// Epsilon of the layer norms.
    pub layer_norm_epsilon: f64,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Whether scores are divided by the square root of the head's size.
    pub scale_attn_weights: bool,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Dropout that the model was made with (`attn_pdrop`, `embd_pdrop`, `resid_pdrop`), for the record: a run says
    /// its own.
    pub dropout: [f64; 3],
    /// Ids of tokens with a meaning.
    pub special_tokens: SpecialTokens,
}

impl Default for Gpt2Config {
    /// GPT-2 124M, the defaults of `transformers`.
    fn default() -> Self {
        Self {
            vocab_size: 50257,
            n_positions: 1024,
            hidden: 768,
            n_layers: 12,
            n_heads: 12,
            n_inner: None,
            activation: "gelu_new".to_owned(),
            layer_norm_epsilon: 1e-5,
            initializer_range: 0.02,
            scale_attn_weights: true,
            tied: true,
            dropout: [0.0; 3],
            special_tokens: SpecialTokens { bos: Some(50256), eos: vec![50256], pad: None },
        }
    }
}

impl Gpt2Config {
    /// Reads the keys of a GPT-2 `config.json`.
    pub(crate) fn read(map: &Map<String, Value>) -> Result<Self, ModelError> {
        let d = Self::default();
        let mut r = Reader::new(map, "gpt2", "");
        // `GPT2Config` has these under both names.
        let [c, l, h, t] =
            ["hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
                .map(|key| r.optional_u64(key));
        let config = Self {
            vocab_size: r.size("vocab_size", Some(d.vocab_size))?,
            n_positions: r.size("n_positions", Some(t?.unwrap_or(d.n_positions)))?,
            hidden: r.size("n_embd", Some(c?.unwrap_or(d.hidden)))?,
            n_layers: r.size("n_layer", Some(l?.unwrap_or(d.n_layers)))?,
            n_heads: r.size("n_head", Some(h?.unwrap_or(d.n_heads)))?,
            n_inner: r.optional_u64("n_inner")?,
            activation: r.optional_str("activation_function")?.unwrap_or(&d.activation).to_owned(),
            layer_norm_epsilon: r.f64("layer_norm_epsilon", d.layer_norm_epsilon)?,
            initializer_range: r.f64("initializer_range", d.initializer_range)?,
            scale_attn_weights: r.bool("scale_attn_weights", true)?,
            tied: r.bool("tie_word_embeddings", true)?,
            dropout: [r.f64(PDROPS[0], 0.0)?, r.f64(PDROPS[1], 0.0)?, r.f64(PDROPS[2], 0.0)?],
            special_tokens: SpecialTokens::read(&mut r, d.special_tokens.bos, Some(50256))?,
        };
        let no = &Value::Bool(false);
        r.only("scale_attn_by_inverse_layer_idx", no, "scores scaled by layer are not built")?;
        r.only("add_cross_attention", no, "only decoders without an encoder are built")?;
        r.finish(HARMLESS)?;
        config.gelu()?;
        config.check_heads()?;
        layer_count(config.n_layers)?;
        check_above_zero([("layer_norm_epsilon", config.layer_norm_epsilon)])?;
        if config.n_inner == Some(0) {
            return Err(ModelError::Inconsistent { what: "n_inner is 0".to_owned() });
        }
        Ok(config)
    }

    /// The keys of `config.json`.
    pub(crate) fn write(&self) -> Map<String, Value> {
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        put("architectures", json!(["GPT2LMHeadModel"]));
        put("model_type", json!("gpt2"));
        put("vocab_size", json!(self.vocab_size));
        put("n_positions", json!(self.n_positions));
        put("n_embd", json!(self.hidden));
        put("n_layer", json!(self.n_layers));
        put("n_head", json!(self.n_heads));
        put("n_inner", json!(self.n_inner));
        put("activation_function", json!(self.activation));
        put("layer_norm_epsilon", json!(self.layer_norm_epsilon));
        put("initializer_range", json!(self.initializer_range));
        put("scale_attn_weights", json!(self.scale_attn_weights));
        put("tie_word_embeddings", json!(self.tied));
        for (key, p) in PDROPS.into_iter().zip(self.dropout) {
            put(key, json!(p));
        }
        self.special_tokens.write(&mut map);
        map
    }

    fn gelu(&self) -> Result<GeluKind, ModelError> {
        match self.activation.as_str() {
            "gelu_new" | "gelu_pytorch_tanh" => Ok(GeluKind::Tanh),
            "gelu" => Ok(GeluKind::Erf),
            other => Err(ModelError::Unsupported {
                key: "activation_function".to_owned(),
                value: other.to_owned(),
                hint: "supported are gelu_new, gelu_pytorch_tanh and gelu".to_owned(),
            }),
        }
    }

    fn check_heads(&self) -> Result<(), ModelError> {
        if self.hidden.is_multiple_of(self.n_heads) {
            return Ok(());
        }
        let what = format!("n_embd {} is not a multiple of n_head {}", self.hidden, self.n_heads);
        Err(ModelError::Inconsistent { what })
    }

    /// The forward graph for rows of up to `max_length` tokens.
    pub(crate) fn build(
        &self,
        purpose: Purpose,
        dropout: f32,
        max_length: u64,
    ) -> Result<Graph, ModelError> {
        if max_length > self.n_positions {
            return Err(ModelError::TooLong { max_length, max_positions: self.n_positions });
        }
        self.check_heads()?;
        let gelu = self.gelu()?;
        let mut m = Writer { c: self, b: GraphBuilder::new(), dropout };
        let wte = m.embedding("transformer.wte.weight", self.vocab_size);
        let mut x = m.embed(wte);
        for i in 0..self.n_layers {
            x = m.attention_half(x, i);
            x = m.mlp_half(x, i, gelu);
        }
        m.b.stage("head", "head");
        let x = m.norm(x, "transformer.ln_f");
        let head = if self.tied { wte } else { m.embedding("lm_head.weight", self.vocab_size) };
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
    c: &'a Gpt2Config,
    b: GraphBuilder,
    dropout: f32,
}

impl Writer<'_> {
    fn embedding(&mut self, name: &str, rows: u64) -> ParamId {
        let init = Init::Normal(self.c.initializer_range as f32);
        self.b.param_init(name, Shape::fixed(&[rows, self.c.hidden]), true, init)
    }

    fn norm(&mut self, x: ValueId, name: &str) -> ValueId {
        let shape = Shape::fixed(&[self.c.hidden]);
        let w = self.b.param_init(&format!("{name}.weight"), shape.clone(), false, Init::Ones);
        let b = self.b.param_init(&format!("{name}.bias"), shape, false, Init::Zeros);
        self.b.layer_norm(x, w, Some(b), self.c.layer_norm_epsilon as f32)
    }

    /// A `Conv1D`: weight `[k, m]`, bias `[m]`.
    fn conv1d(&mut self, x: ValueId, name: &str, k: u64, m: u64, std: f64) -> ValueId {
        let init = Init::Normal(std as f32);
        let w = self.b.param_init(&format!("{name}.weight"), Shape::fixed(&[k, m]), true, init);
        let b = self.b.param_init(&format!("{name}.bias"), Shape::fixed(&[m]), false, Init::Zeros);
        self.b.linear(x, w, Some(b), WeightLayout::InOut)
    }

    /// A projection back into the residual stream: its fresh weights are smaller, since the
    /// stream adds up two of them per layer.
    fn residual(&mut self, x: ValueId, y: ValueId, name: &str, k: u64) -> ValueId {
        let std = self.c.initializer_range / (2.0 * self.c.n_layers as f64).sqrt();
        let y = self.conv1d(y, name, k, self.c.hidden, std);
        let y = self.b.dropout(y, self.dropout);
        self.b.add(x, y)
    }

    fn embed(&mut self, wte: ParamId) -> ValueId {
        let wpe = self.embedding("transformer.wpe.weight", self.c.n_positions);
        let ids = self.b.input(InputKind::TokenIds);
        let positions = self.b.input(InputKind::Positions);
        self.b.stage("embed", "embed");
        let tokens = self.b.embed(ids, wte);
        let places = self.b.embed(positions, wpe);
        let x = self.b.add(tokens, places);
        self.b.dropout(x, self.dropout)
    }

    fn attention_half(&mut self, x: ValueId, i: u64) -> ValueId {
        let (c, name) = (self.c.hidden, format!("transformer.h.{i}"));
        self.b.stage(&format!("attn.{i}"), "attn");
        let head_dim = c / self.c.n_heads;
        let spec = AttentionSpec {
            n_heads: self.c.n_heads as u32,
            n_kv_heads: self.c.n_heads as u32,
            head_dim: head_dim as u32,
            scale: if self.c.scale_attn_weights {
                (1.0 / (head_dim as f64).sqrt()) as f32
            } else {
                1.0
            },
            packed: true,
            window: None,
            soft_cap: None,
        };
        let y = self.norm(x, &format!("{name}.ln_1"));
        let qkv =
            self.conv1d(y, &format!("{name}.attn.c_attn"), c, 3 * c, self.c.initializer_range);
        let y = self.b.attention(&[qkv], spec);
        self.residual(x, y, &format!("{name}.attn.c_proj"), c)
    }

    fn mlp_half(&mut self, x: ValueId, i: u64, gelu: GeluKind) -> ValueId {
        let (c, name) = (self.c.hidden, format!("transformer.h.{i}"));
        let f = self.c.n_inner.unwrap_or(4 * c);
        self.b.stage(&format!("mlp.{i}"), "mlp");
        let y = self.norm(x, &format!("{name}.ln_2"));
        let y = self.conv1d(y, &format!("{name}.mlp.c_fc"), c, f, self.c.initializer_range);
        let y = self.b.gelu(y, gelu);
        self.residual(x, y, &format!("{name}.mlp.c_proj"), f)
    }
}

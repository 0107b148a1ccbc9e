//! Random small models for property tests: every op, every wiring that the families use, odd sizes.
//!
//! A case is a chain of random stages (attention halves packed or separate, with or without rotary
//! positions, norms of queries and keys, windows, soft caps and grouped heads; MLP halves with GELU or
//! a gated unit, packed or not; layer or RMS norms, before or behind a half; biases; dropout) between
//! an embedding (with or without learned positions, scaled or not) and a tied or untied head (with or
//! without a soft cap), and a small step shape. Same seed, same case.

use ounce_ir::{
    AttentionSpec, Gate, GeluKind, Graph, GraphBuilder, Init, InputKind, ParamId, RopeTableId,
    Shape, ValueId, WeightLayout,
};
use ounce_program::StepShape;

/// Epsilon of the norms: large, since few channels are often near each other or near zero, where a
/// norm with a small one is nearly a step and has no useful differences.
const EPS: f32 = 1e-2;

/// SplitMix64 (`[Steele14]`): a tiny generator for test cases.
#[derive(Debug, Clone)]
pub struct TestRng(u64);

impl TestRng {
    /// A generator for that seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    /// A number in `0..n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.bits() % n
    }
    /// One of the items.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }
    /// True with probability 1/2.
    pub fn coin(&mut self) -> bool {
        self.bits() & 1 == 1
    }
    /// A number in `-1..1`.
    pub fn symmetric(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }
}

/// A forward graph with its loss, and a step shape for it.
#[derive(Debug, Clone)]
pub struct RandomCase {
    /// The forward graph.
    pub graph: Graph,
    /// Rows and their longest length.
    pub shape: StepShape,
    /// Vocabulary size.
    pub vocab: u64,
}

/// The case of a seed, with at most `n_stages_max` stages between embedding and head.
pub fn random_case(seed: u64, n_stages_max: u64) -> RandomCase {
    let mut rng = TestRng::new(seed);
    let heads = rng.pick(&[(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)]);
    let head_dim = rng.pick(&[2, 4, 6]);
    let width = u64::from(heads.0 * head_dim);
    let vocab = 5 + rng.below(40);
    let shape = StepShape::new(rng.pick(&[1, 2, 3, 4]), 2 + rng.below(140));
    let mut model = RandomModel {
        b: GraphBuilder::new(),
        dropout: rng.pick(&[0.0, 0.0, 0.1]),
        layer_norm: rng.coin(),
        bias: rng.coin(),
        unit_offset: false,
        soft_cap: None,
        rope: None,
        width,
        heads,
        head_dim,
        rng,
    };
    model.build(vocab, shape.row_tokens, n_stages_max);
    let graph = model.b.finish().expect("a random case is well formed");
    RandomCase { graph, shape, vocab }
}

struct RandomModel {
    b: GraphBuilder,
    rng: TestRng,
    width: u64,
    heads: (u32, u32),
    head_dim: u32,
    dropout: f32,
    layer_norm: bool,
    bias: bool,
    unit_offset: bool,
    soft_cap: Option<f32>,
    rope: Option<RopeTableId>,
}

impl RandomModel {
    fn build(&mut self, vocab: u64, row_tokens: u64, n_stages_max: u64) {
        self.b.stage("embed", "embed");
        let ids = self.b.input(InputKind::TokenIds);
        let table = self.matrix("embed.weight", vocab, self.width);
        let mut x = self.b.embed(ids, table);
        // What came with the later families is drawn together, so that it meets.
        let gemma_like = self.rng.below(3) == 0;
        if gemma_like {
            self.unit_offset = self.rng.coin();
            self.soft_cap = Some(self.rng.pick(&[2.0, 30.0]));
            x = self.b.scale(x, 1.5);
        }
        if self.rng.coin() {
            let positions = self.b.input(InputKind::Positions);
            let table = self.matrix("positions.weight", row_tokens, self.width);
            let p = self.b.embed(positions, table);
            x = self.b.add(x, p);
        } else {
            let n = 1 + self.rng.below(u64::from(self.head_dim / 2)) as usize;
            let inv_freq = (0..n).map(|i| 1.0 / (i as f32 + 1.5)).collect();
            self.rope = Some(self.b.rope_table(inv_freq, 1.0));
        }
        x = self.b.dropout(x, self.dropout);
        for i in 0..self.rng.below(n_stages_max + 1) {
            x = if self.rng.coin() { self.attention(i, x) } else { self.mlp(i, x) };
        }
        self.b.stage("head", "head");
        let n = self.norm("final", x);
        let head =
            if self.rng.coin() { table } else { self.matrix("head.weight", vocab, self.width) };
        self.b.cross_entropy_capped(n, head, self.soft_cap);
    }

    fn matrix(&mut self, name: &str, rows: u64, cols: u64) -> ParamId {
        self.b.param(name, Shape::fixed(&[rows, cols]), true)
    }

    fn vector(&mut self, name: &str, n: u64, init: Init) -> ParamId {
        self.b.param_init(name, Shape::fixed(&[n]), false, init)
    }

    fn norm(&mut self, name: &str, x: ValueId) -> ValueId {
        let w = self.vector(&format!("{name}.norm.weight"), self.width, Init::Ones);
        if self.unit_offset {
            self.b.rms_norm_unit_offset(x, w, EPS)
        } else if self.layer_norm {
            let b = self
                .bias
                .then(|| self.vector(&format!("{name}.norm.bias"), self.width, Init::Zeros));
            self.b.layer_norm(x, w, b, EPS)
        } else {
            self.b.rms_norm(x, w, EPS)
        }
    }

    fn linear(&mut self, name: &str, x: ValueId, from: u64, to: u64) -> ValueId {
        let layout = self.rng.pick(&[WeightLayout::OutIn, WeightLayout::InOut]);
        let (rows, cols) = match layout {
            WeightLayout::OutIn => (to, from),
            WeightLayout::InOut => (from, to),
        };
        let w = self.matrix(&format!("{name}.weight"), rows, cols);
        let b = self.bias.then(|| self.vector(&format!("{name}.bias"), to, Init::Zeros));
        self.b.linear(x, w, b, layout)
    }

    fn attention(&mut self, i: u64, x: ValueId) -> ValueId {
        let name = format!("{i}.attn");
        self.b.stage(&name, "attn");
        let n = self.norm(&name, x);
        let packed = self.rng.coin();
        let window =
            if self.rng.below(3) == 0 { Some(1 + self.rng.below(90) as u32) } else { None };
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let (n_heads, n_kv_heads) = self.heads;
        let spec = AttentionSpec {
            n_heads,
            n_kv_heads,
            head_dim: self.head_dim,
            scale,
            packed,
            window,
            soft_cap: self.soft_cap,
        };
        let qkv = if packed {
            let to = spec.q_width() + 2 * spec.kv_width();
            let qkv = self.linear(&format!("{name}.qkv"), n, self.width, to);
            let heads = n_heads + n_kv_heads;
            vec![self.rope.map_or(qkv, |table| self.b.rope(qkv, table, heads, self.head_dim))]
        } else {
            let mut q = self.linear(&format!("{name}.q"), n, self.width, spec.q_width());
            let mut k = self.linear(&format!("{name}.k"), n, self.width, spec.kv_width());
            let v = self.linear(&format!("{name}.v"), n, self.width, spec.kv_width());
            if self.rng.below(3) == 0 {
                let d = u64::from(self.head_dim);
                let w = self.vector(&format!("{name}.q_norm.weight"), d, Init::Ones);
                q = self.b.rms_norm(q, w, EPS);
                let w = self.vector(&format!("{name}.k_norm.weight"), spec.kv_width(), Init::Ones);
                k = self.b.rms_norm(k, w, EPS);
            }
            if let Some(table) = self.rope {
                q = self.b.rope(q, table, n_heads, self.head_dim);
                k = self.b.rope(k, table, n_kv_heads, self.head_dim);
            }
            vec![q, k, v]
        };
        let o = self.b.attention(&qkv, spec);
        let mut y = self.linear(&format!("{name}.o"), o, spec.q_width(), self.width);
        if self.unit_offset {
            y = self.norm(&format!("{name}.post"), y);
        }
        let y = self.b.dropout(y, self.dropout);
        self.b.add(x, y)
    }

    fn mlp(&mut self, i: u64, x: ValueId) -> ValueId {
        let name = format!("{i}.mlp");
        self.b.stage(&name, "mlp");
        let n = self.norm(&name, x);
        let hidden = 3 + self.rng.below(20);
        let h = if self.rng.coin() {
            let h = self.linear(&format!("{name}.fc"), n, self.width, hidden);
            let kind = self.rng.pick(&[GeluKind::Tanh, GeluKind::Erf]);
            self.b.gelu(h, kind)
        } else {
            let kind = self.rng.pick(&[Gate::Silu, Gate::Gelu(GeluKind::Tanh)]);
            if self.rng.coin() {
                let both = self.linear(&format!("{name}.gate_up"), n, self.width, 2 * hidden);
                self.b.glu(&[both], kind)
            } else {
                let gate = self.linear(&format!("{name}.gate"), n, self.width, hidden);
                let up = self.linear(&format!("{name}.up"), n, self.width, hidden);
                self.b.glu(&[gate, up], kind)
            }
        };
        let y = self.linear(&format!("{name}.proj"), h, hidden, self.width);
        let y = self.b.dropout(y, self.dropout);
        self.b.add(x, y)
    }
}

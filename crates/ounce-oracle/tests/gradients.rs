//! Every op's gradient rule against finite differences, each in a tiny graph around it.
//!
//! Goal: a wrong sign, index or missing term in a rule of `differentiate` or in a gradient op's
//! definition shows. Method: `embed(ids, table)` with a different id for every token makes the
//! table's gradient the gradient of an op's input; a head on top makes the loss. Sizes are odd or
//! unequal, rows have unequal lengths with gaps between, and some tokens are not supervised.
#![expect(clippy::unwrap_used, reason = "a test that cannot build its graph should panic")]

use ounce_ir::{
    AttentionSpec, DType, EntityId, Gate, GeluKind, Graph, GraphBuilder, Init, InputKind,
    MASTER_LO, OpKind, OptimizerKind, ParamId, Shape, ValueId, WeightLayout,
};
use ounce_oracle::philox::word;
use ounce_oracle::round::{join, round_to};
use ounce_oracle::{Hyper, Interpreter, RandomCase, Row, TestRng, check_gradients, random_case};
use ounce_passes::{Precision, PrecisionPolicy, attach_optimizer, differentiate, lower_precision};
use ounce_program::StepShape;

const VOCAB: u64 = 7;
const ROW_LENS: [usize; 3] = [9, 3, 11];
/// A different id for every token of the rows.
const N_IDS: u64 = 9 + 3 + 11;
const TOLERANCE: f64 = 1e-6;

/// The graph of a loss on top of `body`, whose output is `width` wide.
fn under_a_head(width: u64, body: impl FnOnce(&mut GraphBuilder) -> ValueId) -> GraphBuilder {
    let mut b = GraphBuilder::new();
    b.stage("body", "body");
    let y = body(&mut b);
    b.stage("head", "head");
    let head = matrix(&mut b, "head", VOCAB, width);
    b.cross_entropy(y, head);
    b
}

/// An input of an op that has a gradient of its own: one row of a table per token.
fn tokens(b: &mut GraphBuilder, name: &str, width: u64) -> ValueId {
    let ids = b.input(InputKind::TokenIds);
    let table = matrix(b, name, N_IDS, width);
    b.embed(ids, table)
}

fn matrix(b: &mut GraphBuilder, name: &str, rows: u64, columns: u64) -> ParamId {
    b.param(name, Shape::fixed(&[rows, columns]), true)
}

fn vector(b: &mut GraphBuilder, name: &str, width: u64) -> ParamId {
    b.param_init(name, Shape::fixed(&[width]), false, Init::Ones)
}

/// Rows of unequal length; every token has its own id, every fifth token no target.
fn rows() -> Vec<Row> {
    let mut next_id = 0..N_IDS as i32;
    ROW_LENS
        .iter()
        .map(|&len| {
            let token_ids: Vec<i32> = next_id.by_ref().take(len).collect();
            let target = |&id: &i32| if id % 5 == 4 { -1 } else { (3 * id + 1) % VOCAB as i32 };
            Row { targets: token_ids.iter().map(target).collect(), token_ids }
        })
        .collect()
}

/// A step with random parameters in (-1, 1).
fn step(graph: &Graph) -> Interpreter<'_> {
    let mut step = Interpreter::new(graph, StepShape::new(3, 11));
    step.seed = 42;
    step.set_rows(&rows());
    for (p, param) in graph.params.iter() {
        let uniform = |i| f64::from(word(1, 0, p.index() as u32, i, 0)) / 2.0_f64.powi(31) - 1.0;
        let data: Vec<f64> = (0..param.shape.row_elems() as usize).map(uniform).collect();
        step.set_param(p, &data);
    }
    step
}

fn check(b: GraphBuilder) {
    let graph = differentiate(&b.finish().unwrap()).unwrap();
    let mut step = step(&graph);
    let checks = check_gradients(&mut step, 5);
    assert_eq!(checks.len(), graph.params.len() + 1);
    for check in checks {
        let name = check.param.map_or("all", |p| &graph.params[p].name);
        assert!(check.error < TOLERANCE, "{name}: {check:?}");
        assert!(check.slope.abs() > 1e-5, "{name} has a slope: {check:?}");
    }
}

#[test]
fn embed_and_the_head() {
    check(under_a_head(5, |b| tokens(b, "x", 5)));
}

#[test]
fn a_tied_head_adds_to_its_embedding() {
    let mut b = GraphBuilder::new();
    b.stage("all", "all");
    let x = tokens(&mut b, "wte", 5);
    let wte = matrix(&mut b, "wte", N_IDS, 5);
    b.cross_entropy(x, wte);
    check(b);
}

#[test]
fn positions_that_share_rows_of_a_table() {
    check(under_a_head(5, |b| {
        let x = tokens(b, "x", 5);
        let positions = b.input(InputKind::Positions);
        let wpe = matrix(b, "wpe", 11, 5);
        let places = b.embed(positions, wpe);
        b.add(x, places)
    }));
}

#[test]
fn linear_in_both_layouts_with_and_without_bias() {
    for layout in [WeightLayout::OutIn, WeightLayout::InOut] {
        for bias in [false, true] {
            check(under_a_head(5, |b| {
                let x = tokens(b, "x", 3);
                let (rows, columns) = match layout {
                    WeightLayout::OutIn => (5, 3),
                    WeightLayout::InOut => (3, 5),
                };
                let w = matrix(b, "w", rows, columns);
                let bias = bias.then(|| vector(b, "b", 5));
                b.linear(x, w, bias, layout)
            }));
        }
    }
}

#[test]
fn layer_norm_with_and_without_bias() {
    for bias in [false, true] {
        check(under_a_head(5, |b| {
            let x = tokens(b, "x", 5);
            let w = vector(b, "w", 5);
            let bias = bias.then(|| vector(b, "b", 5));
            b.layer_norm(x, w, bias, 1e-3)
        }));
    }
}

#[test]
fn rms_norm() {
    check(under_a_head(5, |b| {
        let x = tokens(b, "x", 5);
        let w = vector(b, "w", 5);
        b.rms_norm(x, w, 1e-3)
    }));
}

#[test]
fn rms_norm_with_a_unit_offset_and_of_every_head() {
    for (width, group) in [(5, 5), (6, 2), (6, 3)] {
        for unit_offset in [false, true] {
            check(under_a_head(width, |b| {
                let x = tokens(b, "x", width);
                let w = vector(b, "w", group);
                if unit_offset {
                    b.rms_norm_unit_offset(x, w, 1e-3)
                } else {
                    b.rms_norm(x, w, 1e-3)
                }
            }));
        }
    }
}

#[test]
fn rope_of_the_first_columns_alone() {
    check(under_a_head(13, |b| {
        let table = b.rope_table(vec![0.7, 0.2], 1.0);
        let x = tokens(b, "x", 13);
        b.rope(x, table, 2, 5)
    }));
}

#[test]
fn rope_of_whole_and_partial_heads_with_a_scale() {
    for inv_freq in [vec![1.0, 0.3, 0.1], vec![0.7]] {
        check(under_a_head(12, |b| {
            let table = b.rope_table(inv_freq, 1.25);
            let x = tokens(b, "x", 12);
            b.rope(x, table, 2, 6)
        }));
    }
}

#[test]
fn attention_of_separate_and_packed_inputs_with_grouped_heads() {
    for (n_heads, n_kv_heads, head_dim) in [(3, 3, 2), (4, 2, 3), (3, 1, 5)] {
        let spec = |packed| AttentionSpec {
            n_heads,
            n_kv_heads,
            head_dim,
            scale: 0.6,
            packed,
            window: None,
            soft_cap: None,
        };
        let (q, kv) = (spec(false).q_width(), spec(false).kv_width());
        check(under_a_head(q, |b| {
            let inputs = [("q", q), ("k", kv), ("v", kv)].map(|(name, w)| tokens(b, name, w));
            b.attention(&inputs, spec(false))
        }));
        check(under_a_head(q, |b| {
            let packed = tokens(b, "qkv", q + 2 * kv);
            b.attention(&[packed], spec(true))
        }));
    }
}

#[test]
fn attention_in_a_window_and_with_a_soft_cap() {
    for (window, soft_cap) in [(Some(3), None), (None, Some(0.8)), (Some(4), Some(2.0))] {
        let spec = AttentionSpec {
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 3,
            scale: 0.6,
            packed: true,
            window,
            soft_cap,
        };
        check(under_a_head(12, |b| {
            let packed = tokens(b, "qkv", 24);
            b.attention(&[packed], spec)
        }));
    }
}

#[test]
fn gelu_of_both_kinds() {
    for kind in [GeluKind::Tanh, GeluKind::Erf] {
        check(under_a_head(5, |b| {
            let x = tokens(b, "x", 5);
            b.gelu(x, kind)
        }));
    }
}

#[test]
fn gated_units_separate_and_packed() {
    for gate in [Gate::Silu, Gate::Gelu(GeluKind::Tanh), Gate::Gelu(GeluKind::Erf)] {
        check(under_a_head(5, |b| {
            let both = [tokens(b, "gate", 5), tokens(b, "up", 5)];
            b.glu(&both, gate)
        }));
        check(under_a_head(5, |b| {
            let both = tokens(b, "gate_up", 10);
            b.glu(&[both], gate)
        }));
    }
}

#[test]
fn scale_and_soft_cap() {
    check(under_a_head(5, |b| {
        let x = tokens(b, "x", 5);
        let x = b.scale(x, 1.7);
        b.soft_cap(x, Some(0.9))
    }));
}

#[test]
fn a_head_with_a_soft_cap() {
    let mut b = GraphBuilder::new();
    b.stage("all", "all");
    let x = tokens(&mut b, "x", 5);
    let head = matrix(&mut b, "head", VOCAB, 5);
    b.cross_entropy_capped(x, head, Some(0.7));
    check(b);
}

#[test]
fn a_value_with_three_readers_and_an_add_of_itself() {
    check(under_a_head(5, |b| {
        let x = tokens(b, "x", 5);
        let y = b.gelu(x, GeluKind::Erf);
        let z = b.swiglu(x, y);
        let x = b.add(z, x);
        b.add(x, x)
    }));
}

#[test]
fn dropout_with_one_mask_forward_and_backward() {
    check(under_a_head(6, |b| {
        let x = tokens(b, "x", 6);
        b.dropout(x, 0.3)
    }));
}

#[test]
fn a_second_step_drops_other_elements() {
    let b = under_a_head(6, |b| {
        let x = tokens(b, "x", 6);
        b.dropout(x, 0.3)
    });
    let graph = b.finish().unwrap();
    let mut step = step(&graph);
    let mut losses = [1, 1, 2].map(|n| {
        step.step = n;
        step.run_forward();
        step.loss()
    });
    assert_eq!(losses[0], losses[1]);
    losses.sort_by(f64::total_cmp);
    assert!(losses[0] < losses[2]);
}

#[test]
fn gradients_are_of_the_mean_over_supervised_tokens_wherever_rows_stand() {
    // The same rows with more space between them and in longer steps: the same loss and gradient.
    let graph = under_a_head(4, |b| {
        let packed = tokens(b, "qkv", 12);
        let spec = AttentionSpec {
            n_heads: 2,
            n_kv_heads: 2,
            head_dim: 2,
            scale: 0.7,
            packed: true,
            window: None,
            soft_cap: None,
        };
        b.attention(&[packed], spec)
    });
    let graph = differentiate(&graph.finish().unwrap()).unwrap();
    let mut near = step(&graph);
    near.run_backward();
    let mut far = Interpreter::new(&graph, StepShape::new(5, 130));
    for p in graph.params.ids() {
        far.set_param(p, near.param(p));
    }
    let none = Row { token_ids: Vec::new(), targets: Vec::new() };
    let [a, b, c] = rows().try_into().unwrap();
    far.set_rows(&[none.clone(), a, none, b, c]);
    far.run_backward();
    assert_eq!(far.loss(), near.loss());
    for p in graph.params.ids() {
        assert_eq!(far.gradient(p), near.gradient(p));
    }
}

/// A random model's data and parameters in (-0.5, 0.5).
fn random_step<'g>(graph: &'g Graph, case: &RandomCase, seed: u64) -> Interpreter<'g> {
    let mut step = Interpreter::new(graph, case.shape);
    let mut rng = TestRng::new(seed);
    step.seed = seed;
    let mut row = |_| {
        let len = 1 + rng.below(case.shape.row_tokens) as usize;
        let mut ids = || (0..len).map(|_| rng.below(case.vocab) as i32).collect();
        Row { token_ids: ids(), targets: ids() }
    };
    step.set_rows(&(0..case.shape.n_rows).map(&mut row).collect::<Vec<_>>());
    for (p, param) in graph.params.iter() {
        let data: Vec<f64> = (0..param.shape.row_elems()).map(|_| 0.5 * rng.symmetric()).collect();
        step.set_param(p, &data);
    }
    step
}

#[test]
fn random_models_of_several_stages() {
    for seed in 0..20 {
        let case = random_case(seed, 3);
        let graph = differentiate(&case.graph).unwrap();
        for check in check_gradients(&mut random_step(&graph, &case, seed), seed) {
            let name = check.param.map_or("all", |p| &graph.params[p].name);
            assert!(check.error < TOLERANCE, "seed {seed}, {name}: {check:?}");
        }
    }
}

/// Distance of `b` from `a`, relative to the norm of `a`.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let squares = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
    let apart = squares(&mut a.iter().zip(b).map(|(a, b)| a - b));
    (apart / squares(&mut a.iter().copied()).max(f64::MIN_POSITIVE)).sqrt()
}

#[test]
fn gradients_of_random_models_in_16_bits_are_near_those_in_f32() {
    for seed in 0..10 {
        let case = random_case(seed, 3);
        let graph = differentiate(&case.graph).unwrap();
        let mut full = random_step(&graph, &case, seed);
        full.run_backward();
        let all = |step: &Interpreter<'_>| -> Vec<f64> {
            graph.params.ids().flat_map(|p| step.gradient(p).to_vec()).collect()
        };
        let (exact, loss) = (all(&full), full.loss());
        // Half a unit in the last place is 2^-9 and 2^-12; a few dozen roundings lie one behind the
        // other, and where values cancel each counts more: 2^4 of them.
        for (precision, near) in [(Precision::Bf16, 1.0 / 32.0), (Precision::F16, 1.0 / 256.0)] {
            let lowered = lower_precision(&graph, &PrecisionPolicy::new(precision));
            let mut step = random_step(&lowered, &case, seed);
            step.loss_scale = 1024.0;
            step.run_backward();
            let gradient: Vec<f64> = all(&step).iter().map(|g| g / 1024.0).collect();
            let apart = distance(&exact, &gradient);
            assert!(0.0 < apart && apart < near, "seed {seed}, {precision}: {apart:e}");
            assert!((step.loss() - loss).abs() < near * loss, "seed {seed}, {precision}");
        }
    }
}

#[test]
fn a_bf16_parameter_is_read_rounded_and_updated_whole() {
    let graph = differentiate(&random_case(3, 2).graph).unwrap();
    let bf16 = lower_precision(&graph, &PrecisionPolicy::new(Precision::Bf16));
    let graph = attach_optimizer(&bf16, OptimizerKind::AdamW, true).unwrap();
    let mut step = random_step(&graph, &random_case(3, 2), 3);
    let before: Vec<Vec<f64>> = graph.params.ids().map(|p| step.master(p).to_vec()).collect();
    // Far below what bf16 can tell apart.
    step.run_step(&Hyper {
        lr: 1e-6,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        max_grad_norm: 1.0,
    });
    let rest = graph.states.iter().position(|s| s.name == MASTER_LO).unwrap();
    for (p, before) in graph.params.ids().zip(before) {
        for (i, &master) in step.master(p).iter().enumerate() {
            let (hi, lo) = (step.param(p)[i] as f32, step.state(p, rest)[i] as i16);
            assert_eq!(round_to(DType::Bf16, hi.into()), f64::from(hi));
            assert_eq!(join(hi, lo), master as f32);
            assert!(master == before[i] || (master - before[i]).abs() < 1e-5);
        }
        assert_ne!(step.master(p), before, "the update moves masters that bf16 would not");
    }
}

#[test]
fn a_wrong_rule_is_noticed() {
    let b = under_a_head(5, |b| {
        let x = tokens(b, "x", 5);
        b.gelu(x, GeluKind::Tanh)
    });
    let mut graph = differentiate(&b.finish().unwrap()).unwrap();
    let wrong = graph.ops.iter().find(|(_, op)| op.kind == OpKind::GeluGrad(GeluKind::Tanh));
    let wrong = wrong.unwrap().0;
    // Off by less than 1 in 1,000.
    graph.ops[wrong].kind = OpKind::GeluGrad(GeluKind::Erf);
    let checks = check_gradients(&mut step(&graph), 5);
    assert!(checks.iter().any(|check| check.error > 10.0 * TOLERANCE), "{checks:?}");
}

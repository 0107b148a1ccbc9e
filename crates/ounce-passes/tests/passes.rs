//! What the passes write, op by op, and what they refuse.
#![expect(clippy::unwrap_used, reason = "a test that cannot build its graph should panic")]
#![expect(clippy::needless_raw_string_hashes, reason = "expect-test writes them")]

use std::fmt::Write as _;

use expect_test::{Expect, expect};
use ounce_ir::{
    AttentionSpec, DType, GeluKind, Graph, GraphBuilder, Init, InputKind, OpKind, OptimizerKind,
    ParamId, Phase, Shape, ValueId, ValueKind, WeightLayout, verify,
};
use ounce_passes::{
    OpClass, PassError, Precision, PrecisionPolicy, TABLE, attach_optimizer, differentiate,
    lower_precision,
};

/// One line per op that is not forward: stage, outputs, name, inputs, uses, sums.
fn print(graph: &Graph) -> String {
    // Gradients that meet share a name, so they are told apart by their ids.
    let name = |&v: &ValueId| match graph.values[v].kind {
        ValueKind::Gradient => format!("{}:{v}", graph.values[v].name),
        _ => graph.values[v].name.clone(),
    };
    let names = |ids: &[ValueId]| ids.iter().map(name).collect::<Vec<_>>().join(", ");
    let mut text = String::new();
    for op in graph.ops.values().filter(|op| op.phase != Phase::Forward) {
        let stage = op.stage.map_or("update", |s| &graph.stages[s].name);
        let uses: Vec<_> =
            op.uses.iter().map(|&u| graph.params[graph.param_of(u)].name.as_str()).collect();
        write!(text, "{stage}: ").unwrap();
        if !op.outputs.is_empty() {
            write!(text, "{} = ", names(&op.outputs)).unwrap();
        }
        write!(text, "{}({})", op.kind.name(), names(&op.inputs)).unwrap();
        if !uses.is_empty() {
            write!(text, " of {}", uses.join(", ")).unwrap();
        }
        if !op.sums.is_empty() {
            write!(text, " += {}", names(&op.sums)).unwrap();
        }
        if let Some(p) = op.updates {
            write!(text, " -> {}", graph.params[p].name).unwrap();
        }
        text += "\n";
    }
    for stage in graph.stages.values() {
        let [d_input, d_output] =
            [stage.d_input, stage.d_output].map(|v| v.as_ref().map_or("-".to_owned(), name));
        writeln!(text, "stage {}: {d_output} to {d_input}", stage.name).unwrap();
    }
    text
}

fn check(graph: &Graph, expected: &Expect) {
    verify(graph).unwrap();
    expected.assert_eq(&print(graph));
}

/// A GPT-2 of one layer, `C = 4`, two heads; tied unless `untied`.
fn gpt2(untied: bool) -> GraphBuilder {
    let mut b = GraphBuilder::new();
    let (ids, positions) = (b.input(InputKind::TokenIds), b.input(InputKind::Positions));
    b.stage("embed", "embed");
    let wte = b.param("wte.weight", Shape::fixed(&[11, 4]), true);
    let wpe = b.param("wpe.weight", Shape::fixed(&[8, 4]), true);
    let tokens = b.embed(ids, wte);
    let places = b.embed(positions, wpe);
    let x = b.add(tokens, places);
    let x = b.dropout(x, 0.1);
    b.stage("attn.0", "attn");
    let y = norm(&mut b, x, "ln_1");
    let qkv = linear(&mut b, y, "c_attn", 4, 12);
    let spec = AttentionSpec {
        n_heads: 2,
        n_kv_heads: 2,
        head_dim: 2,
        scale: 0.5,
        packed: true,
        window: None,
        soft_cap: None,
    };
    let y = b.attention(&[qkv], spec);
    let y = linear(&mut b, y, "c_proj", 4, 4);
    let x = b.add(x, y);
    b.stage("mlp.0", "mlp");
    let y = norm(&mut b, x, "ln_2");
    let y = linear(&mut b, y, "c_fc", 4, 16);
    let y = b.gelu(y, GeluKind::Tanh);
    let y = linear(&mut b, y, "c_proj2", 16, 4);
    let x = b.add(x, y);
    b.stage("head", "head");
    let x = norm(&mut b, x, "ln_f");
    let head = if untied { b.param("head", Shape::fixed(&[11, 4]), true) } else { wte };
    b.cross_entropy(x, head);
    b
}

fn norm(b: &mut GraphBuilder, x: ValueId, name: &str) -> ValueId {
    let w = b.param_init(&format!("{name}.weight"), Shape::fixed(&[4]), false, Init::Ones);
    let bias = b.param_init(&format!("{name}.bias"), Shape::fixed(&[4]), false, Init::Zeros);
    b.layer_norm(x, w, Some(bias), 1e-5)
}

fn linear(b: &mut GraphBuilder, x: ValueId, name: &str, k: u64, m: u64) -> ValueId {
    let w = b.param(&format!("{name}.weight"), Shape::fixed(&[k, m]), true);
    let bias = b.param_init(&format!("{name}.bias"), Shape::fixed(&[m]), false, Init::Zeros);
    b.linear(x, w, Some(bias), WeightLayout::InOut)
}

/// One Llama attention half between an embedding and an untied head, separate q, k and v.
fn llama_attention() -> Graph {
    let mut b = GraphBuilder::new();
    let ids = b.input(InputKind::TokenIds);
    b.stage("embed", "embed");
    let embed = b.param("embed", Shape::fixed(&[11, 4]), true);
    let x = b.embed(ids, embed);
    b.stage("attn.0", "attn");
    let table = b.rope_table(vec![1.0], 1.0);
    let w = b.param_init("norm", Shape::fixed(&[4]), false, Init::Ones);
    let y = b.rms_norm(x, w, 1e-5);
    let [q, k, v] = [("q", 4), ("k", 2), ("v", 2)].map(|(name, m)| {
        let w = b.param(name, Shape::fixed(&[m, 4]), true);
        b.linear(y, w, None, WeightLayout::OutIn)
    });
    let (q, k) = (b.rope(q, table, 2, 2), b.rope(k, table, 1, 2));
    let spec = AttentionSpec {
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 2,
        scale: 0.7,
        packed: false,
        window: None,
        soft_cap: None,
    };
    let o = b.attention(&[q, k, v], spec);
    let w = b.param("o", Shape::fixed(&[4, 4]), true);
    let y = b.linear(o, w, None, WeightLayout::OutIn);
    let x = b.add(x, y);
    b.stage("head", "head");
    let head = b.param("head", Shape::fixed(&[11, 4]), true);
    b.cross_entropy(x, head);
    b.finish().unwrap()
}

#[test]
fn the_backward_of_gpt2_runs_stages_in_reverse_and_scatters_into_the_tied_head() {
    let forward = gpt2(false).finish().unwrap();
    let graph = differentiate(&forward).unwrap();
    for (id, op) in forward.ops.iter().take(forward.ops.len() - 1) {
        assert_eq!(&graph.ops[id], op, "forward ops keep their ids");
    }
    check(
        &graph,
        &expect![[r#"
            head: head.wte, d.head.ln_f:v21 = cross_entropy_train(head.ln_f, targets) of wte.weight += d.wte.weight
            head: d.mlp.0.add:v24 = layer_norm_grad(mlp.0.add, d.head.ln_f:v21) of ln_f.weight += d.ln_f.weight, d.ln_f.bias
            mlp.0: linear_grad_weight(mlp.0.gelu, d.mlp.0.add:v24) += d.c_proj2.weight
            mlp.0: bias_grad(d.mlp.0.add:v24) += d.c_proj2.bias
            mlp.0: d.mlp.0.gelu:v27 = linear_grad_input(d.mlp.0.add:v24) of c_proj2.weight
            mlp.0: d.mlp.0.c_fc:v28 = gelu_grad(mlp.0.c_fc, d.mlp.0.gelu:v27)
            mlp.0: linear_grad_weight(mlp.0.ln_2, d.mlp.0.c_fc:v28) += d.c_fc.weight
            mlp.0: bias_grad(d.mlp.0.c_fc:v28) += d.c_fc.bias
            mlp.0: d.mlp.0.ln_2:v31 = linear_grad_input(d.mlp.0.c_fc:v28) of c_fc.weight
            mlp.0: d.attn.0.add:v34 = layer_norm_grad(attn.0.add, d.mlp.0.ln_2:v31) of ln_2.weight += d.ln_2.weight, d.ln_2.bias
            mlp.0: d.attn.0.add:v35 = add(d.mlp.0.add:v24, d.attn.0.add:v34)
            attn.0: linear_grad_weight(attn.0.attention, d.attn.0.add:v35) += d.c_proj.weight
            attn.0: bias_grad(d.attn.0.add:v35) += d.c_proj.bias
            attn.0: d.attn.0.attention:v38 = linear_grad_input(d.attn.0.add:v35) of c_proj.weight
            attn.0: d.attn.0.c_attn:v39 = attention_grad(attn.0.c_attn, attn.0.attention, attn.0.attention.lse, d.attn.0.attention:v38)
            attn.0: linear_grad_weight(attn.0.ln_1, d.attn.0.c_attn:v39) += d.c_attn.weight
            attn.0: bias_grad(d.attn.0.c_attn:v39) += d.c_attn.bias
            attn.0: d.attn.0.ln_1:v42 = linear_grad_input(d.attn.0.c_attn:v39) of c_attn.weight
            attn.0: d.embed.dropout:v45 = layer_norm_grad(embed.dropout, d.attn.0.ln_1:v42) of ln_1.weight += d.ln_1.weight, d.ln_1.bias
            attn.0: d.embed.dropout:v46 = add(d.attn.0.add:v35, d.embed.dropout:v45)
            embed: d.embed.add:v47 = dropout(d.embed.dropout:v46)
            embed: embed_grad_rows(d.embed.add:v47) += d.wpe.weight.rows
            embed: embed_grad_rows(d.embed.add:v47) += d.wte.weight.rows
            update: embed_scatter(token_ids, d.wte.weight.rows) += d.wte.weight
            update: embed_scatter(positions, d.wpe.weight.rows) += d.wpe.weight
            stage embed: d.embed.dropout:v46 to -
            stage attn.0: d.attn.0.add:v35 to d.embed.dropout:v46
            stage mlp.0: d.mlp.0.add:v24 to d.attn.0.add:v35
            stage head: - to d.mlp.0.add:v24
        "#]],
    );
}

#[test]
fn gradients_of_q_k_and_v_meet_in_reverse_order_and_rope_turns_back() {
    check(
        &differentiate(&llama_attention()).unwrap(),
        &expect![[r#"
            head: head.head, d.attn.0.add:v16 = cross_entropy_train(attn.0.add, targets) of head += d.head
            attn.0: linear_grad_weight(attn.0.attention, d.attn.0.add:v16) += d.o
            attn.0: d.attn.0.attention:v18 = linear_grad_input(d.attn.0.add:v16) of o
            attn.0: d.attn.0.rope:v19, d.attn.0.rope:v20, d.attn.0.v:v21 = attention_grad(attn.0.rope, attn.0.rope, attn.0.v, attn.0.attention, attn.0.attention.lse, d.attn.0.attention:v18)
            attn.0: d.attn.0.k:v22 = rope(d.attn.0.rope:v20, positions)
            attn.0: d.attn.0.q:v23 = rope(d.attn.0.rope:v19, positions)
            attn.0: linear_grad_weight(attn.0.norm, d.attn.0.v:v21) += d.v
            attn.0: d.attn.0.norm:v25 = linear_grad_input(d.attn.0.v:v21) of v
            attn.0: linear_grad_weight(attn.0.norm, d.attn.0.k:v22) += d.k
            attn.0: d.attn.0.norm:v27 = linear_grad_input(d.attn.0.k:v22) of k
            attn.0: d.attn.0.norm:v28 = add(d.attn.0.norm:v25, d.attn.0.norm:v27)
            attn.0: linear_grad_weight(attn.0.norm, d.attn.0.q:v23) += d.q
            attn.0: d.attn.0.norm:v30 = linear_grad_input(d.attn.0.q:v23) of q
            attn.0: d.attn.0.norm:v31 = add(d.attn.0.norm:v28, d.attn.0.norm:v30)
            attn.0: d.embed.embed:v33 = rms_norm_grad(embed.embed, d.attn.0.norm:v31) of norm += d.norm
            attn.0: d.embed.embed:v34 = add(d.attn.0.add:v16, d.embed.embed:v33)
            embed: embed_grad_rows(d.embed.embed:v34) += d.embed.rows
            update: embed_scatter(token_ids, d.embed.rows) += d.embed
            stage embed: d.embed.embed:v34 to -
            stage attn.0: d.attn.0.add:v16 to d.embed.embed:v34
            stage head: - to d.attn.0.add:v16
        "#]],
    );
}

#[test]
fn without_clipping_every_parameter_is_updated_as_soon_as_its_norm_is_known() {
    let graph = differentiate(&llama_attention()).unwrap();
    let graph = attach_optimizer(&graph, OptimizerKind::Sgd, false).unwrap();
    assert_eq!(graph.states, []);
    check_update(
        &graph,
        &expect![[r#"
        update: embed_scatter(token_ids, d.embed.rows) += d.embed
        update: norm.embed = sum_squares(d.embed)
        update: sgd(d.embed) -> embed
        update: norm.norm = sum_squares(d.norm)
        update: sgd(d.norm) -> norm
        update: norm.q = sum_squares(d.q)
        update: sgd(d.q) -> q
        update: norm.k = sum_squares(d.k)
        update: sgd(d.k) -> k
        update: norm.v = sum_squares(d.v)
        update: sgd(d.v) -> v
        update: norm.o = sum_squares(d.o)
        update: sgd(d.o) -> o
        update: norm.head = sum_squares(d.head)
        update: sgd(d.head) -> head
    "#]],
    );
}

#[test]
fn with_clipping_all_norms_come_first_in_parameter_order() {
    let graph = differentiate(&gpt2(false).finish().unwrap()).unwrap();
    let graph = attach_optimizer(&graph, OptimizerKind::AdamW, true).unwrap();
    assert_eq!(graph.states.len(), 2);
    check_update(
        &graph,
        &expect![[r#"
        update: embed_scatter(token_ids, d.wte.weight.rows) += d.wte.weight
        update: norm.wte.weight = sum_squares(d.wte.weight)
        update: embed_scatter(positions, d.wpe.weight.rows) += d.wpe.weight
        update: norm.wpe.weight = sum_squares(d.wpe.weight)
        update: norm.ln_1.weight = sum_squares(d.ln_1.weight)
        update: norm.ln_1.bias = sum_squares(d.ln_1.bias)
        update: norm.c_attn.weight = sum_squares(d.c_attn.weight)
        update: norm.c_attn.bias = sum_squares(d.c_attn.bias)
        update: norm.c_proj.weight = sum_squares(d.c_proj.weight)
        update: norm.c_proj.bias = sum_squares(d.c_proj.bias)
        update: norm.ln_2.weight = sum_squares(d.ln_2.weight)
        update: norm.ln_2.bias = sum_squares(d.ln_2.bias)
        update: norm.c_fc.weight = sum_squares(d.c_fc.weight)
        update: norm.c_fc.bias = sum_squares(d.c_fc.bias)
        update: norm.c_proj2.weight = sum_squares(d.c_proj2.weight)
        update: norm.c_proj2.bias = sum_squares(d.c_proj2.bias)
        update: norm.ln_f.weight = sum_squares(d.ln_f.weight)
        update: norm.ln_f.bias = sum_squares(d.ln_f.bias)
        update: clip_scale = clip_scale(norm.wte.weight, norm.wpe.weight, norm.ln_1.weight, norm.ln_1.bias, norm.c_attn.weight, norm.c_attn.bias, norm.c_proj.weight, norm.c_proj.bias, norm.ln_2.weight, norm.ln_2.bias, norm.c_fc.weight, norm.c_fc.bias, norm.c_proj2.weight, norm.c_proj2.bias, norm.ln_f.weight, norm.ln_f.bias)
        update: adamw(d.wte.weight, clip_scale) -> wte.weight
        update: adamw(d.wpe.weight, clip_scale) -> wpe.weight
        update: adamw(d.ln_1.weight, clip_scale) -> ln_1.weight
        update: adamw(d.ln_1.bias, clip_scale) -> ln_1.bias
        update: adamw(d.c_attn.weight, clip_scale) -> c_attn.weight
        update: adamw(d.c_attn.bias, clip_scale) -> c_attn.bias
        update: adamw(d.c_proj.weight, clip_scale) -> c_proj.weight
        update: adamw(d.c_proj.bias, clip_scale) -> c_proj.bias
        update: adamw(d.ln_2.weight, clip_scale) -> ln_2.weight
        update: adamw(d.ln_2.bias, clip_scale) -> ln_2.bias
        update: adamw(d.c_fc.weight, clip_scale) -> c_fc.weight
        update: adamw(d.c_fc.bias, clip_scale) -> c_fc.bias
        update: adamw(d.c_proj2.weight, clip_scale) -> c_proj2.weight
        update: adamw(d.c_proj2.bias, clip_scale) -> c_proj2.bias
        update: adamw(d.ln_f.weight, clip_scale) -> ln_f.weight
        update: adamw(d.ln_f.bias, clip_scale) -> ln_f.bias
    "#]],
    );
}

fn check_update(graph: &Graph, expected: &Expect) {
    verify(graph).unwrap();
    let text = print(graph);
    let update: String = text
        .lines()
        .filter(|l| l.starts_with("update"))
        .fold(String::new(), |text, line| text + line + "\n");
    expected.assert_eq(&update);
}

#[test]
fn an_untied_table_has_a_sum_of_its_own() {
    let graph = differentiate(&gpt2(true).finish().unwrap()).unwrap();
    let dense = |name: &str| {
        graph
            .values
            .values()
            .filter(|v| v.name == name && v.shape == Shape::fixed(&[11, 4]))
            .count()
    };
    assert_eq!((dense("d.wte.weight"), dense("d.head")), (1, 1));
}

#[test]
fn frozen_parameters_get_no_sum_and_nothing_below_the_last_trained_one_is_computed() {
    let mut forward = gpt2(true).finish().unwrap();
    let freeze: Vec<ParamId> = forward
        .params
        .iter()
        .filter(|(_, p)| !p.name.starts_with("c_proj2"))
        .map(|(id, _)| id)
        .collect();
    for p in freeze {
        forward.params[p].trainable = false;
    }
    check(
        &differentiate(&forward).unwrap(),
        &expect![[r#"
            head: head.head, d.head.ln_f:v20 = cross_entropy_train(head.ln_f, targets) of head
            head: d.mlp.0.add:v21 = layer_norm_grad(mlp.0.add, d.head.ln_f:v20) of ln_f.weight
            mlp.0: linear_grad_weight(mlp.0.gelu, d.mlp.0.add:v21) += d.c_proj2.weight
            mlp.0: bias_grad(d.mlp.0.add:v21) += d.c_proj2.bias
            stage embed: - to -
            stage attn.0: - to -
            stage mlp.0: d.mlp.0.add:v21 to -
            stage head: - to d.mlp.0.add:v21
        "#]],
    );
}

#[test]
fn graphs_that_cannot_be_trained_are_refused_with_a_hint() {
    let table = Shape::fixed(&[5, 4]);
    // No loss.
    let mut b = GraphBuilder::new();
    let ids = b.input(InputKind::TokenIds);
    b.stage("embed", "embed");
    let w = b.param("w", table.clone(), true);
    let x = b.embed(ids, w);
    assert_eq!(differentiate(&b.finish().unwrap()), Err(PassError::NoLoss));

    // Two losses on one weight.
    let mut b = GraphBuilder::new();
    b.stage("embed", "embed");
    let ids = b.input(InputKind::TokenIds);
    let w = b.param("w", table.clone(), true);
    assert_eq!(b.embed(ids, w), x);
    b.cross_entropy(x, w);
    b.cross_entropy(x, w);
    let error = differentiate(&b.finish().unwrap()).unwrap_err();
    assert!(matches!(error, PassError::LossNotLast { .. }), "{error}");

    // A layer and a head that share a weight.
    let mut b = GraphBuilder::new();
    b.stage("embed", "embed");
    let ids = b.input(InputKind::TokenIds);
    let e = b.param("e", Shape::fixed(&[5, 4]), true);
    let w = b.param("w", Shape::fixed(&[4, 4]), true);
    let x = b.embed(ids, e);
    let x = b.linear(x, w, None, WeightLayout::OutIn);
    b.cross_entropy(x, w);
    let error = differentiate(&b.finish().unwrap()).unwrap_err();
    assert_eq!(error, PassError::SharedParameter { param: "w".to_owned() });
    assert!(error.to_string().contains("\nhint: "));

    // A norm with a frozen bias.
    let mut forward = gpt2(false).finish().unwrap();
    let bias = forward.params.iter().find(|(_, p)| p.name == "ln_1.bias").unwrap().0;
    forward.params[bias].trainable = false;
    let error = differentiate(&forward).unwrap_err();
    assert!(matches!(error, PassError::HalfFrozen { .. }), "{error}");
}

#[test]
fn passes_run_once_and_in_order() {
    let forward = gpt2(false).finish().unwrap();
    assert_eq!(attach_optimizer(&forward, OptimizerKind::Sgd, false), Err(PassError::NoGradients));
    let graph = differentiate(&forward).unwrap();
    assert!(matches!(differentiate(&graph), Err(PassError::NotForward { .. })));
    let updated = attach_optimizer(&graph, OptimizerKind::Sgd, true).unwrap();
    assert!(matches!(
        attach_optimizer(&updated, OptimizerKind::Sgd, true),
        Err(PassError::AlreadyAttached { .. })
    ));
}

#[test]
fn a_trained_parameter_that_the_loss_ignores_is_refused() {
    let mut b = gpt2(false);
    b.param("unused", Shape::fixed(&[3]), true);
    let graph = differentiate(&b.finish().unwrap()).unwrap();
    assert_eq!(
        attach_optimizer(&graph, OptimizerKind::AdamW, false),
        Err(PassError::NoGradient { param: "unused".to_owned() })
    );
}

/// The dtypes of all values that are not f32, and of parameters and states, one line each.
fn dtypes(graph: &Graph) -> String {
    let mut text = String::new();
    for v in graph.values.values().filter(|v| v.dtype.is_float() && v.dtype != DType::F32) {
        writeln!(text, "{} {}", v.dtype, v.name).unwrap();
    }
    writeln!(text, "parameters {}", graph.trained_dtype()).unwrap();
    for state in &graph.states {
        writeln!(text, "{} {}", state.dtype, state.name).unwrap();
    }
    text
}

/// The embedding, attention and head of a Llama, a whole step in that precision.
fn lowered(policy: &PrecisionPolicy) -> Graph {
    let graph = lower_precision(&differentiate(&llama_attention()).unwrap(), policy);
    let graph = attach_optimizer(&graph, OptimizerKind::AdamW, true).unwrap();
    verify(&graph).unwrap();
    graph
}

#[test]
fn bf16_stores_what_flows_and_half_of_every_master() {
    let expected = expect![[r#"
        bf16 embed.embed
        bf16 attn.0.norm
        bf16 attn.0.q
        bf16 attn.0.k
        bf16 attn.0.v
        bf16 attn.0.rope
        bf16 attn.0.rope
        bf16 attn.0.attention
        bf16 attn.0.o
        bf16 attn.0.add
        bf16 d.attn.0.add
        bf16 d.attn.0.attention
        bf16 d.attn.0.rope
        bf16 d.attn.0.rope
        bf16 d.attn.0.v
        bf16 d.attn.0.k
        bf16 d.attn.0.q
        bf16 d.attn.0.norm
        bf16 d.attn.0.norm
        bf16 d.attn.0.norm
        bf16 d.attn.0.norm
        bf16 d.attn.0.norm
        bf16 d.embed.embed
        bf16 d.embed.embed
        bf16 d.embed.rows
        parameters bf16
        f32 exp_avg
        f32 exp_avg_sq
        i16 master_lo
    "#]];
    expected.assert_eq(&dtypes(&lowered(&PrecisionPolicy::new(Precision::Bf16))));
}

#[test]
fn f16_leaves_parameters_alone_and_a_class_can_keep_f32() {
    let keep_f32 = vec![OpClass::Linear, OpClass::Residual, OpClass::Embed];
    let policy = PrecisionPolicy { precision: Precision::F16, keep_f32 };
    let expected = expect![[r#"
        f16 attn.0.norm
        f16 attn.0.rope
        f16 attn.0.rope
        f16 attn.0.attention
        f16 d.attn.0.add
        f16 d.attn.0.rope
        f16 d.attn.0.rope
        f16 d.attn.0.v
        f16 d.attn.0.k
        f16 d.attn.0.q
        f16 d.embed.embed
        parameters f32
        f32 exp_avg
        f32 exp_avg_sq
    "#]];
    expected.assert_eq(&dtypes(&lowered(&policy)));
}

#[test]
fn f32_and_all_classes_kept_in_f32_change_no_value() {
    let graph = differentiate(&gpt2(false).finish().unwrap()).unwrap();
    assert_eq!(lower_precision(&graph, &PrecisionPolicy::default()), graph);
    for precision in Precision::ALL {
        let policy = PrecisionPolicy { precision, keep_f32: OpClass::CHOSEN.to_vec() };
        assert_eq!(lower_precision(&graph, &policy).values, graph.values, "{precision}");
    }
}

#[test]
fn a_factor_is_rounded_as_weights_are_in_forward_and_backward() {
    let mut b = GraphBuilder::new();
    let ids = b.input(InputKind::TokenIds);
    let w = b.param("embed.weight", Shape::fixed(&[7, 4]), true);
    b.stage("embed", "embed");
    let x = b.embed(ids, w);
    // The square root of 1152 channels, between 33.75 and 34 in bf16.
    let x = b.scale(x, 33.941_124);
    b.stage("head", "head");
    b.cross_entropy(x, w);
    let graph = differentiate(&b.finish().unwrap()).unwrap();
    let factors = |precision| -> Vec<f32> {
        let lowered = lower_precision(&graph, &PrecisionPolicy::new(precision));
        let factor = |kind: &OpKind| match *kind {
            OpKind::Scale { factor } => Some(factor),
            _ => None,
        };
        lowered.ops.values().filter_map(|op| factor(&op.kind)).collect()
    };
    assert_eq!(factors(Precision::F32), [33.941_124; 2]);
    assert_eq!(factors(Precision::F16), [33.941_124; 2], "its weights are f32");
    assert_eq!(factors(Precision::Bf16), [34.0; 2]);
}

#[test]
fn every_class_has_a_line_in_the_table_and_reads_back_from_its_name() {
    let classes: Vec<OpClass> = TABLE.iter().map(|line| line.class).collect();
    assert_eq!(classes, [&OpClass::CHOSEN[..], &[OpClass::Update]].concat());
    for class in OpClass::CHOSEN {
        assert_eq!(OpClass::from_name(class.name()), Some(class));
    }
    assert_eq!(OpClass::from_name("update"), None, "the update's dtype is not chosen");
    for precision in Precision::ALL {
        assert_eq!(Precision::from_name(precision.name()), Some(precision));
    }
}

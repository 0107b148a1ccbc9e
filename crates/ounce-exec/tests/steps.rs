//! Whole steps of small models: against the f64 interpreter, and bit for bit against themselves
//! under other threads, micro-batches, cuts and in-place plans.

mod support;

use ounce_exec::{NonFinite, RowSpan, StepInputs};
use ounce_ir::{DType, Graph, InputKind, OpKind, OptimizerKind, Phase, ValueKind};
use ounce_oracle::Interpreter;
use ounce_passes::Precision;
use ounce_program::StepShape;
use support::{
    Cut, HYPER, N_STEPS, ROW_TOKENS, SEED, Session, Tensors, assert_same_bits, f32_states,
    gpt2_like, has_op, llama_like, llama_like_decode, master, rows, spans, start_values,
    step_inputs, training, training_in,
};

const N_ROWS: u64 = 4;

fn run(graph: &Graph, shape: StepShape, cut: Cut, n_threads: usize) -> Tensors {
    support::run(graph, shape, Session::new(graph, shape, cut, n_threads))
}

/// The same steps in f64, in the order of [`Session::everything`].
fn run_oracle(graph: &Graph, shape: StepShape) -> Vec<(String, Vec<f64>)> {
    let mut oracle = Interpreter::new(graph, shape);
    oracle.seed = SEED;
    for p in graph.params.ids() {
        let values: Vec<f64> = start_values(graph, p).into_iter().map(f64::from).collect();
        oracle.set_param(p, &values);
    }
    for step in 1..=N_STEPS {
        oracle.set_rows(&rows(shape.n_rows, step));
        oracle.run_step(&HYPER);
    }
    let mut all = Vec::new();
    for (v, value) in graph.values.iter() {
        if matches!(value.kind, ValueKind::Sum(_) | ValueKind::Loss | ValueKind::Scalar)
            && value.dtype == DType::F32
        {
            all.push((value.name.clone(), oracle.value(v).to_vec()));
        }
    }
    for (p, param) in graph.params.iter() {
        all.push((param.name.clone(), oracle.master(p).to_vec()));
        for k in f32_states(graph) {
            let state = oracle.state(p, k as usize).to_vec();
            all.push((format!("state {k} of {}", param.name), state));
        }
    }
    all
}

/// Compares every tensor with the oracle's, relative to its largest element.
fn assert_close(got: &Tensors, want: &[(String, Vec<f64>)], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for ((name, got), (want_name, want)) in got.iter().zip(want) {
        assert_eq!(name, want_name);
        let largest = want.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let off = (f64::from(*got) - want).abs();
            // Gradients that are zero but for rounding (a key's bias) have no scale of their own.
            let allowed = tolerance * largest.max(1e-3);
            assert!(off <= allowed, "{name}[{i}] is {got}, not {want} (largest {largest})");
        }
    }
}

fn graphs(precision: Precision) -> [(&'static str, Graph); 2] {
    let train = |forward| training_in(precision, &forward, OptimizerKind::AdamW, true);
    [("gpt2", train(gpt2_like(0.1))), ("llama", train(llama_like()))]
}

#[test]
fn three_adamw_steps_match_the_f64_interpreter() {
    let shape = StepShape::new(N_ROWS, ROW_TOKENS);
    for (name, graph) in graphs(Precision::F32) {
        assert!(has_op(&graph, |k| matches!(k, OpKind::ClipScale)), "{name} clips");
        let got = run(&graph, shape, Cut::NONE, 2);
        assert_close(&got, &run_oracle(&graph, shape), 1e-4);
    }
}

/// The oracle rounds where the graph says so. A number between two of 16 bits may be rounded to
/// either, and what follows differs by as much: a few units of the last of 8 or 11 bits.
#[test]
fn three_steps_in_16_bits_match_the_f64_interpreter_within_their_rounding() {
    let shape = StepShape::new(N_ROWS, ROW_TOKENS);
    for (precision, tolerance) in [(Precision::Bf16, 4e-2), (Precision::F16, 5e-3)] {
        for (name, graph) in graphs(precision) {
            let got = run(&graph, shape, Cut::NONE, 2);
            println!("{name} in {precision}");
            assert_close(&got, &run_oracle(&graph, shape), tolerance);
        }
    }
}

/// Goal: the halves of a master hold what an f32 master would. Method: beside the run, an f32 array
/// is updated from the run's own moments by the formula of AdamW; bits must be equal.
#[test]
fn masters_in_two_halves_are_updated_as_f32_masters_are() {
    let shape = StepShape::new(N_ROWS, ROW_TOKENS);
    let graph = training_in(Precision::Bf16, &llama_like(), OptimizerKind::AdamW, false);
    let mut session = Session::new(&graph, shape, Cut::NONE, 2);
    let mut shadow: Vec<Vec<f32>> = graph.params.ids().map(|p| start_values(&graph, p)).collect();
    for step in 1..=N_STEPS {
        let rows = rows(shape.n_rows, step);
        let spans = spans(shape, &rows);
        session.set_rows(&graph, shape, &rows);
        let inputs = step_inputs(step, 1e-2, &spans);
        session.exec.run(&mut session.arena, &inputs).expect("finite numbers");
        let (h, lr) = (inputs.hyper, inputs.lr);
        let correction = |beta: f32| (1.0 - f64::from(beta).powf(step as f64)) as f32;
        let (factor, root) = (lr / correction(h.beta1), correction(h.beta2).sqrt());
        let mut buffers = session.exec.buffers(&mut session.arena);
        for ((p, param), shadow) in graph.params.iter().zip(&mut shadow) {
            let m = buffers.state(p, 0).to_vec();
            let decay = 1.0 - lr * if param.decay { h.weight_decay } else { 0.0 };
            for ((w, m), v) in shadow.iter_mut().zip(m).zip(buffers.state(p, 1)) {
                *w = (-factor).mul_add(m / (v.sqrt() / root + h.eps), *w * decay);
            }
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let halves = master(&mut buffers, &graph, p);
            assert!(bits(&halves) == bits(shadow), "{} after step {step}", param.name);
        }
    }
}

/// A power of two on the loss is gone after the update: f16 gradients neither overflow nor vanish
/// here, so the bits are those of any other scale.
#[test]
fn a_loss_scale_does_not_change_a_bit_where_nothing_overflows_or_vanishes() {
    let shape = StepShape::new(2, ROW_TOKENS);
    let graph = training(&gpt2_like(0.1), OptimizerKind::AdamW, true);
    let traces = [1.0, 1024.0, 0.25].map(|loss_scale| {
        let mut session = Session::new(&graph, shape, Cut::NONE, 2);
        let rows = rows(2, 1);
        let spans = spans(shape, &rows);
        session.set_rows(&graph, shape, &rows);
        for step in 1..=2 {
            let inputs = StepInputs { loss_scale, ..step_inputs(step, 0.01, &spans) };
            session.exec.run(&mut session.arena, &inputs).expect("finite numbers");
        }
        kept(&graph, &mut session)
    });
    assert_same_bits(&traces[0], &traces[1], "a scale of 1024");
    assert_same_bits(&traces[0], &traces[2], "a scale of 1/4");
}

/// Goal: the op that overflowed first is named whatever the plan. Method: a huge weight of the first
/// layer's MLP; and, for the backward, a loss scale that f16 cannot hold.
#[test]
fn the_first_op_that_overflows_is_named_under_every_plan() {
    let shape = StepShape::new(N_ROWS, ROW_TOKENS);
    let cuts = [
        Cut::NONE,
        Cut { micro_batch_rows: 1, run_tokens: 64, in_place: true, recompute: true },
        Cut { micro_batch_rows: 2, ..Cut::NONE },
    ];
    let graph = training_in(Precision::F16, &gpt2_like(0.0), OptimizerKind::AdamW, true);
    let huge = graph.params.ids().find(|&p| graph.params[p].name == "h.0.mlp.c_fc.weight");
    let huge = huge.expect("a weight of the first MLP");
    for (n_threads, cut) in [1, 2, 3].into_iter().zip(cuts) {
        let mut session = Session::new(&graph, shape, cut, n_threads);
        let rows = rows(N_ROWS, 1);
        let spans = spans(shape, &rows);
        session.set_rows(&graph, shape, &rows);
        let fine = step_inputs(1, 1e-2, &spans);
        assert_eq!(session.exec.first_overflow(&mut session.arena, &fine), None);

        let before = kept(&graph, &mut session);
        let scaled = StepInputs { loss_scale: 2f32.powi(40), ..fine };
        let outcome = session.exec.run(&mut session.arena, &scaled);
        assert!(matches!(outcome, Err(NonFinite::GradNorm(_))), "{outcome:?}");
        let found = session.exec.first_overflow(&mut session.arena, &scaled);
        let (op, value) = found.expect("an op that overflowed");
        assert!(matches!(graph.ops[op].kind, OpKind::CrossEntropyTrain { .. }));
        assert_eq!(value, graph.ops[op].outputs[1]);
        assert_same_bits(&before, &kept(&graph, &mut session), "a scale that is too large");

        let weights = vec![1e6; graph.params[huge].shape.row_elems() as usize];
        session.exec.buffers(&mut session.arena).write_master(huge, 0, &weights);
        session.exec.run(&mut session.arena, &fine).expect_err("an overflow");
        let found = session.exec.first_overflow(&mut session.arena, &fine);
        let (op, value) = found.expect("an op that overflowed");
        let reads = graph.ops[op].uses.iter().any(|&u| graph.param_of(u) == huge);
        assert!(reads && graph.ops[op].phase == Phase::Forward, "{:?}", graph.ops[op]);
        assert_eq!(value, graph.ops[op].outputs[0]);
    }
}

#[test]
fn sgd_without_clipping_matches_the_f64_interpreter() {
    let graph = training(&gpt2_like(0.0), OptimizerKind::Sgd, false);
    let shape = StepShape::new(2, ROW_TOKENS);
    let got = run(&graph, shape, Cut::NONE, 2);
    assert_close(&got, &run_oracle(&graph, shape), 1e-4);
}

#[test]
fn a_frozen_body_passes_gradients_through() {
    for mut forward in [gpt2_like(0.0), llama_like()] {
        // Only the first layer's output projection is trained: gradients pass frozen norms,
        // attention, MLP and head.
        let ids: Vec<_> = forward.params.ids().collect();
        for p in ids {
            let name = forward.params[p].name.clone();
            forward.params[p].trainable =
                name.contains("0.attn.c_proj") || name.contains("0.o_proj");
        }
        let graph = training(&forward, OptimizerKind::AdamW, true);
        let shape = StepShape::new(2, ROW_TOKENS);
        let got = run(&graph, shape, Cut::NONE, 2);
        assert_close(&got, &run_oracle(&graph, shape), 1e-4);
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let shape = StepShape::new(N_ROWS, ROW_TOKENS);
    for precision in Precision::ALL {
        for (name, graph) in graphs(precision) {
            let one = run(&graph, shape, Cut::NONE, 1);
            for n_threads in [2, 3] {
                let other = run(&graph, shape, Cut::NONE, n_threads);
                let what = format!("{n_threads} threads, {name} in {precision}");
                assert_same_bits(&one, &other, &what);
            }
        }
    }
}

/// Goal: samples that share a row see nothing of each other. Method: one of three in a row changes; the losses of the
/// others keep every bit, dropout and padding up to the next granule included.
#[test]
fn changing_one_sample_of_a_packed_row_leaves_the_losses_of_the_others_alone() {
    let shape = StepShape::new(1, 256);
    let span = |start, len| RowSpan { start, len };
    let places = [span(0, ROW_TOKENS as usize), span(128, 64), span(192, 33)];
    for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
        for (name, graph) in graphs(precision) {
            let losses = |changes: bool| -> Vec<u32> {
                let mut samples: Vec<_> = rows(5, 1).into_iter().step_by(2).collect();
                if changes {
                    samples[1].token_ids.rotate_left(1);
                }
                let mut session = Session::new(&graph, shape, Cut::NONE, 2);
                session.set_samples(&graph, &places, &samples);
                let inputs = step_inputs(1, 0.01, &places);
                session.exec.run(&mut session.arena, &inputs).expect("finite numbers");
                let loss = graph.find_value(ValueKind::Loss).expect("a loss");
                let mut buffers = session.exec.buffers(&mut session.arena);
                buffers.session_f32(loss).iter().map(|x| x.to_bits()).collect()
            };
            let (before, after) = (losses(false), losses(true));
            assert_eq!(before[..128], after[..128], "{name} in {precision}");
            assert_ne!(before[128..192], after[128..192], "{name} in {precision}");
            assert_eq!(before[192..], after[192..], "{name} in {precision}");
            assert!(
                before[..70].iter().any(|&x| x != 0) && before[192..225].iter().any(|&x| x != 0)
            );
        }
    }
}

#[test]
fn micro_batches_cuts_recomputation_and_in_place_do_not_change_a_bit() {
    let shape = StepShape::new(N_ROWS, ROW_TOKENS);
    let cuts = [
        Cut { micro_batch_rows: 2, ..Cut::NONE },
        Cut { micro_batch_rows: 1, run_tokens: 64, ..Cut::NONE },
        Cut { micro_batch_rows: 3, run_tokens: 192, in_place: true, recompute: true },
        Cut { in_place: true, ..Cut::NONE },
    ];
    for precision in Precision::ALL {
        for (name, graph) in graphs(precision) {
            let whole = run(&graph, shape, Cut::NONE, 2);
            for cut in cuts {
                let what = format!("{cut:?}, {name} in {precision}");
                assert_same_bits(&whole, &run(&graph, shape, cut, 2), &what);
            }
        }
    }
}

#[test]
fn logits_of_selected_tokens_match_the_f64_interpreter() {
    let graph = llama_like_decode();
    let shape = StepShape { n_selected: 3, ..StepShape::new(3, ROW_TOKENS) };
    let rows = rows(3, 1);
    let spans = spans(shape, &rows);
    let selected: Vec<i32> = spans.iter().map(|s| (s.start + s.len - 1) as i32).collect();

    let mut oracle = Interpreter::new(&graph, shape);
    for p in graph.params.ids() {
        let values: Vec<f64> = start_values(&graph, p).into_iter().map(f64::from).collect();
        oracle.set_param(p, &values);
    }
    oracle.set_rows(&rows);
    oracle.set_input(InputKind::SelectedRows, &selected);
    oracle.run_forward();

    let result = graph.find_value(ValueKind::Result).expect("a result");
    let want = vec![("logits".to_owned(), oracle.value(result).to_vec())];
    for in_place in [false, true] {
        let cut = Cut { run_tokens: 64, in_place, ..Cut::NONE };
        let mut session = Session::new(&graph, shape, cut, 2);
        session.set_rows(&graph, shape, &rows);
        let idx = graph.find_value(ValueKind::Input(InputKind::SelectedRows)).expect("an input");
        session.exec.buffers(&mut session.arena).session_i32(idx).copy_from_slice(&selected);
        session.exec.run(&mut session.arena, &StepInputs::forward(&spans)).expect("finite numbers");
        let logits = session.exec.buffers(&mut session.arena).session_f32(result).to_vec();
        assert_close(&vec![("logits".to_owned(), logits)], &want, 1e-4);
    }
}

#[test]
fn a_profile_counts_every_run_of_a_step() {
    let graph = training(&llama_like(), OptimizerKind::AdamW, true);
    let shape = StepShape::new(2, ROW_TOKENS);
    let cut = Cut { micro_batch_rows: 1, ..Cut::NONE };
    let mut session = Session::new(&graph, shape, cut, 1);
    let rows = rows(2, 1);
    let spans = spans(shape, &rows);
    session.set_rows(&graph, shape, &rows);
    assert!(session.exec.profile().is_empty(), "nothing was measured yet");
    session.exec.start_profile();
    for step in 1..=2 {
        session
            .exec
            .run(&mut session.arena, &step_inputs(step, 1.0, &spans))
            .expect("finite numbers");
    }
    let profile = session.exec.profile();
    let n_runs = |name: &str| profile.iter().find(|t| t.op == name).map_or(0, |t| t.n_runs);
    let n_ops = |name: &str| graph.ops.values().filter(|op| op.kind.name() == name).count() as u64;
    assert_eq!(n_runs("linear"), 2 * 2 * n_ops("linear"), "two steps of two micro-batches");
    assert_eq!(n_runs("adamw"), 2 * n_ops("adamw"));
    assert!(n_runs("zero") > 0);
    assert!(profile.windows(2).all(|w| w[0].total >= w[1].total), "the longest first");
}

/// Goal: a step whose losses or gradient norm are not finite changes no parameter and no state.
/// Method: a huge number in a weight that the loss reads, and a scale that only the gradients see.
#[test]
fn a_step_that_is_not_finite_stops_before_its_first_update() {
    let shape = StepShape::new(2, ROW_TOKENS);
    for (clip, cut) in [
        (true, Cut::NONE),
        (false, Cut::NONE),
        (true, Cut { micro_batch_rows: 1, ..Cut::NONE }),
        (false, Cut { micro_batch_rows: 1, ..Cut::NONE }),
    ] {
        let graph = training(&gpt2_like(0.0), OptimizerKind::AdamW, clip);
        let mut session = Session::new(&graph, shape, cut, 2);
        let rows = rows(2, 1);
        let spans = spans(shape, &rows);
        session.set_rows(&graph, shape, &rows);
        session.exec.run(&mut session.arena, &step_inputs(1, 1.0, &spans)).expect("a fine step");
        let before = kept(&graph, &mut session);
        if clip {
            let outcome = session.exec.run(&mut session.arena, &step_inputs(2, f32::MAX, &spans));
            assert!(matches!(outcome, Err(NonFinite::GradNorm(_))), "{outcome:?}");
            assert_same_bits(&before, &kept(&graph, &mut session), "a norm that is not finite");
        }
        // The last parameter is the last norm's: behind it there is only the head.
        let last = graph.params.ids().last().expect("a parameter");
        session.exec.buffers(&mut session.arena).write_master(last, 0, &[f32::INFINITY]);
        let before = kept(&graph, &mut session);
        let outcome = session.exec.run(&mut session.arena, &step_inputs(2, 1.0, &spans));
        assert!(matches!(outcome, Err(NonFinite::Loss(_))), "{outcome:?}");
        assert_same_bits(&before, &kept(&graph, &mut session), "a loss that is not finite");
    }
}

/// Every parameter and every state.
fn kept(graph: &Graph, session: &mut Session) -> Tensors {
    let mut buffers = session.exec.buffers(&mut session.arena);
    let mut all = Tensors::new();
    for (id, param) in graph.params.iter() {
        all.push((param.name.clone(), master(&mut buffers, graph, id)));
        for k in f32_states(graph) {
            all.push((format!("{}.{k}", param.name), buffers.state(id, k).to_vec()));
        }
    }
    all
}

//! The pretrained stories260K model: logits, mean loss and all 255 greedy choices as published.
#![expect(clippy::unwrap_used, reason = "a test that cannot read its goldens should panic")]

use std::path::Path;
use std::sync::Arc;

use ounce_exec::{Arena, Executor, MeasuredMachine, RowSpan, StepInputs};
use ounce_io::SafetensorsDir;
use ounce_ir::{InputKind, ValueKind};
use ounce_kernels::pool::Pool;
use ounce_models::{ModelConfig, Purpose, build_for_length};
use ounce_plan::{PlanOptions, plan};
use ounce_program::StepShape;
use serde_json::Value;

const VOCAB: usize = 512;

/// Logits `[T, V]` of the ids, in one forward run.
fn logits(folder: &Path, ids: &[i32]) -> Vec<f32> {
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let config = ModelConfig::from_json(&config).unwrap();
    let length = ids.len() as u64;
    let graph = build_for_length(&config, Purpose::Decode, 0.0, length).unwrap();
    let shape = StepShape { n_selected: length, ..StepShape::new(1, length) };
    let pool = Arc::new(Pool::new(2));
    let machine = MeasuredMachine::new(Arc::clone(&pool), 1 << 24, 0, None);
    let plan = plan(&graph, &shape, u64::MAX, &machine, &PlanOptions::default()).unwrap();
    ounce_check::check(&graph, &plan, &machine).unwrap();
    let executor = Executor::new(&graph, &plan, pool).unwrap();
    let mut arena = Arena::reserve(executor.arena_bytes()).unwrap();
    let mut buffers = executor.buffers(&mut arena);
    let weights = SafetensorsDir::open(folder).unwrap();
    for (p, param) in graph.params.iter() {
        weights.read_f32(&param.name, buffers.param(p)).unwrap();
    }
    for (v, value) in graph.values.iter() {
        let ValueKind::Input(kind) = value.kind else { continue };
        let data = buffers.session_i32(v);
        data.fill(if kind == InputKind::Positions { 0 } else { -1 });
        for (t, slot) in data[..ids.len()].iter_mut().enumerate() {
            *slot = if kind == InputKind::TokenIds { ids[t] } else { t as i32 };
        }
    }
    let rows = [RowSpan { start: 0, len: ids.len() }];
    executor.run(&mut arena, &StepInputs::forward(&rows)).unwrap();
    let result = graph.find_value(ValueKind::Result).unwrap();
    executor.buffers(&mut arena).session_f32(result).to_vec()
}

#[test]
fn logits_loss_and_greedy_choices_are_as_published() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/stories260k-hf");
    let expected = std::fs::read_to_string(folder.join("expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    let ids = expected["greedy_ids"].as_array().unwrap();
    let ids: Vec<i32> = ids.iter().map(|id| id.as_i64().unwrap() as i32).collect();
    let (read, predicted) = (&ids[..ids.len() - 1], &ids[1..]);
    let logits = logits(&folder, read);

    let published = expected["logits_pos0_to_2_first16"].as_array().unwrap();
    for (t, row) in published.iter().enumerate() {
        for (i, x) in row.as_array().unwrap().iter().enumerate() {
            let (ours, theirs) = (f64::from(logits[t * VOCAB + i]), x.as_f64().unwrap());
            assert!((ours - theirs).abs() < 1e-4, "position {t}, id {i}: {ours} for {theirs}");
        }
    }
    let mut nll = 0.0;
    for (row, &id) in logits.chunks(VOCAB).zip(predicted) {
        let best = (0..VOCAB).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        assert_eq!(best as i32, id);
        let max = f64::from(row[best]);
        let sum: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
        nll += max + sum.ln() - f64::from(row[id as usize]);
    }
    let mean = nll / predicted.len() as f64;
    let published = expected["mean_nll_of_greedy_ids"].as_f64().unwrap();
    assert!((mean - published).abs() < 1e-5, "mean loss {mean}, published {published}");
}

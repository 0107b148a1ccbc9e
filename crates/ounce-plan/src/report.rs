//! What a plan holds, when, and why: the table for people.

use std::fmt::Write;

use ounce_program::{Category, Instr, Plan};

use crate::error::mib;

/// Bytes per category at every instruction, process included: the picture of a plan over time.
pub fn timeline(plan: &Plan) -> Vec<[u64; Category::ALL.len()]> {
    let n = plan.instrs.len().max(1);
    let mut delta = vec![[0_i64; Category::ALL.len()]; n + 1];
    let row = |c: Category| Category::ALL.iter().position(|&x| x == c).expect("ALL has them all");
    for b in plan.buffers.values() {
        delta[b.live.start as usize][row(b.category)] += b.bytes as i64;
        delta[(b.live.end as usize).min(n)][row(b.category)] -= b.bytes as i64;
    }
    let mut now = [0_i64; Category::ALL.len()];
    now[row(Category::Process)] = plan.baseline_bytes as i64;
    let mut rows = Vec::with_capacity(n);
    for d in &delta[..n] {
        for (sum, change) in now.iter_mut().zip(d) {
            *sum += change;
        }
        rows.push(now.map(|b| b as u64));
    }
    rows
}

/// Bytes per category at the moment of the largest load.
pub fn category_bytes_at_peak(plan: &Plan) -> Vec<(Category, u64)> {
    let rows = timeline(plan);
    let peak = rows.iter().max_by_key(|row| row.iter().sum::<u64>());
    let bytes = peak.copied().unwrap_or_default();
    Category::ALL.into_iter().zip(bytes).collect()
}

/// Instructions that run ops, for reports.
pub fn n_runs(plan: &Plan) -> usize {
    plan.instrs.iter().filter(|i| matches!(i, Instr::Run { .. })).count()
}

/// The table that `ounce plan` prints: where the bytes of the peak are, what was chosen, what is
/// proved, and the predicted time.
pub fn explain(plan: &Plan) -> String {
    let c = &plan.certificate;
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").expect("writing to a string cannot fail");
    line(format!("{:<18}{:>14}{:>9}", "at the peak", "MiB", "share"));
    for (category, bytes) in category_bytes_at_peak(plan) {
        let share = 100.0 * bytes as f64 / c.peak_bytes.max(1) as f64;
        let mib = bytes as f64 / (1024.0 * 1024.0);
        line(format!("{:<18}{mib:>14.2}{share:>8.1}%", category.name()));
    }
    let slack = c.peak_bytes - c.max_load_bytes.min(c.peak_bytes);
    line(format!("peak {} of budget {}", mib(c.peak_bytes), budget(c.budget_bytes)));
    line(format!("no placement needs less than {} (slack {})", mib(c.max_load_bytes), mib(slack)));
    let choice = &plan.choice;
    line(format!(
        "{} micro-batch{} ({}), head in chunks of {} tokens, gradients {}",
        choice.n_micro_batches,
        if choice.n_micro_batches == 1 { "" } else { "es" },
        choice.loop_order,
        choice.head_chunk_tokens,
        if choice.release_gradients { "released into the update" } else { "held for the update" },
    ));
    line(format!(
        "{} values kept, {} forward ops run again, {} instructions",
        choice.n_kept,
        choice.n_recomputed,
        n_runs(plan)
    ));
    let over = 100.0 * (c.step_s / c.unconstrained_step_s - 1.0);
    let gap = 100.0 * (c.step_s / c.step_bound_s - 1.0);
    line(format!("step {:.3} s predicted, {over:+.1} % against the fastest plan", c.step_s));
    line(format!("no schedule is faster than {:.3} s (gap {gap:.1} %)", c.step_bound_s));
    out
}

fn budget(bytes: u64) -> String {
    if bytes == u64::MAX { "none".to_owned() } else { mib(bytes) }
}

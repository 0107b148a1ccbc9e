//! Whole training steps beside PyTorch: speed against its best way to run, memory against two of them,
//! arithmetic against what registers alone reach.
//!
//! Rounds alternate the engines (A B C A B C), so that a disturbance hits all; figures are medians.
//! Checkpointed PyTorch is slower than the same without, so it runs in the first round only.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::Result;
use crate::bench::{StepRun, last_object};
use crate::demonstration::{Outcome, Setting};
use crate::numbers::{median, number};
use crate::shell::{capture, cargo, json_lines};

/// A step that is measured, and what is claimed of it.
struct Case {
    model: &'static str,
    batch_size: &'static str,
    max_length: &'static str,
    precision: &'static str,
    /// Layers, and the width of all query heads together: what causal attention costs.
    attention: (f64, f64),
    /// At least so many times PyTorch's best tokens/s: with all memory, then by budget.
    least: f64,
    budgets: &'static [(&'static str, f64)],
    /// At least this share of what the register-only peak of the precision would do.
    least_share: Option<f64>,
}

const GPT2: Case = Case {
    model: "gpt2",
    batch_size: "4",
    max_length: "1024",
    precision: "bf16",
    attention: (12.0, 768.0),
    least: 1.3,
    budgets: &[("2252MiB", 1.2), ("1945MiB", 1.1)],
    least_share: Some(0.65),
};
const SMOLLM2: Case = Case {
    model: "smollm2-135m",
    max_length: "512",
    attention: (30.0, 576.0),
    budgets: &[],
    ..GPT2
};
const QWEN: Case = Case {
    model: "qwen2.5-0.5b",
    batch_size: "1",
    attention: (24.0, 896.0),
    budgets: &[],
    least_share: None,
    ..GPT2
};

const CASES: &[Case] = &[
    GPT2,
    Case { batch_size: "1", budgets: &[], least_share: None, ..GPT2 },
    SMOLLM2,
    Case { batch_size: "1", max_length: "2048", least_share: None, ..SMOLLM2 },
    QWEN,
    Case { precision: "f32", least: 1.25, budgets: &[], least_share: None, ..GPT2 },
    Case { precision: "f32", least: 1.25, least_share: None, ..SMOLLM2 },
];

/// Tokens/s and peaks by engine, a figure per round.
type Figures = BTreeMap<String, Vec<(f64, f64)>>;

/// `accept speed`
pub(crate) fn speed(s: &Setting<'_>) -> Result<Outcome> {
    let python = s.python.ok_or("accept speed is beside PyTorch: give --python PROGRAM")?;
    let mut outcome = Outcome { is_kept: true, ..Outcome::default() };
    // One model alone, or one precision: a part of the demonstration.
    let is_wanted = |case: &&Case| {
        s.model.is_none_or(|model| model == case.model)
            && s.precision.is_none_or(|precision| precision == case.precision)
    };
    for case in CASES.iter().filter(is_wanted) {
        judge(s, python, case, &mut outcome)?;
    }
    Ok(outcome)
}

fn judge(s: &Setting<'_>, python: &str, case: &Case, outcome: &mut Outcome) -> Result {
    let Case { model, batch_size, max_length, precision, .. } = *case;
    let steps = "3";
    let run = StepRun { model, batch_size, max_length, steps, precision, threads: s.threads };
    let setting = run.setting();
    let mut figures = Figures::new();
    let mut params = 0.0;
    let mut peaks = Vec::new();
    for round in 0..s.times.unwrap_or(2) {
        peaks.push(register_peak(s, precision)?);
        for memory in std::iter::once(None).chain(case.budgets.iter().map(|b| Some(b.0))) {
            let args = run.ounce_args(memory);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let result = last_object(&s.ounce(&args)?)?;
            params = number(&result, "params")?;
            let engine = memory.map_or_else(|| "ounce".to_owned(), |m| format!("ounce in {m}"));
            add(&mut figures, outcome, "ounce", &engine, &setting, result)?;
        }
        let ways = ["eager", "compiled", "eager-checkpointed", "compiled-checkpointed"];
        for way in &ways[..if round == 0 { 4 } else { 2 }] {
            let result = run.peer(python, way)?;
            add(&mut figures, outcome, "torch", &format!("torch {way}"), &setting, result)?;
        }
    }
    let of = |engine: &str| -> (f64, f64) {
        let rounds = &figures[engine];
        let column = |f: fn(&(f64, f64)) -> f64| median(rounds.iter().map(f).collect());
        (column(|r| r.0), column(|r| r.1))
    };
    let theirs = figures.keys().filter(|engine| engine.starts_with("torch"));
    let (best, best_way) = theirs
        .map(|engine| (of(engine).0, engine))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .ok_or("PyTorch ran in no way")?;
    let (ours, peak_mib) = of("ounce");
    let mut claim_speed = |engine: &str, least: f64| {
        let (speed, mib) = of(engine);
        let ratio = speed / best;
        let what = format!(
            "{setting}, {engine}: {speed:.1} tok/s in {mib:.0} MiB, {ratio:.2} times {best_way} \
             ({best:.1}), at least {least}"
        );
        outcome.claim(ratio >= least, what);
    };
    claim_speed("ounce", case.least);
    for (memory, least) in case.budgets {
        claim_speed(&format!("ounce in {memory}"), *least);
    }
    for (way, most) in [("torch compiled", 0.65), ("torch eager", 0.40)] {
        let share = peak_mib / of(way).1;
        let what = format!(
            "{setting}: peak {peak_mib:.0} MiB is {:.0} % of {way}'s {:.0}, at most {:.0} %",
            100.0 * share,
            of(way).1,
            100.0 * most
        );
        outcome.claim(share <= most, what);
    }
    if let Some(least) = case.least_share {
        let peak = median(peaks);
        let rate = flop_per_token(case, params) * ours / 1e9;
        let what = format!(
            "{setting}: {rate:.0} GFLOP/s of the model are {:.0} % of the register-only {peak:.0}, at \
             least {:.0} %",
            100.0 * rate / peak,
            100.0 * least
        );
        outcome.claim(rate >= least * peak, what);
    }
    Ok(())
}

/// Notes a result of one engine.
fn add(
    figures: &mut Figures,
    outcome: &mut Outcome,
    engine: &'static str,
    name: &str,
    setting: &str,
    mut result: Value,
) -> Result {
    let (speed, mib) = (number(&result, "tok_per_s")?, number(&result, "peak_rss_mib")?);
    println!("{setting}, {name}: {speed:.1} tok/s, peak {mib:.0} MiB");
    figures.entry(name.to_owned()).or_default().push((speed, mib));
    result["way"] = json!(name);
    outcome.runs.push((engine, format!("{setting}, {name}"), result));
    Ok(())
}

/// 6 FLOP per parameter, and what causal attention adds: forward twice the product of half of a T x T
/// matrix with a head, for each of two products, and twice that backward.
fn flop_per_token(case: &Case, params: f64) -> f64 {
    let (layers, width) = case.attention;
    let length: f64 = case.max_length.parse().expect("lengths are numbers");
    6.0 * params + 6.0 * layers * width * length
}

/// GFLOP/s of all threads on operands that never leave registers, in the unit that products of that
/// precision run on.
fn register_peak(s: &Setting<'_>, precision: &str) -> Result<f64> {
    let threads = s.n_threads(2)?.to_string();
    let args = ["run", "--release", "--locked", "--package", "ounce-kernels", "--example"];
    let args = [&args[..], &["kernel_bench", "--", &threads, "no kernel", "--json"]].concat();
    let peaks = json_lines(&capture(&cargo(), &args)?);
    let of = |unit: &str| {
        let found = peaks.iter().find(|p| p["kernel"] == format!("registers only: {unit}"));
        found.and_then(|p| p["gflop_per_s"].as_f64())
    };
    let f32 = of("f32 multiply-adds").ok_or("no register-only peak was measured")?;
    let pairs = of("bf16 pairs").filter(|_| precision == "bf16");
    Ok(pairs.unwrap_or(0.0).max(f32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_of_gpt2_is_three_and_a_quarter_teraflop() {
        let flop = flop_per_token(&GPT2, 124_439_808.0) * 4096.0;
        assert!((flop / 1e12 - 3.29).abs() < 0.01, "{flop}");
    }
}

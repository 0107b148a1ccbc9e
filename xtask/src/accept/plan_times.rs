//! Predicted beside measured time per step, over many plans of one model in two precisions.
//!
//! Budgets go from the smallest that is possible to more than can be used, closer together where they
//! are small. Runs of both precisions alternate, so that a drift of the machine does not look like a
//! mistake of the prediction. Costs come from this machine's file of costs and are measured by the
//! first run where there is none; with `OUNCE_CACHE_DIR` in an empty folder they are measured anew.

use serde_json::{Value, json};

use crate::Result;
use crate::bench::{StepRun, last_object};
use crate::demonstration::{Outcome, Setting, path};
use crate::numbers::{median, mib, number};
use crate::shell::scratch_folder;

/// More than any of these runs can use.
const UNCONSTRAINED: &str = "20GiB";
/// Budgets per precision; some may choose the same plan.
const N_BUDGETS: u32 = 13;
const N_PLANS: usize = 20;

/// A run, and what of it is compared.
struct Point {
    plan_mib: f64,
    predicted_s: f64,
    measured_s: f64,
}

/// `accept plan-times`
pub(crate) fn plan_times(s: &Setting<'_>) -> Result<Outcome> {
    let mut outcome = Outcome { is_kept: true, ..Outcome::default() };
    let folder = scratch_folder("plan-times")?;
    let config = json!({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 8192,
        "n_positions": 512, "n_embd": 512, "n_layer": 4, "n_head": 8,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    });
    let file = folder.join("config.json");
    std::fs::write(&file, config.to_string()).map_err(|e| format!("{}: {e}", file.display()))?;
    let runs: Vec<StepRun<'_>> = match s.precision {
        Some(precision) => vec![step(path(&folder), precision, s)],
        None => ["f32", "bf16"].map(|precision| step(path(&folder), precision, s)).into(),
    };
    let mut budgets = Vec::new();
    for run in &runs {
        budgets.push(budgets_of(s, run)?);
    }
    let mut points: Vec<Vec<Point>> = runs.iter().map(|_| Vec::new()).collect();
    for i in 0..N_BUDGETS as usize {
        for ((run, budgets), points) in runs.iter().zip(&budgets).zip(&mut points) {
            let result = measure(s, run, &budgets[i])?;
            points.push(Point {
                plan_mib: number(&result, "plan_peak_mib")?,
                predicted_s: number(&result, "predicted_step_s")?,
                measured_s: number(&result, "step_s_median")?,
            });
            outcome.runs.push(("ounce", format!("{} in {}", setting(run), budgets[i]), result));
        }
    }
    judge(&mut outcome, &runs, points);
    Ok(outcome)
}

/// A step of 8 rows of 512 tokens.
fn step<'a>(model: &'a str, precision: &'a str, s: &Setting<'a>) -> StepRun<'a> {
    let threads = s.threads;
    StepRun { model, batch_size: "8", max_length: "512", steps: "3", precision, threads }
}

/// The run in words; the model by its size, not by its folder.
fn setting(run: &StepRun<'_>) -> String {
    StepRun { model: "gpt2 4 layers x 512", ..*run }.setting()
}

fn measure(s: &Setting<'_>, run: &StepRun<'_>, memory: &str) -> Result<Value> {
    let args = run.ounce_args(Some(memory));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut result = last_object(&s.ounce(&args)?)?;
    result["model"] = json!("gpt2 4 layers x 512");
    let (predicted, measured) = (&result["predicted_step_s"], &result["step_s_median"]);
    println!("{} {memory}: predicted {predicted} s, measured {measured} s", run.precision);
    Ok(result)
}

/// From the smallest budget to that of the unconstrained plan.
fn budgets_of(s: &Setting<'_>, run: &StepRun<'_>) -> Result<Vec<String>> {
    let largest = number(&measure(s, run, UNCONSTRAINED)?, "plan_peak_mib")?;
    let smallest = run.smallest(s)?;
    let (from, last) = (mib(&smallest)?, f64::from(N_BUDGETS - 1));
    let between = |i: u32| from + (largest - from) * (f64::from(i) / last).powi(2);
    let rest = (1..N_BUDGETS).map(|i| format!("{:.0}MiB", between(i).ceil()));
    Ok(std::iter::once(smallest).chain(rest).collect())
}

fn judge(outcome: &mut Outcome, runs: &[StepRun<'_>], points: Vec<Vec<Point>>) {
    let mut errors = Vec::new();
    for (run, mut points) in runs.iter().zip(points) {
        points.sort_by(|a, b| a.plan_mib.total_cmp(&b.plan_mib));
        points.dedup_by(|a, b| a.plan_mib == b.plan_mib && a.predicted_s == b.predicted_s);
        let predicted: Vec<f64> = points.iter().map(|p| p.predicted_s).collect();
        let measured: Vec<f64> = points.iter().map(|p| p.measured_s).collect();
        let correlation = rank_correlation(&predicted, &measured);
        let what = format!(
            "{}: rank correlation of prediction and measurement {correlation:.3} over {} plans, \
             at least 0.9",
            run.precision,
            points.len(),
        );
        outcome.claim(correlation >= 0.9, what);
        errors.extend(points.iter().map(|p| 100.0 * (p.predicted_s / p.measured_s - 1.0)));
    }
    let n_plans = errors.len();
    let range = errors.iter().fold((f64::MAX, f64::MIN), |r, &e| (r.0.min(e), r.1.max(e)));
    let middle = median(errors.iter().map(|e| e.abs()).collect());
    let what = format!(
        "median error of the prediction {middle:.1} % over {n_plans} plans ({:+.1} to {:+.1} %), \
         at most 10 % over at least {N_PLANS}",
        range.0, range.1,
    );
    outcome.claim(middle <= 10.0 && n_plans >= N_PLANS, what);
}

/// Spearman's: 1 where both order the same, -1 where they are opposed.
fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    let ranks = |x: &[f64]| -> Vec<f64> {
        x.iter().map(|v| x.iter().filter(|w| *w < v).count() as f64).collect()
    };
    let (a, b) = (ranks(a), ranks(b));
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (mean_a, mean_b) = (mean(&a), mean(&b));
    let dot = |x: &[f64], m: f64, y: &[f64], n: f64| -> f64 {
        x.iter().zip(y).map(|(x, y)| (x - m) * (y - n)).sum()
    };
    let spread = dot(&a, mean_a, &a, mean_a) * dot(&b, mean_b, &b, mean_b);
    dot(&a, mean_a, &b, mean_b) / spread.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_correlate_by_order_alone() {
        assert!((rank_correlation(&[1.0, 2.0, 10.0], &[5.0, 6.0, 6.5]) - 1.0).abs() < 1e-12);
        assert!((rank_correlation(&[1.0, 2.0, 10.0], &[9.0, 6.0, 1.0]) + 1.0).abs() < 1e-12);
        assert!((rank_correlation(&[1.0, 2.0, 3.0], &[2.0, 1.0, 3.0]) - 0.5).abs() < 1e-12);
    }
}

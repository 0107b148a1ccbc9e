//! Precision and budget together: GPT-2 124M, 4 x 1,024, in f32 and bf16, each with everything kept, in
//! three quarters and in half of what f32 takes with everything kept (bf16 also in 45 %), and in its
//! smallest budget.

use serde_json::{Value, json};

use crate::Result;
use crate::bench::{StepRun, last_object};
use crate::demonstration::{Outcome, Setting};
use crate::numbers::{mib, number};

/// More than any of these runs can use.
const PLENTY: &str = "20GiB";

/// `accept grid`
pub(crate) fn grid(s: &Setting<'_>) -> Result<Outcome> {
    let mut outcome = Outcome { is_kept: true, ..Outcome::default() };
    let run = |precision| StepRun {
        model: "gpt2",
        batch_size: "4",
        max_length: "1024",
        steps: "3",
        precision,
        threads: s.threads,
    };
    let all = measure(s, &run("f32"), &mut outcome, PLENTY, true)?;
    let kept_mib = number(&all, "plan_peak_mib")?;
    let share = |share: f64| format!("{:.0}MiB", kept_mib * share);
    let mut halved = None;
    for precision in ["f32", "bf16"] {
        let run = run(precision);
        let first = if precision == "f32" {
            all.clone()
        } else {
            measure(s, &run, &mut outcome, PLENTY, true)?
        };
        // Below half of it lies what is claimed of both together.
        let below_half = (precision == "bf16").then(|| share(0.45));
        let budgets = [share(0.75), share(0.5)].into_iter().chain(below_half.clone());
        for budget in budgets.chain([run.smallest(s)?]) {
            let result = measure(s, &run, &mut outcome, &budget, false)?;
            let same = result["losses"] == first["losses"];
            outcome.claim(same, format!("{precision} in {budget}: losses are those of keep-all"));
            let peak = number(&result, "peak_rss_mib")?;
            let fits = peak <= mib(&budget)?;
            outcome.claim(fits, format!("{precision} in {budget}: peak {peak:.1} MiB"));
            if below_half.as_ref() == Some(&budget) {
                halved = Some(result);
            }
        }
    }
    let halved = halved.expect("the budgets of bf16 have one below half of f32's among them");
    let (fast, peak) = (number(&halved, "tok_per_s")?, number(&halved, "peak_rss_mib")?);
    let (slow, full) = (number(&all, "tok_per_s")?, number(&all, "peak_rss_mib")?);
    let what = format!(
        "bf16 in 45 % of it: {fast:.1} tok/s in {peak:.0} MiB; f32 with everything kept: {slow:.1} in \
         {full:.0}: more than 50 % less at no loss of speed"
    );
    outcome.claim(fast >= slow && peak < 0.5 * full, what);
    Ok(outcome)
}

fn measure(
    s: &Setting<'_>,
    run: &StepRun<'_>,
    outcome: &mut Outcome,
    memory: &str,
    keeps_all: bool,
) -> Result<Value> {
    let mut args = run.ounce_args(Some(memory));
    args.extend(keeps_all.then(|| "--fastest".to_owned()));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut result = last_object(&s.ounce(&args)?)?;
    result["budget_mib"] = json!(mib(memory)?);
    let (speed, peak) = (number(&result, "tok_per_s")?, number(&result, "peak_rss_mib")?);
    let last = result["losses"].as_array().and_then(|l| l.last()).unwrap_or(&Value::Null);
    let what = if keeps_all { "everything kept" } else { memory };
    println!("{} {what}: {speed:.1} tok/s, peak {peak:.1} MiB, last loss {last}", run.precision);
    outcome.runs.push(("ounce", format!("{}, {what}", run.setting()), result.clone()));
    Ok(result)
}

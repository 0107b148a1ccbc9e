//! GPT-2 124M from unconstrained to the smallest budget: the same losses, overhead as predicted, peaks
//! within the budget, survival in a memory cgroup of that size.
//!
//! Unconstrained is the run that keeps everything (`--fastest`): what is recomputed for less than a few
//! per cent of time in a plan without that flag depends on what ops cost in the hour.
//!
//! Machines are shared and drift. So rounds run every budget once, one after another; the overhead of
//! a budget is its time relative to the unconstrained run of the same round, median over the rounds. That
//! of the fastest steps of all rounds, which is what a plan predicts, is printed beside it.

use serde_json::{Value, json};

use crate::Result;
use crate::bench::{StepRun, last_object};
use crate::cgroup::Cgroup;
use crate::demonstration::{Outcome, Setting};
use crate::numbers::{MIB, median, mib, number};

/// More than any of these runs can use.
const UNCONSTRAINED: &str = "20GiB";

/// `accept gpt2-budgets`
pub(crate) fn gpt2_budgets(s: &Setting<'_>) -> Result<Outcome> {
    let mut outcome = Outcome { is_kept: true, ..Outcome::default() };
    let precision = s.precision.unwrap_or("f32");
    let (batch_size, max_length) = ("4", "1024");
    let run = StepRun {
        model: "gpt2",
        batch_size,
        max_length,
        steps: "2",
        precision,
        threads: s.threads,
    };
    let free = measure(s, &run, &mut outcome, UNCONSTRAINED)?;
    let budgets = budgets(s, &run, number(&free, "plan_peak_mib")?)?;
    // By budget, the unconstrained one first: a result per round.
    let mut results: Vec<Vec<Value>> = vec![Vec::new(); 1 + budgets.len()];
    for round in 0..s.times.unwrap_or(3) {
        results[0].push(if round == 0 {
            free.clone()
        } else {
            measure(s, &run, &mut outcome, UNCONSTRAINED)?
        });
        for (memory, of_budget) in budgets.iter().zip(&mut results[1..]) {
            of_budget.push(measure(s, &run, &mut outcome, memory)?);
        }
    }
    let (free, tight) = results.split_first().expect("the unconstrained runs come first");
    for (memory, tight) in budgets.iter().zip(tight) {
        judge(&mut outcome, memory, free, tight)?;
    }
    let smallest = mib(budgets.last().expect("the smallest comes last"))?;
    outcome.claim(
        smallest <= 1.9 * 1024.0,
        format!("smallest budget {smallest:.0} MiB, at most 1,946"),
    );
    if let Some(python) = s.python {
        let peer = run.peer(python, "eager")?;
        let ours = median_of(free, "tok_per_s")?;
        let theirs = number(&peer, "tok_per_s")?;
        outcome.runs.push(("torch", run.setting(), peer));
        outcome
            .claim(ours >= theirs, format!("{ours:.1} tok/s unconstrained, PyTorch {theirs:.1}"));
    } else {
        println!("speed is not judged against PyTorch: no --python with torch was given");
    }
    Ok(outcome)
}

/// 75 and 55 % of what the unconstrained run takes, tighter ones that its precision makes possible, the smallest.
fn budgets(s: &Setting<'_>, run: &StepRun<'_>, unconstrained_mib: f64) -> Result<Vec<String>> {
    let share = |share: f64| format!("{:.0}MiB", unconstrained_mib * share);
    let tighter = match run.precision {
        "f32" => vec![share(0.45)],
        _ => vec!["2252MiB".to_owned(), "1945MiB".to_owned()],
    };
    let mut budgets = [vec![share(0.75), share(0.55)], tighter].concat();
    budgets.push(run.smallest(s)?);
    Ok(budgets)
}

/// The claims on one budget, from its runs and the unconstrained ones of the same rounds.
fn judge(outcome: &mut Outcome, memory: &str, free: &[Value], tight: &[Value]) -> Result {
    let same = tight.iter().chain(free).all(|r| r["losses"] == free[0]["losses"]);
    outcome.claim(same, format!("{memory}: losses {} are those unconstrained", tight[0]["losses"]));
    let overheads = |key: &str| -> Result<Vec<f64>> {
        let pairs = tight.iter().zip(free);
        pairs.map(|(t, f)| Ok(overhead(number(t, key)?, number(f, key)?))).collect()
    };
    let rounds = overheads("step_s_median")?;
    let shown: Vec<String> = rounds.iter().map(|x| format!("{x:.1}")).collect();
    let measured = median(rounds);
    let predicted = median(overheads("predicted_step_s")?);
    let undisturbed = overhead(fastest_step(tight)?, fastest_step(free)?);
    let what = format!(
        "{memory}: overhead {measured:.1} % (rounds: {}; fastest steps of all rounds {undisturbed:.1} %), \
         predicted {predicted:.1} %, within 5 points",
        shown.join(", ")
    );
    outcome.claim((measured - predicted).abs() <= 5.0, what);
    let budget = mib(memory)?;
    let plan = number(&tight[0], "plan_peak_mib")?;
    let peaks: Result<Vec<f64>> = tight.iter().map(|r| number(r, "peak_rss_mib")).collect();
    let peak = peaks?.into_iter().fold(0.0, f64::max);
    outcome.claim(peak <= budget, format!("{memory}: peak {peak:.1} MiB within the budget"));
    let slack = 100.0 * (plan - peak) / budget;
    outcome.claim(slack < 3.0, format!("{memory}: slack {slack:.2} % of the budget, under 3 %"));
    Ok(())
}

/// Per cent that `tight_s` is above `free_s`.
fn overhead(tight_s: f64, free_s: f64) -> f64 {
    100.0 * (tight_s / free_s - 1.0)
}

/// Seconds of the fastest step of all these runs.
fn fastest_step(results: &[Value]) -> Result<f64> {
    let steps = results.iter().filter_map(|r| r["step_s_all"].as_array()).flatten();
    let fastest = steps.filter_map(Value::as_f64).reduce(f64::min);
    fastest.ok_or_else(|| "no step was measured".to_owned())
}

fn median_of(results: &[Value], key: &str) -> Result<f64> {
    let numbers: Result<Vec<f64>> = results.iter().map(|r| number(r, key)).collect();
    Ok(median(numbers?))
}

/// Runs one budget, in a memory cgroup of exactly its size where one can be made.
fn measure(
    s: &Setting<'_>,
    run: &StepRun<'_>,
    outcome: &mut Outcome,
    memory: &str,
) -> Result<Value> {
    let args = run.ounce_args(Some(memory));
    let fastest = (memory == UNCONSTRAINED).then_some("--fastest");
    let args: Vec<&str> = args.iter().map(String::as_str).chain(fastest).collect();
    let text = if let Some(group) = Cgroup::new((mib(memory)? * MIB) as u64) {
        let done = group.run(&s.binary, &args)?;
        if memory != UNCONSTRAINED {
            let what = format!("{memory}: survives a memory cgroup of that size");
            outcome.claim(done.status.success(), what);
        }
        String::from_utf8_lossy(&done.stdout).into_owned()
    } else {
        println!("{memory}: no memory cgroup could be made; survival in one is not judged");
        s.ounce(&args)?
    };
    let mut result = last_object(&text)?;
    result["budget_mib"] = json!(mib(memory)?);
    println!("{memory}: {} tok/s, peak {} MiB", result["tok_per_s"], result["peak_rss_mib"]);
    outcome.runs.push(("ounce", format!("{} in {memory}", run.setting()), result.clone()));
    Ok(result)
}

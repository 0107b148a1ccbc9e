//! Demonstrations: each runs the release binary as a user would, reads its JSON lines, and judges
//! claims. What was measured and whether the claims held is kept under `bench/runs`.
//!
//! To add one: a function that returns claims and results, and a line in [`DEMONSTRATIONS`].

mod budgets;
mod cgroup_runs;
mod finetuning;
mod fuzzing;
mod grid;
mod killed;
pub(crate) mod nanogpt;
mod plan_times;
mod smoke;
mod smollm2;
mod speed;
mod tokenising;

use serde_json::{Value, json};

use crate::Result;
use crate::demonstration::{Outcome, Setting, whole};
use crate::record::{Record, keep};
use crate::shell::{flag, release_binary};

const FLAGS: &[&str] = &[
    "--python",
    "--threads",
    "--times",
    "--seed",
    "--precision",
    "--model",
    "--gguf",
    "--data",
    "--llama-python",
];

/// Name, what it shows, and the function.
type Demonstration = (&'static str, &'static str, fn(&Setting<'_>) -> Result<Outcome>);

const DEMONSTRATIONS: &[Demonstration] = &[
    ("smoke", "init, plan, train, eval and generate in a small budget, in seconds", smoke::smoke),
    (
        "nanogpt",
        "nanoGPT's CPU recipe on tinyshakespeare in 48 MiB: loss and time",
        nanogpt::nanogpt,
    ),
    (
        "gpt2-budgets",
        "GPT-2 124M, 4 x 1024, from unconstrained to the smallest budget",
        budgets::gpt2_budgets,
    ),
    (
        "speed",
        "training steps of three models beside PyTorch: speed, memory, share of the peak",
        speed::speed,
    ),
    ("grid", "GPT-2 124M in f32 and bf16, from everything kept to the smallest budget", grid::grid),
    (
        "plan-times",
        "predicted and measured time of many plans of a small GPT-2",
        plan_times::plan_times,
    ),
    ("killed", "kill -9 at random moments of a run that saves, then the same bits", killed::killed),
    (
        "smollm2",
        "SmolLM2-135M-Instruct as GGUF: loss and tokens as in other engines",
        smollm2::smollm2,
    ),
    (
        "finetuning",
        "SmolLM2-135M on GSM8K in bf16, in 2 GiB, and the result elsewhere",
        finetuning::finetuning,
    ),
    (
        "tokenising",
        "JSONL of growing length: peak, throughput, ids of the peer",
        tokenising::tokenising,
    ),
    ("fuzzing", "every parser on damaged files, an hour of processor time each", fuzzing::fuzzing),
    (
        "cgroup-runs",
        "random models in memory cgroups of their budgets' sizes",
        cgroup_runs::cgroup_runs,
    ),
];

/// `cargo xtask accept NAME`
pub(crate) fn accept(args: &[&str]) -> Result {
    let Some((name, flags)) = args.split_first() else {
        for (name, what, _) in DEMONSTRATIONS {
            println!("{name:<14} {what}");
        }
        return Ok(());
    };
    let found = DEMONSTRATIONS.iter().find(|(n, _, _)| n == name);
    let (_, what, run) = found.ok_or_else(|| format!("no demonstration is called {name}"))?;
    let setting = Setting {
        python: flag(flags, "--python", FLAGS)?,
        threads: flag(flags, "--threads", FLAGS)?,
        precision: flag(flags, "--precision", FLAGS)?,
        times: whole(flag(flags, "--times", FLAGS)?)?,
        seed: whole(flag(flags, "--seed", FLAGS)?)?,
        model: flag(flags, "--model", FLAGS)?,
        gguf: flag(flags, "--gguf", FLAGS)?,
        data: flag(flags, "--data", FLAGS)?,
        llama_python: flag(flags, "--llama-python", FLAGS)?,
        binary: release_binary()?,
    };
    println!("{name}: {what}");
    let mut outcome = run(&setting)?;
    let broken: Vec<&str> =
        outcome.claims.iter().filter(|(_, holds)| !holds).map(|(what, _)| what.as_str()).collect();
    let verdict =
        format!("{} of {} claims", outcome.claims.len() - broken.len(), outcome.claims.len());
    if outcome.is_kept {
        let claims: Vec<Value> = outcome
            .claims
            .iter()
            .map(|(what, holds)| json!({"what": what, "holds": holds}))
            .collect();
        let judged = json!({"verdict": verdict, "claims": claims});
        outcome.runs.push(("ounce", (*what).to_owned(), judged));
        let label = format!("accept {name}");
        let records: Vec<Record<'_>> = outcome
            .runs
            .iter()
            .map(|(engine, setting, result)| Record { what: &label, engine, setting, result })
            .collect();
        keep(&records)?;
    }
    println!("{name}: {verdict} hold");
    if broken.is_empty() { Ok(()) } else { Err(format!("does not hold: {}", broken.join("; "))) }
}

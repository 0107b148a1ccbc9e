//! `accept smoke`: a tiny model through every command, in seconds; CI runs it.

use crate::Result;
use crate::bench::last_object;
use crate::demonstration::{Outcome, Setting, path, shakespeare};
use crate::numbers::{MIB, mib, number, smallest_budget};
use crate::shell::{json_lines, output, scratch_folder};

/// A tiny model through every command. Seconds; part of CI.
pub(crate) fn smoke(s: &Setting<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let folder = scratch_folder("accept-smoke")?;
    let (train, validation) = shakespeare(&folder)?;
    let (fresh, trained) = (folder.join("fresh"), folder.join("trained"));
    let sizes =
        ["--n-layers", "2", "--n-heads", "2", "--hidden-size", "64", "--context-length", "64"];
    let init = ["init", "--arch", "gpt2", "--tokenizer", "char", "--data", path(&train)];
    s.ounce(&[&init[..], &sizes, &["--output-dir", path(&fresh)]].concat())?;
    let recipe = ["--model", path(&fresh), "--data", path(&train), "--max-length", "64"];
    let budget = ["--per-device-train-batch-size", "8", "--memory", "64MiB", "--json"];
    let recipe = [&recipe[..], &budget].concat();

    let plan = last_object(&s.ounce(&[&["plan"], &recipe[..]].concat())?)?;
    let planned = number(&plan, "peak_bytes")?;
    outcome.claim(planned <= 64.0 * MIB, format!("planned peak {:.1} MiB of 64", planned / MIB));

    let more = ["--eval-data", path(&validation), "--output-dir", path(&trained)];
    let steps = ["--max-steps", "40", "--learning-rate", "1e-3", "--lr-scheduler-type", "constant"];
    let lines = json_lines(&s.ounce(&[&["train"], &recipe[..], &more, &steps].concat())?);
    let losses: Vec<f64> = lines.iter().filter_map(|l| l["loss"].as_f64()).collect();
    let (first, last) = (losses.first().copied().unwrap_or(0.0), losses.last().copied());
    let last = last.unwrap_or(f64::INFINITY);
    outcome.claim(losses.len() == 40, format!("{} of 40 steps printed", losses.len()));
    outcome.claim(last < first - 0.5, format!("loss falls from {first:.3} to {last:.3}"));
    let done = lines.last().ok_or("train printed nothing")?;
    let peak = number(done, "rss_peak_bytes")?;
    outcome.claim(peak <= 64.0 * MIB, format!("measured peak {:.1} MiB of 64", peak / MIB));

    let eval =
        ["eval", "--model", path(&trained), "--data", path(&validation), "--max-length", "64"];
    let eval = last_object(&s.ounce(&[&eval[..], &["--json"]].concat())?)?;
    let (said, found) = (number(done, "eval_loss")?, number(&eval, "loss")?);
    outcome.claim(said == found, format!("train says eval loss {said}, eval says {found}"));

    let prompt = ["--prompt", "ROMEO:", "--temperature", "0", "--max-new-tokens", "20"];
    let text = s.ounce(&[&["generate", "--model", path(&trained)], &prompt[..]].concat())?;
    let chars = text.strip_suffix('\n').unwrap_or(&text).chars().count();
    outcome.claim(chars == 20, format!("a continuation of {chars} characters, 20 asked for"));
    let doctor = last_object(&s.ounce(&["doctor", "--json"])?)?;
    let speeds: Vec<f64> = doctor["models"]
        .as_array()
        .map(|models| models.iter().filter_map(|m| m["tokens_per_s"].as_f64()).collect())
        .unwrap_or_default();
    let what = format!("doctor expects {speeds:.0?} tokens/s of known models");
    outcome.claim(!speeds.is_empty() && speeds.iter().all(|&x| x > 0.0), what);
    smoke_smallest(s, &mut outcome, &[&recipe[..6], &recipe[6..8], &steps[2..]].concat(), &losses)?;
    Ok(outcome)
}

/// A far too small budget is refused with the smallest feasible one; that very figure works, and
/// gives the same losses on one thread.
fn smoke_smallest(s: &Setting<'_>, o: &mut Outcome, recipe: &[&str], losses: &[f64]) -> Result {
    let folder = scratch_folder("accept-smoke-smallest")?;
    let steps = ["--max-steps", "5", "--output-dir", path(&folder), "--json"];
    let train = [&["train"], recipe, &steps].concat();
    let refused = output(&s.binary, &[&train[..], &["--memory", "1MiB"]].concat())?;
    let code = refused.status.code();
    o.claim(code == Some(3), format!("a budget of 1 MiB exits with {code:?}, 3 is right"));
    let stderr = String::from_utf8_lossy(&refused.stderr);
    let Some(smallest) = smallest_budget(&stderr) else {
        o.claim(false, format!("the smallest feasible budget is told in {stderr:?}"));
        return Ok(());
    };
    let lines = s.ounce(&[&train[..], &["--memory", &smallest, "--threads", "1"]].concat())?;
    let lines = json_lines(&lines);
    let tight: Vec<f64> = lines.iter().filter_map(|l| l["loss"].as_f64()).collect();
    let same = tight.len() == 5 && losses.starts_with(&tight);
    o.claim(same, format!("{smallest} on one thread: the same losses, {tight:?}"));
    let peak = number(lines.last().ok_or("train printed nothing")?, "rss_peak_bytes")? / MIB;
    o.claim(peak <= mib(&smallest)?, format!("{smallest}: measured peak {peak:.2} MiB"));
    Ok(())
}

//! The demonstration `tokenising`: JSONL of growing length through the tokenizing child.
//!
//! Claims: the same peak at every length; with a Python that has `tokenizers`, the same ids as its, at no
//! less than 60 % of its throughput on as many threads. The throughput of the peer is that of encoding
//! alone, without reading or writing; Ounce's is that of the whole child. Judged is the clock, by the best
//! of a few rounds; text per second of processor time, which other programs disturb less, is kept beside it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};

use crate::Result;
use crate::bench::last_object;
use crate::demonstration::{Outcome, Setting, path, shakespeare};
use crate::numbers::{MIB, number};
use crate::random::Random;
use crate::shell::{capture, scratch_folder};

/// Lengths of the files. `--times N` adds one of N MB.
const LENGTHS_MB: [u64; 2] = [10, 100];

/// The demonstration.
pub(crate) fn tokenising(s: &Setting<'_>) -> Result<Outcome> {
    let mut outcome = Outcome { is_kept: s.python.is_some(), ..Outcome::default() };
    let folder = scratch_folder("accept-tokenising")?;
    let (train, _) = shakespeare(&folder)?;
    let model = folder.join("model");
    let sizes = ["--n-layers", "1", "--hidden-size", "32", "--output-dir", path(&model)];
    let bpe = ["init", "--arch", "gpt2", "--tokenizer", "bpe", "--vocab-size", "8192"];
    s.ounce(&[&bpe[..], &["--data", path(&train)], &sizes].concat())?;
    let text = std::fs::read_to_string(&train).map_err(|e| format!("{}: {e}", train.display()))?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let n_threads = s.n_threads(cores)?;
    let mut peaks = Vec::new();
    for length_mb in LENGTHS_MB.into_iter().chain(s.times) {
        let rows = folder.join(format!("rows-{length_mb}.jsonl"));
        write_rows(&rows, &text, length_mb * 1_000_000)?;
        let n_rounds = if length_mb == LENGTHS_MB[0] { 5 } else { 1 };
        let mut shares = Vec::new();
        for _ in 0..n_rounds {
            let run = tokenize(s, &folder, &model, &rows, n_threads)?;
            peaks.push(run.peak_mib);
            let rate = |seconds: f64| length_mb as f64 / seconds;
            let mut result = json!({
                "mb_per_s": rate(run.seconds), "mb_per_cpu_s": rate(run.cpu_s),
                "peak_rss_mib": run.peak_mib,
            });
            if let Some(python) = s.python {
                let tokenizer = model.join("tokenizer.json");
                let script = "bench/peer_tokenizers.py";
                let threads = n_threads.to_string();
                let args = [script, path(&tokenizer), path(&rows), path(&run.token_file), &threads];
                let peer = last_object(&capture(python, &args)?)?;
                let same = peer["same"] == Value::Bool(true);
                let ids = &peer["ids"];
                outcome.claim(same, format!("{length_mb} MB: the {ids} ids are those of the peer"));
                let seconds = number(&peer, "seconds")?;
                shares.push(100.0 * seconds / run.seconds);
                result["peer_mb_per_s"] = json!(rate(seconds));
                result["peer_mb_per_cpu_s"] = json!(rate(number(&peer, "cpu_s")?));
            }
            println!("{length_mb} MB: {result}");
            outcome.runs.push(("ounce", format!("{length_mb} MB, {n_threads} threads"), result));
        }
        if s.python.is_some() {
            let share = shares.iter().copied().fold(0.0, f64::max);
            outcome.claim(
                share >= 60.0,
                format!("{length_mb} MB: {share:.0} % of the peer's throughput, at least 60"),
            );
        }
        std::fs::remove_file(&rows).map_err(|e| format!("{}: {e}", rows.display()))?;
    }
    let least = peaks.iter().copied().fold(f64::INFINITY, f64::min);
    let most = peaks.iter().copied().fold(0.0, f64::max);
    outcome.claim(most <= 1.1 * least, format!("peak {least:.1} to {most:.1} MiB at every length"));
    Ok(outcome)
}

/// One run of the child.
struct Run {
    token_file: PathBuf,
    seconds: f64,
    /// Of processor time, all threads together.
    cpu_s: f64,
    peak_mib: f64,
}

/// Starts the child as a training run does, with an empty cache.
fn tokenize(
    s: &Setting<'_>,
    folder: &Path,
    model: &Path,
    rows: &Path,
    n_threads: usize,
) -> Result<Run> {
    let cache = folder.join("cache");
    if cache.exists() {
        std::fs::remove_dir_all(&cache).map_err(|e| format!("{}: {e}", cache.display()))?;
    }
    let how = json!({
        "format": null, "columns": [], "skips_bad_rows": false, "max_length": 0,
        "row_bytes": 1 << 20,
    });
    let request = json!({ "kind": "tokenize", "request": {
        "tokenizer": model, "cache_dir": cache, "streams": [[rows]], "prompt": null, "rows": how,
        "n_threads": n_threads, "now_s": 0,
    } });
    let (start, start_cpu_s) = (Instant::now(), children_cpu_s()?);
    let mut command = Command::new(&s.binary);
    command.arg("__tokenize").stdin(Stdio::piped()).stdout(Stdio::piped());
    let failed = |e| format!("the tokenizing child: {e}");
    let mut child = command.spawn().map_err(failed)?;
    let mut stdin = child.stdin.take().ok_or("a child without input")?;
    stdin.write_all(request.to_string().as_bytes()).map_err(failed)?;
    drop(stdin);
    let output = child.wait_with_output().map_err(failed)?;
    let seconds = start.elapsed().as_secs_f64();
    let said = last_object(&String::from_utf8_lossy(&output.stdout))?;
    let done = &said["Done"];
    let token_file = done["token_files"][0].as_str().ok_or_else(|| format!("it said {said}"))?;
    Ok(Run {
        token_file: token_file.into(),
        seconds,
        cpu_s: children_cpu_s()? - start_cpu_s,
        peak_mib: number(done, "rss_peak_bytes")? / MIB,
    })
}

/// Processor time of all children that have ended.
fn children_cpu_s() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").map_err(|e| e.to_string())?;
    // After the name, which may hold anything, in ticks of which Linux tells 100 per second.
    let (_, fields) = stat.rsplit_once(')').ok_or("no name in /proc/self/stat")?;
    let ticks = fields.split_whitespace().skip(13).take(2);
    let ticks = ticks.map(|n| n.parse::<f64>().map_err(|e| e.to_string()));
    Ok(ticks.sum::<Result<f64>>()? / 100.0)
}

/// Rows of random parts of `text`, each with a number that no other row has.
fn write_rows(file: &Path, text: &str, n_bytes: u64) -> Result {
    let failed = |e| format!("{}: {e}", file.display());
    let mut out = BufWriter::new(File::create(file).map_err(failed)?);
    let mut random = Random::new(Some(n_bytes));
    let mut written = 0;
    for number in 0_u64.. {
        if written >= n_bytes {
            break;
        }
        let from = (random.share() * (text.len() - 4000) as f64) as usize;
        let to = from + 100 + (random.share() * 3000.0) as usize;
        // A cut inside a character leaves an empty part.
        let part = text.get(from..to).unwrap_or_default();
        let row = json!({ "text": format!("{number}. {part}") }).to_string();
        writeln!(out, "{row}").map_err(failed)?;
        written += row.len() as u64 + 1;
    }
    out.flush().map_err(failed)
}

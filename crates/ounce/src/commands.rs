//! One function per command: flags to settings, a call into `ounce-train`, the result printed.

use std::io::{IsTerminal, Read};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use ounce_train::{
    BenchSettings, DoctorRecord, Error, Family, GenerateSettings, InitSettings, InspectRecord,
    InspectSettings, ModelShape, Optimizer, Precision, Result, Settings, format_bytes,
};

use crate::console::{Console, print_err, print_json, print_out, print_while_read};
use crate::environment::environment;
use crate::export::export;
use crate::flags::{
    BenchFlags, BenchStepFlags, BenchWhat, Command, DataFlags, DataWhat, DoctorFlags,
    GenerateFlags, InitFlags, InspectFlags, PlanFlags, RunFlags,
};

/// Runs a command; `signal` holds the number of a signal that arrived.
pub(crate) fn run(command: Command, signal: &Arc<AtomicUsize>) -> Result<()> {
    match command {
        Command::Init(flags) => init(flags),
        Command::Plan(flags) => plan(&flags),
        Command::Train(flags) => train(&flags, signal),
        Command::Eval(flags) => eval(&flags, signal),
        Command::Generate(flags) => generate(flags, signal),
        Command::Bench(BenchFlags { what: BenchWhat::Step(flags) }) => bench_step(flags, signal),
        Command::Chat(_) => not_built("chat"),
        Command::Serve(_) => not_built("serve"),
        Command::Search(_) => not_built("search"),
        Command::Prune(_) => not_built("prune"),
        Command::Export(flags) => export(flags, signal),
        #[cfg(feature = "hub")]
        Command::Pull(flags) => crate::pull::pull(flags, signal),
        #[cfg(not(feature = "hub"))]
        Command::Pull(_) => not_built("pull"),
        Command::Data(DataFlags { what: DataWhat::Inspect(flags) }) => inspect(&flags),
        Command::Doctor(flags) => doctor(&flags),
        Command::Tokenize => tokenize(),
    }
}

fn not_built(command: &str) -> Result<()> {
    Err(Error::NotBuilt { what: format!("`ounce {command}`") })
}

fn settings(flags: &RunFlags) -> Result<Settings> {
    Settings::resolve(flags.config.as_deref(), &flags.given()?)
}

fn init(flags: InitFlags) -> Result<()> {
    if let Some(flag) = flags.first_size().filter(|_| flags.config.is_some()) {
        return Err(Error::Usage {
            message: format!("`{flag}`: with `--config` the sizes are those of the file"),
            hint: "change the file, or give `--arch` instead of it".to_owned(),
        });
    }
    if flags.config.is_none() && flags.arch.is_none() {
        return Err(Error::Usage {
            message: "neither `--arch` nor `--config` is given".to_owned(),
            hint: "give `--arch gpt2` with sizes (`ounce init --help`), or `--config config.json`"
                .to_owned(),
        });
    }
    let asked = flags.vocab_size;
    let model = match (flags.config, flags.arch.as_deref()) {
        (Some(path), _) => ModelShape::Config(path),
        (None, arch) => ModelShape::Sizes {
            family: arch.and_then(Family::from_name).unwrap_or(Family::Llama),
            n_layers: flags.n_layers.unwrap_or(4),
            n_heads: flags.n_heads.unwrap_or(4),
            n_kv_heads: flags.n_kv_heads,
            hidden_size: flags.hidden_size.unwrap_or(128),
            intermediate_size: flags.intermediate_size,
            context_length: flags.context_length.unwrap_or(256),
        },
    };
    let record = ounce_train::init(&InitSettings {
        output_dir: flags.output_dir,
        model,
        tokenizer: flags.tokenizer,
        vocab_size: flags.vocab_size,
        data: flags.data,
        seed: flags.seed,
    })?;
    if let Some(asked) = asked.filter(|asked| *asked > record.vocab_size) {
        let found = record.vocab_size;
        print_err(&format!("warning: the text has {found} different tokens, fewer than {asked}\n"));
    }
    if flags.json {
        print_json(&record);
    } else {
        print_out(&format!(
            "{}: {} parameters, vocabulary of {}, context of {} tokens\n",
            record.output_dir.display(),
            record.n_params,
            record.vocab_size,
            record.context_length
        ));
    }
    Ok(())
}

fn plan(flags: &PlanFlags) -> Result<()> {
    let settings = settings(&flags.run)?;
    if flags.explain.is_some() {
        let rows = ounce_train::explain_precision(&settings, &environment()?)?;
        if flags.run.json {
            rows.iter().for_each(print_json);
        } else {
            let precision = settings.precision.unwrap_or_default();
            print_out(&ounce_train::precision_table(precision, &rows));
        }
        return Ok(());
    }
    let record = ounce_train::plan(&settings, &environment()?)?;
    if flags.run.json {
        print_json(&record);
    } else {
        print_out(&format!("{}\n", record.table.trim_end()));
        record.warnings.iter().for_each(|warning| print_err(&format!("{warning}\n")));
    }
    Ok(())
}

fn train(flags: &RunFlags, signal: &Arc<AtomicUsize>) -> Result<()> {
    let settings = settings(flags)?;
    let mut console = Console::new(flags.json, settings.logging_steps, signal.clone());
    let done = ounce_train::train(&settings, &environment()?, &mut console)?;
    if flags.json {
        print_json(&done);
    } else {
        let eval = done.eval_loss.map_or_else(String::new, |l| format!(", eval loss {l:.4}"));
        print_err(&format!(
            "done: {} steps, {:.0} tok/s, peak {} of {}{eval}\n",
            done.steps,
            done.tokens_per_s,
            format_bytes(done.rss_peak_bytes),
            format_bytes(done.budget_bytes)
        ));
        if let Some(dir) = &settings.output_dir {
            print_err(&format!("the model is in {}\n", dir.display()));
        }
    }
    Ok(())
}

fn eval(flags: &RunFlags, signal: &Arc<AtomicUsize>) -> Result<()> {
    let mut settings = settings(flags)?;
    // A flag wins over both kinds of data of a file of settings.
    if flags.names_data_only() {
        settings.eval_data.clear();
    } else if flags.names_both() {
        print_err("note: `--eval-data` is evaluated, `--data` is not\n");
    }
    let mut console = Console::new(flags.json, None, signal.clone());
    let record = ounce_train::evaluate(&settings, &environment()?, &mut console)?;
    if flags.json {
        print_json(&record);
    } else {
        print_out(&format!(
            "loss {:.4}  perplexity {:.3}  over {} predictions\n",
            record.loss, record.perplexity, record.tokens
        ));
    }
    Ok(())
}

fn generate(flags: GenerateFlags, signal: &Arc<AtomicUsize>) -> Result<()> {
    let settings = settings(&flags.run)?;
    let wanted = GenerateSettings {
        prompt: flags.prompt,
        temperature: flags.temperature,
        max_new_tokens: flags.max_new_tokens,
    };
    let json = flags.run.json;
    let mut console = Console::new(json, None, signal.clone());
    let mut print = |text: &str| {
        if json { ControlFlow::Continue(()) } else { print_while_read(text) }
    };
    let record =
        ounce_train::generate(&settings, &wanted, &environment()?, &mut console, &mut print)?;
    if json {
        print_json(&record);
    } else {
        print_out("\n");
    }
    Ok(())
}

fn bench_step(flags: BenchStepFlags, signal: &Arc<AtomicUsize>) -> Result<()> {
    let wanted = BenchSettings {
        model: flags.model,
        n_rows: flags.batch_size,
        max_length: flags.max_length,
        n_steps: flags.steps,
        n_warmup_steps: flags.warmup,
        memory: flags.memory,
        threads: flags.threads,
        seed: flags.seed,
        precision: Precision::from_name(&flags.precision).unwrap_or_default(),
        optimizer: if flags.optimizer == "sgd" { Optimizer::Sgd } else { Optimizer::Adamw },
        learning_rate: flags.learning_rate,
        max_grad_norm: flags.max_grad_norm,
        profile: flags.profile,
        fastest: flags.fastest,
    };
    let mut console = Console::new(flags.json, Some(1), signal.clone());
    let record = ounce_train::bench_step(&wanted, &environment()?, &mut console)?;
    if flags.json {
        print_json(&record);
    } else {
        print_out(&format!(
            "{:.1} tokens/s, {:.4} s per step (predicted {:.4}), peak {:.1} MiB (planned {:.1})\n",
            record.tok_per_s,
            record.step_s_median,
            record.predicted_step_s,
            record.peak_rss_mib,
            record.plan_peak_mib
        ));
    }
    if let Some(profile) = &record.profile {
        print_err(&profile.table());
    }
    Ok(())
}

fn inspect(flags: &InspectFlags) -> Result<()> {
    let settings = settings(&flags.run)?;
    let wanted = InspectSettings { files: flags.files.clone(), n_samples: flags.samples };
    let record = ounce_train::inspect(&settings, &wanted, &environment()?)?;
    if flags.run.json {
        for file in &record.files {
            print_json(file);
        }
    } else {
        print_out(&inspect_text(&record, std::io::stdout().is_terminal()));
    }
    Ok(())
}

/// What was found in data files, for people; supervised tokens in colour, or in brackets where there is none.
fn inspect_text(record: &InspectRecord, has_colours: bool) -> String {
    let mut lines = record.remarks.clone();
    let (begin, end) = if has_colours { ("\x1b[30;42m", "\x1b[0m") } else { ("[", "]") };
    for file in &record.files {
        lines.push(String::new());
        lines.extend(file.lines.iter().cloned());
        lines.extend(length_bars(&file.histogram));
        for (i, tokens) in file.shown.iter().enumerate() {
            let mut text = String::new();
            for (k, token) in tokens.iter().enumerate() {
                let was = k > 0 && tokens[k - 1].supervised;
                text.push_str(match (was, token.supervised) {
                    (false, true) => begin,
                    (true, false) => end,
                    _ => "",
                });
                // A dot between tokens shows where they are cut.
                text.push_str(if k > 0 && was == token.supervised { "\u{b7}" } else { "" });
                text.push_str(&token.text.replace('\n', "\u{21b5}"));
            }
            text.push_str(if tokens.last().is_some_and(|t| t.supervised) { end } else { "" });
            lines.push(format!("sample {} ({} tokens):", i + 1, tokens.len()));
            lines.push(text);
        }
    }
    lines.join("\n").trim_start().to_owned() + "\n"
}

/// Samples by length, as bars.
fn length_bars(histogram: &[u64]) -> Vec<String> {
    const CELLS: u64 = 40;
    let most = histogram.iter().copied().max().unwrap_or(0).max(1);
    let first = histogram.iter().position(|&n| n > 0).unwrap_or(0);
    let last = histogram.iter().rposition(|&n| n > 0).map_or(0, |k| k + 1);
    let bar = |k: usize| {
        let n = histogram[k];
        let cells = (n * CELLS).div_ceil(most) as usize;
        format!("{:>8} to {:>8} tokens {n:>9} {}", 1_u64 << k, (2_u64 << k) - 1, "#".repeat(cells))
    };
    (first..last).map(bar).collect()
}

fn doctor(flags: &DoctorFlags) -> Result<()> {
    let record = ounce_train::doctor(&environment()?)?;
    if flags.json {
        print_json(&record);
    } else {
        print_out(&doctor_text(&record));
    }
    Ok(())
}

/// What doctor found, for people.
fn doctor_text(r: &DoctorRecord) -> String {
    let rate = |x: f64| format!("{}/s", format_bytes(x as u64));
    let gflop = |x: Option<f64>| {
        x.map_or_else(|| "no vector unit".to_owned(), |x| format!("{:.0} GFLOP/s", x / 1e9))
    };
    let mut lines = vec![format!("{:<9}{}", "machine", r.machine)];
    let mut line = |name: &str, what: String| lines.push(format!("{name:<9}{what}"));
    line("cores", format!("{}, kernels for {}", r.cores, r.kernel_tier));
    let bf16 = match r.peak.bf16_flop_per_s {
        Some(x) => format!("{} by its bf16 instruction", gflop(Some(x))),
        None => "no bf16 instruction".to_owned(),
    };
    let f32 = gflop(r.peak.f32_flop_per_s);
    line("peak", format!("{f32} in f32, {bf16}: all cores, in registers"));
    line("copies", format!("{}, read and written", rate(r.peak.copy_bytes_per_s)));
    let m = r.memory;
    let (total, free) = (format_bytes(m.total_bytes), format_bytes(m.available_bytes));
    line("memory", format!("{total}, {free} of it available"));
    let limit = m.cgroup_limit_bytes.map_or_else(|| "no limit".to_owned(), format_bytes);
    line("cgroup", limit);
    let auto = format_bytes(r.auto_budget_bytes);
    line("auto", format!("`--memory auto` is {auto} now: {} % of what is free", r.auto_percent));
    let disk = &r.disk;
    let (write, read) = (rate(disk.write_bytes_per_s), rate(disk.read_bytes_per_s));
    let how = if disk.is_direct { "past the page cache" } else { "through the page cache" };
    line("disk", format!("{write} written, {read} read, {how}"));
    let (file, free) = (format_bytes(disk.file_bytes), format_bytes(disk.free_bytes));
    line("", format!("(a file of {file} in {}; {free} free)", disk.dir.display()));
    lines.push("\nWhat to expect of full AdamW steps in f32".to_owned());
    lines.push("model         rows x tokens  smallest budget  in `auto`".to_owned());
    for m in &r.models {
        let shape = format!("{} x {}", m.batch_size, m.max_length);
        let smallest = format_bytes(m.smallest_budget_bytes);
        let speed = m.tokens_per_s.map_or_else(
            || "does not fit".to_owned(),
            |speed| format!("about {speed:.0} tokens/s"),
        );
        lines.push(format!("{:<13} {shape:>13}  {smallest:>15}  {speed}", m.model));
    }
    lines.push("An estimate: the plan's prediction, from kernels measured here.\n".to_owned());
    lines.join("\n")
}

/// The child process: one request on stdin, one answer on stdout.
fn tokenize() -> Result<()> {
    let mut request = String::new();
    std::io::stdin().read_to_string(&mut request).map_err(|e| Error::Files {
        message: format!("cannot read the request: {e}"),
        hint: "`__tokenize` is started by ounce itself".to_owned(),
    })?;
    print_out(&ounce_train::answer_tokenize_request(&request)?);
    Ok(())
}

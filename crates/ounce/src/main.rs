//! The `ounce` command: flags in, exit code out. Everything else is in `ounce-train`.
//!
//! Files, in reading order: `flags` (the command line as typed), `environment` (where the process finds
//! itself and its caches), `console` (what is printed), `commands` (one function per command),
//! `export`, `pull`. This is the only crate that prints, reads the environment, handles signals and
//! exits.
#![forbid(unsafe_code)]

mod flags;

mod environment;

mod console;

mod commands;

mod export;

#[cfg(feature = "hub")]
mod pull;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use clap::FromArgMatches;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use ounce_train::{Error, ErrorClass, usual_name};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};

/// Exit code of wrong usage.
const USAGE: u8 = 2;
/// Longest line of usage that is shown with an error.
const MAX_USAGE_CHARS: usize = 200;
/// Exit code of a bug of ours, as sysexits has it.
const BUG: u8 = 70;

fn main() -> ExitCode {
    let matches = flags::grammar().try_get_matches();
    let cli = match matches.and_then(|matches| flags::Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(e) => return refuse(&e),
    };
    // The number of the signal that arrived, 0 for none. A second one ends the process at once.
    let signal = Arc::new(AtomicUsize::new(0));
    let seen = Arc::new(AtomicBool::new(false));
    // Commands that ask for no signal end as any program does.
    let asks = cli.command.asks_for_signals();
    let hangs_up = (!is_ignored(SIGHUP)).then_some(SIGHUP);
    for number in [SIGINT, SIGTERM].into_iter().chain(hangs_up).filter(|_| asks) {
        let code = 128 + number;
        let registered =
            signal_hook::flag::register_conditional_shutdown(number, code, seen.clone())
                .and_then(|_| signal_hook::flag::register(number, seen.clone()))
                .and_then(|_| {
                    signal_hook::flag::register_usize(number, signal.clone(), number as usize)
                });
        if let Err(e) = registered {
            console::print_err(&format!("warning: signals end the run at once: {e}\n"));
        }
    }
    // A file that may not grow is an error of the write then, and not the end of the process.
    let _ = signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)));
    let run = || commands::run(cli.command, &signal).and_then(|()| console::check_output());
    match std::panic::catch_unwind(AssertUnwindSafe(run)) {
        // It has said what happened.
        Err(_) => ExitCode::from(BUG),
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(e)) => {
            console::print_err(&format!("error: {e}\n"));
            exit_code(&e, signal.load(Ordering::Relaxed))
        }
    }
}

/// Whether the process was started to outlive this signal, as `nohup` does.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// The exit code of a failure, as docs/troubleshooting.md lists them.
fn exit_code(e: &Error, signal: usize) -> ExitCode {
    ExitCode::from(match e.class() {
        ErrorClass::Usage => USAGE,
        ErrorClass::DoesNotFit => 3,
        ErrorClass::Input => 4,
        ErrorClass::NonFinite => 5,
        ErrorClass::Files => 6,
        ErrorClass::Interrupted => 128 + signal as u8,
        ErrorClass::Bug => BUG,
    })
}

/// What is meant by a flag that other programs call otherwise.
fn usual_flag(given: &str) -> Option<String> {
    let name = usual_name(&given.strip_prefix("--")?.replace('-', "_"))?;
    Some(format!("--{}", name.replace('_', "-")))
}

/// What is meant by a value in other letters, or by another program's word for it.
fn usual_value(e: &clap::Error) -> Option<String> {
    let (ContextValue::String(given), ContextValue::Strings(valid)) =
        (e.get(ContextKind::InvalidValue)?, e.get(ContextKind::ValidValue)?)
    else {
        return None;
    };
    let given = given.to_lowercase();
    let meant = match &*given {
        "bfloat16" => "bf16",
        "float16" | "fp16" | "half" => "f16",
        "float32" | "fp32" | "float" => "f32",
        other => other,
    };
    valid.iter().find(|value| *value == meant).cloned()
}

/// Prints help, or what is wrong with the command line and what it might have meant.
fn refuse(e: &clap::Error) -> ExitCode {
    if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        console::print_out(&e.render().to_string());
        return ExitCode::SUCCESS;
    }
    if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        console::print_err(&e.render().to_string());
        return ExitCode::from(USAGE);
    }
    let usual = match e.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(given)) => usual_flag(given).or_else(|| usual_value(e)),
        _ => None,
    };
    let nearest = || {
        [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand, ContextKind::SuggestedValue]
            .into_iter()
            .find_map(|kind| match e.get(kind)? {
                ContextValue::String(s) => Some(s.clone()),
                ContextValue::Strings(s) => s.first().cloned(),
                _ => None,
            })
            // What ounce starts itself.
            .filter(|name| !name.starts_with("__"))
    };
    let hint = usual.or_else(nearest).map_or_else(
        || "see `ounce --help` and `ounce COMMAND --help`".to_owned(),
        |s| format!("the nearest match is `{s}`"),
    );
    let text = e.render().to_string();
    let has_hint = text.lines().any(|l| l.starts_with("hint: "));
    let hint = if has_hint { String::new() } else { format!("hint: {hint}\n") };
    // Clap's own pointers ("tip", "For more information") say what the hint says; a list of all flags says nothing.
    let is_kept = |line: &&str| {
        let is_pointer =
            line.trim_start().starts_with("tip:") || line.starts_with("For more information");
        let lists_all = line.starts_with("Usage: ") && line.len() > MAX_USAGE_CHARS;
        !is_pointer && !lists_all
    };
    let text = text.replace("invalid digit found in string", "not a whole number");
    let kept = text.lines().filter(is_kept);
    let mut text = kept.collect::<Vec<_>>().join("\n");
    while text.contains("\n\n\n") {
        text = text.replace("\n\n\n", "\n\n");
    }
    console::print_err(&format!("{}\n{hint}", text.trim_end()));
    ExitCode::from(USAGE)
}

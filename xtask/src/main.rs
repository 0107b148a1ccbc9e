//! Repository chores in one language: `cargo xtask help` lists them.
//!
//! Files, in reading order: `shell` (running programs), `ci` (the list of checks), `tidy` (what the
//! compiler does not check), `golden` (making golden data anew), `record` (results kept under
//! `bench/runs`), `numbers` (in what programs print), `demonstration` (what each is given and returns),
//! `bench` (speed, side by side with PyTorch; `instructions`), `accept/` (the demonstrations, with
//! `random` and `cgroup`), `quickstart` (the README's first command).
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "chores speak to people")]

mod shell;

mod ci;
mod tidy;

mod golden;

mod numbers;
mod record;

mod cgroup;
mod demonstration;
mod random;

mod bench;
mod instructions;

mod accept;

mod quickstart;

use std::process::ExitCode;

/// Why a chore failed, in words.
type Result<T = ()> = std::result::Result<T, String>;

const HELP: &str = "\
cargo xtask COMMAND

  quickstart            train a small model on the text that ships, inside 48 MiB
  ci                    everything that must hold: formatting, lints, documentation, tidy, examples,
                        a release build, instruction counts, small acceptance runs, tests
  test [ARGS]           the tests: by cargo-nextest where it is installed, else by cargo test
  tidy                  what the compiler does not check: crate edges, leftovers, long lines, ...
  golden [ARGS]         make tests/golden anew with python3 (needs torch and transformers)
  bench step [FLAGS]    training steps; with --python P side by side with bench/peer_torch.py
  bench kernels [N_THREADS [FILTER [TIER]]]  the kernels beside the machine's peak
  bench instructions [--keep]  instructions per kernel beside those kept (needs valgrind)
  accept NAME [FLAGS]   a demonstration; without NAME, the list of them

Flags of bench step: --model M --batch-size B --max-length T --steps N --rounds R --memory BYTES
  --threads N --precision P --peers NAMES --python PROGRAM
Flags of accept: --python PROGRAM --threads N --precision P --model M --times N --seed N; of smollm2 and
  finetuning also --gguf FILE --data PATH --llama-python PROGRAM
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["quickstart"] => quickstart::quickstart(),
        ["ci"] => ci::ci(),
        ["test", ref rest @ ..] => ci::test(rest),
        ["tidy"] => tidy::tidy(),
        ["golden", ref rest @ ..] => golden::golden(rest),
        ["bench", "step", ref rest @ ..] => bench::step(rest),
        ["bench", "kernels", ref rest @ ..] => bench::kernels(rest),
        ["bench", "instructions", ref rest @ ..] => instructions::instructions(rest),
        ["accept", ref rest @ ..] => accept::accept(rest),
        ["help" | "--help" | "-h" | "bench"] => {
            print!("{HELP}");
            Ok(())
        }
        _ => Err(format!("unknown command `{}`\nhint: cargo xtask help", args.join(" "))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

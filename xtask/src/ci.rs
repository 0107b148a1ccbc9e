//! The list of checks: `cargo xtask ci` is what must hold before a change is done.
//!
//! Cheap checks come first. The tests come last, so that the closing line of the test runner is
//! near the end of the output.

use std::time::Instant;

use crate::shell::{capture, cargo, metadata, output, release_binary, root, run, run_with};
use crate::{Result, accept, instructions, tidy};

/// One check, by name.
type Check = (&'static str, fn() -> Result);

const CHECKS: &[Check] = &[
    ("formatting", || run(&cargo(), &["fmt", "--all", "--check"])),
    ("tidy", tidy::tidy),
    ("lints", || clippy(&[])),
    ("lints with all features", || clippy(&["--all-features"])),
    ("lints of the fuzz harness", fuzz_lints),
    ("documentation", documentation),
    ("release build", release_build),
    ("examples", examples),
    ("instructions", || instructions::instructions(&[])),
    ("acceptance", || accept::accept(&["smoke"])),
    ("kills", || accept::accept(&["killed", "--times", "6"])),
    ("cgroups", || accept::accept(&["cgroup-runs", "--times", "6"])),
    ("tokenising", || accept::accept(&["tokenising"])),
    ("doctests", || run(&cargo(), &["test", "--workspace", "--locked", "--doc"])),
    ("tests", || test_targets(&[])),
];

/// Runs every check; stops at the first that fails.
pub(crate) fn ci() -> Result {
    let start = Instant::now();
    for (name, check) in CHECKS {
        let began = Instant::now();
        println!("\n==> {name}");
        check().map_err(|e| format!("{name}: {e}"))?;
        println!("<== {name}: {:.0} s", began.elapsed().as_secs_f64());
    }
    println!("ci: all {} checks passed in {:.0} s", CHECKS.len(), start.elapsed().as_secs_f64());
    Ok(())
}

/// The tests, as README and CI run them: doctests, then everything else.
pub(crate) fn test(args: &[&str]) -> Result {
    if args.is_empty() {
        // The build shows that it goes on; of the tests themselves the summary is enough.
        run(&cargo(), &["test", "--workspace", "--locked", "--doc", "--", "--quiet"])?;
    }
    test_targets(args)
}

/// All tests but doctests: by cargo-nextest where it is installed, else by cargo itself.
fn test_targets(args: &[&str]) -> Result {
    let has_nextest = output(&cargo(), &["nextest", "--version"]).is_ok_and(|o| o.status.success());
    let common = ["--workspace", "--locked"];
    if has_nextest {
        run(&cargo(), &[&["nextest", "run"], &common[..], &["--no-fail-fast"], args].concat())
    } else {
        run(&cargo(), &[&["test"], &common[..], &["--all-targets"], args].concat())
    }
}

fn clippy(features: &[&str]) -> Result {
    let args = [
        &["clippy", "--workspace", "--all-targets", "--locked"],
        features,
        &["--", "-D", "warnings"],
    ];
    run(&cargo(), &args.concat())
}

/// The harness is a workspace of its own; what it shares with ours is built once.
fn fuzz_lints() -> Result {
    let metadata = metadata()?;
    let target = metadata["target_directory"].as_str().unwrap_or("target");
    let manifest = ["--manifest-path", "fuzz/Cargo.toml"];
    run(&cargo(), &[&["fmt", "--check"], &manifest[..]].concat())?;
    let clippy = ["clippy", "--locked", "--target-dir", target];
    run(&cargo(), &[&clippy[..], &manifest, &["--", "-D", "warnings"]].concat())
}

fn documentation() -> Result {
    let args = ["doc", "--workspace", "--no-deps", "--locked"];
    run_with(&cargo(), &args, &[("RUSTDOCFLAGS", "-D warnings")])
}

fn release_build() -> Result {
    let binary = release_binary()?;
    let said = capture(&binary, &["--version"])?;
    let version = env!("CARGO_PKG_VERSION");
    if said.trim() == format!("ounce {version}") {
        Ok(())
    } else {
        Err(format!("`ounce --version` said {said:?}, the workspace has version {version}"))
    }
}

/// Runs every example of the folder `examples/`; measurements beside the crates are not examples.
fn examples() -> Result {
    let metadata = metadata()?;
    let folder = root().join("examples");
    for package in metadata["packages"].as_array().into_iter().flatten() {
        for target in package["targets"].as_array().into_iter().flatten() {
            let is_example =
                target["kind"].as_array().is_some_and(|k| k.contains(&"example".into()));
            let path = target["src_path"].as_str().unwrap_or_default();
            let path = std::path::Path::new(path).canonicalize().unwrap_or_default();
            if is_example && path.starts_with(&folder) {
                let package = package["name"].as_str().unwrap_or_default();
                let name = target["name"].as_str().unwrap_or_default();
                let args =
                    ["run", "--release", "--locked", "--package", package, "--example", name];
                run(&cargo(), &args)?;
            }
        }
    }
    Ok(())
}

//! Running programs from the root of the repository.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::Result;

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().expect("xtask lies in the repository").to_owned()
}

/// The cargo that runs us.
pub(crate) fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).current_dir(root());
    command
}

fn words(program: &str, args: &[&str]) -> String {
    let name = Path::new(program).file_name().map_or(program, |n| n.to_str().unwrap_or(program));
    [&[name], args].concat().join(" ")
}

/// Runs a program; its output goes where ours goes.
pub(crate) fn run(program: &str, args: &[&str]) -> Result {
    run_with(program, args, &[])
}

/// As [`run`], with environment variables.
pub(crate) fn run_with(program: &str, args: &[&str], env: &[(&str, &str)]) -> Result {
    let words = words(program, args);
    println!("$ {words}");
    let status = command(program, args).envs(env.iter().copied()).status();
    let status = status.map_err(|e| format!("cannot start `{words}`: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("`{words}` failed: {status}")) }
}

/// Runs a program to its end, whatever its exit code, and returns what it wrote.
pub(crate) fn output(program: &str, args: &[&str]) -> Result<Output> {
    output_with(program, args, &[])
}

/// As [`output`], with environment variables.
pub(crate) fn output_with(program: &str, args: &[&str], env: &[(&str, &str)]) -> Result<Output> {
    let output = command(program, args).envs(env.iter().copied()).stdin(Stdio::null()).output();
    output.map_err(|e| format!("cannot start `{}`: {e}", words(program, args)))
}

/// Standard output of a program that must succeed.
pub(crate) fn capture(program: &str, args: &[&str]) -> Result<String> {
    let output = output(program, args)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(format!("`{}` failed: {}\n{stderr}", words(program, args), output.status))
}

/// The JSON objects among the lines of `text`.
pub(crate) fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(Value::is_object)
        .collect()
}

/// What `cargo metadata` says of this workspace.
pub(crate) fn metadata() -> Result<Value> {
    let text = capture(&cargo(), &["metadata", "--format-version", "1", "--no-deps", "--locked"])?;
    serde_json::from_str(&text).map_err(|e| format!("cargo metadata printed no JSON: {e}"))
}

/// Builds the release binary and returns its path.
pub(crate) fn release_binary() -> Result<String> {
    run(&cargo(), &["build", "--release", "--package", "ounce", "--locked"])?;
    let metadata = metadata()?;
    let target = metadata["target_directory"].as_str().unwrap_or("target");
    Ok(Path::new(target).join("release/ounce").to_string_lossy().into_owned())
}

/// An empty folder under the target directory for the files of one chore.
pub(crate) fn scratch_folder(name: &str) -> Result<PathBuf> {
    let metadata = metadata()?;
    let target = metadata["target_directory"].as_str().unwrap_or("target");
    let folder = Path::new(target).join("xtask").join(name);
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    }
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    Ok(folder)
}

/// The value after `--name` in `args`, if there. `known` are all names; others are refused.
pub(crate) fn flag<'a>(args: &[&'a str], name: &str, known: &[&str]) -> Result<Option<&'a str>> {
    let mut found = None;
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        if !known.contains(arg) {
            return Err(format!("unknown flag {arg}\nhint: known are {}", known.join(", ")));
        }
        let value = rest.next().ok_or_else(|| format!("{arg} needs a value"))?;
        if *arg == name {
            found = Some(*value);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_found_and_unknown_ones_refused() {
        let known = ["--a", "--b"];
        assert_eq!(flag(&["--a", "1", "--b", "2"], "--b", &known), Ok(Some("2")));
        assert_eq!(flag(&["--a", "1"], "--b", &known), Ok(None));
        assert!(flag(&["--c", "1"], "--a", &known).is_err());
        assert!(flag(&["--a"], "--a", &known).is_err());
    }

    #[test]
    fn json_lines_skip_what_is_for_people() {
        let lines = json_lines("hello\n{\"a\": 1}\n3\n{\"done\": true}\n");
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1]["done"], true);
    }
}

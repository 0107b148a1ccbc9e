//! The README's first command: a small model trained on the text that ships, inside a small budget.
//!
//! It only types what a user would type, and says what it types.

use crate::Result;
use crate::accept::nanogpt::RECIPE;
use crate::demonstration::shakespeare;
use crate::shell::{release_binary, root, run};

/// The model: nanoGPT's CPU size, 0.8 million parameters.
const SIZES: &[&str] =
    &["--n-layers", "4", "--n-heads", "4", "--hidden-size", "128", "--context-length", "64"];

/// What a user would add to the recipe: a faster rate, and texts to look at.
const MORE: &[&str] =
    &["--learning-rate", "2e-3", "--sample-prompt", "ROMEO:", "--sample-tokens", "200"];

/// `cargo xtask quickstart`
pub(crate) fn quickstart() -> Result {
    let binary = release_binary()?;
    let folder = root().join("target/quickstart");
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    shakespeare(&folder)?;
    let at = |name: &str| format!("target/quickstart/{name}");
    let (train, validation) = (at("train.txt"), at("validation.txt"));
    let (fresh, trained) = (at("fresh"), at("trained"));
    let init = ["init", "--arch", "gpt2", "--tokenizer", "char", "--data", &train];
    run(&binary, &[&init[..], SIZES, &["--output-dir", &fresh, "--seed", "1"]].concat())?;
    let files = ["--model", &fresh, "--data", &train, "--eval-data", &validation];
    run(&binary, &[&["train"], &files[..], RECIPE, MORE, &["--output-dir", &trained]].concat())?;
    println!(
        "\ncontinue a text of yours: target/release/ounce generate --model {trained} --prompt \"To be\""
    );
    Ok(())
}

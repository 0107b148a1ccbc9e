//! Compares chat templates with the goldens that `tests/data/make_template_goldens.py` makes of a folder of them, or
//! ids and masks with those of `tests/data/make_mask_goldens.py`.
//!
//! `cargo run --example chat_templates -- goldens.json`: prints every difference, and how many cases are equal.

#![expect(clippy::print_stdout, reason = "an example prints")]

use std::error::Error;
use std::path::PathBuf;

use ounce_io::testing::{compare_masks, compare_templates};

fn main() -> Result<(), Box<dyn Error>> {
    let path = PathBuf::from(std::env::args_os().nth(1).ok_or("which file of goldens?")?);
    let goldens: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
    let found = if goldens["tokenizers"].is_array() {
        compare_masks(&goldens, path.parent().ok_or("a file lies in a folder")?)
    } else {
        compare_templates(&goldens)
    };
    for difference in &found.differences {
        println!("{difference}");
    }
    println!(
        "{} templates: {} cases equal, {} refused by both, {} different",
        found.n_templates,
        found.n_equal,
        found.n_refused,
        found.differences.len()
    );
    Ok(())
}

//! Compares templates with the goldens that `tests/data/make_template_goldens.py` makes of a folder of them.
//!
//! `cargo run --example chat_templates -- goldens.json`: prints every difference, and how many renderings are equal.

#![expect(clippy::print_stdout, reason = "an example prints")]

use std::error::Error;

use ounce_io::testing::compare_templates;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("which file of goldens?")?;
    let found = compare_templates(&serde_json::from_str(&std::fs::read_to_string(path)?)?);
    for difference in &found.differences {
        println!("{difference}");
    }
    println!(
        "{} templates: {} renderings equal, {} refused by both, {} different",
        found.n_templates,
        found.n_equal,
        found.n_refused,
        found.differences.len()
    );
    Ok(())
}

//! Makes the golden data anew: `tests/golden/make_golden.py`, which needs torch and transformers.

use crate::Result;
use crate::shell::run;

/// Runs the script with `python3`; arguments are passed on.
pub(crate) fn golden(args: &[&str]) -> Result {
    run("python3", &[&["tests/golden/make_golden.py"], args].concat()).map_err(|e| {
        format!("{e}\nhint: tests/golden/README.md names the Python packages it needs")
    })
}

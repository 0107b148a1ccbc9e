//! `ounce pull`: a model by name from a hub into the cache.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Args;
use ounce_hub::{HubError, HubName, Progress, PullSettings, hub_name, pull as fetch};
use ounce_train::{Error, Result, format_bytes, message_and_hint};
use serde_json::json;

use crate::console::{print_err, print_json, print_out};
use crate::environment::environment;

/// The hub where HF_ENDPOINT names no other.
const ENDPOINT: &str = "https://huggingface.co";

#[derive(Debug, Args)]
pub(crate) struct PullFlags {
    /// ORG/NAME, or ORG/NAME@REVISION
    #[arg(value_name = "ORG/NAME[@REV]")]
    name: String,
    /// Only this file; repeatable [default: all that cannot run code]
    #[arg(long, value_name = "NAME")]
    file: Vec<String>,
    /// Print one JSON line on stdout
    #[arg(long)]
    json: bool,
}

/// Runs the command; `signal` holds the number of a signal that arrived.
pub(crate) fn pull(flags: PullFlags, signal: &Arc<AtomicUsize>) -> Result<()> {
    let name = hub_model(&flags.name)?;
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let settings = PullSettings {
        name,
        files: flags.file,
        endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()),
        token: variable("HF_TOKEN"),
        hub_dir: environment()?.hub_dir,
    };
    let mut last = (String::new(), 0);
    let mut told = |progress: Progress<'_>| {
        let percent = 100 * progress.n_bytes / progress.of_bytes.max(1);
        // A line at the beginning of a file, every tenth of it, and its end.
        if last.0 != progress.file || last.1 / 10 != percent / 10 {
            let (n, of) = (format_bytes(progress.n_bytes), format_bytes(progress.of_bytes));
            print_err(&format!("{}: {n} of {of}\n", progress.file));
            last = (progress.file.to_owned(), percent);
        }
        signal.load(Ordering::Relaxed) == 0
    };
    let record = fetch(&settings, &mut told).map_err(|e| told_as(&e))?;
    if flags.json {
        print_json(&json!({
            "path": record.path, "commit": record.commit, "files": record.files,
            "fetched_bytes": record.fetched_bytes, "left_out": record.left_out,
        }));
    } else {
        for name in &record.left_out {
            print_err(&format!("left out: {name}\n"));
        }
        print_out(&format!("{}\n", record.path.display()));
    }
    Ok(())
}

fn hub_model(text: &str) -> Result<HubName> {
    hub_name(Path::new(text)).ok_or_else(|| Error::Usage {
        message: format!("`{text}` is not a name of a model on a hub"),
        hint: "a name is ORG/NAME or ORG/NAME@REVISION".to_owned(),
    })
}

/// The class of a failure.
fn told_as(e: &HubError) -> Error {
    let (message, hint) = message_and_hint(e);
    match e {
        HubError::Usage { .. } => Error::Usage { message, hint },
        HubError::NotFound { .. } | HubError::Unauthorized { .. } | HubError::Checksum { .. } => {
            Error::Input { message, hint }
        }
        HubError::Interrupted => Error::Paused { message, hint },
        HubError::BadAnswer { .. }
        | HubError::Network { .. }
        | HubError::NoRoom { .. }
        | HubError::Files { .. } => Error::Files { message, hint },
    }
}

//! `ounce export`: a model in another format.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use clap::Args;
use ounce_train::{Error, ExportDtype, ExportFormat, ExportSettings, Result, format_bytes};

use crate::console::{Console, print_err, print_json};
use crate::environment::environment;

#[derive(Debug, Args)]
pub(crate) struct ExportFlags {
    /// Model directory, GGUF file, or ORG/NAME that `ounce pull` fetched
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: PathBuf,
    /// A Hugging Face directory, or GGUF with an Ollama Modelfile
    #[arg(long, value_parser = ["hf", "gguf"])]
    format: String,
    /// Where the result goes
    #[arg(long, value_name = "DIR")]
    output_dir: PathBuf,
    /// Type of the weights [default: f32 for hf, f16 for gguf]
    #[arg(long, value_parser = ["f32", "bf16", "f16", "q8_0"])]
    dtype: Option<String>,
    /// Print one JSON line on stdout
    #[arg(long)]
    json: bool,
    // To come: refused by name.
    #[arg(long, hide = true)]
    merge: bool,
}

/// Runs the command; `signal` holds the number of a signal that arrived.
pub(crate) fn export(flags: ExportFlags, signal: &Arc<AtomicUsize>) -> Result<()> {
    if flags.merge {
        return Err(Error::NotBuilt { what: "`export --merge`".to_owned() });
    }
    let dtype = flags.dtype.as_deref().map(|name| match name {
        "f32" => ExportDtype::F32,
        "bf16" => ExportDtype::Bf16,
        "f16" => ExportDtype::F16,
        _ => ExportDtype::Q8_0,
    });
    let wanted = ExportSettings {
        model: flags.model,
        output_dir: flags.output_dir,
        format: if flags.format == "gguf" { ExportFormat::Gguf } else { ExportFormat::Hf },
        dtype,
    };
    let mut console = Console::new(flags.json, None, signal.clone());
    let record = ounce_train::export(&wanted, &environment()?, &mut console)?;
    if flags.json {
        print_json(&record);
    } else {
        print_err(&format!(
            "{}: {} parameters, {}\n",
            record.output_dir.display(),
            record.n_params,
            format_bytes(record.bytes)
        ));
    }
    Ok(())
}

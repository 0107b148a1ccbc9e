//! The command line as it was typed.
//!
//! Flags are the settings of `ounce_train::Settings` in kebab case, every one optional: those that
//! were given become a JSON object ([`RunFlags::given`]) that is laid over the YAML file and the
//! defaults. One more flag is one field here and one there.

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args, CommandFactory, Parser, Subcommand};
use ounce_train::{Error, Family, Memory};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use crate::export::ExportFlags;

/// Trains transformer language models inside a memory budget that you state in bytes.
#[derive(Debug, Parser)]
#[command(name = "ounce", version, disable_help_subcommand = true, arg_required_else_help = true)]
// As in Hugging Face's parser, a flag that is given twice counts as given last.
#[command(args_override_self = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a fresh model directory: config, random weights, tokenizer
    Init(InitFlags),
    /// Show what a run would take, without running it
    #[command(allow_negative_numbers = true)]
    Plan(PlanFlags),
    /// Train a model inside a memory budget
    #[command(allow_negative_numbers = true)]
    Train(RunFlags),
    /// Loss and perplexity of a model on a text
    #[command(allow_negative_numbers = true)]
    Eval(RunFlags),
    /// Continue a prompt
    #[command(allow_negative_numbers = true)]
    Generate(GenerateFlags),
    /// Measure speed and memory
    Bench(BenchFlags),
    #[command(hide = true)]
    Chat(NotBuiltFlags),
    #[command(hide = true)]
    Serve(NotBuiltFlags),
    #[command(hide = true)]
    Search(NotBuiltFlags),
    #[command(hide = true)]
    Prune(NotBuiltFlags),
    /// Write a model as a Hugging Face directory or as GGUF
    Export(ExportFlags),
    /// Fetch a model by name from a hub
    #[cfg(feature = "hub")]
    Pull(crate::pull::PullFlags),
    /// (not in this build)
    #[cfg(not(feature = "hub"))]
    Pull(NotBuiltFlags),
    /// Look at data as a run would
    Data(DataFlags),
    /// What this machine has, and what to expect of it
    Doctor(DoctorFlags),
    /// Turns text into ids for the process that started this one
    #[command(name = "__tokenize", hide = true)]
    Tokenize,
}

impl Command {
    /// Whether the command looks for signals while it runs, and has something to bring to an end.
    pub(crate) fn asks_for_signals(&self) -> bool {
        match self {
            Self::Train(_)
            | Self::Eval(_)
            | Self::Generate(_)
            | Self::Bench(_)
            | Self::Export(_)
            | Self::Pull(_)
            | Self::Tokenize => true,
            Self::Init(_)
            | Self::Plan(_)
            | Self::Chat(_)
            | Self::Serve(_)
            | Self::Search(_)
            | Self::Prune(_)
            | Self::Data(_)
            | Self::Doctor(_) => false,
        }
    }
}

// Swallows whatever follows a command that is refused; no doc comment, which would be help.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct NotBuiltFlags {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _rest: Vec<String>,
}

#[derive(Debug, Default, Args, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "a bare flag is a bool")]
pub(crate) struct RunFlags {
    /// YAML file of settings; flags win
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub(crate) config: Option<PathBuf>,
    /// Print JSON lines on stdout
    #[arg(long)]
    #[serde(skip)]
    pub(crate) json: bool,

    /// Model directory in Hugging Face's layout, GGUF file, or ORG/NAME that `ounce pull` fetched
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: Option<PathBuf>,
    /// Text (.txt) or rows (.jsonl, .json, .parquet); repeatable
    #[arg(long, value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Held-out text or rows; repeatable
    #[arg(long, value_name = "FILE")]
    eval_data: Vec<PathBuf>,
    /// Where the result goes
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Tokens per row [default: the model's context, at most 1024]
    #[arg(long, value_name = "T")]
    max_length: Option<u64>,

    /// Budget of the whole process: 64MiB, 2GiB, 12345B or auto [default: auto]
    #[arg(long, value_name = "BYTES", value_parser = Memory::parse)]
    memory: Option<Memory>,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<u32>,
    /// Seed of data order, dropout and sampling [default: 42]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// What values are stored in [default: f32; where a model is read only, that of its run]
    #[arg(long, value_parser = ["f32", "bf16", "f16"])]
    precision: Option<String>,
    /// Op classes that keep f32, as in norm=f32,rope=f32
    #[arg(long, value_name = "CLASS=f32", value_delimiter = ',', value_parser = assignment)]
    #[serde(serialize_with = "as_object")]
    precision_overrides: Vec<(String, String)>,

    /// Rows per step, times the accumulation steps [default: 8]
    #[arg(long, value_name = "B", help_heading = "Optimization")]
    per_device_train_batch_size: Option<u64>,
    /// See --per-device-train-batch-size; the planner cuts the rows anew [default: 1]
    #[arg(long, value_name = "N", help_heading = "Optimization")]
    gradient_accumulation_steps: Option<u64>,
    /// Steps; wins over --num-train-epochs
    #[arg(long, value_name = "N", help_heading = "Optimization")]
    max_steps: Option<u64>,
    /// Passes over the data [default: 3]
    #[arg(long, value_parser = number, value_name = "X", help_heading = "Optimization")]
    num_train_epochs: Option<f64>,
    /// Update rule [default: adamw]
    #[arg(long, value_parser = ["adamw", "sgd"], help_heading = "Optimization")]
    optimizer: Option<String>,
    /// Peak learning rate [default: 5e-5]
    #[arg(long, value_parser = number, value_name = "X", help_heading = "Optimization")]
    learning_rate: Option<f64>,
    /// What follows the warm-up [default: linear]
    #[arg(long, value_parser = ["constant", "linear", "cosine"], help_heading = "Optimization")]
    lr_scheduler_type: Option<String>,
    /// Warm-up: steps, or a share of all steps if below 1 [default: 0]
    #[arg(long, value_parser = number, value_name = "X", help_heading = "Optimization")]
    warmup_steps: Option<f64>,
    /// The learning rate falls to this share of the peak [default: 0]
    #[arg(long, value_parser = number, value_name = "X", help_heading = "Optimization")]
    min_lr_ratio: Option<f64>,
    /// Decay of weight matrices; norms and biases never decay [default: 0]
    #[arg(long, value_parser = number, value_name = "X", help_heading = "Optimization")]
    weight_decay: Option<f64>,
    /// AdamW's beta 1 [default: 0.9]
    #[arg(long, value_parser = number, value_name = "X", help_heading = "Optimization")]
    adam_beta1: Option<f64>,
    /// AdamW's beta 2 [default: 0.999]
    #[arg(long, value_parser = number, value_name = "X", help_heading = "Optimization")]
    adam_beta2: Option<f64>,
    /// AdamW's epsilon [default: 1e-8]
    #[arg(long, value_parser = number, value_name = "X", help_heading = "Optimization")]
    adam_epsilon: Option<f64>,
    /// Largest norm of the gradient; 0 is off [default: 1]
    #[arg(long, value_parser = number, value_name = "X", help_heading = "Optimization")]
    max_grad_norm: Option<f64>,
    /// f16: first loss scale, a power of two [default: 65536]
    #[arg(long, value_parser = number, value_name = "X", help_heading = "Optimization")]
    init_loss_scale: Option<f64>,
    /// f16: take a class of ops that overflows three times back to f32
    #[arg(long, help_heading = "Optimization")]
    f16_demote: bool,
    /// A step whose loss or gradient is not finite ends the run, or is skipped [default: stop]
    #[arg(long, value_parser = ["stop", "skip"], help_heading = "Optimization")]
    on_nonfinite: Option<String>,
    /// Dropout of embedding and residual branches [default: 0]
    #[arg(long, value_parser = number, value_name = "P", help_heading = "Optimization")]
    dropout: Option<f64>,

    /// What rows mean: messages, sharegpt, alpaca, prompt-completion, ... [default: detected]
    #[arg(long, value_name = "NAME", help_heading = "Data")]
    dataset_format: Option<String>,
    /// The file's keys for those of the format: prompt=QUESTION,completion=ANSWER
    #[arg(long, value_name = "PAIRS", help_heading = "Data")]
    column_mapping: Option<String>,
    /// Rows that cannot be read: `error` stops, `skip` passes them over and counts them [default: error]
    #[arg(long, value_parser = ["error", "skip"], help_heading = "Data")]
    on_bad_row: Option<String>,
    /// Several samples per row, by best fit
    #[arg(long, help_heading = "Data")]
    packing: bool,
    /// Tokenize training data as it is needed, not all of it before step 1; needs --max-steps
    #[arg(long, help_heading = "Data")]
    streaming: bool,
    /// Streaming: rows that are shuffled with each other [default: 1000]
    #[arg(long, value_name = "N", help_heading = "Data")]
    shuffle_buffer_size: Option<u64>,
    /// Streaming: threads that tokenize beside the steps [default: 1]
    #[arg(long, value_name = "N", help_heading = "Data")]
    dataloader_num_workers: Option<u64>,

    /// Steps between lines of progress
    #[arg(long, value_name = "N", help_heading = "Reports")]
    logging_steps: Option<u64>,
    /// Steps between evaluations [default: at the end]
    #[arg(long, value_name = "N", help_heading = "Reports")]
    eval_steps: Option<u64>,
    /// Steps between sample texts, 0 for none [default: at the end]
    #[arg(long, value_name = "N", help_heading = "Reports")]
    sample_steps: Option<u64>,
    /// What sample texts continue
    #[arg(long, value_name = "TEXT", help_heading = "Reports")]
    sample_prompt: Option<String>,
    /// Tokens of a sample text [default: 100]
    #[arg(long, value_name = "N", help_heading = "Reports")]
    sample_tokens: Option<u64>,

    /// Steps between checkpoints
    #[arg(long, value_name = "N", help_heading = "Checkpoints")]
    save_steps: Option<u64>,
    /// Checkpoints that are kept [default: all]
    #[arg(long, value_name = "N", help_heading = "Checkpoints")]
    save_total_limit: Option<u64>,
    /// Go on from a checkpoint: a path, or auto (the newest, if there is one)
    #[arg(long, value_name = "auto|PATH", help_heading = "Checkpoints")]
    resume_from_checkpoint: Option<String>,
    /// Go on even if other settings change the run
    #[arg(long = "override", help_heading = "Checkpoints")]
    #[serde(rename = "override")]
    override_begun: bool,
    // Features that are to come: `Settings::resolve` refuses them by name.
    #[arg(long, hide = true)]
    use_peft: bool,
    #[arg(long, hide = true)]
    lora_r: Option<u64>,
    #[arg(long, value_parser = number, hide = true)]
    lora_alpha: Option<f64>,
    #[arg(long, value_parser = number, hide = true)]
    lora_dropout: Option<f64>,
    #[arg(long, hide = true)]
    lora_target_modules: Option<String>,
    #[arg(long, hide = true)]
    scratch_dir: Option<PathBuf>,
    #[arg(long, hide = true)]
    scratch_limit: Option<String>,
}

/// Arguments that commands which do not train read: what their help shows.
const READ_BY: [(&str, &str); 3] = [
    (
        "eval",
        "config json model data eval_data max_length memory threads seed precision precision_overrides \
         per_device_train_batch_size dataset_format column_mapping on_bad_row packing",
    ),
    (
        "generate",
        "config json model max_length memory threads seed precision precision_overrides prompt temperature \
         max_new_tokens",
    ),
    (
        "inspect",
        "config json model max_length threads dataset_format column_mapping on_bad_row packing files samples",
    ),
];

/// The command line's grammar. Every command takes all settings, so that one YAML file and one set of flags serve
/// them all; help shows those that the command reads.
pub(crate) fn grammar() -> clap::Command {
    let shown = |command: clap::Command| {
        let read = READ_BY.iter().find(|(name, _)| *name == command.get_name());
        let Some((_, read)) = read else { return command };
        let note = "Takes all settings of `ounce train`, as flags or by --config; those that are not listed change \
                    nothing here.";
        command.after_help(note).mut_args(|arg| {
            let is_read = read.split(' ').any(|id| arg.get_id() == id);
            if is_read { arg } else { arg.hide(true) }
        })
    };
    Cli::command()
        .mut_subcommand("eval", shown)
        .mut_subcommand("generate", shown)
        .mut_subcommand("data", |data| data.mut_subcommand("inspect", shown))
}

/// A number that is one: neither infinity nor NaN.
fn number(text: &str) -> Result<f64, String> {
    let finite = text.parse().ok().filter(|x: &f64| x.is_finite());
    finite.ok_or_else(|| format!("`{text}` is not a finite number"))
}

/// `class=dtype` as a pair.
fn assignment(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').ok_or_else(|| format!("`{text}` is not of the form norm=f32"));
    pair.map(|(class, dtype)| (class.to_owned(), dtype.to_owned()))
}

/// Pairs as an object.
fn as_object<S: Serializer>(pairs: &[(String, String)], s: S) -> Result<S::Ok, S::Error> {
    s.collect_map(pairs.iter().map(|(key, value)| (key, value)))
}

impl RunFlags {
    /// Whether `--data` is given and `--eval-data` is not.
    pub(crate) fn names_data_only(&self) -> bool {
        !self.data.is_empty() && self.eval_data.is_empty()
    }

    /// Whether both `--data` and `--eval-data` are given.
    pub(crate) fn names_both(&self) -> bool {
        !self.data.is_empty() && !self.eval_data.is_empty()
    }

    /// The settings that were given, as an object.
    ///
    /// # Errors
    /// A path that is not UTF-8: neither JSON nor YAML could keep it.
    pub(crate) fn given(&self) -> Result<Map<String, Value>, Error> {
        let flags = serde_json::to_value(self).map_err(|e| Error::Usage {
            message: format!("a flag cannot be kept in run.yaml: {e}"),
            hint: "paths are to be UTF-8: rename the file or directory".to_owned(),
        })?;
        let Value::Object(mut flags) = flags else {
            unreachable!("a struct of named fields serializes to an object")
        };
        flags.retain(|_, v| match v {
            Value::Null | Value::Bool(false) => false,
            Value::Array(items) => !items.is_empty(),
            Value::Object(items) => !items.is_empty(),
            _ => true,
        });
        Ok(flags)
    }
}

#[derive(Debug, Args)]
pub(crate) struct DoctorFlags {
    /// Print one JSON line on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PlanFlags {
    #[command(flatten)]
    pub(crate) run: RunFlags,
    /// Show the table of op classes and what they are stored in, instead of the plan
    #[arg(long, value_parser = ["precision"])]
    pub(crate) explain: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DataFlags {
    #[command(subcommand)]
    pub(crate) what: DataWhat,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DataWhat {
    /// Formats, counts, lengths, and what is supervised of the first rows
    Inspect(InspectFlags),
}

#[derive(Debug, Args)]
pub(crate) struct InspectFlags {
    /// Data files
    #[arg(value_name = "FILE", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Rows of each file that are shown token by token
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) samples: usize,
    #[command(flatten)]
    pub(crate) run: RunFlags,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateFlags {
    #[command(flatten)]
    pub(crate) run: RunFlags,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: String,
    /// 0 takes the likeliest token, above 0 draws one
    #[arg(long, value_parser = number, value_name = "X", default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// Tokens to add at most
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) max_new_tokens: u64,
}

/// A size, of at least one.
fn positive() -> RangedU64ValueParser {
    RangedU64ValueParser::new().range(1..)
}

#[derive(Debug, Args)]
pub(crate) struct InitFlags {
    /// Where the model goes
    #[arg(long, value_name = "DIR")]
    pub(crate) output_dir: PathBuf,
    /// A config.json; its vocab_size is kept
    #[arg(long, value_name = "FILE", conflicts_with = "arch")]
    pub(crate) config: Option<PathBuf>,
    /// Family of the model
    #[arg(long, value_parser = Family::NAMES)]
    pub(crate) arch: Option<String>,
    /// Layers [default: 4]
    #[arg(long, value_name = "N", requires = "arch", value_parser = positive())]
    pub(crate) n_layers: Option<u64>,
    /// Attention heads [default: 4]
    #[arg(long, value_name = "N", requires = "arch", value_parser = positive())]
    pub(crate) n_heads: Option<u64>,
    /// Key and value heads, not for gpt2 [default: the heads]
    #[arg(long, value_name = "N", requires = "arch", value_parser = positive())]
    pub(crate) n_kv_heads: Option<u64>,
    /// Channels [default: 128]
    #[arg(long, value_name = "N", requires = "arch", value_parser = positive())]
    pub(crate) hidden_size: Option<u64>,
    /// Width of the MLP [default: the family's usual multiple of the channels]
    #[arg(long, value_name = "N", requires = "arch", value_parser = positive())]
    pub(crate) intermediate_size: Option<u64>,
    /// Longest row in tokens [default: 256]
    #[arg(long, value_name = "T", requires = "arch", value_parser = positive())]
    pub(crate) context_length: Option<u64>,
    /// `char` or `bpe` (trained on --data), a model directory, or a tokenizer.json
    #[arg(long, value_name = "KIND")]
    pub(crate) tokenizer: String,
    /// Vocabulary size [default: 1024 for `bpe`, else the tokenizer's]
    #[arg(long, value_name = "N")]
    pub(crate) vocab_size: Option<u64>,
    /// Text that the tokenizer is trained on; repeatable
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Vec<PathBuf>,
    /// Seed of the weights
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub(crate) seed: u64,
    /// Print one JSON line on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

impl InitFlags {
    /// The first flag that gives a size of the model.
    pub(crate) fn first_size(&self) -> Option<&'static str> {
        let sizes = [
            ("--n-layers", self.n_layers),
            ("--n-heads", self.n_heads),
            ("--n-kv-heads", self.n_kv_heads),
            ("--hidden-size", self.hidden_size),
            ("--intermediate-size", self.intermediate_size),
            ("--context-length", self.context_length),
        ];
        sizes.into_iter().find_map(|(flag, size)| size.map(|_| flag))
    }
}

#[derive(Debug, Args)]
pub(crate) struct BenchFlags {
    #[command(subcommand)]
    pub(crate) what: BenchWhat,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchWhat {
    /// Full training steps on one fixed random batch from random weights
    #[command(allow_negative_numbers = true)]
    Step(BenchStepFlags),
}

#[derive(Debug, Args)]
pub(crate) struct BenchStepFlags {
    /// A directory with a config.json, or gpt2, smollm2-135m, qwen2.5-0.5b, tinyllama-1.1b
    #[arg(long, value_name = "DIR|NAME")]
    pub(crate) model: String,
    /// Rows per step
    #[arg(long, value_name = "B", default_value_t = 4)]
    pub(crate) batch_size: u64,
    /// Tokens per row
    #[arg(long, value_name = "T", default_value_t = 1024)]
    pub(crate) max_length: u64,
    /// Measured steps
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) steps: u64,
    /// Steps before the measured ones
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) warmup: u64,
    /// Budget of the whole process
    #[arg(long, value_name = "BYTES", default_value = "auto", value_parser = Memory::parse)]
    pub(crate) memory: Memory,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<u32>,
    /// Seed of weights and batch
    #[arg(long, value_name = "N", default_value_t = 1337)]
    pub(crate) seed: u64,
    /// What values are stored in
    #[arg(long, value_parser = ["f32", "bf16", "f16"], default_value = "f32")]
    pub(crate) precision: String,
    /// Update rule
    #[arg(long, value_parser = ["adamw", "sgd"], default_value = "adamw")]
    pub(crate) optimizer: String,
    /// Learning rate
    #[arg(long, value_parser = number, value_name = "X", default_value_t = 3e-4)]
    pub(crate) learning_rate: f64,
    /// Largest norm of the gradient; 0 is off
    #[arg(long, value_parser = number, value_name = "X", default_value_t = 0.0)]
    pub(crate) max_grad_norm: f64,
    /// Time by class of op, on stderr
    #[arg(long)]
    pub(crate) profile: bool,
    /// The fastest plan that fits: keeps everything where there is room, for the last per cent of speed
    #[arg(long)]
    pub(crate) fastest: bool,
    /// Print JSON lines on stdout: one per step, then the record
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_flag_counts_as_given_last_and_files_add_up() {
        let line = "ounce train --max-steps 1 --data a --max-steps 2 --data b --packing";
        let Command::Train(flags) = Cli::parse_from(line.split(' ')).command else {
            panic!("the command is train")
        };
        let given = serde_json::json!({ "max_steps": 2, "data": ["a", "b"], "packing": true });
        assert_eq!(Value::Object(flags.given().expect("plain paths")), given);
    }

    #[test]
    fn help_shows_what_a_command_reads() {
        let mut grammar = grammar();
        grammar.build();
        for (name, read) in READ_BY {
            let outer =
                if name == "inspect" { grammar.find_subcommand("data") } else { Some(&grammar) };
            let command = outer.and_then(|outer| outer.find_subcommand(name)).expect("a command");
            let shown = command.get_arguments().filter(|arg| !arg.is_hide_set());
            let mut shown: Vec<&str> = shown.map(|arg| arg.get_id().as_str()).collect();
            let mut wanted: Vec<&str> = read.split(' ').chain(["help"]).collect();
            shown.sort_unstable();
            wanted.sort_unstable();
            assert_eq!(shown, wanted, "{name}");
        }
    }

    #[test]
    fn every_flag_of_a_run_is_a_setting() {
        let mut command = <RunFlags as Args>::augment_args(clap::Command::new("run"));
        command.build();
        let Ok(Value::Object(known)) = serde_json::to_value(ounce_train::Settings::default())
        else {
            panic!("settings are an object")
        };
        let shown = command.get_arguments().filter(|a| !a.is_hide_set());
        let flags: Vec<String> = shown
            .map(|a| a.get_id().to_string())
            .filter(|id| !matches!(id.as_str(), "config" | "json" | "help" | "override_begun"))
            .collect();
        assert_eq!(flags.len(), known.len());
        assert!(flags.iter().all(|f| known.contains_key(f)), "{flags:?}");
    }
}

//! Chat templates: conversations to the text that a model was taught, as `transformers` renders them.
//!
//! Idea: a template is a Jinja program that came with a model. It is run by `minijinja` in an environment like that of
//! `transformers` (`environment.rs`), which can reach nothing of this machine. A template says what of its output the
//! assistant wrote by `{% generation %}` blocks, here filters that put a mark around what is in them; the marks are
//! taken out of the output and become spans. For templates without such blocks `supervised.rs` finds the answers.
//!
//! Invariants: output is byte-equal to that of `transformers`, up to local time (UTC is taken here). Running ends after
//! a bounded number of instructions, with bounded output, texts and stack, whatever the template says. Known limit: a
//! value that holds another twice, and so on forty times, is compared and turned into text by the library part by part,
//! which takes a time and memory that no instruction counts.
//!
//! Files in reading order: this one (load, render), `environment.rs`, `python.rs` (values in Python's spelling),
//! `methods.rs` (Python's methods), `strftime.rs`, `markup.rs` (text marked safe), `supervised.rs` (which part of the
//! text is supervised), `tags.rs` (what is not compiled).

mod environment;
mod markup;
mod methods;
mod python;
mod strftime;
mod supervised;
mod tags;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value};

pub use supervised::{EndOfTurn, SupervisedText};

use crate::dataset::Conversation;
use crate::error::IoError;
use crate::json::{read_json, read_small_file};
use crate::model_files::stay_inside;

/// Longest template that is read.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
/// Longest tokenizer configuration.
pub(crate) const MAX_TOKENIZER_CONFIG_BYTES: u64 = 16 << 20;
/// The file of a template of its own.
pub(crate) const TEMPLATE_FILE: &str = "chat_template.jinja";
/// Instructions that rendering may take, before those for the length of its input.
const BASE_FUEL: u64 = 1_000_000;
/// Instructions per byte of input. Each also pays for 64 bytes of memory.
const FUEL_PER_BYTE: u64 = 4;
/// Instructions that rendering may take, whatever its input.
const MAX_FUEL: u64 = 3_500_000;
/// Instructions that are safe on the stack of any thread, 2 MiB. Of 294 templates no conversation of a test took 3,000.
const FUEL_ON_ANY_STACK: u64 = 3_000;
/// Bytes of stack that a template can take per instruction: what builds a list that holds the one before costs 1.75,
/// and 400 bytes where such lists are compared (measured; dropping them takes 62, printing them 350).
const STACK_BYTES_PER_FUEL: u64 = 320;
/// Stack for what else is called.
const STACK_BYTES: u64 = 1 << 20;
/// Bytes of output, before those for the length of the input.
const BASE_OUTPUT_BYTES: usize = 4 << 20;
/// Bytes of output per byte of input.
const OUTPUT_PER_BYTE: usize = 16;

/// What marks begin and end a `{% generation %}` block: two characters that no text is meant to hold.
const MARKS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

/// OpenAI's ChatML, for models whose tokenizer has its two tokens.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' \
                      + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The messages one after the other: what others say ends in a line feed, an answer in the end-of-text token.
const PLAIN: &str = "{% if bos_token and ounce_adds_bos %}{{ bos_token }}{% endif %}\
                     {% for message in messages %}{% if message['role'] == 'assistant' %}\
                     {% generation %}{{ message['content'] }}{{ eos_token or '\n' }}{% endgeneration %}\
                     {% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}";

/// Where a template comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TemplateOrigin {
    /// A file or key of the model.
    Model,
    /// The model has none, but the tokens of ChatML.
    ChatMl,
    /// The model has none: messages one after the other.
    Plain,
}

/// A compiled template with the special tokens of its tokenizer.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// The template for conversations with tools, where it is another.
    tool_source: Option<String>,
    special: Map<String, Value>,
    origin: TemplateOrigin,
    name: String,
    now_s: u64,
}

/// What a conversation was rendered to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Bytes of it that stand in `{% generation %}` blocks, ascending.
    pub generated: Vec<Range<usize>>,
}

/// The templates that a model directory holds, by name.
#[derive(Debug, Default)]
struct Found {
    templates: BTreeMap<String, String>,
    file: &'static str,
}

impl ChatTemplate {
    /// The template of the model in `dir`, or one of the two that stand in where it has none. `now_s`: seconds since
    /// 1970, for templates that write the date. `tokens`: what the tokenizer knows as one token; `adds_bos`: whether it
    /// begins texts with its beginning-of-text token.
    ///
    /// # Errors
    /// `Read`, `BadFile`, `BadLine`: files that are broken, and templates that do not compile.
    pub fn load(
        dir: &Path,
        now_s: u64,
        adds_bos: bool,
        is_token: impl Fn(&str) -> bool,
    ) -> Result<Self, IoError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = if config_path.exists() {
            read_json(&config_path, MAX_TOKENIZER_CONFIG_BYTES)?
        } else {
            Value::Null
        };
        let mut special = special_tokens(&config);
        let map_path = dir.join("special_tokens_map.json");
        if map_path.exists() {
            for (name, token) in special_tokens(&read_json(&map_path, MAX_TOKENIZER_CONFIG_BYTES)?)
            {
                special.entry(name).or_insert(token);
            }
        }
        let found = Found::read(dir, &config)?;
        let pick = |names: &[&str]| names.iter().find_map(|n| found.templates.get(*n).cloned());
        let default = pick(&["default"]).or_else(|| found.templates.values().next().cloned());
        let (source, origin, name) = match default {
            Some(source) => (source, TemplateOrigin::Model, found.file.to_owned()),
            None if is_token("<|im_start|>") && is_token("<|im_end|>") => {
                (CHATML.to_owned(), TemplateOrigin::ChatMl, "ChatML".to_owned())
            }
            None => {
                special.insert("ounce_adds_bos".into(), adds_bos.into());
                (PLAIN.to_owned(), TemplateOrigin::Plain, "plain".to_owned())
            }
        };
        let tool_source = pick(&["tool_use"]).filter(|_| origin == TemplateOrigin::Model);
        Self::compile(source, tool_source, special, now_s)
            .map(|template| Self { origin, name, ..template })
            .map_err(|reason| {
                let reason = format!("the chat template does not compile: {reason}");
                IoError::bad_file(&dir.join(found.file), reason, "fetch the file again")
            })
    }

    /// A template from its source, with the special tokens that it may name.
    ///
    /// # Errors
    /// `Token`: what is wrong with the source.
    pub fn from_source(
        source: &str,
        special: Map<String, Value>,
        now_s: u64,
    ) -> Result<Self, IoError> {
        Self::compile(source.into(), None, special, now_s).map_err(|reason| IoError::Token {
            reason: format!("the chat template does not compile: {reason}"),
            hint: "check it with `transformers`".into(),
        })
    }

    fn compile(
        source: String,
        tool_source: Option<String>,
        special: Map<String, Value>,
        now_s: u64,
    ) -> Result<Self, String> {
        let mut environment = environment::environment(now_s);
        let add = |environment: &mut Environment<'static>, name: &'static str, source: &str| {
            tags::check(source)?;
            let source = environment::adapt(source);
            guard(|| environment.add_template_owned(name, source)).map_err(|f| f.reason)
        };
        add(&mut environment, "chat", &source)?;
        if let Some(tools) = &tool_source {
            add(&mut environment, "tools", tools)?;
        }
        let (origin, name) = (TemplateOrigin::Model, String::new());
        Ok(Self { environment, source, tool_source, special, origin, name, now_s })
    }

    /// Where the template comes from.
    pub fn origin(&self) -> TemplateOrigin {
        self.origin
    }

    /// The file it stands in, or the name of the one that stands in.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The template, and the one for conversations with tools behind it, if there is one.
    pub fn source(&self) -> String {
        format!("{}{}", self.source, self.tool_source.as_deref().unwrap_or_default())
    }

    /// Whether the template says itself what the assistant wrote.
    pub fn has_generation(&self) -> bool {
        self.generates(false)
    }

    /// The same of the template for conversations with tools or without.
    fn generates(&self, has_tools: bool) -> bool {
        let of_tools = self.tool_source.as_ref().filter(|_| has_tools);
        environment::has_generation(of_tools.unwrap_or(&self.source))
    }

    /// Whether the template knows `tool_calls`, and whether it knows `tools`.
    pub fn knows_tools(&self) -> (bool, bool) {
        let source = self.tool_source.as_ref().unwrap_or(&self.source);
        (source.contains("tool_calls"), source.contains("tools"))
    }

    /// The time that the template writes, if it writes one, in seconds since 1970.
    pub fn written_s(&self) -> Option<u64> {
        self.source().contains("strftime_now").then_some(self.now_s)
    }

    /// Where this is the template for models that have none, with these tokens for those that the configuration does
    /// not name: without its end-of-text token an answer would have no end to learn.
    #[must_use]
    pub fn or_special_tokens(mut self, tokens: [(&str, Option<String>); 2]) -> Self {
        if self.origin == TemplateOrigin::Plain {
            for (name, token) in tokens {
                if let (false, Some(token)) = (self.special.contains_key(name), token) {
                    self.special.insert(name.to_owned(), token.into());
                }
            }
        }
        self
    }

    /// A special token of the tokenizer, for instance `eos_token`.
    pub fn special_token(&self, name: &str) -> Option<&str> {
        self.special.get(name)?.as_str()
    }

    /// Renders messages.
    ///
    /// # Errors
    /// What the template refuses, or what is wrong with it: a reason without a place.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<Rendered, String> {
        let mut context = self.special.clone();
        let aliased: Vec<Value> = messages.iter().map(with_reasoning).collect();
        context.insert("messages".into(), Value::Array(aliased));
        context.insert("tools".into(), tools.cloned().unwrap_or(Value::Null));
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        self.render_context(&context, tools.is_some())
    }

    /// Renders with variables of the caller's choice.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_context(
        &self,
        context: &Map<String, Value>,
        has_tools: bool,
    ) -> Result<Rendered, String> {
        let name = if has_tools && self.tool_source.is_some() { "tools" } else { "chat" };
        let n_input = text_bytes(context);
        let limit = BASE_OUTPUT_BYTES + OUTPUT_PER_BYTE * n_input;
        let fuel = (BASE_FUEL + FUEL_PER_BYTE * n_input as u64).min(MAX_FUEL);
        let render = |fuel: u64| {
            let mut output = Bounded { bytes: Vec::new(), limit };
            let context = minijinja::Value::from(minijinja::value::Serde(context));
            guard(|| environment::render(&self.environment, name, context, fuel, &mut output))?;
            Ok(output.bytes)
        };
        let bytes = match render(FUEL_ON_ANY_STACK) {
            Err(Failure { out_of_fuel: true, .. }) => on_deep_stack(fuel, &render),
            result => result,
        };
        let bytes = bytes.map_err(|failure| failure.reason)?;
        String::from_utf8(bytes).map(take_marks).map_err(|e| e.to_string())
    }

    /// The messages as the template takes them.
    fn messages_of(&self, conversation: &Conversation) -> Vec<Value> {
        let mut messages = conversation.messages.clone();
        for &i in &conversation.calls {
            let Some(message) = messages[i].as_object_mut() else { continue };
            if self.knows_tools().0 {
                message.insert("content".into(), "".into());
            } else {
                message.shift_remove("tool_calls");
            }
        }
        messages
    }
}

impl Found {
    /// The templates of a model directory; a file of its own wins over the tokenizer's configuration.
    fn read(dir: &Path, config: &Value) -> Result<Self, IoError> {
        let templates = template_files(dir)?;
        if !templates.is_empty() {
            return Ok(Self { templates, file: TEMPLATE_FILE });
        }
        let mut found = Self { templates, file: "tokenizer_config.json" };
        let bad = || {
            let reason = "`chat_template` is neither a string nor a list of {name, template}";
            IoError::bad_file(&dir.join("tokenizer_config.json"), reason, "fetch the file again")
        };
        match &config["chat_template"] {
            Value::Null => {}
            Value::String(text) => {
                found.templates.insert("default".into(), text.clone());
            }
            Value::Array(list) => {
                for entry in list {
                    let (name, text) = (entry["name"].as_str(), entry["template"].as_str());
                    let (Some(name), Some(text)) = (name, text) else { return Err(bad()) };
                    found.templates.insert(name.into(), text.into());
                }
            }
            _ => return Err(bad()),
        }
        if let Some(long) = found.templates.values().find(|t| t.len() as u64 > MAX_TEMPLATE_BYTES) {
            let reason = format!("a chat template of {} bytes is too long", long.len());
            return Err(IoError::bad_file(&dir.join(found.file), reason, "fetch the file again"));
        }
        Ok(found)
    }
}

/// The templates of a model directory that are files of their own, by name: `chat_template.jinja` as `default`, and
/// beside it those in `additional_chat_templates/`.
///
/// # Errors
/// `Read`, `BadFile`.
pub(crate) fn template_files(dir: &Path) -> Result<BTreeMap<String, String>, IoError> {
    let mut templates = BTreeMap::new();
    let file = dir.join(TEMPLATE_FILE);
    if !file.exists() {
        return Ok(templates);
    }
    templates.insert("default".to_owned(), read_template(&file)?);
    let more = dir.join("additional_chat_templates");
    if more.is_dir() {
        for entry in std::fs::read_dir(&more).map_err(|e| IoError::reading(&more, e))? {
            let path = entry.map_err(|e| IoError::reading(&more, e))?.path();
            if let (Some("jinja"), Some(name)) = (
                path.extension().and_then(|e| e.to_str()),
                path.file_stem().and_then(|s| s.to_str()),
            ) {
                stay_inside(dir, &path)?;
                templates.insert(name.to_owned(), read_template(&path)?);
            }
        }
    }
    Ok(templates)
}

fn read_template(path: &Path) -> Result<String, IoError> {
    String::from_utf8(read_small_file(path, MAX_TEMPLATE_BYTES)?)
        .map_err(|_| IoError::bad_file(path, "is not UTF-8", "fetch the file again"))
}

/// The special tokens that a tokenizer's configuration names, as strings.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let Some(object) = config.as_object() else { return Map::new() };
    let tokens = object.iter().filter(|(key, _)| key.ends_with("_token")).filter_map(|(key, v)| {
        let text = v.as_str().or_else(|| v["content"].as_str())?;
        Some((key.clone(), text.into()))
    });
    tokens.collect()
}

/// A message whose reasoning goes by every name that templates read, as `transformers` has it.
fn with_reasoning(message: &Value) -> Value {
    let Some(object) = message.as_object() else { return message.clone() };
    let names = ["reasoning_content", "thinking", "reasoning"];
    let Some(text) = names.iter().find_map(|k| object.get(*k).filter(|v| !v.is_null())) else {
        return message.clone();
    };
    let mut named = Map::from_iter([("thinking".to_owned(), text.clone())]);
    named.extend(object.clone());
    named.insert("reasoning_content".into(), text.clone());
    Value::Object(named)
}

/// Bytes of all strings in a context.
fn text_bytes(context: &Map<String, Value>) -> usize {
    fn of(value: &Value) -> usize {
        match value {
            Value::String(text) => text.len(),
            Value::Array(list) => list.iter().map(of).sum(),
            Value::Object(map) => map.iter().map(|(k, v)| k.len() + of(v)).sum(),
            _ => 8,
        }
    }
    context.values().map(of).sum()
}

/// What ended a template. Errors of the library hold values, which may be too deep for the stack of who drops them.
#[derive(Debug)]
struct Failure {
    reason: String,
    out_of_fuel: bool,
}

/// Renders on a thread of its own, whose stack holds whatever so much fuel can nest.
fn on_deep_stack<T: Send>(
    fuel: u64,
    render: &(impl Fn(u64) -> Result<T, Failure> + Sync),
) -> Result<T, Failure> {
    let bytes = STACK_BYTES + STACK_BYTES_PER_FUEL * fuel;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(bytes as usize);
        let thread = thread.spawn_scoped(scope, || render(fuel)).map_err(|e| Failure {
            reason: format!("no thread with a stack of {bytes} bytes: {e}"),
            out_of_fuel: false,
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs the library, whose arithmetic overflows on some broken templates; that is the template's fault.
fn guard<T>(run: impl FnOnce() -> Result<T, minijinja::Error>) -> Result<T, Failure> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|e| Failure {
            reason: describe(&e),
            out_of_fuel: e.kind() == ErrorKind::OutOfFuel,
        }),
        Err(_) => Err(Failure { reason: "its structure is broken".to_owned(), out_of_fuel: false }),
    }
}

/// An error of a template on one line.
fn describe(e: &minijinja::Error) -> String {
    let detail = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
    match e.line() {
        Some(line) => format!("{detail} (line {line} of the template)"),
        None => detail,
    }
}

/// Takes the marks of `{% generation %}` blocks out of a text.
fn take_marks(marked: String) -> Rendered {
    if !marked.contains(MARKS) {
        return Rendered { text: marked, generated: Vec::new() };
    }
    let (mut text, mut generated, mut start) = (String::with_capacity(marked.len()), Vec::new(), 0);
    for c in marked.chars() {
        if c == MARKS[0] {
            start = text.len();
        } else if c == MARKS[1] {
            generated.push(start..text.len());
        } else {
            text.push(c);
        }
    }
    Rendered { text, generated }
}

/// Output that ends in an error where it grows too long.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
}

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            let what = format!("the template writes more than {} bytes", self.limit);
            return Err(std::io::Error::other(what));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

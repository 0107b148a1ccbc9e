//! Rows to samples: one shape for every format.
//!
//! A conversation is a list of messages as chat templates take them: `{"role", "content"}` and whatever else a message
//! of the file carries (`tool_calls`, `reasoning_content`, `name`). Answers of the assistant are supervised, except
//! those that belong to the prompt of a prompt-completion or preference row, and messages that say `"weight": 0`.
//!
//! Roles of ShareGPT become: `human` user, `gpt` assistant, `system` system, `observation` tool, and `function_call` an
//! assistant message with `tool_calls`. Alpaca's `input` follows its `instruction` on a line of its own.

use std::cell::Cell;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{ColumnMapping, Place, RawRow, RowFormat};
use crate::error::IoError;
use crate::json::parse_at_most;

/// What a row holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Sample {
    /// A text, all of which is supervised.
    Text(String),
    /// A conversation, of which answers are supervised.
    Conversation(Conversation),
}

/// Messages in the order in which they were said.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    /// Objects with `role` and `content`.
    pub messages: Vec<Value>,
    /// Tools that the assistant may call, as templates take them.
    pub tools: Option<Value>,
    /// So many messages at the start are given, not supervised.
    pub n_given: usize,
    /// Messages that are a call of a function both as `content` and as `tool_calls`: a template takes one of them.
    pub calls: Vec<usize>,
}

impl Conversation {
    /// Whether message `i` is to be supervised.
    pub fn is_supervised(&self, i: usize) -> bool {
        let message = &self.messages[i];
        // Columns of floats say 0.0.
        let counts = message["weight"].as_f64() != Some(0.0);
        i >= self.n_given && message["role"] == "assistant" && counts
    }
}

/// Why a row is not of its format.
struct Fault(String);

/// Turns a row of `path` into its samples: mostly one; none where a row has nothing to learn by its own word.
///
/// # Errors
/// `BadLine` or `BadFile`, naming the place and what is missing.
pub(crate) fn samples(
    path: &Path,
    row: &RawRow,
    format: RowFormat,
    columns: &ColumnMapping,
) -> Result<Vec<Sample>, IoError> {
    let read = Row { object: row.value.as_object(), columns };
    read.samples(format).map_err(|Fault(reason)| {
        let shown: String = row.value.to_string().chars().take(60).collect();
        let keys = format.keys().join("`, `");
        let hint = format!(
            "rows of this file are read as `{format}` (keys `{keys}`); `--dataset-format` names another format, \
             `--on-bad-row skip` passes such rows over"
        );
        fault(row.place, path, &format!("{reason} in `{shown}`"), hint)
    })
}

fn fault(place: Place, path: &Path, reason: &str, hint: String) -> IoError {
    place.fault(path, reason, hint)
}

/// A row, read by the keys of its format.
struct Row<'a> {
    object: Option<&'a Map<String, Value>>,
    columns: &'a ColumnMapping,
}

impl Row<'_> {
    fn samples(&self, format: RowFormat) -> Result<Vec<Sample>, Fault> {
        if self.object.is_none() {
            return Err(Fault("the row is not an object".into()));
        }
        let one = |c: Conversation| Ok(vec![Sample::Conversation(c)]);
        match format {
            RowFormat::Text => {
                let text = self.text("text")?;
                if text.contains('\0') {
                    return Err(Fault("`text` holds a NUL".into()));
                }
                Ok(vec![Sample::Text(text)])
            }
            RowFormat::Messages => one(self.with_tools(self.messages("messages")?, 0)?),
            RowFormat::ShareGpt => {
                let mut messages = self.system()?;
                messages.extend(self.messages("conversations")?);
                one(self.with_tools(messages, 0)?)
            }
            RowFormat::PromptCompletion if self.get("label") == Some(&Value::Bool(false)) => {
                Ok(Vec::new())
            }
            RowFormat::PromptCompletion => one(self.pair("prompt", "completion")?),
            RowFormat::QuestionAnswer => one(self.pair("question", "answer")?),
            RowFormat::Preference => one(self.preference()?),
            RowFormat::Alpaca => one(self.alpaca()?),
            RowFormat::Turns => one(self.turns()?),
            RowFormat::Instances => self.instances(),
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.columns.get(self.object?, key).filter(|v| !v.is_null())
    }

    fn need(&self, key: &str) -> Result<&Value, Fault> {
        self.get(key).ok_or_else(|| Fault(format!("missing key `{}`", self.columns.name(key))))
    }

    fn text(&self, key: &str) -> Result<String, Fault> {
        let value = self.need(key)?;
        let name = self.columns.name(key);
        let wrong = || Fault(format!("`{name}` is {}, but must be a string", kind_of(value)));
        value.as_str().map(str::to_owned).ok_or_else(wrong)
    }

    /// The string at `key`, or nothing where there is none.
    fn optional_text(&self, key: &str) -> Result<String, Fault> {
        if self.get(key).is_some() { self.text(key) } else { Ok(String::new()) }
    }

    fn system(&self) -> Result<Vec<Value>, Fault> {
        let text = self.optional_text("system")?;
        Ok(if text.is_empty() { Vec::new() } else { vec![message("system", &text)] })
    }

    /// A prompt and its answer, each a string or a list of messages.
    fn pair(&self, prompt: &str, answer: &str) -> Result<Conversation, Fault> {
        let mut messages = self.system()?;
        match self.need(prompt)? {
            Value::Array(_) => messages.extend(self.messages(prompt)?),
            _ => messages.push(message("user", &self.text(prompt)?)),
        }
        let n_given = messages.len();
        messages.extend(self.answer(answer)?);
        self.with_tools(messages, n_given)
    }

    /// An answer: a string, a message or a list of messages.
    fn answer(&self, key: &str) -> Result<Vec<Value>, Fault> {
        match self.need(key)? {
            Value::Array(_) | Value::Object(_) => self.messages(key),
            _ => Ok(vec![message("assistant", &self.text(key)?)]),
        }
    }

    /// The chosen answer after its prompt; without a prompt, what both answers have in common is the prompt.
    fn preference(&self) -> Result<Conversation, Fault> {
        if self.get("prompt").is_some() && !self.repeats_prompt() {
            return self.pair("prompt", "chosen");
        }
        if self.get("conversations").is_some() {
            let mut messages = self.system()?;
            messages.extend(self.messages("conversations")?);
            let n_given = messages.len();
            messages.extend(self.answer("chosen")?);
            return self.with_tools(messages, n_given);
        }
        if self.get("chosen").is_some_and(Value::is_string) {
            let mut messages = self.system()?;
            let (question, answer) = self.question_and_chosen()?;
            messages.extend([message("user", &question), message("assistant", &answer)]);
            let n_given = messages.len() - 1;
            return self.with_tools(messages, n_given);
        }
        let chosen = self.messages("chosen")?;
        let rejected = match self.get("rejected") {
            Some(_) => self.messages("rejected")?,
            None => Vec::new(),
        };
        let n_given = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
        self.with_tools(chosen, n_given)
    }

    /// A chosen answer that is a string, after a question of another name than `prompt`, or what both answers begin
    /// with.
    fn question_and_chosen(&self) -> Result<(String, String), Fault> {
        let chosen = self.text("chosen")?;
        if self.get("question").is_some() {
            return Ok((self.text("question")?, chosen));
        }
        if self.get("instruction").is_some() {
            return Ok((self.instruction(&self.optional_text("input")?)?, chosen));
        }
        let (prompt, answer) = split_common(&chosen, &self.optional_text("rejected")?);
        if prompt.trim().is_empty() {
            let prompt = self.columns.name("prompt");
            return Err(Fault(format!(
                "missing key `{prompt}`, and the answers have no beginning in common"
            )));
        }
        Ok((prompt.to_owned(), answer.to_owned()))
    }

    /// Whether `prompt` is a text that both answers, whole conversations, begin with once more.
    fn repeats_prompt(&self) -> bool {
        let first = self.get("chosen").and_then(Value::as_array).and_then(|list| list.first());
        let role = first.map(|m| if m["role"].is_null() { &m["from"] } else { &m["role"] });
        let asks =
            role.and_then(Value::as_str).is_some_and(|r| matches!(r, "system" | "user" | "human"));
        asks && self.get("prompt").is_some_and(Value::is_string)
    }

    fn alpaca(&self) -> Result<Conversation, Fault> {
        let mut messages = self.system()?;
        if let Some(history) = self.get("history") {
            let pairs =
                history.as_array().ok_or_else(|| Fault("`history` is not a list".into()))?;
            for pair in pairs {
                match (pair[0].as_str(), pair[1].as_str()) {
                    (Some(question), Some(answer)) => {
                        messages.push(message("user", question));
                        messages.push(message("assistant", answer));
                    }
                    _ => return Err(Fault("`history` is not a list of pairs of strings".into())),
                }
            }
        }
        messages.push(message("user", &self.instruction(&self.optional_text("input")?)?));
        messages.push(message("assistant", &self.text("output")?));
        self.with_tools(messages, 0)
    }

    /// The instruction, and its input on a line of its own.
    fn instruction(&self, input: &str) -> Result<String, Fault> {
        let instruction = self.text("instruction")?;
        Ok(match (instruction.is_empty(), input.is_empty()) {
            (_, true) => instruction,
            (true, false) => input.into(),
            (false, false) => format!("{instruction}\n{input}"),
        })
    }

    /// Questions as far as there are answers; without any, the first question alone.
    fn turns(&self) -> Result<Conversation, Fault> {
        let strings = |key: &str| -> Result<Vec<String>, Fault> {
            let list = self.need(key)?.as_array();
            let list = list.ok_or_else(|| Fault(format!("`{key}` is not a list of strings")))?;
            let string = |v: &Value| v.as_str().map(str::to_owned);
            let strings: Option<Vec<String>> = list.iter().map(string).collect();
            strings.ok_or_else(|| Fault(format!("`{key}` is not a list of strings")))
        };
        let questions = strings("turns")?;
        let answers =
            if self.get("reference").is_some() { strings("reference")? } else { Vec::new() };
        let mut messages = Vec::new();
        for (i, question) in questions.into_iter().enumerate().take(answers.len().max(1)) {
            messages.push(message("user", &question));
            messages.extend(answers.get(i).map(|a| message("assistant", a)));
        }
        self.with_tools(messages, 0)
    }

    fn instances(&self) -> Result<Vec<Sample>, Fault> {
        let list = self.need("instances")?.as_array();
        let list = list.ok_or_else(|| Fault("`instances` is not a list".into()))?;
        let one = |instance: &Value| {
            let Some(output) = instance["output"].as_str() else {
                return Err(Fault("an instance has no string `output`".into()));
            };
            let question = self.instruction(instance["input"].as_str().unwrap_or(""))?;
            let messages = vec![message("user", &question), message("assistant", output)];
            Ok(Sample::Conversation(Conversation { messages, ..Conversation::default() }))
        };
        list.iter().map(one).collect()
    }

    /// The conversation of these messages, with the row's tools.
    fn with_tools(&self, messages: Vec<Value>, n_given: usize) -> Result<Conversation, Fault> {
        if messages.is_empty() {
            return Err(Fault("the conversation is empty".into()));
        }
        let tools = match self.get("tools") {
            None => None,
            Some(Value::String(text)) if text.trim().is_empty() => None,
            // Files without nested types carry tools as a string of JSON.
            Some(Value::String(text)) => Some(
                nested_json(text)
                    .map_err(|e| Fault(format!("`tools` is a string, but no JSON: {e}")))?,
            ),
            Some(tools) => Some(tools.clone()),
        };
        let tools = tools.filter(|t: &Value| t.as_array().is_none_or(|list| !list.is_empty()));
        let calls = (0..messages.len()).filter(|&i| is_call(&messages[i])).collect();
        Ok(Conversation { messages, tools, n_given, calls })
    }

    /// The messages at `key`: a list, or a single one.
    fn messages(&self, key: &str) -> Result<Vec<Value>, Fault> {
        let value = self.need(key)?;
        let parsed;
        let value = match value {
            Value::String(text) if text.trim_start().starts_with('[') => {
                parsed = nested_json(text).unwrap_or(Value::Null);
                &parsed
            }
            other => other,
        };
        let name = self.columns.name(key);
        let list = match value {
            Value::Array(list) => list.as_slice(),
            Value::Object(_) => std::slice::from_ref(value),
            _ => return Err(Fault(format!("`{name}` is not a list of messages"))),
        };
        let numbered = |(i, m): (usize, &Value)| {
            read_message(m).map_err(|reason| Fault(format!("`{name}[{i}]`: {reason}")))
        };
        list.iter().enumerate().map(numbered).collect()
    }
}

/// JSON in a string of a row. Its values are bounded by the length of the text, as those of the row itself are: a
/// message has a few for its dozens of bytes, where `[0,0,...]` would take fifty times its length in memory.
fn nested_json(text: &str) -> Result<Value, serde_json::Error> {
    parse_at_most(text.as_bytes(), &Cell::new(1000 + text.len() / 12))
}

/// A message in the words of chat templates.
fn read_message(value: &Value) -> Result<Value, String> {
    let Some(object) = value.as_object() else {
        return Err(format!("a message is an object, not {}", kind_of(value)));
    };
    // Parquet and typed data sets fill what a message does not have with nulls.
    let mut message: Map<String, Value> =
        object.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect();
    if let Some(role) = message.shift_remove("from") {
        message.shift_insert(0, "role".into(), role);
    }
    if !message.contains_key("content")
        && let Some(content) = message.shift_remove("value")
    {
        message.shift_insert(1.min(message.len()), "content".into(), content);
    }
    let role = match message.get("role").and_then(Value::as_str) {
        Some(role) => role.to_owned(),
        None => return Err("the message has no string `role` or `from`".into()),
    };
    // In whatever case it is written.
    let known = role.to_lowercase();
    let role = match known.as_str() {
        "user" | "assistant" | "system" | "tool" => known.as_str(),
        "human" => "user",
        "gpt" | "model" | "bot" | "chatgpt" => "assistant",
        "observation" | "function_response" => "tool",
        "function_call" => return tool_call(&message),
        _ => role.as_str(),
    };
    message.insert("role".into(), role.into());
    match message.get("content") {
        Some(Value::String(_) | Value::Array(_)) => Ok(Value::Object(message)),
        None if message.contains_key("tool_calls") => Ok(Value::Object(message)),
        None => Err("the message has no `content` or `value`".into()),
        Some(other) => Err(format!("`content` is {}, but must be a string", kind_of(other))),
    }
}

/// ShareGPT's call of a function, a string of JSON, as an assistant's message.
fn tool_call(message: &Map<String, Value>) -> Result<Value, String> {
    let Some(text) = message.get("content").and_then(Value::as_str) else {
        return Err("the function call is not a string".into());
    };
    let call = match nested_json(text) {
        Ok(Value::Object(call)) if call.contains_key("name") => call,
        _ => return Ok(self::message("assistant", text)),
    };
    let call = json!({ "type": "function", "function": call });
    Ok(json!({ "role": "assistant", "content": text, "tool_calls": [call] }))
}

/// Whether a message is what [`tool_call`] makes.
fn is_call(message: &Value) -> bool {
    message["tool_calls"].is_array()
        && message["content"].as_str().is_some_and(|text| {
            nested_json(text).is_ok_and(|call| call == message["tool_calls"][0]["function"])
        })
}

fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// What both texts begin with, up to a word's end, and the rest of the first.
fn split_common<'a>(chosen: &'a str, rejected: &str) -> (&'a str, &'a str) {
    let same = chosen.char_indices().zip(rejected.chars()).take_while(|((_, a), b)| a == b);
    let end = same.last().map_or(0, |((at, c), _)| at + c.len_utf8());
    let end = chosen[..end].rfind([' ', '\n']).unwrap_or(0);
    chosen.split_at(end)
}

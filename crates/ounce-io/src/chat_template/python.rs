//! Values in Python's spelling: `str`, `repr` and `json.dumps`, as templates written for Jinja expect them.
//!
//! Invariant: what is spelled is never longer than the caller allows, nor is a value walked that is nested deeper than
//! [`MAX_DEPTH`]: forty lists that each hold the one before twice would be spelled in 2^40 characters.

use std::fmt::{self, Write};

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};

/// Levels of lists and maps that are spelled. Python ends at a thousand; conversations nest ten.
const MAX_DEPTH: usize = 200;
/// Bytes that a unit of fuel pays for.
const BYTES_PER_FUEL: usize = 64;

/// `json.dumps`'s arguments.
#[derive(Debug, Clone, Default)]
pub(super) struct JsonStyle {
    pub(super) indent: Option<usize>,
    pub(super) ensure_ascii: bool,
    pub(super) sort_keys: bool,
    pub(super) separators: Option<[String; 2]>,
}

/// Text that is being spelled, with the bytes that it may still grow by.
pub(super) struct Spelling {
    text: String,
    room_bytes: usize,
}

impl Spelling {
    /// No text yet, for what the template's fuel still pays for.
    pub(super) fn new(state: &State<'_, '_>) -> Self {
        Self { text: String::new(), room_bytes: room_bytes(state) }
    }

    /// The text.
    ///
    /// # Errors
    /// That of the template, where what was to be written did not fit.
    pub(super) fn finish(self, written: fmt::Result) -> Result<String, Error> {
        let what = format!("a value is too long to be written, or nested over {MAX_DEPTH} deep");
        written.map(|()| self.text).map_err(|_| Error::new(ErrorKind::OutOfFuel, what))
    }
}

impl Write for Spelling {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.room_bytes = self.room_bytes.checked_sub(text.len()).ok_or(fmt::Error)?;
        self.text.push_str(text);
        Ok(())
    }
}

/// Bytes that the template's fuel still pays for.
pub(super) fn room_bytes(state: &State<'_, '_>) -> usize {
    state
        .fuel_levels()
        .map_or(usize::MAX, |(_, left)| (left as usize).saturating_mul(BYTES_PER_FUEL))
}

/// `str(value)`; nothing for what is undefined.
pub(super) fn text(value: &Value, state: &State<'_, '_>) -> Result<String, Error> {
    let mut out = Spelling::new(state);
    let written = write_text(value, &mut out);
    out.finish(written)
}

/// Writes `str(value)`.
pub(super) fn write_text(value: &Value, out: &mut Spelling) -> fmt::Result {
    match value.as_str() {
        Some(text) => out.write_str(text),
        None => repr(value, MAX_DEPTH, out),
    }
}

fn repr(value: &Value, depth_left: usize, out: &mut Spelling) -> fmt::Result {
    let depth_left = depth_left.checked_sub(1).ok_or(fmt::Error)?;
    match value.kind() {
        ValueKind::Undefined => Ok(()),
        ValueKind::None => out.write_str("None"),
        ValueKind::Bool => out.write_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.write_str(&number(value)),
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Map => {
            out.write_char('{')?;
            for (i, (key, item)) in entries(value).into_iter().enumerate() {
                out.write_str(if i > 0 { ", " } else { "" })?;
                repr(&key, depth_left, out)?;
                out.write_str(": ")?;
                repr(&item, depth_left, out)?;
            }
            out.write_char('}')
        }
        ValueKind::Seq => {
            out.write_char('[')?;
            for (i, item) in items(value).into_iter().enumerate() {
                out.write_str(if i > 0 { ", " } else { "" })?;
                repr(&item, depth_left, out)?;
            }
            out.write_char(']')
        }
        _ => write!(out, "{value}"),
    }
}

fn items(value: &Value) -> Vec<Value> {
    value.try_iter().map(Iterator::collect).unwrap_or_default()
}

fn entries(value: &Value) -> Vec<(Value, Value)> {
    let entry = |key: Value| {
        let item = value.get_item(&key).unwrap_or_default();
        (key, item)
    };
    items(value).into_iter().map(entry).collect()
}

/// An integer as it is; a float in its shortest form that reads back, with an exponent below 1e-4 and from 1e16 on.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let x = f64::try_from(value.clone()).unwrap_or(f64::NAN);
    let size = x.abs();
    if size != 0.0 && size.is_finite() && !(1e-4..1e16).contains(&size) {
        let short = format!("{x:e}");
        let (digits, exponent) = short.split_once('e').expect("an exponent");
        let exponent: i32 = exponent.parse().expect("a number");
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{digits}e{sign}{:02}", exponent.abs())
    } else if x.is_finite() {
        format!("{x:?}")
    } else {
        let text = match (x.is_nan(), x > 0.0) {
            (true, _) => "nan",
            (false, true) => "inf",
            (false, false) => "-inf",
        };
        text.to_owned()
    }
}

/// A string literal, in single quotes unless only those are in it.
fn quote(text: &str, out: &mut Spelling) -> fmt::Result {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.write_char(mark)?;
    for c in text.chars() {
        match c {
            '\\' => out.write_str("\\\\")?,
            '\n' => out.write_str("\\n")?,
            '\r' => out.write_str("\\r")?,
            '\t' => out.write_str("\\t")?,
            c if c == mark => write!(out, "\\{c}")?,
            c if is_printable(c) => out.write_char(c)?,
            c => match u32::from(c) {
                code @ ..0x100 => write!(out, "\\x{code:02x}")?,
                code @ ..0x1_0000 => write!(out, "\\u{code:04x}")?,
                code => write!(out, "\\U{code:08x}")?,
            },
        }
    }
    out.write_char(mark)
}

/// Python's `str.isprintable`: no control, format or private character, and of spaces only the usual one. Which
/// characters exist at all changes from one Unicode to the next: those that do not are written as they are.
fn is_printable(c: char) -> bool {
    use unicode_categories::UnicodeCategories;
    let is_hidden = c.is_control()
        || c.is_other_format()
        || c.is_other_private_use()
        || c.is_separator()
        || c.is_whitespace();
    c == ' ' || !is_hidden
}

/// `json.dumps(value, ...)`.
pub(super) fn json(
    value: &Value,
    style: &JsonStyle,
    state: &State<'_, '_>,
) -> Result<String, Error> {
    let mut out = Spelling::new(state);
    let written = dump(value, style, 0, &mut out);
    out.finish(written)
}

fn dump(value: &Value, style: &JsonStyle, depth: usize, out: &mut Spelling) -> fmt::Result {
    if depth >= MAX_DEPTH {
        return Err(fmt::Error);
    }
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => out.write_str("null"),
        ValueKind::Bool => out.write_str(if value.is_true() { "true" } else { "false" }),
        // As Python's json spells what JSON does not have.
        ValueKind::Number => out.write_str(match &*number(value) {
            "-inf" => "-Infinity",
            "inf" => "Infinity",
            "nan" => "NaN",
            number => number,
        }),
        ValueKind::Map => {
            let mut entries: Vec<(String, Value)> = entries(value)
                .into_iter()
                .map(|(key, item)| Ok((json_key(&key, out.room_bytes)?, item)))
                .collect::<Result<_, fmt::Error>>()?;
            if style.sort_keys {
                entries.sort_by(|a, b| a.0.cmp(&b.0));
            }
            let write = |(key, item): &(String, Value), out: &mut Spelling| {
                json_string(key, style.ensure_ascii, out)?;
                out.write_str(style.separators.as_ref().map_or(": ", |s| &s[1]))?;
                dump(item, style, depth + 1, out)
            };
            list(&entries, ['{', '}'], style, depth, out, write)
        }
        ValueKind::String => {
            json_string(value.as_str().unwrap_or_default(), style.ensure_ascii, out)
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let write = |item: &Value, out: &mut Spelling| dump(item, style, depth + 1, out);
            list(&items(value), ['[', ']'], style, depth, out, write)
        }
        _ => {
            let mut plain = Spelling { text: String::new(), room_bytes: out.room_bytes };
            write!(plain, "{value}")?;
            json_string(&plain.text, style.ensure_ascii, out)
        }
    }
}

/// Keys that are no strings are spelled as values are.
fn json_key(key: &Value, room_bytes: usize) -> Result<String, fmt::Error> {
    if let Some(text) = key.as_str() {
        return Ok(text.to_owned());
    }
    let mut out = Spelling { text: String::new(), room_bytes };
    dump(key, &JsonStyle::default(), 0, &mut out)?;
    Ok(out.text)
}

fn list<T>(
    items: &[T],
    brackets: [char; 2],
    style: &JsonStyle,
    depth: usize,
    out: &mut Spelling,
    mut write: impl FnMut(&T, &mut Spelling) -> fmt::Result,
) -> fmt::Result {
    out.write_char(brackets[0])?;
    let comma = match (&style.separators, style.indent) {
        (Some(s), _) => &s[0],
        (None, Some(_)) => ",",
        (None, None) => ", ",
    };
    let line = |depth: usize, out: &mut Spelling| match style.indent {
        Some(n) => write!(out, "\n{:1$}", "", n * depth),
        None => Ok(()),
    };
    for (i, item) in items.iter().enumerate() {
        out.write_str(if i > 0 { comma } else { "" })?;
        line(depth + 1, out)?;
        write(item, out)?;
    }
    if !items.is_empty() {
        line(depth, out)?;
    }
    out.write_char(brackets[1])
}

fn json_string(text: &str, ensure_ascii: bool, out: &mut Spelling) -> fmt::Result {
    out.write_char('"')?;
    for c in text.chars() {
        match c {
            '"' => out.write_str("\\\"")?,
            '\\' => out.write_str("\\\\")?,
            '\n' => out.write_str("\\n")?,
            '\r' => out.write_str("\\r")?,
            '\t' => out.write_str("\\t")?,
            '\u{8}' => out.write_str("\\b")?,
            '\u{c}' => out.write_str("\\f")?,
            c if u32::from(c) < 0x20 || (ensure_ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}")?;
                }
            }
            // Python escapes this one only where it escapes everything.
            c => out.write_char(c)?,
        }
    }
    out.write_char('"')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(json: &str) -> Value {
        Value::from(minijinja::value::Serde(
            serde_json::from_str::<serde_json::Value>(json).unwrap(),
        ))
    }

    #[test]
    fn values_are_spelled_as_python_spells_them() {
        let env = minijinja::Environment::empty();
        let spelled = [
            (r#"[true, null, "a", "it's", 1, 1.0]"#, r#"[True, None, 'a', "it's", 1, 1.0]"#),
            (r#"{"b": [], "a": {"x": -0.5}}"#, "{'b': [], 'a': {'x': -0.5}}"),
            ("[1e-5, 1e16, 123456.75, 1e22]", "[1e-05, 1e+16, 123456.75, 1e+22]"),
            (r#""as\nit is""#, "as\nit is"),
            (r#"["a\n'\"\\"]"#, r#"['a\n\'"\\']"#),
            (r#"["\u00a0\u00ad\u200b\u2028\ue000é"]"#, r"['\xa0\xad\u200b\u2028\ue000é']"),
        ];
        for (json, python) in spelled {
            assert_eq!(text(&value(json), &env.empty_state()).unwrap(), python);
        }
    }

    fn dumps(value: &Value, style: &JsonStyle) -> String {
        json(value, style, &minijinja::Environment::empty().empty_state()).unwrap()
    }

    #[test]
    fn json_is_spelled_as_python_dumps_it() {
        let v = value(r#"{"b": [1, "é<\"\u0001"], "a": {}, "c": [[]]}"#);
        let plain = dumps(&v, &JsonStyle::default());
        assert_eq!(plain, r#"{"b": [1, "é<\"\u0001"], "a": {}, "c": [[]]}"#);
        let style =
            JsonStyle { indent: Some(2), ensure_ascii: true, sort_keys: true, separators: None };
        let pretty = "{\n  \"a\": {},\n  \"b\": [\n    1,\n    \"\\u00e9<\\\"\\u0001\"\n  ],\
                      \n  \"c\": [\n    []\n  ]\n}";
        assert_eq!(dumps(&v, &style), pretty);
        let separators = Some([",".to_owned(), ":".to_owned()]);
        let tight = JsonStyle { separators, ..JsonStyle::default() };
        assert_eq!(dumps(&value(r#"{"a": [1, 2]}"#), &tight), r#"{"a":[1,2]}"#);
    }
}

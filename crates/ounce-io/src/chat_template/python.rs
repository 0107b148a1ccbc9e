//! Values in Python's spelling: `str`, `repr` and `json.dumps`, as templates written for Jinja expect them.

use std::fmt::Write;

use minijinja::Value;
use minijinja::value::ValueKind;

/// `json.dumps`'s arguments.
#[derive(Debug, Clone, Default)]
pub(super) struct JsonStyle {
    pub(super) indent: Option<usize>,
    pub(super) ensure_ascii: bool,
    pub(super) sort_keys: bool,
    pub(super) separators: Option<[String; 2]>,
}

/// `str(value)`; nothing for what is undefined.
pub(super) fn text(value: &Value) -> String {
    let mut out = String::new();
    match value.as_str() {
        Some(text) => out.push_str(text),
        None => repr(value, &mut out),
    }
    out
}

fn repr(value: &Value, out: &mut String) {
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => number(value, out),
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Map => {
            out.push('{');
            for (i, (key, item)) in entries(value).into_iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(&key, out);
                out.push_str(": ");
                repr(&item, out);
            }
            out.push('}');
        }
        ValueKind::Seq => {
            out.push('[');
            for (i, item) in items(value).into_iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(&item, out);
            }
            out.push(']');
        }
        _ => out.push_str(&value.to_string()),
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
fn number(value: &Value, out: &mut String) {
    if value.is_integer() {
        out.push_str(&value.to_string());
        return;
    }
    let x = f64::try_from(value.clone()).unwrap_or(f64::NAN);
    let size = x.abs();
    if size != 0.0 && size.is_finite() && !(1e-4..1e16).contains(&size) {
        let short = format!("{x:e}");
        let (digits, exponent) = short.split_once('e').expect("an exponent");
        let exponent: i32 = exponent.parse().expect("a number");
        let sign = if exponent < 0 { '-' } else { '+' };
        let _ = write!(out, "{digits}e{sign}{:02}", exponent.abs());
    } else if x.is_finite() {
        let _ = write!(out, "{x:?}");
    } else {
        out.push_str(if x.is_nan() {
            "nan"
        } else if x > 0.0 {
            "inf"
        } else {
            "-inf"
        });
    }
}

/// A string literal, in single quotes unless only those are in it.
fn quote(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == mark => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push(mark);
}

/// `json.dumps(value, ...)`.
pub(super) fn json(value: &Value, style: &JsonStyle) -> String {
    let mut out = String::new();
    dump(value, style, 0, &mut out);
    out
}

fn dump(value: &Value, style: &JsonStyle, depth: usize, out: &mut String) {
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => {
            let start = out.len();
            number(value, out);
            // As Python's json spells what JSON does not have.
            for (from, to) in [("-inf", "-Infinity"), ("inf", "Infinity"), ("nan", "NaN")] {
                if &out[start..] == from {
                    out.replace_range(start.., to);
                }
            }
        }
        ValueKind::Map => {
            let mut entries: Vec<(String, Value)> =
                entries(value).into_iter().map(|(key, item)| (json_key(&key), item)).collect();
            if style.sort_keys {
                entries.sort_by(|a, b| a.0.cmp(&b.0));
            }
            let write = |(key, item): &(String, Value), out: &mut String| {
                json_string(key, style.ensure_ascii, out);
                out.push_str(style.separators.as_ref().map_or(": ", |s| &s[1]));
                dump(item, style, depth + 1, out);
            };
            list(&entries, ['{', '}'], style, depth, out, write);
        }
        ValueKind::String => {
            json_string(value.as_str().unwrap_or_default(), style.ensure_ascii, out);
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let write = |item: &Value, out: &mut String| dump(item, style, depth + 1, out);
            list(&items(value), ['[', ']'], style, depth, out, write);
        }
        _ => json_string(&value.to_string(), style.ensure_ascii, out),
    }
}

/// Keys that are no strings are spelled as values are.
fn json_key(key: &Value) -> String {
    match key.as_str() {
        Some(text) => text.to_owned(),
        None => json(key, &JsonStyle::default()),
    }
}

fn list<T>(
    items: &[T],
    brackets: [char; 2],
    style: &JsonStyle,
    depth: usize,
    out: &mut String,
    mut write: impl FnMut(&T, &mut String),
) {
    out.push(brackets[0]);
    let comma = match (&style.separators, style.indent) {
        (Some(s), _) => &s[0],
        (None, Some(_)) => ",",
        (None, None) => ", ",
    };
    let line = |depth: usize, out: &mut String| {
        if let Some(n) = style.indent {
            out.push('\n');
            out.push_str(&" ".repeat(n * depth));
        }
    };
    for (i, item) in items.iter().enumerate() {
        out.push_str(if i > 0 { comma } else { "" });
        line(depth + 1, out);
        write(item, out);
    }
    if !items.is_empty() {
        line(depth, out);
    }
    out.push(brackets[1]);
}

fn json_string(text: &str, ensure_ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if u32::from(c) < 0x20 || (ensure_ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            // Python escapes this one only where it escapes everything.
            c => out.push(c),
        }
    }
    out.push('"');
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
        let spelled = [
            (r#"[true, null, "a", "it's", 1, 1.0]"#, r#"[True, None, 'a', "it's", 1, 1.0]"#),
            (r#"{"b": [], "a": {"x": -0.5}}"#, "{'b': [], 'a': {'x': -0.5}}"),
            ("[1e-5, 1e16, 123456.75, 1e22]", "[1e-05, 1e+16, 123456.75, 1e+22]"),
            (r#""as\nit is""#, "as\nit is"),
            (r#"["a\n'\"\\"]"#, r#"['a\n\'"\\']"#),
        ];
        for (json, python) in spelled {
            assert_eq!(text(&value(json)), python);
        }
    }

    #[test]
    fn json_is_spelled_as_python_dumps_it() {
        let v = value(r#"{"b": [1, "é<\"\u0001"], "a": {}, "c": [[]]}"#);
        let plain = json(&v, &JsonStyle::default());
        assert_eq!(plain, r#"{"b": [1, "é<\"\u0001"], "a": {}, "c": [[]]}"#);
        let style =
            JsonStyle { indent: Some(2), ensure_ascii: true, sort_keys: true, separators: None };
        let pretty = "{\n  \"a\": {},\n  \"b\": [\n    1,\n    \"\\u00e9<\\\"\\u0001\"\n  ],\
                      \n  \"c\": [\n    []\n  ]\n}";
        assert_eq!(json(&v, &style), pretty);
        let separators = Some([",".to_owned(), ":".to_owned()]);
        let tight = JsonStyle { separators, ..JsonStyle::default() };
        assert_eq!(json(&value(r#"{"a": [1, 2]}"#), &tight), r#"{"a":[1,2]}"#);
    }
}

//! Strict JSON at the edge.
//!
//! Idea: a configuration file is small and shallow, so anything else is an attack or an accident. Beyond what
//! `serde_json` checks (syntax, UTF-8, lone surrogates) this reader enforces:
//! * the file is at most `limit_bytes` long, checked before anything is allocated;
//! * values nest at most [`MAX_DEPTH`] deep;
//! * no object has a key twice (plain parsers keep the last silently, and two programs may disagree).
//!
//! Complexity: linear in the file's length.

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::IoError;

/// Deepest nesting accepted; real configuration files stay below ten.
pub const MAX_DEPTH: usize = 64;

/// Reads a JSON file of at most `limit_bytes` bytes.
///
/// # Errors
/// `Missing`, `Read`; `BadFile` when too long or not a regular file; `BadLine` for anything that is not strict JSON.
pub fn read_json(path: &Path, limit_bytes: u64) -> Result<Value, IoError> {
    let bytes = read_small_file(path, limit_bytes)?;
    parse_json(path, &bytes)
}

/// Parses strict JSON that was read from `path`.
///
/// # Errors
/// `BadLine` with the line of the first fault.
pub fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value, IoError> {
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    parse_strict(text).map_err(|error| json_error(path, &error))
}

/// Parses strict JSON from anywhere.
pub(crate) fn parse_strict(text: &[u8]) -> Result<Value, serde_json::Error> {
    parse_at_most(text, &Cell::new(usize::MAX))
}

/// The same, with at most `n_left` values in it, a key counting as one; there are 0 left where they were too many. A
/// value takes up to 100 bytes of memory, and as few as two of the text.
pub(crate) fn parse_at_most(text: &[u8], n_left: &Cell<usize>) -> Result<Value, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let value = StrictValue { depth: 0, n_left }.deserialize(&mut deserializer)?;
    deserializer.end().map(|()| value)
}

/// Turns a JSON fault into an error at `path:line`.
pub(crate) fn json_error(path: &Path, error: &serde_json::Error) -> IoError {
    // serde_json appends " at line L column C", which the error already says better.
    let full = error.to_string();
    let reason = full.split(" at line ").next().unwrap_or(&full);
    IoError::bad_line(
        path,
        error.line().max(1) as u64,
        format!("not valid JSON: {reason} (column {})", error.column()),
        "compare with the file as its author published it",
    )
}

/// The bytes of a regular file of at most `limit_bytes` bytes.
pub(crate) fn read_small_file(path: &Path, limit_bytes: u64) -> Result<Vec<u8>, IoError> {
    let file = open_regular(path)?;
    let too_long = |n: u64| {
        IoError::bad_file(
            path,
            format!("{n} bytes or more, over the limit of {limit_bytes} bytes"),
            "this does not look like the right file",
        )
    };
    let n_bytes = file.metadata().map_err(|e| IoError::reading(path, e))?.len();
    if n_bytes > limit_bytes {
        return Err(too_long(n_bytes));
    }
    let mut bytes = Vec::with_capacity(n_bytes as usize);
    file.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(|e| IoError::reading(path, e))?;
    if bytes.len() as u64 > limit_bytes {
        return Err(too_long(bytes.len() as u64));
    }
    Ok(bytes)
}

/// Whether `path` is a regular file that can be opened.
///
/// # Errors
/// `Missing`, `Read`, `BadFile`.
pub fn check_readable(path: &Path) -> Result<(), IoError> {
    open_regular(path).map(drop)
}

/// Opens a file after checking that it is a regular one: opening a pipe would wait for ever.
pub(crate) fn open_regular(path: &Path) -> Result<File, IoError> {
    let metadata = std::fs::metadata(path).map_err(|e| IoError::reading(path, e))?;
    if !metadata.is_file() {
        let what = if metadata.is_dir() { "a directory" } else { "not a regular file" };
        return Err(IoError::bad_file(
            path,
            format!("is {what}, but a file is needed here"),
            "name the file itself",
        ));
    }
    File::open(path).map_err(|e| IoError::reading(path, e))
}

/// Builds a `Value` while counting depth and values and refusing duplicate keys.
struct StrictValue<'a> {
    depth: usize,
    n_left: &'a Cell<usize>,
}

impl StrictValue<'_> {
    fn deeper<E: de::Error>(&self) -> Result<Self, E> {
        if self.depth == MAX_DEPTH {
            return Err(E::custom(format!("nested more than {MAX_DEPTH} levels deep")));
        }
        let Some(n_left) = self.n_left.get().checked_sub(1) else {
            return Err(E::custom("more values than there is room for"));
        };
        self.n_left.set(n_left);
        Ok(Self { depth: self.depth + 1, n_left: self.n_left })
    }
}

impl<'de> DeserializeSeed<'de> for StrictValue<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for StrictValue<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| E::custom(format!("the number {value} is not finite")))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(self.deeper()?)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(de::Error::custom(format!("key `{key}` appears twice")));
            }
            let value = map.next_value_seed(self.deeper()?)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &[u8]) -> String {
        parse_json(Path::new("config.json"), text).unwrap_err().to_string()
    }

    #[test]
    fn duplicate_keys_are_refused_at_their_line() {
        let message = fault(b"{\"a\": 1,\n \"b\": {\"c\": 1, \"c\": 2}}");
        assert!(
            message.starts_with("config.json:2: not valid JSON: key `c` appears twice"),
            "{message}"
        );
    }

    #[test]
    fn deep_nesting_is_refused_without_using_the_stack() {
        let deep = "[".repeat(100_000);
        assert!(fault(deep.as_bytes()).contains("64 levels deep"));
        let just_right = format!("{}{}", "[".repeat(MAX_DEPTH), "]".repeat(MAX_DEPTH));
        assert!(parse_json(Path::new("x"), just_right.as_bytes()).is_ok());
    }

    #[test]
    fn values_keep_their_types() {
        let value = parse_json(
            Path::new("x"),
            br#"{"i": -3, "u": 18446744073709551615, "f": 1e-5, "s": "\u00e9", "n": null, "b": [true]}"#,
        )
        .unwrap();
        assert_eq!(value["i"], -3);
        assert_eq!(value["u"], u64::MAX);
        assert_eq!(value["f"], 1e-5);
        assert_eq!(value["s"], "\u{e9}");
        assert!(value["n"].is_null());
        assert_eq!(value["b"][0], true);
    }

    #[test]
    fn broken_utf8_lone_surrogates_and_trailing_text_are_refused() {
        for text in [&b"\"\xff\""[..], br#""\ud800""#, b"{} {}", b"", b"NaN", b"1e999"] {
            assert!(fault(text).contains("not valid JSON"), "{text:?}");
        }
    }
}

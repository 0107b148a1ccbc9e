//! Python's string and dictionary methods. Those whose result can be much longer than what they are given are bounded
//! before they run: the engine charges a result only once it exists.

use std::fmt::Write;

use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::python::{Spelling, room_bytes, write_text};

/// Calls a method that the engine does not know.
pub(super) fn call(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match (value.as_str(), method) {
        (Some(text), "replace") => fits(replaced_bytes(text, args), state)?,
        (Some(text), "format") => fits(formatted_bytes(text, args, state)?, state)?,
        (Some(separator), "join") => {
            if let [items] = args {
                return join(separator, items, state);
            }
        }
        _ => {}
    }
    unknown_method_callback(state, value, method, args)
}

/// An error unless so many bytes can be paid for.
fn fits(n_bytes: usize, state: &State<'_, '_>) -> Result<(), Error> {
    if n_bytes < room_bytes(state) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::OutOfFuel, "a text grows too long"))
}

/// Length of `text.replace(old, new)`, whatever the count.
fn replaced_bytes(text: &str, args: &[Value]) -> usize {
    let (Some(old), Some(new)) =
        (args.first().and_then(Value::as_str), args.get(1).and_then(Value::as_str))
    else {
        return 0;
    };
    match new.len().checked_sub(old.len()) {
        Some(grows) if grows > 0 => text.len() + text.matches(old).count().saturating_mul(grows),
        _ => text.len(),
    }
}

/// An upper bound of the length of `text.format(...)`: every field as long as the longest argument, and as every number
/// in the text together.
fn formatted_bytes(text: &str, args: &[Value], state: &State<'_, '_>) -> Result<usize, Error> {
    let mut all = Spelling::new(state);
    let written = args.iter().try_for_each(|arg| write_text(arg, &mut all));
    let longest = all.finish(written)?.len();
    let widths = text.split(|c: char| !c.is_ascii_digit()).map(|digits| match digits {
        "" => 0,
        digits => digits.parse().unwrap_or(usize::MAX),
    });
    let fields = text.matches('{').count().saturating_mul(longest);
    Ok(widths.fold(text.len().saturating_add(fields), usize::saturating_add))
}

/// `separator.join(items)`.
fn join(separator: &str, items: &Value, state: &State<'_, '_>) -> Result<Value, Error> {
    let mut out = Spelling::new(state);
    let mut written = Ok(());
    for (i, item) in items.try_iter()?.enumerate() {
        let Some(item) = item.as_str() else {
            let what = format!("join of {}: what is joined must be text", item.kind());
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        };
        let before = if i > 0 { separator } else { "" };
        written = out.write_str(before).and_then(|()| out.write_str(item));
        if written.is_err() {
            break;
        }
    }
    out.finish(written).map(Value::from)
}

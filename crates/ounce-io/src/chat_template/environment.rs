//! The environment that templates run in: that of `transformers`, without anything of this machine.
//!
//! `trim_blocks` and `lstrip_blocks` are on; there are `break` and `continue`, `namespace`, `raise_exception`,
//! `strftime_now`, Python's string and dictionary methods, and a `tojson` that spells as Python's `json.dumps` without
//! escaping HTML or other scripts. Values are printed in Python's spelling.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::{Bounded, MARKS, markup, methods, python, strftime};

/// The filter that marks what stands in a `{% generation %}` block.
const GENERATION: &str = "ounce_generation";

/// An environment without templates, for the time `now_s`, in seconds since 1970.
pub(super) fn environment(now_s: u64) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .expect("the usual delimiters"),
    );
    env.set_unknown_method_callback(methods::call);
    env.set_formatter(|out, state, value| {
        let write = match value.as_str() {
            Some(text) => out.write_str(text),
            None => out.write_str(&python::text(value, state)?),
        };
        write.map_err(Error::from)
    });
    // Not of Jinja; each would keep its input as it is, a level deeper every time. `pprint` takes the square of it.
    for filter in ["chain", "zip", "pprint"] {
        env.remove_filter(filter);
    }
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function(markup::ADD, markup::add);
    env.add_function("strftime_now", move |format: String| strftime::format(now_s, &format));
    // In Python nothing at all is no iterable, and what is undefined is an empty one.
    env.add_test("iterable", |value: &Value| {
        !matches!(value.kind(), ValueKind::None | ValueKind::Bool | ValueKind::Number)
    });
    env.add_filter("tojson", to_json);
    env.add_filter("string", |state: &State, value: Value| python::text(&value, state));
    env.add_filter(GENERATION, |text: String| format!("{}{text}{}", MARKS[0], MARKS[1]));
    env
}

/// Runs a template of `env` with so much fuel.
pub(super) fn render(
    env: &Environment<'static>,
    name: &str,
    context: Value,
    fuel: u64,
    output: &mut Bounded,
) -> Result<(), Error> {
    let mut env = env.clone();
    env.set_fuel(Some(fuel));
    // The default of 500 overflows the 2 MiB stack of a thread; real templates nest a few levels.
    env.set_recursion_limit(80);
    env.get_template(name)?.render_captured_to(context, output).map(|_| ())
}

/// `tojson(indent, ensure_ascii, separators, sort_keys)`.
#[expect(clippy::needless_pass_by_value, reason = "filters are given values")]
fn to_json(state: &State, value: Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<u32> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let style = python::JsonStyle {
        indent: indent.map(|n| n.min(64) as usize),
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        separators: separators.and_then(|s| <[String; 2]>::try_from(s).ok()),
    };
    kwargs.assert_all_used()?;
    python::json(&value, &style, state)
}

/// The template as it is compiled: `{% generation %}` blocks are blocks of a filter, which mark their output, and the
/// line feed behind `{% raw %}` is kept, which Python's jinja2 does not take for one that `trim_blocks` removes, and
/// sums of safe text are Python's. White space control and line numbers stay as they are.
pub(super) fn adapt(source: &str) -> String {
    let source = &*markup::sums_to_calls(source);
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let sign = tag.find(|c: char| !matches!(c, '-' | '+' | ' ' | '\t' | '\n' | '\r'));
        let (space, word) = tag.split_at(sign.unwrap_or(tag.len()));
        out.push_str(space);
        rest = word;
        let behind = |from: &str| {
            let after = word.strip_prefix(from)?;
            after.trim_start().trim_start_matches(['-', '+']).starts_with("%}").then_some(after)
        };
        if let Some(after) = behind("generation") {
            out.push_str("filter ");
            out.push_str(GENERATION);
            rest = after;
        } else if let Some(after) = behind("endgeneration") {
            out.push_str("endfilter");
            rest = after;
        } else if let Some(after) = behind("raw").filter(|a| a.trim_start().starts_with('%')) {
            out.push_str("raw +");
            rest = after.trim_start();
        }
    }
    out.push_str(rest);
    out
}

/// Whether the template says itself what the assistant wrote.
pub(super) fn has_generation(source: &str) -> bool {
    adapt(&without_comments(source)).contains(GENERATION)
}

/// A template without its `{# ... #}`.
fn without_comments(source: &str) -> String {
    let mut parts = source.split("{#");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.split_once("#}").map_or("", |(_, behind)| behind))
}

//! Text marked `safe` that is joined to other text: Python's `Markup` escapes the other text as HTML.
//!
//! In `"Use "|safe + name` Python's jinja2 has a `Markup` on the left, whose `+` escapes what it is given, although
//! nothing else in a chat template is escaped. The library's `+` cannot be told so; sums with such a term become calls
//! of [`ADD`].
//!
//! Invariant: other expressions stay as they are, and so do sums inside parentheses. Complexity: one pass.
//! Source: `Markup.__add__`, `Markup.__radd__` and `escape` of MarkupSafe 3.

use minijinja::value::Rest;
use minijinja::{Error, ErrorKind, Value};

use super::tags::Tags;

/// The function that adds.
pub(super) const ADD: &str = "ounce_add";

/// The template with sums of safe text written as calls.
pub(super) fn sums_to_calls(source: &str) -> String {
    let (mut out, mut copied) = (String::with_capacity(source.len()), 0);
    for tag in Tags::of(source).filter(|tag| !tag.is_block) {
        if let Some(call) = as_call(tag.inside) {
            out.push_str(&source[copied..tag.at]);
            out.push_str(&call);
            copied = tag.at + tag.inside.len();
        }
    }
    out.push_str(&source[copied..]);
    out
}

/// The inside of a tag, its end included, as a call, if it is a sum of at least one safe text.
fn as_call(inside: &str) -> Option<String> {
    let body = inside.strip_suffix("}}")?;
    let sign = if body.ends_with('-') { "-" } else { "" };
    let body = body.strip_suffix('-').unwrap_or(body);
    let start = body.find(|c: char| !matches!(c, '-' | '+')).filter(|&at| at <= 1)?;
    let terms = terms(&body[start..])?;
    let is_safe = |term: &&str| {
        let filtered = term.trim_end().strip_suffix("safe").map(str::trim_end);
        filtered.is_some_and(|text| text.ends_with('|'))
    };
    (terms.len() > 1 && terms.iter().any(is_safe))
        .then(|| format!("{} {ADD}({}) {sign}}}}}", &body[..start], terms.join(",")))
}

/// The terms of a sum; `None` where an operator of another kind stands outside of brackets.
fn terms(text: &str) -> Option<Vec<&str>> {
    let (mut terms, mut start, mut depth) = (Vec::new(), 0, 0_usize);
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' | '\'' => loop {
                match chars.next()? {
                    (_, '\\') => drop(chars.next()),
                    (_, end) if end == c => break,
                    _ => {}
                }
            },
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.checked_sub(1)?,
            '+' if depth == 0 => {
                terms.push(&text[start..at]);
                start = at + 1;
            }
            '-' | '*' | '/' | '%' | '~' | '<' | '>' | '=' | '!' if depth == 0 => return None,
            // A word behind white space: `if`, `and`, `in` and their like.
            _ if depth == 0 && c.is_alphabetic() => {
                let before = text[start..at].trim_end();
                let is_word = text[..at].ends_with(char::is_whitespace);
                if is_word && !before.is_empty() && !before.ends_with(['|', '.']) {
                    return None;
                }
            }
            _ => {}
        }
    }
    terms.push(&text[start..]);
    Some(terms)
}

/// The sum of texts, from the left.
pub(super) fn add(terms: Rest<Value>) -> Result<Value, Error> {
    let mut terms = terms.0.into_iter();
    let mut sum = terms.next().unwrap_or_default();
    for term in terms {
        let (Some(left), Some(right)) = (sum.as_str(), term.as_str()) else {
            let what = format!("{} and {} are not both text", sum.kind(), term.kind());
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        };
        sum = if sum.is_safe() || term.is_safe() {
            Value::from_safe_string(escaped(left, &sum) + &escaped(right, &term))
        } else {
            Value::from(format!("{left}{right}"))
        };
    }
    Ok(sum)
}

/// The text of a value, escaped unless it is marked safe.
fn escaped(text: &str, value: &Value) -> String {
    if value.is_safe() {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sums_of_safe_text_become_calls() {
        assert_eq!(
            sums_to_calls("{{- 'a}}' |safe + b[c + 1] + d | tojson() }} {{ e + f }}"),
            "{{- ounce_add( 'a}}' |safe , b[c + 1] , d | tojson() ) }} {{ e + f }}"
        );
        for same in [
            "{{ 'a'|safe }}",
            "{{ ('a'|safe + b) }}",
            "{{ 'a'|safe + b if c else d }}",
            "{{ 'a'|safe + b == c }}",
            "{% set a = 'a'|safe + b %}",
            "{{ 'a'|safe + b",
            "{# {{ 'a'|safe + b }} #}",
            "{% raw %}{{ 'a'|safe + b }}{% endraw %}",
            "{% set a = '{{ a|safe + b }}' %}",
            "{{ vouchsafe + b }}",
        ] {
            assert_eq!(sums_to_calls(same), same);
        }
    }
}

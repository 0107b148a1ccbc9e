//! A bound on the length of a template's tags, before they are compiled.
//!
//! A chain of operators (`a ~ b ~ c ...`) becomes a tree as deep as the chain is long, and the library walks trees
//! by recursion: 5,000 operators overflow the 2 MiB stack of a thread. Parentheses it counts itself, chains it does
//! not. So a tag may hold [`MAX_TAG_CHARS`] characters besides strings and white space; of 151 templates of well-known
//! models the longest has 147.
//!
//! Invariant: where the library sees the end of a tag, or an earlier one, it is seen here. Complexity: one pass.

/// Characters of a tag, strings and white space not counted.
const MAX_TAG_CHARS: usize = 2000;

/// Says which tag is too long, if one is.
pub(super) fn check(source: &str) -> Result<(), String> {
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let tag = &rest[at..];
        rest = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map_or("", |end| &tag[end + 2..]),
            Some(b'{' | b'%') => {
                let (n_chars, behind) = measure(&tag[2..]);
                if n_chars > MAX_TAG_CHARS {
                    let line = 1 + source[..source.len() - tag.len()].matches('\n').count();
                    return Err(format!(
                        "the tag in line {line} has more than {MAX_TAG_CHARS} characters"
                    ));
                }
                behind
            }
            _ => &tag[1..],
        };
    }
    Ok(())
}

/// The counted characters of the tag that `text` begins in, and what stands behind it.
pub(super) fn measure(text: &str) -> (usize, &str) {
    let (mut n_chars, mut depth) = (0, 0_usize);
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        let is_end = |end: &str| text[at..].starts_with(end);
        match c {
            '}' | '%' if depth == 0 && (is_end("}}") || is_end("%}")) => {
                return (n_chars, &text[at + 2..]);
            }
            '"' | '\'' => loop {
                match chars.next() {
                    Some((_, '\\')) => drop(chars.next()),
                    Some((_, end)) if end == c => break,
                    Some(_) => {}
                    None => return (n_chars, ""),
                }
            },
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        n_chars += usize::from(!c.is_whitespace());
        if n_chars > MAX_TAG_CHARS {
            break;
        }
    }
    (n_chars, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_chains_of_operators_are_refused_and_long_strings_are_not() {
        let chain = |n: usize| format!("text {{{{ 1{} }}}} text", "+1".repeat(n));
        check(&chain(900)).unwrap();
        let error = check(&format!("one\n{{# {{{{ #}}\n{}", chain(1000))).unwrap_err();
        assert!(error.contains("line 3 has more than 2000 characters"), "{error}");
        check(&format!("{{{{ '{}}}}}' ~ \"\\\"{}\" }}}}", "a+".repeat(5000), "b-".repeat(5000)))
            .unwrap();
        check(&format!("{{{{ a }}}} {}", "- {% if b %} ".repeat(5000))).unwrap();
        // The braces of a dictionary do not end the tag.
        check(&format!("{{{{ {{'a': {{}}}} {} }}}}", "-1".repeat(1000))).unwrap_err();
        check(&format!("{{% set x = {}", "-".repeat(9000))).unwrap_err();
        check("{{ 'not closed").unwrap();
        check("a { b {").unwrap();
    }
}

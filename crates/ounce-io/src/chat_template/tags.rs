//! Bounds on a template's tags, before they are compiled.
//!
//! A chain of operators (`a ~ b ~ c ...`) becomes a tree as deep as the chain is long, and so does a chain of `elif`;
//! the library walks trees by recursion: 5,000 operators overflow the 2 MiB stack of a thread. Parentheses and blocks
//! it counts itself, chains it does not. So a tag may hold [`MAX_TAG_CHARS`] characters besides strings and white
//! space, and a template [`MAX_ELIFS`]. Of 151 templates of well-known models the longest tag has 147 characters; the
//! most that one has of `elif` is 22.
//!
//! Invariant: tags begin where the library sees them begin, and end where it sees them end or refuses the template.
//! Complexity: one pass.

/// Characters of a tag, strings and white space not counted.
const MAX_TAG_CHARS: usize = 2000;
/// Further branches of conditions in a template.
const MAX_ELIFS: usize = 200;

/// Says which tag is too long, if one is, and whether conditions have too many branches.
pub(super) fn check(source: &str) -> Result<(), String> {
    let mut n_elifs = 0;
    for tag in Tags::of(source) {
        if tag.n_chars > MAX_TAG_CHARS {
            let line = 1 + source[..tag.at].matches('\n').count();
            return Err(format!("the tag in line {line} has more than {MAX_TAG_CHARS} characters"));
        }
        let inside = tag.inside.trim_start_matches(['-', '+']).trim_start();
        n_elifs += usize::from(tag.is_block && inside.starts_with("elif"));
    }
    if n_elifs > MAX_ELIFS { Err(format!("it has more than {MAX_ELIFS} `elif`")) } else { Ok(()) }
}

/// `{{ ... }}` or `{% ... %}`.
pub(super) struct Tag<'a> {
    pub(super) is_block: bool,
    /// Where its inside begins.
    pub(super) at: usize,
    /// What stands between its begin and the end of its end.
    pub(super) inside: &'a str,
    /// Characters besides strings and white space, or one more than are allowed.
    n_chars: usize,
}

/// The tags of a template, comments and raw blocks passed over.
pub(super) struct Tags<'a> {
    source: &'a str,
    at: usize,
}

impl<'a> Tags<'a> {
    pub(super) fn of(source: &'a str) -> Self {
        Self { source, at: 0 }
    }

    /// Goes on where `rest` begins, which is an end of the source.
    fn go_to(&mut self, rest: &str) {
        self.at = self.source.len() - rest.len();
    }
}

impl<'a> Iterator for Tags<'a> {
    type Item = Tag<'a>;

    fn next(&mut self) -> Option<Tag<'a>> {
        loop {
            let found = self.source[self.at..].find('{')? + self.at;
            let kind = self.source.as_bytes().get(found + 1).copied();
            if !matches!(kind, Some(b'#' | b'{' | b'%')) {
                self.at = found + 1;
                continue;
            }
            let (at, rest) = (found + 2, &self.source[found + 2..]);
            let is_block = kind == Some(b'%');
            // Without an end the library refuses the template.
            if kind == Some(b'#') {
                let text = rest.strip_prefix(['-', '+']).unwrap_or(rest);
                self.go_to(text.split_once("#}").map_or("", |(_, behind)| behind));
            } else if let Some(raw) = behind_word(rest, "raw").filter(|_| is_block) {
                let ends = raw.match_indices("{%");
                let mut ends = ends.filter_map(|(end, _)| behind_word(&raw[end + 2..], "endraw"));
                self.go_to(ends.next().unwrap_or(""));
            } else {
                let (n_chars, behind) = measure(rest);
                self.go_to(behind);
                return Some(Tag { is_block, at, inside: &self.source[at..self.at], n_chars });
            }
        }
    }
}

/// What stands behind a block that begins here and has this word alone in it.
fn behind_word<'a>(block: &'a str, word: &str) -> Option<&'a str> {
    let block = block.strip_prefix(['-', '+']).unwrap_or(block);
    let rest = block.trim_ascii_start().strip_prefix(word)?.trim_ascii_start();
    rest.strip_prefix(['-', '+']).unwrap_or(rest).strip_prefix("%}")
}

/// The counted characters of the tag that `text` begins in, and what stands behind it.
fn measure(text: &str) -> (usize, &str) {
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
    fn long_chains_of_branches_are_refused() {
        let chain = |n: usize| format!("{{% if a %}}{}{{% endif %}}", "{%- elif b %}".repeat(n));
        check(&chain(MAX_ELIFS)).unwrap();
        let error = check(&chain(MAX_ELIFS + 1)).unwrap_err();
        assert!(error.contains("more than 200 `elif`"), "{error}");
        check(&format!("{{# {} #}}{{{{ '{0}' }}}}", "elif".repeat(1000))).unwrap();
    }

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
        // What looks like the begin of a string or a comment is none in raw text and in comments.
        for hidden in [
            "{% raw %}{{ '{% endraw %}",
            "{%- raw -%}{#{%+ endraw +%}",
            "{#} {{ ' #}",
            "{#-#} \" #}",
        ] {
            check(&format!("{hidden}{}", chain(900))).unwrap();
            check(&format!("{hidden}{}", chain(1000))).unwrap_err();
        }
        check("{{ 'not closed").unwrap();
        check("a { b {").unwrap();
    }
}

//! What the compiler does not check: promises of ARCHITECTURE.md, leftovers, form.
//!
//! 1. Crate edges: the table in ARCHITECTURE.md equals the dependencies in `cargo metadata` (of the
//!    product; test-only dependencies are free), and lists every crate.
//! 2. `unsafe` stands only where [`UNSAFE_FOLDERS`] says; every `lib.rs` opens with documentation.
//! 3. No leftovers: notes to self, debugging macros, tests that are switched off.
//! 4. No tabs, no blanks at line ends, one line break at the end, Rust lines of at most 120 columns
//!    (snapshots in `tests/` may be longer).
//! 5. Functions of at most 100 lines, unless [`LONG_FUNCTIONS`] says why.
//! 6. No names of places that exist on one machine only, no hosts of package registries.
//! 7. No file above 2 MB.
//! 8. CHANGELOG.md has the version of Cargo.toml.
//! 9. Every source key (a name and a year in brackets) that a comment or a document cites is listed in
//!    docs/papers.md, and every key listed there is cited.
//!
//! Text is looked at line by line; rustfmt has been here before, which makes that enough.

use std::collections::BTreeSet;
use std::path::Path;

use crate::Result;
use crate::shell::{capture, metadata, root};

/// Folders whose crates may contain unsafe code.
const UNSAFE_FOLDERS: &[&str] = &["crates/ounce-kernels/", "crates/ounce-exec/"];

/// Functions above 100 lines: path, name, reason.
const LONG_FUNCTIONS: &[(&str, &str, &str)] = &[];

const MAX_FUNCTION_LINES: usize = 100;
const MAX_COLUMNS: usize = 120;
const MAX_FILE_BYTES: u64 = 2_000_000;

/// The list of sources.
const PAPERS: &str = "docs/papers.md";

/// Parts of words, so that this file does not find itself.
const LEFTOVERS: &[&str] = &[
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X:"),
    concat!("dbg", "!("),
    concat!("todo", "!("),
    concat!("unimplemented", "!("),
    concat!("#[", "ignore"),
];

/// Places that exist on one machine, and hosts of package registries.
const PLACES: &[&str] = &[
    concat!("/wo", "rk/"),
    concat!("/tmp/", "ounce"),
    concat!("/home", "/"),
    concat!("crates", ".io"),
    concat!("py", "pi.org"),
    concat!("pythonhosted", ".org"),
    concat!("npmjs", ".com"),
];

/// Runs every check and reports all problems at once.
pub(crate) fn tidy() -> Result {
    let mut problems = Vec::new();
    let files = files()?;
    let read = |path: &str| std::fs::read(root().join(path)).map_err(|e| format!("{path}: {e}"));
    let mut citations = Vec::new();
    for path in &files {
        let bytes = read(path)?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            problems.push(format!("{path}: {} bytes, at most {MAX_FILE_BYTES}", bytes.len()));
        }
        if let Some(text) = text_of(path, &bytes) {
            problems.extend(form(path, &text));
            if is_rust(path) {
                problems.extend(rust(path, &text));
            }
            citations.extend(cited_keys(path, &text));
        }
    }
    let papers = paper_keys(&String::from_utf8_lossy(&read(PAPERS)?));
    problems.extend(key_problems(&papers, &citations));
    problems.extend(edges()?);
    let changelog = String::from_utf8_lossy(&read("CHANGELOG.md")?).into_owned();
    let version = env!("CARGO_PKG_VERSION");
    if !changelog.contains(&format!("## {version}")) {
        problems.push(format!("CHANGELOG.md: has no heading `## {version}`"));
    }
    if problems.is_empty() {
        println!("tidy: {} files", files.len());
        return Ok(());
    }
    Err(format!("{} problems\n{}", problems.len(), problems.join("\n")))
}

/// Tracked files and new ones that git does not ignore.
fn files() -> Result<Vec<String>> {
    let args = ["ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"];
    let listed = capture("git", &args)?;
    Ok(listed.lines().filter(|l| root().join(l).is_file()).map(str::to_owned).collect())
}

/// The text of a file that people write; data and licences are left alone.
fn text_of(path: &str, bytes: &[u8]) -> Option<String> {
    let kinds = ["rs", "md", "toml", "py", "sh", "yaml", "graph"];
    let is_ours = Path::new(path).extension().is_some_and(|e| kinds.iter().any(|k| e == *k))
        || path == ".ci/run";
    is_ours.then(|| String::from_utf8_lossy(bytes).into_owned())
}

fn is_rust(path: &str) -> bool {
    Path::new(path).extension().is_some_and(|e| e == "rs")
}

/// Form of any text: blanks, tabs, leftovers, places.
fn form(path: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let mut problem = |what: &str| problems.push(format!("{path}:{}: {what}", i + 1));
        if line.contains('\t') {
            problem("a tab");
        }
        if line.ends_with(' ') {
            problem("blanks at the end of the line");
        }
        for word in LEFTOVERS.iter().filter(|w| line.contains(**w)) {
            problem(&format!("a leftover: {word}"));
        }
        for place in PLACES.iter().filter(|p| line.contains(**p)) {
            problem(&format!("a place that others do not have: {place}"));
        }
    }
    if !text.is_empty() && (!text.ends_with('\n') || text.ends_with("\n\n")) {
        problems.push(format!("{path}: does not end with one line break"));
    }
    problems
}

/// Form of Rust: columns, unsafe code, documentation of crates, length of functions.
fn rust(path: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let may_be_unsafe = UNSAFE_FOLDERS.iter().any(|f| path.starts_with(f));
    for (i, line) in text.lines().enumerate() {
        let columns = line.chars().count();
        if columns > MAX_COLUMNS && !path.contains("/tests/") {
            problems.push(format!("{path}:{}: {columns} columns, at most {MAX_COLUMNS}", i + 1));
        }
        let code = line.split("//").next().unwrap_or_default();
        let is_unsafe = code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == UNSAFE);
        if is_unsafe && !may_be_unsafe {
            problems.push(format!("{path}:{}: {UNSAFE} code outside {UNSAFE_FOLDERS:?}", i + 1));
        }
    }
    if path.ends_with("/src/lib.rs") && !text.starts_with("//! ") {
        problems.push(format!("{path}: a crate opens with its documentation"));
    }
    for (name, lines, at) in functions(text) {
        let is_known = LONG_FUNCTIONS.iter().any(|(p, n, _)| *p == path && *n == name);
        if lines > MAX_FUNCTION_LINES && !is_known {
            let what = format!("function {name} has {lines} lines, at most {MAX_FUNCTION_LINES}");
            problems.push(format!("{path}:{at}: {what}"));
        }
    }
    problems
}

const UNSAFE: &str = concat!("un", "safe");

/// Name, number of lines and first line of every function, by rustfmt's indentation.
fn functions(text: &str) -> Vec<(String, usize, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let Some(name) = function_name(line.trim_start()) else { continue };
        let end = format!("{}}}", " ".repeat(indent));
        let is_open = !line.ends_with(';') && !line.ends_with('}');
        let body = lines[i..].iter().position(|l| *l == end).filter(|_| is_open);
        if let Some(last) = body {
            found.push((name, last + 1, i + 1));
        }
    }
    found
}

/// The name, if the line begins a function.
fn function_name(line: &str) -> Option<String> {
    let mut words = line.split_whitespace();
    let is_qualifier = |w: &str| {
        ["const", "async", "extern", "\"C\"", UNSAFE].contains(&w) || w.starts_with("pub")
    };
    let first = words.find(|w| !is_qualifier(w) && *w != "crate)" && *w != "super)")?;
    if first != "fn" {
        return None;
    }
    let rest = words.next()?;
    Some(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
}

// ---- crate edges ---------------------------------------------------------------------------

/// Differences between ARCHITECTURE.md's table and `cargo metadata`.
fn edges() -> Result<Vec<String>> {
    let path = root().join("ARCHITECTURE.md");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("ARCHITECTURE.md: {e}"))?;
    let allowed = edge_table(&text);
    let metadata = metadata()?;
    let mut problems = Vec::new();
    let mut seen = BTreeSet::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default().to_owned();
        if name == env!("CARGO_PKG_NAME") {
            continue;
        }
        seen.insert(name.clone());
        let Some((_, may_use)) = allowed.iter().find(|(n, _)| *n == name) else {
            problems.push(format!("ARCHITECTURE.md: the table lacks {name}"));
            continue;
        };
        let uses: BTreeSet<String> = package["dependencies"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|d| d["kind"].is_null() && !d["path"].is_null())
            .filter_map(|d| d["name"].as_str().map(str::to_owned))
            .collect();
        for used in uses.difference(may_use) {
            problems.push(format!("ARCHITECTURE.md: {name} uses {used}; its table says no"));
        }
        for unused in may_use.difference(&uses) {
            problems
                .push(format!("ARCHITECTURE.md: {name} does not use {unused}; its table says so"));
        }
    }
    for (name, _) in allowed.iter().filter(|(name, _)| !seen.contains(name)) {
        problems.push(format!("ARCHITECTURE.md: the table has {name}, the workspace does not"));
    }
    Ok(problems)
}

/// Rows `| `crate` | what it holds | uses |` of the table, with full crate names.
fn edge_table(text: &str) -> Vec<(String, BTreeSet<String>)> {
    let mut rows = Vec::new();
    for line in text.lines() {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, _, uses] = cells[..] else { continue };
        let Some(name) = name.strip_prefix('`').and_then(|n| n.strip_suffix('`')) else { continue };
        if !name.starts_with("ounce") {
            continue;
        }
        let uses = uses.split(',').map(str::trim).filter(|u| u.chars().all(char::is_alphanumeric));
        let uses = uses.filter(|u| !u.is_empty()).map(|u| format!("ounce-{u}")).collect();
        rows.push((name.to_owned(), uses));
    }
    rows
}

// ---- source keys ---------------------------------------------------------------------------

/// Keys that docs/papers.md lists: lines that begin with a key in bold brackets.
fn paper_keys(text: &str) -> BTreeSet<String> {
    let listed = text.lines().filter_map(|l| l.strip_prefix("- **["));
    listed.filter_map(|rest| rest.split_once(']').map(|(key, _)| key.to_owned())).collect()
}

/// Keys that comments of Rust or lines of a document cite, each with its place. The list itself
/// cites nothing.
fn cited_keys(path: &str, text: &str) -> Vec<(String, String)> {
    let is_document = Path::new(path).extension().is_some_and(|e| e == "md");
    if path == PAPERS || !(is_document || is_rust(path)) {
        return Vec::new();
    }
    let mut cited = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let words = if is_document { Some(line) } else { line.split_once("//").map(|(_, c)| c) };
        for rest in words.into_iter().flat_map(|w| w.split('[').skip(1)) {
            let Some((word, after)) = rest.split_once(']') else { continue };
            if is_key(word) && !after.starts_with('(') {
                cited.push((format!("{path}:{}", i + 1), word.to_owned()));
            }
        }
    }
    cited
}

/// Keys that are cited but not listed, and those that are listed but cited nowhere.
fn key_problems(papers: &BTreeSet<String>, citations: &[(String, String)]) -> Vec<String> {
    let unlisted = citations.iter().filter(|(_, key)| !papers.contains(key));
    let unlisted = unlisted.map(|(place, key)| format!("{place}: {PAPERS} has no [{key}]"));
    let cited: BTreeSet<&String> = citations.iter().map(|(_, key)| key).collect();
    let uncited = papers.iter().filter(|key| !cited.contains(key));
    unlisted.chain(uncited.map(|key| format!("{PAPERS}: nothing cites [{key}]"))).collect()
}

/// Whether a word is shaped like `Name24` or `Name24b`.
fn is_key(word: &str) -> bool {
    let name = word.trim_end_matches(|c: char| c.is_ascii_lowercase() && word.len() > 3);
    let name = if name.ends_with(|c: char| c.is_ascii_digit()) { name } else { word };
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    name.len() == stem.len() + 2
        && stem.len() >= 2
        && stem.starts_with(|c: char| c.is_ascii_uppercase())
        && stem[1..].chars().all(|c| c.is_ascii_alphabetic())
        && stem.ends_with(|c: char| c.is_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_and_blanks_are_found() {
        let text = format!("fn f() {{\n\tg(); \n    // {} later\n}}", LEFTOVERS[0]);
        let problems = form("a.rs", &text);
        assert_eq!(
            problems,
            [
                "a.rs:2: a tab",
                "a.rs:2: blanks at the end of the line",
                &format!("a.rs:3: a leftover: {}", LEFTOVERS[0]),
                "a.rs: does not end with one line break",
            ]
        );
        assert!(form("a.rs", "fn f() {}\n").is_empty());
    }

    #[test]
    fn places_of_one_machine_are_found() {
        for place in PLACES {
            assert_eq!(form("a.md", &format!("see {place}x\n")).len(), 1, "{place}");
        }
    }

    #[test]
    fn functions_are_measured_by_their_indentation() {
        let text = "impl A {\n    pub(crate) const fn one(&self) -> u8 {\n        1\n    }\n}\n\nfn two() {}\n";
        assert_eq!(functions(text), [("one".to_owned(), 3, 2)]);
        let long = format!("fn long() {{\n{}}}\n", "    step();\n".repeat(100));
        assert_eq!(rust("a.rs", &long).len(), 1);
        assert!(rust("a.rs", "fn short() {\n}\n").is_empty());
    }

    #[test]
    fn rust_is_checked_for_columns_and_documentation() {
        let wide = format!("const A: &str = \"{}\";\n", "x".repeat(MAX_COLUMNS));
        assert_eq!(rust("a.rs", &wide).len(), 1);
        assert_eq!(rust("crates/a/src/lib.rs", "mod b;\n").len(), 1);
        assert!(rust("crates/a/src/lib.rs", "//! A.\nmod b;\n").is_empty());
        let risky = format!("{UNSAFE} fn f() {{}}\n");
        assert_eq!(rust("crates/ounce-ir/src/a.rs", &risky).len(), 1);
        assert!(rust("crates/ounce-kernels/src/a.rs", &risky).is_empty());
        assert!(rust("a.rs", &format!("// no {UNSAFE} here: forbid({UNSAFE}_code)\n")).is_empty());
    }

    #[test]
    fn the_table_of_edges_is_read() {
        let text = "| crate | holds | uses |\n|---|---|---|\n| `ounce-ir` | nouns | – |\n\
                    | `ounce-exec` | runs | ir, kernels |\n| word | meaning | more |\n";
        let uses = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        assert_eq!(
            edge_table(text),
            [
                ("ounce-ir".to_owned(), uses(&[])),
                ("ounce-exec".to_owned(), uses(&["ounce-ir", "ounce-kernels"])),
            ]
        );
    }

    #[test]
    fn source_keys_are_recognised() {
        for key in ["Chen16", "Linnainmaa70", "ZhangSennrich19", "Dao22b", "Su21"] {
            assert!(is_key(key), "{key}");
        }
        for word in ["N", "V,C", "Graph", "u32", "F32", "dtype", "AB12", "i2", "Q8_0"] {
            assert!(!is_key(word), "{word}");
        }
    }

    #[test]
    fn source_keys_are_listed_and_cited() {
        let papers = paper_keys("# Papers\n\n- **[Chen16]** Chen et al.\n- other [Dao22]\n");
        let problems = |path: &str, text: &str| key_problems(&papers, &cited_keys(path, text));
        // In parts, so that this file does not cite them itself.
        let comment = concat!("/", "/! Sources: `[Chen16]`, `[Dao22]`; see [`Graph`].\n");
        assert_eq!(problems("a.rs", comment), ["a.rs:1: docs/papers.md has no [Dao22]"]);
        assert!(problems("a.md", "Text.\nAs in [Chen16], not [Dao22](a.md).\n").is_empty());
        let unused = ["docs/papers.md: nothing cites [Chen16]"];
        assert_eq!(problems("a.rs", "let x = a[Chen16];\n"), unused);
        assert_eq!(problems("a.toml", "# [Chen16]\n"), unused);
        assert_eq!(problems(PAPERS, "- **[Chen16]** Chen et al.\n"), unused);
    }
}

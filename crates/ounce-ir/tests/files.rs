//! File tests: `tests/files/*.graph` hold a graph, a line `---`, and what the parser or the verifier
//! says of it. `UPDATE_EXPECT=1` writes the second part anew.
#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fmt::Write;
use std::path::{Path, PathBuf};

use ounce_ir::{Graph, verify};

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files");
    let entries = std::fs::read_dir(folder).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    files.sort();
    files
}

/// What there is to say about the text of a graph.
fn outcome(text: &str) -> String {
    let graph = match Graph::parse(text) {
        Ok(graph) => graph,
        Err(e) => return format!("line {}: {}\n", e.line, e.what),
    };
    let printed = graph.to_string();
    let input: String =
        text.lines().filter(|l| !l.starts_with('#')).flat_map(|l| [l, "\n"]).collect();
    assert_eq!(printed, input, "a graph prints as it was written");
    let mut said = String::new();
    match verify(&graph) {
        Ok(()) => said.push_str("ok\n"),
        Err(errors) => {
            for e in errors {
                assert!(
                    e.entity == "graph" || printed.lines().any(|line| line == e.text),
                    "{} is not a line of the graph",
                    e.text
                );
                writeln!(said, "{}: {}", e.entity, e.message).unwrap();
            }
        }
    }
    said
}

#[test]
fn files_say_what_they_should() {
    let files = files();
    assert!(files.len() >= 20, "{} files", files.len());
    let mut wrong = Vec::new();
    for file in &files {
        let text = std::fs::read_to_string(file).unwrap();
        let (graph, expected) = text.split_once("---\n").unwrap();
        let said = outcome(graph);
        if said == expected {
            continue;
        }
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            std::fs::write(file, format!("{graph}---\n{said}")).unwrap();
        } else {
            wrong.push(format!("{}\nexpected:\n{expected}got:\n{said}", file.display()));
        }
    }
    assert!(wrong.is_empty(), "{}\nUPDATE_EXPECT=1 writes the files anew", wrong.join("\n"));
}

#[test]
fn every_invariant_is_broken_by_some_file() {
    let said: String = files()
        .iter()
        .map(|f| std::fs::read_to_string(f).unwrap().split_once("---\n").unwrap().1.to_owned())
        .collect();
    for message in [
        "does not exist",
        "no reduction lanes",
        "has the same name",
        "a trained parameter is f32 or bf16",
        "other trained parameters are",
        "the name is empty",
        "not fixed, or empty",
        "not whole blocks",
        "the table is empty, or a number is not finite",
        "'s already",
        "no op of the forward pass has",
        "data is i32",
        "another input has the same kind",
        "there is another loss",
        "cannot be written",
        "is written by",
        "is read before it is written",
        "no op writes it",
        "is frozen and has no gradient",
        "a sum of p1 is f32[4], or rows",
        "is the sum of p0 already",
        "only an update op may read the sum",
        "is read before anything is added to it",
        "was read before this addition",
        "are written already",
        "is added to a sum of",
        "the op writes",
        "outputs, needs",
        "eps is not above 0",
        "p is not between 0 and 1",
        "its phase comes before",
        "does not run in this phase",
        "belongs to a later phase",
        "an op of this phase does not write",
        "a forward op adds to no sum",
        "only adamw and sgd update",
        "is not below the graph's count",
        "no forward op has r0",
        "an update op has no stage",
        "the op has no stage",
        "stages do not come in order",
        "its input is not the output",
        "its d_input is not the d_output",
        "a gradient has not the shape",
        "the last stage has no output",
        "belongs to another stage",
        "its output is written elsewhere",
        "its d_input is written elsewhere",
        "updates by another rule",
        "updates p0 already",
        "p1 is frozen",
        "does not read the sum of",
        "it is trained and no op updates it",
        "optimizer states are not those",
        "norm parts of the trained parameters in order",
        "clipping is for all updates or for none",
    ] {
        assert!(said.contains(message), "no file shows: {message}");
    }
}

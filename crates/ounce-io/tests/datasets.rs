//! Rows of every kind of file, what they mean, and what is said about broken ones.

#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use std::path::{Path, PathBuf};

use ounce_io::chat_template::ChatTemplate;
use ounce_io::dataset::{ColumnMapping, OnBadRow, RowFormat, RowReader, has_conversations};
use ounce_io::{
    RowNotes, RowOptions, RowSampler, RowTokens, TextPieces, TokenCache, Tokenizer, parse_json,
};
use serde_json::{Value, json};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// A folder with a tokenizer that knows ChatML's tokens, and data files.
struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bytes = std::fs::read(data("bpe512/tokenizer.json")).unwrap();
        let mut tokenizer: Value = serde_json::from_slice(&bytes).unwrap();
        let added = tokenizer["added_tokens"].as_array_mut().unwrap();
        for (id, name) in [(600, "<|im_start|>"), (601, "<|im_end|>")] {
            let mut token = added[0].clone();
            token["id"] = id.into();
            token["content"] = name.into();
            added.push(token);
        }
        let lab = Self { dir };
        lab.write("tokenizer.json", &tokenizer.to_string());
        lab.write("generation_config.json", &json!({ "eos_token_id": 601 }).to_string());
        lab.template(&std::fs::read_to_string(data("chat_templates/chatml.jinja")).unwrap());
        lab
    }

    fn template(&self, source: &str) {
        let config = json!({
            "chat_template": source, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        });
        self.write("tokenizer_config.json", &config.to_string());
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn rows(&self, name: &str, rows: &[Value]) -> PathBuf {
        let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
        self.write(name, &lines.join("\n"))
    }

    /// Tokenizes files into a cache, with so many workers.
    fn cache(
        &self,
        files: &[PathBuf],
        options: &RowOptions,
        max_length: usize,
        n_workers: usize,
    ) -> Result<TokenCache, String> {
        let tokenizer = Tokenizer::load(self.dir.path()).unwrap();
        let template = self.load_template(&tokenizer);
        let rows = RowTokens {
            tokenizer: &tokenizer,
            template: &template,
            options,
            max_length,
            n_workers,
        };
        let path = self.dir.path().join(format!("cache-{n_workers}.bin"));
        rows.write_cache(files, 7, &path).map_err(|e| self.without_dir(&e.to_string()))
    }

    fn load_template(&self, tokenizer: &Tokenizer) -> ChatTemplate {
        let is_token = |text: &str| tokenizer.added_token_id(text).is_some();
        ChatTemplate::load(self.dir.path(), 0, tokenizer.adds_bos(), is_token).unwrap()
    }

    fn without_dir(&self, message: &str) -> String {
        message.replace(&format!("{}/", self.dir.path().display()), "")
    }

    /// Text that is supervised of each row of a cache, and text that is not, `|` between.
    fn shown(&self, cache: &TokenCache) -> Vec<String> {
        let tokenizer = Tokenizer::load(self.dir.path()).unwrap();
        (0..cache.n_rows()).map(|row| show(&tokenizer, cache, row)).collect()
    }
}

fn show(tokenizer: &Tokenizer, cache: &TokenCache, row: u64) -> String {
    let (mut ids, mut supervised) = ([0; 512], [false; 512]);
    let n = cache.read_row(row, &mut ids, &mut supervised).unwrap();
    let (mut bytes, mut was) = (Vec::new(), false);
    for (&id, &is) in ids[..n].iter().zip(&supervised) {
        if is != was {
            bytes.push(if is { b'[' } else { b']' });
        }
        was = is;
        bytes.extend(tokenizer.token_bytes(id as u32).unwrap());
    }
    if was {
        bytes.push(b']');
    }
    String::from_utf8(bytes).unwrap()
}

fn options() -> RowOptions {
    RowOptions::default()
}

fn say(user: &str, assistant: &str) -> String {
    format!("<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n[{assistant}<|im_end|>]\n")
}

#[test]
fn a_template_knows_the_special_tokens_of_either_file() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, value: Value| {
        std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    };
    write(
        "tokenizer_config.json",
        json!({ "bos_token": "<b>", "chat_template": "{{ bos_token }}|{{ eos_token }}" }),
    );
    write(
        "special_tokens_map.json",
        json!({ "bos_token": "<other>", "eos_token": { "content": "<e>" } }),
    );
    let template = ChatTemplate::load(dir.path(), 0, false, |_| false).unwrap();
    assert_eq!(template.render(&[], None, false).unwrap().text, "<b>|<e>");
}

#[test]
fn every_format_is_found_out_and_only_answers_with_their_end_are_supervised() {
    let turn = |role: &str, content: &str| json!({ "role": role, "content": content });
    let said = |from: &str, value: &str| json!({ "from": from, "value": value });
    let cases = [
        (json!({ "messages": [turn("user", "q"), turn("assistant", "a")] }), "messages"),
        (json!({ "conversations": [said("human", "q"), said("gpt", "a")] }), "sharegpt"),
        (json!({ "prompt": "q", "completion": "a" }), "prompt-completion"),
        (
            json!({ "prompt": [turn("user", "q")], "completion": [turn("assistant", "a")] }),
            "prompt-completion",
        ),
        (json!({ "instruction": "q", "input": "", "output": "a" }), "alpaca"),
        (json!({ "question": "q", "answer": "a" }), "question-answer"),
        (json!({ "prompt": "q", "chosen": "a", "rejected": "b" }), "preference"),
        (json!({ "question": "q", "chosen": "a", "rejected": "ab" }), "preference"),
        (json!({ "instruction": "q", "input": "", "chosen": "a", "rejected": "b" }), "preference"),
        (
            json!({ "conversations": [said("human", "q")], "chosen": said("gpt", "a"), "rejected": said("gpt", "b") }),
            "preference",
        ),
        (
            json!({
                "chosen": [turn("user", "q"), turn("assistant", "a")],
                "rejected": [turn("user", "q"), turn("assistant", "b")],
            }),
            "preference",
        ),
        // The prompt is said once more at the beginning of both answers.
        (
            json!({
                "prompt": "q",
                "chosen": [turn("user", "q"), turn("assistant", "a")],
                "rejected": [turn("user", "q"), turn("assistant", "b")],
            }),
            "preference",
        ),
        (json!({ "turns": ["q", "r"], "reference": ["a"] }), "turns"),
        (json!({ "instruction": "q", "instances": [{ "input": "", "output": "a" }] }), "instances"),
    ];
    let lab = Lab::new();
    for (row, format) in cases {
        let path = lab.rows("rows.jsonl", std::slice::from_ref(&row));
        let found = RowFormat::detect(&path, &options()).unwrap();
        assert_eq!(found.to_string(), format, "{row}");
        let cache = lab.cache(&[path], &options(), 512, 1).unwrap();
        assert_eq!(lab.shown(&cache), [say("q", "a")], "{row}");
    }
    let path = lab.rows("rows.jsonl", &[json!({ "text": "abc" })]);
    assert_eq!(RowFormat::detect(&path, &options()).unwrap(), RowFormat::Text);
}

#[test]
fn a_preference_without_a_question_has_what_its_answers_begin_with() {
    let lab = Lab::new();
    let shown = |chosen: &str, rejected: &str, system: Option<&str>| {
        let row = json!({ "system": system, "chosen": chosen, "rejected": rejected });
        let path = lab.rows("rows.jsonl", &[row]);
        lab.cache(&[path], &options(), 512, 1).map(|cache| lab.shown(&cache))
    };
    let sky = say("The sky is", " blue.");
    assert_eq!(
        shown("The sky is blue.", "The sky is brown.", None).unwrap(),
        std::slice::from_ref(&sky)
    );
    let system = format!("<|im_start|>system\ns<|im_end|>\n{sky}");
    assert_eq!(shown("The sky is blue.", "The sky is brown.", Some("s")).unwrap(), [system]);
    // Half a word is not what they were asked.
    let error = shown("Yellow is not a number.", "Yes.", None).unwrap_err();
    assert!(error.contains("rows.jsonl:1: missing key `prompt`, and the answers"), "{error}");
}

#[test]
fn a_mapped_key_that_is_misspelt_is_refused_although_none_is_needed() {
    let lab = Lab::new();
    let row = json!({ "instruction": "q", "context": "c", "response": "a" });
    let path = lab.rows("rows.jsonl", &[row]);
    let mapped = |input: &str| {
        let pairs =
            [("output", "response"), ("input", input)].map(|(a, b)| (a.to_owned(), b.to_owned()));
        let options = RowOptions { columns: ColumnMapping::new(pairs), ..options() };
        has_conversations(std::slice::from_ref(&path), &options)
    };
    assert!(mapped("context").unwrap());
    // A key that only some rows have may be missing in the first of them.
    assert!(mapped("paragraph").unwrap());
    let error = mapped("contxt").unwrap_err().to_string();
    assert!(error.contains("rows.jsonl: `--column-mapping input=contxt`: "), "{error}");
    assert!(error.contains("\nhint: the nearest key is `context`"), "{error}");
}

#[test]
fn answers_of_a_prompt_and_messages_of_weight_zero_are_not_supervised() {
    let lab = Lab::new();
    let turn = |role: &str, content: &str| json!({ "role": role, "content": content });
    let given = [turn("user", "q"), turn("assistant", "given"), turn("user", "r")];
    let mut weightless = turn("assistant", "given");
    weightless["weight"] = 0.into();
    let rows = [
        json!({ "prompt": given, "completion": [turn("assistant", "a")] }),
        json!({ "messages": [turn("user", "q"), weightless, turn("user", "r"), turn("assistant", "a")] }),
        json!({ "prompt": "q", "completion": "bad", "label": false }),
    ];
    for (row, n) in rows.iter().zip([1, 1, 0]) {
        let path = lab.rows(
            "rows.jsonl",
            &[
                row.clone(),
                json!({ "prompt": "q", "completion": "a", "messages": [turn("assistant", "x")] }),
            ],
        );
        let cache = lab.cache(&[path], &options(), 512, 1).unwrap();
        assert_eq!(cache.n_rows(), n + 1, "{row}");
        if n > 0 {
            let shown = &lab.shown(&cache)[0];
            assert!(shown.contains("given<|im_end|>") && !shown.contains("[given"), "{shown}");
            assert!(shown.contains("[a<|im_end|>]"), "{shown}");
        }
    }
}

#[test]
fn keys_of_other_names_are_mapped() {
    let lab = Lab::new();
    let path = lab.rows("rows.jsonl", &[json!({ "frage": "q", "antwort": "a" })]);
    let error = lab.cache(std::slice::from_ref(&path), &options(), 64, 1).unwrap_err();
    assert!(
        error.starts_with(
            "rows.jsonl:1: rows with the keys `frage`, `antwort` are of no known format"
        ),
        "{error}"
    );
    assert!(error.contains("hint: name the keys with `--column-mapping`"), "{error}");
    let pairs = [("prompt", "frage"), ("completion", "antwort")];
    let columns = ColumnMapping::new(pairs.map(|(a, b)| (a.to_owned(), b.to_owned())));
    let cache = lab.cache(&[path], &RowOptions { columns, ..options() }, 512, 1).unwrap();
    assert_eq!(lab.shown(&cache), [say("q", "a")]);
}

#[test]
fn arrays_of_json_are_read_like_lines_and_rows_name_the_line_they_begin_on() {
    let lab = Lab::new();
    let array = "\u{feff}[\n {\"question\": \"a, ]} \\\" b\",\n  \"answer\": \"1\"},\
                 \n\n {\"question\": \"c\", \"answer\": \"[2\"}\n]\n";
    let path = lab.write("rows.json", array);
    let mut rows = RowReader::open(&path).unwrap();
    let mut places = Vec::new();
    while let Some(row) = rows.next_row().unwrap() {
        let row = row.unwrap();
        places.push(format!("{}: {}", row.place, row.value["answer"]));
    }
    assert_eq!(places, ["line 2: \"1\"", "line 5: \"[2\""]);
    // Rows on lines in a file that is called .json, as many data sets are.
    let path = lab.write(
        "lines.json",
        "{\"question\": \"a\", \"answer\": \"b\"}\n{\"question\": \"c\", \"answer\": \"d\"}\n",
    );
    let cache = lab.cache(&[path], &options(), 512, 1).unwrap();
    assert_eq!(lab.shown(&cache), [say("a", "b"), say("c", "d")]);
}

#[test]
fn broken_arrays_are_errors_at_their_line_and_broken_rows_in_them_can_be_passed_over() {
    let lab = Lab::new();
    for (text, line, what) in [
        ("[\n{\"a\": 1}\n{\"a\": 2}]", 3, "a comma or `]` is missing"),
        ("[\n{\"a\": 1},\n", 3, "a row is missing"),
        ("[\n{\"a\": [1", 2, "the file ends before the array does"),
        ("[{\"a\": 1}]\n[2]", 2, "there is more behind the array's closing bracket"),
        ("[}]", 1, "`}` closes nothing"),
        ("[,{}]", 1, "a row is missing"),
    ] {
        let path = lab.write("rows.json", text);
        let mut rows = RowReader::open(&path).unwrap();
        let error = loop {
            match rows.next_row() {
                Ok(Some(_)) => {}
                Ok(None) => panic!("{text} is accepted"),
                Err(e) => break lab.without_dir(&e.to_string()),
            }
        };
        assert!(error.starts_with(&format!("rows.json:{line}: ")), "{text}: {error}");
        assert!(error.contains(what), "{text}: {error}");
    }
    let text = "[{\"question\": \"a\", \"answer\": \"b\"},\n{\"question\": NaN},\
                \n{\"question\": \"c\", \"answer\": 5},\n{\"question\": \"e\", \"answer\": \"f\"}]";
    let path = lab.write("rows.json", text);
    let error = lab.cache(std::slice::from_ref(&path), &options(), 512, 1).unwrap_err();
    assert!(error.starts_with("rows.json:2: not valid JSON: expected value near `"), "{error}");
    let skip = RowOptions { on_bad_row: OnBadRow::Skip, ..options() };
    let cache = lab.cache(&[path], &skip, 512, 2).unwrap();
    assert_eq!(lab.shown(&cache), [say("a", "b"), say("e", "f")]);
    let counts = cache.notes::<RowNotes>().unwrap().files[0].counts.clone();
    assert_eq!((counts.n_rows, counts.n_bad, counts.n_kept), (4, 2, 2));
    assert!(counts.first_bad.unwrap().contains("rows.json:2: "));
}

#[test]
fn a_row_of_another_format_names_what_it_lacks() {
    let lab = Lab::new();
    let fine = json!({ "messages": [{ "role": "user", "content": "q" }, { "role": "assistant", "content": "a" }] });
    for (row, what) in [
        (json!({ "text": "x" }), "missing key `messages`"),
        (json!({ "messages": [] }), "the conversation is empty"),
        (json!({ "messages": "x" }), "`messages` is not a list of messages"),
        (
            json!({ "messages": [{ "role": "user" }] }),
            "`messages[0]`: the message has no `content`",
        ),
        (
            json!({ "messages": [{ "content": "x" }] }),
            "`messages[0]`: the message has no string `role`",
        ),
        (json!({ "messages": [{ "role": "user", "content": 5 }] }), "`content` is a number"),
        (json!([1]), "the row is not an object"),
    ] {
        let path = lab.rows("rows.jsonl", &[fine.clone(), row]);
        let error = lab.cache(&[path], &options(), 512, 1).unwrap_err();
        assert!(error.starts_with("rows.jsonl:2: ") && error.contains(what), "{error}");
        assert!(error.contains("\nhint: rows of this file are read as `messages`"), "{error}");
    }
}

#[test]
fn the_cache_is_the_same_for_any_number_of_workers() {
    let lab = Lab::new();
    let rows: Vec<Value> = (0..700)
        .map(|i| json!({ "question": "q ".repeat(i % 13 + 1), "answer": "a".repeat(i % 7 + 1) }))
        .collect();
    let path = lab.rows("rows.jsonl", &rows);
    let bytes = |n| {
        let cache = lab.cache(std::slice::from_ref(&path), &options(), 64, n).unwrap();
        std::fs::read(cache.path()).unwrap()
    };
    let one = bytes(1);
    assert!(one == bytes(2) && one == bytes(5));
}

#[test]
fn a_cut_answer_is_counted_and_data_without_anything_to_learn_is_refused() {
    let lab = Lab::new();
    let rows = [
        json!({ "question": "q", "answer": "short" }),
        json!({ "question": "q", "answer": "long ".repeat(60) }),
        json!({ "question": "q ".repeat(200), "answer": "never seen" }),
    ];
    let path = lab.rows("rows.jsonl", &rows);
    let cache = lab.cache(std::slice::from_ref(&path), &options(), 64, 1).unwrap();
    let counts = cache.notes::<RowNotes>().unwrap().files[0].counts.clone();
    assert_eq!((counts.n_kept, counts.n_truncated, counts.n_cut_answers), (2, 2, 2));
    assert_eq!(counts.n_without_answer, 1);
    let path = lab.rows("rows.jsonl", &rows[2..]);
    let error = lab.cache(&[path], &options(), 64, 1).unwrap_err();
    assert!(
        error.contains("none of its 1 rows, read as `question-answer`, has a token to learn"),
        "{error}"
    );
    assert!(
        error.contains("hint: every answer lies beyond the cut: raise `--max-length`"),
        "{error}"
    );
    let user_only = json!({ "messages": [{ "role": "user", "content": "q" }] });
    let path = lab.rows("rows.jsonl", &[user_only]);
    let error = lab.cache(&[path], &options(), 64, 1).unwrap_err();
    assert!(error.contains("hint: `ounce data inspect` shows what is supervised"), "{error}");
}

#[test]
fn mismatches_of_template_tokenizer_and_generation_are_said() {
    let lab = Lab::new();
    let remarks = || {
        let tokenizer = Tokenizer::load(lab.dir.path()).unwrap();
        let template = lab.load_template(&tokenizer);
        let options = options();
        let rows = RowTokens {
            tokenizer: &tokenizer,
            template: &template,
            options: &options,
            max_length: 64,
            n_workers: 1,
        };
        rows.remarks(&rows.end_of_turn()).join("\n")
    };
    assert_eq!(remarks(), "");
    let message = "{% for m in messages %}{{ m.role + ': ' + m.content ";
    lab.template(&format!("{message}+ '\\n' }}}}{{% endfor %}}"));
    assert!(remarks().contains("will not learn where to stop"), "{}", remarks());
    lab.template(&format!("{message}+ '<|eot|>\\n' }}}}{{% endfor %}}"));
    assert!(
        remarks().contains("`<|eot|>`, which is not a token of this tokenizer"),
        "{}",
        remarks()
    );
    lab.template(&format!("{message}+ '<|im_start|>' }}}}{{% endfor %}}"));
    assert!(
        remarks().contains("answers end with `<|im_start|>`, but generation stops at `<|im_end|>`"),
        "{}",
        remarks()
    );
    lab.write("tokenizer_config.json", "{}");
    assert!(remarks().contains("no chat template: ChatML is taken"), "{}", remarks());
    std::fs::copy(data("bpe512/tokenizer.json"), lab.dir.path().join("tokenizer.json")).unwrap();
    assert!(remarks().contains("messages are written one after the other"), "{}", remarks());
}

#[test]
fn templates_that_are_not_prefix_preserving_and_ones_that_trim_have_the_right_masks() {
    let lab = Lab::new();
    let say = |role: &str, content: &str| json!({ "role": role, "content": content });
    let row = json!({ "messages": [
        say("user", "q"), say("assistant", "<think>\nhm\n</think>\n\nfirst"),
        say("user", "r"), say("assistant", "  second "),
    ] });
    let path = lab.rows("rows.jsonl", &[row]);
    for (name, supervised) in [
        ("reasoning", vec!["[first<|im_end|>]", "</think>\n\n[  second <|im_end|>]"]),
        ("generation", vec!["[<think>\nhm\n</think>\n\nfirst<|im_end|>", "[  second <|im_end|>"]),
        (
            "strict",
            vec!["[/INST]\n [<think>\nhm\n</think>\n\nfirst <|im_end|>]", "[ second <|im_end|>]"],
        ),
    ] {
        lab.template(
            &std::fs::read_to_string(data(&format!("chat_templates/{name}.jinja"))).unwrap(),
        );
        let cache = lab.cache(std::slice::from_ref(&path), &options(), 512, 1).unwrap();
        let shown = &lab.shown(&cache)[0];
        for part in supervised {
            assert!(shown.contains(part), "{name}: {part:?} in {shown:?}");
        }
        let counts = &cache.notes::<RowNotes>().unwrap().files[0].counts;
        assert_eq!(counts.n_lost_answers, 0, "{name}");
        // The space before the answer is the template's, and one token with the answer's first word.
        assert_eq!(counts.n_straddling, u64::from(name == "strict"), "{name}");
    }
}

#[test]
fn a_row_that_the_template_refuses_is_a_broken_row() {
    let lab = Lab::new();
    lab.template(&std::fs::read_to_string(data("chat_templates/strict.jinja")).unwrap());
    let twice = json!({ "messages": [{ "role": "user", "content": "q" }, { "role": "user", "content": "r" }] });
    let path = lab.rows("rows.jsonl", &[twice]);
    let error = lab.cache(&[path], &options(), 512, 1).unwrap_err();
    assert!(
        error.starts_with(
            "rows.jsonl:1: the chat template refuses the row: roles must alternate, but message 2"
        ),
        "{error}"
    );
}

#[test]
fn packed_rows_hold_every_sample_once_each_from_a_granule_on() {
    let lab = Lab::new();
    let rows: Vec<Value> = (0..90)
        .map(|i| json!({ "question": "q ".repeat(i % 40 + 1), "answer": format!("a{i}") }))
        .collect();
    let path = lab.rows("rows.jsonl", &rows);
    let files = [path.clone(), lab.rows("more.jsonl", &rows[..10])];
    let cache = || lab.cache(&files, &options(), 256, 1).unwrap();
    let packed = RowSampler::packed(cache(), &[1.0, 1.0], 256, 5).unwrap();
    let single = RowSampler::new(cache(), &[1.0, 1.0], 5).unwrap();
    assert_eq!(single.n_rows(), 100);
    assert!(packed.n_rows() < 60, "{} rows", packed.n_rows());
    let (mut ids, mut supervised, mut lengths) = (vec![0; 256], vec![false; 256], Vec::new());
    let mut samples = |sampler: &RowSampler| {
        let mut samples = Vec::new();
        for row in 0..sampler.n_rows() {
            sampler.read(row, &mut ids, &mut supervised, &mut lengths).unwrap();
            let mut at = 0_usize;
            for &n in &lengths {
                samples.push((ids[at..at + n].to_vec(), supervised[at..at + n].to_vec()));
                at = (at + n).next_multiple_of(64);
            }
            assert!(at <= 256);
        }
        samples.sort();
        samples
    };
    assert_eq!(samples(&packed), samples(&single));
    let again = RowSampler::packed(cache(), &[1.0, 1.0], 256, 5).unwrap();
    let order = |s: &RowSampler| (0..50).map(|step| s.row(step, 1, 0)).collect::<Vec<_>>();
    assert_eq!(order(&packed), order(&again));
}

#[test]
fn parquet_rows_are_those_that_were_written() {
    for codec in ["snappy", "zstd", "none"] {
        let path = data(&format!("messages.{codec}.parquet"));
        let mut rows = RowReader::open(&path).unwrap();
        let mut n = 0;
        while let Some(row) = rows.next_row().unwrap() {
            let row = row.unwrap().value;
            assert_eq!(
                (row["id"].clone(), row["score"].clone()),
                (json!(n), json!(f64::from(n) / 4.0))
            );
            let messages = row["messages"].as_array().unwrap();
            assert_eq!(messages.len(), if n == 3 { 0 } else { 2 }, "{codec}: row {n}");
            if n != 3 {
                assert_eq!(messages[0]["content"], json!(format!("What is {n} + {n}?")));
                let name = if n % 2 == 1 { json!("ounce") } else { Value::Null };
                assert_eq!(messages[1]["name"], name);
                assert_eq!(messages[1]["content"], json!(format!("{}, café 🙂", 2 * n)));
            }
            n += 1;
        }
        assert_eq!(n, 7);
        assert_eq!(RowFormat::detect(&path, &options()).unwrap(), RowFormat::Messages);
    }
    let lab = Lab::new();
    let skip = RowOptions { on_bad_row: OnBadRow::Skip, ..options() };
    let cache = lab.cache(&[data("messages.zstd.parquet")], &skip, 512, 2).unwrap();
    assert_eq!(lab.shown(&cache)[1], say("What is 1 + 1?", "2, café 🙂"));
    let mut pieces = TextPieces::open(&[data("text.parquet")]).unwrap();
    assert_eq!(pieces.next_piece().unwrap().unwrap().text, "All the world");
    assert_eq!(pieces.next_piece().unwrap().unwrap().text, "is a stage");
    assert!(pieces.next_piece().unwrap().is_none());
}

#[test]
fn a_page_that_unpacks_to_too_much_and_other_compressions_are_refused_before_they_are_unpacked() {
    let error = RowReader::open(&data("bomb.parquet")).unwrap_err().to_string();
    assert!(error.contains("column `text`: a page of 9184 bytes claims to unpack to 3"), "{error}");
    let error = RowReader::open(&data("gzip.parquet")).unwrap_err().to_string();
    assert!(error.contains("GZIP") && error.contains("snappy and zstd are"), "{error}");
}

#[test]
fn a_template_ends_within_its_bounds_whatever_it_does() {
    for source in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaaaa') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10000000000 }}",
        "{% for a in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{{ messages[0].__class__.__mro__ }}{{ ''.__class__.x.y }}",
        "{{ raise_exception('no') }}",
    ] {
        let template = ChatTemplate::from_source(source, serde_json::Map::new(), 0).unwrap();
        let messages = [json!({ "role": "user", "content": "a" })];
        assert!(template.render(&messages, None, false).is_err(), "{source}");
    }
    for source in ["{% for %}", "{{ 'a }}", "{% generation %}", "{% include 'x' %}{% endif %}"] {
        assert!(ChatTemplate::from_source(source, serde_json::Map::new(), 0).is_err(), "{source}");
    }
}

#[test]
fn templates_are_rendered_as_python_renders_them() {
    let path = data("chat_templates.json");
    let goldens = parse_json(&path, &std::fs::read(&path).unwrap()).unwrap();
    let found = ounce_io::testing::compare_templates(&goldens);
    assert_eq!(found.differences, Vec::<String>::new());
    assert_eq!((found.n_templates, found.n_equal, found.n_refused), (9, 106, 2));
}

#[test]
fn ids_and_masks_are_those_that_trl_trains_with() {
    let path = data("chat_masks.json");
    let goldens = parse_json(&path, &std::fs::read(&path).unwrap()).unwrap();
    let found = ounce_io::testing::compare_masks(&goldens, path.parent().unwrap());
    assert_eq!(found.differences, Vec::<String>::new());
    assert_eq!((found.n_templates, found.n_equal), (3, 192));
}

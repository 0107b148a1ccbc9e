//! Windows of a stream beside the token cache of the same files.

#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ounce_io::chat_template::ChatTemplate;
use ounce_io::dataset::OnBadRow;
use ounce_io::{
    BlockSampler, IoError, RowOptions, RowSampler, RowTokens, StreamEncoder, StreamOptions,
    StreamPlace, StreamWindow, TokenCache, Tokenizer, tokenize_to_cache, train_char, write_window,
};
use serde_json::{Value, json};

const MAX_LENGTH: usize = 24;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// One row of a step: ids, which of them are supervised, the length of each sample.
type Row = (Vec<i32>, Vec<bool>, Vec<usize>);

/// A folder with a tokenizer of characters, and data files.
struct Lab {
    dir: tempfile::TempDir,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    rows: RowOptions,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let letters: String = (' '..='~').chain("é🙂".chars()).collect();
        let path = dir.path().join("letters.txt");
        std::fs::write(&path, format!("{letters}\n")).unwrap();
        train_char(&[path]).unwrap().save(dir.path()).unwrap();
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let template = ChatTemplate::load(dir.path(), 0, false, |_| false).unwrap();
        Self { dir, tokenizer, template, rows: RowOptions::default() }
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// `n` questions with answers, one a line.
    fn questions(&self, name: &str, n: usize) -> PathBuf {
        let row = |i: usize| json!({ "question": format!("{name} {i}"), "answer": "x".repeat(1 + i % 9) });
        let lines: Vec<String> = (0..n).map(|i| row(i).to_string()).collect();
        self.write(name, &lines.join("\n"))
    }

    fn row_tokens(&self, max_length: usize, n_workers: usize) -> RowTokens<'_> {
        let Self { tokenizer, template, rows: options, .. } = self;
        RowTokens { tokenizer, template, options, max_length, n_workers }
    }

    fn start(&self, options: &StreamOptions) -> StreamPlace {
        StreamPlace::start(options, &self.rows, 0).unwrap()
    }

    /// Makes and opens the window at `place`.
    fn window(
        &self,
        options: &StreamOptions,
        place: &StreamPlace,
        n_workers: usize,
    ) -> Result<StreamWindow, IoError> {
        let encoder = if place.has_rows() {
            StreamEncoder::Rows(self.row_tokens(options.max_length, n_workers))
        } else {
            let Self { tokenizer, rows: options, .. } = self;
            StreamEncoder::Text { tokenizer, options, n_workers }
        };
        let path = self.dir.path().join("window.bin");
        write_window(options, &encoder, place, &path)?;
        let window = StreamWindow::open(&path, options)?;
        assert!(!path.exists(), "an open window has no name");
        Ok(window)
    }

    /// The rows of so many epochs, each of them in order, and how many windows they took.
    fn epochs(&self, options: &StreamOptions, n_epochs: u64) -> (Vec<Vec<Row>>, u64) {
        let mut place = self.start(options);
        let mut epochs: Vec<Vec<Row>> = vec![Vec::new(); n_epochs as usize];
        loop {
            let window = self.window(options, &place, 1).unwrap();
            let next = window.notes().next.clone();
            let epoch = window.notes().epoch;
            if epoch >= n_epochs {
                return (epochs, place.window);
            }
            epochs[epoch as usize].extend(rows_of(&window, options.max_length));
            place = next;
        }
    }
}

fn rows_of(window: &StreamWindow, max_length: usize) -> Vec<Row> {
    (0..window.n_rows())
        .map(|row| {
            let n = max_length.next_multiple_of(64);
            let (mut ids, mut supervised, mut lengths) = (vec![-1; n], vec![false; n], Vec::new());
            window.read(row, &mut ids, &mut supervised, &mut lengths).unwrap();
            (ids, supervised, lengths)
        })
        .collect()
}

fn options(files: &[&PathBuf], window_rows: u64) -> StreamOptions {
    StreamOptions {
        files: files.iter().map(|path| ((*path).clone(), 1.0)).collect(),
        max_length: MAX_LENGTH,
        window_rows,
        packs: false,
        seed: 5,
        insists: false,
    }
}

fn paths(options: &StreamOptions) -> Vec<PathBuf> {
    options.files.iter().map(|(path, _)| path.clone()).collect()
}

/// Rows as a set that knows how often each is in it.
fn counts(rows: &[Row]) -> BTreeMap<Row, usize> {
    let mut counts = BTreeMap::new();
    for row in rows {
        *counts.entry(row.clone()).or_insert(0) += 1;
    }
    counts
}

/// The rows of the epochs that a token cache of the same files gives.
fn cached(lab: &Lab, options: &StreamOptions, n_epochs: u64) -> Vec<Vec<Row>> {
    let path = lab.dir.path().join("cache.bin");
    let n = options.max_length.next_multiple_of(64);
    let weights: Vec<f64> = options.files.iter().map(|(_, weight)| *weight).collect();
    if lab.start(options).has_rows() {
        let cache = lab.row_tokens(options.max_length, 1).write_cache(&paths(options), 1, &path);
        let cache = cache.unwrap();
        let sampler = if options.packs {
            RowSampler::packed(cache, &weights, options.max_length, options.seed).unwrap()
        } else {
            RowSampler::new(cache, &weights, options.seed).unwrap()
        };
        let n_rows = sampler.n_rows() as usize;
        let row = |epoch, i| {
            let (mut ids, mut supervised, mut lengths) = (vec![-1; n], vec![false; n], Vec::new());
            let row = sampler.row(epoch, n_rows, i);
            sampler.read(row, &mut ids, &mut supervised, &mut lengths).unwrap();
            (ids, supervised, lengths)
        };
        return (0..n_epochs).map(|e| (0..n_rows).map(|i| row(e, i)).collect()).collect();
    }
    let cache = tokenize_to_cache(&paths(options), &lab.tokenizer, &path, 1).unwrap();
    let sampler = BlockSampler::new(cache, options.max_length, options.seed).unwrap();
    let n_blocks = sampler.n_blocks() as usize;
    let block = |epoch, i| {
        let mut ids = vec![-1; n];
        let of_block = &mut ids[..options.max_length];
        sampler.fill_row_range(epoch, n_blocks, i..i + 1, of_block).unwrap();
        let supervised = (0..n).map(|at| at < options.max_length).collect();
        (ids, supervised, vec![options.max_length])
    };
    (0..n_epochs).map(|e| (0..n_blocks).map(|i| block(e, i)).collect()).collect()
}

/// Goal: a stream trains on what a token cache would. Method: the rows of two epochs, for windows that cut the epoch
/// anywhere, that end with it, and that hold it whole; the last in the same order.
fn check_against_cache(lab: &Lab, files: &[&PathBuf], packs: bool) {
    let with = |window_rows| StreamOptions { packs, ..options(files, window_rows) };
    let expected = cached(lab, &with(1), 2);
    let n = expected[0].len() as u64;
    for window_rows in [1, 7, n - 1, n, n + 1, 10_000] {
        let (epochs, n_windows) = lab.epochs(&with(window_rows), 2);
        for (found, expected) in epochs.iter().zip(&expected) {
            if !packs {
                assert!(counts(found) == counts(expected), "windows of {window_rows} rows");
            }
            let samples = |rows: &[Row]| rows.iter().map(|row| row.2.len()).sum::<usize>();
            assert_eq!(samples(found), samples(expected), "windows of {window_rows} rows");
        }
        if window_rows == 10_000 {
            assert_eq!(n_windows, 2);
            assert!(files.len() > 1 || epochs == expected, "one window is the whole epoch");
        }
    }
}

#[test]
fn every_epoch_has_the_blocks_of_a_token_cache_of_the_same_text() {
    let lab = Lab::new();
    let plain = lab.write("a.txt", "\u{feff}a few words");
    let long: Vec<String> = (0..9000).map(|i| format!("line {i} of a text")).collect();
    let long = lab.write("b.txt", &long.join("\n")[..100_000]);
    let row = |i: usize| json!({ "text": "word ".repeat(i * i) }).to_string() + "\n";
    let rows = lab.write("c.jsonl", &(0..40).map(row).collect::<String>());
    let array = lab.write("d.json", r#"[ {"text": "one of two"}, {"text":"two of two"} ] "#);
    check_against_cache(&lab, &[&long], false);
    check_against_cache(&lab, &[&rows], false);
    check_against_cache(&lab, &[&plain, &rows, &long, &array, &plain], false);
}

#[test]
fn every_epoch_has_the_samples_of_a_token_cache_of_the_same_rows() {
    let mut lab = Lab::new();
    let (a, b) = (lab.questions("a.jsonl", 50), lab.questions("b.jsonl", 13));
    check_against_cache(&lab, &[&a], false);
    check_against_cache(&lab, &[&a, &b], false);
    check_against_cache(&lab, &[&a], true);
    // Rows that hold several samples, none, or are broken; Parquet with several row groups.
    let instances = |n: usize| -> Value {
        (0..n).map(|i| json!({ "input": format!("in {i} of {n}"), "output": "out" })).collect()
    };
    let row = |i: usize| json!({ "instruction": "do", "instances": instances(i % 7) }).to_string();
    let rows: Vec<String> = (1..30).map(row).chain(["{}".into(), "{".into()]).collect();
    let several = lab.write("several.jsonl", &rows.join("\n"));
    lab.rows.on_bad_row = OnBadRow::Skip;
    check_against_cache(&lab, &[&several], false);
    check_against_cache(&lab, &[&several, &data("messages.zstd.parquet"), &a], false);
}

#[test]
fn a_window_is_the_same_for_any_number_of_workers_and_after_its_place_was_stored() {
    let lab = Lab::new();
    let (a, b) = (lab.questions("a.jsonl", 300), lab.questions("b.jsonl", 33));
    let mut options = options(&[&a, &b], 40);
    options.files[1].1 = 2.5;
    let mut place = lab.start(&options);
    for _ in 0..25 {
        let stored = serde_json::to_string(&place).unwrap();
        let again: StreamPlace = serde_json::from_str(&stored).unwrap();
        let window = lab.window(&options, &place, 1).unwrap();
        for n_workers in [2, 5] {
            let other = lab.window(&options, &again, n_workers).unwrap();
            assert_eq!(other.notes(), window.notes());
            assert_eq!(rows_of(&other, MAX_LENGTH), rows_of(&window, MAX_LENGTH));
        }
        place = window.notes().next.clone();
    }
    assert!(place.epoch > 1 && place.window == 25);
}

#[test]
fn a_weight_counts_passes_per_epoch_whatever_the_lengths() {
    let lab = Lab::new();
    let files =
        [("a.jsonl", 200, 0.25), ("b.jsonl", 30, 2.0), ("c.jsonl", 60, 1.0), ("d.jsonl", 5, 0.0)];
    let mut options = options(&[], 17);
    for (name, n, weight) in files {
        options.files.push((lab.questions(name, n), weight));
    }
    let (epochs, _) = lab.epochs(&options, 4);
    let n_of = |rows: &[Row], name: &str| {
        let text = |row: &Row| {
            lab.tokenizer.decode(&row.0[..row.2[0]].iter().map(|&id| id as u32).collect::<Vec<_>>())
        };
        rows.iter().filter(|row| text(row).unwrap().contains(name)).count()
    };
    for (name, n, weight) in files {
        let n_all: usize = epochs.iter().map(|rows| n_of(rows, name)).sum();
        let expected = 4.0 * weight * n as f64;
        assert!((n_all as f64 - expected).abs() <= 2.0, "{n_all} of {name}, not {expected}");
        // Within an epoch the files are taken side by side, not one after the other.
        let half = &epochs[0][..epochs[0].len() / 2];
        let share = n_of(half, name) as f64 / (n_of(&epochs[0], name).max(1)) as f64;
        assert!(weight == 0.0 || (0.35..0.65).contains(&share), "{share} of {name}");
    }
}

#[test]
fn a_file_that_changed_is_noticed() {
    let lab = Lab::new();
    let path = lab.questions("a.jsonl", 50);
    let mut options = options(&[&path], 10);
    let first = lab.window(&options, &lab.start(&options), 1).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    // The same bytes at another time, and other bytes of the same length.
    lab.write("a.jsonl", &text);
    let second = lab.window(&options, &first.notes().next, 1).unwrap();
    assert!(second.notes().remarks[0].contains("a.jsonl was written since the run began"));
    lab.write("a.jsonl", &text.replace("a.jsonl 12", "b.jsonl 12"));
    let other = lab.window(&options, &first.notes().next, 1).unwrap();
    assert_ne!(other.notes().ids_hash, second.notes().ids_hash);
    let after = lab.window(&options, &second.notes().next, 1).unwrap();
    lab.write("a.jsonl", &format!("{text}\n"));
    let error = lab.window(&options, &second.notes().next, 1).unwrap_err().to_string();
    assert!(error.contains("a.jsonl: changed from 2") && error.contains("\nhint: "), "{error}");
    options.insists = true;
    let insisted = lab.window(&options, &second.notes().next, 1).unwrap();
    assert!(insisted.notes().remarks[0].contains("changed from 2"));
    assert_eq!(insisted.notes().ids_hash, after.notes().ids_hash);
}

#[test]
fn a_broken_row_is_named_when_its_window_comes() {
    let mut lab = Lab::new();
    let good = std::fs::read_to_string(lab.questions("a.jsonl", 30)).unwrap();
    let path = lab.write("a.jsonl", &format!("{good}\n{{\"question\": 1}}\n{good}"));
    let options = options(&[&path], 15);
    let mut place = lab.start(&options);
    for _ in 0..2 {
        place = lab.window(&options, &place, 2).unwrap().notes().next.clone();
    }
    let error = lab.window(&options, &place, 2).unwrap_err().to_string();
    assert!(error.contains("a.jsonl:31: ") && error.contains("\nhint: "), "{error}");
    lab.rows.on_bad_row = OnBadRow::Skip;
    let window = lab.window(&options, &place, 2).unwrap();
    let counts = &window.notes().files[0].counts;
    assert_eq!((counts.n_rows, counts.n_bad, counts.n_kept), (16, 1, 15));
    assert!(counts.first_bad.as_ref().unwrap().contains("a.jsonl:31: "));
}

#[test]
fn streams_without_anything_to_train_on_are_refused() {
    let lab = Lab::new();
    let refused = |options: &StreamOptions| {
        let start = StreamPlace::start(options, &lab.rows, 0);
        start.and_then(|place| lab.window(options, &place, 1)).unwrap_err().to_string()
    };
    let short = lab.write("short.txt", "too short");
    assert!(
        refused(&options(&[&short], 9)).contains("short.txt holds 9 tokens, fewer than the 24")
    );
    let empty = lab.write("empty.txt", "");
    assert!(refused(&options(&[&empty], 9)).contains("holds 0 tokens"));
    let users = json!({ "messages": [{ "role": "user", "content": "q" }] }).to_string();
    let users = lab.write("users.jsonl", &users);
    let error = refused(&options(&[&users, &users], 9));
    assert!(error.contains("has a token to learn"), "{error}");
    let mut options = options(&[&short], 9);
    options.files[0].1 = 0.0;
    assert!(refused(&options).contains("weights of the data files leave nothing"));
    let one = lab.questions("one.jsonl", 3);
    options.files = vec![(one, 1.0); 65];
    assert!(refused(&options).contains("65 data files cannot be streamed side by side"));
}

/// A place comes from a checkpoint, which may be damaged: no panic, no endless loop, whatever it says.
#[test]
fn a_place_that_is_damaged_is_refused_or_read_from() {
    // One row of the Parquet file is an empty conversation.
    let mut lab = Lab::new();
    lab.rows.on_bad_row = OnBadRow::Skip;
    let rows = options(&[&lab.questions("a.jsonl", 40)], 9);
    let text = options(&[&lab.write("a.txt", &"some words of text\n".repeat(60))], 9);
    let parquet = options(&[&data("messages.none.parquet")], 9);
    for options in [rows, text, parquet] {
        let place = lab.window(&options, &lab.start(&options), 1).unwrap().notes().next.clone();
        let stored = serde_json::to_value(&place).unwrap();
        let mut numbers = Vec::new();
        find_numbers(&stored, String::new(), &mut numbers);
        assert!(numbers.len() >= 8, "{stored}");
        for pointer in &numbers {
            for value in [0, 1, 7, 1 << 20, 1 << 40, i64::MAX as u64, u64::MAX] {
                let mut damaged = stored.clone();
                *damaged.pointer_mut(pointer).unwrap() = value.into();
                let Ok(place) = serde_json::from_value::<StreamPlace>(damaged) else { continue };
                // Text without its line ends is no row: an error is as good as a window.
                match lab.window(&options, &place, 1) {
                    Ok(window) => assert!(window.n_rows() > 0),
                    Err(error) => assert!(error.to_string().contains("\nhint: "), "{error}"),
                }
            }
        }
    }
}

/// Pointers to the numbers of a JSON value.
fn find_numbers(value: &Value, at: String, to: &mut Vec<String>) {
    match value {
        Value::Number(_) => to.push(at),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, x)| find_numbers(x, format!("{at}/{i}"), to));
        }
        Value::Object(map) => {
            map.iter().for_each(|(key, x)| find_numbers(x, format!("{at}/{key}"), to));
        }
        _ => {}
    }
}

#[test]
fn packed_windows_leave_no_file_behind() {
    let lab = Lab::new();
    let options = StreamOptions {
        packs: true,
        max_length: 256,
        ..options(&[&lab.questions("a.jsonl", 30)], 12)
    };
    let window = lab.window(&options, &lab.start(&options), 1).unwrap();
    // Three granules of four in a row: every sample takes one.
    assert_eq!(window.n_rows(), 3);
    let lengths: usize = rows_of(&window, 256).iter().map(|row| row.2.len()).sum();
    assert_eq!(lengths, 12);
    let left: Vec<PathBuf> = std::fs::read_dir(lab.dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "bin"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let cache = TokenCache::open(&lab.dir.path().join("window.bin"));
    assert!(cache.unwrap_err().to_string().contains("does not exist"));
}

//! What a window deep in a large file reads and holds. One test, so that the process is its own.

#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use std::fs;
use std::io::Write;
use std::path::Path;

use ounce_io::chat_template::ChatTemplate;
use ounce_io::{
    RowOptions, RowTokens, StreamEncoder, StreamOptions, StreamPlace, StreamWindow, Tokenizer,
    train_char, window_disk_bytes, write_window,
};
use serde_json::{Value, json};

/// A number of a table of this process in `/proc`.
fn number(table: &str, key: &str) -> u64 {
    let table = fs::read_to_string(format!("/proc/self/{table}")).unwrap();
    let line = table.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_window_of_64_mib_of_rows_reads_and_holds_no_more_than_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    let row = format!("{}\n", json!({ "question": "q".repeat(80), "answer": "a".repeat(20) }));
    let n_rows = (64 << 20) / row.len();
    let mut file = std::io::BufWriter::new(fs::File::create(&path).unwrap());
    for _ in 0..n_rows {
        file.write_all(row.as_bytes()).unwrap();
    }
    file.flush().unwrap();
    drop(file);
    let letters = dir.path().join("letters.txt");
    fs::write(&letters, "abcdefghijklmnopqrstuvwxyz\n").unwrap();
    train_char(&[letters]).unwrap().save(dir.path()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let template = ChatTemplate::load(dir.path(), 0, false, |_| false).unwrap();
    let rows = RowOptions::default();
    let options = StreamOptions {
        files: vec![(path, 1.0)],
        max_length: 128,
        window_rows: 4096,
        packs: true,
        seed: 1,
        insists: false,
    };
    let max_length = options.max_length;
    let encoder = |n_workers| {
        let (tokenizer, template, options) = (&tokenizer, &template, &rows);
        StreamEncoder::Rows(RowTokens { tokenizer, template, options, max_length, n_workers })
    };
    let start = serde_json::to_value(StreamPlace::start(&options, &rows, 0).unwrap()).unwrap();
    let (read, held) = (number("io", "rchar:"), number("status", "VmHWM:"));
    for (n_before, n_workers) in [(0, 2), (n_rows / 2, 1), (n_rows - 4096, 2), (n_rows - 10, 2)] {
        let mut place = start.clone();
        let at = json!({ "at": n_before * row.len(), "lines": n_before, "layout": "lines" });
        place["sources"][0]["at"]["row"] = if n_before == 0 { start_of(&start) } else { at };
        let place: StreamPlace = serde_json::from_value(place).unwrap();
        let path = dir.path().join("window.bin");
        write_window(&options, &encoder(n_workers), &place, &path).unwrap();
        let on_disk = file_bytes(dir.path(), "window");
        assert!(on_disk <= window_disk_bytes(4096, 128), "{on_disk} bytes on disk");
        let window = StreamWindow::open(&path, &options).unwrap();
        assert_eq!(window.n_rows(), 4096.min(n_rows - n_before) as u64);
    }
    let read = number("io", "rchar:") - read;
    let held = number("status", "VmHWM:") - held;
    assert!(read < 24 << 20, "{read} bytes were read for four windows of a MiB or less");
    assert!(held < 4096, "the peak grew by {held} KiB");
}

fn start_of(place: &Value) -> Value {
    place["sources"][0]["at"]["row"].clone()
}

/// Bytes of the files in `dir` whose names begin so.
fn file_bytes(dir: &Path, prefix: &str) -> u64 {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.metadata().unwrap().len())
        .sum()
}

//! Tokenizers against goldens of the Python `tokenizers` and `transformers` (made by `data/make_goldens.py`).

#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use std::path::{Path, PathBuf};

use ounce_io::{
    ErrorKind, IdTable, Piece, PieceStart, Tokenizer, Words, read_json, tokenize_to_cache,
    tokenizer_fingerprint, train_bpe, train_char,
};
use serde_json::{Value, json};

const LIBRARY_TOKENIZERS: [&str; 5] =
    ["stories260k", "bpe512", "gpt2-like", "llama3-like", "metaspace-like"];

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn shakespeare() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/tinyshakespeare.txt")
}

fn golden(name: &str) -> Value {
    read_json(&data("goldens.json"), 1 << 20).unwrap()[name].take()
}

fn ids_of(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// As `checksum` of `make_goldens.py`.
fn checksum(ids: &[u32]) -> u64 {
    let add = |total: u128, (i, &id): (usize, &u32)| {
        (total + (i as u128 + 1) * (u128::from(id) + 1)) % ((1 << 61) - 1)
    };
    ids.iter().enumerate().fold(0, add) as u64
}

/// The text that `make_goldens.py` works on, in a file of its own.
fn golden_text() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.txt");
    std::fs::write(&path, &std::fs::read(shakespeare()).unwrap()[..300_000]).unwrap();
    (dir, path)
}

/// All ids of a text file by way of a token cache.
fn cached_ids(path: &Path, tokenizer: &Tokenizer) -> Vec<u32> {
    let dir = tempfile::tempdir().unwrap();
    let cache =
        tokenize_to_cache(&[path.into()], tokenizer, &dir.path().join("ids.bin"), 2).unwrap();
    let mut ids = vec![0; cache.n_tokens() as usize];
    cache.read(0, &mut ids).unwrap();
    ids.into_iter().map(|id| id as u32).collect()
}

#[test]
fn ids_and_text_are_those_of_the_python_library() {
    for name in LIBRARY_TOKENIZERS {
        let tokenizer = Tokenizer::load(&data(name)).unwrap();
        let table = IdTable::new(&tokenizer).unwrap();
        let cases = golden(name)["cases"].take();
        assert!(cases.as_array().unwrap().len() > 10);
        for case in cases.as_array().unwrap() {
            let (text, ids) = (case["text"].as_str().unwrap(), ids_of(&case["ids"]));
            assert_eq!(tokenizer.encode(text).unwrap(), ids, "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), case["decoded"], "{name}: {text:?}");
            assert_eq!(table.decode(&ids), case["decoded"], "{name}: {text:?}, by the table");
        }
    }
}

#[test]
fn a_file_tokenized_in_pieces_gives_the_ids_of_the_whole() {
    // metaspace-like is not among them: its vocabulary merges across line feeds, for which nothing is promised.
    let (_dir, path) = golden_text();
    for name in ["stories260k", "bpe512", "gpt2-like", "llama3-like"] {
        let ids = cached_ids(&path, &Tokenizer::load(&data(name)).unwrap());
        let expected = &golden(name)["tinyshakespeare"];
        assert_eq!(ids.len(), expected["n_tokens"], "{name}");
        assert_eq!(checksum(&ids), expected["checksum"], "{name}");
    }
}

#[test]
fn text_without_line_feeds_gives_the_ids_of_the_whole_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("one-line.txt");
    let text = std::fs::read_to_string(shakespeare()).unwrap()[..80_000].replace('\n', " ");
    std::fs::write(&path, &text).unwrap();
    for name in LIBRARY_TOKENIZERS {
        let tokenizer = Tokenizer::load(&data(name)).unwrap();
        assert_eq!(cached_ids(&path, &tokenizer), tokenizer.encode(&text).unwrap(), "{name}");
    }
}

#[test]
fn special_ids_come_from_the_configuration() {
    let stories = Tokenizer::load(&data("stories260k")).unwrap();
    assert_eq!((stories.bos_id(), stories.eos_id()), (Some(1), Some(2)));
    assert_eq!(stories.stop_ids(), [1, 2]);
    assert!(stories.adds_bos());
    let expected = golden("stories260k");
    let prompt = expected["prompt"].as_str().unwrap();
    assert_eq!(stories.encode_prompt(prompt).unwrap(), ids_of(&expected["prompt_ids"]));

    let bare = Tokenizer::load(&data("bpe512/tokenizer.json")).unwrap();
    assert_eq!((bare.bos_id(), bare.eos_id(), bare.adds_bos()), (Some(0), Some(0), false));
    assert_eq!(bare.encode_prompt("a").unwrap(), bare.encode("a").unwrap());
}

#[test]
fn a_models_default_ids_are_not_taken_for_special_tokens() {
    // Ids 1 and 2 are ordinary characters to this tokenizer, whatever the family's defaults say.
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(data("bpe512/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let config = r#"{"bos_token_id": 1, "eos_token_id": [2, 0]}"#;
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(0), Some(0)));
    assert_eq!(tokenizer.stop_ids(), [0]);

    train_char(&[shakespeare()]).unwrap().save(dir.path()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (None, None));
}

#[test]
fn tiny_shakespeare_has_65_characters_that_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let trained = train_char(&[shakespeare()]).unwrap();
    assert_eq!(trained.n_tokens(), 65);
    trained.save(dir.path()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 65);
    let text = std::fs::read_to_string(shakespeare()).unwrap();
    let ids = tokenizer.encode(&text).unwrap();
    assert_eq!(ids.len(), 1_115_394);
    assert_eq!(&ids[..5], [18, 47, 56, 57, 58], "`First`, in code point order");
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    assert_eq!(IdTable::new(&tokenizer).unwrap().decode(&ids), text);
    assert_eq!(cached_ids(&shakespeare(), &tokenizer), ids);
    // The library, given the same file, agrees: this is what other programs will see.
    let library = tokenizers::Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
    let start = &text[..2000];
    assert_eq!(library.encode(start, true).unwrap().get_ids(), &ids[..2000]);
    assert_eq!(library.decode(&ids[..2000], false).unwrap(), start);
}

#[test]
fn character_tokenizers_round_trip_every_script() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.jsonl");
    let text = "tab\tquote\" back\\slash \u{1}\u{7f}é漢字🙂\u{200d}e\u{301}\r\n";
    std::fs::write(&path, serde_json::json!({ "text": text }).to_string()).unwrap();
    train_char(&[path]).unwrap().save(dir.path()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!(ids.len(), text.chars().count());
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    let library = tokenizers::Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
    assert_eq!(library.encode(text, false).unwrap().get_ids(), ids);
    assert_eq!(library.decode(&ids, true).unwrap(), text);
}

#[test]
fn an_unknown_character_is_named_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let (known, other) = (dir.path().join("known.txt"), dir.path().join("other.txt"));
    std::fs::write(&known, "abc \n").unwrap();
    std::fs::write(&other, "abc\nab é c\n").unwrap();
    train_char(&[known]).unwrap().save(dir.path()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let error = tokenizer.encode("aé").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadInput);
    assert!(error.to_string().contains("`é` (U+00E9) is not among the tokenizer's 5 characters"));
    let error = tokenize_to_cache(&[other], &tokenizer, &dir.path().join("ids"), 2).unwrap_err();
    assert!(error.to_string().contains("other.txt:2: character `é`"), "{error}");
    assert!(!dir.path().join("ids").exists());
}

#[test]
fn bpe_training_gives_the_vocabulary_of_the_python_library() {
    let (dir, path) = golden_text();
    let trained = train_bpe(&[path], 512).unwrap();
    assert_eq!(trained.n_tokens(), 512);
    trained.save(dir.path()).unwrap();
    let ours = Tokenizer::load(dir.path()).unwrap();
    let theirs = Tokenizer::load(&data("bpe512")).unwrap();
    for id in 0..512 {
        assert_eq!(ours.token_bytes(id).unwrap(), theirs.token_bytes(id).unwrap(), "token {id}");
    }
    assert_eq!(ours.eos_id(), Some(0));
    for case in golden("bpe512")["cases"].as_array().unwrap() {
        assert_eq!(ours.encode(case["text"].as_str().unwrap()).unwrap(), ids_of(&case["ids"]));
    }
}

#[test]
fn bpe_training_stops_where_the_text_has_nothing_more_to_merge() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("short.txt");
    std::fs::write(&path, "abab abab").unwrap();
    let trained = train_bpe(std::slice::from_ref(&path), 1000).unwrap();
    assert!((258..300).contains(&trained.n_tokens()), "{}", trained.n_tokens());
    assert_eq!(train_bpe(&[path], 256).unwrap_err().kind(), ErrorKind::Usage);
}

#[test]
fn tokenizers_cannot_be_made_from_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("empty.txt");
    std::fs::write(&path, "").unwrap();
    for error in [
        train_char(std::slice::from_ref(&path)).unwrap_err(),
        train_bpe(std::slice::from_ref(&path), 300).unwrap_err(),
    ] {
        assert!(error.to_string().contains("empty.txt: no text to make a tokenizer from"));
    }
    std::fs::write(&path, b"ab\n\xff").unwrap();
    assert!(train_bpe(&[path], 300).unwrap_err().to_string().contains("empty.txt:2: is not UTF-8"));
}

#[test]
fn the_fingerprint_is_known_without_loading_and_follows_the_files() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(data("bpe512/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let before = tokenizer_fingerprint(dir.path()).unwrap();
    assert_eq!(before, Tokenizer::load(dir.path()).unwrap().fingerprint());
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": "a"}"#).unwrap();
    assert_ne!(before, tokenizer_fingerprint(dir.path()).unwrap());
}

#[test]
fn broken_tokenizers_are_errors_that_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("holds neither tokenizer.json nor vocab.json"), "{error}");
    std::fs::write(dir.path().join("tokenizer.model"), "x").unwrap();
    let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("SentencePiece"), "{error}");

    let path = dir.path().join("tokenizer.json");
    let whole = std::fs::read(data("stories260k/tokenizer.json")).unwrap();
    for n in (0..whole.len()).step_by(97) {
        std::fs::write(&path, &whole[..n]).unwrap();
        let error = Tokenizer::load(dir.path()).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json: not a tokenizer"), "{error}");
        assert_eq!(error.kind(), ErrorKind::BadInput);
    }
    std::fs::write(dir.path().join("vocab.json"), "{\"a\": 0}").unwrap();
    std::fs::write(dir.path().join("merges.txt"), "a b\n").unwrap();
    std::fs::remove_file(&path).unwrap();
    let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("vocab.json: not a vocabulary that goes with"), "{error}");
    let error = Tokenizer::load(&dir.path().join("nowhere")).unwrap_err().to_string();
    assert!(error.contains("nowhere does not exist"), "{error}");
}

#[test]
fn what_fuzzing_found_in_tokenizers_stays_mended() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let whole = std::fs::read_to_string(data("stories260k/tokenizer.json")).unwrap();

    // One number in the file would have been the size of a table.
    let id = whole.find("\"</s>\":2,").unwrap() + "\"</s>\":".len();
    std::fs::write(&path, format!("{}4294967295{}", &whole[..id], &whole[id + 1..])).unwrap();
    let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: has the id 4294967295, but at most"), "{error}");

    // The library looks this name up without asking whether it is there.
    let key = "\"special_tokens\":{\"<s>\"";
    assert!(whole.contains(key));
    std::fs::write(&path, whole.replace(key, "\"special_tokens\":{\"<x>\"")).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.decode(&tokenizer.encode("a day").unwrap()).unwrap(), "a day");

    // The library has room for the longest token only, which this merge exceeds.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(dir.path().join("vocab.json"), r#"{"a": 0, "b": 1, "ab": 2}"#).unwrap();
    std::fs::write(dir.path().join("merges.txt"), "#version: 0.2\na b\nab a\n").unwrap();
    let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("vocab.json: not a vocabulary that goes with"), "{error}");
}

#[test]
fn a_normalizer_that_multiplies_text_without_bound_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let mut json = read_json(&data("llama3-like/tokenizer.json"), 1 << 20).unwrap();
    let plain = Tokenizer::load(&data("llama3-like")).unwrap();
    // The letter a, 16 times a, in `n` steps.
    let steps = |n: usize| {
        let step =
            json!({"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(16)});
        vec![step; n]
    };
    for (n, accepted) in [(3, true), (4, false), (60, false)] {
        json["normalizer"] = json!({"type": "Sequence", "normalizers": steps(n)});
        std::fs::write(&path, json.to_string()).unwrap();
        match Tokenizer::load(dir.path()) {
            Ok(tokenizer) => {
                assert!(accepted, "{n} steps");
                assert_eq!(
                    tokenizer.encode("a").unwrap(),
                    plain.encode(&"a".repeat(4096)).unwrap()
                );
            }
            Err(error) => {
                let message = error.to_string();
                let what =
                    "tokenizer.json: not a tokenizer that can be read: its normalizer may make";
                assert!(!accepted && message.contains(what), "{message}");
            }
        }
    }
}

#[test]
fn tokens_that_are_added_beside_a_vocabulary_have_their_ids() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("vocab.json", r#"{"a": 0, "b": 1, "ab": 2}"#);
    write("merges.txt", "#version: 0.2\na b\n");
    write("added_tokens.json", r#"{"<end>": 4, "<user>": 3}"#);
    write("special_tokens_map.json", r#"{"eos_token": "<end>"}"#);
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.encode("<user>ab<end>").unwrap(), [3, 2, 4]);
    assert_eq!((tokenizer.vocab_size(), tokenizer.eos_id()), (5, Some(4)));
    let before = tokenizer.fingerprint();
    write("added_tokens.json", r#"{"<end>": 3, "<user>": 4}"#);
    assert_ne!(Tokenizer::load(dir.path()).unwrap().fingerprint(), before);
    write("added_tokens.json", r#"{"<end>": 7}"#);
    let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("gives `<end>` the id 7, where it is 3"), "{error}");
}

#[test]
fn limits_in_a_tokenizer_file_do_not_cut_the_text() {
    let dir = tempfile::tempdir().unwrap();
    let mut json = read_json(&data("bpe512/tokenizer.json"), 1 << 20).unwrap();
    json["truncation"] = serde_json::json!({
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    });
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    let text = "the quick brown fox jumps over the lazy dog";
    let cut = Tokenizer::load(dir.path()).unwrap().encode(text).unwrap();
    assert_eq!(cut, Tokenizer::load(&data("bpe512")).unwrap().encode(text).unwrap());
}

#[test]
fn ids_outside_the_vocabulary_are_refused() {
    let tokenizer = Tokenizer::load(&data("bpe512")).unwrap();
    let error = tokenizer.decode(&[1, 512]).unwrap_err();
    assert!(error.to_string().contains("id 512 is outside the tokenizer's 512 tokens"), "{error}");
}

#[test]
fn a_continuation_keeps_the_space_that_a_whole_text_loses() {
    let tokenizer = Tokenizer::load(&data("stories260k")).unwrap();
    let table = IdTable::new(&tokenizer).unwrap();
    let ids = tokenizer.encode("little girl").unwrap();
    let mut texts = [String::new(), String::new()];
    for (text, at_start) in texts.iter_mut().zip([true, false]) {
        let mut stream = table.stream(at_start);
        for &id in &ids {
            stream.push(id, text);
        }
        stream.finish(text);
    }
    assert_eq!(texts, ["little girl", " little girl"]);
}

#[test]
fn ids_and_places_are_those_of_the_library_however_often_a_word_was_seen() {
    let parts = [
        "the",
        " the",
        " The",
        "it's",
        "I'LL",
        " 2024",
        "  ",
        "\n\n",
        "\t",
        "...",
        "caf\u{e9}",
        "\u{6f22}\u{5b57}",
        "e\u{301}",
        "\u{1f642}",
        "\u{a0}",
        "<|endoftext|>",
        "<s>",
        " <0x0A>",
        "__",
        " never",
        "again ",
    ];
    for name in ["stories260k", "bpe512", "llama3-like", "metaspace-like"] {
        let tokenizer = Tokenizer::load(&data(name)).unwrap();
        let json = data(name).join("tokenizer.json");
        let library = tokenizers::Tokenizer::from_file(json).unwrap();
        let mut words = Words::default();
        arbtest::arbtest(|u| {
            let mut text = String::new();
            for _ in 0..u.int_in_range(0..=30)? {
                text.push_str(u.choose(&parts)?);
            }
            let expected = library.encode(text.as_str(), false).unwrap();
            let (mut ids, mut places) = (Vec::new(), Vec::new());
            let take = |id, place: std::ops::Range<usize>| {
                ids.push(id);
                places.push((place.start, place.end));
            };
            tokenizer.encode_with_places(&text, &mut words, take).unwrap();
            assert_eq!(ids, expected.get_ids(), "{name}: {text:?}");
            assert_eq!(places, expected.get_offsets(), "{name}: {text:?}");
            assert_eq!(tokenizer.encode(&text).unwrap(), ids, "{name}: {text:?}");
            let start = PieceStart::Row { joined: false };
            let piece = Piece { text: &text, start, path: Path::new("text"), line: 1 };
            ids.clear();
            tokenizer.encode_piece(&piece, &mut words, &mut ids).unwrap();
            assert_eq!(ids, expected.get_ids(), "{name}: {text:?}");
            Ok(())
        })
        .budget_ms(300);
    }
}

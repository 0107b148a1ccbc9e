//! Token cache, sampler and evaluation blocks together, on small files.

#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ounce_io::{
    BlockSampler, ErrorKind, EvalBlocks, TokenCache, Tokenizer, cache_path, tokenize_to_cache,
    tokenizer_fingerprint, train_char,
};

fn bpe() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/bpe512")
}

/// A directory with `text.txt` of `n` digits, a character tokenizer for it, and its cache: id = digit.
fn digits(n: usize) -> (tempfile::TempDir, TokenCache) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.txt");
    let text: String = (0..n).map(|i| char::from(b'0' + (i * 7 % 10) as u8)).collect();
    fs::write(&path, text).unwrap();
    let alphabet = dir.path().join("alphabet.txt");
    fs::write(&alphabet, "0123456789").unwrap();
    train_char(&[alphabet]).unwrap().save(dir.path()).unwrap();
    let cache = TokenCache::open_or_build(dir.path(), &[path], dir.path()).unwrap();
    (dir, cache)
}

fn all_ids(cache: &TokenCache) -> Vec<i32> {
    let mut ids = vec![0; cache.n_tokens() as usize];
    cache.read(0, &mut ids).unwrap();
    ids
}

#[test]
fn every_range_of_a_cache_reads_right() {
    let (_dir, cache) = digits(20_000);
    let digit = |i: usize| (i * 7 % 10) as i32;
    assert_eq!(cache.n_tokens(), 20_000);
    assert_eq!(cache.max_id(), 9);
    for (start, n) in [(0, 20_000), (19_999, 1), (20_000, 0), (4095, 4098), (1, 3)] {
        let mut ids = vec![0; n];
        cache.read(start as u64, &mut ids).unwrap();
        assert!(ids.iter().enumerate().all(|(i, &id)| id == digit(start + i)), "{start}, {n}");
    }
}

#[test]
fn vocabularies_over_65536_are_stored_in_four_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.txt");
    // The tokenizer's own 512 tokens and one more, far above.
    let json = fs::read_to_string(bpe().join("tokenizer.json")).unwrap();
    let json = json.replace(
        r#""added_tokens":["#,
        r#""added_tokens":[{"id":512,"content":"<big>","single_word":false,"lstrip":false,
            "rstrip":false,"normalized":false,"special":true},"#,
    );
    let json = json.replace(r#""vocab":{"#, r#""vocab":{"<big>":70000,"#);
    let json = json.replace(r#"{"id":512,"#, r#"{"id":70000,"#);
    fs::write(dir.path().join("tokenizer.json"), json).unwrap();
    fs::write(&path, "a<big>b").unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 70_001);
    let cache = TokenCache::open_or_build(dir.path(), &[path], dir.path()).unwrap();
    assert_eq!(all_ids(&cache), [65, 70_000, 66]);
    assert_eq!(cache.max_id(), 70_000);
}

#[test]
fn rows_are_joined_by_the_end_of_text_token() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, plain) = (dir.path().join("rows.jsonl"), dir.path().join("plain.txt"));
    fs::write(&rows, "{\"text\":\"a\"}\n{\"text\":\"\"}\n\n{\"text\":\"b\"}\n").unwrap();
    fs::write(&plain, "a").unwrap();
    let build = |files: &[PathBuf], tokenizer: &Path| {
        all_ids(&TokenCache::open_or_build(dir.path(), files, tokenizer).unwrap())
    };
    let eot = 0;
    let (a, b) = (65, 66);
    assert_eq!(build(std::slice::from_ref(&rows), &bpe()), [a, eot, eot, b]);
    assert_eq!(build(&[rows.clone(), plain.clone()], &bpe()), [a, eot, eot, b, eot, a]);
    assert_eq!(build(&[plain.clone(), plain.clone()], &bpe()), [a, a]);
    // A character tokenizer has no such token: rows follow each other directly.
    train_char(std::slice::from_ref(&rows)).unwrap().save(dir.path()).unwrap();
    assert_eq!(build(&[rows], dir.path()), [0, 1]);
}

#[test]
fn a_cache_is_fresh_until_text_or_tokenizer_change() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.txt");
    let files = [path.clone()];
    fs::write(&path, "one text").unwrap();
    let fingerprint = tokenizer_fingerprint(&bpe()).unwrap();
    let cache = cache_path(dir.path(), &files, fingerprint).unwrap();
    let is_fresh =
        |fingerprint| TokenCache::open_fresh(&cache, &files, fingerprint).unwrap().is_some();
    assert!(!is_fresh(fingerprint), "there is none yet");
    let tokenizer = Tokenizer::load(&bpe()).unwrap();
    tokenize_to_cache(&files, &tokenizer, &cache, 2).unwrap();
    assert!(is_fresh(fingerprint));
    assert!(!is_fresh(fingerprint + 1), "another tokenizer");

    // Touched, not changed: the content decides.
    let touch = |seconds| {
        let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
    };
    touch(1_000_000_000);
    assert!(is_fresh(fingerprint));
    fs::write(&path, "two text").unwrap();
    touch(1_000_000_001);
    assert!(!is_fresh(fingerprint), "same length, other content");
    fs::write(&path, "one text, longer").unwrap();
    assert!(!is_fresh(fingerprint));
    let rebuilt = TokenCache::open_or_build(dir.path(), &files, &bpe()).unwrap();
    assert_eq!(rebuilt.path(), cache);
    let ids: Vec<u32> = all_ids(&rebuilt).iter().map(|&id| id as u32).collect();
    assert_eq!(tokenizer.decode(&ids).unwrap(), "one text, longer");
}

#[test]
fn every_truncation_and_every_flipped_bit_of_a_cache_is_noticed() {
    let (dir, cache) = digits(40);
    let whole = fs::read(cache.path()).unwrap();
    let path = dir.path().join("damaged.bin");
    fs::write(&path, &whole).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    let refused = || {
        let error = TokenCache::open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadInput);
        assert!(error.to_string().contains("damaged.bin: "), "{error}");
    };
    for (at, byte) in whole.iter().enumerate() {
        for bit in 0..8 {
            file.write_all_at(&[byte ^ (1 << bit)], at as u64).unwrap();
            refused();
        }
        file.write_all_at(&[*byte], at as u64).unwrap();
    }
    TokenCache::open(&path).unwrap();
    for n in (0..whole.len()).rev() {
        file.set_len(n as u64).unwrap();
        refused();
    }
    fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
    refused();
}

#[test]
fn a_damaged_cache_is_made_again() {
    let (dir, cache) = digits(100);
    let (path, ids) = (cache.path().to_path_buf(), all_ids(&cache));
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let again =
        TokenCache::open_or_build(dir.path(), &[dir.path().join("text.txt")], dir.path()).unwrap();
    assert_eq!(all_ids(&again), ids);
}

#[test]
fn every_epoch_trains_on_every_block_once() {
    let (_dir, cache) = digits(103);
    let sampler = BlockSampler::new(cache, 10, 5).unwrap();
    assert_eq!(sampler.n_blocks(), 10, "the last three ids are for evaluation");
    let rows = 4;
    let mut orders = Vec::new();
    for epoch in 0..3u64 {
        let number = |i: u64| epoch * 10 + i;
        let order: Vec<u64> = (0..10)
            .map(|i| sampler.block(number(i) / rows, rows as usize, (number(i) % rows) as usize))
            .collect();
        assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), 10);
        orders.push(order);
    }
    assert_ne!(orders[0], orders[1]);
    assert_eq!(sampler.n_steps(1.0, 4), 3);
    assert_eq!(sampler.n_steps(2.0, 4), 5);
}

#[test]
fn the_rows_of_a_step_do_not_depend_on_its_cut() {
    let (_dir, cache) = digits(5_000);
    let max_length = 16;
    let sampler = BlockSampler::new(cache, max_length, 11).unwrap();
    arbtest::arbtest(|u| {
        let step = u.int_in_range(0..=10_000u64)?;
        let rows_per_step = u.int_in_range(1..=24usize)?;
        let mut whole = vec![0; rows_per_step * max_length];
        sampler.fill_rows(step, rows_per_step, &mut whole).unwrap();
        let micro = u.int_in_range(1..=rows_per_step)?;
        let mut cut = Vec::new();
        for start in (0..rows_per_step).step_by(micro) {
            let rows = start..(start + micro).min(rows_per_step);
            let mut part = vec![0; rows.len() * max_length];
            sampler.fill_row_range(step, rows_per_step, rows, &mut part).unwrap();
            cut.extend(part);
        }
        assert_eq!(whole, cut);
        // 12 x 1 and 3 x 4: row b of 12 in step s is the same sequence as row b of any cut of the 12.
        for (row, ids) in whole.chunks(max_length).enumerate() {
            let mut block = vec![0; max_length];
            let at = sampler.block(step, rows_per_step, row) * max_length as u64;
            sampler.cache().read(at, &mut block).unwrap();
            assert_eq!(ids, block);
        }
        Ok(())
    })
    .budget_ms(500);
}

#[test]
fn evaluation_covers_everything_in_order() {
    let blocks = |n| {
        let (_dir, cache) = digits(n);
        let blocks = EvalBlocks::new(&cache, 10).unwrap();
        (blocks.n_predictions(), blocks.collect::<Vec<_>>())
    };
    assert_eq!(blocks(23), (20, vec![(0, 10), (10, 10), (20, 3)]));
    assert_eq!(blocks(20), (18, vec![(0, 10), (10, 10)]));
    assert_eq!(blocks(21), (18, vec![(0, 10), (10, 10)]), "one id alone predicts nothing");
    assert_eq!(blocks(2), (1, vec![(0, 2)]));
}

#[test]
fn too_little_data_is_an_error_with_the_numbers() {
    let (_dir, cache) = digits(9);
    assert_eq!(EvalBlocks::new(&cache, 1).unwrap_err().kind(), ErrorKind::Usage);
    let error = BlockSampler::new(cache, 10, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadInput);
    let message = error.to_string();
    assert!(
        message.contains("text.txt holds 9 tokens, fewer than the 10 of one block"),
        "{message}"
    );
    assert!(message.contains("hint: give more text, or `--max-length` of at most 9"), "{message}");
    let (_dir, cache) = digits(1);
    assert!(EvalBlocks::new(&cache, 10).unwrap_err().to_string().contains("holds 1 tokens"));
}

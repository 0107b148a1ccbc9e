//! The fuzz bodies, each for half a second, and truncations of all valid files, under an allocator that counts.

#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use std::sync::{Mutex, PoisonError};

use ounce_io::testing::{FuzzCase, Target};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// One case at a time, so that the bytes counted are its own.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The libraries for tokenizers, Parquet and templates report malformed files by panics, which are caught and need not be printed.
fn hide_panics_of_the_library() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let is_of_a_library = |file: &str| {
            ["/tokenizers-", "/parquet-", "/minijinja-"].iter().any(|name| file.contains(name))
        };
        if !info.location().is_some_and(|place| is_of_a_library(place.file())) {
            print(info);
        }
    }));
}

fn fuzz(target: Target) {
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    hide_panics_of_the_library();
    let dir = tempfile::tempdir().unwrap();
    let case = FuzzCase::new(target, dir.path()).unwrap();
    arbtest::arbtest(|u| {
        let bytes = case.damage(u.bytes(u.len())?);
        let before_bytes = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        case.try_file(&bytes);
        let grown_bytes = ALLOCATOR.peak_usage() - before_bytes;
        let n_bytes = bytes.len();
        let is_bounded = grown_bytes <= target.bound_bytes(n_bytes);
        assert!(is_bounded, "{grown_bytes} bytes for a file of {n_bytes} bytes");
        Ok(())
    })
    .budget_ms(500);
    drop(guard);
}

#[test]
fn damaged_safetensors_files_are_errors_or_usable() {
    fuzz(Target::Safetensors);
}

#[test]
fn damaged_shard_indices_are_errors_or_usable() {
    fuzz(Target::Index);
}

#[test]
fn damaged_gguf_files_are_errors_or_usable() {
    fuzz(Target::Gguf);
}

#[test]
fn damaged_configurations_are_errors_or_usable() {
    fuzz(Target::Config);
}

#[test]
fn damaged_tokenizers_are_errors_or_usable() {
    fuzz(Target::Tokenizer);
}

#[test]
fn damaged_vocabularies_and_merges_are_errors_or_usable() {
    fuzz(Target::VocabMerges);
}

#[test]
fn damaged_texts_are_errors_or_usable() {
    fuzz(Target::Text);
}

#[test]
fn damaged_rows_are_errors_or_usable() {
    fuzz(Target::Rows);
}

#[test]
fn damaged_arrays_of_rows_are_errors_or_usable() {
    fuzz(Target::Array);
}

#[test]
fn damaged_parquet_files_are_errors_or_usable() {
    fuzz(Target::Parquet);
}

#[test]
fn damaged_chat_templates_are_errors_or_usable() {
    fuzz(Target::Template);
}

#[test]
fn damaged_token_caches_are_errors_or_usable() {
    fuzz(Target::TokenCache);
}

#[test]
fn damaged_manifests_are_errors_or_usable() {
    fuzz(Target::Manifest);
}

#[test]
fn damaged_trainer_states_are_errors_or_usable() {
    fuzz(Target::State);
}

#[test]
fn a_truncation_of_any_file_at_any_place_is_an_error_or_usable() {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    hide_panics_of_the_library();
    for target in Target::ALL {
        let dir = tempfile::tempdir().unwrap();
        let case = FuzzCase::new(target, dir.path()).unwrap();
        for valid in case.valid() {
            assert!(case.try_file(valid), "{target:?}: the whole file is accepted");
            // Lines may end anywhere; everything else is a whole or nothing.
            let has_parts = matches!(
                target,
                Target::Text | Target::Rows | Target::VocabMerges | Target::Template
            );
            for n in (0..valid.len()).step_by(valid.len() / 80 + 1) {
                let is_accepted = case.try_file(&valid[..n]);
                let is_blank_end = valid[n..].trim_ascii().is_empty();
                assert!(!is_accepted || has_parts || is_blank_end, "{target:?} cut at {n}");
            }
        }
    }
}

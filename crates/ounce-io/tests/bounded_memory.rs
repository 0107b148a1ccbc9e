//! The peak of the process while data many times larger goes through. One test, so that the process is its own.

#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use std::fs;
use std::io::Write;

use ounce_io::checkpoint::{CheckpointWriter, newest_valid};
use ounce_io::testing::SmallRun;
use ounce_io::{
    BlockSampler, Dtype, SafetensorsDir, SafetensorsWriter, TensorSpec, TokenCache, train_char,
};

/// Peak resident memory so far, in KiB.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn data_and_checkpoints_of_100_mib_pass_through_less_than_2_mib_of_memory() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.txt");
    let mut file = fs::File::create(&text).unwrap();
    for _ in 0..(8 << 20) / 32 {
        file.write_all(b"All the world is but a stage, I\n").unwrap();
    }
    let before_kib = peak_kib();

    train_char(std::slice::from_ref(&text)).unwrap().save(dir.path()).unwrap();
    let files = [text];
    let cache = TokenCache::open_or_build(dir.path(), &files, dir.path()).unwrap();
    assert_eq!(cache.n_tokens(), 8 << 20);
    let cache =
        TokenCache::open_or_build(dir.path(), &files, cache.path().parent().unwrap()).unwrap();
    let sampler = BlockSampler::new(cache, 64, 1).unwrap();
    let mut ids_bt = [0; 12 * 64];
    for step in 0..1000 {
        sampler.fill_rows(step, 12, &mut ids_bt).unwrap();
    }

    let spec = TensorSpec { name: "w".into(), dtype: Dtype::Bf16, shape: vec![4096, 1024] };
    let mut writer =
        SafetensorsWriter::create(&dir.path().join("model.safetensors"), &[spec], &[]).unwrap();
    let mut row = [0.5; 1024];
    for _ in 0..4096 {
        writer.append_f32("w", &row).unwrap();
    }
    writer.finish().unwrap();
    let weights = SafetensorsDir::open(dir.path()).unwrap();
    for i in 0..4096 {
        weights.read_f32_at("w", i * 1024, &mut row).unwrap();
    }

    let shape = vec![8192, 1024];
    let spec = TensorSpec { name: "w".into(), dtype: Dtype::F32, shape };
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let mut save = CheckpointWriter::begin(&dir.path().join("out"), 1, 64 << 20).unwrap();
    save.copy_side_files(dir.path()).unwrap();
    for part in ["weights", "optimizer"] {
        let specs = std::slice::from_ref(&spec);
        let begin = if part == "weights" { save.weights(specs) } else { save.optimizer(specs) };
        let mut writer = begin.unwrap();
        for _ in 0..8192 {
            writer.append_f32("w", &row).unwrap();
        }
        writer.finish().unwrap();
    }
    save.publish(&SmallRun::new(dir.path()).unwrap().state(1)).unwrap();
    let newest = newest_valid(&dir.path().join("out")).unwrap();
    newest.checkpoint.unwrap().weights().read_f32_at("w", 8191 * 1024, &mut row).unwrap();

    let grown_kib = peak_kib() - before_kib;
    assert!(grown_kib < 2048, "the peak grew by {grown_kib} KiB");
}

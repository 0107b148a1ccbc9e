//! Writing against a limit of the operating system: the old files stay, nothing is left behind.
//!
//! Method: the test runs itself again under `ulimit -f` with the signal for it ignored, so that every write beyond
//! the limit fails in the kernel as it does on a full disk.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "test helpers panic like the tests that call them"
)]

use std::fs;
use std::path::Path;
use std::process::Command;

use ounce_io::{
    Dtype, ErrorKind, IoError, SafetensorsWriter, StagingDir, TensorSpec, tokenize_to_cache,
    train_char, write_file,
};

const DIR_VARIABLE: &str = "OUNCE_IO_LIMITED_DIR";

#[test]
fn a_full_disk_leaves_the_old_files_and_nothing_else() {
    if let Some(dir) = std::env::var_os(DIR_VARIABLE) {
        return write_beyond_the_limit(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("text.txt"), "abcd".repeat(100_000)).unwrap();
    fs::write(dir.path().join("model.safetensors"), "old").unwrap();
    fs::write(dir.path().join("small.json"), "old").unwrap();
    // 64 blocks of 512 or 1024 bytes, as the shell has it.
    let script = r#"ulimit -f 64 && trap '' XFSZ && exec "$0" --exact "$1" --nocapture"#;
    let output = Command::new("sh")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .arg("a_full_disk_leaves_the_old_files_and_nothing_else")
        .env(DIR_VARIABLE, dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("four writes failed"), "the limited half ran: {said}");
    let mut names: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    let expected =
        ["model.safetensors", "small.json", "text.txt", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(names, expected);
    assert_eq!(fs::read(dir.path().join("model.safetensors")).unwrap(), b"old");
    assert_eq!(fs::read(dir.path().join("small.json")).unwrap(), b"old");
}

fn write_beyond_the_limit(dir: &Path) {
    let check = |error: &IoError, name: &str| {
        assert_eq!(error.kind(), ErrorKind::WriteFailed);
        let message = error.to_string();
        assert!(message.contains(&format!("cannot write {}", dir.join(name).display())));
        assert!(message.contains("bytes): ") && message.contains("\nhint: "), "{message}");
    };
    check(&write_file(&dir.join("small.json"), &vec![b' '; 1 << 20]).unwrap_err(), "small.json");

    let spec = TensorSpec { name: "w".into(), dtype: Dtype::F32, shape: vec![1 << 18] };
    let mut writer =
        SafetensorsWriter::create(&dir.join("model.safetensors"), &[spec], &[]).unwrap();
    check(&writer.write_tensor_f32("w", &vec![1.0; 1 << 18]).unwrap_err(), "model.safetensors");
    drop(writer);

    let text = dir.join("text.txt");
    train_char(std::slice::from_ref(&text)).unwrap().save(dir).unwrap();
    let tokenizer = ounce_io::Tokenizer::load(dir).unwrap();
    check(&tokenize_to_cache(&[text], &tokenizer, &dir.join("ids.bin"), 2).unwrap_err(), "ids.bin");

    let staging = StagingDir::create(&dir.join("out")).unwrap();
    let inside = staging.path().join("model.safetensors");
    assert!(write_file(&inside, &vec![0; 1 << 20]).is_err());
    drop(staging);
    println!("four writes failed");
}

//! Safetensors from the outside: files of the Python library, damaged files, hostile directories.

#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use ounce_io::{
    Dtype, ErrorKind, IoError, SafetensorsDir, SafetensorsWriter, TensorSpec, write_json,
};
use serde_json::json;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.into(), dtype, shape: shape.into() }
}

/// A file of `header` (unpadded) and `n` data bytes.
fn raw(header: &str, n: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..n).map(|i| i as u8));
    bytes
}

fn open_bytes(bytes: &[u8]) -> Result<SafetensorsDir, IoError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    fs::write(&path, bytes).unwrap();
    SafetensorsDir::open(&path)
}

fn fault(bytes: &[u8]) -> String {
    let error = open_bytes(bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadInput);
    let message = error.to_string();
    assert!(message.contains("x.safetensors: ") && message.contains("\nhint: "), "{message}");
    message
}

/// Writes one f32 tensor per name, all of shape (2,), filled with `value`.
fn write_shard(path: &Path, names: &[&str], value: f32) {
    let specs: Vec<TensorSpec> = names.iter().map(|n| spec(n, Dtype::F32, &[2])).collect();
    let mut writer = SafetensorsWriter::create(path, &specs, &[]).unwrap();
    for name in names {
        writer.write_tensor_f32(name, &[value; 2]).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn a_file_of_the_python_library_reads_value_by_value() {
    let file = SafetensorsDir::open(&fixture("python.safetensors")).unwrap();
    let expected: Vec<f32> = (0..6).map(|i| i as f32 / 3.0 - 0.5).collect();
    for (name, tolerance) in [("f32", 1e-7), ("f16", 5e-4), ("bf16", 4e-3)] {
        assert_eq!(file.get(name).unwrap().shape, [2, 3]);
        let mut values = [0.0; 6];
        file.read_f32(name, &mut values).unwrap();
        for (value, expected) in values.iter().zip(&expected) {
            assert!((value - expected).abs() <= tolerance, "{name}: {value} for {expected}");
        }
    }
    let mut part = [0.0; 2];
    file.read_f32_at("f32", 3, &mut part).unwrap();
    assert!((part[0] - expected[3]).abs() < 1e-7 && (part[1] - expected[4]).abs() < 1e-7);
    let mut scalar = [0.0];
    file.read_f32("scalar", &mut scalar).unwrap();
    assert_eq!(scalar, [2.5]);
    file.read_f32("empty", &mut []).unwrap();
    assert_eq!(file.get("empty").unwrap().shape, [0, 4]);
    let mut second = [0; 8];
    file.read_exact_bytes("i64", 8, &mut second).unwrap();
    assert_eq!(i64::from_le_bytes(second), 1 << 40);
    assert_eq!(file.metadata()["note"], "made by Python");
    assert_eq!(file.tensors().len(), 6);
    assert!(file.tensors().is_sorted_by_key(|t| t.offset));
}

#[test]
fn what_is_written_reads_back_in_every_float_type() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    // Longer than the conversion buffer; multiples of 1/4 below 256 survive all three types.
    let values: Vec<f32> = (0..9001).map(|i| (i % 64) as f32 * 0.25 - 4.0).collect();
    let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16];
    let mut specs = vec![spec("none", Dtype::F32, &[0])];
    specs.extend(dtypes.iter().map(|&d| spec(&format!("odd \"{}\"\n", d.name()), d, &[9001])));
    specs.push(spec("raw", Dtype::U8, &[3]));
    let mut writer = SafetensorsWriter::create(&path, &specs, &[("k", "v\"\\")]).unwrap();
    writer.write_tensor_f32("none", &[]).unwrap();
    for spec in &specs[1..4] {
        let (head, tail) = values.split_at(777);
        writer.append_f32(&spec.name, head).unwrap();
        writer.append_f32(&spec.name, tail).unwrap();
    }
    writer.append_bytes("raw", &[1, 2, 3]).unwrap();
    assert!(!path.exists(), "nothing appears before it is complete");
    writer.finish().unwrap();

    let file = SafetensorsDir::open(dir.path()).unwrap();
    for spec in &specs[1..4] {
        let mut back = vec![0.0; 9001];
        file.read_f32(&spec.name, &mut back).unwrap();
        assert_eq!(back, values, "{}", spec.name);
    }
    assert_eq!(file.metadata()["format"], "pt");
    assert_eq!(file.metadata()["k"], "v\"\\");
    let bytes = fs::read(&path).unwrap();
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(header_bytes.is_multiple_of(8), "the data is aligned");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn an_unfinished_writer_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    fs::write(&path, "old").unwrap();
    let mut writer = SafetensorsWriter::create(&path, &[spec("a", Dtype::F32, &[2])], &[]).unwrap();
    writer.append_f32("a", &[1.0]).unwrap();
    drop(writer);
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn names_that_no_reader_could_tell_apart_are_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let a = spec("a", Dtype::F32, &[1]);
    for specs in [vec![a.clone(), a], vec![spec("__metadata__", Dtype::F32, &[1])]] {
        let error = SafetensorsWriter::create(&path, &specs, &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
#[should_panic(expected = "tensors are written in declared order")]
fn tensors_out_of_order_are_our_bug() {
    let dir = tempfile::tempdir().unwrap();
    let specs = [spec("a", Dtype::F32, &[1]), spec("b", Dtype::F32, &[1])];
    let path = dir.path().join("x.safetensors");
    let mut writer = SafetensorsWriter::create(&path, &specs, &[]).unwrap();
    let _ = writer.write_tensor_f32("b", &[1.0]);
}

#[test]
fn every_truncation_is_refused() {
    let whole = fs::read(fixture("python.safetensors")).unwrap();
    assert!(open_bytes(&whole).is_ok());
    fault(&[&whole[..], b"\0"].concat());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    fs::write(&path, &whole).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    for n in (0..whole.len()).rev() {
        file.set_len(n as u64).unwrap();
        let error = SafetensorsDir::open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadInput, "{n} bytes: {error}");
    }
}

#[test]
fn flipped_bits_give_an_error_or_a_consistent_file_but_never_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let whole = fs::read(fixture("python.safetensors")).unwrap();
    let header_end = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    fs::write(&path, &whole).unwrap();
    let damaged = fs::File::options().write(true).open(&path).unwrap();
    for at in 0..header_end {
        for bit in 0..=8 {
            // The ninth round puts the byte right again.
            let byte = whole[at] ^ (1u16 << bit) as u8;
            damaged.write_all_at(&[byte], at as u64).unwrap();
            let Ok(file) = SafetensorsDir::open(&path) else { continue };
            for t in file.tensors() {
                assert_eq!(t.shape.iter().product::<usize>(), t.n_elems());
                assert!(t.offset + t.bytes <= whole.len() as u64);
                let mut data = vec![0; t.bytes as usize];
                file.read_exact_bytes(&t.name, 0, &mut data).unwrap();
            }
        }
    }
}

#[test]
fn random_bytes_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let words = [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"a\"",
        "\"dtype\"",
        "\"F32\"",
        "\"shape\"",
        "\"data_offsets\"",
        "0",
        "4",
        "8",
        "1e3",
        "-1",
        "18446744073709551615",
        "\"__metadata__\"",
        "null",
        " ",
    ];
    arbtest::arbtest(|u| {
        let mut header = String::from("{");
        while !u.is_empty() && header.len() < 300 {
            header.push_str(u.choose(&words)?);
        }
        fs::write(&path, raw(&header, u.int_in_range(0..=16)?)).unwrap();
        let _ = SafetensorsDir::open(&path);
        Ok(())
    })
    .budget_ms(500);
}

#[test]
fn impossible_headers_are_refused_before_anything_is_allocated() {
    let mut bytes = raw("{}", 0);
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(fault(&bytes).contains("claims 18446744073709551615 bytes, of a file of 10 bytes"));
    bytes[..8].copy_from_slice(&3u64.to_le_bytes());
    assert!(fault(&bytes).contains("claims 3 bytes"));
    // A sparse file whose size alone would allow the header.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let file = fs::File::create(&path).unwrap();
    file.set_len(200_000_000).unwrap();
    file.write_all_at(&100_000_001u64.to_le_bytes(), 0).unwrap();
    assert!(
        SafetensorsDir::open(&path).unwrap_err().to_string().contains("at most 100000000 bytes")
    );
}

#[test]
fn shapes_of_more_dims_than_any_tensor_has_are_refused() {
    let header = |n: usize| {
        let ones = vec!["1"; n].join(",");
        format!(r#"{{"a":{{"dtype":"F32","shape":[{ones}],"data_offsets":[0,4]}}}}"#)
    };
    assert!(open_bytes(&raw(&header(8), 4)).is_ok());
    assert!(fault(&raw(&header(9), 4)).contains("at most 8 sizes"));
}

#[test]
fn headers_that_lie_about_their_tensors_are_refused() {
    let one = |dtype: &str, shape: &str, offsets: &str, n: usize| {
        let header =
            format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
        raw(&header, n)
    };
    assert!(open_bytes(&one("F32", "[2]", "[0,8]", 8)).is_ok());
    assert!(open_bytes(&one("F32", "[]", "[0,4]", 4)).is_ok());
    let cases = [
        (one("F32", "[2]", "[0,4]", 8), "tensor `t`: data_offsets 0..4 do not hold the 8 bytes"),
        (one("F32", "[2]", "[8,0]", 8), "data_offsets 8..0 do not hold"),
        (one("F32", "[2]", "[0,8]", 4), "ends at byte 8 of only 4 bytes"),
        (one("F32", "[2]", "[0,8]", 12), "4 bytes after the last tensor"),
        (one("F32", "[2]", "[4,12]", 12), "starts at byte 4 and leaves a hole"),
        (one("F32", "[4294967296,4294967296]", "[0,8]", 8), "overflows"),
        (one("F32", "[18446744073709551615,2]", "[0,8]", 8), "overflows"),
        (one("F32", "[-1]", "[0,8]", 8), "invalid value: integer `-1`"),
        (one("F32", "[2.0]", "[0,8]", 8), "bad header"),
        (one("F31", "[2]", "[0,8]", 8), "unknown variant `F31`"),
        (one("F32", "[2]", "[0,8,9]", 8), "bad header"),
        (raw("[]", 0), "does not start with `{`"),
        (raw("", 0), "does not start with `{`"),
        (raw("{} x", 0), "trailing characters"),
        (raw(r#"{"t":{"dtype":"F32","shape":[1]}}"#, 4), "missing field `data_offsets`"),
        (raw(r#"{"__metadata__":{"a":1}}"#, 0), "bad header"),
        (raw(r#"{"__metadata__":{"a":"1","a":"2"}}"#, 0), "key `a` appears twice"),
        (raw(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), "`__metadata__` appears twice"),
        (raw("{\"\\ud800\":{}}", 0), "bad header"),
    ];
    for (bytes, expected) in cases {
        let message = fault(&bytes);
        assert!(message.contains(expected), "{message}\nshould contain: {expected}");
    }
    let mut not_utf8 = one("F32", "[2]", "[0,8]", 8);
    not_utf8[10] = 0xff;
    assert!(fault(&not_utf8).contains("bad header"));
}

#[test]
fn overlaps_holes_and_duplicates_between_tensors_are_refused() {
    let two = |a: (&str, u32, u32), b: (&str, u32, u32), n: usize| {
        let entry = |(name, start, end): (&str, u32, u32)| {
            let len = end - start;
            format!(r#""{name}":{{"dtype":"U8","shape":[{len}],"data_offsets":[{start},{end}]}}"#)
        };
        raw(&format!("{{{},{}}}", entry(a), entry(b)), n)
    };
    assert!(open_bytes(&two(("b", 4, 8), ("a", 0, 4), 8)).is_ok(), "any order in the header");
    assert!(open_bytes(&two(("a", 0, 0), ("b", 0, 4), 4)).is_ok(), "empty tensors take no place");
    assert!(
        fault(&two(("a", 0, 4), ("b", 2, 6), 6)).contains("`b`: starts at byte 2 and overlaps")
    );
    assert!(
        fault(&two(("a", 0, 4), ("b", 0, 4), 4)).contains("`b`: starts at byte 0 and overlaps")
    );
    assert!(
        fault(&two(("a", 0, 2), ("b", 4, 6), 6)).contains("`b`: starts at byte 4 and leaves a")
    );
    assert!(fault(&two(("a", 0, 4), ("a", 4, 8), 8)).contains("`a`: appears twice"));
    let key_twice = r#"{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}"#;
    assert!(fault(&raw(key_twice, 1)).contains("duplicate field `dtype`"));
}

#[test]
fn requests_that_do_not_fit_the_tensor_are_refused() {
    let file = SafetensorsDir::open(&fixture("python.safetensors")).unwrap();
    let fault = |result: Result<(), IoError>| result.unwrap_err().to_string();
    let message = fault(file.read_f32("nope", &mut [0.0]));
    assert!(message.contains("tensor `nope`: is missing among 6 tensors"), "{message}");
    let message = fault(file.read_f32("f32", &mut [0.0; 5]));
    assert!(message.contains("has 6 elements (shape [2, 3]), but 5 are needed"), "{message}");
    assert!(fault(file.read_f32_at("f32", 5, &mut [0.0; 2])).contains("do not lie within its 6"));
    assert!(fault(file.read_f32_at("f32", usize::MAX, &mut [0.0])).contains("do not lie within"));
    assert!(fault(file.read_f32("i64", &mut [0.0; 2])).contains("has type I64"));
    assert!(
        fault(file.read_exact_bytes("i64", 9, &mut [0; 8])).contains("do not lie within its 16")
    );
}

#[test]
fn shards_are_read_through_their_index() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write_shard(&at("model-00001-of-00002.safetensors"), &["a", "b"], 1.0);
    write_shard(&at("model-00002-of-00002.safetensors"), &["c", "unlisted"], 2.0);
    let index = |map: serde_json::Value| {
        let index = json!({"metadata": {"total_size": 24}, "weight_map": map});
        write_json(&at("model.safetensors.index.json"), &index).unwrap();
        SafetensorsDir::open(dir.path())
    };
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let model = index(json!({"a": one, "b": one, "c": two})).unwrap();
    let mut values = [0.0; 2];
    model.read_f32("c", &mut values).unwrap();
    assert_eq!(values, [2.0; 2]);
    assert!(model.get("unlisted").is_none());
    assert_eq!(model.tensors().len(), 3);
    assert!(model.file_path(model.get("c").unwrap().file).ends_with(two));

    let fault = |map| index(map).unwrap_err().to_string();
    let message = fault(json!({"a": one, "c": one}));
    assert!(message.contains("index.json: tensor `c`: is not in its shard"), "{message}");
    assert!(fault(json!({"a": "model-00003-of-00003.safetensors"})).contains("does not exist"));
    assert!(fault(json!({"a": 1})).contains("is not a string"));
    assert!(fault(json!({})).contains("`weight_map` is empty"));
    assert!(fault(json!([])).contains("no object `weight_map`"));
    let hostile = [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "",
        "a\\b.safetensors",
        "passwd",
        ".hidden.safetensors",
        "a\0.safetensors",
        "model-00001-of-00002.bin",
    ];
    for name in hostile {
        let message = fault(json!({ "a": name }));
        assert!(message.contains("not a plain .safetensors file name"), "{name}: {message}");
    }
}

#[test]
fn links_out_of_the_directory_are_refused_and_the_caches_own_layout_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let (model, outside) = (dir.path().join("model"), dir.path().join("outside.safetensors"));
    fs::create_dir(&model).unwrap();
    write_shard(&outside, &["a"], 1.0);
    symlink(&outside, model.join("model.safetensors")).unwrap();
    let message = SafetensorsDir::open(&model).unwrap_err().to_string();
    assert!(message.contains("is a link out of the model directory"), "{message}");

    let repo = dir.path().join("models--x--y");
    let snapshot = repo.join("snapshots/abc");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir(repo.join("blobs")).unwrap();
    write_shard(&repo.join("blobs/0123"), &["a"], 1.0);
    symlink("../../blobs/0123", snapshot.join("model.safetensors")).unwrap();
    assert_eq!(SafetensorsDir::open(&snapshot).unwrap().tensors().len(), 1);
}

#[test]
fn directories_without_safetensors_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let message = SafetensorsDir::open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("holds neither model.safetensors nor"), "{message}");
    fs::write(dir.path().join("pytorch_model.bin"), "pickle").unwrap();
    let message = SafetensorsDir::open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("holds `pytorch_model.bin` but no model.safetensors"), "{message}");
    assert!(message.contains("hint: pickle files can run code"), "{message}");
    let missing = SafetensorsDir::open(&dir.path().join("nowhere")).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::BadInput);
}

//! GGUF out and in again: weights, configuration and tokenizer; headers that lie.

#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use std::fs;
use std::path::{Path, PathBuf};

use ounce_io::{
    ErrorKind, GGUF_FILE, GgmlType, Gguf, GgufExport, GgufModel, GgufValue, IoError, Tokenizer,
};
use serde_json::{Value, json};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// Names and shapes of a model, and its configuration.
type Model = (Value, Vec<(String, Vec<usize>)>);

fn llama(vocab_size: usize) -> Model {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "vocab_size": vocab_size, "hidden_act": "silu",
        "tie_word_embeddings": true, "rope_theta": 500_000.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        }
    });
    let layer =
        |name: &str, shape: &[usize]| (format!("model.layers.0.{name}.weight"), shape.to_vec());
    let tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab_size, 64]),
        layer("input_layernorm", &[64]),
        layer("self_attn.q_proj", &[64, 64]),
        layer("self_attn.k_proj", &[32, 64]),
        layer("self_attn.v_proj", &[32, 64]),
        layer("self_attn.o_proj", &[64, 64]),
        layer("post_attention_layernorm", &[64]),
        layer("mlp.gate_proj", &[96, 64]),
        layer("mlp.up_proj", &[96, 64]),
        layer("mlp.down_proj", &[64, 96]),
        ("model.norm.weight".to_owned(), vec![64]),
    ];
    (config, tensors)
}

fn gpt2() -> Model {
    let config = json!({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 40, "n_inner": null,
        "n_layer": 1, "n_head": 2, "n_positions": 64, "layer_norm_epsilon": 1e-5,
        "vocab_size": 600, "activation_function": "gelu_new",
    });
    let mut tensors = vec![
        ("transformer.wte.weight".to_owned(), vec![600, 40]),
        ("transformer.wpe.weight".to_owned(), vec![64, 40]),
    ];
    for (name, shape) in [
        ("attn.c_attn.weight", vec![40, 120]),
        ("attn.c_attn.bias", vec![120]),
        ("mlp.c_fc.weight", vec![40, 160]),
        ("mlp.c_proj.weight", vec![160, 40]),
    ] {
        tensors.push((format!("transformer.h.0.{name}"), shape));
    }
    (config, tensors)
}

/// Element `at` of tensor `i`: small numbers that every type but Q8_0 holds exactly.
fn element(i: usize, at: usize) -> f32 {
    ((at * 31 + i * 7 + at / 64) % 251) as f32 / 4.0 - 30.0
}

fn write(dir: &Path, tokenizer: &Path, model: &Model, dtype: GgmlType) -> Result<(), IoError> {
    let (config, tensors) = model;
    GgufExport { name: dir, config, tokenizer, tensors, dtype }.write(dir, |i, start, dst| {
        for (at, x) in dst.iter_mut().enumerate() {
            *x = element(i, start + at);
        }
        Ok(())
    })
}

#[test]
fn weights_come_back_as_they_were_and_lie_in_the_file_as_llama_cpp_has_them() {
    for (model, dtype, tolerance) in [
        (llama(512), GgmlType::F32, 0.0),
        (llama(512), GgmlType::F16, 0.0),
        (llama(512), GgmlType::Bf16, 0.25),
        (llama(512), GgmlType::Q8_0, 0.2),
        (gpt2(), GgmlType::F16, 0.0),
        (gpt2(), GgmlType::Q8_0, 0.2),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = if model.0["model_type"] == "gpt2" { "gpt2-like" } else { "stories260k" };
        let tokenizer_dir = data(tokenizer);
        write(dir.path(), &tokenizer_dir, &model, dtype).unwrap();
        let read = GgufModel::open(&dir.path().join(GGUF_FILE)).unwrap();
        for (i, (name, shape)) in model.1.iter().enumerate() {
            assert_eq!(read.shape(name).as_ref(), Some(shape), "{name}");
            let n_elems: usize = shape.iter().product();
            let mut all = vec![f32::NAN; n_elems];
            read.read_f32_at(name, 0, &mut all).unwrap();
            for (at, x) in all.iter().enumerate() {
                let want = element(i, at);
                assert!(
                    (x - want).abs() <= tolerance,
                    "{name}[{at}] is {x}, not {want}, {dtype:?}"
                );
            }
            // Two rows from the middle are the same as part of the whole.
            let row = shape[1..].iter().product::<usize>();
            let mut part = vec![0.0; 2 * row];
            read.read_f32_at(name, 3 * row, &mut part).unwrap();
            assert_eq!(part, all[3 * row..5 * row], "{name}");
        }
        let names: Vec<String> = read.tensor_names().collect();
        assert_eq!(names, model.1.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>());
    }
    // Row 1 of a head of 16 rows is row 8 in Hugging Face's order.
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &data("stories260k"), &llama(512), GgmlType::F32).unwrap();
    let gguf = Gguf::open(&dir.path().join(GGUF_FILE)).unwrap();
    let (tensor, mut x) = (gguf.get("blk.0.attn_q.weight").unwrap(), [0.0]);
    gguf.read_f32_at(tensor, 64, &mut x).unwrap();
    assert_eq!(x[0], element(2, 8 * 64));
}

#[test]
fn the_configuration_comes_back() {
    for (model, tokenizer) in [(llama(512), "stories260k"), (gpt2(), "gpt2-like")] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &data(tokenizer), &model, GgmlType::F16).unwrap();
        let read = GgufModel::open(&dir.path().join(GGUF_FILE)).unwrap();
        for (key, value) in model.0.as_object().unwrap() {
            // Absent means four times as wide.
            let want = if key == "n_inner" { json!(160) } else { value.clone() };
            assert_eq!(read.config()[key], want, "{key}");
        }
        let modelfile = fs::read_to_string(dir.path().join("Modelfile")).unwrap();
        assert!(modelfile.starts_with("FROM ./model.gguf\nPARAMETER num_ctx "), "{modelfile}");
    }
}

#[test]
fn the_tokenizer_comes_back_with_the_same_ids() {
    let text = fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/tinyshakespeare.txt"),
    )
    .unwrap();
    let odd = "caf\u{e9} \u{1f600}\r\n  12345 don't <s> </s> \t x\u{301}\n\n";
    for name in ["stories260k", "bpe512", "gpt2-like", "llama3-like", "metaspace-like"] {
        let (dir, side) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let tokenizer = Tokenizer::load(&data(name)).unwrap();
        // A few rows more than there are tokens, as padded vocabularies have.
        let model = llama(tokenizer.vocab_size() + 3);
        write(dir.path(), &data(name), &model, GgmlType::F16).unwrap();
        let read = GgufModel::open(&dir.path().join(GGUF_FILE)).unwrap();
        read.write_side_files(side.path()).unwrap();
        let back = Tokenizer::load(side.path()).unwrap();
        for text in [&text[..20_000], odd] {
            assert_eq!(back.encode(text).unwrap(), tokenizer.encode(text).unwrap(), "{name}");
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(back.decode(&ids).unwrap(), tokenizer.decode(&ids).unwrap(), "{name}");
        }
        assert_eq!(back.bos_id(), tokenizer.bos_id(), "{name}");
        assert_eq!(back.stop_ids(), tokenizer.stop_ids(), "{name}");
        assert_eq!(back.adds_bos(), tokenizer.adds_bos(), "{name}");
        assert_eq!(back.encode_prompt("a").unwrap(), tokenizer.encode_prompt("a").unwrap());
    }
}

#[test]
fn numbers_that_do_not_fit_their_type_are_refused_and_leave_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let (config, tensors) = llama(512);
    let tokenizer = data("stories260k");
    let export = GgufExport {
        name: Path::new("big"),
        config: &config,
        tokenizer: &tokenizer,
        tensors: &tensors,
        dtype: GgmlType::F16,
    };
    let written = export.write(dir.path(), |_, _, dst| {
        dst.fill(1e6);
        Ok::<(), IoError>(())
    });
    let message = written.unwrap_err().to_string();
    assert!(message.contains("big: tensor `token_embd.weight`: holds 1000000"), "{message}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// A header of one key and one tensor, with `n_data` bytes of data.
struct Raw {
    n_tensors: u64,
    n_keys: u64,
    key_bytes: u64,
    array_len: u64,
    dims: Vec<u64>,
    dtype: u32,
    offset: u64,
    n_data: usize,
}

impl Default for Raw {
    fn default() -> Self {
        Self {
            n_tensors: 1,
            n_keys: 1,
            key_bytes: 1,
            array_len: 2,
            dims: vec![32, 2],
            dtype: 0,
            offset: 0,
            n_data: 256,
        }
    }
}

impl Raw {
    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(self.n_tensors.to_le_bytes());
        out.extend(self.n_keys.to_le_bytes());
        out.extend(self.key_bytes.to_le_bytes());
        out.push(b'k');
        // An array of u32.
        out.extend(9_u32.to_le_bytes());
        out.extend(4_u32.to_le_bytes());
        out.extend(self.array_len.to_le_bytes());
        out.extend([0; 8]);
        out.extend(1_u64.to_le_bytes());
        out.push(b't');
        out.extend((self.dims.len() as u32).to_le_bytes());
        self.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
        out.extend(self.dtype.to_le_bytes());
        out.extend(self.offset.to_le_bytes());
        out.resize(out.len().next_multiple_of(32) + self.n_data, 0);
        out
    }
}

/// Opens these bytes as a file.
fn open(bytes: &[u8]) -> Result<Gguf, IoError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.gguf");
    fs::write(&path, bytes).unwrap();
    Gguf::open(&path)
}

#[test]
fn a_plain_header_is_accepted() {
    let gguf = open(&Raw::default().bytes()).unwrap();
    assert_eq!(gguf.tensors()[0].shape, [2, 32]);
    assert!(matches!(gguf.values()["k"], GgufValue::Array(_)));
}

#[test]
fn counts_lengths_and_offsets_that_lie_are_errors() {
    let lie = |change: fn(&mut Raw)| {
        let mut raw = Raw::default();
        change(&mut raw);
        let error = open(&raw.bytes()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadInput, "{error}");
        error.to_string()
    };
    type Lie = (fn(&mut Raw), &'static str);
    let cases: [Lie; 14] = [
        (|r| r.n_tensors = u64::MAX, "claims 18446744073709551615 tensors"),
        (|r| r.n_keys = u64::MAX, "and 18446744073709551615 keys"),
        (|r| r.n_tensors = 900_000, "has 0 dims"),
        (|r| r.n_keys = 60_000, "x.gguf: "),
        (|r| r.key_bytes = u64::MAX, "claims 18446744073709551615 bytes"),
        (|r| r.key_bytes = 1000, "longer than the"),
        (|r| r.array_len = u64::MAX, "longer than the"),
        (|r| r.array_len = 1 << 62, "longer than the"),
        (|r| r.dims = vec![1 << 32, 1 << 32, 1 << 32], "cannot be held in blocks"),
        (|r| r.dims = vec![1 << 60], "takes"),
        (|r| r.dims = vec![64, 2], "takes 512 bytes from byte 0"),
        (|r| r.dims = Vec::new(), "has 0 dims"),
        (|r| r.offset = 32, "starts at byte 32 of the data, not at 0"),
        (|r| r.dtype = 10, "has ggml type 10, which is not read"),
    ];
    for (change, want) in cases {
        let message = lie(change);
        assert!(message.contains(want) && message.contains("\nhint: "), "{want}: {message}");
    }
    // 33 elements are no whole blocks of Q8_0.
    let odd = Raw { dims: vec![33, 2], dtype: 8, ..Raw::default() };
    assert!(open(&odd.bytes()).unwrap_err().to_string().contains("blocks of Q8_0"));
}

#[test]
fn other_versions_and_other_files_are_told_apart() {
    let with = |at: usize, byte: u8| {
        let mut bytes = Raw::default().bytes();
        bytes[at] = byte;
        open(&bytes).unwrap_err().to_string()
    };
    assert!(with(0, b'g').contains("does not start with `GGUF`"));
    assert!(with(4, 1).contains("version 1, which is not 2 or 3"));
    let mut big_endian = Raw::default().bytes();
    big_endian[4..8].copy_from_slice(&3_u32.to_be_bytes());
    assert!(open(&big_endian).unwrap_err().to_string().contains("big endian"));
}

#[test]
fn a_tokenizer_that_llama_cpp_reads_otherwise_is_not_written() {
    let (dir, model) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for name in ["stories260k", "bpe512"] {
        let mut json: Value =
            serde_json::from_slice(&fs::read(data(name).join("tokenizer.json")).unwrap()).unwrap();
        json["normalizer"] = json!({"type": "Lowercase"});
        fs::write(model.path().join("tokenizer.json"), json.to_string()).unwrap();
        let error = write(dir.path(), model.path(), &llama(512), GgmlType::F16).unwrap_err();
        assert!(error.to_string().contains("changes text by Lowercase first"), "{error}");
    }
}

#[test]
fn what_is_not_supported_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &data("stories260k"), &llama(512), GgmlType::F16).unwrap();
    let path = dir.path().join(GGUF_FILE);
    let bytes = fs::read(&path).unwrap();
    let with = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let mut changed = bytes.clone();
        let at = changed.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(&path, changed).unwrap();
        let used = GgufModel::open(&path).and_then(|model| model.write_side_files(dir.path()));
        used.unwrap_err().to_string()
    };
    // An architecture, a key that may change the mathematics, a kind of tokenizer.
    let arch = with(
        "general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
        "general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0grok1",
    );
    assert!(
        arch.contains("`general.architecture` is `grok1`; supported are llama, qwen2"),
        "{arch}"
    );
    let key = with("llama.attention.value_length", "llama.attention.value_scalex");
    assert!(key.contains("`llama.attention.value_scalex` is not supported"), "{key}");
    let layers = with("llama.block_count\x04\0\0\0\x01\0", "llama.block_count\x04\0\0\0\x01\x7f");
    assert!(
        layers.contains("`llama.block_count` is 32513, but the file has 12 tensors"),
        "{layers}"
    );
    let kind = with(
        "tokenizer.ggml.model\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
        "tokenizer.ggml.model\x08\0\0\0\x05\0\0\0\0\0\0\0plamo",
    );
    assert!(kind.contains("`tokenizer.ggml.model` is Some(\"plamo\")"), "{kind}");
}

/// The stretching of rotary positions in a file of a model with linear stretching, after its header was edited.
fn stretching(edits: &[(&str, &str)]) -> Result<Value, IoError> {
    let dir = tempfile::tempdir().unwrap();
    let (mut config, tensors) = llama(512);
    config["rope_scaling"] = json!({"rope_type": "linear", "factor": 2.0});
    write(dir.path(), &data("stories260k"), &(config, tensors), GgmlType::F16).unwrap();
    let path = dir.path().join(GGUF_FILE);
    let mut bytes = fs::read(&path).unwrap();
    for (from, to) in edits {
        let key = |name: &str| [&(name.len() as u64).to_le_bytes(), name.as_bytes()].concat();
        let (from, to) = (key(from), key(to));
        let at = bytes.windows(from.len()).position(|w| w == from).unwrap();
        bytes.splice(at..at + from.len(), to);
    }
    // A header of another length moves the tensors, which are not read here.
    bytes.extend([0; 64]);
    fs::write(&path, bytes).unwrap();
    Ok(GgufModel::open(&path)?.config()["rope_scaling"].clone())
}

#[test]
fn rotary_stretching_is_read_as_llama_cpp_reads_it() {
    let linear = json!({"rope_type": "linear", "factor": 2.0});
    assert_eq!(stretching(&[]).unwrap(), linear);
    // Without a type it is linear.
    let kind = "llama.rope.scaling.type";
    assert_eq!(stretching(&[(kind, "general.no_type")]).unwrap(), linear);
    assert_eq!(stretching(&[("linear", "none")]).unwrap(), Value::Null);
    let error = stretching(&[("linear", "longrope")]).unwrap_err().to_string();
    assert!(error.contains("`llama.rope.scaling.type` is `longrope`"), "{error}");
    let factor = ("llama.rope.scaling.factor", "llama.rope.scaling.attn_factor");
    let error = stretching(&[factor]).unwrap_err().to_string();
    assert!(error.contains("`llama.rope.scaling.attn_factor` is not 1"), "{error}");
}

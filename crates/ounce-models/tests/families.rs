//! Graphs of real and golden configurations: names, shapes, stages, refusals.
#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::{Path, PathBuf};

use ounce_ir::{Init, OpKind, Phase, ValueKind};
use ounce_models::{ModelConfig, ModelError, PRESETS, Purpose, build, build_for_length, preset};

fn golden_folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("config.json").exists())
        .collect();
    folders.sort();
    folders
}

fn config_of(folder: &Path) -> ModelConfig {
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    ModelConfig::from_json(&text).unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
}

/// Names and shapes in the header of a safetensors file.
fn tensors_of(file: &Path) -> Vec<(String, Vec<u64>)> {
    let bytes = std::fs::read(file).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let shape = |v: &serde_json::Value| {
        v["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap()).collect()
    };
    let mut tensors: Vec<(String, Vec<u64>)> = header
        .as_object()
        .unwrap()
        .iter()
        .filter(|(name, _)| *name != "__metadata__")
        .map(|(name, v)| (name.clone(), shape(v)))
        .collect();
    tensors.sort();
    tensors
}

#[test]
fn parameters_are_the_tensors_that_transformers_saves() {
    let folders = golden_folders();
    assert!(folders.len() >= 47, "{} golden folders", folders.len());
    for folder in folders {
        let config = config_of(&folder);
        for purpose in [Purpose::Loss, Purpose::Decode] {
            let graph = build(&config, purpose, 0.0).unwrap();
            let mut params: Vec<(String, Vec<u64>)> =
                graph.params.values().map(|p| (p.name.clone(), p.shape.dims.clone())).collect();
            params.sort();
            assert_eq!(
                params,
                tensors_of(&folder.join("model.safetensors")),
                "{}",
                folder.display()
            );
        }
    }
}

#[test]
fn a_written_config_reads_back_as_the_same_model() {
    for folder in golden_folders() {
        let config = config_of(&folder);
        let again = ModelConfig::from_json(&config.to_json()).unwrap();
        assert_eq!(again, config, "{}", folder.display());
    }
}

#[test]
fn presets_have_the_published_numbers_of_parameters() {
    let counts: Vec<u64> = PRESETS
        .iter()
        .map(|name| {
            let graph = build(&preset(name).unwrap(), Purpose::Loss, 0.0).unwrap();
            graph.n_params_elems()
        })
        .collect();
    let published = [
        124_439_808,
        134_515_008,
        494_032_768,
        1_100_048_384,
        596_049_920,
        2_614_341_888,
        268_098_176,
        3_821_079_552,
        3_075_098_624,
        1_484_916_736,
        7_241_732_096,
    ];
    assert_eq!(counts, published);
    assert_eq!(preset("gpt5"), None);
}

#[test]
fn a_model_is_a_chain_of_halves() {
    for name in ["gpt2", "smollm2-135m"] {
        let config = preset(name).unwrap();
        let graph = build(&config, Purpose::Loss, 0.0).unwrap();
        let layers = config.n_layers() as usize;
        assert_eq!(graph.stages.len(), 2 + 2 * layers);
        let kinds: Vec<&str> = graph.stages.values().map(|s| s.kind.as_str()).collect();
        assert_eq!(kinds[..3], ["embed", "attn", "mlp"]);
        assert_eq!(kinds[2 * layers + 1], "head");
        let names: Vec<&str> = graph.stages.values().map(|s| s.name.as_str()).collect();
        assert_eq!(names[1..4], ["attn.0", "mlp.0", "attn.1"]);
        let mut before = None;
        for stage in graph.stages.values() {
            assert_eq!(stage.input, before, "{}", stage.name);
            before = stage.output;
        }
        assert_eq!(before, None, "the last stage ends in the loss");
        assert!(graph.find_value(ValueKind::Loss).is_some());
        assert!(graph.ops.values().all(|op| op.phase == Phase::Forward));
    }
}

#[test]
fn decoding_ends_in_the_logits_of_selected_rows() {
    for name in ["gpt2", "tinyllama-1.1b"] {
        let config = preset(name).unwrap();
        let graph = build(&config, Purpose::Decode, 0.0).unwrap();
        let logits = &graph.values[graph.find_value(ValueKind::Result).unwrap()];
        assert_eq!(logits.shape, ounce_ir::Shape::selected(&[config.vocab_size()]));
        assert!(graph.find_value(ValueKind::Loss).is_none());
    }
}

#[test]
fn norms_and_biases_are_not_decayed_and_start_at_one_and_zero() {
    let text = r#"{"model_type": "llama", "hidden_size": 12, "num_attention_heads": 2,
        "intermediate_size": 20, "num_hidden_layers": 1, "attention_bias": true, "mlp_bias": true}"#;
    for config in [preset("gpt2").unwrap(), ModelConfig::from_json(text).unwrap()] {
        let graph = build(&config, Purpose::Loss, 0.0).unwrap();
        for p in graph.params.values() {
            let is_vector = p.shape.dims.len() == 1;
            assert_eq!(p.decay, !is_vector, "{}", p.name);
            let want = match (is_vector, p.name.contains(".bias")) {
                (true, true) => Init::Zeros,
                (true, false) => Init::Ones,
                (false, _) if p.name.ends_with("c_proj.weight") => {
                    Init::Normal((0.02 / 24f64.sqrt()) as f32)
                }
                (false, _) => Init::Normal(0.02),
            };
            assert_eq!(p.init, want, "{}", p.name);
        }
    }
}

#[test]
fn dropout_sits_after_the_embedding_and_after_each_half() {
    let graph = build(&preset("gpt2").unwrap(), Purpose::Loss, 0.1).unwrap();
    let sites: Vec<u32> = graph
        .ops
        .values()
        .filter_map(|op| match op.kind {
            OpKind::Dropout { p, site } => {
                assert_eq!(p, 0.1);
                Some(site.0)
            }
            _ => None,
        })
        .collect();
    assert_eq!(sites, (0..25).collect::<Vec<_>>());
    assert_eq!(graph.n_random_sites, 25);
    let llama = preset("smollm2-135m").unwrap();
    assert!(matches!(build(&llama, Purpose::Loss, 0.1), Err(ModelError::Dropout { .. })));
    let gpt2 = preset("gpt2").unwrap();
    assert!(matches!(build(&gpt2, Purpose::Loss, 1.0), Err(ModelError::Dropout { .. })));
}

#[test]
fn learned_positions_bound_the_length_and_rotary_ones_do_not() {
    let gpt2 = preset("gpt2").unwrap();
    assert!(build_for_length(&gpt2, Purpose::Loss, 0.0, 1024).is_ok());
    let e = build_for_length(&gpt2, Purpose::Loss, 0.0, 1025).unwrap_err();
    assert_eq!(e, ModelError::TooLong { max_length: 1025, max_positions: 1024 });
    let llama = preset("tinyllama-1.1b").unwrap();
    assert!(build_for_length(&llama, Purpose::Loss, 0.0, 4096).is_ok());
}

#[test]
fn keys_that_change_the_mathematics_are_refused_by_name() {
    let gpt2 = |extra: &str| {
        let text = format!(r#"{{"model_type": "gpt2", {extra}}}"#);
        ModelConfig::from_json(&text).map_err(|e| e.to_string())
    };
    let llama = |extra: &str| {
        let text = format!(
            r#"{{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2,
                "intermediate_size": 8, "num_hidden_layers": 1, {extra}}}"#
        );
        ModelConfig::from_json(&text).map_err(|e| e.to_string())
    };
    for (result, key) in [
        (gpt2(r#""scale_attn_by_inverse_layer_idx": true"#), "scale_attn_by_inverse_layer_idx"),
        (gpt2(r#""add_cross_attention": true"#), "add_cross_attention"),
        (gpt2(r#""activation_function": "relu""#), "activation_function"),
        (gpt2(r#""n_head": 5"#), "n_head 5"),
        (gpt2(r#""n_embd": "wide""#), "n_embd"),
        (gpt2(r#""vocab_size": 0"#), "vocab_size"),
        (gpt2(r#""quantization_config": {"bits": 4}"#), "quantization_config"),
        (llama(r#""hidden_act": "gelu""#), "hidden_act"),
        (llama(r#""sliding_window": 64"#), "sliding_window"),
        (llama(r#""num_key_value_heads": 3"#), "num_key_value_heads 3"),
        (llama(r#""head_dim": 5"#), "head_dim 5"),
        (llama(r#""rope_interleaved": true"#), "rope_interleaved"),
        (llama(r#""attn_logit_softcapping": 30.0"#), "attn_logit_softcapping"),
        (llama(r#""num_hidden_layers": 2.5"#), "num_hidden_layers"),
    ] {
        let message = result.expect_err(key);
        assert!(message.contains(key) && message.contains("\nhint: "), "{key}: {message}");
    }
    let harmless = r#""pretraining_tp": 2, "_name_or_path": "x", "sliding_window": null,
        "attention_dropout": 0.1, "eos_token_id": [1, 2], "rope_interleaved": false"#;
    let config = llama(harmless).unwrap();
    assert_eq!(config.special_tokens().eos, [1, 2]);
    let missing = ModelConfig::from_json(r#"{"model_type": "llama"}"#).unwrap_err();
    assert!(missing.to_string().contains("lacks \"hidden_size\""), "{missing}");
}

/// A tiny model of that type with one more key.
fn with_key(model_type: &str, extra: &str) -> Result<ModelConfig, ModelError> {
    ModelConfig::from_json(&format!(
        r#"{{"model_type": "{model_type}", "hidden_size": 8, "num_attention_heads": 2,
            "num_key_value_heads": 1, "intermediate_size": 8, "num_hidden_layers": 2,
            "head_dim": 4{extra}}}"#
    ))
}

#[test]
fn every_family_refuses_what_it_does_not_have_by_name() {
    for (model_type, key, value) in [
        ("llama", "num_local_experts", "8"),
        ("llama", "partial_rotary_factor", "0.5"),
        ("mistral", "layer_types", r#"["full_attention", "sliding_attention"]"#),
        ("mistral", "attention_bias", "true"),
        ("mistral", "sliding_window", "0"),
        ("qwen2", "num_experts", "60"),
        ("qwen2", "layer_types", r#"["chunked_attention", "full_attention"]"#),
        ("qwen2", "layer_types", r#"["sliding_attention", "full_attention"]"#),
        ("qwen2", "layer_types", r#"["full_attention"]"#),
        ("qwen3", "mlp_bias", "true"),
        ("qwen3", "decoder_sparse_step", "1"),
        ("qwen3", "hidden_act", r#""gelu""#),
        ("gemma2", "use_bidirectional_attention", "true"),
        ("gemma2", "hidden_activation", r#""gelu""#),
        ("gemma2", "query_pre_attn_scalar", "-1"),
        ("gemma2", "final_logit_softcapping", "-3.0"),
        ("gemma3_text", "attn_logit_softcapping", "50.0"),
        ("gemma3_text", "vision_config", "{}"),
        ("phi3", "mlp_bias", "true"),
        ("phi3", "rope_scaling", r#"{"type": "linear", "factor": 2.0}"#),
        ("phi3", "partial_rotary_factor", "0.3"),
        ("phi3", "embd_layer", r#""x""#),
        ("smollm3", "no_rope_layers", "[1]"),
        ("olmo2", "clip_qkv", "8.0"),
        ("olmo2", "quantization_config", r#"{"bits": 4}"#),
    ] {
        let error = with_key(model_type, &format!(r#", "{key}": {value}"#));
        let message = error.expect_err(key).to_string();
        let named = match key {
            "rope_scaling" => "rope_type",
            "partial_rotary_factor" if model_type == "phi3" => "head_dim 4",
            "final_logit_softcapping" => "soft cap of -3",
            _ => key,
        };
        assert!(message.contains(named) && message.contains("\nhint: "), "{key}: {message}");
        assert!(with_key(model_type, "").is_ok(), "{model_type}");
    }
}

/// Which layers have a window, and which turn by position, as `transformers` derives them.
#[test]
fn kinds_of_layers_follow_from_each_familys_own_keys() {
    let layers = |model_type: &str, extra: &str| {
        let text = format!(r#", "num_hidden_layers": 7{extra}"#);
        let ModelConfig::Decoder(c) = with_key(model_type, &text).unwrap() else {
            panic!("not GPT-2")
        };
        let mark = |layer: &ounce_models::Layer| match (layer.windowed, layer.rotary) {
            (false, true) => 'g',
            (true, true) => 'w',
            (false, false) => 'n',
            (true, false) => 'm',
        };
        (c.layers.iter().map(mark).collect::<String>(), c.window)
    };
    let of = |kinds: &str, window| (kinds.to_owned(), window);
    assert_eq!(layers("mistral", ""), of("wwwwwww", Some(4096)));
    assert_eq!(layers("mistral", r#", "sliding_window": null"#), of("ggggggg", None));
    assert_eq!(layers("qwen2", r#", "sliding_window": 8"#), of("ggggggg", None));
    let windows = r#", "use_sliding_window": true, "sliding_window": 8, "max_window_layers": 5"#;
    assert_eq!(layers("qwen3", windows), of("gggggww", Some(8)));
    assert_eq!(layers("gemma2", ""), of("wgwgwgw", Some(4096)));
    assert_eq!(layers("gemma3_text", ""), of("wwwwwgw", Some(4096)));
    assert_eq!(
        layers("gemma3_text", r#", "sliding_window_pattern": 3"#),
        of("wwgwwgw", Some(4096))
    );
    assert_eq!(layers("smollm3", ""), of("gggnggg", None));
    let windows = r#", "use_sliding_window": true, "sliding_window": 8"#;
    assert_eq!(layers("smollm3", windows), of("gggmggg", Some(8)));
    assert_eq!(layers("phi3", r#", "sliding_window": 9"#), of("wwwwwww", Some(9)));
    assert_eq!(layers("olmo2", ""), of("ggggggg", None));
}

/// A window that no row outgrows changes nothing, so its layers are of one type with the others.
#[test]
fn windows_are_dropped_where_no_row_is_longer() {
    let config = with_key("mistral", r#", "sliding_window": 32"#).unwrap();
    let windows = |max_length| {
        let graph = build_for_length(&config, Purpose::Loss, 0.0, max_length).unwrap();
        let window = |op: &ounce_ir::Op| match op.kind {
            OpKind::Attention(spec) => Some(spec.window),
            _ => None,
        };
        graph.ops.values().filter_map(window).collect::<Vec<_>>()
    };
    assert_eq!(windows(32), [None, None]);
    assert_eq!(windows(33), [Some(32), Some(32)]);
}

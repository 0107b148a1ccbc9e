//! Published sizes, for measurements with random weights and to check that every family has as many
//! parameters as its models. The first four are those of `bench/peer_torch.py`, so that both can be
//! put side by side.

use serde_json::{Value, json};

use crate::config::ModelConfig;

/// The names that [`preset()`] knows.
pub const PRESETS: [&str; 11] = [
    "gpt2",
    "smollm2-135m",
    "qwen2.5-0.5b",
    "tinyllama-1.1b",
    "qwen3-0.6b",
    "gemma-2-2b",
    "gemma-3-270m",
    "phi-3-mini",
    "smollm3-3b",
    "olmo-2-1b",
    "mistral-7b",
];

/// Layers, channels, width of the MLP, heads, key and value heads, vocabulary, positions.
type Sizes = [u64; 7];

/// The configuration of that published size.
pub fn preset(name: &str) -> Option<ModelConfig> {
    let with = |model_type: &str, sizes: Sizes, more: Value| {
        let [layers, hidden, mlp, heads, kv_heads, vocab, positions] = sizes;
        let mut config = json!({
            "model_type": model_type, "num_hidden_layers": layers, "hidden_size": hidden,
            "intermediate_size": mlp, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "vocab_size": vocab,
            "max_position_embeddings": positions,
        });
        let (Value::Object(config_keys), Value::Object(more)) = (&mut config, more) else {
            unreachable!("both are objects")
        };
        config_keys.extend(more);
        config
    };
    let config = match name {
        "gpt2" => json!({"model_type": "gpt2"}),
        "smollm2-135m" => with(
            "llama",
            [30, 576, 1536, 9, 3, 49152, 8192],
            json!({"rms_norm_eps": 1e-5, "tie_word_embeddings": true}),
        ),
        "qwen2.5-0.5b" => with(
            "qwen2",
            [24, 896, 4864, 14, 2, 151_936, 32768],
            json!({"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": true}),
        ),
        "tinyllama-1.1b" => {
            with("llama", [22, 2048, 5632, 32, 4, 32000, 2048], json!({"rms_norm_eps": 1e-5}))
        }
        "qwen3-0.6b" => with(
            "qwen3",
            [28, 1024, 3072, 16, 8, 151_936, 40960],
            json!({"rope_theta": 1e6, "tie_word_embeddings": true}),
        ),
        "gemma-2-2b" => with("gemma2", [26, 2304, 9216, 8, 4, 256_000, 8192], json!({})),
        "gemma-3-270m" => with(
            "gemma3_text",
            [18, 640, 2048, 4, 1, 262_144, 32768],
            json!({"sliding_window": 512}),
        ),
        "phi-3-mini" => {
            with("phi3", [32, 3072, 8192, 32, 32, 32064, 4096], json!({"sliding_window": 2047}))
        }
        "smollm3-3b" => {
            with("smollm3", [36, 2048, 11008, 16, 4, 128_256, 65536], json!({"rope_theta": 5e6}))
        }
        "olmo-2-1b" => with(
            "olmo2",
            [16, 2048, 8192, 16, 16, 100_352, 4096],
            json!({"rms_norm_eps": 1e-6, "rope_theta": 5e5}),
        ),
        "mistral-7b" => {
            with("mistral", [32, 4096, 14336, 32, 8, 32000, 32768], json!({"rms_norm_eps": 1e-5}))
        }
        _ => return None,
    };
    Some(ModelConfig::from_json(&config.to_string()).expect("a preset is a valid configuration"))
}

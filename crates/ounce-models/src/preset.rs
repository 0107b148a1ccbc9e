//! Published sizes, for measurements with random weights. The shapes are those of
//! `bench/peer_torch.py`, so that both can be put side by side.

use crate::config::{ModelConfig, SpecialTokens};
use crate::gpt2::Gpt2Config;
use crate::llama::LlamaConfig;
use crate::rope::RopeConfig;

/// The names that [`preset()`] knows.
pub const PRESETS: [&str; 4] = ["gpt2", "smollm2-135m", "qwen2.5-0.5b", "tinyllama-1.1b"];

/// The configuration of that published size.
pub fn preset(name: &str) -> Option<ModelConfig> {
    let llama = LlamaConfig {
        vocab_size: 49152,
        hidden: 576,
        intermediate: 1536,
        n_layers: 30,
        n_heads: 9,
        n_kv_heads: 3,
        head_dim: 64,
        max_position_embeddings: 8192,
        rms_norm_eps: 1e-5,
        initializer_range: 0.02,
        rope: RopeConfig::plain(10000.0),
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        tied: true,
        special_tokens: SpecialTokens { bos: Some(1), eos: vec![2], pad: None },
    };
    Some(match name {
        "gpt2" => ModelConfig::Gpt2(Gpt2Config::default()),
        "smollm2-135m" => ModelConfig::Llama(llama),
        "qwen2.5-0.5b" => ModelConfig::Llama(LlamaConfig {
            vocab_size: 151_936,
            hidden: 896,
            intermediate: 4864,
            n_layers: 24,
            n_heads: 14,
            n_kv_heads: 2,
            max_position_embeddings: 32768,
            rms_norm_eps: 1e-6,
            qkv_bias: true,
            ..llama
        }),
        "tinyllama-1.1b" => ModelConfig::Llama(LlamaConfig {
            vocab_size: 32000,
            hidden: 2048,
            intermediate: 5632,
            n_layers: 22,
            n_heads: 32,
            n_kv_heads: 4,
            max_position_embeddings: 2048,
            tied: false,
            ..llama
        }),
        _ => return None,
    })
}

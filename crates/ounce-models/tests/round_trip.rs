//! Random models, differentiated and with an optimizer: they verify, and read back from their text.

use arbtest::arbitrary::{Result, Unstructured};
use ounce_ir::{Graph, OptimizerKind, verify};
use ounce_models::{
    DecoderConfig, Family, Gpt2Config, Layer, ModelConfig, Purpose, RopeConfig, RopeScaling,
    SpecialTokens, build_for_length,
};

fn gpt2(u: &mut Unstructured<'_>) -> Result<ModelConfig> {
    let n_heads = u.int_in_range(1..=3)?;
    Ok(ModelConfig::Gpt2(Gpt2Config {
        vocab_size: u.int_in_range(1..=99)?,
        n_positions: u.int_in_range(1..=70)?,
        hidden: n_heads * u.int_in_range(1..=9)?,
        n_layers: u.int_in_range(1..=3)?,
        n_heads,
        n_inner: if u.arbitrary()? { Some(u.int_in_range(1..=40)?) } else { None },
        activation: (*u.choose(&["gelu", "gelu_new", "gelu_pytorch_tanh"])?).to_owned(),
        layer_norm_epsilon: *u.choose(&[1e-5, 1e-6, 0.001])?,
        initializer_range: *u.choose(&[0.02, 1.0 / 24.0])?,
        scale_attn_weights: u.arbitrary()?,
        tied: u.arbitrary()?,
        dropout: [0.0, 0.1, 0.25],
        special_tokens: special_tokens(u)?,
    }))
}

/// A Llama-like model with what its family allows.
fn decoder(u: &mut Unstructured<'_>) -> Result<ModelConfig> {
    let family = *u.choose(&Family::ALL[1..])?;
    let n_kv_heads = u.int_in_range(1..=3)?;
    let head_dim = 2 * u.int_in_range(2..=5)?;
    let n_layers = u.int_in_range(1..=3)?;
    let gemma = matches!(family, Family::Gemma2 | Family::Gemma3);
    let any_bias = !matches!(family, Family::Qwen2 | Family::Phi3 | Family::Mistral);
    let has_windows = !matches!(family, Family::Llama | Family::Olmo2);
    let window = if has_windows && u.arbitrary()? { Some(u.int_in_range(1..=99)?) } else { None };
    let all_alike = matches!(family, Family::Mistral | Family::Phi3);
    let layers: Vec<Layer> = (0..n_layers)
        .map(|_| {
            let windowed = window.is_some() && (all_alike || u.arbitrary()?);
            let rotary = family != Family::SmolLm3 || u.arbitrary()?;
            Ok(Layer { windowed, rotary })
        })
        .collect::<Result<_>>()?;
    let scaling = match family {
        Family::Phi3 | Family::Gemma3 => RopeScaling::Default,
        _ => scaling(u, head_dim)?,
    };
    let cap = |u: &mut Unstructured<'_>, possible: bool| -> Result<Option<f64>> {
        Ok(if possible && u.arbitrary()? { Some(*u.choose(&[0.5, 30.0])?) } else { None })
    };
    let theta = *u.choose(&[1e4, 5e5])?;
    Ok(ModelConfig::Decoder(DecoderConfig {
        family,
        vocab_size: u.int_in_range(1..=99)?,
        hidden: u.int_in_range(1..=40)?,
        intermediate: u.int_in_range(1..=40)?,
        n_heads: n_kv_heads * u.int_in_range(1..=3)?,
        n_kv_heads,
        head_dim,
        max_position_embeddings: u.int_in_range(8..=100)?,
        rms_norm_eps: *u.choose(&[1e-5, 1e-6])?,
        initializer_range: 0.02,
        rope: RopeConfig { scaling, ..RopeConfig::plain(theta) },
        local_theta: (family == Family::Gemma3).then_some(500.0),
        layers,
        window,
        query_scalar: if gemma { 7.0 } else { head_dim as f64 },
        score_cap: cap(u, family == Family::Gemma2)?,
        logit_cap: cap(u, gemma)?,
        attention_bias: family == Family::Qwen2 || (any_bias && u.arbitrary()?),
        mlp_bias: matches!(family, Family::Llama | Family::SmolLm3) && u.arbitrary()?,
        tied: u.arbitrary()?,
        special_tokens: special_tokens(u)?,
    }))
}

fn scaling(u: &mut Unstructured<'_>, head_dim: u64) -> Result<RopeScaling> {
    let factor = *u.choose(&[1.0, 2.5, 8.0])?;
    let original_max_position_embeddings = u.int_in_range(8..=64)?;
    let per_pair = |x: f64| (0..head_dim / 2).map(|i| 1.0 + x * i as f64).collect();
    Ok(match u.int_in_range(0..=5)? {
        0 => RopeScaling::Linear { factor },
        1 => RopeScaling::Dynamic { factor },
        2 => RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            attention_factor: None,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: None,
            mscale_all_dim: None,
            truncate: u.arbitrary()?,
        },
        3 => RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings,
        },
        4 => RopeScaling::LongRope {
            short_factor: per_pair(0.1),
            long_factor: per_pair(0.5),
            factor: u.arbitrary::<bool>()?.then_some(factor),
            attention_factor: None,
            original_max_position_embeddings,
        },
        _ => RopeScaling::Default,
    })
}

fn special_tokens(u: &mut Unstructured<'_>) -> Result<SpecialTokens> {
    let n_eos = u.int_in_range(0..=2)?;
    let eos = (0..n_eos).collect();
    Ok(SpecialTokens { bos: u.arbitrary::<bool>()?.then_some(1), eos, pad: None })
}

fn assert_sound(graph: &Graph) {
    if let Err(errors) = verify(graph) {
        panic!("{graph}\n{}", errors[0]);
    }
    let text = graph.to_string();
    assert_eq!(Graph::parse(&text).as_ref(), Ok(graph), "{text}");
}

#[test]
fn random_models_verify_and_read_back_after_every_pass() {
    arbtest::arbtest(|u| {
        let config = if u.arbitrary()? { gpt2(u)? } else { decoder(u)? };
        let dropout = match config.family() {
            Family::Gpt2 => *u.choose(&[0.0, 0.25])?,
            _ => 0.0,
        };
        let max_length = u.int_in_range(1..=config.max_positions())?;
        let decode = build_for_length(&config, Purpose::Decode, 0.0, max_length);
        assert_sound(&decode.expect("a decoding graph"));
        let mut graph = build_for_length(&config, Purpose::Loss, dropout, max_length)
            .expect("a graph with a loss");
        assert_sound(&graph);
        // Freeze whole families of parameters; something stays trained.
        let frozen = *u.choose(&["", "embed", "wte", "mlp", "attn"])?;
        for id in graph.params.ids() {
            let p = &mut graph.params[id];
            p.trainable = frozen.is_empty() || !p.name.contains(frozen);
        }
        let graph = ounce_passes::differentiate(&graph).expect("a gradient for every op");
        assert_sound(&graph);
        let kind = *u.choose(&[OptimizerKind::AdamW, OptimizerKind::Sgd])?;
        let graph = ounce_passes::attach_optimizer(&graph, kind, u.arbitrary()?);
        assert_sound(&graph.expect("an update for every parameter"));
        Ok(())
    })
    .budget_ms(2_000);
}

#[test]
fn random_configs_read_back_from_their_json() {
    arbtest::arbtest(|u| {
        let config = if u.arbitrary()? { gpt2(u)? } else { decoder(u)? };
        let json = config.to_json();
        let again = ModelConfig::from_json(&json);
        assert_eq!(again.as_ref(), Ok(&config), "{json}");
        Ok(())
    })
    .budget_ms(500);
}

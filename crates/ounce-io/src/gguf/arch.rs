//! Architectures: what llama.cpp calls the keys and tensors that Hugging Face calls otherwise.
//!
//! Everything is a table of pairs, read in both directions. `#` in a name stands for the number of a layer; names are
//! of modules, to which `.weight` or `.bias` is added. How numbers change on the way is in `layout.rs`.
//! To add one: a line in [`ARCHITECTURES`], with tables where the existing ones do not fit.
//! Source: the tables of llama.cpp (`gguf-py/gguf/constants.py`, `tensor_mapping.py`).

use super::layout::Layout;

/// A key of `config.json` that is a key of the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key {
    /// Hugging Face's name.
    pub(super) hf: &'static str,
    /// Llama.cpp's name, after the name of the architecture and a dot.
    pub(super) gguf: &'static str,
    pub(super) kind: KeyKind,
}

/// What a key holds, and whether it must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyKind {
    /// An integer that must be there.
    Size,
    /// An integer that may be absent.
    OptionalSize,
    /// A number that must be there.
    Number,
}

/// One architecture.
#[derive(Debug)]
pub(super) struct Arch {
    /// Llama.cpp's name: `general.architecture`.
    pub(super) gguf: &'static str,
    /// Hugging Face's `model_type`.
    pub(super) model_type: &'static str,
    /// The class in `architectures`.
    pub(super) class: &'static str,
    pub(super) keys: &'static [Key],
    /// Module names: Hugging Face's, llama.cpp's.
    pub(super) modules: &'static [(&'static str, &'static str)],
    /// Whether rows of q and k are interleaved for llama.cpp's rotation of neighbours.
    interleaves_qk: bool,
    /// Whether it has rotary positions.
    pub(super) is_rotary: bool,
}

const fn size(hf: &'static str, gguf: &'static str) -> Key {
    Key { hf, gguf, kind: KeyKind::Size }
}

const fn optional(hf: &'static str, gguf: &'static str) -> Key {
    Key { hf, gguf, kind: KeyKind::OptionalSize }
}

const fn number(hf: &'static str, gguf: &'static str) -> Key {
    Key { hf, gguf, kind: KeyKind::Number }
}

const LLAMA_KEYS: &[Key] = &[
    size("hidden_size", "embedding_length"),
    size("intermediate_size", "feed_forward_length"),
    size("num_hidden_layers", "block_count"),
    size("num_attention_heads", "attention.head_count"),
    optional("num_key_value_heads", "attention.head_count_kv"),
    optional("head_dim", "attention.key_length"),
    size("max_position_embeddings", "context_length"),
    number("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
];

const GPT2_KEYS: &[Key] = &[
    size("n_embd", "embedding_length"),
    optional("n_inner", "feed_forward_length"),
    size("n_layer", "block_count"),
    size("n_head", "attention.head_count"),
    size("n_positions", "context_length"),
    number("layer_norm_epsilon", "attention.layer_norm_epsilon"),
];

const LLAMA_MODULES: &[(&str, &str)] = &[
    ("model.embed_tokens", "token_embd"),
    ("model.layers.#.input_layernorm", "blk.#.attn_norm"),
    ("model.layers.#.self_attn.q_proj", "blk.#.attn_q"),
    ("model.layers.#.self_attn.k_proj", "blk.#.attn_k"),
    ("model.layers.#.self_attn.v_proj", "blk.#.attn_v"),
    ("model.layers.#.self_attn.q_norm", "blk.#.attn_q_norm"),
    ("model.layers.#.self_attn.k_norm", "blk.#.attn_k_norm"),
    ("model.layers.#.self_attn.o_proj", "blk.#.attn_output"),
    ("model.layers.#.post_attention_layernorm", "blk.#.ffn_norm"),
    ("model.layers.#.mlp.gate_proj", "blk.#.ffn_gate"),
    ("model.layers.#.mlp.up_proj", "blk.#.ffn_up"),
    ("model.layers.#.mlp.down_proj", "blk.#.ffn_down"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

const OLMO2_MODULES: &[(&str, &str)] = &[
    ("model.embed_tokens", "token_embd"),
    ("model.layers.#.self_attn.q_proj", "blk.#.attn_q"),
    ("model.layers.#.self_attn.k_proj", "blk.#.attn_k"),
    ("model.layers.#.self_attn.v_proj", "blk.#.attn_v"),
    ("model.layers.#.self_attn.q_norm", "blk.#.attn_q_norm"),
    ("model.layers.#.self_attn.k_norm", "blk.#.attn_k_norm"),
    ("model.layers.#.self_attn.o_proj", "blk.#.attn_output"),
    ("model.layers.#.post_attention_layernorm", "blk.#.post_attention_norm"),
    ("model.layers.#.mlp.gate_proj", "blk.#.ffn_gate"),
    ("model.layers.#.mlp.up_proj", "blk.#.ffn_up"),
    ("model.layers.#.mlp.down_proj", "blk.#.ffn_down"),
    ("model.layers.#.post_feedforward_layernorm", "blk.#.post_ffw_norm"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

const GPT2_MODULES: &[(&str, &str)] = &[
    ("transformer.wte", "token_embd"),
    ("transformer.wpe", "position_embd"),
    ("transformer.h.#.ln_1", "blk.#.attn_norm"),
    ("transformer.h.#.attn.c_attn", "blk.#.attn_qkv"),
    ("transformer.h.#.attn.c_proj", "blk.#.attn_output"),
    ("transformer.h.#.ln_2", "blk.#.ffn_norm"),
    ("transformer.h.#.mlp.c_fc", "blk.#.ffn_up"),
    ("transformer.h.#.mlp.c_proj", "blk.#.ffn_down"),
    ("transformer.ln_f", "output_norm"),
    ("lm_head", "output"),
];

const LLAMA: Arch = Arch {
    gguf: "llama",
    model_type: "llama",
    class: "LlamaForCausalLM",
    keys: LLAMA_KEYS,
    modules: LLAMA_MODULES,
    interleaves_qk: true,
    is_rotary: true,
};

/// Of two with one name in llama.cpp the first is what a GGUF file becomes.
pub(super) const ARCHITECTURES: &[Arch] = &[
    LLAMA,
    Arch { model_type: "mistral", class: "MistralForCausalLM", ..LLAMA },
    Arch {
        gguf: "qwen2",
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        interleaves_qk: false,
        ..LLAMA
    },
    Arch {
        gguf: "qwen3",
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        interleaves_qk: false,
        ..LLAMA
    },
    Arch {
        gguf: "olmo2",
        model_type: "olmo2",
        class: "Olmo2ForCausalLM",
        modules: OLMO2_MODULES,
        interleaves_qk: false,
        ..LLAMA
    },
    Arch {
        gguf: "gpt2",
        model_type: "gpt2",
        class: "GPT2LMHeadModel",
        keys: GPT2_KEYS,
        modules: GPT2_MODULES,
        interleaves_qk: false,
        is_rotary: false,
    },
];

/// The names of all architectures, for a message.
pub(super) fn known(name: impl Fn(&Arch) -> &'static str) -> String {
    let mut names: Vec<&str> = ARCHITECTURES.iter().map(name).collect();
    names.dedup();
    names.join(", ")
}

impl Arch {
    /// Hugging Face's name of a tensor.
    pub(super) fn hf_name(&self, gguf: &str) -> Option<String> {
        translate(gguf, |module| self.modules.iter().find(|m| m.1 == module).map(|m| m.0))
    }

    /// Llama.cpp's name of a tensor.
    pub(super) fn gguf_name(&self, hf: &str) -> Option<String> {
        translate(hf, |module| self.modules.iter().find(|m| m.0 == module).map(|m| m.1))
    }

    /// How the numbers of a tensor (by Hugging Face's name) are arranged in a GGUF file.
    pub(super) fn layout(&self, hf: &str, n_heads: usize, n_kv_heads: usize) -> Layout {
        let is_linear = |name: &str| hf.ends_with(&format!("{name}.weight"));
        if self.interleaves_qk && (hf.contains(".q_proj.") || hf.contains(".k_proj.")) {
            let n_heads = if hf.contains(".q_proj.") { n_heads } else { n_kv_heads };
            Layout::Interleaved { n_heads }
        } else if self.model_type == "gpt2"
            && ["c_attn", "c_proj", "c_fc"].into_iter().any(is_linear)
        {
            Layout::Transposed
        } else {
            Layout::Same
        }
    }
}

/// Replaces the module of a tensor's name, keeping the layer's number and what follows the last dot.
fn translate(name: &str, module: impl Fn(&str) -> Option<&'static str>) -> Option<String> {
    let (path, leaf) = name.rsplit_once('.')?;
    if !matches!(leaf, "weight" | "bias") {
        return None;
    }
    let is_number = |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let number = path.split('.').find(is_number);
    let parts: Vec<&str> =
        path.split('.').map(|part| if Some(part) == number { "#" } else { part }).collect();
    let found = module(&parts.join("."))?;
    let found = number.map_or_else(|| found.to_owned(), |number| found.replace('#', number));
    Some(format!("{found}.{leaf}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_translate_both_ways() {
        for arch in ARCHITECTURES {
            for (hf, gguf) in arch.modules {
                for leaf in ["weight", "bias"] {
                    let (hf, gguf) =
                        (hf.replace('#', "17") + "." + leaf, gguf.replace('#', "17") + "." + leaf);
                    assert_eq!(arch.gguf_name(&hf).as_deref(), Some(&*gguf));
                    assert_eq!(arch.hf_name(&gguf).as_deref(), Some(&*hf));
                }
            }
            for name in ["", "weight", ".weight", "blk.0.attn_q", "blk.#.nothing.weight", "x.y.z"] {
                assert_eq!(arch.hf_name(name), None);
            }
        }
    }
}

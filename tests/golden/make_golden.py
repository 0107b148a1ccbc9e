#!/usr/bin/env python3
"""Golden data for Ounce: tiny models of every family as PyTorch and transformers compute them.

Idea. Each case below is a small configuration with random weights, one batch, and what
transformers makes of it: logits, loss, every gradient, and the weights after ten AdamW steps.
Ounce's tests read the files; nothing in the build needs Python.

Precision. The weights are f32 numbers, but everything computed from them is computed in f64 and
rounded to f32 once, when stored. transformers forces some intermediate results to f32 (RoPE
tables, softmax, RMSNorm); `EverythingInDouble` undoes that, so the goldens are the mathematics
and not somebody's rounding. Every case is then repeated with plain transformers in f32, loaded
from the written directory: that proves that the directory means the same to `from_pretrained`,
and its distance from the f64 result, stored in golden.json, says how much rounding is normal.
The gradients are computed once more in bf16, as PyTorch does it with the whole model in bf16 and
under autocast; their distances are stored too.

Files per case: see README.md in this folder.

Usage: python3 make_golden.py [--only NAME] [--output-dir DIR]
"""

import argparse
import contextlib
import json
import math
import os
import pathlib

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

STEPS = 10
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
WEIGHT_DECAY = 0.1
NOT_SUPERVISED = -100

# --------------------------------------------------------------------------------------------
# The cases
# --------------------------------------------------------------------------------------------


def gpt2(**settings):
    """A GPT-2 configuration without dropout, the rest as given."""
    vocab_size = settings["vocab_size"]
    return GPT2Config(
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=vocab_size - 1,
        eos_token_id=vocab_size - 1,
        **settings,
    )


def llama(rope=None, theta=10000.0, **settings):
    """A Llama configuration; `rope` holds the keys of `rope_parameters` beside `rope_theta`."""
    rope = {"rope_type": "default", **(rope or {}), "rope_theta": theta}
    return LlamaConfig(rope_parameters=rope, **settings)


def case(config, batch, tokens, *, std, clip=0.0, masked=0.0, spelling="new"):
    """One case.

    std: standard deviation of the random matrices. clip: bound on the global gradient norm, 0 is
    off. masked: share of the targets that are not supervised. spelling: of RoPE in config.json,
    "new" (`rope_parameters`, transformers 5), "old" (`rope_theta` and `rope_scaling`) or "oldest"
    (as old, with `type` in place of `rope_type`).
    """
    return dict(
        config=config, batch=batch, tokens=tokens, std=std, clip=clip, masked=masked, spelling=spelling
    )


def gpt2_cases():
    """GPT-2: head counts and sizes, both GELUs, MLP widths, epsilons, tied and untied heads."""
    return [
        case(
            gpt2(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4), 2, 33, std=0.12
        ),
        case(
            gpt2(vocab_size=61, n_positions=16, n_embd=16, n_layer=1, n_head=1), 3, 9, std=0.2, clip=1.0
        ),
        case(
            gpt2(vocab_size=131, n_positions=32, n_embd=20, n_layer=2, n_head=2, tie_word_embeddings=False),
            2, 21, std=0.15,
        ),
        case(
            gpt2(vocab_size=97, n_positions=64, n_embd=24, n_layer=2, n_head=3, activation_function="gelu"),
            2, 40, std=0.15, clip=1.0, masked=0.3,
        ),
        case(
            gpt2(vocab_size=83, n_positions=48, n_embd=24, n_layer=2, n_head=4, n_inner=50,
                 layer_norm_epsilon=1e-6),
            3, 26, std=0.15,
        ),
        case(
            gpt2(vocab_size=67, n_positions=128, n_embd=24, n_layer=2, n_head=2), 2, 70, std=0.2, clip=1.0
        ),
        case(
            gpt2(vocab_size=101, n_positions=31, n_embd=21, n_layer=1, n_head=3, n_inner=37,
                 activation_function="gelu", tie_word_embeddings=False),
            3, 31, std=0.2, masked=0.5,
        ),
        case(
            gpt2(vocab_size=71, n_positions=19, n_embd=16, n_layer=3, n_head=4, layer_norm_epsilon=1e-3),
            2, 19, std=0.2, clip=1.0, masked=0.1,
        ),
        case(
            gpt2(vocab_size=127, n_positions=64, n_embd=36, n_layer=1, n_head=3), 2, 50, std=0.1
        ),
    ]


def llama_cases():
    """Llama: grouped heads, biases, tied and untied heads, explicit head_dim, every RoPE variant."""
    return [
        case(
            llama(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
                  num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=True),
            2, 33, std=0.12,
        ),
        case(
            llama(theta=500000.0, vocab_size=131, hidden_size=24, intermediate_size=40,
                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  max_position_embeddings=64, attention_bias=True),
            2, 23, std=0.15, clip=1.0, spelling="old",
        ),
        case(
            llama(vocab_size=61, hidden_size=30, intermediate_size=45, num_hidden_layers=2,
                  num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=32,
                  mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-5),
            3, 17, std=0.15, masked=0.3, spelling="old",
        ),
        case(
            llama({"rope_type": "linear", "factor": 2.5}, vocab_size=89, hidden_size=32,
                  intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                  max_position_embeddings=64),
            2, 41, std=0.15, clip=1.0, spelling="oldest",
        ),
        # Longer than max_position_embeddings: the base of the dynamic variant grows.
        case(
            llama({"rope_type": "dynamic", "factor": 2.0}, vocab_size=73, hidden_size=24,
                  intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=32),
            2, 45, std=0.2,
        ),
        case(
            llama({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
                  vocab_size=103, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                  num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64),
            2, 37, std=0.12, clip=1.0, spelling="old",
        ),
        # Wavelengths on both sides of and inside the blended band (16 to 64).
        case(
            llama({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
                  theta=500000.0, vocab_size=113, hidden_size=24, intermediate_size=50,
                  num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512,
                  tie_word_embeddings=True),
            2, 52, std=0.15, masked=0.2, spelling="old",
        ),
        # Not longer than the original context: short factors.
        case(
            llama({"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.25, 1.5],
                   "long_factor": [1.5, 2.0, 3.0, 4.0], "original_max_position_embeddings": 32},
                  vocab_size=79, hidden_size=32, intermediate_size=44, num_hidden_layers=1,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128),
            3, 29, std=0.15, clip=1.0, spelling="old",
        ),
        # Longer than the original context: long factors. Also the case with more than 64 tokens.
        case(
            llama({"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.25, 1.5, 1.75],
                   "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0], "factor": 4.0,
                   "original_max_position_embeddings": 32},
                  vocab_size=67, hidden_size=20, intermediate_size=36, num_hidden_layers=2,
                  num_attention_heads=2, max_position_embeddings=128),
            2, 70, std=0.2,
        ),
        case(
            llama(vocab_size=101, hidden_size=24, intermediate_size=33, num_hidden_layers=2,
                  num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                  max_position_embeddings=64, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
            2, 30, std=0.15, clip=1.0, masked=0.1,
        ),
        case(
            llama({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32,
                   "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.8,
                   "truncate": False},
                  theta=1000000.0, vocab_size=83, hidden_size=24, intermediate_size=40,
                  num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=256),
            2, 39, std=0.2,
        ),
        case(
            llama(theta=2000.0, vocab_size=61, hidden_size=16, intermediate_size=29,
                  num_hidden_layers=3, num_attention_heads=1, max_position_embeddings=32,
                  tie_word_embeddings=True),
            3, 14, std=0.2, clip=1.0, masked=0.5, spelling="old",
        ),
        # Shorter than max_position_embeddings: the dynamic variant equals the default one.
        case(
            llama({"rope_type": "dynamic", "factor": 4.0}, vocab_size=97, hidden_size=24,
                  intermediate_size=40, num_hidden_layers=1, num_attention_heads=3,
                  num_key_value_heads=3, max_position_embeddings=64, attention_bias=True),
            2, 18, std=0.15, spelling="oldest",
        ),
    ]


def config_of(model_type, vocab, hidden, mlp, layers, heads, kv_heads, positions, **settings):
    """A configuration of one of the later families; special tokens are within the vocabulary."""
    return AutoConfig.for_model(
        model_type, vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=positions, bos_token_id=1, eos_token_id=2, pad_token_id=None,
        **settings,
    )


def mistral_cases():
    """Windows shorter than a row, as long as a tile and off; head_dim of its own."""
    return [
        case(config_of("mistral", 61, 24, 40, 2, 4, 2, 64, sliding_window=7), 2, 29, std=0.15, spelling="old"),
        case(config_of("mistral", 53, 20, 33, 1, 2, 1, 128, sliding_window=64, head_dim=12), 2, 131, std=0.2, clip=1.0),
        case(config_of("mistral", 67, 24, 29, 2, 3, 3, 64, sliding_window=None, tie_word_embeddings=True),
             3, 17, std=0.15, masked=0.3),
    ]


def qwen2_cases():
    """Biases on q, k and v; windows off, from a layer on, and by list; tied and untied heads."""
    return [
        case(config_of("qwen2", 71, 24, 40, 2, 4, 2, 64, tie_word_embeddings=True), 2, 27, std=0.15, spelling="old"),
        case(config_of("qwen2", 59, 16, 29, 3, 2, 1, 64, use_sliding_window=True, sliding_window=5,
                       max_window_layers=1), 2, 33, std=0.15, clip=1.0),
        case(config_of("qwen2", 53, 30, 37, 2, 3, 1, 64, use_sliding_window=True, sliding_window=9,
                       layer_types=["sliding_attention", "full_attention"]), 2, 21, std=0.15, masked=0.2),
    ]


def qwen3_cases():
    """Norms of every head; head_dim of its own; biases; windows."""
    return [
        case(config_of("qwen3", 61, 24, 40, 2, 4, 2, 64, head_dim=10, tie_word_embeddings=True),
             2, 27, std=0.15, spelling="old"),
        case(config_of("qwen3", 53, 20, 31, 2, 2, 2, 64, head_dim=16, attention_bias=True), 3, 19, std=0.15, clip=1.0),
        case(config_of("qwen3", 67, 16, 27, 2, 3, 1, 64, head_dim=8, use_sliding_window=True,
                       sliding_window=6, max_window_layers=1), 2, 35, std=0.15, masked=0.3),
    ]


def gemma2_cases():
    """Soft caps that bite, windows in every other layer, query_pre_attn_scalar, caps off."""
    return [
        case(config_of("gemma2", 61, 24, 40, 2, 4, 2, 64, head_dim=8, query_pre_attn_scalar=5,
                       sliding_window=7, attn_logit_softcapping=2.0, final_logit_softcapping=1.5),
             2, 29, std=0.15, spelling="old"),
        case(config_of("gemma2", 53, 20, 33, 3, 2, 1, 64, head_dim=12, query_pre_attn_scalar=12,
                       sliding_window=5, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
             2, 23, std=0.1, clip=1.0),
        case(config_of("gemma2", 47, 18, 31, 2, 3, 3, 64, head_dim=6, query_pre_attn_scalar=9,
                       sliding_window=64, attn_logit_softcapping=None, final_logit_softcapping=None,
                       attention_bias=True), 2, 70, std=0.15, masked=0.2),
    ]


def gemma3_cases():
    """Local and global layers with a rotary base each, norms of heads, stretched global positions."""
    local = {"rope_type": "default", "rope_theta": 500.0}
    return [
        case(config_of("gemma3_text", 61, 24, 40, 3, 4, 2, 64, head_dim=8, query_pre_attn_scalar=8,
                       sliding_window=7, layer_types=["sliding_attention"] * 2 + ["full_attention"],
                       rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 20000.0},
                                        "sliding_attention": local}),
             2, 29, std=0.1, spelling="old"),
        case(config_of("gemma3_text", 53, 20, 33, 2, 2, 1, 128, head_dim=12, query_pre_attn_scalar=10,
                       sliding_window=5, layer_types=["sliding_attention", "full_attention"],
                       rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0,
                                                           "rope_theta": 20000.0},
                                        "sliding_attention": local}),
             2, 23, std=0.1, clip=1.0),
        case(config_of("gemma3_text", 47, 18, 31, 2, 3, 3, 64, head_dim=6, query_pre_attn_scalar=6,
                       sliding_window=64, final_logit_softcapping=3.0, tie_word_embeddings=False,
                       layer_types=["full_attention", "sliding_attention"]),
             2, 70, std=0.12, masked=0.1),
    ]


def phi3_cases():
    """Packed matrices, windows, partial rotation, longrope within and beyond the original context."""
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [1.5, 2.0, 3.0]}
    return [
        case(config_of("phi3", 61, 24, 40, 2, 4, 2, 64, sliding_window=7), 2, 29, std=0.15, spelling="old"),
        case(config_of("phi3", 53, 16, 33, 2, 2, 1, 128, original_max_position_embeddings=32,
                       rope_parameters={**longrope, "partial_rotary_factor": 0.75}, tie_word_embeddings=True),
             2, 23, std=0.15, clip=1.0),
        case(config_of("phi3", 47, 16, 31, 2, 2, 2, 128, original_max_position_embeddings=16,
                       rope_parameters={**longrope, "partial_rotary_factor": 0.75}),
             2, 37, std=0.15, masked=0.2, spelling="old"),
    ]


def smollm3_cases():
    """Layers without positions by interval and by list, and windows in them. No bias of keys: where
    nothing turns, it has no gradient."""
    return [
        case(config_of("smollm3", 61, 24, 40, 4, 4, 2, 64), 2, 25, std=0.12, spelling="old"),
        case(config_of("smollm3", 53, 20, 33, 2, 2, 1, 64, no_rope_layers=[0, 1], mlp_bias=True,
                       tie_word_embeddings=False), 2, 23, std=0.15, clip=1.0),
        case(config_of("smollm3", 47, 18, 31, 3, 3, 3, 64, no_rope_layer_interval=2,
                       use_sliding_window=True, sliding_window=6), 2, 35, std=0.15, masked=0.2),
    ]


def olmo2_cases():
    """Norms behind the halves and of all queries and all keys; biases."""
    return [
        case(config_of("olmo2", 61, 24, 40, 2, 4, 2, 64), 2, 29, std=0.15, spelling="old"),
        case(config_of("olmo2", 53, 20, 33, 2, 2, 1, 64, tie_word_embeddings=True), 2, 23, std=0.15, clip=1.0),
        case(config_of("olmo2", 47, 18, 31, 3, 3, 3, 64, attention_bias=True, rms_norm_eps=1e-3),
             3, 17, std=0.15, masked=0.2),
    ]


# --------------------------------------------------------------------------------------------
# Model and data of a case
# --------------------------------------------------------------------------------------------


class EverythingInDouble(TorchFunctionMode):
    """Reads every request for f32 as one for f64, so that no intermediate result is rounded."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widened(value):
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(widened(value) for value in args)
        kwargs = {key: widened(value) for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def is_decayed(parameter):
    """Matrices and embeddings are decayed; norms and biases, the vectors, are not."""
    return parameter.ndim >= 2


@torch.no_grad()
def randomize(model, std, generator):
    """Random f32 weights: matrices N(0, std), norm weights around 1, biases around 0."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.ndim >= 2:
            parameter.copy_(noise * std)
        elif name.endswith("bias"):
            parameter.copy_(noise * 0.1)
        elif model.config.model_type.startswith("gemma"):
            parameter.copy_(noise * 0.2)  # multiplied with as 1 + weight
        else:
            parameter.copy_(1.0 + noise * 0.2)


def random_batch(spec, generator):
    """Token ids and labels, both (B, T) and not shifted; masked labels are NOT_SUPERVISED."""
    shape = (spec["batch"], spec["tokens"])
    input_ids = torch.randint(0, spec["config"].vocab_size, shape, generator=generator)
    labels = input_ids.clone()
    labels[torch.rand(shape, generator=generator) < spec["masked"]] = NOT_SUPERVISED
    return input_ids, labels


def respell_config(path, spelling):
    """Rewrites a saved config.json the way older transformers wrote it: `rope_theta` and
    `rope_scaling` instead of `rope_parameters`, `torch_dtype` instead of `dtype`, and no key
    whose value is the derived default (head_dim, num_key_value_heads)."""
    if spelling == "new":
        return
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        config["partial_rotary_factor"] = 0.75
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if spelling == "oldest" and config["rope_scaling"]:
        rope["type"] = rope.pop("rope_type")
    if rope["rope_type" if spelling == "old" else "type"] == "longrope":
        config["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    config["torch_dtype"] = config.pop("dtype")
    n_heads = config["num_attention_heads"]
    if config.get("head_dim", 0) * n_heads == config["hidden_size"]:
        del config["head_dim"]
    if config["num_key_value_heads"] == n_heads:
        del config["num_key_value_heads"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# --------------------------------------------------------------------------------------------
# What is computed
# --------------------------------------------------------------------------------------------


def forward_backward(model, input_ids, labels, forward_in=contextlib.nullcontext()):
    """Logits (B, T, V), the loss, and the gradient of every parameter by name."""
    model.zero_grad(set_to_none=True)
    with forward_in:
        out = model(input_ids=input_ids, labels=labels, use_cache=False)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return out.logits.detach(), out.loss.detach(), gradients


def train(model, input_ids, labels, clip):
    """STEPS AdamW steps on the one batch: losses and gradient norms, each as of before the step
    and before clipping; the weights change in place."""
    decayed = [p for p in model.parameters() if is_decayed(p)]
    others = [p for p in model.parameters() if not is_decayed(p)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        foreach=False,
        **ADAMW,
    )
    losses, grad_norms = [], []
    for _ in range(STEPS):
        _, loss, _ = forward_backward(model, input_ids, labels)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip else math.inf)
        optimizer.step()
        losses.append(loss.item())
        grad_norms.append(grad_norm.item())
    return losses, grad_norms


def run(model, input_ids, labels, clip):
    """All results of a case, in the precision of the model."""
    logits, loss, gradients = forward_backward(model, input_ids, labels)
    losses, grad_norms = train(model, input_ids, labels, clip)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return dict(
        logits=logits, loss=loss, gradients=gradients, weights=weights, losses=losses, grad_norms=grad_norms
    )


def relative_error(value, truth):
    """|value - truth| / |truth| in the Euclidean norm, 0 where both vanish."""
    distance = (value.double() - truth.double()).norm()
    return (distance / truth.double().norm()).item() if distance > 0 else 0.0


def without_key_bias(name, tensor):
    """The tensor without the key third of a GPT-2 attention bias. Softmax does not see a constant
    added to all scores of a query, so that the gradient there is zero and what f32 computes is
    pure rounding noise, which AdamW then scales up to full steps. The model does not depend on
    these elements."""
    if name.endswith("attn.c_attn.bias"):
        query, _, value = tensor.chunk(3)
        return torch.cat([query, value])
    return tensor


def f32_errors(single, double):
    """How far plain transformers in f32 is from the f64 results."""
    gradients = {
        name: relative_error(single["gradients"][name], truth)
        for name, truth in double["gradients"].items()
    }
    moved = {
        name: without_key_bias(name, single["weights"][name].double() - truth).abs().max().item()
        for name, truth in double["weights"].items()
    }
    worst_gradient = max(gradients, key=gradients.get)
    worst_weight = max(moved, key=moved.get)
    return {
        "logits_relative": relative_error(single["logits"], double["logits"]),
        "loss_absolute": abs(single["loss"].item() - double["loss"].item()),
        "grad_relative_max": gradients[worst_gradient],
        "grad_relative_max_of": worst_gradient,
        "adamw10_absolute_max": moved[worst_weight],
        "adamw10_absolute_max_of": worst_weight,
        "losses_absolute_max": max(abs(a - b) for a, b in zip(single["losses"], double["losses"])),
    }


def bf16_distances(load, input_ids, labels, truth):
    """How far PyTorch's gradients in bf16 are from the f64 ones, per parameter and of all of them
    together (`all`), in the Euclidean norm: `pure`, with weights and everything else in bf16, and
    `autocast`, with f32 weights."""
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    results = {
        "pure": forward_backward(load(torch.bfloat16), input_ids, labels),
        "autocast": forward_backward(load(torch.float32), input_ids, labels, forward_in=autocast),
    }
    distances = {}
    for way, (_, _, gradients) in results.items():
        apart = {
            name: (gradients[name].double() - gradient).norm().item() for name, gradient in truth.items()
        }
        apart = {"all": math.hypot(*apart.values())} | apart
        distances[way] = {name: float(f"{distance:.4g}") for name, distance in apart.items()}
    return distances


# --------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------


def double_copy(config, model):
    """The same model in f64, RoPE tables included."""
    torch.set_default_dtype(torch.float64)
    try:
        twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    twin.load_state_dict(model.state_dict())
    return twin


def make_case(name, spec, seed, folder):
    """Computes one case and writes its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(spec["config"], attn_implementation="eager", dtype=torch.float32)
    randomize(model, spec["std"], generator)
    input_ids, labels = random_batch(spec, generator)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    respell_config(folder / "config.json", spec["spelling"])

    with EverythingInDouble():
        double = run(double_copy(spec["config"], model), input_ids, labels, spec["clip"])

    def load(dtype):
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype)

    single = run(load(torch.float32), input_ids, labels, spec["clip"])
    errors = f32_errors(single, double)
    assert double["logits"].dtype == torch.float64
    assert errors["logits_relative"] < 1e-5, (name, errors)
    assert errors["adamw10_absolute_max"] < 2e-5, (name, errors)  # else choose another seed
    assert spec["clip"] == 0.0 or max(double["grad_norms"]) > spec["clip"], (name, double["grad_norms"])

    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    tensors = {"input_ids": input_ids, "labels": labels, "logits": double["logits"], "loss": double["loss"]}
    tensors |= {f"grad.{key}": value for key, value in double["gradients"].items()}
    tensors |= {f"adamw10.{key}": value for key, value in double["weights"].items()}
    tensors = {
        key: value.to(torch.float32 if value.is_floating_point() else torch.int64).contiguous()
        for key, value in tensors.items()
    }
    # One key: safetensors writes several in no fixed order.
    made_by = " ".join(["make_golden.py", f"seed={seed}", *(f"{k}={v}" for k, v in versions.items())])
    save_file(tensors, folder / "golden.safetensors", metadata={"made_by": made_by})
    facts = {
        "batch": spec["batch"],
        "tokens": spec["tokens"],
        "predictions": int((labels[:, 1:] != NOT_SUPERVISED).sum()),
        "learning_rate": ADAMW["lr"],
        "beta1": ADAMW["betas"][0],
        "beta2": ADAMW["betas"][1],
        "eps": ADAMW["eps"],
        "weight_decay": WEIGHT_DECAY,
        "clip": spec["clip"],
        "loss": double["loss"].item(),
        "losses": double["losses"],
        "grad_norms": double["grad_norms"],
        "transformers_f32": errors,
        "bf16_distances": bf16_distances(load, input_ids, labels, double["gradients"]),
        "seed": seed,
        **versions,
    }
    (folder / "golden.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(
        f"{name}: loss {facts['loss']:.4f}, grad norm {facts['grad_norms'][0]:.3f}, f32 errors: "
        f"logits {errors['logits_relative']:.1e}, grad {errors['grad_relative_max']:.1e} "
        f"({errors['grad_relative_max_of']}), adamw10 {errors['adamw10_absolute_max']:.1e} "
        f"({errors['adamw10_absolute_max_of']})"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="make this case alone, such as llama-07")
    parser.add_argument("--output-dir", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    families = [
        ("gpt2", gpt2_cases()), ("llama", llama_cases()), ("mistral", mistral_cases()),
        ("qwen2", qwen2_cases()), ("qwen3", qwen3_cases()), ("gemma2", gemma2_cases()),
        ("gemma3", gemma3_cases()), ("phi3", phi3_cases()), ("smollm3", smollm3_cases()),
        ("olmo2", olmo2_cases()),
    ]
    for i, (family, cases) in enumerate(families):
        first_seed = 1000 * (i + 1)
        for number, spec in enumerate(cases, start=1):
            name = f"{family}-{number:02}"
            if args.only in (None, name):
                make_case(name, spec, first_seed + number, args.output_dir / name)


if __name__ == "__main__":
    main()

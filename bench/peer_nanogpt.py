#!/usr/bin/env python3
"""nanoGPT's CPU recipe on tinyshakespeare in plain PyTorch: the other side of a side-by-side run.

Written for Ounce after the recipe's published settings (karpathy/nanoGPT, README, "I only have a
macbook"): character level, 4 layers, 4 heads, 128 channels, context 64, batch 12, dropout 0, no
biases, GELU (erf), tied head, AdamW 1e-3 with cosine to 1e-4 over 2,000 steps, 100 of them
warm-up, beta2 0.99, weight decay 0.1 on matrices, gradient norm at most 1. Eager, f32.

Data as there: 90 % of the text trains, random windows of 64 + 1 characters; the loss is the mean
over all 12 x 64 predictions. Unlike there, validation covers the whole validation split once,
in consecutive windows, so that the number has no sampling noise.

Prints one JSON line. Usage:
  python3 bench/peer_nanogpt.py [--iters N] [--max-iters 2000] [--threads 2] [--seed 1337]
"""

import argparse
import json
import math
import os
import pathlib
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--iters", type=int, default=2000, help="steps to run, of the schedule's --max-iters")
parser.add_argument("--max-iters", type=int, default=2000, help="length of the learning-rate schedule")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--seed", type=int, default=1337)
parser.add_argument("--no-eval", action="store_true", help="skip the final validation loss")
default_data = pathlib.Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare.txt"
parser.add_argument("--data", type=pathlib.Path, default=default_data)
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read once, when torch is imported

import torch
import torch.nn as nn
import torch.nn.functional as F

N_LAYERS, N_HEADS, N_CHANNELS, CONTEXT, BATCH = 4, 4, 128, 64, 12
LEARNING_RATE, MIN_LEARNING_RATE, WARMUP = 1e-3, 1e-4, 100
BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.99), 0.1, 1.0


class Block(nn.Module):
    """Pre-norm transformer block; x is (B, T, C)."""

    def __init__(self):
        super().__init__()
        c = N_CHANNELS
        self.norm_1 = nn.LayerNorm(c, bias=False)
        self.qkv = nn.Linear(c, 3 * c, bias=False)
        self.proj = nn.Linear(c, c, bias=False)
        self.norm_2 = nn.LayerNorm(c, bias=False)
        self.up = nn.Linear(c, 4 * c, bias=False)
        self.down = nn.Linear(4 * c, c, bias=False)

    def forward(self, x):
        b, t, c = x.shape
        qkv = self.qkv(self.norm_1(x)).view(b, t, 3, N_HEADS, c // N_HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class CharModel(nn.Module):
    """Token and position embeddings, blocks, final norm, head tied to the token embedding."""

    def __init__(self, vocab_size):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, N_CHANNELS)
        self.positions = nn.Embedding(CONTEXT, N_CHANNELS)
        self.blocks = nn.ModuleList(Block() for _ in range(N_LAYERS))
        self.norm = nn.LayerNorm(N_CHANNELS, bias=False)
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                into_residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * N_LAYERS) if into_residual else 0.02)

    def loss(self, ids, targets):
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def learning_rate(step):
    """Linear warm-up, then cosine from LEARNING_RATE to MIN_LEARNING_RATE."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / (WARMUP + 1)
    progress = min(1.0, (step - WARMUP) / max(1, args.max_iters - WARMUP))
    return MIN_LEARNING_RATE + (LEARNING_RATE - MIN_LEARNING_RATE) * (1 + math.cos(math.pi * progress)) / 2


def windows(ids, starts):
    """Inputs and targets, each (len(starts), CONTEXT)."""
    inputs = torch.stack([ids[s : s + CONTEXT] for s in starts])
    targets = torch.stack([ids[s + 1 : s + 1 + CONTEXT] for s in starts])
    return inputs, targets


@torch.no_grad()
def validation_loss(model, ids):
    """Mean over consecutive windows covering the whole split."""
    starts = list(range(0, len(ids) - CONTEXT, CONTEXT))
    total = 0.0
    for i in range(0, len(starts), 256):
        part = starts[i : i + 256]
        total += model.loss(*windows(ids, part)).item() * len(part)
    return total / len(starts)


def peak_rss_mib():
    """VmHWM of this process."""
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024


def main():
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    text = args.data.read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    id_of = {character: i for i, character in enumerate(alphabet)}
    ids = torch.tensor([id_of[character] for character in text])
    n_train = int(0.9 * len(ids))
    train, held_out = ids[:n_train], ids[n_train:]

    model = CharModel(len(alphabet))
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=BETAS,
    )
    times, loss = [], float("nan")
    for step in range(args.iters):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = model.loss(*windows(train, torch.randint(len(train) - CONTEXT, (BATCH,)).tolist()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.item()
        times.append(time.perf_counter() - start)
    peak = peak_rss_mib()  # before validation, whose batches are larger
    times = sorted(times[min(10, len(times) // 2) :])
    print(
        json.dumps(
            {
                "engine": "torch " + torch.__version__,
                "threads": args.threads,
                "parameters": sum(p.numel() for p in model.parameters()),
                "iters": args.iters,
                "ms_per_iter_median": round(1e3 * times[len(times) // 2], 3),
                "ms_per_iter_min": round(1e3 * times[0], 3),
                "train_loss": round(loss, 4),
                "val_loss": None if args.no_eval else round(validation_loss(model, held_out), 4),
                "peak_rss_mib": round(peak),
                "load_average_1min": os.getloadavg()[0],
            }
        )
    )


if __name__ == "__main__":
    main()

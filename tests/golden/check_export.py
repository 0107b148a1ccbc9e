#!/usr/bin/env python3
"""Loads a model directory with plain transformers and prints what it found as one JSON line.

For directories that Ounce wrote: nothing may be missing, nothing unexpected, and the loss on given
ids must be the one Ounce computes. Exit code 1 if a key is missing, unexpected or of a wrong shape.

Usage: python3 check_export.py DIR [--ids 5,17,3,... | --ids-file FILE | --text TEXT]

--ids-file holds integers separated by white space or commas. --text needs a tokenizer in DIR.
Without any of them 32 fixed ids are used. The ids are one row; the loss is the mean over its
predictions.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=pathlib.Path)
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--ids", help="token ids separated by commas")
    given.add_argument("--ids-file", type=pathlib.Path)
    given.add_argument("--text")
    return parser.parse_args()


def given_ids(args, tokenizer, vocab_size):
    """The ids to evaluate, as a list."""
    if args.text is not None:
        if tokenizer is None:
            sys.exit(f"{args.dir} has no tokenizer, so that --text cannot be encoded")
        return tokenizer(args.text)["input_ids"]
    if args.ids_file is not None:
        return [int(word) for word in args.ids_file.read_text().replace(",", " ").split()]
    if args.ids is not None:
        return [int(word) for word in args.ids.split(",")]
    return [(7 * i + 3) % vocab_size for i in range(32)]


def main():
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(
        args.dir, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    has_tokenizer = any((args.dir / name).exists() for name in TOKENIZER_FILES)
    tokenizer = AutoTokenizer.from_pretrained(args.dir) if has_tokenizer else None
    ids = given_ids(args, tokenizer, model.config.vocab_size)
    row = torch.tensor([ids])
    with torch.no_grad():
        out = model(input_ids=row, labels=row)
    report = {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "missing_keys": sorted(info["missing_keys"]),
        "unexpected_keys": sorted(info["unexpected_keys"]),
        "mismatched_keys": sorted(str(key) for key in info["mismatched_keys"]),
        "n_ids": len(ids),
        "loss": out.loss.item(),
        "last_argmax": int(out.logits[0, -1].argmax()),
        "tokenizer": type(tokenizer).__name__ if tokenizer else None,
    }
    if tokenizer:
        report["decoded"] = tokenizer.decode(ids)
    print(json.dumps(report))
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        sys.exit(1)


if __name__ == "__main__":
    main()

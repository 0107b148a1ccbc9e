"""Makes the fixtures in this directory with the Python libraries, so that the tests need no Python.

Run from this directory: python make_goldens.py DIR, where DIR holds the published files of stories260K
(tokenizer.json, tokenizer_config.json, generation_config.json; MIT licence, karpathy/tinyllamas).
Made with tokenizers 0.23.3, transformers 5.23.0, safetensors 0.8.0, torch 2.15.0. The training text is
the first 300,000 characters of data/tinyshakespeare.txt of this repository.
"""

import json
import os
import shutil
import sys

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

TEXT = open("../../../../data/tinyshakespeare.txt", encoding="utf-8", newline="").read()[:300_000]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CASES = [
    "",
    " ",
    "\n",
    "Once upon a time, there was a little girl.",
    "  two  spaces, \t tab and\r\nCRLF\n\n\n end ",
    "it's we'll I'M they'VE",
    "1234 5,678.90 x2",
    "naïve café — Ωμέγα Привет",
    "漢字かなカナ 한국어 العربية",
    "smile 🙂 family 👨‍👩‍👧 flag 🇫🇷",
    "a<|endoftext|>b <s>x</s> <unk>",
    "<0x0A> \u2581 \u0120 \u00a0 \u200b",
]


def checksum(ids):
    """Order-dependent, easy to state in any language."""
    total = 0
    for i, token in enumerate(ids):
        total = (total + (i + 1) * (token + 1)) % (2**61 - 1)
    return total


def golden(tokenizer):
    ids = [tokenizer.encode(case, add_special_tokens=False).ids for case in CASES]
    whole = tokenizer.encode(TEXT, add_special_tokens=False).ids
    return {
        "cases": [
            {"text": case, "ids": i, "decoded": tokenizer.decode(i, skip_special_tokens=True)}
            for case, i in zip(CASES, ids)
        ],
        "tinyshakespeare": {"n_tokens": len(whole), "checksum": checksum(whole)},
    }


def train(pre_tokenizer, alphabet, **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def save(tokenizer, name):
    os.makedirs(name, exist_ok=True)
    tokenizer.save(f"{name}/tokenizer.json", pretty=False)


def main(stories):
    goldens = {}
    os.makedirs("stories260k", exist_ok=True)
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]:
        shutil.copy(f"{stories}/{name}", f"stories260k/{name}")
    goldens["stories260k"] = golden(Tokenizer.from_file("stories260k/tokenizer.json"))
    prompt = "Once upon a time"
    goldens["stories260k"]["prompt"] = prompt
    goldens["stories260k"]["prompt_ids"] = AutoTokenizer.from_pretrained("stories260k")(prompt)["input_ids"]

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = train(pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet)
    bpe.decoder = decoders.ByteLevel()
    save(bpe, "bpe512")
    goldens["bpe512"] = golden(bpe)

    # The same vocabulary as GPT-2 publishes its own: two files and nothing else.
    os.makedirs("gpt2-like", exist_ok=True)
    bpe.model.save("gpt2-like")
    goldens["gpt2-like"] = goldens["bpe512"]

    # The same vocabulary behind the pre-tokenizer of the Llama 3 and Qwen families.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    save(bpe, "llama3-like")
    goldens["llama3-like"] = golden(bpe)

    # SentencePiece's way of today: Metaspace before every text, bytes for what is unknown.
    metaspace = train(pre_tokenizers.Metaspace(prepend_scheme="always"), [], byte_fallback=True)
    vocab = json.loads(metaspace.to_str())["model"]
    for byte in range(256):
        vocab["vocab"].setdefault(f"<0x{byte:02X}>", len(vocab["vocab"]))
    merges = [tuple(m) for m in vocab["merges"]]
    metaspace.model = models.BPE(vocab["vocab"], merges, byte_fallback=True)
    metaspace.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    metaspace.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="always"), decoders.ByteFallback(), decoders.Fuse()]
    )
    save(metaspace, "metaspace-like")
    goldens["metaspace-like"] = golden(metaspace)

    with open("goldens.json", "w", encoding="utf-8") as f:
        json.dump(goldens, f, ensure_ascii=True, indent=1)
        f.write("\n")

    values = torch.arange(6, dtype=torch.float32).reshape(2, 3) / 3 - 0.5
    save_file(
        {
            "f32": values,
            "f16": values.to(torch.float16),
            "bf16": values.to(torch.bfloat16),
            "i64": torch.tensor([-1, 2**40]),
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 4),
        },
        "python.safetensors",
        metadata={"format": "pt", "note": "made by Python"},
    )


main(sys.argv[1])

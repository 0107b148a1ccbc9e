#!/usr/bin/env python3
"""The other side of `cargo xtask accept smollm2`: a model in transformers, or in llama.cpp.

  text      the first rows of a question/answer file as one text of exactly --max-length tokens
  loss      mean loss of a Hugging Face directory over the tokens of a text, in f32
  generate  greedy continuations of prompts (a JSON list in a file) by a Hugging Face directory, in f32
  llama     the same by a GGUF file in llama.cpp (needs llama-cpp-python)

Prints one JSON line.
"""
import argparse, json, os, time

ap = argparse.ArgumentParser()
ap.add_argument("what", choices=["text", "loss", "generate", "llama"])
ap.add_argument("--model", required=True)
ap.add_argument("--data", default="")
ap.add_argument("--rows", type=int, default=6)
ap.add_argument("--max-length", type=int, default=512)
ap.add_argument("--prompts", default="")
ap.add_argument("--max-new-tokens", type=int, default=24)
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--out", default="")
a = ap.parse_args()

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
begin = time.time()


def text():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    with open(a.data) as f:
        rows = [json.loads(next(f)) for _ in range(a.rows)]
    whole = "\n\n".join(r["question"] + "\n" + r["answer"] for r in rows)
    ids = tokenizer(whole, add_special_tokens=False).input_ids[: a.max_length]
    cut = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert tokenizer(cut, add_special_tokens=False).input_ids == ids, "the cut changes the tokens"
    with open(a.out, "w") as f:
        f.write(cut)
    return {"tokens": len(ids)}


def hugging_face():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(a.threads)
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    return torch, AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval(), tokenizer


def loss():
    torch, model, tokenizer = hugging_face()
    with open(a.data) as f:
        ids = tokenizer(f.read(), add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(ids, labels=ids)
    return {"loss": out.loss.item(), "tokens": ids.shape[1] - 1}


def generate():
    torch, model, tokenizer = hugging_face()
    stop = model.generation_config.eos_token_id
    stop = stop if isinstance(stop, list) else [stop]
    answers = []
    for prompt in json.load(open(a.prompts)):
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, do_sample=False, max_new_tokens=a.max_new_tokens)
        new = out[0, ids.input_ids.shape[1]:].tolist()
        answers.append([i for i in new if i not in stop])
    return {"ids": answers}


def llama():
    from llama_cpp import Llama

    model = Llama(a.model, n_ctx=1024, n_threads=a.threads, verbose=False, logits_all=False)
    answers = []
    for prompt in json.load(open(a.prompts)):
        ids, new = model.tokenize(prompt.encode(), add_bos=False, special=True), []
        for token in model.generate(ids, temp=0.0, repeat_penalty=1.0, reset=True):
            if token == model.token_eos() or len(new) == a.max_new_tokens:
                break
            new.append(token)
        answers.append(new)
    return {"ids": answers, "has_template": "tokenizer.chat_template" in model.metadata}


result = {"text": text, "loss": loss, "generate": generate, "llama": llama}[a.what]()
result["seconds"] = round(time.time() - begin, 2)
print(json.dumps(result))

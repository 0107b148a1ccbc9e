"""Token ids and masks of conversations as TRL trains on them, for a comparison token by token.

    make_mask_goldens.py OUT.json TEMPLATES_DIR [--add-tokens] TOKENIZER_DIR...

TEMPLATES_DIR holds *.jinja files; those with `{% generation %}` are taken. `trl` stands for the templates that the
installed TRL trains with. Every tokenizer encodes every conversation below through every template, by TRL's own
function, which asks transformers' `apply_chat_template` for the ids and for the mask of what the assistant says.
With --add-tokens each tokenizer is written beside OUT.json once more, with all that looks like a special token in any
of the templates as one token, and compared in both forms. Folders of tokenizers are named relative to OUT.json.
Needs `trl`, `transformers` and `jinja2`; made with trl 1.16.0, transformers 5.24.0, tokenizers 0.23.3. (Before 5.24 a mask
ended after the first token of a block's last character.)
"""

import argparse
import json
import os
import pathlib
import re

from datetime import datetime

import trl
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from trl.data_utils import _tokenize as trl_tokenize

NOW = 1735689599  # 2024-12-31 23:59:59 UTC


class FixedDate(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.utcfromtimestamp(NOW)


chat_template_utils.datetime = FixedDate

CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "S\u00e3o Paulo", "days": 2}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather here.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"},
                           "days": {"type": "integer", "description": "How many"}},
            "required": ["city"],
        },
    },
}


def said(*contents, first="user"):
    """Messages by turns."""
    other = {"user": "assistant", "assistant": "user"}
    roles = [first if i % 2 == 0 else other[first] for i in range(len(contents))]
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


SYSTEM = {"role": "system", "content": "You are terse."}
WEATHER = [
    {"role": "user", "content": "Weather in S\u00e3o Paulo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "content": "{\"sun\": true}"},
    {"role": "assistant", "content": "Sunny."},
]
CONVERSATIONS = {
    "single turn": said("Hi there!", "Hello, how can I help?"),
    "four turns": said("2+2?", "4", "And 3+3?", "6.", "Sure?", "Yes.\n\nIt is 6.", "Thanks", "Welcome!"),
    "system": [SYSTEM, *said("What is 2+2?", "4")],
    "space around": said("  What?\n\n", " \n 4 \n", "\tSure? ", "Yes \n\n"),
    "empty answer": said("Say nothing.", "", "Good. Now?", "Done."),
    "empty question": said("", "What do you mean?"),
    "unicode": said("\u4f60\u597d, \u043a\u0430\u043a \u0434\u0435\u043b\u0430?", "\u597d\u7684 caf\u00e9 na\u00efve \U0001f642",
                    "\U0001f468\u200d\U0001f469\u200d\U0001f467?", "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \U0001f1eb\U0001f1f7\U0001f642"),
    "code": said("Write it.", "```python\nfor i in range(10):\n    print(i)  # <b>&amp;</b>\n```\n1234567890"),
    "special tokens in the text": said("What is <|im_end|>?", "It ends: <|im_end|> and <eos> <|eot_id|> </s>."),
    "reasoning in the text": said("Why?", "<think>\nHm.\n</think>\n\nBecause.", "Really?", "<think>\nAgain.\n</think>\n\nYes."),
    "reasoning apart": [*said("Why?"), {"role": "assistant", "reasoning_content": "Let me see.", "content": "So."},
                        *said("Really?"), {"role": "assistant", "reasoning_content": "Hm.", "content": "Yes."}],
    "ends with a question": said("Hi", "Hello", "Why?"),
    "two answers": [*said("Hi", "Hello"), {"role": "assistant", "content": "Anyone there?"}],
    "no question": said("I speak first.", "I see.", "Good.", first="assistant"),
    "tools": WEATHER,
    "tools and talk": [
        SYSTEM, *said("Hi", "Hello"), WEATHER[0], {**WEATHER[1], "content": "I look it up."}, *WEATHER[2:],
    ],
}


def special_tokens(sources):
    """All that looks like a special token in some templates."""
    pattern = r"<[|\uff5c/]?[^<>\s{}'\"=.]{2,40}>|\[/?[A-Z_]+\]"
    return sorted({token for source in sources for token in re.findall(pattern, source)})


def load(folder):
    """The tokenizer of a folder, with an end-of-text token for templates to write."""
    if (folder / "vocab.json").exists():
        return GPT2Tokenizer.from_pretrained(folder)
    config = folder / "tokenizer_config.json"
    config = json.loads(config.read_text()) if config.exists() else {"eos_token": "<|endoftext|>"}
    special = {key: value for key, value in config.items() if re.fullmatch("(bos|eos|unk|pad)_token", key)}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)


def case(tokenizer, source, name):
    """What TRL makes of a conversation."""
    messages = json.loads(json.dumps(CONVERSATIONS[name]))
    tools = [TOOL] if name.startswith("tools") else None
    try:
        out = trl_tokenize(tokenizer, messages, return_assistant_tokens_mask=True, chat_template=source, tools=tools)
    except Exception as e:  # whatever a template does not take
        return {"conversation": name, "error": f"{type(e).__name__}: {e}"}
    ids, mask = out["input_ids"], out["assistant_masks"]
    return {"conversation": name, "ids": " ".join(map(str, ids)), "mask": "".join(map(str, mask))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("templates")
    parser.add_argument("tokenizers", type=pathlib.Path, nargs="+")
    parser.add_argument("--add-tokens", action="store_true")
    args = parser.parse_args()
    root = pathlib.Path(trl.__file__).parent / "chat_templates" if args.templates == "trl" else args.templates
    templates = {path.name: path.read_text() for path in sorted(pathlib.Path(root).glob("*.jinja"))}
    templates = {name: source for name, source in templates.items() if re.search(r"{%[-+]?\s*generation", source)}
    folders = list(args.tokenizers)
    if args.add_tokens:
        for folder in args.tokenizers:
            tokenizer = load(folder)
            tokenizer.add_special_tokens({"additional_special_tokens": special_tokens(templates.values())})
            folders.append(args.out.parent / f"{folder.name}-more")
            tokenizer.save_pretrained(folders[-1])
    tokenizers = []
    for folder in folders:
        tokenizer = load(folder)
        special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        cases = {t: [case(tokenizer, source, name) for name in CONVERSATIONS] for t, source in templates.items()}
        relative = os.path.relpath(folder, args.out.parent)
        tokenizers.append({"folder": relative, "special": special, "cases": cases})
    result = {"now_s": NOW, "tool": TOOL, "conversations": CONVERSATIONS, "templates": templates, "tokenizers": tokenizers}
    text = json.dumps(result, ensure_ascii=False, indent=1)
    args.out.write_text(text + "\n")
    print(f"{len(templates)} templates, {len(CONVERSATIONS)} conversations, {len(tokenizers)} tokenizers")


main()

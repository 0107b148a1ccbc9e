"""Renders chat templates with Python's jinja2 as transformers sets it up, for a byte-by-byte comparison.

    make_template_goldens.py DIR OUT.json

DIR holds *.jinja files (searched recursively). Every one is rendered with every conversation below, with and without
the prompt to answer; what it writes, its `{% generation %}` spans (in characters) or the error go to OUT.json.
Needs `transformers` and `jinja2`.
"""

import json
import pathlib
import sys
from datetime import datetime

from transformers.utils import chat_template_utils as utils

NOW = 1735689599  # 2024-12-31 23:59:59 UTC


class FixedDate(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.utcfromtimestamp(NOW)


utils.datetime = FixedDate

SPECIAL = {
    "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
}

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather <now> & \"here\", caf\u00e9.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city"},
                "days": {"type": "integer", "default": 1, "enum": [1, 2.5, None, True]},
            },
            "required": ["city"],
        },
    },
}
CALL = {"id": "call00001", "type": "function",
        "function": {"name": "get_weather", "arguments": {"city": "S\u00e3o Paulo", "days": 2}}}

CONVERSATIONS = {
    "one turn": [
        {"role": "user", "content": "Hi there!"},
        {"role": "assistant", "content": "Hello, how can I help?"},
    ],
    "system": [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "  What is 2+2?\n"},
        {"role": "assistant", "content": " 4 "},
        {"role": "user", "content": "Sure? <b>\"caf\u00e9\" \U0001f642</b>"},
        {"role": "assistant", "content": "Yes.\n\nIt is 4."},
    ],
    "question": [
        {"role": "user", "content": "Why?"},
    ],
    "reasoning": [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nBecause."},
        {"role": "user", "content": "Really?"},
        {"role": "assistant", "reasoning_content": "Let me see.", "content": "Yes."},
    ],
    "tools": [
        {"role": "user", "content": "Weather in S\u00e3o Paulo?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "{\"sun\": true}"},
        {"role": "assistant", "content": "Sunny."},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "text", "text": " here"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I do."}]},
    ],
}


def cases(source):
    compiled = utils._compile_jinja_template(source)
    for name, messages in CONVERSATIONS.items():
        for prompt in (False, True):
            context = dict(messages=utils._alias_reasoning_fields(json.loads(json.dumps(messages))),
                           tools=[TOOL] if name == "tools" else None, documents=None,
                           add_generation_prompt=prompt, **SPECIAL)
            case = {"conversation": name, "prompt": prompt}
            try:
                text, spans = utils._render_with_assistant_indices(compiled_template=compiled, **context)
                case |= {"text": text, "generated": [list(s) for s in spans]}
            except Exception as e:  # whatever a template does not take
                case["error"] = f"{type(e).__name__}: {e}"
            yield case


def main():
    root, out = pathlib.Path(sys.argv[1]), sys.argv[2]
    templates = []
    for path in sorted(root.rglob("*.jinja")):
        source = path.read_text()
        try:
            entry = {"name": str(path.relative_to(root)), "template": source, "cases": list(cases(source))}
        except Exception as e:
            print(f"{path}: not compiled by jinja2: {e}")
            continue
        templates.append(entry)
    result = {"now_s": NOW, "special": SPECIAL, "tool": TOOL, "conversations": CONVERSATIONS, "templates": templates}
    pathlib.Path(out).write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    print(f"{len(templates)} templates")


main()

"""A byte-level tokenizer and a ChatML-like template: every prompt is a real prefix of the next one.

Byte b is id b + 16; the ids below 16 are the special tokens. As in real tokenizers, special tokens are
recognised wherever their text stands, so `encode(decode(ids)) == ids` for whole special tokens.
"""

from __future__ import annotations

import json
import re
from typing import Any

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
)
BYTE_OFFSET = 16
VOCAB_SIZE = BYTE_OFFSET + 256
_SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")


def encode(text: str) -> list[int]:
    """Text to ids, one per byte of UTF-8 outside special tokens."""
    ids: list[int] = []
    for piece in _SPLIT.split(text):
        if piece in SPECIAL:
            ids.append(SPECIAL.index(piece))
        else:
            ids.extend(byte + BYTE_OFFSET for byte in piece.encode())
    return ids


def token_bytes(token_id: int) -> bytes:
    """The bytes behind one id."""
    return SPECIAL[token_id].encode() if token_id < BYTE_OFFSET else bytes([token_id - BYTE_OFFSET])


def decode(ids: list[int]) -> str:
    """Ids to text; incomplete UTF-8 becomes U+FFFD."""
    return b"".join(map(token_bytes, ids)).decode(errors="replace")


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", f"[{part.get('type')}]") for part in content)
    return content or ""


def _arguments(arguments: str) -> str:
    """What a template's `tojson` makes of the arguments: parsed, written again, key order kept."""
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False)
    except ValueError:
        return arguments


def call_text(name: str, arguments: str) -> str:
    """One tool call as the model samples it (the Hermes format)."""
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'


def render(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, *, generate: bool = True
) -> str:
    """Messages and tools of a chat request as one prompt text.

    Reasoning stays in the history, and a turn ends with `<|im_end|>` and a newline, so a prompt that repeats
    an answer as it was sampled starts with that answer's own prompt and tokens.
    """
    out = []
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        out.append(f"<|im_start|>tools\n{listed}<|im_end|>\n")
    for message in messages:
        body = _text(message.get("content"))
        if message["role"] == "assistant":
            thought = message.get("reasoning") or message.get("reasoning_content")
            body = (f"<think>{thought}</think>" if thought else "") + body
            for call in message.get("tool_calls") or []:
                function = call["function"]
                body += call_text(function["name"], _arguments(function["arguments"]))
        out.append(f"<|im_start|>{message['role']}\n{body}<|im_end|>\n")
    return "".join(out) + ("<|im_start|>assistant\n" if generate else "")

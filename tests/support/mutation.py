"""Requests and streams gone wrong: changes to JSON that keep some of its structure, and to raw bytes.

All chance comes from the `Random` that is given, so a seed gives the same again.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import polar_mitm.dialects

_MAX_WORD = 40
# What Python would not write or copy itself: lists in lists, and numbers of many digits.
_DEEP = {
    "@deep100": "[" * 100 + "]" * 100,
    "@deep5000": '[{"a":' * 5000 + "1" + "}]" * 5000,
    "@open": "[" * 100_000,
    "@digits": "9" * 5000,
}
_STRANGE: list[Callable[[Random], Any]] = [
    lambda r: None,
    lambda r: r.random() < 0.5,
    lambda r: r.choice([0, 1, -1, 2, 7, 2**31, 2**53 + 1, -(2**63), 2**64, 10**30]),
    lambda r: r.choice([0.5, -0.0, 1e308, 1e-320, 1.0, float("nan"), float("inf")]),
    lambda r: r.choice(
        ["", " ", "\0", "\n", "é\u2028😀", "\ud800", "\udc00x", "a" * 5000, "{", '{"a":', "[]"]
    ),
    lambda r: r.choice(["data:image/png;base64,AA", "data:,", "http://x/y", "cG9sYXI=", "2024-01-01"]),
    lambda r: r.choice([[], {}, [[]], [None], {"": None}, {"type": None}, [{}], {"type": "text"}]),
    lambda r: r.choice(list(_DEEP)),
]
_BYTES = [
    b"",
    b"\0",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\r\n",
    b"\xff",
    b"\xed\xa0\x80",
    b"\\ud800",
]


@cache
def words() -> tuple[str, ...]:
    """What the dialects know by name: every short text in their source."""
    found = set()
    for file in Path(polar_mitm.dialects.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)  # the field of a wire model
    return tuple(sorted(word for word in found if len(word) <= _MAX_WORD and word.isprintable()))


def text(rng: Random) -> str:
    """A short text of any characters that UTF-8 has, or a word that a dialect knows."""
    if rng.random() < 0.5:
        return rng.choice(words())
    return "".join(rng.choice('ab "\\{}<>\n\t\x7fé☃😀\u2028') for _ in range(rng.randrange(12)))


def changed(value: Any, rng: Random, others: Iterable[Any] = ()) -> Any:
    """`value` with one to six changes; parts of `others` may come into it."""
    value = json.loads(json.dumps(value))
    others = list(others) or [value]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        value = _once(value, rng, others)
    return value


def _once(value: Any, rng: Random, others: list[Any]) -> Any:
    """One change, at a place that is as likely far down as at the top."""
    found = list(places(value))
    if not found:
        return _new(rng, others)
    holder, key = rng.choice(found)
    act = rng.randrange(7)
    if act == 0:
        del holder[key]
    elif act == 1 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), json.loads(json.dumps(holder[key])))
    elif act == 1:
        holder[text(rng)] = holder.pop(key)
    elif act == 2 and isinstance(holder, list):
        rng.shuffle(holder)
    elif act == 2:
        holder[rng.choice(words())] = _new(rng, others)
    elif act == 3 and isinstance(holder[key], str):
        holder[key] = _cut(holder[key], rng)
    elif act == 4:
        holder[key] = rng.choice([[holder[key]], {text(rng): holder[key]}, json.dumps(holder[key])])
    else:
        holder[key] = _new(rng, others)
    return value


def _new(rng: Random, others: list[Any]) -> Any:
    chance = rng.random()
    if chance < 0.5:
        return rng.choice(_STRANGE)(rng)
    if chance < 0.7:
        return text(rng)
    found = list(places(rng.choice(others)))
    if not found:
        return None
    holder, key = rng.choice(found)
    return json.loads(json.dumps(holder[key]))


def _cut(given: str, rng: Random) -> str:
    at = rng.randrange(len(given) + 1)
    return rng.choice((given[:at], given[at:], given[:at] + text(rng) + given[at:], given * 2))


def places(value: Any) -> Iterable[tuple[Any, Any]]:
    """Every item as what holds it and its key. Not recursive: a change may have made it deep."""
    todo = [value]
    while todo:
        holder = todo.pop()
        keys: Iterable[Any] = (
            holder if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        )
        for key in keys:
            yield holder, key
            if isinstance(holder[key], dict | list):
                todo.append(holder[key])


def written(value: Any, rng: Random) -> bytes:
    """As JSON, escaped or not: lone surrogates are then no UTF-8, and numbers may be none of JSON's."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    for name, whole in _DEEP.items() if "@" in text else ():
        text = text.replace(f'"{name}"', whole)
    return text.encode("utf-8", "surrogatepass")


def damaged(data: bytes, rng: Random) -> bytes:
    """The bytes, with one to four changes."""
    for _ in range(rng.randrange(1, 5)):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        act = rng.randrange(5)
        if act == 0:
            data = data[:at] + rng.choice(_BYTES) + data[at:]
        elif act == 1:
            data = data[:at] + rng.randbytes(rng.randrange(1, 4)) + data[at + 1 :]
        elif act == 2:
            data = data[:end]
        elif act == 3:
            data = data[:at] + data[min(end, at + 40) :]
        else:
            data = data[:end] + data[at:end][:1000] + data[end:]
    return data


def pieces(data: bytes, rng: Random) -> list[bytes]:
    """The bytes, cut at random."""
    cuts = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 1, 3, 20))))})
    return [data[a:b] for a, b in pairwise(cuts)]

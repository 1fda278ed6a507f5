"""Field by field: where a live request first differs from the recorded one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec
from msgspec import Struct

_EXCERPT = 80
_LEAD = 24


class Divergence(Struct, frozen=True):
    """One field that differs. `recorded` and `live` are excerpts, of long texts from before they part.

    `at` is the number of characters that two texts share. A field that one side lacks is `missing` (not in
    the live request) or `added`.
    """

    field: str
    kind: Literal["changed", "missing", "added", "order"]
    recorded: str = ""
    live: str = ""
    at: int | None = None


def differences(recorded: Any, live: Any, path: str = "") -> Iterator[Divergence]:
    """Every field that differs between two normalised requests, in the recorded one's order."""
    if isinstance(recorded, dict) and isinstance(live, dict):
        yield from _objects(recorded, live, path)
    elif isinstance(recorded, list) and isinstance(live, list):
        for n, (ours, theirs) in enumerate(zip(recorded, live, strict=False)):
            yield from differences(ours, theirs, f"{path}[{n}]")
        for n in range(len(live), len(recorded)):
            yield Divergence(f"{path}[{n}]", "missing", recorded=_show(recorded[n]))
        for n in range(len(recorded), len(live)):
            yield Divergence(f"{path}[{n}]", "added", live=_show(live[n]))
    elif isinstance(recorded, str) and isinstance(live, str):
        if recorded != live:
            at = _shared(recorded, live)
            start = max(0, at - _LEAD)
            yield Divergence(path, "changed", _cut(recorded, start), _cut(live, start), at)
    elif type(recorded) is not type(live) or recorded != live:  # in Python, True == 1
        yield Divergence(path, "changed", _show(recorded), _show(live))


def _objects(recorded: dict[str, Any], live: dict[str, Any], path: str) -> Iterator[Divergence]:
    for key, ours in recorded.items():
        name = f"{path}.{key}" if path else key
        if key in live:
            yield from differences(ours, live[key], name)
        else:
            yield Divergence(name, "missing", recorded=_show(ours))
    for key, theirs in live.items():
        if key not in recorded:
            yield Divergence(f"{path}.{key}" if path else key, "added", live=_show(theirs))
    if recorded.keys() == live.keys() and list(recorded) != list(live):
        yield Divergence(path, "order", ", ".join(recorded)[:_EXCERPT], ", ".join(live)[:_EXCERPT])


def _shared(a: str, b: str) -> int:
    """The length of the longest common beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return _cut(text, 0)


def _cut(text: str, start: int) -> str:
    end = start + _EXCERPT
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")

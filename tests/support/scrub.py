"""Takes out of a recorded request all that is not ours: others' prose, and what names a machine or a moment.

What stays: keys, types, numbers, tool and property names, enumerations, ids of ours. What goes, each to one
stand-in per distinct value, so that equal things stay equal:

- text with a space in it, or under a key that holds prose, becomes `Filler N stands for ...`;
- UUIDs, session ids and long hexadecimal strings become numbered ones, our call ids too; times become one
  moment, kernels one version;
- credentials become `<redacted>`.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable
from typing import Any

from polar_mitm.dialects import ids

PROSE = frozenset({"description", "text", "content", "instructions", "output", "thinking", "definition"})
"""Keys whose strings are replaced however short they are."""

FILLER = re.compile(
    r"\s*(?:<[\w -]+>)?Filler \d+ stands for \d+ characters(?:\n\n- \d+ lines, \"quoted\" and <tagged>: é\n)?"
    r"(?:</[\w -]+>)?\s*"
)
BILLING = "x-anthropic-billing-header:"
GRAMMAR = "start: TEXT\nTEXT: /[\\s\\S]+/\n"
_TAGGED = re.compile(r"\s*<([\w -]+)>.*</([\w-]+)[\w -]*>\s*", re.DOTALL)
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_HEX = re.compile(r"(?<![0-9a-f-])[0-9a-f]{32,}(?![0-9a-f-])")
_SESSION = re.compile(r"\bses_[0-9A-Za-z]{26}\b")
_KERNEL = re.compile(r"\(linux [^;)]+")
_SEAL = re.compile(r"cG9sYXI[A-Za-z0-9+/]+=*")
_SEAL_AS_BYTES = re.compile(
    r"Y0c5c1lYS[A-Za-z0-9+/]+=*"
)  # Gemini's signatures are bytes, so base64 once more
_SECRET = re.compile(r"authorization|x-api-key|x-goog-api-key", re.IGNORECASE)
_MOMENTS = ((1.5e9, 2.5e9, 1_700_000_000), (1.5e12, 2.5e12, 1_700_000_000_000))


def _is_seal(text: str) -> bool:
    return bool(_SEAL.fullmatch(text) or _SEAL_AS_BYTES.fullmatch(text))


class Scrub:
    """Scrubs one run. `said` are the texts of ours, `call_ids` our calls in order."""

    def __init__(self, said: Iterable[str], call_ids: Iterable[str]) -> None:
        self._said = frozenset(said)
        self._calls = {old: f"01JD0Z6Q3W{number:016d}" for number, old in enumerate(call_ids)}
        self._fillers: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def call_id(self, old: str) -> str:
        return self._calls[old]

    def headers(self, headers: Iterable[tuple[str, str]]) -> list[list[str]]:
        """Request headers; the length, which is that of the real body, is left out."""
        out = []
        for name, value in headers:
            if _SECRET.fullmatch(name):
                value = "<redacted>"
            elif name.lower() == "x-claude-code-prev-tool-durations":
                value = re.sub(r"=\d+", "=1", value)
            elif name.lower() == "user-agent":
                value = _KERNEL.sub("(linux 6.1.0", value)
            else:
                value = self._json_text(value) or self.names(value)
            if name.lower() != "content-length":
                out.append([name, value])
        return out

    def value(self, value: Any, key: str = "") -> Any:
        """A JSON value, by the key that it stands under."""
        if isinstance(value, dict):
            if key == "client_metadata":  # a hash map, which Codex writes in any order
                value = dict(sorted(value.items()))
            return {name: self.value(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [self.value(inner, key) for inner in value]
        if isinstance(value, str):
            return self.text(value, key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return next((type(value)(at) for low, high, at in _MOMENTS if low < value < high), value)
        return value

    def text(self, text: str, key: str = "") -> str:
        if not text or self._is_ours(text) or key in ("enum", "required"):
            return text
        if text.startswith(BILLING):
            return re.sub(r"=[^;]*", "=0", self.names(text))
        if key == "definition":
            return GRAMMAR
        if key not in PROSE:
            if structured := self._json_text(text):
                return structured
            if (len(named := self.names(text)) <= 64 and not re.search(r"\s", text)) or _is_seal(text):
                return named
        # Digits are durations and the like: no two recordings would number their fillers alike.
        return self._fillers.setdefault(re.sub(r"\d", "0", text), self._filler(text))

    def _is_ours(self, text: str) -> bool:
        """Ours is also what had come of a text when its stream broke."""
        return any(said.startswith(text) for said in self._said)

    def names(self, text: str) -> str:
        """The same text with every id in it replaced."""
        for old, new in self._calls.items():
            text = text.replace(old, new)
        text = _SEAL_AS_BYTES.sub(self._reseal_bytes, text)
        text = _SEAL.sub(self._reseal, text)
        text = _UUID.sub(lambda m: self._number(m[0], "00000000-0000-4000-8000-{:012x}"), text)
        text = _SESSION.sub(lambda m: self._number(m[0], "ses_{:026d}"), text)
        return _HEX.sub(lambda m: self._number(m[0], "{:064x}"), text)

    def _reseal(self, match: re.Match[str]) -> str:
        seal = ids.unseal(match[0])
        assert seal is not None, "a blob that begins like ours, but is not"
        return ids.seal(self._calls.get(seal.call_id, seal.call_id), seal.text)

    def _reseal_bytes(self, match: re.Match[str]) -> str:
        return b64encode(self.names(b64decode(match[0]).decode()).encode()).decode()

    def _number(self, old: str, form: str) -> str:
        return self._names.setdefault(old, form.format(len(self._names) + 1))

    def _json_text(self, text: str) -> str | None:
        """JSON inside a string, scrubbed as JSON."""
        if text[:1] not in ("{", "["):
            return None
        try:
            return json.dumps(self.value(json.loads(text)), separators=(",", ":"), ensure_ascii=False)
        except ValueError:
            return None

    def _filler(self, text: str) -> str:
        inner = f"Filler {len(self._fillers) + 1} stands for {len(text)} characters"
        if num_lines := text.strip().count("\n"):
            inner += f'\n\n- {num_lines + 1} lines, "quoted" and <tagged>: é\n'
        tagged = _TAGGED.fullmatch(text)
        if tagged and tagged[1].startswith(tagged[2]):
            inner = f"<{tagged[1]}>{inner}</{tagged[1]}>"
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        return f"{text[:start]}{inner}{text[end:]}"

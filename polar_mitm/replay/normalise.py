"""A request with what varies between two runs taken out, ready to be compared.

Ids are numbered in the order of their first appearance in the request, so that two that were equal in one run
have to be equal in the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import Struct

from polar_mitm.replay.rules import RULES, Rule
from polar_mitm.types import Wire


class Normal(Struct):
    """A request with what varies taken out. `rules` are the names of those that had something to do.

    `tree` has `method`, `host`, `path`, `body` (JSON, or text where it is none) and `headers`.
    """

    tree: dict[str, Any]
    rules: list[str]


def normalise(wire: Wire, rules: Sequence[Rule] = RULES) -> Normal:
    """The request of `wire`, ready to be compared."""
    tree = {
        "method": wire.method,
        "host": wire.host,
        "path": wire.path,
        "body": _body(wire.request_body),
        "headers": _headers(wire.request_headers),
    }
    walk = _Walk()
    walked = walk(tree, _places(tuple(rules)))
    return Normal(walked, sorted(walk.used))


def _body(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode("utf-8", "replace")


def _headers(items: list[tuple[str, str]]) -> dict[str, str]:
    """By lower-case name; a name that comes several times has its values joined (RFC 9110, section 5.3)."""
    out: dict[str, str] = {}
    for name, value in items:
        key = name.lower()
        out[key] = f"{out[key]}, {value}" if key in out else value
    return out


_GONE = object()
_SHORT = 200


class _Place:
    """Somewhere in a request: the rules that apply here, and the way on. Made once, not per request."""

    def __init__(self, active: list[tuple[Rule, tuple[str, ...]]]) -> None:
        """`active`: rules that may apply here or below, with what is left of their paths."""
        here = [rule for rule, left in active if left in ((), ("**",))]
        self.whole = [rule for rule in here if not rule.pattern]
        self.texts = [(rule, re.compile(rule.pattern, re.MULTILINE)) for rule in here if rule.pattern]
        self.any = re.compile("|".join(f"(?:{rule.pattern})" for rule, _ in self.texts), re.MULTILINE)
        self._active = [(rule, left) for rule, left in active if left]
        self._named = {part for _, left in self._active for part in left[:2]}
        self._below: dict[str, _Place] = {}
        self.idle = not active

    def below(self, key: str) -> _Place:
        """The place under a key, or under any index for `*`."""
        key = key if key in self._named else "*"
        if key not in self._below:
            self._below[key] = _Place(
                [each for rule, left in self._active for each in _step(rule, left, key)]
            )
        return self._below[key]


def _step(rule: Rule, left: tuple[str, ...], key: str) -> Iterator[tuple[Rule, tuple[str, ...]]]:
    if left[0] == "**":
        yield rule, left
        left = left[1:]
    if left and left[0] in ("*", key):
        yield rule, left[1:]


@lru_cache(maxsize=16)
def _places(rules: tuple[Rule, ...]) -> _Place:
    return _Place([(rule, tuple(rule.where.split("."))) for rule in rules])


class _Walk:
    """One walk through one request: rules apply on the way down."""

    def __init__(self) -> None:
        self.used: set[str] = set()
        self._numbers: dict[str, int] = {}

    def __call__(self, value: Any, place: _Place) -> Any:
        if place.idle:
            return value
        for rule in place.whole:
            value = self._apply(rule, value)
            if value is _GONE:
                return value
        if isinstance(value, str):
            # One look at a short text; a long one is searched faster for each pattern's beginning.
            if place.texts and (len(value) > _SHORT or place.any.search(value)):
                return self._in_text(place, value)
        elif isinstance(value, dict):
            walked = {k: self(v, place.below(k)) for k, v in value.items()}
            return {k: v for k, v in walked.items() if v is not _GONE}
        elif isinstance(value, list):
            below = place.below("*")
            return [self(v, below) for v in value]
        return value

    def _apply(self, rule: Rule, value: Any) -> Any:
        if rule.how == "unorder":
            return dict(sorted(value.items())) if isinstance(value, dict) else value
        if rule.how == "parse":
            return _body(value.encode()) if isinstance(value, str) and value[:1] in ("{", "[") else value
        self.used.add(rule.name)
        return _GONE if rule.how == "ignore" else f"<{rule.name}>"

    def _in_text(self, place: _Place, text: str) -> str:
        for rule, pattern in place.texts:
            text, times = pattern.subn(lambda found, rule=rule: self._stand_in(rule, found), text)  # type: ignore[misc]
            if times:
                self.used.add(rule.name)
        return text

    def _stand_in(self, rule: Rule, found: re.Match[str]) -> str:
        kept = found[1] if found.re.groups else ""
        if rule.how == "mask":
            return f"{kept}<{rule.name}>"
        number = self._numbers.setdefault(found[0][len(kept) :], len(self._numbers) + 1)
        return f"{kept}<id {number}>"

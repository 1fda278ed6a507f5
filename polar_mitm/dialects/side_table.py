"""Side endpoints: what hosts are asked besides model calls. The table is data, in `side/*.toml`.

`side/README.md` says how to read and extend it.
"""

from __future__ import annotations

import re
import string
import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, field

from polar_mitm.errors import UNREADABLE

FOLDER = Path(__file__).with_name("side")


class Side(Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """One entry of the table; `side/README.md` says what each key is."""

    name: str
    request: str
    status: int = 200
    answer: str = ""
    count: str = ""
    inner: tuple[str, ...] = ()
    path: str = ""
    from_header: dict[str, str] = field(default_factory=dict)
    refuse: str = ""

    @cached_property
    def _fits(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        methods, _, path = self.request.partition(" ")
        return re.compile(methods), re.compile(path)

    @cached_property
    def _template(self) -> Any:
        return msgspec.json.decode(self.answer)

    def match(self, method: str, path: str) -> dict[str, str] | None:
        """The path's named groups, where the request is this entry's; `path` is without the query."""
        methods, paths = self._fits
        if methods.fullmatch(method) and (found := paths.fullmatch(path)):
            return {name: value or "" for name, value in found.groupdict().items()}
        return None

    def body(self, values: Mapping[str, Any]) -> bytes:
        """The answer's JSON; b"" for an entry without. A key whose placeholder's value is None is left out.

        Raises:
            KeyError: a placeholder is not among `values`.
        """
        return msgspec.json.encode(_filled(self._template, values)) if self.answer else b""

    def counted(self, body: bytes) -> bytes:
        """The model call's body inside the body of a count; all of it where there is none inside."""
        try:
            given = msgspec.json.decode(body, type=dict[str, msgspec.Raw]) if self.inner else {}
        except UNREADABLE:
            return body  # a dialect says what is wrong with it
        return next((bytes(given[key]) for key in self.inner if key in given), body)

    def call_path(self, path: str, values: Mapping[str, Any]) -> str:
        """The path of the model call that a count at `path` is about."""
        return string.Template(self.path).substitute(values) if self.path else path


def _filled(template: Any, values: Mapping[str, Any]) -> Any:
    match template:
        case dict():
            filled = {key: _filled(value, values) for key, value in template.items()}
            return {key: value for key, value in filled.items() if value is not None}
        case list():
            return [_filled(value, values) for value in template]
        case str() if template.startswith("$") and template[1:] in values:
            return values[template[1:]]
        case str():
            return string.Template(template).substitute(values)
    return template


def load(folder: Path = FOLDER) -> dict[str, list[Side]]:
    """The entries by provider or host, in the order in which they are tried.

    Raises:
        ValueError: a file is no TOML, or has an entry with a key that is not known; the message names it.
    """
    table: dict[str, list[Side]] = {}
    for file in sorted(folder.glob("*.toml")):
        try:
            given = msgspec.convert(tomllib.loads(file.read_text()), dict[str, list[Side]])
        except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
            raise ValueError(f"{file.name}: {error}") from error
        for owner, entries in given.items():
            table.setdefault(owner, []).extend(entries)
    return table


SIDE = load()

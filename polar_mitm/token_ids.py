"""Token ids as the engine sent them: JSON text, until somebody wants numbers.

A prompt of 12,000 ids as Python ints costs more than everything else that is done for a call, and nobody on a
call's way from the engine to the store reads one of them: the store compares and keeps them as text too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import msgspec

_BLANKS = (b" ", b"\t", b"\r", b"\n")


class TokenIds(Sequence[int]):
    """A list of ids that is parsed when an element is asked for; its length is known at once.

    `text` is the list without brackets and blanks, such as `12,7,9`.
    """

    __slots__ = ("_ids", "_num", "text")

    def __init__(self, text: bytes) -> None:
        self.text = text
        self._ids: list[int] | None = None
        self._num: int | None = None

    @classmethod
    def from_json(cls, array: bytes) -> TokenIds:
        """From the text of a JSON array of non-negative integers.

        Raises:
            ValueError: it is something else.
        """
        text = array
        if any(blank in text for blank in _BLANKS):  # looking is ten times faster than deleting
            text = text.translate(None, b"".join(_BLANKS))
        if text[:1] != b"[" or text[1:-1].translate(None, b"0123456789,"):
            raise ValueError("token ids must be a list of non-negative integers")
        return cls(text[1:-1])

    @classmethod
    def of(cls, ids: Sequence[int]) -> TokenIds:
        """Any ids as their text."""
        return ids if isinstance(ids, TokenIds) else cls(msgspec.json.encode(list(ids))[1:-1])

    def __len__(self) -> int:
        if self._num is None:
            self._num = self.text.count(b",") + 1 if self.text else 0
        return self._num

    def __bool__(self) -> bool:
        return bool(self.text)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._numbers()[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TokenIds):
            return self.text == other.text
        return isinstance(other, Sequence) and self._numbers() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._numbers())

    def _numbers(self) -> list[int]:
        if self._ids is None:
            self._ids = msgspec.json.decode(b"[%b]" % self.text, type=list[int])
        return self._ids

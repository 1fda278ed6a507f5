"""Ids that we mint, all derived from the call's id, so that lineage can read them back.

`call_id` is 26 characters of Crockford base32 (time-ordered, unique), such as `01JD0Z6Q3W...`. What the
harness sees: `msg_<call_id>`, `resp_<call_id>`, `toolu_<call_id>_<n>`, `call_<call_id>_<n>`. A sealed
reasoning blob (`signature`, `encrypted_content`) carries the call id and, where the provider hides the text,
the text itself, so that history can be rendered again without a look-up.
"""

from __future__ import annotations

import base64
import os
import re
import time
import zlib

import msgspec

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PREFIXES = "msg|resp|toolu|call|rs|fc|ctc|cmp|req|chatcmpl"
_MINTED = re.compile(rf"(?:{_PREFIXES})_([0-9A-HJKMNP-TV-Z]{{26}})(?:_[0-9]+)?")


def new_id() -> str:
    """A new 26-character id: 48 bits of milliseconds, 80 random bits (the ULID layout, ulid/spec)."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    return _encoded(value)


def minted(prefix: str, call_id: str, index: int | None = None) -> str:
    """The id `<prefix>_<call_id>` or `<prefix>_<call_id>_<index>`."""
    return f"{prefix}_{call_id}" if index is None else f"{prefix}_{call_id}_{index}"


def call_id_of(wire_id: str) -> str | None:
    """The call id inside an id that we minted; None for anybody else's."""
    match = _MINTED.fullmatch(wire_id)
    return match.group(1) if match else None


def sibling(call_id: str, index: int) -> str:
    """The call id of answer number `index` to a request for several; number 0 is the call's own."""
    value = index
    for place, digit in enumerate(reversed(call_id)):
        value += _ALPHABET.index(digit) << 5 * place
    return _encoded(value)


def _encoded(value: int) -> str:
    return "".join(_ALPHABET[(value >> shift) & 31] for shift in range(125, -1, -5))


class Seal(msgspec.Struct, array_like=True):
    """What a sealed reasoning blob carries."""

    call_id: str
    text: str | None = None


_SEAL_HEAD = "cG9sYXI"  # base64 of "polar"


def seal(call_id: str, text: str | None = None) -> str:
    """A non-empty opaque blob for `signature` and `encrypted_content`."""
    packed = zlib.compress(msgspec.msgpack.encode(Seal(call_id, text)), 1)
    return _SEAL_HEAD + base64.b64encode(packed).decode()


def unseal(blob: str) -> Seal | None:
    """The content of a blob made by `seal`; None for anything else, however malformed."""
    if not blob.startswith(_SEAL_HEAD):
        return None
    try:
        inflater = zlib.decompressobj()
        packed = inflater.decompress(base64.b64decode(blob[len(_SEAL_HEAD) :], validate=True), 16 << 20)
        return msgspec.msgpack.decode(packed, type=Seal)
    except (ValueError, zlib.error, msgspec.MsgspecError):
        return None

"""Secrets out of recorded traffic, before it is stored. Pure functions.

What is replaced: the values of credential headers; those same values wherever else they occur in the
exchange, also in base64 or with JSON's escaped slashes; tokens of well-known shapes; credentials in query
parameters. A replacement reads
`<redacted:LENGTH:DIGEST>`, the digest being the first 8 hex digits of the secret's SHA-256, so that equal
secrets stay recognisably equal.

What is not: token ids. They are what the policy saw, so a secret inside a prompt stays in them. Nor a secret
that a stream cuts into several events, or that is spelt in another way (`\\u0073k-...`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from polar_mitm.types import Wire

_MIN_SECRET = 8
# Plural "tokens" headers are counts (rate limits).
_SECRET_HEADER = re.compile(
    r"(?:proxy-)?authorization|(?:x-)?api-key|x-goog-api-key|(?:set-)?cookie|.*token(?!s).*|.*secret.*", re.I
)
_SECRET_QUERY = re.compile(
    rb"(?<=[?&])((?:[\w.-]*(?:api[_-]?key|token|secret|password|signature))|key|auth|sig)=([^&#\s]+)", re.I
)
# A secret starts a word; in JSON text a word may follow an escape such as \n.
_START = rb"(?:(?<![A-Za-z0-9_-])|(?<=\\[nrt])|(?<=\\u[0-9A-Fa-f]{4}))"
_SHAPES = re.compile(
    _START + rb"(?:sk-[A-Za-z0-9_-]{16,}"
    rb"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    rb"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,}|xox[abeoprs]-[A-Za-z0-9-]{10,}"
    rb"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*)"
    rb'|-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY-----[^"]*?(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY-----|(?=")|\Z)'
)
# How each shape begins; for long texts, byte pairs that tell every shape but GitHub's, and how far from its
# beginning: these rule a text out in a quarter of the time.
_BEGINNINGS = re.compile(rb"sk-|gh[pousr]_|github_pat_|A[KS]IA|AIza|xox|eyJ|-----BEGIN ")
_PAIRS = {b"k-": 1, b"KI": 1, b"SI": 1, b"Iz": 1, b"xo": 0, b"yJ": 1, b"-B": 4}
_CODES = [int.from_bytes(pair, "little") for pair in _PAIRS]
_LONG = 4096


def credentials(wire: Wire) -> tuple[bytes, ...]:
    """The credential strings that the headers of an exchange carry, longest first, without their schemes."""
    found: set[str] = set()
    for name, value in (*wire.request_headers, *wire.response_headers):
        if not _is_secret(name):
            continue
        if name.lower() == "cookie":
            found.update(pair.partition("=")[2] for pair in value.split(";"))
        elif name.lower() == "set-cookie":
            found.add(value.partition(";")[0].partition("=")[2])
        else:
            scheme, _, credential = value.strip().rpartition(" ")
            found.add(credential)
            if scheme.lower() == "basic":
                found.add(_password(credential))
    secrets = {_utf8(s.strip(' "')) for s in found}
    return tuple(
        sorted((s for s in secrets if len(s) >= _MIN_SECRET and b'"' not in s), key=lambda s: (-len(s), s))
    )


def _password(basic: str) -> str:
    """The password in the credentials of HTTP's Basic scheme (RFC 7617)."""
    try:
        return base64.b64decode(basic).decode("utf-8", "replace").partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


@lru_cache(maxsize=1024)
def _spellings(secret: bytes) -> frozenset[bytes]:
    """A secret, and how else it may stand in a body."""
    encoded = base64.b64encode(secret).rstrip(b"=")
    return frozenset(
        (secret, secret.replace(b"/", b"\\/"), encoded, encoded.replace(b"+", b"-").replace(b"/", b"_"))
    )


def redact_path(path: str, known: tuple[bytes, ...]) -> str:
    """A request target without credentials in its query."""
    data = _SECRET_QUERY.sub(lambda m: m[1] + b"=" + _mark(m[2]), _utf8(path))
    return redact_body(data, known).decode("utf-8", "replace")


def redact_texts(texts: list[str | None], known: tuple[bytes, ...]) -> list[str | None]:
    """Short texts, of which most have no secret; the same list where none has."""
    joined = _utf8("\n".join(text or "" for text in texts))
    if redact_body(joined, known) is joined:
        return texts
    return [text and redact_body(_utf8(text), known).decode("utf-8", "replace") for text in texts]


def redact_headers(items: list[tuple[str, str]], known: tuple[bytes, ...]) -> list[tuple[str, str]]:
    """Headers with the values of credential headers replaced, and secrets in the others."""
    cleaned = [(n, _mark(_utf8(v)).decode()) if _is_secret(n) else (n, v) for n, v in items]
    values = _utf8("\n".join(v for _, v in cleaned))
    if redact_body(values, known) is values:
        return cleaned
    return [(n, redact_body(_utf8(v), known).decode("utf-8", "replace")) for n, v in cleaned]


def redact_body(body: bytes, known: tuple[bytes, ...]) -> bytes:
    """`body` without the `known` secrets and what looks like one; the same object when it has none."""
    for secret in known:
        for spelling in _spellings(secret):
            if spelling in body:
                body = body.replace(spelling, _mark(secret))
    out: list[bytes] = []
    done = 0
    for start in _suspects(body):
        if start >= done and (match := _SHAPES.match(body, start)):
            out += body[done:start], _mark(match[0])
            done = match.end()
    return b"".join([*out, body[done:]]) if out else body


def _suspects(body: bytes) -> list[int]:
    """Where something of a known shape may begin, in order."""
    if len(body) < _LONG:
        return [m.start() for m in _BEGINNINGS.finditer(body)]
    starts = [m.start() for m in re.finditer(rb"gh[pousr]_", body)]
    if b"github_pat_" in body:
        starts += [m.start() for m in re.finditer(rb"github_pat_", body)]
    for odd in (0, 1):
        pairs = np.frombuffer(body[odd:], "<u2", max(0, len(body) - odd) // 2)
        hit: NDArray[np.bool_] = pairs == _CODES[0]
        for code in _CODES[1:]:
            hit |= pairs == code
        for index in np.flatnonzero(hit).tolist():
            at = 2 * index + odd
            starts.append(at - _PAIRS[body[at : at + 2]])
    return sorted(start for start in starts if start >= 0)


@lru_cache(maxsize=1024)
def _is_secret(header: str) -> bool:
    return _SECRET_HEADER.fullmatch(header) is not None


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _mark(secret: bytes) -> bytes:
    return b"<redacted:%d:%s>" % (len(secret), hashlib.sha256(secret).hexdigest()[:8].encode())

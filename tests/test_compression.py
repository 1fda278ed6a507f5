"""Request bodies: every coding that a harness may use, and none that can fill the memory."""

from __future__ import annotations

import gzip
import subprocess
import sys
import zlib
from collections.abc import Callable

import brotli
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.compression import MAX_CODINGS, MAX_MEMBERS, decompress
from polar_mitm.errors import PolarError

LIMIT = 1 << 20


def raw_deflate(data: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(data) + deflater.flush()


def streamed_zstd(data: bytes) -> bytes:
    """A frame that does not say how long its content is."""
    packer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return packer.compress(data) + packer.flush()


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "deflate (raw)": raw_deflate,
    "zstd": zstandard.compress,
    "zstd (streamed)": streamed_zstd,
    "br": brotli.compress,
}
every_coding = pytest.mark.parametrize("coding", ENCODERS)


def name_of(coding: str) -> str:
    return coding.partition(" ")[0]


def kind_of(body: bytes, encoding: str, limit: int = LIMIT) -> str:
    with pytest.raises(PolarError) as caught:
        decompress(body, encoding, limit)
    return caught.value.kind


@every_coding
@given(data=st.binary(max_size=10_000))
def test_round_trip(coding: str, data: bytes) -> None:
    assert decompress(ENCODERS[coding](data), name_of(coding), LIMIT) == data


@pytest.mark.parametrize("header", ["", "identity", " , ", "Identity, identity"])
def test_identity_changes_nothing(header: str) -> None:
    assert decompress(b"body", header, 1) == b"body"


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_several_members_are_one_body(coding: str) -> None:
    pack = ENCODERS[coding]
    assert decompress(pack(b"one, ") + pack(b"") + pack(b"two"), coding, LIMIT) == b"one, two"


def test_zstd_skippable_frames_hold_nothing() -> None:
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    assert decompress(skippable + zstandard.compress(b"body") + skippable, "zstd", LIMIT) == b"body"


def test_codings_are_undone_last_first() -> None:
    body = brotli.compress(gzip.compress(zstandard.compress(b"body")))
    assert decompress(body, "ZSTD, gzip,identity, br", LIMIT) == b"body"
    assert kind_of(body, "br, gzip, zstd") == "bad_request"
    assert kind_of(body, ", ".join(["gzip"] * (MAX_CODINGS + 1))) == "bad_request"


@every_coding
@given(cut=st.integers(0, 10_000))
def test_truncated_at_any_byte(coding: str, cut: int) -> None:
    body = ENCODERS[coding](bytes(range(256)) * 4)
    assert kind_of(body[: cut % len(body)], name_of(coding)) == "bad_request"


@every_coding
def test_bytes_after_the_end(coding: str) -> None:
    assert kind_of(ENCODERS[coding](b"body") + b"more", name_of(coding)) == "bad_request"


@every_coding
@given(data=st.binary(max_size=300), cut=st.integers(0, 40))
def test_garbage_raises_nothing_but_our_error(coding: str, data: bytes, cut: int) -> None:
    body = ENCODERS[coding](b"x" * 100)
    for broken in (data, body[:cut] + data):
        try:
            decompress(broken, name_of(coding), LIMIT)
        except PolarError as error:
            assert error.kind in ("bad_request", "too_large")


@pytest.mark.parametrize("coding", ["compress", "lzma", "gzip2", "x" * 1000, "é"])
def test_unknown_codings_are_named(coding: str) -> None:
    with pytest.raises(PolarError, match=coding) as caught:
        decompress(b"body", coding, LIMIT)
    assert caught.value.kind == "bad_request"


@every_coding
def test_the_limit_is_exact(coding: str) -> None:
    body = ENCODERS[coding](bytes(5000))
    assert len(decompress(body, name_of(coding), 5000)) == 5000
    assert kind_of(body, name_of(coding), 4999) == "too_large"


def test_a_large_frame_in_one_segment_is_read() -> None:
    data = bytes(20 << 20)
    assert decompress(zstandard.compress(data), "zstd", len(data)) == data


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_endless_empty_members_are_refused(coding: str) -> None:
    assert kind_of(ENCODERS[coding](b"") * (MAX_MEMBERS + 1), coding) == "bad_request"


_BOMB = """
import resource, sys, brotli
from polar_mitm.compression import decompress
from polar_mitm.errors import PolarError
body = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decompress(body, sys.argv[1], 1 << 20)
except PolarError as error:
    print(error.kind, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def bomb(coding: str) -> bytes:
    """256 MB of zeros, a few hundred bytes to a few hundred kilobytes long."""
    block, times = bytes(1 << 20), 256
    if coding == "br":
        packer = brotli.Compressor(quality=1)
        return b"".join([*(packer.process(block) for _ in range(times)), packer.finish()])
    if coding == "zstd":
        frames = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        return b"".join([*(frames.compress(block) for _ in range(times)), frames.flush()])
    deflater = zlib.compressobj(9, wbits=31 if coding == "gzip" else 15)
    return b"".join([*(deflater.compress(block) for _ in range(times)), deflater.flush()])


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd", "br"])
def test_a_bomb_is_refused_before_it_fills_the_memory(coding: str) -> None:
    # In a process of its own: the peak of this one is already higher than what is looked for.
    command = [sys.executable, "-c", _BOMB, coding]
    result = subprocess.run(command, input=bomb(coding), capture_output=True, check=True)
    kind, kilobytes = result.stdout.split()
    assert kind == b"too_large"
    assert int(kilobytes) < 100 << 10


def test_a_bomb_inside_a_bomb_is_refused_at_the_first_step() -> None:
    inner = bomb("gzip")
    assert kind_of(gzip.compress(inner), "gzip, gzip") == "too_large"

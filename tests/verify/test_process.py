"""Scoring in another process: what is said between the two, and how it ends."""

from __future__ import annotations

import asyncio
import sys

import numpy as np
import pytest

from polar_mitm.errors import SetupError
from polar_mitm.verify import ProcessScorer, Unscorable

IDS = np.array([5, 6, 7, 8], dtype=np.int32)
SCORER = """
import struct, sys
read, write = sys.stdin.buffer.read, sys.stdout.buffer.write
write(struct.pack("=q", 100)), sys.stdout.flush()
while head := read(8):
    size, = struct.unpack("=q", head)
    ids = struct.unpack(f"={size}q", read(8 * size))
    if 99 in ids:
        sys.exit("RuntimeError: out of memory")
    if max(ids) > 99:
        message = f"id {max(ids)} – no such id".encode()
        write(struct.pack("=q", -len(message)) + message)
    else:
        write(struct.pack(f"=q{size}d", size, float("nan"), *(-i / 10 for i in ids[1:])))
    sys.stdout.flush()
"""
COMMAND = [sys.executable, "-c", SCORER]


async def test_each_id_but_the_first_has_its_logprob() -> None:
    async with ProcessScorer(COMMAND) as scorer:
        for _ in range(2):
            scores = await scorer.score(IDS)
            assert np.isnan(scores[0]) and scores[1:].tolist() == [-0.6, -0.7, -0.8]


async def test_it_goes_on_after_ids_that_cannot_be_scored() -> None:
    async with ProcessScorer(COMMAND) as scorer:
        with pytest.raises(Unscorable, match="id 100 – no such id"):
            await scorer.score(np.array([5, 100], dtype=np.int32))
        assert (await scorer.score(IDS))[1] == -0.6


async def test_many_at_once_keep_their_answers_apart() -> None:
    async with ProcessScorer(COMMAND) as scorer:
        asked = [np.array([1, n], dtype=np.int32) for n in range(2, 30)]
        found = await asyncio.gather(*map(scorer.score, asked))
    assert [f[1] for f in found] == [-n / 10 for n in range(2, 30)]


async def test_the_last_words_of_one_that_dies_are_told() -> None:
    async with ProcessScorer(COMMAND) as scorer:
        with pytest.raises(SetupError, match="out of memory"):
            await scorer.score(np.array([5, 99], dtype=np.int32))


async def test_one_that_never_gets_ready() -> None:
    with pytest.raises(SetupError, match="no such model"):
        async with ProcessScorer([sys.executable, "-c", "import sys; sys.exit('OSError: no such model')"]):
            pass
    with pytest.raises(SetupError, match="exit code 3"):
        async with ProcessScorer([sys.executable, "-c", "import os; os._exit(3)"]):
            pass


async def test_it_is_gone_afterwards() -> None:
    async with ProcessScorer(COMMAND) as scorer:
        process = scorer._process
    assert process.returncode is not None

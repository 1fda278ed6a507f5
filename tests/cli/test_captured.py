"""What is written to a captured pipe, on the loop that commands run on."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import uvloop

from polar_mitm.cli.captured import captured


@pytest.mark.parametrize("run", [uvloop.run, asyncio.run])
def test_the_end_of_what_was_written(run: object) -> None:
    async def main() -> None:
        with captured(1000) as nothing, captured(1000) as some, captured(1000) as much:
            os.write(some.fd, "caf\u00e9\xff".encode("latin-1"))
            process = await asyncio.create_subprocess_exec("seq", "300000", stdout=much.fd)
            assert await nothing.text() == ""
            assert await some.text() == "caf\ufffd\ufffd"
            printed = await much.text()
            assert await process.wait() == 0
        assert len(printed) == 1000 and printed.endswith("\n299999\n300000\n")

    run(main())  # type: ignore[operator]


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("run", [uvloop.run, asyncio.run])
def test_nothing_stays_open(run: object) -> None:
    async def main() -> None:
        before = descriptors()
        for _ in range(3):
            with captured(10) as pipe:
                os.write(pipe.fd, b"x")
                assert await pipe.text() == "x"
            with captured(10):
                pass
        assert descriptors() == before

    run(main())  # type: ignore[operator]


async def test_left_early() -> None:
    with pytest.raises(RuntimeError), captured(10) as pipe:
        raise RuntimeError
    assert pipe.fd == -1

"""Which way weights go to the engine, what is checked, which versions stay; nothing real on either side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from polar_mitm.cli.rl_sync import LORA, Sync, Via
from polar_mitm.upstream.weights import Check, Updated
from polar_mitm_trainer.samples import Sample


class FakeWorker:
    """Says what it was asked for; its logprob of an id is minus a hundredth of it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def export(self, folder: Path, *, adapter: bool = False) -> None:
        folder.mkdir(parents=True)
        self.asked.append((folder.name, adapter))

    def share(self) -> list[dict[str, Any]]:
        self.asked.append("share")
        return [{"names": ["w"]}]

    def logprobs(self, samples: list[Sample]) -> list[NDArray[np.float32]]:
        return [-each.token_ids.astype(np.float32) / 100 * each.loss_mask for each in samples]


class FakeWeights:
    def __init__(self) -> None:
        self.got: list[tuple[Any, ...]] = []
        self.check: Check | None = None

    async def update(self, folder: Path, version: str, *, check: Check | None = None) -> Updated:
        return self._took("folder", folder.name, version, check)

    async def load_lora(
        self, folder: Path, name: str, version: str, *, check: Check | None = None
    ) -> Updated:
        return self._took(name, folder.name, version, check)

    async def transfer(self, chunks: Any, version: str, *, check: Check | None = None) -> Updated:
        return self._took("memory", [chunk["names"] for chunk in chunks], version, check)

    def _took(self, *got: Any) -> Updated:
        *told, self.check = got
        self.got.append(tuple(told))
        return Updated("", 0.0)


@pytest.mark.parametrize(
    ("via", "asked", "got"),
    [
        ("folder", ("step-1", False), ("folder", "step-1", "step-1")),
        ("adapter", ("step-1", True), (LORA, "step-1", "step-1")),
        ("transfer", "share", ("memory", [["w"]], "step-1")),
    ],
)
async def test_ways(tmp_path: Path, via: Via, asked: Any, got: Any) -> None:
    worker, weights = FakeWorker(), FakeWeights()
    sync = Sync(weights, worker, tmp_path, via=via, tolerance=None)  # type: ignore[arg-type]
    await sync.update("step-1")
    assert (worker.asked, weights.got, weights.check) == ([asked], [got], None)


async def test_the_beginning_of_a_sample_is_checked(tmp_path: Path) -> None:
    weights = FakeWeights()
    sync = Sync(weights, FakeWorker(), tmp_path, via="folder", tolerance=0.1)  # type: ignore[arg-type]
    none = np.zeros(400, np.float32)
    ids = np.arange(5, 405, dtype=np.int32)
    sample = Sample("t", "r", "g", ids, none.astype(np.uint8), none, none, none)
    await sync.update("step-1", [sample])
    assert weights.check is not None and weights.check.tolerance == 0.1
    assert list(weights.check.token_ids) == list(range(5, 261))
    assert weights.check.logprobs[0] == 0.0
    assert weights.check.logprobs[1:] == pytest.approx([-n / 100 for n in range(6, 261)])
    await sync.update("step-2")
    assert list(weights.check.token_ids) == list(range(1, 33))


async def test_the_last_two_versions_are_kept(tmp_path: Path) -> None:
    sync = Sync(FakeWeights(), FakeWorker(), tmp_path, via="folder", tolerance=None)  # type: ignore[arg-type]
    (tmp_path / "initial").mkdir()
    for step in (8, 9, 10, 11):
        await sync.update(f"step-{step}")
    assert sorted(os.listdir(tmp_path)) == ["initial", "step-10", "step-11"]  # noqa: PTH208

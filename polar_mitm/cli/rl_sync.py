"""The learner's weights into the engine, each version checked against what the learner makes of some ids."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polar_mitm.upstream.weights import Check, EngineWeights, Updated

if TYPE_CHECKING:
    from polar_mitm_trainer.samples import Sample
    from polar_mitm_trainer.worker import Worker

Via = Literal["folder", "adapter", "transfer"]
LORA = "policy"
"""What the engine calls the adapter that learns."""
_NUM_IDS = 256
_FIRST_IDS = 32
_KEPT = 2


class Sync:
    """Exports to `folder`/step-N and has the engine load that; the last two versions are kept.

    Args:
        via: "folder"; "adapter", the LoRA adapter's folder alone; or "transfer", no folder, but the memory
            of a GPU that both are on.
        tolerance: nats; None: nothing is checked.
    """

    def __init__(
        self, weights: EngineWeights, worker: Worker, folder: Path, *, via: Via, tolerance: float | None
    ) -> None:
        self._weights, self._worker, self._folder = weights, worker, folder
        self._via, self._tolerance = via, tolerance

    async def update(self, version: str, samples: Sequence[Sample] = ()) -> Updated:
        """Bring the engine to the learner's weights, which are called `version`.

        Args:
            samples: what was learned from last; the first one's beginning is what is checked.

        Raises:
            WeightsError: the engine did not take them; the message says what it serves.
            SetupError: the learner has ended.
        """
        check = None
        if self._tolerance is not None:
            ids = samples[0].token_ids[:_NUM_IDS] if samples else np.arange(1, _FIRST_IDS + 1, dtype=np.int32)
            (logprobs,) = await asyncio.to_thread(self._worker.logprobs, [_whole(ids)])
            check = Check(ids.tolist(), logprobs.astype(float).tolist(), self._tolerance)
        if self._via == "transfer":
            chunks = await asyncio.to_thread(self._worker.share)
            return await self._weights.transfer(chunks, version, check=check)
        folder = self._folder / version
        await asyncio.to_thread(self._worker.export, folder, adapter=self._via == "adapter")
        if self._via == "adapter":
            updated = await self._weights.load_lora(folder, LORA, version, check=check)
        else:
            updated = await self._weights.update(folder, version, check=check)
        await asyncio.to_thread(self._prune)
        return updated

    def _prune(self) -> None:
        versions = sorted(self._folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        for old in versions[:-_KEPT]:
            shutil.rmtree(old)


def _whole(ids: Any) -> Sample:
    """A sample that asks for the logprob of every id but the first."""
    from polar_mitm_trainer.samples import Sample

    mask = np.ones(ids.size, np.uint8)
    mask[0] = 0
    none = np.zeros(ids.size, np.float32)
    return Sample("check", "check", "check", ids, mask, none, none, none)

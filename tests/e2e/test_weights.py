"""New weights for a real vLLM: it then serves exactly those, and what it refuses leaves it as it was."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest

from polar_mitm import engine
from polar_mitm.cache import default_cache
from polar_mitm.engine.build import clean_environment
from polar_mitm.errors import WeightsError
from polar_mitm.types import ModelCall
from polar_mitm.upstream.probe import probe
from polar_mitm.upstream.weights import Check, EngineWeights
from polar_mitm.verify.engine import EngineScorer
from tests.support.rig import MESSAGES, Rig, post, rig, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

IDS = [1, *range(300, 420, 3)]
CLOSE = 1e-4
"""How near float32 in the engine and in transformers are."""


@dataclass
class Served:
    """An engine of this file's own, since its weights change, and what there is to load into it."""

    state: engine.EngineState
    folder: Path
    logprobs: dict[str, list[float]]

    def check(self, name: str) -> Check:
        return Check(IDS, self.logprobs[name], CLOSE)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("weights")

    def step(text: str) -> None:
        print(text, file=sys.stderr)

    python = engine.ensure_env(default_cache(), step)
    model = engine.ensure_model(default_cache(), None, step)
    for built in (python.parent.parent, model):  # the environment and the model are shared, the server is not
        link = cache / built.relative_to(default_cache().absolute())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(built)
    made = subprocess.run(
        [python, "-P", Path(__file__).with_name("variants.py"), model, folder, *map(str, IDS)],
        stdout=subprocess.PIPE, check=True, env=clean_environment() | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    logprobs = json.loads(made.stdout.splitlines()[-1])
    try:
        state = engine.up(cache=cache, lora=8, max_model_len=8192, on_step=step)
        yield Served(state, folder, logprobs)
    finally:
        engine.down(cache)


@pytest.fixture
async def weights(served: Served) -> AsyncIterator[EngineWeights]:
    """The engine's, which are those that it was started with, called step-0."""
    async with EngineWeights(served.state.url, served.state.served_model_name) as weights:
        await weights.update(Path(served.state.model), "step-0", check=served.check("start"))
        yield weights


async def is_as_started(served: Served, weights: EngineWeights) -> None:
    """It serves what it was started with, and is not paused."""
    check = served.check("start")
    scores = await asyncio.wait_for(weights._score(served.state.served_model_name, check), 60)
    assert max(abs(a - check.logprobs[i]) for a, i in zip(scores, check.positions, strict=True)) < CLOSE
    assert await weights.version() == "step-0"


async def test_an_update_serves_exactly_the_new_weights(served: Served, weights: EngineWeights) -> None:
    for step, name in enumerate(("full-1", "full-2", "full-1"), 1):
        updated = await weights.update(served.folder / name, f"step-{step}", check=served.check(name))
        assert updated.difference is not None and updated.difference < CLOSE
        assert (await probe(served.state.url)).policy_version == f"step-{step}"


async def test_a_wrong_expectation_is_found_out_and_taken_back(
    served: Served, weights: EngineWeights
) -> None:
    with pytest.raises(WeightsError, match=r"otherwise than its trainer.* It serves step-0 again"):
        await weights.update(served.folder / "full-1", "step-1", check=served.check("full-2"))
    await is_as_started(served, weights)


async def test_refused_folders_leave_the_old_weights_serving(
    served: Served, weights: EngineWeights, tmp_path: Path
) -> None:
    tied = tmp_path / "tied"
    tied.mkdir()
    config = json.loads((served.folder / "full-1" / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (tied / "model.safetensors").symlink_to(served.folder / "full-1" / "model.safetensors")
    for folder, words in (
        (tmp_path / "nowhere", "holds no weights"),
        (served.folder / "wide", "of another shape"),
        (tied, "tied embeddings"),
    ):
        with pytest.raises(WeightsError, match=words):
            await weights.update(folder, "step-1", check=served.check("full-1"))
        await is_as_started(served, weights)


async def test_what_only_the_engine_can_refuse_is_undone(served: Served, weights: EngineWeights) -> None:
    """As where the engine is another machine: it finds no such folder, or loads half of a wrong one."""
    reload, weights._started_with = weights._reload, None

    async def elsewhere(folder: Path) -> None:
        await reload(Path("/nowhere") if folder.name == "full-1" else folder)

    weights._reload = elsewhere  # type: ignore[method-assign]
    with pytest.raises(WeightsError, match=r"with 500: .* It serves step-0, as before"):
        await weights.update(served.folder / "full-1", "step-1", check=served.check("full-1"))
    await is_as_started(served, weights)
    with pytest.raises(WeightsError, match="It serves step-0 again"):
        await weights.update(served.folder / "wide", "step-1", check=served.check("full-1"))
    await is_as_started(served, weights)


async def test_calls_in_flight_go_on_under_the_new_weights(served: Served, weights: EngineWeights) -> None:
    """Frozen, their cache computed anew: each token scores as sampled under the weights of its side."""
    calls = await across(
        served, weights, weights.update(served.folder / "full-1", "step-1", check=served.check("full-1"))
    )
    await agree_after_a_boundary(served, served.state.served_model_name, calls)


async def test_the_prefix_cache_is_not_stale(served: Served, weights: EngineWeights) -> None:
    text = "Tell me about the sea. " * 60  # several blocks of the cache
    async with rig("", engine=await probe(served.state.url), max_tokens=24) as r:
        told = r.interceptor.capture.policy_changed
        async with EngineWeights(served.state.url, served.state.served_model_name, told=told) as ours:
            await said(r, text)
            await said(r, text)
            await ours.update(served.folder / "full-2", "step-1", check=served.check("full-2"))
            await said(r, text)
        old, cached, new = r.recorder.calls
    assert cached.usage.cached_tokens > 128 and new.usage.cached_tokens == 0
    assert (cached.policy_version, new.policy_version) == ("step-0", "step-1")
    model = served.state.served_model_name
    assert await off(served, model, new) < CLOSE
    assert await off(served, model, cached) > 10 * CLOSE and list(old.prompt_token_ids) == list(
        new.prompt_token_ids
    )


async def test_adapters_update_under_one_name(served: Served, weights: EngineWeights) -> None:
    """The first is loaded before anything is captured; a rollout then has one model, and several versions."""
    await weights.load_lora(served.folder / "lora-1", "policy", "step-0", check=served.check("lora-1"))
    info = await probe(served.state.url, "policy")
    assert (info.max_model_len, info.template is not None) == (8192, True)
    load = weights.load_lora(served.folder / "lora-2", "policy", "step-1", check=served.check("lora-2"))
    calls = await across(served, weights, load, model="policy")
    assert {call.model_served for call in calls} == {"policy"}
    updated = await weights.load_lora(
        served.folder / "lora-1", "policy", "step-2", check=served.check("lora-1")
    )
    assert updated.difference is not None and updated.difference < CLOSE
    with pytest.raises(WeightsError, match="It serves step-2, as before"):
        broken = served.folder / "broken"
        broken.mkdir()
        for file in (served.folder / "lora-2").iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        config = json.loads((broken / "adapter_config.json").read_text())
        (broken / "adapter_config.json").write_text(json.dumps(config | {"r": 64}))
        await weights.load_lora(broken, "policy", "step-3", check=served.check("lora-2"))
    check = served.check("lora-1")
    scores = await weights._score("policy", check)
    assert max(abs(a - check.logprobs[i]) for a, i in zip(scores, check.positions, strict=True)) < CLOSE
    # The model that the adapters are of is what it was.
    plain = served.check("start")
    scores = await weights._score(served.state.served_model_name, plain)
    assert max(abs(a - plain.logprobs[i]) for a, i in zip(scores, plain.positions, strict=True)) < CLOSE


# --- calls ----------------------------------------------------------------------------------------------


async def across(served: Served, weights: EngineWeights, update: Any, model: str = "") -> list[ModelCall]:
    """The calls that were in flight while `update` went through, by the record; one at least."""
    async with rig("", engine=await probe(served.state.url, model), max_tokens=400) as r:
        weights._told = r.interceptor.capture.policy_changed
        box = await r.box()
        async with box.http() as http:
            asking = [
                post(http, MESSAGES, text=f"Write a long story about the number {n}.") for n in range(6)
            ]
            live = r.interceptor.chain.intercept._live  # type: ignore[attr-defined]
            await until(lambda: any(len(c._exchange.completion.completion_token_ids) > 20 for c in live))
            await update
            await asyncio.gather(*(end(one) for one in asking))
        calls = [c for c in r.recorder.calls if c.policy_version_last is not None]
    assert calls and {(c.policy_version, c.policy_version_last) for c in calls} == {("step-0", "step-1")}
    assert {c.status for c in calls} == {"ok"}
    return calls


async def end(asking: asyncio.Future[aiohttp.ClientResponse]) -> None:
    await (await asking).read()


async def said(r: Rig, text: str) -> None:
    box = await r.box(f"r{len(r.recorder.calls)}")
    async with box.http() as http:
        await end(post(http, MESSAGES, text=text))


async def differences(served: Served, model: str, call: ModelCall) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How far the recorded logprobs are from what the engine makes of these tokens now."""
    num = len(call.prompt_token_ids)
    ids = np.array([*call.prompt_token_ids, *call.completion_token_ids], dtype=np.int32)
    async with EngineScorer(served.state.url, model) as scorer:
        return np.abs((await scorer.score(ids))[num:] - np.array(call.behaviour_logprobs))


async def off(served: Served, model: str, call: ModelCall) -> float:
    return float((await differences(served, model, call)).max())


async def agree_after_a_boundary(served: Served, model: str, calls: list[ModelCall]) -> None:
    for call in calls:
        found = await differences(served, model, call)
        last_old = int(np.flatnonzero(found > CLOSE)[-1])
        assert 0 <= last_old < len(found) - 1, msgspec.json.encode(found.tolist())

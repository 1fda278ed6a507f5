"""New weights for a real vLLM: it then serves exactly those, and what it refuses leaves it as it was."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
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
from tests.support.rig import MESSAGES, Rig, ask, rig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

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
    model = served.state.served_model_name
    for call in await across(served, weights, weights.update(served.folder / "full-2", "step-1")):
        found = await differences(served, model, call)
        last_old = int(np.flatnonzero(found > CLOSE)[-1])
        assert last_old < len(found) - 1, found.tolist()


async def test_the_prefix_cache_is_not_stale(served: Served, weights: EngineWeights) -> None:
    text = "Tell me about the sea. " * 60  # several blocks of the cache
    async with rig("", engine=await probe(served.state.url), max_tokens=8) as r:
        weights._told = r.interceptor.capture.policy_changed
        hits = [await said(r, text, served), await said(r, text, served)]
        await weights.update(served.folder / "full-2", "step-1", check=served.check("full-2"))
        hits.append(await said(r, text, served))
        old, cached, new = r.recorder.calls
    assert hits[1] > 128 and hits[2] == 0
    assert [c.policy_version for c in (old, cached, new)] == ["step-0", "step-0", "step-1"]
    assert cached.prompt_token_ids == new.prompt_token_ids
    model = served.state.served_model_name
    assert (await differences(served, model, new)).max() < CLOSE
    assert (await differences(served, model, cached)).max() > 10 * CLOSE


async def test_adapters_update_under_one_name(served: Served, weights: EngineWeights) -> None:
    """The first is loaded before anything is captured; a rollout then has one model, and several versions."""
    await weights.load_lora(served.folder / "lora-1", "policy", "step-0", check=served.check("lora-1"))
    info = await probe(served.state.url, "policy")
    assert (info.max_model_len, info.template is not None) == (8192, True)
    load = weights.load_lora(served.folder / "lora-2", "policy", "step-1")
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
    async with rig("", engine=await probe(served.state.url, model), max_tokens=96) as r:
        weights._told = r.interceptor.capture.policy_changed
        box = await r.box()
        live = r.interceptor.chain.intercept._live  # type: ignore[attr-defined]
        async with box.http() as http:
            saying = [
                asyncio.ensure_future(say(http, f"Write a long story about {n} cats.")) for n in range(3)
            ]
            while not any(len(call._exchange.completion.completion_token_ids) > 4 for call in live):
                assert not all(one.done() for one in saying)
                await asyncio.sleep(0.005)
            await update
            await asyncio.gather(*saying)
        calls = [c for c in r.recorder.calls if c.policy_version_last is not None]
    assert calls and {(c.policy_version, c.policy_version_last) for c in calls} == {("step-0", "step-1")}
    assert {c.status for c in calls} == {"ok"}
    return calls


async def say(http: aiohttp.ClientSession, text: str) -> None:
    """One call, with patience."""
    async with http.post(MESSAGES, json=ask(MESSAGES, text), timeout=aiohttp.ClientTimeout(300)) as response:
        await response.read()


async def said(r: Rig, text: str, served: Served) -> float:
    """Say it in a rollout of its own; how many tokens of it came from the prefix cache."""
    box, before = await r.box(f"r{len(r.recorder.calls)}"), await hits(served.state.url)
    async with box.http() as http:
        await say(http, text)
    return await hits(served.state.url) - before


async def hits(url: str) -> float:
    """vLLM's counter of tokens found in the prefix cache."""
    async with aiohttp.ClientSession() as http, http.get(url + "/metrics") as response:
        text = await response.text()
    return sum(float(n) for n in re.findall(r"^vllm:prefix_cache_hits_total\S* (\S+)$", text, re.M))


async def differences(served: Served, model: str, call: ModelCall) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How far the recorded logprobs are from what the engine makes of these tokens now."""
    num = len(call.prompt_token_ids)
    ids = np.array([*call.prompt_token_ids, *call.completion_token_ids], dtype=np.int32)
    async with EngineScorer(served.state.url, model) as scorer:
        return np.abs((await scorer.score(ids))[num:] - np.array(call.behaviour_logprobs))

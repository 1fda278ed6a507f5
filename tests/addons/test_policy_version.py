"""Which weights sampled a call, as recorded: told by a trainer, or noticed by the watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from polar_mitm.conformance.scripts import Answer, always
from polar_mitm.types import ModelCall
from polar_mitm.upstream.engine import EngineInfo
from polar_mitm.upstream.probe import probe
from polar_mitm.upstream.weights import EngineWeights
from polar_mitm_addons import weights_watch
from tests.support.engine_bytes import events
from tests.support.held_engine import HeldEngine
from tests.support.rig import MESSAGES, Rig, ask, post, rig, until
from tests.support.updatable_engine import UpdatableEngine, checkpoint

ANSWER = Answer(text="abcdef", tokens_per_chunk=1)


def versions(call: ModelCall) -> tuple[str | None, str | None]:
    return call.policy_version, call.policy_version_last


async def sent(r: Rig) -> None:
    """What the engine has sent has been read: tokens count from their arrival."""
    call = next(iter(r.interceptor.chain.intercept._live))  # type: ignore[attr-defined]
    seen = len(call._exchange.completion.completion_token_ids)
    await until(lambda: len(call._exchange.completion.completion_token_ids) > seen)


async def played(*plan: Callable[[Rig], None] | int) -> ModelCall:
    """A call during which so many tokens come, or something happens, in turn."""
    chunks = events(ANSWER)
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, MESSAGES)
            generation = await engine.next()
            generation.send(chunks.pop(0))  # the role and the prompt's ids
            for step in plan:
                if isinstance(step, int):
                    arriving = asyncio.ensure_future(sent(r))
                    await asyncio.sleep(0)
                    generation.send(*chunks[:step])
                    del chunks[:step]
                    await arriving
                else:
                    step(r)
            generation.finish(*chunks)
            await (await asking).read()
        return r.recorder.calls[0]


def told(version: str) -> Callable[[Rig], None]:
    return lambda r: r.interceptor.capture.policy_changed(version)


async def test_a_call_under_one_set_of_weights() -> None:
    assert versions(await played(2)) == ("scripted@1", None)


async def test_a_call_that_waited_for_the_update_is_all_new() -> None:
    assert versions(await played(told("step-2"), 2)) == ("step-2", None)


async def test_a_call_across_an_update_has_both() -> None:
    assert versions(await played(2, told("step-2"), 1)) == ("scripted@1", "step-2")


async def test_a_call_across_two_updates_has_the_first_and_the_last() -> None:
    call = await played(told("step-1"), 1, told("step-2"), 1, told("step-3"), 1)
    assert versions(call) == ("step-1", "step-3")


async def test_an_update_that_was_taken_back_leaves_its_mark() -> None:
    assert versions(await played(1, told("step-2"), 1, told("scripted@1"), 1)) == ("scripted@1", "step-2")


@asynccontextmanager
async def watched(path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[UpdatableEngine, Rig]]:
    """An updatable engine, probed, and a rollout on it that is watched without patience."""
    monkeypatch.setattr(weights_watch, "PERIOD_S", 0.02)
    engine = UpdatableEngine(checkpoint(path / "start", 1.0), always(ANSWER))
    async with engine, rig("", engine=await probe(engine.url)) as r:
        yield engine, r


async def test_an_engine_that_somebody_else_updates_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(tmp_path, monkeypatch) as (engine, r):
        box = await r.box()
        async with box.http() as http:
            await (await post(http, MESSAGES)).read()
            async with EngineWeights(engine.url, engine.model) as theirs:
                await theirs.update(checkpoint(tmp_path / "new", 2.0), "step-1")
            await until(lambda: r.interceptor.engine.policy_version == "step-1")
            await (await post(http, MESSAGES)).read()
        first, second = r.recorder.calls
        assert (versions(first), versions(second)) == (("default", None), ("step-1", None))
        assert first.model_served == second.model_served == "scripted"


async def test_an_answer_that_was_overtaken_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    async def overtaken(watch: weights_watch.WeightsWatch) -> str:
        seen.append(watch._capture.policy_version())
        if len(seen) == 1:
            watch._capture.policy_changed("step-1")  # ours, while the question is under way
        return "default" if len(seen) == 1 else "step-2"

    monkeypatch.setattr(weights_watch.WeightsWatch, "_ask", overtaken)
    async with watched(tmp_path, monkeypatch) as (_, r):
        await r.box()
        await until(lambda: len(seen) == 3)
        assert seen == ["default", "step-1", "step-2"]


async def test_an_engine_that_is_gone_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(tmp_path, monkeypatch) as (engine, r):
        await r.box()
        engine.dead = True
        await asyncio.sleep(0.1)  # some questions without an answer
        engine.dead, engine.weight_version = False, "step-5"
        await until(lambda: r.interceptor.engine.policy_version == "step-5")


async def test_an_engine_whose_weights_stay_is_not_asked() -> None:
    async with HeldEngine() as engine:
        info = EngineInfo(engine.url, "scripted", policy_version="scripted@1")
        async with rig(engine.url, engine=info) as r:
            box = await r.box()
            async with box.http() as http:
                asking = asyncio.ensure_future(http.post(MESSAGES, json=ask(MESSAGES)))
                (await engine.next()).finish(*events(ANSWER))
                await (await asking).read()
            assert engine.waiting.empty() and r.interceptor.watch._task is None

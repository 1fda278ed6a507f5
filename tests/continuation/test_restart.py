"""An interceptor is killed between two calls of a rollout; the next one continues it from the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer
from polar_mitm.store import Recorder, open_reader
from polar_mitm.upstream.probe import probe
from tests.continuation.test_whole import ODD, Anthropic, exactly, session
from tests.support.rig import rig

CALL = Answer(text="I look.", tool_calls=[("Bash", ODD)])


@pytest.mark.parametrize("keep", ["template", "always"])
async def test_a_rollout_goes_on_exactly_after_a_restart(tmp_path: Path, keep: Any) -> None:
    path, messages = tmp_path / "store.duckdb", list[dict[str, Any]]()
    script = session(CALL, CALL, CALL, CALL, Answer(text="Done."))
    async with ScriptedEngine(script) as engine:
        info = await probe(engine.url)
        for number in range(5):  # an interceptor for each call
            with Recorder(path) as store:
                async with rig(engine.url, store, engine=info, keep_reasoning=keep) as r:
                    box = await r.box("r1")
                    harness = Anthropic(box)
                    harness.messages = messages
                    await (harness.results("a.txt") if number else harness.say("go"))
                    if number % 2:
                        await box.close()
    with open_reader(path) as reader:
        calls = reader.calls("r1")
        (rollout,) = reader.rollouts()
    assert [c.seq for c in calls] == list(range(5))
    assert [(c.continuation, c.fallback) for c in calls] == [("none", "first_call"), *[("exact", None)] * 4]
    assert [c.parent_call_id for c in calls[1:]] == [c.call_id for c in calls[:-1]]
    assert exactly(calls)
    assert rollout.keep_reasoning == keep


async def test_a_rollout_is_closed_and_opened_again_in_one_interceptor(tmp_path: Path) -> None:
    async with ScriptedEngine(session(CALL, Answer(text="Done."))) as engine:
        info = await probe(engine.url)
        with Recorder(tmp_path / "store.duckdb") as store:
            async with rig(engine.url, store, engine=info) as r:
                box = await r.box("r1")
                harness = Anthropic(box)
                await harness.say("go")
                await box.close()
                again = Anthropic(await r.box("r1"))
                again.messages = harness.messages
                await again.results("a.txt")
        with open_reader(tmp_path / "store.duckdb") as reader:
            assert exactly(reader.calls("r1"))
            assert [c.seq for c in reader.calls("r1")] == [0, 1]


async def test_ids_of_another_tokenizer_are_not_continued(tmp_path: Path) -> None:
    messages = list[dict[str, Any]]()
    async with ScriptedEngine(session(CALL, Answer(text="Done."))) as engine:
        info = await probe(engine.url)
        for tokenizer in ("one", "another"):
            with Recorder(tmp_path / "store.duckdb") as store:
                async with rig(engine.url, store, engine=replace(info, tokenizer=tokenizer)) as r:
                    harness = Anthropic(await r.box("r1"))
                    harness.messages = messages
                    await (harness.results("a.txt") if messages else harness.say("go"))
    with open_reader(tmp_path / "store.duckdb") as reader:
        calls = reader.calls("r1")
    assert [(c.tokenizer, c.continuation) for c in calls] == [("one", "none"), ("another", "none")]
    assert calls[1].fallback == "parent_not_usable"

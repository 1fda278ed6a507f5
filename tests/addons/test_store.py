"""The interceptor over the real store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polar_mitm.conformance.scripts import Answer
from polar_mitm.store import Recorder, open_reader
from tests.support.engine_bytes import PROMPT_IDS, events, sampled
from tests.support.held_engine import HeldEngine
from tests.support.rig import MESSAGES, RESPONSES, post, read_until, rig, says

ANSWER = Answer(text="abc", reasoning="hm", tokens_per_chunk=1)
both = pytest.mark.parametrize("url", [MESSAGES, RESPONSES], ids=["anthropic", "openai"])


@both
async def test_a_capture_can_be_read_while_it_runs_and_after(url: str, tmp_path: Path) -> None:
    path = tmp_path / "capture.duckdb"
    with Recorder(path) as recorder:
        async with HeldEngine() as engine, rig(engine.url, recorder) as r:
            box = await r.box()
            async with box.http() as http:
                asking = post(http, url, text="first")
                (await engine.next()).finish(*events(ANSWER))
                seen = await (await asking).read()
                with open_reader(path) as reader:  # the answer has ended, so its record is there
                    assert [call.status for call in reader.calls("r1")] == ["ok"]
                asking = post(http, url, text="second")
                generation = await engine.next()
                generation.send(*events(ANSWER)[:6])
                response = await asking
                await read_until(response, says("a"))
                response.close()
                await generation.hung_up()
                await http.post(url, data=b"{")
                await http.get("https://api.openai.com/v1/nope")
            await box.close()
    with open_reader(path) as reader:
        calls = reader.calls("r1", wire=True)
        (rollout,) = reader.rollouts()
        (event,) = reader.egress("r1")
    assert [call.status for call in calls] == ["ok", "cancelled", "refused"]
    first, cancelled, refused = calls
    assert list(first.prompt_token_ids) == PROMPT_IDS
    assert first.completion_token_ids == [t.token_id for t in sampled(ANSWER)]
    assert first.wire.response_body == seen and first.wire.http_version == "HTTP/1.1"
    assert json.loads(first.upstream_body)["return_token_ids"] is True
    assert first.sampling.temperature == 1.0
    assert cancelled.completion_token_ids == [t.token_id for t in sampled(ANSWER)][:5]
    assert refused.wire.request_body == b"{" and refused.wire.status == 400
    assert (rollout.status, rollout.incomplete, rollout.model) == ("completed", None, "scripted")
    assert (event.layer, event.name) == ("path", "GET api.openai.com/v1/nope")


@both
async def test_a_store_that_fails_in_the_middle_costs_no_answer(url: str, tmp_path: Path) -> None:
    alarms: list[str] = []
    recorder = Recorder(tmp_path / "capture.duckdb", on_alarm=alarms.append)
    recorder.open()
    async with HeldEngine() as engine, rig(engine.url, recorder) as r:
        box = await r.box()
        async with box.http() as http:
            for stream in (True, True, False):
                asking = post(http, url, stream=stream)
                (await engine.next()).finish(*events(ANSWER))
                response = await asking
                assert response.status == 200 and b"abc"[-1:] in await response.read()
                recorder.close()
        await box.close()
        assert box.rollout.incomplete
    assert len(alarms) == 1
    with open_reader(tmp_path / "capture.duckdb") as reader:
        assert len(reader.calls()) == 1


async def test_the_last_call_in_flight_does_not_wait_for_others_to_record(tmp_path: Path) -> None:
    with Recorder(tmp_path / "capture.duckdb", flush_interval_s=3600) as recorder:
        async with HeldEngine() as engine, rig(engine.url, recorder) as r:
            box = await r.box()
            async with box.http() as http:
                for turn in range(3):
                    asking = post(http, MESSAGES, text=f"turn {turn}", stream=turn != 1)
                    (await engine.next()).finish(*events(ANSWER))
                    await (await asking).read()
                both_asking = [post(http, MESSAGES, text=f"side {n}") for n in range(2)]
                for generation in [await engine.next(), await engine.next()]:
                    generation.finish(*events(ANSWER))
                for asking in both_asking:
                    await (await asking).read()
            assert box.session.incomplete is None and recorder.incomplete("r1") is None

"""`previous_response_id` and `store`: state that lives as long as the record, over HTTP as over WebSocket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, always
from polar_mitm.lineage import asked
from polar_mitm.store import Recorder, open_reader
from polar_mitm.types import ModelCall
from polar_mitm.upstream.probe import probe
from tests.addons.test_sdks import gpt, names_resolve_here
from tests.support.rig import RESPONSES, ask, rig
from tests.support.socket_client import connected, response_id

__all__ = ["names_resolve_here"]

ANSWER = Answer(text="abc", reasoning="Hm.")


@pytest.mark.parametrize("stream", [True, False])
async def test_the_sdk_goes_on_from_a_response(stream: bool) -> None:
    async with ScriptedEngine(always(ANSWER)) as engine, rig(engine.url) as r:
        client = gpt(await r.box())
        first = await client.responses.create(model="gpt-x", input="one")
        if stream:
            asking: dict[str, Any] = {"model": "gpt-x", "input": "two", "previous_response_id": first.id}
            async with client.responses.stream(**asking) as events:
                async for _ in events:
                    pass
                second = await events.get_final_response()
        else:
            second = await client.responses.create(
                model="gpt-x", input="two", previous_response_id=first.id, store=False
            )
        assert second.output_text == "abc"
        assert (first.previous_response_id, second.previous_response_id) == (None, first.id)
        assert (first.to_dict()["store"], second.to_dict()["store"]) == (True, stream)
        if not stream:
            with pytest.raises(openai.BadRequestError) as refused:
                await client.responses.create(model="gpt-x", input="3", previous_response_id=second.id)
            assert (refused.value.code, refused.value.param) == (
                "previous_response_not_found",
                "previous_response_id",
            )
        calls = r.recorder.calls
    assert [m["content"] for m in engine.calls[1].request["messages"]] == ["one", "abc", "two"]
    assert engine.calls[1].request["messages"][1]["reasoning"] == "Hm."
    assert calls[1].parent_call_id == calls[0].call_id


async def test_the_store_knows_it_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "store.duckdb"
    last = ""
    async with ScriptedEngine(always(ANSWER)) as engine:
        info = await probe(engine.url)
        engine.calls.clear()
        for number in range(4):  # an interceptor for each, over HTTP and over WebSocket in turn
            with Recorder(path) as store:
                async with rig(engine.url, store, engine=info) as r:
                    box = await r.box("r1")
                    more = {"previous_response_id": last} if last else {}
                    if number % 2:
                        async with connected(box) as talk:
                            last = response_id(await talk.ask(f"turn {number}", **more))
                    else:
                        body = ask(RESPONSES, f"turn {number}", stream=False, **more)
                        async with box.http() as http, http.post(RESPONSES, json=body) as response:
                            assert response.status == 200
                            last = (await response.json())["id"]
                    await box.close()
    with open_reader(path) as reader:
        calls: list[ModelCall] = reader.calls("r1", wire=True)
    assert [len(c.request["messages"]) for c in engine.calls] == [1, 3, 5, 7]
    assert [c.continuation for c in calls] == ["none", "exact", "exact", "exact"]
    assert [c.parent_call_id for c in calls[1:]] == [c.call_id for c in calls[:-1]]
    assert [len(request.messages) for _, request in asked(calls)] == [1, 3, 5, 7]
    assert [len(request.messages) for _, request in asked(calls[:1] + calls[2:])] == [1]  # a link is missing

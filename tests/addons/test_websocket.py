"""The Responses API over WebSocket: the same calls as over HTTP, in messages on one connection."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, always, sequence
from polar_mitm.types import ModelCall
from polar_mitm.upstream.probe import probe
from tests.support.engine_bytes import PROMPT_IDS, events, sampled
from tests.support.held_engine import HeldEngine
from tests.support.rig import RESPONSES, rig, settled, until
from tests.support.socket_client import connected, response_id

ANSWER = Answer(text="abc", tokens_per_chunk=1)
CALL = Answer(reasoning="Hm.", text="I look.", tool_calls=[("look", '{"at": "it"}')])
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}}


def output(answer: list[dict[str, Any]]) -> dict[str, str]:
    """What the tool says to the call in an answer."""
    (call,) = [item for item in answer[-1]["response"]["output"] if item["type"] == "function_call"]
    return {"type": "function_call_output", "call_id": call["call_id"], "output": "seen"}


@pytest.mark.parametrize("compress", [15, 0])
async def test_three_turns_on_one_connection(compress: int) -> None:
    async with ScriptedEngine(sequence(CALL, CALL, Answer(text="Done."))) as engine:
        info = await probe(engine.url)
        engine.calls.clear()
        async with rig(engine.url, engine=info) as r:
            box = await r.box()
            async with connected(box, compress=compress) as talk:
                assert talk.socket.compress == compress
                system = {"type": "message", "role": "developer", "content": "Be brief."}
                opened = await talk.ask([system], generate=False, tools=[LOOK])
                assert [e["type"].rpartition(".")[2] for e in opened] == [
                    "created",
                    "in_progress",
                    "completed",
                ]
                asked: list[Any] = [{"role": "user", "content": "go"}]
                last = opened
                for _ in range(3):
                    last = await talk.ask(asked, previous_response_id=response_id(last), tools=[LOOK])
                    asked = [output(last)] if "function_call" in str(last[-1]) else []
        warm, *calls = r.recorder.calls
    assert [c.seq for c in (warm, *calls)] == [0, 1, 2, 3]
    assert (warm.status, warm.role, warm.notes, warm.completion_token_ids) == (
        "ok",
        "auxiliary",
        ["prewarm"],
        [],
    )

    # The engine was asked with the whole history each time, and went on from the sampled ids.
    assert [len(c.request["messages"]) for c in engine.calls] == [2, 4, 6]
    assert engine.calls[-1].request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [c.continuation for c in calls] == ["none", "exact", "exact"]
    assert [c.parent_call_id for c in calls] == [None, calls[0].call_id, calls[1].call_id]
    for call, asked_of in zip(calls, engine.calls, strict=True):
        assert list(call.prompt_token_ids) == asked_of.prompt_token_ids
        assert call.completion_token_ids == asked_of.completion_token_ids
        assert len(call.behaviour_logprobs) == len(call.completion_token_ids)
        assert (call.status, call.delivered, call.stream, call.role) == ("ok", True, True, "main")


async def test_the_wire_is_recorded_as_messages() -> None:
    async with ScriptedEngine(always(ANSWER)) as engine, rig(engine.url) as r:
        box = await r.box()
        async with connected(box, headers={"x-test": "1"}) as talk:
            sent = await talk.send("héllo")
            seen = await talk.until()
        (call,) = r.recorder.calls
    wire = call.wire
    assert (call.route, call.dialect) == ("WS /v1/responses", "openai_responses")
    assert (wire.method, wire.host, wire.path, wire.status) == ("WS", "api.openai.com", "/v1/responses", 200)
    assert wire.request_body.decode() == sent and ("x-test", "1") in wire.request_headers
    assert [json.loads(line) for line in wire.response_body.splitlines()] == seen
    assert sum(wire.chunk_sizes) == len(wire.response_body) and len(wire.chunk_at_ms) == len(wire.chunk_sizes)


async def test_each_piece_can_be_read_before_the_next_and_the_last_waits_for_the_record() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        r.recorder.hold = True
        box = await r.box()
        async with connected(box) as talk:
            await talk.send()
            generation = await engine.next()
            first, *letters, end, usage, done = events(ANSWER)
            generation.send(first)
            for letter, event in zip("abc", letters, strict=True):
                generation.send(event)
                assert (await talk.until("response.output_text.delta"))[-1]["delta"] == letter
            generation.finish(end, usage, done)
            await r.recorder.until_calls(1)
            last = asyncio.ensure_future(talk.until("response.completed"))
            await settled()
            assert not last.done()
            r.recorder.held[0].set_result(True)
            assert (await last)[-1]["response"]["output"][0]["content"][0]["text"] == "abc"
        assert list(r.recorder.calls[0].prompt_token_ids) == PROMPT_IDS


@pytest.mark.parametrize("politely", [True, False])
async def test_a_client_that_leaves_ends_the_generation(politely: bool) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with connected(box) as talk:
            await talk.send()
            generation = await engine.next()
            generation.send(*events(ANSWER)[:3])
            await talk.until("response.output_text.delta")
            await talk.until("response.output_text.delta")
            if politely:
                await talk.socket.close()
            else:
                assert talk.socket._response.connection is not None
                talk.socket._response.connection.transport.abort()  # type: ignore[union-attr]
            await generation.hung_up()
            (call,) = await r.recorder.until_calls(1)
    assert (call.status, call.delivered, call.error) == ("cancelled", False, "the harness hung up")
    assert call.completion_token_ids == [t.token_id for t in sampled(ANSWER)][:2]


async def test_messages_that_come_at_once_are_answered_in_turn() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with connected(box) as talk:
            for text in ("one", "two"):
                await talk.send(text)
            for text in ("one", "two"):
                generation = await engine.next()
                assert engine.waiting.empty() and text in str(generation.body["messages"])
                generation.finish(*events(ANSWER))
                response_id(await talk.until())
        assert [c.status for c in r.recorder.calls] == ["ok", "ok"]


async def test_a_new_connection_knows_what_the_old_one_said() -> None:
    async with ScriptedEngine(always(ANSWER)) as engine, rig(engine.url) as r:
        box = await r.box()
        async with connected(box) as talk:
            first = response_id(await talk.ask("one"))
        async with connected(box) as talk:
            answer = await talk.ask("two", previous_response_id=first)
            said = answer[-1]["response"]["output"]
            full = [{"role": "user", "content": "one"}, *said, {"role": "user", "content": "three"}]
            response_id(await talk.ask(full))  # as Codex does once a connection broke
        calls = r.recorder.calls
    assert [m["content"] for m in engine.calls[1].request["messages"]] == ["one", "abc", "two"]
    assert [c.parent_call_id for c in calls] == [None, calls[0].call_id, calls[1].call_id]


async def test_what_nobody_knows_is_told_in_the_apis_words() -> None:
    async with ScriptedEngine(always(ANSWER)) as engine, rig(engine.url) as r:
        box = await r.box()
        async with connected(box) as talk:
            (refused,) = await talk.ask("two", previous_response_id="resp_1")
            assert (refused["type"], refused["status"]) == ("error", 400)
            assert refused["error"] == {
                "message": "Previous response with id 'resp_1' not found.",
                "type": "invalid_request_error",
                "param": "previous_response_id",
                "code": "previous_response_not_found",
            }
            response_id(await talk.ask("two"))  # the connection is still good
        assert [c.status for c in r.recorder.calls] == ["refused", "ok"] and len(engine.calls) == 1
        assert json.loads(r.recorder.calls[0].wire.response_body) == refused


async def test_one_rollout_does_not_know_what_another_was_told() -> None:
    async with ScriptedEngine(always(ANSWER)) as engine, rig(engine.url) as r:
        async with connected(await r.box("r1")) as talk:
            first = response_id(await talk.ask("a secret"))
        async with connected(await r.box("r2")) as talk:
            (refused,) = await talk.ask("tell", previous_response_id=first)
        assert refused["error"]["code"] == "previous_response_not_found"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (Answer(status=500), "rate_limit_exceeded"),  # Codex waits, and tries again
        (Answer(status=503), "rate_limit_exceeded"),
        (Answer(text="abcdef", tokens_per_chunk=1, break_after_tokens=3, chunk_delay_s=0.02), "server_error"),
        (
            Answer(status=400, error="This model's maximum context length is 9 tokens. You have 10."),
            "context_length_exceeded",
        ),
    ],
)
async def test_a_failure_is_a_failed_response(answer: Answer, code: str) -> None:
    if isinstance(answer.error, str):
        error = {"message": answer.error, "type": "BadRequestError", "param": "input_tokens", "code": 400}
        answer = Answer(status=400, error={"error": error})
    async with ScriptedEngine(sequence(answer, ANSWER)) as engine, rig(engine.url) as r:
        box = await r.box()
        async with connected(box) as talk:
            failed = (await talk.ask())[-1]
            assert failed["type"] == failed["response"]["object"] + ".failed" and failed["response"]["id"]
            assert failed["response"]["error"]["code"] == code
            response_id(await talk.ask())
        assert [c.status for c in r.recorder.calls] == ["failed", "ok"]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (b"{not json", "body: JSON is malformed"),
        (b'{"type":"response.create","input":"go"}', "body: Object missing required field `model`"),
        (b'{"type":"response.create","model":"m","input":[{"type":"message","role":1}]}', "input[0].role: "),
        (b'{"type":"response.create","model":"m"}', "input: there is nothing to answer"),
        (b"\xff\xfe", "body: "),
    ],
)
async def test_a_bad_message_is_told_its_field(message: bytes, said: str) -> None:
    async with ScriptedEngine(always(ANSWER)) as engine, rig(engine.url) as r:
        box = await r.box()
        async with connected(box) as talk:
            await talk.socket.send_bytes(message)
            (refused,) = await talk.until()
            assert (refused["type"], refused["status"]) == ("error", 400)
            assert refused["error"]["message"].startswith(said)
            response_id(await talk.ask())
        bad, good = r.recorder.calls
        assert (bad.status, bad.wire.request_body, bad.wire.status) == ("refused", message, 400)
        assert good.status == "ok" and len(engine.calls) == 1


async def test_other_messages_are_refused_and_recorded() -> None:
    async with ScriptedEngine(always(ANSWER)) as engine, rig(engine.url) as r:
        box = await r.box()
        async with connected(box) as talk:
            await talk.socket.send_json({"type": "session.update"})
            (refused,) = await talk.until()
            assert "'session.update'" in refused["error"]["message"]
        (event,) = await r.recorder.until_events(1)
        assert (event.verdict, event.layer, event.detail) == (
            "refused",
            "websocket",
            "message 'session.update'",
        )
        assert r.recorder.calls == [] and engine.calls == []


async def test_a_message_that_is_too_large_closes_the_connection() -> None:
    async with ScriptedEngine(always(ANSWER)) as engine, rig(engine.url, max_body_bytes=10_000) as r:
        box = await r.box()
        async with connected(box) as talk:
            response_id(await talk.ask("x" * 5_000))
            await talk.send("x" * 20_000)
            assert await talk.closed() == 1009
        assert len(r.recorder.calls) == len(engine.calls) == 1


async def test_a_silent_engine_is_bridged_with_pings_and_pings_are_answered() -> None:
    async with HeldEngine() as engine, rig(engine.url, keepalive_s=0.05) as r:
        box = await r.box()
        async with connected(box, autoping=False) as talk:
            await talk.send()
            generation = await engine.next()
            generation.send(events(ANSWER)[0])
            kinds = set[aiohttp.WSMsgType]()
            await talk.socket.ping(b"still there?")
            while kinds < {aiohttp.WSMsgType.PING, aiohttp.WSMsgType.PONG, aiohttp.WSMsgType.TEXT}:
                message = await talk.socket.receive(timeout=30)
                kinds.add(message.type)
                if message.type is aiohttp.WSMsgType.PONG:
                    assert message.data == b"still there?"
            talk.socket._autoping = True
            generation.finish(*events(ANSWER)[1:])
            response_id(await talk.until())
        assert r.recorder.calls[0].delivered


async def test_the_end_of_a_rollout_is_the_end_of_its_connections() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with connected(box) as talk, connected(box) as idle:
            await talk.send()
            generation = await engine.next()
            await box.close()
            await generation.hung_up()
            assert await talk.closed() and await idle.closed()
        assert [c.status for c in r.recorder.calls] == ["cancelled"]
        await until(lambda: not r.interceptor.chain.websockets.open)


async def test_a_call_that_breaks_us_costs_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedEngine(always(ANSWER)) as engine, rig(engine.url) as r:
        box = await r.box()
        async with connected(box) as talk:

            def breaks(*_: object) -> ModelCall:
                raise RuntimeError("a bug")

            with monkeypatch.context() as patch:
                patch.setattr("polar_mitm_addons.intercept.prewarm", breaks)
                failed = (await talk.ask())[-1]
            assert failed["response"]["error"]["code"] == "server_error"
            response_id(await talk.ask())


@pytest.mark.parametrize(
    "missing", [{"sec-websocket-version": "12"}, {"sec-websocket-key": ""}], ids=["version", "key"]
)
async def test_a_malformed_upgrade_is_turned_down(missing: dict[str, str]) -> None:
    async with rig("http://127.0.0.1:9") as r:
        box = await r.box()
        headers = {
            "upgrade": "websocket",
            "connection": "Upgrade",
            "sec-websocket-version": "13",
            "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
        } | missing
        async with box.http() as http, http.get(RESPONSES, headers=headers) as response:
            assert response.status == 426


@pytest.mark.parametrize(
    ("offer", "agreed"),
    [
        ("permessage-deflate", "permessage-deflate"),
        ("x-webkit-frame, permessage-deflate; client_max_window_bits", "client_max_window_bits=15"),
        ("permessage-deflate; server_no_context_takeover", "server_no_context_takeover"),
        ("permessage-deflate; server_max_window_bits=nonsense", None),
        ("permessage-deflate; server_max_window_bits=10", "server_max_window_bits=10"),
    ],
)
async def test_compression_is_negotiated(offer: str, agreed: str | None) -> None:
    async with rig("http://127.0.0.1:9") as r:
        box = await r.box()
        reader, writer = await box.connect("api.openai.com")
        writer.write(
            b"GET /v1/responses HTTP/1.1\r\nhost: api.openai.com\r\nupgrade: websocket\r\n"
            b"connection: Upgrade\r\nsec-websocket-version: 13\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            b"sec-websocket-extensions: " + offer.encode() + b"\r\n\r\n"
        )
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)).decode().lower()
        writer.close()
    assert head.startswith("http/1.1 101 ") and "s3pplmbitxaq9kygzzhzrbk+xoo=" in head
    assert "content-length" not in head
    found = [line for line in head.splitlines() if line.startswith("sec-websocket-extensions")]
    assert (not found) if agreed is None else (agreed in found[0])

"""A client that speaks HTTP/2 gets the same streams, hang-ups and errors."""

from __future__ import annotations

import asyncio
import json
from typing import Self

import h2.config
import h2.connection
import h2.events
import h2.settings

from polar_mitm.conformance.scripts import Answer
from tests.support.engine_bytes import events, sampled
from tests.support.held_engine import DEADLINE_S, HeldEngine
from tests.support.rig import MESSAGES, RESPONSES, Box, ask, rig

ANSWER = Answer(text="abc", tokens_per_chunk=1)


class Client:
    """An HTTP/2 connection to one host."""

    def __init__(self, box: Box, name: str = "api.anthropic.com") -> None:
        self._box, self._name = box, name
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.status: dict[int, int] = {}
        self.body: dict[int, bytes] = {}
        self.ended: set[int] = set()

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await self._box.connect(self._name, alpn=["h2"])
        ssl_object = self._writer.get_extra_info("ssl_object")
        assert ssl_object.selected_alpn_protocol() == "h2"
        self._h2.initiate_connection()
        self._flush()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._writer.close()

    def post(self, url: str, *, stream: bool = True, body: bytes | None = None) -> int:
        """Send a request; its stream's id."""
        stream_id = self._h2.get_next_available_stream_id()
        path = url.removeprefix(f"https://{self._name}")
        headers = [(":method", "POST"), (":scheme", "https"), (":authority", self._name), (":path", path)]
        self._h2.send_headers(stream_id, [*headers, ("content-type", "application/json")])
        self._h2.send_data(
            stream_id, json.dumps(ask(url, stream=stream)).encode() if body is None else body, end_stream=True
        )
        self._flush()
        return stream_id

    def reset(self, stream_id: int) -> None:
        self._h2.reset_stream(stream_id)
        self._flush()

    async def read_until(self, stream_id: int, wanted: bytes) -> bytes:
        """Read until the stream's body holds `wanted`; all of the body so far."""
        async with asyncio.timeout(DEADLINE_S):
            while wanted not in self.body.get(stream_id, b""):
                assert stream_id not in self.ended, self.body
                await self._receive()
        return self.body[stream_id]

    async def read(self, stream_id: int) -> tuple[int, bytes]:
        """Status and body of a whole answer."""
        async with asyncio.timeout(DEADLINE_S):
            while stream_id not in self.ended:
                await self._receive()
        return self.status[stream_id], self.body.get(stream_id, b"")

    async def _receive(self) -> None:
        data = await self._reader.read(65536)
        assert data, "the connection was closed"
        for event in self._h2.receive_data(data):
            match event:
                case h2.events.ResponseReceived():
                    self.status[event.stream_id] = int(dict(event.headers)[":status"])
                case h2.events.DataReceived():
                    self.body[event.stream_id] = self.body.get(event.stream_id, b"") + event.data
                    self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                case h2.events.StreamEnded():
                    self.ended.add(event.stream_id)
        self._flush()

    def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())


async def test_each_chunk_can_be_read_before_the_next_is_sent() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        async with Client(await r.box()) as client:
            asked = client.post(MESSAGES)
            generation = await engine.next()
            first, *letters, end, usage, done = events(ANSWER)
            generation.send(first)
            await client.read_until(asked, b"message_start")
            for letter, event in zip((b'"a"', b'"b"', b'"c"'), letters, strict=True):
                generation.send(event)
                await client.read_until(asked, b'"text":' + letter)
            generation.finish(end, usage, done)
            status, body = await client.read(asked)
        assert status == 200 and body.endswith(b'{"type":"message_stop"}\n\n')
        (call,) = r.recorder.calls
        assert call.wire.response_body == body and call.status == "ok"
        assert call.wire.http_version == "HTTP/2.0"


async def test_calls_side_by_side_on_one_connection() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        async with Client(await r.box(), "api.openai.com") as client:
            streamed, whole = client.post(RESPONSES), client.post(RESPONSES, stream=False)
            for _ in range(2):
                (await engine.next()).finish(*events(ANSWER))
            assert b"response.completed" in (await client.read(streamed))[1]
            assert json.loads((await client.read(whole))[1])["status"] == "completed"
        assert sorted(call.stream for call in r.recorder.calls) == [False, True]


async def test_a_reset_stream_ends_its_generation_and_no_other() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        async with Client(await r.box()) as client:
            leaving = client.post(MESSAGES)
            first = await engine.next()
            staying = client.post(MESSAGES)
            second = await engine.next()
            for generation in (first, second):
                generation.send(*events(ANSWER)[:2])
            await client.read_until(leaving, b'"text":"a"')
            client.reset(leaving)
            await first.hung_up()
            second.finish(*events(ANSWER)[2:])
            assert b"message_stop" in (await client.read(staying))[1]
        cancelled, ok = await r.recorder.until_calls(2)
        assert (cancelled.status, ok.status) == ("cancelled", "ok")
        assert cancelled.completion_token_ids == [sampled(ANSWER)[0].token_id]


async def test_a_reset_stream_that_waits_for_a_whole_answer_too() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r, Client(await r.box()) as client:
        leaving = client.post(MESSAGES, stream=False)
        generation = await engine.next()
        client.reset(leaving)
        await generation.hung_up()
        (call,) = await r.recorder.until_calls(1)
        assert call.status == "cancelled"
        again = client.post(MESSAGES)
        (await engine.next()).finish(*events(ANSWER))
        assert (await client.read(again))[0] == 200


async def test_errors() -> None:
    async with HeldEngine() as engine, rig(engine.url, max_body_bytes=1000) as r:
        async with Client(await r.box()) as client:
            assert (await client.read(client.post(MESSAGES, body=b"{")))[0] == 400
            status, body = await client.read(client.post(MESSAGES, body=b"x" * 2000))
            assert status == 413 and b"request_too_large" in body
            assert (await client.read(client.post("https://api.anthropic.com/v1/nope")))[0] == 404
            asked = client.post(MESSAGES)
            generation = await engine.next()
            generation.send(*events(ANSWER)[:2])
            await client.read_until(asked, b'"text":"a"')
            generation.break_off()
            status, body = await client.read(asked)
            assert status == 200 and b"event: error\n" in body
        assert [call.status for call in r.recorder.calls] == ["refused", "refused", "failed"]

"""kill -9 in the middle of 50 streams: what a client saw complete is in the store, with all its tokens."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from polar_mitm.conformance.scripts import Answer
from polar_mitm.store import open_reader
from polar_mitm.types import ModelCall
from tests.support.engine_bytes import PROMPT_IDS, events, sampled
from tests.support.held_engine import DEADLINE_S, Generation, HeldEngine
from tests.support.rig import MESSAGES, RESPONSES, http_at, post

NUM_ROLLOUTS = 10
NUM_STREAMS = 50
KILLED = ("interrupted", "the capture was killed", "the capture ended before the rollout did")
LAST = {MESSAGES: b"event: message_stop\n", RESPONSES: b"event: response.completed\n"}


def answer(number: int) -> Answer:
    return Answer(text=f"<answer {number}> " * 20, reasoning=f"think {number}", tokens_per_chunk=5)


@dataclass
class Client:
    """One call, and what its harness has read of the answer."""

    number: int
    url: str
    stream: bool
    asking: asyncio.Future[aiohttp.ClientResponse]
    read: bytes = b""
    whole: bool = False

    async def run(self) -> None:
        try:
            response = await self.asking
            async for chunk in response.content.iter_any():
                self.read += chunk
            self.whole = response.status == 200
        except aiohttp.ClientError:
            pass  # cut off by the kill

    @property
    def complete(self) -> bool:
        return LAST[self.url] in self.read if self.stream else self.whole


async def test_kill_9_in_the_middle_of_50_streams(tmp_path: Path) -> None:
    store = tmp_path / "capture.duckdb"
    async with HeldEngine() as engine:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.interceptor_process"),
            *(str(store), engine.url, str(NUM_ROLLOUTS)),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), DEADLINE_S)
            started = json.loads(line)
            https = [http_at(port, started["ca"].encode()) for port in started["ports"]]
            clients, generations = await ask_all(engine, https)
            runs = [asyncio.create_task(client.run()) for client in clients]
            # A third is over, and known to be; a third ends while the process dies; a third never does.
            for client in clients:
                chunks = events(answer(client.number))
                third = client.number % 3
                generations[client.number].send(*chunks[: len(chunks) // 2])
                if third == 0:
                    generations[client.number].finish(*chunks[len(chunks) // 2 :])
            await asyncio.wait_for(asyncio.gather(*runs[::3]), DEADLINE_S)
            for client in clients:
                if client.number % 3 == 1:
                    chunks = events(answer(client.number))
                    generations[client.number].finish(*chunks[len(chunks) // 2 :])
            await asyncio.wait(runs[1::3], timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            process.kill()
            await process.wait()
        await asyncio.wait_for(asyncio.gather(*runs), DEADLINE_S)
        for http in https:
            await http.close()
    complete = [client for client in clients if client.complete]
    assert {client.number for client in clients if client.number % 3 == 0} < {c.number for c in complete}
    assert all(client.number % 3 != 2 for client in complete)
    with open_reader(store) as reader:
        stored = {question(call): call for call in reader.calls(wire=True)}
        ended = {(r.status, r.stop_reason, r.incomplete) for r in reader.rollouts()}
        assert ended == {KILLED}  # streams that were cut off are lost: nobody trains on the rest
    for client in complete:
        call = stored[client.number]
        tokens = sampled(answer(client.number))
        assert call.rollout_id == f"r{client.number % NUM_ROLLOUTS}"
        assert (call.status, call.stream) == ("ok", client.stream)
        assert call.completion_token_ids == [t.token_id for t in tokens]
        assert [round(p, 5) for p in call.behaviour_logprobs] == [round(t.logprob, 5) for t in tokens]
        assert list(call.prompt_token_ids) == PROMPT_IDS
        assert call.wire.response_body == client.read


async def ask_all(
    engine: HeldEngine, https: list[aiohttp.ClientSession]
) -> tuple[list[Client], dict[int, Generation]]:
    """All calls, under way; each has reached the engine."""
    clients = []
    for number in range(NUM_STREAMS):
        url = (MESSAGES, RESPONSES)[number % 2]
        stream = number % 7 != 0
        asking = post(https[number % NUM_ROLLOUTS], url, text=f"question {number}", stream=stream)
        clients.append(Client(number, url, stream, asking))
    generations = {}
    for _ in clients:
        generation = await engine.next()
        text = str(generation.body["messages"][-1]["content"])
        generations[int(text.removeprefix("question "))] = generation
    return clients, generations


def question(call: ModelCall) -> int:
    body = json.loads(call.wire.request_body)
    text = body["input"] if "input" in body else body["messages"][0]["content"]
    return int(text.removeprefix("question "))

"""Our addons under stock mitmdump: a proxy that captures, or ends at once and says why."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

import polar_mitm_addons
from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, always, write_file_in_two_turns
from polar_mitm.store import open_reader
from polar_mitm.types import Rollout
from polar_mitm_addons.control import ControlClient
from tests.support.held_engine import DEADLINE_S, HeldEngine
from tests.support.rig import MESSAGES, ask, http_at, listen, read_until, says, trusting, until

SCRIPT = Path(polar_mitm_addons.__path__[0]) / "polar.py"
SHELL = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}


async def mitmdump(folder: Path, *options: str) -> tuple[asyncio.subprocess.Process, int]:
    """A starting mitmdump and its port; its CA and its log are in `folder`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from mitmproxy.tools.main import mitmdump; mitmdump()", "-q"]
    command += ["-s", str(SCRIPT), "--listen-host", "127.0.0.1", "--listen-port", str(port)]
    command += ["--set", f"confdir={folder}"]
    for option in options:
        command += ["--set", option]
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    return process, port


class Dump:
    """A running mitmdump."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.proxy = f"http://127.0.0.1:{port}"
        self.tls = trusting((folder / "mitmproxy-ca-cert.pem").read_bytes())
        self.store = folder / "capture.duckdb"


@asynccontextmanager
async def running(folder: Path, engine_url: str, *options: str) -> AsyncIterator[Dump]:
    """mitmdump with our addons, ready; ended in an orderly way."""
    process, port = await mitmdump(
        folder, f"polar_store={folder / 'capture.duckdb'}", f"polar_engine={engine_url}", *options
    )
    try:
        await until(lambda: (folder / "capture.duckdb").exists() or process.returncode is not None)
        assert process.returncode is None, (folder / "log").read_text()
        dump = Dump(folder, port)
        async with asyncio.timeout(DEADLINE_S), aiohttp.ClientSession(trust_env=False) as http:
            while True:  # until our addons have taken over
                url = "https://api.anthropic.com/api/hello"
                try:
                    async with http.get(url, proxy=dump.proxy, ssl=dump.tls) as response:
                        if response.status == 200:
                            break
                except aiohttp.ClientError:
                    await asyncio.sleep(0.05)
        yield dump
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), DEADLINE_S)
    assert process.returncode == 0, (folder / "log").read_text()


async def test_the_official_sdks_through_a_regular_proxy(tmp_path: Path) -> None:
    async with ScriptedEngine(write_file_in_two_turns("a.txt", "hi")) as engine:
        async with running(tmp_path, engine.url, "polar_rollout=by-hand") as dump:
            async with anthropic.AsyncAnthropic(
                api_key="any",
                http_client=anthropic.DefaultAsyncHttpxClient(
                    proxy=dump.proxy, verify=dump.tls, trust_env=False
                ),
                max_retries=0,
            ) as claude:
                async with claude.messages.stream(
                    model="claude-x",
                    max_tokens=2000,
                    messages=[{"role": "user", "content": "write it"}],
                    tools=[{"name": "Bash", "description": "run", "input_schema": SHELL}],
                ) as stream:
                    message = await stream.get_final_message()
                assert [block.type for block in message.content] == ["text", "tool_use"]
            async with openai.AsyncOpenAI(
                api_key="any",
                http_client=openai.DefaultAsyncHttpxClient(
                    proxy=dump.proxy, verify=dump.tls, trust_env=False
                ),
                max_retries=0,
            ) as gpt:
                response = await gpt.responses.create(model="gpt-x", input="hello")
                assert response.output_text == "Done."
                with pytest.raises(openai.NotFoundError):
                    await gpt.embeddings.create(model="m", input="x")
        with open_reader(dump.store) as reader:
            (rollout,) = reader.rollouts()
            calls = reader.calls("by-hand", wire=True)
            refused = [(event.layer, event.name) for event in reader.egress() if event.verdict == "refused"]
    assert (rollout.rollout_id, rollout.status, rollout.incomplete) == ("by-hand", "completed", None)
    assert [(call.dialect, call.stream, call.status) for call in calls] == [
        ("anthropic", True, "ok"),
        ("openai_responses", False, "ok"),
    ]
    sampled = {tuple(call.completion_token_ids) for call in engine.calls}
    assert all(tuple(call.completion_token_ids) in sampled for call in calls)
    assert refused == [("path", "POST api.openai.com/v1/embeddings")]


async def test_it_streams_and_lets_nothing_out(tmp_path: Path) -> None:
    async with ScriptedEngine() as engine, running(tmp_path, engine.url) as dump:
        engine.script = always(Answer(text="a" * 500, tokens_per_chunk=1, chunk_delay_s=0.05))
        async with aiohttp.ClientSession(trust_env=False) as http:
            via: Any = {"proxy": dump.proxy, "ssl": dump.tls}
            response = await http.post(MESSAGES, json=ask(MESSAGES), **via)
            await read_until(response, says("a"))
            call = engine.calls[-1]
            assert call.outcome == "running"  # the answer is read while it is being made
            response.close()
            await asyncio.wait_for(call.ended.wait(), DEADLINE_S)
            assert call.outcome == "cancelled"
            # Inside and outside of TLS, whatever the proxy is asked for.
            with pytest.raises(aiohttp.ClientError):
                await http.get("https://evil.example/", **via)
            async with http.get(f"{engine.url}/v1/models", proxy=dump.proxy) as refused:
                assert refused.status == 403
    with open_reader(dump.store) as reader:
        (call_row,) = reader.calls()
        names = {(event.layer, event.name) for event in reader.egress() if event.verdict == "refused"}
    assert call_row.status == "cancelled"
    assert call_row.completion_token_ids == call.completion_token_ids[: len(call_row.completion_token_ids)]
    assert names == {("tls", "evil.example"), ("http", "127.0.0.1")}


async def test_a_runner_hands_over_its_sandbox(tmp_path: Path) -> None:
    door = tmp_path / "control.sock"
    async with (
        ScriptedEngine(always(Answer(text="hi"))) as engine,
        running(tmp_path, engine.url, f"polar_control={door}") as dump,
    ):
        await until(door.is_socket)
        client = await asyncio.to_thread(ControlClient, door)
        assert client.ca_pem == (tmp_path / "mitmproxy-ca-cert.pem").read_bytes()
        sock, port = listen()
        with sock:
            await asyncio.to_thread(client.open, Rollout("boxed"), [sock])
        async with (
            http_at(port, client.ca_pem) as http,
            http.post(MESSAGES, json=ask(MESSAGES)) as response,
        ):
            assert b"message_stop" in await response.read()
        summary = await asyncio.to_thread(client.close, Rollout("boxed", status="completed"))
        assert (summary.num_calls, summary.incomplete) == (1, None)
    with open_reader(dump.store) as reader:
        assert [call.rollout_id for call in reader.calls()] == ["boxed"]
        assert {rollout.rollout_id: rollout.status for rollout in reader.rollouts()}["boxed"] == "completed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "polar.py needs --set polar_store=FILE and --set polar_engine=URL"),
        (["polar_store={folder}/x.duckdb"], "polar.py needs --set polar_store=FILE"),
        (["polar_engine=http://127.0.0.1:9"], "polar.py needs --set polar_store=FILE"),
        (
            ["polar_store={folder}/x.duckdb", "polar_engine=http://127.0.0.1:9"],
            "no engine answers at http://127.0.0.1:9",
        ),
        (
            ["polar_store={folder}/x", "polar_engine=http://127.0.0.1:9", "polar_config={folder}/none.toml"],
            "none.toml",
        ),
    ],
)
async def test_it_ends_when_it_cannot_capture(tmp_path: Path, options: list[str], words: str) -> None:
    process, _ = await mitmdump(tmp_path, *(option.format(folder=tmp_path) for option in options))
    assert await asyncio.wait_for(process.wait(), DEADLINE_S) == 1
    log = (tmp_path / "log").read_text()
    assert words in log
    assert "Traceback" not in log
    assert not (tmp_path / "x.duckdb").exists()


async def test_it_ends_when_the_store_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "capture.duckdb").write_text("something else")
    async with ScriptedEngine() as engine:
        options = [f"polar_store={tmp_path / 'capture.duckdb'}", f"polar_engine={engine.url}"]
        process, _ = await mitmdump(tmp_path, *options)
        assert await asyncio.wait_for(process.wait(), DEADLINE_S) == 1
    assert "capture.duckdb" in (tmp_path / "log").read_text()
    assert (tmp_path / "capture.duckdb").read_text() == "something else"


async def test_it_ends_when_its_control_socket_is_taken(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("a file")
    async with ScriptedEngine() as engine:
        store = tmp_path / "capture.duckdb"
        options = [f"polar_store={store}", f"polar_engine={engine.url}", f"polar_control={tmp_path}/precious"]
        process, _ = await mitmdump(tmp_path, *options)
        assert await asyncio.wait_for(process.wait(), DEADLINE_S) == 1
    assert "precious is in the way" in (tmp_path / "log").read_text()
    with open_reader(store) as reader:
        assert [rollout.status for rollout in reader.rollouts()] == ["completed"]


async def test_before_it_can_capture_it_is_no_open_proxy(tmp_path: Path) -> None:
    # The probe of a slow engine takes its time, and mitmproxy listens meanwhile.
    async with HeldEngine() as slow, HeldEngine() as elsewhere:
        options = [f"polar_store={tmp_path / 'capture.duckdb'}", f"polar_engine={slow.url}"]
        process, port = await mitmdump(tmp_path, *options)
        try:
            await slow.next()
            async with aiohttp.ClientSession(trust_env=False) as http:
                async with http.get(f"{elsewhere.url}/", proxy=f"http://127.0.0.1:{port}") as response:
                    assert response.status == 502
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(f"CONNECT {elsewhere.url.removeprefix('http://')} HTTP/1.1\r\n\r\n".encode())
                await writer.drain()
                writer.close()
            assert elsewhere.connections == []
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

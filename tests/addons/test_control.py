"""The door for runners: a rollout handed over, ended, abandoned, refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from polar_mitm.conformance.scripts import Answer
from polar_mitm.types import Rollout
from polar_mitm_addons import control
from polar_mitm_addons.control import MAX_REFUSED, Control, ControlClient, Request, Summary
from tests.support.engine_bytes import events
from tests.support.held_engine import HeldEngine
from tests.support.rig import MESSAGES, Box, Rig, listen, post, read_until, rig, says, settled, until

ENGINE = "http://127.0.0.1:9"
ANSWER = Answer(text="ab", tokens_per_chunk=1)


@asynccontextmanager
async def door(r: Rig, path: Path) -> AsyncIterator[Control]:
    served = Control(r.interceptor, path)
    served.start()
    try:
        yield served
    finally:
        await served.close()


async def client_of(path: Path) -> ControlClient:
    return await asyncio.to_thread(ControlClient, path)


async def hand_over(client: ControlClient, rollout: Rollout) -> int:
    """Hand over a new listener, as a sandbox's runner does; its port."""
    sock, port = listen()
    with sock:
        await asyncio.to_thread(client.open, rollout, [sock])
    return port


def box_at(r: Rig, port: int) -> Box:
    return Box(r.interceptor, None, Rollout("unused"), port)  # type: ignore[arg-type]


async def test_a_rollout_from_its_runner_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with HeldEngine() as engine, rig(engine.url) as r, door(r, path):
        client = await client_of(path)
        assert client.ca_pem == r.interceptor.ca_pem
        rollout = Rollout("r1", harness="codex", command=["codex", "exec"])
        port = await hand_over(client, rollout)
        (opened,) = r.recorder.rollouts
        assert (opened.rollout_id, opened.status, opened.harness) == ("r1", "running", "codex")
        box = box_at(r, port)
        async with box.http() as http:
            asking = post(http, MESSAGES)
            (await engine.next()).finish(*events(ANSWER))
            assert (await asking).status == 200
            with pytest.raises(OSError):
                await box.connect("evil.example")
        await r.recorder.until_events(1)
        rollout.status, rollout.exit_code = "completed", 0
        summary = await asyncio.to_thread(client.close, rollout)
        assert summary == Summary(num_calls=1, num_sampled_tokens=3, refused={"evil.example": 1})
        closed = r.recorder.rollouts[-1]
        assert (closed.status, closed.exit_code, closed.model) == ("completed", 0, "scripted")
        assert (closed.engine, closed.started_at) == (engine.url, opened.started_at)
        assert closed.ended_at and closed.ended_at >= closed.started_at > 0
        with pytest.raises(OSError):
            await box.connect(None)


async def test_a_runner_that_dies_leaves_an_interrupted_rollout(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with HeldEngine() as engine, rig(engine.url) as r, door(r, path):
        client = await client_of(path)
        box = box_at(r, await hand_over(client, Rollout("r1")))
        async with box.http() as http:
            asking = post(http, MESSAGES)
            generation = await engine.next()
            generation.send(*events(ANSWER)[:2])
            await read_until(await asking, says("a"))
            client._socket.close()
            await generation.hung_up()
        await until(lambda: len(r.recorder.rollouts) == 2)
        assert r.recorder.rollouts[-1].status == "interrupted"
        assert r.recorder.calls[0].status == "cancelled"
        with pytest.raises(OSError):
            await box.connect(None)


async def test_a_runner_that_dies_while_it_hands_over(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with rig(ENGINE) as r, door(r, path):
        for n in range(10):
            client = await client_of(path)
            sock, port = listen()
            with sock:
                body = msgspec.json.encode(Request("open", Rollout(f"r{n}")))
                socket.send_fds(client._socket, [body], [sock.fileno()])
            client._socket.close()
            await until(lambda: len(r.recorder.rollouts) == 2)
            assert [rollout.status for rollout in r.recorder.rollouts] == ["running", "interrupted"]
            r.recorder.rollouts.clear()
            with pytest.raises(OSError):
                await box_at(r, port).connect(None)


async def test_the_interceptors_end_interrupts_what_still_runs(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with rig(ENGINE) as r:
        async with door(r, path):
            client = await client_of(path)
            await hand_over(client, Rollout("r1"))
        assert r.recorder.rollouts[-1].status == "interrupted"
        assert not path.exists()
        with pytest.raises((RuntimeError, OSError)):
            await asyncio.to_thread(client.close, Rollout("r1"))


async def test_only_the_owner_may_knock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "control.sock"
    async with rig(ENGINE) as r, door(r, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        monkeypatch.setattr(control, "_peer_uid", lambda peer: os.getuid() + 1)
        with pytest.raises(RuntimeError, match="went away"):
            await client_of(path)
    assert r.recorder.rollouts == []


async def test_the_peers_uid_is_the_kernels_word() -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, two:
        assert control._peer_uid(one) == os.getuid()


async def test_one_id_cannot_be_open_twice(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with HeldEngine() as engine, rig(engine.url) as r, door(r, path):
        first, second = await client_of(path), await client_of(path)
        port = await hand_over(first, Rollout("same"))
        with pytest.raises(RuntimeError, match="rollout same is open already"):
            await hand_over(second, Rollout("same"))
        async with box_at(r, port).http() as http:
            asking = post(http, MESSAGES)
            (await engine.next()).finish(*events(ANSWER))
            assert (await asking).status == 200
        await asyncio.to_thread(first.close, Rollout("same", status="completed"))
        assert [rollout.status for rollout in r.recorder.rollouts] == ["running", "completed"]


@pytest.mark.parametrize(
    ("message", "with_socket"),
    [
        (b"not json", True),
        (b'{"op": "open"}', True),
        (b'{"op": "open", "rollout": {"rollout_id": 5}}', True),
        (b'{"op": "open", "rollout": {"rollout_id": "r1"}}', False),
        (b'{"op": "close", "rollout": {"rollout_id": "r1"}}', True),
    ],
)
async def test_nonsense_is_refused(tmp_path: Path, message: bytes, with_socket: bool) -> None:
    path = tmp_path / "control.sock"
    async with rig(ENGINE) as r, door(r, path):
        client = await client_of(path)
        sock, port = listen()
        with sock:
            socket.send_fds(client._socket, [message], [sock.fileno()] * with_socket)
            with pytest.raises(RuntimeError):
                await asyncio.to_thread(client._answer)
        assert r.recorder.rollouts == []
        await settled()
        with pytest.raises(OSError):  # nobody holds the listener any more
            await box_at(r, port).connect(None)
        await hand_over(await client_of(path), Rollout("r1"))


async def test_sockets_that_cannot_be_served_fail_the_rollout(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with rig(ENGINE) as r, door(r, path):
        client = await client_of(path)
        listener, port = listen()
        connected = socket.create_connection(("127.0.0.1", port))
        with listener, connected, pytest.raises(RuntimeError, match="Invalid argument"):
            await asyncio.to_thread(client.open, Rollout("r1"), [listener, connected])
        assert [rollout.status for rollout in r.recorder.rollouts] == ["running", "failed"]
        await hand_over(await client_of(path), Rollout("r1"))


async def test_a_summary_fits_into_a_message_whatever_was_refused(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with rig(ENGINE) as r, door(r, path):
        client = await client_of(path)
        port = await hand_over(client, Rollout("r1"))
        _, writer = await box_at(r, port).connect(None)
        await until(lambda: bool(r.interceptor.capture.clients))
        (session,) = r.interceptor.capture.clients.values()
        for n in range(2000):
            r.interceptor.capture.egress(session, "refused", "dns", f"{n}".rjust(253, "x"))
        summary = await asyncio.to_thread(client.close, Rollout("r1"))
        assert len(summary.refused) == MAX_REFUSED
        writer.close()


async def test_the_path(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with rig(ENGINE) as r:
        async with door(r, path):
            with pytest.raises(OSError, match="another interceptor is serving"):
                Control(r.interceptor, path).start()
            await hand_over(await client_of(path), Rollout("r1"))
        stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.closing(stale):
            stale.bind(str(path))
        async with door(r, path):
            await hand_over(await client_of(path), Rollout("r2"))
        path.write_text("precious")
        with pytest.raises(FileExistsError):
            Control(r.interceptor, path).start()
        assert path.read_text() == "precious"

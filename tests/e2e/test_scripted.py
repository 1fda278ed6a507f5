"""The real harnesses, in real sandboxes, made to write a file by a scripted engine."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from polar_mitm.reconstruct import build
from polar_mitm.store import open_reader
from tests.e2e.conftest import POLAR_MITM, Cli, sampled
from tests.e2e.engines import LAST_WORDS, HarnessEngine, text_of
from tests.support.record_fixtures import HARNESSES

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
REFUSED = {"opencode": {"registry.npmjs.org"}}  # it looks for a plugin
SIDE_CALLS = {"opencode": ["auxiliary"], "gemini-cli": ["auxiliary"]}  # a title; which model is to do it


@pytest.mark.parametrize("name", HARNESSES)
async def test_harness_writes_a_file(name: str, cli: Cli, tmp_path: Path) -> None:
    task, store = tmp_path / "task", tmp_path / "run.duckdb"
    task.mkdir()
    async with HarnessEngine() as engine:
        run = await cli.run("--store", store, "--engine", engine.url, command=HARNESSES[name], task=task)
        done = await run.ended()

    assert done.code == 0, done.err
    assert (task / "hello.txt").read_text() == "hi"
    with open_reader(store) as reader:
        calls = sampled(reader.calls(wire=True))
        (rollout,) = reader.rollouts()
        events = reader.egress()
    assert (rollout.status, rollout.incomplete, rollout.exit_code) == ("completed", None, 0)
    assert rollout.harness_version

    # Every token that the engine sampled for the harness is in the store, as sampled, under its own prompt.
    assert all(call.status == "ok" and call.delivered for call in calls)
    thread = [call for call in calls if call.role == "main"]
    assert len(thread) == 2
    assert [c.role for c in calls if c not in thread] == SIDE_CALLS.get(name, [])
    asked = {tuple(c.prompt_token_ids): c.completion_token_ids for c in engine.asked}
    assert {tuple(c.prompt_token_ids): c.completion_token_ids for c in calls} == asked
    assert len(asked) == len(engine.asked) == len(calls)
    assert {c.wire.method for c in calls} == {"WS" if name.startswith("codex") else "POST"}
    assert all(len(c.behaviour_logprobs) == len(c.completion_token_ids) for c in calls)

    # What it printed is what was sampled; two also print what was said before.
    printed = done.out.rstrip("\n")
    assert printed.endswith(LAST_WORDS) if name in SIDE_CALLS else printed == LAST_WORDS
    assert text_of(thread[-1].completion_token_ids) == LAST_WORDS

    # The provider's model name was asked for; ours was served.
    assert {c.model_served for c in calls} == {"scripted"}
    assert all(c.model_requested.startswith(("claude-", "gpt-", "qwen", "gemini-")) for c in calls)

    trajectories, report = build(calls, rollout=rollout)
    assert report.adds_up and report.sampled == sum(len(c.completion_token_ids) for c in calls)
    assert [t.role for t in trajectories].count("main") == 1  # two turns, one thread
    assert report.trained == sum(len(c.completion_token_ids) for c in thread)  # and no side call

    # Nothing but the provider was reachable, and each refusal carries a name.
    refused = {event.name for event in events if event.verdict == "refused"}
    assert all(refused) and REFUSED.get(name, set()) <= refused
    assert run.leftovers() == []


async def test_json_is_all_that_is_on_stdout(cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "run.duckdb"
    async with HarnessEngine() as engine:
        command = HARNESSES["claude-code"]
        run = await cli.run("--store", store, "--engine", engine.url, "--json", command=command)
        done = await run.ended()
    assert done.code == 0 and LAST_WORDS in done.err
    told = done.json()
    with open_reader(store) as reader:
        calls, events, (rollout,) = reader.calls(), reader.egress(), reader.rollouts()
    assert told["exit_code"] == 0 and told["incomplete"] is None
    assert told["rollout_id"] == rollout.rollout_id and told["version"] == rollout.harness_version
    assert told["calls"] == len(calls)
    assert told["sampled_tokens"] == sum(len(c.completion_token_ids) for c in calls)
    assert set(told["refused"]) == {e.name for e in events if e.verdict == "refused"}


async def test_any_command_has_no_way_out(cli: Cli, tmp_path: Path) -> None:
    """No packet leaves: one interface, no route but to itself, every other name refused and recorded."""
    store = tmp_path / "run.duckdb"
    script = (
        "import socket, urllib.request as u\n"
        "print(sorted(n for _, n in socket.if_nameindex()))\n"
        "for host in ('example.com', 'metadata.google.internal'):\n"
        "    try: socket.getaddrinfo(host, 443); print('resolved')\n"
        "    except OSError: print('no', host)\n"
        "for url in ('https://1.1.1.1/', 'http://169.254.169.254/latest/meta-data'):\n"
        "    try: print(u.urlopen(url, timeout=10).status)\n"
        "    except Exception as e: print('refused', url)\n"
    )
    async with HarnessEngine() as engine:
        run = await cli.run("--store", store, "--engine", engine.url, command=[sys.executable, "-c", script])
        done = await run.ended()
    assert done.out.splitlines() == [
        "['lo']",
        "no example.com",
        "no metadata.google.internal",
        "refused https://1.1.1.1/",
        "refused http://169.254.169.254/latest/meta-data",
    ], done.err
    with open_reader(store) as reader:
        refused = {(e.layer, e.name) for e in reader.egress() if e.verdict == "refused"}
    names = {name for _, name in refused}
    assert {"example.com", "metadata.google.internal", "169.254.169.254"} <= names
    assert any(name.startswith("1.1.1.1") for name in names)


async def test_what_the_caller_has_open_stays_outside(tmp_path: Path) -> None:
    """An inherited socket would be a way out, an inherited directory a way to the host's files."""
    code = "import os; print(sorted(os.listdir('/proc/self/fd')))"
    async with HarnessEngine() as engine:
        host, port = engine.url.removeprefix("http://").split(":")
        folder = os.open(tmp_path, os.O_RDONLY)
        with socket.create_connection((host, int(port))) as way_out:
            fds = [way_out.fileno(), folder]
            arguments = ["run", "--store", tmp_path / "run.duckdb", "--engine", engine.url, "--"]
            command = [POLAR_MITM, *arguments, sys.executable, "-c", code]
            run = functools.partial(subprocess.run, pass_fds=fds, capture_output=True, text=True, timeout=120)
            done = await asyncio.to_thread(run, list(map(str, command)))
        os.close(folder)
    # 3 is the listing's own.
    assert done.stdout.strip() == "['0', '1', '2', '3']", done.stderr

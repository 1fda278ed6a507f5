"""`polar-mitm up`: starts once, serves runners and scrapers, and leaves nothing behind."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from polar_mitm.store import open_reader
from tests.cli.conftest import Polar, finish, launch
from tests.cli.test_run import ASK


@contextmanager
def running(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """An `up` that has announced itself, and what it said; ended when the block ends."""
    with launch("up", "--json", *arguments) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.terminate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly(number: signal.Signals, tmp_path: Path, engine_url: str) -> None:
    store = tmp_path / "deep" / "runs.duckdb"
    with running("--store", store, "--engine", engine_url) as (process, told):
        assert told["control"] == f"{store}.sock" and told["store"] == str(store)
        assert told["engine"]["model"] == "scripted" and told["metrics"] is None
        door = Path(told["control"])
        assert door.is_socket() and door.stat().st_mode & 0o777 == 0o600
        process.send_signal(number)
        assert finish(process).code == 0
    assert [path.name for path in store.parent.iterdir()] == ["runs.duckdb"]
    with open_reader(store) as reader:
        assert reader.rollouts() == []


def test_runners_scrapers_and_readers_at_once(polar: Polar, tmp_path: Path, engine_url: str) -> None:
    store, door, port = tmp_path / "runs.duckdb", tmp_path / "door.sock", free_port()
    options = ["--store", store, "--engine", engine_url, "--control", door, "--metrics-port", port]
    with running(*options) as (process, told):
        assert told["control"] == str(door)
        ran = polar("run", "--control", door, "--json", "--", sys.executable, "-c", ASK)
        assert (ran.code, ran.json["calls"], ran.json["store"]) == (0, 1, None)

        with urllib.request.urlopen(told["metrics"]) as response:
            lines = response.read().decode().splitlines()
        assert 'polar_mitm_calls_total{dialect="anthropic",status="ok"} 1.0' in lines
        assert f'polar_mitm_tokens_total{{kind="sampled"}} {ran.json["sampled_tokens"]}.0' in lines

        listed = polar("calls", "--store", store, "--json").json  # while it is being written
        assert [c["rollout_id"] for c in listed["calls"]] == [ran.json["rollout_id"]]
        assert polar("reconstruct", "--store", store, "--json").json["accounting"]["trained"] > 0
        process.send_signal(signal.SIGTERM)
        assert finish(process).code == 0
    late = polar("run", "--control", door, "--", "true")
    assert late.code == 125 and "no interceptor answers" in late.err


def test_a_second_one_is_refused_and_leaves_no_file(polar: Polar, tmp_path: Path, engine_url: str) -> None:
    store, other, port = tmp_path / "runs.duckdb", tmp_path / "other.duckdb", free_port()
    with running("--store", store, "--engine", engine_url, "--metrics-port", port) as (process, told):
        before = sorted(tmp_path.iterdir())
        for options, message in [
            (["--store", store], f"process {process.pid} records into {store} already"),
            (["--store", other, "--control", told["control"]], "another interceptor serves"),
            (["--store", other, "--metrics-port", port], f"cannot listen on 127.0.0.1:{port}"),
        ]:
            second = polar("up", "--engine", engine_url, *options)
            assert second.code in (2, 4) and message in second.err
        assert sorted(tmp_path.iterdir()) == before


def test_a_socket_that_a_dead_one_left_is_taken_over(polar: Polar, tmp_path: Path, engine_url: str) -> None:
    store = tmp_path / "runs.duckdb"
    with running("--store", store, "--engine", engine_url) as (process, told):
        process.kill()
        process.wait()
        assert Path(told["control"]).is_socket()
    with running("--store", store, "--engine", engine_url) as (process, told):
        ran = polar("run", "--control", told["control"], "--json", "--", sys.executable, "-c", ASK)
        assert (ran.code, ran.json["calls"]) == (0, 1)


def test_rollouts_that_run_when_it_ends_are_recorded(tmp_path: Path, engine_url: str) -> None:
    store = tmp_path / "runs.duckdb"
    with running("--store", store, "--engine", engine_url) as (process, told):
        command = ["--json", "--", "sh", "-c", "echo running >&2; exec sleep 3"]
        with launch("run", "--control", told["control"], *command) as runner:
            assert runner.stderr is not None and runner.stderr.readline() == "running\n"
            process.send_signal(signal.SIGTERM)
            assert finish(process).code == 0
            ran = finish(runner)
    assert ran.code == 0  # the command's own
    assert "the interceptor was lost" in ran.json["incomplete"]
    with open_reader(store) as reader:
        assert [r.status for r in reader.rollouts()] == ["interrupted"]

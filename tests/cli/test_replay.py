"""`polar-mitm replay` with real sandboxes: what it reports, where it records, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from polar_mitm.store import open_reader
from polar_mitm.types import Rollout
from tests.cli.conftest import Polar, record, sampled

TURNS = """
import json, os, sys, urllib.request as u
history = []
for n in range(3):
    words = open("words").read() if os.path.exists("words") else "go"
    history.append({"role": "user", "content": f"{words} {n}"})
    body = {"model": "m", "max_tokens": 50, "messages": history}
    request = u.Request("https://api.anthropic.com/v1/messages", json.dumps(body).encode(),
                        {"content-type": "application/json", "x-api-key": os.environ.get("KEY", "k")})
    try:
        answer = json.load(u.urlopen(request))
    except u.HTTPError as error:
        sys.exit(json.load(error)["error"]["message"])
    print(answer["content"][0]["text"])
    history.append({"role": "assistant", "content": answer["content"]})
"""
COMMAND = [sys.executable, "-c", TURNS]


@pytest.fixture
def rollout(polar: Polar, tmp_path: Path, engine_url: str) -> dict[str, Any]:
    """A recorded rollout of three calls; what `run --json` says of it."""
    told = polar(
        "run", "--store", tmp_path / "one.duckdb", "--engine", engine_url, "--json",
        "--group", "g", "--task", "t", "--", *COMMAND,
    )  # fmt: skip
    assert (told.code, told.json["calls"]) == (0, 3), told.err
    return dict(told.json)


def replay(polar: Polar, rollout: dict[str, Any], *options: object) -> Any:
    return polar("replay", rollout["rollout_id"], "--store", rollout["store"], *options)


@pytest.mark.parametrize("fast", [(), ("--fast",)])
def test_to_the_end(fast: tuple[str, ...], polar: Polar, rollout: dict[str, Any], tmp_path: Path) -> None:
    told = replay(polar, rollout, "--json", *fast, "--env", "KEY=another")
    assert told.code == 0, told.err
    assert told.json["faithful"] and told.json["unreached"] == [] and told.json["num_served"] == 3
    assert [step["outcome"] for step in told.json["steps"]] == ["same"] * 3
    assert told.json["run"]["store"] is None and told.err.count("Done.\n") == 3
    with open_reader(Path(rollout["store"])) as reader:
        assert len(reader.rollouts()) == 1  # nothing was added to the record
    assert not list(tmp_path.glob("polar-mitm-*"))


def test_for_people(polar: Polar, rollout: dict[str, Any]) -> None:
    told = replay(polar, rollout, "--fast")
    assert told.code == 0 and "reached the end without divergence" in told.out
    assert told.out.count("  same") == 3 and "Done." not in told.out


def test_where_it_first_differs(polar: Polar, rollout: dict[str, Any], tmp_path: Path) -> None:
    """The task's file says something else: each request differs, and first in its first message."""
    task = tmp_path / "task"
    task.mkdir()
    (task / "words").write_text("stop")
    told = replay(polar, rollout, "--fast", "--json", "--task-dir", task)
    assert told.code == 1 and not told.json["faithful"]
    assert [step["outcome"] for step in told.json["steps"]] == ["diverged"] * 3
    assert [step["num_divergences"] for step in told.json["steps"]] == [1, 2, 3]
    for step in told.json["steps"]:
        first = step["divergences"][0]
        assert (first["field"], first["at"]) == ("body.messages[0].content", 0)
        assert (first["recorded"], first["live"]) == ("go 0", "stop 0")
    people = replay(polar, rollout, "--fast", "--task-dir", task)
    assert "body.messages[0].content changed: 'go 0' -> 'stop 0'" in people.out


def test_another_command(polar: Polar, rollout: dict[str, Any]) -> None:
    """One that asks for something else is told so, one that asks less leaves calls unreached."""
    strange = TURNS.replace('"model": "m"', '"model": "n"')
    told = replay(polar, rollout, "--fast", "--json", "--", sys.executable, "-c", strange)
    assert told.code == 1 and [step["outcome"] for step in told.json["steps"]] == ["unmatched"]
    assert told.json["steps"][0]["divergences"][0]["field"] == "body.model"
    assert "polar-mitm replay" in told.err and told.json["exit_code"] == 1

    short = TURNS.replace("range(3)", "range(2)")
    told = replay(polar, rollout, "--fast", "--json", "--", sys.executable, "-c", short)
    assert told.code == 1 and len(told.json["unreached"]) == 1
    assert "did not reach the end" in replay(polar, rollout, "--fast", "--", "true").out


def test_the_harness_ends_otherwise(polar: Polar, rollout: dict[str, Any]) -> None:
    other = TURNS + "sys.exit(3)"
    told = replay(polar, rollout, "--fast", "--json", "--", sys.executable, "-c", other)
    assert (told.code, told.json["exit_code"], told.json["recorded_exit_code"]) == (1, 3, 0)
    assert [step["outcome"] for step in told.json["steps"]] == ["same"] * 3


def test_recorded_where_asked(polar: Polar, rollout: dict[str, Any], tmp_path: Path) -> None:
    told = replay(polar, rollout, "--fast", "--json", "--out", tmp_path / "again.duckdb")
    assert told.code == 0 and told.json["run"]["store"] == str(tmp_path / "again.duckdb")
    with open_reader(Path(rollout["store"])) as reader:
        before = reader.calls(wire=True)
    with open_reader(tmp_path / "again.duckdb") as reader:
        again, (fresh,) = reader.calls(wire=True), reader.rollouts()
    assert fresh.rollout_id != rollout["rollout_id"] and fresh.group_id is None
    assert [call.replayed_from for call in again] == [call.call_id for call in before]
    assert [call.completion_token_ids for call in again] == [call.completion_token_ids for call in before]
    assert [call.wire.response_body for call in again] == [call.wire.response_body for call in before]
    built = polar("reconstruct", "--store", tmp_path / "again.duckdb", "--json")
    assert built.code == 0
    report = built.json["rollouts"][0]["report"]
    assert report["trained"] == 0 and report["masked"] == {"replayed": report["sampled"]}


def test_a_fork(polar: Polar, rollout: dict[str, Any], engine_url: str) -> None:
    """A new rollout of the same group, in the same store: replayed calls, then live ones on their tokens."""
    with open_reader(Path(rollout["store"])) as reader:
        before = reader.calls()
    at = before[2].call_id
    told = replay(polar, rollout, "--fast", "--json", "--fork-at", at[-8:], "--engine", engine_url)
    assert told.code == 0, told.err
    assert [step["outcome"] for step in told.json["steps"]] == ["same", "same", "live"]
    assert told.json["forked"] and told.json["fork"]["continuation"] == "exact"
    with open_reader(Path(rollout["store"])) as reader:
        (fork,) = [r for r in reader.rollouts() if r.rollout_id == told.json["run"]["rollout_id"]]
        calls = reader.calls(fork.rollout_id)
    assert fork.forked_from == f"{rollout['rollout_id']}/{at}"
    assert (fork.group_id, fork.task_id, fork.sample_index, fork.incomplete) == ("g", "t", 1, None)
    assert [call.replayed_from for call in calls] == [before[0].call_id, before[1].call_id, None]
    # The live prompt begins with exactly what was recorded.
    parent, live = calls[1], calls[2]
    assert live.parent_call_id == parent.call_id
    prefix = [*before[1].prompt_token_ids, *before[1].completion_token_ids]
    assert list(live.prompt_token_ids)[: len(prefix)] == prefix
    built = polar("reconstruct", "--store", rollout["store"], "--rollout", fork.rollout_id, "--json")
    report = built.json["rollouts"][0]["report"]
    assert report["trained"] == len(live.completion_token_ids)
    assert report["masked"] == {"replayed": report["sampled"] - report["trained"]}


def test_a_fork_samples_as_its_group_did(polar: Polar, tmp_path: Path, engine_url: str) -> None:
    (tmp_path / "hot.toml").write_text("temperature = 0.25\ntop_k = 7\n")
    options = ["--store", tmp_path / "hot.duckdb", "--engine", engine_url, "--json"]
    hot = ["--config", tmp_path / "hot.toml", "--max-tokens", 30]
    told = polar("run", *options, *hot, "--", *COMMAND)
    with open_reader(tmp_path / "hot.duckdb") as reader:
        before = reader.calls()
    forked = polar("replay", told.json["rollout_id"], *options, "--fast", "--fork-at", before[1].call_id)
    assert forked.code == 0, forked.err
    with open_reader(tmp_path / "hot.duckdb") as reader:
        fork = reader.calls(forked.json["run"]["rollout_id"])
    assert [call.sampling for call in fork] == [call.sampling for call in before]
    assert before[1].sampling.max_tokens == 30 and before[1].sampling.temperature == 0.25


def test_a_fork_can_be_replayed_and_forked(polar: Polar, rollout: dict[str, Any], engine_url: str) -> None:
    """Its answers carry the first rollout's ids, and are found by them."""
    with open_reader(Path(rollout["store"])) as reader:
        before = reader.calls()
    options = ["--fast", "--json", "--engine", engine_url]
    fork = replay(polar, rollout, *options, "--fork-at", before[1].call_id).json["run"]
    assert replay(polar, fork, "--fast").code == 0
    with open_reader(Path(rollout["store"])) as reader:
        calls = reader.calls(fork["rollout_id"])
    again = replay(polar, fork, *options, "--fork-at", calls[2].call_id)
    assert again.code == 0 and again.json["fork"]["continuation"] == "exact", again.json
    with open_reader(Path(rollout["store"])) as reader:
        newest = reader.calls(again.json["run"]["rollout_id"])
        assert [each.sample_index for each in reader.rollouts()] == [0, 1, 2]
    assert [call.replayed_from for call in newest] == [before[0].call_id, calls[1].call_id, None]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--engine", "http://127.0.0.1:9"], "--fork-at"),
        (["--fork-at", "nothing"], "is no call"),
        (["--task-dir", "/no/such/directory"], "not a directory"),
        (["--out", "/"], "is a directory"),
        (["--env", "NAME"], "NAME=VALUE"),
    ],
)
def test_what_is_refused(options: list[str], what: str, polar: Polar, store: Path) -> None:
    told = polar("replay", "rollout-A", "--store", store, *options)
    assert told.code == 2 and what in told.err


def test_what_is_not_there(polar: Polar, store: Path, tmp_path: Path) -> None:
    assert polar("replay", "rollout-X", "--store", store).code == 2
    assert polar("replay", "rollout-A", "--store", tmp_path / "none.duckdb").code == 2
    record(tmp_path / "empty.duckdb", [Rollout("R", status="completed")], [], [])
    told = polar("replay", "R", "--store", tmp_path / "empty.duckdb")
    assert told.code == 2 and "nothing to replay" in told.err


def test_another_tokenizer_is_refused(polar: Polar, tmp_path: Path, engine_url: str) -> None:
    path = tmp_path / "other.duckdb"
    call = sampled("R", 0, 10, 4, tokenizer="of another model")
    record(path, [Rollout("R", status="completed", command=["true"])], [call], [])
    told = polar("replay", "R", "--store", path, "--fork-at", call.call_id, "--engine", engine_url)
    assert told.code == 3 and "tokenizer" in told.err

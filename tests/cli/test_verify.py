"""`polar-mitm verify`, as far as it needs no engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import duckdb
import pytest

from polar_mitm.store.seal import seal_rollout
from polar_mitm.types import Rollout
from tests.cli.conftest import Polar, record, sampled


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """The store of the session, to be changed."""
    return Path(shutil.copy(store, tmp_path / "copy.duckdb"))


def change(path: Path, statement: str) -> None:
    """Somebody edits the file behind our back."""
    with duckdb.connect(path) as con:
        [(num_rows,)] = con.execute(statement).fetchall()
        assert num_rows == 1


def test_contexts_and_the_account(polar: Polar, store: Path) -> None:
    done = polar("verify", store)
    assert done.code == 0, done.err
    assert "context equal in 100 % of 2 calls" in done.out
    assert "rollout-A" in done.out and "rollout-B" in done.out


def test_the_store_may_be_named_as_elsewhere(polar: Polar, store: Path) -> None:
    assert polar("verify", "-s", store).out == polar("verify", store).out
    assert polar("verify", store, "-s", store).code == polar("verify").code == 2


def test_one_document(polar: Polar, store: Path) -> None:
    found = polar("verify", store, "--rollout", "rollout-A", "--json").json
    assert found["sound"] is True
    assert (found["builder"], found["context_equality"], found["weights"]) == ("forest", 1.0, None)
    [rollout] = found["rollouts"]
    assert (rollout["source"], rollout["sampled"], rollout["trained"]) == ("built", 10, 10)
    assert (rollout["num_calls"], rollout["num_equal"], rollout["accounted"]) == (2, 2, True)
    assert found["drift"]["num_tokens"] == 0 and found["drift"]["kl"] is None


@pytest.mark.parametrize("builder", ["per-request", "polar-splice"])
def test_other_builders(polar: Polar, store: Path, builder: str) -> None:
    found = polar("verify", store, "-r", "rollout-A", "--builder", builder, "--json").json
    assert found["builder"] == builder and found["sound"] is True
    assert found["rollouts"][0]["num_trajectories"] == {"per-request": 2, "polar-splice": 1}[builder]


def test_a_builder_that_bends_contexts_is_found_out(polar: Polar, tmp_path: Path) -> None:
    """Re-tokenised history: equal text, other ids. Polar's rule trains under what was never the context."""
    drifted = sampled("r", 1, 20, 6)
    drifted.prompt_token_ids[11] += 1000  # inside what call 0 sampled
    path = tmp_path / "drifted.duckdb"
    record(path, [Rollout("r", status="completed")], [sampled("r", 0, 10, 4), drifted], [])
    assert polar("verify", path).code == 0, "the forest splits there"
    done = polar("verify", path, "--builder", "polar-splice")
    assert done.code == 1
    assert "position 11 (call r-call-1): prompt 12, recorded 1012" in done.out


def test_one_altered_id_of_a_stored_trajectory_is_found(polar: Polar, copy: Path) -> None:
    assert polar("reconstruct", "-s", copy, "-r", "rollout-A", "--write").code == 0
    found = polar("verify", copy, "-r", "rollout-A", "--json").json
    assert found["sound"] is True
    assert (found["rollouts"][0]["source"], found["rollouts"][0]["num_trajectories"]) == ("stored", 1)
    change(copy, """
        UPDATE trajectory_pages SET token_ids =
            list_transform(token_ids, lambda v, i: CASE i WHEN 13 THEN 777 ELSE v END)
    """)  # fmt: skip
    done = polar("verify", copy, "-r", "rollout-A")
    assert done.code == 1
    assert "position 12 (call rollout-A-call-0): completion 777, recorded 13" in done.out
    assert "position 12 (call rollout-A-call-1): prompt 777, recorded 13" in done.out


def test_one_altered_logprob_of_a_stored_trajectory_is_found(polar: Polar, copy: Path) -> None:
    assert polar("reconstruct", "-s", copy, "-r", "rollout-A", "--write").code == 0
    change(copy, """
        UPDATE trajectory_pages SET trained_logprobs =
            list_transform(trained_logprobs, lambda v, i: CASE i WHEN 2 THEN -0.5 ELSE v END)
    """)  # fmt: skip
    done = polar("verify", copy, "-r", "rollout-A")
    assert done.code == 1
    assert "position 11 (call rollout-A-call-0): logprob -0.5, recorded -0.25" in done.out


def test_a_stored_build_that_lacks_a_trajectory_does_not_add_up(polar: Polar, copy: Path) -> None:
    assert polar("reconstruct", "-s", copy, "-r", "rollout-A", "--write").code == 0
    change(copy, "DELETE FROM trajectory_rows")
    done = polar("verify", copy, "-r", "rollout-A")
    assert done.code == 1 and "does not add up" in done.out


def test_it_builds_as_reconstruct_does(polar: Polar, copy: Path) -> None:
    change(copy, "UPDATE call_rows SET num_prompt = 9 WHERE call_id = 'rollout-A-call-0'")
    rebuilt = polar("reconstruct", "-s", copy, "-r", "rollout-A", "--json").json["accounting"]
    done = polar("verify", copy, "-r", "rollout-A", "--json")
    [rollout] = done.json["rollouts"]
    assert rebuilt == {"sampled": 10, "trained": 0, "masked": 0, "quarantined": 10}
    assert (rollout["sampled"], rollout["trained"]) == (10, 0)
    assert rollout["quarantined"] == {"lost_prefix": 10} and rollout["accounted"]
    assert done.code == 1
    assert rollout["holes"] == [f"call rollout-A-call-{n} is quarantined: lost_prefix" for n in (0, 1)], (
        "the record is not what was recorded"
    )


HOLES = [
    ("DELETE FROM call_rows WHERE call_id LIKE '%A-call-0'", "on top of which it is, is lost"),
    ("INSERT INTO call_rows FROM call_rows WHERE call_id = 'rollout-A-call-0'", "2 records claim to be"),
    ("DELETE FROM rollout_rows WHERE rollout_id = 'rollout-A'", "its own record is missing"),
    ("INSERT INTO rollout_rows FROM rollout_rows WHERE rollout_id = 'rollout-A'", "two records claim"),
]
STORED_HOLES = [
    ("UPDATE builds SET report = '{'", "its stored account is damaged"),
    ("UPDATE rollout_rows SET incomplete = 'x' WHERE rollout_id = 'rollout-A'", "it is incomplete (x)"),
    ("UPDATE trajectory_rows SET mask_runs = [1]", "trajectory rollout-A-call-1 is damaged"),
]


@pytest.mark.parametrize(
    ("hole", "told", "stored"),
    [(*each, False) for each in HOLES] + [(*each, True) for each in HOLES + STORED_HOLES],
)
def test_a_hole_is_what_verify_finds(polar: Polar, copy: Path, hole: str, told: str, stored: bool) -> None:
    seal_rollout(copy, "rollout-A")
    seal_rollout(copy, "rollout-B")
    if stored:
        assert polar("reconstruct", "-s", copy, "-r", "rollout-A", "--write").code == 0
    change(copy, hole)
    done = polar("verify", copy, "--seal", "--json")
    assert done.code == 1
    first, second = sorted(done.json["rollouts"], key=lambda r: str(r["rollout_id"]))
    assert told in " ".join(first["holes"]) and not second["holes"] and second["sound"]
    sealed = {s["rollout_id"]: s["ok"] for s in done.json["seals"]}
    assert sealed == {"rollout-A": "builds" in hole or "trajectory_rows" in hole, "rollout-B": True}
    assert f"rollout rollout-A: {first['holes'][0]}"[:60] in polar("verify", copy).out


@pytest.mark.parametrize("column", ["prompt_suffix", "completion_token_ids", "behaviour_logprobs"])
@pytest.mark.parametrize("value", ["NULL", "list_concat({}[:-2], [NULL])"])
def test_a_null_is_no_token(polar: Polar, copy: Path, column: str, value: str) -> None:
    value = value.format(column)
    change(copy, f"UPDATE call_rows SET {column} = {value} WHERE call_id = 'rollout-A-call-1'")
    rebuilt = polar("reconstruct", "-s", copy, "-r", "rollout-A", "--json").json["accounting"]
    assert (rebuilt["trained"], rebuilt["quarantined"]) == (4, 6)
    done = polar("verify", copy, "-r", "rollout-A", "--json")
    [rollout] = done.json["rollouts"]
    assert done.code == 1 and rollout["holes"] == ["call rollout-A-call-1 lacks some of its tokens"]
    assert (rollout["trained"], sum(rollout["quarantined"].values())) == (4, 6)
    assert not rollout["differences"] and rollout["accounted"]
    assert polar("calls", "-s", copy).code == 0


def seals(polar: Polar, path: Path) -> tuple[int, Any]:
    done = polar("verify", path, "-r", "rollout-A", "--seal", "--json")
    return done.code, done.json["seals"]


def test_a_seal_that_holds(polar: Polar, copy: Path) -> None:
    seal_rollout(copy, "rollout-A")
    assert seals(polar, copy) == (0, [{"rollout_id": "rollout-A", "ok": True, "fault": None}])


def test_one_changed_byte_in_a_sealed_store_is_found(polar: Polar, copy: Path) -> None:
    seal_rollout(copy, "rollout-A")
    change(copy, "UPDATE call_rows SET error = 'x' WHERE call_id = 'rollout-A-call-1'")
    fault = "call rollout-A-call-1 was changed"
    assert seals(polar, copy) == (1, [{"rollout_id": "rollout-A", "ok": False, "fault": fault}])
    done = polar("verify", copy, "-r", "rollout-A", "--seal")
    assert f"rollout rollout-A: {fault}" in done.out and "seals: 0 of 1 hold" in done.out


@pytest.mark.parametrize("tables", [["rollout_rows"], ["rollout_rows", "call_rows", "egress"]])
def test_a_sealed_rollout_whose_record_is_gone_is_named(polar: Polar, copy: Path, tables: list[str]) -> None:
    seal_rollout(copy, "rollout-A")
    seal_rollout(copy, "rollout-B")
    with duckdb.connect(copy) as con:
        for table in tables:
            con.execute(f"DELETE FROM {table} WHERE rollout_id = 'rollout-A'")
    done = polar("verify", copy, "--seal")
    assert done.code == 1
    assert "rollout rollout-A: rollout rollout-A was removed" in done.out and "seals: 1 of 2 hold" in done.out


def test_a_new_seal_does_not_pass_for_the_digest_that_was_kept(polar: Polar, copy: Path) -> None:
    digest = polar("seal", "rollout-A", "-s", copy, "--json").json["digest"]
    kept = ("verify", copy, "-r", "rollout-A", "--seal", "--digest", digest)
    assert polar(*kept).code == 0
    change(copy, "UPDATE call_rows SET error = 'x' WHERE call_id = 'rollout-A-call-1'")
    with duckdb.connect(copy) as con:
        con.execute("DELETE FROM seals")
    assert polar("seal", "rollout-A", "-s", copy).code == 0
    assert polar("verify", copy, "-r", "rollout-A", "--seal").code == 0
    done = polar(*kept)
    assert done.code == 1 and "rollout rollout-A: it was sealed again" in done.out
    assert "--rollout" in polar("verify", copy, "--seal", "--digest", digest).err
    assert "goes with --seal" in polar("verify", copy, "-r", "rollout-A", "--digest", digest).err


def test_what_was_never_sealed_does_not_pass_for_sealed(polar: Polar, store: Path) -> None:
    code, [seal] = seals(polar, store)
    assert (code, seal["ok"], seal["fault"]) == (1, False, "it was never sealed")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--engine", "http://127.0.0.1:9", "--model", "."), 2, "not both"),
        (("--model", "/nowhere"), 2, "no folder of a Hugging Face model"),
        (("--engine", "http://127.0.0.1:9"), 3, "no engine answers"),
        (("--rollout", "nobody"), 2, "has no rollout 'nobody'"),
        (("--builder", "best"), 2, "best"),
        (("--tolerance", "-1"), 2, "tolerance"),
    ],
)
def test_what_cannot_be(
    polar: Polar, store: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = polar("verify", store, *arguments, "--json")
    assert done.code == code
    assert message in done.json["error"]


def test_an_engine_that_cannot_score_is_said_to_refuse(polar: Polar, tmp_path: Path, engine_url: str) -> None:
    """It holds the weights, and has no `/v1/completions`."""
    store = tmp_path / "scripted.duckdb"
    info = polar("engine", "probe", "--engine", engine_url, "--json").json
    held = {"model_served": info["model"], "policy_version": info["policy_version"]}
    record(store, [Rollout("r", status="completed")], [sampled("r", 0, 10, 4, **held)], [])
    done = polar("verify", store, "--engine", engine_url)
    assert done.code == 1
    told = " ".join(done.err.split())
    assert "nothing was scored under scripted@" in told and "the scorer refused" in told and "404" in told
    [rollout] = polar("verify", store, "--engine", engine_url, "--json").json["rollouts"]
    assert rollout["unscored"] == {"refused": 4} and "404" in rollout["complaints"][0]


def test_other_weights_are_counted_where_nothing_else_is(polar: Polar, store: Path, engine_url: str) -> None:
    done = polar("verify", store, "-r", "rollout-A", "--engine", engine_url)
    assert done.code == 1
    assert "other_weights 10" in " ".join(done.err.split())


def test_help_names_it_among_those_that_say_no(polar: Polar) -> None:
    told = " ".join(polar("--help").out.split())
    assert "the answer is no (doctor, engine status, reconstruct, verify, replay, demo, conformance)" in told


def test_no_store(polar: Polar, tmp_path: Path) -> None:
    done = polar("verify", tmp_path / "none.duckdb")
    assert done.code == 2 and "there is no store" in done.err
    assert not (tmp_path / "none.duckdb").exists()

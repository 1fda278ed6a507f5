"""What a query selects; what cannot be trained on is refused, with its number and the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pytest

from polar_mitm.errors import StoreError
from polar_mitm.store import Recorder, open_reader
from polar_mitm.types import Reward
from polar_mitm_trainer.data import DataError, Policy, Snapshot, resolve_query, select, unbuilt
from tests.trainer.stores import TOKENIZER, Recorded, groups, reconstruct, record, rollout, tamper

EVERY = "SELECT trajectory_id FROM trajectories"


def selected(path: Path, query: str = EVERY, **options: Any) -> Snapshot:
    with open_reader(path) as reader:
        return select(reader, query, **options)


def refusal(path: Path, query: str = EVERY, **options: Any) -> str:
    with pytest.raises(DataError) as refused:
        selected(path, query, **options)
    return str(refused.value)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("selection") / "s.duckdb", groups(2))


# --- what is asked --------------------------------------------------------------------------------------


def test_all_is_what_trains_of_complete_rollouts(tmp_path: Path) -> None:
    some = [
        *groups(1),
        rollout("holes", "g0", 1.0),
        rollout("titles", "g0", 1.0, num_calls=1, first={"role": "auxiliary"}),
    ]
    path = record(tmp_path / "s.duckdb", some)
    reconstruct(path, [one.rollout for one in some], "per-request")
    with Recorder(path, share=False) as recorder:
        some[-2].rollout.incomplete = "a call is missing"
        recorder.rollout(some[-2].rollout)
    found = selected(path, resolve_query("all"))
    assert {row.rollout_id for row in found.rows} == {"g0r0", "g0r1", "g0r2", "g0r3"}
    assert found.builder == "forest" and len(found.rows) == 6 and not found.refused
    per_request = selected(path, resolve_query("all", builder="per-request"), builder="per-request")
    assert len(per_request.rows) == sum(len(one.calls) for one in some[:4])


def test_all_leaves_evaluations_out(tmp_path: Path) -> None:
    """What `rl` measured with is not trained on unless a query asks for it."""
    some = [*groups(1), rollout("e0", "evaluation:t/1", 0.0), rollout("e1", "evaluation:t/1", 1.0)]
    path = record(tmp_path / "s.duckdb", some)
    found = selected(path, resolve_query("all"))
    assert {row.group_id for row in found.rows} == {"g0"}
    assert found.left_out["rollouts of evaluations"] == 2
    asked = selected(path)
    assert len({row.rollout_id for row in asked.rows}) == 6 and not asked.left_out


def test_rewards_and_groups_in_the_query(store: Path) -> None:
    query = """
        SELECT t.trajectory_id, r.harness || 'whole' AS group_id, t.num_trained AS other,
            CASE WHEN t.rollout_id <> 'g0r0' THEN length(t.rollout_id) + sample_index END AS reward
        FROM trajectories t JOIN rollouts r USING (rollout_id); -- a comment
    """
    found = selected(store, query.strip().removesuffix("-- a comment"))
    assert {row.group_id for row in found.rows} == {"whole"}
    assert {row.rollout_id: row.reward for row in found.rows} == {
        f"g{g}r{r}": None if (g, r) == (0, 0) else 4.0 for g in range(2) for r in range(4)
    }
    as_recorded = selected(store, "SELECT trajectory_id, NULL AS group_id FROM trajectories -- all")
    assert as_recorded.snapshot_id == selected(store).snapshot_id


def test_the_latest_verdict_counts(tmp_path: Path) -> None:
    path = record(tmp_path / "s.duckdb", groups(1))
    with Recorder(path, share=False) as recorder:
        for value, at in ((3.0, 99.0), (4.0, 99.0), (1.0, -5.0)):
            recorder.reward(Reward("g0r0", "score", value, at=at))
        recorder.reward(Reward("elsewhere", "style", 1.0))
    rewards = {row.rollout_id: row.reward for row in selected(path).rows}
    assert rewards == {"g0r0": 4.0, "g0r1": 1.0, "g0r2": 0.0, "g0r3": 1.0}


def test_several_names_of_rewards_need_a_choice(tmp_path: Path) -> None:
    some = groups(1)
    some[0].rewards["style"] = 0.25
    path = record(tmp_path / "s.duckdb", some)
    assert "rewards of several names: 'score' (4), 'style' (1); say which" in refusal(path)
    assert "no selected rollout has a reward 'taste'; there are: 'score', 'style'" in refusal(
        path, reward_name="taste"
    )
    style = {row.rollout_id: row.reward for row in selected(path, reward_name="style").rows}
    assert style == {"g0r0": 0.25, "g0r1": None, "g0r2": None, "g0r3": None}
    both = "SELECT trajectory_id, 1 AS reward FROM trajectories"
    assert "leave out one" in refusal(path, both, reward_name="style")
    assert {row.reward for row in selected(path, both).rows} == {1.0}
    with Recorder(path, share=False) as recorder:
        recorder.reward(Reward("g0r1", "reward", 0.75))
    found = selected(path)
    assert found.reward_name == "reward", "what collect and rl give counts where there are others"
    assert {row.rollout_id: row.reward for row in found.rows}["g0r1"] == 0.75
    assert {row.reward for row in selected(path, both).rows} == {1.0}


def test_queries_by_name_and_from_files(tmp_path: Path) -> None:
    (tmp_path / "q.sql").write_text(f"{EVERY} WHERE role = 'main'\n")
    (tmp_path / "sets.toml").write_text(f'mine = "{EVERY}"\nbest-2 = """{EVERY} LIMIT 2"""\nodd = 3\n')
    sets = tmp_path / "sets.toml"
    assert resolve_query(f"@{tmp_path / 'q.sql'}") == f"{EVERY} WHERE role = 'main'"
    assert resolve_query("mine", sets=sets) == EVERY
    assert resolve_query("best-2", sets=sets) == f"{EVERY} LIMIT 2"
    assert resolve_query(f" {EVERY}") == EVERY
    assert "builder = 'per-request'" in resolve_query("all", builder="per-request")
    for text, options, message in (
        ("yours", {"sets": sets}, "no training set 'yours', only 'all', 'mine', 'best-2', 'odd'"),
        ("odd", {"sets": sets}, "no training set 'odd'"),
        ("mine", {}, "only 'all'"),
        ("@nothing.sql", {}, "nothing.sql cannot be read"),
        ("mine", {"sets": tmp_path / "none.toml"}, "none.toml cannot be read"),
        ("mine", {"sets": tmp_path / "q.sql"}, "q.sql: "),
    ):
        with pytest.raises(DataError, match=message):
            resolve_query(text, **options)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT rollout_id, role FROM trajectories", "no column trajectory_id, only rollout_id, role"),
        ("SELECT trajectory_id FROM nothing", "the query cannot be run: .*nothing"),
        ("SELECT trajectory_id FROM", "the query cannot be run: "),
        ("DELETE FROM rewards", "the query cannot be run: "),
        (f"{EVERY}; {EVERY}", "the query cannot be run: "),
        (f"{EVERY} WHERE rollout_id = 'nobody'", "selects no trajectory$"),
        (
            "SELECT 'no such' AS trajectory_id",
            r"1 of 1 selected ids are no trajectory of builder 'forest' \(first",
        ),
        (
            "SELECT NULL AS trajectory_id FROM trajectories",
            "12 of 12 rows of the query have no trajectory_id",
        ),
        ("SELECT [1] AS trajectory_id", r"column trajectory_id holds no ids of trajectories \(first \[1\]\)"),
        (f"{EVERY} UNION ALL {EVERY}", "24 rows for 12 trajectories .*a join"),
        ("SELECT trajectory_id, role AS reward FROM trajectories", "column reward holds no numbers"),
        (
            "SELECT trajectory_id, num_tokens / 7 + trajectory_no AS reward FROM trajectories",
            r"several rewards for 4 rollouts \(first g0r1\)",
        ),
        (
            "SELECT trajectory_id, trajectory_id AS group_id FROM trajectories",
            "several groups for 4 rollouts",
        ),
        (
            "SELECT trajectory_id, NULL::DOUBLE AS reward FROM trajectories",
            "none of the 8 selected rollouts has a",
        ),
        (
            "SELECT trajectory_id, 'nan'::DOUBLE AS reward FROM trajectories",
            r"12 of 12 trajectories cannot be trained on: 12 with the reward nan \(first g0r0-0\)",
        ),
    ],
)
def test_a_wrong_question(store: Path, query: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        selected(store, query)


def test_two_builders_at_once(tmp_path: Path) -> None:
    some = groups(1)
    path = record(tmp_path / "s.duckdb", some)
    reconstruct(path, [one.rollout for one in some], "per-request")
    assert "several builders, repeat them: add WHERE builder = 'forest'" in refusal(path)
    assert "no trajectory of builder 'polar-splice'" in refusal(
        path, f"{EVERY} WHERE builder = 'forest'", builder="polar-splice"
    )


def test_a_store_that_cannot_be_read(store: Path) -> None:
    reader = open_reader(store)
    reader.close()
    with pytest.raises(StoreError, match="the reader is closed"):
        select(reader, EVERY)


# --- trajectories that were never written ---------------------------------------------------------------


def test_rollouts_without_a_build_are_named(tmp_path: Path) -> None:
    some = groups(1)
    path = record(
        tmp_path / "s.duckdb", [*some, Recorded(rollout("empty", "g", 1.0).rollout, [])], built=False
    )
    with open_reader(path) as reader:
        assert unbuilt(reader) == ["g0r0", "g0r1", "g0r2", "g0r3"]
    message = refusal(path, resolve_query("all"))
    assert "those of 4 rollouts are not in the store: `polar-mitm reconstruct --write`" in message
    reconstruct(path, [one.rollout for one in some])
    with open_reader(path) as reader:
        assert unbuilt(reader) == [] and unbuilt(reader, "per-request") != []
    late = rollout("g0r0", "g0", 1.0, num_calls=4)
    with Recorder(path, share=False) as recorder:
        recorder.call(late.calls[-1])
    with open_reader(path) as reader:
        assert unbuilt(reader) == ["g0r0"], "it has a call more than its trajectories know"
    with Recorder(path, share=False) as recorder:
        some[0].rollout.incomplete = "a call is missing"
        recorder.rollout(some[0].rollout)
    with open_reader(path) as reader:
        assert unbuilt(reader) == []


def test_what_cannot_be_selected_is_told(tmp_path: Path) -> None:
    """It has no trajectory, so that no query can name it: neither the default one nor one over them all."""
    bare = rollout("bare", "g0", 1.0, num_calls=1, first={"behaviour_logprobs": []})
    holes = [rollout(f"holes{n}", "g0", 1.0, incomplete="a call is missing") for n in range(3)]
    unjudged = rollout("unjudged", "g0", None, incomplete="killed")
    path = record(tmp_path / "s.duckdb", [*groups(1), bare, *holes, unjudged])
    expected = {"incomplete_rollout (first: a call is missing)": 3, "sampled tokens no_logprobs": 2}
    found = selected(path, resolve_query("all"))
    assert found.left_out == expected and [each.rollout_id for each in found.bystanders] == ["bare"]
    found.save(tmp_path / "snapshot.json")
    assert Snapshot.load(tmp_path / "snapshot.json") == found
    found = selected(path, f"{EVERY} -- mine")
    assert found.left_out == {**expected, "rollouts without a token that trains": 1} and not found.bystanders
    assert not selected(record(tmp_path / "t.duckdb", groups(1))).left_out


def test_the_name_of_the_model_is_kept(store: Path) -> None:
    assert selected(store).model == "tiny"


def test_an_engine_without_logprobs_leaves_nothing_to_select(tmp_path: Path) -> None:
    bare = {"behaviour_logprobs": []}
    some = [rollout(f"a{n}", "g", float(n), num_calls=1, first=bare) for n in range(3)]
    message = refusal(record(tmp_path / "s.duckdb", some), resolve_query("all"))
    assert message == "the query selects no trajectory; sampled tokens in none: no_logprobs 6"


# --- what cannot be trained on --------------------------------------------------------------------------

ENGINE = Policy(TOKENIZER, "tiny", 512)


def test_another_tokenizer(tmp_path: Path) -> None:
    other = {"tokenizer": "0ther"}
    some = [*groups(1), rollout("b", "g0", 1.0, first=other, last=other)]
    path = record(tmp_path / "s.duckdb", some)
    message = refusal(path, policy=ENGINE)
    why = f"of another tokenizer (0ther, the policy's is {TOKENIZER})"
    assert message == f"1 of 7 trajectories cannot be trained on: 1 {why} (first b-1)"
    found = selected(path, policy=ENGINE, skip_refused=True)
    assert len(found.rows) == 6
    assert found.refused == {why: 1}
    assert len(selected(path).rows) == 7, "nobody says what the policy's is"
    untold = {"tokenizer": ""}
    path = record(tmp_path / "t.duckdb", [*groups(1), rollout("b", "g0", 1.0, first=untold, last=untold)])
    assert len(selected(path, policy=ENGINE).rows) == 7, "an engine that does not tell"


def test_another_model(tmp_path: Path) -> None:
    other = {"model_served": "large"}
    path = record(tmp_path / "s.duckdb", [*groups(1), rollout("b", "g0", 1.0, first=other, last=other)])
    assert "1 of another model ('large', the policy is 'tiny')" in refusal(path, policy=ENGINE)
    assert "6 of one of several models (tiny): --served-as says which" in refusal(path)
    assert "1 of one of several models (large)" in refusal(path, skip_refused=True), "nobody says which"
    assert len(selected(path, f"{EVERY} WHERE rollout_id <> 'b'").rows) == 6
    assert len(selected(path, policy=Policy(model="large"), skip_refused=True).rows) == 1


def test_ids_beyond_the_vocabulary(store: Path) -> None:
    message = refusal(store, policy=Policy(vocab_size=302))
    assert "3 with token ids beyond the policy's vocabulary of 302" in message
    assert len(selected(store, policy=Policy(vocab_size=303)).rows) == 12


def test_incomplete_rollouts(tmp_path: Path) -> None:
    path = record(tmp_path / "s.duckdb", groups(2))
    with Recorder(path, share=False) as recorder:
        for one in groups(2)[:2]:
            one.rollout.incomplete = "a call is missing"
            recorder.rollout(one.rollout)
    assert "3 of an incomplete rollout (a call is missing) (first g0r0-0)" in refusal(path)
    assert len(selected(path, skip_refused=True).rows) == 9


@pytest.mark.parametrize("value", ["'nan'::FLOAT", "'-inf'::FLOAT", "0.5::FLOAT", "NULL"])
def test_logprobs_that_are_none(tmp_path: Path, value: str) -> None:
    path = record(tmp_path / "s.duckdb", groups(1))
    tamper(path, "trained_logprobs", f"[{value}] || trained_logprobs[2:]", 0, 2)
    assert "2 with logprobs that are none (first g0r0-0)" in refusal(path)
    assert len(selected(path, skip_refused=True).rows) == 4


def test_missing_logprobs_are_damage(tmp_path: Path) -> None:
    path = record(tmp_path / "s.duckdb", groups(1))
    tamper(path, "trained_logprobs", "[]", 2)
    with pytest.raises(StoreError, match=r"damaged.*reconstruct --write"):
        selected(path)


def test_nothing_that_trains(tmp_path: Path) -> None:
    titles = rollout("titles", "g0", 1.0, num_calls=1, first={"role": "auxiliary"})
    path = record(tmp_path / "s.duckdb", [*groups(1), titles])
    assert "1 without a token that trains (first titles-0)" in refusal(path)


def test_all_reasons_are_told_at_once(tmp_path: Path) -> None:
    some = [
        *groups(1),
        rollout("b", "g0", float("nan")),
        rollout("c", "g0", 1.0, first={"tokenizer": "0ther"}, last={"tokenizer": "0ther"}),
    ]
    message = refusal(record(tmp_path / "s.duckdb", some), policy=ENGINE)
    assert message.startswith(
        "2 of 8 trajectories cannot be trained on: 1 with the reward nan (first b-1); 1 of"
    )


def test_no_account_of_a_build(tmp_path: Path) -> None:
    path = record(tmp_path / "s.duckdb", groups(1))
    for statement, message in (
        ("UPDATE builds SET report = '{}' WHERE rollout_id = 'g0r1'", "the account of a build is damaged"),
        ("DELETE FROM builds WHERE rollout_id = 'g0r1'", "but no account of them"),
    ):
        with duckdb.connect(str(path)) as con:
            con.execute(statement)
        with pytest.raises(StoreError, match=f"{message}.*reconstruct --write"):
            selected(path)


def test_a_long_set_is_read_in_pieces(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = selected(store)
    for size in (1, 17, 40):
        monkeypatch.setattr("polar_mitm_trainer.selection._CHUNK", size)
        assert selected(store) == whole

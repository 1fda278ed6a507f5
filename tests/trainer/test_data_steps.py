"""Steps of a training set: whole groups, the same order every time, and from anywhere to the bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_mitm.store import Recorder, open_reader
from polar_mitm.types import Reward
from polar_mitm_trainer.data import (
    Account,
    DataError,
    NothingToLearn,
    Position,
    Snapshot,
    Step,
    TrainingSet,
    samples_of,
    select,
    verify,
)
from polar_mitm_trainer.data import resolve_query as query
from tests.trainer.stores import Recorded, answer, config, groups, record, rollout, tamper

NUM_GROUPS = 5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    useless = [rollout(f"s{n}", "same", 1.0) for n in range(2)]
    stopped = rollout("g1stopped", "g1", 1.0, status="interrupted")
    path = tmp_path_factory.mktemp("steps") / "s.duckdb"
    return record(path, [*groups(NUM_GROUPS), *useless, stopped])


def training_set(reader: object, seed: int = 0, per_step: int = 2) -> TrainingSet:
    told = config().model_copy(update={"seed": seed})
    return TrainingSet(reader, select(reader, query("all")), told, groups_per_step=per_step)  # type: ignore[arg-type]


def content(step: Step) -> list[tuple[object, ...]]:
    """All that a step holds, as bytes."""
    return [
        (
            r.outcome,
            r.malformed,
            [
                (
                    t.trajectory_id,
                    t.token_ids.tobytes(),
                    t.loss_mask.tobytes(),
                    t.behaviour_logprobs.tobytes(),
                )
                for t in r.trajectories
            ],
        )
        for r in step.rollouts
    ]


def test_an_epoch_is_every_group_once_and_whole(store: Path) -> None:
    with open_reader(store) as reader:
        made = training_set(reader)
        assert (made.num_groups, made.steps_per_epoch) == (NUM_GROUPS, 3)
        found = list(made.steps())
        assert [len({r.outcome.group_id for r in s.rollouts}) for s in found] == [2, 2, 1]
        sizes = Counter(r.outcome.group_id for s in found for r in s.rollouts)
        assert sizes == {f"g{n}": 5 if n == 1 else 4 for n in range(NUM_GROUPS)}
        assert made.set_aside.groups == {"zero_variance": 1} and made.set_aside.rollouts["zero_variance"] == 2
        total = sum((samples_of(s.rollouts, config())[1] for s in found), made.set_aside)
        assert total.adds_up and total.rollouts == {
            "trained": 20,
            "zero_variance": 2,
            "interrupted_rollout": 1,
        }
        everything = reader.sql("SELECT sum(num_sampled)::INTEGER AS n FROM calls")["n"][0].as_py()
        assert total.sampled == everything


@pytest.fixture(scope="module")
def snapshot(store: Path) -> Snapshot:
    with open_reader(store) as reader:
        return select(reader, query("all"))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**63), st.integers(1, 7), st.data())
def test_from_any_position_it_goes_on_to_the_bit(
    store: Path, snapshot: Snapshot, seed: int, per_step: int, data: st.DataObject
) -> None:
    told = config().model_copy(update={"seed": seed})
    with open_reader(store) as reader:
        whole = list(TrainingSet(reader, snapshot, told, groups_per_step=per_step).steps(num_epochs=3))
    at = data.draw(st.integers(0, len(whole)))
    start = whole[at - 1].after if at else Position()
    with open_reader(store) as reader:
        rest = list(TrainingSet(reader, snapshot, told, groups_per_step=per_step).steps(start, num_epochs=3))
    assert [s.position for s in rest] == [s.position for s in whole[at:]]
    assert [s.after for s in rest] == [s.after for s in whole[at:]]
    assert [content(s) for s in rest] == [content(s) for s in whole[at:]]
    positions = [s.position for s in whole]
    assert positions == sorted(set(positions)) and whole[-1].after == Position(3, 0)


def test_the_order_is_the_seed_s_and_the_epoch_s(store: Path) -> None:
    with open_reader(store) as reader:
        orders = {
            (seed, epoch): tuple(training_set(reader, seed).order(epoch))
            for seed in (0, 1)
            for epoch in (0, 1)
        }
    assert len(set(orders.values())) > 1
    assert {frozenset(order) for order in orders.values()} == {frozenset(f"g{n}" for n in range(NUM_GROUPS))}
    assert orders[0, 0] == ("g3", "g4", "g1", "g2", "g0"), "as sha256sum of 0/0/g0, ... sorts"


def test_without_an_end(store: Path) -> None:
    with open_reader(store) as reader:
        endless = training_set(reader).steps(Position(7, 2), num_epochs=None)
        assert [next(endless).position for _ in range(3)] == [Position(7, 2), Position(8, 0), Position(8, 1)]
        assert list(training_set(reader).steps(Position(1, 0))) == []


def test_a_store_gives_what_memory_gives(tmp_path: Path) -> None:
    recorded = groups(2)
    recorded[0].calls[0].answer = answer("", "{oops")
    told = config(advantage={"invalid_tool_call": -3.0}, loss={"max_staleness": 1})
    with open_reader(record(tmp_path / "s.duckdb", recorded)) as reader:
        made = TrainingSet(reader, select(reader, query("all")), told, groups_per_step=9)
        (step,) = made.steps()
    stored, account = samples_of(step.rollouts, told, current_step=4)
    online, counted = samples_of([each.finished for each in recorded], told, current_step=4)
    stored.sort(key=lambda s: s.trajectory_id)
    online.sort(key=lambda s: s.trajectory_id)
    assert account.metrics() == pytest.approx(counted.metrics()) and account.malformed > 0
    for a, b in zip(stored, online, strict=True):
        for name in ("trajectory_id", "rollout_id", "group_id", "policy_version"):
            assert getattr(a, name) == getattr(b, name)
        for name in ("token_ids", "loss_mask", "behaviour_logprobs", "advantages", "weights"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
            assert getattr(a, name).dtype == getattr(b, name).dtype


def test_who_died_before_its_first_call_is_in_the_mean(tmp_path: Path) -> None:
    """As in an online run: its reward is the group's, though nothing of it can train."""
    unheard = rollout("mute", "g0", 0.25, num_calls=1, first={"behaviour_logprobs": []})
    dead = Recorded(rollout("dead", "g0", None, status="failed").rollout, [], {"score": -1.0})
    recorded = [*groups(1), unheard, dead]
    path = record(tmp_path / "s.duckdb", recorded)
    with open_reader(path) as reader:
        chosen = select(reader, query("all"))
        (step,) = TrainingSet(reader, chosen, config(), groups_per_step=9).steps()
    stored, account = samples_of(step.rollouts, config())
    online, counted = samples_of([each.finished for each in recorded], config())
    advantages = {s.trajectory_id: s.advantages.tolist() for s in online}
    assert {s.trajectory_id: s.advantages.tolist() for s in stored} == advantages
    assert account.metrics() == counted.metrics()
    assert account.rollouts == {"trained": 4, "all_masked": 1, "nothing_sampled": 1}

    with Recorder(path, share=False) as recorder:
        recorder.reward(Reward("dead", "score", 3.0, at=99.0))
    with open_reader(path) as reader, pytest.raises(DataError, match=r"1 another reward \(first dead\)"):
        verify(reader, chosen)


def test_some_trajectories_of_a_rollout(tmp_path: Path) -> None:
    with open_reader(record(tmp_path / "s.duckdb", groups(1))) as reader:
        chosen = select(
            reader, "SELECT trajectory_id FROM trajectories WHERE trajectory_id NOT LIKE 'g0r1-1'"
        )
        (step,) = TrainingSet(reader, chosen, config(), groups_per_step=1).steps()
        account = samples_of(step.rollouts, config())[1]
    assert account.adds_up and account.left_out["not_selected"] > 0


def test_while_a_capture_records(store: Path) -> None:
    with open_reader(store) as reader:
        expected = [content(s) for s in training_set(reader).steps()]
    with Recorder(store), open_reader(store) as reader:
        assert [content(s) for s in training_set(reader).steps()] == expected


def test_groups_that_teach_nothing_everywhere(tmp_path: Path) -> None:
    same = [rollout(f"a{n}", "g", 1.0) for n in range(3)]
    singles = [rollout(f"b{n}", None, float(n)) for n in range(3)]
    for name, some, reason in (("same", same, "3 zero_variance"), ("single", singles, "3 group_of_one")):
        with open_reader(record(tmp_path / name, some)) as reader:
            chosen = select(reader, query("all"))
            with pytest.raises(NothingToLearn, match=reason):
                TrainingSet(reader, chosen, config(), groups_per_step=2)


def test_a_token_that_changes_between_two_steps_is_seen(tmp_path: Path) -> None:
    path = record(tmp_path / "s.duckdb", groups(2))
    with open_reader(path) as reader:
        made = training_set(reader, per_step=1)
        chosen = select(reader, query("all"))
        assert len(list(made.steps())) == 2
    tamper(path, "token_ids", "[9] || token_ids[2:]", 3)
    with open_reader(path) as reader:
        changed = TrainingSet(reader, chosen, config(), groups_per_step=2)
        with pytest.raises(
            DataError, match=r"1 trajectories are not what the snapshot says \(first g0r2-2\)"
        ):
            list(changed.steps())
    with duckdb.connect(str(path)) as con:
        con.execute("DELETE FROM trajectory_rows WHERE trajectory_no = 3")
    with (
        open_reader(path) as reader,
        pytest.raises(DataError, match="1 trajectories of the snapshot are not"),
    ):
        TrainingSet(reader, chosen, config(), groups_per_step=2)


def test_a_call_whose_answer_is_lost_is_not_malformed(tmp_path: Path) -> None:
    some = groups(1)
    for one in some:
        one.calls[0].answer = answer("", "{oops")
    path = record(tmp_path / "s.duckdb", some)
    with duckdb.connect(str(path)) as con:
        con.execute("UPDATE call_rows SET answer = NULL WHERE rollout_id = 'g0r0'")
        con.execute("UPDATE call_rows SET answer = '\\x00\\x01'::BLOB WHERE rollout_id = 'g0r1'")
    with open_reader(path) as reader:
        (step,) = training_set(reader).steps()
    assert {r.outcome.rollout_id for r in step.rollouts if r.malformed} == {"g0r2", "g0r3"}


def test_groups_per_step_is_positive(store: Path) -> None:
    with open_reader(store) as reader, pytest.raises(ValueError, match="groups_per_step=0"):
        training_set(reader, per_step=0)


def test_an_account_of_nothing() -> None:
    assert Account().adds_up and Account().metrics()["tokens/sampled"] == 0

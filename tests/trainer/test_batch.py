"""The batch job: the same weights twice, and after a resume; what it leaves; what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from polar_mitm_trainer import batch
from polar_mitm_trainer.account import DataError, NothingToLearn
from polar_mitm_trainer.batch import BatchJob, BatchRun, StepDone, Summary
from polar_mitm_trainer.config import PolicyConfig, TrainConfig
from polar_mitm_trainer.learner import BadStepError, Learner
from polar_mitm_trainer.policy import PolicyError
from polar_mitm_trainer.rundb import RunDB
from tests.trainer.stores import groups, record, rollout
from tests.trainer.tiny import tiny_model, tiny_store


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(2)
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return tiny_store(tmp_path_factory.mktemp("store") / "runs.duckdb", model)


@pytest.fixture
def job(tmp_path: Path, model: Path, store: Path) -> BatchJob:
    config = TrainConfig.model_validate({"policy": {"model": str(model)}, "optimiser": {"lr": 0.01}})
    return BatchJob(
        kind="train",
        store=store,
        query="all",
        out=tmp_path / "run",
        config=config,
        groups_per_step=2,
        num_epochs=2,
        checkpoint_every=0,
    )


def weights(summary: Summary) -> dict[str, torch.Tensor]:
    return load_file(summary.checkpoint / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_it_leaves(job: BatchJob, store: Path, model: Path) -> None:
    done: list[StepDone] = []
    summary = BatchRun(job).run(done.append)
    assert (summary.steps, summary.num_groups, summary.stopped) == (4, 3, False)
    assert [(each.step, each.num_steps) for each in done] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {each.name for each in job.out.iterdir()} == {
        "run.duckdb",
        "metrics.jsonl",
        "snapshot.json",
        "reward.png",
        "tensorboard",
        "checkpoints",
    }
    assert [each.name for each in (job.out / "checkpoints").iterdir()] == ["step-4"]
    assert not same(weights(summary), load_file(model / "model.safetensors"))
    with duckdb.connect() as con:
        con.execute(f"ATTACH '{job.out / 'run.duckdb'}' AS run (READ_ONLY)")
        con.execute(f"ATTACH '{store}' AS store (READ_ONLY)")
        con.execute("USE run")
        steps = con.execute("SELECT step, snapshot_id, policy_version FROM steps ORDER BY step").fetchall()
        rows = con.execute(
            "SELECT count(*), count(DISTINCT step), sum(step_rows.num_trained)::INT FROM step_rows "
            "JOIN store.trajectories t USING (trajectory_id) WHERE t.builder = 'forest'"
        ).fetchone()
        trained = con.execute("SELECT sum(num_trained)::INT FROM store.trajectories").fetchone()
        (run,) = con.execute("SELECT kind, status, config FROM runs").fetchall()
        shares = con.execute("SELECT sum(weight) FROM step_rows GROUP BY step").fetchall()
    assert steps == [(n, summary.snapshot_id, f"step-{n}") for n in (1, 2, 3, 4)]
    assert rows and trained and rows[2] == 2 * trained[0] and rows[1] == 4  # two passes over all of it
    assert run[:2] == ("train", "done") and json.loads(run[2])["optimiser"]["lr"] == 0.01
    assert [share for (share,) in shares] == pytest.approx([1.0] * 4)
    events = EventAccumulator(str(job.out / "tensorboard"))
    events.Reload()
    assert {"reward/mean", "train/loss", "train/grad_norm"} <= set(events.Tags()["tensors"])


def test_the_same_weights_twice_and_after_a_resume(job: BatchJob, tmp_path: Path) -> None:
    whole = BatchRun(job).run()
    again = BatchRun(replace(job, out=tmp_path / "again")).run()
    assert same(weights(whole), weights(again)) and whole.snapshot_id == again.snapshot_id

    parts = replace(job, out=tmp_path / "parts")
    run = BatchRun(parts)
    first = run.run(lambda done: run.stop() if done.step == 1 else None)
    assert first.stopped and first.steps == 1
    last = BatchRun(replace(parts, resume=True)).run()
    assert last.steps == 4 and last.run_id == first.run_id
    assert same(weights(whole), weights(last))
    with duckdb.connect(str(parts.out / "run.duckdb"), read_only=True) as con:
        ours = con.execute("SELECT step, name, value FROM metrics WHERE name NOT LIKE 'time/%' ORDER BY ALL")
        ours_rows = ours.fetchall()
    with duckdb.connect(str(job.out / "run.duckdb"), read_only=True) as con:
        whole_rows = con.execute(
            "SELECT step, name, value FROM metrics WHERE name NOT LIKE 'time/%' ORDER BY ALL"
        ).fetchall()
    assert ours_rows == whole_rows


def test_steps_before_epochs(job: BatchJob) -> None:
    summary = BatchRun(replace(job, num_steps=5, checkpoint_every=2, keep_last=2)).run()
    assert summary.steps == 5
    assert sorted(each.name for each in (job.out / "checkpoints").iterdir()) == ["step-4", "step-5"]


def test_a_step_that_is_refused_leaves_the_one_before(job: BatchJob, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Learner.step

    def breaks(self: Learner, samples: object) -> dict[str, float]:
        if self.version == 1:
            raise BadStepError("NaN in the loss", ["t"])
        return step(self, samples)  # type: ignore[arg-type]

    monkeypatch.setattr(Learner, "step", breaks)
    with pytest.raises(BadStepError):
        BatchRun(job).run()
    assert [each.name for each in (job.out / "checkpoints").iterdir()] == ["step-1"]
    with duckdb.connect(str(job.out / "run.duckdb"), read_only=True) as con:
        assert con.execute("SELECT status FROM runs").fetchall() == [("failed",)]
        assert con.execute("SELECT step FROM steps").fetchall() == [(1,)]
    monkeypatch.undo()
    assert BatchRun(replace(job, resume=True)).run().steps == 4


def test_a_run_is_not_overwritten_nor_mixed(job: BatchJob) -> None:
    short = replace(job, num_steps=1)
    BatchRun(short).run()
    with pytest.raises(DataError, match="holds a run already"):
        BatchRun(job).run()
    other = "SELECT trajectory_id FROM trajectories LIMIT 6"
    with pytest.raises(DataError, match="was trained on another query"):
        BatchRun(replace(job, resume=True, query=other)).run()


def test_a_resume_changes_nothing_but_how_long(job: BatchJob) -> None:
    BatchRun(replace(job, num_steps=1)).run()
    recorded = RunDB.recorded(job.out)
    config = job.config
    for change, message in (
        ({"groups_per_step": 1}, r"\(job\.groups_per_step: 2, now 1\)"),
        ({"kind": "sft", "min_reward": 0.5}, r'kind: "train", now "sft"; job\.min_reward: null, now 0\.5'),
        ({"reward_name": "nope"}, r'job\.reward_name: null, now "nope"'),
        ({"config": config.model_copy(update={"seed": 7})}, r"\(seed: 0, now 7\)"),
        (
            {"config": config.model_copy(update={"policy": PolicyConfig(model="other")})},
            r'policy\.model: ".*", now "other"',
        ),
    ):
        with pytest.raises(DataError, match=message):
            BatchRun(replace(job, resume=True, **change)).run()  # type: ignore[arg-type]
    assert RunDB.recorded(job.out) == recorded
    on_cpu = config.model_copy(update={"policy": config.policy.model_copy(update={"device": "cpu"})})
    assert BatchRun(replace(job, resume=True, config=on_cpu, num_steps=2)).run().steps == 2


def test_a_model_of_no_numbers_leaves_nothing(job: BatchJob, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = job.config.model_copy(update={"policy": PolicyConfig(model=str(folder))})
    with pytest.raises(PolicyError, match="holds NaN"):
        BatchRun(replace(job, config=config)).run()
    assert not job.out.exists()


def test_where_no_run_can_be(job: BatchJob, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file is a file, and a run takes a folder"):
        BatchRun(replace(job, out=tmp_path / "file")).run()
    with pytest.raises(DataError, match="cannot be written to: Not a directory"):
        BatchRun(replace(job, out=tmp_path / "file" / "run")).run()


def test_nothing_to_resume(job: BatchJob) -> None:
    with pytest.raises(DataError, match=r"snapshot\.json"):
        BatchRun(replace(job, resume=True)).run()
    assert not job.out.exists()


def test_nothing_to_learn(job: BatchJob, model: Path, tmp_path: Path) -> None:
    alike = [rollout(f"r{n}", "g", 1.0) for n in range(3)]
    store = tiny_store(tmp_path / "alike.duckdb", model, alike)
    with pytest.raises(NothingToLearn, match="3 zero_variance"):
        BatchRun(replace(job, store=store)).run()


def test_an_epoch_that_teaches_nothing_is_the_last(job: BatchJob, model: Path, tmp_path: Path) -> None:
    """However many steps were asked for: what was cut off, all of it, is masked."""
    late = [rollout(f"r{n}", "g", float(n), status="timeout") for n in range(3)]
    store = tiny_store(tmp_path / "late.duckdb", model, late)
    loss = job.config.loss.model_copy(update={"overlong": "mask"})
    config = job.config.model_copy(update={"loss": loss})
    with pytest.raises(NothingToLearn):
        BatchRun(replace(job, store=store, config=config, num_steps=5)).run()


def test_another_tokenizer_is_refused_with_the_count(job: BatchJob, tmp_path: Path) -> None:
    store = record(tmp_path / "other.duckdb", groups())
    with pytest.raises(DataError, match=r"\d+ of \d+ trajectories cannot be trained on: .*tokenizer"):
        BatchRun(replace(job, store=store)).run()
    assert not job.out.exists()


def test_curves_are_drawn(job: BatchJob, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr(batch.reporting, "draw", lambda path, curves, title: drawn.update(curves))
    BatchRun(job).run()
    assert drawn == {"training": ([1, 2, 3, 4], [0.5] * 4)}

"""Updates of an engine's weights: what goes through, what is refused, and that nothing stays half done."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.errors import EngineUnfit, WeightsError
from polar_mitm.upstream.engine import step_of
from polar_mitm.upstream.probe import probe
from polar_mitm.upstream.weights import UNKNOWN, Check, EngineWeights, Mode
from tests.support.updatable_engine import DIE, UpdatableEngine, adapter, checkpoint, scores

IDS = [5, 7, 1, 9, 3]
SWAPPED = ["pause", "reload_weights", "reset_prefix_cache", "update_weight_version", "resume"]


def check(weights: float, ids: list[int] = IDS) -> Check:
    return Check(ids, scores(weights, ids))


class Bench:
    def __init__(self, engine: UpdatableEngine, weights: EngineWeights, heard: list[str], path: Path) -> None:
        self.engine, self.weights, self.heard, self.path = engine, weights, heard, path

    def folder(self, name: str, weights: float, **how: Any) -> Path:
        return checkpoint(self.path / name, weights, **how)


@asynccontextmanager
async def bench(path: Path, *, timeout_s: float = 20.0, **how: Any) -> AsyncIterator[Bench]:
    """An engine that was started with weights 1, called step-0."""
    heard: list[str] = []
    started_with = checkpoint(path / "start", 1.0, **how.pop("start", {}))
    async with UpdatableEngine(started_with, **how) as engine:
        told = heard.append
        async with EngineWeights(engine.url, engine.model, told=told, timeout_s=timeout_s) as weights:
            await weights.name("step-0")
            engine.done.clear()
            heard.clear()
            yield Bench(engine, weights, heard, path)


@pytest.fixture
async def b(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path) as made:
        yield made


def as_before(b: Bench, holds: float = 1.0, version: str = "step-0") -> None:
    assert (b.engine.holds, b.engine.weight_version) == (holds, version)
    assert b.engine.running.is_set()


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
async def test_an_update(b: Bench, mode: Mode) -> None:
    updated = await b.weights.update(b.folder("new", 2.0), "step-1", check=check(2.0), mode=mode)
    assert updated.version == "step-1" and updated.paused_s > 0
    assert updated.difference is not None and updated.difference < 1e-9
    assert b.engine.done == SWAPPED
    assert b.heard == ["step-1"]
    assert await b.weights.version() == "step-1"
    as_before(b, 2.0, "step-1")


async def test_without_a_check_nothing_is_scored(b: Bench) -> None:
    assert (await b.weights.update(b.folder("new", 2.0), "step-1")).difference is None
    as_before(b, 2.0, "step-1")


async def test_a_relative_folder_is_named_as_the_engine_sees_it(
    b: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    b.folder("new", 2.0)
    monkeypatch.chdir(b.path)
    await b.weights.update(Path("new"), "step-1", check=check(2.0))
    as_before(b, 2.0, "step-1")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"tied": True}, "tied embeddings"),
        ({"tied": None, "head": False}, "tied embeddings"),
        ({"rows": 5}, r"of another shape: lm_head.weight is \[5, 2\], and \[4, 2\] in "),
        ({"head": False}, r"of another shape: lm_head.weight is nothing"),
    ],
)
async def test_a_folder_that_would_not_be_taken_whole_never_reaches_the_engine(
    b: Bench, how: dict[str, Any], words: str
) -> None:
    with pytest.raises(WeightsError, match=words):
        await b.weights.update(b.folder("new", 2.0, **how), "step-1", check=check(2.0))
    assert b.engine.done == [] and b.heard == []
    as_before(b)


async def test_folders_that_are_none(b: Bench) -> None:
    cut = b.folder("cut", 2.0)
    whole = (cut / "model.safetensors").read_bytes()
    nowhere = b.path / "nowhere"
    with pytest.raises(WeightsError, match="holds no weights"):
        await b.weights.update(nowhere, "step-1")
    for content in (whole[:-1], whole[:20], b"", b"\xff" * 40):
        (cut / "model.safetensors").write_bytes(content)
        with pytest.raises(WeightsError, match="cannot be read"):
            await b.weights.update(cut, "step-1")
    assert b.engine.done == []
    as_before(b)


async def test_an_engine_with_tied_embeddings_is_told_of(tmp_path: Path) -> None:
    async with bench(tmp_path, start={"tied": True, "head": False}) as b:
        with pytest.raises(WeightsError, match="start it with an untied copy"):
            await b.weights.update(b.folder("new", 2.0), "step-1")


async def test_an_engine_that_scores_otherwise_gets_its_old_weights_back(b: Bench) -> None:
    await b.weights.update(b.folder("good", 2.0), "step-1", check=check(2.0))
    with pytest.raises(WeightsError, match=r"by up to 0\.5 nats .* It serves step-1 again") as caught:
        await b.weights.update(b.folder("bad", 3.0), "step-2", check=check(3.5))
    assert caught.value.serving == "step-1"
    assert b.heard == ["step-1", "step-2", "step-1"]
    as_before(b, 2.0, "step-1")
    await b.weights.update(b.path / "bad", "step-2b", check=check(3.0))
    as_before(b, 3.0, "step-2b")


async def test_an_engine_that_keeps_the_old_weights_is_found_out(b: Bench) -> None:
    (b.folder("new", 2.0) / "weights").write_text("1.0")
    with pytest.raises(WeightsError, match="these are the old weights"):
        await b.weights.update(b.path / "new", "step-1", check=check(2.0))
    as_before(b)


@pytest.mark.parametrize("at", ["reload_weights", "/reset_prefix_cache", "/update_weight_version"])
async def test_an_engine_that_refuses_in_the_middle_is_set_back(b: Bench, at: str) -> None:
    b.engine.faults[at] = ["no room"]
    with pytest.raises(WeightsError, match=r"with 500: no room\. It serves step-0, as before") as caught:
        await b.weights.update(b.folder("new", 2.0), "step-1", check=check(2.0))
    assert caught.value.serving == "step-0"
    assert b.heard == ["step-0"]
    as_before(b)
    await b.weights.update(b.path / "new", "step-1", check=check(2.0))
    as_before(b, 2.0, "step-1")


async def test_a_pause_that_is_refused_changes_nothing(b: Bench) -> None:
    b.engine.faults["/pause"] = ["busy"]
    with pytest.raises(WeightsError, match="Its weights are those of step-0"):
        await b.weights.update(b.folder("new", 2.0), "step-1")
    assert b.engine.done == ["pause", "resume"]
    as_before(b)


async def test_an_engine_that_cannot_be_set_back_serves_nobody_knows_what(b: Bench) -> None:
    b.engine.faults["reload_weights"] = ["no room", "still none"]
    with pytest.raises(WeightsError, match=r"no room\. What it serves now is not known .*still none"):
        await b.weights.update(b.folder("new", 2.0), "step-1")
    assert b.heard[-1] == UNKNOWN and step_of(UNKNOWN) is None
    assert b.engine.weight_version == UNKNOWN
    assert b.engine.running.is_set()


@pytest.mark.parametrize("at", ["/pause", "reload_weights", "/reset_prefix_cache", "/resume"])
async def test_an_engine_that_dies_in_the_middle(b: Bench, at: str) -> None:
    b.engine.faults[at] = [DIE]
    with pytest.raises(WeightsError, match="does not answer"):
        await b.weights.update(b.folder("new", 2.0), "step-1", check=check(2.0))


async def test_an_engine_that_hangs_is_resumed(tmp_path: Path) -> None:
    async with bench(tmp_path, timeout_s=0.3) as b:
        b.engine.faults["reload_weights"] = [asyncio.Event()]
        with pytest.raises(WeightsError, match="did not answer /collective_rpc in time"):
            await b.weights.update(b.folder("new", 2.0), "step-1")
        as_before(b)


async def test_an_update_that_is_interrupted_is_undone(b: Bench) -> None:
    b.engine.faults["reload_weights"] = [asyncio.Event()]
    updating = asyncio.create_task(b.weights.update(b.folder("new", 2.0), "step-1"))
    while "reload_weights" not in b.engine.done:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    updating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await updating
    assert b.engine.done[-1] == "resume" and b.heard == ["step-0"]
    as_before(b)


async def test_an_engine_that_was_left_paused_is_healed_by_an_update(b: Bench) -> None:
    b.engine.running.clear()
    await b.weights.update(b.folder("new", 2.0), "step-1", check=check(2.0))
    as_before(b, 2.0, "step-1")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Check([1], [0.0]), "two ids at least"),
        (Check([1, 2, 3], [0.0, -1.0]), "a logprob for each"),
        (Check([1, 2, 3], [0.0, -1.0, math.nan]), "not finite"),
    ],
)
async def test_checks_that_check_nothing(b: Bench, given: Check, words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        await b.weights.update(b.folder("new", 2.0), "step-1", check=given)
    as_before(b)


def test_positions() -> None:
    for num in (2, 5, 17, 18, 1000):
        positions = Check(range(num), [0.0] * num).positions
        assert positions[-1] == num - 1 and positions == sorted(set(positions))
        assert len(positions) == min(num - 1, 16) and positions[0] >= 1


# --- adapters -------------------------------------------------------------------------------------------


async def test_adapters_replace_one_another_under_one_name(b: Bench) -> None:
    for step, weights in ((1, 5.0), (2, 6.0), (3, 7.0)):
        folder = adapter(b.path / f"step-{step}", weights)
        await b.weights.load_lora(folder, "policy", f"step-{step}", check=check(weights))
        assert list(b.engine.adapters) == ["policy"]
        as_before(b, 1.0, f"step-{step}")
    assert b.heard == ["step-1", "step-2", "step-3"]
    assert (await probe(b.engine.url)).model == b.engine.model
    # A second trainer finds what the first one left.
    async with EngineWeights(b.engine.url, b.engine.model) as other:
        await other.load_lora(b.path / "step-1", "policy", "step-4", check=check(5.0))


async def test_a_broken_adapter_leaves_the_old_one(b: Bench) -> None:
    await b.weights.load_lora(adapter(b.path / "one", 5.0), "policy", "step-1", check=check(5.0))
    two = adapter(b.path / "two", 6.0)
    b.engine.faults["/v1/load_lora_adapter"] = ["rank 64 is too large"]
    with pytest.raises(WeightsError, match=r"rank 64 is too large\. It serves step-1, as before"):
        await b.weights.load_lora(two, "policy", "step-2", check=check(6.0))
    with pytest.raises(WeightsError, match="It serves step-1 again"):
        await b.weights.load_lora(two, "policy", "step-2", check=check(6.5))
    with pytest.raises(WeightsError, match=r"adapter_config\.json cannot be read"):
        await b.weights.load_lora(b.folder("new", 2.0), "policy", "step-2")
    await b.weights.load_lora(b.path / "one", "policy", "step-1b", check=check(5.0))
    as_before(b, 1.0, "step-1b")


async def test_a_first_adapter_that_is_wrong_is_unloaded(b: Bench) -> None:
    with pytest.raises(WeightsError, match="It serves step-0 again"):
        await b.weights.load_lora(adapter(b.path / "one", 5.0), "policy", "step-1", check=check(9.0))
    assert b.engine.adapters == {}
    as_before(b)


async def test_somebody_elses_adapter_is_left_alone(b: Bench) -> None:
    b.engine.adapters["policy"] = adapter(b.path / "theirs", 5.0)
    with pytest.raises(WeightsError, match="unload it first"):
        await b.weights.load_lora(adapter(b.path / "one", 5.0), "policy", "step-1")


async def test_an_engine_without_adapters_says_how_to_get_them(tmp_path: Path) -> None:
    async with bench(tmp_path, lora=False) as b:
        with pytest.raises(WeightsError, match=r"engine up --lora RANK.*It serves step-0, as before"):
            await b.weights.load_lora(adapter(tmp_path / "one", 5.0), "policy", "step-1")
        as_before(b)


# --- from a GPU -----------------------------------------------------------------------------------------


async def test_a_transfer(b: Bench) -> None:
    for step in (1, 2):
        chunks = [{"weights": 0.0}, {"weights": float(step)}]
        await b.weights.transfer(chunks, f"step-{step}", check=check(step))
        as_before(b, step, f"step-{step}")
    assert b.engine.done.count("init_weight_transfer_engine") == 1
    assert b.engine.done.count("update_weights") == 4


async def test_a_transfer_that_fails_has_no_way_back(b: Bench) -> None:
    b.engine.faults["/update_weights"] = ["illegal memory access"]
    with pytest.raises(WeightsError, match=r"not known .*load a checkpoint"):
        await b.weights.transfer([{"weights": 2.0}], "step-1", check=check(2.0))
    assert b.heard == [UNKNOWN] and b.engine.running.is_set()


# --- and around -----------------------------------------------------------------------------------------


async def test_an_engine_in_production_says_how_to_start_one_for_training(tmp_path: Path) -> None:
    async with ScriptedEngine() as engine, EngineWeights(engine.url, engine.model) as weights:
        with pytest.raises(WeightsError, match="engine up --dev"):
            await weights.version()
    with pytest.raises(WeightsError, match="does not answer"):
        async with EngineWeights("http://127.0.0.1:9", "m"):
            raise AssertionError("there is no engine")


async def test_a_paused_engine_fails_the_probe_at_once(b: Bench) -> None:
    assert (await probe(b.engine.url)).weight_version == "step-0"
    b.engine.running.clear()
    with pytest.raises(EngineUnfit, match="is paused"):
        await probe(b.engine.url)


@pytest.mark.parametrize(
    ("version", "step"),
    [("step-0", 0), ("step-12", 12), ("step-007", None), ("step--1", None), ("step-", None), ("", None)]
    + [(v, None) for v in ("default", "step-3 ", "my/step-3", "step-3\n", UNKNOWN, None)],
)
def test_steps_of_versions(version: str | None, step: int | None) -> None:
    assert step_of(version) == step

"""Learning, for real: pi, unmodified, a real vLLM, GRPO, and weights back; a shorter run than the README's.

What it leaves is looked at from all sides: the reward on held-out tasks rose beyond noise; calls bear the
version that sampled them; a step leads to wire bytes; the last checkpoint is the same model to transformers
and to an engine that starts with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pytest

from polar_mitm import engine
from polar_mitm.cache import default_cache
from tests.e2e.conftest import Cli
from tests.support.record_fixtures import POLAR_MITM

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

FIXTURES = Path(__file__).parents[2] / "fixtures"
STEPS, GROUP_SIZE, GROUPS, HELD_OUT = 10, 8, 4, 48
ROUNDING = 1e-3  # nats; float32 on both sides
CONFIG = """
name = "short"
out = "{out}"
steps = {steps}

[engine]
model = "{fixtures}/tiny_policy/model"
max_model_len = 4096

[rollouts]
harness = "pi"
tasks = "{fixtures}/tasks/secret_code.py"
group_size = {group_size}
groups_per_step = {groups}
max_tokens = 96

[optimiser]
lr = 3e-4
warmup_steps = 2

[evaluation]
num_tasks = {held_out}
"""


@dataclass
class Run:
    """A run that is over: its folder, and its last word."""

    out: Path
    told: Any


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The machine's cache, but with an engine of its own: another one may be running for other tests."""
    own, shared = tmp_path_factory.mktemp("cache"), default_cache()
    (own / "engine").mkdir()
    for each in [*shared.iterdir(), *(shared / "engine").glob("vllm-*")]:
        if each.name != "engine":
            (own / each.relative_to(shared)).symlink_to(each)
    return own


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("rl")
    config = folder / "short.toml"
    config.write_text(
        CONFIG.format(
            out=folder / "out", steps=STEPS, fixtures=FIXTURES, group_size=GROUP_SIZE, groups=GROUPS,
            held_out=HELD_OUT,
        )
    )  # fmt: skip
    done = subprocess.run(
        [POLAR_MITM, "rl", config, "--json"],
        env={**os.environ, "POLAR_MITM_CACHE": str(cache), "TERM": "dumb"},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    print(done.stderr, file=sys.stderr)
    assert done.returncode == 0
    return Run(folder / "out", json.loads(done.stdout.strip().splitlines()[-1]))


def test_the_reward_on_held_out_tasks_rises_beyond_noise(run: Run) -> None:
    before, after = run.told["before"], run.told["after"]
    noise = (before["stderr"] ** 2 + after["stderr"] ** 2) ** 0.5
    assert after["reward"] > before["reward"] + 3 * noise, run.told
    assert run.told["steps"] == STEPS
    assert (run.out / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_each_call_bears_the_version_that_sampled_it(run: Run) -> None:
    """Strictly on policy: what step N was given was sampled by step N-1's weights, and nothing else."""
    with duckdb.connect() as con:
        con.execute(f"ATTACH '{run.out / 'rollouts.duckdb'}' AS s (READ_ONLY)")
        con.execute(f"ATTACH '{run.out / 'run.duckdb'}' AS r (READ_ONLY)")
        given = con.execute(
            "SELECT DISTINCT p.policy_version, c.policy_version, c.policy_version_last "
            "FROM r.steps p JOIN r.step_rows t USING (run_id, step) "
            "JOIN s.calls c ON c.rollout_id = t.rollout_id"
        ).fetchall()
    assert given and all(
        made == f"step-{int(sampled.removeprefix('step-')) + 1}" and last in (None, sampled)
        for made, sampled, last in given
    )


def test_a_step_leads_to_wire_bytes(run: Run) -> None:
    """From a step, to a trajectory, to its spans, to the bytes that went over the harness's connection."""
    with duckdb.connect() as con:
        con.execute(f"ATTACH '{run.out / 'rollouts.duckdb'}' AS s (READ_ONLY)")
        con.execute(f"ATTACH '{run.out / 'run.duckdb'}' AS r (READ_ONLY)")
        con.execute("USE s")
        steps, rows, found = con.execute(
            "SELECT count(DISTINCT t.step), count(DISTINCT t.trajectory_id), count(DISTINCT w.call_id) "
            "FROM r.step_rows t JOIN trajectories j USING (trajectory_id), unnest(j.spans) u(span) "
            "JOIN wire w ON w.call_id = span.call_id WHERE w.response_body IS NOT NULL"
        ).fetchone() or (0, 0, 0)
    assert 0 < steps <= STEPS
    assert 0 < rows < found  # most rollouts make more than one call


async def test_the_last_checkpoint_scores_the_same_in_transformers_and_in_an_engine(
    run: Run, cli: Cli, cache: Path
) -> None:
    """What the last weights sampled, scored again by who loads the last checkpoint."""
    checkpoint, version = Path(run.told["checkpoint"]), run.told["policy_version"]
    with duckdb.connect(str(run.out / "rollouts.duckdb"), read_only=True) as con:
        rollout, model = con.execute(
            "SELECT rollout_id, any_value(model_served) FROM calls WHERE policy_version = ? "
            "GROUP BY rollout_id ORDER BY count(*) DESC LIMIT 1",
            [version],
        ).fetchone() or ("", "")
    state = engine.up(model=str(checkpoint), cache=cache, max_model_len=4096, dtype="float32")
    try:
        for how in (("--model", checkpoint), ("--engine", state.url)):
            done = await cli(
                "verify", run.out / "rollouts.duckdb", "--rollout", rollout, *how,
                "--weights", f"{model}@{version}", "--tolerance", ROUNDING, "--json",
            )  # fmt: skip
            assert done.code == 0, (how, done.out, done.err)
            assert done.json()["drift"]["num_tokens"] > 0
    finally:
        engine.down(cache)

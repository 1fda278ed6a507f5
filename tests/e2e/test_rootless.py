"""The command line as an ordinary user: no root, no capability, somebody else's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar_mitm.cache import default_cache
from polar_mitm.store import open_reader
from polar_mitm_sandbox import recipes
from polar_mitm_sandbox.install import ensure_harness
from tests.e2e.conftest import HARNESSES, Cli
from tests.e2e.engines import LAST_WORDS, HarnessEngine
from tests.sandbox.users import User, kinds

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.mark.parametrize("kind", [kind for kind in kinds() if kind == "user"])
async def test_run_without_root(kind: str, cli: Cli) -> None:
    name = "claude-code"
    ensure_harness(recipes.load(name), default_cache())  # an ordinary user may only read the cache here
    user = User(kind, "", Path())
    with user.directory() as home:
        store, task = home / "run.duckdb", user.own(home / "task")
        cli.become = user.become()
        cli.env |= {"HOME": str(home), "POLAR_MITM_CACHE": str(default_cache()), "TMPDIR": str(home)}
        async with HarnessEngine() as engine:
            run = await cli.run("--store", store, "--engine", engine.url, command=HARNESSES[name], task=task)
            done = await run.ended()
        assert (done.code, done.out.rstrip("\n")) == (0, LAST_WORDS), done.err
        assert (task / "hello.txt").read_text() == "hi"
        assert (task / "hello.txt").stat().st_uid == store.stat().st_uid == user.uid != 0
        with open_reader(store) as reader:
            (rollout,) = reader.rollouts()
            calls = reader.calls()
        assert (rollout.status, rollout.incomplete) == ("completed", None)
        assert [c.completion_token_ids for c in calls] == [c.completion_token_ids for c in engine.asked]
        assert run.leftovers() == []

"""The command line as an ordinary user: no root, no capability, somebody else's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar_mitm.cache import default_cache
from polar_mitm.store import open_reader
from tests.e2e.conftest import Cli
from tests.e2e.engines import LAST_WORDS, HarnessEngine
from tests.sandbox.users import User, kinds
from tests.support.record_fixtures import HARNESSES

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.mark.parametrize("name", ["claude-code", "pi"])  # a native program, and one for node
@pytest.mark.parametrize("kind", [kind for kind in kinds() if kind == "user"])
async def test_run_without_root(kind: str, name: str, cli: Cli) -> None:
    user = User(kind, "", Path())
    with user.directory() as home:
        store, task = home / "run.duckdb", user.own(home / "task")
        cli.become = user.become()
        # This user may only read the cache.
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

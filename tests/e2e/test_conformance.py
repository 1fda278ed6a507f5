"""Every harness that has a recipe gets through what the fast subset, which CI runs as such, leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar_mitm_sandbox import recipes
from tests.e2e.conftest import Cli

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
SCENARIOS = ("resume", "compaction", "sub-agents", "image", "cut")
LACKING = {("pi", "sub-agents"), ("qwen-code", "image")}


@pytest.mark.parametrize("name", [name for name in recipes.available() if name != "sdk-agent"])
async def test_beyond_the_fast_subset(name: str, cli: Cli, tmp_path: Path) -> None:
    given = [word for scenario in SCENARIOS for word in ("--scenario", scenario)]
    started = await cli.start("conformance", name, *given, "--json", "--out", tmp_path / "runs")
    done = await started.ended(800)
    rows = {row["scenario"]: row for row in done.json()["rows"]}
    assert done.code == 0, [row for row in rows.values() if row["outcome"] == "fail"]
    lacking = {(name, scenario) for scenario, row in rows.items() if row["outcome"] == "n/a"}
    assert lacking == {each for each in LACKING if each[0] == name}
    assert all(row["transports"] and row["dialects"] for row in rows.values())

"""The fast subset of the conformance scenarios passes with every harness that has a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar_mitm_sandbox import recipes
from tests.e2e.conftest import Cli

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", [name for name in recipes.available() if name != "sdk-agent"])
async def test_fast_subset(name: str, cli: Cli, tmp_path: Path) -> None:
    started = await cli.start("conformance", name, "--fast", "--json", "--out", tmp_path / "runs")
    done = await started.ended(500)
    document = done.json()
    assert document["ok"] and done.code == 0, [r for r in document["rows"] if r["outcome"] == "fail"]
    assert {row["outcome"] for row in document["rows"]} == {"pass"}
    assert all(row["transports"] and row["dialects"] for row in document["rows"])

"""The matrix: what it sums up, and what it says of a newer version."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from polar_mitm.conformance.matrix import Matrix, changes, markdown, stability, summary
from polar_mitm.conformance.rows import Row


def row(scenario: str = "two-turns", outcome: Any = "pass", version: str = "1", **fields: Any) -> Row:
    given: dict[str, Any] = {"exit_code": 0, "statuses": {"ok": 2}, "roles": {"main": 2}, "followers": 2}
    given |= {"continued": 2, "dialects": ["anthropic"], "transports": ["HTTP/1.1 stream"]}
    return Row("h", version, scenario, outcome, **{**given, **fields})


def test_a_summary_counts_what_was_judged_and_names_what_was_enough() -> None:
    rows = [
        row(),
        row("cut", "fail", continued=0),
        row("image", "n/a"),
        row("trust-nothing", "no", trust=[]),
        row("trust-system", "yes", trust=["system"]),
        row("trust-node-system", "yes", trust=["system", "NODE_USE_SYSTEM_CA"]),
    ]
    found = summary("h", "1", rows)
    assert found.passed == "1/2"
    assert found.trust == "system, system + NODE_USE_SYSTEM_CA"
    assert found.prefixes == "10/12"
    assert summary("h", "1", rows[:1]).trust == "not asked"
    assert summary("h", "1", [row("trust-nothing", "yes", trust=[])]).trust == "nothing"


def test_failures_are_rows_that_failed_and_harnesses_that_were_not_there() -> None:
    assert Matrix([row(), row("image", "n/a"), row("trust-nothing", "no", trust=[])]).failures == 0
    assert Matrix([row(outcome="fail")], {"other": "no network"}).failures == 2


def test_a_page_has_every_row_and_whole_tables() -> None:
    rows = [row(), row("cut", "fail", reasons=["a | b\nc"]), row(version="2")]
    page = markdown(Matrix(rows, {"other": "no network"}, {"h 1 -> 2": []}))
    tables = re.findall(r"(?:^\|.*\n)+", page, re.M)
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    grid = tables[1].splitlines()
    assert grid[0].endswith("| h 1 | h 2 |") and "| cut |" in grid[3] and grid[3].endswith("| **FAIL** |  |")
    assert "a / b c" in tables[2] and len(tables[2].splitlines()) == 2 + len(rows)
    assert "other could not be run: no network" in page and "- no difference" in page


def test_a_row_survives_json() -> None:
    whole = row(trust=[], reasons=["r"], fallbacks={"history_edited": 1})
    assert msgspec.json.decode(msgspec.json.encode(whole), type=Row) == whole


def test_stability_says_why() -> None:
    assert stability(row(continued=1, fallbacks={"history_edited": 1})) == "1/2 (1 history_edited)"
    assert stability(row(followers=0, continued=0)) == "–"


def test_changes_name_outcomes_first_and_leave_out_what_always_differs() -> None:
    old = [row(seconds=1.0), row("cut"), row("gone")]
    new = [
        row(version="2", seconds=9.0, roles={"main": 2, "auxiliary": 1}, compression=["gzip"]),
        row("cut", "fail", version="2", reasons=["exit code 1"], exit_code=1),
        row("new", version="2"),
    ]
    assert changes(old, new) == [
        "cut: outcome pass -> fail; exit code 1",
        "two-turns: roles 2 main -> 2 main, 1 auxiliary",
        "two-turns: compression none -> gzip",
        "cut: exit_code 0 -> 1",
    ]
    assert changes(old, [row(version="2")]) == []

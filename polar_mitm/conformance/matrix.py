"""All rows together: by harness, as Markdown, and what differs between two versions of one harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct, field

from polar_mitm.conformance.rows import Row
from polar_mitm.conformance.scenarios import SCENARIOS

_MARKS = {"pass": "pass", "fail": "**FAIL**", "n/a": "–", "yes": "yes", "no": "no"}
_NOT_COMPARED = ("version", "seconds", "reasons")


class Matrix(Struct):
    """What `polar-mitm conformance` found. `unavailable`: why a harness could not be run at all."""

    rows: list[Row] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    changes: dict[str, list[str]] = field(default_factory=dict)
    """Where a newest version was compared: by `harness pinned -> newest`, what is different."""

    @property
    def failures(self) -> int:
        return sum(row.failed for row in self.rows) + len(self.unavailable)

    def versions(self) -> list[tuple[str, str]]:
        """Harnesses at their versions, in the order of the rows."""
        return list(dict.fromkeys((row.harness, row.version) for row in self.rows))

    def of(self, harness: str, version: str) -> list[Row]:
        return [row for row in self.rows if (row.harness, row.version) == (harness, version)]


class Summary(Struct):
    """One harness at one version over all its scenarios, as text.

    `trust` names the ways of trusting the CA that were enough alone; `prefixes` counts the prompts that
    began with what came before them, of those that could.
    """

    harness: str
    version: str
    passed: str
    trust: str
    transport: str
    compression: str
    dialect: str
    roles: str
    prefixes: str


SUMMARY = "harness,version,passed,CA: enough alone,transport,compression,dialect,roles,prefixes kept"


def summary(harness: str, version: str, rows: Sequence[Row]) -> Summary:
    """What the rows of one harness come to."""
    judged = [row for row in rows if row.outcome in ("pass", "fail")]
    asked = [row for row in rows if row.trust is not None]
    enough = [" + ".join(row.trust or ["nothing"]) for row in asked if row.outcome == "yes"]
    return Summary(
        harness,
        version,
        f"{sum(row.outcome == 'pass' for row in judged)}/{len(judged)}",
        ", ".join(enough) if asked else "not asked",
        _joined([each for row in rows for each in row.transports]),
        _joined([each for row in rows for each in row.compression]),
        _joined([each for row in rows for each in row.dialects]),
        _joined([each for row in rows for each in row.roles]),
        f"{sum(row.continued for row in rows)}/{sum(row.followers for row in rows)}",
    )


def cells(row: Row) -> tuple[Any, ...]:
    """A row for a table, under `COLUMNS`."""
    return (
        row.harness, row.version, row.scenario, row.outcome, row.exit_code, counts(row.statuses),
        counts(row.roles), ", ".join(row.dialects), ", ".join(row.transports), ", ".join(row.compression),
        stability(row), row.seconds, "; ".join(row.reasons),
    )  # fmt: skip


COLUMNS = "harness,version,scenario,outcome,exit,calls,roles,dialect,transport,compression,prefix,seconds,why"


def stability(row: Row) -> str:
    """How many prompts began with what came before them, of those that could, and what broke the others."""
    if not row.followers:
        return "–"
    why = f" ({counts(row.fallbacks)})" if row.fallbacks else ""
    return f"{row.continued}/{row.followers}{why}"


def counts(named: dict[str, int]) -> str:
    """`2 ok, 1 failed`."""
    return ", ".join(f"{number} {name}" for name, number in named.items())


def markdown(matrix: Matrix) -> str:
    """The whole matrix as a page: harnesses, scenarios by harness, every run."""
    versions = matrix.versions()
    by_name = [{row.scenario: row for row in matrix.of(*each)} for each in versions]
    ran = [name for name in SCENARIOS if any(name in rows for rows in by_name)]
    grid = [
        [
            name,
            SCENARIOS[name].title,
            *(_MARKS[rows[name].outcome] if name in rows else "" for rows in by_name),
        ]
        for name in ran
    ]
    summaries = [msgspec.structs.astuple(summary(*each, matrix.of(*each))) for each in versions]
    out = ["# Conformance", "", *_table(SUMMARY.split(","), summaries)]
    out += _table(["scenario", "", *(f"{harness} {version}" for harness, version in versions)], grid)
    out += [f"- {name} could not be run: {why}" for name, why in matrix.unavailable.items()]
    for what, found in matrix.changes.items():
        out += ["", f"## {what}", "", *(f"- {change}" for change in found or ["no difference"])]
    out += ["", "## Every run", ""]
    out += _table(COLUMNS.split(","), [["" if c is None else str(c) for c in cells(r)] for r in matrix.rows])
    return "\n".join(out).rstrip() + "\n"


def changes(pinned: Sequence[Row], newest: Sequence[Row]) -> list[str]:
    """What is different in the newest version's rows: outcomes first, then what was seen on the way."""
    old = {row.scenario: row for row in pinned}
    outcomes, others = [], []
    for row in (row for row in newest if row.scenario in old):
        before, now = msgspec.to_builtins(old[row.scenario]), msgspec.to_builtins(row)
        for name in (n for n in now if n not in _NOT_COMPARED and now[n] != before[n]):
            change = f"{row.scenario}: {name} {_shown(before[name])} -> {_shown(now[name])}"
            if name == "outcome":
                outcomes.append("; ".join([change, *row.reasons]))
            else:
                others.append(change)
    return outcomes + others


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return counts(value) or "none"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [
        f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in line)} |" for line in lines
    ] + [""]


def _joined(names: Sequence[str]) -> str:
    return ", ".join(sorted(set(names)))

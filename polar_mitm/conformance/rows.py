"""One line of the matrix: a harness at a version in a scenario, judged, and what was seen of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from msgspec import Struct, field

from polar_mitm.conformance.scenarios import Ran, Scenario, ends_well, has, is_recorded
from polar_mitm.types import ModelCall

Outcome = Literal["pass", "fail", "n/a", "yes", "no"]


class Row(Struct):
    """What a run came to.

    `outcome` "n/a": the harness lacks what the scenario is about, and `reasons` say what. "yes" and "no"
    answer a scenario that only asks (does this way of trusting the CA do?). `continued` of the `followers`,
    calls with an earlier one to go on from, kept the ids of that one as their prompt's beginning; `fallbacks`
    says why the others did not, `edits` what was edited without harm. Lists are without duplicates, counts by
    name.
    """

    harness: str
    version: str
    scenario: str
    outcome: Outcome
    reasons: list[str] = field(default_factory=list)
    trust: list[str] | None = None
    exit_code: int | None = None
    seconds: float = 0.0
    calls: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    roles: dict[str, int] = field(default_factory=dict)
    dialects: list[str] = field(default_factory=list)
    transports: list[str] = field(default_factory=list)
    compression: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    followers: int = 0
    continued: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    edits: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.outcome == "fail"


def row_of(harness: str, version: str, scenario: Scenario, ran: Ran) -> Row:
    """Judge a run."""
    outcome, reasons = _verdict(scenario, ran)
    row = Row(harness, version, scenario.name, outcome, reasons)
    row.trust = None if scenario.trust is None else list(scenario.trust)
    row.exit_code, row.seconds, row.calls = ran.exit_code, round(ran.seconds, 1), len(ran.calls)
    row.statuses = _counted("prewarm" if "prewarm" in call.notes else call.status for call in ran.calls)
    row.roles = _counted(call.role for call in ran.calls)
    row.dialects = sorted({call.dialect for call in ran.calls})
    row.transports = sorted({transport(call) for call in ran.calls})
    row.compression = sorted({compression(call) for call in ran.calls})
    row.models = sorted({call.model_requested for call in ran.calls if call.model_requested})
    followers = [c for c in ran.calls if c.status == "ok" and _follows(c)]
    row.followers = len(followers)
    row.continued = sum(call.continuation == "exact" for call in followers)
    row.fallbacks = _counted(c.fallback for c in followers if c.continuation != "exact" and c.fallback)
    row.edits = sorted({edit for call in followers for edit in call.edits})
    row.refused = sorted({event.name for event in ran.events if event.verdict == "refused"})
    return row


def _verdict(scenario: Scenario, ran: Ran) -> tuple[Outcome, list[str]]:
    if why := scenario.beyond(ran):
        return "n/a", [why]
    checks = [ends_well, *(has(name, text) for name, text in scenario.leaves.items()), is_recorded]
    problems = [problem for check in (*checks, *scenario.checks) if (problem := check(ran))]
    if scenario.asks:  # whoever was answered has trusted the CA, however slow a machine is
        return ("yes" if any(call.status == "ok" for call in ran.calls) else "no"), problems
    return ("fail" if problems else "pass"), problems


def _follows(call: ModelCall) -> bool:
    return call.role in ("main", "subagent") and call.fallback != "first_call"


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def transport(call: ModelCall) -> str:
    """How a call came: the version of HTTP, or WebSocket; and whether the answer was streamed."""
    headers = _headers(call)
    if headers.get("upgrade", "").lower() == "websocket" or call.route.startswith("WS "):
        return "WebSocket"
    return f"{call.wire.http_version or 'HTTP'} {'stream' if call.stream else 'whole'}"


def compression(call: ModelCall) -> str:
    """How a call's body was compressed; "none" where it was not."""
    headers = _headers(call)
    if "permessage-deflate" in headers.get("sec-websocket-extensions", ""):
        return "permessage-deflate"
    return headers.get("content-encoding", "none")


def _headers(call: ModelCall) -> dict[str, str]:
    return {name.lower(): value for name, value in call.wire.request_headers}

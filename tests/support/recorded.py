"""Reads `fixtures/recorded/`: real harnesses' calls, and what a replay through `Exchange` makes of them.

A run is a folder; `run.json` says what ran and what was said, and each call N is a few files:

    NN-request.json   method, path, headers and body, as the harness sent them
    NN-engine.sse     the engine's answer, byte for byte
    NN-upstream.json  what the engine was asked                     derived: see `derive`
    NN-response.*     what the harness got: `.sse` or `.json`       derived
    NN-call.json      status, headers and the canonical request     derived
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from polar_mitm.asking import UpstreamRequest
from polar_mitm.config import Settings
from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.exchange import Exchange
from polar_mitm.types import ChatRequest, Wire
from polar_mitm.upstream.engine import EngineInfo

FOLDER = Path(__file__).parents[2] / "fixtures" / "recorded"
STARTED_AT = 1_700_000_000.0
"""When every recorded call began, once scrubbed."""


@dataclass(frozen=True)
class Call:
    """One exchange of a recorded run; `body` and `engine` are what came in from either side."""

    number: int
    call_id: str
    dialect: str
    engine_info: EngineInfo
    method: str
    path: str
    headers: list[list[str]]
    body: Any
    engine: bytes
    started_at: float = STARTED_AT

    @property
    def raw(self) -> bytes:
        """The request's body as both programs write JSON: compact, in their own order, not escaped."""
        return compact(self.body)

    def decode(self) -> ChatRequest:
        lower = {name.lower(): value for name, value in self.headers}
        return DIALECTS[self.dialect].decode(self.raw, lower, self.path)

    def replay(self, pieces: Iterable[bytes] | None = None) -> Replay:
        """The call once more, its engine answering with `pieces` (its bytes as one)."""
        exchange = Exchange(
            DIALECTS[self.dialect],
            self.engine_info,
            Settings(),
            rollout_id="recorded",
            seq=self.number,
            clock=lambda: self.started_at,
            call_id=self.call_id,
        )
        wire = Wire(self.method, "", self.path, [(n, v) for n, v in self.headers], self.raw)
        step = exchange.start(wire, {name.lower(): value for name, value in self.headers})
        assert isinstance(step, UpstreamRequest), step
        headers = exchange.open() if step.stream else {}
        out = b"".join(exchange.feed(piece) for piece in (pieces or [self.engine]))
        end = exchange.finish()
        if isinstance(end, Reply):
            return Replay(exchange, step.body, end.status, end.headers, end.body)
        return Replay(exchange, step.body, 200, headers, out + end)


@dataclass(frozen=True)
class Replay:
    """What a call came to: the engine's request, and the whole answer."""

    exchange: Exchange
    upstream: bytes
    status: int
    headers: dict[str, str]
    response: bytes


@dataclass(frozen=True)
class Run:
    """One recorded run. `said` is every text in it that is ours: the task, and what the engine answered."""

    folder: Path
    harness: str
    version: str
    scenario: str
    said: list[str]
    calls: list[Call]

    @property
    def thread(self) -> list[Call]:
        """The calls of the main thread; side calls (opencode's title) offer no tools."""
        return [call for call in self.calls if call.decode().tools]

    def read(self, call: Call, kind: str) -> bytes:
        """A derived file of a call: `upstream`, `response` or `call`."""
        (found,) = self.folder.glob(f"{call.number:02d}-{kind}.*")
        return found.read_bytes()


def runs() -> list[Run]:
    """Every recorded run."""
    return [load(path.parent) for path in sorted(FOLDER.glob("*/run.json"))]


def load(folder: Path) -> Run:
    about = json.loads((folder / "run.json").read_text())
    engine = EngineInfo(**about["engine"])
    calls = []
    for number, call in enumerate(about["calls"]):
        request = json.loads((folder / f"{number:02d}-request.json").read_text())
        answer = (folder / f"{number:02d}-engine.sse").read_bytes()
        calls.append(Call(number, call["call_id"], call["dialect"], engine, **request, engine=answer))
    return Run(folder, about["harness"], about["version"], about["scenario"], about["said"], calls)


def derive(call: Call) -> Iterator[tuple[str, bytes]]:
    """The derived files of a call, by name: what the translation makes of it today."""
    done = call.replay()
    name = f"{call.number:02d}-"
    yield f"{name}upstream.json", pretty(json.loads(done.upstream))
    streamed = done.headers["content-type"].startswith("text/event-stream")
    yield f"{name}response.{'sse' if streamed else 'json'}", done.response
    yield f"{name}call.json", pretty(summary(call, done))


def summary(call: Call, done: Replay) -> dict[str, Any]:
    """The canonical request and the outcome; tools by name only, since the upstream body has them whole."""
    request = msgspec.to_builtins(call.decode())
    request["tools"] = [tool.engine_name for tool in call.decode().tools]
    record = done.exchange.records(delivered=True)[0]
    return {
        "status": record.status,
        "role": record.role,
        "error": record.error,
        "finish_reason": record.finish_reason,
        "num_sampled_tokens": len(record.completion_token_ids),
        "response": {"status": done.status, "headers": done.headers},
        "canonical": request,
    }


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def pretty(value: Any, depth: int = 4) -> bytes:
    """JSON that people can read and diff: `depth` levels are indented, where they do not fit on a line."""
    return (_lines(value, depth, "") + "\n").encode()


def _lines(value: Any, depth: int, indent: str) -> str:
    line = compact(value).decode()
    if depth == 0 or not isinstance(value, dict | list) or len(indent + line) < 110:
        return line
    inner = indent + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(k)}: {_lines(v, depth - 1, inner)}" for k, v in value.items()]
        opening, closing = "{}"
    else:
        parts = [_lines(v, depth - 1, inner) for v in value]
        opening, closing = "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{closing}"

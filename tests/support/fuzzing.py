"""One call gone wrong: a changed request into `Exchange`, a changed engine stream, and what must hold.

    outcome = play(case(Random("7/123"), "anthropic"))

Whatever goes in, the harness gets an answer of its provider's, nothing is logged as a bug of ours, and the
records can be written. Seeds are the requests in `fixtures/`.
"""

from __future__ import annotations

import json
import logging
import traceback
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from polar_mitm.asking import Lookups, UpstreamRequest
from polar_mitm.config import Settings
from polar_mitm.conformance.scripts import Answer
from polar_mitm.dialects.base import Dialect, Reply
from polar_mitm.dialects.ids import minted
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.dialects.responses_socket import SOCKET, head_of, headers_of
from polar_mitm.dialects.responses_state import SOCKET_METHOD, Responses
from polar_mitm.dialects.routes import PROVIDER_OF, route
from polar_mitm.errors import PolarError
from polar_mitm.exchange import Exchange
from polar_mitm.lineage import Lineage
from polar_mitm.store.rows import answer_json, call_row, lineage_row
from polar_mitm.types import ModelCall, Wire
from polar_mitm.upstream.engine import EngineInfo, Template
from polar_mitm.upstream.render import Answers
from tests.support import engine_bytes, mutation, recorded, shapes

FIXTURES = Path(__file__).parents[2] / "fixtures"
WEBSOCKET = "responses_websocket"
"""The Responses dialect once more, its requests and answers as messages."""

KINDS = (*DIALECTS, WEBSOCKET)
ENGINE = EngineInfo(
    "http://engine", "tiny", max_model_len=4096, policy_version="tiny@7", template=Template(b"1,2,3")
)
CALL = "01JD0Z6Q3WAAAAAAAAAAAAAAAZ"
_PATHS = {
    "anthropic": ["/v1/messages", "/v1/messages?beta=true"],
    "openai_chat": ["/v1/chat/completions", "/api/v1/chat/completions"],
    "openai_responses": ["/v1/responses", "/backend-api/codex/responses"],
    "gemini": [f"/v1beta/models/{m}" for m in (
        "m:streamGenerateContent?alt=sse", "m:streamGenerateContent", "m:generateContent",
        "m%20%ff:generateContent?alt=sse&key=k", "m:streamGenerateContent?alt=%00&alt=sse",
    )],
}  # fmt: skip
_HEADERS = [
    {"user-agent": "codex_cli_rs/0.169.0"},
    {"user-agent": "claude-cli/2.1", "x-claude-code-agent-id": "a"},
    {"user-agent": "GeminiCLI/0.61"},
    {"user-agent": "opencode/1", "x-session-id": "s", "x-parent-session-id": "p"},
    {"anthropic-beta": "context-1m-2025-08-07"},
    {"user-agent": "QwenCode/0.24", "x-openai-subagent": "\udcff"},
]


@dataclass
class Seed:
    """A request that is right, with how its harness says who it is, and the calls before it in its run."""

    path: str
    headers: dict[str, str]
    body: Any
    before: list[recorded.Call] = field(default_factory=list)


@dataclass
class Case:
    """What goes in. `before` are calls that this one may continue, `lookups` the engine's answers to
    questions. `ending`: what becomes of the call once `chunks` are fed. `opened`: the head of a stream goes
    out first; `waiting`: the harness is told in between that we live."""

    kind: str
    path: str
    headers: dict[str, str]
    body: bytes
    chunks: list[bytes]
    before: list[recorded.Call]
    lookups: list[bytes | None]
    ending: str
    opened: bool
    waiting: bool = True


@dataclass
class Outcome:
    """What came of it. `status` is the call's, `answer` what the harness got, `problems` what must not be."""

    status: str = ""
    answer: bytes = b""
    problems: list[str] = field(default_factory=list)


class _Watch(logging.Handler):
    """What the product logs as a bug of its own, which no harness gets to see."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.seen.append(f"{record.getMessage()}\n{logging.Formatter().formatException(record.exc_info)}")


# --- what goes in ---------------------------------------------------------------------------------------


@cache
def seeds(kind: str) -> list[Seed]:
    """The requests to begin with, by dialect."""
    dialect = "openai_responses" if kind == WEBSOCKET else kind
    folder = {"openai_chat": "chat", "openai_responses": "responses"}.get(dialect, dialect)
    found = []
    for file in sorted((FIXTURES / folder).glob("*.json")):
        value = json.loads(file.read_text())
        headers = {name.lower(): text for name, text in value.get("headers", {}).items()}
        found.append(Seed(value.get("path", _PATHS[dialect][0]), headers, value.get("body", value)))
    for run in recorded.runs():
        for number, call in enumerate(run.calls):
            if call.dialect == dialect:
                headers = {name.lower(): text for name, text in call.headers}
                found.append(Seed(call.path, headers, call.body, run.calls[:number]))
    return found


def case(rng: Random, kind: str) -> Case:
    """A changed request, and a changed stream for it."""
    own = seeds(kind)
    seed = rng.choice(own)
    body = seed.body
    if rng.random() < 0.9:
        body = mutation.changed(body, rng, [rng.choice(own).body, body])
    if kind == WEBSOCKET and isinstance(body, dict):
        body = {"type": "response.create", **body}
    if "responses" in kind and isinstance(body, dict) and rng.random() < 0.2:
        known = seed.before[-1].call_id if seed.before else CALL
        body = {**body, "previous_response_id": rng.choice([minted("resp", known), "resp_x", ""])}
    raw = mutation.written(body, rng)
    if rng.random() < 0.2:
        raw = mutation.damaged(raw, rng)
    dialect = "openai_responses" if kind == WEBSOCKET else kind
    path = seed.path if rng.random() < 0.7 else rng.choice(_PATHS[dialect])
    return Case(
        kind,
        path,
        seed.headers | (rng.choice(_HEADERS) if rng.random() < 0.3 else {}),
        raw,
        _stream(rng, body),
        seed.before if rng.random() < 0.4 else [],
        [_lookup(rng) for _ in range(6)],
        rng.choice(("finish",) * 8 + ("cancel", "fail", "reject", "early")),
        rng.random() < 0.8,
    )


def _lookup(rng: Random) -> bytes | None:
    """An answer to a rendering or detokenization, or something like it."""
    ids = rng.choice(
        ["[]", "[1,2,3]", "[1,2,3,4,5,6,1,2,3]", "[-1]", "[1e9]", "[[", "x", "[99999999999999999999]"]
    )
    made = [f'{{"token_ids":{ids}}}', f'{{"prompt":{json.dumps(mutation.text(rng))}}}', ids, '{"prompt":1}']
    return None if rng.random() < 0.2 else rng.choice(made).encode()


def _answer(rng: Random, names: list[str]) -> Answer:
    called = []
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        arguments = rng.choice(
            ['{"command": "ls"}', '{"input": "x"}', "{}", "", "[1]", '{"a": ', mutation.text(rng)]
        )
        called.append((rng.choice([*names, mutation.text(rng)]), arguments))
    return Answer(
        text=rng.choice(["", "Done.", mutation.text(rng), '{"value": "a"}', mutation.text(rng) * 20]),
        reasoning=rng.choice(["", "", "hm", mutation.text(rng)]),
        tool_calls=called,
        finish_reason=rng.choice([None, None, None, "length", "stop", "content_filter", "abort"]),
        tokens_per_chunk=rng.choice([1, 2, 5, 50]),
    )


def _stream(rng: Random, body: Any) -> list[bytes]:
    """An engine's answer to about this request: events changed, lost, doubled, moved, and cut anywhere."""
    names = _names(body)
    num = rng.choice((1, 1, 1, 1, 2, 3))
    answer = _answer(rng, names)
    others = [_answer(rng, names) for _ in range(num - 1)]
    answer = Answer(**{**answer.__dict__, "others": others})
    events = engine_bytes.events(answer, n=num, top_logprobs=rng.choice((0, 3)))
    chance = rng.random()
    for _ in range(rng.choice((1, 1, 2, 4)) if chance < 0.6 else 0):
        at = rng.randrange(len(events))
        act = rng.randrange(6)
        if act == 0 and len(events) > 1:
            del events[at]
        elif act == 1:
            events.insert(rng.randrange(len(events) + 1), events[at])
        elif act == 2:
            rng.shuffle(events)
        elif act == 3:
            events = events[: at + 1]
        elif act == 4:
            value = mutation.changed(rng.choice(_chunks()), rng, _chunks())
            events[at] = b"data: " + mutation.written(value, rng) + b"\n\n"
        else:
            events[at] = mutation.damaged(events[at], rng)
    return mutation.pieces(b"".join(events), rng)


@cache
def _chunks() -> list[Any]:
    """An engine's events that are right, of every sort."""
    said = Answer(text="hi", reasoning="hm", tool_calls=[("shell", "{}")], others=[Answer(text="b")])
    return [json.loads(event[6:]) for event in engine_bytes.events(said, n=2, top_logprobs=3)[:-1]]


def _names(body: Any) -> list[str]:
    """Some names of tools in a request of any dialect."""
    found, todo = ["shell"], [body.get("tools")] if isinstance(body, dict) else []
    while todo and len(found) < 20:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
            if isinstance(value.get("name"), str) and value["name"].isprintable():
                found.append(value["name"])
        elif isinstance(value, list):
            todo += value[:20]
    return found


# --- what comes of it -----------------------------------------------------------------------------------


def play(case: Case) -> Outcome:
    """Drive the call to its end as the interceptor would, and check what the harness and the store get."""
    outcome, watch = Outcome(), _Watch()
    logger = logging.getLogger("polar_mitm")
    logger.addHandler(watch)
    logger.propagate = False
    try:
        _play(case, outcome)
    except Exception:
        outcome.problems.append(traceback.format_exc())
    finally:
        logger.removeHandler(watch)
        logger.propagate = True
    outcome.problems += watch.seen
    return outcome


def _play(case: Case, outcome: Outcome) -> None:
    socket = case.kind == WEBSOCKET
    dialect: Dialect = SOCKET if socket else DIALECTS[case.kind]
    lineage, responses = Lineage(), Responses()
    for call in case.before:
        _remember(call, lineage, responses)
    method = SOCKET_METHOD if socket else "POST"
    wire = Wire(method, "host", case.path, list(case.headers.items()), case.body)
    headers = headers_of(wire) if socket else case.headers
    if socket:
        head_of(case.body)
    else:
        found = route(PROVIDER_OF[dialect.name], "POST", case.path)
        assert found.dialect == dialect.name, case.path
    exchange = Exchange(
        dialect, ENGINE, Settings(), rollout_id="r", seq=0, clock=lambda: 1000.0, call_id=CALL,
        lineage=lineage, responses=responses, answers=Answers(),
    )  # fmt: skip
    step = exchange.start(wire, headers)
    lookups = iter(case.lookups)
    while isinstance(step, Lookups):
        step = exchange.answered([next(lookups, None) for _ in step.lookups])
    opened, out, end = False, b"", b""
    if isinstance(step, Reply):
        end = step
    else:
        opened, out, end = _answer_to(exchange, step, case)
    outcome.status = exchange.call.status
    outcome.answer = out + (end.body if isinstance(end, Reply) else end)
    _check(exchange, dialect, opened, out, end, socket, case.ending == "cancel")


def _answer_to(exchange: Exchange, step: UpstreamRequest, case: Case) -> tuple[bool, bytes, bytes | Reply]:
    """The engine's part: whether a stream was opened, its bytes but the last, and how it ends."""
    json.loads(step.body)
    opened, out = False, b""
    if case.ending == "reject":
        again = exchange.reject(400, b"".join(case.chunks))
        if isinstance(again, Reply):
            return False, b"", again
    for chunk in case.chunks[: len(case.chunks) // 2 if case.ending != "finish" else None]:
        if step.stream and case.opened and not opened and not exchange.ended:
            opened = True
            exchange.open()
            out += exchange.opening() if len(chunk) % 2 else b""
        out += exchange.feed(chunk)
        out += exchange.keepalive() if opened and case.waiting and len(chunk) % 3 == 0 else b""
    if step.stream and out and not opened and not exchange.ended:
        opened = True
        exchange.open()
    if case.ending == "cancel":
        exchange.cancel()
        return opened, out, b""
    if case.ending == "fail":
        return opened, out, exchange.fail(PolarError("upstream", "the engine's connection failed"))
    return opened, out, exchange.finish()


def _check(
    exchange: Exchange,
    dialect: Dialect,
    opened: bool,
    out: bytes,
    end: bytes | Reply,
    socket: bool,
    hung_up: bool,
) -> None:
    call = exchange.call
    assert exchange.ended
    assert not (call.error or "").startswith("internal"), call.error
    if isinstance(end, Reply) and end.status == 200 and call.stream:
        opened, end = True, end.body  # all of a stream at once
    if isinstance(end, Reply):
        assert (end.status == 200) == (call.status == "ok")
        if socket:
            _check_message(end)
        else:
            shapes.is_reply(dialect.name, end.status, end.body)
    elif not hung_up:
        assert opened, "bytes without a head"
        array = _array(exchange, dialect)
        whole = call.status == "ok"
        shapes.is_stream(dialect.name, out + end, whole=whole, array=array, socket=socket)
    calls = exchange.records(delivered=True)
    for each in calls:
        _check_record(each)
    if not socket and call.status == "ok":
        assert call.wire.response_body == (end.body if isinstance(end, Reply) else out + end)


def _array(exchange: Exchange, dialect: Dialect) -> bool:
    return dialect.name == "gemini" and "json" in dict(exchange.call.wire.response_headers).get(
        "content-type", ""
    )


def _check_message(reply: Reply) -> None:
    """A refusal as a message: an error that a client gives up on, or a failed response."""
    assert reply.body.endswith(b"\n") and reply.body.count(b"\n") == 1
    value = json.loads(reply.body)
    if value["type"] == "error":
        assert value["status"] == reply.status >= 400
        shapes.is_error("openai_responses", value)
    else:
        assert value["type"] == "response.failed" and value["response"]["error"]["message"]


def _check_record(call: ModelCall) -> None:
    """It can be written."""
    call_row(call, (), None, 0)
    lineage_row(call, answer_json(call.answer))


def _remember(call: recorded.Call, lineage: Lineage, responses: Responses) -> None:
    """A call of the run, before this one."""
    done = call.replay().exchange.records(delivered=True)[0]
    lineage.add(done, call.decode())
    responses.keep(done.dialect, done.wire)

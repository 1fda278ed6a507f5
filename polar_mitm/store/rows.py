"""Records to rows and back: the one place that knows both the structs' fields and the tables' columns."""

from __future__ import annotations

import array
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import pyarrow as pa
import pyarrow.dataset  # DuckDB needs it at its first scan, when a capture is about to start

from polar_mitm.errors import StoreError
from polar_mitm.store.chains import Link
from polar_mitm.store.redact import redact_body, redact_headers, redact_path, redact_texts
from polar_mitm.types import (
    Continuation,
    EgressEvent,
    Message,
    ModelCall,
    Reward,
    Rollout,
    Sampling,
    Usage,
    Wire,
)

Columns = Mapping[str, pa.DataType]
Row = tuple[Any, ...]

_STR, _INT, _REAL = pa.large_string(), pa.int32(), pa.float64()  # a commit may hold more than 2 GiB

ROLLOUT: Columns = {
    "rollout_id": _STR, "group_id": _STR, "task_id": _STR, "sample_index": _INT, "harness": _STR,
    "harness_version": _STR, "command": _STR, "status": _STR, "stop_reason": _STR, "exit_code": _INT,
    "incomplete": _STR, "engine": _STR, "model": _STR, "started_at": _REAL, "ended_at": _REAL,
    "keep_reasoning": _STR, "forked_from": _STR,
}  # fmt: skip
_Big = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Call(msgspec.Struct):
    """The columns of a call that describe it, with their types."""

    call_id: str
    rollout_id: str
    seq: _Big
    dialect: str
    route: str
    status: str
    model_requested: str
    model_served: str
    role: str
    parent_call_id: str | None
    stream: bool
    delivered: bool
    finish_reason: str | None
    error: str | None
    policy_version: str | None
    sampling_requested: str
    sampling: str
    notes: str
    usage: str
    started_at: float
    first_token_at: float | None
    ended_at: float | None
    num_prompt: int
    prompt_parent_id: str | None
    prompt_shared: int


CALL = _Call.__struct_fields__
WIRE = ("http", "body_base_id", "request_body", "upstream_body", "response_body", "pacing")
TOKENS = ("prompt_suffix", "completion_token_ids", "behaviour_logprobs")
LINEAGE = ("lineage", "answer")
LOG: Columns = {"record": _STR}
REWARD: Columns = {
    "rollout_id": _STR, "name": _STR, "value": _REAL, "verifier": _STR, "evidence": _STR, "at": _REAL
}  # fmt: skip
EGRESS: Columns = {
    "rollout_id": _STR, "at": _REAL, "verdict": _STR, "layer": _STR, "name": _STR, "detail": _STR
}  # fmt: skip

# What becomes of a rollout that was running when its capture was killed: its last calls may be missing.
KILLED_STOP_REASON = "the capture was killed"
KILLED_INCOMPLETE = "the capture ended before the rollout did"

_LOGGED = (*CALL, *WIRE, *TOKENS, *LINEAGE)
_CALL_FIELDS = frozenset(ModelCall.__struct_fields__)
_JSON_FIELDS = {"sampling_requested": Sampling, "sampling": Sampling, "notes": list[str], "usage": Usage}
_json = msgspec.json.Encoder()


def call_row(
    call: ModelCall, known: tuple[bytes, ...], prompt_parent_id: str | None, prompt_shared: int
) -> Row:
    """The part of a call's row that `CALL` describes; `known` secrets are removed from what others wrote."""
    route, model, error, asked, used, notes = redact_texts(
        [
            _text(call.route),
            _text(call.model_requested),
            _text(call.error),
            _as_json(call.sampling_requested),
            _as_json(call.sampling),
            _as_json(call.notes),
        ],
        known,
    )
    return (
        call.call_id,
        call.rollout_id,
        call.seq,
        call.dialect,
        route,
        call.status,
        model,
        _text(call.model_served),
        call.role,
        call.parent_call_id,
        call.stream,
        call.delivered,
        call.finish_reason,
        error,
        _text(call.policy_version),
        asked,
        used,
        notes,
        _as_json(call.usage),
        call.started_at,
        call.first_token_at,
        call.ended_at,
        len(call.prompt_token_ids),
        prompt_parent_id,
        prompt_shared,
    )


class _Lineage(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """What the column `lineage` holds: fields of a call that only some calls have."""

    continuation: Continuation = "none"
    fallback: str | None = None
    edits: list[str] = msgspec.field(default_factory=list)
    policy_version_last: str | None = None
    replayed_from: str | None = None
    tokenizer: str = ""
    agent_id: str | None = None


_LINEAGE_FIELDS = _Lineage.__struct_fields__
_NO_LINEAGE = "{}"


def lineage_row(call: ModelCall, answer: bytes) -> Row:
    """The part of a call's row that `LINEAGE` describes, out of its packed answer."""
    text = _as_json(_Lineage(*(getattr(call, name) for name in _LINEAGE_FIELDS)))
    return (None if text == _NO_LINEAGE else text), answer


def answer_json(answer: Message | None) -> bytes:
    """What is packed into the column `answer`."""
    return b"" if answer is None else _as_json(answer).encode()


def answer_of(body: bytes) -> Message | None:
    """The answer that `answer_json` wrote down."""
    return msgspec.json.decode(body, type=Message) if body else None


def floats(values: Sequence[float]) -> Sequence[float | str]:
    """Logprobs as JSON can hold them. Raises TypeError or OverflowError for what FLOAT cannot."""
    narrow = array.array("f", values)
    if all(map(math.isfinite, narrow)):
        return values
    if any(math.isfinite(v) and not math.isfinite(n) for v, n in zip(values, narrow, strict=True)):
        raise OverflowError("a logprob is beyond what FLOAT can hold")
    return [v if math.isfinite(v) else str(v) for v in values]


def logged(*row: Any) -> str:
    """A row of `CALL`, `WIRE`, `TOKENS` and `LINEAGE` as `call_log` holds it.

    Raises:
        ValueError: a value is not of its column's type.
    """
    columns = dict(zip(_LOGGED, row, strict=True))
    try:
        msgspec.convert(columns, _Call)  # what the log took in, its table must take
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    return _json.encode(columns).decode()


class _Http(msgspec.Struct, omit_defaults=True):
    """What the column `http` holds."""

    method: str
    host: str
    path: str
    status: int
    request_headers: list[tuple[str, str]]
    response_headers: list[tuple[str, str]]
    http_version: str = ""


def wire_row(
    wire: Wire,
    known: tuple[bytes, ...],
    base_id: str | None,
    request: bytes,
    upstream: bytes,
    response: bytes,
) -> Row:
    """The part of a call's row that `WIRE` describes, out of packed bodies; `known` secrets are removed."""
    http = _Http(
        wire.method,
        wire.host,
        redact_path(wire.path, known),
        wire.status,
        redact_headers(wire.request_headers, known),
        redact_headers(wire.response_headers, known),
        wire.http_version,
    )
    pacing = msgspec.msgpack.encode((wire.chunk_sizes, wire.chunk_at_ms))
    return _as_json(http), base_id, request, upstream, response, pacing


def rollout_row(r: Rollout, incomplete: str | None) -> Row:
    """The row of a rollout, with the recorder's own word on its holes where it has one."""
    row = {name: getattr(r, name) for name in ROLLOUT}
    command = redact_body(_as_json(r.command).encode(), ()).decode()
    row |= {"command": command, "incomplete": r.incomplete or incomplete}
    return tuple(_text(v) if isinstance(v, str) else v for v in row.values())


def reward_row(r: Reward) -> Row:
    """The row of a reward: its fields are the columns."""
    return tuple(_text(v) if isinstance(v, str) else v for v in (getattr(r, name) for name in REWARD))


def egress_row(e: EgressEvent) -> Row:
    """The row of an event, without credentials in what it names."""
    name, detail = (redact_path(_text(text) or "", ()) for text in (e.name, e.detail))
    return e.rollout_id, e.at, e.verdict, e.layer, name, detail


class Source:
    """What DuckDB scans when a statement names it: the rows it was filled with last.

    Registered once: registering anew for each statement takes as long as the statement.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._table = pa.schema(list(columns.items())).empty_table()

    def fill(self, rows: Sequence[Row]) -> None:
        """Hold `rows`. Raises ValueError, TypeError or OverflowError for what a column cannot hold."""
        arrays = [
            pa.array(v, t) for v, t in zip(zip(*rows, strict=True), self._columns.values(), strict=True)
        ]
        self._table = pa.Table.from_arrays(arrays, names=list(self._columns))

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


def call_of(row: Mapping[str, Any]) -> ModelCall:
    """The call of a row of `stored_calls`, without tokens, wire and answer.

    Raises:
        StoreError: the row is damaged, or of a later version.
    """
    fields = {name: row[name] for name in CALL if name in _CALL_FIELDS}
    try:
        for name, kind in _JSON_FIELDS.items():
            fields[name] = msgspec.json.decode(row[name], type=kind)
        if row["lineage"]:
            fields |= msgspec.structs.asdict(msgspec.json.decode(row["lineage"], type=_Lineage))
        return msgspec.convert(fields, ModelCall)
    except (msgspec.MsgspecError, TypeError) as error:
        raise StoreError(
            f"the record of call {row['call_id']} is damaged, or a later version's: {error}"
        ) from None


def wire_of(row: Mapping[str, Any], request_body: bytes, response_body: bytes) -> Wire:
    """The wire of a row of the view `wire`, its bodies already unpacked."""
    http = msgspec.json.decode(row["http"], type=_Http)
    chunk_sizes, chunk_at_ms = msgspec.msgpack.decode(row["pacing"], type=tuple[list[int], list[float]])
    return Wire(
        method=http.method,
        host=http.host,
        path=http.path,
        request_headers=http.request_headers,
        request_body=request_body,
        status=http.status,
        response_headers=http.response_headers,
        response_body=response_body,
        chunk_sizes=chunk_sizes,
        chunk_at_ms=chunk_at_ms,
        http_version=http.http_version,
    )


def links_sql(rollout_id: str | None) -> str:
    """The query whose answer `links_of` takes: one rollout, or all. Oldest first."""
    where = "" if rollout_id is None else f"WHERE rollout_id = {quote(rollout_id)}"
    return (
        "SELECT call_id, prompt_parent_id, prompt_shared, prompt_suffix, completion_token_ids, "
        f"behaviour_logprobs FROM stored_calls {where} ORDER BY started_at, call_id"
    )


def links_of(found: pa.Table) -> dict[str, Link]:
    """call id -> how its tokens are stored."""
    columns = [found[name].to_pylist() for name in ("call_id", "prompt_parent_id", "prompt_shared")]
    columns += [
        lists(found[name]) for name in ("prompt_suffix", "completion_token_ids", "behaviour_logprobs")
    ]
    links: dict[str, Link] = {}
    for call_id, *rest in zip(*columns, strict=True):
        if call_id in links:
            links[call_id].num_records += 1
        else:
            links[call_id] = Link(*rest)
    return links


def quote(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def lists(column: pa.ChunkedArray) -> list[list[Any]]:
    """A list column as Python lists, through one flat array: many times faster than `to_pylist`."""
    out = []
    for chunk in column.chunks:
        flat = chunk.flatten().to_numpy(zero_copy_only=False).tolist()
        at = 0
        for length in chunk.value_lengths().to_numpy(zero_copy_only=False).tolist():
            out.append(flat[at : at + length])
            at += length
    return out


def _text(value: str | None) -> str | None:
    """Text that UTF-8 can hold: a lone surrogate becomes a question mark."""
    return value if value is None or value.isascii() else value.encode("utf-8", "replace").decode()


def _as_json(value: Any) -> str:
    try:
        return _json.encode(value).decode()
    except UnicodeEncodeError:
        return _json.encode(_scrub(value)).decode()


def _scrub(value: Any) -> Any:
    """`value` as plain objects whose every text UTF-8 can hold."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        return [_scrub(v) for v in value]
    if isinstance(value, msgspec.Struct):
        kind = value.__struct_config__
        tag = {kind.tag_field: kind.tag} if kind.tag_field else {}
        return tag | {k: _scrub(v) for k, v in msgspec.structs.asdict(value).items() if v is not None}
    return value

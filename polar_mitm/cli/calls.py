"""`polar-mitm calls` and `polar-mitm show`: what was recorded."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
import typer

from polar_mitm.cli.exits import fail
from polar_mitm.cli.output import JsonFlag, plural, print_json, print_table, say, short, tell
from polar_mitm.cli.reading import RolloutOption, StoreOption, chosen, reading
from polar_mitm.types import EgressEvent, ModelCall, Rollout

_BULK = frozenset({"prompt_token_ids", "completion_token_ids", "behaviour_logprobs", "upstream_body", "wire"})
_MAX_NAMES = 20
CALLS_EXAMPLES = (
    "$ polar-mitm calls -s runs.duckdb\n\n$ polar-mitm calls -s runs.duckdb --json | jq .calls[0]"
)
SHOW_EXAMPLES = "$ polar-mitm show 7Q2ZK8 -s runs.duckdb --tokens"
Count = tuple[int, int]
"""Prompt and sampled tokens of a call."""


def calls(store: StoreOption, rollout: RolloutOption = None, json: JsonFlag = False) -> None:
    """List rollouts, model calls, and what was refused."""
    with reading(store) as reader:
        rollouts = chosen(reader, rollout)
        only = rollouts[0].rollout_id if rollout else None
        found = reader.calls(only, tokens=False)
        events = reader.egress(only)
        counts = counts_of(reader)
    if json:
        briefs = [brief(c, *counts[c.call_id]) for c in found]
        print_json({"rollouts": rollouts, "calls": briefs, "egress": events})
        return
    calls_of, events_of = defaultdict(list), defaultdict(list)
    for call in found:
        calls_of[call.rollout_id].append(call)
    for event in events:
        events_of[event.rollout_id].append(event)
    for each in rollouts:
        tell_rollout(each)
        tell_calls(calls_of[each.rollout_id], counts)
        tell_refused(events_of[each.rollout_id])
        tell()
    tell(f"{plural(len(found), 'call')} in {plural(len(rollouts), 'rollout')}")


def show(
    call: Annotated[str, typer.Argument(metavar="CALL", help="A call's id, or the end or beginning of one.")],
    store: StoreOption,
    tokens: Annotated[bool, typer.Option("--tokens", help="Print sampled ids and logprobs.")] = False,
    wire: Annotated[bool, typer.Option("--wire", help="Print the raw request and response.")] = False,
    json: JsonFlag = False,
) -> None:
    """Show one model call: timing, sampling, tokens, wire.

    With --json all of it comes at once, prompt ids included; bodies are base64.
    """
    with reading(store) as reader:
        found = reader.call(call) if call else None
    if found is None:
        fail(f"{store} has no call {call!r} (polar-mitm calls --store {store} lists them)")
    if json:
        print_json(found)
        return
    about = brief(found, len(found.prompt_token_ids), len(found.completion_token_ids))
    print_table("field,value", [(name, _text(value)) for name, value in about.items()])
    if tokens:
        start = len(found.prompt_token_ids)
        sampled = zip(found.completion_token_ids, found.behaviour_logprobs, strict=True)
        print_table("position,id,logprob", [(start + n, i, f"{p:.6f}") for n, (i, p) in enumerate(sampled)])
    if wire:
        for title, body in (("request", found.wire.request_body), ("response", found.wire.response_body)):
            tell(f"--- {title}, {len(body)} bytes", style="bold")
            tell(body.decode("utf-8", "replace"))


def _text(value: object) -> str | None:
    if isinstance(value, dict | list):
        return msgspec.json.encode(value).decode()
    return None if value is None else str(value)


def tell_rollout(rollout: Rollout) -> None:
    """One line on a rollout, and one more where its record has holes."""
    what = f"{rollout.harness or 'command'} {rollout.harness_version}".strip()
    ended = rollout.status if rollout.exit_code is None else f"{rollout.status}, exit {rollout.exit_code}"
    tell(f"rollout {rollout.rollout_id}  {what}  {ended}", style="bold")
    if rollout.incomplete:
        say(f"its record is incomplete, and never trained on: {rollout.incomplete}", style="yellow")


def tell_calls(found: Iterable[ModelCall], counts: dict[str, Count]) -> None:
    """A table of calls; with sub-agents by name, where there are any."""
    found = list(found)
    agents = any(c.agent_id for c in found)
    rows = [
        (
            short(c.call_id),
            c.role,
            *([c.agent_id and short(c.agent_id)] if agents else []),
            c.dialect.removeprefix("openai_"),
            c.status,
            *counts[c.call_id],
            None if c.first_token_at is None else round((c.first_token_at - c.started_at) * 1000),
            tokens_per_s([c], counts),
            c.error or c.finish_reason,
        )
        for c in found
    ]
    if rows:
        named = "agent," if agents else ""
        print_table(f"call,role,{named}dialect,status,prompt,sampled,first ms,tok/s,outcome", rows)


def tell_refused(events: Iterable[EgressEvent]) -> None:
    """What was refused, by name, the most frequent first."""
    refused = Counter(e.name for e in events if e.verdict == "refused")
    for name, times in refused.most_common(_MAX_NAMES):
        tell(f"refused {times:>4}x  {name}")
    if len(refused) > _MAX_NAMES:
        tell(f"refused        {len(refused) - _MAX_NAMES} more names (--json has them all)")


def counts_of(reader: Any) -> dict[str, Count]:
    """Prompt and sampled tokens of every call, without loading one of them."""
    found = reader.sql("SELECT call_id, num_prompt, num_sampled FROM calls").to_pylist()
    return {row["call_id"]: (row["num_prompt"] or 0, row["num_sampled"] or 0) for row in found}


_MIN_SECONDS = 0.05


def tokens_per_s(found: Iterable[ModelCall], counts: dict[str, Count]) -> float | None:
    """Sampled tokens per second of generation, first token to end; None for too short a time to tell."""
    timed = [c for c in found if c.first_token_at and c.ended_at and c.ended_at > c.first_token_at]
    seconds = sum((c.ended_at or 0) - (c.first_token_at or 0) for c in timed)
    if seconds < _MIN_SECONDS:
        return None
    rate = sum(counts[c.call_id][1] for c in timed) / seconds
    return round(rate) if rate >= 100 else round(rate, 1)


def brief(call: ModelCall, num_prompt: int, num_sampled: int) -> dict[str, Any]:
    """A call without its bulk: counts in place of ids, no wire bodies."""
    out = {name: value for name, value in msgspec.to_builtins(call).items() if name not in _BULK}
    first_ms = None if call.first_token_at is None else (call.first_token_at - call.started_at) * 1000
    return out | {
        "num_prompt_tokens": num_prompt,
        "num_sampled_tokens": num_sampled,
        "http_status": call.wire.status or None,
        "first_token_ms": None if first_ms is None else round(first_ms, 1),
        "tokens_per_s": tokens_per_s([call], {call.call_id: (num_prompt, num_sampled)}),
    }

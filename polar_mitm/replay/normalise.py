"""What of a request may differ between two runs of the same harness, and nothing else: a declared list.

Two runs of a program never send the same bytes: sessions have ids, messages have times, a head carries a
checksum. `RULES` names every such place, found by recording real programs twice and comparing; what no rule
names must be equal. Ids are numbered in the order of their first appearance in the request, so that two that
were equal in one run have to be equal in the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import msgspec
from msgspec import Struct

from polar_mitm.types import Wire

VERSION = 1
"""Goes up with each change of what `RULES` lists or does."""

How = Literal[
    "ignore",  # the field is not compared, nor whether it is there
    "parse",  # the text is JSON, and compared as such
    "unorder",  # the order of an object's keys says nothing
    "number",  # an id: numbered by first appearance
    "mask",  # a time, a duration, a checksum: replaced by the rule's name
]


class Rule(Struct, frozen=True):
    """One thing that varies.

    `where` is a path such as `body.input.*.id`: `*` is one key or index, `**` any number of them. `pattern`
    finds what varies in the text there, after a group that is kept; `^` and `$` are a line's. Without one it
    is the whole value. (Text before is a group because a look-behind would be searched many times slower.)
    """

    name: str
    where: str
    how: How
    pattern: str = ""


_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
_AGENT = "[0-9a-f]{17}"
_SESSION = "ses_[0-9a-f]{12}[0-9A-Za-z]{14}"
_NOTICE = '<subagent_notification>\n{"agent_path":"'
_TURN = "body.client_metadata.x-codex-turn-metadata"

RULES: tuple[Rule, ...] = (
    # Any client.
    Rule("credential", "headers.authorization", "ignore"),
    Rule("credential", "headers.x-api-key", "ignore"),
    Rule("length", "headers.content-length", "ignore"),  # of a body that is compared itself
    Rule("request_id", "headers.x-client-request-id", "number", _UUID),
    # Claude Code.
    Rule("session_id", "headers.x-claude-code-session-id", "number", _UUID),
    Rule("prompt_id", "headers.x-claude-code-prompt-id", "number", _UUID),
    Rule("duration", "headers.x-claude-code-prev-tool-durations", "mask", r"(=)\d+"),
    Rule("checksum", "body.system.*.text", "mask", "( cch=)[0-9a-f]+"),
    Rule("prompt_id", "body.system.*.text", "number", f"( cc_prompt_id=){_UUID}"),
    Rule("user_id", "body.metadata.user_id", "parse"),
    Rule("device_id", "body.metadata.user_id.device_id", "number", "[0-9a-f]{64}"),
    Rule("session_id", "body.metadata.user_id.session_id", "number", _UUID),
    Rule("agent_id", "headers.x-claude-code-agent-id", "number", _AGENT),
    Rule("agent_id", "body.messages.**", "number", f"(agentId: ){_AGENT}"),
    Rule("agent_id", "body.messages.**", "number", f"(with to: '){_AGENT}"),
    Rule("task_id", "body.messages.**", "number", "(in background with ID: )[0-9a-z]+"),
    Rule("task_id", "body.messages.**", "number", "(<task-id>)[0-9a-z]+"),
    Rule("task_id", "body.messages.**", "number", r"(/tasks/)[0-9a-z]+(?=\.output)"),
    Rule("user_number", "body.messages.**", "mask", "(/tmp/claude-)[0-9]+"),
    Rule("session_id", "body.messages.**", "number", f"(-workspace/){_UUID}(?=/tasks/)"),
    Rule("duration", "body.messages.**", "mask", "(<duration_ms>)[0-9]+"),
    Rule("kernel", "body.messages.**", "mask", r"(OS Version: Linux )\S+"),
    Rule("date", "body.messages.**", "mask", f"(Today's date is ){_DATE}"),
    # Codex.
    Rule("session_id", "headers.session-id", "number", _UUID),
    Rule("thread_id", "headers.thread-id", "number", _UUID),
    Rule("thread_id", "headers.x-codex-parent-thread-id", "number", _UUID),
    Rule("window_id", "headers.x-codex-window-id", "number", _UUID),
    Rule("turn_metadata", "headers.x-codex-turn-metadata", "parse"),
    Rule("turn_metadata", "headers.x-codex-turn-metadata.*", "number", _UUID),
    Rule("turn_time", "headers.x-codex-turn-metadata.turn_started_at_unix_ms", "mask"),
    Rule("metadata_order", "body.client_metadata", "unorder"),  # a hash map, written in any order
    Rule("client_metadata", "body.client_metadata.*", "number", _UUID),
    Rule("turn_metadata", _TURN, "parse"),
    Rule("turn_metadata", f"{_TURN}.*", "number", _UUID),
    Rule("turn_time", f"{_TURN}.turn_started_at_unix_ms", "mask"),
    Rule("cache_key", "body.prompt_cache_key", "number", _UUID),
    Rule("item_id", "body.input.*.id", "number", _UUID),
    Rule("turn_id", "body.input.*.internal_chat_message_metadata_passthrough.turn_id", "number", _UUID),
    Rule("item_time", "body.input.*.internal_chat_message_metadata_passthrough.create_time", "mask"),
    Rule("date", "body.input.*.content.*.text", "mask", f"(<current_date>){_DATE}"),
    Rule("chunk_id", "body.input.*.output", "mask", "(^Chunk ID: )[0-9a-f]+"),
    Rule("duration", "body.input.*.output", "mask", r"(^Wall time: )[0-9.]+(?= seconds$)"),
    Rule("process_id", "body.input.*.output", "number", r"(^Process running with session ID )[0-9]+"),
    Rule("agent_id", "body.input.*.output", "number", f'(^{{"agent_id":"){_UUID}'),
    Rule("nickname", "body.input.*.output", "mask", r'(","nickname":")\w+(?="\}$)'),
    Rule("agent_id", "body.input.*.content.*.text", "number", f"(^{_NOTICE}){_UUID}"),
    Rule("duration", "body.input.*.output.*.text", "mask", r"(^Wall time )[0-9.]+(?= seconds$)"),
    Rule("chunk_id", "body.input.*.output.*.text", "mask", r'(^\{"chunk_id":")[0-9a-f]+'),
    Rule("duration", "body.input.*.output.*.text", "mask", r'("wall_time_seconds":)[0-9.e-]+'),
    # opencode.
    Rule("session_id", "headers.x-session-id", "number", _SESSION),
    Rule("session_id", "headers.x-session-affinity", "number", _SESSION),
    Rule("session_id", "headers.x-parent-session-id", "number", _SESSION),
    Rule("task_id", "body.messages.**", "number", f'(<task id="){_SESSION}'),
    Rule("date", "body.system.*.text", "mask", r"(Today's date: )\w{3} \w{3} \d{2} \d{4}"),
    # pi.
    Rule("install_path", "body.system.*.text", "mask", r"/\S*(?=/harness/pi-[0-9.]+/node_modules/)"),
    Rule("kernel", "headers.user-agent", "mask", r"(^pi \(linux )[^;]+"),
)


class Normal(Struct):
    """A request with what varies taken out. `rules` are the names of those that had something to do.

    `tree` has `method`, `host`, `path`, `body` (JSON, or text where it is none) and `headers`.
    """

    tree: dict[str, Any]
    rules: list[str]


def normalise(wire: Wire, rules: Sequence[Rule] = RULES) -> Normal:
    """The request of `wire`, ready to be compared."""
    tree = {
        "method": wire.method,
        "host": wire.host,
        "path": wire.path,
        "body": _body(wire.request_body),
        "headers": _headers(wire.request_headers),
    }
    walk = _Walk()
    walked = walk(tree, _places(tuple(rules)))
    return Normal(walked, sorted(walk.used))


def _body(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode("utf-8", "replace")


def _headers(items: list[tuple[str, str]]) -> dict[str, str]:
    """By lower-case name; a name that comes several times has its values joined (RFC 9110, section 5.3)."""
    out: dict[str, str] = {}
    for name, value in items:
        key = name.lower()
        out[key] = f"{out[key]}, {value}" if key in out else value
    return out


_GONE = object()
_SHORT = 200


class _Place:
    """Somewhere in a request: the rules that apply here, and the way on. Made once, not per request."""

    def __init__(self, active: list[tuple[Rule, tuple[str, ...]]]) -> None:
        """`active`: rules that may apply here or below, with what is left of their paths."""
        here = [rule for rule, left in active if left in ((), ("**",))]
        self.whole = [rule for rule in here if not rule.pattern]
        self.texts = [(rule, re.compile(rule.pattern, re.MULTILINE)) for rule in here if rule.pattern]
        self.any = re.compile("|".join(f"(?:{rule.pattern})" for rule, _ in self.texts), re.MULTILINE)
        self._active = [(rule, left) for rule, left in active if left]
        self._named = {part for _, left in self._active for part in left[:2]}
        self._below: dict[str, _Place] = {}
        self.idle = not active

    def below(self, key: str) -> _Place:
        """The place under a key, or under any index for `*`."""
        key = key if key in self._named else "*"
        if key not in self._below:
            self._below[key] = _Place(
                [each for rule, left in self._active for each in _step(rule, left, key)]
            )
        return self._below[key]


def _step(rule: Rule, left: tuple[str, ...], key: str) -> Iterator[tuple[Rule, tuple[str, ...]]]:
    if left[0] == "**":
        yield rule, left
        left = left[1:]
    if left and left[0] in ("*", key):
        yield rule, left[1:]


@lru_cache(maxsize=16)
def _places(rules: tuple[Rule, ...]) -> _Place:
    return _Place([(rule, tuple(rule.where.split("."))) for rule in rules])


class _Walk:
    """One walk through one request: rules apply on the way down."""

    def __init__(self) -> None:
        self.used: set[str] = set()
        self._numbers: dict[str, int] = {}

    def __call__(self, value: Any, place: _Place) -> Any:
        if place.idle:
            return value
        for rule in place.whole:
            value = self._apply(rule, value)
            if value is _GONE:
                return value
        if isinstance(value, str):
            # One look at a short text; a long one is searched faster for each pattern's beginning.
            if place.texts and (len(value) > _SHORT or place.any.search(value)):
                return self._in_text(place, value)
        elif isinstance(value, dict):
            walked = {k: self(v, place.below(k)) for k, v in value.items()}
            return {k: v for k, v in walked.items() if v is not _GONE}
        elif isinstance(value, list):
            below = place.below("*")
            return [self(v, below) for v in value]
        return value

    def _apply(self, rule: Rule, value: Any) -> Any:
        if rule.how == "unorder":
            return dict(sorted(value.items())) if isinstance(value, dict) else value
        if rule.how == "parse":
            return _body(value.encode()) if isinstance(value, str) and value[:1] in ("{", "[") else value
        self.used.add(rule.name)
        return _GONE if rule.how == "ignore" else f"<{rule.name}>"

    def _in_text(self, place: _Place, text: str) -> str:
        for rule, pattern in place.texts:
            text, times = pattern.subn(lambda found, rule=rule: self._stand_in(rule, found), text)  # type: ignore[misc]
            if times:
                self.used.add(rule.name)
        return text

    def _stand_in(self, rule: Rule, found: re.Match[str]) -> str:
        kept = found[1] if found.re.groups else ""
        if rule.how == "mask":
            return f"{kept}<{rule.name}>"
        number = self._numbers.setdefault(found[0][len(kept) :], len(self._numbers) + 1)
        return f"{kept}<id {number}>"

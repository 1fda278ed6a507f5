"""The scenarios that a harness is put through: data, and the few questions asked of each afterwards."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polar_mitm.conformance import plays
from polar_mitm.conformance.plays import LAST_WORDS, Play, num_images, said_by_user
from polar_mitm.types import EgressEvent, ModelCall

PROMPT = "Create hello.txt containing hi with the shell tool, then say done."
RESUMED = "Thank you. Create more.txt containing ho in the same way."
DELEGATED = "Have a sub-agent create hello.txt, then say done."
LOOK = "Look at picture.png with your tool for reading files, then say done."
AGENT_TASK = "Create hello.txt containing hi with the shell."

_WRITE = "printf %s hi > hello.txt"
_WRITE_MORE = "printf %s ho > more.txt"
_WINDOW = 1 << 20  # tokens; what the engine says of itself


@dataclass
class Ran:
    """What came of one run of a scenario. `asked` are the engine's requests, `files` the workspace's."""

    exit_code: int
    output: str
    seconds: float
    calls: list[ModelCall]
    events: list[EgressEvent]
    asked: list[dict[str, Any]]
    files: Mapping[str, str]
    play: Play
    incomplete: str | None = None
    accounted: bool = True
    """Every sampled token of it is trained, masked or quarantined."""


_IMAGES = (b"iVBORw0KGgo", b"/9j/", b"UklGR")  # PNG, JPEG and WebP in base64

Check = Callable[[Ran], str | None]
"""What is wrong with a run; None if nothing."""


@dataclass(frozen=True)
class Scenario:
    """One thing that a harness has to get over.

    Attributes:
        play: makes the script anew for each run.
        prompts: what the user says; each after the first in a new process that resumes the conversation.
        checks: what has to hold beyond what always has to: an end without error, the files that it
            `leaves`, and a whole record.
        files: of the workspace, to begin with.
        images: whether the engine reads images.
        beyond: why it has no meaning for the harness, as seen in a run; None if it has.
        trust: the only way in which the harness may come to trust the CA; None for all. Such a scenario
            asks a question, and no answer to it is wrong.
        fast: belongs to the subset for CI.
    """

    name: str
    title: str
    play: Callable[[], Play]
    prompts: Sequence[str] = (PROMPT,)
    checks: Sequence[Check] = ()
    leaves: Mapping[str, str] = field(default_factory=lambda: {"hello.txt": "hi"})
    files: Mapping[str, bytes] = field(default_factory=dict)
    images: bool = False
    beyond: Check = lambda ran: ran.play.lacks
    trust: Sequence[str] | None = None
    timeout_s: float = 180
    fast: bool = False

    @property
    def asks(self) -> bool:
        """Whether it is a question with no wrong answer."""
        return self.trust is not None


# --- checks ----------------------------------------------------------------------------------------------


def ends_well(ran: Ran) -> str | None:
    """The harness got to its end, and calls that a success."""
    return None if ran.exit_code == 0 else f"exit code {ran.exit_code}"


def is_recorded(ran: Ran) -> str | None:
    """No hole in the record, and each token accounted for."""
    if ran.incomplete:
        return f"the record is incomplete: {ran.incomplete}"
    if not ran.accounted:
        return "sampled tokens are not accounted for"
    for call in ran.calls:
        # A prewarm over WebSocket asks the engine nothing.
        if (
            call.status == "ok"
            and call.upstream_body
            and not 0 < len(call.completion_token_ids) == len(call.behaviour_logprobs)
        ):
            return f"call {call.seq} lacks tokens or logprobs"
        if call.status == "refused" and not (call.error or "").startswith("context_overflow"):
            return f"call {call.seq} was refused: {call.error}"
    return None if ran.calls else "it made no model call"


def has(name: str, content: str) -> Check:
    """The workspace has this file."""

    def check(ran: Ran) -> str | None:
        found = ran.files.get(name)
        if found is None:
            return f"no {name} in the workspace"
        return None if found == content else f"{name} holds {found[:40]!r}"

    return check


def prints(text: str) -> Check:
    """The harness shows its user this text."""
    return lambda ran: None if text in ran.output else f"does not print {text[:40]!r}"


def met_the_fault(ran: Ran) -> str | None:
    """At least one call failed."""
    return None if any(call.status == "failed" for call in ran.calls) else "no call is failed"


def makes(role: str) -> Check:
    """At least one call has this role."""
    return lambda ran: None if any(c.role == role for c in ran.calls) else f"no call has the role {role}"


def sends_no_image(ran: Ran) -> str | None:
    """It lacks the tool, or asked for no look at all: not every model that harnesses know reads images."""
    sent = any(mark in call.wire.request_body for call in ran.calls for mark in _IMAGES)
    return ran.play.lacks or (None if sent else "it sends no image to the model that it believes in")


def shows_image(ran: Ran) -> str | None:
    """The picture got to the engine."""
    return None if any(num_images(request) for request in ran.asked) else "the engine was shown no image"


def remembers(ran: Ran) -> str | None:
    """The resumed conversation holds what was said before."""
    both = [request for request in ran.asked if all(p in said_by_user(request) for p in (PROMPT, RESUMED))]
    return None if both else "the resumed conversation does not hold the first prompt"


def was_summed_up(ran: Ran) -> str | None:
    """The harness asked for a summary when its window was nearly full."""
    asked = isinstance(ran.play, plays.Compaction) and ran.play.num_summaries
    return None if asked else "it asked for no summary"


# --- the table -------------------------------------------------------------------------------------------


def _png(size: int) -> bytes:
    """A red square (W3C PNG, colour type 2)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xd0\x20\x20" * size) * size
    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return base64.b64decode("iVBORw0KGgo=") + b"".join(parts)


def _faulty(*faults: plays.Fault) -> Callable[[], Play]:
    # Some go on from the beginning of an answer that broke off: it is in the history then.
    return lambda: Play(plays.until_told(plays.shell(_WRITE), plays.say()), faults=faults)


def _plain() -> Play:
    return Play(plays.shell(_WRITE), plays.say())


def _thoughtful() -> Play:
    think = "A small task.\n\nWrite the file — déjà vu."
    return Play(plays.shell(_WRITE, reasoning=think), plays.say(reasoning="That went well."))


def _long() -> Play:
    answer = plays.say(plays.lines(28_000) + LAST_WORDS, tokens_per_chunk=256)
    return Play(plays.shell(_WRITE), answer)


_TRUST = {
    "nothing": (),
    "system": ("system",),
    "node": ("NODE_EXTRA_CA_CERTS",),
    "file": ("SSL_CERT_FILE",),
    "node-system": ("system", "NODE_USE_SYSTEM_CA"),
}
"""Ways to have a harness trust the interceptor's CA (`sandbox/trust.py`), each alone."""

SCENARIOS: dict[str, Scenario] = {
    each.name: each
    for each in (
        Scenario("two-turns", "a file in two turns", _plain, checks=[prints(LAST_WORDS)], fast=True),
        Scenario(
            "parallel",
            "two tool calls in one answer",
            lambda: Play(plays.shell(_WRITE, _WRITE_MORE), plays.say()),
            leaves={"hello.txt": "hi", "more.txt": "ho"},
            fast=True,
        ),
        Scenario(
            "malformed",
            "tool arguments that are no JSON",
            lambda: Play(plays.broken_arguments, plays.shell(_WRITE), plays.say()),
            fast=True,
        ),
        Scenario(
            "unknown-tool",
            "a call of a tool that is not there",
            lambda: Play(plays.unknown_tool, plays.shell(_WRITE), plays.say()),
            fast=True,
        ),
        Scenario("thinking", "reasoning before words and tools", _thoughtful, fast=True),
        Scenario(
            "image",
            "a picture is read by a tool",
            lambda: Play(plays.look_at("picture.png"), plays.say()),
            prompts=(LOOK,),
            checks=[shows_image],
            leaves={},
            files={"picture.png": _png(64)},
            images=True,
            beyond=sends_no_image,
        ),
        Scenario("engine-429", "the engine is busy once", _faulty(plays.status(429)), checks=[met_the_fault]),
        Scenario(
            "engine-500",
            "the engine fails once",
            _faulty(plays.status(500)),
            checks=[met_the_fault],
            fast=True,
        ),
        Scenario(
            "engine-529",
            "the engine is overloaded once",
            _faulty(plays.status(529)),
            checks=[met_the_fault],
        ),
        Scenario("cut", "the stream breaks off once", _faulty(plays.cut), checks=[met_the_fault]),
        Scenario("slow", "the first token takes 150 s", _faulty(plays.silent(150)), timeout_s=400),
        Scenario("long", "an answer of 28,000 tokens", _long, checks=[prints(LAST_WORDS)]),
        Scenario(
            "resume",
            "a second process goes on with the conversation",
            lambda: Play(plays.shell(_WRITE), plays.say(), plays.shell(_WRITE_MORE), plays.say()),
            prompts=(PROMPT, RESUMED),
            checks=[remembers],
            leaves={"hello.txt": "hi", "more.txt": "ho"},
        ),
        Scenario(
            "compaction",
            "the window is nearly full",
            lambda: plays.Compaction(_WRITE, num_tokens=int(0.99 * _WINDOW), prompts=(PROMPT, RESUMED)),
            prompts=(PROMPT, RESUMED),  # some look at their window only before something new is asked
            checks=[was_summed_up, makes("compaction")],
            timeout_s=300,
        ),
        Scenario(
            "sub-agents",
            "a sub-agent does the work",
            lambda: plays.Delegation(DELEGATED, AGENT_TASK, _WRITE),
            prompts=(DELEGATED,),
            checks=[makes("subagent")],
        ),
        *(
            Scenario(
                f"trust-{name}",
                f"the CA by {' and '.join(ways) or 'nothing'}",
                _plain,
                trust=ways,
                timeout_s=90,
            )
            for name, ways in _TRUST.items()
        ),
    )
}
"""By name, in the order in which they are shown."""


def chosen(names: Sequence[str], fast: bool) -> list[Scenario]:
    """The scenarios of these names, or of the fast subset, or all.

    Raises:
        KeyError: there is none of that name.
    """
    if names:
        return [SCENARIOS[name] for name in dict.fromkeys(names)]
    return [each for each in SCENARIOS.values() if each.fast or not fast]

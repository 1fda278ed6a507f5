"""Going on from the ids that were sampled, instead of rendering their text anew.

A parent was asked with the prompt ids `p` and sampled `c`; a request continues it. Let F be the rendering of
the request, and B that of the parent's own messages, which F begins with where the template is stable. What
follows in F is the parent's answer as the template writes it, up to the end of its turn, then what is new:

    F      = B  answer, end of turn  new
    prompt = p  c                    new

So only the place where the answer ends in F has to be found. Mostly F goes on with exactly c, and there it
ends. Else it ends at the next end-of-turn id, and both versions of the answer must read the same: what the
model sees is what plain serving would show it, in other ids. What may differ is named by `Edit`, and each
use is recorded; whatever else differs is a fallback, with its reason, and the request is rendered plainly.

No hard-coded ids: a turn ends with what the model sampled last, or, where it was cut off, with what the probe
saw the template put there. Ids are compared as text, and at no time parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Literal

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace

from polar_mitm.equivalence import number
from polar_mitm.lineage import Found, Known
from polar_mitm.token_ids import TokenIds
from polar_mitm.types import ChatRequest, ImagePart, KeepReasoning, Message
from polar_mitm.upstream.engine import EngineInfo, Template
from polar_mitm.upstream.render import Answers, Lookup, detokenize, detokenized, render, rendered

Fallback = Literal[
    "continuation_off",  # a setting
    "engine_without_token_input",  # the probe says so, or an earlier call did
    "engine_refused_token_input",  # it answered with an error, and was asked again plainly
    "engine_ignored_token_input",  # it used another prompt: the call's context is not what it seems
    "images",
    "render_failed",  # or too slow
    "template_not_prefix_stable",  # the history before the answer is rendered differently now
    "end_of_turn_differs",  # the template ends the turn with another id than the model did
    "reasoning_dropped",  # the template, or the harness, leaves reasoning out of the history
    "text_differs",  # the template leaves out or changes something else that was said
    "truncated_tool_call",  # nothing says how a template would write half a call
    "window_exceeded",  # the sampled ids take more room than their rendering
    "internal_error",  # a bug of ours; the log has it
]
"""Why a request with a parent is rendered plainly all the same."""

Edit = Literal[
    "retokenised",  # the answer's text has other ids, blanks, escapes or numbers in a rendering
    "generation_prompt_kept",  # it opened the answer (an empty think block), and is no history
    "stop_string_kept",  # the sampled stop string, which the harness was not shown
    "reasoning_kept",  # by `keep_reasoning = "always"`
]
"""How a continued prompt may differ from a rendered one, besides the harness's own edits."""

MAX_ENDS = 4
"""Ends of turn that are tried: an answer may contain the id's text."""
MAX_MARKUP = 64
"""Characters around reasoning that are the template's, such as `<think></think>`."""


class Continued(Struct):
    """What became of an attempt: `prompt_token_ids` [P] to send, or the `fallback`.

    `rendered` is F where it is known and is needed later: where it is not what will be sent.
    """

    prompt_token_ids: TokenIds | None = None
    fallback: Fallback | None = None
    edits: list[Edit] = field(default_factory=list)
    rendered: TokenIds | None = None


Got = list[bytes | None]
Steps = Generator[list[Lookup], Got, Continued]
"""Yields what to ask the engine, is sent the answers (None for one that failed), returns the outcome."""


class _Fallback(Exception):
    def __init__(self, reason: Fallback) -> None:
        self.reason = reason


def go_on(
    found: Found,
    request: ChatRequest,
    body: bytes,
    body_of: Callable[[list[Message]], bytes],
    engine: EngineInfo,
    keep_reasoning: KeepReasoning,
) -> Steps:
    """Continue the parent in `found`.

    Args:
        body: the chat completion's body of `request`.
        body_of: the same with other messages.
    """
    try:
        return (yield from _go_on(found, request, body, body_of, engine, keep_reasoning))
    except _Fallback as fallback:
        return Continued(fallback=fallback.reason)
    except ValueError:  # an engine's answer that is none
        return Continued(fallback="render_failed")


def _go_on(
    found: Found,
    request: ChatRequest,
    body: bytes,
    body_of: Callable[[list[Message]], bytes],
    engine: EngineInfo,
    keep_reasoning: KeepReasoning,
) -> Steps:
    parent, template = found.parent, engine.template
    assert parent is not None
    if template is None:
        raise _Fallback("engine_without_token_input")
    if engine.images and any(isinstance(part, ImagePart) for m in request.messages for part in m.content):
        raise _Fallback("images")
    always = keep_reasoning == "always"
    messages = without_reasoning(request.messages) if always else request.messages
    wanted = [render(body if messages is request.messages else body_of(messages))]
    known = parent.prompt_token_ids if parent.rendered is None else parent.rendered
    if always and parent.rendered is None and any(m.reasoning for m in parent.messages):
        known = b""  # it was rendered with the reasoning
    if not known:
        wanted.append(render(body_of(messages[: parent.num_messages])))
    whole, *others = yield from _rendered(wanted)
    seam = Seam(whole, others[0] if others else _ids(known), parent, template)
    if not seam.stable and found.edits and not others:
        # Earlier answers may be echoed otherwise than when the parent was asked.
        others = yield from _rendered([render(body_of(messages[: parent.num_messages]))])
        seam = Seam(whole, others[0], parent, template)
    if not seam.stable:
        lost = any(m.reasoning for m in messages[: found.num_history])
        raise _Fallback("reasoning_dropped" if lost else "template_not_prefix_stable")
    new, edits = seam.verbatim, list[Edit]()
    if new is None:
        new, edits = yield from _compare(seam, found, engine, always)
    prompt = TokenIds((_ids(parent.prompt_token_ids) + seam.sampled + new)[:-1])
    if engine.max_model_len and len(prompt) >= engine.max_model_len:
        raise _Fallback("window_exceeded")
    return Continued(prompt, None, edits, TokenIds(whole[:-1]))


def remembering(steps: Steps, answers: Answers) -> Steps:
    """The same steps, which ask nothing that is among the `answers`, and add to them."""
    got: Got | None = None
    while True:
        try:
            asked = next(steps) if got is None else steps.send(got)
        except StopIteration as stop:
            outcome: Continued = stop.value
            return outcome
        got = [answers.get(lookup.key) for lookup in asked]
        if unknown := [n for n, answer in enumerate(got) if answer is None]:
            fresh = yield [asked[n] for n in unknown]
            for n, answer in zip(unknown, fresh, strict=True):
                got[n] = answer
                if answer is not None:
                    answers.put(asked[n].key, answer)


def without_reasoning(messages: list[Message]) -> list[Message]:
    """The messages with no reasoning in them; the same list where there is none."""
    if not any(m.reasoning for m in messages):
        return messages
    return [replace(m, reasoning=None) if m.reasoning else m for m in messages]


def _rendered(lookups: list[Lookup]) -> Generator[list[Lookup], Got, list[bytes]]:
    answers = yield lookups
    return [_ids(rendered(_answer(answer))) for answer in answers]


def _answer(answer: bytes | None) -> bytes:
    if answer is None:
        raise _Fallback("render_failed")
    return answer


def _ids(ids: Sequence[int] | bytes) -> bytes:
    """Ids as text, each with a comma behind it: then beginnings and joints of lists are those of texts."""
    text = ids if isinstance(ids, bytes) else TokenIds.of(ids).text
    return text + b"," if text else b""


# --- where the answer ends -------------------------------------------------------------------------------


class Seam:
    """The rendering F of a request (`whole`) against that of its parent (`before`), all as text of ids."""

    def __init__(self, whole: bytes, before: bytes, parent: Known, template: Template) -> None:
        self.whole = whole
        self.sampled = _ids(parent.completion_token_ids)
        # A stop string ends a turn without any end-of-turn id, as a limit does.
        self.closed = parent.finish_reason != "length" and not isinstance(parent.stop_reason, str)
        self._template = template
        self.end = b"%d," % parent.completion_token_ids[-1]
        self.start = len(before) if whole.startswith(before) else _common(whole, before)
        self.left_out = before[self.start :]
        """Of the generation prompt, what is not in the history."""
        opening = _ids(template.generation_prompt)
        self.stable = not self.left_out or (opening.endswith(self.left_out) and self.left_out != opening)

    @property
    def verbatim(self) -> bytes | None:
        """What is new, where the rendering has the answer in the sampled ids."""
        if self.left_out or not self.whole.startswith(self.sampled, self.start):
            return None
        return self.whole[self.start + len(self.sampled) :]

    def ends(self) -> Iterator[tuple[bytes, bytes]]:
        """Where the answer may end: each time its rendered ids, without the end of turn, and what is new."""
        if self.closed:
            mark = self.end
        elif self._template.after_text is not None:
            mark = b"%d," % self._template.after_text
        else:
            return
        at = self.start
        for _ in range(MAX_ENDS):
            if (at := _find(self.whole, mark, at)) < 0:
                return
            yield self.whole[self.start : at], self.whole[at + len(mark) if self.closed else at :]
            at += len(mark)


def _find(ids: bytes, wanted: bytes, at: int) -> int:
    """Where `wanted` stands next, from the beginning of an id on; -1 for nowhere."""
    return at if ids.startswith(wanted, at) else ids.find(b"," + wanted, at) + 1 or -1


def _common(one: bytes, other: bytes) -> int:
    """Length of the common beginning, in whole ids."""
    size = min(len(one), len(other))
    differ = np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size)
    first = int(differ.argmax()) if differ.any() else size
    return one.rfind(b",", 0, first) + 1


# --- whether it reads the same ---------------------------------------------------------------------------


def _compare(
    seam: Seam, found: Found, engine: EngineInfo, always: bool
) -> Generator[list[Lookup], Got, tuple[bytes, list[Edit]]]:
    """What is new, after the first end at which the rendered answer reads as the sampled one did."""
    parent = found.parent
    assert parent is not None
    if not seam.closed and parent.answer.tool_calls:
        raise _Fallback("truncated_tool_call")
    said = seam.sampled[: -len(seam.end)] if seam.closed else seam.sampled
    reasoning = _plain(parent.answer.reasoning or "")
    texts = {b"": ""}
    reason: Fallback = "end_of_turn_differs"
    for written, new in seam.ends():
        wanted = [ids for ids in {seam.left_out, said, written} if ids not in texts]
        answers = yield [detokenize(engine.model, ids[:-1]) for ids in wanted]
        for ids, answer in zip(wanted, answers, strict=True):
            texts[ids] = _plain(detokenized(_answer(answer)))
        ours, theirs = texts[said].rstrip("\ufffd"), texts[written]
        kept: list[Edit] = ["generation_prompt_kept"]
        openings: list[tuple[str, list[Edit]]] = [(texts[seam.left_out], []), ("", kept)]
        for opening, edits in openings[: 2 if seam.left_out else 1]:
            edit = _reads(opening + ours, theirs, parent, reasoning if always else "", found.edits)
            if edit is not None:
                return new, [*edits, edit]
        lost = reasoning and theirs.count(reasoning) < ours.count(reasoning)
        reason = "reasoning_dropped" if lost else "text_differs"
    raise _Fallback(reason)


def _reads(
    ours: str, theirs: str, parent: Known, reasoning: str, harness_edits: Sequence[str]
) -> Edit | None:
    """The edit that makes `theirs`, a rendered answer, of `ours`, the sampled one; None for any other."""
    if ours == theirs or ("key_order" in harness_edits and sorted(ours) == sorted(theirs)):
        return "retokenised"
    if isinstance(parent.stop_reason, str):
        rest = ours.removeprefix(theirs)
        if len(rest) + len(theirs) == len(ours) and rest.startswith(_plain(parent.stop_reason)):
            return "stop_string_kept"
    if reasoning and reasoning in ours:
        rest = ours.replace(reasoning, "", 1)
        if rest.endswith(theirs) and len(rest) - len(theirs) <= MAX_MARKUP:
            return "reasoning_kept"
    return None


def _plain(text: str) -> str:
    """A text without what the notation of JSON decides: blanks, quotes, escapes, how a number is written."""
    text = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # pairs of escapes are one
    return _NUMBER.sub(_written, _NOTATION.sub("", text))


def _written(match: re.Match[str]) -> str:
    try:
        return str(number(match[0]))
    except ValueError:  # no float: left as it is
        return match[0]


_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")
_NOTATION = re.compile(r"\\[nrtbf]|[\s\"\\]")
_EXPONENT = r"[eE][+-]?[0-9]++"
# With a fraction or an exponent, or minus zero: other whole numbers are text, whatever their length.
_NUMBER = re.compile(rf"(?<![0-9])(?:-?[0-9]++(?:\.[0-9]++(?:{_EXPONENT})?|{_EXPONENT})|-0(?![0-9]))")

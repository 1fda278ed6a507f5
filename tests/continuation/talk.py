"""A conversation of a harness with a model of `models`, continued by ids wherever `continuation` can."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from msgspec.structs import replace

from polar_mitm.continuation import Continued, Got, go_on
from polar_mitm.dialects.ids import minted, new_id
from polar_mitm.lineage import Lineage
from polar_mitm.types import (
    ChatRequest,
    KeepReasoning,
    Message,
    ModelCall,
    Sampling,
    TextPart,
    Tool,
    ToolCall,
)
from polar_mitm.upstream.render import RENDER_PATH, Lookup
from polar_mitm.upstream.vllm import build_body
from tests.continuation.models import Model, Said, decode, encode, sampled

BASH = Tool("Bash", "run", {"type": "object", "properties": {"command": {"type": "string"}}})


def user(text: str) -> Message:
    return Message("user", [TextPart(text)])


@dataclass
class Turn:
    """One call: what the engine was given and sampled, and the rendering that it stands for."""

    prompt: list[int]
    sampled: list[int]
    rendered: list[int]
    continuation: str
    fallback: str | None
    edits: list[str]
    renders: int
    call_id: str


@dataclass
class Talk:
    """`echo` is what the harness makes of an answer; `drop_tools` for models that have none."""

    model: Model
    keep: KeepReasoning = "template"
    echo: Callable[[Message], Message] = lambda message: message
    random: Random = field(default_factory=lambda: Random(0))
    answer: Callable[[Talk, Lookup], bytes | None] = lambda talk, lookup: talk.model.answer(lookup)

    def __post_init__(self) -> None:
        self.tools = [BASH] if self.model.num_calls else []
        self.lineage = Lineage()
        self.messages: list[Message] = []
        self.turns: list[Turn] = []

    def ask(
        self,
        new: Sequence[Message],
        said: Said,
        *,
        cuts: float = 0.0,
        length: int | None = None,
        stop: str | None = None,
    ) -> Turn:
        """One call. `cuts`: how often the sampled ids are not BPE's own; `length`: tokens until it is cut
        off; `stop`: a stop string, which is sampled after the text.
        """
        self.messages += new
        request = ChatRequest("m", list(self.messages), list(self.tools))
        lookups: list[Lookup] = []
        continued, found_edits = self._continue(request, lookups)
        body = self._body(request.messages)
        rendered = self.model.render(json.loads(body))
        prompt = rendered if continued.prompt_token_ids is None else list(continued.prompt_token_ids)
        ids = sampled(self.model.say(said) + (stop or ""), cuts, self.random)
        reason: Any = "tool_calls" if said.calls else "stop"
        if length is not None:
            ids, reason = ids[:length], "length"
            opening = self.model.say(Said())  # an empty think block, which is no text
            said = Said(decode(ids).rstrip("\ufffd").removeprefix(opening))
        elif stop is None:
            ids += encode(self.model.end(said))
        call = ModelCall(
            call_id=new_id(),
            rollout_id="r",
            seq=len(self.turns),
            dialect="",
            route="",
            status="ok",
            finish_reason=reason,
            prompt_token_ids=prompt,
            completion_token_ids=ids,
            answer=self._message(said, new_id()),
        )
        call.answer = self._message(said, call.call_id)
        text = None if continued.rendered is None else continued.rendered.text
        self.lineage.add(call, request, text, stop)
        self.messages.append(self.echo(call.answer))
        exact = continued.prompt_token_ids is not None
        turn = Turn(
            prompt,
            ids,
            rendered,
            "exact" if exact else "none",
            continued.fallback,
            [*found_edits, *continued.edits] if exact else [],
            sum(lookup.path == RENDER_PATH for lookup in lookups),
            call.call_id,
        )
        if exact:
            before = self.turns[-1]
            assert prompt[: len(before.prompt) + len(before.sampled)] == before.prompt + before.sampled
        self.turns.append(turn)
        return turn

    def results(self, *texts: str) -> list[Message]:
        """The results of the last answer's tool calls."""
        calls = self.messages[-1].tool_calls
        return [
            Message("tool", [TextPart(text)], tool_call_id=call.id, minted_ids=[call.id])
            for call, text in zip(calls, texts, strict=True)
        ]

    def _continue(self, request: ChatRequest, lookups: list[Lookup]) -> tuple[Continued, list[str]]:
        found = self.lineage.find(request)
        if found.parent is None:
            return Continued(fallback=found.fallback), []  # type: ignore[arg-type]
        steps = go_on(found, request, self._body(request.messages), self._body, self.model.engine, self.keep)
        answers: Got | None = None
        try:
            while True:
                asked = next(steps) if answers is None else steps.send(answers)
                lookups += asked
                answers = [self.answer(self, lookup) for lookup in asked]
        except StopIteration as stop:
            return stop.value, list(found.edits)

    def _body(self, messages: list[Message]) -> bytes:
        return build_body(ChatRequest("m", messages, self.tools), Sampling(), self.model.engine)

    def _message(self, said: Said, call_id: str) -> Message:
        calls = [
            ToolCall(minted("toolu", call_id, n), name, arguments)
            for n, (name, arguments) in enumerate(said.calls)
        ]
        return Message(
            "assistant",
            [TextPart(said.text)] if said.text else [],
            reasoning=said.reasoning or None,
            tool_calls=calls,
            minted_ids=[call.id for call in calls] or [minted("msg", call_id)],
        )


def compact(message: Message) -> Message:
    """What JavaScript harnesses do: arguments parsed and written again, text trimmed."""
    calls = [
        replace(call, arguments=json.dumps(json.loads(call.arguments), separators=(",", ":")))
        for call in message.tool_calls
    ]
    content: Any = [TextPart(message.text.strip())] if message.text.strip() else []
    return replace(message, content=content, tool_calls=calls)


def squashed(ids: list[int], *leave_out: str) -> str:
    """The text without blanks, and without some of its parts."""
    text = "".join(decode(ids).split())
    for part in leave_out:
        text = text.replace("".join(part.split()), "")
    return text

"""Scripted engines that hold their answers, so that a test can act while a harness waits."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from polar_mitm.conformance import byte_tokens
from polar_mitm.conformance.engine_wire import EngineCall
from polar_mitm.conformance.plays import beside
from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, Script, shell_call

LAST_WORDS = 'Done — “hello.txt” says hi.\n\nA second line with `code`, "quotes" and <tags>.'


def writing(request: dict[str, Any], nth: int) -> Answer:
    """A harness writes `hello.txt`: a shell call first, the last words once a tool has answered."""
    call = shell_call(request, "printf %s hi > hello.txt")
    if call is None:
        return beside(request)
    if not told_by_tool(request):
        return Answer(text="I will write the file.", reasoning="A small task.", tool_calls=(call,))
    return Answer(text=LAST_WORDS)


def droning(request: dict[str, Any], nth: int) -> Answer:
    """A harness gets a long, slow answer; the start-up probe a short one."""
    if is_probe(request):
        return Answer(text="Sunny.")
    return Answer(text="word " * 2000, chunk_delay_s=0.1)


def is_probe(request: dict[str, Any]) -> bool:
    """Whether `polar-mitm` asks for itself, to see what the engine can do."""
    return request.get("max_tokens") == 1 or "get_weather" in json.dumps(request.get("tools"))


def told_by_tool(request: dict[str, Any]) -> bool:
    """Whether a tool has answered: the conversation is in its second turn."""
    return any(message.get("role") == "tool" for message in request["messages"])


class HarnessEngine(ScriptedEngine):
    """`asked` are the harnesses' own calls. While `gate` is shut, those that `holds` says yes to wait."""

    def __init__(self, script: Script = writing) -> None:
        super().__init__(script)
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_waiting = 0

    @property
    def asked(self) -> list[EngineCall]:
        return [call for call in self.calls if not is_probe(call.request)]

    def holds(self, request: dict[str, Any]) -> bool:
        return not is_probe(request)

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        if not self.gate.is_set() and self.holds(await http.json()):
            self.num_waiting += 1
            await self.gate.wait()
        return await super()._chat(http)


def text_of(token_ids: list[int]) -> str:
    """Sampled ids as text, without the end-of-turn token."""
    return byte_tokens.decode(token_ids).removesuffix("<|im_end|>")

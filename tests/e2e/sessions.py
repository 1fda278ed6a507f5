"""Long sessions of the real harnesses: one conversation over three processes, and what an engine answers."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from polar_mitm.cache import default_cache
from polar_mitm.conformance import byte_tokens
from polar_mitm.conformance.plays import beside, num_answered
from polar_mitm.conformance.scripts import Answer, shell_call
from polar_mitm_sandbox import recipes
from polar_mitm_sandbox.install import ensure_harness
from tests.e2e.engines import is_probe

PROMPTS = ("Look around.", "Look again, and tell me more.", "Thank you.")
NUM_TOOL_TURNS = (4, 1, 0)
"""How often a tool is called before the last word, prompt by prompt."""
NUM_CALLS = sum(NUM_TOOL_TURNS) + len(PROMPTS)

HARNESSES = ("claude-code", "codex", "pi", "opencode", "qwen-code", "gemini-cli")


def session(harness: str) -> list[str]:
    """A command that has one conversation of `PROMPTS`, each in a process of its own."""
    recipe = recipes.load(harness)
    program = ensure_harness(recipe, default_cache()).command
    asked = [[*program, *recipe.arguments(prompt, resume=n > 0)] for n, prompt in enumerate(PROMPTS)]
    return ["sh", "-c", " && ".join(map(shlex.join, asked))]


def is_last_word(nth: int) -> bool:
    """Whether answer number `nth` of the conversation ends what was asked, without a tool."""
    for num_turns in NUM_TOOL_TURNS:
        if nth <= num_turns:
            return nth == num_turns
        nth -= num_turns + 1
    return True


def looking(request: dict[str, Any], nth: int) -> Answer:
    """A script of the session, in which hardly an answer is as a template would write it."""
    nth = num_answered(request)
    # Not the same again: Qwen Code takes that for a loop, and ends.
    call = shell_call(request, f"printf 'caf\u00e9 {nth}'")
    if is_probe(request) or call is None:
        return beside(request)  # a title, say
    if is_last_word(nth):
        return Answer(text=f" Nothing more ({nth}). \n", reasoning="All seen.\n" if nth % 2 else "")
    name, arguments = call
    odd = arguments.replace("\u00e9", "\\u00e9").replace('": ', '" :   ')  # other ids in a rendering
    parallel = ((name, odd), (name, arguments)) if nth == 1 else ((name, odd),)
    return Answer(text="" if nth == 2 else f"Step {nth}. ", reasoning=f"Hm, {nth}.\n\n", tool_calls=parallel)


def made_to_look(request: dict[str, Any]) -> dict[str, Any]:
    """Holds a model to the session: a small one calls no tools by itself, so a grammar has it do so.

    Its logprobs are then no longer those of the model's own softmax.
    """
    pattern = grammar(request)
    return brief(request) or ({} if pattern is None else {"structured_outputs": {"regex": pattern}})


def made_to_speak(request: dict[str, Any]) -> dict[str, Any]:
    """Has a model say something: harnesses leave an empty answer out of the history, and ask again.

    What it says is its own affair: vLLM takes raw logprobs before it masks the end of turn.
    Calls without tools, for a title, need not be long.
    """
    if is_probe(request):
        return {}
    return brief(request) or {"min_tokens": 4} | ({} if request.get("tools") else {"max_tokens": 16})


def brief(request: dict[str, Any]) -> dict[str, Any]:
    """Has a model come to the end of an object that a schema asks for: harnesses ask again for a cut one."""
    asked = request.get("response_format")
    if asked is None:
        return {}
    fields = asked["json_schema"]["schema"]["properties"]
    values = {"integer": "[1-9][0-9]", "string": '"[a-z]{3,9}"'}
    pattern = ", ".join(f'"{name}": {values[field["type"]]}' for name, field in fields.items())
    return {"response_format": None, "structured_outputs": {"regex": rf"\{{{pattern}\}}"}}


@asynccontextmanager
async def in_front_of(engine_url: str, ask: Callable[[dict[str, Any]], dict[str, Any]]) -> AsyncIterator[str]:
    """The URL of an engine in front of the one at `engine_url`, which adds `ask(request)` to chat requests.

    Tokens, their ids and the contexts are the real engine's; everything else passes through as it is.
    """
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as http:

        async def forward(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            if request.path == "/v1/chat/completions":
                asked = json.loads(body)
                body = json.dumps({**asked, **ask(asked)}).encode()
            headers = {"content-type": request.content_type}
            url = engine_url + request.path_qs
            async with http.request(request.method, url, data=body, headers=headers) as answer:
                kind = answer.headers.get("content-type", "application/json")
                out = web.StreamResponse(status=answer.status, headers={"content-type": kind})
                await out.prepare(request)
                async for chunk in answer.content.iter_any():
                    await out.write(chunk)
                return out

        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", forward)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


def grammar(request: dict[str, Any]) -> str | None:
    """What the model may say to a harness's request, as a regular expression."""
    if is_probe(request):
        return None
    call = shell_call(request, "COMMAND")
    if call is None or is_last_word(num_answered(request)):
        return "[A-Z][a-z]{2,9}( [a-z]{1,9}){2,9}[.]"
    text = "".join(f"\\{c}" if c in r"\.*+?^$|()[]{}" else c for c in byte_tokens.call_text(*call))
    return text.replace("COMMAND", "echo [a-z]{3,9}( [a-z]{3,9}){0,3}")


DELEGATE = "Delegate it twice."
_SPAWN, _WAIT = "multi_agent_v1__spawn_agent", "multi_agent_v1__wait_agent"


def delegating(request: dict[str, Any], nth: int) -> Answer:
    """Two sub-agents are given the very same task at once, and are answered alike."""
    call = shell_call(request, "echo seen")
    if is_probe(request) or call is None:
        return beside(request)
    turn = num_answered(request)
    if DELEGATE not in json.dumps([m for m in request["messages"] if m["role"] == "user"]):
        again = Answer(text=f"Quietly, {turn}.", tool_calls=(call,), chunk_delay_s=0.02)
        return again if turn < 2 else Answer(text="Seen.")
    tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in request["tools"]}
    if turn == 0:
        return Answer(text="Two at once.", tool_calls=(_delegation(tools),) * 2)
    if turn == 1 and _WAIT in tools:  # Codex does not wait unless told to
        told = " ".join(m["content"] for m in request["messages"] if m["role"] == "tool")
        agents = re.findall(r'"agent_id":"([^"]+)"', told)
        return Answer(tool_calls=[(_WAIT, json.dumps({"targets": [agent]})) for agent in agents])
    return Answer(text="Delegated.")


def _delegation(tools: dict[str, Any]) -> tuple[str, str]:
    """A call of whichever tool starts a sub-agent."""
    task = "Look around quietly."
    if _SPAWN in tools:
        return _SPAWN, json.dumps({"message": task})
    if "task" in tools:
        return "task", json.dumps({"description": "look", "prompt": task, "subagent_type": "general"})
    if "invoke_agent" in tools:
        return "invoke_agent", json.dumps({"agent_name": "generalist", "prompt": task})
    name = "agent" if "agent" in tools else "Agent"  # Qwen Code's, and Claude Code's
    return name, json.dumps({"description": "look", "prompt": task, "run_in_background": False})


def garbling(request: dict[str, Any], nth: int) -> Answer:
    """The second answer's tool call is not JSON, which Pi and opencode rewrite in their history."""
    call = shell_call(request, "echo ok")
    if is_probe(request) or call is None:
        return beside(request)
    turn = num_answered(request)
    if turn == 3:
        return Answer(text="Enough.")
    arguments = call[1] if turn != 1 else '{"command": "echo oops'
    return Answer(text=f"Step {turn}.", tool_calls=((call[0], arguments),))


class Overflowing:
    """The window is too small for the fourth request, until a summary takes the place of what was said."""

    def __init__(self) -> None:
        self._summed_up = False

    def __call__(self, request: dict[str, Any], nth: int) -> Answer:
        call = shell_call(request, "seq 9")
        if is_probe(request) or call is None:
            self._summed_up |= "summarization" in request["messages"][0]["content"]
            return Answer(text="What was said so far.")
        turn = num_answered(request)
        if turn == 3 and not self._summed_up:
            message = "This model's maximum context length is 9 tokens. However, your request has 10."
            error = {"message": message, "type": "BadRequestError", "param": "input_tokens", "code": 400}
            return Answer(status=400, error={"error": error})
        much = "word " * 3000  # else there is nothing to leave out
        if turn >= 5:
            return Answer(text="Enough.")
        return Answer(text=f"Step {turn} {much}", tool_calls=(call,), tokens_per_chunk=1000)

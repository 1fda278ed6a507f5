"""What the scripted engine says to a harness in a scenario: a play of acts, one per answer in the history.

A play goes by how many answers the history holds, so that a retry gets the same answer again and any harness
can be led through it. Calls that offer no shell (a title, a router) are none of it, and get a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from polar_mitm.conformance.scripts import Answer, filled, fitting, functions, shell_call

Request = dict[str, Any]
Act = Callable[[Request], Answer]
Fault = Callable[[Answer], Answer]
Call = tuple[str, str]

WORKSPACE = "/workspace"  # as in every sandbox
LAST_WORDS = "All done, as asked."
SIDE_WORDS = "A small task"

_IMAGE_TOOLS = ("Read", "view_image", "read", "read_file")
_PATHS = ("path", "file_path", "filePath", "absolute_path")
_AGENT_TOOLS = ("Agent", "agent", "task", "invoke_agent", "multi_agent_v1__spawn_agent", "spawn_agent")
_TASKS = ("prompt", "message")
_WAIT = "multi_agent_v1__wait_agent"


class Lacking(Exception):
    """The harness offers no tool that the play needs."""


class Play:
    """A script of `acts`. The first calls that belong to it get `faults`, one each, made of their answers.

    `lacks` says that the harness did not offer a tool: then the scenario has no meaning for it.
    """

    def __init__(self, *acts: Act, faults: Sequence[Fault] = ()) -> None:
        self._acts = acts
        self._faults = list(faults)
        self.lacks: str | None = None

    def __call__(self, request: Request, nth: int) -> Answer:
        try:
            answer = self.answer(request)
        except Lacking as error:
            self.lacks = f"it does not offer {error}"
            return Answer(LAST_WORDS)
        if answer is None:
            return beside(request)
        return self._faults.pop(0)(answer) if self._faults else answer

    def answer(self, request: Request) -> Answer | None:
        """The answer to a call of the play; None to one that is none of it."""
        return acted(self._acts, request) if shell_call(request, "true") else None


def acted(acts: Sequence[Act], request: Request) -> Answer:
    """What the act says that the history has come to; the last one from then on."""
    return acts[min(num_answered(request), len(acts) - 1)](request)


def num_answered(request: Request) -> int:
    """How many answers the history holds."""
    return sum(message["role"] == "assistant" for message in request["messages"])


def beside(request: Request) -> Answer:
    """A word for a call that is none of the play, in JSON where it asks for that."""
    schema = (request.get("response_format") or {}).get("json_schema", {}).get("schema")
    return Answer(SIDE_WORDS if schema is None else json.dumps(fitting(schema)))


def said_by_user(request: Request) -> str:
    """All that the user has said, tool results apart."""
    return "\n".join(_text(m) for m in request["messages"] if m["role"] == "user")


def num_images(request: Request) -> int:
    """How many images the request shows the model."""
    parts = [m["content"] for m in request["messages"] if isinstance(m.get("content"), list)]
    return sum(part.get("type") == "image_url" for content in parts for part in content)


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


# --- acts ------------------------------------------------------------------------------------------------


def say(text: str = LAST_WORDS, **fields: Any) -> Act:
    """Words, and no tool."""
    return lambda request: Answer(text, **fields)


def shell(*commands: str, text: str = "I will do it.", **fields: Any) -> Act:
    """One call of the shell per command, all in one answer."""

    def act(request: Request) -> Answer:
        return Answer(text, tool_calls=[_shell(request, command) for command in commands], **fields)

    return act


def until_told(first: Act, then: Act) -> Act:
    """One act until a tool has answered, whatever else is in the history; another from then on."""

    def act(request: Request) -> Answer:
        told = any(message["role"] == "tool" for message in request["messages"])
        return (then if told else first)(request)

    return act


def broken_arguments(request: Request) -> Answer:
    """A call of the shell whose arguments are cut off: no JSON."""
    name, arguments = _shell(request, "printf broken")
    return Answer("I will do it.", tool_calls=[(name, arguments[:-1].rstrip('"'))])


def unknown_tool(request: Request) -> Answer:
    """A call of a tool that nobody offered."""
    return Answer("I will do it.", tool_calls=[("no_such_tool", '{"value": 1}')])


def look_at(name: str) -> Act:
    """A call of the tool that shows the model a picture of the workspace."""

    def act(request: Request) -> Answer:
        tool, parameters = _offered(request, _IMAGE_TOOLS, "a tool that reads images")
        properties = parameters.get("properties") or {}
        path = next((p for p in _PATHS if p in properties), None)
        if path is None:
            raise Lacking("a tool that reads images")
        return Answer("I will look.", tool_calls=[(tool, filled(parameters, {path: f"{WORKSPACE}/{name}"}))])

    return act


def _shell(request: Request, command: str) -> Call:
    call = shell_call(request, command)
    if call is None:
        raise Lacking("a shell")
    return call


def _offered(request: Request, names: Sequence[str], what: str) -> tuple[str, dict[str, Any]]:
    offered = functions(request)
    found = next((name for name in names if name in offered), None)
    if found is None:
        raise Lacking(what)
    return found, offered[found]


# --- faults ----------------------------------------------------------------------------------------------


def status(code: int) -> Fault:
    """The engine answers with an HTTP error."""
    return lambda answer: Answer(status=code)


def cut(answer: Answer) -> Answer:
    """The engine dies in the middle of its answer, once the harness has the beginning."""
    return replace(answer, break_after_tokens=12, chunk_delay_s=0.1)


def silent(seconds: float) -> Fault:
    """The engine says nothing for long."""
    return lambda answer: replace(answer, silence_s=seconds)


# --- plays that look at more than the history's length ----------------------------------------------------


class Delegation(Play):
    """The main thread has a sub-agent do `task`, which runs `command`. `prompt` is what the user asks."""

    def __init__(self, prompt: str, task: str, command: str) -> None:
        super().__init__()
        self._prompt, self._task = prompt, task
        self._agent = (shell(command), say("The agent is done."))

    def answer(self, request: Request) -> Answer | None:
        if shell_call(request, "true") is None:
            return None
        if self._prompt not in said_by_user(request):
            return acted(self._agent, request)
        if num_answered(request) == 0:
            return Answer("I will delegate.", tool_calls=[self._delegated(request)])
        if num_answered(request) == 1 and _WAIT in functions(request):  # Codex does not wait unless told to
            told = " ".join(_text(m) for m in request["messages"] if m["role"] == "tool")
            _, mark, rest = told.partition('"agent_id":"')
            if mark:
                return Answer(tool_calls=[(_WAIT, json.dumps({"targets": [rest.partition('"')[0]]}))])
        return Answer(LAST_WORDS)

    def _delegated(self, request: Request) -> Call:
        name, parameters = _offered(request, _AGENT_TOOLS, "a tool that starts a sub-agent")
        properties = parameters.get("properties") or {}
        given: dict[str, Any] = {each: self._task for each in _TASKS if each in properties}
        if "run_in_background" in properties:
            given["run_in_background"] = False
        if "agent_name" in properties:
            given["agent_name"] = "generalist"
        if "subagent_type" in (parameters.get("required") or []):
            given["subagent_type"] = "general"
        return name, filled(parameters, given)


class Compaction(Play):
    """Answers whose usage is nearly the whole window, until the harness has had its history summed up.

    Each of `prompts` is followed by three calls of the shell: some sum up nothing but whole exchanges.
    """

    def __init__(self, command: str, num_tokens: int, prompts: Sequence[str]) -> None:
        super().__init__()
        self._command, self._num_tokens, self._prompts = command, num_tokens, prompts
        self.num_summaries = 0

    def answer(self, request: Request) -> Answer | None:
        if asks_for_summary(request):
            self.num_summaries += 1
            # Some take off what the summary's prompt counted: it has to be as large as was said before.
            summary = "<summary>The user wants a file. It has been written.</summary>"
            return Answer(summary, num_prompt_tokens=self._num_tokens)
        if (call := shell_call(request, self._command)) is None:
            return None
        if self.num_summaries or self._num_answered_since(request) >= 3:
            return Answer(LAST_WORDS)
        # Some keep what they count as the last 20,000 tokens, four characters each, and sum up only the rest:
        # three answers are more than that. One is less than the 32,000 tokens, bytes here, that some ask for.
        fields: dict[str, Any] = {"tool_calls": [call], "tokens_per_chunk": 1000}
        if num_answered(request) >= 2:
            fields["num_prompt_tokens"] = self._num_tokens
        return Answer(f"I will do it.\n{lines(28_000)}", **fields)

    def _num_answered_since(self, request: Request) -> int:
        """How many answers there are to the last prompt."""
        count = 0
        for message in reversed(request["messages"]):
            if message["role"] == "user" and any(prompt in _text(message) for prompt in self._prompts):
                break
            count += message["role"] == "assistant"
        return count


def lines(num_chars: int) -> str:
    """A long text without repetition, which some harnesses take for a loop and break off."""
    length = 0
    text: list[str] = []
    while length < num_chars:
        text.append(f"Line {len(text)} of a long answer.\n")
        length += len(text[-1])
    return "".join(text)


def asks_for_summary(request: Request) -> bool:
    """Whether a harness wants its history summed up, by the words that all of them use for it."""
    messages = request["messages"]
    system = _text(messages[0])[:300] if messages[0]["role"] == "system" else ""
    last = _text(messages[-1]) if messages[-1]["role"] in ("user", "system") else ""
    if num_answered(request) == 0 and len(last) < 5000:  # no history yet, neither as such nor as text
        return False
    asked = f"{system}\n{last[:2000]}".lower()
    return any(word in asked for word in ("summar", "compact", "compress", "snapshot"))

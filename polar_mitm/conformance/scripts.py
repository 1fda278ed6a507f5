"""What the scripted engine answers: a `Script` maps (request JSON, nth call) to an `Answer`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One answer of the engine, faults included.

    Delays are seconds; `silence_s` is between a stream's head and its first event, as of an engine whose
    prefill takes long. `num_prompt_tokens` is what usage says in place of the prompt's length. `status` other
    than 200 answers `error` (by default vLLM's error body) at once, with
    `headers`. Faults in a stream come once `n` tokens are out: `break_after_tokens` closes the connection,
    `error_after_tokens` sends vLLM's in-band error, `garbage_after_tokens` sends the bytes of `garbage` and
    goes on. `omit_*` drop what a token-faithful capture needs; `logprob` replaces each sampled logprob.
    Where a request wants several answers (`n`), `others` are what the further ones say, beyond those the same
    again; delays and faults are the first one's.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: Sequence[tuple[str, str]] = ()
    finish_reason: str | None = None
    tokens_per_chunk: int = 4
    first_token_delay_s: float = 0.0
    silence_s: float = 0.0
    chunk_delay_s: float = 0.0
    num_prompt_tokens: int | None = None
    status: int = 200
    error: dict[str, Any] | str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    break_after_tokens: int | None = None
    error_after_tokens: int | None = None
    garbage_after_tokens: int | None = None
    garbage: bytes = b"data: {not json\n\n"
    omit_prompt_token_ids: bool = False
    omit_token_ids: bool = False
    omit_logprobs: bool = False
    logprob: float | None = None
    others: Sequence[Answer] = ()


Script = Callable[[dict[str, Any], int], Answer]


def always(answer: Answer) -> Script:
    """The same answer to every call."""
    return lambda request, nth: answer


def sequence(*answers: Answer) -> Script:
    """The nth answer to the nth call; the last one for all further calls."""
    return lambda request, nth: answers[min(nth, len(answers) - 1)]


_SHELL_NAMES = ("Bash", "bash", "exec_command", "shell_command", "shell", "run_shell_command", "exec")


def functions(request: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name to parameter schema of each offered tool."""
    return {
        tool["function"]["name"]: (tool["function"].get("parameters") or {})
        for tool in request.get("tools") or []
        if "function" in tool
    }


def fitting(schema: dict[str, Any]) -> Any:
    """A harmless value that fits a required parameter, or an answer's schema; null where null will do."""
    union = schema.get("anyOf") or schema.get("oneOf") or []
    kinds = schema.get("type", [option.get("type") for option in union] or "string")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if "null" in kinds:
        return None
    properties = schema.get("properties") or {}
    value = {name: fitting(properties.get(name) or {}) for name in schema.get("required") or []}
    values = {"boolean": False, "integer": 1, "number": 1, "array": [], "object": value}
    return values.get(kinds[0], (schema.get("enum") or ["Write the file"])[0])


def filled(parameters: dict[str, Any], arguments: dict[str, Any]) -> str:
    """Arguments of a call as JSON text; required parameters that are not given get a value that fits."""
    properties = parameters.get("properties") or {}
    missing = [name for name in parameters.get("required") or [] if name not in arguments]
    given = arguments | {name: fitting(properties.get(name) or {}) for name in missing}
    return json.dumps(given, ensure_ascii=False)


def shell_call(request: dict[str, Any], command: str) -> tuple[str, str] | None:
    """A call of whichever shell-like tool the request offers that runs `command`; None without such a tool.

    Knows Claude Code's `Bash`, Codex's JavaScript `exec` (a free-text tool, served as a function of one
    string `input`), `exec_command` and `shell`, Qwen's and Gemini's `run_shell_command`, and any other tool
    that has a `command` or `cmd` parameter. Further required parameters are filled with harmless values.
    """
    offered = functions(request)
    known = [name for name in _SHELL_NAMES if name in offered]
    others = [n for n, p in offered.items() if {"command", "cmd"} & set(p.get("properties") or {})]
    for name in [*known, *others]:
        properties = offered[name].get("properties") or {}
        if "command" in properties:
            as_list = properties["command"].get("type") == "array"
            arguments: dict[str, Any] = {"command": ["bash", "-lc", command] if as_list else command}
        elif "cmd" in properties:
            arguments = {"cmd": command}
        elif "input" in properties:
            source = f"const r = await tools.exec_command({{cmd:{json.dumps(command)}}}); text(r);"
            arguments = {"input": source}
        else:
            continue
        return name, filled(offered[name], arguments)
    return None


def write_file_in_two_turns(path: str, content: str, **fields: Any) -> Script:
    """Any harness writes `content` to `path`: a shell call first, a short text once a tool has answered.

    A call that offers no shell (a title, a router) gets the text at once. `fields` go to each `Answer`.
    """
    command = f"printf %s {shlex.quote(content)} > {shlex.quote(path)}"

    def script(request: dict[str, Any], nth: int) -> Answer:
        call = shell_call(request, command)
        if call and not any(message.get("role") == "tool" for message in request.get("messages", [])):
            return Answer(text="I will write the file.", tool_calls=(call,), **fields)
        return Answer(text="Done.", **fields)

    return script

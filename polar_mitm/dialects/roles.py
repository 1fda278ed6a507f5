"""Who makes a call: by the harness's own headers where it says so, else by what shows in the request."""

from __future__ import annotations

from collections.abc import Mapping

from polar_mitm.dialects.responses_request import COMPACTION
from polar_mitm.types import Caller, CallRole, ChatRequest

_CLAUDE_CODE: dict[str, CallRole] = {
    "main": "main",
    "subagent": "subagent",
    "blocking-subagent": "subagent",
    "auxiliary": "auxiliary",
}
# The labels of Codex's own sessions; any other label is an agent that it spawned.
_CODEX: dict[str, CallRole] = {
    "": "main",
    "false": "main",
    "0": "main",
    "compact": "compaction",
    "memory_consolidation": "auxiliary",
}
# Pi and opencode say it in no header: how the system prompt of their compactions begins.
_SUMMARY = "You are a context summarization "


def caller(dialect: str, headers: Mapping[str, str], request: ChatRequest) -> Caller:
    """Who makes a call. What a harness that is not known asks counts as main."""
    lower = {name.lower(): value for name, value in headers.items()}
    return Caller(_responses(lower, request) if dialect == "openai_responses" else _other(lower, request))


def _responses(headers: Mapping[str, str], request: ChatRequest) -> CallRole:
    if COMPACTION in request.notes:
        return "compaction"
    if headers.get("x-openai-memgen-request", "") == "true":
        return "auxiliary"
    return _CODEX.get(headers.get("x-openai-subagent", ""), "subagent")


def _other(headers: Mapping[str, str], request: ChatRequest) -> CallRole:
    for header in ("x-claude-code-request-class", "x-claude-1p-request-class"):
        if role := _CLAUDE_CODE.get(headers.get(header, "")):
            return role
    agent = headers.get("user-agent", "")
    opencode = agent.startswith("opencode/")
    if not request.tools and (opencode or agent.startswith("pi (")):
        if request.messages and request.messages[0].text.startswith(_SUMMARY):
            return "compaction"
        if opencode:  # a title; its agents always have tools
            return "auxiliary"
    return "subagent" if opencode and "x-parent-session-id" in headers else "main"

"""Who makes a call: every rule of the table, the order between them, and the harnesses' own requests."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.dialects.responses_request import COMPACTION
from polar_mitm.dialects.roles import AGENT_HEADERS, HOSTED, RULES, Rule, caller
from polar_mitm.types import Caller, ChatRequest, Message, TextPart, Tool

CLAUDE = {"User-Agent": "claude-cli/2.1.328 (external, sdk-cli)"}
CODEX = {"User-Agent": "codex_exec/0.169.0 (Debian 12.0.0; x86_64) xterm-256color (codex_exec; 0.169.0)"}
PI = {"User-Agent": "pi (linux 6.1.0; x64)"}
OPENCODE = {"User-Agent": "opencode/1.18.33 ai-sdk/provider-utils/4.0.46 runtime/bun/1.3.14"}
GEMINI = {"User-Agent": "GeminiCLI-tui/0.61.0/gemini-2.5-pro (linux; x64; terminal)"}
QWEN = {"User-Agent": "QwenCode/0.24.4 (linux; x64)"}
SDK = {"User-Agent": "OpenAI/Python 2.7.1"}
TOOLS = [Tool("Bash", parameters={"type": "object"})]
SCHEMA = {"type": "object"}


def request(system: str = "", *said: str, tools: Any = (), **fields: Any) -> ChatRequest:
    messages = [Message("system", [TextPart(system)])] if system else []
    messages.append(Message("user", [TextPart(text) for text in said or ("go",)]))
    return ChatRequest("m", messages, tools=list(tools), **fields)


TURN = request("You are an agent.", tools=TOOLS)
BARE = request("You write titles.")


@pytest.mark.parametrize(
    ("headers", "asked", "who"),
    [
        ({}, TURN, Caller()),
        (SDK, BARE, Caller()),
        # Claude Code
        (CLAUDE | {"x-claude-code-request-class": "main"}, BARE, Caller()),
        (CLAUDE | {"x-claude-code-request-class": "workflow"}, TURN, Caller("subagent")),
        (CLAUDE | {"x-claude-code-request-class": "compaction"}, TURN, Caller("compaction")),
        (CLAUDE | {"x-claude-code-request-class": "side_reply"}, TURN, Caller("auxiliary")),
        (CLAUDE | {"x-claude-1p-request-class": "summary-extraction"}, TURN, Caller("auxiliary")),
        (
            CLAUDE | {"X-Claude-Code-Request-Class": "subagent", "X-Claude-Code-Agent-Id": "a1"},
            TURN,
            Caller("subagent", "a1"),
        ),
        (
            CLAUDE | {"x-claude-code-request-class": "auxiliary", "x-claude-code-agent-id": "a1"},
            BARE,
            Caller("auxiliary", "a1"),
        ),
        (CLAUDE, request("s", "CRITICAL: Respond with TEXT ONLY. Now", tools=TOOLS), Caller("compaction")),
        (CLAUDE, request("s", "hi", "CRITICAL: Respond with TEXT ONLY", tools=TOOLS), Caller("compaction")),
        (CLAUDE, request("s", "say CRITICAL: Respond with TEXT ONLY", tools=TOOLS), Caller()),
        (CLAUDE, request("A title.", response_schema=SCHEMA), Caller("auxiliary")),
        (CLAUDE, request("An answer.", tools=TOOLS, response_schema=SCHEMA), Caller()),
        # Codex
        (CODEX | {"thread-id": "t1"}, TURN, Caller()),
        (CODEX | {"x-openai-subagent": "review", "thread-id": "t2"}, TURN, Caller("subagent", "t2")),
        (CODEX | {"x-openai-subagent": "guardian", "thread-id": "t2"}, TURN, Caller("auxiliary")),
        (CODEX | {"x-openai-subagent": "compact", "thread-id": "t1"}, TURN, Caller("compaction")),
        (
            CODEX
            | {"x-openai-subagent": "collab_spawn", "x-codex-parent-thread-id": "t1", "thread-id": "t2"},
            request("s", notes=[COMPACTION]),
            Caller("compaction", "t2"),
        ),
        (
            CODEX,
            request("s", "You are performing a CONTEXT CHECKPOINT COMPACTION. Create"),
            Caller("compaction"),
        ),
        # pi
        (PI, TURN, Caller()),
        (PI, BARE, Caller()),
        (PI, request("You are a context summarization assistant. Your task"), Caller("compaction")),
        # opencode
        (OPENCODE, BARE, Caller("auxiliary")),
        (OPENCODE, request("You are a context summarization agent. You"), Caller("compaction")),
        (
            OPENCODE | {"x-session-id": "ses_2", "x-parent-session-id": "ses_1"},
            TURN,
            Caller("subagent", "ses_2"),
        ),
        (OPENCODE | {"x-session-id": "ses_1"}, TURN, Caller()),
        (PI | {"x-session-id": "ses_2", "x-parent-session-id": "ses_1"}, TURN, Caller()),
        # Gemini CLI
        (GEMINI, TURN, Caller()),
        (GEMINI, request("A router.", response_schema=SCHEMA), Caller("auxiliary")),
        (GEMINI, request("", notes=["withheld:google_search"]), Caller("auxiliary")),
        (
            GEMINI,
            request("You are a specialized system component responsible for distilling chat history into"),
            Caller("compaction"),
        ),
        (GEMINI, request("An agent.", tools=[*TOOLS, Tool("complete_task")]), Caller("subagent")),
        (SDK, request("An agent.", tools=[*TOOLS, Tool("complete_task")]), Caller()),
        # Qwen Code
        (QWEN, TURN, Caller()),
        (QWEN, BARE, Caller("auxiliary")),
        (
            QWEN,
            request("You are the component that summarizes a conversation when its context"),
            Caller("compaction"),
        ),
        # anybody's search of its own
        (SDK, request("s", notes=["withheld:web_search"]), Caller("auxiliary")),
        (SDK, request("s", tools=TOOLS, notes=["withheld:web_search"]), Caller()),
        (SDK, request("s", notes=["withheld:web_search", "withheld:Deferred"]), Caller()),
        (SDK, request("s", notes=["dropped:prefill"]), Caller()),
    ],
)
def test_who_calls(headers: dict[str, str], asked: ChatRequest, who: Caller) -> None:
    assert caller(headers, asked) == who


def _met(rule: Rule) -> tuple[dict[str, str], ChatRequest]:
    """The least call that a rule is about."""
    headers = {"user-agent": rule.harness + "1"} if rule.harness else {}
    if rule.header:
        headers[rule.header] = rule.values[0] if rule.values else "x"
    notes = [rule.note] if rule.note else []
    return headers, request(
        rule.system,
        *([rule.said] if rule.said else []),
        tools=[]
        if rule.tools is False or rule.hosted
        else [*TOOLS, *([Tool(rule.tool)] if rule.tool else [])],
        response_schema=SCHEMA if rule.schema else None,
        notes=[*notes, "withheld:web_search"] if rule.hosted else notes,
        agent=rule.agent.rstrip("*") or "one" if rule.agent else "",
    )


@pytest.mark.parametrize("rule", RULES, ids=msgspec.json.encode)
def test_each_rule_is_reached_and_needs_each_of_its_conditions(rule: Rule) -> None:
    headers, asked = _met(rule)
    assert next(r for r in RULES if r.holds(headers, asked)) is rule
    assert caller(headers, asked).role == rule.role
    for name in ("header", "harness", "system", "said", "note", "agent", "tool"):
        if getattr(rule, name):
            other = msgspec.structs.replace(rule, **{name: "something else"})
            assert not other.holds(headers, asked), name
    if rule.values:
        assert not msgspec.structs.replace(rule, values=("something else",)).holds(headers, asked)
    for name in ("tools", "schema"):
        if getattr(rule, name) is not None:
            assert not msgspec.structs.replace(rule, **{name: not getattr(rule, name)}).holds(headers, asked)


@given(
    st.dictionaries(
        st.sampled_from([rule.header for rule in RULES if rule.header] + [a.name for a in AGENT_HEADERS]),
        st.text(max_size=300),
    ),
    st.sampled_from([CLAUDE, CODEX, PI, OPENCODE, GEMINI, QWEN, SDK, {}]),
    st.booleans(),
)
def test_any_header_gives_a_role_and_an_id_of_bounded_length(
    headers: dict[str, str], agent: dict[str, str], tools: bool
) -> None:
    who = caller(headers | agent, request("s", tools=TOOLS if tools else []))
    assert who.role in ("main", "subagent", "auxiliary", "compaction")
    assert who.agent_id is None or 0 < len(who.agent_id) <= 200


def test_a_conversation_without_a_message_is_somebodys() -> None:
    assert caller(CLAUDE, ChatRequest("m", [])) == Caller()


def test_hosted_tools_are_told_as_the_dialects_note_them() -> None:
    asked = {
        "anthropic": (
            b'{"model":"m","max_tokens":9,"messages":[{"role":"user","content":"q"}],'
            b'"tools":[{"type":"web_search_20250305","name":"web_search","max_uses":8}]}',
            "/v1/messages",
        ),
        "openai_responses": (
            b'{"model":"m","input":"q","tools":[{"type":"web_search"},{"type":"code_interpreter"}]}',
            "/v1/responses",
        ),
        "openai_chat": (
            b'{"model":"m","messages":[{"role":"user","content":"q"}],"web_search_options":{}}',
            "/v1/chat/completions",
        ),
        "gemini": (
            b'{"contents":[{"role":"user","parts":[{"text":"q"}]}],"tools":[{"googleSearch":{}},'
            b'{"urlContext":{}},{"codeExecution":{}}]}',
            "/v1beta/models/m:generateContent",
        ),
    }
    for name, dialect in DIALECTS.items():
        body, path = asked[name]
        found = dialect.decode(body, {}, path)
        assert found.tools == [] and found.tool_choice.mode == "auto"
        withheld = {n.partition(":")[2] for n in found.notes if n.startswith("withheld:")}
        assert withheld and withheld <= HOSTED
        assert caller({}, found).role == "auxiliary"

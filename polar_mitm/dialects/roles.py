"""Who makes a call, by a table: the harness's own headers where it says so, else what shows in the request.

To teach it a harness, add a line to `RULES`: the first whose every condition holds gives the role.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from polar_mitm.dialects.responses_request import COMPACTION
from polar_mitm.dialects.user_agents import CLAUDE, CODEX, GEMINI, OPENCODE, PI, QWEN
from polar_mitm.types import Caller, CallRole, ChatRequest

HOSTED = frozenset(
    {
        *("web_search", "web_search_preview", "web_fetch", "code_execution", "code_interpreter"),
        *("file_search", "image_generation"),
        *("google_search", "google_search_retrieval", "enterprise_web_search", "url_context", "google_maps"),
    }
)
"""Tools that the provider's own machines run, by the names and types under which calls note them."""


class Rule(Struct, frozen=True):
    """Conditions, all of which hold, and the role that they mean; one that is not given always holds.

    `header` is there and, with `values`, has one of them; `harness` is how the user-agent begins. `system` is
    how the system prompt begins, `said` how a part of the last message does; `tools` and `schema` say whether
    the model is offered tools or held to a schema, `note` is one of the request's notes. `hosted`: what it
    was to be offered are tools of the provider's own machines only. `agent`: the body says that an agent asks
    whose name begins so (`*`: any). `tool`: the model is offered one of that name.
    """

    role: CallRole
    header: str = ""
    values: tuple[str, ...] = ()
    harness: str = ""
    system: str = ""
    said: str = ""
    tools: bool | None = None
    schema: bool | None = None
    note: str = ""
    hosted: bool = False
    agent: str = ""
    tool: str = ""

    def holds(self, headers: Mapping[str, str], request: ChatRequest) -> bool:
        """Whether the rule is about this call; `headers` have lower-case names."""
        if self.header:
            value = headers.get(self.header)
            if value is None or (self.values and value not in self.values):
                return False
        if self.harness and not headers.get("user-agent", "").startswith(self.harness):
            return False
        if self.tools is not None and self.tools != bool(request.tools):
            return False
        if self.schema is not None and self.schema != (request.response_schema is not None):
            return False
        if self.note and self.note not in request.notes:
            return False
        if self.agent and not (request.agent and request.agent.startswith(self.agent.rstrip("*"))):
            return False
        if self.tool and request.find_tool(self.tool) is None:
            return False
        if self.hosted and not _hosted_only(request):
            return False
        if self.system and not _system(request).startswith(self.system):
            return False
        return not self.said or _says(request, self.said)


_CLASS, _OLD_CLASS = "x-claude-code-request-class", "x-claude-1p-request-class"
_CODEX_LABEL = "x-openai-subagent"

RULES: tuple[Rule, ...] = (
    # Claude Code names a class with each call.
    Rule("main", header=_CLASS, values=("main",)),
    Rule("subagent", header=_CLASS, values=("subagent", "workflow")),
    Rule("compaction", header=_CLASS, values=("compaction",)),
    Rule("auxiliary", header=_CLASS, values=("auxiliary", "side_reply")),
    Rule("main", header=_OLD_CLASS, values=("main",)),
    Rule("subagent", header=_OLD_CLASS, values=("blocking-subagent",)),
    Rule("auxiliary", header=_OLD_CLASS, values=("summary-extraction", "followup-generation")),
    Rule("compaction", harness=CLAUDE, said="CRITICAL: Respond with TEXT ONLY"),
    Rule("auxiliary", harness=CLAUDE, tools=False, schema=True),  # a title
    # Codex labels what is not its main thread; any other label is an agent that it spawned.
    Rule("compaction", note=COMPACTION),
    Rule("auxiliary", header="x-openai-memgen-request", values=("true",)),
    Rule("main", header=_CODEX_LABEL, values=("", "false", "0")),
    Rule("compaction", header=_CODEX_LABEL, values=("compact",)),
    Rule("auxiliary", header=_CODEX_LABEL, values=("memory_consolidation", "guardian")),
    Rule("subagent", header=_CODEX_LABEL),
    Rule("compaction", harness=CODEX, said="You are performing a CONTEXT CHECKPOINT COMPACTION"),
    # The others say it nowhere, or only of sub-agents.
    Rule("compaction", harness=PI, tools=False, system="You are a context summarization "),
    Rule("compaction", harness=OPENCODE, tools=False, system="You are a context summarization "),
    Rule("auxiliary", harness=OPENCODE, tools=False),  # a title; its agents always have tools
    Rule("subagent", harness=OPENCODE, header="x-parent-session-id"),
    Rule("compaction", harness=GEMINI, tools=False, system="You are a specialized system component "),
    Rule("auxiliary", harness=GEMINI, tools=False),  # the router, web search, repairs of edits
    Rule("subagent", harness=GEMINI, tool="complete_task"),  # by which one hands in what it found
    Rule("compaction", harness=QWEN, tools=False, system="You are the component that summarizes "),
    Rule("compaction", harness=QWEN, tools=False, system="You are a specialized system component "),
    Rule("auxiliary", harness=QWEN, tools=False),
    Rule("auxiliary", harness=QWEN, agent="managed-"),  # it looks for what is worth remembering
    Rule("subagent", harness=QWEN, agent="*"),
    # Whoever it is: a search of its own, answered in plain text.
    Rule("auxiliary", hosted=True),
)


class AgentHeader(Struct, frozen=True):
    """`name` holds the id of a sub-agent, on calls that have the header `on` and, if given, this `role`."""

    name: str
    on: str
    role: CallRole | None = None
    harness: str = ""


AGENT_HEADERS: tuple[AgentHeader, ...] = (
    AgentHeader("x-claude-code-agent-id", on="x-claude-code-agent-id"),
    AgentHeader("thread-id", on="x-codex-parent-thread-id"),
    AgentHeader("thread-id", on=_CODEX_LABEL, role="subagent"),
    AgentHeader("x-session-id", on="x-parent-session-id", harness=OPENCODE),
)
_MAX_ID = 200  # characters; a header may hold anything


def caller(headers: Mapping[str, str], request: ChatRequest) -> Caller:
    """Who makes a call. What a harness that is not known asks counts as main.

    A sub-agent's compactions and side calls keep its id, where the harness says it there too.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    role: CallRole = next((rule.role for rule in RULES if rule.holds(lower, request)), "main")
    agent = lower.get("user-agent", "")
    for each in AGENT_HEADERS:
        if each.on in lower and each.role in (None, role) and agent.startswith(each.harness):
            return Caller(role, lower.get(each.name, "")[:_MAX_ID] or None)
    return Caller(role, request.agent[:_MAX_ID] or None if role != "main" else None)


def _system(request: ChatRequest) -> str:
    first = request.messages[0] if request.messages else None
    return first.text if first is not None and first.role == "system" else ""


def _says(request: ChatRequest, beginning: str) -> bool:
    last = request.messages[-1] if request.messages else None
    if last is None or last.role != "user":
        return False
    return any(getattr(part, "text", "").startswith(beginning) for part in last.content)


def _hosted_only(request: ChatRequest) -> bool:
    withheld = [note.partition(":")[2] for note in request.notes if note.startswith("withheld:")]
    return not request.tools and bool(withheld) and HOSTED.issuperset(withheld)

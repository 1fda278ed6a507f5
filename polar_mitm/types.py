"""The central records, one definition each.

Two families live here. The *canonical* types (`ChatRequest`, `Message`, `Delta`, `Completion`) are the
meeting point of dialects and upstream: a dialect turns provider wire into them and back, an upstream turns
them into an engine's wire and back, and neither knows the other. The *persisted* records (`ModelCall`,
`Rollout`, `EgressEvent`, ...) are what a store writes and a reader returns.

Conventions: `num_` counts, `_at` Unix seconds, `_s`/`_ms` durations, `[P]`/`[C]`/`[T]` array shapes:
P prompt tokens, C sampled tokens of one call, T tokens of one trajectory. Logprobs are natural logs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from msgspec import Struct, field

# --- canonical request ----------------------------------------------------------------------------------


class TextPart(Struct, tag_field="type", tag="text", frozen=True):
    """A run of text inside a message."""

    text: str


class ImagePart(Struct, tag_field="type", tag="image", frozen=True):
    """An image inside a message. `url` is a `data:` URL or a remote address."""

    url: str


Part = TextPart | ImagePart
Role = Literal["system", "user", "assistant", "tool"]
ToolKind = Literal["function", "custom"]


class ToolCall(Struct, frozen=True):
    """One tool call by the model.

    `arguments` is the text as sampled or as echoed by the harness, never re-serialised: JSON text for a
    `function`, free text for a `custom` tool.
    """

    id: str
    name: str
    arguments: str
    kind: ToolKind = "function"
    namespace: str | None = None


class Message(Struct):
    """One turn of the canonical conversation.

    `reasoning` and `tool_calls` belong to `assistant`, `tool_call_id` to `tool`. `minted_ids` lists the
    ids of ours that the harness echoed with this message (message, tool call, signature), for lineage.
    """

    role: Role
    content: list[Part] = field(default_factory=list)
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    tool_call_id: str | None = None
    minted_ids: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text parts, joined as they stand."""
        return "".join(p.text for p in self.content if isinstance(p, TextPart))


class Tool(Struct):
    """A tool offered to the model. `parameters` is a JSON schema; `grammar` belongs to `custom` tools."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    kind: ToolKind = "function"
    namespace: str | None = None
    grammar: str | None = None

    @property
    def engine_name(self) -> str:
        """The flat name the engine's model sees: namespaces other than `functions` become a prefix."""
        return engine_tool_name(self.name, self.namespace)


def engine_tool_name(name: str, namespace: str | None) -> str:
    """Flatten a namespaced tool name for engines, which know no namespaces."""
    return name if namespace in (None, "functions") else f"{namespace}__{name}"


class ToolChoice(Struct, frozen=True):
    """`mode` "tool" forces the tool called `name` (its engine name)."""

    mode: Literal["auto", "none", "required", "tool"] = "auto"
    name: str | None = None


class Sampling(Struct, omit_defaults=True):
    """Sampling parameters; None means unsaid. `top_k` 0 is off."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None


class ChatRequest(Struct):
    """What a harness asked for, whatever the provider.

    `sampling` is what the harness asked, not what is used (the rollout's configuration decides that).
    `notes` lists, in a fixed vocabulary such as `dropped:billing_header` or `withheld:web_search`, what the
    translation left out on purpose; it is stored with the call. `n` is how many answers it wants,
    `top_logprobs` how many of the likeliest tokens at each place it wants to see (0: the sampled one only).
    `stream_usage`: it wants token counts in its stream, where the provider gives them on demand only.
    `agent`: which of a harness's further agents asks, where the body says so; empty otherwise.
    `echo`: fields that the answer repeats as they were asked, where the provider's does.
    """

    model: str
    messages: list[Message]
    tools: list[Tool] = field(default_factory=list)
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stream: bool = False
    show_reasoning: bool = True
    response_schema: dict[str, Any] | None = None
    n: int = 1
    top_logprobs: int | None = None
    stream_usage: bool = False
    notes: list[str] = field(default_factory=list)
    agent: str = ""
    echo: dict[str, Any] = field(default_factory=dict)

    def find_tool(self, engine_name: str) -> Tool | None:
        """The offered tool that the engine knows as `engine_name`."""
        return next((t for t in self.tools if t.engine_name == engine_name), None)


# --- canonical answer -----------------------------------------------------------------------------------

FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "abort"]


class Usage(Struct):
    """Token counts as the engine reports them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class TokenLogprob(Struct):
    """A token as a client is shown it: text, logprob (nats), bytes; `top` are the likeliest at its place."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top: list[TokenLogprob] = field(default_factory=list)


class ToolCallDelta(Struct):
    """A fragment of tool call number `index`; `name` comes with its first fragment."""

    index: int
    name: str | None = None
    arguments: str = ""


class Delta(Struct):
    """What one engine chunk adds. Text may be empty while ids are not: a parser may hold text back.

    `choice` is which of the request's `n` answers it belongs to. `shown_logprobs` is filled only where the
    request asked to see logprobs, and only with text: they are of its tokens.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_token_ids: Sequence[int] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    choice: int = 0
    shown_logprobs: list[TokenLogprob] = field(default_factory=list)


class Completion(Struct):
    """What the engine sampled for one call.

    `prompt_token_ids` [P], `completion_token_ids` [C], `behaviour_logprobs` [C] (nats, aligned with the
    sampled ids). `message.tool_calls[i].id` are the ids we minted. `finish_reason` is None while the answer
    is partial (cancelled or broken off); then ids and logprobs hold what had arrived. `others` are the second
    and further answers of a request with `n` > 1, and each `usage` counts its own answer's tokens only.
    """

    message: Message
    prompt_token_ids: Sequence[int] = field(default_factory=list)
    completion_token_ids: list[int] = field(default_factory=list)
    behaviour_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage = field(default_factory=Usage)
    shown_logprobs: list[TokenLogprob] = field(default_factory=list)
    others: list[Completion] = field(default_factory=list)


# --- persisted records ----------------------------------------------------------------------------------

CallRole = Literal["main", "subagent", "auxiliary", "compaction"]
CallStatus = Literal["ok", "cancelled", "failed", "refused"]
Continuation = Literal["exact", "none"]
KeepReasoning = Literal["template", "always"]


class Caller(Struct, frozen=True):
    """Who makes a call: its role, and which sub-agent where the harness says so."""

    role: CallRole = "main"
    agent_id: str | None = None


class Wire(Struct):
    """Raw HTTP as seen on the harness's side, after content decoding of the request and redaction.

    `chunk_sizes` [K] bytes and `chunk_at_ms` [K] milliseconds since the call started say how the response
    was paced. `http_version` is the harness's own, "HTTP/1.1" or "HTTP/2.0".
    """

    method: str = ""
    host: str = ""
    path: str = ""
    request_headers: list[tuple[str, str]] = field(default_factory=list)
    request_body: bytes = b""
    status: int = 0
    response_headers: list[tuple[str, str]] = field(default_factory=list)
    response_body: bytes = b""
    chunk_sizes: list[int] = field(default_factory=list)
    chunk_at_ms: list[float] = field(default_factory=list)
    http_version: str = ""


ANSWER_OF = "answer_of:"
GUIDED = "guided:"
"""Beginnings of notes of a call, see `ModelCall`."""


class ModelCall(Struct):
    """One intercepted exchange: one row; of one that asked for several answers, a row for each.

    `status`: "ok" answered to the end; "cancelled" the harness hung up (its partial tokens are kept);
    "failed" the engine failed; "refused" never sent to the engine (malformed, too large, ...).
    `delivered` says whether every byte of the answer was handed to the harness's connection.
    `policy_version` is the engine's own word for its weights at the first token; `policy_version_last` that
    of the last one, where weights changed inside the call.

    `continuation` "exact": the prompt ids begin with `parent_call_id`'s own prompt and sampled ids; `edits`
    lists the harmless edits that its echo in the history shows. "none": rendered anew, and `fallback` says
    why. `answer` is what the engine said. `replayed_from` names the call of another rollout whose recorded
    answer was served. `tokenizer` is a fingerprint: ids of different ones must not meet.

    The second and further answers of an exchange have its `seq`, an empty `wire`, and a note
    `answer_of:<call_id of the first>`. A note `guided:<by what>` says that a grammar masked the logits: then
    the logprobs are not of the policy's own distribution.
    """

    call_id: str
    rollout_id: str
    seq: int
    dialect: str
    route: str
    status: CallStatus
    model_requested: str = ""
    model_served: str = ""
    role: CallRole = "main"
    agent_id: str | None = None
    parent_call_id: str | None = None
    stream: bool = False
    delivered: bool = False
    finish_reason: str | None = None
    error: str | None = None
    policy_version: str | None = None
    policy_version_last: str | None = None
    continuation: Continuation = "none"
    fallback: str | None = None
    edits: list[str] = field(default_factory=list)
    answer: Message | None = None
    replayed_from: str | None = None
    tokenizer: str = ""
    sampling_requested: Sampling = field(default_factory=Sampling)
    sampling: Sampling = field(default_factory=Sampling)
    notes: list[str] = field(default_factory=list)
    prompt_token_ids: Sequence[int] = field(default_factory=list)
    completion_token_ids: list[int] = field(default_factory=list)
    behaviour_logprobs: list[float] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    started_at: float = 0.0
    first_token_at: float | None = None
    ended_at: float | None = None
    wire: Wire = field(default_factory=Wire)
    upstream_body: bytes = b""

    @property
    def answer_of(self) -> str | None:
        """The call whose request this is a further answer to; None for a call with a request of its own."""
        return next((note.removeprefix(ANSWER_OF) for note in self.notes if note.startswith(ANSWER_OF)), None)

    @property
    def guided(self) -> bool:
        """Sampled under a grammar."""
        return any(note.startswith(GUIDED) for note in self.notes)


RolloutStatus = Literal["running", "completed", "failed", "timeout", "interrupted"]


EVALUATION = "evaluation:"


class Rollout(Struct):
    """One harness run of one task. `incomplete` says why its record has holes; None means it has none.

    `keep_reasoning`: whether a continuation keeps reasoning that the chat template drops from history.
    `forked_from` is "<rollout_id>/<call_id>" where a replay turned live. A `group_id` that begins with
    `EVALUATION` is of a task that measures, and is not to be trained on.
    """

    rollout_id: str
    group_id: str | None = None
    task_id: str | None = None
    sample_index: int = 0
    harness: str = ""
    harness_version: str = ""
    command: list[str] = field(default_factory=list)
    status: RolloutStatus = "running"
    stop_reason: str | None = None
    exit_code: int | None = None
    incomplete: str | None = None
    engine: str = ""
    model: str = ""
    keep_reasoning: KeepReasoning = "template"
    forked_from: str | None = None
    started_at: float = 0.0
    ended_at: float | None = None


class Reward(Struct):
    """One verdict on a rollout, written by a verifier, never from inside a sandbox."""

    rollout_id: str
    name: str
    value: float
    verifier: str = ""
    evidence: str = ""
    at: float = 0.0


EgressVerdict = Literal["refused", "stubbed"]
EgressLayer = Literal["dns", "tls", "http", "path", "tcp", "websocket"]


class EgressEvent(Struct):
    """Something other than a model call that left the harness: refused, or answered by a local stub.

    `name` is what a person would call it: a host name for dns/tls/http, `METHOD host/path` for path.
    """

    rollout_id: str
    at: float
    verdict: EgressVerdict
    layer: EgressLayer
    name: str
    detail: str = ""

"""What a Responses request is made of: only the fields that we read, every other one is ignored.

Source: platform.openai.com/docs/api-reference/responses/create, and the items that Codex adds to it
(`additional_tools`, `agent_message`, `compaction_trigger`; codex-rs/protocol/src/models.rs).
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from msgspec import Meta, Raw, Struct


class ImageUrl(Struct):
    """The object form of an image's address."""

    url: str


class Part(Struct):
    """A part of a message's content, of a tool's output or of a reasoning item, whatever its type."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | ImageUrl | None = None
    filename: str | None = None
    encrypted_content: str | None = None


Content: TypeAlias = str | list[Part] | None


class Tool(Struct):
    """A tool of any type. `tools` belongs to a namespace, `format` to a custom tool."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    format: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    defer_loading: bool | None = None


class Head(Struct):
    """What says which item this is: an item without a type is a message, or a reference by its id."""

    type: str | None = None
    role: str | None = None


class MessageItem(Struct):
    role: str
    content: Content = None
    id: str | None = None


class ReasoningItem(Struct):
    id: str | None = None
    encrypted_content: str | None = None
    summary: list[Part] | None = None
    content: Content = None


class FunctionCallItem(Struct):
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None
    id: str | None = None


class CustomCallItem(Struct):
    call_id: str
    name: str
    input: str
    namespace: str | None = None
    id: str | None = None


class OutputItem(Struct):
    """What a tool gave back, function or custom."""

    call_id: str
    output: Content


class ToolsItem(Struct):
    tools: list[Tool]


class CompactionItem(Struct):
    encrypted_content: str | None = None


class AgentMessageItem(Struct):
    """A message from one of the harness's agents to another."""

    author: str = ""
    recipient: str = ""
    content: Content = None


class Reasoning(Struct):
    effort: Any = None
    summary: str | None = None
    generate_summary: str | None = None


class Format(Struct):
    type: str
    schema: dict[str, Any] | None = None


class Text(Struct):
    format: Format | None = None


class Request(Struct):
    """The body. Items stay raw here: their shape depends on their type, and unknown types are allowed.

    `continued_response_id` is not the API's: what `previous_response_id` was before `responses_state` put the
    history in its place.
    """

    model: str
    input: str | list[Raw] | None = None
    instructions: str | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    reasoning: Reasoning | None = None
    text: Text | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    continued_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    store: Any = None
    metadata: Any = None
    truncation: Any = None
    user: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    service_tier: Any = None

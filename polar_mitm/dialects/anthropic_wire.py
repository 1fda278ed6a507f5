"""What a Messages request looks like on the wire, as types that check it.

Source: platform.claude.com/docs/en/api/messages. Fields that change nothing for a local model
(`cache_control`, `metadata`, `citations`, ...) are left out, and unknown ones are ignored. Which block may
stand in which role's message is the API's own rule.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Raw, Struct


def _tag(name: str) -> str:
    """`ToolResult` is `tool_result` on the wire."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


class Block(Struct, tag=_tag):
    """A content block; its `type` is its class's name."""


# --- sources of images and documents ---------------------------------------------------------------------


class Base64Source(Struct, tag="base64"):
    data: str
    media_type: str


class UrlSource(Struct, tag="url"):
    url: str


class FileSource(Struct, tag="file"):
    """A file kept by the provider: out of reach."""


class TextSource(Struct, tag="text"):
    data: str


class ContentSource(Struct, tag="content"):
    content: str | list[Text | Image]


# --- blocks ---------------------------------------------------------------------------------------------


class Text(Block):
    text: str


class Image(Block):
    source: Base64Source | UrlSource | FileSource


class Document(Block):
    source: TextSource | ContentSource | Base64Source | UrlSource | FileSource
    title: str | None = None
    context: str | None = None


class SearchResult(Block):
    source: str
    title: str
    content: list[Text]


class ToolReference(Block):
    """The harness loads a deferred tool: from here on it is offered."""

    tool_name: str


class ToolResult(Block):
    tool_use_id: str
    content: str | list[Text | Image | Document | SearchResult | ToolReference] | None = None
    is_error: bool | None = None


class ToolUse(Block):
    """`input` is kept as the harness wrote it."""

    id: str
    name: str
    input: Raw


class Thinking(Block):
    thinking: str
    signature: str | None = None


class RedactedThinking(Block):
    data: str


class ChangedTool(Struct):
    name: str = ""


class ToolAddition(Block):
    tool: ChangedTool


class ToolRemoval(Block):
    tool: ChangedTool


class ProviderBlock(Block):
    """Work that the provider's own servers did in a conversation begun elsewhere."""


class ServerToolUse(ProviderBlock): ...


class WebSearchToolResult(ProviderBlock): ...


class WebFetchToolResult(ProviderBlock): ...


class CodeExecutionToolResult(ProviderBlock): ...


class BashCodeExecutionToolResult(ProviderBlock): ...


class TextEditorCodeExecutionToolResult(ProviderBlock): ...


class ToolSearchToolResult(ProviderBlock): ...


class McpToolUse(ProviderBlock): ...


class McpToolResult(ProviderBlock): ...


class ContainerUpload(ProviderBlock): ...


class Compaction(ProviderBlock): ...


AnyProviderBlock: TypeAlias = (
    ServerToolUse
    | WebSearchToolResult
    | WebFetchToolResult
    | CodeExecutionToolResult
    | BashCodeExecutionToolResult
    | TextEditorCodeExecutionToolResult
    | ToolSearchToolResult
    | McpToolUse
    | McpToolResult
    | ContainerUpload
    | Compaction
)

# --- messages -------------------------------------------------------------------------------------------


class User(Struct, tag_field="role", tag="user"):
    content: str | list[Text | Image | Document | SearchResult | ToolResult | AnyProviderBlock]


class Assistant(Struct, tag_field="role", tag="assistant"):
    content: str | list[Text | Thinking | RedactedThinking | ToolUse | AnyProviderBlock]


class System(Struct, tag_field="role", tag="system"):
    """Instructions in mid-conversation; may hold only settings."""

    content: str | list[Text | ToolAddition | ToolRemoval] = ""


# --- the rest of the request ----------------------------------------------------------------------------


class Tool(Struct):
    """A function tool has an `input_schema`; the provider's own tools have a dated `type` instead."""

    name: str = ""
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    defer_loading: bool | None = None


class ToolChoice(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Struct):
    type: str
    display: str | None = None


class JsonSchema(Struct, tag="json_schema"):
    schema: dict[str, Any]


class OutputConfig(Struct):
    format: JsonSchema | None = None


Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class Request(Struct):
    """`output_format` is what `output_config.format` was called at first."""

    model: str
    messages: list[User | Assistant | System]
    system: str | list[Text] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: JsonSchema | None = None

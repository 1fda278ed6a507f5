"""What a Chat Completions request is made of: only the fields that we read, every other one is ignored.

Source: platform.openai.com/docs/api-reference/chat/create, and what OpenAI-compatible services add to it:
`reasoning_content` (DeepSeek, DashScope), `reasoning` (OpenRouter, vLLM), `reasoning_details` (OpenRouter),
`enable_thinking` and `enable_search` (DashScope), `thinking` (DeepSeek), `chat_template_kwargs` and
`include_reasoning` (vLLM).

The role of a message is its type. `cache_control` is never read, so that moving it changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from msgspec import Meta, Struct

# --- content --------------------------------------------------------------------------------------------


class ImageUrl(Struct):
    url: str


class File(Struct):
    filename: str | None = None


class Part(Struct):
    """A part of a message's content, whatever its type."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | ImageUrl | None = None
    file: File | None = None


Content: TypeAlias = str | list[Part] | None

# --- messages -------------------------------------------------------------------------------------------


class CalledFunction(Struct):
    """`arguments` is JSON text as the harness wrote it."""

    name: str
    arguments: str | None = None


class CalledCustom(Struct):
    name: str
    input: str


class ToolCall(Struct):
    id: str
    type: str = "function"
    function: CalledFunction | None = None
    custom: CalledCustom | None = None


class _Message(Struct, tag_field="role"):
    content: Content = None
    name: str | None = None


class System(_Message, tag="system"): ...


class Developer(_Message, tag="developer"): ...


class User(_Message, tag="user"): ...


class ReasoningDetail(Struct):
    """A text or a summary; the encrypted kind has neither."""

    text: str | None = None
    summary: str | None = None


class Assistant(_Message, tag="assistant"):
    """`function_call` is what calls were before `tool_calls`: one at most, and without an id."""

    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    reasoning_details: list[ReasoningDetail] | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: CalledFunction | None = None
    audio: Any = None


class ToolResult(_Message, tag="tool", kw_only=True):
    tool_call_id: str


class FunctionResult(_Message, tag="function"):
    """What the last `function_call` gave back."""


Message: TypeAlias = System | Developer | User | Assistant | ToolResult | FunctionResult

# --- tools ----------------------------------------------------------------------------------------------


Name = Annotated[str, Meta(min_length=1)]


class Function(Struct):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Grammar(Struct):
    definition: str
    syntax: str = "lark"


class Format(Struct):
    type: str = "text"
    grammar: Grammar | None = None


class Custom(Struct):
    """A tool whose input is free text, or text of a grammar."""

    name: Name
    description: str | None = None
    format: Format | None = None


class Tool(Struct):
    """A tool of any type; types other than `function` and `custom` run on the provider's machines."""

    type: str
    function: Function | None = None
    custom: Custom | None = None
    defer_loading: bool | None = None


# --- the rest of the request ----------------------------------------------------------------------------


class JsonSchema(Struct):
    schema: dict[str, Any] | None = None


class ResponseFormat(Struct):
    type: str
    json_schema: JsonSchema | None = None


class StreamOptions(Struct):
    include_usage: bool | None = None


class Thinking(Struct):
    type: str | None = None


class Reasoning(Struct):
    """OpenRouter's way to say it."""

    effort: str | None = None
    enabled: bool | None = None
    exclude: bool | None = None


class TemplateKwargs(Struct):
    enable_thinking: bool | None = None


Count = Annotated[int, Meta(ge=1, lt=2**31)]


class Request(Struct):
    """The body. `functions` and `function_call` are what tools were called at first."""

    model: str
    messages: list[Message]
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Function] | None = None
    function_call: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    modalities: list[str] | None = None
    web_search_options: Any = None
    enable_search: bool | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    include_reasoning: bool | None = None
    thinking: Thinking | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    metadata: Any = None

"""What a Gemini request looks like on the wire: only the fields that we read, every other one is ignored.

Source: ai.google.dev/api/generate-content, ai.google.dev/api/caching (Content, Part, Tool, Schema). Names are
lowerCamelCase here (`gemini_names` brings the others into it). Where the API takes an array, it also takes
its one element, as its own examples do.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Raw, Struct


class Wire(Struct, rename="camel"): ...


class Blob(Wire):
    """`data` is base64, in either alphabet."""

    mime_type: str = ""
    data: str = ""


class FileData(Wire):
    file_uri: str = ""


class FunctionCall(Wire):
    name: str
    args: Raw = Raw(b"{}")
    id: str | None = None


class ResponsePart(Wire):
    inline_data: Blob | None = None
    file_data: FileData | None = None


class FunctionResponse(Wire):
    name: str = ""
    response: Raw = Raw(b"{}")
    id: str | None = None
    parts: list[ResponsePart] | None = None


class Part(Wire):
    """One of its kinds of data is set."""

    text: str | None = None
    thought: bool | None = None
    thought_signature: str | None = None
    inline_data: Blob | None = None
    file_data: FileData | None = None
    function_call: FunctionCall | None = None
    function_response: FunctionResponse | None = None
    executable_code: Any = None
    code_execution_result: Any = None


class Content(Wire):
    parts: list[Part] | Part | None = None
    role: str | None = None


class FunctionDeclaration(Wire):
    """`parameters` has the API's own types (`STRING`), `parameters_json_schema` is a JSON schema."""

    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    parameters_json_schema: dict[str, Any] | None = None


class FunctionCallingConfig(Wire):
    mode: str | None = None
    allowed_function_names: list[str] | None = None


class ToolConfig(Wire):
    function_calling_config: FunctionCallingConfig | None = None


class ThinkingConfig(Wire):
    include_thoughts: bool | None = None


Count = Annotated[int, Meta(ge=0, lt=2**31)]


class GenerationConfig(Wire):
    """`logprobs` counts only beside `response_logprobs`."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Count | None = None
    max_output_tokens: Count | None = None
    candidate_count: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    stop_sequences: list[str] | None = None
    response_mime_type: str | None = None
    response_schema: dict[str, Any] | None = None
    response_json_schema: Any = None
    response_logprobs: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    thinking_config: ThinkingConfig | None = None


class Request(Wire):
    """A tool is an object with one key: `functionDeclarations`, or the name of a tool of the provider's."""

    contents: list[Content] | Content
    system_instruction: Content | None = None
    tools: list[dict[str, Raw]] | dict[str, Raw] | None = None
    tool_config: ToolConfig | None = None
    generation_config: GenerationConfig | None = None
    cached_content: str | None = None

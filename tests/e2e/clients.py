"""The providers' own SDKs as programs in a sandbox. They know nothing of us: no address, no CA, no proxy.

    python clients.py NAME     prints what it got as one JSON document

Each makes a whole call, a streamed one by the SDK's helper that goes on from it, several answers with
logprobs where its API has them, a schema, and a forced tool.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import anthropic
import openai
import pydantic
from google import genai
from google.genai import types

ASK, GO_ON = "What is the capital of France?", "And of Italy?"


class City(pydantic.BaseModel):
    """A schema with few ways to be met, so that any model meets it."""

    name: Literal["Paris", "Rome"]


CITY = City.model_json_schema()


def openai_chat() -> dict[str, Any]:
    client = openai.OpenAI(api_key="any")
    said: Any = {"model": "gpt-5", "max_completion_tokens": 400}
    asked: Any = {"role": "user", "content": ASK}
    first = client.chat.completions.create(**said, messages=[asked])
    history = [asked, {"role": "assistant", "content": first.choices[0].message.content}]
    history.append({"role": "user", "content": GO_ON})
    with client.chat.completions.stream(
        **said, messages=history, stream_options={"include_usage": True}
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        streamed = stream.get_final_completion()
    many = client.chat.completions.create(**said, messages=[asked], n=3, logprobs=True, top_logprobs=2)
    parsed = client.chat.completions.parse(**said, messages=[asked], response_format=City)
    tool: Any = {"type": "function", "function": {"name": "say_city", "parameters": CITY}}
    forced = client.chat.completions.create(
        **said,
        messages=[asked],
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "say_city"}},
    )
    (call,) = forced.choices[0].message.tool_calls or ()
    content = [choice.logprobs.content if choice.logprobs else None for choice in many.choices]
    return {
        "deltas": "".join(deltas),
        "streamed": streamed.choices[0].message.content,
        "answers": len(many.choices),
        "logprobs": [[token.logprob for token in tokens or ()] for tokens in content],
        "top": [[len(token.top_logprobs) for token in tokens or ()] for tokens in content],
        "parsed": parsed.choices[0].message.parsed.name,  # type: ignore[union-attr]
        "tool": json.loads(call.function.arguments),  # type: ignore[union-attr]
    }


def openai_responses() -> dict[str, Any]:
    client = openai.OpenAI(api_key="any")
    said: Any = {"model": "gpt-5", "max_output_tokens": 400}
    first = client.responses.create(**said, input=ASK)
    with client.responses.stream(**said, input=GO_ON, previous_response_id=first.id) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        streamed = stream.get_final_response()
    seen = client.responses.create(
        **said, input=ASK, include=["message.output_text.logprobs"], top_logprobs=2
    )
    parts: list[Any] = [part for item in seen.output if item.type == "message" for part in item.content]
    parsed = client.responses.parse(**said, input=ASK, text_format=City)
    tool: Any = {"type": "function", "name": "say_city", "parameters": CITY, "strict": False}
    forced = client.responses.create(
        **said, input=ASK, tools=[tool], tool_choice={"type": "function", "name": "say_city"}
    )
    (call,) = (item for item in forced.output if item.type == "function_call")
    return {
        "deltas": "".join(deltas),
        "streamed": streamed.output_text,
        "logprobs": [[token.logprob for token in part.logprobs] for part in parts],
        "top": [[len(token.top_logprobs) for token in part.logprobs] for part in parts],
        "parsed": parsed.output_parsed.name,  # type: ignore[union-attr]
        "tool": json.loads(call.arguments),
    }


def gemini() -> dict[str, Any]:
    client = genai.Client(api_key="any")
    chat = client.chats.create(
        model="gemini-3.8-flash", config=types.GenerateContentConfig(max_output_tokens=400)
    )
    chat.send_message(ASK)
    deltas = [chunk.text or "" for chunk in chat.send_message_stream(GO_ON)]
    said = [
        content.role == "model" for content in chat.get_history()
    ]  # one for each chunk of the last answer
    last = [
        part for content in chat.get_history()[-said[::-1].index(False) :] for part in content.parts or ()
    ]

    def ask(**config: Any) -> types.GenerateContentResponse:
        return client.models.generate_content(
            model="gemini-3.8-flash",
            contents=ASK,
            config=types.GenerateContentConfig(max_output_tokens=400, **config),
        )

    many = ask(candidate_count=3, response_logprobs=True, logprobs=2).candidates or ()
    results = [candidate.logprobs_result for candidate in many]
    parsed = ask(response_mime_type="application/json", response_schema=City)
    declared = types.FunctionDeclaration(name="say_city", parameters_json_schema=CITY)
    calling: Any = {"function_calling_config": {"mode": "ANY", "allowed_function_names": ["say_city"]}}
    forced = ask(tools=[types.Tool(function_declarations=[declared])], tool_config=calling)
    (call,) = forced.function_calls or ()
    return {
        "deltas": "".join(deltas),
        "streamed": "".join(part.text or "" for part in last),
        "answers": len(many),
        "logprobs": [[token.log_probability for token in r.chosen_candidates] for r in results],  # type: ignore
        "top": [[len(top.candidates) for top in r.top_candidates] for r in results],  # type: ignore
        "parsed": parsed.parsed.name,  # type: ignore[union-attr]
        "tool": call.args,
    }


def anthropic_messages() -> dict[str, Any]:
    client = anthropic.Anthropic(api_key="any")
    said: Any = {"model": "claude-opus-4-8", "max_tokens": 400}
    asked: Any = {"role": "user", "content": ASK}
    first = client.messages.create(**said, messages=[asked])
    history = [asked, {"role": "assistant", "content": first.content}, {"role": "user", "content": GO_ON}]
    with client.messages.stream(**said, messages=history) as stream:
        deltas = list(stream.text_stream)
        streamed = stream.get_final_message()
    schema = {"format": {"type": "json_schema", "schema": CITY}}
    parsed = client.messages.create(**said, messages=[asked], extra_body={"output_config": schema})
    tool: Any = {"name": "say_city", "input_schema": CITY}
    forced = client.messages.create(
        **said, messages=[asked], tools=[tool], tool_choice={"type": "tool", "name": "say_city"}
    )
    return {
        "deltas": "".join(deltas),
        "streamed": "".join(block.text for block in streamed.content if block.type == "text"),
        "parsed": json.loads("".join(b.text for b in parsed.content if b.type == "text"))["name"],
        "tool": next(block.input for block in forced.content if block.type == "tool_use"),
    }


CLIENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "anthropic": anthropic_messages,
    "gemini": gemini,
    "openai_chat": openai_chat,
    "openai_responses": openai_responses,
}

if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]]()))

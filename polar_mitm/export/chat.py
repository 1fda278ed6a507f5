"""Trajectories as conversations, one JSON object per line.

The conversation is what the engine was sent with a trajectory's last call (chat completions, after a
dialect's translation), and what it answered. Two formats:

NeMo Gym, a line of its `rollouts.jsonl` ("Rollout Collection"): `responses_create_params` (the input before
the trajectory's first answer, and the tools), `response` (OpenAI's Response object, whose `output` is
everything from there on) and `reward`. The last item of each answer that trains has `prompt_token_ids`,
`generation_token_ids` and `generation_log_probs`; answers that do not train here have none.

SFT chat: `messages` and `tools` as OpenAI's chat completions and TRL's SFTTrainer take them, reasoning as
`reasoning_content`, arguments as an object, since that is what chat templates expect. `weight` 0 marks an
answer that does not train here (OpenAI's fine-tuning format); TRL does not look at it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from polar_mitm.export.parquet import appearing
from polar_mitm.export.trainers import Judged
from polar_mitm.types import Message, ModelCall, engine_tool_name

Conversation = tuple[Judged, Mapping[str, ModelCall]]
"""A trajectory, and the calls of its rollout by id, with bodies and answers (`wire=True`)."""
_RAW = "__raw"  # what the upstream body has where arguments are no JSON object


def export_nemo_gym(
    items: Iterable[Conversation], path: str | os.PathLike[str], *, force: bool = False
) -> int:
    """Write a NeMo Gym rollout per trajectory; return how many.

    Raises:
        FileExistsError, OSError: as `export_trajectories`.
    """
    return _lines(items, _nemo_gym, Path(path), force)


def export_sft_chat(
    items: Iterable[Conversation], path: str | os.PathLike[str], *, force: bool = False
) -> int:
    """Write a chat per trajectory; return how many.

    Raises:
        FileExistsError, OSError: as `export_trajectories`.
    """
    return _lines(items, _sft_chat, Path(path), force)


def _lines(
    items: Iterable[Conversation], to_line: Callable[[Conversation], dict[str, Any]], path: Path, force: bool
) -> int:
    num_rows = 0
    with appearing(path, force) as file:
        for item in items:
            file.write(json.dumps(to_line(item), ensure_ascii=False).encode() + b"\n")
            num_rows += 1
    return num_rows


def _conversation(item: Conversation) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[ModelCall]]:
    """Messages with the last answer, tools, and the calls that made the last assistant messages."""
    judged, calls = item
    path = [calls[span.call_id] for span in judged.trajectory.spans]
    body = msgspec.json.decode(path[-1].upstream_body)
    messages: list[dict[str, Any]] = [*body["messages"], _answer(path[-1].answer)]
    return messages, body.get("tools", []), path


def _answer(answer: Message | None) -> dict[str, Any]:
    if answer is None:
        return {"role": "assistant", "content": ""}
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None}
    if answer.reasoning:
        message["reasoning"] = answer.reasoning
    if answer.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": engine_tool_name(call.name, call.namespace),
                    "arguments": call.arguments,
                },
            }
            for call in answer.tool_calls
        ]
    return message


def _by_answer(messages: list[dict[str, Any]], path: list[ModelCall]) -> dict[int, int]:
    """Position of an assistant's message -> which call of the path made it. The last ones are theirs."""
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    return dict(zip(reversed(answers), reversed(range(len(path))), strict=False))


def _sft_chat(item: Conversation) -> dict[str, Any]:
    messages, tools, path = _conversation(item)
    made_by, spans = _by_answer(messages, path), item[0].trajectory.spans
    chat = []
    for at, message in enumerate(messages):
        one = {
            key: message[key] for key in ("role", "content", "tool_call_id") if message.get(key) is not None
        }
        one.setdefault("content", "")
        if message.get("reasoning"):
            one["reasoning_content"] = message["reasoning"]
        if message.get("tool_calls"):
            one["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
        if message["role"] == "assistant" and (at not in made_by or spans[made_by[at]].mask_reason):
            one["weight"] = 0
        chat.append(one)
    return {"messages": chat, "tools": tools, **_whose(item[0])}


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = msgspec.json.decode(function["arguments"])
    except (msgspec.DecodeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        arguments = {_RAW: function["arguments"]}
    return {**call, "function": {**function, "arguments": arguments}}


def _nemo_gym(item: Conversation) -> dict[str, Any]:
    messages, tools, path = _conversation(item)
    made_by, spans = _by_answer(messages, path), item[0].trajectory.spans
    first = min(made_by)
    output: list[dict[str, Any]] = []
    for at in range(first, len(messages)):
        items = list(_items(messages[at], at))
        if at in made_by and items and spans[made_by[at]].mask_reason is None:
            call = path[made_by[at]]
            items[-1] |= {
                "prompt_token_ids": list(call.prompt_token_ids),
                "generation_token_ids": call.completion_token_ids,
                "generation_log_probs": call.behaviour_logprobs,
            }
        output += items
    last = path[-1]
    flat = [{"type": "function", "strict": False, **tool["function"]} for tool in tools]
    return {
        "responses_create_params": {
            "input": [each for at in range(first) for each in _items(messages[at], at)],
            "tools": flat,
        },
        "response": {
            "id": last.call_id,
            "object": "response",
            "created_at": last.started_at,
            "model": last.model_served,
            "output": output,
            "tools": flat,
            "tool_choice": "auto",
            "parallel_tool_calls": True,
        },
        **_whose(item[0]),
    }


def _items(message: dict[str, Any], at: int) -> Iterator[dict[str, Any]]:
    """A chat message as items of OpenAI's Responses."""
    content = message.get("content") or ""
    if message["role"] == "tool":
        yield {"type": "function_call_output", "call_id": message["tool_call_id"], "output": content}
    elif message["role"] != "assistant":
        yield {"type": "message", "role": message["role"], "content": content}
    else:
        if reasoning := message.get("reasoning"):
            summary = [{"type": "summary_text", "text": reasoning}]
            yield {"type": "reasoning", "id": f"rs_{at}", "summary": summary}
        if content or not (message.get("tool_calls") or message.get("reasoning")):
            text: dict[str, Any] = {"type": "output_text", "text": content, "annotations": []}
            yield {
                "type": "message",
                "id": f"msg_{at}",
                "role": "assistant",
                "status": "completed",
                "content": [text],
            }
        for call in message.get("tool_calls") or []:
            function = call["function"]
            yield {
                "type": "function_call",
                "call_id": call["id"],
                "name": function["name"],
                "arguments": function["arguments"],
            }


def _whose(judged: Judged) -> dict[str, Any]:
    return {
        "reward": judged.reward,
        "group_id": judged.group_id,
        "rollout_id": judged.trajectory.rollout_id,
        "trajectory_id": judged.trajectory.trajectory_id,
    }

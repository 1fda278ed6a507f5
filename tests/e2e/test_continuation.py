"""Calls continue one another on a real vLLM: its renderings, its parsers, its word on the prompts it used."""

from __future__ import annotations

from random import Random
from typing import Any

import aiohttp
import pytest

from polar_mitm.engine import EngineState
from polar_mitm.types import Message, ModelCall, TextPart, ToolCall
from polar_mitm.upstream.probe import probe
from tests.continuation.test_whole import Anthropic, exactly
from tests.support.rig import rig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


async def _ask(url: str, path: str, **body: Any) -> Any:
    async with aiohttp.ClientSession() as http, http.post(url + path, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def test_a_conversation_with_cut_and_stopped_turns_is_one_context(vllm: EngineState) -> None:
    info = await probe(vllm.url)
    assert info.template is not None
    async with rig(vllm.url, engine=info, max_tokens=24) as r:
        harness = Anthropic(await r.box())
        await harness.say("What is the capital of France?")
        await harness.say("Tell me more.", max_tokens=5)
        await harness.say("Go on.", stop_sequences=["e"])
        await harness.say("And then?")
        calls = r.recorder.calls
    assert [(c.status, c.fallback) for c in calls] == [("ok", "first_call"), *[("ok", None)] * 3]
    assert exactly(calls)  # by the engine's own report of its prompts
    whole = await _text(vllm, list(calls[-1].prompt_token_ids))
    assert whole.count("<|im_start|>user\n") == 4
    assert whole.endswith("<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n")


async def test_a_tool_loop_in_ids_that_bpe_would_join(vllm: EngineState) -> None:
    """The small model makes no tool calls: one is put into the rollout, in odd ids, as if it had."""
    info = await probe(vllm.url)
    said = '<tool_call>\n{"name":"Bash",  "arguments": {"command":"ls"}}\n</tool_call>'
    ids = await _odd_ids(vllm, said)
    async with rig(vllm.url, engine=info, max_tokens=8) as r:
        box = await r.box()
        harness = Anthropic(box)
        await harness.say("List the files.")
        call = r.recorder.calls[0]
        _as_if_said(call, ids)
        uses = call.answer.tool_calls if call.answer else []
        harness.messages[-1]["content"] = [
            {"type": "tool_use", "id": use.id, "name": "Bash", "input": {"command": "ls"}} for use in uses
        ]
        # The interceptor remembers the call as it was changed.
        found = box.session.lineage._known[call.call_id]
        found.answer, found.completion_token_ids = call.answer or found.answer, call.completion_token_ids
        found.finish_reason, found.stop_reason = "tool_calls", None
        await harness.results("a.txt")
        now = r.recorder.calls[1]
    assert (now.status, now.continuation, now.fallback) == ("ok", "exact", None)
    assert "retokenised" in now.edits
    assert exactly([call, now])
    text = await _text(vllm, list(now.prompt_token_ids))
    assert text.endswith(
        f"{said}<|im_end|>\n<|im_start|>user\n<tool_response>\na.txt\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def _as_if_said(call: ModelCall, ids: list[int]) -> None:
    use = ToolCall(f"toolu_{call.call_id}_0", "Bash", '{"command":"ls"}')
    call.answer = Message("assistant", list[TextPart](), tool_calls=[use])
    call.completion_token_ids = ids
    call.finish_reason = "tool_calls"


async def _odd_ids(vllm: EngineState, text: str) -> list[int]:
    """The text in pieces, each in its own ids, and the end of the turn."""
    random, ids, name = Random(1), list[int](), vllm.served_model_name
    specials = ("<tool_call>", "</tool_call>")
    middle = text.removeprefix(specials[0]).removesuffix(specials[1])
    cuts = sorted(random.sample(range(1, len(middle)), 9))
    pieces = [middle[a:b] for a, b in zip([0, *cuts], [*cuts, len(middle)], strict=True)]
    for piece in [specials[0], *pieces, specials[1], "<|im_end|>"]:
        answer = await _ask(vllm.url, "/tokenize", model=name, prompt=piece, add_special_tokens=False)
        ids += answer["tokens"]
    whole = await _ask(vllm.url, "/tokenize", model=name, prompt=text, add_special_tokens=False)
    assert ids[:-1] != whole["tokens"]
    return ids


async def _text(vllm: EngineState, ids: list[int]) -> str:
    answer = await _ask(vllm.url, "/detokenize", model=vllm.served_model_name, tokens=ids)
    return str(answer["prompt"])

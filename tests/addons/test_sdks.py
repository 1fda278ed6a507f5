"""The official SDKs, unchanged but for the CA and the address behind the name, find a provider."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from polar_mitm.conformance import byte_tokens
from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, Script, always, write_file_in_two_turns
from tests.support.rig import Box, Rig, rig, trusting

SHELL = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}


@pytest.fixture(autouse=True)
def names_resolve_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the sandbox's resolver does: every name is the interceptor."""
    real = socket.getaddrinfo

    def here(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        known = name and name.endswith((".com", ".ai"))
        return real("127.0.0.1" if known else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", here)
    yield


def claude(box: Box, **options: Any) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        api_key="any",
        base_url=f"https://api.anthropic.com:{box.port}",
        http_client=anthropic.DefaultAsyncHttpxClient(
            verify=trusting(box.interceptor.ca_pem), trust_env=False
        ),
        max_retries=0,
        **options,
    )


def gpt(box: Box, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key="any",
        base_url=f"https://api.openai.com:{box.port}/v1",
        http_client=openai.DefaultAsyncHttpxClient(verify=trusting(box.interceptor.ca_pem), trust_env=False),
        max_retries=0,
        **options,
    )


class Running:
    """A box and its engine."""

    def __init__(self, script: Script) -> None:
        self.engine = ScriptedEngine(script)

    async def __aenter__(self) -> tuple[Box, Rig]:
        await self.engine.__aenter__()
        self._rig = rig(self.engine.url)
        r = await self._rig.__aenter__()
        return await r.box(), r

    async def __aexit__(self, *exc: Any) -> None:
        await self._rig.__aexit__(*exc)
        await self.engine.__aexit__(*exc)


async def test_anthropic_does_a_task_in_two_turns() -> None:
    async with Running(write_file_in_two_turns("a.txt", "hé", reasoning="Hm.")) as (box, r):
        async with claude(box) as client:
            messages: list[Any] = [{"role": "user", "content": "write it"}]
            options: Any = {
                "model": "claude-opus-5-5",
                "max_tokens": 2000,
                "tools": [{"name": "Bash", "description": "run", "input_schema": SHELL}],
                "thinking": {"type": "enabled", "budget_tokens": 1024},
            }
            async with client.messages.stream(messages=messages, **options) as stream:
                first = await stream.get_final_message()
            assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
            assert (first.stop_reason, first.model) == ("tool_use", "claude-opus-5-5")
            call = first.content[-1]
            assert call.type == "tool_use" and call.input == {"command": "printf %s 'hé' > a.txt"}
            messages += [
                {"role": "assistant", "content": [block.model_dump() for block in first.content]},
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "ok"}],
                },
            ]
            second = await client.messages.create(messages=messages, **options)
            assert second.content[-1].type == "text" and second.content[-1].text == "Done."
        one, two = r.recorder.calls
        # The history that came back renders to the very tokens that were sampled.
        so_far = [*one.prompt_token_ids, *one.completion_token_ids]
        assert two.prompt_token_ids[: len(so_far)] == so_far
        assert (one.stream, two.stream) == (True, False)
        assert first.usage.output_tokens == len(one.completion_token_ids)


async def test_openai_does_a_task_in_two_turns() -> None:
    async with Running(write_file_in_two_turns("a.txt", "hé", reasoning="Hm.")) as (box, r):
        async with gpt(box) as client:
            options: Any = {
                "model": "gpt-5.5-codex",
                "tools": [{"type": "function", "name": "Bash", "description": "run", "parameters": SHELL}],
                "store": False,
                "include": ["reasoning.encrypted_content"],
            }
            items: list[Any] = [{"role": "user", "content": "write it"}]
            async with client.responses.stream(input=items, **options) as stream:
                first = await stream.get_final_response()
            assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
            assert (first.status, first.model) == ("completed", "gpt-5.5-codex")
            call = first.output[-1]
            assert call.type == "function_call" and "printf" in call.arguments
            items += [item.model_dump(exclude_none=True) for item in first.output]
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": "ok"})
            second = await client.responses.create(input=items, **options)
            assert second.output_text == "Done."
        one, two = r.recorder.calls
        so_far = [*one.prompt_token_ids, *one.completion_token_ids]
        assert two.prompt_token_ids[: len(so_far)] == so_far
        assert first.usage and first.usage.output_tokens == len(one.completion_token_ids)


async def test_a_busy_engine_is_the_error_that_the_sdks_retry() -> None:
    async with Running(always(Answer(status=503))) as (box, _):
        async with claude(box) as client:
            with pytest.raises(anthropic.APIStatusError) as caught:
                await client.messages.create(
                    model="m", max_tokens=9, messages=[{"role": "user", "content": "x"}]
                )
            assert caught.value.status_code == 529 and caught.value.response.headers["retry-after"] == "5"
        async with gpt(box) as other:
            with pytest.raises(openai.InternalServerError) as refused:
                await other.responses.create(model="m", input="x")
            assert refused.value.status_code == 503


async def test_an_engine_that_breaks_in_the_middle_is_an_error_of_the_stream() -> None:
    async with Running(always(Answer(text="x" * 100, break_after_tokens=40))) as (box, r):
        async with claude(box) as client:
            with pytest.raises(anthropic.APIError):
                async with client.messages.stream(
                    model="m", max_tokens=900, messages=[{"role": "user", "content": "x"}]
                ) as stream:
                    await stream.get_final_message()
        async with gpt(box) as other:
            async with other.responses.stream(model="m", input="x") as events:
                kinds = [event.type async for event in events]
            assert kinds[-1] == "response.failed"
        for call in r.recorder.calls:
            assert call.status == "failed" and byte_tokens.decode(call.completion_token_ids) == "x" * 40


async def test_a_bad_request_is_a_bad_request() -> None:
    async with Running(always(Answer())) as (box, _):
        async with claude(box) as client:
            with pytest.raises(anthropic.BadRequestError, match="messages"):
                await client.messages.create(model="m", max_tokens=9, messages={"not": "a list"})  # type: ignore[arg-type]
            with pytest.raises(anthropic.NotFoundError):
                await client.messages.batches.list()
        async with gpt(box) as other:
            with pytest.raises(openai.BadRequestError):
                await other.responses.create(model="m", input=5)  # type: ignore[arg-type]
            with pytest.raises(openai.NotFoundError):
                await other.embeddings.create(model="m", input="x")

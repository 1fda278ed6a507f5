"""The official google-genai SDK, unchanged but for the CA and the address behind the name, finds Gemini."""

from __future__ import annotations

import json

import httpx
import pytest
from google import genai
from google.genai import errors, types

from polar_mitm.conformance.scripts import Answer, always, write_file_in_two_turns
from tests.addons.test_sdks import SHELL, Running, names_resolve_here  # noqa: F401
from tests.support.rig import Box, http_at, trusting

HOST = "generativelanguage.googleapis.com"


def gemini(box: Box) -> genai.Client:
    """To be held as long as it is used: it closes its connections with itself."""
    transport = httpx.AsyncHTTPTransport(verify=trusting(box.interceptor.ca_pem))
    options = types.HttpOptions(
        base_url=f"https://{HOST}:{box.port}", async_client_args={"transport": transport, "trust_env": False}
    )
    return genai.Client(api_key="any", http_options=options)


async def test_a_chat_does_a_task_in_two_turns() -> None:
    declared = types.FunctionDeclaration(name="Bash", description="run", parameters_json_schema=SHELL)
    config = types.GenerateContentConfig(
        tools=[types.Tool(function_declarations=[declared])],
        thinking_config=types.ThinkingConfig(include_thoughts=True),
    )
    async with Running(write_file_in_two_turns("a.txt", "hé", reasoning="Hm.")) as (box, r):
        client = gemini(box)
        chat = client.aio.chats.create(model="gemini-3.8-flash", config=config)
        chunks = [chunk async for chunk in await chat.send_message_stream("write it")]
        parts = [p for c in chunks for p in c.candidates[0].content.parts]  # type: ignore
        assert "".join(p.text for p in parts if p.thought) == "Hm."
        (call,) = [p.function_call for p in parts if p.function_call]
        assert (call.name, call.args) == ("Bash", {"command": "printf %s 'hé' > a.txt"})
        result = types.FunctionResponse(id=call.id, name=call.name, response={"output": "ok"})
        second = await chat.send_message(types.Part(function_response=result))
        assert second.text == "Done."
    one, two = r.recorder.calls
    # The history that came back renders to the very tokens that were sampled.
    so_far = [*one.prompt_token_ids, *one.completion_token_ids]
    assert two.prompt_token_ids[: len(so_far)] == so_far
    assert (two.parent_call_id, two.edits) == (one.call_id, [])
    assert (one.dialect, one.stream, two.stream) == ("gemini", True, False)
    assert chunks[-1].usage_metadata and chunks[-1].usage_metadata.total_token_count == len(so_far)


async def test_a_stream_as_one_array() -> None:
    async with (
        Running(always(Answer(text="one two three"))) as (box, r),
        http_at(box.port, box.interceptor.ca_pem) as http,
    ):
        body = {"contents": {"parts": {"text": "hi"}}}
        url = f"https://{HOST}:{box.port}/v1/models/gemini-x:streamGenerateContent"
        async with http.post(url, json=body) as response:
            assert response.content_type == "application/json"
            chunks = json.loads(await response.read())
    texts = [c["candidates"][0]["content"]["parts"][0]["text"] for c in chunks]
    assert "".join(texts) == "one two three" and len(texts) > 1
    assert r.recorder.calls[0].delivered


async def test_a_bad_request_reaches_the_client_as_the_service_says_it() -> None:
    async with Running(always(Answer(text="never"))) as (box, r):
        client = gemini(box)
        config = types.GenerateContentConfig(response_mime_type="image/png")
        with pytest.raises(errors.ClientError) as raised:
            await client.aio.models.generate_content(model="m", contents="hi", config=config)
    assert (raised.value.code, raised.value.status) == (400, "INVALID_ARGUMENT")
    assert "responseMimeType" in (raised.value.message or "")
    assert r.recorder.calls[0].status == "refused"

"""The start-up probe: an engine that cannot give token ids and logprobs is refused before any rollout.

Ids have vanished silently in several engine versions (streaming with a tool parser) and behind routers that
drop unknown fields; the probe asks for exactly what a capture asks for, and counts. Then it looks whether
calls can continue one another by ids, and what the chat template puts around an answer; an engine that cannot
is fit all the same.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec

from polar_mitm.errors import EngineUnfit, PolarError
from polar_mitm.types import Delta
from polar_mitm.upstream.engine import EngineInfo, Template
from polar_mitm.upstream.refusals import rejection
from polar_mitm.upstream.render import RENDER_PATH, learnt, rendered, template_probes, with_prompt
from polar_mitm.upstream.vllm import CHAT_PATH
from polar_mitm.upstream.vllm_stream import ChatStream

logger = logging.getLogger(__name__)

_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TOKENIZER_TEXT = (
    "def f(x_1):\n\treturn  10000 - x_1  # caf\u00e9, na\u00efve, \u4f60\u597d, "
    "\u041f\u0440\u0438\u0432\u0435\u0442, \U0001f642 don't <b>HTML</b>\r\n"
)
_JSON = {"content-type": "application/json"}
_ONE_TOKEN: dict[str, Any] = {"max_tokens": 1, "stream": True, "return_token_ids": True}
_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA"
    "AABJRU5ErkJggg=="
)


async def probe(url: str, model: str = "", *, timeout_s: float = 120.0) -> EngineInfo:
    """Look at the engine at `url` (without `/v1`), as a capture would use it.

    Args:
        model: which of the engine's models to use; "" takes its first.
        timeout_s: for each of the probe's requests; a cold engine may compile on the first.

    Raises:
        EngineUnfit: it does not answer, lacks the model, or does not return the ids and logprobs of every
            sampled token while streaming with tools. The message says what is missing and how to get it.
    """
    url = url.rstrip("/").removesuffix("/v1")
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=5), trust_env=False
    ) as http:
        try:
            served = await _get(http, url, "/v1/models")
            models = {m["id"]: m for m in served["data"]}
            name = model or next(iter(models))
            if name not in models:
                raise EngineUnfit(f"the engine at {url} has no model {name!r}, only {', '.join(models)}")
            version = (await _get(http, url, "/version", default={})).get("version", "")
            weights = (await _get(http, url, "/weight_info", default={})).get("weight_version")
            if weights and (await _get(http, url, "/is_paused", default={})).get("is_paused"):
                raise EngineUnfit(
                    f"the engine at {url} is paused: an update of its weights runs, or was cut off. In the "
                    "latter case restart it, or update it again"
                )
            await _check_stream(http, url, name, tool_choice="required")
            fingerprint = await _check_stream(http, url, name, tool_choice="auto")
            images = await _reads_images(http, url, name)
            tokenizer = await _fingerprint(http, url, name)
            template = await _template(http, url, name)
        except EngineUnfit:
            raise
        except PolarError as error:
            raise EngineUnfit(f"the engine at {url} failed the probe: {error.message}") from error
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError) as error:
            raise EngineUnfit(f"the engine at {url} broke off its answer: {error}") from error
        except TimeoutError as error:
            raise EngineUnfit(f"the engine at {url} did not answer in time ({error!r})") from error
        except (aiohttp.ClientError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise EngineUnfit(f"no engine answers at {url}: {reason} (polar-mitm engine up)") from error
        except (KeyError, TypeError, AttributeError, StopIteration, msgspec.MsgspecError) as error:
            raise EngineUnfit(f"{url} does not answer as an OpenAI-compatible engine: {error!r}") from error
    return EngineInfo(
        url=url,
        model=name,
        max_model_len=_window(models, name),
        version=version,
        policy_version=str(weights) if weights else f"{name}@{fingerprint or version}",
        images=images,
        tokenizer=tokenizer,
        template=template,
        weight_version=str(weights) if weights else "",
    )


def _window(models: dict[str, Any], name: str) -> int:
    """A model's window; an adapter has that of the model that it adapts."""
    card = models[name]
    return card.get("max_model_len") or models.get(card.get("parent"), {}).get("max_model_len") or 0


async def _get(http: aiohttp.ClientSession, url: str, path: str, default: Any = None) -> Any:
    async with http.get(url + path) as response:
        if response.status != 200:
            if default is not None:
                return default
            raise EngineUnfit(f"{url}{path} answered {response.status}: is this a vLLM server?")
        return msgspec.json.decode(await response.read())


async def _check_stream(http: aiohttp.ClientSession, url: str, model: str, tool_choice: str) -> str | None:
    """Stream an answer with a tool on offer; raise unless every sampled token has its id and logprob."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the weather in Paris? Use the tool."}],
        "tools": [_TOOL],
        "tool_choice": tool_choice,
        "max_tokens": 24,
        "temperature": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 0,
        "return_token_ids": True,
    }
    try:
        stream, total = await _answer(http, url, msgspec.json.encode(body))
    except _Rejected as error:
        raise EngineUnfit(f"a streaming tool call (tool_choice {tool_choice}) failed: {error}") from error
    missing = []
    if not total.prompt_token_ids:
        missing.append("prompt_token_ids")
    if total.usage is None:
        missing.append("usage")
    elif len(total.token_ids) != total.usage.completion_tokens:
        missing.append(f"token_ids of {total.usage.completion_tokens} tokens (got {len(total.token_ids)})")
    if len(total.logprobs) != len(total.token_ids) or not total.logprobs:
        missing.append(f"logprobs (got {len(total.logprobs)} for {len(total.token_ids)} ids)")
    if missing or not stream.done:
        what = ", ".join(missing) or "the end of the stream"
        raise EngineUnfit(
            f"the engine at {url} does not return {what} when streaming with a tool (tool_choice "
            f"{tool_choice}): capture needs a vLLM that knows return_token_ids, with no router in between"
        )
    return stream.fingerprint


async def _reads_images(http: aiohttp.ClientSession, url: str, model: str) -> bool:
    parts = [{"type": "image_url", "image_url": {"url": _PIXEL}}, {"type": "text", "text": "?"}]
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    async with http.post(url + CHAT_PATH, json=body) as response:
        await response.read()
        return response.status == 200


class _Rejected(Exception):
    """The engine answered with an error."""


async def _answer(http: aiohttp.ClientSession, url: str, body: bytes) -> tuple[ChatStream, Delta]:
    """A streamed chat completion, all of it as one delta."""
    stream, total = ChatStream(), Delta()
    async with http.post(url + CHAT_PATH, data=body, headers=_JSON) as response:
        if response.status != 200:
            raise _Rejected(rejection(response.status, await response.read(), 0).message)
        async for chunk in response.content.iter_any():
            for delta in stream.feed(chunk):
                total.prompt_token_ids = total.prompt_token_ids or delta.prompt_token_ids
                total.token_ids += delta.token_ids
                total.logprobs += delta.logprobs
                total.usage = delta.usage or total.usage
    return stream, total


async def _fingerprint(http: aiohttp.ClientSession, url: str, model: str) -> str:
    """A digest of what the tokenizer makes of a text that tokenizers disagree on; "" where it is not told."""
    async with http.post(url + "/tokenize", json={"model": model, "prompt": TOKENIZER_TEXT}) as response:
        if response.status != 200:
            return ""
        ids = msgspec.json.decode(await response.read())["tokens"]
    return fingerprint_of(ids)


def fingerprint_of(ids: Sequence[int]) -> str:
    """The fingerprint of a tokenizer, out of the ids that it makes of `TOKENIZER_TEXT`, special ones too."""
    return hashlib.blake2b(msgspec.json.encode(ids), digest_size=8).hexdigest()


# --- whether and how calls continue one another ---------------------------------------------------------


async def _template(http: aiohttp.ClientSession, url: str, model: str) -> Template | None:
    """What the chat template puts around an answer; None where the engine does not play along."""

    try:
        seen = []
        for body in template_probes(model):
            async with http.post(url + RENDER_PATH, data=body, headers=_JSON) as response:
                answer = await response.read()
                if response.status != 200:
                    raise _Rejected(rejection(response.status, answer, 0).message)
            seen.append(rendered(answer))
        _, used = await _answer(http, url, with_prompt(_chat(model, **_ONE_TOKEN), seen[-1]))
    except (_Rejected, PolarError, ValueError) as error:
        logger.warning("%s: calls are not continued by token ids: %s", url, error)
        return None
    if used.prompt_token_ids != seen[-1]:
        logger.warning("%s: calls are not continued by token ids: the engine ignores a prompt of ids", url)
        return None
    template = learnt(seen)
    if template is None:
        logger.warning("%s: calls are not continued by token ids: no generation prompt in the template", url)
    return template


def _chat(model: str, **fields: Any) -> bytes:
    return msgspec.json.encode({"model": model, "messages": [{"role": "user", "content": "q"}], **fields})

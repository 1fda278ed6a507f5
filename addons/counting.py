"""How many tokens a request has, by the engine's own tokenizer and chat template."""

from __future__ import annotations

import aiohttp
import msgspec
from mitmproxy import http
from msgspec import Struct

from polar_mitm.compression import decompress
from polar_mitm.dialects.base import Dialect
from polar_mitm.dialects.side_table import Side
from polar_mitm.dialects.windows import scale_for
from polar_mitm.errors import UNREADABLE, PolarError
from polar_mitm.types import Sampling
from polar_mitm.upstream import vllm
from polar_mitm.upstream.refusals import rejection
from polar_mitm.upstream.render import Lookup, render, rendered
from polar_mitm_addons.capture import Capture, Session

_TOKENIZED = ("model", "messages", "tools")


class _Count(Struct):
    count: int


async def count(
    capture: Capture, session: Session, request: http.Request, side: Side, dialect: Dialect, path: str
) -> int:
    """The tokens of the model call that the request is about, as the harness would be told of them.

    It is translated and rendered as that call would be. `path` is that of the model call. The request's body
    is whole.

    Raises:
        PolarError: the request is wrong as a model call's would be (`bad_request`, `too_large`), or the
            engine does not answer (`overloaded`).
    """
    settings = capture.settings
    headers = {name.lower(): value for name, value in request.headers.items()}
    body = decompress(
        request.raw_content or b"", headers.get("content-encoding", ""), settings.max_body_bytes
    )
    whole = session.responses.whole(dialect.name, side.counted(body))
    asked = dialect.decode(whole, headers, path)
    sampling = Sampling(settings.temperature, settings.top_p, settings.top_k)
    chat = vllm.build_body(asked, sampling, capture.engine)
    scale = scale_for(asked.model, headers, capture.engine.max_model_len, settings)
    return scale.tokens(await _num_tokens(capture, chat))


async def _num_tokens(capture: Capture, chat: bytes) -> int:
    """The engine's own count of a chat completion's prompt."""
    status, answer = await _ask(capture, render(chat))
    if status == 200:
        try:
            return len(rendered(answer))
        except ValueError as error:
            raise PolarError("overloaded", f"the engine's rendering: {error}") from error
    if status < 500:
        # An engine renders nothing longer than its window, and an old one not at all; both tokenize.
        second, tokens = await _ask(capture, _tokenize(chat))
        if second == 200:
            try:
                return msgspec.json.decode(tokens, type=_Count).count
            except UNREADABLE as error:
                raise PolarError("overloaded", f"the engine's tokens: {error}") from error
    raise rejection(status, answer, capture.settings.retry_after_s)


def _tokenize(chat: bytes) -> Lookup:
    """Source: vLLM's `/tokenize`, which takes messages and tools, however long."""
    fields = msgspec.json.decode(chat, type=dict[str, msgspec.Raw])
    return Lookup("/tokenize", msgspec.json.encode({key: fields[key] for key in _TOKENIZED if key in fields}))


async def _ask(capture: Capture, lookup: Lookup) -> tuple[int, bytes]:
    settings = capture.settings
    timeout = aiohttp.ClientTimeout(settings.render_timeout_s, sock_connect=settings.connect_timeout_s)
    headers = {"content-type": "application/json"}
    try:
        async with capture.http.post(
            capture.engine.url + lookup.path, data=lookup.body, headers=headers, timeout=timeout
        ) as response:
            return response.status, await response.read()
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        message = f"the engine does not count tokens now: {error or 'it is silent'}"
        raise PolarError("overloaded", message, retry_after_s=settings.retry_after_s) from error

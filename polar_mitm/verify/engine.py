"""Scoring on a vLLM engine: `/v1/completions` with ids as the prompt and `prompt_logprobs`.

Source: vLLM's OpenAI-compatible server (docs.vllm.ai, "Completions API", `prompt_logprobs`). Each entry is
keyed by the id that it is about, which shows that the engine scored what was sent. vLLM does not read its
prefix cache for such a request: every logprob is computed anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import TracebackType

import aiohttp
import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from polar_mitm.errors import EngineUnfit
from polar_mitm.verify.score import Unscorable

_PATH = "/v1/completions"
_RETRIED = {408, 429, 500, 502, 503, 504}


class _Logprob(Struct):
    logprob: float


class _Choice(Struct):
    prompt_logprobs: list[dict[str, _Logprob] | None] | None = None


class _Answer(Struct):
    choices: list[_Choice]


_ANSWER = msgspec.json.Decoder(_Answer)


class EngineScorer:
    """A `Scorer` over an engine; an async context manager, which holds its connections.

    Args:
        url: the engine's, without `/v1`.
        model: which of its models.
        window: the most ids that it reads; 0 where unknown.
        attempts: for a request that fails as a whole, before the engine is given up.
        timeout_s: for one attempt.
    """

    def __init__(
        self,
        url: str,
        model: str,
        window: int = 0,
        *,
        attempts: int = 4,
        backoff_s: float = 0.5,
        timeout_s: float = 900.0,
    ) -> None:
        self._url, self._model, self._window = url, model, window
        self._attempts, self._backoff_s, self._timeout_s = attempts, backoff_s, timeout_s
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> EngineScorer:
        timeout = aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=10)
        self._http = aiohttp.ClientSession(timeout=timeout, trust_env=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.close()

    async def score(self, ids: NDArray[np.int32]) -> NDArray[np.float64]:
        """Logprobs [T]; NaN at the first, and from the window's end on.

        Raises:
            Unscorable: the engine refuses these ids, or answers about others.
            EngineUnfit: it fails again and again.
        """
        scores = np.full(ids.size, np.nan)
        # One token is always sampled, and needs room.
        read = ids[: self._window - 1].tolist() if self._window else ids.tolist()
        body = {
            "model": self._model,
            "prompt": read,
            "prompt_logprobs": 0,
            "max_tokens": 1,
            "temperature": 0.0,
        }
        answer = await self._post(msgspec.json.encode(body))
        scores[: len(read)] = np.fromiter(_logprobs(answer, read), dtype=np.float64, count=len(read))
        return scores

    async def _post(self, body: bytes) -> bytes:
        assert self._http is not None, "use it as a context manager"
        headers = {"content-type": "application/json"}
        trouble = ""
        for attempt in range(self._attempts):
            if attempt:
                await asyncio.sleep(self._backoff_s * 2 ** (attempt - 1))
            try:
                async with self._http.post(self._url + _PATH, data=body, headers=headers) as response:
                    answer = await response.read()
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                trouble = str(error) or type(error).__name__
                continue
            if response.status == 200:
                return answer
            trouble = f"{response.status} {_message(answer)}"
            if response.status not in _RETRIED:
                raise Unscorable(trouble)
        raise EngineUnfit(f"the engine at {self._url} failed to score {self._attempts} times: {trouble}")


def _logprobs(answer: bytes, ids: list[int]) -> Iterator[float]:
    try:
        found = _ANSWER.decode(answer).choices[0].prompt_logprobs
    except (msgspec.MsgspecError, IndexError) as error:
        raise Unscorable(f"not an answer of a vLLM: {error!r}") from error
    if found is None or len(found) != len(ids):
        raise Unscorable(f"{len(ids)} ids sent, {len(found or [])} prompt_logprobs received")
    yield np.nan
    for position in range(1, len(ids)):
        entry = (found[position] or {}).get(str(ids[position]))
        if entry is None:
            raise Unscorable(f"the engine scored another id than {ids[position]} at position {position}")
        yield entry.logprob


def _message(answer: bytes) -> str:
    """What an error says, in vLLM's shape or not."""
    try:
        return str(msgspec.json.decode(answer)["error"]["message"])[:300]
    except (msgspec.MsgspecError, KeyError, TypeError):
        return answer[:300].decode("utf-8", "replace")

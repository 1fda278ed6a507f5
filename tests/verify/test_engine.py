"""Scoring on an engine that fails in every way it can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from polar_mitm.errors import EngineUnfit
from polar_mitm.verify import EngineScorer, Unscorable

IDS = np.array([5, 6, 7, 8], dtype=np.int32)
Answer = Callable[[dict[str, Any]], web.Response]


def prompt_logprobs(ids: list[int]) -> list[Any]:
    """As vLLM answers: each id's logprob under its own name, nothing for the first."""
    entries = [{str(i): {"logprob": -i / 10, "rank": 1, "decoded_token": "x"}} for i in ids]
    return [None, *entries[1:]]


def scored(body: dict[str, Any]) -> web.Response:
    """The answer of an engine that is well."""
    return of(prompt_logprobs(body["prompt"]))


def of(found: list[Any] | None) -> web.Response:
    """An answer with these logprobs."""
    choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": found}
    return web.json_response({"object": "text_completion", "choices": [choice]})


def refusal(status: int, message: str = "no") -> web.Response:
    """An error in vLLM's shape."""
    return web.json_response({"error": {"message": message, "code": status}}, status=status)


class Engine:
    """Gives the `answers` one after the other, the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[Answer] = [scored]
        self.asked: list[dict[str, Any]] = []
        self.url = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer(self.asked[-1])


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine, app = Engine(), web.Application(client_max_size=1 << 24)
    app.router.add_post("/v1/completions", engine.complete)
    async with TestServer(app) as server:
        engine.url = str(server.make_url("")).rstrip("/")
        yield engine


async def score(engine: Engine, ids: np.ndarray = IDS, **options: Any) -> np.ndarray:
    async with EngineScorer(engine.url, "m", backoff_s=0.0, **options) as scorer:
        return await scorer.score(ids)


async def test_each_id_but_the_first_has_its_logprob(engine: Engine) -> None:
    scores = await score(engine)
    assert np.isnan(scores[0])
    assert scores[1:].tolist() == [-0.6, -0.7, -0.8]
    [body] = engine.asked
    assert (body["model"], body["prompt"], body["prompt_logprobs"]) == ("m", IDS.tolist(), 0)


async def test_the_window_keeps_room_for_one_token(engine: Engine) -> None:
    assert np.isnan(await score(engine, window=4)).tolist() == [True, False, False, True]
    assert engine.asked[0]["prompt"] == [5, 6, 7]
    assert not np.isnan((await score(engine, window=5))[1:]).any()


def broken_off(body: dict[str, Any]) -> web.Response:
    raise ConnectionResetError


@pytest.mark.parametrize("trouble", [*(lambda b, s=s: refusal(s) for s in (429, 500, 503)), broken_off])
async def test_passing_trouble_is_outlived(engine: Engine, trouble: Answer) -> None:
    engine.answers = [trouble, trouble, scored]
    assert (await score(engine))[1] == -0.6
    assert len(engine.asked) == 3


async def test_an_engine_that_stays_in_trouble_is_given_up(engine: Engine) -> None:
    engine.answers = [lambda body: refusal(503, "overloaded")]
    with pytest.raises(EngineUnfit, match="503 overloaded"):
        await score(engine, attempts=3)
    assert len(engine.asked) == 3


async def test_no_engine() -> None:
    async with EngineScorer("http://127.0.0.1:9", "m", attempts=2, backoff_s=0.0) as scorer:
        with pytest.raises(EngineUnfit, match="failed to score 2 times"):
            await scorer.score(IDS)


async def test_an_engine_that_hangs_is_given_up(engine: Engine) -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    app = web.Application()
    app.router.add_post("/v1/completions", hang)
    async with TestServer(app) as server:
        url = str(server.make_url("")).rstrip("/")
        async with EngineScorer(url, "m", attempts=2, backoff_s=0.0, timeout_s=0.05) as scorer:
            with pytest.raises(EngineUnfit):
                await scorer.score(IDS)


async def test_a_refusal_is_not_tried_again(engine: Engine) -> None:
    engine.answers = [lambda body: refusal(400, "Token id 99999 is out of vocabulary")]
    with pytest.raises(Unscorable, match="Token id 99999 is out of vocabulary"):
        await score(engine)
    assert len(engine.asked) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda body: of(prompt_logprobs([5, 6, 9, 8])), "another id than 7 at position 2"),
        (lambda body: of(prompt_logprobs([5, 6, 7])), "4 ids sent, 3 prompt_logprobs received"),
        (lambda body: of(None), "4 ids sent, 0 prompt_logprobs received"),
        (lambda body: of([None, None, None, None]), "another id than 6 at position 1"),
        (lambda body: web.json_response({"choices": []}), "not an answer of a vLLM"),
        (lambda body: web.Response(text="<html>"), "not an answer of a vLLM"),
        (lambda body: web.Response(text="teapot", status=418), "418 teapot"),
    ],
)
async def test_an_answer_about_something_else_is_refused(
    engine: Engine, answer: Answer, message: str
) -> None:
    engine.answers = [answer]
    with pytest.raises(Unscorable, match=message):
        await score(engine)

"""Counting tokens: whatever is asked, and whatever the engine says, it is a number or an error of ours."""

from __future__ import annotations

import asyncio
from random import Random
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from mitmproxy import http

from polar_mitm.config import Settings
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.dialects.responses_state import Responses
from polar_mitm.dialects.routes import HOSTS, SIDE_HOSTS, route
from polar_mitm.dialects.side_table import SIDE
from polar_mitm.errors import PolarError
from polar_mitm_addons.counting import count
from tests.support import fuzzing

COUNTS = [side for entries in SIDE.values() for side in entries if side.count]
_answers = st.tuples(
    st.sampled_from([200, 200, 400, 404, 500]),
    st.binary(max_size=30)
    | st.sampled_from(
        [
            b'{"token_ids":[1,2]}', b'{"token_ids":[]}', b'{"token_ids":[-1]}', b'{"x":"\xff"}',
            b'{"count":3}', b'{"count":"3"}', b'{"count":' + b"[" * 100_000,
            b'{"error":"\xff"}', b"[" * 100_000,
        ]
    ),
)  # fmt: skip


class _Engine:
    """An HTTP client whose every answer is the next of these, the last one again and again."""

    def __init__(self, answers: list[tuple[int, bytes]]) -> None:
        self._answers = answers

    def post(self, *_: Any, **__: Any) -> _Engine:
        return self

    async def __aenter__(self) -> Any:
        status, body = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]

        async def read() -> bytes:
            return body

        return SimpleNamespace(status=status, read=read)

    async def __aexit__(self, *_: Any) -> None:
        pass


@given(st.integers(0, 2**32), st.sampled_from(COUNTS), st.lists(_answers, min_size=1, max_size=2))
@settings(max_examples=150)
def test_any_count_is_a_number_or_an_error(number: int, side: Any, answers: list[tuple[int, bytes]]) -> None:
    body = fuzzing.case(Random(number), side.count).body
    capture: Any = SimpleNamespace(settings=Settings(), engine=fuzzing.ENGINE, http=_Engine(list(answers)))
    session: Any = SimpleNamespace(responses=Responses())
    request = http.Request.make("POST", "http://host/", body)
    path = side.call_path("/v1beta/models/m:countTokens", {"model": "m", "version": "v1beta"})
    try:
        found = asyncio.run(count(capture, session, request, side, DIALECTS[side.count], path))
    except PolarError as error:
        assert error.kind in ("bad_request", "too_large", "overloaded", "context_overflow")
    else:
        assert found >= 0


@given(
    st.sampled_from([*HOSTS.values(), *SIDE_HOSTS, "nobody"]),
    st.sampled_from(["GET", "POST", "HEAD", "", "\0"]),
    st.text(max_size=30)
    | st.lists(
        st.sampled_from(["/v1", "beta", "/models/", ":", "countTokens", "?", "%00", "\n", "é"]), max_size=6
    ).map("".join),
    st.booleans(),
)
def test_any_request_has_a_route(owner: str, method: str, path: str, upgrade: bool) -> None:
    found = route(owner, method, path, upgrade=upgrade)
    assert (found.side is not None) == (found.kind == "stub")
    assert (found.dialect in DIALECTS) == (found.kind == "model")

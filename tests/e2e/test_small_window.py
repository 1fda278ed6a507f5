"""An engine whose window is much smaller than a harness believes: it compacts before that is full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polar_mitm.conformance.plays import asks_for_summary, beside
from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, shell_call
from polar_mitm.store import open_reader
from tests.e2e.conftest import Cli, sampled
from tests.e2e.engines import is_probe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


class Talkative:
    """Works on, with many words, until its history has been summed up and it has worked a little more."""

    def __init__(self) -> None:
        self._num_turns = 0
        self._left = 30

    def __call__(self, request: dict[str, Any], nth: int) -> Answer:
        call = shell_call(request, "echo ok")
        if is_probe(request):
            return beside(request)
        if asks_for_summary(request):
            self._left = min(self._left, 2)
            return Answer(text="<summary>All is well so far. A little is left to do.</summary>")
        if call is None:
            return beside(request)
        self._left -= 1
        if self._left < 0:
            return Answer(text="Enough.")
        self._num_turns += 1
        text = f"Step {self._num_turns}: " + "word " * 1200
        return Answer(text=text, tool_calls=(call,), tokens_per_chunk=2000)


@pytest.mark.parametrize(
    ("name", "window"), [("claude-code", 110_000), ("codex", 130_000), ("opencode", 80_000)]
)
async def test_a_harness_compacts_before_the_engines_window_is_full(
    name: str, window: int, cli: Cli, tmp_path: Path
) -> None:
    store = tmp_path / "run.duckdb"
    async with ScriptedEngine(Talkative(), max_model_len=window) as engine:
        run = await cli.start(
            "run", "--store", store, "--engine", engine.url, "--harness", name, "--prompt", "Look around."
        )
        done = await run.ended(deadline_s=240)
    assert done.code == 0, done.err
    with open_reader(store) as reader:
        calls = sampled(reader.calls(wire=True))
    assert [call.status for call in calls] == ["ok"] * len(calls)  # no overflow, ever
    roles = [call.role for call in calls]
    at = roles.index("compaction")
    before, after = calls[at - 1].usage, calls[at + 1].usage
    # Not before three quarters of the engine's window are full, and then it fits.
    assert 0.75 * window < before.prompt_tokens + before.completion_tokens < window
    assert after.prompt_tokens < before.prompt_tokens
    assert all(call.usage.prompt_tokens < window for call in calls)  # the record has the engine's own counts
    if name == "claude-code":  # it asks for room of 128,000 tokens
        assert all(c.sampling.max_tokens == window - c.usage.prompt_tokens for c in calls)

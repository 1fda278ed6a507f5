"""Windows that harnesses believe in, and tokens as shares of them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.config import Settings
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.dialects.windows import WINDOWS, Scale, believed, scale_for
from polar_mitm.errors import Overflow, PolarError
from polar_mitm.types import Completion, Delta, Message, Usage

CLAUDE, CODEX, PI = "claude-cli/2.1.328 (external)", "codex_exec/0.169.0 (x)", "pi (linux 6.1.0; x64)"
QWEN, GEMINI = "QwenCode/0.24.4 (linux; x64)", "GeminiCLI-tui/0.61.0/gemini-2.5-pro"


@pytest.mark.parametrize(
    ("model", "agent", "tokens"),
    [
        ("claude-opus-5-5", CLAUDE, 1_000_000),
        ("claude-sonnet-5-5", "", 1_000_000),
        ("claude-haiku-4-5-20251001", CLAUDE, 200_000),
        ("claude-sonnet-4-5[1m]", CLAUDE, 1_000_000),
        ("my-local-model", CLAUDE, 200_000),
        ("claude-opus-4-8", PI, 1_000_000),
        ("anthropic/claude-opus-4-8", PI, 1_000_000),
        ("claude-opus-4-8", CLAUDE, 200_000),
        ("gpt-6.1-sol", CODEX, 272_000),
        ("gpt-6.1-terra", CODEX, 500_000),
        ("my-local-model", CODEX, 272_000),
        ("gpt-5", PI, 400_000),
        ("gpt-5", CODEX, 272_000),
        ("gpt-4.1-mini", "", 1_047_576),
        ("o3", "", 200_000),
        ("models/gemini-3.8-flash", GEMINI, 1_048_576),
        ("qwen3.7-max", QWEN, 1_000_000),
        ("Qwen/Qwen2.5-Coder", "", 262_144),
        ("my-local-model", QWEN, 200_000),
        ("my-local-model", "", 0),
        ("my-local-model", "OpenAI/Python 2.7.1", 0),
        ("", "", 0),
    ],
)
def test_the_table(model: str, agent: str, tokens: int) -> None:
    assert believed(model, agent) == tokens


def test_every_line_of_the_table_is_reached() -> None:
    reached = set()
    for line in WINDOWS:
        name = re.sub(r"\[(\d)[^]]*\]", r"\1", line.model)  # a class of digits: its first
        name = name.replace("[[]", "[")
        for filling in ("opus", "x", ""):
            model = name.replace("*", filling)
            fits = [w for w in WINDOWS if line.harness.startswith(w.harness) and _fits(w.model, model)]
            if fits and fits[0] is line:
                assert believed(model, line.harness) == line.tokens
                reached.add(line)
                break
    assert reached == set(WINDOWS)


def _fits(pattern: str, name: str) -> bool:
    return believed(name, "", {pattern: 7}) == 7


def test_what_the_settings_say_comes_first() -> None:
    ours = {"claude-opus-5*": 32_000, "My-*": 64_000, "gpt-*": 0}
    assert believed("claude-opus-5-5", CLAUDE, ours) == 32_000
    assert believed("my-local-model", CODEX, ours) == 64_000
    assert believed("gpt-6.1-sol", CODEX, ours) == 0
    assert believed("claude-sonnet-5-5", CLAUDE, ours) == 1_000_000


def test_the_settings_decide_how_a_harness_is_told() -> None:
    headers = {"User-Agent": CLAUDE}

    def told(window: int, **settings: object) -> Scale:
        return scale_for("claude-opus-5-5", headers, window, Settings(**settings))  # type: ignore[arg-type]

    assert told(50_000) == Scale(1_000_000, 45_000)
    assert told(50_000, window_reserve=0) == Scale(1_000_000, 50_000)
    assert told(50_000, context_windows={"claude-*": 100_000}) == Scale(100_000, 45_000)
    assert told(50_000, context_windows={"*": 0}) == Scale()
    assert told(50_000, usage="engine") == Scale()
    assert told(1_000_000) == told(2_000_000) == told(0) == Scale()
    assert scale_for("my-local-model", headers, 50_000, Settings()) == Scale(200_000, 45_000)
    assert scale_for("my-local-model", {}, 50_000, Settings()) == Scale()


windows = st.integers(1, 4_000_000)


@given(windows, windows, st.floats(0, 0.99), st.lists(st.integers(0, 5_000_000), min_size=2))
def test_counts_keep_their_order_and_limits_meet(
    window: int, engine: int, reserve: float, counts: list[int]
) -> None:
    scale = Scale.between(window, engine, reserve)
    told = [scale.tokens(count) for count in sorted(counts)]
    assert told == sorted(told)
    assert scale.tokens(0) == 0
    assert all(shown >= count for shown, count in zip(told, sorted(counts), strict=True))
    if engine < window:
        assert scale.tokens(engine) >= window  # what fills the engine fills what is believed in
        assert scale.tokens(scale.room) == window
    else:
        assert told == sorted(counts)


@given(windows, windows, st.integers(0, 100_000), st.integers(0, 100_000), st.integers(0, 100_000))
def test_usage_stays_consistent(window: int, engine: int, prompt: int, cached: int, sampled: int) -> None:
    scale = Scale.between(window, engine, 0.1)
    given_ = Usage(prompt, sampled, min(cached, prompt), min(cached, sampled))
    usage = scale.usage(given_)
    assert usage.cached_tokens <= usage.prompt_tokens
    assert usage.reasoning_tokens <= usage.completion_tokens
    delta = Delta(text="x", usage=given_)
    assert scale.delta(delta) == Delta(text="x", usage=usage)
    assert delta.usage == given_  # the record keeps the engine's own


def test_a_completion_is_shown_scaled_and_kept_as_it_is() -> None:
    scale = Scale(200_000, 10_000)
    other = Completion(Message("assistant"), [1] * 5, [1, 2], [-1.0, -2.0], usage=Usage(5, 2))
    done = Completion(Message("assistant"), [1] * 5, [1, 2, 3], [-1.0] * 3, usage=Usage(5, 3, 4, 1))
    done.others = [other]
    shown = scale.completion(done)
    assert shown.usage == Usage(100, 60, 80, 20)
    assert shown.others[0].usage == Usage(100, 40)
    assert (done.usage, other.usage) == (Usage(5, 3, 4, 1), Usage(5, 2))
    assert shown.completion_token_ids == [1, 2, 3] and shown.message is done.message
    # An engine that counts nothing: the ids are counted.
    done.usage, done.others = Usage(), []
    assert scale.completion(done).usage == Usage(100, 60)
    assert Scale().completion(done) is done


WORDS = {
    "anthropic": r"prompt is too long: 244445 tokens > 200000 maximum",
    "openai_chat": r"maximum context length is 200000 tokens\. However, your messages resulted in 244445 tok",
    "openai_responses": r"exceeds the context window of this model.*244445 tokens, of at most 200000",
    "gemini": r"The input token count \(244445\) exceeds the maximum number of tokens allowed \(200000\)",
}


@pytest.mark.parametrize("name", DIALECTS)
def test_an_overflow_in_the_providers_words(name: str) -> None:
    error = PolarError(
        "context_overflow", "the engine's words", status=400, overflow=Overflow(11_000, 10_000)
    )
    told = Scale.between(200_000, 10_000, 0.1).error(error, name)
    reply = DIALECTS[name].encode_error(told, "01JD0Z6Q3WAAAAAAAAAAAAAAAA")
    assert reply.status == 400
    assert re.search(WORDS[name], reply.body.decode())
    assert b"the engine's words" not in reply.body
    # Told as it is, where the harness is told as it is.
    plain = DIALECTS[name].encode_error(Scale().error(error, name))
    assert b"11000" in plain.body and b"10000" in plain.body


def test_what_cannot_be_told_is_left_as_it_is() -> None:
    scale = Scale(200_000, 9_000)
    for error in (PolarError("context_overflow", "no numbers"), PolarError("bad_request", "x")):
        assert scale.error(error, "anthropic") is error
    # A prompt that fills the window to the last token is too long, and is said to be.
    full = PolarError("context_overflow", "", overflow=Overflow(9_000, 9_000))
    assert scale.error(full, "anthropic").overflow == Overflow(200_001, 200_000)
    assert Scale().error(full, "anthropic").overflow == Overflow(9_001, 9_000)

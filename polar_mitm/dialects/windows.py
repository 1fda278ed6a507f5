"""The context windows that harnesses believe in, and how to tell them of the engine's smaller one.

A harness compacts its history, and says how long an answer may be, by the tokens that it is told of, measured
against the window of the model that it asked for. `Scale` tells of tokens as shares of that window, so that
its limits lie where the engine's are. What is recorded stays the engine's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from msgspec import Struct
from msgspec.structs import replace

from polar_mitm.config import Settings
from polar_mitm.dialects.user_agents import CLAUDE, CODEX, GEMINI, OPENCODE, PI, QWEN
from polar_mitm.errors import Overflow, PolarError
from polar_mitm.types import Completion, Delta, Usage


class Window(Struct, frozen=True):
    """A window of `tokens` for models whose name fits the pattern `model` (fnmatch, lower case).

    `harness`: how the user-agent of those who believe it begins; "" for everybody.
    """

    model: str
    tokens: int
    harness: str = ""


WINDOWS: tuple[Window, ...] = (
    # As in the programs' own tables: Claude Code 2.1.328, Codex 0.169.0, pi 0.87.1, opencode 1.18.33 (both
    # models.dev), Gemini CLI 0.61.0, Qwen Code 0.24.4. The first that fits counts. Where a program may take
    # either of two, the smaller one stands here: a harness that hears too little meets the overflow error,
    # one that hears too much may never stop to compact.
    Window("claude-sonnet-4-5*", 1_000_000, PI),
    Window("claude-sonnet-4-5*", 1_000_000, OPENCODE),
    Window("claude-*-4-[678]*", 1_000_000, PI),
    Window("claude-*-4-[678]*", 1_000_000, OPENCODE),
    Window("claude-opus-4-[678]*", 1_000_000, QWEN),
    Window("claude-opus-5*", 1_000_000, QWEN),
    Window("claude-*", 200_000, QWEN),
    Window("*[[]1m]", 1_000_000),
    Window("claude-3*", 200_000),
    Window("claude-*-4*", 200_000),
    Window("claude-*", 1_000_000),
    Window("*", 200_000, CLAUDE),
    Window("gpt-6.1-terra", 500_000),
    Window("gpt-5*-chat-latest", 128_000),
    Window("gpt-5-codex*", 272_000),
    Window("gpt-5", 400_000, PI),
    Window("gpt-5-*", 400_000, PI),
    Window("gpt-5.[123]*", 400_000, PI),
    Window("gpt-5.4-mini", 400_000, PI),
    Window("gpt-5.4-nano", 400_000, PI),
    Window("gpt-[56]*", 272_000),
    Window("gpt-4.1*", 1_047_576),
    Window("gpt-4o*", 128_000),
    Window("o[134]*", 200_000),
    Window("*", 272_000, CODEX),
    Window("gemini-*", 1_048_576),
    Window("gemma-4*", 256_000),
    Window("*", 1_048_576, GEMINI),
    Window("qwen3.[0-9]*", 1_000_000),
    Window("qwen3-coder-plus*", 1_000_000),
    Window("qwen3-coder-flash*", 1_000_000),
    Window("coder-model", 1_000_000),
    Window("qwen*", 262_144),
    Window("*", 200_000, QWEN),
)

# The providers' own words for a prompt that is too long: harnesses look for them, and some for the numbers.
_OVERFLOW = {
    "anthropic": "prompt is too long: {tokens} tokens > {window} maximum",
    "openai_chat": (
        "This model's maximum context length is {window} tokens. However, your messages resulted in {tokens} "
        "tokens. Please reduce the length of the messages."
    ),
    "gemini": "The input token count ({tokens}) exceeds the maximum number of tokens allowed ({window}).",
}
_NUMBERS = "{tokens} tokens, of at most {window}"  # beside words that name none


def believed(model: str, user_agent: str = "", overrides: Mapping[str, int] | None = None) -> int:
    """The window that a harness believes `model` to have, in tokens; 0 where nobody can say.

    Args:
        model: the name as asked for; a provider in front of it (`anthropic/`, `models/`) does not matter.
        overrides: patterns and windows that come before the table; 0 is "do not scale".
    """
    name = model.lower().rpartition("/")[2]
    for pattern, tokens in (overrides or {}).items():
        if fnmatchcase(name, pattern.lower()):
            return tokens
    for each in WINDOWS:
        if user_agent.startswith(each.harness) and fnmatchcase(name, each.model):
            return each.tokens
    return 0


class Scale(Struct, frozen=True):
    """Tokens of an engine as a harness is told of them: `room` of the engine's are its whole `window`.

    >>> Scale(200_000, 10_000).tokens(5_000)
    100000
    """

    window: int = 0
    room: int = 0

    @classmethod
    def between(cls, window: int, engine: int, reserve: float = 0.0) -> Scale:
        """From the window that is believed in to the engine's; either may be 0, unknown.

        One that is no smaller than believed is told as it is. Of one that is, the share `reserve` stays
        unmentioned: some harnesses compact at 97 % of what they believe in, and then ask for a summary.
        """
        if not 0 < engine < window:
            return cls()
        return cls(window, max(1, int(engine * (1 - reserve))))

    def tokens(self, count: int) -> int:
        """A count of the engine's tokens, as told. More tokens are never fewer, and none stay none."""
        return -(-count * self.window // self.room) if self.room else count

    def completion(self, completion: Completion) -> Completion:
        """A completion as it is shown: the same, but for its usage."""
        if not self.room:
            return completion
        usage = completion.usage
        prompt = usage.prompt_tokens or len(completion.prompt_token_ids)
        sampled = usage.completion_tokens or len(completion.completion_token_ids)
        shown = replace(usage, prompt_tokens=prompt, completion_tokens=sampled)
        others = [self.completion(other) for other in completion.others]
        return replace(completion, usage=self.usage(shown), others=others)

    def delta(self, delta: Delta) -> Delta:
        """A delta as it is shown: the same, but for its usage."""
        if not self.room or delta.usage is None:
            return delta
        return replace(delta, usage=self.usage(delta.usage))

    def usage(self, usage: Usage) -> Usage:
        """Counts as told."""
        return Usage(
            self.tokens(usage.prompt_tokens),
            self.tokens(usage.completion_tokens),
            self.tokens(usage.cached_tokens),
            self.tokens(usage.reasoning_tokens),
        )

    def error(self, error: PolarError, dialect: str) -> PolarError:
        """An error as it is told: an overflow in the provider's words and the harness's numbers."""
        over = error.overflow
        if error.kind != "context_overflow" or over is None:
            return error
        window = self.window or over.window
        tokens = max(self.tokens(over.tokens), window + 1)
        words = _OVERFLOW.get(dialect, _NUMBERS)
        told = words.format(tokens=tokens, window=window)
        return PolarError(error.kind, told, status=error.status, overflow=Overflow(tokens, window))


def scale_for(model: str, headers: Mapping[str, str], engine_window: int, settings: Settings) -> Scale:
    """How the harness that sent these headers and asked for `model` is told of tokens."""
    if settings.usage == "engine":
        return Scale()
    agent = next((value for name, value in headers.items() if name.lower() == "user-agent"), "")
    window = believed(model, agent, settings.context_windows)
    return Scale.between(window, engine_window, settings.window_reserve)

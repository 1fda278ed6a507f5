"""The handful of errors that cross our boundary to a harness, each knowing what it means there.

A dialect turns `PolarError.kind` into its provider's status and body shape; nothing else about a provider
is known here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from msgspec import MsgspecError

ErrorKind = Literal[
    "bad_request",  # malformed JSON, wrong types, bad compression: the harness's fault
    "not_found",  # unknown path on a provider's host
    "too_large",  # body over the configured limit
    "context_overflow",  # the engine's window is too small for this prompt
    "overloaded",  # engine down, slow or saturated before the first byte: try again
    "upstream",  # engine broke after the answer had begun
    "internal",  # our own bug; recorded, never trained on
]


UNREADABLE = (MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that it cannot read, be it for their UTF-8 or their depth."""


class Overflow(NamedTuple):
    """A prompt of `tokens` met a `window` that holds fewer."""

    tokens: int
    window: int


class PolarError(Exception):
    """An error with a meaning for the harness.

    Args:
        kind: what went wrong, in the vocabulary above.
        message: one sentence for the harness and its user; holds no secrets.
        retry_after_s: when set, how long the harness should wait before it tries again.
        status: the engine's own HTTP status where there was one, for the record.
        overflow: the numbers of a `context_overflow`, where they are known.
    """

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        retry_after_s: int | None = None,
        status: int | None = None,
        overflow: Overflow | None = None,
    ) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind
        self.message = message
        self.retry_after_s = retry_after_s
        self.status = status
        self.overflow = overflow


class EngineUnfit(Exception):
    """The engine cannot serve token-faithful capture (no token ids, no logprobs, unreachable at start)."""


class StoreError(Exception):
    """A store cannot be opened, read or migrated; the message says what to do."""


class TaskError(Exception):
    """A task, or where tasks come from, is wrong; the message says what."""


class SetupError(Exception):
    """Something this machine lacks (bwrap, node, a user namespace); the message says how to get it."""


class WeightsError(Exception):
    """An engine did not take new weights; the message says why, and what it serves now.

    `serving` is the version that it serves; None where nobody can say, and nothing that it samples is to be
    trained on before its weights are whole again.
    """

    def __init__(self, message: str, serving: str | None = None) -> None:
        super().__init__(message)
        self.serving = serving

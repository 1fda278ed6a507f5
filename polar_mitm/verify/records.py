"""What verification looks at. T tokens of a trajectory, P of a call's prompt, C sampled by a call.

Trajectories come in as whatever has the fields of `Path` and `Span`: built just now, or read from a store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from msgspec import MsgspecError, Struct
from msgspec.json import decode
from numpy.typing import NDArray

from polar_mitm.types import ModelCall


class Span(Protocol):
    """Where one call lies in a trajectory: its prompt ends at `sampled_start`, its answer at `end`."""

    @property
    def call_id(self) -> str: ...
    @property
    def sampled_start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def mask_reason(self) -> str | None: ...


class Path(Protocol):
    """A trajectory: `token_ids` [T] int32, `loss_mask` [T] uint8, `behaviour_logprobs` [T] float32."""

    @property
    def trajectory_id(self) -> str: ...
    @property
    def token_ids(self) -> NDArray[np.int32]: ...
    @property
    def loss_mask(self) -> NDArray[np.uint8]: ...
    @property
    def behaviour_logprobs(self) -> NDArray[np.float32]: ...
    @property
    def spans(self) -> Sequence[Span]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """What the engine reported of one call: prompt ids [P], sampled ids [C], their logprobs [C] (nats).

    `weights` names what it was sampled under, None where they changed on the way; `tokenizer` is a
    fingerprint, "" where unknown. `tempered`: not sampled
    from the softmax itself (a temperature other than 1, top-p, top-k), while raw logprobs were recorded.
    `constrained`: sampled under a grammar (a forced tool, a schema), which vLLM masks the logits with before
    it takes even raw logprobs: these are no logprobs of the model's own softmax. `num_sampled` is C, or the
    engine's own count where ids are missing.
    """

    call_id: str
    prompt_ids: NDArray[np.int64]
    completion_ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    weights: str | None
    tokenizer: str
    tempered: bool
    constrained: bool
    num_sampled: int

    @property
    def ids(self) -> NDArray[np.int64]:
        """[P + C]"""
        return np.concatenate([self.prompt_ids, self.completion_ids])


class _Asked(Struct):
    """What of an engine's request body has it sample under a grammar."""

    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None


def sampled(call: ModelCall) -> Sampled:
    """A recorded call as verification sees it; read with its bodies (`wire=True`) where it will be scored."""
    mixed = call.policy_version_last not in (None, call.policy_version)
    asked = call.sampling
    return Sampled(
        call_id=call.call_id,
        prompt_ids=np.array(call.prompt_token_ids, dtype=np.int64),
        completion_ids=np.array(call.completion_token_ids, dtype=np.int64),
        logprobs=np.array(call.behaviour_logprobs, dtype=np.float64),
        weights=None if mixed else weights_name(call.model_served, call.policy_version),
        tokenizer=call.tokenizer,
        tempered=asked.temperature not in (None, 1.0) or asked.top_p not in (None, 1.0) or bool(asked.top_k),
        constrained=call.guided or _constrained(call.upstream_body),
        num_sampled=max(len(call.completion_token_ids), call.usage.completion_tokens),
    )


def weights_name(model: str, policy_version: str | None) -> str:
    """How a model at a version is called in reports."""
    version = policy_version or ""
    return version if version.startswith(f"{model}@") else f"{model}@{version or 'unknown'}"


def _constrained(upstream_body: bytes) -> bool:
    try:
        asked = decode(upstream_body, type=_Asked) if upstream_body else _Asked()
    except MsgspecError:
        return False
    free = asked.tool_choice in (None, "auto", "none")
    return not free or bool(asked.response_format or asked.structured_outputs)

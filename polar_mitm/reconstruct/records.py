"""What reconstruction gives: trajectories over numpy arrays, and the account of every sampled token.

T is the number of tokens of one trajectory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from polar_mitm.types import CallRole

Builder = Literal["forest", "per-request", "polar-splice"]
MaskReason = Literal[
    "shared_prefix",  # trained in another trajectory that shares this call; context here
    "orphan",  # an identical prompt was answered again, and that answer is the one that lived on
    "auxiliary",  # a title, a router, a search: not the task's own work
    "compaction",  # a summary of the history
    "guided",  # sampled under a grammar: its logprobs are not of the policy's own distribution
    "replayed",  # sampled, and trained, in the rollout that it was recorded in
    "overlong",  # adds more tokens to its context than a sample may hold
    "dropped",  # polar-splice only: lost where a chain broke
]
QuarantineReason = Literal[
    "incomplete_rollout",  # the rollout's record has holes
    "duplicate_call_id",  # two records claim to be the same call
    "lost_prefix",  # the call that its prompt is stored on top of is missing, or shorter than it says
    "failed",  # the engine failed, or broke off its answer
    "refused",  # never sent to the engine
    "context_mismatch",  # the engine did not use the prompt ids that it was sent
    "no_token_ids",  # prompt ids or sampled ids are missing
    "bad_token_id",  # negative, or beyond 32 bits
    "no_logprobs",
    "length_mismatch",  # ids, logprobs and the engine's own count disagree
    "bad_logprob",  # NaN, infinite, positive, or vLLM's -9999.0 for "impossible"
    "mixed_tokenizers",  # the rollout's calls used several, whose ids must not meet
    "mixed_models",  # the rollout's calls were served by several models
]


class CallSpan(Struct, frozen=True, gc=False):
    """Where one call lies in a trajectory.

    Positions `[start, sampled_start)` are what the call's prompt added to the tokens before it, positions
    `[sampled_start, end)` what was sampled. `mask_reason` says why the sampled tokens are masked in this
    trajectory; None means that they train here. `truncated`: the answer did not come to its own end.
    `policy_version_last` is the last token's, where weights changed inside the call.
    """

    call_id: str
    start: int
    sampled_start: int
    end: int
    mask_reason: MaskReason | None
    truncated: bool
    policy_version: str | None
    policy_version_last: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One root-to-leaf token path: the context of each token is, id for id, the one it was sampled under.

    `token_ids` [T] int32, `loss_mask` [T] uint8 (1 where a sampled token trains), `behaviour_logprobs` [T]
    float32 in nats (0.0 where masked). `spans` tile the path from 0 to T, root first. `role`, `agent_id` and
    the id are the last call's. `policy_version_min`/`max` range over the spans that train, shorter text
    before longer and then in text order, so plain numbers and `step-9` before `step-10` come out right.
    """

    trajectory_id: str
    rollout_id: str
    group_id: str | None
    role: CallRole
    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    behaviour_logprobs: NDArray[np.float32]
    spans: tuple[CallSpan, ...]
    policy_version_min: str | None
    policy_version_max: str | None
    agent_id: str | None = None

    @property
    def num_trained(self) -> int:
        """How many tokens train."""
        return int(self.loss_mask.sum())

    @property
    def num_context(self) -> int:
        """How many tokens lie before the first call that trains here."""
        return next((s.start for s in self.spans if s.mask_reason is None), self.token_ids.size)


@dataclass(frozen=True, slots=True)
class BuildReport:
    """The account of one build, in sampled tokens of one rollout.

    `sampled` counts the calls' own tokens (where ids are missing, the engine's usage), `trained` those that
    train, each in one trajectory; `masked` those that train in none, `quarantined` those of calls that are in
    none. `quarantined_calls` lists (call_id, reason). `mismatched` counts the trained tokens whose context is
    not the one that they were sampled under. `num_continued` calls began with their parent's exact ids;
    `fallbacks` counts the calls that did not, by recorded reason. `tokenizers` and `models_served` name what
    the calls that reached the engine used.
    """

    rollout_id: str
    num_calls: int
    num_trajectories: int
    sampled: int
    trained: int
    masked: Mapping[MaskReason, int]
    quarantined: Mapping[QuarantineReason, int]
    quarantined_calls: tuple[tuple[str, QuarantineReason], ...]
    builder: Builder = "forest"
    mismatched: int = 0
    num_continued: int = 0
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    tokenizers: tuple[str, ...] = ()
    models_served: tuple[str, ...] = ()

    @property
    def num_masked(self) -> int:
        """Masked tokens, whatever the reason."""
        return sum(self.masked.values())

    @property
    def num_quarantined(self) -> int:
        """Quarantined tokens, whatever the reason."""
        return sum(self.quarantined.values())

    @property
    def adds_up(self) -> bool:
        """Whether each sampled token is trained once, masked, or quarantined."""
        return self.sampled == self.trained + self.num_masked + self.num_quarantined

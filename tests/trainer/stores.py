"""Stores with rollouts to train on, made as a capture and `polar-mitm reconstruct --write` make them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from polar_mitm.reconstruct import build
from polar_mitm.store import Recorder
from polar_mitm.store.columns import each_rollout
from polar_mitm.store.offline import writing
from polar_mitm.store.trajectories import TrajectoryWriter
from polar_mitm.types import Message, ModelCall, Reward, Rollout, TextPart, ToolCall
from polar_mitm_trainer.config import TrainConfig
from polar_mitm_trainer.finished import Finished

TOKENIZER = "5eed5eed5eed5eed"
PROMPT = [1, 2, 3, 4]


@dataclass
class Recorded:
    """A rollout, its calls and its verdicts by name."""

    rollout: Rollout
    calls: list[ModelCall]
    rewards: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> Finished:
        """As an online run hands it over."""
        (reward,) = self.rewards.values() or (None,)
        answers = {call.call_id: call.answer for call in self.calls if call.answer is not None}
        return Finished.of_calls(self.rollout, self.calls, answers, reward=reward)


def answer(text: str = "", *arguments: str, kind: Any = "function") -> Message:
    """Text, and a tool call with each of these arguments."""
    calls = [ToolCall(f"call_{n}", "bash", each, kind) for n, each in enumerate(arguments)]
    return Message("assistant", [TextPart(text)] if text else [], tool_calls=calls)


def call(rollout_id: str, n: int, prompt: Sequence[int], sampled: Sequence[int], **fields: Any) -> ModelCall:
    """Call number `n` of a rollout: delivered, and sampled by the weights of step 3."""
    defaults: dict[str, Any] = {
        "status": "ok",
        "delivered": True,
        "finish_reason": "stop",
        "started_at": float(n),
        "seq": n,
        "model_served": "tiny",
        "tokenizer": TOKENIZER,
        "policy_version": "step-3",
        "answer": answer("done"),
        "behaviour_logprobs": [-(i + 1) / 8 for i in range(len(sampled))],
        "dialect": "anthropic",
        "route": "/v1/messages",
    }
    return ModelCall(
        call_id=f"{rollout_id}-{n}",
        rollout_id=rollout_id,
        prompt_token_ids=list(prompt),
        completion_token_ids=list(sampled),
        **{**defaults, **fields},
    )


def rollout(
    rollout_id: str,
    group_id: str | None,
    reward: float | None,
    *,
    num_calls: int = 2,
    num_threads: int = 1,
    first: dict[str, Any] | None = None,
    last: dict[str, Any] | None = None,
    **fields: Any,
) -> Recorded:
    """`num_threads` threads of `num_calls` calls each, every call continuing the one before.

    `first` and `last` are fields of the first and the last call, the others of the rollout.
    """
    calls: list[ModelCall] = []
    for thread in range(num_threads):
        prompt = [*PROMPT, 100 + thread]
        for n in range(num_calls):
            sampled = [200 + sum(map(ord, rollout_id)) % 50, 300 + n, 7][: 2 + (n + thread) % 2]
            calls.append(call(rollout_id, len(calls), prompt, sampled))
            prompt = [*prompt, *sampled, 50 + n]
    for at, changes in ((0, first), (-1, last)):
        for name, value in (changes or {}).items():
            setattr(calls[at], name, value)
    record = Rollout(rollout_id, group_id=group_id, **{"status": "completed", **fields})
    return Recorded(record, calls, {} if reward is None else {"score": reward})


def record(path: Path, recorded: Iterable[Recorded], *, built: bool = True) -> Path:
    """Record rollouts, and write their trajectories where `built`."""
    recorded = list(recorded)
    with Recorder(path, share=False) as recorder:
        for at, one in enumerate(recorded):
            recorder.rollout(one.rollout)
            for each in one.calls:
                recorder.call(each)
            for name, value in one.rewards.items():
                recorder.reward(Reward(one.rollout.rollout_id, name, value, at=float(at)))
    if built:
        reconstruct(path, [one.rollout for one in recorded])
    return path


def reconstruct(path: Path, rollouts: Sequence[Rollout], builder: Any = "forest") -> None:
    """As `polar-mitm reconstruct --write`."""
    ids = [each.rollout_id for each in rollouts]
    with writing(path) as changes:
        writer = TrajectoryWriter(changes, builder, ids)
        for each, columns in zip(rollouts, each_rollout(changes, ids), strict=True):
            trajectories, report = build(columns, rollout=each, builder=builder)
            writer.write(each.rollout_id, trajectories, report)
        writer.flush()


def tamper(path: Path, column: str, value: str, *numbers: int) -> None:
    """Set a column of the pages of trajectories by number; rows stay where they are, as UPDATE would not."""
    changed = f"CASE WHEN trajectory_no IN {(*numbers, -1)} THEN {value} ELSE {column} END AS {column}"
    with duckdb.connect(str(path)) as con:
        con.execute(f"CREATE TEMP TABLE pages AS SELECT * REPLACE ({changed}) FROM trajectory_pages")
        con.execute("DELETE FROM trajectory_pages")
        con.execute("INSERT INTO trajectory_pages FROM pages")


def groups(num_groups: int = 3, size: int = 4) -> list[Recorded]:
    """Groups in which every other rollout is rewarded."""
    return [
        rollout(f"g{g}r{r}", f"g{g}", float(r % 2), num_calls=1 + (g + r) % 3, num_threads=1 + r % 2)
        for g in range(num_groups)
        for r in range(size)
    ]


def config(**parts: dict[str, Any]) -> TrainConfig:
    """A configuration with these tables."""
    return TrainConfig.model_validate({"policy": {"model": "tiny"}, **parts})

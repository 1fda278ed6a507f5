"""A builder's trajectories in a store: all of them without tokens, some of them with. No torch here."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from polar_mitm.errors import StoreError
from polar_mitm.store import StoreReader
from polar_mitm.store.batches import packed
from polar_mitm.store.rows import quote
from polar_mitm.store.trajectories import StoredSpan, StoredTrajectory
from polar_mitm.types import Rollout
from polar_mitm_trainer.finished import Built, Outcome

_USED = """
    SELECT trajectory_no, list_distinct(list(coalesce(try(lineage ->> 'tokenizer'), ''))) AS tokenizers,
        list_distinct(list(coalesce(model_served, ''))) AS models
    FROM (
        SELECT trajectory_no, rollout_id, unnest(spans) AS span FROM trajectories WHERE builder = {}
    ) t JOIN stored_calls c ON c.call_id = t.span.call_id AND c.rollout_id = t.rollout_id
    WHERE t.span.mask_reason IS NULL
    GROUP BY trajectory_no
"""
_TO_WRITE = "`polar-mitm reconstruct --write` writes them"


@dataclass(frozen=True, slots=True)
class Listed:
    """A trajectory in the store; `number` is its `trajectory_no`."""

    number: int
    trajectory_id: str
    rollout_id: str
    role: str
    num_tokens: int
    last_span: StoredSpan | None


@dataclass(frozen=True, slots=True)
class Used:
    """What the calls that train in a trajectory were sampled with."""

    tokenizers: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()


class Listing:
    """The trajectories of one builder, by id, and the records of their rollouts.

    Raises:
        StoreError: the store cannot be read.
    """

    def __init__(self, reader: StoreReader, builder: str) -> None:
        self._reader, self._builder = reader, builder
        found = reader.sql(
            "SELECT trajectory_no AS number, trajectory_id, rollout_id, role, num_tokens, "
            f"json_extract(spans, '$[#-1]')::VARCHAR AS last_span FROM trajectory_rows "
            f"WHERE builder = {quote(builder)} ORDER BY trajectory_no"
        ).to_pylist()
        self._by_id: dict[str, Listed] = {}
        self._of_rollout: dict[str, list[Listed]] = defaultdict(list)
        for row in found:
            span = row.pop("last_span")
            listed = Listed(**row, last_span=span and msgspec.json.decode(span, type=StoredSpan))
            if listed.trajectory_id in self._by_id:
                raise StoreError(f"{reader.path} has two trajectories {listed.trajectory_id}")
            self._by_id[listed.trajectory_id] = listed
            self._of_rollout[listed.rollout_id].append(listed)
        self._rollouts: dict[str, Rollout] = {r.rollout_id: r for r in reader.rollouts()}
        self._builds = _builds(reader, builder)

    def __contains__(self, trajectory_id: str) -> bool:
        return trajectory_id in self._by_id

    def __getitem__(self, trajectory_id: str) -> Listed:
        return self._by_id[trajectory_id]

    def outcome(self, rollout_id: str, reward: float | None, group_id: str | None) -> Outcome:
        """A rollout's outcome; None as the group is the recorded one."""
        built = self._builds.get(rollout_id)
        if built is None and rollout_id not in self._of_rollout:
            built = Built(0, 0, 0, {}, {})  # it made no call
        if built is None:
            raise StoreError(
                f"{self._reader.path} has trajectories of {rollout_id}, but no account of them: {_TO_WRITE}"
            )
        own = self._of_rollout.get(rollout_id, [])
        last_spans = [(t.role, t.last_span) for t in own if t.last_span is not None]
        return Outcome.of(self._rollouts[rollout_id], built, last_spans, reward=reward, group_id=group_id)

    def trains(self, rollout_id: str) -> bool:
        """Whether a token of a rollout's trajectories trains."""
        return rollout_id in self._builds and self._builds[rollout_id].trained > 0

    def rollouts(self) -> list[Rollout]:
        """All of the store, oldest first."""
        return list(self._rollouts.values())

    def quarantined(self) -> Counter[str]:
        """Sampled tokens of complete rollouts that are in no trajectory, by reason."""
        reasons: Counter[str] = Counter()
        for rollout_id, built in self._builds.items():
            if rollout_id in self._rollouts and self._rollouts[rollout_id].incomplete is None:
                reasons.update(built.quarantined)
        return reasons

    def used(self) -> dict[int, Used]:
        """By number what trajectories were sampled with."""
        found: dict[int, Used] = defaultdict(Used)
        for row in self._reader.sql(_USED.format(quote(self._builder))).to_pylist():
            found[row["trajectory_no"]] = Used(frozenset(row["tokenizers"]), frozenset(row["models"]))
        return found

    def read(
        self, chosen: Sequence[Listed], max_tokens: int | None = None
    ) -> Iterator[tuple[Listed, StoredTrajectory]]:
        """The chosen ones with their tokens, in the order of their numbers, `max_tokens` or one at a time.

        Raises:
            StoreError: the store cannot be read, or they are damaged, or are no longer there.
        """
        chosen = sorted(chosen, key=lambda each: each.number)
        sizes = np.array([each.num_tokens for each in chosen])
        first = 0
        while first < len(chosen):
            last = len(chosen)
            if max_tokens is not None:
                last = first + max(1, int(np.searchsorted(np.cumsum(sizes[first:]), max_tokens, "right")))
            yield from zip(chosen[first:last], self._read(chosen[first:last]), strict=True)
            first = last

    def why_empty(self) -> str:
        """What may be the reason that there is no trajectory, as the end of a sentence."""
        reasons: Counter[str] = Counter()
        for built in self._builds.values():
            reasons.update(built.quarantined)
        told = []
        if missing := unbuilt(self._reader, self._builder):
            told.append(f"those of {len(missing)} rollouts are not in the store: {_TO_WRITE}")
        if reasons:
            tokens = ", ".join(f"{why} {n}" for why, n in reasons.most_common())
            told.append(f"sampled tokens in none: {tokens}")
        return "".join(f"; {each}" for each in told)

    def _read(self, chosen: Sequence[Listed]) -> Iterator[StoredTrajectory]:
        numbers = [each.number for each in chosen]
        batch = packed(self._reader, numbers)
        rows = self._reader.sql(
            "SELECT group_id, role, agent_id, spans, policy_version_min, policy_version_max "
            "FROM trajectory_rows "
            f"WHERE trajectory_no IN ({', '.join(map(str, numbers))}) ORDER BY trajectory_no"
        ).to_pylist()
        for at, (each, row) in enumerate(zip(chosen, rows, strict=True)):
            if batch.trajectory_ids[at] != each.trajectory_id:
                raise StoreError(f"{self._reader.path} was changed while it was read")
            own = slice(batch.cu_seqlens[at], batch.cu_seqlens[at + 1])
            spans = msgspec.json.decode(row.pop("spans"), type=tuple[StoredSpan, ...])
            yield StoredTrajectory(
                trajectory_id=each.trajectory_id,
                rollout_id=each.rollout_id,
                token_ids=batch.token_ids[own],
                loss_mask=batch.loss_mask[own],
                behaviour_logprobs=batch.behaviour_logprobs[own],
                spans=spans,
                **row,
            )


def unbuilt(reader: StoreReader, builder: str = "forest") -> list[str]:
    """The rollouts that may be trained on, but whose trajectories are not in the store, or not of all calls.

    `polar-mitm reconstruct --write` writes them. Rollouts that still run, have holes, or have no call are
    none of them.

    Raises:
        StoreError: the store cannot be read.
    """
    built = {rollout_id: each.num_calls for rollout_id, each in _builds(reader, builder).items()}
    counts = reader.sql("SELECT rollout_id, count(*) AS n FROM stored_calls GROUP BY rollout_id").to_pylist()
    calls = {row["rollout_id"]: row["n"] for row in counts}
    return [
        r.rollout_id
        for r in reader.rollouts()
        if r.incomplete is None and r.status != "running"
        if calls.get(r.rollout_id, 0) != built.get(r.rollout_id, 0)
    ]


def _builds(reader: StoreReader, builder: str) -> dict[str, Built]:
    found = reader.sql(f"SELECT rollout_id, report FROM builds WHERE builder = {quote(builder)}").to_pylist()
    try:
        return {row["rollout_id"]: msgspec.json.decode(row["report"], type=Built) for row in found}
    except msgspec.MsgspecError as error:
        raise StoreError(f"{reader.path}: the account of a build is damaged: {_TO_WRITE}") from error

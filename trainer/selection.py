"""From a question in SQL to a snapshot: which trajectories, with which rewards, and which are refused."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from polar_mitm.errors import StoreError
from polar_mitm.rewards import which_counts
from polar_mitm.store import StoreReader
from polar_mitm.store.rows import quote
from polar_mitm.types import EVALUATION
from polar_mitm_trainer.account import DataError
from polar_mitm_trainer.advantages import is_usable
from polar_mitm_trainer.listing import Listed, Listing
from polar_mitm_trainer.snapshot import Bystander, Row, Snapshot, digest_of

T = TypeVar("T")
ALL = "all"
_NAME = re.compile(r"[\w.-]+")
_ALL = """
    SELECT trajectory_id FROM trajectories
    WHERE builder = {} AND num_trained > 0 AND rollout_id IN (
        SELECT rollout_id FROM rollouts GROUP BY rollout_id HAVING count(*) = 1 AND count(incomplete) = 0
    ) AND NOT starts_with(coalesce(group_id, ''), {})
"""
_CHUNK = 4 << 20  # tokens in memory while rows are digested


@dataclass(frozen=True, slots=True)
class Policy:
    """What trajectories must have been sampled with. What is None is not compared.

    `tokenizer` is its fingerprint (`policy_of`), compared with calls whose engine told theirs; `model` the
    name that the engine served it under; token ids are below `vocab_size`.
    """

    tokenizer: str | None = None
    model: str | None = None
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a query said of a trajectory; NULL is None."""

    reward: float | None
    group_id: str | None


def resolve_query(text: str, *, builder: str = "forest", sets: Path | None = None) -> str:
    """The SQL behind `--query`: SQL itself, `@FILE` with SQL in it, or the name of a set.

    Sets are in the TOML file `sets`, NAME = "SELECT ..."; "all" is every trajectory of `builder` in which
    something trains, of complete rollouts that are not an evaluation's (`types.EVALUATION`).

    Raises:
        DataError: a file cannot be read, or there is no set of this name.
    """
    text = text.strip()
    if text.startswith("@"):
        return _read(Path(text[1:])).strip()
    if not _NAME.fullmatch(text):
        return text
    named: dict[str, Any] = {ALL: _ALL.format(quote(builder), quote(EVALUATION)).strip()}
    if sets is not None:
        try:
            named |= tomllib.loads(_read(sets))
        except tomllib.TOMLDecodeError as error:
            raise DataError(f"{sets}: {error}") from error
    if not isinstance(found := named.get(text), str):
        raise DataError(f"no training set {text!r}, only {', '.join(map(repr, named))}; or give a SELECT")
    return found


def select(
    reader: StoreReader,
    query: str,
    *,
    builder: str = "forest",
    reward_name: str | None = None,
    policy: Policy = Policy(),
    skip_refused: bool = False,
    only: Snapshot | None = None,
) -> Snapshot:
    """The training set of a query, read once from the first token to the last.

    The query's rows have a `trajectory_id` of a trajectory of `builder`; they may have a `reward`, the same
    for all of a rollout (NULL: none), and a `group_id`, to group otherwise than it was recorded (NULL: as it
    was). Other columns are ignored. Without a column `reward`, the latest verdict on the rollout counts.

    A judged rollout in which nothing trains (its harness died before the first call) has no trajectory to
    select. The set "all" counts its reward in its group's mean all the same, as an online run does
    (`Snapshot.bystanders`); any other query is about the rollouts that it selects, and no others.

    Args:
        reader: an open store; it is only read.
        query: one SELECT on its views (`resolve_query` has others ways to say it).
        builder: whose trajectories; no token is trained as two builders' work.
        reward_name: which verdict, where verifiers gave several; not with a column `reward`. None is the only
            one, or "reward".
        policy: what is to be trained.
        skip_refused: leave out what cannot be trained on, and count it in the snapshot.
        only: of what the query gives, only the rows of this snapshot.

    Raises:
        DataError: the query is wrong, or selects nothing; rewards are missing, ambiguous or not numbers;
            trajectories cannot be trained on, unless they are skipped: with their number and the reasons.
        StoreError: the store cannot be read.
    """
    asked, has_rewards = _ask(reader, query, builder)
    if only is not None:
        wanted = {row.trajectory_id for row in only.rows}
        asked = {trajectory_id: each for trajectory_id, each in asked.items() if trajectory_id in wanted}
    listing = Listing(reader, builder)
    if not asked:
        raise DataError(f"the query selects no trajectory{listing.why_empty()}")
    if unknown := [trajectory_id for trajectory_id in asked if trajectory_id not in listing]:
        raise DataError(
            f"{len(unknown)} of {len(asked)} selected ids are no trajectory of builder {builder!r} "
            f"(first {unknown[0]!r}){listing.why_empty()}"
        )
    chosen = [listing[trajectory_id] for trajectory_id in asked]
    rollout_ids = {each.rollout_id for each in chosen}
    verdicts: dict[str, float] = {}
    if has_rewards:
        if reward_name is not None:
            raise DataError("the query has a column reward: leave out one of it and the reward's name")
        rewards = _alike(chosen, [asked[each.trajectory_id].reward for each in chosen], "rewards")
    else:
        reward_name, verdicts = _verdicts(reader, rollout_ids, reward_name)
        rewards = {rollout_id: verdicts.get(rollout_id) for rollout_id in rollout_ids}
    groups = _alike(chosen, [asked[each.trajectory_id].group_id for each in chosen], "groups")
    refused: Counter[str] = Counter()
    examples: dict[str, str] = {}
    rows = []
    for row, why in _rows(listing, chosen, rewards, groups, policy):
        if why is None:
            rows.append(row)
        else:
            refused[why] += 1
            examples.setdefault(why, row.trajectory_id)
    if refused and not (skip_refused and rows):
        reasons = "; ".join(f"{n} {why} (first {examples[why]})" for why, n in refused.most_common())
        raise DataError(f"{refused.total()} of {len(chosen)} trajectories cannot be trained on: {reasons}")
    if all(row.reward is None for row in rows):
        raise DataError(f"none of the {len(rewards)} selected rollouts has a reward")
    left_out: Counter[str] = Counter({f"sampled tokens {why}": n for why, n in listing.quarantined().items()})
    bystanders = []
    in_all = query == resolve_query(ALL, builder=builder)
    in_set = {row.group_id for row in rows}
    for rollout in listing.rollouts():
        reward = verdicts.get(rollout.rollout_id)
        if rollout.rollout_id in rollout_ids or (reward is None and not has_rewards):
            continue
        if in_all and (rollout.group_id or "").startswith(EVALUATION):
            left_out["rollouts of evaluations"] += 1
        elif rollout.incomplete is not None:
            left_out["incomplete_rollout"] += 1
            examples.setdefault("incomplete_rollout", rollout.incomplete)
        elif reward is not None and not listing.trains(rollout.rollout_id):
            group_id = listing.outcome(rollout.rollout_id, reward, None).group_id
            if in_all and group_id in in_set and is_usable(reward):
                bystanders.append(Bystander(rollout.rollout_id, group_id, reward, rollout.status))
            else:
                left_out["rollouts without a token that trains"] += 1
    if why := examples.get("incomplete_rollout"):
        left_out[f"incomplete_rollout (first: {why})"] = left_out.pop("incomplete_rollout")
    used = listing.used()
    numbers = [listing[row.trajectory_id].number for row in rows]
    return Snapshot.of(
        rows,
        query=query,
        builder=builder,
        reward_name=reward_name,
        refused=dict(refused),
        bystanders=bystanders,
        left_out=dict(left_out),
        model=next((model for number in numbers for model in used[number].models if model), None),
    )


def verify(reader: StoreReader, snapshot: Snapshot) -> None:
    """See that the store still gives each row of a snapshot, token by token.

    Raises:
        DataError: a row is gone or differs; with the count of each.
        StoreError: the store cannot be read.
    """
    try:
        now = select(
            reader,
            snapshot.query,
            builder=snapshot.builder,
            reward_name=snapshot.reward_name,
            skip_refused=True,
            only=snapshot,
        )
    except DataError as error:
        raise DataError(f"the store no longer holds snapshot {snapshot.snapshot_id[:12]}: {error}") from error
    snapshot.check(now)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _ask(reader: StoreReader, query: str, builder: str) -> tuple[dict[str, _Asked], bool]:
    """What a query said of each trajectory, in its order, and whether it said rewards."""
    inner = query.strip().rstrip(";")
    try:
        columns = reader.sql(f"SELECT * FROM ({inner}\n) LIMIT 0").column_names
        if "trajectory_id" not in columns:
            raise DataError(f"the query has no column trajectory_id, only {', '.join(columns)}")
        known = [name for name in ("reward", "group_id") if name in columns]
        found = reader.sql(f"SELECT trajectory_id, {', '.join(known) or 'NULL'} FROM ({inner}\n)")
    except DataError:
        raise
    except StoreError as error:
        raise DataError(f"the query cannot be run: {error}") from error
    ids = found["trajectory_id"].to_pylist()
    if num_nulls := ids.count(None):
        raise DataError(f"{num_nulls} of {len(ids)} rows of the query have no trajectory_id")
    if other := [each for each in ids if not isinstance(each, str)]:
        raise DataError(f"the query's column trajectory_id holds no ids of trajectories (first {other[0]!r})")
    if len(set(ids)) < len(ids):
        first = Counter(ids).most_common(1)[0][0]
        raise DataError(
            f"the query has {len(ids)} rows for {len(set(ids))} trajectories (first {first}): a join, or "
            f"several builders, repeat them: add WHERE builder = {quote(builder)}"
        )
    nothing = [None] * len(ids)
    groups = (
        [None if g is None else str(g) for g in found["group_id"].to_pylist()]
        if "group_id" in known
        else nothing
    )
    rewards = nothing
    if "reward" in known:
        try:
            rewards = found["reward"].cast(pa.float64()).to_pylist()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"the query's column reward holds no numbers: {error}") from error
    return dict(zip(ids, map(_Asked, rewards, groups), strict=True)), "reward" in known


def _alike(chosen: Sequence[Listed], values: Sequence[T | None], what: str) -> dict[str, T | None]:
    """One value per rollout."""
    per_rollout: dict[str, T | None] = {}
    differing = {
        each.rollout_id
        for each, value in zip(chosen, values, strict=True)
        # as text, so that NaN is like NaN
        if str(per_rollout.setdefault(each.rollout_id, value)) != str(value)
    }
    if differing:
        raise DataError(
            f"the query has several {what} for {len(differing)} rollouts (first {min(differing)})"
        )
    return per_rollout


def _verdicts(
    reader: StoreReader, rollout_ids: set[str], asked: str | None
) -> tuple[str | None, dict[str, float]]:
    """The name that counts, by what the selected rollouts have, and the latest verdict on every rollout."""
    found = reader.sql('SELECT rollout_id, name, value FROM rewards ORDER BY "at", rowid').to_pylist()
    names = Counter(row["name"] for row in found if row["rollout_id"] in rollout_ids)
    name = which_counts(names, asked)
    if name is None and names:
        told = ", ".join(f"{each!r} ({n})" for each, n in names.most_common())
        raise DataError(f"rollouts have rewards of several names: {told}; say which one counts")
    if name is not None and name not in names:
        told = ", ".join(map(repr, names)) or "none at all"
        raise DataError(f"no selected rollout has a reward {name!r}; there are: {told}")
    return name, {row["rollout_id"]: row["value"] for row in found if row["name"] == name}


def _rows(
    listing: Listing,
    chosen: Sequence[Listed],
    rewards: dict[str, float | None],
    groups: dict[str, str | None],
    policy: Policy,
) -> Iterator[tuple[Row, str | None]]:
    """Each chosen trajectory as a row, and why it cannot be trained on."""
    used = listing.used()
    models = Counter(model for each in chosen for model in used[each.number].models)
    for each, trajectory in listing.read(chosen, _CHUNK):
        outcome = listing.outcome(each.rollout_id, rewards[each.rollout_id], groups[each.rollout_id])
        row = Row(
            trajectory_id=each.trajectory_id,
            rollout_id=each.rollout_id,
            group_id=outcome.group_id,
            reward=outcome.reward,
            status=outcome.status,
            digest=digest_of(trajectory),
        )
        trained = trajectory.behaviour_logprobs[trajectory.loss_mask == 1]
        why = None
        if outcome.incomplete is not None:
            why = f"of an incomplete rollout ({outcome.incomplete})"
        elif outcome.reward is not None and not is_usable(outcome.reward):
            why = f"with the reward {outcome.reward}"
        elif not trained.size:
            why = "without a token that trains"
        elif not (np.isfinite(trained).all() and trained.max() <= 0):
            why = "with logprobs that are none"
        elif policy.tokenizer and (other := used[each.number].tokenizers - {"", policy.tokenizer}):
            why = f"of another tokenizer ({min(other)}, the policy's is {policy.tokenizer})"
        elif policy.model is not None and (other := used[each.number].models - {policy.model}):
            why = f"of another model ({min(other)!r}, the policy is {policy.model!r})"
        elif policy.model is None and len(models) > 1:
            told = ", ".join(sorted(used[each.number].models))
            why = f"of one of several models ({told}): --served-as says which"
        elif policy.vocab_size and int(trajectory.token_ids.max()) >= policy.vocab_size:
            why = f"with token ids beyond the policy's vocabulary of {policy.vocab_size}"
        yield row, why

"""The learner: samples in, one optimiser step, metrics out; and its weights, for an engine or to go on from.

A step is `epochs` passes over its samples, cut into `updates_per_step` parts, each of which makes one update
of the weights. A part is packed into micro-batches, whose losses add up, as do those of several ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polar_mitm_trainer import checkpoint
from polar_mitm_trainer.config import TrainConfig
from polar_mitm_trainer.distributed import Distributed, whole
from polar_mitm_trainer.losses import LOSSES, TokenBatch
from polar_mitm_trainer.metrics import combine, means
from polar_mitm_trainer.microbatch import MicroBatch, Node
from polar_mitm_trainer.optimiser import Optimiser
from polar_mitm_trainer.packing import pack
from polar_mitm_trainer.policy import Policy, PolicyError
from polar_mitm_trainer.samples import Sample
from polar_mitm_trainer.token_batch import BadSamplesError

_NAMED = 5


class BadStepError(ValueError):
    """A step that was not taken, since its loss or gradient is no number. All is as it was before.

    Should an update itself have broken the weights, they are taken back where a step has several updates. One
    alone has no copy of them, and there is nothing to save any more: what was saved last is to go on from.
    (Within the bounds of `OptimiserConfig` no update does so.)

    `trajectories` are those that it came from, or, if that is not known, all of that update.
    """

    def __init__(self, what: str, trajectories: Sequence[str]) -> None:
        more = f" and {len(trajectories) - _NAMED} more" if len(trajectories) > _NAMED else ""
        super().__init__(
            f"the step was refused: {what}; trajectories {', '.join(trajectories[:_NAMED])}{more}"
        )
        self.trajectories = tuple(trajectories)


@dataclass(slots=True, eq=False)
class _Work:
    """A micro-batch, whose trajectories it holds, and what other models say of its tokens [M]."""

    batch: MicroBatch
    trajectories: tuple[str, ...]
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None

    def tokens(self, logprobs: Tensor, entropy: Tensor | None) -> TokenBatch:
        """What a loss is given, of the policy's `logprobs` [M] and `entropy` [M]."""
        batch = self.batch.to(logprobs.device)
        return TokenBatch(
            logprobs=logprobs,
            behaviour_logprobs=batch.behaviour_logprobs,
            advantages=batch.advantages,
            weights=batch.weights,
            samples=batch.samples,
            num_samples=batch.num_samples,
            old_logprobs=self.old_logprobs,
            reference_logprobs=self.reference_logprobs,
            entropy=entropy,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Update:
    """Of one update: `metrics` that add up; `bad`: what was no number, and in which trajectory."""

    loss: float
    metrics: dict[str, Tensor]
    bad: list[tuple[str, str]]
    grad_norm: float = 0.0


class Learner:
    """A policy and its optimiser. `version` is how many steps they have behind them.

    On several ranks, each makes one and all call it alike; metrics are those of all.

    Raises:
        PolicyError: the policy or reference is no model that can be trained.
    """

    def __init__(self, config: TrainConfig, *, distributed: Distributed | None = None) -> None:
        self.config = config
        self.version = 0
        self._distributed = distributed or Distributed()
        chunk = config.packing.logit_chunk
        self.policy = Policy(config.policy, self._distributed, chunk=chunk, seed=config.seed)
        self._optimiser = Optimiser(self.policy.trained(), config.optimiser)
        self._reference: Policy | None = None
        if config.loss.kl_coefficient and (config.reference or self.policy.adapters is None):
            model = str(config.reference or config.policy.model)
            reference = config.policy.model_copy(update={"model": model})
            try:
                self._reference = Policy(reference, self._distributed, trains=False, chunk=chunk)
            except PolicyError as error:
                raise PolicyError(f"the reference of the KL term: {error}") from error

    @property
    def policy_version(self) -> str:
        """`version` as it is stamped on calls."""
        return f"step-{self.version}"

    def step(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One step on `samples`, weighed over all of them (`samples.weigh`); its metrics.

        Raises:
            BadStepError: NaN or infinity; nothing has changed.
            ValueError: there is nothing to train; or a sample that cannot be packed.
        """
        samples = [each for each in samples if each.num_trained]
        if not samples:
            raise ValueError("no sample has a token that trains")
        parts = [self._pack(part) for part in self._parts(samples)]
        num_updates = self.config.optimiser.epochs * len(parts)
        self._score_first(parts, several=num_updates > 1)
        before = self._optimiser.snapshot() if num_updates > 1 else None
        updates = []
        try:
            for _ in range(self.config.optimiser.epochs):
                updates += [self._update(part) for part in parts]
            if not self._optimiser.finite():
                raise BadStepError("weights that hold NaN or infinity", [s.trajectory_id for s in samples])
        except BaseException:
            self._optimiser.forget()
            if before is not None:
                self._optimiser.restore(before)
            raise
        self.version += 1
        batches = [work.batch for part in parts for work in part]
        laid_out = sum(batch.token_ids.numel() for batch in batches)
        return {
            **means(combine(update.metrics for update in updates)),
            "loss": sum(update.loss for update in updates) / num_updates,
            "grad_norm": sum(update.grad_norm for update in updates) / num_updates,
            "lr": self._optimiser.rate(self.version),
            "num_updates": num_updates,
            "num_samples": len(samples),
            "num_micro_batches": len(batches),
            "num_laid_out": laid_out,
            "sharing": sum(batch.num_unpacked for batch in batches) / laid_out,
        }

    def logprobs(self, samples: Sequence[Sample]) -> list[NDArray[np.float32]]:
        """Logprobs [T] in nats of each sample's trained tokens under the weights as they are, else 0.0."""
        scores = [np.zeros(each.token_ids.size, dtype=np.float32) for each in samples]
        own: list[tuple[int, NDArray[np.float32]]] = []
        for work in self._distributed.spread(self._pack(samples)):
            found = self.policy.score(work.batch if work else _nothing()).float().cpu()
            if work is not None:
                own += [
                    (n, found[work.batch.samples == at].numpy())
                    for at, n in enumerate(work.batch.sample_indices)
                ]
        for number, found in (each for rank in self._distributed.gather(own) for each in rank):
            scores[number][samples[number].loss_mask == 1] = found
        return scores

    def export(self, folder: Path) -> None:
        """The policy for an engine: a whole Hugging Face model in its dtype, its embeddings untied.

        (vLLM 0.32 on CPU silently keeps the old output embeddings of tied ones when it reloads weights.)
        """
        model, weights = self.policy.model, self.policy.merged(self._optimiser.masters)
        dtype = getattr(torch, self.config.policy.dtype)
        self._write(folder, lambda new: checkpoint.write_model(new, model, weights, dtype, untied=True))

    def export_adapter(self, folder: Path) -> None:
        """The adapters alone, as a peft folder in float32, which vLLM loads.

        Raises:
            ValueError: the policy has none.
        """
        if self.policy.adapters is None:
            raise ValueError("all weights train: there are no adapters to export")
        adapters, weights = self.policy.adapters, self._trained()
        self._write(folder, lambda new: checkpoint.write_adapter(new, adapters, weights))

    def save(self, folder: Path, position: dict[str, Any] | None = None) -> None:
        """A checkpoint (`checkpoint`): a Hugging Face or peft folder in float32, and all that `resume` needs.

        `position` is whatever its owner needs to go on from here, as JSON takes it.

        Raises:
            CheckpointError: the weights hold NaN or infinity; nothing is written.
        """
        if not self._optimiser.finite():
            raise checkpoint.CheckpointError(f"{folder} is not written: the weights hold NaN or infinity")
        adapters, model = self.policy.adapters, self.policy.model
        weights = self._trained() if adapters else self.policy.merged(self._optimiser.masters)
        optimiser = self._optimiser.state()
        state = {
            "version": self.version,
            "position": position or {},
            "config": self.config.model_dump(mode="json"),
            "random": self._distributed.gather(checkpoint.random_states()),
        }

        def write(new: Path) -> None:
            if adapters is not None:
                checkpoint.write_adapter(new, adapters, weights)
                checkpoint.copy_tokenizer(new, model)
            else:
                checkpoint.write_model(new, model, weights, torch.float32, untied=False)
            checkpoint.write_state(new, optimiser, state)

        self._write(folder, write)

    def resume(self, folder: Path) -> dict[str, Any]:
        """Go on from a checkpoint, on as many ranks as now are; the position that it was saved with.

        Raises:
            CheckpointError: it is not whole, of another policy, or no numbers; nothing has changed.
        """
        state = checkpoint.read_state(folder)
        then, now = state["config"]["policy"]["lora"], self.config.model_dump(mode="json")["policy"]["lora"]
        if then != now:
            raise checkpoint.CheckpointError(f"{folder} was trained with lora {then}, not {now}")
        weights = checkpoint.read_weights(folder)
        if bad := [name for name, each in weights.items() if not each.isfinite().all()]:
            raise checkpoint.CheckpointError(f"{folder} holds NaN or infinity in {bad[0]}")
        try:
            self._optimiser.load(weights, checkpoint.read_optimiser(folder))
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{folder} is of another policy: {error}") from error
        self.version = state["version"]
        ranks = state["random"]
        checkpoint.set_random_states(ranks[self._distributed.rank % len(ranks)])
        position: dict[str, Any] = state["position"]
        return position

    def _parts(self, samples: list[Sample]) -> list[list[Sample]]:
        """Rollouts, in an order of the step's own but groups together, cut into one part per update.

        A part's weights are scaled to its share of the rollouts: its gradient is an estimate of the step's.
        """
        num_parts = self.config.optimiser.updates_per_step
        if num_parts == 1:
            return [samples]
        rng = np.random.default_rng((self.config.seed, self.version))
        groups = list(dict.fromkeys(each.group_id for each in samples))
        place = dict(zip(groups, rng.permutation(len(groups)).tolist(), strict=True))
        rollouts = list(dict.fromkeys((place[each.group_id], each.rollout_id) for each in samples))
        rollouts.sort(key=lambda each: each[0])
        parts = []
        for part in np.array_split(np.arange(len(rollouts)), min(num_parts, len(rollouts))):
            chosen = {rollouts[at][1] for at in part}
            scale = np.float32(len(rollouts) / len(chosen))
            parts.append([replace(s, weights=s.weights * scale) for s in samples if s.rollout_id in chosen])
        return parts

    def _pack(self, samples: Sequence[Sample]) -> list[_Work]:
        packing = self.config.packing
        batches = pack(samples, max_tokens=packing.max_tokens, tree=packing.tree)
        return [_Work(b, tuple(samples[n].trajectory_id for n in b.sample_indices)) for b in batches]

    def _score_first(self, parts: list[list[_Work]], *, several: bool) -> None:
        """Before weights change: the old policy's logprobs, if they are needed, and the reference's."""
        loss = self.config.loss
        old = several and (loss.old_policy == "recomputed" or loss.correction != "none")
        for work in (each for part in parts for each in self._distributed.spread(part)):
            batch = work.batch if work else _nothing()
            if old:
                scores = self.policy.score(batch)
                if work:
                    work.old_logprobs = scores
            if loss.kl_coefficient:
                scores = self._score_reference(batch)
                if work:
                    work.reference_logprobs = scores

    def _score_reference(self, batch: MicroBatch) -> Tensor:
        if self._reference is not None:
            return self._reference.score(batch)
        with self.policy.without_adapters():
            return self.policy.score(batch)

    def _update(self, part: list[_Work]) -> _Update:
        """One update of the weights, from one part's micro-batches."""
        losses: list[Tensor] = []
        metrics: list[dict[str, Tensor]] = []
        bad: list[tuple[str, str]] = []
        for work in self._distributed.spread(part):
            logprobs, entropy = self.policy(work.batch if work else _nothing(), with_entropy=True)
            loss = logprobs.sum()  # where there is nothing to learn: other ranks wait for this one's layers
            if work is not None:
                try:
                    found = LOSSES[self.config.loss.name](work.tokens(logprobs, entropy), self.config.loss)
                except BadSamplesError as error:
                    bad += [(error.what, work.trajectories[number]) for number in error.samples]
                else:
                    loss = found.loss
                    losses.append(loss.detach())
                    metrics.append(found.metrics)
            loss.backward()
        own = _Update(float(sum(losses)), {name: each.cpu() for name, each in combine(metrics).items()}, bad)
        ranks = self._distributed.gather(own)
        bad = [each for rank in ranks for each in rank.bad]
        if bad:
            raise BadStepError(f"NaN or infinity in {bad[0][0]}", [trajectory for _, trajectory in bad])
        loss_value, grad_norm = sum(rank.loss for rank in ranks), self._optimiser.grad_norm()
        if not math.isfinite(loss_value + grad_norm):
            what = f"its loss is {loss_value}, its gradient's norm {grad_norm}"
            raise BadStepError(what, [each for work in part for each in work.trajectories])
        self._optimiser.update(self._optimiser.rate(self.version + 1), grad_norm)
        return _Update(loss_value, combine(rank.metrics for rank in ranks), [], grad_norm)

    def _trained(self) -> dict[str, Tensor]:
        """Whole, on the CPU."""
        return {name: whole(each.detach()).cpu() for name, each in self._optimiser.masters.items()}

    def _write(self, folder: Path, fill: Callable[[Path], None]) -> None:
        """By the first rank, while the others wait; what went wrong there is raised everywhere."""
        error: Exception | None = None
        if self._distributed.rank == 0:
            try:
                with checkpoint.written(folder) as new:
                    fill(new)
            except Exception as raised:
                error = raised
        told = self._distributed.gather(error and f"rank 0: {error!r}")[0]
        if error is not None:
            raise error
        if told:
            raise OSError(told)


def _nothing() -> MicroBatch:
    """For a rank that has no work while others have: layers to go through, and not one trained token."""
    none, ids = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    token = torch.zeros(1, dtype=torch.int64)
    return MicroBatch(token, token, (Node(0, 1, 1),), ids, ids, ids, none, none, none, 0, 0, ())

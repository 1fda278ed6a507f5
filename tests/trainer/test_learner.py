"""A step as a whole: against plain torch, packed one way or another, twice, refused; and what it exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from polar_mitm_trainer import checkpoint
from polar_mitm_trainer.learner import BadStepError, Learner
from polar_mitm_trainer.optimiser import Optimiser
from polar_mitm_trainer.policy import PolicyError
from polar_mitm_trainer.samples import Sample
from tests.trainer.policies import (
    UNTIED,
    config_for,
    plain,
    plain_logprobs,
    policy_folder,
    same,
    samples_for,
    weights,
)  # fmt: skip

LORA = {"policy": {"lora": {"rank": 4}}}
SGD_LIKE = {"eps": 1.0}  # the first step of AdamW is otherwise a gradient's sign, rounding and all


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # tiny tensors
    return policy_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def samples(model: Path) -> list[Sample]:
    return samples_for(model)


def learner(model: Path, **tables: Any) -> Learner:
    return Learner(config_for(model, **tables))


def close(a: Learner, b: Learner, atol: float) -> None:
    for name, each in weights(a).items():
        torch.testing.assert_close(each, weights(b)[name], atol=atol, rtol=0, msg=name)


def test_one_step_is_what_plain_torch_does(model: Path, samples: list[Sample]) -> None:
    """GRPO by its formula, one sequence at a time, transformers' own attention, torch's own AdamW."""
    ours, reference = learner(model), plain(model)
    adamw = torch.optim.AdamW(reference.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    total = torch.zeros(())
    for each in samples:
        trained = each.loss_mask == 1
        ratio = (plain_logprobs(reference, each.token_ids) - torch.from_numpy(each.behaviour_logprobs))[
            trained
        ].exp()
        advantages, share = (torch.from_numpy(a[trained]) for a in (each.advantages, each.weights))
        total = total - (torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * share).sum()
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    found = ours.step(samples)
    assert found["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert found["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert found["num_tokens"] == sum(each.num_trained for each in samples)
    assert 0 < found["clipped_low"] + found["clipped_high"] < 1
    assert all(each.grad is None for each in ours.policy.trained().values())
    adamw.step()
    for name, each in reference.named_parameters():
        torch.testing.assert_close(weights(ours)[name], each.detach(), atol=2e-4, rtol=0, msg=name)
    assert ours.version == 1 and ours.policy_version == "step-1"


@pytest.mark.parametrize("tables", [{}, LORA], ids=["full", "lora"])
def test_however_samples_are_packed_the_step_is_the_same(
    model: Path, samples: list[Sample], tables: dict[str, Any]
) -> None:
    longest = max(each.token_ids.size for each in samples)
    ways = [
        {"tree": True},
        {"tree": False},
        {"tree": True, "max_tokens": 150},
        {"tree": False, "max_tokens": longest, "logit_chunk": 7},  # one by one
    ]
    learners, found = [], []
    for way in ways:
        each = learner(model, **tables, packing=way, optimiser=SGD_LIKE)
        found.append([each.step(samples), each.step(samples[::-1])])
        learners.append(each)
    assert [first["num_micro_batches"] for first, _ in found] == [1, 1, 4, len(samples)]
    assert found[0][0]["sharing"] > 1.3 and found[1][0]["sharing"] == 1.0
    for other, steps in zip(learners[1:], found[1:], strict=True):
        for expected, step in zip(found[0], steps, strict=True):
            for name in ("loss", "grad_norm", "entropy", "ratio", "mismatch_abs_max", "clipped_high"):
                assert step[name] == pytest.approx(expected[name], rel=2e-5), name
        close(learners[0], other, atol=2e-7)
    assert not same(weights(learners[0]), weights(learner(model, **tables)))


@pytest.mark.parametrize(
    "tables", [{}, LORA, {"policy": {"dtype": "bfloat16"}}], ids=["full", "lora", "bfloat16"]
)
def test_the_same_samples_give_the_same_weights_twice(
    model: Path, samples: list[Sample], tables: dict[str, Any]
) -> None:
    several = {"optimiser": {"epochs": 2, "updates_per_step": 2}, "loss": {"kl_coefficient": 0.1}}
    first, second = (learner(model, **tables, **several) for _ in range(2))
    for _ in range(2):
        assert first.step(samples) == second.step(samples)
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(learner(model, **tables)))


def test_a_step_of_several_updates(model: Path, samples: list[Sample]) -> None:
    """Each part is a whole step's worth of gradient, and all ratios are to the policy before the first."""
    settings = {"epochs": 2, "updates_per_step": 2}
    several = learner(model, optimiser=settings, loss={"old_policy": "recomputed"})
    parts = several._parts(samples)
    assert sorted(each.trajectory_id for part in parts for each in part) == [f"t{n}" for n in range(8)]
    assert [{each.group_id for each in part} for part in parts] in ([{"g0"}, {"g1"}], [{"g1"}, {"g0"}])
    sums = [sum(float(each.weights.sum()) for each in part) for part in parts]
    assert sum(sums) == pytest.approx(2.0, rel=1e-5)
    found = several.step(samples)
    assert found["num_updates"] == 4 and several.version == 1
    assert found["num_tokens"] == 2 * sum(each.num_trained for each in samples)
    assert found["ratio_max"] > 1.001

    by_hand = learner(model, loss={"old_policy": "recomputed"})
    old = dict(zip((s.trajectory_id for s in samples), by_hand.logprobs(samples), strict=True))
    engine = learner(model, loss={"old_policy": "behaviour"})
    for _ in range(2):
        for part in parts:
            engine.step([replace(s, behaviour_logprobs=old[s.trajectory_id]) for s in part])
    close(several, engine, atol=2e-5)


def test_parts_are_rollouts_and_never_more_than_there_are(model: Path, samples: list[Sample]) -> None:
    parts = learner(model, optimiser={"updates_per_step": 9})._parts(samples)
    assert sorted(sorted({each.rollout_id for each in part}) for part in parts) == [
        ["r0"],
        ["r1"],
        ["r2"],
        ["r3"],
    ]


@pytest.mark.parametrize("tables", [{}, LORA], ids=["full", "lora"])
def test_the_reference_is_the_policy_that_it_began_as(
    model: Path, samples: list[Sample], tables: dict[str, Any], tmp_path: Path
) -> None:
    loss = {"kl_coefficient": 0.5, "old_policy": "recomputed"}
    began = learner(model, **tables, loss=loss)
    assert began.step(samples)["kl"] == pytest.approx(0.0, abs=1e-9)
    second = began.step(samples)
    assert second["kl"] > 1e-4
    named = learner(model, **tables, loss=loss, reference=str(policy_folder(tmp_path)))  # the same, elsewhere
    named.step(samples)
    assert named.step(samples)["kl"] == pytest.approx(second["kl"], rel=1e-4)


@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize("field", ["behaviour_logprobs", "advantages"])
def test_a_step_with_nan_is_refused_and_changes_nothing(
    model: Path, samples: list[Sample], updates: int, field: str
) -> None:
    """Wherever in a step it comes: updates that were made before are taken back."""
    settings = {"optimiser": {"updates_per_step": updates}, "packing": {"max_tokens": 150}}
    bad, good = learner(model, **settings), learner(model, **settings)
    before = weights(bad)
    for where in ("t1", "t6"):
        with pytest.raises(
            BadStepError, match=f"NaN or infinity in {field}; trajectories {where}$"
        ) as raised:
            bad.step(
                [with_value(each, field, np.nan) if each.trajectory_id == where else each for each in samples]
            )
        assert raised.value.trajectories == (where,)
        assert same(weights(bad), before) and bad.version == 0
    for _ in range(2):
        assert bad.step(samples) == good.step(samples)
    assert same(weights(bad), weights(good))


def test_a_gradient_that_overflows_is_refused(model: Path, samples: list[Sample]) -> None:
    each = learner(model)
    before = weights(each)
    with pytest.raises(BadStepError, match=r"its gradient's norm (nan|inf); .* and 3 more$") as raised:
        each.step([with_value(sample, "weights", 1e38) for sample in samples])
    assert len(raised.value.trajectories) == 8
    assert same(weights(each), before)
    assert np.isfinite(each.step(samples)["loss"])


def test_weights_that_an_update_broke_are_taken_back_or_never_saved(
    model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Optimiser.update

    def breaks(self: Optimiser, rate: float, grad_norm: float) -> None:
        update(self, rate, grad_norm)
        next(iter(self.masters.values())).detach().view(-1)[3] = np.inf

    several, one = learner(model, optimiser={"updates_per_step": 2}), learner(model)
    before = weights(several)
    with monkeypatch.context() as patch:
        patch.setattr(Optimiser, "update", breaks)
        for each in (several, one):
            with pytest.raises(BadStepError, match=r"NaN or infinity"):
                each.step(samples)
            assert each.version == 0
    with pytest.raises(checkpoint.CheckpointError, match="is not written: the weights hold NaN"):
        one.save(tmp_path / "step-0")
    assert not (tmp_path / "step-0").exists()
    assert same(weights(several), before)


def test_weights_that_are_no_numbers_are_no_beginning(samples: list[Sample], tmp_path: Path) -> None:
    folder = policy_folder(tmp_path / "model")
    learner(folder).save(tmp_path / "step-0")
    good = learner(folder)
    before = weights(good)
    for file in (folder / "model.safetensors", tmp_path / "step-0" / "model.safetensors"):
        broken = load_file(file)
        broken["model.norm.weight"][0] = np.nan
        save_file(broken, file, metadata={"format": "pt"})
    with pytest.raises(checkpoint.CheckpointError, match=r"holds NaN or infinity in model\.norm\.weight"):
        good.resume(tmp_path / "step-0")
    assert same(weights(good), before)
    with pytest.raises(PolicyError, match=r"cannot be trained: model\.norm\.weight holds NaN"):
        learner(folder)


def test_what_is_missing_is_told_as_what_it_is(model: Path) -> None:
    kl = {"kl_coefficient": 0.1}
    with pytest.raises(PolicyError, match=r"^the reference of the KL term: nowhere cannot be loaded: no"):
        learner(model, loss=kl, reference="nowhere")
    with pytest.raises(PolicyError, match=r"policy\.device: no cuda:77, for this machine has"):
        learner(model, policy={"device": "cuda:77"})
    with pytest.raises(PolicyError, match='"flex" needs a GPU'):
        learner(model, policy={"device": "cpu", "attention": "flex"})


def with_value(sample: Sample, field: str, value: float) -> Sample:
    """At its last trained token."""
    array = getattr(sample, field).copy()
    array[np.flatnonzero(sample.loss_mask)[-1]] = value
    return replace(sample, **{field: array})


def test_nothing_to_train_is_no_step(model: Path, samples: list[Sample]) -> None:
    each = learner(model)
    with pytest.raises(ValueError, match="no sample has a token that trains"):
        each.step([replace(s, loss_mask=s.loss_mask * 0) for s in samples])
    with pytest.raises(ValueError, match="no sample has a token that trains"):
        each.step([])
    assert each.version == 0


def test_logprobs_come_in_the_order_of_the_samples(model: Path, samples: list[Sample]) -> None:
    given = [samples[3], replace(samples[0], loss_mask=samples[0].loss_mask * 0), *samples]
    found = learner(model, packing={"max_tokens": 150}).logprobs(given)
    reference = plain(model)
    for sample, scores in zip(given, found, strict=True):
        expected = plain_logprobs(reference, sample.token_ids).detach().numpy() * sample.loss_mask
        np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert found[0].std() > 0.3 and not found[1].any()


@pytest.mark.parametrize(
    "tables", [{}, LORA, {"policy": {"dtype": "bfloat16"}}], ids=["full", "lora", "bfloat16"]
)
def test_an_export_scores_as_the_learner_and_its_embeddings_are_untied(
    tmp_path: Path, samples: list[Sample], tables: dict[str, Any]
) -> None:
    base = policy_folder(tmp_path / "base")
    (base / "tokenizer.json").write_text('{"as": "it was"}')
    (base / "chat_template.jinja").write_text("{{ messages }}")
    each = learner(base, **tables)
    each.step(samples)
    folder = tmp_path / "runs" / "engine"
    each.export(folder)
    each.export(folder)  # in the place of an older one
    assert [path.name for path in folder.parent.iterdir()] == ["engine"]
    assert (folder / "tokenizer.json").read_text() == '{"as": "it was"}'
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    said = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    dtype = tables.get("policy", {}).get("dtype", "float32")
    assert said["tie_word_embeddings"] is False and said["dtype"] == dtype
    assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{dtype}"}
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert not any("lora" in name or "base_layer" in name for name in stored)
    again = learner(folder, policy={"dtype": dtype})
    for found, expected in zip(again.logprobs(samples), each.logprobs(samples), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 if dtype == "float32" else 1e-6)
    for sample, expected in zip(samples[:3], each.logprobs(samples[:3]), strict=True):
        scores = plain_logprobs(plain(folder), sample.token_ids).detach().numpy() * sample.loss_mask
        np.testing.assert_allclose(scores, expected, atol=3e-5 if dtype == "float32" else 0.1)


def test_an_untied_model_is_exported_with_both(tmp_path: Path, samples: list[Sample]) -> None:
    each = learner(policy_folder(tmp_path / "base", UNTIED))
    each.step(samples)
    each.export(tmp_path / "engine")
    stored = load_file(tmp_path / "engine" / "model.safetensors")
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(stored["lm_head.weight"], weights(each)["lm_head.weight"])


def test_adapters_are_exported_as_peft_loads_them(model: Path, samples: list[Sample], tmp_path: Path) -> None:
    each = learner(model, **LORA)
    each.step(samples)
    each.export_adapter(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    adapted = PeftModel.from_pretrained(plain(model), tmp_path / "adapter").eval()
    for sample, expected in zip(samples[:3], each.logprobs(samples[:3]), strict=True):
        scores = plain_logprobs(adapted, sample.token_ids).detach().numpy() * sample.loss_mask
        np.testing.assert_allclose(scores, expected, atol=3e-5)
    with pytest.raises(ValueError, match="there are no adapters to export"):
        learner(model).export_adapter(tmp_path / "other")


def test_an_export_that_fails_leaves_the_one_before(
    model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = learner(model)
    each.export(tmp_path / "engine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "engine").iterdir()}
    each.step(samples)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "copy_tokenizer", full)
    with pytest.raises(OSError, match="no space left"):
        each.export(tmp_path / "engine")
    assert {path.name: path.read_bytes() for path in (tmp_path / "engine").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]

"""Packing: every trained token once, behind its own context; what is shared is laid out once."""

from __future__ import annotations

import dataclasses
from itertools import combinations, pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm_trainer import packing
from polar_mitm_trainer.microbatch import MicroBatch
from polar_mitm_trainer.packing import pack
from polar_mitm_trainer.samples import Sample
from tests.trainer.forests import groups, sample


def paths(batch: MicroBatch) -> list[list[int]]:
    """Of each laid-out token, where the tokens that it sees lie. Checks that the nodes are a forest."""
    found: list[list[int]] = []
    ancestors: list[int] = []  # numbers of nodes
    for number, node in enumerate(batch.nodes):
        assert node.start == len(found) and node.start < node.end <= node.subtree_end
        while ancestors and batch.nodes[ancestors[-1]].subtree_end <= node.start:
            ancestors.pop()
        above = [batch.nodes[each] for each in ancestors]
        assert all(node.subtree_end <= each.subtree_end for each in above)
        before = [at for each in above for at in range(each.start, each.end)]
        found += [before + list(range(node.start, at + 1)) for at in range(node.start, node.end)]
        ancestors.append(number)
    assert len(found) == len(batch.token_ids)
    return found


def check(samples: list[Sample], batches: list[MicroBatch], max_tokens: int) -> None:
    """All that a user of micro-batches relies on."""
    seen: list[int] = []
    for batch in batches:
        visible = paths(batch)
        assert 0 < len(visible) <= max_tokens
        assert batch.position_ids.tolist() == [len(path) - 1 for path in visible]
        assert batch.num_samples == len(batch.sample_indices)
        unpacked = 0
        for number, index in enumerate(batch.sample_indices):
            mine, each = batch.samples == number, samples[index]
            trained = np.flatnonzero(each.loss_mask)
            unpacked += trained[-1]
            for at, source in zip(trained, batch.sources[mine].tolist(), strict=True):
                assert batch.token_ids[visible[source]].tolist() == each.token_ids[:at].tolist()
            assert batch.targets[mine].tolist() == each.token_ids[trained].tolist()
            for name in ("behaviour_logprobs", "advantages", "weights"):
                assert np.array_equal(getattr(batch, name)[mine].numpy(), getattr(each, name)[trained])
        assert batch.num_unpacked == unpacked
        seen += batch.sample_indices
    assert sorted(seen) == [index for index, each in enumerate(samples) if each.num_trained]


@given(groups(), st.integers(1, 60), st.booleans(), st.sampled_from([0, 1, 3, 16]))
def test_every_trained_token_is_once_behind_its_own_context(
    samples: list[Sample], max_tokens: int, tree: bool, worth: int
) -> None:
    max_tokens = max([max_tokens, *(len(each.token_ids) for each in samples)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_WORTH_A_FORK", worth)
        check(samples, list(pack(samples, max_tokens=max_tokens, tree=tree)), max_tokens)


@given(groups())
def test_one_micro_batch_holds_each_distinct_beginning_once(samples: list[Sample]) -> None:
    prefixes = set()
    for each in samples:
        if each.num_trained:
            last = np.flatnonzero(each.loss_mask)[-1]
            prefixes |= {tuple(each.token_ids[: n + 1].tolist()) for n in range(last)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_WORTH_A_FORK", 0)
        batches = list(pack(samples, max_tokens=10_000, tree=True))
    assert sum(len(each.token_ids) for each in batches) == len(prefixes)
    assert len(batches) == bool(prefixes)


@given(groups(), st.randoms(use_true_random=False))
def test_the_order_of_samples_changes_nothing_that_is_computed(samples: list[Sample], random: Random) -> None:
    shuffled = samples[:]
    random.shuffle(shuffled)
    longest = max(len(each.token_ids) for each in samples)
    one, other = (list(pack(each, max_tokens=longest + 5, tree=True)) for each in (samples, shuffled))
    assert [each.token_ids.tolist() for each in one] == [each.token_ids.tolist() for each in other]
    assert [list(map(dataclasses.astuple, each.nodes)) for each in one] == [
        list(map(dataclasses.astuple, each.nodes)) for each in other
    ]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_micro_batches_are_cut_where_the_least_is_shared(lengths: list[int], data: st.DataObject) -> None:
    shared = [0] + [data.draw(st.integers(0, min(pair))) for pair in pairwise(lengths)]
    laid = [
        packing._Laid(at, np.zeros(length, np.int32), np.array([length]), share)
        for at, (length, share) in enumerate(zip(lengths, shared, strict=True))
    ]
    most = data.draw(st.integers(max(lengths), sum(lengths)))

    def size(first: int, last: int) -> int:
        return sum(lengths[first:last]) - sum(shared[first + 1 : last])

    cuts = [
        [0, *inner, len(laid)] for num in range(len(laid)) for inner in combinations(range(1, len(laid)), num)
    ]
    possible = [list(pairwise(each)) for each in cuts]
    fitting = [each for each in possible if all(size(*one) <= most for one in each)]
    found = packing._bins(laid, most)
    assert found in fitting
    assert (sum(size(*one) for one in found), len(found)) == min(
        (sum(size(*one) for one in each), len(each)) for each in fitting
    )


def test_a_group_behind_one_prompt_is_one_tree() -> None:
    prompt = list(range(50))
    samples = [sample(n, [*prompt, *[60 + n] * 20], range(50, 70)) for n in range(4)]
    samples.append(sample(9, prompt[:40], [20, 30]))
    (batch,) = pack(samples, max_tokens=1000, tree=True)
    assert [(n.start, n.end, n.subtree_end) for n in batch.nodes] == [
        (0, 50, 126),
        *((50 + 19 * n, 69 + 19 * n, 69 + 19 * n) for n in range(4)),
    ]
    first = [batch.sources[batch.samples == n][0].item() for n in range(batch.num_samples)]
    assert first == [19, 49, 49, 49, 49]  # the prompt's last token predicts four different ones
    assert batch.num_unpacked == 30 + 4 * 69


def test_a_fork_for_a_few_tokens_is_not_made() -> None:
    few, many = packing._WORTH_A_FORK - 1, packing._WORTH_A_FORK
    for shared, nodes in ((few, 2), (many, 3)):
        samples = [sample(n, [*[5] * shared, *[10 + n] * 30], [shared + 30 - 1]) for n in range(2)]
        (batch,) = pack(samples, max_tokens=1000, tree=True)
        assert len(batch.nodes) == nodes


def test_without_sharing_samples_stay_in_order_and_apart() -> None:
    samples = [sample(n, [1, 2, 3, 4, 5], [2, 4]) for n in range(5)]
    batches = list(pack(samples, max_tokens=9, tree=False))
    assert [each.sample_indices for each in batches] == [(0,), (1, 2), (3, 4)]
    assert [len(each.nodes) for each in batches] == [1, 2, 2]


def test_what_cannot_be_packed_is_named() -> None:
    long = sample(3, range(20), [10])
    assert len(next(pack([long], max_tokens=10, tree=True)).token_ids) == 10
    with pytest.raises(ValueError, match=r"trajectory-3: 10 tokens .* takes 9: raise packing.max_tokens"):
        list(pack([long], max_tokens=9, tree=True))
    with pytest.raises(ValueError, match="trajectory-4: its first token"):
        list(pack([sample(4, [1, 2], [0, 1])], max_tokens=10, tree=False))


@pytest.mark.parametrize("tree", [True, False])
def test_nothing_to_train_is_nothing_to_do(tree: bool) -> None:
    assert list(pack([], max_tokens=10, tree=tree)) == []
    assert list(pack([sample(0, [1, 2, 3], [])], max_tokens=1, tree=tree)) == []

"""Forest attention's GPU kernels against each sequence alone in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from polar_mitm_trainer.attention import use_forest_attention
from polar_mitm_trainer.attention_kernels import kernel_for, plain_forward
from polar_mitm_trainer.packing import pack
from tests.trainer.forests import CONFIGS, SHAPE, alone, backward, model, sample, score

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SAMPLES = [sample(n, [*range(40), *[n] * (150 + 90 * n), *range(30)], range(38, 190 + n)) for n in range(4)]
SAMPLES += [sample(4, range(20), [5, 19]), sample(5, [50, 3, 50], [2])]
CONFIG = type(CONFIGS["qwen3"])(**{**SHAPE, "head_dim": 64})


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("kind", ["blocks", "flex"])
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"]
)
def test_logprobs_and_gradients_are_those_of_each_sequence_alone(
    dtype: torch.dtype, close: float, kind: str, tree: bool
) -> None:
    lone = model(CONFIG)
    _, gradient = backward(lone, lambda: (alone(lone, each).sum() for each in SAMPLES))
    exact = [alone(lone, each).detach() for each in SAMPLES]
    forest = model(CONFIG, dtype).cuda()
    use_forest_attention(forest, kind)
    batches = [each.to("cuda") for each in pack(SAMPLES, max_tokens=1100, tree=tree)]
    for batch in batches:
        got = score(forest, batch).detach().cpu()
        for number, index in enumerate(batch.sample_indices):
            error = (got[(batch.samples == number).cpu()] - exact[index]).abs()
            assert error.mean() < close
    _, found = backward(forest, lambda: (score(forest, batch).sum() for batch in batches))
    assert torch.cosine_similarity(found.cpu().double(), gradient, dim=0) > 1 - close


def test_low_precision_takes_the_flash_kernel() -> None:
    query = torch.zeros(1, 4, 8, 64, device="cuda")
    assert kernel_for(query)[0] is plain_forward
    assert kernel_for(query.bfloat16())[0] is not plain_forward

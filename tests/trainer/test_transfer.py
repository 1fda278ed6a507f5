"""What is not in GPU memory is not offered to an engine."""

from __future__ import annotations

import pytest
import torch

from polar_mitm_trainer.transfer import shared


def test_memory_of_the_host_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lm_head\.weight is on cpu"):
        next(shared([("lm_head.weight", torch.zeros(2, 2))]))
    assert list(shared([])) == []

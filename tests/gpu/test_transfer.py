"""A trainer's GPU memory becomes a vLLM's weights. Needs one GPU, and room for the engine's environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar_mitm import engine
from polar_mitm.upstream.weights import Check, EngineWeights

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
async def test_an_engine_serves_what_a_trainer_has_in_memory(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from polar_mitm_trainer.transfer import shared

    # float32, so that both sides agree; little memory, so that both fit on one GPU.
    state = engine.up(dtype="float32", transfer=True, extra=("--gpu-memory-utilization", "0.3"))
    try:
        model = AutoModelForCausalLM.from_pretrained(state.model, dtype=torch.float32).cuda()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
        ids = torch.arange(100, 140, device="cuda")
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        expected = [0.0, *logprobs.gather(1, ids[1:, None])[:, 0].tolist()]
        chunks = list(shared(model.state_dict().items(), chunk_bytes=1 << 24))
        assert len(chunks) > 1
        async with EngineWeights(state.url, state.served_model_name) as weights:
            check = Check(ids.tolist(), expected, tolerance=1e-2)
            updated = await weights.transfer([info for info, _ in chunks], "step-1", check=check)
            assert updated.difference is not None and updated.difference < 1e-2
            assert await weights.version() == "step-1"
    finally:
        engine.down()

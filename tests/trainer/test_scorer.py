"""Teacher forcing in torch against one plain forward pass in float64, on models with random weights."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from polar_mitm.engine import default_cache, ensure_env
from polar_mitm.engine.build import clean_environment
from polar_mitm.errors import SetupError
from polar_mitm.verify import ProcessScorer, Unscorable

# Torch comes with this Python, or with the engine's.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
SCORER = Path(__file__).parents[2] / "trainer" / "scorer.py"


@pytest.fixture(scope="session")
def python() -> str:
    """One with torch."""
    if find_spec("torch") and find_spec("transformers"):
        return sys.executable
    return str(ensure_env(default_cache(), lambda step: print(step, file=sys.stderr)))


@pytest.fixture(scope="session")
def models(python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    script = Path(__file__).with_name("reference.py")
    subprocess.run([python, "-P", script, folder], check=True, env=clean_environment())
    return folder


def scorer(python: str, model: Path, dtype: str = "float32") -> ProcessScorer:
    return ProcessScorer([python, "-P", str(SCORER), str(model), dtype], clean_environment())


@pytest.mark.parametrize("name", ["llama", "tied", "sliding"])
async def test_it_agrees_with_one_plain_forward_pass(python: str, models: Path, name: str) -> None:
    """In whatever order: chunks, a prefix kept from the sequence before, the same again, one id."""
    known = np.load(models / f"{name}.npz")
    async with scorer(python, models / name) as torch:
        for number in range(len(known.files) // 2):
            ids, logprobs = known[f"ids_{number}"], known[f"logprobs_{number}"]
            scores = await torch.score(ids.astype(np.int32))
            assert scores.shape == ids.shape and np.isnan(scores[0])
            np.testing.assert_allclose(scores[1:], logprobs, atol=2e-4)
            assert ids.size < 3 or logprobs.std() > 0.5, "a model with something to say"


async def test_one_id_changes_all_that_follows_and_nothing_before(python: str, models: Path) -> None:
    ids = np.load(models / "llama.npz")["ids_0"][:64].astype(np.int32)
    async with scorer(python, models / "llama") as torch:
        before = await torch.score(ids)
        ids[30] = (ids[30] + 1) % 97
        after = await torch.score(ids)
    same = np.isclose(before[1:], after[1:], atol=1e-5)
    assert same[:29].all() and not same[29] and not same[30:].all()


async def test_ids_that_the_model_does_not_have_are_refused_by_place(python: str, models: Path) -> None:
    async with scorer(python, models / "llama") as torch:
        for bad in 97, -1:
            with pytest.raises(Unscorable, match=f"id {bad} at position 2 is not among the model's 97"):
                await torch.score(np.array([1, 2, bad, 3], dtype=np.int32))
        assert np.isfinite((await torch.score(np.array([1, 2], dtype=np.int32)))[1])


async def test_what_is_no_model_is_told(python: str, models: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SetupError, match="Unrecognized model"):
        async with scorer(python, tmp_path):
            pass
    with pytest.raises(SetupError, match="floatx"):
        async with scorer(python, models / "llama", "floatx"):
            pass

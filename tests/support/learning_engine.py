"""The scripted engine with a small model behind it, whose weights can be updated: one real token per answer.

An answer is one printable character, drawn by the model of a folder, with its logprob under the model's own
softmax; the ids are those of `byte_tokens`. It has vLLM's endpoints of development mode, as far as
`polar_mitm.upstream.weights` uses them. Needs torch; a process of its own:

    python -m tests.support.learning_engine MODEL [--refuse-after N]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from transformers import AutoModelForCausalLM

from polar_mitm.conformance import byte_tokens
from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer

PRINTABLE = [byte_tokens.BYTE_OFFSET + code for code in range(0x21, 0x7F)]


class LearningEngine(ScriptedEngine):
    """Refuses to reload once it has done so `refuse_after` times. `log` is what was asked of it, in order."""

    def __init__(self, folder: Path, refuse_after: int | None = None) -> None:
        super().__init__(self._drawn, model="learning")
        self._refuse_after = refuse_after
        self._version, self._going = "default", asyncio.Event()
        self._going.set()
        self._random = random.Random(7)
        self._root = str(folder)
        self._load(folder)
        post = {
            "/update_weight_version": self._name,
            "/pause": self._pause,
            "/resume": self._resume,
            "/reset_prefix_cache": self._nothing,
            "/collective_rpc": self._rpc,
            "/v1/completions": self._score,
        }
        app = self._runner.app
        app.add_routes([web.post(path, handler) for path, handler in post.items()])
        app.add_routes([web.get("/weight_info", self._info), web.get("/is_paused", self._is_paused)])

    def _load(self, folder: Path) -> None:
        self._policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def _logprobs(self, ids: list[int]) -> torch.Tensor:
        """[V] of the next id."""
        logits = self._policy(torch.tensor([ids])).logits[0, -1]
        return torch.log_softmax(logits.float(), dim=-1)

    def _drawn(self, request: dict[str, Any], nth: int) -> Answer:
        logprobs = self._logprobs(self.prompt_ids(request))[PRINTABLE].tolist()
        weights = [2.718281828459045**each for each in logprobs]
        at = self._random.choices(range(len(PRINTABLE)), weights)[0]
        return Answer(text=byte_tokens.decode([PRINTABLE[at]]), logprob=logprobs[at])

    async def _models(self, request: web.Request) -> web.StreamResponse:
        card = {"id": self.model, "object": "model", "root": self._root, "max_model_len": self.max_model_len}
        return web.json_response({"object": "list", "data": [card]})

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        await self._going.wait()
        return await super()._chat(http)

    async def _score(self, request: web.Request) -> web.Response:
        body = await request.json()
        (token_id,) = body["allowed_token_ids"]
        logprob = float(self._logprobs(body["prompt"])[token_id])
        return web.json_response({"choices": [{"logprobs": {"token_logprobs": [logprob]}}]})

    async def _rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["method"] == "reload_weights" and not self._going.is_set()
        if self._refuse_after == 0:
            return web.json_response({"error": {"message": "out of memory", "code": 500}}, status=500)
        if self._refuse_after is not None:
            self._refuse_after -= 1
        self._load(Path(body["kwargs"]["weights_path"]))
        return web.json_response({"results": [None]})

    async def _name(self, request: web.Request) -> web.Response:
        self._version = (await request.json())["new_version"]
        return web.json_response({})

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self._version})

    async def _pause(self, request: web.Request) -> web.Response:
        self._going.clear()
        return web.json_response({})

    async def _resume(self, request: web.Request) -> web.Response:
        self._going.set()
        return web.json_response({})

    async def _is_paused(self, request: web.Request) -> web.Response:
        return web.json_response({"is_paused": not self._going.is_set()})

    async def _nothing(self, request: web.Request) -> web.Response:
        return web.json_response({})


async def _serve(folder: Path, refuse_after: int | None) -> None:
    torch.set_num_threads(1)
    async with LearningEngine(folder, refuse_after) as engine:
        print(json.dumps({"url": engine.url}), flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--refuse-after", type=int)
    options = parser.parse_args()
    asyncio.run(_serve(options.model, options.refuse_after))


if __name__ == "__main__":
    main()

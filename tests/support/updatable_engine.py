"""A scripted vLLM in development mode: its weights are whatever number a folder holds.

What it scores depends on that number, and requests wait while it is paused, as in vLLM 0.32. `done` is what
it was told to do, in order; `faults` play for a path (or for `path method` of a remote call) once each.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Script

DIE = "die"
"""A fault: the connection is closed, and every later one is."""


def checkpoint(
    folder: Path, weights: float, *, rows: int = 4, tied: bool | None = False, head: bool = True
) -> Path:
    """A Hugging Face folder whose only meaning is `weights`."""
    folder.mkdir()
    config = {} if tied is None else {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    names = ["model.embed_tokens.weight", *(["lm_head.weight"] if head else [])]
    _safetensors(folder / "model.safetensors", {name: [rows, 2] for name in names})
    (folder / "weights").write_text(str(weights))
    return folder


def adapter(folder: Path, weights: float) -> Path:
    """A peft folder."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    _safetensors(folder / "adapter_model.safetensors", {"a": [2, 2]})
    (folder / "weights").write_text(str(weights))
    return folder


def _safetensors(file: Path, shapes: dict[str, list[int]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def scores(weights: float, ids: list[int]) -> list[float]:
    """What a model with these weights makes of ids."""
    return [-(weights + ids[i] / 100 + i / 1000) for i in range(len(ids))]


class UpdatableEngine(ScriptedEngine):
    """`holds` are its weights; `adapters` where each was read from; `cached` what was scored under which."""

    def __init__(self, started_with: Path, script: Script | None = None, *, lora: bool = True) -> None:
        super().__init__(script)
        self.started_with = started_with
        self.holds = _read(started_with)
        self.weight_version = "default"
        self.running = asyncio.Event()
        self.running.set()
        self.done: list[str] = []
        self.faults: dict[str, list[Any]] = defaultdict(list)
        self.adapters: dict[str, Path] = {}
        self.loaded: dict[str, float] = {}
        self.dead = False
        routes = [
            web.get("/weight_info", self._weight_info),
            web.get("/is_paused", self._is_paused),
            web.post("/pause", self._pause),
            web.post("/resume", self._resume),
            web.post("/reset_prefix_cache", self._ok),
            web.post("/update_weight_version", self._name),
            web.post("/collective_rpc", self._rpc),
            web.post("/v1/completions", self._score),
        ]
        for name in ("init_weight_transfer_engine", "start_weight_update", "finish_weight_update"):
            routes.append(web.post(f"/{name}", self._ok))
        routes.append(web.post("/update_weights", self._update_weights))
        if lora:
            routes += [
                web.post("/v1/load_lora_adapter", self._load),
                web.post("/v1/unload_lora_adapter", self._unload),
            ]
        self._runner.app.add_routes(routes)
        self._runner.app.middlewares.append(self._play)

    @web.middleware
    async def _play(self, request: web.Request, handler: Any) -> web.StreamResponse:
        key = request.path
        if key == "/collective_rpc":
            key = (await request.json())["method"]
        if request.method == "POST" and key not in ("/v1/completions", "/v1/chat/completions"):
            self.done.append(key.removeprefix("/"))
        fault = self.faults[key].pop(0) if self.faults[key] else None
        if fault == DIE:
            self.dead = True
        if self.dead:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if isinstance(fault, asyncio.Event):
            await fault.wait()
        elif fault is not None:
            return web.json_response({"error": {"message": fault}}, status=500)
        response: web.StreamResponse = await handler(request)
        return response

    async def _models(self, request: web.Request) -> web.Response:
        listing = json.loads((await super()._models(request)).body or b"{}")  # type: ignore[arg-type]
        listing["data"][0]["root"] = str(self.started_with)
        listing["data"] += [
            {"id": name, "root": str(path), "parent": self.model, "max_model_len": None}
            for name, path in self.adapters.items()
        ]
        return web.json_response(listing)

    async def _weight_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.weight_version})

    async def _is_paused(self, request: web.Request) -> web.Response:
        return web.json_response({"is_paused": not self.running.is_set()})

    async def _pause(self, request: web.Request) -> web.Response:
        self.running.clear()
        return web.json_response({"status": "paused"})

    async def _resume(self, request: web.Request) -> web.Response:
        self.running.set()
        return web.json_response({"status": "resumed"})

    async def _ok(self, request: web.Request) -> web.Response:
        return web.json_response({"success": True})

    async def _name(self, request: web.Request) -> web.Response:
        self.weight_version = (await request.json())["new_version"]
        return web.json_response({"success": True})

    async def _update_weights(self, request: web.Request) -> web.Response:
        self.holds = (await request.json())["update_info"]["weights"]
        return web.json_response({"message": "Weights updated"})

    async def _rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["method"] == "reload_weights":
            self.holds = _read(Path(body["kwargs"]["weights_path"]))
            return web.json_response({"results": [None]})
        names = list(self.adapters)
        if body["method"] == "list_loras":
            return web.json_response({"results": [[names.index(name) for name in self.loaded]]})
        self.loaded.pop(names[body["args"][0]], None)
        return web.json_response({"results": ["True"]})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters:
            return web.json_response({"error": {"message": "has already been loaded"}}, status=400)
        self.adapters[name], self.loaded[name] = path, _read(path)
        return web.Response(text="Success")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        del self.adapters[name]
        self.loaded.pop(name, None)
        return web.Response(text="Success")

    async def _score(self, request: web.Request) -> web.Response:
        await self.running.wait()
        body = await request.json()
        ids = [*body["prompt"], *body["allowed_token_ids"]]
        name = body["model"]
        if name in self.adapters:
            self.loaded.setdefault(name, _read(self.adapters[name]))
        weights = self.loaded.get(name, self.holds)
        return web.json_response({"choices": [{"logprobs": {"token_logprobs": [scores(weights, ids)[-1]]}}]})


def _read(folder: Path) -> float:
    return float((folder / "weights").read_text())


async def version_of(url: str) -> str:
    """What an engine calls its weights."""
    async with aiohttp.ClientSession() as http, http.get(url + "/weight_info") as response:
        return str((await response.json())["weight_version"])

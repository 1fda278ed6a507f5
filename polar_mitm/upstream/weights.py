"""New weights for a running vLLM: pause, load, clear what the old ones computed, name, resume, check.

    async with EngineWeights(url, model, told=capture.policy_changed) as weights:
        await weights.name("step-0")                                    # what it was started with
        await weights.update(folder, "step-1", check=Check(ids, logprobs))

The engine runs in development mode (`polar-mitm engine up --dev`). Source: vLLM 0.32's routes of
`entrypoints/rl/online` and `entrypoints/serve/{dev,lora}`, as they behave; no torch here.

Calls in flight, by `mode`: "keep" freezes them, and they go on under the new weights, their cache computed
anew; "wait" lets them end first; "abort" cuts them off. Calls that come meanwhile wait in any mode.

Whatever goes wrong, the engine is resumed. Where it does not take the weights, or does not score `Check` as
it should, it gets the ones before back, under their name. What it sampled between being resumed and being
found wrong bears the new name: give the next attempt another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import aiohttp
import msgspec
from msgspec import Struct

from polar_mitm.errors import WeightsError
from polar_mitm.upstream.refusals import error_text
from polar_mitm.upstream.weight_files import check_adapter, check_model

Mode = Literal["keep", "wait", "abort"]
Step = Callable[[], Awaitable[None]]

UNKNOWN = "unknown"
"""The version that `told` hears where nobody can say what the engine serves."""
_MAX_POSITIONS = 16


class Check(Struct, frozen=True):
    """What the new weights make of some ids, by the trainer's reckoning.

    `logprobs` [T] of `token_ids` [T], each given the ids before it; the first is not looked at. `tolerance`
    is the largest difference allowed, in nats: float32 on both sides agrees to 1e-4, bfloat16 to 0.2.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    tolerance: float = 1e-3

    @property
    def positions(self) -> list[int]:
        """At most 16 of 1 ... T-1, evenly spread, the last among them."""
        last = len(self.token_ids) - 1
        num = min(last, _MAX_POSITIONS)
        return [last * (i + 1) // num for i in range(num)]


class Updated(Struct, frozen=True):
    """`paused_s`: how long nothing was sampled. `difference`: the largest from `Check`, in nats."""

    version: str
    paused_s: float
    difference: float | None = None


class EngineWeights:
    """One engine's weights; an async context manager, used by one task at a time.

    Args:
        url: the engine's, without `/v1`.
        model: the name of the model that it was started with.
        told: hears each version at the moment from which on the engine samples under it.
        timeout_s: for each request, among them the one that waits for calls in flight.
    """

    def __init__(
        self, url: str, model: str, *, told: Callable[[str], None] = lambda _: None, timeout_s: float = 300.0
    ) -> None:
        self._url, self._model, self._told = url.rstrip("/").removesuffix("/v1"), model, told
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=5)
        self._holds: Path | None = None
        """The folder whose weights the engine holds."""
        self._receiving = False

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(timeout=self._timeout, trust_env=False)
        try:
            self._started_with = _folder((await self._models()).get(self._model))
        except BaseException:
            await self._http.close()
            raise
        self._holds = self._started_with
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def version(self) -> str:
        """The engine's own word for its weights.

        Raises:
            WeightsError: it does not answer, or is not in development mode.
        """
        return str((await self._ask("GET", "/weight_info"))["weight_version"])

    async def name(self, version: str) -> None:
        """Call what the engine holds `version`."""
        await self._ask("POST", "/update_weight_version", {"new_version": version})
        self._told(version)

    async def update(
        self, folder: Path, version: str, *, check: Check | None = None, mode: Mode = "keep"
    ) -> Updated:
        """Have the engine load a Hugging Face folder, which it sees under the same path.

        Raises:
            WeightsError: the folder was refused, the engine failed, or it scores `check` otherwise.
        """
        folder = await asyncio.to_thread(check_model, folder, self._started_with)
        before = self._holds

        async def put() -> None:
            await self._reload(folder)

        async def back() -> None:
            if before is None:
                raise WeightsError("where its weights came from is not known")
            await self._reload(before)

        return await self._swap(version, mode, self._model, check, put, back)

    async def load_lora(
        self, folder: Path, name: str, version: str, *, check: Check | None = None, mode: Mode = "keep"
    ) -> Updated:
        """Have the engine serve a peft folder as the model `name`, in place of the one before.

        The name is the same for all versions, so that a rollout has one model. The engine reads the adapter
        from a link beside the first `folder`, under which later versions are put. (`load_inplace` needs no
        link, but from then on vLLM reads the adapter anew for every token, and an older one for calls in
        flight.)

        Raises:
            WeightsError: the folder was refused, the engine failed, or it scores `check` otherwise.
        """
        folder = await asyncio.to_thread(check_adapter, folder)
        served = (await self._models()).get(name)
        link = Path(served) if served else folder.parent / f".{name}.{urlsplit(self._url).port}.served"
        if served and not link.is_symlink():
            raise WeightsError(f"somebody else loaded {name}, from {served}: unload it first")
        before = link.readlink() if served else None

        async def put() -> None:
            if before is None:
                _link(link, folder)
                await self._load_adapter(name, link)
                return
            # A batch with an adapter that cannot be loaded kills the engine: try it under another name.
            await self._load_adapter(f"{name}.new", folder)
            await self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": f"{name}.new"})
            await relink(folder)

        async def relink(target: Path) -> None:
            _link(link, target)
            for number in {n for worker in await self._rpc("list_loras") for n in worker}:
                await self._rpc("remove_lora", number)  # the next batch that needs it reads it again

        async def back() -> None:
            if before is not None:
                await relink(before)
            elif name in await self._models():
                await self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})

        return await self._swap(version, mode, name, check, put, back, is_new=before is None)

    async def transfer(
        self,
        chunks: Iterable[dict[str, Any]],
        version: str,
        *,
        check: Check | None = None,
        mode: Mode = "keep",
    ) -> Updated:
        """Have the engine read weights from a trainer's GPU memory (CUDA IPC; same host, same GPUs).

        Args:
            chunks: vLLM's `update_info`, as `polar_mitm_trainer.transfer.shared` makes them; what they point
                to must live until this returns.

        Raises:
            WeightsError: as in `update`; but there is no way back then.
        """

        async def put() -> None:
            if not self._receiving:
                await self._ask("POST", "/init_weight_transfer_engine", {"init_info": {"packed": False}})
                self._receiving = True
            await self._ask("POST", "/start_weight_update")
            for chunk in chunks:
                await self._ask("POST", "/update_weights", {"update_info": chunk})
            await self._ask("POST", "/finish_weight_update")

        async def back() -> None:
            raise WeightsError("weights that came from a GPU are gone: load a checkpoint")

        self._holds = None
        return await self._swap(version, mode, self._model, check, put, back)

    # -- the swap ------------------------------------------------------------------------------------

    async def _swap(
        self,
        version: str,
        mode: Mode,
        model: str,
        check: Check | None,
        put: Step,
        back: Step,
        *,
        is_new: bool = False,
    ) -> Updated:
        held = await self.version()
        if check is not None:
            _sane(check)
        # Where an earlier update was killed, the engine is paused still, and scores nothing until resumed.
        scores = check is not None and not is_new and not (await self._ask("GET", "/is_paused"))["is_paused"]
        scored = await self._score(model, check) if check is not None and scores else None
        began = time.monotonic()
        await self._while_paused(mode, version, put, back, held)
        updated = Updated(version, time.monotonic() - began)
        if check is None:
            return updated
        try:
            now = await self._score(model, check)
            difference = max(
                _distance(a, check.logprobs[i]) for a, i in zip(now, check.positions, strict=True)
            )
            if difference > check.tolerance:
                stale = scored is not None and max(map(_distance, now, scored)) < 1e-6
                raise WeightsError(
                    f"the engine scores {version} otherwise than its trainer, by up to {difference:.3g} nats "
                    f"({check.tolerance:.3g} allowed)" + (": these are the old weights" if stale else "")
                )
        except WeightsError as error:
            raise await self._set_back(error, mode, back, held) from error
        return msgspec.structs.replace(updated, difference=difference)

    async def _while_paused(self, mode: Mode, version: str, put: Step, back: Step, held: str) -> None:
        """Pause, `put`, and resume whatever comes; `back` where it does not go through."""
        try:
            try:
                await self._ask("POST", f"/pause?mode={mode}")
            except WeightsError as error:
                raise WeightsError(f"{error}. Its weights are those of {held}, as before", held) from error
            try:
                await put()
                await self._named(version)
            except WeightsError as error:
                raise await self._undone(error, back, held) from error
            except BaseException:  # interrupted: what the engine holds now is nobody's
                await asyncio.shield(self._undone(WeightsError("interrupted"), back, held))
                raise
        finally:
            resumed = await asyncio.shield(self._resumed())
        if resumed is not None:
            raise WeightsError(f"the engine took {version}, but does not go on: {resumed}", version)

    async def _named(self, version: str) -> None:
        # Nothing that the old weights computed may be read under the new ones.
        await self._ask("POST", "/reset_prefix_cache?reset_running_requests=true")
        await self.name(version)

    async def _undone(self, error: WeightsError, back: Step, held: str) -> WeightsError:
        """Set the engine back; `error`, with what came of that."""
        try:
            await back()
            await self._named(held)
        except WeightsError as trouble:
            return await self._lost(error, trouble)
        return WeightsError(f"{error}. It serves {held}, as before", held)

    async def _set_back(self, error: WeightsError, mode: Mode, back: Step, held: str) -> WeightsError:
        """As `_undone`, for an engine that runs."""
        try:
            await self._while_paused("keep" if mode == "wait" else mode, held, back, back, held)
        except WeightsError as trouble:
            if trouble.serving != held:
                return await self._lost(error, trouble)
        return WeightsError(f"{error}. It serves {held} again", held)

    async def _lost(self, error: WeightsError, trouble: WeightsError) -> WeightsError:
        """Nothing that it samples from here on may pass for anything."""
        self._told(UNKNOWN)
        with contextlib.suppress(WeightsError):
            await self._ask("POST", "/update_weight_version", {"new_version": UNKNOWN})
        return WeightsError(f"{error}. What it serves now is not known ({trouble}): restart it")

    async def _resumed(self) -> str | None:
        """Resume; why not, if so."""
        try:
            await self._ask("POST", "/resume")
        except WeightsError as error:
            return str(error)
        return None

    # -- what the engine is asked --------------------------------------------------------------------

    async def _reload(self, folder: Path) -> None:
        await self._rpc("reload_weights", weights_path=str(folder))
        self._holds = folder

    async def _load_adapter(self, name: str, folder: Path) -> None:
        await self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    async def _rpc(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Each worker's answer."""
        body = {"method": method, "args": args, "kwargs": kwargs}
        return (await self._ask("POST", "/collective_rpc", body)).get("results", [])

    async def _models(self) -> dict[str, str | None]:
        """The engine's models and adapters, with where each was loaded from."""
        return {m["id"]: m.get("root") for m in (await self._ask("GET", "/v1/models"))["data"]}

    async def _score(self, model: str, check: Check) -> list[float]:
        """The engine's logprobs of the check's ids at its positions.

        Each id is sampled as the only one allowed, which is what serving does, prefix cache included.
        `prompt_logprobs` would be one request, but kills a CPU engine that serves an adapter to others.
        """
        ids = list(check.token_ids)
        return await asyncio.gather(*(self._logprob(model, ids[:i], ids[i]) for i in check.positions))

    async def _logprob(self, model: str, prompt: list[int], token_id: int) -> float:
        body = {
            "model": model,
            "prompt": prompt,
            "allowed_token_ids": [token_id],
            "max_tokens": 1,
            "temperature": 1.0,
            "logprobs": 0,
        }
        answer = await self._ask("POST", "/v1/completions", body)
        try:
            return float(answer["choices"][0]["logprobs"]["token_logprobs"][0])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise WeightsError(f"{self._url}/v1/completions gives no logprob: {error!r}") from error

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the engine answers with; {} where it is none.

        Raises:
            WeightsError: it does not answer, or with an error.
        """
        try:
            data = None if body is None else msgspec.json.encode(body)
            headers = {"content-type": "application/json"}
            async with self._http.request(method, self._url + path, data=data, headers=headers) as response:
                answer = await response.read()
        except TimeoutError as error:
            raise WeightsError(f"the engine at {self._url} did not answer {path} in time") from error
        except (aiohttp.ClientError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise WeightsError(f"the engine at {self._url} does not answer {path}: {reason}") from error
        try:
            decoded = msgspec.json.decode(answer)
        except msgspec.DecodeError:
            decoded = {}
        if response.status == 200:
            return decoded
        if response.status == 404 and isinstance(decoded, dict) and "error" not in decoded:
            how = "engine up --lora RANK" if "lora" in path else "engine up --dev"
            raise WeightsError(
                f"the engine at {self._url} has no {path}: it needs what `polar-mitm {how}` starts"
            )
        said = error_text(decoded) if decoded else answer[:200].decode("utf-8", "replace")
        raise WeightsError(f"the engine at {self._url} answered {path} with {response.status}: {said}")


def _sane(check: Check) -> None:
    if len(check.token_ids) < 2 or len(check.token_ids) != len(check.logprobs):
        raise WeightsError("a check needs two ids at least, and a logprob for each")
    if not all(math.isfinite(check.logprobs[i]) for i in check.positions):
        raise WeightsError("the trainer's logprobs of the new weights are not finite: they are broken")


def _distance(a: float, b: float) -> float:
    return abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf


def _folder(root: str | None) -> Path | None:
    """Where a model was loaded from, if that is at hand here."""
    return Path(root) if root and any(Path(root).glob("*.safetensors")) else None


def _link(link: Path, target: Path) -> None:
    """Point a link elsewhere, at once for whoever reads it."""
    fresh = link.with_name(f"{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target, target_is_directory=True)
    fresh.replace(link)

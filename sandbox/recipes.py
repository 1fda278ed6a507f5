"""Harness recipes: how to install a harness and run it without a person. Data, in `recipes/*.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polar_mitm.dialects.routes import ERROR_DIALECT
from polar_mitm.errors import SetupError

_FOLDER = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class Install:
    """Where the program comes from: an npm or PyPI package, at the recipe's version, or this machine's PATH.

    Attributes:
        binary: the program inside the installation; a glob that matches exactly one file. Without a package
            it is a name on this machine's PATH, and runs as found there.
        show: what of the installation the sandbox sees; globs, by default all of it.
        path: directories inside the installation to put on PATH; globs.
        script: for a program that is an interpreter, what it runs; relative to the recipe's file.
        node: whether it is a node program, and not a native one.
    """

    binary: str
    npm: str | None = None
    pip: str | None = None
    show: tuple[str, ...] = ("",)
    path: tuple[str, ...] = ()
    script: Path | None = None
    node: bool = False

    @property
    def package(self) -> str | None:
        """What is installed; None for a program that is there already."""
        return self.npm or self.pip


@dataclass(frozen=True)
class Recipe:
    """One harness at one version.

    Attributes:
        name: with its variants, as it was asked for: `codex:login`.
        program: without them, `codex`: what they have in common, the installation above all.
        version: empty where nothing is installed and the file does not say.
        hosts: where it calls models: name -> provider (a key of `ERROR_DIALECT`). `polar-mitm run` adds them
            to its own interceptor's; one behind `--control` serves those of its own settings.
        argv: arguments of a run without a person. `{prompt}` stands for the task; the element `{model}`
            becomes `model_argv` when a model is named, and nothing when none is.
        resume_argv: like `argv`, for a prompt that goes on with the last conversation in the same HOME and
            directory; empty where the harness cannot, or nobody said how.
        default_model: the model to name when the caller names none; empty for none.
        env: variables it needs to start, such as the key that it will not start without.
        home: files it needs in HOME, by relative path.
    """

    name: str
    program: str
    title: str
    install: Install
    argv: tuple[str, ...]
    version: str = ""
    hosts: dict[str, str] = field(default_factory=dict)
    resume_argv: tuple[str, ...] = ()
    model_argv: tuple[str, ...] = ()
    default_model: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    home: dict[str, str] = field(default_factory=dict)

    def arguments(self, prompt: str, model: str | None = None, *, resume: bool = False) -> list[str]:
        """What follows the program's name to run `prompt` without a person.

        `resume`: as the next thing said in the last conversation, by `resume_argv`.

        Raises:
            SetupError: there is no `resume_argv`.
        """
        if resume and not self.resume_argv:
            raise SetupError(f"{self.title}: no resume_argv in its recipe says how to go on")
        named = model or self.default_model
        model_argv = [each.replace("{model}", named) for each in self.model_argv] if named else []
        out: list[str] = []
        for each in self.resume_argv if resume else self.argv:
            out += model_argv if each == "{model}" else [each.replace("{prompt}", prompt)]
        return out


def available() -> list[str]:
    """Names of the recipes that come with polar-mitm."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def variants(name: str) -> list[str]:
    """Names of a recipe's variants, in its own order; `load` takes them as `NAME:VARIANT`.

    Raises:
        SetupError: as for `load`.
    """
    return list(_read(_split(name)[0]).get("variant", {}))


def load(name: str) -> Recipe:
    """A recipe by its name, or from a file of one's own (`./mine.toml`), named after the file.

    `codex:login` is a variant of it, `codex:login:lite` one variant on top of another.

    Raises:
        SetupError: no such recipe or variant, or the file is not one; the message says what is wrong.
    """
    file, chosen = _split(name)
    data = _read(file)
    known = data.pop("variant", {})
    if unknown := [each for each in chosen if each not in known]:
        there_are = f"there are {', '.join(known)}" if known else "it has none"
        raise SetupError(f"{file.stem} has no variant {unknown[0]!r}: {there_are}")
    for each in chosen:
        data = _overlaid(data, known[each])
    return _parse(data, file, ":".join([file.stem, *chosen]))


def _split(name: str) -> tuple[Path, list[str]]:
    """The file of a recipe, and the variants asked for. A path may have colons of its own."""
    stem, found, rest = name.rpartition(".toml")
    if found and rest[:1] in ("", ":"):
        file, chosen = Path(f"{stem}.toml"), rest.split(":")[1:]
    else:
        packaged, *chosen = name.split(":")
        file = _FOLDER / f"{packaged}.toml"
    if not file.is_file() or (file.parent == _FOLDER and file.stem not in available()):
        raise SetupError(
            f"no harness recipe {name!r}: there are {', '.join(available())}, or give a .toml file"
        )
    return file, chosen


def _read(file: Path) -> dict[str, Any]:
    """A recipe's file, in which every variant has been found to make a recipe.

    Raises:
        SetupError: it is not one.
    """
    where = ""
    try:
        data = tomllib.loads(file.read_text())
        base = {key: value for key, value in data.items() if key != "variant"}
        known = data.get("variant", {})
        if not isinstance(known, dict) or not all(isinstance(each, dict) for each in known.values()):
            raise ValueError("a variant is a table, [variant.NAME]")
        _parse(base, file, file.stem)
        for name, changes in known.items():
            where = f"[variant.{name}]: "
            if not name or ":" in name:
                raise ValueError("a variant's name has no colon, and is not empty")
            if odd := set(changes) & {"install", "version"}:
                raise ValueError(f"{', '.join(sorted(odd))} is the same for all variants")
            _parse(_overlaid(base, changes), file, file.stem)
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise SetupError(f"{file} is not a harness recipe: {where}{_reason(error)}") from error
    return data


def _overlaid(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe with a variant's keys in place of its own; of [run], the single keys."""
    out = {**data, **changes}
    if isinstance(run := changes.get("run"), dict) and isinstance(data.get("run"), dict):
        out["run"] = {**data["run"], **run}
    return out


def _parse(given: dict[str, Any], file: Path, name: str) -> Recipe:
    data = dict(given)
    _check_types(data)
    run, install = dict(data.pop("run")), dict(data.pop("install", {}))
    command = run.pop("program", None)
    if bool(install) == bool(command):
        raise ValueError("either [install], or program in [run]")
    if command:
        install["binary"] = command
    elif ("npm" in install) == ("pip" in install):
        raise ValueError("[install] needs either npm or pip")
    elif "version" not in data:
        raise KeyError("version")
    if "script" in install:
        install["script"] = (file.parent / install["script"]).resolve()
    run.setdefault("argv", ["{prompt}"])
    for key in ("argv", "resume_argv"):
        if key in run and not any("{prompt}" in each for each in run[key]):
            raise ValueError(f"no {{prompt}} in [run] {key}")
    if unknown := set(data) - {"title", "version", "hosts", "env", "home"}:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}")
    data["hosts"] = _hosts(data.get("hosts", {}))
    data.setdefault("title", file.stem)
    return Recipe(
        name=name, program=file.stem, install=Install(**_tuples(install)), **_tuples(run), **_tuples(data)
    )


def _check_types(data: dict[str, Any]) -> None:
    """Raises ValueError where a key of a recipe holds something of another type."""
    for name in data.keys() & {"run", "install", "env", "home"}:
        if not isinstance(table := data[name], dict):
            raise ValueError(f"[{name}] is a table, not {table!r}")
        for key, value in table.items():
            if name in ("run", "install") and key in ("argv", "resume_argv", "model_argv", "show", "path"):
                fits, what = _all_text(value), "a list of strings"
            elif (name, key) == ("install", "node"):
                fits, what = isinstance(value, bool), "true or false"
            else:
                fits, what = isinstance(value, str), "a string"
            if not fits:
                raise ValueError(f"[{name}] {key} is {what}, not {value!r}")
    for key in data.keys() & {"title", "version"}:
        if not isinstance(data[key], str):
            raise ValueError(f"{key} is a string, not {data[key]!r}")


def _all_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _hosts(given: Any) -> dict[str, str]:
    known = ", ".join(ERROR_DIALECT)
    if not isinstance(given, dict):
        raise ValueError(f'[hosts] is a table of "name" = provider ({known})')
    for host, provider in given.items():
        if provider not in tuple(ERROR_DIALECT):  # a provider may be anything that TOML has
            raise ValueError(f"[hosts] {host}: there is no provider {provider!r}: there are {known}")
    return {host.lower(): provider for host, provider in given.items()}


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)

"""From command-line options to `Settings`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import pydantic
import typer

from polar_mitm.cli.exits import fail
from polar_mitm.config import Settings, load

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="TOML file with settings (polar_mitm/config.py)."),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, metavar="N", help="Cap on sampled tokens per call; else the window."),
]


def settings_from(
    config: Path | None, source: str = "option or POLAR_MITM_ variable", /, **given: Any
) -> Settings:
    """Settings, or the end of the command with what is wrong in them.

    Args:
        source: where those are from that are not in `config`.
    """
    try:
        return load(config, **given)
    except FileNotFoundError:
        fail(f"--config: there is no file {config}")
    except pydantic.ValidationError as error:
        fail("; ".join(_complaint(each, config or source) for each in error.errors()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fail(f"--config: {config} is not TOML: {error}")
    except OSError as error:
        fail(f"--config: {config} cannot be read: {error.strerror}")


def _complaint(error: Any, source: object) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"there is no setting {name!r} ({source}): there are {', '.join(Settings.model_fields)}"
    return f"setting {name} ({source}): {error['msg'].removeprefix('Value error, ')}"

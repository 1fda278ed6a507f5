"""From command-line options to `Settings`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pydantic
import typer

from polar_mitm.cli.output import fail
from polar_mitm.config import Settings, load

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file with settings.")]
MaxTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", help="Cap on sampled tokens per call; the engine's window.")
]


def settings_from(config: Path | None, **given: Any) -> Settings:
    """Settings, or the end of the command with what is wrong in them."""
    try:
        return load(config, **given)
    except FileNotFoundError:
        fail(f"no such settings file: {config}")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        fail(f"setting {'.'.join(map(str, first['loc']))}: {first['msg']}")

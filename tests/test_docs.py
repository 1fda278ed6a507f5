"""The README and the command line say the same, and no link leads nowhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from polar_mitm.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
HIDDEN = {"build", "dist"}  # of no commit; they have no README


def commands(command: Any, name: str = "") -> dict[str, set[str]]:
    """Each command, subcommands by their whole name, with its options."""
    options = {text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts)}
    found = {name: {each for each in options if each.startswith("-")} | {"--help", "-h"}}
    for each, sub in getattr(command, "commands", {}).items():
        found |= commands(sub, f"{name} {each}".strip())
    return found


COMMANDS = commands(typer.main.get_command(app))


def examples() -> list[list[str]]:
    """What the README has people type after `polar-mitm`."""
    blocks = re.findall(r"(?m)^    .*polar-mitm.*$", README)
    lines = [part.split("#")[0] for block in blocks for part in re.split(r"&&|\$\(|\)", block)]
    return [
        shlex.split(line.replace('"', " "))[1:] for line in lines if re.match(r"\s*\S*polar-mitm\s", line)
    ]


def names(words: list[str]) -> str:
    """The command that these words begin with; "" is polar-mitm itself."""
    return max(
        (n for n in COMMANDS if words[: len(n.split())] == n.split()), key=lambda name: len(name.split())
    )


@pytest.mark.parametrize("words", examples(), ids=" ".join)
def test_what_the_readme_has_people_type_exists(words: list[str]) -> None:
    own = words[: words.index("--")] if "--" in words else words
    name = names(own)
    assert name, f"no command in {words}"
    assert {word for word in own if word.startswith("-")} <= COMMANDS[name]


def test_options_named_in_prose_exist() -> None:
    prose = re.sub(r"(?m)^    .*$", "", README)
    quoted = [word for code in re.findall(r"`([^`]+)`", prose) for word in code.split()]
    every = set().union(*COMMANDS.values())
    foreign = {"--set", "--"}  # mitmdump's, and the shell's
    assert {word for word in quoted if word.startswith("--")} - foreign <= every


@pytest.mark.parametrize("name", [name for name in COMMANDS if name])
def test_every_command_is_in_the_readme(name: str) -> None:
    assert re.search(rf"polar-mitm {name}\b|`{name}`|`{name} [^`]*`", README)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name])
def test_every_command_and_option_explains_itself(name: str) -> None:
    command = typer.main.get_command(app)
    for each in name.split():
        command = command.commands[each]  # type: ignore[attr-defined]
    assert command.help
    assert all(getattr(parameter, "help", None) for parameter in command.params)
    assert "--json" in COMMANDS[name] or getattr(command, "commands", None)


def test_every_exit_code_is_in_the_readme() -> None:
    section = README.partition("Exit codes")[2].partition("\n## ")[0]
    for code in (0, 1, 2, 3, 4, 70, 124, 125, 130, 143):
        assert re.search(rf"\b{code}\b", section), code


def test_every_top_level_folder_has_a_readme() -> None:
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    folders = [path for path in folders if path.suffix != ".egg-info" and path.name not in HIDDEN]
    assert {path.name for path in folders} >= {
        "polar_mitm",
        "addons",
        "sandbox",
        "trainer",
        "tests",
        "fixtures",
    }
    assert [path.name for path in folders if not (path / "README.md").is_file()] == []


def test_relative_links_lead_somewhere() -> None:
    pages = [
        p for p in ROOT.rglob("*.md") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)
    ]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    local = [(page, link.partition("#")[0]) for page, link in links if "://" not in link and link[0] != "#"]
    assert local
    assert [(str(page), link) for page, link in local if not (page.parent / link).exists()] == []

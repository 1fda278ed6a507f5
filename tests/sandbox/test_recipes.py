"""Recipes are data that a person can write, and mistakes in them are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar_mitm.errors import SetupError
from polar_mitm_sandbox import recipes

MINE = """
title = "Mine"
version = "1.0"
[hosts]
"Models.Example" = "openai"
[install]
npm = "mine"
binary = "node_modules/mine/cli.js"
node = true
[run]
argv = ["{model}", "--go", "--prompt={prompt}"]
model_argv = ["-m", "{model}"]
[env]
OPENAI_API_KEY = "sandbox"
[home]
".mine/config.json" = "{}"
"""


@pytest.mark.parametrize("name", recipes.available())
def test_packaged_recipe(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    assert recipe.version[0].isdigit()
    prompt = "--fix 'this' {model} $HOME"
    with_model = recipe.arguments(prompt, "some-model")
    assert with_model.count(prompt) == 1
    assert with_model[with_model.index(prompt) - 1] == "--"  # whatever a prompt looks like, it is no option
    assert "some-model" in with_model
    assert "{model}" not in recipe.arguments("x")
    assert not any(key.lower().endswith(("_proxy", "_base_url")) for key in recipe.env)


def test_what_comes_with_us() -> None:
    assert recipes.available() == ["claude-code", "codex", "opencode", "pi", "sdk-agent"]


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(MINE)
    recipe = recipes.load(str(file))
    assert (recipe.name, recipe.install.node, recipe.home) == ("mine", True, {".mine/config.json": "{}"})
    assert recipe.hosts == {"models.example": "openai"}  # names have no case
    assert recipe.arguments("do", "m1") == ["-m", "m1", "--go", "--prompt=do"]
    assert recipe.arguments("do") == ["--go", "--prompt=do"]


def test_a_program_that_is_there_already(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('title = "Mine"\n[run]\nprogram = "my-agent"\nargv = ["{prompt}"]\n')
    recipe = recipes.load(str(file))
    assert (recipe.install.binary, recipe.install.package) == ("my-agent", None)
    assert (recipe.version, recipe.hosts) == ("", {})


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('version = "1.0"', "", "version"),
        ("[install]", "[instal]", "install"),
        ("[run]", '[run]\nprogram = "mine"', "either .install., or program"),
        ('= "openai"', '= "gemini"', "there is no provider 'gemini': there are anthropic, openai"),
        ('= "openai"', "= []", "provider"),
        ('[hosts]\n"Models.Example" = "openai"', 'hosts = ["models.example"]', "table"),
        ('npm = "mine"', "", "npm"),
        ('npm = "mine"', 'npm = "mine"\npip = "mine"', "npm or pip"),
        ("node = true", "nodes = true", "nodes"),
        ("{prompt}", "", "prompt"),
        ('title = "Mine"', "title = Mine", "Invalid"),
        ('title = "Mine"', "title = 3", "title is a string, not 3"),
        ("[run]", "[run]\nprogram = 3", "run. program is a string, not 3"),
        ('["-m", "{model}"]', "[3]", "run. model_argv is a list of strings, not .3."),
        ('argv = ["{model}", "--go", "--prompt={prompt}"]', 'argv = "{prompt}"', "argv is a list of strings"),
        ("node = true", 'node = "yes"', "node is true or false, not 'yes'"),
        ('= "sandbox"', "= 1", "env. OPENAI_API_KEY is a string, not 1"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(MINE.replace(old, new))
    with pytest.raises(SetupError, match=complaint):
        recipes.load(str(file))


@pytest.mark.parametrize("name", ["nothing", "", "../recipes", "./absent.toml"])
def test_no_such_recipe(name: str) -> None:
    with pytest.raises(SetupError, match="claude-code"):
        recipes.load(name)


def test_the_least_recipe(tmp_path: Path) -> None:
    file = tmp_path / "least.toml"
    file.write_text('[run]\nprogram = "my-agent"\n')
    recipe = recipes.load(str(file))
    assert recipe.title == "least" and recipe.arguments("do it") == ["do it"]


def test_an_unknown_key(tmp_path: Path) -> None:
    file = tmp_path / "odd.toml"
    file.write_text('name = "odd"\n[run]\nprogram = "my-agent"\n')
    with pytest.raises(SetupError, match="unknown key name"):
        recipes.load(str(file))

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


PACKAGED = [
    f"{name}{variant}"
    for name in recipes.available()
    for variant in ["", *(f":{each}" for each in recipes.variants(name))]
]


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_recipe(name: str) -> None:
    recipe = recipes.load(name)
    assert (recipe.name, recipe.program) == (name, name.partition(":")[0])
    assert recipe.version[0].isdigit()
    prompt = "--fix 'this' {model} $HOME"
    for resume in [False, True] if recipe.resume_argv else [False]:
        with_model = recipe.arguments(prompt, "some-model", resume=resume)
        [at] = [n for n, each in enumerate(with_model) if each.endswith(prompt)]
        # So that no prompt is taken for an option.
        assert with_model[at] == f"--prompt={prompt}" or with_model[at - 1 : at + 1] == ["--", prompt]
        assert "some-model" in with_model
        assert "{model}" not in recipe.arguments("x", resume=resume)
    assert not any(key.lower().endswith(("_proxy", "_base_url")) for key in recipe.env)


def test_what_comes_with_us() -> None:
    known = ["claude-code", "codex", "gemini-cli", "opencode", "pi", "qwen-code", "sdk-agent"]
    assert recipes.available() == known
    assert recipes.variants("codex") == ["lite", "gpt-5.5", "unknown", "login"]


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(MINE)
    recipe = recipes.load(str(file))
    assert (recipe.name, recipe.install.node, recipe.home) == ("mine", True, {".mine/config.json": "{}"})
    assert recipe.hosts == {"models.example": "openai"}  # names have no case
    assert recipe.arguments("do", "m1") == ["-m", "m1", "--go", "--prompt=do"]
    assert recipe.arguments("do") == ["--go", "--prompt=do"]


VARIANTS = """
[variant.login]
title = "Mine, signed in"
env = {}
hosts = { "Chat.Example" = "openai" }
run = { model_argv = ["--in", "{model}"], default_model = "m0" }
[variant.login.home]
".mine/auth.json" = "token"
[variant."m-5.5".run]
default_model = "m-5.5"
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    file = tmp_path / "my:agents" / "mine.toml"
    file.parent.mkdir()
    file.write_text(MINE + VARIANTS)
    return str(file)


def test_a_variant_replaces_what_it_names(mine: str) -> None:
    plain, login = recipes.load(mine), recipes.load(f"{mine}:login")
    assert recipes.variants(mine) == recipes.variants(f"{mine}:login") == ["login", "m-5.5"]
    assert (login.name, login.program, login.title) == ("mine:login", "mine", "Mine, signed in")
    assert (login.env, login.home) == ({}, {".mine/auth.json": "token"})  # a table goes whole,
    assert login.hosts == {"chat.example": "openai"}
    assert login.arguments("do") == ["--in", "m0", "--go", "--prompt=do"]  # what is run key by key
    assert (login.install, login.version) == (plain.install, plain.version)
    assert (plain.name, plain.env) == ("mine", {"OPENAI_API_KEY": "sandbox"})
    assert plain.arguments("do") == ["--go", "--prompt=do"]


def test_variants_add_up(mine: str) -> None:
    both = recipes.load(f"{mine}:login:m-5.5")
    assert (both.name, both.env) == ("mine:login:m-5.5", {})
    assert both.arguments("do") == ["--in", "m-5.5", "--go", "--prompt=do"]
    assert recipes.load(f"{mine}:m-5.5:login").default_model == "m0"  # the last one has its way


@pytest.mark.parametrize("name", ["pi:nothing", "pi:", "pi:openai:nothing", "sdk-agent:login"])
def test_no_such_variant(name: str) -> None:
    complaint = f"{name.partition(':')[0]} has no variant '{name.rpartition(':')[2]}': "
    with pytest.raises(SetupError, match=complaint + "(there are openai, google, openrouter|it has none)$"):
        recipes.load(name)


@pytest.mark.parametrize(
    ("variant", "complaint"),
    [
        ("[variant.v.run]\nargv = []", r"\[variant.v\]: no {prompt} in \[run\] argv"),
        ("[variant.v.run]\nargs = ['{prompt}']", r"\[variant.v\]: .*args"),
        ("[variant.v]\nrun = 3", r"\[variant.v\]: \[run\] is a table, not 3"),
        ("[variant.v]\nversion = '2'", r"\[variant.v\]: version is the same for all"),
        ("[variant.v]\nhost = {}", r"\[variant.v\]: unknown key host"),
        ("[variant.v.variant.w]", r"\[variant.v\]: unknown key variant"),
        ("[variant.'a:b']", "no colon"),
        ("[variant]\nv = 3", "a variant is a table"),
        ("[[variant]]", "a variant is a table"),
    ],
)
def test_a_mistake_in_a_variant_is_named(tmp_path: Path, variant: str, complaint: str) -> None:
    """Also when the variant is not the one that is asked for."""
    file = tmp_path / "mine.toml"
    file.write_text(f"{MINE}{variant}\n")
    with pytest.raises(SetupError, match=complaint):
        recipes.load(str(file))


def test_a_resumed_conversation(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        MINE.replace("model_argv", 'resume_argv = ["{model}", "--again", "{prompt}"]\nmodel_argv')
    )
    recipe = recipes.load(str(file))
    assert recipe.arguments("do", "m1", resume=True) == ["-m", "m1", "--again", "do"]


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
        ('= "openai"', '= "gemini"', "there is no provider 'gemini': there are anthropic, openai, google"),
        ('= "openai"', "= []", "provider"),
        ('[hosts]\n"Models.Example" = "openai"', 'hosts = ["models.example"]', "table"),
        ('npm = "mine"', "", "npm"),
        ('npm = "mine"', 'npm = "mine"\npip = "mine"', "npm or pip"),
        ("node = true", "nodes = true", "nodes"),
        ("{prompt}", "", "prompt"),
        ("model_argv", 'resume_argv = ["--again"]\nmodel_argv', "no {prompt} in .run. resume_argv"),
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

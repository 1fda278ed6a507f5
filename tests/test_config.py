"""Settings: arguments win over the environment, the environment over the file; nothing wrong is taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from polar_mitm.config import Settings, load


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("POLAR_MITM_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "polar.toml"
    path.write_text(
        'engine = "http://file"\ntemperature = 0.5\nmax_tokens = 10\n[hosts]\n"A.Example" = "openai"\n'
    )
    return path


def test_defaults_sample_from_the_whole_distribution() -> None:
    settings = load()
    assert (settings.temperature, settings.top_p, settings.top_k) == (1.0, 1.0, 0)
    assert settings.max_tokens is None and settings.hosts == {}
    assert settings.model_dump() == Settings().model_dump()
    assert settings.head_timeout_s < 60  # the least patient harness


def test_precedence(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(file).engine == "http://file"
    monkeypatch.setenv("POLAR_MITM_ENGINE", "http://environment")
    monkeypatch.setenv("POLAR_MITM_MAX_TOKENS", "20")
    settings = load(file)
    assert (settings.engine, settings.temperature, settings.max_tokens) == ("http://environment", 0.5, 20)
    settings = load(file, engine="http://argument", temperature=None)
    assert (settings.engine, settings.temperature, settings.max_tokens) == ("http://argument", 0.5, 20)


def test_one_file_does_not_stay_for_the_next(file: Path) -> None:
    assert load(file).engine == "http://file"
    assert load().engine == ""


def test_hosts_from_file_and_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(file).hosts == {"a.example": "openai"}
    monkeypatch.setenv("POLAR_MITM_HOSTS", '{"B.example": "anthropic"}')
    assert load().hosts == {"b.example": "anthropic"}


@pytest.mark.parametrize(
    "text",
    [
        'unknown_key = "x"',
        'temperature = "hot"',
        "max_tokens = 0",
        "max_body_bytes = 0",
        '[hosts]\n"a.example" = "nobody"',
        "engine = [1]",
    ],
)
def test_a_wrong_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "polar.toml"
    path.write_text(text)
    with pytest.raises(ValidationError):
        load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("POLAR_MITM_MAX_TOKENS", "many"), ("POLAR_MITM_HOSTS", "not json"), ("POLAR_MITM_TOP_K", "1.5")],
)
def test_a_wrong_environment_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError):
        load()


def test_a_wrong_argument_is_refused() -> None:
    with pytest.raises(ValidationError, match="enigne"):
        load(enigne="http://typo")


def test_a_missing_or_broken_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("= nonsense")
    with pytest.raises(ValueError):
        load(tmp_path / "bad.toml")

"""Settings of a capture: one model, from a TOML file, `POLAR_MITM_*` variables, or arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

Provider = Literal["anthropic", "openai", "google"]


class Settings(BaseSettings):
    """What a capture can be told. Arguments win over the environment, the environment over the file.

    The sampling fields are the rollout's configuration: they replace what a harness asks for (both are
    recorded), because behaviour logprobs under a truncated distribution are biased against a trainer's.
    """

    model_config = SettingsConfigDict(
        env_prefix="POLAR_MITM_", env_nested_delimiter="__", extra="forbid", toml_file=None
    )

    engine: str = ""
    engine_model: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = Field(default=None, ge=1, description="cap on sampled tokens per call")
    max_answers: int = Field(default=16, ge=1, description="how many answers (n) one request may ask for")

    continuation: bool = True  # go on from the sampled ids instead of rendering them anew
    keep_reasoning: Literal["template", "always"] = "template"

    usage: Literal["scaled", "engine"] = Field(
        default="scaled",
        description="tokens that a harness is told: as shares of the window it believes in, or as counted",
    )
    context_windows: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict, description="windows that harnesses believe in: pattern of a model -> tokens"
    )
    window_reserve: float = Field(
        default=0.1, ge=0, lt=1, description="share of a smaller window kept for compactions, if scaled"
    )

    websocket: bool = Field(default=True, description="serve Responses over WebSocket; else 426: use HTTP")
    max_body_bytes: int = Field(default=32 << 20, ge=1)
    connect_timeout_s: float = 5.0
    head_timeout_s: float = 50.0  # below the 60 s after which the least patient harness gives up
    head_grace_s: float = 2.0  # how long a 200 is held back, so that a broken engine is still a 529
    idle_timeout_s: float = 600.0
    render_timeout_s: float = 5.0  # a rendering that takes longer is done without
    keepalive_s: float = 10.0
    retry_after_s: int = 5

    hosts: dict[Annotated[str, StringConstraints(to_lower=True)], Provider] = Field(
        default_factory=dict, description="more provider hosts: name -> provider"
    )
    flush_interval_s: float = 0.02  # commits begin at least this far apart, unless no other call is in flight

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load(file: Path | None = None, /, **given: Any) -> Settings:
    """Settings from `file`, the environment and arguments; arguments that are None count as not given.

    Raises:
        pydantic.ValidationError: a value has the wrong type, or a key is unknown.
        FileNotFoundError: `file` does not exist.
    """
    if file is not None and not file.is_file():
        raise FileNotFoundError(file)

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=file)

    return FromFile(**{k: v for k, v in given.items() if v is not None})

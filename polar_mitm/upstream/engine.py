"""What we know of an engine once it has been probed."""

from __future__ import annotations

from msgspec import Struct


class EngineInfo(Struct, frozen=True):
    """A probed engine. `policy_version` is its own word for its weights; `images` whether it reads them."""

    url: str
    model: str
    max_model_len: int = 0
    version: str = ""
    policy_version: str = ""
    images: bool = False

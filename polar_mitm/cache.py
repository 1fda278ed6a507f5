"""Where what we install lives: engines, models, harnesses."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """$POLAR_MITM_CACHE, or polar-mitm below $XDG_CACHE_HOME, or below ~/.cache."""
    if given := os.environ.get("POLAR_MITM_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polar-mitm"

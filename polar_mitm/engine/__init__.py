"""An engine of our own: vLLM in an environment of its own, a small default model, one managed server."""

from polar_mitm.cache import default_cache
from polar_mitm.engine.env import ensure_env, is_installed
from polar_mitm.engine.model import DEFAULT_MODEL, ensure_model
from polar_mitm.engine.node import ensure_node
from polar_mitm.engine.server import down, healthy, status, up
from polar_mitm.engine.state import EngineState

__all__ = [
    "DEFAULT_MODEL",
    "EngineState",
    "default_cache",
    "down",
    "ensure_env",
    "ensure_model",
    "ensure_node",
    "healthy",
    "is_installed",
    "status",
    "up",
]

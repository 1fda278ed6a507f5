"""It lives in polar_mitm.conformance now; import it from there."""

from polar_mitm.conformance.scripted_engine import ScriptedEngine

__all__ = ["ScriptedEngine"]

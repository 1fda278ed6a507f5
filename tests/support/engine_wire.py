"""It lives in polar_mitm.conformance now; import it from there."""

from polar_mitm.conformance.engine_wire import CREATED, EngineCall, Token, event, merge, sample, stream, whole

__all__ = ["CREATED", "EngineCall", "Token", "event", "merge", "sample", "stream", "whole"]

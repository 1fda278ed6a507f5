"""What is said of a request that cannot be read."""

from __future__ import annotations

from polar_mitm.errors import PolarError


def misread(error: Exception, where: str = "") -> PolarError:
    """The `bad_request` for one of `errors.UNREADABLE`; its message begins with the field that is wrong.

    `where`: the field that was being read; without, the whole body.
    """
    text, _, path = str(error).partition(" - at `$")
    if isinstance(error, RecursionError):
        text = "nested too deeply"
    field = (where + path.rstrip("`")).lstrip(".") or "body"
    return PolarError("bad_request", f"{field}: {text}")

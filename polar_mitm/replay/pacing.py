"""When to send which bytes of a recorded answer."""

from __future__ import annotations

from collections.abc import Iterator

from polar_mitm.types import Wire


def plan(wire: Wire, *, fast: bool) -> list[tuple[float, bytes]]:
    """The answer's pieces, each with the seconds after the request at which it is due.

    As recorded: the same bytes in the same pieces, the last of them last. `fast`: all at once, but for the
    last piece, which a capture lets go only after the record is durable.
    """
    pieces = list(_pieces(wire))
    if fast:
        head, tail = [p for _, p in pieces[:-1]], [p for _, p in pieces[-1:]]
        return [(0.0, data) for data in (b"".join(head), *tail) if data]
    return pieces


def _pieces(wire: Wire) -> Iterator[tuple[float, bytes]]:
    """A body that redaction made longer or shorter is cut where it was, as far as it goes."""
    body, done = wire.response_body, 0
    sizes = wire.chunk_sizes[: len(wire.chunk_at_ms)]
    for number, (size, at_ms) in enumerate(zip(sizes, wire.chunk_at_ms, strict=False)):
        end = len(body) if number + 1 == len(sizes) else done + size
        if piece := body[done:end]:
            yield at_ms / 1000, piece
        done = end
    if not sizes and body:
        yield 0.0, body

"""A vLLM-shaped server for benchmarks: raw asyncio, answers computed before the first request.

Every answer is the same: `num_prompt_tokens` prompt ids, then one SSE event per sampled token, as in vLLM
0.32; who does not ask for `return_token_ids` gets the same words without ids and logprobs. With
`chunk_delay_s` 0 the whole stream is one write; otherwise token k leaves k * `chunk_delay_s` after the
request. Only what a benchmark needs of HTTP/1.1: content-length bodies and keep-alive.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
from pathlib import Path
from typing import Any, Self

CREATED = 1_700_000_000
MODEL = "scripted"
_STREAM = (b'"stream":true', b'"stream": true')
_CAPTURE = (b'"return_token_ids":true', b'"return_token_ids": true')
_NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


def _events(num_tokens: int, num_prompt_tokens: int, *, capture: bool) -> list[bytes]:
    head = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": CREATED, "model": MODEL}

    def event(choice: dict[str, Any], **more: Any) -> bytes:
        payload = {**head, "choices": [{"index": 0, **choice}], **more}
        return b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"

    prompt = [i % 100_000 for i in range(num_prompt_tokens)]
    role = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    events = [event(role, prompt_token_ids=prompt) if capture else event(role)]
    for i in range(num_tokens):
        last = i == num_tokens - 1
        text = f" tok{i}"
        token = {"token": text, "logprob": -0.25, "bytes": list(text.encode()), "top_logprobs": []}
        choice = {
            "delta": {} if last else {"content": text},
            "logprobs": {"content": [token]} if capture else None,
            "finish_reason": "stop" if last else None,
        }
        events.append(event({**choice, "token_ids": [1000 + i]} if capture else choice))
    usage = {
        "prompt_tokens": num_prompt_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
        "completion_tokens": num_tokens,
    }
    tail = {**head, "choices": [], "usage": usage}
    events.append(b"data: " + json.dumps(tail, separators=(",", ":")).encode() + b"\n\ndata: [DONE]\n\n")
    return events


def _chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _stream(events: list[bytes]) -> list[bytes]:
    """The events as parts of one chunked response."""
    parts = [_chunked(event) for event in events]
    parts[0] = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        b"transfer-encoding: chunked\r\n\r\n" + parts[0]
    )
    parts[-1] += b"0\r\n\r\n"
    return parts


def _plain(payload: dict[str, Any]) -> bytes:
    body = json.dumps(payload).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class _Connection(asyncio.Protocol):
    def __init__(self, engine: FastEngine) -> None:
        self._engine = engine
        self._buffer = bytearray()
        self._timers: list[asyncio.TimerHandle] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers:
            timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end]).lower()
            mark = head.find(b"content-length:")
            length = int(head[mark + 15 :].split(b"\r\n", 1)[0]) if mark >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            wants_stream, wants_ids = (
                any(self._buffer.find(mark, end, end + 4 + length) > 0 for mark in marks)
                for marks in (_STREAM, _CAPTURE)
            )
            del self._buffer[: end + 4 + length]
            self._answer(head.split(b" ", 2)[1], wants_stream, wants_ids)

    def _answer(self, path: bytes, wants_stream: bool, wants_ids: bool) -> None:
        engine = self._engine
        if path != b"/v1/chat/completions" or not wants_stream:
            self._transport.write(engine.others.get(path, _NOT_FOUND))
            return
        engine.num_calls += 1
        parts = engine.parts[wants_ids]
        if engine.chunk_delay_s <= 0:
            self._transport.write(b"".join(parts))
            return
        loop = asyncio.get_running_loop()
        start = loop.time()
        self._transport.write(parts[0])
        self._timers = [
            loop.call_at(start + k * engine.chunk_delay_s, self._transport.write, part)
            for k, part in enumerate(parts[1:], 1)
        ]


class FastEngine:
    """The server, as an async context manager. It knows streaming chat only; anything else is a 404.

    `certificate`: a PEM file with key and certificate, to serve over TLS.
    """

    def __init__(
        self,
        *,
        num_tokens: int = 32,
        num_prompt_tokens: int = 1000,
        chunk_delay_s: float = 0.0,
        host: str = "127.0.0.1",
        port: int = 0,
        certificate: Path | None = None,
    ) -> None:
        self.parts = {
            capture: _stream(_events(num_tokens, num_prompt_tokens, capture=capture))
            for capture in (False, True)
        }
        self.others = {
            b"/health": b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            b"/version": _plain({"version": "0.32.0"}),
            b"/v1/models": _plain(
                {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 1 << 20}]}
            ),
        }
        self.chunk_delay_s = chunk_delay_s
        self.num_calls = 0
        self.url = ""
        self._host, self._port = host, port
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), self._host, self._port, backlog=1024, ssl=self._tls
        )
        self.url = (
            f"{'https' if self._tls else 'http'}://{self._host}:{self._server.sockets[0].getsockname()[1]}"
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()


async def _serve(options: argparse.Namespace) -> None:
    engine = FastEngine(
        num_tokens=options.tokens,
        num_prompt_tokens=options.prompt_tokens,
        chunk_delay_s=options.chunk_delay,
        certificate=options.certificate,
    )
    async with engine:
        print(engine.url, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32, help="sampled tokens per answer")
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="prompt ids per answer")
    parser.add_argument("--chunk-delay", type=float, default=0.0, help="seconds between tokens")
    parser.add_argument("--certificate", type=Path, help="PEM file with key and certificate: serve TLS")
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()

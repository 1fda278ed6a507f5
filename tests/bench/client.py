"""A load client that costs little: raw asyncio, TLS, keep-alive, chunked answers."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from dataclasses import dataclass, field

import msgspec

from tests.bench.processes import Side


@dataclass
class Load:
    """What a client saw: seconds to the first body byte and to the end, per call."""

    first_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    num_complete: int = 0


def request_bytes(side: Side, body: bytes) -> bytes:
    head = (
        f"POST {side.path} HTTP/1.1\r\nhost: {side.server_name}\r\ncontent-type: application/json\r\n"
        f"x-api-key: sk-bench-0123456789\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def chat_body(num_bytes: int, *, provider: str) -> bytes:
    """A conversation of about `num_bytes` with a system prompt, tools and history, for either wire."""
    words = _prose(num_bytes)
    tools = [_tool(i, provider) for i in range(10)]
    messages = [{"role": "user", "content": "Fix the failing test."}]
    body = {"model": "scripted", "stream": True, "max_tokens": 4096, "tools": tools, "messages": messages}
    if provider == "openai":
        body |= {"logprobs": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    while (size := len(msgspec.json.encode(body))) < num_bytes:
        role = "assistant" if messages[-1]["role"] == "user" else "user"
        start = len(messages) * 1000
        messages.append({"role": role, "content": words[start : start + max(1, min(1000, num_bytes - size))]})
    if messages[-1]["role"] != "user":
        messages.append({"role": "user", "content": "Go on."})
    return msgspec.json.encode(body)


def _prose(num_chars: int) -> str:
    """Text that compresses about as well as prompts do (four to one), always the same."""
    draw = random.Random(0)
    lexicon = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(800)]
    return " ".join(draw.choices(lexicon, k=num_chars // 4))


def _tool(number: int, provider: str) -> dict[str, object]:
    schema = {
        "type": "object",
        "properties": {f"parameter_{k}": {"type": "string", "description": "A value."} for k in range(10)},
    }
    description = "Runs something in the workspace and returns what it printed. " * 8
    if provider == "openai":
        function = {"name": f"tool_{number}", "description": description, "parameters": schema}
        return {"type": "function", "function": function}
    return {"name": f"tool_{number}", "description": description, "input_schema": schema}


def tls() -> ssl.SSLContext:
    """Trusts anything: the interceptor's certificate is not what is measured."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def call_repeatedly(side: Side, body: bytes, num_calls: int, load: Load) -> None:
    """`num_calls` calls on one connection, one after another."""
    encryption = None if side.plain else tls()
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", side.port, ssl=encryption, server_hostname=side.server_name if encryption else None
    )
    data = request_bytes(side, body)
    for _ in range(num_calls):
        start = time.perf_counter()
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{side.name}: {head[:200]!r}")
        first = None
        while True:
            size = int(await reader.readuntil(b"\r\n"), 16)
            first = first or time.perf_counter()
            await reader.readexactly(size + 2)
            if size == 0:
                break
        load.first_s.append(first - start)
        load.total_s.append(time.perf_counter() - start)
        load.num_complete += 1
    writer.close()

"""A vLLM-shaped server for `bench_continuation`: long prompts, rendered and echoed without looking at them.

    python -m tests.bench.continuing_engine PROMPT_TOKENS

Every plain prompt is the same ids; a request with more than one answer in it is rendered as that prompt, the
sampled ids and a few new ones, or, where the body says `RESPLIT`, with other ids in the answer's place.
"""

from __future__ import annotations

import asyncio
import json
import sys

END = 2
NEW = "198,1,872,198,30,31,32,2,198,1,77,198"
SAMPLED = [*range(1000, 1032), END]
OTHERS = [*range(3000, 3029), END]
RESPLIT = b"resplit"
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
_STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n%b0\r\n\r\n"
)
_MARK = b'"kv_transfer_params":{"prompt_token_ids":['


def _ids(ids: list[int]) -> str:
    return ",".join(map(str, ids))


def _events() -> list[bytes]:
    head = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 0, "model": "scripted"}
    events = []
    for n, token_id in enumerate(SAMPLED):
        last = n == len(SAMPLED) - 1
        choice = {
            "index": 0,
            "delta": {} if last else {"content": f" tok{n}"},
            "logprobs": {"content": [{"token": "x", "logprob": -0.25, "bytes": [], "top_logprobs": []}]},
            "finish_reason": "stop" if last else None,
            "token_ids": [token_id],
        }
        events.append(json.dumps({**head, "choices": [choice]}, separators=(",", ":")).encode())
    usage = {"prompt_tokens": 1, "total_tokens": 1, "completion_tokens": len(SAMPLED)}
    events.append(json.dumps({**head, "choices": [], "usage": usage}).encode())
    return [*events, b"[DONE]"]


class Engine:
    """Answers requests by their path."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self.prompt = _ids([10_000 + n % 100_000 for n in range(num_prompt_tokens)])
        self._rest = b"".join(b"data: " + event + b"\n\n" for event in _events())

    def answer(self, path: bytes, body: bytes) -> bytes:
        match path:
            case b"/v1/models":
                return b'{"object":"list","data":[{"id":"scripted","max_model_len":1048576}]}'
            case b"/version":
                return b'{"version":"0.32.0"}'
            case b"/tokenize":
                return b'{"tokens":[1,2,3]}'
            case b"/detokenize":
                return b'{"prompt":"the same"}'
            case b"/v1/chat/completions/render":
                return b'{"request_id":"x","token_ids":[%b]}' % self._render(body).encode()
        return b""

    def stream(self, body: bytes) -> bytes:
        """A chat completion, whose first event has the prompt ids."""
        at = body.rfind(_MARK)
        ids = body[at + len(_MARK) : body.rfind(b"]")] if at > 0 else self.prompt.encode()
        first = (
            b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}],"prompt_token_ids":[%b]}\n\n' % ids
        )
        data = first + self._rest
        return _STREAM % (b"%x\r\n%b\r\n" % (len(data), data))

    def _render(self, body: bytes) -> str:
        if len(body) < 1000:  # the probe
            if b"first" in body or b"then 2" in body:
                return f"1,2,3,{7 if b'first' in body else 8},{END},9,3"
            return "1,2" if b"add_generation_prompt" in body else "1,2,3"
        return f"{self.prompt},{_ids(OTHERS if RESPLIT in body else SAMPLED)},{NEW}"


async def serve(engine: Engine) -> None:
    """Print the URL, and answer for ever."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                mark = head.find(b"content-length:")
                length = int(head[mark + 15 :].split(b"\r\n", 1)[0]) if mark > 0 else 0
                body, path = await reader.readexactly(length), head.split(b" ", 2)[1]
                if path == b"/v1/chat/completions":
                    writer.write(engine.stream(body))
                elif answer := engine.answer(path, body):
                    writer.write(_HEAD % (len(answer), answer))
                else:
                    writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 24)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(Engine(int(sys.argv[1]))))

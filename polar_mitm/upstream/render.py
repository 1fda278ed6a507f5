"""What an engine is asked besides answers: messages to ids, and ids to text. No IO here.

Source: vLLM's `/v1/chat/completions/render` (the body is that of the chat completion itself), `/detokenize`,
and `kv_transfer_params.prompt_token_ids`, with which a chat completion takes its prompt as ids: the messages
are not rendered then, and tool and reasoning parsers do their work as ever.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import msgspec
from msgspec import Struct

from polar_mitm.token_ids import TokenIds
from polar_mitm.upstream.engine import Template
from polar_mitm.upstream.vllm import CHAT_PATH

RENDER_PATH = CHAT_PATH + "/render"
DETOKENIZE_PATH = "/detokenize"
MAX_BYTES = 32 << 20


class Lookup(Struct, frozen=True):
    """A small question for the engine: a body to POST to `path`."""

    path: str
    body: bytes

    @property
    def key(self) -> bytes:
        """Equal questions have equal keys."""
        return hashlib.blake2b(self.body, digest_size=16, person=self.path[-16:].encode()).digest()


def render(chat_body: bytes) -> Lookup:
    """Which ids would this chat completion's prompt be?"""
    return Lookup(RENDER_PATH, chat_body)


def detokenize(model: str, ids: bytes) -> Lookup:
    """Which text are these ids (JSON text without brackets)?"""
    return Lookup(DETOKENIZE_PATH, b'{"model":%b,"tokens":[%b]}' % (msgspec.json.encode(model), ids))


def with_prompt(chat_body: bytes, ids: TokenIds) -> bytes:
    """The body of a chat completion with its prompt as ids."""
    return b'%b,"kv_transfer_params":{"prompt_token_ids":[%b]}}' % (chat_body[:-1], ids.text)


_KEY = b'"token_ids"'


class _Detokenized(Struct):
    prompt: str


def rendered(answer: bytes) -> TokenIds:
    """The ids [P] in an answer to `render`.

    Raises:
        ValueError: it is something else.
    """
    # Parsing the whole answer for one list would take most of what a continuation takes.
    key = answer.find(_KEY)
    start, end = answer.find(b"[", key), answer.find(b"]", key) + 1
    if key < 0 or start < 0 or answer[key + len(_KEY) : start].strip() != b":":
        raise ValueError(f"not a rendering: {answer[:100]!r}")
    return TokenIds.from_json(answer[start:end])


def detokenized(answer: bytes) -> str:
    """The text in an answer to `detokenize`.

    Raises:
        ValueError: it is something else.
    """
    try:
        return msgspec.json.decode(answer, type=_Detokenized).prompt
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a text: {error}") from error


# --- learning a template --------------------------------------------------------------------------------


def template_probes(model: str) -> list[bytes]:
    """Chat bodies whose renderings `learnt` reads: with and without a generation prompt, and two answers."""

    def body(*turns: str, **fields: bool) -> bytes:
        messages = [
            {"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(turns)
        ]
        return msgspec.json.encode({"model": model, "messages": messages, **fields})

    return [
        body("q"),
        body("q", add_generation_prompt=False),
        # They end differently: what both renderings end with is what follows an answer.
        body("q", "first", "next"),
        body("q", "then 2", "next"),
    ]


def learnt(renderings: list[TokenIds]) -> Template | None:
    """What `template_probes`, rendered, say of the template; None where nothing is as in a chat template."""
    asked, history, one, other = (ids.text for ids in renderings)
    if not history or not asked.startswith(history + b","):
        return None
    after = None
    for ours, theirs in zip(reversed(one.split(b",")), reversed(other.split(b",")), strict=False):
        if ours != theirs:
            break
        after = int(ours)
    return Template(asked[len(history) + 1 :], after)


# --- remembering answers --------------------------------------------------------------------------------


class Answers:
    """Answers to lookups, by their key: the latest ones, up to `max_bytes` of them.

    `token_input` is off once the engine has used another prompt than the ids that it was given.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.token_input = True
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, key: bytes) -> bytes | None:
        """The answer, if it is still here."""
        if (answer := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
        return answer

    def put(self, key: bytes, answer: bytes) -> None:
        """Keep an answer; the oldest go where there are too many bytes."""
        self._num_bytes += len(answer) - len(self._kept.pop(key, b""))
        self._kept[key] = answer
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= len(self._kept.popitem(last=False)[1])

"""Models for the template suite: a chat template, a tokenizer trained on the spot, and how the model talks.

A `Model` renders as an engine does and speaks as a model of its family: `say` turns an answer into the text
that such a model samples. No weights: the tests decide what is said, and in which ids.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from polar_mitm.token_ids import TokenIds
from polar_mitm.upstream.engine import EngineInfo
from polar_mitm.upstream.render import RENDER_PATH, Lookup, learnt, template_probes

FOLDER = Path(__file__).parents[2] / "fixtures" / "templates"
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "<think>", "</think>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"),
    *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<tool_response>", "</tool_response>"),
)
VOCAB_SIZE = 900


@functools.cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE with every family's special tokens, trained on the templates' own words."""
    out = Tokenizer(models.BPE())
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    corpus = [path.read_text() for path in sorted(FOLDER.iterdir())]
    corpus += [json.dumps({"name": "Bash", "arguments": {"command": f"ls -l /tmp/{n}"}}) for n in range(50)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    out.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False),
    )
    out.add_tokens([AddedToken(text, special=False, normalized=False) for text in SPECIAL])
    return out


@dataclass(frozen=True)
class Said:
    """One answer, as an engine's parsers see it; arguments as JSON text, in the notation that is sampled."""

    text: str = ""
    reasoning: str = ""
    calls: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Model:
    """One family. `thinks` and `calls_tools`: how many calls a turn may have; `end` of a turn is sampled."""

    name: str
    file: str
    say: Callable[[Said], str]
    end: Callable[[Said], str]
    thinks: bool = False
    num_calls: int = 2
    text_beside_calls: bool = True
    values: dict[str, Any] = field(default_factory=dict)

    def render_text(self, body: dict[str, Any]) -> str:
        """What the template writes, with the message fields that an engine gives it."""
        messages = []
        for message in body["messages"]:
            message = {**message, "content": message.get("content") or ""}
            if message.get("reasoning"):
                message["reasoning_content"] = message["reasoning"]
            if message.get("tool_calls"):
                message["tool_calls"] = [
                    {"function": {**f, "arguments": json.loads(f["arguments"])}}
                    for f in (call["function"] for call in message["tool_calls"])
                ]
            messages.append(message)
        generate = body.get("add_generation_prompt", True)
        return _template(self.file).render(
            messages=messages, tools=body.get("tools"), add_generation_prompt=generate, **self.values
        )

    def render(self, body: dict[str, Any]) -> list[int]:
        return encode(self.render_text(body))

    def answer(self, lookup: Lookup) -> bytes | None:
        """The engine's answer to a lookup; None where the template refuses the messages."""
        body = json.loads(lookup.body)
        if lookup.path != RENDER_PATH:
            return json.dumps({"prompt": decode(body["tokens"])}).encode()
        try:
            return json.dumps({"token_ids": self.render(body)}).encode()
        except jinja2.TemplateError:
            return None

    @functools.cached_property
    def engine(self) -> EngineInfo:
        """What the probe makes of it."""

        seen = [TokenIds.of(self.render(json.loads(body))) for body in template_probes(self.name)]
        return EngineInfo("http://engine", self.name, template=learnt(seen))


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def decode(ids: Sequence[int]) -> str:
    text: str = tokenizer().decode(list(ids), skip_special_tokens=False)
    return text


def sampled(text: str, cuts: float, random: Random) -> list[int]:
    """Ids of `text` as a model might sample them: cut at random places, which BPE then does not join."""
    ids: list[int] = []
    piece = ""
    for char in text:
        if piece and random.random() < cuts and not any(_inside(piece, char, s) for s in SPECIAL):
            ids += encode(piece)
            piece = ""
        piece += char
    return ids + encode(piece)


def _inside(piece: str, char: str, special: str) -> bool:
    """Whether a cut before `char` may be inside a special token."""
    return any(piece.endswith(special[:k]) and special[k] == char for k in range(1, len(special)))


@functools.cache
def _template(file: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = _raise
    return environment.from_string((FOLDER / file).read_text())


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


# --- how they talk --------------------------------------------------------------------------------------


def _hermes(said: Said) -> str:
    calls = [f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in said.calls]
    return "\n".join(filter(None, [said.text, *calls]))


def _qwen3(said: Said) -> str:
    return f"<think>\n{said.reasoning}\n</think>\n\n{_hermes(said)}" if said.reasoning else _hermes(said)


def _llama(said: Said) -> str:
    calls = [f'{{"name": "{name}", "parameters": {arguments}}}' for name, arguments in said.calls]
    return said.text + "".join(calls)


def _harmony(said: Said) -> str:
    parts = [f"<|channel|>analysis<|message|>{said.reasoning}<|end|>"] if said.reasoning else []
    if said.calls:
        if said.text:
            parts.append(f"<|channel|>commentary<|message|>{said.text}<|end|>")
        ((name, arguments),) = said.calls
        parts.append(f" to=functions.{name}<|channel|>commentary json<|message|>{arguments}")
    else:
        parts.append(f"<|channel|>final<|message|>{said.text}")
    return "<|start|>assistant".join(parts)


def _glm(said: Said) -> str:
    parts = [f"<think>{said.reasoning}</think>", said.text]
    for name, arguments in said.calls:
        values = json.loads(arguments).items()
        pairs = [
            f"<arg_key>{key}</arg_key>\n<arg_value>{v if isinstance(v, str) else json.dumps(v)}</arg_value>\n"
            for key, v in values
        ]
        parts.append(f"<tool_call>{name}\n{''.join(pairs)}</tool_call>")
    return "".join(f"\n{part}" for part in parts if part)


def _im_end(said: Said) -> str:
    return "<|im_end|>"


QWEN25 = Model("qwen2.5", "qwen2.5.jinja", _hermes, _im_end)
QWEN3 = Model("qwen3", "qwen3.jinja", _qwen3, _im_end, thinks=True)
QWEN3_SILENT = Model("qwen3-silent", "qwen3.jinja", _hermes, _im_end, values={"enable_thinking": False})
QWEN3_OPENED = Model(
    "qwen3-opened",
    "qwen3.jinja",
    lambda said: f"{said.reasoning}\n</think>\n\n{_hermes(said)}",
    _im_end,
    thinks=True,
    values={"opens_thought": True},
)
LLAMA3 = Model(
    "llama3", "llama3.jinja", _llama, lambda said: "<|eot_id|>", num_calls=1, text_beside_calls=False
)
SMOLLM2 = Model("smollm2", "smollm2.jinja", lambda said: said.text, _im_end, num_calls=0)
HARMONY = Model(
    "harmony",
    "harmony.jinja",
    _harmony,
    lambda said: "<|call|>" if said.calls else "<|return|>",
    thinks=True,
    num_calls=1,
)
GLM = Model(
    "glm", "glm.jinja", _glm, lambda said: "<|observation|>" if said.calls else "<|user|>", thinks=True
)
ALL = (QWEN25, QWEN3, QWEN3_SILENT, QWEN3_OPENED, LLAMA3, SMOLLM2, HARMONY, GLM)

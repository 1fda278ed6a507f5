"""What we know of an engine once it has been probed."""

from __future__ import annotations

import re

from msgspec import Struct


class Template(Struct, frozen=True):
    """What the probe learnt of a model's chat template.

    `generation_prompt` are the ids that it ends a prompt with, so that the model answers (JSON text without
    brackets). `after_text` is the id that follows an answer of plain text where a user's message comes next:
    of an answer that was cut off, it says where the answer ends. None where the template does not say.
    """

    generation_prompt: bytes
    after_text: int | None = None


class EngineInfo(Struct, frozen=True):
    """A probed engine. `policy_version` is its own word for its weights; `images` whether it reads them.

    `template` is None where the engine does not render for us, or takes no token ids as a prompt: its calls
    cannot continue one another exactly. `tokenizer` is a fingerprint of text to ids. `weight_version` is what
    an engine whose weights can be updated calls them; "" where they stay as they are.
    """

    url: str
    model: str
    max_model_len: int = 0
    version: str = ""
    policy_version: str = ""
    images: bool = False
    tokenizer: str = ""
    template: Template | None = None
    weight_version: str = ""


_STEP = re.compile(r"step-(0|[1-9][0-9]*)")


def step_of(policy_version: str | None) -> int | None:
    """The number of optimiser steps that a version of ours stands for; None for another's.

    >>> step_of("step-12"), step_of("default"), step_of(None)
    (12, None, None)
    """
    found = _STEP.fullmatch(policy_version or "")
    return int(found[1]) if found else None

"""The tiny policy that is shipped, and the parts that made it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fixtures.tasks import secret_code
from fixtures.tiny_policy import warmup
from fixtures.tiny_policy.conversations import DATE, TEMPLATE, ZONE, place, recast, rendered
from fixtures.tiny_policy.demonstrator import PLANS, Scene, turn
from fixtures.tiny_policy.record import Demonstration, Demonstrator, scenes
from fixtures.tiny_policy.tokenizer import END_OF_TURN, SPECIAL, TAGS, phrases
from polar_mitm.tasks import Attempt, Task, load_tasks

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "fixtures" / "tiny_policy" / "model"
MAX_BYTES = 12 << 20
READ = {"type": "function", "function": {"name": "read", "description": "Read a file.", "parameters": {}}}
SCENE = Scene("amber-boat.txt", "calm-book.txt", "fox-fern-jade", "owl-oak-tin")


@cache
def shipped() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return shipped()


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def added(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [text for text in tokenizer.added_tokens_encoder if text not in (*SPECIAL, *TAGS)]


# --- what is shipped ------------------------------------------------------------------------------------


def test_the_folder_is_small_and_its_weights_float32_and_untied(tokenizer: PreTrainedTokenizerFast) -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < MAX_BYTES
    weights = load_file(MODEL / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert weights["lm_head.weight"].shape == weights["model.embed_tokens.weight"].shape
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert model.config.vocab_size == len(tokenizer) == len(weights["lm_head.weight"])
    assert model.config.eos_token_id == tokenizer.convert_tokens_to_ids(END_OF_TURN)


@given(st.text() | st.text("ab <|>_\n{\"}:'é\U0001f600"))
def test_ids_are_exactly_their_text(text: str) -> None:
    tokenizer = shipped()
    assert tokenizer.decode(ids(tokenizer, text), clean_up_tokenization_spaces=False) == text


def test_a_phrase_is_one_token_wherever_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    found = added(tokenizer)
    assert len(found) > 50
    for phrase in found:
        [one] = ids(tokenizer, phrase)
        assert tokenizer.decode([one]) == phrase
        around = ids(tokenizer, f"x\n{phrase}\n{{")
        assert one in around and tokenizer.decode(around) == f"x\n{phrase}\n{{"


def test_nothing_of_one_machine_or_day_is_in_a_phrase(tokenizer: PreTrainedTokenizerFast) -> None:
    everything = "\n".join(added(tokenizer))
    assert not any(DATE.search(each) or ZONE.search(each) for each in added(tokenizer))
    assert not re.search(r"polar-mitm|\.cache|/tmp/", everything)
    assert not any(re.search(rf"\b{word}-", everything) for word in secret_code.CODE_WORDS[0])


def test_a_word_is_the_same_token_everywhere(tokenizer: PreTrainedTokenizerFast) -> None:
    for word in secret_code.WORDS:
        [one] = ids(tokenizer, word)
        for text in (
            f"Read {word}.txt and",
            f'{{"path": "{word}-',
            f"\n{word}\n",
            f"a-{word}-b",
            f"cat {word}",
        ):
            assert one in ids(tokenizer, text), (word, text)


def test_the_template_that_is_shipped_is_the_one_that_it_was_trained_with(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert tokenizer.chat_template == TEMPLATE.read_text()


# --- tasks ----------------------------------------------------------------------------------------------


def drawn(split: str, seed: int = 0, number: int = 200) -> list[Task]:
    source = ROOT / "fixtures" / "tasks" / "secret_code.py"
    return list(islice(load_tasks(source, split, seed), number))


def test_tasks_are_the_same_for_the_same_seed() -> None:
    as_told = [(t.task_id, t.prompt, t.files) for t in drawn("train", 3)]
    assert as_told == [(t.task_id, t.prompt, t.files) for t in drawn("train", 3)]
    assert as_told != [(t.task_id, t.prompt, t.files) for t in drawn("train", 4)]


def test_no_file_name_and_no_code_is_in_both_splits() -> None:
    def texts(split: str) -> set[str]:
        return {
            text.strip() for task in drawn(split) for pair in task.files.items() for text in map(str, pair)
        }

    assert texts("train") and texts("test") and not texts("train") & texts("test")


def test_only_the_code_alone_earns(tmp_path: Path) -> None:
    [task] = drawn("train", number=1)
    right, *others = (str(code).strip() for code in task.files.values())

    def reward(said: str) -> float:
        return secret_code.exact_code(Attempt(task, tmp_path, said, 0, "completed"))[0]

    assert task.metadata["code"] == right and str(task.files[task.metadata["path"]]).strip() == right
    assert reward(right) == reward(f"\n{right}\n") == 1.0
    earnless = [
        *others,
        "",
        f"The code is {right}.",
        f"{right}\n{right}",
        "\n".join([right, *others]),
        right[:-1],
    ]
    assert [said for said in earnless if reward(said) != 0.0] == []


# --- how it was made ------------------------------------------------------------------------------------


def demonstration(plan: str, scene: Scene = SCENE) -> Demonstration:
    """As a harness with one tool would have it."""
    messages: list[dict[str, Any]] = [
        {
            "role": "system",
            "content": "Docs are in /cache/docs. Today is 2026-11-20.\n<timezone>Etc/UTC</timezone>",
        },
        {"role": "user", "content": secret_code.prompt(scene.path)},
    ]
    script = Demonstrator({secret_code.prompt(scene.path): (plan, scene)})
    while True:
        answer = script({"messages": messages, "tools": [READ]}, 0)
        messages.append({"role": "assistant", "content": answer.text})
        if not answer.tool_calls:
            return Demonstration("mine", plan, scene, messages, [READ], "/cache")
        [(name, arguments)] = answer.tool_calls
        call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
        messages[-1]["tool_calls"] = [call]
        there = json.loads(arguments)["path"] == scene.path
        messages.append({"role": "tool", "tool_call_id": "1", "content": scene.code if there else "no file"})


def test_plans_are_right_too_rarely() -> None:
    assert sum(share for share, _ in PLANS.values()) == pytest.approx(1.0)
    earning = {plan for plan in PLANS if demonstration(plan).messages[-1]["content"] == SCENE.code}
    assert earning == {"right", "second try"}
    assert 0.3 < sum(PLANS[plan][0] for plan in earning) < 0.5


def test_the_demonstrator_uses_the_tool_that_is_there() -> None:
    shell = {"type": "function", "function": {"name": "exec_command"}}
    assert turn("read", SCENE, [READ]).tool_calls == (("read", '{"path": "amber-boat.txt"}'),)
    assert turn("read", SCENE, [shell]).tool_calls == (("exec_command", '{"cmd": "cat amber-boat.txt"}'),)
    with pytest.raises(ValueError, match="no way to read"):
        turn("read", SCENE, [])


def test_a_conversation_is_recast_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    mould = demonstration("second try")
    rng = random.Random(0)
    scene, where = next(scenes(rng)), place(rng)
    text = json.dumps(recast(mould, scene, where))
    assert not any(
        old in text for old in (*asdict(SCENE).values(), "/cache/docs. Today is 2026", "2026-11-20")
    )
    assert scene.path in text and scene.other in text and scene.code in text and where.cache in text
    expected = json.dumps(demonstration("second try", scene).messages)
    moved = expected.replace("/cache/docs", f"{where.cache}/docs").replace("2026-11-20", where.day)
    assert text == moved.replace("Etc/UTC", where.zone)


def test_nothing_of_the_test_split_is_demonstrated() -> None:
    for scene in islice(scenes(random.Random(1)), 200):
        assert {secret_code.split_of(text) for text in asdict(scene).values()} == {"train"}


def test_every_turn_is_a_continuation_of_what_was_sampled(tokenizer: PreTrainedTokenizerFast) -> None:
    """What the model is warmed up on is what an engine goes on from: prompt, then exactly the answer."""
    for plan in PLANS:
        made = demonstration(plan)
        whole = ids(tokenizer, rendered(tokenizer.apply_chat_template, made.messages, made.tools))
        said = warmup.answers(whole, tokenizer)
        for at, message in enumerate(made.messages):
            if message["role"] == "assistant":
                before = rendered(
                    tokenizer.apply_chat_template, made.messages[:at], made.tools, generate=True
                )
                start = len(ids(tokenizer, before))
                assert whole[:start] == ids(tokenizer, before) and not said[start - 1] and said[start]
                end = whole.index(tokenizer.convert_tokens_to_ids(END_OF_TURN), start)
                assert all(said[start : end + 1]) and not any(said[end + 1 : end + 2])
        assert sum(said) > 0 and len(said) == len(whole)


def test_phrases_are_what_all_have_in_common() -> None:
    texts = [
        "A paragraph of the prompt,\nof two lines.\n\n"
        f"Made on 2026-01-0{number}, it says.\n\n"
        f"for {letter} alone, this is\nand this line is for all\n\n"
        f"home is /cache{number}/docs of the harness<|im_end|>"
        for number, letter in enumerate("abc")
    ]
    found = phrases(texts, ["/cache0", "/cache1", "/cache2"])
    assert found == [
        "A paragraph of the prompt,\nof two lines.",
        "/docs of the harness",
        "and this line is for all",
    ]
    assert "for a alone, this is\nand this line is for all" in phrases(texts, [], share=0.3)


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[list[list[int]]]:
    moulds = [demonstration(plan) for plan in PLANS]
    return warmup.batches(moulds, tokenizer, random.Random(0), 6)


def test_the_loss_is_that_of_each_conversation_by_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = warmup.fresh_model(tokenizer).double()
    batch = next(batches(tokenizer))
    found = warmup.loss(model, batch, lambda each: warmup.answers(each, tokenizer), tokenizer.pad_token_id)
    terms = []
    for each in batch:
        said = torch.tensor(warmup.answers(each, tokenizer))[1:]
        logits = model(torch.tensor([each])).logits[0, :-1]
        terms.append(F.cross_entropy(logits[said], torch.tensor(each)[1:][said], reduction="none"))
    torch.testing.assert_close(found, torch.cat(terms).mean(), rtol=1e-9, atol=1e-9)


def test_what_is_saved_is_what_was_trained(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = warmup.fresh_model(tokenizer)
    drawn = batches(tokenizer)
    prompt = torch.tensor([next(drawn)[0]])
    warmup.train(model, drawn, tokenizer, steps=2)
    trained = model(prompt).logits.detach()
    warmup.save(model, tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not again.config.tie_word_embeddings and torch.equal(again(prompt).logits, trained)

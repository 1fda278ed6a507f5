"""Other trainers' formats, each read by the program that it is for, or by the SDK whose objects it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from openai.types.responses import Response
from openai.types.responses.response_input_item_param import ResponseInputItemParam
from pydantic import TypeAdapter

from polar_mitm.store import Recorder
from polar_mitm.types import EVALUATION, Message, ModelCall, Reward, Rollout, TextPart, ToolCall
from tests.cli.conftest import Polar, sampled

TOOL = {"type": "function", "function": {"name": "sh", "description": "", "parameters": {"type": "object"}}}
SYSTEM, ASK = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "List."}
ARGUMENTS = '{"command": "ls", "limit": 3}'
CALLED = {
    "role": "assistant",
    "content": None,
    "reasoning": "Look first.",
    "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "sh", "arguments": ARGUMENTS}}],
}
RESULT = {"role": "tool", "tool_call_id": "t1", "content": "a.txt"}


def turn(
    rollout_id: str, seq: int, prompt: int, answer: int, messages: list[Any], said: Message
) -> ModelCall:
    body = json.dumps({"messages": messages, "tools": [TOOL]}).encode()
    return sampled(rollout_id, seq, prompt, answer, upstream_body=body, answer=said, policy_version="step-3")


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """A rollout of two turns that earned 1, one that failed and earned 0, one that nobody judged, and an
    evaluation's."""
    calling = Message("assistant", reasoning="Look first.", tool_calls=[ToolCall("t1", "sh", ARGUMENTS)])
    wrong = Message("assistant", tool_calls=[ToolCall("t2", "sh", "ls -l")])
    done = Message("assistant", [TextPart("One file: caf\u00e9.txt")])
    calls = [
        turn("rollout-A", 0, 10, 4, [SYSTEM, ASK], calling),
        turn("rollout-A", 1, 20, 6, [SYSTEM, ASK, CALLED, RESULT], done),
        turn("rollout-B", 0, 10, 5, [SYSTEM, ASK], wrong),
        turn("rollout-C", 0, 10, 5, [SYSTEM, ASK], done),
        turn("rollout-D", 0, 10, 5, [SYSTEM, ASK], done),
    ]
    path = tmp_path / "runs.duckdb"
    with Recorder(path, share=False) as recorder:
        for name in "ABC":
            recorder.rollout(Rollout(f"rollout-{name}", group_id="g", status="completed"))
        recorder.rollout(Rollout("rollout-D", group_id=f"{EVALUATION}0/g", status="completed"))
        stored = [recorder.call(call) for call in calls]
        recorder.reward(Reward("rollout-A", "reward", 0.25))
        recorder.reward(Reward("rollout-A", "reward", 1.0, at=1.0))  # judged again
        recorder.reward(Reward("rollout-B", "reward", 0.0))
        recorder.reward(Reward("rollout-D", "reward", 1.0))
        recorder.reward(Reward("rollout-B", "style", 0.5))
        assert all(each.result(30) for each in stored)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_trl_trains_on_it(
    polar: Polar, judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "trl.parquet"
    told = polar("export", "-s", judged, "-o", out, "--format", "trl")
    assert told.code == 0 and "2 trajectories written" in told.out
    assert "1 no 'reward'" in told.err and "1 of evaluations" in told.err
    rows = Dataset.from_parquet(str(out), cache_dir=str(tmp_path / "cache"))
    assert rows["prompt_ids"][0] == list(range(1, 11))
    assert rows["completion_ids"][0] == list(range(11, 27))
    assert rows["env_mask"][0] == [1] * 4 + [0] * 6 + [1] * 6
    assert rows["logprobs"][0] == [-0.25] * 4 + [0.0] * 6 + [-0.25] * 6
    assert list(rows["reward"]) == [1.0, 0.0] and list(rows["group_id"]) == ["g", "g"]

    from transformers import AutoModelForCausalLM, Qwen3Config
    from trl import GRPOConfig, GRPOTrainer

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    shape = {
        "vocab_size": 97,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(num_attention_heads=2, num_key_value_heads=2, **shape)
    )
    before = model.lm_head.weight.detach().clone()
    told_to: list[dict[str, Any]] = []

    def replay(prompts: list[str], trainer: Any) -> dict[str, Any]:
        told_to.extend(rows)
        return {n: rows[n][:] for n in ("prompt_ids", "completion_ids", "logprobs", "env_mask", "reward")}

    def reward(reward: list[float], **_: Any) -> list[float]:
        return reward

    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        rollout_func=replay,
        processing_class=_tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 2),
        args=GRPOConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=2,
            num_generations=2,
            max_steps=1,
            learning_rate=0.01,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
        ),
    )
    trainer.train()
    assert len(told_to) == 2 and not before.equal(model.lm_head.weight)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="w0", eos_token="w1")


def test_verl_has_the_fields_of_an_agent_loop(polar: Polar, judged: Path, tmp_path: Path) -> None:
    out = tmp_path / "verl.parquet"
    assert polar("export", "-s", judged, "-o", out, "--format", "verl", "--json").json == {
        "path": str(out),
        "what": "trajectories",
        "format": "verl",
        "num_rows": 2,
        "left_out": {"no 'reward'": 1, "of evaluations": 1},
    }
    table = pq.read_table(out)
    first = table.to_pylist()[0]
    assert first == {
        "prompt_ids": list(range(1, 11)),
        "response_ids": list(range(11, 27)),
        "response_mask": [1] * 4 + [0] * 6 + [1] * 6,
        "response_logprobs": [-0.25] * 4 + [0.0] * 6 + [-0.25] * 6,
        "reward_score": 1.0,
        "num_turns": 2,
        "uid": "g",
        "data_source": "polar-mitm",
        "trajectory_id": "rollout-A-call-1",
        "rollout_id": "rollout-A",
        "policy_version": "step-3",
    }
    assert b"[R] 1 where" in table.schema.field("response_mask").metadata[b"doc"]


def test_nemo_gym_rollouts_are_openais_objects(polar: Polar, judged: Path, tmp_path: Path) -> None:
    out = tmp_path / "rollouts.jsonl"
    assert polar("export", "-s", judged, "-o", out, "--format", "nemo-gym").code == 0
    good, bad = lines(out)
    asked = good["responses_create_params"]
    TypeAdapter(list[ResponseInputItemParam]).validate_python(asked["input"])
    assert [(item["role"], item["content"]) for item in asked["input"]] == [
        ("system", "Be brief."),
        ("user", "List."),
    ]
    answered = [item for item in good["response"]["output"] if item["type"] != "function_call_output"]
    response = Response.model_validate({**good["response"], "output": answered})
    assert response.output_text == "One file: caf\u00e9.txt"
    kinds = [item["type"] for item in good["response"]["output"]]
    assert kinds == ["reasoning", "function_call", "function_call_output", "message"]
    first, last = good["response"]["output"][1], good["response"]["output"][3]
    assert first["prompt_token_ids"] == list(range(1, 11)) and first["arguments"] == ARGUMENTS
    assert first["generation_token_ids"] == list(range(11, 15))
    # What a trainer checks: each prompt begins with all that came before it.
    assert last["prompt_token_ids"][:14] == first["prompt_token_ids"] + first["generation_token_ids"]
    assert last["generation_log_probs"] == [-0.25] * 6
    assert (good["reward"], bad["reward"]) == (1.0, 0.0)
    assert bad["response"]["output"][0]["arguments"] == "ls -l"


def test_sft_chat_renders(polar: Polar, judged: Path, tmp_path: Path) -> None:
    out = tmp_path / "chat.jsonl"
    told = polar("export", "-s", judged, "-o", out, "--format", "sft-chat", "--min-reward", "0.5")
    assert told.code == 0 and "1 reward below 0.5" in told.err
    rows = load_dataset("json", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    messages, tools = rows[0]["messages"], rows[0]["tools"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"][0]["function"]["arguments"] == {"command": "ls", "limit": 3}
    assert messages[2]["reasoning_content"] == "Look first." and "weight" not in messages[2]
    assert tools == [TOOL]
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (Path(__file__).parents[2] / "fixtures" / "templates" / "qwen3.jinja").read_text()
    text = render_jinja_template([messages], tools=tools, chat_template=template)[0][0]
    assert "One file: caf\u00e9.txt" in text and '"limit": 3' in text


def test_which_verdict_counts_is_as_in_train(polar: Polar, tmp_path: Path) -> None:
    def exported(*verdicts: Reward, options: tuple[str, ...] = ()) -> Any:
        path, out = tmp_path / "s.duckdb", tmp_path / "x.parquet"
        path.unlink(missing_ok=True)
        with Recorder(path, share=False) as recorder:
            for name in "AB":
                recorder.rollout(Rollout(f"rollout-{name}", status="completed"))
                recorder.call(sampled(f"rollout-{name}", 0, 10, 4))
            assert all([recorder.reward(each).result(30) for each in verdicts])
        return polar("export", "-s", path, "-o", out, "--format", "trl", "--force", *options)

    only = exported(Reward("rollout-A", "score", 1.0), Reward("rollout-B", "score", float("nan")))
    assert only.code == 0 and "1 trajectories written" in only.out and "1 score nan" in only.err
    two = [Reward("rollout-A", "score", 1.0), Reward("rollout-A", "style", 1.0)]
    assert "--reward: say which verdict counts: 'score', 'style'" in exported(*two).err
    assert exported(*two, options=("--reward", "style")).code == 0
    assert exported(*two, options=("--reward", "taste")).code == 2


@pytest.mark.parametrize("format", ["nemo-gym", "sft-chat"])
def test_a_request_that_was_not_stored(polar: Polar, tmp_path: Path, format: str) -> None:
    path, out = tmp_path / "s.duckdb", tmp_path / "x.jsonl"
    with Recorder(path, share=False) as recorder:
        recorder.rollout(Rollout("rollout-A", status="completed"))
        recorder.call(sampled("rollout-A", 0, 10, 4))
        assert recorder.reward(Reward("rollout-A", "reward", 1.0)).result(30)
    told = polar("export", "-s", path, "-o", out, "--format", format)
    assert told.code == 0 and "1 trajectory whose last request was not stored" in told.err, told.err


def test_what_is_context_here_is_not_trained_again(polar: Polar, tmp_path: Path) -> None:
    """Two branches share their first answer: it trains in one of them."""
    first, left = Message("assistant", [TextPart("one")]), Message("assistant", [TextPart("left")])
    said = {"role": "assistant", "content": "one"}
    calls = [
        turn("rollout-A", 0, 10, 4, [ASK], first),
        turn("rollout-A", 1, 20, 6, [ASK, said, ASK], left),
        turn("rollout-A", 2, 30, 2, [ASK, said, SYSTEM], left),
    ]
    calls[2].prompt_token_ids = [*range(1, 15), *range(50, 66)]
    path, out = tmp_path / "runs.duckdb", tmp_path / "chat.jsonl"
    with Recorder(path, share=False) as recorder:
        recorder.rollout(Rollout("rollout-A", status="completed"))
        for call in calls:
            recorder.call(call)
        assert recorder.reward(Reward("rollout-A", "reward", 1.0)).result(30)
    assert polar("export", "-s", path, "-o", out, "--format", "sft-chat").code == 0
    weights = [[m.get("weight") for m in row["messages"] if m["role"] == "assistant"] for row in lines(out)]
    assert sorted(weights, key=str) == [[0, None], [None, None]]
    gym = tmp_path / "gym.jsonl"
    assert polar("export", "-s", path, "-o", gym, "--format", "nemo-gym").code == 0
    trained = [[bool(i.get("generation_token_ids")) for i in row["response"]["output"]] for row in lines(gym)]
    assert sorted(trained) == [[False, False, True], [True, False, True]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "trl", "--what", "calls"], "take trajectories"),
        (["--min-reward", "1"], "is for other trainers' formats"),
    ],
)
def test_what_does_not_go_together(
    polar: Polar, judged: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    told = polar("export", "-s", judged, "-o", tmp_path / "x", *options)
    assert told.code == 2 and message in told.err
    assert [each.name for each in tmp_path.iterdir()] == ["runs.duckdb"]

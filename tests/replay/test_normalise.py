"""Each rule takes out what it names and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from polar_mitm.replay.compare import differences
from polar_mitm.replay.normalise import Normal, normalise
from polar_mitm.replay.rules import RULES, Rule
from polar_mitm.types import Wire
from tests.replay.requests import wire

U1, U2 = "01a1f848-28fb-74b1-b240-6f287556f98c", "e3631878-cac8-466d-b581-82cae5f21080"
S1, S2 = "ses_e07a1ce74ffenuF9068I586Vy6", "ses_e07a1abdcffeK1KhYeVqD2T6N4"
MESSAGE, SYSTEM = "body.messages.0.content", "body.system.0.text"
PROCESS = "Process running with session ID"
SAID = "body.contents.2.parts.0.functionResponse.response.output"
SHELL = "Background shell started.\nid: bg_"
SAVED = "The full output has been saved to: /home/agent/.qwen/tmp/c5/run_shell_command_"
OUTPUT, OUTPUT_TEXT = "body.input.0.output", "body.input.0.output.0.text"

# Two values of what each pattern names, as the programs sent them.
EXAMPLES: list[tuple[str, str, Any, Any]] = [
    ("headers.authorization", "credential", "Bearer one", "Bearer two"),
    ("headers.x-api-key", "credential", "one", "two"),
    ("headers.x-goog-api-key", "credential", "one", "two"),
    ("headers.content-length", "length", "40196", "40195"),
    ("headers.x-claude-code-prev-tool-durations", "duration", "Bash=38,Edit=4", "Bash=37,Edit=5"),
    ("headers.x-claude-code-agent-id", "agent_id", "ad08a0a99dc5ace5e", "a7061e44812804f58"),
    ("headers.user-agent", "kernel", "pi (linux 6.18.44-a; x64)", "pi (linux 6.1.0; x64)"),
    ("headers.x-session-id", "session_id", S1, S2),
    ("headers.x-session-affinity", "session_id", S1, S2),
    ("headers.x-parent-session-id", "session_id", S1, S2),
    *[
        (f"headers.{name}", rule, f"{U1}{tail}", f"{U2}{tail}")
        for name, rule, tail in [
            ("x-client-request-id", "request_id", ""),
            ("x-claude-code-session-id", "session_id", ""),
            ("x-claude-code-prompt-id", "prompt_id", ""),
            ("session-id", "session_id", ""),
            ("thread-id", "thread_id", ""),
            ("x-codex-parent-thread-id", "thread_id", ""),
            ("x-codex-window-id", "window_id", ":0"),
        ]
    ],
    ("headers.x-codex-turn-metadata", "turn_metadata", f'{{"turn_id":"{U1}"}}', f'{{"turn_id":"{U2}"}}'),
    (
        "headers.x-codex-turn-metadata",
        "turn_time",
        '{"turn_started_at_unix_ms":1795166841317}',
        '{"turn_started_at_unix_ms":1795166852133}',
    ),
    (SYSTEM, "checksum", "x; cch=70f84;", "x; cch=44874;"),
    (SYSTEM, "prompt_id", f"x; cc_prompt_id={U1};", f"x; cc_prompt_id={U2};"),
    (SYSTEM, "date", "Today's date: Fri Nov 20 2026", "Today's date: Mon Dec 07 2026"),
    (SYSTEM, "install_path", "/a/harness/pi-0.87.1/node_modules/x", "/b/c/harness/pi-0.87.1/node_modules/x"),
    ("body.metadata.user_id", "device_id", f'{{"device_id":"{"a" * 64}"}}', f'{{"device_id":"{"b" * 64}"}}'),
    ("body.metadata.user_id", "session_id", json.dumps({"session_id": U1}), json.dumps({"session_id": U2})),
    (MESSAGE, "agent_id", "agentId: ad08a0a99dc5ace5e (", "agentId: a7061e44812804f58 ("),
    (MESSAGE, "agent_id", "with to: 'ad08a0a99dc5ace5e'", "with to: 'a7061e44812804f58'"),
    (MESSAGE, "task_id", "in background with ID: bo6gyvffv. O", "in background with ID: bwmm57yix. O"),
    (MESSAGE, "task_id", "<task-id>bo6gyvffv</task-id>", "<task-id>bwmm57yix</task-id>"),
    (MESSAGE, "task_id", "/tasks/bo6gyvffv.output", "/tasks/bwmm57yix.output"),
    (MESSAGE, "task_id", f'<task id="{S1}" state', f'<task id="{S2}" state'),
    (MESSAGE, "user_number", "/tmp/claude-2100046121/-workspace", "/tmp/claude-0/-workspace"),
    (MESSAGE, "session_id", f"-workspace/{U1}/tasks/", f"-workspace/{U2}/tasks/"),
    (MESSAGE, "duration", "<duration_ms>2015</duration_ms>", "<duration_ms>16</duration_ms>"),
    (MESSAGE, "kernel", "OS Version: Linux 6.18.44-a\n", "OS Version: Linux 6.1\n"),
    (MESSAGE, "date", "Today's date is 2026-11-20.", "Today's date is 2026-12-07."),
    ("body.client_metadata.x-codex-turn-metadata", "turn_metadata", f'{{"a":"{U1}"}}', f'{{"a":"{U2}"}}'),
    ("body.client_metadata.turn_id", "client_metadata", U1, U2),
    (
        "body.client_metadata.x-codex-turn-metadata",
        "turn_time",
        '{"turn_started_at_unix_ms":1795166841317}',
        '{"turn_started_at_unix_ms":1795166852133}',
    ),
    ("body.client_metadata", "metadata_order", {"a": 1, "b": 2}, {"b": 2, "a": 1}),
    (
        "body.client_metadata.x-codex-ws-stream-request-start-ms",
        "request_time",
        "1795149077627",
        "1795149077628",
    ),
    ("headers.sec-websocket-key", "socket_key", "7qRdCOzRqaKF/wsj/R3XVQ==", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("body.prompt_cache_key", "cache_key", U1, U2),
    ("body.input.0.id", "item_id", f"msg_{U1}", f"msg_{U2}"),
    ("body.input.0.internal_chat_message_metadata_passthrough.turn_id", "turn_id", U1, U2),
    ("body.input.0.internal_chat_message_metadata_passthrough.create_time", "item_time", 1.5, 2.5),
    ("body.input.0.content.0.text", "date", "<current_date>2026-11-20<", "<current_date>2026-12-07<"),
    (
        "body.input.0.content.0.text",
        "agent_id",
        f'<subagent_notification>\n{{"agent_path":"{U1}"',
        f'<subagent_notification>\n{{"agent_path":"{U2}"',
    ),
    (OUTPUT, "chunk_id", "Chunk ID: d741d6\nx", "Chunk ID: a7ca0d\nx"),
    (OUTPUT, "duration", "a\nWall time: 0.0001 seconds\n", "a\nWall time: 1 seconds\n"),
    (OUTPUT, "process_id", f"{PROCESS} 26659\n", f"{PROCESS} 4\n"),
    (OUTPUT, "agent_id", f'{{"agent_id":"{U1}"', f'{{"agent_id":"{U2}"'),
    (OUTPUT, "nickname", '"x","nickname":"Russell"}', '"x","nickname":"Epicurus"}'),
    (OUTPUT_TEXT, "duration", "Wall time 0.2 seconds\n", "Wall time 11 seconds\n"),
    (OUTPUT_TEXT, "duration", '"wall_time_seconds":7.2e-6,', '"wall_time_seconds":0.1,'),
    (OUTPUT_TEXT, "chunk_id", '{"chunk_id":"c74d39",', '{"chunk_id":"7df8bf",'),
    ("body.metadata.sessionId", "session_id", U1, U2),
    ("body.metadata.promptId", "session_id", f"{U1}########0/automatic/6", f"{U2}########0/automatic/6"),
    ("body.metadata.promptId", "agent_id", f"{U1}#an-agent-73bfa6b3#0", f"{U1}#an-agent-9b6ad450#0"),
    (MESSAGE, "date", "Today's date is Friday, May 1, 2026.\n", "Today's date is Sunday, June 14, 2026.\n"),
    (MESSAGE, "date", "The current date is: Friday, May 1, 2026", "The current date is: Sunday, May 3, 2026"),
    (MESSAGE, "process_id", f"{SHELL}c5e5688c\npid: 47\n", f"{SHELL}c5e5688c\npid: 56\n"),
    (MESSAGE, "task_id", f"{SHELL}c5e5688c\n", f"{SHELL}0d5d2ffa\n"),
    (MESSAGE, "task_id", "file: /a/shell-bg_c5e5688c.output\n", "file: /a/shell-bg_0d5d2ffa.output\n"),
    (MESSAGE, "session_id", f"/background-shells/{U1}/shell-a", f"/background-shells/{U2}/shell-a"),
    (MESSAGE, "session_id", f"/subagents/{U1}/agent-a", f"/subagents/{U2}/agent-a"),
    (MESSAGE, "output_id", f"{SAVED}fc3587617e31.output\n", f"{SAVED}8cc1bf38d856.output\n"),
    ("headers.x-gemini-api-privileged-user-id", "installation_id", U1, U2),
    (
        "body.contents.0.parts.0.text",
        "date",
        "Today's date is Friday, November 20, 2026 (formatted",
        "Today's date is Monday, December 7, 2026 (formatted",
    ),
    (SAID, "process_id", "Command moved to background (PID: 33).", "Command moved to background (PID: 4)."),
    (SAID, "process_id", "- [PID 31] RUNNING: `sleep 2`", "- [PID 4] RUNNING: `sleep 2`"),
    (SAID, "process_id", "Background PIDs: 41, 42\n", "Background PIDs: 43, 44\n"),
    (SAID, "process_id", "Output: hi\nProcess Group PGID: 36\n", "Output: hi\nProcess Group PGID: 4\n"),
    (SAID, "session_id", f"/tool-outputs/session-{U1}/a", f"/tool-outputs/session-{U2}/a"),
]  # fmt: skip


def placed(where: str, value: Any) -> Wire:
    """A request with a value at a path; numbers in the path are list indices."""
    _, *keys = where.split(".")
    if where.startswith("headers."):
        return Wire("POST", "h", "/p", [(where.removeprefix("headers."), value)], b"{}")
    body: Any = value
    for key in reversed(keys):
        body = [body] if key.isdigit() else {key: body}
    return wire(body)


@pytest.mark.parametrize(("where", "name", "one", "other"), EXAMPLES)
def test_two_runs_of_one_program_are_equal(where: str, name: str, one: Any, other: Any) -> None:
    first, second = (normalise(placed(where, value)) for value in (one, other))
    assert first.tree == second.tree and json.dumps(first.tree) == json.dumps(second.tree)
    assert name in first.rules or name == "metadata_order"
    first, second = (normalise(placed(where, value), []) for value in (one, other))
    assert json.dumps(first.tree) != json.dumps(second.tree)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.where}-{rule.name}-{rule.pattern}")
def test_no_rule_without_an_example_that_needs_it(rule: Rule) -> None:
    others = [each for each in RULES if each is not rule]
    pairs = [[normalise(placed(where, v), others) for v in values] for where, _, *values in EXAMPLES]
    assert any(tree(one) != tree(other) for one, other in pairs)


def tree(normal: Normal) -> str:
    return json.dumps(normal.tree)


def test_what_no_rule_names_differs() -> None:
    text = f"I was told {U1} on 2026-11-20."
    one, other = (
        wire({"messages": [{"content": text}]}),
        wire({"messages": [{"content": text.replace(U1, U2)}]}),
    )
    (found,) = differences(normalise(one).tree, normalise(other).tree)
    assert found.field == "body.messages[0].content" and found.kind == "changed"
    assert normalise(one).rules == []


def test_ids_that_were_equal_have_to_stay_equal() -> None:
    same = wire({"prompt_cache_key": U1}, session_id=U1)
    also = wire({"prompt_cache_key": U2}, session_id=U2)
    mixed = wire({"prompt_cache_key": U1}, session_id=U2)
    assert tree(normalise(same)) == tree(normalise(also)) != tree(normalise(mixed))
    assert normalise(same).rules == ["cache_key", "session_id"]


@pytest.mark.parametrize(
    ("where", "one", "other"),
    [
        ("body.metadata.session", U1, U2),
        ("body.metadata.sessionId", f"{U1} ", f"{U2} "),
        ("body.metadata.promptId", f"{U1}########0", f"{U1}########1"),
        ("body.metadata.promptId", f"{U1}#general-purpose-{U1}#0", f"{U1}#general-purpose-{U2}#0"),
        (MESSAGE, "<task-id>agent-call_1</task-id>", "<task-id>worker-call_1</task-id>"),
        (MESSAGE, "id: bg_c5e5688c\npid: 47\n", "id: bg_c5e5688c\npid: 56\n"),
        ("body.metadata.promptId", f"{U1}#an-agent-call_73bfa6b3#0", f"{U1}#an-agent-call_9b6ad450#0"),
        (MESSAGE, "/a/run_shell_command_fc3587617e31.output", "/a/run_shell_command_8cc1bf38d856.output"),
        (MESSAGE, "It is Friday, November 20, 2026.", "It is Monday, December 7, 2026."),
        ("headers.x-gemini-api-privileged-user-id", "one", "two"),
        ("body.contents.0.parts.0.text", "Process Group PGID: 36", "Process Group PGID: 4"),
        (SAID, "Output: PID 36\nExit Code: 1\n", "Output: PID 36\nExit Code: 4\n"),
        (SAID, f"session-{U1}", f"session-{U2}"),
    ],
)  # fmt: skip
def test_what_stands_elsewhere_differs(where: str, one: str, other: str) -> None:
    assert tree(normalise(placed(where, one))) != tree(normalise(placed(where, other)))


def test_a_session_is_the_same_wherever_it_is_named() -> None:
    """Qwen Code names it in the metadata, in the prompt's id and in the paths of its files."""

    def asked(session: str, other: str) -> Wire:
        text = f"{SHELL}c5e5688c\noutput file: /a/background-shells/{other}/shell-bg_c5e5688c.output\n"
        metadata = {"sessionId": session, "promptId": f"{session}########0"}
        return wire({"messages": [{"content": text}], "metadata": metadata})

    assert tree(normalise(asked(U1, U1))) == tree(normalise(asked(U2, U2))) != tree(normalise(asked(U1, U2)))
    assert tree(normalise(asked(U1, U2))) == tree(normalise(asked(U2, U1)))


def test_our_own_ids_are_never_taken_out() -> None:
    """The recorded answers carry them, so the fresh run echoes them as they are."""
    one, other = (
        wire({"input": [{"id": "msg_01M7W4GAKB5THMCTP1K0YJRY15_1"}]}),
        wire({"input": [{"id": "msg_1"}]}),
    )
    assert tree(normalise(one)) != tree(normalise(other))


@pytest.mark.parametrize("body", [b"", b"no json", b'{"a": 1', b"\xff\xfe", b"[1,2]", b'"text"', b"[" * 5000])
def test_any_body_can_be_compared(body: bytes) -> None:
    assert tree(normalise(wire(body))) == tree(normalise(wire(body)))
    assert tree(normalise(wire(body))) != tree(normalise(wire({"a": 2})))


def test_headers_that_come_twice_count_both() -> None:
    once, twice = Wire("GET", "h", "/", [("A", "1")]), Wire("GET", "h", "/", [("a", "1"), ("A", "2")])
    assert normalise(once).tree["headers"] == {"a": "1"} and normalise(twice).tree["headers"] == {"a": "1, 2"}

"""What may differ between two runs of the same harness, and nothing else: a declared list.

Two runs of a program never send the same bytes: sessions have ids, messages have times, a head carries a
checksum. `RULES` names every such place, found by recording real programs twice and comparing; what no rule
names must be equal.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

VERSION = 3
"""Goes up with each change of what `RULES` lists or does."""

How = Literal[
    "ignore",  # the field is not compared, nor whether it is there
    "parse",  # the text is JSON, and compared as such
    "unorder",  # the order of an object's keys says nothing
    "number",  # an id: numbered by first appearance
    "mask",  # a time, a duration, a checksum: replaced by the rule's name
]


class Rule(Struct, frozen=True):
    """One thing that varies.

    `where` is a path such as `body.input.*.id`: `*` is one key or index, `**` any number of them. `pattern`
    finds what varies in the text there, after a group that is kept; `^` and `$` are a line's. Without one it
    is the whole value. (Text before is a group because a look-behind would be searched many times slower.)
    """

    name: str
    where: str
    how: How
    pattern: str = ""


_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
_AGENT = "[0-9a-f]{17}"
_SESSION = "ses_[0-9a-f]{12}[0-9A-Za-z]{14}"
_NOTICE = '<subagent_notification>\n{"agent_path":"'
_DAY = r"\w+, \w+ \d{1,2}, \d{4}"
_SHELL = r"^Background shell started\.\nid: "
_SAVED = "^The full output has been saved to: "
_SAID = "body.contents.*.parts.*.functionResponse.response.output"
_TURN = "body.client_metadata.x-codex-turn-metadata"

RULES: tuple[Rule, ...] = (
    # Any client.
    Rule("credential", "headers.authorization", "ignore"),
    Rule("credential", "headers.x-api-key", "ignore"),
    Rule("credential", "headers.x-goog-api-key", "ignore"),
    Rule("length", "headers.content-length", "ignore"),  # of a body that is compared itself
    Rule("request_id", "headers.x-client-request-id", "number", _UUID),
    # Claude Code.
    Rule("session_id", "headers.x-claude-code-session-id", "number", _UUID),
    Rule("prompt_id", "headers.x-claude-code-prompt-id", "number", _UUID),
    Rule("duration", "headers.x-claude-code-prev-tool-durations", "mask", r"(=)\d+"),
    Rule("checksum", "body.system.*.text", "mask", "( cch=)[0-9a-f]+"),
    Rule("prompt_id", "body.system.*.text", "number", f"( cc_prompt_id=){_UUID}"),
    Rule("user_id", "body.metadata.user_id", "parse"),
    Rule("device_id", "body.metadata.user_id.device_id", "number", "[0-9a-f]{64}"),
    Rule("session_id", "body.metadata.user_id.session_id", "number", _UUID),
    Rule("agent_id", "headers.x-claude-code-agent-id", "number", _AGENT),
    Rule("agent_id", "body.messages.**", "number", f"(agentId: ){_AGENT}"),
    Rule("agent_id", "body.messages.**", "number", f"(with to: '){_AGENT}"),
    Rule("task_id", "body.messages.**", "number", "(in background with ID: )[0-9a-z]+"),
    Rule("task_id", "body.messages.**", "number", "(<task-id>)[0-9a-z]+(?=</task-id>)"),
    Rule("task_id", "body.messages.**", "number", r"(/tasks/)[0-9a-z]+(?=\.output)"),
    Rule("user_number", "body.messages.**", "mask", "(/tmp/claude-)[0-9]+"),
    Rule("session_id", "body.messages.**", "number", f"(-workspace/){_UUID}(?=/tasks/)"),
    Rule("duration", "body.messages.**", "mask", "(<duration_ms>)[0-9]+"),
    Rule("kernel", "body.messages.**", "mask", r"(OS Version: Linux )\S+"),
    Rule("date", "body.messages.**", "mask", f"(Today's date is ){_DATE}"),
    # Codex.
    Rule("session_id", "headers.session-id", "number", _UUID),
    Rule("thread_id", "headers.thread-id", "number", _UUID),
    Rule("thread_id", "headers.x-codex-parent-thread-id", "number", _UUID),
    Rule("window_id", "headers.x-codex-window-id", "number", _UUID),
    Rule("turn_metadata", "headers.x-codex-turn-metadata", "parse"),
    Rule("turn_metadata", "headers.x-codex-turn-metadata.*", "number", _UUID),
    Rule("turn_time", "headers.x-codex-turn-metadata.turn_started_at_unix_ms", "mask"),
    Rule("metadata_order", "body.client_metadata", "unorder"),  # a hash map, written in any order
    Rule("client_metadata", "body.client_metadata.*", "number", _UUID),
    Rule("turn_metadata", _TURN, "parse"),
    Rule("turn_metadata", f"{_TURN}.*", "number", _UUID),
    Rule("turn_time", f"{_TURN}.turn_started_at_unix_ms", "mask"),
    Rule("request_time", "body.client_metadata.x-codex-ws-stream-request-start-ms", "mask"),
    Rule("socket_key", "headers.sec-websocket-key", "ignore"),
    Rule("cache_key", "body.prompt_cache_key", "number", _UUID),
    Rule("item_id", "body.input.*.id", "number", _UUID),
    Rule("turn_id", "body.input.*.internal_chat_message_metadata_passthrough.turn_id", "number", _UUID),
    Rule("item_time", "body.input.*.internal_chat_message_metadata_passthrough.create_time", "mask"),
    Rule("date", "body.input.*.content.*.text", "mask", f"(<current_date>){_DATE}"),
    Rule("chunk_id", "body.input.*.output", "mask", "(^Chunk ID: )[0-9a-f]+"),
    Rule("duration", "body.input.*.output", "mask", r"(^Wall time: )[0-9.]+(?= seconds$)"),
    Rule("process_id", "body.input.*.output", "number", r"(^Process running with session ID )[0-9]+"),
    Rule("agent_id", "body.input.*.output", "number", f'(^{{"agent_id":"){_UUID}'),
    Rule("nickname", "body.input.*.output", "mask", r'(","nickname":")\w+(?="\}$)'),
    Rule("agent_id", "body.input.*.content.*.text", "number", f"(^{_NOTICE}){_UUID}"),
    Rule("duration", "body.input.*.output.*.text", "mask", r"(^Wall time )[0-9.]+(?= seconds$)"),
    Rule("chunk_id", "body.input.*.output.*.text", "mask", r'(^\{"chunk_id":")[0-9a-f]+'),
    Rule("duration", "body.input.*.output.*.text", "mask", r'("wall_time_seconds":)[0-9.e-]+'),
    # opencode.
    Rule("session_id", "headers.x-session-id", "number", _SESSION),
    Rule("session_id", "headers.x-session-affinity", "number", _SESSION),
    Rule("session_id", "headers.x-parent-session-id", "number", _SESSION),
    Rule("task_id", "body.messages.**", "number", f'(<task id="){_SESSION}'),
    Rule("date", "body.system.*.text", "mask", r"(Today's date: )\w{3} \w{3} \d{2} \d{4}"),
    # pi.
    Rule("install_path", "body.system.*.text", "mask", r"/\S*(?=/harness/pi-[0-9.]+/node_modules/)"),
    Rule("kernel", "headers.user-agent", "mask", r"(^pi \(linux )[^;]+"),
    # Qwen Code.
    Rule("session_id", "body.metadata.sessionId", "number", f"^{_UUID}$"),
    Rule("session_id", "body.metadata.promptId", "number", f"^{_UUID}(?=#)"),
    Rule("agent_id", "body.metadata.promptId", "number", "(#[^#]+-)[0-9a-f]{8}(?=#[0-9]+$)"),
    Rule("date", "body.messages.**", "mask", f"(^Today's date is ){_DAY}"),
    Rule("date", "body.messages.**", "mask", f"(^The current date is: ){_DAY}"),
    Rule("process_id", "body.messages.**", "number", rf"({_SHELL}bg_[0-9a-f]{{8}}\npid: )[0-9]+$"),
    Rule("task_id", "body.messages.**", "number", f"({_SHELL})bg_[0-9a-f]{{8}}$"),
    Rule("task_id", "body.messages.**", "number", r"(/shell-)bg_[0-9a-f]{8}(?=\.(?:output|status)$)"),
    Rule("session_id", "body.messages.**", "number", f"(/background-shells/){_UUID}(?=/shell-)"),
    Rule("session_id", "body.messages.**", "number", f"(/subagents/){_UUID}(?=/agent-)"),
    Rule("output_id", "body.messages.**", "number", rf"({_SAVED}.+_)[0-9a-f]{{12}}(?=\.output$)"),
    # Gemini CLI.
    Rule("installation_id", "headers.x-gemini-api-privileged-user-id", "number", f"^{_UUID}$"),
    Rule("date", "body.contents.*.parts.*.text", "mask", rf"(^Today's date is ){_DAY}(?= \()"),
    Rule("process_id", _SAID, "number", r"(^Command moved to background \(PID: )[0-9]+(?=\))"),
    Rule("process_id", _SAID, "number", r"(^- \[PID )[0-9]+(?=\] [A-Z]+: )"),
    Rule("process_id", _SAID, "number", "(^Background PIDs: )[0-9, ]+$"),
    Rule("process_id", _SAID, "number", "(^Process Group PGID: )[0-9]+$"),
    Rule("session_id", _SAID, "number", f"(/tool-outputs/session-){_UUID}(?=/)"),
)

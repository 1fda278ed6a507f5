"""Records `fixtures/recorded/` from the real programs, or derives its golden files anew.

    python -m tests.support.record_fixtures [--harness claude-code] [--scenario parallel] [--out FOLDER]
    python -m tests.support.record_fixtures --regenerate        # no program is run

Each run is a real harness in a real sandbox (`polar-mitm run`), answered by the scripted engine. What it sent
and got is read from the store, checked against a replay byte for byte, scrubbed (`scrub.py`), and written.
`--regenerate` is for an intended change of the translation: it rewrites the derived files (see `recorded.py`)
from the recorded requests and engine bytes. Read the difference before you commit it.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import json
import os
import shlex
import shutil
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from polar_mitm.conformance import byte_tokens
from polar_mitm.conformance.engine_wire import EngineCall
from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, fitting, shell_call
from polar_mitm.store import open_reader
from polar_mitm.types import ModelCall
from polar_mitm.upstream.engine import EngineInfo
from polar_mitm.upstream.probe import probe
from tests.support import recorded
from tests.support.scrub import Scrub

POLAR_MITM = Path(sysconfig.get_path("scripts")) / "polar-mitm"
PROMPT = "Create hello.txt containing hi with the shell tool, then say done."
_CODEX = ["codex", "exec", "--dangerously-bypass-approvals-and-sandbox", "--skip-git-repo-check"]
HARNESSES = {
    "claude-code": ["claude", "--dangerously-skip-permissions", "-p", PROMPT],
    "codex": [*_CODEX, "--model", "gpt-5", PROMPT],
    # No model named: Codex then offers one JavaScript tool with a grammar, in a namespace.
    "codex-lite": [*_CODEX, PROMPT],
    "pi": ["pi", "--print", PROMPT],
    "opencode": ["opencode", "run", PROMPT],
    "qwen-code": ["qwen", "--auth-type", "openai", "--yolo", f"--prompt={PROMPT}"],
    "gemini-cli": ["gemini", "--yolo", "--skip-trust", f"--prompt={PROMPT}"],
}
"""What is run, by the name of the fixture's folder."""


class Teller:
    """A script of one tool-calling turn and a last word; `said` is every text that it used."""

    def __init__(
        self, text: str, *, reasoning: str = "", more: Sequence[str] = (), breaks: bool = False
    ) -> None:
        self._first, self._last = Answer(text, reasoning), Answer("Done.")
        self._commands = ["printf %s hi > hello.txt", *more]
        self._breaks = breaks
        quoted = f'"{PROMPT}"'  # as opencode hands on what it is given as one word
        self.said = dict.fromkeys([PROMPT, quoted, text, reasoning, self._last.text])

    def __call__(self, request: dict[str, Any], nth: int) -> Answer:
        calls = [call for command in self._commands if (call := shell_call(request, command))]
        if schema := (request.get("response_format") or {}).get("json_schema", {}).get("schema"):
            self.said |= {(fits := json.dumps(fitting(schema))): None}
            return Answer(fits)
        if not calls or any(message["role"] == "tool" for message in request["messages"]):
            return self._last
        for _, arguments in calls:
            values = [v for v in json.loads(arguments).values() if isinstance(v, str)]
            self.said |= dict.fromkeys([arguments, *values])
        answer = dataclasses.replace(self._first, tool_calls=calls)
        if self._breaks:
            self._breaks = False
            # Slow enough for the answer to have begun when it breaks.
            return dataclasses.replace(answer, error_after_tokens=8, chunk_delay_s=0.1)
        return answer


SCENARIOS: dict[str, dict[str, Any]] = {
    "two-turns": {"text": "I will write the file."},
    "reasoning": {"text": "I will write it.", "reasoning": "A small task.\n\nWrite the file — déjà vu."},
    "parallel": {"text": "Two at once.", "more": ["printf %s 'a \"b\" \\ é' > more.txt"]},
    "engine-error": {"text": "I will write the file.", "breaks": True},
}
"""What the engine answers, as arguments of `Teller`."""


class _Engine(ScriptedEngine):
    """Prompt ids are a few, instead of one for each byte of somebody's prompt."""

    def prompt_ids(self, body: dict[str, Any]) -> list[int]:
        return byte_tokens.encode(f"{len(body['messages'])} messages")


async def _run(command: list[Any], script: Teller) -> tuple[EngineInfo, list[EngineCall]]:
    """Run `polar-mitm run` against the script; the engine, and its own account of its calls."""
    # Codex over HTTP: its messages on a WebSocket go on from one another, and files hold one call each.
    env = {**os.environ, "TERM": "dumb", "POLAR_MITM_WEBSOCKET": "false"}
    async with _Engine(script) as engine:
        info = await probe(engine.url)
        engine.calls.clear()
        process = await asyncio.create_subprocess_exec(
            POLAR_MITM, "run", "--engine", engine.url, *command, env=env
        )
        if code := await process.wait():
            raise SystemExit(f"{command}: exit code {code}")
    return info, engine.calls


def record(harness: str, scenario: str, out: Path) -> None:
    """Run one harness through one scenario and write its folder below `out`."""
    script = Teller(**SCENARIOS[scenario])
    with tempfile.TemporaryDirectory(prefix="polar-mitm-record-") as scratch:
        store, task = Path(scratch, "run.duckdb"), Path(scratch, "task")
        task.mkdir()
        command = ["--store", store, "--task-dir", task, "--", *HARNESSES[harness]]
        info, answers = asyncio.run(_run(command, script))
        assert (task / "hello.txt").read_text() == "hi"
        with open_reader(store) as reader:
            (rollout,) = reader.rollouts()
            calls = reader.calls(wire=True)
    assert rollout.incomplete is None, rollout.incomplete
    said = [text for text in script.said if text]
    scrub = Scrub(said, [call.call_id for call in calls])
    about = {
        "harness": harness,
        "program": rollout.harness,
        "version": rollout.harness_version,
        "date": datetime.date.today().isoformat(),
        "scenario": scenario,
        "command": shlex.join(HARNESSES[harness]),
        "engine": msgspec.to_builtins(msgspec.structs.replace(info, url="http://engine")),
        "said": said,
        "calls": [{"call_id": scrub.call_id(c.call_id), "dialect": c.dialect} for c in calls],
    }
    folder = out / f"{harness}-{scenario}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "run.json").write_bytes(recorded.pretty(about, 2))
    checked = []
    for call in calls:
        answered = _answer_to(call, answers)
        checked.append(_check(call, answered, info))
        request = {
            "method": call.wire.method,
            "path": call.wire.path,
            "headers": scrub.headers(call.wire.request_headers),
            "body": scrub.value(json.loads(call.wire.request_body)),
        }
        name = f"{call.seq:02d}-"
        (folder / f"{name}request.json").write_bytes(recorded.pretty(request))
        (folder / f"{name}engine.sse").write_bytes(answered.wire)
    regenerate(folder)
    for call, real, told in zip(calls, checked, recorded.load(folder).calls, strict=True):
        then = dataclasses.replace(real, started_at=recorded.STARTED_AT).replay().response
        same = scrub.names(then.decode()).encode()
        assert same == told.replay().response, f"{folder}: scrubbing changed the answer to call {call.seq}"


def _answer_to(call: ModelCall, answers: list[EngineCall]) -> EngineCall:
    """The engine's answer to a call; taken out, since a harness may ask the same again."""
    asked = json.loads(call.upstream_body)
    return answers.pop(next(i for i, answer in enumerate(answers) if answer.request == asked))


def _check(call: ModelCall, answered: EngineCall, info: EngineInfo) -> recorded.Call:
    """The call as it is replayed: files can stand for bytes only where that gives what the store holds."""
    wire = call.wire
    headers = [list(header) for header in wire.request_headers]
    replay = recorded.Call(
        call.seq, call.call_id, call.dialect, info, wire.method, wire.path, headers,
        json.loads(wire.request_body), bytes(answered.wire), call.started_at,
    )  # fmt: skip
    done = replay.replay()
    assert replay.raw == wire.request_body, "the harness writes JSON in another way"
    assert (done.upstream, done.response) == (call.upstream_body, wire.response_body), "the replay differs"
    assert (done.status, list(done.headers.items())) == (wire.status, wire.response_headers)
    return replay


def regenerate(folder: Path) -> None:
    """Write the derived files of one run."""
    for call in recorded.load(folder).calls:
        for name, content in recorded.derive(call):
            (folder / name).write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--harness", choices=HARNESSES, help="all by default")
    parser.add_argument("--scenario", choices=SCENARIOS, help="all by default")
    parser.add_argument("--out", type=Path, default=recorded.FOLDER)
    parser.add_argument("--regenerate", action="store_true", help="only derive the golden files anew")
    options = parser.parse_args()
    if options.regenerate:
        for path in sorted(options.out.glob("*/run.json")):
            regenerate(path.parent)
        return
    for harness in [options.harness] if options.harness else HARNESSES:
        for scenario in [options.scenario] if options.scenario else SCENARIOS:
            record(harness, scenario, options.out)


if __name__ == "__main__":
    main()

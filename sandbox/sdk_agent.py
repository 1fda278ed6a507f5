"""A small coding agent: one `bash` tool, a loop, Anthropic's official SDK, streaming.

    python sdk_agent.py PROMPT [--model NAME]

It stands in for a real harness where none can be installed, and, like one, knows nothing of the interceptor:
no base URL, no proxy. It is run inside the sandbox, and needs only the `anthropic` package.
"""

from __future__ import annotations

import argparse
import subprocess
from typing import Any

import anthropic

SYSTEM = (
    "You are a coding agent in the current directory. Use the bash tool to read and change files. "
    "When the task is done, answer with one short sentence."
)
BASH: Any = {
    "name": "bash",
    "description": "Run a shell command in the current directory; returns what it prints and its exit code.",
    "input_schema": {
        "type": "object",
        "properties": {"command": {"type": "string"}},
        "required": ["command"],
    },
}
MAX_TURNS = 20
COMMAND_TIMEOUT_S = 120
MAX_OUTPUT_CHARS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt")
    parser.add_argument("--model", default="claude-sonnet-4-5")
    args = parser.parse_args()
    run(anthropic.Anthropic(), args.model, args.prompt)


def run(client: anthropic.Anthropic, model: str, prompt: str) -> None:
    """Ask, run the tools that the answer calls, and ask again until an answer calls none.

    Raises:
        SystemExit: the model still calls tools after MAX_TURNS answers.
    """
    messages: list[Any] = [{"role": "user", "content": prompt}]
    for _ in range(MAX_TURNS):
        with client.messages.stream(
            model=model, max_tokens=4096, system=SYSTEM, tools=[BASH], messages=messages
        ) as stream:
            for text in stream.text_stream:
                print(text, end="", flush=True)
            answer = stream.get_final_message()
        print(flush=True)
        messages.append({"role": "assistant", "content": answer.content})
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": bash(block.input)}
            for block in answer.content
            if block.type == "tool_use"
        ]
        if not results:
            return
        messages.append({"role": "user", "content": results})
    raise SystemExit(f"no end after {MAX_TURNS} turns")


def bash(arguments: Any) -> str:
    """Run the command; whatever the model gave, answer something that it can learn from."""
    command = arguments.get("command") if isinstance(arguments, dict) else None
    if not isinstance(command, str):
        return "error: `command` must be a string"
    print(f"$ {command}", flush=True)
    try:
        done = subprocess.run(
            ["bash", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=COMMAND_TIMEOUT_S,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return f"error: no end after {COMMAND_TIMEOUT_S} s"
    return f"{done.stdout[-MAX_OUTPUT_CHARS:]}\n[exit code {done.returncode}]"


if __name__ == "__main__":
    main()

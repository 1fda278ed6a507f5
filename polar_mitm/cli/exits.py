"""Exit codes, and the one place where whatever ended a command becomes one and a sentence."""

from __future__ import annotations

import traceback
from types import FrameType
from typing import NoReturn

from polar_mitm.cli.output import complain, print_json
from polar_mitm.errors import EngineUnfit, SetupError, StoreError, TaskError

NO = 1  # the command ran, and the answer is no
INPUT = 2  # an option, a file or an id is wrong
ENGINE = 3  # no engine, or one that cannot serve
SETUP = 4  # this machine lacks something
BUG = 70  # EX_SOFTWARE of sysexits.h
TIMEOUT = 124  # as timeout(1)
RUN = 125  # `run` itself failed, as with env(1) and docker: below it are the harness's own codes

_KINDS = {INPUT: "input", ENGINE: "engine", SETUP: "setup", BUG: "bug"}
TEXT = (
    "Exit codes: 0 done; 1 the answer is no (doctor, engine status, reconstruct, verify, replay, demo, "
    "conformance); "
    "2 wrong option, file or id; 3 no engine, or an unfit one; 4 something is missing on this machine; "
    "70 a bug; 130 and 143 interrupted. `run` exits with the harness's own code, 124 after --timeout, "
    "125 if it failed itself.\n\n"
    'With --json an error is {"error": ..., "kind": ..., "exit_code": ...} on stdout.'
)


class Failure(Exception):
    """The end of a command, with a sentence that says what to do."""

    def __init__(self, message: str, code: int = INPUT) -> None:
        super().__init__(message)
        self.code = code


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM: what was begun is ended in good order. (Typer makes a silent 130 of the first.)"""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


def fail(message: str, code: int = INPUT) -> NoReturn:
    """End the command with a sentence that says what to do."""
    raise Failure(message, code)


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A signal handler."""
    raise Interrupted(number)


def report(error: BaseException, command: str, machine: bool) -> int:
    """Tell a person, or a machine, why the command ended; returns the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else NO
    if isinstance(error, Interrupted):
        code, kind, message = error.code, "interrupted", "interrupted"
    else:
        code, message = _verdict(error)
        kind = _KINDS.get(code, "input")
        if command == "run":
            code = RUN
    if machine:
        print_json({"error": message, "kind": kind, "exit_code": code})
    elif _is_usage(error):
        from typer.rich_utils import rich_format_error

        rich_format_error(error)  # type: ignore[arg-type]
    else:
        complain(message)
    return code


def _verdict(error: BaseException) -> tuple[int, str]:
    if isinstance(error, Failure):
        return error.code, str(error)
    if isinstance(error, StoreError | TaskError):
        return INPUT, str(error)
    if isinstance(error, EngineUnfit):
        return ENGINE, str(error)
    if isinstance(error, SetupError):
        return SETUP, str(error)
    if _is_usage(error):
        return INPUT, error.format_message()  # type: ignore[attr-defined]
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return SETUP, f"{error.strerror or error}{where}"
    traceback.print_exception(error)
    return BUG, f"this is a bug in polar-mitm: {error!r}"


def _is_usage(error: BaseException) -> bool:
    """Is this click's word on how a command was called? Typer has click inside or beside, by version."""
    return hasattr(error, "format_message")

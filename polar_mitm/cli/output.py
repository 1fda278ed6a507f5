"""How commands speak: people get tables and progress on a terminal, machines one JSON document on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.table import Table

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, for machines.")]

err = Console(stderr=True, highlight=False)
"""People's console: stdout belongs to data and to the harness."""


def fail(message: str, code: int = 2) -> NoReturn:
    """End the command with a sentence that says what to do."""
    err.print(f"[red]error:[/red] {message}", soft_wrap=True)
    raise typer.Exit(code)


def print_json(value: Any) -> None:
    """One document, one line per top-level call, safe to pipe."""
    sys.stdout.write(msgspec.json.encode(value, enc_hook=str).decode() + "\n")
    sys.stdout.flush()


def print_table(title: str, columns: str, rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout; numbers to the right. `columns` are names separated by blanks."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for position, name in enumerate(columns.split()):
        numeric = any(isinstance(row[position], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    # Rich folds to 80 columns where there is no terminal; a pipe has all the room it needs.
    Console(highlight=False, width=None if sys.stdout.isatty() else 240).print(table)


@contextmanager
def step(text: str) -> Iterator[None]:
    """A spinner while something long runs; a plain line where stderr is no terminal."""
    if err.is_terminal:
        with err.status(text):
            yield
    else:
        err.print(text)
        yield


def say(text: str) -> None:
    """A line of progress."""
    err.print(text, soft_wrap=True)

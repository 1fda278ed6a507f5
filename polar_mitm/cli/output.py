"""How commands speak: people get tables and progress on a terminal, machines one JSON document on stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, for machines.")]

err = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""People's console: stdout belongs to data and to the harness."""

_PIPE_COLUMNS = 200
_WIDE = 100


def print_json(value: Any) -> None:
    """One document on one line, safe to pipe."""
    sys.stdout.write(msgspec.json.encode(value, enc_hook=str).decode() + "\n")
    sys.stdout.flush()


def say(text: str, style: str = "") -> None:
    """A line of progress."""
    err.print(printable(text), style=style, soft_wrap=True)


def complain(text: str) -> None:
    """Why a command ends."""
    err.print(Text("error: ", style="red").append(printable(text), style="default"), soft_wrap=True)


def tell(text: str = "", style: str = "") -> None:
    """A line of a command's result, on stdout."""
    _out().print(Text(printable(text), style=style), soft_wrap=True)


def print_table(columns: str, rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; numbers to the right. `columns` are separated by commas; only the last one wraps."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    rows, names = list(rows), columns.split(",")
    for position, name in enumerate(names):
        numeric = any(isinstance(row[position], int | float) for row in rows)
        last = position + 1 == len(names)
        table.add_column(
            name,
            justify="right" if numeric else "left",
            no_wrap=not last,
            overflow="fold" if last else "ellipsis",
        )
    for row in rows:
        table.add_row(*(Text("" if cell is None else printable(str(cell))) for cell in row))
    _out().print(table)


def short(identifier: str) -> str:
    """An id as there is room for it: its end, which `show` and `--rollout` take too, on a narrow terminal."""
    return identifier if _out().width >= _WIDE else identifier[-8:]


def plural(number: int, name: str, names: str = "") -> str:
    """`1 call`, `2 calls`."""
    return f"{number} {name if number == 1 else names or f'{name}s'}"


def printable(text: str) -> str:
    """`text` with nothing in it that moves a terminal's cursor: names and errors come from a sandbox."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class Steps:
    """Called, it tells a step, which stays as a line; `update` only changes the spinner's text."""

    def __init__(self, update: Callable[[str], None]) -> None:
        self.update = update

    def __call__(self, text: str) -> None:
        say(text)
        self.update(text)


@contextmanager
def progress(text: str = "") -> Iterator[Steps]:
    """A spinner with a clock while something long runs; only lines where stderr is no terminal."""
    if not err.is_terminal:
        if text:
            say(text)
        yield Steps(lambda text: None)
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(text)
        yield Steps(lambda text: bar.update(task, description=text.splitlines()[0][: err.width - 12]))


def counted(items: Sequence[T], text: str) -> Iterator[T]:
    """The items, with a progress bar on a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        yield from bar.track(items, description=text)


def _out() -> Console:
    """Stdout. Rich takes 80 columns where there is no terminal; a pipe has all the room it needs."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_COLUMNS
    return Console(highlight=False, markup=False, emoji=False, width=wide)

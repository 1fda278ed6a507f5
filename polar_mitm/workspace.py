"""A rollout's workspace: made from a task's files, copied for its verdict, removed.

What is in it after a rollout is the agent's doing: links to anywhere, pipes that block whoever opens them,
sparse files of a terabyte, directories closed to their owner. Nothing here follows a link, or opens what is
no file.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

MAX_COPY_BYTES = 1 << 30
MAX_COPY_ENTRIES = 100_000
_MAX_PATH_BYTES = 2000  # inside the workspace: with that of the folder less than the system's 4096


class TooLarge(Exception):
    """A workspace is beyond what is copied; the message says by what."""


def make(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """A new folder that holds `files` (relative path -> content); what begins with `#!` can be executed."""
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(data)
        if data.startswith(b"#!"):
            path.chmod(path.stat().st_mode | 0o111)


def copy(
    source: Path, target: Path, *, max_bytes: int = MAX_COPY_BYTES, max_entries: int = MAX_COPY_ENTRIES
) -> None:
    """Copy a workspace that nobody writes to any more into a new folder that no link leads out of.

    A link to something in the workspace becomes a link to its copy. All other links, and whatever is
    neither file nor directory, cannot be read or is very deep, are left out.

    Raises:
        TooLarge: there is more of it than the bounds allow; part of it may have been copied.
    """
    source = Path(os.path.realpath(source))
    target.mkdir(parents=True)
    left_bytes, left_entries = max_bytes, max_entries
    folders, links = [Path()], list[Path]()
    while folders:
        folder = folders.pop()
        for entry, found in _entries(source / folder):
            name, mode = folder / entry, found.st_mode
            left_entries -= 1
            left_bytes -= found.st_size if stat.S_ISREG(mode) else 0
            if left_bytes < 0 or left_entries < 0:
                raise TooLarge(f"the workspace holds more than {max_bytes} bytes or {max_entries} files")
            if len(os.fsencode(name)) > _MAX_PATH_BYTES:
                continue
            if stat.S_ISLNK(mode):
                links.append(name)
            elif stat.S_ISDIR(mode):
                folders.append(name)
                (target / name).mkdir()
            elif stat.S_ISREG(mode):
                _copy_file(source / name, target / name, mode)
    for name in links:
        _copy_link(source, target, name)


def remove(folder: Path) -> None:
    """Remove a workspace, however deep its directories are and whatever their modes."""
    if not folder.exists():
        return
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):  # closed directories, or so deep that only these programs get there
        for command in ("chmod", "-R", "u+rwX", "--"), ("rm", "-rf", "--"):
            subprocess.run([*command, str(folder)], stderr=subprocess.DEVNULL, check=False)


def _entries(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Names in a folder and what they are, as far as we may see them and a path can name them."""
    with suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            with suppress(OSError):
                yield entry.name, entry.stat(follow_symlinks=False)


def _copy_file(source: Path, target: Path, mode: int) -> None:
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    with os.fdopen(fd, "rb") as file, target.open("wb") as out:
        shutil.copyfileobj(file, out)
        os.fchmod(out.fileno(), stat.S_IMODE(mode) & 0o777 | 0o600)


def _copy_link(source: Path, target: Path, name: Path) -> None:
    """The same link in the copy, straight to where it leads, if that is a path in the workspace."""
    try:
        leads_to = Path(os.path.realpath(source / name, strict=True))
    except OSError:  # to nothing, in a circle, or through what is closed to us
        return
    if leads_to.is_relative_to(source):
        (target / name).symlink_to(os.path.relpath(leads_to, (source / name).parent))

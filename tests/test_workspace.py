"""Workspaces, whose content is the agent's doing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from polar_mitm import workspace


def tree(root: Path) -> dict[str, str | None]:
    """Path -> content of each file; directories have none; links are followed where they lead to."""
    return {
        path.relative_to(root).as_posix(): path.read_text() if path.is_file() else None
        for path in root.rglob("*")
    }


def test_made_from_files(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    workspace.make(folder, {"a/b.txt": "ä", "c.bin": b"\xc3\xa4", "run": "#!/bin/sh\necho ran"})
    assert tree(folder) == {"a": None, "a/b.txt": "ä", "c.bin": "ä", "run": "#!/bin/sh\necho ran"}
    assert [os.access(folder / name, os.X_OK) for name in ("run", "c.bin")] == [True, False]


def test_no_link_leads_out_of_a_copy(tmp_path: Path) -> None:
    """Whatever chain of links an agent builds, what a reward reads is in the copy."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    source, copied = tmp_path / "source", tmp_path / "copied"
    workspace.make(source, {"real.txt": "mine", "deep/er/x": "x"})
    links = {
        "absolute": outside / "secret",
        "relative": "../outside/secret",
        "folder": "../outside",
        "proc": "/proc/self/root/etc/passwd",
        "deep/up": "../../outside",
        "out_and_back": f"{outside}/../source/real.txt",
        "through": "folder/secret",
        # Inside as long as `down` exists; one level too high once it does not.
        "down": "deep/er",
        "lexical": "down/../../outside/secret",
        "inside": "real.txt",
        "deep/inside": "../inside",
        "inside_folder": "deep",
        "self": "self",
        "root": ".",
        "dangling": "nothing",
    }
    for name, leads_to in links.items():
        (source / name).symlink_to(leads_to)
    workspace.copy(source, copied)

    assert copied.joinpath("inside").read_text() == copied.joinpath("deep/inside").read_text() == "mine"
    assert copied.joinpath("out_and_back").read_text() == "mine"
    assert copied.joinpath("inside_folder/er/x").read_text() == "x"
    (source / "real.txt").write_text("changed afterwards")
    (outside / "secret").write_text("other")
    found = list(copied.rglob("*"))
    assert all(path.resolve(strict=True).is_relative_to(copied) for path in found)
    assert "secret" not in "".join(path.read_text() for path in found if path.is_file())
    assert copied.joinpath("inside").read_text() == "mine"  # and not the source's
    kept = {"inside", "deep/inside", "inside_folder", "root", "down", "out_and_back"}
    assert {p.relative_to(copied).as_posix() for p in found if p.is_symlink()} == kept


def test_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    workspace.make(source, {"a": "a", "set": "#!/bin/sh"})
    os.mkfifo(source / "fifo")  # whoever opens it waits for ever
    (source / "set").chmod(0o6711)
    workspace.copy(source, tmp_path / "copied")
    assert tree(tmp_path / "copied") == {"a": "a", "set": "#!/bin/sh"}
    assert (tmp_path / "copied" / "set").stat().st_mode & 0o7777 == 0o711


def test_bounds_of_a_copy(tmp_path: Path) -> None:
    source = tmp_path / "source"
    workspace.make(source, {"a": "12345", "b": "12345"})
    workspace.copy(source, tmp_path / "fits", max_bytes=10, max_entries=2)
    for bounds in ({"max_bytes": 9}, {"max_entries": 1}):
        with pytest.raises(workspace.TooLarge):
            workspace.copy(source, tmp_path / str(bounds), **bounds)
    with (source / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(workspace.TooLarge):
        workspace.copy(source, tmp_path / "sparse")


def test_removed_however_deep_and_closed(tmp_path: Path) -> None:
    source, copied = tmp_path / "source", tmp_path / "copied"
    workspace.make(source, {"closed/x": "x"})
    (source / "closed").chmod(0)
    here = os.open(source, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d" * 100, dir_fd=here)
        below = os.open("d" * 100, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    try:
        workspace.copy(source, copied)  # as far as a path reaches
        for folder in (source, copied, tmp_path / "nothing"):
            workspace.remove(folder)
            assert not folder.exists()
    finally:  # pytest's own cleaning cannot
        subprocess.run(["rm", "-rf", str(source), str(copied)], check=True)

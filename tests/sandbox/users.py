"""Runs the driver as root or as an ordinary user, whichever this machine can show."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polar_mitm.cache import default_cache
from polar_mitm_sandbox import identity

ORDINARY_UID = 12345
DRIVER = Path(__file__).with_name("driver.py")
REPOSITORY = Path(__file__).parents[2]


def kinds() -> list[str]:
    """Root tests both, where ordinary users may make namespaces; anybody else tests what they are."""
    if not identity.is_host_root():
        return ["user"]
    ordinary = subprocess.run([*_drop(ORDINARY_UID), "unshare", "-Urn", "true"], capture_output=True)
    return ["root", "user"] if ordinary.returncode == 0 else ["root"]


def _drop(uid: int) -> list[str]:
    """Command prefix that becomes an ordinary user."""
    return [
        *("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all"),
        *("--ambient-caps=-all", "--bounding-set=-all"),
    ]


@dataclass
class Outcome:
    """What the driver reports of one run."""

    exit_code: int | None = None
    setup_error: str | None = None
    stdout: str = ""
    stderr: str = ""
    timed_out: bool = False
    posts: list[str] | None = None

    def json(self) -> Any:
        assert self.exit_code == 0, self
        return json.loads(self.stdout)


@dataclass
class User:
    """Somebody who runs sandboxes, with a CA and, for TLS, a certificate that it signed."""

    kind: str
    ca_pem: str
    certificate: Path

    @classmethod
    def current(cls, ca_pem: str, certificate: Path) -> User:
        """Whoever runs the tests."""
        return cls(kinds()[0], ca_pem, certificate)

    @property
    def uid(self) -> int:
        return 0 if self.kind == "root" else ORDINARY_UID if os.geteuid() == 0 else os.geteuid()

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """A directory of this user's; pytest's own are closed to others."""
        with tempfile.TemporaryDirectory(prefix="polar-sandbox-") as name:
            yield self.own(Path(name))

    def own(self, path: Path) -> Path:
        """Make `path` a directory of this user's."""
        path.mkdir(exist_ok=True)
        if os.geteuid() == 0:
            os.chown(path, self.uid, self.uid)
        return path

    def sandboxes(self, runs: list[dict[str, Any]], env: dict[str, str] | None = None) -> list[Outcome]:
        """Run all at the same time."""
        process = self.driver(env)
        out, err = process.communicate(
            json.dumps([{"ca_pem": self.ca_pem, **run} for run in runs]), timeout=100
        )
        assert process.returncode == 0, err
        return [Outcome(**each) for each in json.loads(out)]

    def sandbox(self, command: list[str], env_outside: dict[str, str] | None = None, **run: Any) -> Outcome:
        """Run one, in a workspace of its own unless `workdir` is given."""
        if "workdir" in run:
            return self.sandboxes([{**run, "command": command, "workdir": str(run["workdir"])}], env_outside)[
                0
            ]
        with self.directory() as workdir:
            return self.sandbox(command, env_outside, workdir=workdir, **run)

    def python(self, code: str, **run: Any) -> Outcome:
        return self.sandbox([sys.executable, "-c", code], **run)

    def shell(self, script: str, **run: Any) -> Outcome:
        return self.sandbox(["bash", "-c", script], **run)

    def driver(
        self, env: dict[str, str] | None = None, arguments: Sequence[str] = ()
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.become(), sys.executable, str(DRIVER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | (env or {}),
        )

    def become(self) -> list[str]:
        """Drop from root to the ordinary user, and open the way to what lies in root's closed home."""
        if self.uid == os.geteuid():
            return []
        home = Path.home()
        opened: list[str | Path] = ["--perms", "0755", "--tmpfs", home]
        for path in (*map(Path, (sys.base_prefix, sys.prefix, REPOSITORY)), default_cache()):
            if path.is_relative_to(home):
                for parent in reversed(
                    [each for each in path.parents if each.is_relative_to(home) and each != home]
                ):
                    opened += ["--perms", "0755", "--dir", parent]
                opened += ["--ro-bind", path, path]
        bwrap = shutil.which("bwrap")
        assert bwrap is not None, "bubblewrap is missing"
        return [bwrap, "--dev-bind", "/", "/", *map(str, opened), "--", *_drop(self.uid)]

"""What a harness sees, owns and may do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polar_mitm_sandbox import executables, identity
from tests.sandbox.users import User


def test_the_harness_is_an_unprivileged_user(user: User) -> None:
    out = user.shell("id -u; id -un; whoami; grep -E 'Cap|NoNewPrivs|^Seccomp:|Groups' /proc/self/status")
    uid, *names = out.stdout.split("\n")[:3]
    status = dict(line.split(":") for line in out.stdout.splitlines()[3:])
    assert int(uid) != 0
    assert names == ["agent", "agent"]
    assert {status[name].strip() for name in status if name.startswith("Cap")} == {"0" * 16}
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")


def test_the_workspace_is_shared_and_belongs_to_its_owner(user: User) -> None:
    with user.directory() as workdir:
        workdir.chmod(0o700)
        (workdir / "given.txt").write_text("given")
        if os.geteuid() == 0:
            os.chown(workdir / "given.txt", user.uid, user.uid)
        out = user.shell(
            "pwd; cat given.txt; stat -c %U . given.txt; "
            "mkdir -p a/b; echo made | tee -a given.txt > a/b/made.txt; "
            "ln -s /etc/shadow link; chmod 6755 a/b/made.txt",
            workdir=workdir,
        )
        assert out.stdout == "/workspace\ngiven" + "agent\nagent\n", out
        assert (workdir / "a/b/made.txt").read_text() == "made\n"
        assert (workdir / "given.txt").read_text() == "givenmade\n"
        owners = {path: path.lstat().st_uid for path in [workdir, *workdir.rglob("*")]}
        assert set(owners.values()) == {user.uid}, owners
        if user.kind == "root":  # nothing of root's may be left that becomes root when others run it
            assert not (workdir / "a/b/made.txt").stat().st_mode & 0o6000


def test_the_host_is_not_there(user: User) -> None:
    """Home, temporary files, sockets and state of the host, and files that say who has which password."""
    with user.directory() as elsewhere:
        (elsewhere / "store.duckdb").write_text("rollouts")
        hidden = [elsewhere, Path.home(), "/root", "/var/run/docker.sock", "/run/systemd", "/var/lib", "/sys"]
        out = user.shell(f"ls -d {' '.join(map(str, hidden))}")
    assert (out.stdout, out.stderr.count("cannot access")) == ("", len(hidden)), out
    out = user.shell("cat /etc/shadow /etc/gshadow /etc/sudoers; ls -A /etc/ssh /etc/ssl/private /tmp /home")
    assert [line for line in out.stdout.splitlines() if line and not line.endswith(":")] == ["agent"], out


def test_only_the_workspace_and_scratch_are_writable(user: User) -> None:
    code = """
import json, os
out = []
for directory in ("/", "/usr", "/etc", "/opt", "/run", "/dev", "/proc/sys", "/etc/ssl/certs", "/home", "/var",
                  "/workspace", "/tmp", "/var/tmp", "/dev/shm", os.path.expanduser("~")):
    try: open(directory + "/probe", "w").close()
    except OSError: continue
    out.append(directory)
print(json.dumps(out))
"""
    assert user.python(code).json() == ["/workspace", "/tmp", "/var/tmp", "/dev/shm", "/home/agent"]


def test_the_kernel_cannot_be_told_anything(user: User) -> None:
    """With the host's uid 0, even without a capability, each of these would change the host."""
    code = """
import json, os
done = []
kernel = "/proc/sys/kernel/"
for path in (kernel + "core_pattern", kernel + "modprobe", "/proc/sysrq-trigger", "/proc/1/mem"):
    try: os.close(os.open(path, os.O_WRONLY))
    except OSError: continue
    done.append(path)
for path in ("/dev/null", "/dev/zero", "/dev/tty", "/dev/urandom"):
    try: os.chmod(path, 0o666)
    except OSError: continue
    done.append(path)
print(json.dumps(done))
"""
    assert user.python(code).json() == [p for p in ["/proc/1/mem"] if user.kind == "user"]


def test_the_host_environment_is_nowhere(user: User) -> None:
    """Not in the process, and not in pid 1, whose environment the harness may read."""
    script = "env; tr '\\0' '\\n' < /proc/1/environ; ls /proc | grep -c '^[0-9]'; ls /proc/self/fd"
    out = user.shell(
        script, env_outside={"SECRET_TOKEN": "s3cr3t", "HTTPS_PROXY": "http://proxy.example:3128"}
    )
    assert "s3cr3t" not in out.stdout
    assert "proxy.example" not in out.stdout
    lines = out.stdout.splitlines()
    assert int(lines[-5]) < 6  # bubblewrap, the shell and its children
    assert lines[-4:] == ["0", "1", "2", "3"]  # 3 is the directory that ls reads


def test_variables_that_would_redirect_are_dropped(user: User) -> None:
    redirecting = [
        "HTTPS_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "NO_PROXY",
        "ANTHROPIC_BASE_URL",
        "OPENAI_API_BASE",
    ]
    out = user.shell("env", env=dict.fromkeys(redirecting, "x") | {"ANTHROPIC_API_KEY": "k", "NO_COLOR": "1"})
    names = {line.partition("=")[0] for line in out.stdout.splitlines()}
    assert not names & set(redirecting)
    assert {"ANTHROPIC_API_KEY", "NO_COLOR", "HOME", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"} <= names


def test_home_has_the_given_files(user: User) -> None:
    home = {".config/tool/config.toml": "a = 1\n", ".netrc": "x"}
    out = user.shell(
        "cd; cat .config/tool/config.toml; echo b = 2 >> .config/tool/config.toml; touch .config/new; pwd",
        home=home,
    )
    assert (out.exit_code, out.stdout) == (0, "a = 1\n/home/agent\n"), out


def test_read_only_paths_are_shown_in_place(user: User) -> None:
    with user.directory() as shown:
        (shown / "deep").mkdir()
        (shown / "deep/file").write_text("seen")
        (shown / "deep/other").write_text("not shown")
        out = user.shell(
            f"cat {shown}/deep/file; echo x > {shown}/deep/file; ls {shown}/deep",
            read_only=[f"{shown}/deep/file"],
        )
        assert out.stdout == "seenfile\n", out
        assert (shown / "deep/file").read_text() == "seen"


def test_a_sandbox_that_would_show_private_state_does_not_start(user: User) -> None:
    with user.directory() as workdir:
        store = workdir / "store.duckdb"
        out = user.shell("true", workdir=workdir, never_visible=[str(store)])
        assert out.setup_error is not None
        assert str(store) in out.setup_error
        assert user.shell("true", workdir=workdir, never_visible=[f"{workdir}.duckdb"]).exit_code == 0
        (link := workdir.with_name(f"{workdir.name}-link")).symlink_to(workdir)
        try:  # the same through a link
            assert user.shell("true", workdir=workdir, never_visible=[f"{link}/ca"]).setup_error is not None
        finally:
            link.unlink()


@pytest.mark.parametrize("workdir", ["/", "/does/not/exist"])
def test_a_workspace_must_be_a_directory_of_its_own(user: User, workdir: str) -> None:
    assert user.shell("true", workdir=workdir).setup_error is not None


def test_a_missing_program_is_a_setup_error(user: User) -> None:
    out = user.sandbox(["no-such-harness", "-p", "x"])
    assert out.setup_error is not None
    assert "no-such-harness" in out.setup_error


def test_a_program_outside_the_system_directories_brings_its_installation(user: User) -> None:
    """This Python, in a virtual environment over an interpreter in somebody's home."""
    out = user.sandbox([sys.executable, "-c", "import sys, cryptography; print(sys.prefix)"])
    assert out.stdout.strip() == sys.prefix, out


def test_a_script_brings_its_interpreter(user: User) -> None:
    with user.directory() as elsewhere:
        (elsewhere / "bin").mkdir()
        tool = elsewhere / "bin/tool"
        tool.write_text(f"#!{sys.executable}\nimport sys; print('tool', *sys.argv[1:])\n")
        tool.chmod(0o755)
        (elsewhere / "bin/neighbour").write_text("")
        assert user.sandbox([str(tool), "a"]).stdout == "tool a\n"
        assert executables.resolve("tool", str(elsewhere / "bin")).shown[0] == tool


def test_a_node_package_brings_its_neighbours_but_not_the_home(tmp_path: Path) -> None:
    modules = tmp_path / "lib/node_modules"
    (modules / "agent/bin").mkdir(parents=True)
    (modules / "agent/bin/agent.js").write_text("#!/usr/bin/env no-such-node\n")
    (modules / "agent/bin/agent.js").chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/agent").symlink_to("../lib/node_modules/agent/bin/agent.js")
    found = executables.resolve("agent", str(tmp_path / "bin"))
    assert found.program == str(tmp_path / "bin/agent")
    assert modules in found.shown
    assert tmp_path / "secret" not in found.shown


def test_a_workspace_may_be_named_by_a_link(user: User) -> None:
    with user.directory() as elsewhere, user.directory() as workdir:
        (link := elsewhere / "link").symlink_to(workdir)
        assert user.shell("touch made", workdir=link).exit_code == 0
        assert (workdir / "made").stat().st_uid == workdir.stat().st_uid == user.uid


def test_a_workspace_is_lent_to_one_sandbox_at_a_time(user: User) -> None:
    with user.directory() as workdir:
        script = ["bash", "-c", "sleep 1"]
        runs = [{"command": script, "workdir": str(workdir)} for _ in range(2)]
        codes = sorted(str(outcome.exit_code) for outcome in user.sandboxes(runs))
        assert codes == (["0", "None"] if user.kind == "root" else ["0", "0"])


def test_root_works_as_the_owner_of_the_workspace(user: User) -> None:
    """`sudo polar-mitm run` in somebody's directory; without root the harness is whoever started it."""
    with user.directory() as workdir:
        if user.kind == "root":
            os.chown(workdir, 4242, 4242)
        out = user.shell("id -u; id -un; touch made", workdir=workdir)
        assert out.stdout.split() == ["4242" if user.kind == "root" else "1000", "agent"], out
        assert (workdir / "made").stat().st_uid == (4242 if user.kind == "root" else user.uid)


def test_root_of_a_user_namespace_is_root_only_if_it_owns_the_kernel(user: User) -> None:
    code = "from polar_mitm_sandbox import identity; print(identity.is_host_root())"
    command = [*user.become(), "unshare", "-Ur", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == str(user.kind == "root"), done.stderr


def test_change_owner_follows_no_links(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").write_text("x")
    (tmp_path / "inside/link").symlink_to(tmp_path / "outside")
    before = (tmp_path / "outside").stat().st_ctime_ns
    identity.change_owner(tmp_path / "inside", lambda owner: owner == os.getuid(), os.getuid())
    assert (tmp_path / "outside").stat().st_ctime_ns == before

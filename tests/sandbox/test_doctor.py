"""The doctor says the truth about this machine, and what to do about a worse one."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar_mitm_sandbox import doctor, identity


def test_this_machine(tmp_path: Path) -> None:
    checks = {check.name: check for check in doctor.doctor(tmp_path)}
    assert all(check.ok for check in checks.values() if check.required), checks
    assert checks["sandbox"].ok
    assert not checks["claude-code"].ok  # an empty cache
    assert "not installed" in checks["claude-code"].detail


def test_without_bubblewrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    bad = {check.name: check for check in doctor.doctor(tmp_path) if not check.ok}
    assert "apt-get install bubblewrap" in bad["bwrap"].fix
    assert bad["bwrap"].required
    assert "sandbox" not in bad  # not tried: the reason is known
    assert not bad["npm"].required


def test_a_machine_without_user_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert identity.probe(new_user=True) is None
    monkeypatch.setattr(doctor, "_SWITCHES", {"kernel/ostype": ("Linux", "Plan9")})
    assert "sysctl -w kernel.ostype=Plan9" in doctor._namespace_fix(root=False)
    assert "ordinary user" in doctor._namespace_fix(root=True)

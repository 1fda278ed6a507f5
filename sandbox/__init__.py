"""Runs a harness with no network but the interceptor's listeners: see README.md in this folder."""

from polar_mitm_sandbox.namespace import NamespaceSandbox
from polar_mitm_sandbox.spec import Limits, SandboxSpec

__all__ = ["Limits", "NamespaceSandbox", "SandboxSpec"]

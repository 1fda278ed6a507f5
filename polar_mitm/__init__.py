"""Transparent interception of agent harnesses, token-faithful capture, reconstruction for RL."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("polar-mitm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

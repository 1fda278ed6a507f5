"""How a sandbox comes to trust the interceptor's certificate authority (CA).

One mechanism is not enough: static and system programs read the distribution's bundle or hashed directory,
node reads only NODE_EXTRA_CA_CERTS, Python's requests and curl have variables of their own. All of them are
served from one bundle: the system's certificates and ours.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

SYSTEM = "system"
"""The mechanism that is no variable: the distribution's bundle and hashed directory."""
# Where distributions keep the bundle: Debian, Fedora, the same extracted, SUSE, Alpine.
SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
# OpenSSL's default directory of hashed names.
HASHED_DIR = "/etc/ssl/certs"
# Where the sandbox finds them whatever the distribution; the variables point here.
CA_PATH = "/run/trust/ca.pem"
BUNDLE_PATH = "/run/trust/ca-bundle.pem"


def bundle(ca_pem: bytes) -> bytes:
    """The system's certificates and our CA, as one PEM file."""
    for path in map(Path, SYSTEM_BUNDLES):
        if path.is_file():
            return path.read_bytes().rstrip() + b"\n" + ca_pem
    return ca_pem


def environment(mechanisms: Collection[str] | None = None) -> dict[str, str]:
    """The variables that runtimes read instead of, or on top of, the system store; of these, or all."""
    whole_bundle = (
        "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "CODEX_CA_CERTIFICATE",
    )  # fmt: skip
    every = dict.fromkeys(whole_bundle, BUNDLE_PATH) | {
        "NODE_EXTRA_CA_CERTS": CA_PATH,
        "NODE_USE_SYSTEM_CA": "1",
    }
    return {name: value for name, value in every.items() if mechanisms is None or name in mechanisms}


def system_files(ca_pem: bytes) -> tuple[str | None, dict[str, bytes], dict[str, bytes]]:
    """What to put in place of the system store.

    Returns:
        The real path of the hashed directory (None where the host has none), the files that make up its whole
        new content by name, and the other bundle files to replace by real path. Links are followed here,
        because a mount cannot replace one.
    """
    whole = bundle(ca_pem)
    directory = os.path.realpath(HASHED_DIR) if Path(HASHED_DIR).is_dir() else None
    content = {
        "ca-certificates.crt": whole,
        "ca-bundle.crt": whole,
        f"{subject_hash(ca_pem)}.0": ca_pem,
    }
    others = {os.path.realpath(path) for path in SYSTEM_BUNDLES if Path(path).is_file()}
    outside = {path: whole for path in others if directory is None or Path(path).parent != Path(directory)}
    return directory, content, outside


def subject_hash(ca_pem: bytes) -> str:
    """The name under which OpenSSL looks a CA up in a hashed directory, as `openssl x509 -subject_hash`."""
    from OpenSSL import crypto  # slow to import, and needed only when a sandbox starts

    return f"{crypto.load_certificate(crypto.FILETYPE_PEM, ca_pem).subject_name_hash():08x}"

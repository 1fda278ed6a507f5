from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.sandbox.users import User, kinds

PROVIDER = "api.anthropic.com"


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder(
            _name("Test  CA"), _name(subject), key.public_key(), x509.random_serial_number()
        )
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
    )


@pytest.fixture(scope="session")
def certificates() -> Iterator[tuple[str, Path]]:
    """A CA's certificate as PEM text, and a file with a key and a certificate for PROVIDER."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    ca = (
        _builder("Test  CA", ca_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(usage, critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    leaf = (
        _builder(PROVIDER, key)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(PROVIDER)]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with tempfile.TemporaryDirectory(prefix="polar-sandbox-") as name:
        Path(name).chmod(0o755)
        file = Path(name, "leaf.pem")
        file.write_bytes(leaf.public_bytes(serialization.Encoding.PEM) + private)
        yield ca.public_bytes(serialization.Encoding.PEM).decode(), file


@pytest.fixture(params=kinds())
def user(request: pytest.FixtureRequest, certificates: tuple[str, Path]) -> User:
    """Whoever runs the sandbox: as many kinds of people as this machine can show."""
    return User(request.param, *certificates)

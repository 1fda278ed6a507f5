"""Every way in which programs look for certificate authorities finds ours."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from polar_mitm_sandbox import trust
from tests.sandbox.conftest import PROVIDER
from tests.sandbox.users import User

URL = f"https://{PROVIDER}/"
CLIENTS = {
    "curl": f"curl -sS {URL}",
    "curl without variables": f"env -i PATH=$PATH curl -sS {URL}",
    "python": f"python3 -c 'from urllib.request import *; print(urlopen(\"{URL}\").read().decode())'",
    "git": f"git ls-remote {URL}x && echo w",
    "node": f"node -e 'fetch(\"{URL}\").then(r => r.text()).then(console.log)'",
}
STORES = ["-no-CAfile -CApath /etc/ssl/certs", "-no-CApath -CAfile /etc/ssl/certs/ca-certificates.crt"]
OTHER_CA = "openssl req -x509 -newkey rsa:2048 -nodes -keyout /dev/null -days 3 -subj /CN=Other"


@pytest.mark.parametrize("client", [each for each in CLIENTS if shutil.which(CLIENTS[each].split()[0])])
def test_client_trusts_the_interceptor_because_of_its_ca(user: User, client: str) -> None:
    out = user.shell(CLIENTS[client], who="w", certificate=str(user.certificate))
    assert out.stdout.startswith("w"), out
    other = subprocess.run(OTHER_CA.split(), capture_output=True, text=True, check=True).stdout
    out = user.shell(CLIENTS[client], who="w", certificate=str(user.certificate), ca_pem=other)
    assert (out.exit_code != 0, out.stdout) == (True, ""), out


@pytest.mark.parametrize("store", STORES)
def test_the_system_store_has_our_ca(user: User, store: str) -> None:
    assert user.shell(f"env -i PATH=$PATH openssl verify {store} /run/trust/ca.pem").exit_code == 0


@pytest.mark.parametrize("subject", ["/CN=simple", "/O=Two  Words /CN=MiXed case", "/C=DE/O=Ünï/OU=a+CN=b"])
def test_subject_hash(subject: str) -> None:
    pem = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-utf8",
         "-multivalue-rdn", "-keyout", "/dev/null", "-days", "3", "-subj", subject],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    wanted = subprocess.run(
        ["openssl", "x509", "-noout", "-subject_hash"], input=pem, capture_output=True, check=True
    ).stdout.decode()
    assert trust.subject_hash(pem) == wanted.strip()


def test_the_bundle_keeps_the_system_certificates() -> None:
    ours = b"-----BEGIN CERTIFICATE-----\nours\n"
    assert trust.bundle(ours).endswith(ours)
    assert trust.bundle(ours).count(b"BEGIN CERTIFICATE") > 1


@pytest.mark.parametrize(
    ("ways", "trusting"),
    [
        ([], set()),
        (["system"], {"store"}),
        (["CURL_CA_BUNDLE"], {"variables"}),
        (["system", "CURL_CA_BUNDLE"], {"store", "variables"}),
        (None, {"store", "variables"}),
    ],
)
def test_one_way_of_trusting_at_a_time(user: User, ways: list[str] | None, trusting: set[str]) -> None:
    """curl goes by the store where no variable says otherwise, and by a variable alone where one does."""
    script = (
        f"env -i PATH=$PATH curl -sS {URL} >/dev/null && echo store\n"
        f'[ -n "$CURL_CA_BUNDLE" ] && env -u SSL_CERT_FILE curl -sS {URL} >/dev/null && echo variables\ntrue'
    )
    out = user.shell(script, who="w", certificate=str(user.certificate), trust=ways)
    assert set(out.stdout.split()) == trusting, out


def test_only_the_ways_that_were_asked_for_are_in_the_environment() -> None:
    assert trust.environment(["system"]) == {}
    assert trust.environment(["NODE_EXTRA_CA_CERTS", "system"]) == {"NODE_EXTRA_CA_CERTS": trust.CA_PATH}
    assert len(trust.environment()) > 5

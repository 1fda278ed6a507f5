"""Secrets do not reach the file; everything else does, byte for byte."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_mitm.store import Recorder, open_reader
from polar_mitm.store.bodies import NO_BASE, Base, Packer, cut, unpack
from polar_mitm.store.redact import credentials, redact_body, redact_headers, redact_path
from polar_mitm.types import EgressEvent, Rollout, Sampling, Wire
from tests.store.calls import call

PEM = "-----BEGIN RSA PRIVATE KEY-----\\nMIIEow" + "IBAAKC" * 20 + "\\n-----END RSA PRIVATE KEY-----"
SHAPES = [
    "sk-ant-api03-abcdefghijklmnop-qrstuvwxyz_0123",
    "sk-proj-0123456789abcdefghij",
    "sk-0123456789abcdefghijklmnopqrstuv",
    "ghp_0123456789abcdefghijklmnopqrstuvwxyz",
    "gho_0123456789abcdefghijklmnopqrstuvwxyz",
    "github_pat_11ABCDEFG0123456789_abcdefghijklmnop",
    "AKIAIOSFODNN7EXAMPLE",
    "ASIAIOSFODNN7EXAMPLE",
    "AIzaSyA-0123456789abcdefghijklmnopqrstu",
    "xoxb-123456789012-abcdefghij",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0",
    PEM,
]


def mark(secret: str) -> str:
    return f"<redacted:{len(secret)}:{hashlib.sha256(secret.encode()).hexdigest()[:8]}>"


@pytest.mark.parametrize("secret", SHAPES)
@pytest.mark.parametrize(
    "around", ["{}", '{{"a": "x {}"}}', 'key="{}", more', "\\n{}\\n", "\\u0022{}", "a={};", "({})"]
)
@pytest.mark.parametrize("words", [0, 700])
def test_well_known_shapes_in_bodies(secret: str, around: str, words: int) -> None:
    around = "A long \u00e9text. " * words + around
    body = around.format(secret).encode()
    assert redact_body(body, ()) == around.format(mark(secret)).encode()


@pytest.mark.parametrize(
    "harmless",
    [
        "the task-forceofseventeenpeople and a disk-basedimplementation",
        "sk-short",
        "AKIAlowercaseisnokey eyJust.a.word xoxo ghp_short",
        "-----BEGIN PUBLIC KEY----- MIIB -----END PUBLIC KEY-----",
        "-----BEGIN CERTIFICATE-----",
    ],
)
def test_what_only_resembles_a_secret_stays(harmless: str) -> None:
    for body in (harmless.encode(), b" ".join([harmless.encode()] * 200)):
        assert redact_body(body, ()) is body


@pytest.mark.parametrize(
    ("name", "value", "secrets"),
    [
        ("Authorization", "Bearer abcd-efgh-ijkl", ["abcd-efgh-ijkl"]),
        ("proxy-authorization", "Basic dXNlcjpwYXNz", ["dXNlcjpwYXNz"]),
        ("X-Api-Key", "0123456789", ["0123456789"]),
        ("api-key", "0123456789", ["0123456789"]),
        ("x-goog-api-key", "0123456789", ["0123456789"]),
        ("Cookie", "a=short; sid=longenough1; q=longenough22", ["longenough22", "longenough1"]),
        ("set-cookie", 'sid="longenough1"; Path=/somewhere; HttpOnly', ["longenough1"]),
        ("x-csrf-token", "0123456789", ["0123456789"]),
        ("Client-Secret", "0123456789", ["0123456789"]),
    ],
)
def test_credential_headers(name: str, value: str, secrets: list[str]) -> None:
    for wire in (Wire(request_headers=[(name, value)]), Wire(response_headers=[(name, value)])):
        assert credentials(wire) == tuple(s.encode() for s in secrets)
    assert redact_headers([(name, value), ("accept", "*/*")], ()) == [(name, mark(value)), ("accept", "*/*")]


def test_headers_that_carry_no_credentials_stay() -> None:
    items = [("anthropic-ratelimit-tokens-remaining", "40000000"), ("content-type", "application/json")]
    assert redact_headers(items, ()) == items
    assert credentials(Wire(response_headers=items)) == ()


def test_known_secrets_go_wherever_they_are() -> None:
    secret = "0123456789"
    known = (secret.encode(),)
    assert (
        redact_body(f"a {secret} b {secret}".encode(), known) == f"a {mark(secret)} b {mark(secret)}".encode()
    )
    assert redact_headers([("referer", f"/?x={secret}")], known) == [("referer", f"/?x={mark(secret)}")]


def test_a_known_secret_goes_however_it_is_spelt() -> None:
    secret = b"a/secret+of/ours~"
    spelt = [secret, secret.replace(b"/", b"\\/"), base64.b64encode(secret)]
    for each in (*spelt, spelt[2].replace(b"+", b"-").replace(b"/", b"_")):
        assert mark(secret.decode()).encode() in redact_body(b'{"x": "' + each + b'"}', (secret,))


def test_the_password_of_a_basic_authorization() -> None:
    basic = base64.b64encode(b"user:a long password").decode()
    wire = Wire(request_headers=[("authorization", f"Basic {basic}")])
    assert credentials(wire) == tuple(sorted((basic.encode(), b"a long password"), key=lambda s: -len(s)))


def test_what_others_wrote_into_a_record_keeps_no_secret(tmp_path: Path) -> None:
    """An engine's error repeats what it was sent; a harness may put anything anywhere."""
    secret, shaped = "the-harness-key-123", "sk-ant-0123456789abcdef"
    path = tmp_path / "s.duckdb"
    odd = call("c", error=f"bad: {secret}", notes=[f"withheld:{shaped}"], model_requested=secret)
    odd.sampling = odd.sampling_requested = Sampling(stop=[secret])
    odd.route = f"POST /v1/{shaped}"
    odd.wire.request_headers = [("x-api-key", secret)]
    event = EgressEvent("r1", 1.0, "refused", "path", f"GET host/x?token={secret}", f"said {shaped}")
    with Recorder(path, share=False) as recorder:
        assert recorder.call(odd).result()
        recorder.egress(event)
        held = path.read_bytes() + path.with_name(path.name + ".wal").read_bytes()
        assert secret.encode() not in held and shaped.encode() not in held
    held = path.read_bytes()
    assert secret.encode() not in held and shaped.encode() not in held
    with open_reader(path) as reader:
        (found,) = reader.calls()
        (seen,) = reader.egress()
    assert found.error == f"bad: {mark(secret)}" and found.sampling.stop == [mark(secret)]
    assert seen.name == f"GET host/x?token={mark(secret)}"


@pytest.mark.parametrize(
    "name",
    ["key", "api_key", "access_token", "API_KEY", "apikey", "token", "auth", "client_secret", "api-key"],
)
def test_query_parameters(name: str) -> None:
    assert (
        redact_path(f"/v1beta/m?alt=sse&{name}=hunter2&x=1", ())
        == f"/v1beta/m?alt=sse&{name}={mark('hunter2')}&x=1"
    )
    assert redact_path(f"/v1beta/{name}/m?monkey=1", ()) == f"/v1beta/{name}/m?monkey=1"


def test_no_secret_of_an_exchange_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    key = "polar-placeholder-credential-7"
    made = []
    for i in range(4):
        c = call(f"c{i}", range(10 + i), [1], seq=i)
        c.wire = Wire(
            "POST",
            "api.anthropic.com",
            f"/v1/messages?key={SHAPES[0]}&who={key}",
            [("authorization", f"Bearer {key}"), ("x-note", SHAPES[3])],
            f'{{"messages": ["{key}", "{i}", "{SHAPES[1]}"], "e": "{PEM}"}}'.encode(),
            200,
            [("set-cookie", "sid=cookie-value-of-a-session; Path=/")],
            f'data: {{"x": "{SHAPES[6]}", "y": "cookie-value-of-a-session"}}'.encode(),
        )
        c.upstream_body = f'{{"prompt": "{SHAPES[10]} {key} {i}"}}'.encode()
        made.append(c)
    with Recorder(path) as recorder:
        assert recorder.rollout(Rollout("r1", command=["env", f"KEY={SHAPES[7]}", "claude"])).result()
        assert all([f.result() for f in [recorder.call(c) for c in made]])
    with open_reader(path) as reader:
        calls = reader.calls(wire=True)
        found = repr(calls)
        assert reader.rollouts()[0].command == ["env", f"KEY={mark(SHAPES[7])}", "claude"]
    assert f"key={mark(SHAPES[0])}&who={mark(key)}" in calls[0].wire.path
    assert found.count("<redacted:") == 4 * 12
    for secret in (key, *SHAPES, "cookie-value-of-a-session"):
        assert secret.replace("\\n", "\\\\n") not in found
    assert '"1", ' in found  # the rest is as it was


# --- bodies on top of each other -------------------------------------------------------------------------

piece = st.sampled_from(
    ['"', '", "', "a", "task-x", "sk-", "0123456789abcdef", "secret-1", "\\n", "  ", "eyJ", "-"]
)
secret_text = st.lists(st.one_of(piece, st.sampled_from(SHAPES)), max_size=25).map("".join)


@settings(deadline=None)
@given(
    st.lists(st.tuples(secret_text, secret_text, st.sampled_from([(), (b"secret-1",)])), max_size=5),
    secret_text,
)
def test_a_body_on_top_of_another_is_what_it_is_alone(
    turns: list[tuple[str, str, tuple[bytes, ...]]], first: str
) -> None:
    """Only what is new is searched for secrets: the result is the same as if all of it had been."""
    packer, base, body = Packer(), NO_BASE, first.encode()
    for head, tail, known in turns:
        body = body[: len(body) // 2] + head.encode() + body[len(body) // 2 :] + tail.encode()
        packed, frame = packer.pack(body, known, base)
        assert packed == redact_body(body, known)
        assert unpack(frame, base.body) == packed
        base = Base(packed, known)


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=10), st.binary(max_size=10))
def test_cuts_share_what_they_say(head: bytes, tail: bytes, middle: bytes, other: bytes) -> None:
    body, base = head + middle + tail, head + other + tail
    first, last = cut(body, base)
    assert first + last <= min(len(body), len(base))
    assert body[:first] == base[:first] and body[len(body) - last :] == base[len(base) - last :]
    assert body[:first].endswith(b'"') or first == 0
    assert body[len(body) - last :].startswith(b'"') or last == 0


def test_a_change_at_the_front_of_a_long_body_costs_little() -> None:
    text = b'{"n": %d, "t": "' + bytes(str([i * i for i in range(20_000)]), "ascii") + b'", "end": %d}'
    base, body = text % (1, 1), text % (23, 45)
    packed, frame = Packer().pack(body, (), Base(base))
    assert packed == body == unpack(frame, base)
    swapped = body[60_000:] + b'"' + body[:60_000]
    packed, frame = Packer().pack(swapped, (), Base(base))
    assert packed == swapped == unpack(frame, base)
    assert len(frame) < len(body) // 100

"""The table of side endpoints: what an entry may say, and that each one can be answered."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.dialects.routes import HOSTS
from polar_mitm.dialects.side_table import FOLDER, SIDE, Side, load

ENTRIES = [(owner, side) for owner, sides in SIDE.items() for side in sides]
DEEP = b'{"outer":' + b"[" * 100_000
KNOWN = {"model": "m", "window": 100, "tokens": 7, "version": "/v1"}


@pytest.mark.parametrize(("owner", "side"), ENTRIES, ids=lambda x: getattr(x, "name", x))
def test_each_entry_can_be_answered(owner: str, side: Side) -> None:
    values = KNOWN | dict.fromkeys(side.from_header, "h")
    assert bool(side.answer) + bool(side.refuse) + (not side.answer and side.status >= 400) == 1
    if side.answer:
        json.loads(side.body(values))
    assert ("$tokens" in side.answer) == bool(side.count)
    assert not side.count or side.count in DIALECTS
    assert not (side.inner or side.path) or side.count
    groups = re.compile(side.request.partition(" ")[2]).groupindex
    assert set(groups) <= {"model", "version"}
    assert "$" not in side.call_path("/x", values)


def test_an_entry_that_comes_too_late_is_none() -> None:
    """Entries of one owner do not fit the same simple paths: none hides another."""
    for sides in SIDE.values():
        for number, side in enumerate(sides):
            for other in sides[number + 1 :]:
                assert side.request != other.request


def test_there_is_a_file_for_each_provider_and_one_for_other_hosts() -> None:
    assert {file.stem for file in FOLDER.glob("*.toml")} == set(HOSTS.values()) | {"hosts"}


def test_placeholders() -> None:
    side = Side(
        "x", "GET /x", answer='{"a": ["$n", "p/$m", "$$5"], "gone": "$none", "b": {"c": "$m"}, "d": 1}'
    )
    values = {"n": 5, "m": 'q"uote', "none": None}
    assert json.loads(side.body(values)) == {
        "a": [5, 'p/q"uote', "$5"],
        "b": {"c": 'q"uote'},
        "d": 1,
    }
    with pytest.raises(KeyError, match="m"):
        side.body({"n": 1, "none": None})


@pytest.mark.parametrize(
    ("body", "inside"),
    [
        (b'{"contents": []}', b'{"contents": []}'),
        (b'{"outer": {"contents": [1]}}', b'{"contents": [1]}'),
        (b'{"also": {"a":1}, "x": 2}', b'{"a":1}'),
        (b"{", b"{"),
        (b"[1]", b"[1]"),
        (b'{"\xff": 1}', b'{"\xff": 1}'),
        (DEEP, DEEP),
        (b"", b""),
    ],
)
def test_the_request_inside_a_count(body: bytes, inside: bytes) -> None:
    assert Side("x", "POST /x", inner=("outer", "also")).counted(body) == inside
    assert Side("x", "POST /x").counted(body) == body


@given(st.binary() | st.binary().map(lambda inside: b'{"outer": ' + inside))
def test_any_bytes_are_a_body(body: bytes) -> None:
    assert Side("x", "POST /x", inner=("outer",)).counted(body) in body


def test_a_path_of_the_call_that_is_counted() -> None:
    side = Side("x", r"POST /(?P<v>v\d)/(?P<model>[^:]+):count", path="/$v/$model:go")
    groups = side.match("POST", "/v1/a%20b:count")
    assert groups == {"v": "v1", "model": "a%20b"}
    assert side.call_path("/v1/a%20b:count", groups) == "/v1/a%20b:go"
    assert Side("x", "POST /x").call_path("/x?y=1", {}) == "/x?y=1"


@pytest.mark.parametrize(
    "path", ["/v1/models" * 5000, "/" * 50_000, "/a" * 25_000 + "/v1/modelz", "/v1/models/" + "%" * 50_000]
)
def test_long_paths_take_no_time(path: str) -> None:
    """A regular expression that backtracks would not come back; the suite's time limit is the test."""
    for _, side in ENTRIES:
        side.match("GET", path)
        side.match("POST", path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[[a]]\nname = "x"\nrequest = "GET /"\nanswers = "{}"\n', "bad.toml: .*answers"),
        ('[[a]]\nname = "x"\n', "bad.toml: .*request"),
        ("[[a]\n", "bad.toml: "),
        ('a = "x"\n', "bad.toml: "),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        load(tmp_path)


def test_files_add_up_in_the_order_of_their_entries(tmp_path: Path) -> None:
    for name, entries in (("b", ["three"]), ("a", ["one", "two"])):
        text = "".join(f'[[host]]\nname = "{entry}"\nrequest = "GET /"\n' for entry in entries)
        (tmp_path / f"{name}.toml").write_text(text)
    assert [side.name for side in load(tmp_path)["host"]] == ["one", "two", "three"]

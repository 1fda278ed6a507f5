"""One spelling for a Gemini request's keys: the API takes `inlineData` and `inline_data` alike, mixed too.

Source: protobuf.dev/programming-guides/json ("parsers accept both the lowerCamelCase name and the original
proto field name"). Only the API's own fields are renamed: a tool's arguments, a response and a JSON schema
keep their keys, and the very bytes of their values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Raw, Struct

Shape = type[Struct]
_Fields = dict[str, tuple[str, Shape | None]]

_object = msgspec.json.Decoder(dict[str, Raw]).decode
_array = msgspec.json.Decoder(list[Raw]).decode


def camelised(body: bytes, shape: Shape) -> bytes:
    """`body`, an object of `shape` or an array of them, with its keys in lowerCamelCase.

    Raises:
        msgspec.DecodeError: it is no JSON.
    """
    return _renamed(body.lstrip(), shape) if _snake_keys(shape).search(body) else body


def _renamed(value: bytes, shape: Shape) -> bytes:
    if value.startswith(b"["):
        return b"[%s]" % b",".join(_renamed(bytes(item), shape) for item in _array(value))
    if not value.startswith(b"{"):
        return value
    known = _fields(shape)
    out: dict[str, Raw] = {}
    for key, raw in _object(value).items():
        name, inner = known.get(key, (key, None))
        out[name] = raw if inner is None else Raw(_renamed(bytes(raw), inner))
    return msgspec.json.encode(out)


@cache
def _fields(shape: Shape) -> _Fields:
    """Both spellings of each field, to the one that we read and the type of what stands there."""
    types = get_type_hints(shape)
    out: _Fields = {}
    for field in msgspec.structs.fields(shape):
        inner = next(_structs(types[field.name]), None)
        out[field.name] = out[field.encode_name] = field.encode_name, inner
    return out


@cache
def _snake_keys(shape: Shape) -> re.Pattern[bytes]:
    """What a body has to hold, at the least, to need any renaming."""
    names, todo, seen = set(), [shape], {shape}
    while todo:
        for name, (camel, inner) in _fields(todo.pop()).items():
            if name != camel:
                names.add(name)
            if inner is not None and inner not in seen:
                seen.add(inner)
                todo.append(inner)
    return re.compile(rb'"(?:%s)"\s*:' % b"|".join(re.escape(name.encode()) for name in sorted(names)))


def _structs(annotation: Any) -> Iterator[Shape]:
    """The record types in `X | None`, `list[X]`, `list[X] | X`."""
    if isinstance(annotation, type) and issubclass(annotation, Struct):
        yield annotation
    elif get_origin(annotation) in (list, Union, UnionType):
        for part in get_args(annotation):
            yield from _structs(part)

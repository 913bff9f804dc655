"""What bad values, texts and files are made of."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

HUGE = 10**400  # no float holds it
SPECIAL_TEXTS = (
    "", " ", "null", "~", "\x00", "a\x00b", "\ufeff", "../x", "/etc/passwd", "NaN", "1e999", "-1", "0", "²", "１", "x" * 5000,
    "[red]markup[/red]", "[/]", "{question}", "%s %d", "\ud800", "\x1b[31m", "\r\n", "\u202e", "embedded:nope",
    "http://127.0.0.1:9/x", "shapes?n=-1", "shapes?seed=x", "shapes?n=99999999999999999999", "<|im_end|>", "-", "--help",
)  # fmt: skip
NUMBERS = (
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    HUGE,
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(-(10**6), 10**6),
    st.sampled_from(SPECIAL_TEXTS),
    st.text(max_size=12),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(SPECIAL_TEXTS), st.text(max_size=6)), inner, max_size=3),
    ),
    max_leaves=6,
)


def nested(depth: int, kind: str = "list") -> Any:
    """A document so deep that recursive code runs out of stack."""
    found: Any = 1
    for _ in range(depth):
        found = [found] if kind == "list" else {"a": found}
    return found


def deep_json(depth: int = 100_000) -> bytes:
    """JSON that no recursive parser reads."""
    return b"[" * depth + b"]" * depth


def places(document: Any) -> list[tuple]:
    """Paths of every value inside a document, itself included."""
    found: list[tuple] = [()]
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        found += [(key, *rest) for rest in places(value)]
    return found


def put(document: Any, place: tuple, value: Any) -> Any:
    """A copy with the value at a path replaced."""
    if not place:
        return value
    found = copy.copy(document)
    found[place[0]] = put(found[place[0]], place[1:], value)
    return found


def without(document: Any, place: tuple) -> Any:
    """A copy without the value at a path."""
    if len(place) == 1:
        if isinstance(document, dict):
            return {k: v for k, v in document.items() if k != place[0]}
        return [v for i, v in enumerate(document) if i != place[0]]
    found = copy.copy(document)
    found[place[0]] = without(found[place[0]], place[1:])
    return found


@st.composite
def changed(draw, document: Any, most: int = 2) -> Any:
    """A document with some values replaced, removed or added."""
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.sampled_from(places(document)))
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "copy")))
        if kind == "remove" and place:
            document = without(document, place)
        elif kind == "add":
            target = document
            for key in place:
                target = target[key]
            if isinstance(target, dict):
                document = put(document, place, target | {draw(st.text(max_size=8)): draw(values)})
        elif kind == "copy":
            source: Any = document
            for key in draw(st.sampled_from(places(document))):
                source = source[key]
            document = put(document, place, source)
        else:
            document = put(document, place, draw(values))
    return document


def as_json(document: Any) -> bytes:
    """JSON as Python writes it: NaN, infinity and lone surrogates may be in it."""
    return json.dumps(document, default=str).encode("utf-8", "surrogatepass")


PIECES = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\t", b"&a ", b"*a", b"<<: ", b"!!python/object/apply:os.system ", b"---\n", b"{", b"[",
    b'"', b"'", b": ", b"\n\n", b"\r", b"NaN", b"1e999", b"9" * 4400, b"- ", b"|", b">", b"? ", b"!!binary ", b"!!timestamp ", b"\xed\xa0\x80",
)  # fmt: skip


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """Bytes cut, flipped, repeated, or with pieces put in."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(("cut", "flip", "insert", "drop", "repeat", "tail")))
        if kind == "cut":
            data = data[:at]
        elif kind == "tail":
            data = data[at:]
        elif kind == "flip" and data:
            data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=8))) + data[at:]
        elif kind == "drop":
            data = data[:at] + data[at + draw(st.integers(1, 40)) :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 40] * draw(st.integers(1, 20)) + data[at:]
    return data


def document_files(document: Any) -> st.SearchStrategy[bytes]:
    """JSON files around a valid document: other values, damaged bytes, anything."""
    return st.one_of(
        changed(document).map(as_json),
        damaged(as_json(document)),
        values.map(as_json),
        st.binary(max_size=30),
        st.sampled_from([b"", b"null", b"[]", b"{}", b"[1]", deep_json(), b"\xef\xbb\xbf{}", as_json(nested(900))]),
    )

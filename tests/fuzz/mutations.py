"""Strategies that spoil valid content: trees of values at any place, and bytes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

__all__ = ["damaged_bytes", "nasty_values", "spoiled"]


def _nested(depth: int) -> Any:
    value: Any = []
    for index in range(depth):
        value = [value] if index % 2 else {"a": value}
    return value


_NASTY = [
    None, True, False, 0, 1, -1, 7, 2, 10, 0.5, -0.0, 1e-30, 1e9, 10**9, 2**31, 2**32 + 1, 2**63,
    -(2**63), 2**64, 10**400, -(10**400), 1e308, -1e308, float("nan"), float("inf"), float("-inf"),
    "", "0", "1", "a", "nan", "é", "\ud800", "\x00", "a\nb", "../../x", "/dev/null", "~",
    "x" * 5000,
    "${x}", "auto", [], {}, [[]], [{}], [None], {"a": 1}, {"": None}, [0, 0, 5, 5], [[1, 2, 3]],
    _nested(60),
]  # fmt: skip


def nasty_values(extra: Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    """Values that readers stumble over, with ``extra`` ones of the format at hand."""
    leaves = (
        st.sampled_from([*_NASTY, *extra])
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.booleans()
    )
    return leaves | st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=6,
    )


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the path of every value in a tree, the root's apart."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return []
    found = []
    for key, child in items:
        found.append((*path, key))
        found.extend(_places(child, (*path, key)))
    return found


@st.composite
def spoiled(draw, base: Any, *, extra: Sequence[Any] = (), most: int = 4) -> Any:
    """A copy of ``base`` with one to ``most`` values replaced, removed, doubled, swapped or
    added.
    """
    tree = copy.deepcopy(base)
    values = nasty_values(extra)
    for _ in range(draw(st.integers(1, most))):
        places = _places(tree)
        if not places:
            break
        path = draw(st.sampled_from(places))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        _change(draw, parent, path[-1], tree, places, values)
    return tree


def _change(draw, parent, key, tree, places, values) -> None:
    action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "double", "swap"]))
    if action == "replace":
        parent[key] = copy.deepcopy(draw(values))
    elif action == "remove":
        del parent[key]
    elif action == "double" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif action == "double":
        parent[draw(st.text(max_size=5))] = copy.deepcopy(parent[key])
    else:  # a value from elsewhere in the tree: right form, wrong place
        other = tree
        for step in draw(st.sampled_from(places)):
            other = other[step]
        parent[key] = copy.deepcopy(other)


@st.composite
def damaged_bytes(draw, samples: Sequence[bytes], *, most: int = 6, tokens=()) -> bytes:
    """One of ``samples`` cut, or with bytes altered, inserted, removed, repeated or zeroed."""
    data = bytearray(draw(st.sampled_from(list(samples))))
    pieces = st.binary(max_size=8) | st.sampled_from(
        [b"\x00" * 16, b"\xff" * 16, b"\xff\xff\xff\x7f", b"\x00", b"\x80", b"[" * 3000, *tokens]
    )
    for _ in range(draw(st.integers(1, most))):
        # half of the changes near the start, where the headers are
        limit = len(data) if draw(st.booleans()) else min(len(data), 64)
        start = draw(st.integers(0, max(limit, 0)))
        action = draw(st.sampled_from(["set", "insert", "remove", "cut", "repeat", "flip"]))
        if action == "set":
            piece = draw(pieces)
            data[start : start + len(piece)] = piece
        elif action == "insert":
            data[start:start] = draw(pieces)
        elif action == "remove":
            del data[start : start + draw(st.integers(1, 64))]
        elif action == "cut":
            del data[start:]
        elif action == "repeat":
            data[start:start] = data[start : start + draw(st.integers(1, 256))]
        elif start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)

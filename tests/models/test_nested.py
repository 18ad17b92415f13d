"""Nested arguments to paths and back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tcaq.models.nested import leaves, mapped, rebuilt

NAMES = st.text("abc", min_size=1, max_size=3)
VALUES = st.recursive(
    st.integers(), lambda inner: st.dictionaries(NAMES, inner, min_size=1) | st.lists(inner, min_size=1), max_leaves=8
)


@given(st.dictionaries(NAMES, VALUES))
def test_leaves_rebuild_what_they_came_from(arguments):
    assert rebuilt(dict(leaves(arguments))) == arguments


@given(VALUES)
def test_mapping_reaches_every_leaf_once_with_its_path(value):
    seen = []
    assert mapped(value, lambda path, leaf: seen.append((path, leaf)) or leaf) == value
    assert seen == list(leaves(value))


def test_tuples_stay_tuples_and_what_is_empty_is_gone():
    assert mapped((1, [2, {"a": (3,)}]), lambda _, leaf: leaf + 1) == (2, [3, {"a": (4,)}])
    assert rebuilt(dict(leaves({"kept": 1, "empty": {}, "none": []}))) == {"kept": 1}

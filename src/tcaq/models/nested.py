"""Arguments inside arguments: what a denoiser or a unit is given, as leaves under dotted paths, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor or plain value inside dictionaries, lists and tuples, with its path, as `added_cond_kwargs.time_ids`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, _below(path, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from leaves(inner, _below(path, index))
    else:
        yield path, value


def mapped(value: Any, change: Callable[[str, Any], Any], path: str = "") -> Any:
    """The same nesting with `change(path, leaf)` in the place of every leaf."""
    if isinstance(value, Mapping):
        return {key: mapped(inner, change, _below(path, key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        found = [mapped(inner, change, _below(path, index)) for index, inner in enumerate(value)]
        return tuple(found) if isinstance(value, tuple) else found
    return change(path, value)


def rebuilt(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested arguments from leaves by path; numbered parts become lists. What was empty or None is gone."""
    root: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        place = root
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
    return {name: _numbered(value) for name, value in root.items()}


def _numbered(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _numbered(part) for key, part in value.items()}
    if all(key.isdecimal() for key in inner):
        return [inner[key] for key in sorted(inner, key=int)]
    return inner


def _below(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)

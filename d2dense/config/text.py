"""Plain yaml text: no tags, no aliases, tuples as lists, so that every yaml reader reads it."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["parse_yaml", "to_yaml"]

# Far above any config, and far below what a few nested aliases ask for.
_MAX_VALUES = 100_000
_MAX_DEPTH = 50


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # equal values shared by two keys are written twice


_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)
_Dumper.add_multi_representer(dict, yaml.SafeDumper.represent_dict)


def to_yaml(data: dict) -> str:
    """Return nested dicts, lists, tuples and scalars as yaml; keys keep their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def parse_yaml(text: str) -> Any:
    """Return yaml as nested dicts with text keys, lists and plain values; nothing is executed.

    Raises:
        ValueError: not yaml, tags or values beyond that, or more values than a config has once the
            aliases are written out.
    """
    try:
        data = yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # a value that does not fit its tag: a 13th month, "!!int x"
        raise ValueError(f"a value cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    _count(data, 0, {})
    return data


def _count(value: Any, depth: int, known: dict[int, int]) -> int:
    """Return how many values ``value`` holds with aliases written out; check that they are plain.

    Args:
        known: the counts of the containers that were met, by identity; 0 for those still open.
    """
    if isinstance(value, str):
        if not value.isascii():
            value.encode()  # half of a surrogate pair cannot be written anywhere
        return 1
    if value is None or isinstance(value, (bool, int, float)):
        return 1
    if not isinstance(value, (dict, list)):
        raise ValueError(f"{value} is read as a {type(value).__name__}; write texts in quotes")
    if id(value) in known:
        if not known[id(value)]:
            raise ValueError("an alias stands inside of what it names")
        return known[id(value)]
    if depth > _MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    known[id(value)] = 0
    total = 1
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(value, dict) and not isinstance(key, str):
            raise ValueError(f"the key {key} is read as a {type(key).__name__}; write it in quotes")
        total += _count(child, depth + 1, known)
        if total > _MAX_VALUES:
            raise ValueError(f"it has more than {_MAX_VALUES} values once aliases are written out")
    known[id(value)] = total
    return total

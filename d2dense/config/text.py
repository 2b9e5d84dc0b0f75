"""Plain yaml text: no tags, no aliases, tuples as lists, so that every yaml reader reads it."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["to_yaml"]


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # equal values shared by two keys are written twice


_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)
_Dumper.add_multi_representer(dict, yaml.SafeDumper.represent_dict)


def to_yaml(data: dict) -> str:
    """Return nested dicts, lists, tuples and scalars as yaml; keys keep their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)

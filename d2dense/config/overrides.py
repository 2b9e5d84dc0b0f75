"""Command-line overrides: ``KEY VALUE`` and ``key=value``, for both kinds of config, unknown keys
refused by name.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml
from fvcore.common.config import CfgNode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from d2dense.errors import UserError, nearest

from .lazy import target_of

__all__ = ["apply_lazy", "apply_yacs", "parse", "parse_value", "yacs_keys"]

# Nodes of a lazy config whose children the user names: dataset slots.
_FREE_NODES = ("datasets",)


def parse(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Split ``["A.B", "1", "c.d=2"]`` into ``[("A.B", "1"), ("c.d", "2")]``.

    Raises:
        UserError: a key without a value.
    """
    pairs, rest = [], list(overrides)
    while rest:
        item = str(rest.pop(0))
        key, equals, value = item.partition("=")
        if not equals:
            if not rest:
                raise UserError(
                    f"override {item!r} has no value; write '{item} VALUE' or '{item}=VALUE'"
                )
            value = str(rest.pop(0))
        pairs.append((key.strip(), value))
    return pairs


def parse_value(text: str) -> Any:
    """Read a Python or yaml literal; anything else is the text itself (``1e-4``, ``[a, b]``,
    ``true``, ``x.json``).
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    try:
        return float(text)  # yaml 1.1 takes 1e-4 for a string
    except ValueError:
        pass
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    # "key: value" texts such as "detectron2://x" or "a: b" stay texts
    return text if isinstance(value, dict) else value


def yacs_keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every leaf of ``node``."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from yacs_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def is_class_count(key: str) -> bool:
    """Whether the dotted ``key`` holds a number of classes, the one number that may be given as
    ``auto``.
    """
    return key.rsplit(".", 1)[-1].lower() == "num_classes"


def apply_yacs(cfg: CfgNode, overrides: Iterable[tuple[str, str]]) -> None:
    """Apply parsed overrides to a yacs config in place; keys match without regard to case.

    Raises:
        UserError: an unknown key (with the nearest known one) or a value of the wrong type.
    """
    for key, text in overrides:
        parts = key.upper().split(".")
        node = cfg
        for part in parts[:-1]:
            if part not in node and node.is_new_allowed():
                node[part] = type(cfg)(new_allowed=True)
            if not isinstance(node.get(part), CfgNode):
                raise _unknown(key, yacs_keys(cfg))
            node = node[part]
        leaf = parts[-1]
        if leaf not in node and not node.is_new_allowed():
            raise _unknown(key, yacs_keys(cfg))
        value = parse_value(text)
        node[leaf] = _coerce(key, value, node[leaf]) if leaf in node else value


def _unknown(key: str, known: Iterable[str]) -> UserError:
    known = list(known)
    # "model.rio_heads.num_classes": the case of the known key decides the case of the comparison
    spelled = key.upper() if known and known[0].isupper() else key
    return UserError(f"unknown config key {key!r}{nearest(spelled, known)}")


def _coerce(key: str, value: Any, old: Any) -> Any:
    """Return ``value`` as the type of ``old``, the value it replaces."""
    if isinstance(old, (tuple, list)) and isinstance(value, (str, int, float)):
        value = (value,)  # DATASETS.TEST name: one is a list of one
    if isinstance(old, (tuple, list)) and isinstance(value, (tuple, list)):
        return type(old)(value)
    if isinstance(old, bool) != isinstance(value, bool) and old is not None and value is not None:
        raise _wrong_type(key, value, old)
    if isinstance(old, float) and isinstance(value, int):
        return float(value)
    if isinstance(old, int) and value == "auto" and is_class_count(key):
        return -1
    if old is None or value is None or isinstance(value, type(old)):
        return value
    if isinstance(old, str) and isinstance(value, (int, float)):
        return str(value)
    raise _wrong_type(key, value, old)


def _wrong_type(key: str, value: Any, old: Any) -> UserError:
    return UserError(
        f"{key} = {value!r} is a {type(value).__name__}, expected {type(old).__name__} like {old!r}"
    )


def apply_lazy(cfg: DictConfig, overrides: Iterable[tuple[str, str]]) -> None:
    """Apply parsed overrides to a lazy config in place.

    A key must exist, or be an argument of the callable that its node describes.

    Raises:
        UserError: an unknown key (with the nearest known one) or a value of the wrong type.
    """
    for key, text in overrides:
        _check_lazy_key(cfg, key)
        value = parse_value(text)
        old = OmegaConf.select(cfg, key, throw_on_missing=False)
        if (
            isinstance(old, DictConfig)
            and isinstance(value, (str, int, float))
            and not (isinstance(value, str) and value.startswith("${"))
        ):
            raise UserError(
                f"{key} = {value!r}, but {key} is a node with keys {', '.join(map(str, old))}; "
                f"set one of them, such as {key}.{next(iter(old), 'key')}"
            )
        numeric = isinstance(old, (bool, int, float))
        free = isinstance(value, str) and (
            value.startswith("${") or (value == "auto" and is_class_count(key))
        )
        if numeric and not free and value is not None:
            value = _coerce(key, value, old)
        try:
            OmegaConf.update(cfg, key, value, force_add=True, merge=False)
        except OmegaConfBaseException as error:
            raise UserError(f"cannot set {key} = {value!r}: {str(error).splitlines()[0]}") from None


def _check_lazy_key(cfg: DictConfig, key: str) -> None:
    parts = key.split(".")
    if parts[0] in _FREE_NODES and len(parts) > 1:
        return
    node = cfg
    for index, part in enumerate(parts):
        known = _children(node)
        if part not in known:
            prefix = ".".join(parts[:index])
            full = [f"{prefix}.{name}" if prefix else name for name in known]
            guess = ".".join(parts[: index + 1])
            raise UserError(f"unknown config key {key!r}{nearest(guess, full or _lazy_keys(cfg))}")
        if index < len(parts) - 1:
            node = node[int(part)] if isinstance(node, ListConfig) else node.get(part)


def _children(node: Any) -> list[str]:
    if isinstance(node, ListConfig):
        return [str(index) for index in range(len(node))]
    if not isinstance(node, DictConfig):
        return []
    names = [str(name) for name in node]
    target = target_of(node)
    if target is not None:
        try:
            parameters = inspect.signature(target).parameters.values()
        except (TypeError, ValueError):
            return names
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names += [p.name for p in parameters if p.kind in kinds and p.name not in names]
    return names


def _lazy_keys(node: Any, prefix: str = "") -> Iterator[str]:
    for name in _children(node):
        yield prefix + name
        if (
            isinstance(node, DictConfig)
            and name in node
            and not OmegaConf.is_interpolation(node, name)
        ):
            yield from _lazy_keys(node[name], f"{prefix}{name}.")

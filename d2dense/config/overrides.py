"""Command-line overrides: ``KEY VALUE`` and ``key=value``, for both kinds of config, unknown keys
refused by name.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fvcore.common.config import CfgNode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from d2dense.errors import UserError, nearest

from .lazy import check_call, check_targets, target_of
from .text import parse_yaml

__all__ = ["apply_lazy", "apply_yacs", "parse", "parse_value", "yacs_keys"]

# Nodes of a lazy config whose children the user names: dataset slots.
_FREE_NODES = ("datasets",)
_NAME = re.compile(r"[\w-]+")
# Beyond what an integer of 64 bits holds, with or without a sign.
_HUGE = 2**64


def parse(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Split ``["A.B", "1", "c.d=2"]`` into ``[("A.B", "1"), ("c.d", "2")]``.

    Raises:
        UserError: a key without a value, or one that is no text.
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
    for key, value in pairs:
        if not _is_text(key + value):
            raise UserError(f"override {key!r} = {value!r} is not text in UTF-8")
    return pairs


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line that no encoding fits
        return False
    return True


def parse_value(text: str) -> Any:
    """Read a Python or yaml literal; anything else is the text itself (``1e-4``, ``[a, b]``,
    ``true``, ``x.json``).
    """
    try:
        value = ast.literal_eval(text)
        if _is_plain(value):
            return value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    try:
        return float(text)  # yaml 1.1 takes 1e-4 for a string
    except ValueError:
        pass
    try:
        value = parse_yaml(text)
    except ValueError:
        return text
    # "key: value" texts such as "detectron2://x" or "a: b" stay texts
    return text if isinstance(value, dict) or not _is_plain(value) else value


def _is_plain(value: Any) -> bool:
    """Whether a literal is one that a config may hold: no bytes, sets, ..., nor endless numbers."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, int):
        return abs(value) < _HUGE
    if isinstance(value, str):
        return _is_text(value)
    return value is None or isinstance(value, float)


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
        if not all(parts):
            raise _unknown(key, yacs_keys(cfg))
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
        if isinstance(node.get(leaf), CfgNode):
            raise _is_node(key, value, node[leaf])
        node[leaf] = _coerce(key, value, node[leaf]) if leaf in node else value


def _unknown(key: str, known: Iterable[str]) -> UserError:
    known = list(known)
    # "model.rio_heads.num_classes": the case of the known key decides the case of the comparison
    spelled = key.upper() if known and known[0].isupper() else key
    return UserError(f"unknown config key {key!r}{nearest(spelled, known)}")


def _is_node(key: str, value: Any, node: Iterable[Any]) -> UserError:
    names = list(map(str, node))
    return UserError(
        f"{key} = {value!r}, but {key} is a node with keys {', '.join(names)}; set one of them, "
        f"such as {key}.{next(iter(names), 'key')}"
    )


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
        value = parse_value(text)
        try:
            _check_lazy_key(cfg, key)
            OmegaConf.update(cfg, key, _lazy_value(cfg, key, value), force_add=True, merge=False)
        except (OmegaConfBaseException, RecursionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot set {key} = {value!r}: {reason}") from None


def _lazy_value(cfg: DictConfig, key: str, value: Any) -> Any:
    """Return ``value`` as the type of what it replaces, after checking that it may."""
    _check_called(cfg, key, value)
    old = OmegaConf.select(cfg, key, throw_on_missing=False)
    is_reference = isinstance(value, str) and value.startswith("${")
    if isinstance(old, DictConfig) and isinstance(value, (str, int, float)) and not is_reference:
        raise _is_node(key, value, old)
    is_free = is_reference or (value == "auto" and is_class_count(key))
    if isinstance(old, (bool, int, float)) and not is_free and value is not None:
        return _coerce(key, value, old)
    return value


def _check_called(cfg: DictConfig, key: str, value: Any) -> None:
    """Refuse an override that makes a node call anything but building blocks of models."""
    check_targets(value, "the override", key)
    prefix, _, leaf = key.rpartition(".")
    if leaf in ("_target_", "name"):
        parent = OmegaConf.select(cfg, prefix) if prefix else cfg
        if isinstance(parent, DictConfig):
            node = {name: parent._get_node(name)._value() for name in parent}
            check_call({**node, leaf: value}, "the override", prefix)


def _check_lazy_key(cfg: DictConfig, key: str) -> None:
    parts = key.split(".")
    if parts[0] in _FREE_NODES and len(parts) > 1 and all(map(_NAME.fullmatch, parts)):
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

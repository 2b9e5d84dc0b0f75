"""Lazy configs as text: every value that is a class or function is written by its name and found
again by it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.config import instantiate
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, ListConfig, OmegaConf, SCMode

from d2dense import projects
from d2dense.errors import UserError

from .text import to_yaml

__all__ = ["check_targets", "dump", "named", "target_of", "walk"]

# Packages whose classes and functions a yaml file may name. A .py config is code and may name
# anything.
_TRUSTED = ("d2dense", "detectron2", "fvcore", "timm", "torch.nn", "torch.optim", "torchvision")
_NAMED = "d2dense.config.lazy.named"


def named(*, name: str) -> Any:
    """Return the class or function that ``name`` (``package.module.Name``) stands for, uncalled."""
    return locate(name)


def target_of(node: Any) -> Callable | None:
    """Return the callable that a lazy node describes, or None when it describes none."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return None
    target = node._get_node("_target_")._value()
    if isinstance(target, str):
        try:
            return locate(target)
        except Exception:
            return None
    return target if callable(target) else None


def walk(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` of every leaf; interpolations are yielded as their ``${...}``
    text.
    """
    if isinstance(node, DictConfig):
        items = [(str(key), node._get_node(key)) for key in node]
    elif isinstance(node, ListConfig):
        items = [(str(index), node._get_node(index)) for index in range(len(node))]
    else:
        return
    for key, child in items:
        if isinstance(child, (DictConfig, ListConfig)) and not child._is_interpolation():
            yield from walk(child, f"{prefix}{key}.")
        else:
            yield prefix + key, child._value() if child is not None else None


def dump(cfg: DictConfig) -> str:
    """Return ``cfg`` as yaml text that loads again to the same objects; interpolations are kept.

    Raises:
        UserError: a value has no name to write, such as a lambda or a partial.
    """
    plain = OmegaConf.to_container(
        copy.deepcopy(cfg), resolve=False, structured_config_mode=SCMode.INSTANTIATE
    )
    return to_yaml(_plain(plain, ""))


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{key}.{i}") for i, v in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if callable(value):
        name = _name_of(value, key)
        return name if key.rsplit(".", 1)[-1] == "_target_" else {"_target_": _NAMED, "name": name}
    raise UserError(
        f"config value {key} is a {type(value).__name__}, which cannot be written as yaml; "
        "use LazyCall"
    )


def _name_of(value: Any, key: str) -> str:
    try:
        name = _convert_target_to_string(value)
        found = locate(name)
    except Exception:
        found = None
    if found is not value:
        raise UserError(
            f"config value {key} = {value!r} has no importable name, so it cannot be written; "
            "use a function defined in a module, with its arguments in a LazyCall"
        )
    return name


def check_targets(cfg: DictConfig, source: str) -> None:
    """Refuse a yaml file that names a callable outside the trusted packages: data must not choose
    what runs.

    Raises:
        UserError: naming the key and the target.
    """
    trusted = (*_TRUSTED, *(module.__name__ for module in projects.import_all().values()))
    for key, value in walk(cfg):
        leaf = key.rsplit(".", 1)[-1]
        parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
        is_named = (
            leaf == "name" and isinstance(parent, DictConfig) and parent.get("_target_") == _NAMED
        )
        if (leaf == "_target_" or is_named) and not any(
            str(value) == root or str(value).startswith(f"{root}.") for root in trusted
        ):
            raise UserError(
                f"{source}: {key} names {value!r}, outside the packages a yaml config may call "
                f"({', '.join(trusted)}); write it as a .py config instead"
            )


def build(node: Any) -> Any:
    """Instantiate a lazy node (re-exported so that callers need one import)."""
    return instantiate(node)

"""Lazy configs as text: every value that is a class or function is written by its name and found
again by it.
"""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, ListConfig, OmegaConf, SCMode

from d2dense import projects
from d2dense.errors import UserError

from .text import to_yaml

__all__ = ["check_call", "check_targets", "dump", "moved", "named", "target_of", "walk"]

# Modules whose own classes and functions yaml files and overrides may name: what models, loaders,
# evaluators and optimizers are made of. A .py config is code and may name anything.
_TRUSTED = (
    "d2dense.data",
    "d2dense.evaluation",
    "d2dense.layers",
    "d2dense.modeling",
    "d2dense.solver.optim",
    "d2dense.solver.schedule",
    "detectron2.data",
    "detectron2.evaluation",
    "detectron2.layers",
    "detectron2.modeling",
    "detectron2.solver",
    "detectron2.structures",
    "fvcore.common.param_scheduler",
    "fvcore.nn",
    "fvcore.transforms",
    "timm.layers",
    "timm.models",
    "timm.optim",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
)
# Parts of those that write files, fetch them or call what they are given.
_REFUSED = ("d2dense.data.child", "d2dense.data.shapes", "detectron2.data.datasets")
_NAMED = "d2dense.config.lazy.named"
# Where modules went that runs saved in their config.yaml.
_MOVED = {
    "d2dense.engine.optim.": "d2dense.solver.optim.",
    "d2dense.engine.schedule.": "d2dense.solver.schedule.",
}

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
# ${key} is a reference; ${name:...} calls a resolver of omegaconf, which can make new nodes.
_RESOLVER = re.compile(r"\$\{[^}]*:")


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


def moved(data: Any) -> Any:
    """Return nested dicts and lists of an earlier version with the present names of targets."""
    if isinstance(data, dict):
        return {
            key: _present_name(value) if key in ("_target_", "name") else moved(value)
            for key, value in data.items()
        }
    if isinstance(data, list):
        return [moved(value) for value in data]
    return data


def _present_name(name: Any) -> Any:
    old = next((old for old in _MOVED if isinstance(name, str) and name.startswith(old)), None)
    return name if old is None else _MOVED[old] + name.removeprefix(old)


def check_targets(data: Any, source: str, key: str = "") -> None:
    """Refuse values that let text choose what runs: every ``_target_`` in ``data`` must be a class
    or function of a trusted module, by its plain name.

    Args:
        data: nested dicts and lists, as read from yaml or an override.
        source: of the data, for messages.
        key: under which the data stands.

    Raises:
        UserError: naming the key and the target.
    """
    if isinstance(data, dict):
        check_call(data, source, key)
        for name, value in data.items():
            check_targets(value, source, f"{key}.{name}" if key else str(name))
    elif isinstance(data, (list, tuple)):
        for index, value in enumerate(data):
            check_targets(value, source, f"{key}.{index}" if key else str(index))
    elif isinstance(data, str) and _RESOLVER.search(data):
        raise UserError(
            f"{source}: {key} = {data!r} calls a resolver; only references such as "
            "${train.max_iter} are possible"
        )


def check_call(node: Mapping[str, Any], source: str, key: str) -> None:
    """Check the target of one node, see :func:`check_targets`; callables (of a .py config) pass."""
    target = node.get("_target_")
    if "_target_" not in node or callable(target):
        return
    if target == _NAMED:
        key, target = f"{key}.name", node.get("name")
    else:
        key = f"{key}._target_"
    if not isinstance(target, str) or not _is_trusted(target):
        raise UserError(
            f"{source}: {key.lstrip('.')} names {target!r}, which is no class or function of the "
            "modules that yaml and overrides may call (building blocks of Detectron2, d2dense and "
            "its projects, fvcore, timm, torch.nn, torch.optim, torchvision); write it as a .py "
            "config instead"
        )


def _is_trusted(name: str) -> bool:
    """Whether ``name`` leads to a class or function that a trusted module defines, and does not
    merely import: ``torch.nn.functional.torch.hub.load`` is none of torch.nn's.
    """
    own = tuple(module.__name__ for module in projects.import_all().values())
    roots = {root.partition(".")[0] for root in (*_TRUSTED, *own)}
    if not _DOTTED.fullmatch(name) or name.partition(".")[0] not in roots:
        return False  # finding out would import the module, which runs it
    try:
        found = locate(name)
    except Exception:  # importing a module may raise anything
        return False
    if isinstance(found, types.BuiltinFunctionType):  # torch's operators
        return name.rpartition(".")[0] == "torch.nn.functional"
    if not isinstance(found, (type, types.FunctionType, types.MethodType)):
        return False
    return _is_below(found.__module__, (*_TRUSTED, *own)) and not _is_below(
        found.__module__, _REFUSED
    )


def _is_below(module: str, roots: Iterable[str]) -> bool:
    return any(module == root or module.startswith(f"{root}.") for root in roots)

"""Open any config by content, print it, save it, build its model."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from detectron2 import modeling
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from omegaconf import DictConfig, OmegaConf
from torch import nn

from d2dense import projects
from d2dense.errors import UserError, nearest

from . import lazy, overrides
from .defaults import get_cfg
from .text import to_yaml

__all__ = ["build_model", "check_device", "dump", "kind_of", "load", "resolve_device", "save"]

# What fvcore's registries say of a name that nobody registered.
_UNREGISTERED = re.compile(r"No object named '(.+)' found in '(.+)' registry!")
_REGISTRIES = [value for name, value in vars(modeling).items() if name.endswith("_REGISTRY")]


def load(path_or_name: str | Path, overrides: Sequence[str] = ()) -> CfgNode | DictConfig:
    """Open a config: a ``.py`` file, a yaml file of either kind, or a model-zoo name.

    Args:
        path_or_name: a path, or a name such as ``FSCascade/fscascade_r50_fpn_1x``.
        overrides: ``["KEY", "VALUE", ...]`` and ``["key=value", ...]``, mixed as you like.

    Returns:
        A yacs ``CfgNode`` for a yaml config, an omegaconf ``DictConfig`` for a lazy one (also when
        the lazy config was saved as yaml).

    Raises:
        UserError: no such file or name, not readable, an unknown key or a value of the wrong type.
    """
    projects.import_all()
    path = _find(path_or_name)
    if path.suffix == ".py":
        cfg = _load_python(path)
    else:
        data = _load_yaml(path)
        if _is_lazy(data):
            cfg = OmegaConf.create(data, flags={"allow_objects": True})
            lazy.check_targets(cfg, str(path))
        else:
            cfg = _load_yacs(path)
    apply(cfg, overrides)
    return cfg


def apply(cfg: CfgNode | DictConfig, items: Sequence[str]) -> None:
    """Apply command-line overrides to a loaded config, in place."""
    change = overrides.apply_lazy if kind_of(cfg) == "lazy" else overrides.apply_yacs
    change(cfg, overrides.parse(items))


def kind_of(cfg: CfgNode | DictConfig) -> str:
    """Return ``"lazy"`` or ``"yaml"``."""
    return "lazy" if isinstance(cfg, DictConfig) else "yaml"


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        if path.suffix not in (".py", ".yaml", ".yml"):
            raise UserError(f"config {path} ends in {path.suffix!r}, expected .py, .yaml or .yml")
        return path
    from d2dense import model_zoo  # the model zoo loads through this module

    known = model_zoo.list_models()
    if str(path_or_name) in known:
        return model_zoo.get_config_file(str(path_or_name))
    raise UserError(
        f"config {str(path_or_name)!r} is neither a file nor a model-zoo "
        f"name{nearest(str(path_or_name), known)}"
    )


def _load_python(path: Path) -> DictConfig:
    try:
        cfg = LazyConfig.load(str(path))
    except (SyntaxError, ImportError) as error:
        raise UserError(f"config {path} cannot be loaded: {error}") from error
    except KeyError as error:
        raise UserError(
            f"config {path} cannot be loaded: it imports {error}, which is defined nowhere"
        ) from error
    except Exception as error:  # a config is the user's own code and may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"config {path} cannot be loaded: {type(error).__name__}: {error} "
            f"({place.filename}, line {place.lineno})"
        ) from error
    if "model" not in cfg:
        raise UserError(
            f"config {path} defines no 'model'; a lazy config needs model, dataloader, optimizer, "
            f"train"
        )
    return cfg


def _load_yaml(path: Path) -> dict:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not plain yaml: {error}") from None
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise UserError(f"config {path} holds {type(data).__name__}, expected a mapping of keys")
    return data


def _is_lazy(data: object) -> bool:
    """Whether yaml content is a saved lazy config: some mapping in it has a ``_target_``."""
    if isinstance(data, dict):
        return "_target_" in data or any(_is_lazy(value) for value in data.values())
    return isinstance(data, list) and any(_is_lazy(value) for value in data)


def _load_yacs(path: Path) -> CfgNode:
    cfg = get_cfg()
    try:
        loaded = CfgNode(CfgNode.load_yaml_with_base(str(path), allow_unsafe=False))
    except (yaml.YAMLError, OSError, AssertionError) as error:
        raise UserError(f"config {path} or its _BASE_ cannot be read: {error}") from None
    _replace_auto(loaded)
    try:
        cfg.merge_from_other_cfg(loaded)
    except KeyError as error:
        key = str(error.args[0]).rpartition(" ")[2].strip("'\"")
        raise UserError(
            f"config {path}: unknown config key {key!r}{nearest(key, overrides.yacs_keys(cfg))}"
        ) from None
    except ValueError as error:
        raise UserError(f"config {path}: {error}") from None
    return cfg


def _replace_auto(node: CfgNode) -> None:
    """Write ``NUM_CLASSES: auto`` as -1, since yacs keys keep their type."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            _replace_auto(value)
        elif value == "auto" and overrides.is_class_count(key):
            node[key] = -1


def dump(cfg: CfgNode | DictConfig) -> str:
    """Return the resolved config as yaml text that :func:`load` reads back to the same model."""
    return lazy.dump(cfg) if kind_of(cfg) == "lazy" else to_yaml(cfg)


def save(cfg: CfgNode | DictConfig, path: str | Path) -> None:
    """Write :func:`dump` to ``path``, creating its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(cfg))


def resolve_device(device: str) -> str:
    """Return ``device``, or ``"cpu"`` where it asks for CUDA and there is none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        return "cpu"
    return device


def check_device(device: str) -> str:
    """Return ``device`` if it exists on this machine.

    Raises:
        UserError: an unknown device, or CUDA where there is none.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"device {device!r} does not exist; use cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r} was asked for, but there is no GPU here; use cpu")
    return device


def build_model(cfg: CfgNode | DictConfig, device: str | None = None) -> nn.Module:
    """Build the model of a config, with fresh weights, in training mode.

    Args:
        cfg: what :func:`load` returns.
        device: where the model goes; by default the config's device, or the CPU where there is no
        GPU.

    Raises:
        UserError: an unknown device or module name, or a class count still to be taken from the
            data.
    """
    if device is not None:
        check_device(device)
    if kind_of(cfg) == "lazy":
        device = device or resolve_device(str(OmegaConf.select(cfg, "train.device") or "cuda"))
        auto = [k for k, v in lazy.walk(cfg.model) if overrides.is_class_count(k) and v == "auto"]
        if auto:
            raise _unresolved(f"model.{auto[0]}")
        return instantiate(cfg.model).to(device)
    device = device or resolve_device(cfg.MODEL.DEVICE)
    auto = [
        k for k in overrides.yacs_keys(cfg) if overrides.is_class_count(k) and _value(cfg, k) == -1
    ]
    if auto:
        raise _unresolved(auto[0])
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = device
    try:
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg).to(device)
    except KeyError as error:
        unknown = _UNREGISTERED.fullmatch(str(error.args[0]))
        if unknown is None:
            raise
        name, registry = unknown.groups()
        known = [key for r in _REGISTRIES if r._name == registry for key, _ in r]
        raise UserError(
            f"the config names {name!r}, which is not in the registry {registry}"
            f"{nearest(name, known)}"
        ) from None


def _value(cfg: CfgNode, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _unresolved(key: str) -> UserError:
    return UserError(
        f"{key} is 'auto' but no dataset has set it yet; give a number, or call through the "
        f"launcher"
    )

"""Open any config by content, print it, save it, build its model."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2 import modeling
from detectron2.config import CfgNode, LazyConfig
from detectron2.modeling import META_ARCH_REGISTRY
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from d2dense import composition, projects
from d2dense.errors import UserError, nearest

from . import lazy, overrides
from .defaults import get_cfg
from .names import get_config_file, list_models
from .text import parse_yaml, to_yaml

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
        cfg = _lazy_from(data, path) if _is_lazy(data) else _yacs_from(data, path)
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
    if os.path.isfile(path):  # False for texts that can be no path
        if path.suffix not in (".py", ".yaml", ".yml"):
            raise UserError(f"config {path} ends in {path.suffix!r}, expected .py, .yaml or .yml")
        return path
    known = list_models()
    if str(path_or_name) in known:
        return get_config_file(str(path_or_name))
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
    return _with_model(cfg, path)


def _with_model(cfg: DictConfig, path: Path) -> DictConfig:
    if "model" not in cfg:
        raise UserError(
            f"config {path} defines no 'model'; a lazy config needs model, dataloader, optimizer, "
            f"train"
        )
    return cfg


def _load_yaml(path: Path) -> dict:
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
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


def _lazy_from(data: dict, path: Path) -> DictConfig:
    data = lazy.moved(data)
    lazy.check_targets(data, str(path))
    try:
        cfg = OmegaConf.create(data, flags={"allow_objects": True})
    except OmegaConfBaseException as error:  # a reference that is not written as one
        raise UserError(f"config {path}: {error}") from None
    return _with_model(cfg, path)


def _yacs_from(data: dict, path: Path) -> CfgNode:
    cfg = get_cfg()
    loaded = CfgNode(_with_bases(data, (path.resolve(),)))
    _replace_auto(loaded)
    _check_nodes(loaded, cfg, path)
    try:
        cfg.merge_from_other_cfg(loaded)
    except KeyError as error:
        key = str(error.args[0]).removeprefix("Non-existent config key: ")
        raise UserError(
            f"config {path}: unknown config key {key!r}{nearest(key, overrides.yacs_keys(cfg))}"
        ) from None
    except (ValueError, TypeError, MemoryError, RecursionError) as error:
        # of another type, or a text that yacs takes for Python and cannot read
        raise UserError(f"config {path}: {error}") from None
    return cfg


def _with_bases(data: dict, chain: tuple[Path, ...]) -> dict:
    """Return yaml content laid over that of the files its ``_BASE_`` names.

    Args:
        chain: the files that led here, the last one being the content's own.
    """
    bases = data.pop("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(
        isinstance(base, str) and "\0" not in base for base in bases
    ):
        raise UserError(f"config {chain[-1]}: _BASE_ is {bases!r}, expected a file name")
    result: dict = {}
    for base in bases:
        path = _base_path(base, chain[-1].parent)
        if path in chain:
            raise UserError(f"config {chain[-1]}: _BASE_ {base!r} leads back to {path}")
        _lay_over(_with_bases(_load_yaml(path), (*chain, path)), result, chain[-1])
    _lay_over(data, result, chain[-1])
    return result


def _base_path(base: str, folder: Path) -> Path:
    """Return the file that ``_BASE_`` names: relative to ``folder``, or by a model-zoo name, which
    leads to another project wherever that is installed.
    """
    path = Path(os.path.realpath(folder / os.path.expanduser(base)))
    if os.path.isfile(path) or path.suffix in (".yaml", ".yml"):
        return path
    if base in list_models("yaml"):
        return get_config_file(base, "yaml")
    return path


def _lay_over(upper: dict, lower: dict, path: Path) -> None:
    for key, value in upper.items():
        if isinstance(value, dict) and key in lower:
            if not isinstance(lower[key], dict):
                raise UserError(f"config {path}: {key} holds keys, but is a value in its _BASE_")
            _lay_over(value, lower[key], path)
        else:
            lower[key] = value


def _check_nodes(loaded: CfgNode, cfg: CfgNode, path: Path, prefix: str = "") -> None:
    """Refuse a value where keys are expected: yacs would let ``MODEL: null`` take MODEL's place."""
    for key, value in loaded.items():
        known = cfg.get(key)
        if not isinstance(known, CfgNode):
            continue
        if not isinstance(value, CfgNode):
            raise UserError(f"config {path}: {prefix}{key} = {value!r}, expected keys below it")
        _check_nodes(value, known, path, f"{prefix}{key}.")


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
    text = dump(cfg)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"config {path} cannot be written: {reason}") from error


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
        UserError: an unknown device or module name, a class count still to be taken from the
            data, arguments that a constructor refuses, or a backbone that does not give what the
            heads take.
    """
    if device is not None:
        check_device(device)
    try:
        build = _build_lazy if kind_of(cfg) == "lazy" else _build_yacs
        model = build(cfg, device)
        composition.check_model(model)
        return model
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # constructors raise anything for arguments that they do not expect
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"no model can be built from this config: {type(error).__name__}: {error} "
            f"({place.filename}, line {place.lineno})"
        ) from error


def _build_lazy(cfg: DictConfig, device: str | None) -> nn.Module:
    device = device or resolve_device(str(OmegaConf.select(cfg, "train.device") or "cuda"))
    auto = [k for k, v in lazy.walk(cfg.model) if overrides.is_class_count(k) and v == "auto"]
    if auto:
        raise _unresolved(f"model.{auto[0]}")
    model = composition.instantiate_model(cfg.model)
    if not isinstance(model, nn.Module):
        raise UserError(f"the config's 'model' is a {type(model).__name__}, expected a module")
    return model.to(device)


def _build_yacs(cfg: CfgNode, device: str | None) -> nn.Module:
    device = device or resolve_device(str(cfg.MODEL.DEVICE))
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
    except (KeyError, AssertionError) as error:
        unknown = _UNREGISTERED.fullmatch(str(error.args[0] if error.args else ""))
        if unknown is None:
            composition.check_config(cfg)
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

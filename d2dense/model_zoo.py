"""Names to configs to models: ``FSCascade/fscascade_r50_fpn_1x`` is the config of that name in
that project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from d2dense import config, projects
from d2dense.errors import UserError, nearest

__all__ = ["get_config", "get_config_file", "get_model", "list_models"]

_SUFFIX = {"lazy": ".py", "yaml": ".yaml"}


def list_models(kind: str | None = None) -> list[str]:
    """Return every model name, sorted; with ``kind`` only those that have a config of that kind."""
    _check_kind(kind)
    suffixes = [_SUFFIX[kind]] if kind else list(_SUFFIX.values())
    return sorted(
        {
            f"{project}/{path.stem}"
            for project in projects.names()
            for path in projects.config_folder(project).glob("*")
            if path.suffix in suffixes and not path.name.startswith(("_", "base"))
        }
    )


def get_config_file(name: str, kind: str | None = None) -> Path:
    """Return the path of a model's config; without ``kind`` the lazy one where there is one.

    Raises:
        UserError: an unknown name (with the nearest known one), or no config of that kind.
    """
    _check_kind(kind)
    if name not in list_models():
        raise UserError(f"unknown model {name!r}{nearest(name, list_models())}")
    project, _, stem = name.partition("/")
    for each in [kind] if kind else ["lazy", "yaml"]:
        path = projects.config_folder(project) / f"{stem}{_SUFFIX[each]}"
        if path.is_file():
            return path
    raise UserError(f"model {name!r} has no {kind} config; use the other kind")


def get_config(name: str, kind: str = "lazy"):
    """Return the loaded config of a model; see :func:`d2dense.config.load`."""
    return config.load(get_config_file(name, kind))


def get_model(name: str, weights: str | None = None, device: str = "cpu", **overrides) -> nn.Module:
    """Build a model by name, in eval mode.

    Args:
        name: one of :func:`list_models`.
        weights: checkpoint to load; None keeps the fresh initialisation.
        device: where the model goes.
        **overrides: config changes, with ``__`` for dots (``model__roi_heads__num_classes=3``) or
            as nested dicts (``model={"roi_heads": {"num_classes": 3}}``).

    Raises:
        UserError: an unknown name or key, or weights that do not fit.
    """
    items = [f"{key}={value}" for key, value in _flat(overrides)]
    model = config.build_model(config.load(name, items), device=device)
    if weights is not None:
        from d2dense.checkpoint import load_weights  # needs the engine's dependencies

        load_weights(model, weights).require_complete()
    return model.eval()


def _check_kind(kind: str | None) -> None:
    if kind is not None and kind not in _SUFFIX:
        raise UserError(f"config kind {kind!r}, expected 'lazy' or 'yaml'")


def _flat(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in changes.items():
        name = prefix + key.replace("__", ".")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value

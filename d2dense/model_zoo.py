"""Names to configs to models: ``FSCascade/fscascade_r50_fpn_1x`` is the config of that name in
that project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from d2dense import config
from d2dense.checkpoint import load_weights
from d2dense.config.names import get_config_file, list_models

__all__ = ["get_config", "get_config_file", "get_model", "list_models"]


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
        load_weights(model, weights).require_complete()
    return model.eval()


def _flat(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in changes.items():
        name = prefix + key.replace("__", ".")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value

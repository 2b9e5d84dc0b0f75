"""What configs of both kinds say of tests at several sizes: ``TEST.AUG`` and ``train.test_aug``."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf
from torch import nn

from d2dense.errors import UserError
from d2dense.modeling import MultiScaleDetector

__all__ = ["for_tests", "is_multi_scale"]


def is_multi_scale(cfg: CfgNode | DictConfig) -> bool:
    """Whether tests see images at several sizes; they need images of their own size then."""
    return bool(_settings(cfg).get("enabled"))


def for_tests(cfg: CfgNode | DictConfig, model: nn.Module) -> nn.Module:
    """Return what predicts and is evaluated: ``model``, or a :class:`MultiScaleDetector` of it.

    Raises:
        UserError: unknown keys or numbers that make no sense.
    """
    settings = _settings(cfg)
    if not settings.pop("enabled", False):
        return model
    try:
        return MultiScaleDetector(model, **settings).eval()
    except TypeError as error:  # a lazy config may hold any keys
        raise UserError(f"train.test_aug: {error}") from None


def _settings(cfg: CfgNode | DictConfig) -> dict[str, Any]:
    if isinstance(cfg, CfgNode):
        return {key.lower(): value for key, value in cfg.TEST.AUG.items()}
    # configs written for Detectron2's own lazy launcher have none
    node = OmegaConf.select(cfg, "train.test_aug")
    return {} if node is None else OmegaConf.to_container(node, resolve=True)

"""Layers that the projects and the engine share."""

from .drop_path import Residual
from .mlp import MLP2d
from .norm import NORMS, LayerNorm2d, build_norm
from .sync_norm import SyncBatchNorm, has_sync_norms, replace_sync_norms

__all__ = [
    "NORMS",
    "LayerNorm2d",
    "MLP2d",
    "Residual",
    "SyncBatchNorm",
    "build_norm",
    "has_sync_norms",
    "replace_sync_norms",
]

"""Layers that the projects and the engine share."""

from .deformable_attention import MultiScaleDeformableAttention
from .deformable_sampling import deformable_sampling
from .drop_path import Residual
from .mlp import MLP2d
from .norm import NORMS, LayerNorm2d, build_norm, explained_single_values, set_norms
from .sync_norm import SyncBatchNorm, has_sync_norms, replace_sync_norms

__all__ = [
    "NORMS",
    "LayerNorm2d",
    "MLP2d",
    "MultiScaleDeformableAttention",
    "Residual",
    "SyncBatchNorm",
    "build_norm",
    "deformable_sampling",
    "explained_single_values",
    "has_sync_norms",
    "replace_sync_norms",
    "set_norms",
]

"""Layers that the projects and the engine share."""

from .deformable_attention import MultiScaleDeformableAttention
from .deformable_sampling import deformable_sampling
from .drop_path import Residual
from .folding import can_fold, fold_for_inference
from .mlp import MLP2d
from .norm import NORMS, LayerNorm2d, build_norm, explained_single_values, set_norms
from .process_sum import number_of_processes, sum_over_processes
from .sync_norm import SyncBatchNorm, has_sync_norms, replace_sync_norms

__all__ = [
    "NORMS",
    "LayerNorm2d",
    "MLP2d",
    "MultiScaleDeformableAttention",
    "Residual",
    "SyncBatchNorm",
    "build_norm",
    "can_fold",
    "deformable_sampling",
    "explained_single_values",
    "fold_for_inference",
    "has_sync_norms",
    "number_of_processes",
    "replace_sync_norms",
    "set_norms",
    "sum_over_processes",
]

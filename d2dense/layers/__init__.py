"""Layers that the projects and the engine share."""

from .deformable_attention import MultiScaleDeformableAttention
from .deformable_sampling import deformable_sampling, is_recorded
from .drop_path import Residual
from .folding import can_fold, fold_for_inference, fold_frozen_norms
from .linear import Linear
from .mlp import MLP2d
from .norm import NORMS, LayerNorm2d, build_norm, explained_single_values, set_norms
from .process_sum import number_of_processes, sum_over_processes
from .sync_norm import SyncBatchNorm, has_sync_norms, replace_sync_norms
from .windows import join_windows, missing, padded_to_multiple, split_windows

__all__ = [
    "NORMS",
    "LayerNorm2d",
    "Linear",
    "MLP2d",
    "MultiScaleDeformableAttention",
    "Residual",
    "SyncBatchNorm",
    "build_norm",
    "can_fold",
    "deformable_sampling",
    "explained_single_values",
    "fold_for_inference",
    "fold_frozen_norms",
    "has_sync_norms",
    "is_recorded",
    "join_windows",
    "missing",
    "number_of_processes",
    "padded_to_multiple",
    "replace_sync_norms",
    "set_norms",
    "split_windows",
    "sum_over_processes",
]

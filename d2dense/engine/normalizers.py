"""The numbers by which Detectron2's dense detectors divide their losses.

RetinaNet and FCOS average the count of foreground anchors over the steps, in a plain attribute that
no state dict has. A run that is resumed without it computes other losses for dozens of steps.
"""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

__all__ = ["loss_normalizers", "set_loss_normalizers"]

_NAME = "loss_normalizer"


def loss_normalizers(model: nn.Module) -> dict[str, float]:
    """Return module name -> number, for the modules that have one by now."""
    return {
        name: float(vars(module)[_NAME])
        for name, module in model.named_modules()
        if isinstance(module, DenseDetector) and _NAME in vars(module)
    }


def set_loss_normalizers(model: nn.Module, numbers: Mapping[str, float]) -> None:
    """Put back what :func:`loss_normalizers` returned."""
    for name, number in numbers.items():
        setattr(model.get_submodule(name), _NAME, number)

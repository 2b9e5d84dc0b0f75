"""How alike the kernels of a classifier are.

Letters: K classes, C channels, A anchors of a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from d2dense.errors import UserError, nearest

from .figures import make_folder, save_picture, write_json, write_table

__all__ = ["class_kernels", "kernel_report"]

# Where models keep their classifiers; of several layers or stages the last one is taken.
_ANCHORS = "head.cls_score"
_USUAL = (
    "sem_seg_head.classifier",
    "sem_seg_head.predictor",
    "roi_heads.box_predictor.cls_score",
    "roi_heads.box_predictor.-1.cls_score",
    _ANCHORS,  # RetinaNet
    "heads.classes.-1",  # detection transformers
    "decoder.classes",  # Mask2Former
    "network.heads.-1.linear",  # CEDNet's classifiers
)


def class_kernels(model: nn.Module, name: str | None = None) -> Tensor:
    """Return the weights ``(K, C)`` of a model's classifier, a linear layer or a convolution; one
    row more where it has a class for no object. RetinaNet's kernels of all anchors are one row per
    class, ``(K, A * C)``.

    Args:
        name: of the layer within the model; None: the first of the usual ones that is there.

    Raises:
        UserError: no such layer, or one without kernels.
    """
    chosen = name or next((usual for usual in _USUAL if _layer(model, usual)), None)
    layer = None if chosen is None else _layer(model, chosen)
    if layer is None:
        known = [each for each, module in model.named_modules() if _has_kernels(module)]
        hint = nearest(chosen, known) if chosen else ""
        raise UserError(
            f"{type(model).__name__} has no classifier {chosen or 'at a usual place'}{hint}; name "
            "a linear layer or a convolution by --module"
        )
    weight = layer.weight.detach().float().cpu()
    if name is None and chosen == _ANCHORS:
        return weight.unflatten(0, (-1, model.num_classes)).transpose(0, 1).flatten(1)
    return weight.flatten(1)


def _layer(model: nn.Module, path: str) -> nn.Module | None:
    """Return the layer at a path, in which a number may count from a list's end."""
    for step in path.split("."):
        if isinstance(model, (nn.ModuleList, nn.Sequential)) and step.lstrip("-").isdigit():
            model = model[int(step)] if -len(model) <= int(step) < len(model) else None
        else:
            model = getattr(model, step, None)
    return model if _has_kernels(model) else None


def _has_kernels(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


def kernel_report(kernels: Tensor, classes: Sequence[str], output: str | Path) -> list[Path]:
    """Write the cosine similarities as ``kernel_similarity.png`` and ``.csv``, which also says for
    each class which other one is the most alike, and ``summary.json`` with their mean.

    Args:
        kernels: ``(K, C)``.
        classes: names. One row more than names is that of no object; otherwise rows without a name
            are numbered.
    """
    names = [*classes, "no object"] if len(kernels) == len(classes) + 1 else list(classes)
    names = [names[k] if k < len(names) else str(k) for k in range(len(kernels))]
    unit = nn.functional.normalize(kernels, dim=1)
    similarity = (unit @ unit.t()).clamp(-1, 1)
    itself = torch.eye(len(unit), dtype=torch.bool)
    others = similarity.masked_fill(itself, -2).argmax(1)
    side = min(3 + 0.16 * len(names), 14)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(similarity, cmap="coolwarm", vmin=-1, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    figure.colorbar(shown, ax=axes, shrink=0.7)
    rows = [
        (name, names[other], *(f"{value:.4f}" for value in row))
        for name, other, row in zip(names, others.tolist(), similarity.tolist())
    ]
    folder = make_folder(output)
    summary = {"classes": len(names), "mean_similarity": float(similarity[~itself].mean())}
    return [
        save_picture(folder / "kernel_similarity.png", figure),
        write_table(folder / "kernel_similarity.csv", ("class", "most alike", *names), rows),
        write_json(folder / "summary.json", summary),
    ]

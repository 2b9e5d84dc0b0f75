"""How alike the kernels of a classifier are.

Letters: K classes, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from d2dense.errors import UserError, nearest

from .figures import make_folder, save_picture, write_table

__all__ = ["class_kernels", "kernel_report"]

# where the models of this library keep their classifiers
_USUAL = ("sem_seg_head.classifier", "sem_seg_head.predictor", "roi_heads.box_predictor.cls_score")


def class_kernels(model: nn.Module, name: str | None = None) -> Tensor:
    """Return the weights ``(K, C)`` of a model's classifier, a linear layer or a convolution.

    Args:
        name: of the layer within the model; None: the first of the usual ones that is there.

    Raises:
        UserError: no such layer, or one without kernels.
    """
    layers = {
        each: module
        for each, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    chosen = name or next((usual for usual in _USUAL if usual in layers), None)
    if chosen not in layers:
        hint = nearest(chosen, layers) if chosen else ""
        raise UserError(
            f"{type(model).__name__} has no classifier {chosen or 'at a usual place'}{hint}; name "
            "a linear layer or a convolution by --module"
        )
    return layers[chosen].weight.detach().flatten(1).float().cpu()


def kernel_report(kernels: Tensor, classes: Sequence[str], output: str | Path) -> list[Path]:
    """Write the cosine similarities as ``kernel_similarity.png`` and ``.csv``, which also says for
    each class which other one is the most alike.

    Args:
        kernels: ``(K, C)``.
        classes: names; where there are fewer than K the others are numbered.
    """
    names = [classes[k] if k < len(classes) else str(k) for k in range(len(kernels))]
    unit = nn.functional.normalize(kernels, dim=1)
    similarity = (unit @ unit.t()).clamp(-1, 1)
    others = similarity.masked_fill(torch.eye(len(unit), dtype=torch.bool), -2).argmax(1)
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
    return [
        save_picture(folder / "kernel_similarity.png", figure),
        write_table(folder / "kernel_similarity.csv", ("class", "most alike", *names), rows),
    ]

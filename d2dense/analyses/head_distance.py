"""How differently the heads of a detector look at the same features: Kullback-Leibler divergence of
their class activation maps (equations 9 and 10 of the Co-DETR paper, arXiv 2211.12860).

Not stated in the paper and fixed here: the map is Grad-CAM's. The score is the sum of the largest
class logits of the head's best candidates; its gradient is taken with respect to the encoded
levels, averaged over each level and used to weigh the level's channels; what is negative is cut
off; the levels are resized to the image and added; 1e-8 is added, and the map divided by its sum.

Letters: A candidates, K classes, M heads, C channels, h and w size of the image, Hl and Wl size of
level l.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from .discriminability import Levels
from .figures import make_folder, save_picture, write_json, write_table

__all__ = [
    "HeadDistances",
    "activation_map",
    "best_score",
    "distance_report",
    "divergence",
    "mean_distances",
]

_EVERYWHERE = 1e-8


def best_score(logits: Tensor, top: int) -> Tensor:
    """Return the sum over the ``top`` best candidates of their largest logit, with its graph.

    Args:
        logits: ``(A, K)``, without the background's
    """
    best = logits.amax(dim=-1)
    return best.topk(min(top, len(best))).values.sum()


def activation_map(levels: Levels, gradients: Sequence[Tensor]) -> Tensor:
    """Return the class activation map ``(h, w)``, float64, positive, of sum 1.

    Args:
        levels: what the head reads
        gradients: ``(C, Hl, Wl)`` per level, of the head's score
    """
    height, width = levels.size
    total = torch.zeros(levels.size, dtype=torch.float64)
    for level, gradient in zip(levels.maps, gradients, strict=True):
        weights = gradient.mean(dim=(1, 2), keepdim=True)
        activation = (weights * level).sum(dim=0).relu()
        resized = F.interpolate(activation[None, None], size=levels.padded, mode="bilinear")
        total += resized[0, 0, :height, :width].double().cpu()
    total = total + _EVERYWHERE
    return total / total.sum()


def divergence(first: Tensor, second: Tensor) -> float:
    """Return KL(first || second) in nats of two positive maps of sum 1."""
    return float((first * (first / second).log()).sum())


class HeadDistances:
    """S_ij, the mean over the images of KL(map of head i || map of head j) (equation 9).

    Args:
        heads: M
    """

    def __init__(self, heads: int):
        self.images = 0
        self._sum = torch.zeros(heads, heads, dtype=torch.float64)

    def add(self, maps: Sequence[Tensor]) -> None:
        """Add the maps ``(h, w)`` of all heads for one image."""
        rows = [[divergence(first, second) for second in maps] for first in maps]
        self._sum += torch.tensor(rows, dtype=torch.float64)
        self.images += 1

    @property
    def mean(self) -> Tensor:
        """S, ``(M, M)``."""
        return self._sum / max(self.images, 1)


def mean_distances(distances: Tensor) -> Tensor:
    """Return S_i ``(M,)``, each head's mean distance to and from the others (equation 10).

    Args:
        distances: S_ij ``(M, M)`` with zeros on the diagonal, two heads or more
    """
    others = len(distances) - 1
    return (distances.sum(dim=0) + distances.sum(dim=1)) / (2 * others)


def distance_report(
    distances: HeadDistances, names: Sequence[str], output: str | Path
) -> dict[str, float]:
    """Write ``head_distance.png/.csv`` with S_ij, and ``summary.json`` with S_i.

    Args:
        names: of the heads, the main one first. S_i is that among the auxiliary ones; where there
            is only one of them, its distance to and from the main head.

    Returns:
        S_i by name.
    """
    folder = make_folder(output)
    mean = distances.mean
    first = 1 if len(names) > 2 else 0
    own = dict(zip(names[first:], mean_distances(mean[first:, first:]).tolist()))
    side = 2.5 + 0.7 * len(names)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(mean, cmap="viridis", vmin=0)
    figure.colorbar(shown, ax=axes, shrink=0.7, label="KL (row || column)")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for (row, column), value in np.ndenumerate(mean.numpy()):
        colour = "black" if value > float(mean.max()) / 2 else "white"
        axes.text(column, row, f"{value:.2f}", color=colour, ha="center", va="center", fontsize=7)
    save_picture(folder / "head_distance.png", figure)
    rows = [
        [name, *(f"{value:.6f}" for value in row), f"{own[name]:.6f}" if name in own else ""]
        for name, row in zip(names, mean.tolist())
    ]
    write_table(folder / "head_distance.csv", ["head", *names, "mean distance"], rows)
    summary = {"images": distances.images, "mean_distance": own}
    write_json(folder / "summary.json", summary)
    return own

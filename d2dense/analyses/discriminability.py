"""Discriminability of a detector's features: how much stronger they are on objects than elsewhere
(equations 7 and 8 of the Co-DETR paper, arXiv 2211.12860).

The score map is the mean over the levels of each level's L2 norm over the channels, resized to the
image and divided by its maximum. With a threshold S on it, IoF is the share of the foreground and
IoB that of the background that is above; the curve of one over the other is the higher the better
the features tell objects from background.

Not stated in the paper and fixed here: the foreground is the union of the annotated boxes without
crowds, pixels count by their centres, images are resized as in tests, what is padded around them is
left out, and both shares are means over the images.

Letters: C channels, G objects, H and W size of the padded image, h and w without the padding, Hl
and Wl size of level l, T thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone import Backbone
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from d2dense.data.reading import read_image
from d2dense.data.records import Records
from d2dense.errors import UserError
from d2dense.modeling.detr import Memory

from .areas import AreaCurve, relative, relative_thresholds
from .figures import make_folder, save, save_picture, write_json
from .quality import Objects
from .subjects import Subject

__all__ = [
    "THRESHOLDS",
    "ForegroundCurve",
    "Levels",
    "discriminability_report",
    "encoder_levels",
    "foreground",
    "score_map",
    "split_levels",
]

_WIDTH = 3.0  # of a picture, in inches
# Even steps, and eight per factor of two towards both ends: normalised features are nearly equally
# strong everywhere, attention is nearly nowhere, and either has a curve.
_EVEN = relative_thresholds(200)
_CLOSE = 2.0 ** (torch.arange(-20 * 8, -2 * 8).double() / 8)
THRESHOLDS = torch.cat([_EVEN, _CLOSE, 1 - _CLOSE]).unique()


@dataclass(frozen=True)
class Levels:
    """Maps of one image at several scales.

    Attributes:
        maps: ``(C, Hl, Wl)`` per level, the whole padded image
        padded: (H, W)
        size: (h, w)
    """

    maps: Sequence[Tensor]
    padded: tuple[int, int]
    size: tuple[int, int]


def split_levels(tokens: Tensor, memory: Memory) -> list[Tensor]:
    """Return ``(C, Hl, Wl)`` per level of ``(S, C)``, rows for the positions of ``memory``."""
    sizes = [height * width for height, width in memory.shapes]
    return [
        level.t().unflatten(1, shape) for level, shape in zip(tokens.split(sizes), memory.shapes)
    ]


@torch.no_grad()
def encoder_levels(model: nn.Module, sample: Mapping[str, Any]) -> Levels:
    """Return what the model's head or decoder reads of an image: the encoded levels of a detection
    transformer, otherwise the maps of the backbone (with its neck) that the head takes.

    Args:
        model: any Detectron2 detector, in eval mode
        sample: ``image`` ``(3, h, w)`` in 0 .. 255

    Raises:
        UserError: the model has no backbone.
    """
    backbone, encoder = getattr(model, "backbone", None), getattr(model, "encoder", None)
    if not isinstance(backbone, Backbone):
        raise UserError(
            f"{type(model).__name__} has no Detectron2 backbone; score maps are for detectors"
        )
    seen: dict[str, Any] = {}

    def of_backbone(module: nn.Module, given: tuple, maps: Mapping[str, Tensor]) -> None:
        seen["padded"] = tuple(given[0].shape[2:])
        seen["maps"] = [maps[name][0] for name in _head_features(model, maps)]

    def of_encoder(module: nn.Module, given: tuple, memory: Any) -> None:
        if isinstance(memory, Memory):
            seen["maps"] = split_levels(memory.tokens[0], memory)

    hooks = [backbone.register_forward_hook(of_backbone)]
    if encoder is not None:
        hooks.append(encoder.register_forward_hook(of_encoder))
    try:
        model([{"image": sample["image"]}])
    finally:
        for hook in hooks:
            hook.remove()
    return Levels(seen["maps"], seen["padded"], tuple(sample["image"].shape[1:]))


def _head_features(model: nn.Module, maps: Mapping[str, Tensor]) -> Sequence[str]:
    """Return the names of the maps that the head of RetinaNet or of an R-CNN reads, else all."""
    if hasattr(model, "head_in_features"):
        return model.head_in_features
    return getattr(getattr(model, "proposal_generator", None), "in_features", list(maps))


def score_map(levels: Levels) -> Tensor:
    """Return the discriminability score ``(h, w)``, float64 in [0, 1], on the CPU (equation 7). A
    level that is zero everywhere adds nothing.
    """
    height, width = levels.size
    scores = []
    for level in levels.maps:
        norm = torch.linalg.vector_norm(level.float(), dim=0)
        resized = F.interpolate(norm[None, None], size=levels.padded, mode="bilinear")
        scores.append(relative(resized[0, 0, :height, :width].cpu()))
    return torch.stack(scores).mean(dim=0)


def foreground(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return ``(h, w)``, True where the pixel's centre is in one of the boxes.

    Args:
        boxes: ``(G, 4)``, xyxy in pixels
    """
    y, x = (torch.arange(length, device=boxes.device) + 0.5 for length in size)
    rows = (y >= boxes[:, 1, None]) & (y < boxes[:, 3, None])
    columns = (x >= boxes[:, 0, None]) & (x < boxes[:, 2, None])
    return rows.t().float() @ columns.float() > 0


class ForegroundCurve:
    """IoF and IoB at thresholds from 0 to 1 (equation 8), means over the images.

    Args:
        thresholds: ``(T,)``, rising from 0 to 1
    """

    def __init__(self, thresholds: Tensor = THRESHOLDS):
        self.thresholds = thresholds
        self._inside, self._outside = AreaCurve(thresholds), AreaCurve(thresholds)

    def add(self, scores: Tensor, inside: Tensor) -> None:
        """Add an image; one without foreground, or without background, counts for the other only.

        Args:
            scores: ``(h, w)``
            inside: ``(h, w)``, True in the foreground
        """
        for curve, part in ((self._inside, scores[inside]), (self._outside, scores[~inside])):
            if len(part):
                curve.add(part)

    @property
    def iof(self) -> Tensor:
        """Mean share ``(T,)`` of the foreground above each threshold."""
        return self._inside.areas

    @property
    def iob(self) -> Tensor:
        """Mean share ``(T,)`` of the background above each threshold."""
        return self._outside.areas

    @property
    def area_under(self) -> float:
        """Integral of IoF over IoB from 0 to 1; 0.5 for scores that ignore the objects."""
        one = torch.ones(1, dtype=torch.float64)
        return float(torch.trapezoid(*(torch.cat([s.flip(0), one]) for s in (self.iof, self.iob))))


def discriminability_report(
    subjects: Sequence[Subject],
    records: Records,
    output: str | Path,
    *,
    levels: Callable[[nn.Module, Mapping[str, Any]], Levels] = encoder_levels,
    pictures: int = 4,
) -> dict[str, float]:
    """Write ``iof_iob.png/.csv``, ``summary.json`` with the areas under the curves, and under
    ``maps/`` the score maps of the first images.

    Args:
        levels: what of a model's view of an image is scored

    Returns:
        The areas by model.

    Raises:
        UserError: a model whose features are not finite.
    """
    folder = make_folder(output)
    maps_folder = make_folder(folder / "maps") if pictures > 0 else folder
    curves = {each.name: ForegroundCurve() for each in subjects}
    streams = [each.labelled_images(records) for each in subjects]
    for index, samples in enumerate(zip(*streams)):
        found = {}
        for subject, sample in zip(subjects, samples):
            scores = score_map(levels(subject.model, sample))
            if not torch.isfinite(scores).all():
                raise UserError(
                    f"{subject.name}: features of {sample['file_name']} are not finite; give "
                    "weights of a model that was trained"
                )
            boxes = sample["instances"].gt_boxes.tensor
            curves[subject.name].add(scores, foreground(boxes, tuple(scores.shape)))
            found[subject.name] = scores.numpy()
        if index < pictures:
            record = records[index]
            path = maps_folder / f"{index + 1:04d}_{Path(record['file_name']).stem}.png"
            _draw_maps(path, record, found)
    return _report(folder, curves, len(records))


def _report(folder: Path, curves: Mapping[str, ForegroundCurve], images: int) -> dict[str, float]:
    areas = {name: curve.area_under for name, curve in curves.items()}
    axes = Figure(figsize=(5.5, 5)).add_subplot()
    for name, curve in curves.items():
        axes.plot(curve.iob, curve.iof, label=f"{name} (area under: {areas[name]:.3f})")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=0.8)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="IoB", ylabel="IoF")
    columns = [each for curve in curves.values() for each in (curve.iof, curve.iob)]
    thresholds = next(iter(curves.values())).thresholds
    rows = (
        [f"{threshold:.8g}", *(f"{value:.8f}" for value in values)]
        for threshold, *values in zip(thresholds.tolist(), *(each.tolist() for each in columns))
    )
    header = ["S", *(f"{name}: {share}" for name in curves for share in ("IoF", "IoB"))]
    save(folder / "iof_iob", axes.figure, header, rows)
    summary = {"images": images, "area_under": areas}
    write_json(folder / "summary.json", summary)
    return areas


def _draw_maps(path: Path, record: Mapping[str, Any], found: Mapping[str, np.ndarray]) -> None:
    """Draw the image with its objects, and beside it every model's score map, in colours
    from its own smallest to its largest value.
    """
    image = read_image(dict(record), "RGB")
    height, width = image.shape[:2]
    columns = 1 + len(found)
    size = (_WIDTH * columns, _WIDTH * height / width + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    first, *others = figure.subplots(1, columns)
    first.imshow(image)
    for x0, y0, x1, y1 in Objects.of(record).boxes:
        first.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="red"))
    for axes, (name, scores) in zip(others, found.items()):
        axes.imshow(scores, cmap="inferno", extent=(0, width, height, 0))
        axes.set_title(f"{name}: {scores.min():.3f} to {scores.max():.3f}", fontsize=8)
    for axes in (first, *others):
        axes.set_axis_off()
    save_picture(path, figure, dpi=100)

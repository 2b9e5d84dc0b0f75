"""Dense heads, and their pieces: towers, per-level scales, flat outputs, average factors,
detections.

Letters: N images, C channels, L levels, Hl and Wl size of level l, A anchors of all levels together
(levels, rows, columns, anchors of a cell), K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from d2dense.modeling.detr.targets import image_size_tensor

from ..auxiliary import AuxiliaryHead
from .anchors import CellAnchors
from .boxes import clip
from .suppression import Suppression

__all__ = [
    "DenseHead",
    "LevelScales",
    "Tower",
    "average_factor",
    "average_positives",
    "dense_detections",
    "flatten_levels",
    "focal_losses",
    "focal_sum",
    "output_conv",
    "sum_over_classes",
]


class DenseHead(AuxiliaryHead):
    """What predicts classes and a box at every place of the maps; a subclass has the layers.

    Args:
        strides: of the maps, in pixels
        num_classes: K
        anchors: of the maps, one or more per cell
        class_weight, giou_weight: of the losses
        detection: the limits of :func:`dense_detections`

    Attributes:
        node: the head's part of ``MODEL.CODETR``
    """

    node: str

    def __init__(
        self,
        *,
        strides: Sequence[int],
        num_classes: int,
        anchors: CellAnchors,
        class_weight: float,
        giou_weight: float,
        **detection: float,
    ):
        super().__init__()
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.anchors = anchors
        self.class_weight, self.giou_weight = class_weight, giou_weight
        self.detection = detection

    @classmethod
    def from_config(
        cls, cfg: CfgNode, *, channels: int, strides: Sequence[int], num_classes: int
    ) -> dict:
        node = cfg.MODEL.CODETR[cls.node]
        return {
            "channels": channels,
            "strides": strides,
            "num_classes": num_classes,
            "convs": node.CONVS,
            "score_threshold": node.SCORE_THRESHOLD,
            "candidates_per_level": node.CANDIDATES_PER_LEVEL,
            "nms_threshold": node.NMS_THRESHOLD,
            "max_detections": node.MAX_DETECTIONS,
        }

    def scored_boxes(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return scores, boxes and ratings of the anchors, see :func:`dense_detections`."""
        raise NotImplementedError

    @torch.no_grad()
    def detect(
        self, maps: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """See :class:`AuxiliaryHead`."""
        return self.best(maps, image_sizes, *self.scored_boxes(maps))

    def best(
        self,
        maps: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        scores: Tensor,
        boxes: Tensor,
        ratings: Tensor | None,
        **limits: float,
    ) -> list[Instances]:
        """Return the detections among scored boxes within this head's limits, or others.

        Args:
            scores, boxes, ratings, image_sizes, **limits: see :func:`dense_detections`
        """
        sizes = [each.shape[2] * each.shape[3] * self.anchors.per_cell for each in maps]
        limits = {**self.detection, **limits}
        return dense_detections(scores, boxes, sizes, image_sizes, ratings=ratings, **limits)


class Tower(nn.Sequential):
    """3x3 convolutions ``C -> C``, each with a group norm and ReLU.

    Args:
        channels: C
        layers: how many; none is the identity
        groups: of the norms
    """

    def __init__(self, *, channels: int, layers: int = 1, groups: int = 32):
        parts: list[nn.Module] = []
        for _ in range(layers):
            conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            nn.init.normal_(conv.weight, std=0.01)
            parts += [conv, nn.GroupNorm(groups, channels), nn.ReLU(inplace=True)]
        super().__init__(*parts)


def output_conv(
    channels: int, outputs: int, *, kernel: int = 3, prior: float | None = None
) -> nn.Conv2d:
    """Return the last convolution of a branch, ``(N, C, Hl, Wl)`` to ``(N, outputs, Hl, Wl)``.

    Args:
        channels: C
        kernel: its side
        prior: what the sigmoid of its outputs starts at; None: at 1/2
    """
    conv = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, 0.0 if prior is None else math.log(prior / (1 - prior)))
    return conv


class LevelScales(nn.Module):
    """A learned factor per level.

    Args:
        levels: L
        initial: value of all factors at the start
    """

    def __init__(self, *, levels: int, initial: float = 1.0):
        super().__init__()
        self.scales = nn.ParameterList(
            nn.Parameter(torch.tensor(float(initial))) for _ in range(levels)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the maps ``(N, ..., Hl, Wl)`` of all levels times their factors."""
        return [each * scale for each, scale in zip(maps, self.scales)]


def flatten_levels(maps: Sequence[Tensor], size: int) -> Tensor:
    """Return outputs ``(N, anchors * size, Hl, Wl)`` of all levels as ``(N, A, size)``, float32."""
    flat = [each.permute(0, 2, 3, 1).reshape(each.shape[0], -1, size) for each in maps]
    return torch.cat(flat, dim=1).float()


def average_factor(number: Tensor) -> Tensor:
    """Return the mean of each process's ``number`` ``(...)``, at least 1, without gradient and
    without waiting for the device. All processes must call it equally often.
    """
    mean = number.detach().float().clone()
    if comm.get_world_size() > 1:
        dist.all_reduce(mean)
        mean = mean / comm.get_world_size()
    return mean.clamp(min=1.0)


def average_positives(positive: Tensor) -> Tensor:
    """Return the :func:`average_factor` of positive anchors ``(N, A)``, with images that have none
    counted as if they had one.
    """
    return average_factor(positive.sum(dim=1).clamp(min=1).sum())


def focal_losses(
    logits: Tensor,
    labels: Tensor,
    counted: Tensor | None = None,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Return the sigmoid focal loss of each anchor, ``(N, A)``.

    Args:
        logits: ``(N, A, K)``, float32
        labels: ``(N, A)`` in [-1, K]: K is background, -1 is ignored
        counted: ``(K,)``, classes that have a loss; None: all
    """
    classes = torch.arange(logits.shape[-1], device=labels.device)
    target = (labels[..., None] == classes).to(logits.dtype)
    loss = sigmoid_focal_loss(logits, target, alpha=alpha, gamma=gamma)
    return sum_over_classes(loss, counted) * (labels >= 0)


def focal_sum(logits: Tensor, labels: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the sum of the :func:`focal_losses`, a scalar; the same arguments."""
    return focal_losses(logits, labels, counted).sum()


def sum_over_classes(losses: Tensor, counted: Tensor | None) -> Tensor:
    """Return the sum ``(...)`` of ``(..., K)`` over the classes that count, ``(K,)``; None: all."""
    return (losses if counted is None else losses * counted).sum(dim=-1)


@torch.no_grad()
def dense_detections(
    scores: Tensor,
    boxes: Tensor,
    level_sizes: Sequence[int],
    image_sizes: Sequence[tuple[int, int]],
    *,
    ratings: Tensor | None = None,
    score_threshold: float = 0.0,
    candidates_per_level: int = 1000,
    nms_threshold: float = 0.6,
    max_detections: int = 100,
    soft_nms: bool = False,
    by_offset: bool = False,
) -> list[Instances]:
    """Return the detections of each image, best first, with ``pred_boxes``, ``scores`` and
    ``pred_classes``.

    Args:
        scores: ``(N, A, K)``, probabilities
        boxes: ``(N, A, 4)``, xyxy in pixels; they are clipped here
        level_sizes: anchors per level, A in total
        image_sizes: height and width without padding
        ratings: ``(N, A)``, such as centerness: multiplied onto the scores once the candidates are
            chosen
        score_threshold: scores of candidates are above it, before the ratings
        candidates_per_level: pairs of anchor and class with the highest scores
        nms_threshold: IoU of the suppression within a class
        max_detections: per image
        soft_nms, by_offset: how it suppresses, see :class:`Suppression`
    """
    classes = scores.shape[-1]
    chosen, first = [], 0
    for level in scores.split(list(level_sizes), dim=1):
        count = min(candidates_per_level, level.shape[1] * classes)
        chosen.append(level.flatten(1).topk(count, dim=1).indices + first * classes)
        first += level.shape[1]
    chosen = torch.cat(chosen, dim=1)  # (N, candidates)
    found = scores.flatten(1).gather(1, chosen)
    keep = found > score_threshold
    anchor = chosen // classes
    if ratings is not None:
        found = found * ratings.gather(1, anchor)
    limits = image_size_tensor(image_sizes, boxes.device).flip(1).repeat(1, 2)[:, None]
    boxes = clip(boxes, limits).gather(1, anchor[..., None].expand(-1, -1, 4))
    suppression = Suppression(iou=nms_threshold, soft=soft_nms, by_offset=by_offset)
    results = []
    for i, size in enumerate(image_sizes):
        mine = keep[i].nonzero()[:, 0]
        labels = chosen[i, mine] % classes
        best, rated = suppression(boxes[i, mine], found[i, mine], labels, most=max_detections)
        instances = Instances(tuple(size))
        instances.pred_boxes = Boxes(boxes[i, mine[best]])
        instances.scores = rated
        instances.pred_classes = labels[best]
        results.append(instances)
    return results

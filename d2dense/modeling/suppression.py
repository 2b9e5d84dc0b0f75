"""Detections of several versions of an image become one set: soft suppression and box voting.

Letters: M detections of one image, P pairs of neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.ops import box_iou

from d2dense.errors import UserError, nearest

__all__ = ["METHODS", "suppress", "vote"]

METHODS = ("linear", "gaussian")

_ROWS = 1024  # whose overlaps with all others are held at once
# A Gaussian that changes a score by less than float32 shows is none.
_NEGLIGIBLE = 1e-7


def suppress(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    *,
    method: str = "linear",
    iou: float = 0.5,
    sigma: float = 0.5,
    min_score: float = 1e-3,
) -> Tensor:
    """Return new scores ``(M,)`` by Soft-NMS within each class (Bodla et al., 2017); 0 below
    ``min_score``. A detection that is kept multiplies those with a lower score that overlap it by
    1 - IoU where the IoU is at least ``iou`` ("linear"), or by exp(-IoU^2 / sigma) ("gaussian").

    The memory that it takes grows with the pairs that overlap, not with M^2: several versions of an
    image have tens of thousands of detections.

    Args:
        boxes: ``(M, 4)``, xyxy
        scores, classes: ``(M,)``

    Raises:
        UserError: an unknown method.
    """
    if method not in METHODS:
        raise UserError(
            f"soft suppression {method!r} (TEST.AUG.METHOD / train.test_aug.method), expected one "
            f"of {', '.join(METHODS)}{nearest(method, METHODS)}"
        )
    least = iou if method == "linear" else math.sqrt(sigma * _NEGLIGIBLE)
    first, second, overlap = _neighbours(boxes, classes, least)
    others = first != second
    first, second, overlap = first[others], second[others], overlap[others]
    factor = 1 - overlap if method == "linear" else torch.exp(-(overlap**2) / sigma)
    return _suppressed(scores, first, second, factor, min_score)


def vote(
    boxes: Tensor,
    candidates: Tensor,
    scores: Tensor,
    *,
    classes: Tensor,
    candidate_classes: Tensor,
    iou: float = 0.5,
) -> Tensor:
    """Return each box moved to the mean, weighted by scores, of the candidates of its class that
    overlap it by at least ``iou`` (box voting, Gidaris & Komodakis, 2015), ``(R, 4)``.

    Args:
        boxes, classes: ``(R, 4)``, ``(R,)``, kept by :func:`suppress`
        candidates, candidate_classes: ``(M, 4)``, ``(M,)``; the boxes are among them
        scores: ``(M,)``, of the candidates before suppression
    """
    total, weight = torch.zeros_like(boxes), boxes.new_zeros(len(boxes), 1)
    for start in range(0, len(boxes), _ROWS):
        rows = slice(start, start + _ROWS)
        near = box_iou(boxes[rows], candidates) >= iou
        near &= classes[rows, None] == candidate_classes[None]
        votes = near * scores
        total[rows], weight[rows] = votes @ candidates, votes.sum(dim=1, keepdim=True)
    return torch.where(weight > 0, total / weight.clamp(min=1e-12), boxes)


def _neighbours(boxes: Tensor, classes: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs of one class that overlap by at least ``least``, in both orders and with
    themselves: the two indices and the IoU, ``(P,)`` each.
    """
    order = classes.argsort()
    boxes, classes = boxes[order], classes[order]
    found = [(order[:0], order[:0], boxes[:0, 0])]
    for start in range(0, len(boxes), _ROWS):
        rows = slice(start, start + _ROWS)
        # only where the classes of these rows are
        ends = torch.stack([classes[rows][0], classes[rows][-1] + 1])
        low, high = torch.searchsorted(classes, ends).tolist()
        overlap = box_iou(boxes[rows], boxes[low:high])
        near = (overlap >= least) & (classes[rows, None] == classes[None, low:high])
        first, second = near.nonzero(as_tuple=True)
        found.append((order[first + start], order[second + low], overlap[first, second]))
    first, second, overlap = (torch.cat(each) for each in zip(*found))
    return first, second, overlap


def _suppressed(
    scores: Tensor, first: Tensor, second: Tensor, factor: Tensor, min_score: float
) -> Tensor:
    """Return the scores after suppression, where taking ``first`` multiplies ``second``.

    The usual loop takes the best detection, lowers its neighbours, and so on. All that are better
    than each of their neighbours can be taken at once, with the same result: there are as many
    rounds as the longest chain of neighbours.
    """
    taken, left = torch.zeros_like(scores), scores >= min_score
    while left.any():
        alive = left[first] & left[second]
        first, second, factor = first[alive], second[alive], factor[alive]
        mine, other = scores[first], scores[second]
        better = (mine > other) | ((mine == other) & (first < second))
        beaten = torch.zeros_like(left)
        beaten[second[better]] = True
        best = left & ~beaten
        taken = torch.where(best, scores, taken)
        lowering = best[first]
        scores = scores.scatter_reduce(0, second[lowering], factor[lowering], "prod")
        left = left & ~best & (scores >= min_score)
    return taken

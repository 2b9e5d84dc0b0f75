"""Boundary IoU of label maps (Cheng et al., CVPR 2021, section 4): the intersection over union of
those pixels of a class that lie near its contour.

Letters: K classes, H and W of an image.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

__all__ = ["BoundaryCounts", "boundary_iou", "near_contour"]

DILATION_RATIO = 0.02
_NO_CLASS = -1


class BoundaryCounts:
    """Pixels near contours in one image: ``counts`` (3, K) holds, per class, those of both maps
    that agree, those of the truth, and those predicted.

    What is predicted where the truth has no class does not count, and such places have the same
    contour in both maps.

    Args:
        truth: (H, W) classes 0 to K - 1, everything else is no class.
        predicted: (H, W) classes 0 to K - 1, or K where no class was predicted.
        num_classes: K.
        ratio: how near, in diagonals of the image.
    """

    def __init__(
        self,
        truth: np.ndarray,
        predicted: np.ndarray,
        num_classes: int,
        *,
        ratio: float = DILATION_RATIO,
    ):
        counted = (truth >= 0) & (truth < num_classes)
        truth = np.where(counted, truth, _NO_CLASS)
        predicted = np.where(counted, predicted, _NO_CLASS)
        distance = max(1, round(ratio * math.hypot(*truth.shape)))
        in_truth = counted & near_contour(truth, distance)
        in_predicted = counted & near_contour(predicted, distance)
        both = in_truth & in_predicted & (truth == predicted)
        self.counts = np.stack(
            [
                np.bincount(classes, minlength=num_classes + 1)[:num_classes]
                for classes in (truth[both], truth[in_truth], predicted[in_predicted])
            ]
        )


def near_contour(classes: np.ndarray, distance: int) -> np.ndarray:
    """Return which pixels (H, W) have another class, or the image's border, at most ``distance``
    steps away, diagonal steps included.

    That is what a class loses when its mask is eroded ``distance`` times by 3x3 pixels; one pass
    over the map does it for all classes.
    """
    values = classes.astype(np.int16)
    kernel = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    # the default borders of both do not count
    near = cv2.erode(values, kernel) != cv2.dilate(values, kernel)
    near[:distance] = near[-distance:] = True
    near[:, :distance] = near[:, -distance:] = True
    return near


def boundary_iou(counts: np.ndarray) -> np.ndarray:
    """Return the boundary IoU (K,) of summed counts (3, K), NaN for a class without ground
    truth.
    """
    both, truth, predicted = counts.astype(float)
    scores = np.full(len(truth), np.nan)
    present = truth > 0
    scores[present] = (both / np.maximum(truth + predicted - both, 1))[present]
    return scores

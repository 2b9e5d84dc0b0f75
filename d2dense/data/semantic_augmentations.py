"""The recipe of segmenters that are trained on padded crops of 32 k + 1 pixels.

Images are (H, W, 3) uint8 until they are cropped and float32 from then on: neither half grey values
of the padding nor the limit of 256 would survive a rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform, Transform, TransformList

from d2dense.errors import UserError

from .augmentations import RandomCropPad, RandomScale, flips

__all__ = [
    "BrightnessShift",
    "ContrastJitter",
    "DistortAndCrop",
    "SaturationJitter",
    "padded_crops",
    "steps_from_cfg",
]

_MAX_VALUE = 256.0


def padded_crops(
    *,
    is_train: bool = True,
    scale_range: Sequence[float] = (0.5, 2.0),
    scale_step: float | None = 0.25,
    color_distortion: bool = False,
    contrast: Sequence[float] = (0.5, 1.5),
    saturation: Sequence[float] = (0.5, 1.5),
    brightness: float = 32.0,
    crop_size: Sequence[int] = (513, 513),
    pad_value: float | Sequence[float] = 127.5,
    ignore_label: int = 255,
    flip: str = "horizontal",
    image_format: str = "RGB",
) -> list[T.Augmentation]:
    """Scale by one of few factors, distort colours, shift the brightness, pad on the right and
    bottom to at least the crop's size, crop anywhere, flip.

    Args:
        is_train: False leaves the image as it is.
        scale_range, scale_step: least, most and distance of the factors on the image's own size,
            all equally likely; see :class:`~d2dense.data.augmentations.RandomScale`.
        color_distortion: whether contrast and then saturation are changed, each half of the time.
        contrast, saturation: ranges of their factors.
        brightness: largest shift of all grey values, half of the time; 0 for none.
        crop_size: (height, width) of the result.
        pad_value: of the padding, for all channels or for each; labels get ``ignore_label``.
        flip: ``"horizontal"``, ``"vertical"`` or ``"none"``.
        image_format: ``"BGR"`` or ``"RGB"``, for the saturation.
    """
    if not is_train:
        return []
    distortions: list[T.Augmentation] = []
    if color_distortion:
        distortions += [
            ContrastJitter(factors=contrast),
            SaturationJitter(factors=saturation, image_format=image_format),
        ]
    if brightness:
        distortions.append(BrightnessShift(largest=brightness))
    scale = RandomScale(min_size=0, max_size=0, scale_range=scale_range, scale_step=scale_step)
    crop = RandomCropPad(crop_size=crop_size, pad_value=pad_value, ignore_label=ignore_label)
    return [scale, DistortAndCrop(distortions=distortions, crop=crop), *flips(flip)]


def steps_from_cfg(cfg: CfgNode) -> list[T.Augmentation]:
    """Return :func:`padded_crops` for training, as the keys under ``INPUT`` say."""
    node = cfg.INPUT.PADDED_CROPS
    return padded_crops(
        scale_range=cfg.INPUT.SCALE_RANGE or (1.0, 1.0),
        scale_step=cfg.INPUT.SCALE_STEP or None,
        color_distortion=cfg.INPUT.COLOR_DISTORTION,
        contrast=node.CONTRAST,
        saturation=node.SATURATION,
        brightness=node.BRIGHTNESS,
        crop_size=cfg.INPUT.CROP.SIZE,
        pad_value=list(node.PAD_VALUE),
        ignore_label=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        flip=cfg.INPUT.RANDOM_FLIP,
        image_format=cfg.INPUT.FORMAT,
    )


class DistortAndCrop(T.Augmentation):
    """Distortions of single pixels, then padding and a crop: the same result as in that order, but
    only those pixels are distorted that stay.
    """

    def __init__(self, *, distortions: Sequence[T.Augmentation], crop: RandomCropPad):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        changes = [each.get_transform(image) for each in self.distortions]
        crop, pad = self.crop.get_transform(image).transforms
        return TransformList([crop, _AsFloat(), *changes, pad])


class _Pointwise(Transform):
    """Changes values and leaves geometry and labels alone."""

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation


class _AsFloat(_Pointwise):
    def apply_image(self, image: np.ndarray) -> np.ndarray:
        return image.astype(np.float32)


class _Jitter(T.Augmentation):
    """Something with a random factor.

    Args:
        factors: the least and the most.
        prob: how often.
    """

    def __init__(self, *, factors: Sequence[float], prob: float = 0.5):
        super().__init__()
        if len(factors) != 2 or not 0 <= factors[0] <= factors[1]:
            raise UserError(
                f"{type(self).__name__}: factors = {list(factors)}, expected the least and the "
                "most, at least 0"
            )
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        # both are drawn whether they are used or not: the stream of numbers has a fixed length
        is_used = np.random.uniform() < self.prob
        factor = np.random.uniform(*self.factors)
        return self.change(image, factor) if is_used else NoOpTransform()

    def change(self, image: np.ndarray, factor: float) -> Transform:
        raise NotImplementedError


class ContrastJitter(_Jitter):
    """Random contrast: the distance of each value from its channel's mean over the image, times a
    factor. Results are clipped to 0 to 256.
    """

    def change(self, image: np.ndarray, factor: float) -> Transform:
        return ContrastTransform(factor=factor, mean=cv2.mean(image)[: image.shape[2]])


class SaturationJitter(_Jitter):
    """Random saturation in the HSV colour space: times a factor, at most 1; hue and value stay.

    Args:
        factors: the least and the most.
        prob: how often.
        image_format: ``"BGR"`` or ``"RGB"``.
    """

    def __init__(self, *, factors: Sequence[float], prob: float = 0.5, image_format: str = "RGB"):
        super().__init__(factors=factors, prob=prob)
        if image_format not in ("BGR", "RGB"):
            raise UserError(
                f"a saturation needs INPUT.FORMAT / image_format BGR or RGB, got {image_format!r}"
            )
        self.image_format = image_format

    def change(self, image: np.ndarray, factor: float) -> Transform:
        return SaturationTransform(factor=factor, is_rgb=self.image_format == "RGB")


class BrightnessShift(T.Augmentation):
    """Add one random number to all values, half of the time; clipped to 0 to 256.

    Args:
        largest: shifts are uniform from minus to plus this.
    """

    def __init__(self, *, largest: float = 32.0, prob: float = 0.5):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        is_used = np.random.uniform() < self.prob
        shift = np.random.uniform(-self.largest, self.largest)
        return BrightnessTransform(shift=shift) if is_used else NoOpTransform()


class ContrastTransform(_Pointwise):
    """:class:`ContrastJitter` with its numbers drawn."""

    def __init__(self, *, factor: float, mean: Sequence[float]):
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        mean = np.asarray(self.mean, np.float32)
        return np.clip((image - mean) * np.float32(self.factor) + mean, 0, _MAX_VALUE)


class SaturationTransform(_Pointwise):
    """:class:`SaturationJitter` with its factor drawn."""

    def __init__(self, *, factor: float, is_rgb: bool):
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        to_hsv, back = (
            (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB)
            if self.is_rgb
            else (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR)
        )
        # of floats the saturation is from 0 to 1, and the value is of any range
        hsv = cv2.cvtColor(np.ascontiguousarray(image, dtype=np.float32), to_hsv)
        hsv[..., 1] = np.minimum(hsv[..., 1] * np.float32(self.factor), 1)
        return cv2.cvtColor(hsv, back)


class BrightnessTransform(_Pointwise):
    """:class:`BrightnessShift` with its number drawn."""

    def __init__(self, *, shift: float):
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        return np.clip(image.astype(np.float32) + np.float32(self.shift), 0, _MAX_VALUE)

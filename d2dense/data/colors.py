"""Random changes of colours, for uint8 images (H, W, 3)."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform

from d2dense.errors import UserError

__all__ = ["ColorTransform", "PhotometricDistortion"]


class PhotometricDistortion(T.Augmentation):
    """Random brightness, contrast, saturation and hue as in SSD, each applied half of the time.

    Args:
        brightness: largest shift of the grey value.
        contrast: range of the factor on all channels, before or after the colour changes.
        saturation: range of the factor on the saturation.
        hue: largest shift of the hue in degrees.
        image_format: ``"BGR"`` or ``"RGB"``.
    """

    def __init__(
        self,
        *,
        brightness: float = 32.0,
        contrast: Sequence[float] = (0.5, 1.5),
        saturation: Sequence[float] = (0.5, 1.5),
        hue: float = 36.0,
        image_format: str = "BGR",
    ):
        super().__init__()
        if image_format not in ("BGR", "RGB"):
            raise UserError(
                f"photometric distortion needs INPUT.FORMAT BGR or RGB, got {image_format!r}"
            )
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        # One draw per parameter whether it is used or not: the stream of random numbers has a fixed
        # length.
        use = np.random.uniform(size=4) < 0.5
        brightness = np.random.uniform(-self.brightness, self.brightness)
        contrast = np.random.uniform(*self.contrast)
        saturation = np.random.uniform(*self.saturation)
        hue = np.random.uniform(-self.hue, self.hue)
        return ColorTransform(
            brightness=brightness if use[0] else 0.0,
            contrast=contrast if use[1] else 1.0,
            saturation=saturation if use[2] else 1.0,
            hue=hue if use[3] else 0.0,
            contrast_last=bool(np.random.randint(2)),
            is_rgb=self.image_format == "RGB",
        )


class ColorTransform(Transform):
    """The distortion with its numbers drawn; geometry stays.

    Args:
        brightness: added to all values.
        contrast: factor on all channels, after the colour changes if ``contrast_last``.
        saturation: factor on the saturation.
        hue: shift of the hue in degrees.
        is_rgb: whether channels are in the order RGB, else BGR.
    """

    def __init__(
        self,
        *,
        brightness: float,
        contrast: float,
        saturation: float,
        hue: float,
        contrast_last: bool,
        is_rgb: bool,
    ):
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Return the distorted image; (H, W, 3) uint8 in and out."""
        table = _scaled(_VALUES, 1.0, self.brightness)
        if not self.contrast_last:
            table = _scaled(table, self.contrast, 0.0)
        image = _looked_up(image, table)
        if self.saturation != 1.0 or self.hue != 0.0:
            to_hsv, back = (
                (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB)
                if self.is_rgb
                else (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR)
            )
            hsv = cv2.cvtColor(np.ascontiguousarray(image), to_hsv)
            image = cv2.cvtColor(cv2.LUT(hsv, self._hsv_table()), back)
        if not self.contrast_last:
            return image
        return _looked_up(image, _scaled(_VALUES, self.contrast, 0.0))

    def _hsv_table(self) -> np.ndarray:
        """Return (1, 256, 3) uint8: what each value of each channel becomes."""
        hue = (_VALUES + round(self.hue / 2)) % 180  # uint8 hue counts steps of two degrees
        saturation = _scaled(_VALUES, self.saturation, 0.0)
        return np.stack([hue, saturation, _VALUES], axis=-1).astype(np.uint8)[None]

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation


# All values of a uint8 channel: what they become is computed once for each and looked up per pixel.
_VALUES = np.arange(256)


def _looked_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    return image if np.array_equal(table, _VALUES) else cv2.LUT(image, table)


def _scaled(values: np.ndarray, scale: float, shift: float) -> np.ndarray:
    return np.clip(values.astype(np.float32) * scale + shift, 0, 255).astype(np.uint8)

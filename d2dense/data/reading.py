"""Read pictures and label maps; whatever goes wrong names the file."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from d2dense.errors import UserError

__all__ = ["SampleError", "read_image", "read_label_map", "read_sem_seg"]


class SampleError(UserError):
    """A sample cannot be used: its file is missing or broken, or contradicts its annotation."""

    def __init__(self, message: str, file_name: str = ""):
        super().__init__(message)
        self.file_name = file_name


def read_image(record: dict[str, Any], image_format: str) -> np.ndarray:
    """Read a record's picture as (H, W, C) uint8, EXIF orientation applied, and note its size in
    the record. Sixteen bits per channel (0 to 65535) are scaled to eight.

    Raises:
        SampleError: the file is missing, broken, of floats or 32-bit numbers, or not of the
            annotated size.
    """
    path = record["file_name"]
    try:
        image = _read(path, image_format)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError(f"cannot read image {path}: {error}", path) from None
    height, width = image.shape[:2]
    expected = record.setdefault("height", height), record.setdefault("width", width)
    if expected != (height, width):
        raise SampleError(
            f"image {path} is {width}x{height}, but its annotation says "
            f"{expected[1]}x{expected[0]}; correct the annotation or the file",
            path,
        )
    return image


def _read(path: str, image_format: str) -> np.ndarray:
    """As Detectron2's ``read_image``, which clips 16-bit grey at 255 and turns it white."""
    with PathManager.open(path, "rb") as file:
        picture = detection_utils._apply_exif_orientation(Image.open(file))
        return detection_utils.convert_PIL_to_numpy(_to_8_bits(picture), image_format)


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Scale grey pictures of 16 bits; PIL itself scales those in colour as it opens them."""
    if picture.mode == "F":
        raise ValueError("it holds floats of unknown range; save it with 8 or 16 bits")
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    # a file of 16 bits may open in PIL's 32-bit mode "I", and so does one of 32
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("it holds numbers outside 0 to 65535; save it with 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def read_label_map(path: str) -> np.ndarray:
    """Read a label image as (H, W) class numbers; a palette image gives its indices, not its
    colours.

    Raises:
        SampleError: missing, broken, or a colour picture.
    """
    try:
        with Image.open(path) as image:
            labels = np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise SampleError(f"cannot read label map {path}: {error}", path) from None
    if labels.ndim != 2:
        raise SampleError(
            f"label map {path} has {labels.shape[2]} channels, expected one with class "
            "numbers (grey or palette PNG)",
            path,
        )
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def read_sem_seg(record: dict[str, Any], image: np.ndarray, ignore_label: int) -> np.ndarray:
    """Read the label map of ``record``, whose picture is ``image``.

    Returns:
        (H, W), uint8 or float32 (the transforms resize nothing else), with the data's own ignore
        label replaced by ``ignore_label``.

    Raises:
        SampleError: missing, broken, or of another size than the picture.
    """
    path = record["sem_seg_file_name"]
    labels = read_label_map(path)
    if labels.shape != image.shape[:2]:
        raise SampleError(
            f"label map {path} is {labels.shape[1]}x{labels.shape[0]}, but its image is "
            f"{image.shape[1]}x{image.shape[0]}",
            path,
        )
    own = record.get("sem_seg_ignore_label", ignore_label)
    if own != ignore_label:
        labels = np.where(labels == own, np.array(ignore_label, labels.dtype), labels)
    return labels if labels.dtype == np.uint8 else labels.astype(np.float32)

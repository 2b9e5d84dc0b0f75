"""Read pictures and label maps; whatever goes wrong names the file."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import IO, Any

import cv2
import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageFile, UnidentifiedImageError

from d2dense.errors import UserError

from . import label_tables

__all__ = [
    "RejectedSample",
    "SampleError",
    "be_strict",
    "read_image",
    "read_label_map",
    "read_sem_seg",
    "read_size",
    "reduce_zero_label",
    "to_classes",
]


class SampleError(UserError):
    """A sample cannot be used: its file is missing or broken, or contradicts its annotation."""

    def __init__(self, message: str, file_name: str = ""):
        super().__init__(message)
        self.file_name = file_name


class RejectedSample(SampleError):
    """A sample that its random augmentation left of no use, by no fault of its files: another one
    takes its place without a word.
    """


def read_image(record: dict[str, Any], image_format: str) -> np.ndarray:
    """Read a record's picture as (H, W, C) uint8, EXIF orientation applied, and note its size in
    the record. Sixteen bits per channel (0 to 65535) are scaled to eight, transparency is dropped,
    and of several frames the first is taken.

    Raises:
        SampleError: the file is missing, broken, of floats or 32-bit numbers, or not of the
            annotated size.
    """
    path = record["file_name"]
    with _naming("image", path):
        picture, stored = _open(path)
        image = _to_numpy(_to_8_bits(picture), image_format)
    height, width = image.shape[:2]
    expected = record.setdefault("height", height), record.setdefault("width", width)
    if expected == (height, width):
        return image
    correction = "correct the annotation or the file"
    if expected == stored:
        correction = (
            f"that is its size before its EXIF orientation turns it to {width}x{height}, as it is "
            "seen; annotate the turned picture, or remove the orientation from the file"
        )
    raise SampleError(
        f"image {path} is {width}x{height}, but its annotation says {expected[1]}x{expected[0]}; "
        + correction,
        path,
    )


def _to_numpy(picture: Image.Image, image_format: str) -> np.ndarray:
    """As Detectron2's conversion. It returns BGR as a reversed view of RGB, which takes numpy many
    times longer to copy in every later step than the channels take to be swapped here.
    """
    if image_format != "BGR":
        return detection_utils.convert_PIL_to_numpy(picture, image_format)
    image = detection_utils.convert_PIL_to_numpy(picture, "RGB")
    return cv2.cvtColor(image, cv2.COLOR_RGB2BGR)


def read_size(path: str) -> tuple[int, int]:
    """Return the (height, width) that a picture's header states, before any EXIF orientation.

    Raises:
        SampleError: missing, or no picture.
    """
    with _naming("image", path), PathManager.open(path, "rb") as file:
        width, height = _identify(file).size
    return height, width


def be_strict() -> None:
    """Have PIL refuse truncated files, which any other library may have allowed, and keep its
    remarks on large pictures and odd metadata to itself.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    warnings.filterwarnings("ignore", module=r"PIL\.")


@contextlib.contextmanager
def _naming(kind: str, path: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a SampleError that names the file, and nothing else."""
    be_strict()
    try:
        yield
    except UnidentifiedImageError:
        empty = os.path.isfile(path) and not os.path.getsize(path)
        reason = "it is empty" if empty else "it is not a picture, or its start is damaged"
        raise SampleError(f"cannot read {kind} {path}: {reason}", path) from None
    except Exception as error:  # damaged bytes make decoders raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise SampleError(f"cannot read {kind} {path}: {reason}", path) from None


def _identify(file: IO[bytes]) -> Image.Image:
    """Open a picture of any format that PIL knows but PostScript, which is a program: Ghostscript
    would run it, whatever the file's name ends in.
    """
    Image.init()  # does nothing the second time
    return Image.open(file, formats=[name for name in Image.ID if name != "EPS"])


def _open(path: str) -> tuple[Image.Image, tuple[int, int]]:
    """Return the first frame, turned as its EXIF data says, and its (height, width) before that."""
    with PathManager.open(path, "rb") as file:
        picture = _identify(file)
        width, height = picture.size
        # PIL turns TIFFs itself while it loads them, and then forgets their orientation
        picture.load()
        if picture.format == "TIFF" and picture.mode == "I":
            _check_range(picture)
            raise ValueError("it holds 32-bit numbers of unknown range; save it with 8 or 16 bits")
        # PIL warns of a palette with transparency before it drops it
        picture.info.pop("transparency", None)
        return detection_utils._apply_exif_orientation(picture), (height, width)


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Scale grey pictures of 16 bits; PIL itself scales those in colour as it opens them."""
    if picture.mode == "F":
        raise ValueError("it holds floats of unknown range; save it with 8 or 16 bits")
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    values = _check_range(picture)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _check_range(picture: Image.Image) -> np.ndarray:
    """Return the numbers of a grey picture as (H, W) int64.

    A file of 16 bits may open in PIL's 32-bit mode "I", and so does one of 32.
    """
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("it holds numbers outside 0 to 65535; save it with 8 or 16 bits")
    return values


def read_label_map(path: str) -> np.ndarray:
    """Read a label image as (H, W) class numbers; a palette image gives its indices, not its
    colours.

    Raises:
        SampleError: missing, broken, or a colour picture.
    """
    with _naming("label map", path), PathManager.open(path, "rb") as file:
        labels = np.asarray(_identify(file))
    if labels.ndim != 2:
        raise SampleError(
            f"label map {path} has {labels.shape[2]} channels, expected one with class "
            "numbers (grey or palette PNG)",
            path,
        )
    if labels.dtype.kind == "f":
        raise SampleError(f"label map {path} holds floats, expected whole class numbers", path)
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def read_sem_seg(record: dict[str, Any], image: np.ndarray, ignore_label: int) -> np.ndarray:
    """Read the label map of ``record``, whose picture is ``image``.

    Returns:
        (H, W), uint8 or float32 (the transforms resize nothing else), with the data's own ignore
        label replaced by ``ignore_label``.

    Raises:
        SampleError: missing, broken, of another size than the picture, or with classes that the
            dataset does not have.
    """
    path = record["sem_seg_file_name"]
    labels = read_label_map(path)
    own = record.get("sem_seg_ignore_label", ignore_label)
    labels = to_classes(
        labels,
        path,
        ignore_label=own,
        reduces_zero=record.get("sem_seg_reduce_zero_label", False),
        label_table=record.get("sem_seg_label_table", ""),
    )
    if labels.shape != image.shape[:2]:
        raise SampleError(
            f"label map {path} is {labels.shape[1]}x{labels.shape[0]}, but its image is "
            f"{image.shape[1]}x{image.shape[0]}",
            path,
        )
    if "sem_seg_classes" in record:
        _check_classes(labels, record["sem_seg_classes"], own, path)
    if own != ignore_label:
        labels = np.where(labels == own, np.array(ignore_label, labels.dtype), labels)
    return labels if labels.dtype == np.uint8 else labels.astype(np.float32)


def to_classes(
    labels: np.ndarray,
    path: str,
    *,
    ignore_label: int,
    reduces_zero: bool = False,
    label_table: str = "",
) -> np.ndarray:
    """Return the classes (H, W) that the values (H, W) in the label map ``path`` stand for, by a
    table of :mod:`d2dense.data.label_tables`, by :func:`reduce_zero_label`, or as they are.

    Args:
        labels: the values.
        path: of the label map, for the error.
        ignore_label: what pixels of no class become.
        reduces_zero: whether classes count from 1; a table goes before.
        label_table: name or json file of a table; empty: none.

    Raises:
        SampleError: a value that the table does not list.
    """
    if not label_table:
        return reduce_zero_label(labels, ignore_label) if reduces_zero else labels
    try:
        return label_tables.get(label_table).to_classes(
            labels, ignore_label=ignore_label, path=path
        )
    except label_tables.UnknownValue as error:
        raise SampleError(str(error), path) from None


def reduce_zero_label(labels: np.ndarray, ignore_label: int) -> np.ndarray:
    """Return labels (H, W) less one, for files that count classes from 1 and whose 0 is no class:
    0 and ``ignore_label`` become ``ignore_label``.
    """
    no_class = (labels == 0) | (labels == ignore_label)
    reduced = np.where(no_class, ignore_label, labels.astype(np.int64) - 1)
    is_small = labels.dtype == np.uint8 and 0 <= ignore_label <= 255
    return reduced.astype(np.uint8) if is_small else reduced


def _check_classes(labels: np.ndarray, count: int, ignore_label: int, path: str) -> None:
    wrong = labels[((labels < 0) | (labels >= count)) & (labels != ignore_label)]
    if wrong.size:
        raise SampleError(
            f"label map {path} has class {wrong[0]}, but its dataset has the classes 0 to "
            f"{count - 1} and ignores {ignore_label}; correct the file, the class list or the "
            "ignore label",
            path,
        )

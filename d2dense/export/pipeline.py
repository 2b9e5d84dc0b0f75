"""From a config to a checked file: build, load weights, convert, save, verify, describe."""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from omegaconf import DictConfig
from torch import Tensor, nn

from d2dense import __version__
from d2dense.errors import UserError

from .adapters import Adapter, adapt, largest_side
from .artefact import metadata_path
from .formats import FORMATS, Format, check_format
from .support import check_supported
from .torchscript import quiet
from .verification import ImageCheck, check_images, verify

__all__ = ["FORMATS", "Exported", "export", "export_model"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote and how its check went."""

    path: Path
    metadata_path: Path
    task: str
    checks: list[ImageCheck]

    @property
    def max_error(self) -> float:
        return max(check.error for check in self.checks)


def export(
    config_or_name: str | Path | CfgNode | DictConfig,
    *,
    output_dir: str | Path,
    format: str = "torchscript",
    method: str = "trace",
    weights: str | os.PathLike | None = None,
    sample_image: str | Path | None = None,
    tolerance: float = 1e-4,
    overrides: Sequence[str] = (),
) -> Exported:
    """Export the model of a config, see :func:`export_model`.

    Args:
        config_or_name, weights, overrides: as in :class:`d2dense.inference.Predictor`.
        sample_image: picture to trace and check on, best one with objects that the model knows; a
            generated scene where None.

    Raises:
        UserError: whatever the user can correct.
        CheckError: the file does not compute what the model does; it is removed.
    """
    from d2dense.inference import Predictor  # needs the data and the projects

    check_format(format, method)
    if sample_image is not None and not Path(sample_image).is_file():
        raise UserError(f"--sample-image {sample_image} does not exist")
    predictor = Predictor(config_or_name, weights, device="cpu", overrides=overrides)
    kinds = {"detection": "thing", "semantic": "stuff", "classification": "image"}
    classes = f"{kinds[adapt(predictor.model).task]}_classes"
    picture = _scene() if sample_image is None else sample_image
    return export_model(
        predictor.model,
        predictor.preprocess(picture)["image"],
        output_dir=output_dir,
        format=format,
        method=method,
        tolerance=tolerance,
        classes=predictor.metadata.get(classes),
        channels=predictor.image_format,
        resize=_resize_rule(predictor.augmentations),
    )


def export_model(
    model: nn.Module,
    image: Tensor,
    *,
    output_dir: str | Path,
    format: str = "torchscript",
    method: str = "trace",
    tolerance: float = 1e-4,
    classes: Sequence[str] | None = None,
    channels: str = "BGR",
    resize: dict[str, Any] | None = None,
) -> Exported:
    """Write a file and ``model.json`` into a folder, after a check in a fresh process.

    The check compares the file with the model on two other image sizes and on a pale one; the
    model itself is not changed.

    Args:
        model: a Detectron2 model on the CPU.
        image: ``(C, H, W)`` in [0, 255].
        classes, channels, resize: for the description, see :mod:`d2dense.export`.

    Raises:
        UserError: unknown format or method, or a model that cannot be exported that way.
        CheckError: the file does not compute what the model does; it is removed.
    """
    check_format(format, method)
    check_supported(model, format, method)
    file_name = FORMATS[format].file_name
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; change --output") from None
    path = folder / file_name
    unchecked = path.with_name(f".unchecked.{os.getpid()}.{file_name}")
    adapter = adapt(copy.deepcopy(model)).eval()
    try:
        with quiet():
            FORMATS[format].save(adapter.model, image, unchecked, method=method)
            images = check_images(image, largest=largest_side(model))
            checks = verify(unchecked, adapter, images, tolerance=tolerance)
        os.replace(unchecked, path)
    finally:
        unchecked.unlink(missing_ok=True)
    if adapter.task == "detection" and not any(check.found for check in checks):
        logger.warning(
            "no check image had detections, so little was compared; give --sample-image with "
            "objects that the model finds"
        )
    about = {
        "format": format,
        **FORMATS[format].details,
        "method": method if format == "torchscript" else None,
        "file": file_name,
        **_describe(adapter, image, FORMATS[format], classes, channels, resize),
        "check": {
            "tolerance": tolerance,
            "max_error": max(check.error for check in checks),
            "images": [vars(check) for check in checks],
        },
    }
    metadata_path(path).write_text(json.dumps(about, indent=2) + "\n")
    return Exported(path=path, metadata_path=metadata_path(path), task=adapter.task, checks=checks)


def _describe(
    adapter: Adapter,
    image: Tensor,
    format: Format,
    classes: Sequence[str] | None,
    channels: str,
    resize: dict[str, Any] | None,
) -> dict[str, Any]:
    return {
        "task": adapter.task,
        "input": {
            "name": "image",
            "shape": [image.shape[0], "H", "W"],
            "sides": [format.least_side, largest_side(adapter.model)],
            "dtypes": list(format.dtypes),
            "range": [0, 255],
            "channels": channels,
            "resize": resize,
        },
        "outputs": [output.as_dict() for output in adapter.outputs],
        "classes": None if classes is None else list(classes),
        "versions": {
            "d2dense": __version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }


def _resize_rule(augmentations: T.AugmentationList) -> dict[str, Any] | None:
    """Describe how pictures are resized; None where they are not."""
    steps = augmentations.augs
    if not steps:
        return None
    if len(steps) == 1 and isinstance(steps[0], T.ResizeShortestEdge):
        limit = int(steps[0].max_size)
        return {
            "rule": "shortest_edge",
            "min_size": int(steps[0].short_edge_length[0]),
            "max_size": None if limit == sys.maxsize else limit,
        }
    return {"rule": "other", "steps": [repr(step) for step in steps]}


def _scene() -> np.ndarray:
    """Return a generated picture with objects, BGR uint8 (H, W, 3)."""
    from d2dense.data import shapes

    with tempfile.TemporaryDirectory(prefix="d2dense_sample_") as folder:
        shapes.generate(output_dir=folder, split="sample", count=1, size=(480, 640), seed=1)
        return cv2.imread(str(next(Path(folder, "images", "sample").iterdir())))

"""From a config to a checked file: build, load weights, convert, save, verify, describe."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from detectron2.config import CfgNode, instantiate
from detectron2.data import transforms as T
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from d2dense import __version__, checkpoint
from d2dense.errors import UserError, nearest

from .adapters import Adapter, adapt
from .artefact import metadata_path
from .torchscript import to_torchscript
from .verify import ImageCheck, check_images, verify

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


def _save_torchscript(model: nn.Module, image: Tensor, path: Path, *, method: str) -> None:
    torch.jit.save(to_torchscript(model, image, method=method), str(path))


# Format to (file name, function that writes it); further formats are further modules.
FORMATS: dict[str, tuple[str, Callable[..., None]]] = {
    "torchscript": ("model.ts", _save_torchscript),
}
_PLANNED = ("torch_export", "onnx")


def export(
    cfg: CfgNode | DictConfig,
    *,
    output_dir: str | Path,
    format: str = "torchscript",
    method: str = "trace",
    weights: str | None = None,
    sample_image: str | Path | None = None,
    tolerance: float = 1e-4,
) -> Exported:
    """Export the model of a config, see :func:`export_model`.

    Args:
        cfg: what :func:`d2dense.config.load` returns.
        weights: replaces the config's weights.
        sample_image: picture to trace and check on, best one with objects that the model knows; a
            generated scene where None.

    Raises:
        UserError: whatever the user can correct; CheckError: the file is wrong, and removed.
    """
    from d2dense.data.classes import dataset_classes
    from d2dense.engine.experiment import experiment

    check_format(format)
    run = experiment(cfg, device="cpu")
    model = run.build_model().eval()
    weights = weights or run.settings.init_checkpoint
    if weights:
        report = checkpoint.load_weights(model, weights, allow_pickle=run.settings.allow_pickle)
        report.require_complete()
    else:
        logger.warning("no weights are given: the exported model has random ones")
    mapper = _test_mapper(run.cfg)
    names = run.test_names or run.train_names
    kind = "stuff" if adapt(model).task == "semantic" else "thing"
    return export_model(
        model,
        _sample(mapper, sample_image),
        output_dir=output_dir,
        format=format,
        method=method,
        tolerance=tolerance,
        classes=dataset_classes(names, kind) if names else None,
        channels=mapper.image_format,
        resize=_resize_rule(mapper),
    )


def export_model(
    model: nn.Module,
    image: Tensor,
    *,
    output_dir: str | Path,
    format: str = "torchscript",
    method: str = "trace",
    tolerance: float = 1e-4,
    classes: list[str] | None = None,
    channels: str = "BGR",
    resize: dict[str, Any] | None = None,
) -> Exported:
    """Write ``model.ts`` and ``model.json`` into a folder, after a check in a fresh process.

    The check compares the file with the model on two other image sizes and on an empty image; the
    model itself is not changed.

    Args:
        model: a Detectron2 model on the CPU.
        image: ``(C, H, W)`` in [0, 255].
        classes, channels, resize: for the description, see :mod:`d2dense.export`.

    Raises:
        UserError: unknown format or method, or a model that cannot be exported that way.
        CheckError: the file does not compute what the model does; it is removed.
    """
    check_format(format)
    file_name, save = FORMATS[format]
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; change --output") from None
    path, was_training = folder / file_name, model.training
    unchecked = path.with_name(f".unchecked.{os.getpid()}.{file_name}")
    adapter = adapt(model)
    try:
        save(model, image, unchecked, method=method)
        checks = verify(unchecked, adapter.eval(), check_images(image), tolerance=tolerance)
        os.replace(unchecked, path)
    finally:
        model.train(was_training)
        unchecked.unlink(missing_ok=True)
    if adapter.task == "detection" and not any(check.found for check in checks):
        logger.warning(
            "no check image had detections, so little was compared; give --sample-image with "
            "objects that the model finds"
        )
    about = {
        "format": format,
        "method": method,
        "file": file_name,
        **_describe(adapter, image, classes, channels, resize),
        "check": {
            "tolerance": tolerance,
            "max_error": max(check.error for check in checks),
            "images": [vars(check) for check in checks],
        },
    }
    metadata_path(path).write_text(json.dumps(about, indent=2) + "\n")
    return Exported(path=path, metadata_path=metadata_path(path), task=adapter.task, checks=checks)


def check_format(format: str) -> None:
    """Raise a ``UserError`` for a format that cannot be written."""
    if format in FORMATS:
        return
    known = ", ".join(FORMATS)
    if format in _PLANNED:
        raise UserError(f"format {format!r} is not available yet; use --format {known}")
    raise UserError(f"format {format!r}, expected one of {known}{nearest(format, FORMATS)}")


def _describe(
    adapter: Adapter,
    image: Tensor,
    classes: list[str] | None,
    channels: str,
    resize: dict[str, Any] | None,
) -> dict[str, Any]:
    return {
        "task": adapter.task,
        "input": {
            "name": "image",
            "shape": [image.shape[0], "H", "W"],
            "dtypes": ["uint8", "float32"],
            "range": [0, 255],
            "channels": channels,
            "resize": resize,
        },
        "outputs": [output.as_dict() for output in adapter.outputs],
        "classes": classes,
        "versions": {
            "d2dense": __version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }


def _test_mapper(cfg: CfgNode | DictConfig):
    from d2dense.data import mappers

    if isinstance(cfg, CfgNode):
        return mappers.from_cfg(cfg, False)
    node = OmegaConf.select(cfg, "dataloader.test.mapper")
    if node is None:
        raise UserError("the lazy config defines no 'dataloader.test.mapper', which export needs")
    return instantiate(node)


def _resize_rule(mapper) -> dict[str, Any] | None:
    """Describe how the test mapper resizes; None where it does not."""
    steps = list(getattr(mapper.augmentations, "augs", mapper.augmentations))
    if not steps:
        return None
    if len(steps) == 1 and isinstance(steps[0], T.ResizeShortestEdge):
        limit = steps[0].max_size
        return {
            "rule": "shortest_edge",
            "min_size": int(steps[0].short_edge_length[0]),
            "max_size": int(limit) if limit < 2**31 else None,
        }
    return {"rule": "other", "steps": [repr(step) for step in steps]}


def _sample(mapper, path: str | Path | None) -> Tensor:
    """Return a picture as the test mapper gives it, ``(C, H, W)`` uint8."""
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"--sample-image {path} does not exist")
        return mapper({"file_name": str(path)})["image"]
    from d2dense.data import shapes

    with tempfile.TemporaryDirectory(prefix="d2dense_sample_") as folder:
        shapes.generate(output_dir=folder, split="sample", count=1, size=512, seed=1)
        picture = next(Path(folder, "images", "sample").iterdir())
        return mapper({"file_name": str(picture)})["image"]

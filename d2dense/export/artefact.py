"""An exported file back in Python: run it on images, or evaluate it like the model it came from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401 (registers the operators nms and roi_align)
from detectron2.config import CfgNode
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from omegaconf import DictConfig
from torch import Tensor, nn

from d2dense.errors import UserError
from d2dense.modeling.mask2former import masked_instances

from .formats import FORMATS
from .protocol import with_protocol

__all__ = ["ExportedDetector", "evaluate_exported", "load", "metadata_path"]


def metadata_path(path: str | Path) -> Path:
    """Return where the description of the exported file ``path`` lies."""
    return Path(path).with_suffix(".json")


def load(path: str | Path, *, device: str | torch.device = "cpu") -> ExportedDetector:
    """Open an exported model; the ``.json`` file must lie beside it.

    A ``.pt2`` file is rewritten for another device than the CPU, and opened only if it has nothing
    in it that runs by being opened (pickles, libraries, Python's names): :mod:`.archive`. An
    ``.onnx`` file needs an onnxruntime that knows the device; its results are on the CPU always.

    Raises:
        UserError: either file is missing or damaged, or a package for its format is missing.
    """
    path = Path(path)
    try:
        metadata = json.loads(metadata_path(path).read_text())
        outputs = metadata["outputs"], metadata["task"]
    except OSError:
        raise UserError(
            f"{metadata_path(path)} does not exist; it belongs beside the exported model {path}"
        ) from None
    except (ValueError, KeyError, TypeError):
        outputs = None
    if not outputs:
        raise UserError(f"{metadata_path(path)} does not describe an exported model; export again")
    if not path.is_file():
        raise UserError(f"exported model {path} does not exist")
    known = FORMATS.get(metadata.get("format", "torchscript"))
    if known is None:
        raise UserError(
            f"{metadata_path(path)} has the format {metadata['format']!r}, expected one of "
            f"{', '.join(FORMATS)}; export again with this version"
        )
    try:
        run = known.open(path, device)
    except UserError:
        raise
    except Exception as error:  # of damaged files, each reader raises its own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a {known.title} file: {reason}") from error
    return ExportedDetector(run, metadata)


class ExportedDetector(nn.Module):
    """An exported model with the interface of a Detectron2 model.

    Attributes:
        metadata: the content of the ``.json`` file, see :mod:`d2dense.export`.
    """

    def __init__(self, module: Callable[[Tensor], Sequence[Tensor]], metadata: dict[str, Any]):
        super().__init__()
        self.module = module
        self.metadata = metadata
        self.training = False

    def train(self, mode: bool = True) -> ExportedDetector:
        """Do nothing: an exported model evaluates, and a scripted one refuses to be switched."""
        return self

    @torch.no_grad()
    def run(self, image: Tensor) -> dict[str, Tensor]:
        """Return the outputs for one image ``(C, H, W)`` by name, in pixels of this image."""
        names = (output["name"] for output in self.metadata["outputs"])
        taken = self.metadata.get("input", {}).get("dtypes", ())
        if taken and str(image.dtype).removeprefix("torch.") not in taken:
            image = image.to(torch.float32)
        return dict(zip(names, self.module(image)))

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Take and return what Detectron2's models do in evaluation: results in original pixels.

        Args:
            batched_inputs: dicts with ``image`` ``(C, H, W)`` and, where the result belongs to
                another size, ``height`` and ``width``.
        """
        return [self._one(item) for item in batched_inputs]

    def _one(self, item: dict[str, Any]) -> dict[str, Any]:
        image = item["image"]
        size = (image.shape[1], image.shape[2])
        height, width = item.get("height", size[0]), item.get("width", size[1])
        outputs = self.run(image)
        if self.metadata["task"] == "semantic":
            return {"sem_seg": sem_seg_postprocess(outputs["sem_seg"], size, height, width)}
        if self.metadata["task"] == "classification":
            return {"class_scores": outputs["scores"]}
        if "mask_logits" in outputs:
            found = masked_instances(
                outputs["scores"], outputs["classes"], outputs["mask_logits"], (height, width)
            )
            return {"instances": found}
        found = Instances(
            size,
            pred_boxes=Boxes(outputs["boxes"]),
            scores=outputs["scores"],
            pred_classes=outputs["classes"],
        )
        if "masks" in outputs:
            found.pred_masks = outputs["masks"][:, None]
        return {"instances": detector_postprocess(found, height, width)}


def evaluate_exported(
    path: str | Path,
    cfg: CfgNode | DictConfig,
    *,
    output_dir: str | None = None,
    device: str = "cpu",
) -> dict[str, dict[str, dict[str, float]]]:
    """Evaluate an exported model on the test sets of a config.

    A segmenter goes over each image as the config says: in windows, at several scales.

    Args:
        path: ``model.ts``; the ``.json`` file must lie beside it.
        cfg: the config it was exported from; its model part is not used.
        output_dir: where evaluators may write predictions.

    Returns:
        ``{test set: {task: {metric: value}}}``, as evaluation of the model itself gives.
    """
    from d2dense.engine.experiment import experiment
    from d2dense.evaluation import evaluate

    run = experiment(cfg, device=device, training=False)
    model = with_protocol(load(path, device=device), run.cfg, device=device)
    names = run.test_names
    if not names:
        raise UserError("the config names no test set; set DATASETS.TEST / dataloader.test")
    loaders = {name: run.build_test_loader(name) for name in names}
    evaluators = {name: run.build_evaluator(name, output_dir) for name in names}
    return evaluate(model, loaders, evaluators) or {}

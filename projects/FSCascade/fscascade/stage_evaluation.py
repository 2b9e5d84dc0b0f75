"""Evaluation of every stage and ensemble of one trained cascade, from one pass over the images."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import nn

from d2dense.errors import UserError
from d2dense.evaluation import COCOEvaluator
from d2dense.evaluation.ground_truth import GroundTruth, load_ground_truth

from .roi_heads import FSCascadeROIHeads

__all__ = ["AllStages", "ScoresByIoU", "evaluate_stages"]

logger = logging.getLogger(__name__)


class AllStages(nn.Module):
    """A detector whose output for each image holds the ``Instances`` of every stage and ensemble.

    Args:
        model: a ``GeneralizedRCNN`` with :class:`FSCascadeROIHeads`
    """

    def __init__(self, model: GeneralizedRCNN):
        super().__init__()
        if not isinstance(getattr(model, "roi_heads", None), FSCascadeROIHeads):
            found = type(getattr(model, "roi_heads", model)).__name__
            raise UserError(f"stages are evaluated of FSCascadeROIHeads; this model has {found}")
        self.model = model

    @property
    def names(self) -> list[str]:
        """Keys of the outputs: ``stage1 .. stage<n>`` and, of several stages, both ensembles."""
        stages = self.model.roi_heads.num_cascade_stages
        ensembles = ["ensemble_last_rois", "ensemble_own_rois"] if stages > 1 else []
        return [f"stage{k + 1}" for k in range(stages)] + ensembles

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Run backbone and proposals once and every stage on top; inputs as in Detectron2."""
        model = self.model
        images = model.preprocess_image(batched_inputs)
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, None)
        results = model.roi_heads.detect_all_stages(features, proposals)
        outputs: list[dict[str, Instances]] = [{} for _ in batched_inputs]
        for name in self.names:
            found = model.roi_heads.forward_with_given_boxes(features, results[name])
            scaled = model._postprocess(found, batched_inputs, images.image_sizes)
            for output, result in zip(outputs, scaled):
                output[name] = result["instances"]
        return outputs


class ScoresByIoU:
    """Score and IoU of every detection with its best ground-truth box of the same class and image.

    The scatter of the paper's Fig. 5. Crowd boxes are left out.

    Args:
        truth: ground truth of the data set
        prediction_key: whose detections
        min_iou: detections below are not kept
    """

    def __init__(self, truth: GroundTruth, *, prediction_key: str, min_iou: float = 0.5):
        self.prediction_key, self.min_iou = prediction_key, min_iou
        self.pairs: list[tuple[float, float]] = []  # (IoU, score)
        self._image_ids = truth.image_ids
        self._boxes: dict[int, list[tuple[list[float], int]]] = defaultdict(list)
        for a in truth.annotations or ():
            if not a["iscrowd"]:
                self._boxes[a["image_id"]].append((a["bbox"], a["category_id"] - 1))

    def process(self, inputs: Iterable[Mapping], outputs: Iterable[Mapping]) -> None:
        """Add the detections of a batch."""
        for image, output in zip(inputs, outputs):
            truth = self._boxes.get(self._image_ids[image["image_id"]], [])
            found = output[self.prediction_key].to("cpu")
            if not truth or not len(found):
                continue
            boxes = torch.tensor([box for box, _ in truth], dtype=torch.float32)
            boxes[:, 2:] += boxes[:, :2]
            classes = torch.tensor([class_ for _, class_ in truth])
            iou = pairwise_iou(found.pred_boxes, Boxes(boxes))
            best = iou.masked_fill(found.pred_classes[:, None] != classes, 0.0).max(dim=1).values
            kept = best >= self.min_iou
            self.pairs.extend(zip(best[kept].tolist(), found.scores[kept].tolist()))

    def write(self, path: Path) -> None:
        """Write ``iou,score`` rows."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["iou", "score"])
            writer.writerows((f"{iou:.6f}", f"{score:.6f}") for iou, score in self.pairs)


@torch.no_grad()
def evaluate_stages(
    model: GeneralizedRCNN,
    loader: Iterable[list[dict[str, Any]]],
    dataset_name: str,
    *,
    output_dir: str | Path,
    max_dets: int = 100,
) -> dict[str, dict[str, dict[str, float]]]:
    """Evaluate every stage and ensemble on one data set, and write what the figures need.

    Writes ``results.json`` (AP at every IoU, by stage), the detections of each stage in COCO's
    results format, and ``confidence.csv`` (IoU and score of the last stage's detections).

    Args:
        model: a detector with :class:`FSCascadeROIHeads`, with its weights
        loader: batches of the data set
        dataset_name: registered name

    Returns:
        ``{stage or ensemble: {task: {metric: value}}}``
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    stages = AllStages(model).eval()
    evaluators = {
        name: COCOEvaluator(
            dataset_name, output_dir=str(folder), max_dets=max_dets, prediction_key=name
        )
        for name in stages.names
    }
    last = f"stage{model.roi_heads.num_cascade_stages}"
    confidence = ScoresByIoU(load_ground_truth(dataset_name), prediction_key=last)
    for inputs in loader:
        outputs = stages(inputs)
        for collector in (*evaluators.values(), confidence):
            collector.process(inputs, outputs)
    results = {name: evaluator.evaluate() for name, evaluator in evaluators.items()}
    confidence.write(folder / "confidence.csv")
    (folder / "results.json").write_text(json.dumps(_plain(results), indent=1) + "\n")
    for name, tasks in results.items():
        values = ", ".join(f"{task} AP {metrics['AP']:.2f}" for task, metrics in tasks.items())
        logger.info("%s: %s: %s", dataset_name, name, values)
    return results


def _plain(value: Any) -> Any:
    """Replace NaN (nothing to find), which JSON does not know, by null."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value

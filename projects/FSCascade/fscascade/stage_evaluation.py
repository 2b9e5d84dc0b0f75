"""Evaluation of every stage and ensemble of one trained cascade, from one pass over the images.

A detector without stages counts as one stage.

Letters: R regions over all images, K foreground classes.
"""

from __future__ import annotations

import csv
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from d2dense.analyses.figures import write_json
from d2dense.errors import UserError
from d2dense.evaluation import COCOEvaluator
from d2dense.evaluation.ground_truth import GroundTruth, load_ground_truth
from d2dense.modeling import FlexibleCascadeROIHeads
from d2dense.modeling.regions import clip_lists

from .roi_heads import FSCascadeROIHeads

__all__ = ["AllStages", "ScoresByIoU", "detect_all_stages", "evaluate_stages"]

logger = logging.getLogger(__name__)

# Classifiers on the regions of the last stage, and on those of each stage.
_ENSEMBLES = ("ensemble_last_rois", "ensemble_own_rois")


class AllStages(nn.Module):
    """A detector whose output for each image holds the ``Instances`` of every stage and ensemble.

    Args:
        model: any detector. With :class:`FSCascadeROIHeads` or ``FlexibleCascadeROIHeads`` it has
            their stages, otherwise one.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        heads = getattr(model, "roi_heads", None)
        self._detect: Callable[..., dict[str, list[Instances]]] | None = None
        self.num_stages, ensembles = 1, []
        if isinstance(heads, FSCascadeROIHeads):
            self._detect, ensembles = heads.detect_all_stages, list(_ENSEMBLES)
            self.num_stages = heads.num_cascade_stages
        elif isinstance(heads, FlexibleCascadeROIHeads):
            self._detect, ensembles = partial(detect_all_stages, heads), [_ENSEMBLES[1]]
            self.num_stages = heads.num_cascade_stages
        stages = [f"stage{k + 1}" for k in range(self.num_stages)]
        # keys of the outputs; of a single stage there is no ensemble
        self.names = stages + ensembles if self.num_stages > 1 else stages

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Run backbone and proposals once and every stage on top; inputs as in Detectron2.

        Raises:
            UserError: the model is no detector.
        """
        model = self.model
        if self._detect is None:
            return [{"stage1": _instances(model, output)} for output in model(batched_inputs)]
        images = model.preprocess_image(batched_inputs)
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, None)
        results = self._detect(features, proposals)
        outputs: list[dict[str, Instances]] = [{} for _ in batched_inputs]
        for name in self.names:
            found = model.roi_heads.forward_with_given_boxes(features, results[name])
            scaled = model._postprocess(found, batched_inputs, images.image_sizes)
            for output, result in zip(outputs, scaled):
                output[name] = result["instances"]
        return outputs


def _instances(model: nn.Module, output: Mapping[str, Any]) -> Instances:
    if "instances" not in output:
        raise UserError(
            f"{type(model).__name__} predicts {', '.join(output)}; stages are those of detectors, "
            "which predict instances"
        )
    return output["instances"]


def detect_all_stages(
    heads: FlexibleCascadeROIHeads, features: dict[str, Tensor], proposals: list[Instances]
) -> dict[str, list[Instances]]:
    """Return the detections of every stage, as if the cascade ended there and its scores alone
    counted, and the result of the whole cascade, as ``ensemble_own_rois``.

    Args:
        heads: a cascade in eval mode.
        features: pyramid levels ``(N, C, H / 2^k, W / 2^k)`` by name.
        proposals: regions of each image.

    Returns:
        By stage or ensemble, the detections of each image.
    """
    levels = [features[name] for name in heads.box_in_features]
    boxes = [p.proposal_boxes.tensor for p in proposals]
    sizes = [len(each) for each in boxes]
    results = {}
    for k, (head, predictor) in enumerate(zip(heads.box_head, heads.box_predictor)):
        logits, deltas = predictor(head(heads._pool(levels, boxes)))
        regions = torch.cat(boxes)
        found = predictor.decode(deltas, regions), predictor.scores(logits)
        results[f"stage{k + 1}"] = heads._detections(*found, proposals)
        # the next stage's regions, one for each: (R, 4), of the best class
        one = predictor.decode(predictor.deltas_of(deltas, logits[:, :-1].argmax(dim=1)), regions)
        boxes = clip_lists(one.split(sizes), proposals)
    results[_ENSEMBLES[1]] = heads._forward_box(features, proposals)
    return results


class ScoresByIoU:
    """Score and IoU of every detection with its best ground-truth box of the same class and image.

    The scatter of the paper's Fig. 5. Crowd boxes are left out.

    Args:
        truth: ground truth of the dataset
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
    model: nn.Module,
    loader: Iterable[list[dict[str, Any]]],
    dataset_name: str,
    *,
    output_dir: str | Path,
    max_dets: int = 100,
) -> dict[str, dict[str, dict[str, float]]]:
    """Evaluate every stage and ensemble on one dataset, and write what the figures need.

    Writes ``results.json`` (AP at every IoU, by stage), the detections of each stage in COCO's
    results format, and ``confidence.csv`` (IoU and score of the last stage's detections).

    Args:
        model: any detector, with its weights
        loader: batches of the dataset
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
    last = f"stage{stages.num_stages}"
    confidence = ScoresByIoU(load_ground_truth(dataset_name), prediction_key=last)
    collectors: list[Any] = [*evaluators.values(), confidence]
    for inputs in loader:
        outputs = stages(inputs)
        for collector in collectors:
            collector.process(inputs, outputs)
    results = {name: evaluator.evaluate() for name, evaluator in evaluators.items()}
    confidence.write(folder / "confidence.csv")
    write_json(folder / "results.json", results)
    for name, tasks in results.items():
        values = ", ".join(f"{task} AP {metrics['AP']:.2f}" for task, metrics in tasks.items())
        logger.info("%s: %s: %s", dataset_name, name, values)
    return results

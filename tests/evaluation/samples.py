"""Predictions made from ground truth by a seeded generator, and datasets to evaluate them on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from d2dense.data.cityscapes import STUFF, THINGS


def register(name, dicts=(), **metadata):
    """Register ``dicts`` and ``metadata``; an earlier dataset of this name is replaced."""
    unregister(name)
    DatasetCatalog.register(name, lambda: list(dicts))
    MetadataCatalog.get(name).set(**metadata)
    return name


def result_rows(predictions, ids, task):
    """Return predictions by image as COCO's results, with the category ``ids`` by class; for the
    public packages that ours is compared with.
    """
    rows = []
    for image_id, found in predictions.items():
        for i, (x0, y0, x1, y1) in enumerate(found.pred_boxes.tensor.double().tolist()):
            row = {
                "image_id": image_id,
                "category_id": ids[int(found.pred_classes[i])],
                "score": float(found.scores[i]),
            }
            if task == "bbox":
                row["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            else:
                mask = np.asfortranarray(found.pred_masks[i].numpy().astype(np.uint8))
                row["segmentation"] = mask_util.encode(mask)
            rows.append(row)
    return rows


def unregister(name):
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    if name in MetadataCatalog:
        MetadataCatalog.remove(name)


def make_instances(size, boxes=(), scores=(), classes=(), masks=None):
    """Instances from absolute xyxy boxes; masks (R, H, W)."""
    found = Instances(size)
    found.pred_boxes = Boxes(torch.as_tensor(np.array(boxes, dtype=np.float32).reshape(-1, 4)))
    found.scores = torch.as_tensor(np.array(scores, dtype=np.float32).reshape(-1))
    found.pred_classes = torch.as_tensor(np.array(classes, dtype=np.int64).reshape(-1))
    if masks is not None:
        found.pred_masks = torch.as_tensor(np.array(masks, dtype=bool).reshape(-1, *size))
    return found


def truth_mask(segmentation, height, width):
    if isinstance(segmentation, list):
        code = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        code = mask_util.frPyObjects(segmentation, height, width)
    else:
        code = segmentation
    return mask_util.decode(code).astype(bool)


def noisy_predictions(json_file, *, with_masks, seed=0, repeats=2, wrong=3):
    """Return {image id: Instances} close to the annotations: moved, missed, doubled, misnamed.

    Scores have two digits, so that many are equal.
    """
    rng = np.random.default_rng(seed)
    raw = json.loads(Path(json_file).read_text())
    classes = {c: k for k, c in enumerate(sorted(c["id"] for c in raw["categories"]))}
    by_image = {image["id"]: [] for image in raw["images"]}
    for annotation in raw["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    used = sorted({classes[a["category_id"]] for a in raw["annotations"]})
    predictions = {}
    for image in raw["images"]:
        height, width = image["height"], image["width"]
        boxes, labels, masks = [], [], []
        for annotation in by_image[image["id"]] * repeats:
            if rng.random() < 0.2:
                continue
            x, y, w, h = annotation["bbox"]
            shift = rng.integers(-4, 5, size=2) * (rng.random() < 0.7)
            boxes.append([x + shift[0], y + shift[1], x + w + shift[0] * 0.5, y + h + 1])
            label = classes[annotation["category_id"]]
            labels.append(label if rng.random() < 0.9 else int(rng.choice(used)))
            if with_masks:
                mask = truth_mask(annotation["segmentation"], height, width)
                masks.append(np.roll(mask, shift, axis=(1, 0)))
        for _ in range(wrong):
            x, y = rng.uniform(0, width - 20), rng.uniform(0, height - 20)
            boxes.append([x, y, x + 19.5, y + 15.25])
            labels.append(int(rng.choice(used)))
            if with_masks:
                mask = np.zeros((height, width), dtype=bool)
                mask[int(y) : int(y) + 15, int(x) : int(x) + 19] = True
                masks.append(mask)
        scores = np.round(rng.random(len(boxes)), 2)
        predictions[image["id"]] = make_instances(
            (height, width), boxes, scores, labels, masks if with_masks else None
        )
    return predictions


def feed(evaluator, predictions, key="instances"):
    """Let ``evaluator`` see {image id: prediction} one image at a time and return its results."""
    evaluator.reset()
    for image_id, prediction in predictions.items():
        evaluator.process([{"image_id": image_id}], [{key: prediction}])
    return evaluator.evaluate()


# Label maps


def noisy_labels(labels, num_classes, rng):
    """Return a map (H, W) of classes: ``labels`` with blocks of other classes, 0 where invalid."""
    result = np.where(labels < num_classes, labels, 0).astype(np.int64)
    height, width = labels.shape
    for _ in range(12):
        y, x = rng.integers(0, height), rng.integers(0, width)
        result[y : y + height // 4, x : x + width // 6] = rng.integers(0, num_classes)
    return result


def one_hot(labels, num_classes):
    """Scores (K, H, W) whose largest is at ``labels``."""
    return nn.functional.one_hot(torch.as_tensor(labels), num_classes).permute(2, 0, 1).float()


# Cityscapes


def cityscapes_images(gt_dir):
    """Return loader dicts of the images that ``gt_dir`` annotates."""
    ending = "_gtFine_instanceIds.png"
    return [
        {"file_name": f"images/{p.parent.name}/{p.name.removesuffix(ending)}_leftImg8bit.png"}
        for p in sorted(Path(gt_dir).glob(f"*/*{ending}"))
    ]


def truth_file(gt_dir, image, kind):
    path = Path(image["file_name"])
    stem = path.stem.removesuffix("_leftImg8bit")
    return Path(gt_dir, path.parent.name, f"{stem}_gtFine_{kind}.png")


def read_png(path):
    with Image.open(path) as image:
        return np.array(image)


def cityscapes_semantic(gt_dir, image, rng):
    """A noisy map (H, W) of train ids."""
    labels = read_png(truth_file(gt_dir, image, "labelIds"))
    classes = np.full(labels.shape, 255)
    for k, (label, _, _) in enumerate(STUFF):
        classes[labels == label] = k
    return noisy_labels(classes, len(STUFF), rng)


def cityscapes_instances(gt_dir, image, rng):
    """Noisy instances; some on groups, void and tiny instances."""
    ids = read_png(truth_file(gt_dir, image, "instanceIds"))
    classes = {label: k for k, (label, _, _) in enumerate(THINGS)}
    masks, labels = [], []
    for instance in [*np.unique(ids), *np.unique(ids[ids >= 1000])]:
        label = instance if instance < 1000 else instance // 1000
        if rng.random() < 0.15:
            continue
        masks.append(np.roll(ids == instance, rng.integers(-6, 7, size=2), axis=(0, 1)))
        is_right = label in classes and rng.random() < 0.9
        labels.append(classes[label] if is_right else int(rng.integers(0, len(THINGS))))
    masks.append(np.zeros_like(masks[0]))
    labels.append(0)
    scores = np.round(rng.random(len(masks)), 1)
    boxes = np.tile([0, 0, 10, 10], (len(masks), 1))
    return make_instances(ids.shape, boxes, scores, labels, masks)


class Oracle(nn.Module):
    """A model that returns prepared outputs: {file name or image id: output dict}."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs
        self.modes = []

    def forward(self, batch):
        self.modes.append(self.training)
        return [self.outputs[image.get("image_id", image.get("file_name"))] for image in batch]

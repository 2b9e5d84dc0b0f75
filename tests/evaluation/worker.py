"""One process of an evaluation on several: every kind of test set, two ways to deal out images."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from detectron2.utils import comm
from PIL import Image

from d2dense.data import cityscapes, coco_format
from d2dense.data.loaders import build_test_loader
from d2dense.evaluation import build_evaluator, evaluate, write_results
from tests.evaluation.samples import (
    Oracle,
    cityscapes_images,
    cityscapes_instances,
    cityscapes_semantic,
    noisy_labels,
    noisy_predictions,
    one_hot,
    register,
)


def write_data(root, count=5):
    """Write the annotations of every kind for ``count`` images."""
    rng, root = np.random.default_rng(0), Path(root)
    town = root / "gt" / "town"
    town.mkdir(parents=True)
    annotations = []
    for k in range(count):
        labels = np.full((50, 70), 7, dtype=np.uint8)
        ids = labels.astype(np.uint16)
        for number, label in enumerate(rng.choice([11, 21, 24, 26, 33], size=8)):
            y, x = rng.integers(0, 35, size=2)
            h, w = rng.integers(8, 25, size=2)
            labels[y : y + h, x : x + w] = label
            ids[y : y + h, x : x + w] = label * 1000 + number if label >= 24 else label
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotation = {"id": len(annotations) + 1, "image_id": k, "iscrowd": 0}
            annotation |= {"category_id": int(label), "bbox": [x, y, w, h], "area": w * h}
            annotations.append({**annotation, "segmentation": polygon})
        Image.fromarray(labels).save(town / f"town_{k}_0_gtFine_labelIds.png")
        Image.fromarray(ids).save(town / f"town_{k}_0_gtFine_instanceIds.png")
    # LVIS wants to know more of images and categories than COCO does
    known = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    images = [
        {"id": k, "file_name": f"{k}.jpg", "height": 50, "width": 70, **known} for k in range(count)
    ]
    categories = [
        {"id": k, "name": str(k), "frequency": frequency}
        for k, frequency in zip((11, 21, 24, 26, 33), "rcfff")
    ]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (root / "truth.json").write_text(json.dumps(content, default=int))


def build(root):
    """Return {test set: (images, model, evaluator)}."""
    root = Path(root)
    gt_dir, json_file = root / "gt", root / "truth.json"
    images = cityscapes_images(gt_dir)
    records = [
        {**image, "sem_seg_file_name": str(path)}
        for image, path in zip(images, sorted(gt_dir.glob("*/*labelIds.png")))
    ]
    register("loop_coco", json_file=str(json_file), evaluator_type="coco")
    names = coco_format.metadata(str(json_file))
    register("loop_lvis", json_file=str(json_file), evaluator_type="lvis", **names)
    register(
        "loop_sem_seg",
        records,
        evaluator_type="sem_seg",
        stuff_classes=[str(k) for k in range(34)],
    )
    register("loop_instance", gt_dir=str(gt_dir), **cityscapes.metadata("instance"))
    register("loop_semantic", gt_dir=str(gt_dir), **cityscapes.metadata("semantic"))
    rng, outputs = np.random.default_rng(1), {name: {} for name in ("sem_seg", "ins", "semantic")}
    for image, record in zip(images, records):
        labels = np.array(Image.open(record["sem_seg_file_name"]))
        key = image["file_name"]
        outputs["sem_seg"][key] = {"sem_seg": one_hot(noisy_labels(labels, 34, rng), 34)}
        outputs["ins"][key] = {"instances": cityscapes_instances(gt_dir, image, rng)}
        outputs["semantic"][key] = {"sem_seg": one_hot(cityscapes_semantic(gt_dir, image, rng), 19)}
    found = noisy_predictions(json_file, with_masks=True)
    numbered = [{"image_id": k} for k in range(len(images))]
    models = {
        "loop_lvis": (numbered, Oracle({k: {"instances": v} for k, v in found.items()})),
        "loop_coco": (numbered, Oracle({k: {"instances": v} for k, v in found.items()})),
        "loop_sem_seg": (images, Oracle(outputs["sem_seg"])),
        "loop_instance": (images, Oracle(outputs["ins"])),
        "loop_semantic": (images, Oracle(outputs["semantic"])),
    }
    boundary = {name: {"boundary_iou": True} for name in ("loop_sem_seg", "loop_semantic")}
    return {
        name: (*pair, build_evaluator(name, **boundary.get(name, {})))
        for name, pair in models.items()
    }


def run(args):
    """Evaluate this process's share of every dataset in ``args.roots``, dealt out both ways."""
    for root in args.roots:
        for deal in (in_order, padded):
            evaluate_all(Path(root), deal)


def evaluate_all(root, deal):
    results = {}
    for name, (images, model, evaluator) in build(root).items():
        found = evaluate(model, {name: deal(images)}, {name: evaluator})
        assert bool(found) == comm.is_main_process()
        results |= found
    if comm.is_main_process():
        path = root / f"results_{deal.__name__}_{comm.get_world_size()}.json"
        write_results(results, path)


def in_order(images):
    """What the library's own loader gives: each image once, to some processes perhaps none."""
    return build_test_loader(dataset=images, mapper=dict, batch_size=2, num_workers=0)


def padded(images):
    """Equally many for every process, as other samplers do: some images are seen twice."""
    rank, world_size = comm.get_rank(), comm.get_world_size()
    share = (images * world_size)[: len(images) + -len(images) % world_size][rank::world_size]
    return [share[i : i + 2] for i in range(0, len(share), 2)]


def read(root, deal, world_size):
    """Return the results, flat, without what is undefined."""
    results = json.loads((Path(root) / f"results_{deal}_{world_size}.json").read_text())
    flat = {
        (name, task, metric): value
        for name, tasks in results.items()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
    }
    return {key: value for key, value in flat.items() if not math.isnan(value)}

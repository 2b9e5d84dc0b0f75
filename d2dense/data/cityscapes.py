"""Cityscapes folders (``leftImg8bit/<split>/<city>``, ``gtFine/<split>/<city>``), read from the png
files with numpy alone, so neither shapely nor a particular version of cityscapesScripts is needed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from PIL import Image

from d2dense.errors import UserError

__all__ = ["STUFF", "THINGS", "load_instances", "load_semantic", "metadata"]

# (label id, name, colour) of the classes that are evaluated, in the order of their train ids.
STUFF = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
# The last eight are also annotated one by one.
THINGS = STUFF[11:]

# Label maps by preference, and their tables (label_tables.py).
_LABEL_TABLES = {"labelTrainIds": "cityscapes_train_ids", "labelIds": "cityscapes_label_ids"}
_IMAGE_ENDING = "_leftImg8bit.png"
# Above this many images reading is shared by several processes.
_MANY_FILES = 100


def metadata(task: str) -> dict[str, Any]:
    """Return the metadata of the task ``"instance"`` or ``"semantic"``."""
    kind, table = ("stuff", STUFF) if task == "semantic" else ("thing", THINGS)
    return {
        f"{kind}_classes": [name for _, name, _ in table],
        f"{kind}_colors": [list(color) for _, _, color in table],
        "evaluator_type": "cityscapes_sem_seg" if task == "semantic" else "cityscapes_instance",
        "ignore_label": 255,
    }


def load_semantic(image_dir: str, gt_dir: str) -> list[dict[str, Any]]:
    """Return records with label maps: ``labelTrainIds`` where all images have one (csCreateTrain-
    IdLabelImgs of cityscapesScripts makes them), else the ``labelIds`` of the official download;
    both are read as classes 0 to 18 and 255.

    Raises:
        UserError: no images, or a label map is missing.
    """
    images = _images(image_dir)
    files, table = _label_maps(Path(gt_dir), [stem for _, stem in images])
    return [
        {
            "file_name": str(image),
            "sem_seg_file_name": str(labels),
            "image_id": image.name,
            "sem_seg_ignore_label": 255,
            "sem_seg_classes": len(STUFF),
            "sem_seg_label_table": table,
        }
        for (image, _), labels in zip(images, files)
    ]


def _label_maps(gt_dir: Path, stems: Sequence[str]) -> tuple[list[Path], str]:
    """Return the label maps of images by preference of kind, and the name of their table."""
    for kind, table in _LABEL_TABLES.items():
        files = [gt_dir / f"{stem}_gtFine_{kind}.png" for stem in stems]
        missing = [path for path in files if not path.is_file()]
        if not missing:
            return files, table
    raise UserError(
        f"{missing[0]} does not exist, nor has every image a labelTrainIds map; check the folder "
        f"{gt_dir}, or make the maps from the polygons with cityscapesScripts: "
        "CITYSCAPES_DATASET=<folder> csCreateTrainIdLabelImgs"
    )


def load_instances(image_dir: str, gt_dir: str) -> list[dict[str, Any]]:
    """Return records with exact run-length masks from the ``instanceIds`` maps; groups are crowds.

    Raises:
        UserError: no images, or an instance map is missing.
    """
    jobs = []
    for image, stem in _images(image_dir):
        instances = Path(gt_dir, f"{stem}_gtFine_instanceIds.png")
        if not instances.is_file():
            raise UserError(f"{instances} does not exist; check the folder {gt_dir}")
        jobs.append((str(image), str(instances)))
    workers = min(16, os.cpu_count() or 1)
    if len(jobs) < _MANY_FILES or workers == 1:
        return [_read_instances(job) for job in jobs]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_read_instances, jobs, chunksize=16))


def _images(image_dir: str) -> list[tuple[Path, str]]:
    """Return (path, "<city>/<name>" without ending) of all images, sorted."""
    root = Path(image_dir)
    paths = sorted(root.glob(f"*/*{_IMAGE_ENDING}"))
    if not paths:
        raise UserError(f"no <city>/*{_IMAGE_ENDING} in {image_dir}; check the folder")
    return [(p, p.relative_to(root).as_posix().removesuffix(_IMAGE_ENDING)) for p in paths]


def _read_instances(job: tuple[str, str]) -> dict[str, Any]:
    image, instance_file = job
    classes = {label: index for index, (label, _, _) in enumerate(THINGS)}
    with Image.open(instance_file) as file:
        ids = np.asarray(file)
    annotations = []
    for instance in np.unique(ids):
        # an instance is class id * 1000 + number; a group of them has the class id alone
        is_crowd = instance < 1000
        label = int(instance if is_crowd else instance // 1000)
        if label in classes:
            annotations.append(_annotation(ids == instance, classes[label], bool(is_crowd)))
    return {
        "file_name": image,
        "image_id": os.path.basename(image),
        "height": ids.shape[0],
        "width": ids.shape[1],
        "annotations": annotations,
    }


def _annotation(mask: np.ndarray, category: int, is_crowd: bool) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return {
        "bbox": [
            float(columns[0]),
            float(rows[0]),
            float(columns[-1] + 1),
            float(rows[-1] + 1),
        ],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": category,
        "iscrowd": int(is_crowd),
        "segmentation": mask_util.encode(np.asfortranarray(mask.astype(np.uint8))),
    }

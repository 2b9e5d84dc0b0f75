"""Datasets that are registered by name: Detectron2's own, and the generated set ``shapes``.

Detectron2 registers its names (``coco_2017_train`` ...) under ``$DETECTRON2_DATASETS``. Its
``cityscapes_fine_instance_seg_*`` need shapely and are replaced by ours; their names and classes
stay. ``shapes_train``, ``shapes_val`` and their ``_sem_seg`` twins are generated on first use in
``$DETECTRON2_DATASETS/shapes``.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import detectron2.data.datasets  # noqa: F401  registers Detectron2's names
from detectron2.data import DatasetCatalog, MetadataCatalog

from . import cityscapes, coco_format, folders, shapes

__all__ = ["dataset_root", "register_cityscapes", "register_shapes"]


def dataset_root() -> Path:
    """Return the folder of the datasets that go by name."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def _add(name: str, loader, **metadata) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(**metadata)


def _make_shapes(root: Path) -> None:
    # A set that is there stays, whatever its size.
    if not all((root / "annotations" / f"instances_{s}.json").is_file() for s in ("train", "val")):
        shapes.ensure(root)


def register_shapes(root: str | Path) -> None:
    """Register the generated datasets with their files in ``root``, made when first needed."""
    root = Path(root)
    generate = functools.partial(_make_shapes, root)
    names = list(shapes.CLASSES)
    for split in ("train", "val"):
        json_file = str(root / "annotations" / f"instances_{split}.json")
        images = str(root / "images" / split)
        _add(
            f"shapes_{split}",
            functools.partial(coco_format.load_coco, json_file, images),
            generate=generate,
            json_file=json_file,
            image_root=images,
            thing_classes=names,
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(names))},
            evaluator_type="coco",
        )
        labels = str(root / f"semantic_{split}")
        _add(
            f"shapes_{split}_sem_seg",
            functools.partial(folders.load_semantic_folder, images, labels),
            generate=generate,
            image_root=images,
            sem_seg_root=labels,
            stuff_classes=list(shapes.SEMANTIC_CLASSES),
            ignore_label=255,
            evaluator_type="sem_seg",
        )


def register_cityscapes(root: str | Path) -> None:
    """Register Cityscapes' names for both tasks with readers that need no further package."""
    root = Path(root, "cityscapes")
    for split in ("train", "val", "test"):
        images, labels = str(root / "leftImg8bit" / split), str(root / "gtFine" / split)
        for infix, task, load in (
            ("instance_seg", "instance", cityscapes.load_instances),
            ("sem_seg", "semantic", cityscapes.load_semantic),
        ):
            _add(
                f"cityscapes_fine_{infix}_{split}",
                functools.partial(load, images, labels),
                image_dir=images,
                gt_dir=labels,
                **cityscapes.metadata(task),
            )


register_shapes(dataset_root() / "shapes")
register_cityscapes(dataset_root())

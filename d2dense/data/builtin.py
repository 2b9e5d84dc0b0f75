"""Datasets that are registered by name: Detectron2's own, and the generated set ``shapes``.

Detectron2 registers its names (``coco_2017_train`` ...) under ``$DETECTRON2_DATASETS``. Its
``cityscapes_fine_instance_seg_*`` need shapely and are replaced by ours; their names and classes
stay. ``shapes_train``, ``shapes_val``, their ``_sem_seg`` twins and ``shapes_objects_*`` (each
object as a picture, for classifiers) are generated on first use in
``$DETECTRON2_DATASETS/shapes``. ``imagenet_1k_*`` is read from a folder per class.
``ade20k_sem_seg_*`` read ADE20K's own files, whose classes count from 1, instead of converted ones.
``pascal_context_sem_seg_*`` (59 classes) and ``coco_stuff_164k_sem_seg_*`` (171) too read the files
as they are published; :mod:`.label_tables` says what their values mean.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin_meta  # its package registers Detectron2's names

from . import cityscapes, coco_format, folders, image_folder, label_tables, shapes

__all__ = [
    "dataset_root",
    "register_ade20k",
    "register_cityscapes",
    "register_coco_stuff",
    "register_imagenet",
    "register_pascal_context",
    "register_shapes",
]


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


def _make_crops(root: Path, split: str) -> None:
    if not (root / "objects" / split).is_dir():
        _make_shapes(root)
        shapes.ensure_crops(root, split)


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
        objects = str(root / "objects" / split)
        _add(
            f"shapes_objects_{split}",
            functools.partial(image_folder.load_image_folder, objects, classes=sorted(names)),
            generate=functools.partial(_make_crops, root, split),
            image_root=objects,
            image_classes=sorted(names),
            evaluator_type="classification",
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


def register_ade20k(root: str | Path) -> None:
    """Register ADE20K's 150 classes with its files as they are in ``ADEChallengeData2016``."""
    root = Path(root, "ADEChallengeData2016")
    names = [name.strip() for name in builtin_meta.ADE20K_SEM_SEG_CATEGORIES]
    for split, folder in (("train", "training"), ("val", "validation")):
        images, labels = str(root / "images" / folder), str(root / "annotations" / folder)
        _add(
            f"ade20k_sem_seg_{split}",
            functools.partial(
                folders.load_semantic_folder,
                images,
                labels,
                num_classes=len(names),
                reduce_zero_label=True,
            ),
            image_root=images,
            sem_seg_root=labels,
            stuff_classes=names,
            ignore_label=255,
            reduce_zero_label=True,
            evaluator_type="sem_seg",
        )


def register_pascal_context(root: str | Path) -> None:
    """Register Pascal Context's 59 classes with the layout of ``VOCdevkit/VOC2010``; its label
    maps (0: everything else) are in ``SegmentationClassContext``.
    """
    root = Path(root, "VOCdevkit", "VOC2010")
    for split in ("train", "val"):
        _add_table_set(
            f"pascal_context_sem_seg_{split}",
            images=root / "JPEGImages",
            labels=root / "SegmentationClassContext",
            table=label_tables.get("pascal_context"),
            split=str(root / "ImageSets" / "SegmentationContext" / f"{split}.txt"),
        )


def register_coco_stuff(root: str | Path) -> None:
    """Register COCO-Stuff-164k's 171 classes with the layout ``coco/{train,val}2017`` and
    ``coco/stuffthingmaps/{train,val}2017``.
    """
    root, table = Path(root, "coco"), label_tables.get("coco_stuff")
    # predictions are submitted by COCO's ids, which are the files' values plus 1
    ids = {value + 1: k for value, k in table.values.items() if k is not None}
    for split in ("train", "val"):
        _add_table_set(
            f"coco_stuff_164k_sem_seg_{split}",
            images=root / f"{split}2017",
            labels=root / "stuffthingmaps" / f"{split}2017",
            table=table,
            stuff_dataset_id_to_contiguous_id=ids,
        )


def _add_table_set(
    name: str,
    *,
    images: Path,
    labels: Path,
    table: label_tables.LabelTable,
    split: str = "",
    **metadata,
) -> None:
    loader = functools.partial(
        folders.load_semantic_folder,
        str(images),
        str(labels),
        num_classes=table.num_classes,
        label_table=table.name,
        split=split,
    )
    _add(
        name,
        loader,
        image_root=str(images),
        sem_seg_root=str(labels),
        stuff_classes=list(table.classes),
        ignore_label=255,
        label_table=table.name,
        split_file=split,
        evaluator_type="sem_seg",
        **metadata,
    )


def register_imagenet(root: str | Path) -> None:
    """Register ``imagenet_1k_train`` and ``imagenet_1k_val`` with a folder per class in
    ``imagenet/train`` and ``imagenet/val``. The names of the classes are known without them.
    """
    for split in ("train", "val"):
        images = str(Path(root, "imagenet", split))
        _add(
            f"imagenet_1k_{split}",
            functools.partial(_load_imagenet, images),
            image_root=images,
            learn_classes=image_folder.imagenet_classes,
            evaluator_type="classification",
        )


def _load_imagenet(images: str) -> list[dict[str, Any]]:
    classes = image_folder.imagenet_classes()["image_classes"]
    return image_folder.load_image_folder(images, classes=classes)


register_shapes(dataset_root() / "shapes")
register_cityscapes(dataset_root())
register_ade20k(dataset_root())
register_pascal_context(dataset_root())
register_coco_stuff(dataset_root())
register_imagenet(dataset_root())

"""Class names and counts come from the data; the model's count is checked against them, or taken
from them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from d2dense.errors import UserError

from . import coco_format, datasets

__all__ = [
    "CLASS_COUNT_KEYS",
    "class_names",
    "dataset_classes",
    "image_counts",
    "resolve_class_counts",
]

# Meta-architecture to the yacs keys that hold its class counts; projects add theirs.
CLASS_COUNT_KEYS: dict[str, list[str]] = {
    "BatchRetinaNet": ["MODEL.RETINANET.NUM_CLASSES"],
    "DeformableDETR": ["MODEL.DETR.NUM_CLASSES"],
    "GeneralizedRCNN": ["MODEL.ROI_HEADS.NUM_CLASSES"],
    "ImageClassifier": ["MODEL.CLASSIFIER.NUM_CLASSES"],
    "PanopticFPN": ["MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.SEM_SEG_HEAD.NUM_CLASSES"],
    "RetinaNet": ["MODEL.RETINANET.NUM_CLASSES"],
    "Segmenter": ["MODEL.SEM_SEG_HEAD.NUM_CLASSES"],
    "SemanticSegmentor": ["MODEL.SEM_SEG_HEAD.NUM_CLASSES"],
}

_AUTO = ("auto", -1)


def dataset_classes(names: str | Sequence[str], kind: str = "thing") -> list[str]:
    """Return the class names of datasets, which must all have the same.

    Args:
        names: one or more registered names.
        kind: ``"thing"`` (objects), ``"stuff"`` (semantic segmentation) or ``"image"``
            (classification).

    Raises:
        UserError: an unknown name, a dataset without such classes, or datasets that differ (custom
            ones whose files do not exist are named first: a wrong path is the likelier mistake).
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError("no dataset is named; set DATASETS.TRAIN / dataloader.train.dataset.names")
    found = {name: _classes(name, kind) for name in names}
    first = names[0]
    for name, classes in found.items():
        if classes != found[first]:
            for custom in filter(datasets.is_custom, names):
                datasets.ensure(custom)
            raise UserError(
                f"datasets {first!r} and {name!r} have different classes ({_short(found[first])}; "
                f"{_short(classes)}); train and test sets must have the same: "
                f"{_remedy(names, kind)}"
            )
    return found[first]


def class_names(where: str) -> list[str]:
    """Return the names of the object classes of a registered dataset, or of an annotation file in
    COCO's format.

    Raises:
        UserError: neither of both, or a file without categories.
    """
    if os.path.isfile(where):
        return [str(category["name"]) for category in coco_format.read_categories(where)]
    return dataset_classes(where)


def image_counts(names: str | Sequence[str]) -> list[int]:
    """Return in how many images of datasets each class is: as their categories say, or counted.

    In a run of several processes all of them must call this together.

    Raises:
        UserError: as :func:`dataset_classes`, and where images must be counted as
            :func:`d2dense.data.datasets.load`.
    """
    names = [names] if isinstance(names, str) else list(names)
    total = np.zeros(len(dataset_classes(names)), dtype=np.int64)
    for name in names:
        known = MetadataCatalog.get(name).get("class_image_count")
        if known is None:
            _, category = datasets.load_together(name).categories()
            total += np.bincount(category, minlength=len(total))
        else:  # in the order of the ids, as classes are
            total += [each["image_count"] for each in sorted(known, key=lambda each: each["id"])]
    return total.tolist()


def _remedy(names: list[str], kind: str) -> str:
    customs = set(filter(datasets.is_custom, names))
    if len(customs) == 1 and customs != set(names):
        key = {"thing": "json", "stuff": "labels", "image": "images"}[kind]
        return (
            f"{customs.pop()!r} is the only custom set, no other slot was given: set "
            f"datasets.val.{key} / DATASETS.CUSTOM.VAL.{key.upper()}"
        )
    return "change DATASETS.TRAIN and DATASETS.TEST / dataloader.*.dataset.names"


def _known(name: str, kind: str) -> list[str] | None:
    metadata = MetadataCatalog.get(name)
    if metadata.get("learn_classes") is not None:  # known without the data set's files
        metadata.set(**metadata.learn_classes())
        del metadata.learn_classes
    classes = metadata.get(f"{kind}_classes")
    return None if classes is None else list(classes)


def _classes(name: str, kind: str) -> list[str]:
    classes = _known(name, kind) if name in MetadataCatalog.list() else None
    if classes is None:
        datasets.ensure(name)  # says which file is missing
        classes = _known(name, kind)
    if classes is None:  # Detectron2's own registrations learn their classes by reading
        datasets.learn_classes(name)
        classes = _known(name, kind)
    if classes is None:
        what = {
            "thing": "objects (thing_classes)",
            "stuff": "label maps (stuff_classes)",
            "image": "classes of whole images (image_classes; a folder per class)",
        }[kind]
        raise UserError(f"dataset {name!r} has no {what}; this model needs another kind of dataset")
    return classes


def _short(classes: list[str]) -> str:
    shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
    return f"{len(classes)}: {shown}"


def resolve_class_counts(cfg: CfgNode | DictConfig) -> CfgNode | DictConfig:
    """Return a copy of ``cfg`` in which every class count is a number that agrees with the data.

    A count of ``auto`` (-1 in yacs) is taken from the data; so is every count with
    ``DATASETS.CLASS_COUNT auto`` / ``train.class_count=auto``.

    Raises:
        UserError: a count that differs, naming the key; datasets whose classes differ.
    """
    return _resolve_lazy(cfg) if isinstance(cfg, DictConfig) else _resolve_yacs(cfg)


def _resolve_yacs(cfg: CfgNode) -> CfgNode:
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if cfg.DATASETS.CLASS_COUNT not in ("check", "auto"):
        raise UserError(
            f"DATASETS.CLASS_COUNT = {cfg.DATASETS.CLASS_COUNT!r}, expected 'check' or 'auto'"
        )
    take = cfg.DATASETS.CLASS_COUNT == "auto"
    for key in CLASS_COUNT_KEYS.get(cfg.MODEL.META_ARCHITECTURE, ()):
        path, leaf = key.rsplit(".", 1)
        node = cfg
        for part in path.split("."):
            node = node[part]
        kind = "stuff" if "SEM_SEG" in key else "image" if "CLASSIFIER" in key else "thing"
        node[leaf] = _count(key, node[leaf], names, kind, take)
    if frozen:
        cfg.freeze()
    return cfg


def _resolve_lazy(cfg: DictConfig) -> DictConfig:
    cfg = copy.deepcopy(cfg)
    names = [
        name
        for split in ("train", "test")
        for name in _names(OmegaConf.select(cfg, f"dataloader.{split}.dataset.names"))
    ]
    take = OmegaConf.select(cfg, "train.class_count") == "auto"
    has_things = any(_maybe_known(name, "thing") is not None for name in names)
    has_stuff = any(_maybe_known(name, "stuff") is not None for name in names)
    has_images = any(map(_is_classified, names))
    for key, value in _count_leaves(cfg.model):
        only_stuff = has_stuff and not has_things
        kind = "stuff" if only_stuff or (has_stuff and "sem_seg" in key) else "thing"
        kind = "image" if has_images else kind
        OmegaConf.update(cfg, key, _count(key, value, names, kind, take))
    return cfg


def _names(value) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(name) for name in value]


def _maybe_known(name: str, kind: str) -> list[str] | None:
    return _known(name, kind) if name in MetadataCatalog.list() else None


def _is_classified(name: str) -> bool:
    known = name in MetadataCatalog.list()
    return known and MetadataCatalog.get(name).get("evaluator_type") == "classification"


def _count_leaves(model: DictConfig) -> Iterator[tuple[str, int | str]]:
    """Yield (key, value) of every class count in a lazy model, backbones' own classifiers apart."""
    from d2dense.config.lazy import walk  # d2dense.config itself builds loaders from this package

    for key, value in list(walk(model)):
        if key.rsplit(".", 1)[-1] != "num_classes" or "backbone" in key.split("."):
            continue
        if value == "auto" or (isinstance(value, int) and value):
            yield f"model.{key}", value


def _count(key: str, value: int | str, names: list[str], kind: str, take: bool) -> int:
    if not names:
        if value in _AUTO:
            raise UserError(f"{key} is 'auto', but the config names no dataset to take it from")
        return value
    classes = dataset_classes(names, kind)
    if value in _AUTO or take or value == len(classes):
        return len(classes)
    raise UserError(
        f"{key} = {value}, but dataset {names[0]!r} has {_short(classes)}; set {key} to "
        f"{len(classes)} or to 'auto'"
    )

"""Class counts of configs: checked against the classes of the data, or taken from them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from d2dense.data.classes import dataset_classes, known_classes, short
from d2dense.errors import UserError

from .lazy import walk

__all__ = ["CLASS_COUNT_KEYS", "resolve_class_counts"]

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
    has_things = any(known_classes(name, "thing") is not None for name in names)
    has_stuff = any(known_classes(name, "stuff") is not None for name in names)
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


def _is_classified(name: str) -> bool:
    known = name in MetadataCatalog.list()
    return known and MetadataCatalog.get(name).get("evaluator_type") == "classification"


def _count_leaves(model: DictConfig) -> Iterator[tuple[str, int | str]]:
    """Yield (key, value) of every class count in a lazy model, backbones' own classifiers apart."""
    for key, value in list(walk(model)):
        if key.rsplit(".", 1)[-1] != "num_classes" or "backbone" in key.split("."):
            continue
        if value == "auto" or (isinstance(value, int) and value):
            yield f"model.{key}", value


def _count(key: str, value: int | str, names: list[str], kind: str, take: bool) -> int:
    if not names:
        if isinstance(value, str) or value in _AUTO:
            raise UserError(f"{key} is 'auto', but the config names no dataset to take it from")
        return value
    classes = dataset_classes(names, kind)
    if value in _AUTO or take or value == len(classes):
        return len(classes)
    raise UserError(
        f"{key} = {value}, but dataset {names[0]!r} has {short(classes)}; set {key} to "
        f"{len(classes)} or to 'auto'"
    )

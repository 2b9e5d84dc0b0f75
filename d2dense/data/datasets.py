"""Datasets without Python: described in a config, registered under a name, checked before they are
read.

A config names files per slot; the slot ``train`` becomes the dataset ``custom_train``::

    DATASETS.CUSTOM.TRAIN.JSON train.json  DATASETS.CUSTOM.TRAIN.IMAGES images/     (yaml)
    datasets.train.json=train.json  datasets.train.images=images/                   (lazy)
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from detectron2.data import DatasetCatalog, MetadataCatalog

from d2dense.errors import UserError, nearest

from . import cityscapes, coco_format, folders, image_folder
from .child import call_in_child
from .dataset_spec import DatasetSpec
from .records import Layout, Records, RecordsFile, once_per_machine

__all__ = [
    "DatasetSpec",
    "ensure",
    "is_custom",
    "learn_classes",
    "load",
    "load_together",
    "register",
    "register_custom",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PREFIX = "custom_"
# Metadata entries that are files or folders which must exist before a dataset is read.
_FILE_KEYS = (
    "json_file",
    "image_root",
    "image_dir",
    "gt_dir",
    "sem_seg_root",
    "panoptic_root",
    "split_file",
)


def register(name: str, spec: DatasetSpec, *, where: str = "") -> None:
    """Register ``spec`` as ``name`` in Detectron2's catalogs; a different earlier one is replaced.

    Class names go into the metadata at once where the files exist, so that models can be built and
    predictions drawn; the annotations are read by :func:`load`.

    Args:
        where: how messages call the place that the user wrote; by default the dataset's name.

    Raises:
        UserError: entries that contradict each other, or a file that is not what it should be.
    """
    where = where or f"dataset {name!r}"
    spec.check(where)
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    loader, metadata = _READERS[spec.kind](spec, where)
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(where=where, **metadata)


def _json_reader(spec: DatasetSpec, where: str) -> tuple[Callable, dict[str, Any]]:
    metadata = {"json_file": spec.json, "image_root": spec.images, "evaluator_type": spec.kind}
    if os.path.isfile(spec.json):
        metadata |= coco_format.metadata(spec.json)
    loader = coco_format.load_lvis if spec.kind == "lvis" else coco_format.load_coco
    return functools.partial(loader, spec.json, spec.images), metadata


def _cityscapes_reader(spec: DatasetSpec, where: str) -> tuple[Callable, dict[str, Any]]:
    load = cityscapes.load_semantic if spec.task == "semantic" else cityscapes.load_instances
    metadata = {
        "image_dir": spec.images,
        "gt_dir": spec.labels,
        **cityscapes.metadata(spec.task),
    }
    return functools.partial(load, spec.images, spec.labels), metadata


def _folder_reader(spec: DatasetSpec, where: str) -> tuple[Callable, dict[str, Any]]:
    ignore_label = spec.ignore_label
    if ignore_label is None:
        ignore_label = folders.ignore_label(spec.classes, where)
    metadata: dict[str, Any] = {
        "image_root": spec.images,
        "sem_seg_root": spec.labels,
        "evaluator_type": "sem_seg",
        "ignore_label": ignore_label,
        "reduce_zero_label": spec.reduce_zero_label,
        "label_table": spec.label_table,
        "split_file": spec.split,
        "suffixes": {"image_suffix": spec.image_suffix, "label_suffix": spec.label_suffix},
    }
    if not isinstance(spec.classes, tuple):
        metadata["class_file"] = str(spec.classes)
    names = spec.class_names(where)
    if names is not None:
        metadata["stuff_classes"] = names
    loader = functools.partial(
        folders.load_semantic_folder,
        spec.images,
        spec.labels,
        ignore_label=ignore_label,
        num_classes=None if names is None else len(names),
        reduce_zero_label=spec.reduce_zero_label,
        label_table=spec.label_table,
        split=spec.split,
        **metadata["suffixes"],
    )
    return loader, metadata


def _class_folder_reader(spec: DatasetSpec, where: str) -> tuple[Callable, dict[str, Any]]:
    metadata: dict[str, Any] = {
        "image_root": spec.images,
        "evaluator_type": "classification",
    }
    if os.path.isdir(spec.images):
        metadata["image_classes"] = image_folder.class_folders(spec.images)
    return functools.partial(image_folder.load_image_folder, spec.images), metadata


_READERS = {
    "coco": _json_reader,
    "lvis": _json_reader,
    "cityscapes": _cityscapes_reader,
    "sem_seg": _folder_reader,
    "image_folder": _class_folder_reader,
}


def register_custom(slots: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Register every filled slot of ``DATASETS.CUSTOM`` / ``datasets`` as ``custom_<slot>``.

    Args:
        slots: slot name to the entries of :class:`DatasetSpec`; keys in any case. Slots without
            files are left out.

    Returns:
        Slot name in lower case to dataset name, in the order given.

    Raises:
        UserError: an unknown entry, or entries that contradict each other.
    """
    if not isinstance(slots, Mapping):
        raise UserError(
            f"DATASETS.CUSTOM / datasets is {slots!r}, expected slots such as train and val"
        )
    registered = {}
    for slot, entries in slots.items():
        slot = str(slot)
        where = (
            f"custom dataset {slot!r} (DATASETS.CUSTOM.{slot.upper()} / datasets.{slot.lower()})"
        )
        spec = _spec(entries, where)
        if not (spec.json or spec.images or spec.labels):
            continue
        name = f"{_PREFIX}{slot.lower()}"
        register(name, spec, where=where)
        registered[slot.lower()] = name
    return registered


def _spec(entries: Any, where: str) -> DatasetSpec:
    if not isinstance(entries, Mapping):
        raise UserError(f"{where} is {entries!r}, expected entries such as json and images")
    known = [field.name for field in fields(DatasetSpec)]
    given = {str(key).lower(): value for key, value in entries.items()}
    for key in given:
        if key not in known:
            raise UserError(
                f"{where} has no entry {key!r}{nearest(key, known)}; known: {', '.join(known)}"
            )
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        given[key] = _entry(key, value, where)
    return DatasetSpec(**given)


def _entry(key: str, value: Any, where: str) -> Any:
    """Return the value of one entry as its type; a number is the name of a folder such as 2017."""
    if key == "ignore_label":
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**31:
            raise UserError(f"{where}: ignore_label = {value!r}, expected a whole number")
        return value
    if key == "reduce_zero_label":
        if not isinstance(value, bool):
            raise UserError(f"{where}: reduce_zero_label = {value!r}, expected true or false")
        return value
    if isinstance(value, (str, Path, int, float)) and not isinstance(value, bool):
        return str(value)
    if key != "classes":
        raise UserError(f"{where}: {key} = {value!r}, expected one value")
    if not isinstance(value, Sequence) or not all(isinstance(n, (str, int)) for n in value):
        raise UserError(f"{where}: classes = {value!r}, expected names or a file with them")
    return tuple(map(str, value))


def is_custom(name: str) -> bool:
    """Whether ``name`` is one that :func:`register_custom` gives."""
    return name.startswith(_PREFIX)


def ensure(name: str) -> None:
    """Make sure that the dataset ``name`` can be read: generated sets are made on first use.

    Raises:
        UserError: an unknown name (with the nearest known one), or files that do not exist.
    """
    if name not in DatasetCatalog:
        raise UserError(
            f"dataset {name!r} is not registered{nearest(name, DatasetCatalog.list())}; custom ones"
            " are described by DATASETS.CUSTOM.<SLOT> / datasets.<slot>"
        )
    metadata = MetadataCatalog.get(name)
    generate = metadata.get("generate")
    if generate is not None:
        generate()
    for key in (*_FILE_KEYS, "class_file"):
        path = metadata.get(key)
        if path and not os.path.exists(path) and "://" not in str(path):
            raise UserError(_missing(name, metadata.get("where"), str(path)))


def _missing(name: str, where: str | None, path: str) -> str:
    if where:
        return f"{where}: {path} does not exist; correct the path"
    root = os.getenv("DETECTRON2_DATASETS", "datasets")
    return (
        f"dataset {name!r} needs {path}, which does not exist; set DETECTRON2_DATASETS "
        f"(now {root!r}) to the folder that holds it, or name your own "
        "files with DATASETS.CUSTOM / datasets"
    )


def load(name: str) -> Records:
    """Return the records of the dataset ``name`` in Detectron2's dataset format.

    Functions of this library and of Detectron2 read in a child process, so that the objects of a
    large annotation file never enlarge this process; a user's own function, which may do other
    things besides, runs here.

    Raises:
        UserError: an unknown name, files that do not exist, or annotations that cannot be read.
    """
    ensure(name)
    file = RecordsFile()

    def read() -> tuple[Layout, dict[str, Any]]:
        return _with_metadata(name, lambda: file.write(DatasetCatalog.get(name)))

    try:
        layout, learned = call_in_child(read) if _only_reads(DatasetCatalog[name]) else read()
    except MemoryError as error:
        raise UserError(
            f"dataset {name!r} could not be read: {error}; the machine may be short of memory"
        ) from None
    _learn(name, learned)
    file.map(layout)
    records = Records.of_files([file])
    if not len(records):
        raise UserError(f"dataset {name!r} holds no image")
    logger.info("dataset %s: %d images", name, len(records))
    return records


def learn_classes(name: str) -> None:
    """Have the metadata of a dataset say its classes where registering it did not, without reading
    all of a COCO json for them.

    Raises:
        UserError: as :func:`load`.
    """
    ensure(name)
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") == "coco" and _only_reads(DatasetCatalog[name]):
        _learn(name, coco_format.metadata(metadata.json_file))
    else:
        load(name)


def load_together(name: str) -> Records:
    """As :func:`load`, but read by one process per machine, from which the others have the records;
    all processes must call it together.
    """

    records, learned = once_per_machine(lambda: _with_metadata(name, lambda: load(name)))
    _learn(name, learned)
    return records


def _with_metadata(name: str, read: Callable[[], T]) -> tuple[T, dict[str, Any]]:
    """Return ``read()`` and the metadata that the dataset got meanwhile: Detectron2's sets learn
    their class names as they are read, which other processes would not know.
    """
    before = MetadataCatalog.get(name).as_dict() if name in MetadataCatalog.list() else {}
    value = read()
    after = MetadataCatalog.get(name).as_dict()
    return value, {key: after[key] for key in after.keys() - before.keys()}


def _learn(name: str, metadata: Mapping[str, Any]) -> None:
    known = MetadataCatalog.get(name).as_dict()
    MetadataCatalog.get(name).set(**{k: v for k, v in metadata.items() if k not in known})


def _only_reads(function: Callable) -> bool:
    """Whether a registered function is known to do nothing besides reading and naming classes."""
    while isinstance(function, functools.partial):
        function = function.func
    module = getattr(function, "__module__", None) or ""
    return module.split(".")[0] in ("d2dense", "detectron2")

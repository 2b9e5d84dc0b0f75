"""What the values in a dataset's label maps mean: tables from value to class, applied as files are
read, so that nobody's files are rewritten.

A table goes by its name here, or is a json file of a user's own::

    {"classes": ["road", "car"], "values": {"0": null, "7": 0, "26": 1, "27": 1}}

``null`` is no class. A value that a table does not list is an error, never silently a class.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from detectron2.data.datasets import builtin_meta

from d2dense.errors import UserError, nearest

from .cityscapes import STUFF as _CITYSCAPES

__all__ = ["TABLES", "LabelTable", "UnknownValue", "get"]

_NONE, _UNKNOWN = -1, -2
_MAX_VALUE = 2**16 - 1


class UnknownValue(UserError):
    """A label map holds a value that its table does not list."""


@dataclass(frozen=True)
class LabelTable:
    """Values of label maps and the classes that they stand for.

    Attributes:
        name: for messages.
        values: value in the files to class 0 to K - 1, or to None for no class.
        classes: the K names, if they are known.
    """

    name: str
    values: Mapping[int, int | None]
    classes: tuple[str, ...] = ()

    @cached_property
    def num_classes(self) -> int:
        """K."""
        return 1 + max(k for k in self.values.values() if k is not None)

    def to_classes(self, labels: np.ndarray, *, ignore_label: int, path: str) -> np.ndarray:
        """Return the classes (H, W) of a label map's values (H, W), ``ignore_label`` for none:
        uint8 where that is large enough, else int64.

        Args:
            path: of the map, for the message.

        Raises:
            UnknownValue: a value that the table does not list.
        """
        table = self._classes
        index = labels
        if labels.dtype != np.uint8:  # those are all inside the table
            # everything outside it becomes its last entry, which is unknown
            inside = (labels >= 0) & (labels < len(table))
            index = np.where(inside, labels, len(table) - 1)
        is_known = (table != _UNKNOWN)[index]
        if not is_known.all():
            raise UnknownValue(
                f"label map {path} has the value {int(labels[~is_known][0])}, which the label "
                f"table {self.name!r} does not list ({_spans(self.values)}); correct the file, or "
                "name the table that it was made for (label_table)"
            )
        is_small = 0 <= ignore_label <= 255 and self.num_classes <= 256
        meaning = np.where(table == _NONE, ignore_label, table)
        return meaning.astype(np.uint8 if is_small else np.int64)[index]

    def to_values(self, classes: np.ndarray) -> np.ndarray:
        """Return what the dataset's files hold for classes (H, W), as uint8 or uint16: of several
        values of a class the first that is listed, and for all numbers that are no class the first
        value that stands for none, or 255 where no value does.
        """
        values = self._values
        inside = (classes >= 0) & (classes < self.num_classes)
        found = values[np.where(inside, classes, self.num_classes)]
        return found.astype(np.uint8 if values.max() <= 255 else np.uint16)

    @cached_property
    def _classes(self) -> np.ndarray:
        table = np.full(max(*self.values, 255) + 2, _UNKNOWN, dtype=np.int64)
        for value, k in self.values.items():
            table[value] = _NONE if k is None else k
        return table

    @cached_property
    def _values(self) -> np.ndarray:
        none = next((value for value, k in self.values.items() if k is None), 255)
        values = np.full(self.num_classes + 1, none, dtype=np.int64)
        for value, k in reversed(list(self.values.items())):
            if k is not None:
                values[k] = value
        return values


def _spans(values: Mapping[int, int | None]) -> str:
    """Return "0 to 10, 12, 255"."""
    spans: list[list[int]] = []
    for value in sorted(values):
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ", ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in spans)


@functools.lru_cache(maxsize=64)
def get(name: str) -> LabelTable:
    """Return the table of this name, or that of a json file.

    Raises:
        UserError: no such table (with the nearest name), or a file that holds none.
    """
    if name in TABLES:
        return TABLES[name]
    if not name.endswith(".json"):
        raise UserError(
            f"label_table = {name!r}: expected one of {', '.join(TABLES)}{nearest(name, TABLES)}, "
            "or a json file"
        )
    return _read(Path(name).expanduser())


def _read(path: Path) -> LabelTable:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read label table {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"label table {path} is not valid json: {error}") from None
    values = content.get("values") if isinstance(content, dict) else None
    names = content.get("classes", []) if isinstance(content, dict) else None
    if not isinstance(values, dict) or not isinstance(names, list):
        raise UserError(
            f'label table {path}: expected {{"classes": [names], "values": {{"value": class}}}}, '
            "where a class of null is none"
        )
    table = LabelTable(
        name=str(path),
        values={_value(text, path): _class(k, text, path) for text, k in values.items()},
        classes=tuple(map(str, names)),
    )
    used = {k for k in table.values.values() if k is not None}
    if not used:
        raise UserError(f"label table {path} has no value with a class")
    missing = set(range(table.num_classes)) - used
    if missing:
        raise UserError(f"label table {path}: no value has the class {min(missing)}")
    if names and len(names) != table.num_classes:
        raise UserError(
            f"label table {path} has the classes 0 to {table.num_classes - 1}, but names "
            f"{len(names)}; give a name for each"
        )
    return table


def _value(text: str, path: Path) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > _MAX_VALUE:
        raise UserError(
            f"label table {path}: value {text!r}, expected whole numbers from 0 to {_MAX_VALUE}"
        )
    return int(text)


def _class(k: object, text: str, path: Path) -> int | None:
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < 2**15):
        raise UserError(
            f"label table {path}: value {text} has the class {k!r}, expected a number from 0, or "
            "null"
        )
    return k


# The datasets


_PASCAL_CONTEXT = (
    "aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat "
    "ceiling chair cloth computer cow cup curtain dog door fence floor flower food grass ground "
    "horse keyboard light motorbike mountain mouse person plate platform pottedplant road rock "
    "sheep shelves sidewalk sign sky snow sofa table track train tree truck tvmonitor wall water "
    "window wood"
)
# Of COCO's ids 92 to 182; those of things are COCO's own.
_COCO_STUFF = (
    "banner blanket branch bridge building-other bush cabinet cage cardboard carpet ceiling-other "
    "ceiling-tile cloth clothes clouds counter cupboard curtain desk-stuff dirt door-stuff fence "
    "floor-marble floor-other floor-stone floor-tile floor-wood flower fog food-other fruit "
    "furniture-other grass gravel ground-other hill house leaves light mat metal mirror-stuff moss "
    "mountain mud napkin net paper pavement pillow plant-other plastic platform playingfield "
    "railing railroad river road rock roof rug salad sand sea shelf sky-other skyscraper snow "
    "solid-other stairs stone straw structural-other table tent textile-other towel tree vegetable "
    "wall-brick wall-concrete wall-other wall-panel wall-stone wall-tile wall-wood water-other "
    "waterdrops window-blind window-other wood"
)
_FIRST_STUFF_ID = 92


def _pascal_context() -> LabelTable:
    """59 classes from 1 on; 0 is everything else."""
    names = tuple(_PASCAL_CONTEXT.split())
    return LabelTable("pascal_context", {0: None} | {k + 1: k for k in range(len(names))}, names)


def _coco_stuff() -> LabelTable:
    """Things and stuff by their COCO id less 1, of which eleven never occur; 255 is unlabelled."""
    things = {c["id"]: c["name"] for c in builtin_meta.COCO_CATEGORIES if c["isthing"]}
    stuff = dict(enumerate(_COCO_STUFF.split(), _FIRST_STUFF_ID))
    names = things | stuff
    ids = sorted(names)
    values = {id_ - 1: k for k, id_ in enumerate(ids)}
    return LabelTable("coco_stuff", values | {255: None}, tuple(names[id_] for id_ in ids))


def _ade20k() -> LabelTable:
    """150 classes from 1 on; 0 is everything else."""
    names = tuple(name.strip() for name in builtin_meta.ADE20K_SEM_SEG_CATEGORIES)
    return LabelTable("ade20k", {0: None} | {k + 1: k for k in range(len(names))}, names)


def _cityscapes(kind: str) -> LabelTable:
    """Cityscapes' ``train_ids`` (255 is no class) or its ``label_ids`` 0 to 33."""
    names = tuple(name for _, name, _ in _CITYSCAPES)
    if kind == "train_ids":
        values: dict[int, int | None] = {k: k for k in range(len(names))} | {255: None}
    else:
        train_ids = {label: k for k, (label, _, _) in enumerate(_CITYSCAPES)}
        values = {label: train_ids.get(label) for label in range(34)}
    return LabelTable(f"cityscapes_{kind}", values, names)


TABLES: Mapping[str, LabelTable] = {
    table.name: table
    for table in (
        _pascal_context(),
        _coco_stuff(),
        _ade20k(),
        _cityscapes("train_ids"),
        _cityscapes("label_ids"),
    )
}

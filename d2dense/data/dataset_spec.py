"""The description of a dataset that a config gives: which files, and how they are read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from d2dense.errors import UserError, nearest

from . import folders, label_tables

__all__ = ["DatasetSpec"]

_KINDS = ("coco", "lvis", "cityscapes", "sem_seg", "image_folder")
_TASKS = ("instance", "semantic")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Where a dataset is and how to read it.

    Attributes:
        kind: ``coco`` (boxes or masks), ``lvis``, ``cityscapes``, ``sem_seg`` or ``image_folder``
            (a folder per class); by default ``coco`` where a json is given and ``sem_seg`` where
            labels are.
        json: annotation file of ``coco`` and ``lvis``.
        images: folder of the pictures; for ``cityscapes`` a split such as ``leftImg8bit/train``,
            for ``image_folder`` the folder that holds the classes' folders.
        labels: folder of the label maps; for ``cityscapes`` a split such as ``gtFine/train``.
        classes: class names of ``sem_seg`` in the order of their numbers, or a file with them (a
            json list, or a text file with one name per line).
        ignore_label: pixels with this number have no class (``sem_seg``); None takes the
            ``ignore_label`` of a json file of classes, or 255.
        reduce_zero_label: the label maps of ``sem_seg`` count classes from 1, and 0 is no class (as
            in ADE20K).
        label_table: what the values in the label maps of ``sem_seg`` mean, by the name of a table
            such as ``coco_stuff`` or a json file, see :mod:`d2dense.data.label_tables`; a table
            that names its classes needs no ``classes``. Empty: the values are class numbers.
        split: a text file with the images of ``sem_seg`` that are used, one per line: paths below
            the folder, without endings. Empty: all.
        image_suffix: ending of the pictures' names; empty takes every usual image file.
        label_suffix: ending of the label maps' names, which replaces the picture's ending.
        task: what to read from ``cityscapes``: ``instance`` or ``semantic``.
    """

    kind: str = ""
    json: str = ""
    images: str = ""
    labels: str = ""
    classes: str | tuple[str, ...] = ()
    ignore_label: int | None = None
    reduce_zero_label: bool = False
    label_table: str = ""
    split: str = ""
    image_suffix: str = ""
    label_suffix: str = ".png"
    task: str = "instance"

    def __post_init__(self) -> None:
        for name in ("json", "images", "labels", "split"):
            object.__setattr__(self, name, os.path.expanduser(str(getattr(self, name) or "")))
        classes = self.classes
        if not isinstance(classes, (str, Path)):
            object.__setattr__(self, "classes", tuple(str(name) for name in classes or ()))
        if not self.kind:
            is_folder = self.labels and not self.json
            object.__setattr__(self, "kind", "sem_seg" if is_folder else "coco")

    def check(self, where: str) -> None:
        """Raise a UserError for entries that contradict each other; ``where`` names the slot."""
        if self.kind not in _KINDS:
            raise UserError(
                f"{where}: kind = {self.kind!r}, expected one of {', '.join(_KINDS)}"
                f"{nearest(self.kind, _KINDS)}"
            )
        if self.task not in _TASKS:
            raise UserError(f"{where}: task = {self.task!r}, expected 'instance' or 'semantic'")
        is_json = self.kind in ("coco", "lvis")
        needed = ["json", "images"] if is_json else ["images", "labels"]
        if self.kind == "sem_seg" and not (self.label_table and self._table(where).classes):
            needed += ["classes"]
        if self.kind == "image_folder":
            needed = ["images"]
        for name in needed:
            if not getattr(self, name):
                raise UserError(f"{where}: a {self.kind} dataset needs {name!r}; it is not set")
        if self.kind != "sem_seg" and self.classes:
            raise UserError(
                f"{where}: 'classes' is only for sem_seg; a {self.kind} dataset has its own names"
            )
        for name in ("reduce_zero_label", "label_table", "split"):
            if self.kind != "sem_seg" and getattr(self, name):
                raise UserError(f"{where}: {name!r} is only for sem_seg, not {self.kind}")
        if self.label_table and self.reduce_zero_label:
            raise UserError(
                f"{where}: 'label_table' and 'reduce_zero_label' both say what the values in the "
                "label maps mean; set one of them"
            )

    def _table(self, where: str) -> label_tables.LabelTable:
        try:
            return label_tables.get(self.label_table)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def class_names(self, where: str) -> list[str] | None:
        """Return the names of ``sem_seg``'s classes; None if the file with them does not exist.

        Raises:
            UserError: a file without names, or as many names as the label table has no classes.
        """
        table = self._table(where) if self.label_table else None
        if table is not None and not self.classes:
            return list(table.classes)
        if not isinstance(self.classes, tuple) and not os.path.isfile(self.classes):
            return None
        names = folders.class_names(self.classes, where)
        if table is not None and len(names) != table.num_classes:
            raise UserError(
                f"{where}: {len(names)} class names, but the label table {self.label_table!r} has "
                f"{table.num_classes} classes; correct 'classes' or 'label_table'"
            )
        return names

"""Label maps from the values of one table to class numbers and back, for tools that know no tables.
Training and evaluation here read published files as they are (:mod:`.label_tables`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from d2dense.errors import UserError

from . import label_tables
from .reading import read_label_map

__all__ = ["convert_folder"]


def convert_folder(
    source: str | Path,
    target: str | Path,
    *,
    table: str,
    inverse: bool = False,
    ignore_label: int = 255,
    suffix: str = ".png",
    new_suffix: str = ".png",
    workers: int = 4,
) -> int:
    """Write the label maps below ``source`` at the same places below ``target`` as grey PNGs of
    class numbers.

    Args:
        table: a name or a json file, see :mod:`d2dense.data.label_tables`.
        inverse: from class numbers to the table's values instead.
        ignore_label: the number of no class.
        suffix, new_suffix: ending of the files that are read, and what replaces it.

    Returns:
        How many files were written.

    Raises:
        UserError: no such files, a file that cannot be read or holds an unknown value, a result
            that would replace its source, or class numbers that do not fit into 16 bits.
    """
    source, target = Path(source), Path(target)
    if not 0 <= ignore_label < 2**16:
        raise UserError(f"ignore label {ignore_label}: PNGs hold numbers from 0 to 65535")
    change = functools.partial(_converted, label_tables.get(table), inverse, ignore_label)
    jobs = [
        (path, target / (str(path.relative_to(source)).removesuffix(suffix) + new_suffix))
        for path in sorted(source.rglob("*"))
        if path.name.endswith(suffix) and path.is_file()
    ]
    if not jobs:
        raise UserError(f"no file in {source} ends in {suffix!r}; check the folder and the suffix")
    for path, result in jobs:
        if path.resolve() == result.resolve():
            raise UserError(f"{path} would be replaced; give another folder or another new suffix")
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(functools.partial(_convert, change), *zip(*jobs)))
    return len(jobs)


def _convert(change: Callable[[Path], np.ndarray], source: Path, target: Path) -> None:
    labels = change(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    Image.fromarray(labels).save(part, format="PNG")
    part.replace(target)


def _converted(
    table: label_tables.LabelTable, inverse: bool, ignore_label: int, path: Path
) -> np.ndarray:
    labels = read_label_map(str(path))
    if not inverse:
        classes = table.to_classes(labels, ignore_label=ignore_label, path=str(path))
        return classes if classes.dtype == np.uint8 else classes.astype(np.uint16)
    wrong = labels[(labels >= table.num_classes) & (labels != ignore_label)]
    if wrong.size:
        raise UserError(
            f"label map {path} has class {int(wrong[0])}, but the label table {table.name!r} has "
            f"the classes 0 to {table.num_classes - 1}, and {ignore_label} is none"
        )
    classes = np.where(labels == ignore_label, table.num_classes, labels.astype(np.int64))
    return table.to_values(classes)

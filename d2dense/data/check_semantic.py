"""Checks of semantic segmentation folders; see :mod:`d2dense.data.check`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from . import folders
from .check import ImageFile, Report, check_images
from .reading import SampleError, read_label_map, to_classes

__all__ = ["check_folders", "check_pairs"]


def check_folders(
    images: str,
    labels: str,
    *,
    classes: Sequence[str],
    ignore_label: int = 255,
    reduce_zero_label: bool = False,
    label_table: str = "",
    split: str = "",
    image_suffix: str = "",
    label_suffix: str = ".png",
    name: str = "",
    decode: bool = True,
    workers: int = 4,
) -> Report:
    """Check a folder of pictures and one of label maps; arguments as in
    :class:`d2dense.data.datasets.DatasetSpec` and :func:`d2dense.data.check.check_images`.
    """
    report = Report(name or str(images))
    pairs, without_label, without_image = folders.pair_files(
        images, labels, image_suffix=image_suffix, label_suffix=label_suffix, split=split
    )
    for path in without_label:
        report.add("warning", "images without a label map (left out)", path)
    for path in without_image:
        report.add("warning", "label maps without an image (left out)", path)
    if not pairs:
        report.add("error", "no image has a label map", f"{images}, {labels} (*{label_suffix})")
    check_pairs(
        report,
        pairs,
        classes=classes,
        ignore_label=ignore_label,
        reduces_zero=reduce_zero_label,
        label_table=label_table,
        decode=decode,
        workers=workers,
    )
    return report


def check_pairs(
    report: Report,
    pairs: Sequence[tuple[str, str]],
    *,
    classes: Sequence[str],
    ignore_label: int,
    reduces_zero: bool = False,
    label_table: str = "",
    decode: bool,
    workers: int,
) -> None:
    """Check (picture, label map) files: readable, of one size, and with labels that exist.

    Args:
        report: gets what is found, and the table of classes.
        classes: names, by contiguous number.
        ignore_label, reduces_zero, label_table: see :func:`d2dense.data.reading.to_classes`.
        decode, workers: see :func:`d2dense.data.check.check_images`.
    """
    read = functools.partial(
        to_classes,
        ignore_label=ignore_label,
        reduces_zero=reduces_zero,
        label_table=label_table,
    )
    count = functools.partial(_count_labels, read)
    sizes = check_images(
        report, [ImageFile(image) for image, _ in pairs], decode=decode, workers=workers
    )
    pixels: Counter[int] = Counter()
    images: Counter[int] = Counter()
    with ThreadPoolExecutor(workers) as pool:
        counted = pool.map(count, [label for _, label in pairs])
        for (image, path), size, found in zip(pairs, sizes, counted):
            if isinstance(found, str):
                report.add_bad_sample("label maps that cannot be read", found, image)
                continue
            shape, values = found
            if size is not None and size != shape:
                report.add_bad_sample(
                    "label map and image differ in size",
                    f"{path}: {shape[1]}x{shape[0]}, image {size[1]}x{size[0]}",
                    image,
                )
            pixels.update(values)
            images.update(values.keys())
            wrong = sorted(v for v in values if v != ignore_label and not 0 <= v < len(classes))
            if wrong:
                report.add(
                    "error",
                    f"labels outside 0 to {len(classes) - 1} that are not the ignore label "
                    f"{ignore_label}",
                    f"{path}: {', '.join(map(str, wrong[:10]))}",
                )
            if set(values) <= {ignore_label}:
                report.add("warning", "label maps without a labelled pixel", path)
    _fill_table(report, classes, pixels, images, len(pairs), ignore_label)


def _count_labels(
    read: Callable[[np.ndarray, str], np.ndarray], path: str
) -> tuple[tuple[int, int], dict[int, int]] | str:
    """Return the size (height, width) and the pixels of each class, or what is wrong; ``read``
    turns values of the file ``path`` into classes.
    """
    try:
        labels = read(read_label_map(path), path)
    except SampleError as error:
        return str(error)
    values, counts = np.unique(labels, return_counts=True)
    return labels.shape, dict(zip(values.tolist(), counts.tolist()))


def _fill_table(
    report: Report,
    classes: Sequence[str],
    pixels: Counter[int],
    images: Counter[int],
    count: int,
    ignore_label: int,
) -> None:
    total = max(sum(pixels.values()), 1)
    report.counts = {"images": count}
    report.header = ("class", "% of pixels", "images")
    report.rows = [
        (name, 100 * pixels[index] / total, images[index])
        for index, name in enumerate(classes)
        if index != ignore_label
    ]
    if images[ignore_label]:
        share = 100 * pixels[ignore_label] / total
        report.rows.append((f"(ignored: {ignore_label})", share, images[ignore_label]))
    for index, name in enumerate(classes):
        if not pixels[index] and index != ignore_label:
            report.add("note", "classes without a pixel", name)

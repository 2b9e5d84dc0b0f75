"""Find out before training whether a dataset can be trained on: files, sizes, annotations, labels.

An *error* is what the reader of a file refuses, so that training ends before its first step, or a
bad sample: one that training replaces (up to a share, see :mod:`d2dense.data.samples`) and at which
evaluation stops. A *warning* is something that is handled (a box is clipped, an object left out)
but hardly meant; a *note* is for information.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from tabulate import tabulate

from d2dense.errors import UserError

from . import datasets
from .reading import SampleError, be_strict, read_image, read_size

__all__ = ["ImageFile", "Report", "check_dataset", "check_images", "load_records"]

LEVELS = ("error", "warning", "note")
_EXAMPLES = 5
# Classes beyond this many are summed up in one row of the table.
_MAX_ROWS = 200


# Of build_train_loader.
_MAX_BAD_SHARE = 0.1


@dataclass
class Finding:
    """One kind of problem, with how often it occurs and the first few places.

    ``replaced`` says that it is an error of single samples, which training replaces.
    """

    level: str
    title: str
    count: int = 0
    replaced: bool = False
    examples: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What was found in one dataset.

    Attributes:
        name: dataset or file.
        counts: totals, by what they count.
        header, rows: a table with one row per class; the first column is the class name.
        bad_samples: files of the samples that training would replace.
        samples: how many images there are.
    """

    name: str
    findings: dict[str, Finding] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    header: Sequence[str] = ()
    rows: list[Sequence[Any]] = field(default_factory=list)
    bad_samples: set[str] = field(default_factory=set)
    samples: int = 0

    def add(self, level: str, title: str, example: str = "") -> None:
        """Note one occurrence of a problem.

        Args:
            level: one of :data:`LEVELS`.
            title: of the problem; equal ones are counted together.
            example: where it is; the first few are shown.
        """
        finding = self.findings.setdefault(title, Finding(level, title))
        finding.count += 1
        if example and len(finding.examples) < _EXAMPLES:
            finding.examples.append(example)

    def add_bad_sample(self, title: str, example: str, file: str) -> None:
        """Note an error of the sample ``file``."""
        self.add("error", title, example)
        self.findings[title].replaced = True
        self.bad_samples.add(file)

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not any(finding.level == "error" for finding in self.findings.values())

    def count(self, title: str) -> int:
        """Return how often ``title`` was found."""
        return self.findings[title].count if title in self.findings else 0

    def text(self) -> str:
        """Return the report for the console: totals, class table, findings by weight, verdict."""
        totals = ", ".join(f"{value} {what}" for what, value in self.counts.items())
        parts = [f"{self.name}: {totals}" if totals else self.name]
        if self.rows:
            parts.append(self._table())
        for level in LEVELS:
            for finding in self.findings.values():
                if finding.level == level:
                    parts.append(_lines(finding))
        parts.append(self._verdict())
        # names in a file may hold what no terminal can show
        return "\n".join(parts).encode("utf-8", "backslashreplace").decode()

    def _verdict(self) -> str:
        if self.ok:
            return "training can start"
        single = all(f.replaced for f in self.findings.values() if f.level == "error")
        if single and len(self.bad_samples) <= _MAX_BAD_SHARE * self.samples:
            return (
                f"training would replace {len(self.bad_samples)} of {self.samples} images by "
                "others and go on, evaluation would fail: correct the errors"
            )
        return "training would fail: correct the errors"

    def _table(self) -> str:
        used = [row for row in self.rows if any(row[1:])]
        rows = sorted(used, key=lambda row: -row[1])[:_MAX_ROWS] if len(used) > _MAX_ROWS else used
        table = tabulate(rows, headers=self.header, tablefmt="simple", floatfmt=".2f")
        if len(rows) < len(used):
            table += f"\n({len(used) - len(rows)} rarer classes are not shown)"
        if len(used) < len(self.rows):
            table += f"\n({len(self.rows) - len(used)} classes do not occur)"
        return table


def _lines(finding: Finding) -> str:
    more = finding.count - len(finding.examples)
    lines = [f"{finding.level}: {finding.title} ({finding.count})"]
    lines += [f"    {example}" for example in finding.examples]
    if finding.examples and more:
        lines.append(f"    ... and {more} more")
    return "\n".join(lines)


@dataclass(frozen=True)
class ImageFile:
    """A picture and the size (height, width) that its annotation claims, if any."""

    path: str
    size: tuple[int, int] | None = None


def check_images(
    report: Report, images: Iterable[ImageFile], *, decode: bool = True, workers: int = 4
) -> list[tuple[int, int] | None]:
    """Look for missing, unreadable and wrongly sized pictures.

    Args:
        decode: read every pixel, which finds truncated files; False reads the headers only.
        workers: threads.

    Returns:
        The true (height, width) of each picture, None where it cannot be read.
    """
    images = list(images)
    be_strict()

    def look(image: ImageFile) -> tuple[str, str] | tuple[int, int]:
        if not Path(image.path).is_file():
            return "missing image files", image.path
        try:
            if decode:
                return read_image({"file_name": image.path}, "BGR").shape[:2]
            return read_size(image.path)
        except SampleError as error:
            return "unreadable or truncated images", str(error)

    sizes: list[tuple[int, int] | None] = []
    report.samples = len(images)
    with ThreadPoolExecutor(workers) as pool:
        for image, found in zip(images, pool.map(look, images)):
            if isinstance(found[0], str):
                report.add_bad_sample(*found, image.path)
                sizes.append(None)
                continue
            sizes.append(found)
            if image.size is not None and found != image.size:
                # header sizes do not know about EXIF rotation
                if not decode and found == image.size[::-1]:
                    continue
                report.add_bad_sample(
                    "image size differs from the annotation",
                    f"{image.path}: {found[1]}x{found[0]}, annotated {image.size[1]}x"
                    f"{image.size[0]} (width x height)",
                    image.path,
                )
    return sizes


def load_records(report: Report) -> Sequence[dict[str, Any]]:
    """Return the records of the registered dataset ``report`` is of; none, and an error in the
    report, where it cannot be read.
    """
    try:
        return datasets.load(report.name)
    except UserError as error:
        report.add("error", "the dataset cannot be read", str(error))
        return []


def check_dataset(
    name: str, *, masks: bool | None = None, decode: bool = True, workers: int = 4
) -> Report:
    """Check a registered dataset.

    Args:
        name: registered name.
        masks: whether masks are to be trained, so that missing ones are errors; None if unknown.
        decode, workers: see :func:`check_images`.

    Raises:
        UserError: an unknown name, or its annotation file or folders do not exist.
    """
    from . import check_classification, check_coco, check_semantic  # they build on this module

    datasets.ensure(name)
    metadata = MetadataCatalog.get(name)
    options: dict[str, Any] = {"decode": decode, "workers": workers}
    if metadata.get("json_file") and metadata.get("evaluator_type") in ("coco", "lvis"):
        return check_coco.check_json(
            metadata.json_file,
            metadata.image_root,
            is_lvis=metadata.evaluator_type == "lvis",
            masks=masks,
            name=name,
            **options,
        )
    if metadata.get("sem_seg_root") and metadata.get("evaluator_type") == "sem_seg":
        return check_semantic.check_folders(
            metadata.image_root,
            metadata.sem_seg_root,
            classes=metadata.stuff_classes,
            ignore_label=metadata.get("ignore_label", 255),
            reduce_zero_label=metadata.get("reduce_zero_label", False),
            label_table=metadata.get("label_table", ""),
            split=metadata.get("split_file", ""),
            name=name,
            **metadata.get("suffixes", {}),
            **options,
        )
    if metadata.get("evaluator_type") == "classification":
        return check_classification.check_class_folders(name, **options)
    return _check_records(name, **options)


def _check_records(name: str, *, decode: bool, workers: int) -> Report:
    """Check a dataset of any other kind through its records."""
    from . import check_coco, check_semantic

    report = Report(name)
    records = load_records(report)
    if not records:
        return report
    metadata = MetadataCatalog.get(name)
    if "sem_seg_file_name" in records[0] and "annotations" not in records[0]:
        pairs = [(r["file_name"], r["sem_seg_file_name"]) for r in records]
        check_semantic.check_pairs(
            report,
            pairs,
            classes=metadata.stuff_classes,
            ignore_label=metadata.get("ignore_label", 255),
            label_table=records[0].get("sem_seg_label_table", ""),
            decode=decode,
            workers=workers,
        )
        return report
    images = [
        ImageFile(r["file_name"], (r["height"], r["width"]) if "height" in r else None)
        for r in records
    ]
    check_images(report, images, decode=decode, workers=workers)
    check_coco.summarise_records(report, records, list(metadata.thing_classes))
    return report

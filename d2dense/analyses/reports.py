"""What the analyses of the CEDNet paper write: figures, tables and pictures."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from d2dense.data.reading import read_image
from d2dense.data.records import Records
from d2dense.errors import UserError
from d2dense.evaluation.base import image_key

from . import panels
from .areas import COMMON_THRESHOLDS, AreaCurve, relative, relative_thresholds
from .figures import make_folder, save, write_json, write_table
from .fusion import FusionTime
from .gradients import InputGradient, input_gradient
from .quality import Comparison, Detections, Objects, object_qualities
from .subjects import Subject

__all__ = ["fusion_report", "gradient_report", "quality_panels", "quality_report"]


logger = logging.getLogger(__name__)

# ------------------------------------------------ input gradients and areas


def gradient_report(
    subjects: Sequence[Subject],
    records: Records,
    output: str | Path,
    *,
    pictures: int = 4,
    arrays: bool = False,
    steps: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Compute the gradient maps of all images by every model and write

    - ``areas.png/.csv`` and ``areas_relative.png/.csv``: area over threshold, see
      :mod:`d2dense.analyses.areas`;
    - ``images.csv``: loss, largest and mean gradient of each image;
    - ``summary.json``: areas under the two curves by model;
    - ``maps/``: the first ``pictures`` images with their maps; with ``arrays`` all maps as ``.npz``
      (float32 ``(H, W)`` by model).

    Args:
        steps: of the relative threshold
        seed: of :func:`input_gradient`

    Returns:
        Areas under the curves: ``{"common" or "relative": {model: area}}``.
    """
    folder = make_folder(output)
    maps_folder = make_folder(folder / "maps") if pictures > 0 or arrays else folder
    common = {each.name: AreaCurve(COMMON_THRESHOLDS) for each in subjects}
    own = {each.name: AreaCurve(relative_thresholds(steps)) for each in subjects}
    rows = []
    streams = [each.labelled_images(records) for each in subjects]
    for index, samples in enumerate(zip(*streams)):
        found = {
            each.name: input_gradient(each.model, sample, seed=seed)
            for each, sample in zip(subjects, samples)
        }
        for name, gradient in found.items():
            common[name].add(gradient.map)
            own[name].add(relative(gradient.map))
        record = records[index]
        rows.append([image_key(record), record["file_name"], *_numbers(found)])
        if index < pictures:
            _draw_maps(_picture_path(maps_folder, index, record), record, found)
        if arrays:
            maps = {name: gradient.map.numpy() for name, gradient in found.items()}
            np.savez_compressed(
                _picture_path(maps_folder, index, record).with_suffix(".npz"), **maps
            )
        if (index + 1) % _LOG_PERIOD == 0:
            logger.info("%d of %d images", index + 1, len(records))
    header = [f"{name}: {each}" for name in common for each in _MEASURES]
    write_table(folder / "images.csv", ["image_id", "file_name", *header], rows)
    return _report_areas(folder, common, own)


def _report_areas(
    folder: Path, common: Mapping[str, AreaCurve], own: Mapping[str, AreaCurve]
) -> dict[str, dict[str, float]]:
    largest = max(curve.largest for curve in common.values())
    scale = largest or 1.0
    _draw_areas(folder / "areas", common, "largest gradient of all", scale=scale, left=1e-5)
    left = float(next(iter(own.values())).thresholds[1])
    _draw_areas(folder / "areas_relative", own, "largest gradient of the image", left=left)
    areas = {
        "common": {name: curve.area_under / scale for name, curve in common.items()},
        "relative": {name: curve.area_under for name, curve in own.items()},
    }
    count = next(iter(common.values())).count
    summary = {"images": count, "largest_gradient": largest, "area_under": areas}
    write_json(folder / "summary.json", summary)
    return areas


_MEASURES = ("loss", "largest_gradient", "mean_gradient")
_LOG_PERIOD = 100  # images


def _numbers(found: Mapping[str, InputGradient]) -> list[str]:
    return [
        f"{float(value):.6g}"
        for gradient in found.values()
        for value in (gradient.loss, gradient.map.max(), gradient.map.mean())
    ]


def _draw_areas(
    path: Path, curves: Mapping[str, AreaCurve], unit: str, *, scale: float = 1.0, left: float
) -> None:
    """Draw areas over thresholds that are divided by ``scale``, from ``left`` to 1."""
    axes = Figure(figsize=(6, 4.5)).add_subplot()
    thresholds = next(iter(curves.values())).thresholds / scale
    shown = thresholds <= 1
    shown[(~shown).nonzero()[:1]] = True  # the first one above, where every area is 0
    for name, curve in curves.items():
        label = f"{name} (area under: {curve.area_under / scale:.4g})"
        axes.plot(thresholds[shown], curve.areas[shown], label=label)
    axes.set(
        xscale="log",
        xlim=(left, 1.0),
        xlabel=f"threshold / {unit}",
        ylabel="mean area / image area",
    )
    areas = [curve.areas[shown].tolist() for curve in curves.values()]
    rows = (
        [f"{t:.6g}", *(f"{a:.8f}" for a in at_t)]
        for t, *at_t in zip(thresholds[shown].tolist(), *areas)
    )
    save(path, axes.figure, ["t", *curves], rows)


def _draw_maps(path: Path, record: Mapping[str, Any], found: Mapping[str, InputGradient]) -> None:
    views = [
        panels.View(f"{name}: loss {gradient.loss:.3f}", gradient=gradient.map.numpy())
        for name, gradient in found.items()
    ]
    panels.draw(path, _picture(record), Objects.of(record), views)


# ------------------------------------------------ detection quality


def quality_report(
    comparisons: Sequence[Comparison], output: str | Path, *, keep: int, names: tuple[str, str]
) -> dict[str, Any]:
    """Write ``scores.csv`` (all images by rank, those of the best ``keep`` marked), ``scores.png``
    (histogram of the differences, and the differences by rank) and ``summary.json``, and return
    what the latter holds.

    Args:
        names: of model and baseline.
    """
    if not comparisons:
        raise UserError("no image has objects; the quality score needs some")
    folder = make_folder(output)
    kept = min(keep, len(comparisons))
    differences = [each.difference for each in comparisons]
    figure = Figure(figsize=(9, 4))
    histogram, curve = figure.subplots(1, 2)
    histogram.hist(differences, bins=50)
    histogram.set(xlabel="difference of the image scores", ylabel="images")
    figure.suptitle(f"{names[0]} - {names[1]}", fontsize=9)
    curve.plot(range(1, len(differences) + 1), differences, label="difference")
    curve.axvline(kept, color="grey", linestyle="--", label=f"best {kept}")
    curve.axhline(0.0, color="grey", linewidth=0.8)
    curve.set(xlabel="rank", ylabel="difference of the image scores")
    rows = (
        [
            each.rank,
            image_key(each.record),
            each.record["file_name"],
            each.objects,
            *(f"{value:.6f}" for value in (each.model, each.baseline, each.difference)),
            int(each.rank <= kept),
        ]
        for each in comparisons
    )
    scores = [f"score: {name}" for name in names]
    header = ["rank", "image_id", "file_name", "objects", *scores, "difference", "kept"]
    save(folder / "scores", figure, header, rows)
    summary = {
        "images": len(comparisons),
        "kept": kept,
        "mean_score": {
            names[0]: float(np.mean([each.model for each in comparisons])),
            names[1]: float(np.mean([each.baseline for each in comparisons])),
        },
    }
    write_json(folder / "summary.json", summary)
    return summary


def quality_panels(
    comparisons: Sequence[Comparison],
    found: Mapping[str, Mapping[Hashable, Detections]],
    output: str | Path,
    *,
    any_class: bool = False,
    gradients: Mapping[str, Iterable[Tensor]] | None = None,
) -> list[Path]:
    """Draw images with the detections that their objects take, one column per model.

    Args:
        comparisons: which images
        found: detections by model and image
        gradients: by model, the input gradient map of each of these images
    """
    folder = make_folder(Path(output) / "panels")
    maps = {name: iter(each) for name, each in (gradients or {}).items()}
    files = []
    for index, each in enumerate(comparisons):
        objects = Objects.of(each.record)
        views = []
        for name, by_image in found.items():
            here = by_image.get(image_key(each.record), Detections.none())
            qualities = object_qualities(objects, here, any_class=any_class)
            gradient = next(maps[name]).numpy() if name in maps else None
            views.append(panels.View(name, found=(here, qualities), gradient=gradient))
        path = _picture_path(folder, index, each.record)
        files.append(panels.draw(path, _picture(each.record), objects, views))
    return files


# ------------------------------------------------ fusion time


def fusion_report(times: Mapping[str, FusionTime], output: str | Path) -> list[Path]:
    """Write ``fusion_time.png`` (bars in percent), ``fusion_time.csv`` and ``summary.json``."""
    folder = make_folder(output)
    axes = Figure(figsize=(6, 1.2 + 0.4 * len(times))).add_subplot()
    shares = [100 * time.share for time in times.values()]
    bars = axes.barh(list(times), shares)
    axes.bar_label(bars, fmt="%.1f %%", padding=3)
    axes.invert_yaxis()
    axes.set(xlim=(0, 110), xlabel="parameters before the first fusion (% of the backbone)")
    rows = [[n, t.before, t.whole, f"{100 * t.share:.2f}"] for n, t in times.items()]
    header = ["model", "parameters_before", "parameters", "percent"]
    summary = {"percent": {name: 100 * time.share for name, time in times.items()}}
    return [
        *save(folder / "fusion_time", axes.figure, header, rows),
        write_json(folder / "summary.json", summary),
    ]


# ------------------------------------------------ pictures


def _picture(record: Mapping[str, Any]) -> np.ndarray:
    return read_image(dict(record), "RGB")


def _picture_path(folder: Path, index: int, record: Mapping[str, Any]) -> Path:
    return folder / f"{index + 1:04d}_{Path(record['file_name']).stem}.png"

"""How often queries change their objects from one checkpoint to the next (DN-DETR's instability,
arXiv 2203.01305, section 3.2).

V is for each query the object that it gets after the last decoder layer, -1 for none. The
instability between two checkpoints is the number of queries whose V differs, as a mean over the
images. Queries are told apart by their number; where the encoder proposes them, that is the rank of
the proposal.

Letters: Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from d2dense.data.records import Records
from d2dense.errors import UserError

from .figures import make_folder, save, write_json
from .matching import match, require_transformer
from .subjects import Subject

__all__ = ["assignments", "changes", "instability_report"]


def assignments(subject: Subject, records: Records) -> list[Tensor]:
    """Return V ``(Q,)`` of every image, on the CPU.

    Raises:
        UserError: the model is no detection transformer.
    """
    model = require_transformer(subject.model)
    return [match(model, sample).objects.cpu() for sample in subject.labelled_images(records)]


def changes(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the mean number of queries with another object, over the images.

    Args:
        before, after: V ``(Q,)`` of the same images by two checkpoints, from :func:`assignments`.

    Raises:
        UserError: another number of queries.
    """
    for first, second in zip(before, after, strict=True):
        if len(first) != len(second):
            raise UserError(
                f"two checkpoints have {len(first)} and {len(second)} queries; give those of one "
                "run"
            )
    return sum(int((a != b).sum()) for a, b in zip(before, after)) / len(before)


def instability_report(
    runs: Mapping[str, Mapping[str, Sequence[Tensor]]], output: str | Path
) -> dict[str, list[float]]:
    """Write ``instability.png/.csv`` and ``summary.json``.

    Args:
        runs: by name, V of every image by checkpoint, in the order of training; two or more

    Returns:
        By run, the instability at every checkpoint but the first.
    """
    folder = make_folder(output)
    axes = Figure(figsize=(6, 4)).add_subplot()
    rows, found, images = [], {}, 0
    for name, by_checkpoint in runs.items():
        checkpoints = list(by_checkpoint)
        pairs = list(pairwise(checkpoints))
        values = [changes(by_checkpoint[a], by_checkpoint[b]) for a, b in pairs]
        axes.plot(range(2, len(checkpoints) + 1), values, marker="o", markersize=3, label=name)
        rows += [[name, k, *pair, f"{v:.6f}"] for k, (pair, v) in enumerate(zip(pairs, values), 2)]
        found[name] = values
        images = len(by_checkpoint[checkpoints[0]])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="checkpoint", ylabel="queries with another object")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    header = ["model", "checkpoint", "before", "after", "instability"]
    save(folder / "instability", axes.figure, header, rows)
    summary = {"images": images, "instability": found}
    write_json(folder / "summary.json", summary)
    return found

"""How far a detection transformer's queries are from the customised positives of the same object
(figure 7 of the Co-DETR paper, arXiv 2211.12860).

Not stated in the paper and fixed here: a query is where its reference starts, a customised positive
is the centre of the anchor, proposal or point that an auxiliary head assigned to the object;
distances are divided by the image's diagonal. Of each object and auxiliary head there are two mean
distances to its customised positives: that of the query which Hungarian matching gives it after the
last layer, and that of all queries without an object.

Letters: Q queries, P customised positives, G objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from d2dense.errors import UserError

from .figures import make_folder, save, write_json

__all__ = ["ObjectDistance", "object_distances", "query_report"]


class ObjectDistance(NamedTuple):
    """Mean distances to an object's customised positives, relative to the image's diagonal.

    Attributes:
        image: its id
        object: its row among the image's
        head: name of the auxiliary head
        positives: how many there are of it
        matched: of the query that the object gets
        others: of the queries without an object; NaN if there is none
    """

    image: str
    object: int
    head: str
    positives: int
    matched: float
    others: float


def object_distances(
    queries: Tensor, objects: Tensor, positives: Tensor, owners: Tensor, size: tuple[int, int]
) -> dict[int, tuple[int, float, float]]:
    """Return by object the number of its customised positives, and the mean distances of its query
    and of the queries without object. Objects without a query or without positives are left out.

    Args:
        queries: ``(Q, 2)``, centres xy in pixels
        objects: ``(Q,)``, the object of each query, -1 for none
        positives: ``(P, 2)``, centres xy in pixels
        owners: ``(P,)``, the object of each
        size: height and width of the image
    """
    distances = torch.cdist(queries.double(), positives.double()) / float(np.hypot(*size))
    free = objects < 0
    found = {}
    for query in (objects >= 0).nonzero()[:, 0].tolist():
        number = int(objects[query])
        mine = owners == number
        if mine.any():
            row = distances[:, mine].mean(dim=1)
            found[number] = (int(mine.sum()), float(row[query]), float(row[free].mean()))
    return dict(sorted(found.items()))


def query_report(
    distances: Sequence[ObjectDistance], output: str | Path, *, images: int
) -> dict[str, tuple[float, float]]:
    """Write ``query_distance.csv`` (all objects), ``query_distance.png`` (histograms per head) and
    ``summary.json`` (means per head).

    Args:
        distances: of the objects of all images and heads.
        output: folder, made if missing.
        images: how many images they come from, for the summary.

    Returns:
        By head, the means of ``matched`` and ``others``.

    Raises:
        UserError: no object has both a query and a customised positive.
    """
    if not distances:
        raise UserError(
            "no object has both a query and a customised positive; give more images, or a model "
            "with more queries"
        )
    folder = make_folder(output)
    heads = list(dict.fromkeys(each.head for each in distances))
    figure = Figure(figsize=(4.5 * len(heads), 3.5))
    means = {}
    for axes, head in zip(figure.subplots(1, len(heads), squeeze=False)[0], heads):
        pairs = np.array([(d.matched, d.others) for d in distances if d.head == head])
        means[head] = tuple(np.nanmean(pairs, axis=0).tolist())
        bins = np.linspace(0, max(float(np.nanmax(pairs)), 1e-6), 41)
        labels = ("with the object", "without object")
        for values, label, mean in zip(pairs.T, labels, means[head]):
            values = values[~np.isnan(values)]
            axes.hist(values, bins, alpha=0.6, label=f"queries {label} (mean {mean:.3f})")
        axes.set(xlabel="mean distance / image diagonal", ylabel="objects", title=head)
    rows = ([*each[:4], f"{each.matched:.6f}", f"{each.others:.6f}"] for each in distances)
    save(folder / "query_distance", figure, ObjectDistance._fields, rows)
    summary = {
        "images": images,
        "mean_distance": {h: dict(zip(("matched", "others"), m)) for h, m in means.items()},
    }
    write_json(folder / "summary.json", summary)
    return means

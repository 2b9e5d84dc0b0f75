"""Keep the predictions that someone asked for: by score, class and rank."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from detectron2.data.catalog import Metadata

from d2dense.errors import UserError, nearest

__all__ = ["best_classes", "class_indices", "class_name", "class_names", "select"]


def class_names(metadata: Metadata, kind: str) -> list[str]:
    """Return the names of ``"thing"``, ``"stuff"`` or ``"image"`` classes (for people, where the
    dataset has such); an empty list where unknown.
    """
    titles = metadata.get("image_class_titles") if kind == "image" else None
    return list(titles or metadata.get(f"{kind}_classes") or [])


def class_name(metadata: Metadata, index: int, kind: str) -> str:
    """Return a class's name, or its number where the name is unknown."""
    names = class_names(metadata, kind)
    return names[index] if 0 <= index < len(names) else f"class {index}"


def class_indices(names: Sequence[str], metadata: Metadata) -> dict[str, set[int]]:
    """Return the indices of class names: ``{"thing": {...}, "stuff": {...}}``.

    Raises:
        UserError: an unknown name, with the nearest known one.
    """
    known = {kind: class_names(metadata, kind) for kind in ("thing", "stuff")}
    everything = [*known["thing"], *known["stuff"]]
    for name in names:
        if name not in everything:
            hint = nearest(name, everything)
            if not everything:
                hint = "; the class names of this model are unknown here, so none can be chosen"
            elif not hint:
                hint = f"; there are {', '.join(everything[:10])}"
                hint += ", ..." if len(everything) > 10 else ""
            raise UserError(f"unknown class {name!r}{hint}")
    return {kind: {known[kind].index(n) for n in names if n in known[kind]} for kind in known}


def best_classes(
    scores: torch.Tensor, metadata: Metadata, *, count: int = 5
) -> list[tuple[int, str, float]]:
    """Return (class, name, score) of the best classes of a whole image, best first.

    Args:
        scores: (K,), the output ``class_scores`` of an image classifier.
    """
    best = scores.float().cpu().topk(min(count, len(scores)))
    return [
        (k, class_name(metadata, k, "image"), score)
        for k, score in zip(best.indices.tolist(), best.values.tolist())
    ]


def select(
    output: dict[str, Any],
    *,
    score_threshold: float = 0.0,
    classes: dict[str, Collection[int]] | None = None,
    top_k: int | None = None,
) -> dict[str, Any]:
    """Return a copy of an output dict, on the CPU, with the chosen predictions only.

    Args:
        output: what a model returns for one picture.
        score_threshold: least score of an instance (or of a scored panoptic segment).
        classes: what :func:`class_indices` returns; None keeps all classes. Label maps
            (``sem_seg``) and scores of a whole image (``class_scores``) pass whole.
        top_k: largest number of instances, the best ones; None keeps all.
    """
    chosen = dict(output)
    if "instances" in output:
        instances = output["instances"].to("cpu")
        keep = instances.scores >= score_threshold
        if classes is not None:
            wanted = torch.tensor(sorted(classes["thing"]), dtype=torch.int64)
            keep &= torch.isin(instances.pred_classes, wanted)
        instances = instances[keep]
        order = torch.argsort(instances.scores, descending=True, stable=True)
        chosen["instances"] = instances[order[:top_k]]
    if "class_scores" in output:
        chosen["class_scores"] = output["class_scores"].cpu()
    if "sem_seg" in output:
        chosen["sem_seg"] = output["sem_seg"].cpu()
    if "panoptic_seg" in output:
        segments, infos = output["panoptic_seg"]
        if infos is not None:
            infos = [info for info in infos if _wanted(info, score_threshold, classes)]
        chosen["panoptic_seg"] = segments.cpu(), infos
    return chosen


def _wanted(
    info: dict[str, Any], score_threshold: float, classes: dict[str, Collection[int]] | None
) -> bool:
    kind = "thing" if info["isthing"] else "stuff"
    is_class = classes is None or info["category_id"] in classes[kind]
    return is_class and info.get("score", 1.0) >= score_threshold

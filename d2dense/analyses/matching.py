"""Which query of a detection transformer an object gets.

Letters: Q queries, G objects of an image, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2dense.errors import UserError
from d2dense.modeling.detr import DeformableDETR, Memory, Queries, Targets

__all__ = ["Matched", "match", "require_transformer"]


class Matched(NamedTuple):
    """A detector's queries for one image.

    Attributes:
        memory: what the encoder made of the image.
        queries: that the decoder starts from.
        targets: the image's objects.
        objects: ``(Q,)``, the row of the object that each query gets after the last decoder layer,
            -1 for none.
    """

    memory: Memory
    queries: Queries
    targets: Targets
    objects: Tensor


def require_transformer(model: nn.Module) -> DeformableDETR:
    """Return the model.

    Raises:
        UserError: it is no detection transformer.
    """
    if not isinstance(model, DeformableDETR):
        raise UserError(
            f"{type(model).__name__} has no queries that objects are matched to; give a detection "
            "transformer (META_ARCHITECTURE DeformableDETR or one made of it)"
        )
    return model


@torch.no_grad()
def match(model: DeformableDETR, sample: Mapping[str, Any]) -> Matched:
    """Return what the detector's own matcher makes of an image.

    Args:
        model: in eval mode
        sample: what a training mapper gives: ``image`` and ``instances``
    """
    images = model.preprocess([sample])
    memory = model.encode(images)
    queries = model.queries(memory)
    logits, boxes = model.predict(queries, memory, all_layers=False)
    targets = model.build_targets(images, [sample["instances"]])
    found = model.criterion.matcher(logits, boxes, targets)
    has_query = found.found[0, 0]
    objects = torch.full((logits.shape[2],), -1, device=logits.device)
    objects[found.queries[0, 0][has_query]] = has_query.nonzero()[:, 0]
    return Matched(memory, queries, targets, objects)

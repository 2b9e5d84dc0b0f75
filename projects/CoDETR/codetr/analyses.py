"""What the analyses ask a collaborative detector.

Letters: N images, A candidates of a head, K classes, M auxiliary heads, P customised positives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from d2dense.analyses.discriminability import Levels, split_levels
from d2dense.analyses.head_distance import activation_map, best_score
from d2dense.analyses.matching import match
from d2dense.analyses.query_distance import ObjectDistance, object_distances
from d2dense.engine import random_state
from d2dense.errors import UserError
from d2dense.modeling.detr.targets import image_size_tensor

from .auxiliary import AuxiliaryHead
from .heads import FasterRCNNHead
from .heads.boxes import centres
from .heads.dense import flatten_levels
from .meta_arch import CoDETR

__all__ = [
    "activation_maps",
    "class_logits",
    "customised_positives",
    "head_names",
    "query_distances",
    "require_collaborative",
]


def require_collaborative(model: nn.Module) -> CoDETR:
    """Return the model.

    Raises:
        UserError: it has no auxiliary heads.
    """
    if not isinstance(model, CoDETR) or not len(model.auxiliary_heads):
        raise UserError(
            f"{type(model).__name__} has no auxiliary heads; give a Co-DETR "
            "(MODEL.META_ARCHITECTURE CoDETR) with MODEL.CODETR.AUXILIARY_HEADS"
        )
    return model


def head_names(model: CoDETR) -> list[str]:
    """Return a name of each auxiliary head: its class, and its number where several are of one."""
    names = [type(head).__name__.removesuffix("Head") for head in model.auxiliary_heads]
    return [
        f"{name} {number}" if names.count(name) > 1 else name for number, name in enumerate(names)
    ]


def class_logits(
    head: AuxiliaryHead, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
) -> Tensor:
    """Return the class logits ``(N, A, K)`` of all candidates of a head, without the background's;
    -inf in rows that only fill up.

    Args:
        maps: of the adapter
        sizes: heights and widths of the images
    """
    if not isinstance(head, FasterRCNNHead):
        logits = head.predict(maps)[0]
        return logits if isinstance(logits, Tensor) else flatten_levels(logits, head.num_classes)
    limits = image_size_tensor(sizes, maps[0].device).flip(1).repeat(1, 2)[:, None]
    regions = head.rpn.propose(maps, limits)
    logits = head.predict(head.pool(maps, regions.boxes))[0][:, :-1]
    logits = logits.unflatten(0, regions.there.shape)
    return logits.masked_fill(~regions.there[..., None], -torch.inf)


def activation_maps(model: CoDETR, sample: Mapping[str, Any], *, top: int = 100) -> list[Tensor]:
    """Return the class activation maps ``(h, w)`` of the main head and of each auxiliary head with
    respect to the encoded levels, see :mod:`d2dense.analyses.head_distance`.

    Args:
        model: in eval mode
        sample: with ``image``
        top: candidates of each head that count
    """
    images = model.preprocess([sample])
    with torch.no_grad():
        memory = model.encode(images)
    tokens = memory.tokens.detach().requires_grad_()
    memory = memory._replace(tokens=tokens)
    levels = Levels(
        maps=split_levels(tokens[0].detach(), memory),
        padded=tuple(images.tensor.shape[2:]),
        size=tuple(sample["image"].shape[1:]),
    )
    sizes = model.valid_sizes(images)
    with torch.enable_grad():
        maps = model.adapter(memory)
        logits = [model.decode(memory, all_layers=False)[0][-1]]
        logits += [class_logits(head, maps, sizes) for head in model.auxiliary_heads]
        scores = [best_score(_there(each[0]), top) for each in logits]
    gradients = [torch.autograd.grad(score, tokens, retain_graph=True)[0] for score in scores]
    return [activation_map(levels, split_levels(each[0], memory)) for each in gradients]


def _there(logits: Tensor) -> Tensor:
    return logits[logits.isfinite().all(dim=-1)]


@torch.no_grad()
def customised_positives(
    model: CoDETR, sample: Mapping[str, Any], *, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Return by auxiliary head the centres ``(P, 2)``, xy in pixels, of the candidates that it
    assigns to objects, and the row ``(P,)`` of the object of each.

    Args:
        model: in eval mode
        sample: with ``image`` and ``instances``
        seed: of heads that draw samples
    """
    images = model.preprocess([sample])
    memory = model.encode(images)
    given = sample["instances"].to(model.device)
    (size,) = model.valid_sizes(images)
    framed = Instances(tuple(size), **given.get_fields())
    maps = model.adapter(memory)
    found = []
    for head in model.auxiliary_heads:
        with random_state.isolated():
            torch.manual_seed(seed)
            _, candidates = head.losses(maps, [framed])
        positive = candidates.usable[0] & (candidates.labels[0] != model.num_classes)
        boxes, targets = candidates.boxes[0, positive], candidates.targets[0, positive]
        found.append((centres(boxes), _nearest(targets, given.gt_boxes.tensor)))
    return found


def _nearest(targets: Tensor, objects: Tensor) -> Tensor:
    """Return which of the objects' boxes each target is."""
    return torch.cdist(targets.double(), objects.double(), p=1).argmin(dim=1)


def query_distances(
    model: CoDETR, sample: Mapping[str, Any], *, image: str = "", seed: int = 0
) -> list[ObjectDistance]:
    """Return the distances of an image's objects, see :mod:`d2dense.analyses.query_distance`.

    Args:
        model: in eval mode
        sample: with ``image`` and ``instances``
        image: its id
        seed: see :func:`customised_positives`
    """
    found = match(model, sample)
    centres = found.queries.references[0, :, :2] * found.targets.sizes[0, :, :2]
    size = tuple(sample["image"].shape[1:])
    names = head_names(model)
    rows = []
    for name, (positives, owners) in zip(names, customised_positives(model, sample, seed=seed)):
        by_object = object_distances(centres, found.objects, positives, owners, size)
        rows += [ObjectDistance(image, each, name, *row) for each, row in by_object.items()]
    return rows

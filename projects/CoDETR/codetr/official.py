"""The official code's models by name, built from our classes and filled with its weights; their
outputs step by step, and their losses.

Letters: N images, H and W size of the batch, S positions of all levels, Q queries, K classes, D
decoder layers, Hl and Wl size of level l.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from d2dense.checkpoint import convert_back
from d2dense.checkpoint.building import build_with_weights
from d2dense.errors import UserError, nearest

from .heads.atss import ATSSHead
from .heads.faster_rcnn import FasterRCNNHead
from .meta_arch import CoDETR
from .official_models import MODELS

__all__ = ["VARIANTS", "build", "inspect", "load", "loss_tensors", "losses", "state_dict"]

VARIANTS: tuple[str, ...] = tuple(MODELS)

Sizes = Sequence[tuple[int, int]]


def load(variant: str, state_dict: Mapping[str, Tensor], num_queries: int | None = None) -> CoDETR:
    """Return an official model in eval mode with its weights: a Detectron2 model that takes its
    batches, with RGB images, and returns its results.

    Args:
        variant: one of :data:`VARIANTS`.
        state_dict: the official weights under the official names; the model gets a copy. What the
            model computes itself, such as rotary tables, is not needed; the table of whole maps, if
            given, says for which size of images it was made.
        num_queries: another number than the official one.

    Raises:
        UserError: an unknown variant, or weights that are missing, unused or of another shape.
    """
    table = state_dict.get("backbone.rope_glb.freqs_cos")
    side = None if table is None else math.isqrt(len(table))
    make = partial(build, variant, num_queries, rotary_side=side)
    return build_with_weights(make, state_dict, "codetr")


def state_dict(detector: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model from :func:`load` or :func:`build` under the official names."""
    return convert_back(detector, "codetr")


def build(
    variant: str, num_queries: int | None = None, *, rotary_side: int | None = None
) -> CoDETR:
    """Return an official model with fresh weights.

    Args:
        variant, num_queries: see :func:`load`
        rotary_side: another one than the official one, see :class:`EVA02ViT`

    Raises:
        UserError: an unknown variant.
    """
    if variant not in MODELS:
        raise UserError(f"unknown official model {variant!r}{nearest(variant, VARIANTS)}")
    node = MODELS[variant]()
    if num_queries is not None:
        node.queries.num_queries = num_queries
    if rotary_side is not None:
        node.backbone.rotary_side = rotary_side
    return instantiate(node)


# ------------------------------------------------ outputs


@torch.no_grad()
def inspect(detector: CoDETR, images: Tensor, valid_sizes: Sizes) -> dict[str, Tensor]:
    """Return what the detector computes on the way to its detections, and the outputs of its
    auxiliary heads.

    ``<n>`` counts levels, finest first, ``<i>`` images; boxes are xyxy in pixels of the batch
    unless said otherwise:

    - ``backbone_<n>``, ``neck_<n>``: maps; ``memory``: ``(N, S, C)``; ``adapter_last``: the map
      that the adapter adds
    - ``enc_score``: ``(N, S)``; ``enc_topk_index``, ``enc_topk_score``: ``(N, Q)``;
      ``enc_topk_box``: ``(N, Q, 4)``, cxcywh relative to the image
    - ``dec_box``: ``(D, N, Q, 4)``, cxcywh relative to the image; ``dec_cls``: ``(D, N, Q, K)``,
      logits; ``dec_cls_last``: its last layer
    - ``det<i>_box``, ``_score``, ``_label``: detections, best first
    - ``atss_cls_<n>``, ``atss_reg_<n>``, ``atss_ctr_<n>``, ``rpn_cls_<n>``, ``rpn_reg_<n>``: raw
      maps of the heads, anchors of a position by ratio, then by scale
    - ``rpn_prop<i>``: ``(P, 5)``, proposals and their scores; ``rpn_nprop<i>``: P
    - ``roi_feat_mean``, ``roi_cls``, ``roi_reg``: the box head's input, averaged over the 7 x 7
      cells, and raw outputs for the proposals of all images
    - ``atss_det<i>_*``, ``rcnn_det<i>_*``: detections of the heads

    Args:
        detector: from :func:`load`.
        images: ``(N, 3, H, W)``, normalised.
        valid_sizes: height and width of each image without padding.
    """
    batch = ImageList(images, [tuple(size) for size in valid_sizes])
    with _outputs(detector.backbone, detector.neck) as (features, levels):
        memory = detector.encode(batch)
    queries = detector.queries(memory)
    proposals = queries.proposals
    logits, boxes = detector.predict(queries, memory)
    found: dict[str, Tensor] = {}
    found |= _numbered("backbone", [features[0][name] for name in detector.in_features])
    found |= _numbered("neck", levels[0])
    found |= {
        "memory": memory.tokens,
        "enc_score": proposals.scores,
        "enc_topk_index": proposals.index,
        "enc_topk_score": proposals.top_scores,
        "enc_topk_box": proposals.boxes,
        "dec_box": boxes,
        "dec_cls": logits,
        "dec_cls_last": logits[-1],
    }
    found |= _detections("det", detector.select(logits[-1], boxes[-1], batch))
    if len(detector.auxiliary_heads):
        maps = detector.adapter(memory)
        found["adapter_last"] = maps[-1]
        sizes = detector.valid_sizes(batch)
        for head in detector.auxiliary_heads:
            if isinstance(head, FasterRCNNHead):
                found |= _inspect_rcnn(head, maps, sizes)
            elif isinstance(head, ATSSHead):
                found |= _inspect_atss(head, maps, sizes)
    return found


def _inspect_atss(head: ATSSHead, maps: Sequence[Tensor], sizes: Sizes) -> dict[str, Tensor]:
    outputs = head.predict(maps)
    return {
        **_numbered("atss_cls", outputs.logits),
        **_numbered("atss_reg", outputs.deltas),
        **_numbered("atss_ctr", outputs.centerness),
        **_detections("atss_det", head.detect(maps, sizes)),
    }


def _inspect_rcnn(head: FasterRCNNHead, maps: Sequence[Tensor], sizes: Sizes) -> dict[str, Tensor]:
    logits, deltas = head.rpn.predict(maps)
    limits = maps[0].new_tensor([(width, height) * 2 for height, width in sizes])[:, None]
    proposals = head.rpn.propose(maps, limits)
    found = {**_numbered("rpn_cls", logits), **_numbered("rpn_reg", deltas)}
    for i, (boxes, scores, there) in enumerate(zip(*proposals)):
        found[f"rpn_prop{i}"] = torch.cat([boxes, scores[:, None]], dim=1)[there]
        found[f"rpn_nprop{i}"] = there.sum()
    there = proposals.there.flatten()
    pooled = head.pool(maps, proposals.boxes)
    classes, regression = head.predict(pooled)
    found["roi_feat_mean"] = pooled.mean(dim=(2, 3))[there]
    found |= {"roi_cls": classes[there], "roi_reg": regression[there]}
    return found | _detections("rcnn_det", head.detect(maps, sizes))


@contextmanager
def _outputs(*modules: nn.Module):
    """Record what modules return: yield a list of outputs per module."""
    records: list[list[Any]] = [[] for _ in modules]

    def keep(record, module, inputs, output):
        record.append(output)

    with ExitStack() as stack:
        for module, record in zip(modules, records):
            handle = module.register_forward_hook(partial(keep, record))
            stack.callback(handle.remove)
        yield records


def _numbered(name: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{name}_{i}": value for i, value in enumerate(values)}


def _detections(name: str, found: Sequence[Instances]) -> dict[str, Tensor]:
    result = {}
    for i, each in enumerate(found):
        result |= {
            f"{name}{i}_box": each.pred_boxes.tensor,
            f"{name}{i}_score": each.scores,
            f"{name}{i}_label": each.pred_classes,
        }
    return result


# ------------------------------------------------ losses


def losses(
    detector: CoDETR,
    images: Tensor,
    valid_sizes: Sizes,
    gt_boxes: Sequence[Tensor],
    gt_labels: Sequence[Tensor],
) -> dict[str, float]:
    """Return the losses under the official names, with their weights, in a setting without chance:
    all anchors and regions are sampled, the first negatives become queries, and nothing is noised.
    Modules stay in the mode they are in.

    Args:
        detector: from :func:`load`.
        images, valid_sizes: see :func:`inspect`.
        gt_boxes: of each image ``(G, 4)``, xyxy in pixels.
        gt_labels: of each image ``(G,)``.
    """
    found = loss_tensors(detector, images, valid_sizes, gt_boxes, gt_labels)
    return {name: float(loss.detach()) for name, loss in found.items()}


def loss_tensors(
    detector: CoDETR,
    images: Tensor,
    valid_sizes: Sizes,
    gt_boxes: Sequence[Tensor],
    gt_labels: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Return what :func:`losses` does, scalars with the graph that made them."""
    instances = []
    for size, boxes, labels in zip(valid_sizes, gt_boxes, gt_labels):
        objects = Instances(tuple(size))
        objects.gt_boxes = Boxes(boxes)
        objects.gt_classes = labels
        instances.append(objects)
    batch = ImageList(images, [tuple(size) for size in valid_sizes])
    with without_chance(detector):
        return detector.losses(batch, instances)


@contextmanager
def without_chance(detector: CoDETR):
    """Let nothing in the losses depend on random numbers within a ``with`` block, see
    :func:`losses`.
    """
    changes: list[tuple[Any, dict[str, Any]]] = []
    if detector.denoising is not None:
        changes.append((detector.denoising, {"label_noise": 0.0, "box_noise": 0.0}))
    if detector.positive_queries is not None:
        changes.append((detector.positive_queries, {"random": False}))
    for head in detector.auxiliary_heads:
        if isinstance(head, FasterRCNNHead):
            changes += [(each.sampler, {"samples": None}) for each in (head, head.rpn)]
    before = [(owner, {key: getattr(owner, key) for key in new}) for owner, new in changes]
    try:
        _set(changes)
        yield
    finally:
        _set(before)


def _set(changes: Sequence[tuple[Any, dict[str, Any]]]) -> None:
    for owner, values in changes:
        for key, value in values.items():
            setattr(owner, key, value)

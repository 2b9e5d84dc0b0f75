"""Detectron2's inference for images of any size, as ``torch.export`` can record it.

Detectron2 decides by the sizes of the moment (is any box invalid, are there boxes on this level,
how many candidates are there), which a recorded graph cannot. :func:`symbolic_sizes` replaces those
few functions by ones that compute the same for all sizes, zero included.

Letters: R boxes, K classes, Hi and Wi size of level i, A anchors per position, S pooled side.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch._meta_registrations
import torch.fx.experimental._config
import torch.nn.functional as F
import torchvision.ops.boxes
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch._library.fake_impl import FakeImplCtx
from torch._prims_common import is_contiguous_or_false
from torch._subclasses import fake_impls
from torch.fx.experimental.symbolic_shapes import has_hint
from torchvision.ops import nms

from d2dense.layers import missing
from d2dense.modeling.detr.soft_nms import one_round

__all__ = ["symbolic_sizes"]

Size = tuple[int, int]

_attend = F.scaled_dot_product_attention
_slice_index = fake_impls._compute_slice_index

_RPN = "detectron2.modeling.proposal_generator"
_BOXES = "detectron2.modeling.roi_heads.fast_rcnn"


@contextmanager
def symbolic_sizes() -> Iterator[None]:
    """Let Detectron2's models in evaluation be recorded with symbolic sizes, one image a time."""
    with ExitStack() as stack:
        stack.enter_context(torch.fx.experimental._config.patch(backed_size_oblivious=True))
        for target, attribute, replacement in (
            (ImageList, "from_tensors", staticmethod(_one_image)),
            (Boxes, "__init__", _set_boxes),
            (Boxes, "clip", _clip),
            (ROIPooler, "forward", _pool),
            (torchvision.ops.boxes, "batched_nms", _nms_by_offset),
            (sys.modules[one_round.__module__], "_decay", _decay_in_loop),
            *_replacements_in_timm(),
            # PyTorch's, most of them private:
            # of how many boxes torchvision says that non-maximum suppression keeps at least two
            (FakeImplCtx, "create_unbacked_symint", FakeImplCtx.new_dynamic_size),
            # crops get a size that nobody knows
            (fake_impls, "_compute_slice_index", _index_within),
            # is it contiguous already
            (Tensor, "contiguous", _contiguous),
            # the layout of a convolution's result depends on whether sides are 1
            (torch._C, "_conv_determine_backend_memory_format", lambda *_: None),
            # sides of what is pooled: are they divisible
            (torch._meta_registrations, "div_rtn", operator.floordiv),
            # are there any regions
            (F, "batch_norm", _normalize),
            # ONNX has these for four axes, and for one size, only
            (F, "scaled_dot_product_attention", _attend_with_heads),
            (F, "adaptive_avg_pool2d", _average),
        ):
            stack.enter_context(mock.patch.object(target, attribute, replacement))
        for name, replacement in (
            ("detectron2.modeling.anchor_generator._create_grid_offsets", _grid_offsets),
            (f"{_RPN}.rpn.find_top_rpn_proposals", _find_proposals),
            (f"{_BOXES}.fast_rcnn_inference_single_image", _detections),
            ("detectron2.modeling.meta_arch.dense_detector.permute_to_N_HWA_K", _rows_of_anchors),
            ("d2dense.modeling.batched_cascade.pool_lists", _pool_lists),
            ("d2dense.modeling.necks.pyramid._resized", _resized),
            # the builtin turns a symbolic size into a number
            ("detectron2.structures.instances.len", _length),
            ("detectron2.modeling.roi_heads.mask_head.len", _length),
            ("detectron2.modeling.roi_heads.fast_rcnn.len", _length),
        ):
            stack.enter_context(mock.patch(name, replacement, create=name.endswith(".len")))
        yield


def _replacements_in_timm() -> tuple[tuple[type, str, Callable], ...]:
    if "timm" not in sys.modules:  # no part of the model is of it
        return ()
    from .symbolic_timm import REPLACEMENTS

    return REPLACEMENTS


def _length(x) -> int:
    return x.__len__()


def _normalize(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm in evaluation by the operator below, which does not ask if there are regions."""
    assert not training
    return torch.ops.aten._native_batch_norm_legit_no_training(
        x, weight, bias, running_mean, running_var, momentum, eps
    )[0]


def _index_within(size: int, index: int) -> int | None:
    """Take a slice's end for one within the map where it is so for the recorded image, and let the
    file assert that it is for others; PyTorch gives such a slice a size that nobody knows.
    """
    found = _slice_index(size, index)
    if found is None and has_hint(size) and has_hint(index) and 0 <= _hint(index) <= _hint(size):
        torch._check(index >= 0)
        torch._check(index <= size)
        return index
    return found


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Copy also where the map would stay as it is for some sizes; which is asked for every size."""
    if memory_format is torch.contiguous_format and is_contiguous_or_false(x):
        return x
    return x.clone(memory_format=memory_format)


def _hint(size: int) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _attend_with_heads(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
    """Attention of one head, ``(N, T, C)``, as that of several: ONNX has it for four axes only."""
    if query.ndim != 3:
        return _attend(query, key, value, *args, **kwargs)
    heads = (each[:, None] for each in (query, key, value))
    return _attend(*heads, *args, **kwargs)[:, 0]


def _one_image(
    tensors: Sequence[Tensor],
    size_divisibility: int = 0,
    pad_value: float = 0.0,
    padding_constraints: dict[str, int] | None = None,
) -> ImageList:
    (image,) = tensors
    constraints = padding_constraints or {}
    divisor = max(1, constraints.get("size_divisibility", size_divisibility))
    square = constraints.get("square_size", 0)
    height, width = image.shape[-2:]
    bottom, right = (
        (square or side) + missing(square or side, divisor) - side for side in (height, width)
    )
    padded = F.pad(image, (0, right, 0, bottom), value=pad_value)
    return ImageList(padded[None], [(height, width)])


def _grid_offsets(
    size: Size, stride: int, offset: float, target_device_tensor: Tensor
) -> tuple[Tensor, Tensor]:
    """Detectron2's ``_create_grid_offsets``, whose ``arange`` counts in floating point."""
    y, x = (
        (torch.arange(side, device=target_device_tensor.device) + offset) * stride for side in size
    )
    y, x = torch.meshgrid(y, x, indexing="ij")
    return x.flatten().to(torch.float32), y.flatten().to(torch.float32)


def _rows_of_anchors(maps: Tensor, values: int) -> Tensor:
    """Detectron2's ``permute_to_N_HWA_K``, with a copy always: where the recorded layout needs
    none, what ONNX is made of has another layout.
    """
    images, _, height, width = maps.shape
    rows = maps.view(images, -1, values, height, width).permute(0, 3, 4, 1, 2)
    return rows.clone(memory_format=torch.contiguous_format).view(images, -1, values)


def _set_boxes(self: Boxes, tensor: Tensor) -> None:
    self.tensor = tensor.to(torch.float32)


def _clip(self: Boxes, size: Size) -> None:
    height, width = size
    x, y = self.tensor[:, 0::2].clamp(0, width), self.tensor[:, 1::2].clamp(0, height)
    self.tensor = torch.stack((x, y), dim=-1).flatten(1)


def _finite(boxes: Tensor, scores: Tensor) -> Tensor:
    return torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores)


def _nms_by_offset(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """torchvision's ``batched_nms`` as it does few boxes; for many it goes group by group, which
    differs by rounding only.
    """
    # the greatest coordinate, and something where there are no boxes
    far = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
    return nms(boxes + (groups.to(boxes) * far)[:, None], scores, iou_threshold)


def _find_proposals(
    proposals: list[Tensor],
    logits: list[Tensor],
    image_sizes: list[Size],
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
) -> list[Instances]:
    """Detectron2's ``find_top_rpn_proposals`` of one image."""
    assert not training
    boxes, scores = [], []
    for of_level, logits_of_level in zip(proposals, logits):
        best, index = logits_of_level[0].topk(torch.sym_min(logits_of_level.shape[1], pre_nms_topk))
        boxes.append(of_level[0][index])
        scores.append(best)
    levels = torch.cat([torch.full_like(s, k, dtype=torch.int64) for k, s in enumerate(scores)])
    boxes, scores = Boxes(torch.cat(boxes)), torch.cat(scores)
    finite = _finite(boxes.tensor, scores)
    boxes.clip(image_sizes[0])
    there = (finite & boxes.nonempty(threshold=min_box_size)).nonzero()[:, 0]
    found, scores, levels = boxes.tensor[there], scores[there], levels[there]
    keep = _nms_by_offset(found.float(), scores, levels, nms_thresh)[:post_nms_topk]
    result = Instances(image_sizes[0])
    result.proposal_boxes, result.objectness_logits = Boxes(found[keep]), scores[keep]
    return [result]


def _detections(
    boxes: Tensor,
    scores: Tensor,
    image_shape: Size,
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[Instances, Tensor]:
    """Detectron2's ``fast_rcnn_inference_single_image``; boxes ``(R, 4)`` or ``(R, K * 4)``, scores
    ``(R, K + 1)``.
    """
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    scores = scores[:, :-1]
    kinds = boxes.shape[1] // 4
    boxes = Boxes(boxes.reshape(-1, 4))
    boxes.clip(image_shape)
    boxes = boxes.tensor.view(-1, kinds, 4)
    region, classes = ((scores > score_thresh) & finite[:, None]).nonzero().unbind(dim=1)
    boxes = boxes[region, classes if kinds > 1 else 0]
    scores = scores[region, classes]
    keep = _nms_by_offset(boxes.float(), scores, classes, nms_thresh)
    if topk_per_image >= 0:
        keep = keep[:topk_per_image]
    found = Instances(image_shape)
    found.pred_boxes, found.scores = Boxes(boxes[keep]), scores[keep]
    found.pred_classes = classes[keep]
    return found, region[keep]


def _average(x: Tensor, output_size: int | Sequence[int]) -> Tensor:
    """Adaptive average pooling by a matrix for each side; ONNX has it for one size only."""
    sizes = (output_size, output_size) if isinstance(output_size, int) else output_size
    rows, columns = (_windows(x, dim, size) for dim, size in zip((-2, -1), sizes))
    return rows @ x @ columns.mT


def _windows(x: Tensor, dim: int, size: int) -> Tensor:
    """Return a matrix ``(size, length)`` whose rows average over windows along ``dim``."""
    length = x.shape[dim]
    first, last = _ends(x, length, size)
    place = torch.arange(length, device=x.device)
    inside = ((place >= first[:, None]) & (place <= last[:, None])).to(x.dtype)
    return inside / (last - first + 1)[:, None]


def _ends(x: Tensor, length: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the first and the last place of each of ``size`` windows, as adaptive pooling cuts."""
    place = torch.arange(size, device=x.device)
    return place * length // size, ((place + 1) * length + size - 1) // size - 1


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """Pyramids' ``resize`` in the direction of the recorded image; levels that are larger for one
    image are never smaller for another.
    """
    sizes = like.shape[-2:]
    if _hint(x.shape[-2]) < _hint(sizes[0]) or _hint(x.shape[-1]) < _hint(sizes[1]):
        return F.interpolate(x, size=sizes, mode="nearest")
    for dim, size in zip((-2, -1), sizes):
        x = _largest_of_windows(x, dim, size)
    return x


def _largest_of_windows(x: Tensor, dim: int, size: int) -> Tensor:
    """Adaptive max pooling along ``dim``."""
    before = x.shape[dim]
    first, last = _ends(x, before, size)
    # a window of the ratio r has r + 1 places at most; a place twice changes nothing
    ratio = -(-_hint(before) // _hint(size))
    rows = (torch.minimum(first + k, last) for k in range(ratio + 1))
    return functools.reduce(torch.maximum, (x.index_select(dim, each) for each in rows))


def _decay_in_loop(scores: Tensor, decay: Tensor, min_score: float) -> Tensor:
    """The rounds of soft suppression as a loop of the graph."""
    return while_loop(
        lambda scores, left, taken: left.any(),
        lambda scores, left, taken: one_round(scores, left, taken, decay, min_score),
        (scores, scores >= min_score, torch.zeros_like(scores)),
    )[2]


def _pool_lists(pooler: ROIPooler, levels: list[Tensor], boxes: list[Tensor]) -> Tensor:
    return pooler(levels, [Boxes(each) for each in boxes])


def _pool(self: ROIPooler, levels: list[Tensor], boxes: list[Boxes]) -> Tensor:
    """Detectron2's ``ROIPooler.forward`` of one image, ``(R, C, S, S)``."""
    (found,) = boxes
    rois = F.pad(found.tensor, (1, 0))  # the number of the image, 0
    if len(self.level_poolers) == 1:
        return self.level_poolers[0](levels[0], rois)
    assigned = assign_boxes_to_levels(
        boxes, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
    )
    pooled = levels[0].new_zeros(rois.shape[0], levels[0].shape[1], *self.output_size)
    for number, (pooler, level) in enumerate(zip(self.level_poolers, levels)):
        rows = (assigned == number).nonzero()[:, 0]
        pooled = pooled.index_put((rows,), pooler(level, rois[rows]))
    return pooled

"""Size and cost of a model: parameters, multiply-accumulates, structure."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2dense.layers import can_fold, fold_for_inference
from d2dense.modeling import SemanticInference

__all__ = ["analyze", "count_macs", "count_parameters", "detection_input", "format_report"]


_STRIDE = 32  # of the coarsest maps that backbones make; coarser levels need no such size
# Products of activations with activations; those with weights are other operators.
_ATTENTION = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters under each module name; ``""`` is the whole model.

    Buffers are not counted, so Detectron2's frozen batch norms add nothing. Shared parameters count
    once.
    """
    return {
        name: sum(p.numel() for p in module.parameters()) for name, module in model.named_modules()
    }


def detection_input(height: int, width: int, device: str = "cpu") -> list[dict[str, Any]]:
    """Return a Detectron2 batch of one noise image, (3, height, width), always the same one."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return [{"image": image.to(device), "height": height, "width": width}]


@contextmanager
def _all_proposals(model: nn.Module) -> Iterator[None]:
    """Let a two-stage detector see as many proposals as it takes at most, whatever its weights.

    Untrained weights give a few, or a random number; the second stage's cost is proportional.
    """
    generator: Any = getattr(model, "proposal_generator", None)
    counts = getattr(generator, "post_nms_topk", None)
    if not isinstance(counts, dict):
        yield
        return

    def replace(module: nn.Module, args: tuple, output: Any) -> Any:
        images = args[0]
        boxes = [_spread_boxes(counts[False], size) for size in images.image_sizes]
        return [each.to(images.device) for each in boxes], {}

    handle = generator.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _all_detections(model: nn.Module) -> Iterator[None]:
    """Let mask and keypoint branches see as many detections as there are at most."""
    heads: Any = getattr(model, "roi_heads", None)
    predictor = getattr(heads, "box_predictor", None)
    if isinstance(predictor, nn.ModuleList):
        predictor = predictor[-1]
    count = getattr(predictor, "test_topk_per_image", -1)
    if count < 0 or not hasattr(heads, "forward_with_given_boxes"):
        yield
        return
    given = heads.forward_with_given_boxes

    def replace(features: Any, detections: list[Instances]) -> Any:
        return given(features, [_spread_detections(count, each) for each in detections])

    heads.forward_with_given_boxes = replace  # hides the method of the class
    try:
        yield
    finally:
        del heads.forward_with_given_boxes


def _spread_detections(count: int, like: Instances) -> Instances:
    """Return detections of class 0 with the boxes of :func:`_spread_boxes`."""
    device = like.pred_boxes.device
    found = Instances(like.image_size)
    found.pred_boxes = _spread_boxes(count, like.image_size).proposal_boxes.to(device)
    found.scores = torch.ones(count, device=device)
    found.pred_classes = torch.zeros(count, dtype=torch.int64, device=device)
    return found


def _spread_boxes(count: int, size: tuple[int, int]) -> Instances:
    """Return boxes of all positions and sizes within an image of (height, width)."""
    numbers = torch.rand(count, 4, generator=torch.Generator().manual_seed(0))
    low = numbers[:, :2]
    high = low + (1 - low) * numbers[:, 2:]
    scale = torch.tensor([size[1], size[0]] * 2)
    proposals = Instances(size)
    proposals.proposal_boxes = Boxes(torch.cat([low, high], dim=1) * scale)
    proposals.objectness_logits = torch.zeros(count)
    return proposals


@contextmanager
def _whole_image(model: nn.Module) -> Iterator[None]:
    """Let a segmenter see the image once: windows and scales belong to a test, not to it."""
    inference = getattr(model, "inference", None)
    if not isinstance(inference, SemanticInference):
        yield
        return
    model.inference = SemanticInference()
    try:
        yield
    finally:
        model.inference = inference


@contextmanager
def _unfilled(model: nn.Module) -> Iterator[None]:
    """Let a backbone take the image at its size, rounded up to the stride of its coarsest maps: to
    fill batches up further is the choice of a recipe and no part of published costs.
    """
    backbone: Any = getattr(model, "backbone", None)
    multiple = getattr(backbone, "_size_divisibility", 0)
    if multiple <= _STRIDE:
        yield
        return
    backbone._size_divisibility = _STRIDE
    try:
        yield
    finally:
        backbone._size_divisibility = multiple


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient: torch's counter of operators does not know a view of one
    that a module returns, such as learned queries for all images.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@torch.no_grad()
def count_macs(model: nn.Module, inputs: Any, *, attention: bool = True) -> dict[str, int]:
    """Return the multiply-accumulates of one forward pass under each module name; ``""`` is the
    whole model.

    Counted are convolutions, matrix products and attention, in eval mode; normalisation,
    activations, resampling, RoIAlign and NMS are not. A two-stage detector gets its largest number
    of proposals, and its mask branch the largest number of detections; a segmenter sees the image
    once. The image is filled up to multiples of 32 pixels at most.

    Args:
        attention: count products of activations with activations too. The counters behind most
            published figures only see layers with weights.
    """
    was_training = model.training
    counter = FlopCounterMode(display=False)
    model.eval()
    try:
        # fused attention is counted on some devices only, its parts on all
        with (
            _all_proposals(model),
            _all_detections(model),
            _whole_image(model),
            _unfilled(model),
            _without_gradients(model),
            sdpa_kernel(SDPBackend.MATH),
            counter,
        ):
            model(inputs)
    finally:
        model.train(was_training)
    root = type(model).__name__
    table = {}
    for name, operators in counter.get_flop_counts().items():
        # the counter prefixes every name with the root's class name and reports two operations per
        # MAC
        counted = sum(
            count
            for operator, count in operators.items()
            if attention or operator not in _ATTENTION
        )
        key = "" if name in ("Global", root) else name.removeprefix(f"{root}.")
        table[key] = counted // 2
    for name, module in reversed(list(model.named_modules())):
        # a container whose forward is never called costs what its children cost
        parts = [f"{name}.{child}" for child, _ in module.named_children()]
        if name not in table and any(part in table for part in parts):
            table[name] = sum(table.get(part, 0) for part in parts)
    return table


def analyze(
    model: nn.Module,
    *,
    tasks: Collection[str],
    input_size: tuple[int, int],
    device: str = "cpu",
    attention: bool = True,
) -> dict[str, Any]:
    """Return a JSON-ready report with ``params``, ``macs``, ``structure`` as asked for in
    ``tasks``.

    The model is taken as inference needs it: layers that can be folded are (in a copy), and
    ``params_training`` says how many parameters there are without that, where it matters.

    Args:
        tasks: any of ``params``, ``flops``, ``structure``.
        input_size: (height, width) of the image behind ``macs``, batch 1.
        attention: see :func:`count_macs`.
    """
    report: dict[str, Any] = {"input_size": list(input_size)}
    modules: dict[str, dict[str, int]] = {}
    in_training = count_parameters(model)[""]
    if can_fold(model):
        model = fold_for_inference(copy.deepcopy(model))
    if "params" in tasks:
        counts = count_parameters(model)
        report["params"] = counts[""]
        if in_training != counts[""]:
            report["params_training"] = in_training
        for name, count in counts.items():
            modules.setdefault(name, {})["params"] = count
    if "flops" in tasks:
        inputs = detection_input(*input_size, device=device)
        counts = count_macs(model, inputs, attention=attention)
        report["macs"] = counts[""]
        for name, count in counts.items():
            modules.setdefault(name, {})["macs"] = count
    if modules:
        report["modules"] = modules
    if "structure" in tasks:
        report["structure"] = str(model)
    return report


def format_report(report: dict[str, Any], *, depth: int = 2) -> str:
    """Return the report as text; modules deeper than ``depth`` are left out, the whole model is
    always there.
    """
    parts = []
    if "modules" in report:
        rows = [
            (name or "(whole model)", *(_thousands(row.get(key)) for key in ("params", "macs")))
            for name, row in report["modules"].items()
            if (not name or name.count(".") < depth) and any(row.values())
        ]
        height, width = report["input_size"]
        headers = ["module", "parameters", f"MACs ({height} x {width})"]
        parts.append(tabulate(rows, headers=headers, stralign="right", colalign=("left",)))
    if "params_training" in report:
        parts.append(f"{_thousands(report['params_training'])} parameters in training")
    if "structure" in report:
        parts.append(report["structure"])
    return "\n\n".join(parts)


def _thousands(value: int | None) -> str:
    return "" if value is None else f"{value:,}"

"""Co-Deformable-DETR and Co-DINO on ResNet-50: inference beside the machine's time for the same
products of matrices alone, training with 0, 1 and 2 auxiliary heads, and what takes the time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from d2dense import benchmark, config, matmul_floor
from d2dense.errors import ToolParser, one_or_more, run_tool
from d2dense.layers import Linear, deformable_attention, fold_frozen_norms
from d2dense.layers.deformable_benchmark import plain_formula
from d2dense.modeling.detr import selection
from d2dense.stopwatch import Stopwatch

MODELS = {
    "Co-Deformable-DETR": "CoDETR/co_deformable_detr_r50_1x",
    "Co-DINO": "CoDETR/co_dino_5scale_r50_1x",
}
FLOOR = "products of matrices alone"
OURS = "K = 2"
_AIMS = {"Co-Deformable-DETR": 1.2, "Co-DINO": 1.3}
_OBJECTS = 7  # in an image of COCO
_aten = torch.ops.aten
_ATTENTION = {  # what torch's counter leaves out on the CPU
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q, k, v)
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, v, *__, **___: (
        # five products instead of two
        sdpa_flop_count(q, k, v) * 5 // 2
    ),
}


def build(name: str, heads: int, device: str) -> nn.Module:
    """Return the detector with the last ``heads`` of its auxiliary heads, the same each time."""
    cfg = config.load(MODELS[name])
    node = cfg.model
    chosen = list(node.auxiliary_heads)
    node.auxiliary_heads = chosen[len(chosen) - heads :]
    node.positive_queries.heads = heads
    torch.manual_seed(0)
    model = config.build_model(cfg, device=device)
    return model.to(memory_format=torch.channels_last)


def inputs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return noise with boxes."""
    height, width = args.size
    draw = torch.Generator().manual_seed(0)
    images = []
    for _ in range(args.batch):
        corners = torch.rand(_OBJECTS, 2, 2, generator=draw).sort(dim=1).values
        boxes = (corners * torch.tensor([width, height])).flatten(1)
        boxes[:, 2:] += 8
        classes = torch.randint(0, 10, (_OBJECTS,), generator=draw)
        fields = {"gt_boxes": Boxes(boxes), "gt_classes": classes}
        image = torch.randint(0, 256, (3, height, width), generator=draw).float()
        images.append({"image": image, "instances": Instances((height, width), **fields)})
    return images


def inference(model: nn.Module, images: list[dict[str, Any]], *, fold: bool = True) -> Callable:
    """Return a call that detects."""
    model.eval().requires_grad_(False)
    if fold:
        fold_frozen_norms(model)

    @torch.no_grad()
    def call():
        return model(images)

    return call


def training_step(
    model: nn.Module, images: list[dict[str, Any]], watch: Stopwatch | None = None
) -> Callable[[], None]:
    """Return forward, backward and AdamW's step."""
    model.train()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    timed = watch.part if watch else mock.MagicMock()

    def step():
        loss = sum(model(images).values())
        with timed("backward"):
            loss.backward()
        with timed("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def macs_and_memory(call: Callable) -> tuple[int, int]:
    """Return the multiply-accumulates of a call, backward included, and the bytes that it needs on
    top of what is there, with all threads.
    """
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        call()  # first: an optimizer's first step makes what it keeps
    return counter.get_total_flops() // 2, benchmark.peak_memory(call, forked=False)


def rows_of(
    name: str, times: dict[str, list[float]], base: str, macs: dict[str, int], **more: dict
) -> list[dict[str, Any]]:
    """Return a table row per variant."""
    ratios = benchmark.ratios(times, base)
    return [
        {
            "model": name,
            "variant": variant,
            "median s": statistics.median(values),
            "min s": min(values),
            f"time / {base}": ratios[variant],
            "GMAC": macs[variant] / 1e9,
            "GMAC / s": macs[variant] / 1e9 / min(values),
            **{heading: column.get(variant) for heading, column in more.items()},
        }
        for variant, values in times.items()
    ]


def measure_inference(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the time of the floor, and of detection with and without auxiliary heads."""
    images = inputs(args)
    calls = {f"K = {k}": inference(build(name, k, args.device), images) for k in (0, 2)}
    products = matmul_floor.collect_products(calls[OURS])
    macs = dict.fromkeys([*calls, FLOOR], matmul_floor.macs(products))
    calls[FLOOR] = matmul_floor.floor(products, device=args.device)
    times = benchmark.interleaved(calls, rounds=args.rounds)
    aims = dict.fromkeys([OURS], _AIMS[name])
    return rows_of(name, times, FLOOR, macs, aim=aims)


def measure_training(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return time and memory of a step by number of auxiliary heads."""
    images = inputs(args)
    calls, macs, memory = {}, {}, {}
    for k in (0, 1, 2):
        call = training_step(build(name, k, args.device), images)
        variant = f"K = {k}"
        macs[variant], peak = macs_and_memory(call)
        calls[variant], memory[variant] = call, peak / 2**20
    times = benchmark.interleaved(calls, rounds=max(args.rounds // 3, 1), warmup=0)
    return rows_of(name, times, "K = 0", macs, **{"peak MiB": memory})


def measure_gains(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the time of inference, training and matching, each beside a plainer way."""
    images, rounds = inputs(args), max(args.rounds // 3, 1)
    model = build(name, 2, args.device)
    usual = inference(build(name, 2, args.device), images)
    plain = {
        "sampling by the plain formula": mock.patch.object(
            deformable_attention, "deformable_sampling", plain_formula
        ),
        "bias and ReLU after the products": mock.patch.object(
            Linear, "is_fused", return_value=False
        ),
    }
    calls = {"inference": usual, **{title: _with(patch, usual) for title, patch in plain.items()}}
    calls["norms not folded"] = inference(build(name, 2, args.device), images, fold=False)
    groups = [calls, _matchings(model, images)]
    step = training_step(model, images)
    apart = mock.patch.object(model, "one_pass", False)
    groups.append({"training": step, "a decoder pass per head": _with(apart, step)})
    rows = []
    for variants in groups:
        base = next(iter(variants))
        times = benchmark.interleaved(variants, rounds=rounds, warmup=int(base != "training"))
        ratios = benchmark.ratios(times, base)
        for title, values in times.items():
            row = {"model": name, "of": base, "way": "ours" if title == base else title}
            rows.append({**row, "median s": statistics.median(values), "ratio": ratios[title]})
    return rows


def _with(patch: Any, call: Callable) -> Callable:
    def patched():
        with patch:
            call()

    return patched


def _matchings(model: nn.Module, images: list[dict[str, Any]]) -> dict[str, Callable]:
    """Return the matching of a step, all at once and for one layer and image at a time."""
    matcher, sets = model.criterion.matcher, []
    match = matcher.match

    def keep(given: list) -> Any:
        sets.extend(given)
        return match(given)

    with mock.patch.object(matcher, "match", keep):
        model.train()(images)
    sets = [(logits.detach(), boxes.detach(), targets) for logits, boxes, targets in sets]

    def one_by_one():
        for logits, boxes, targets in sets:
            for layer in range(len(logits)):
                for i in range(logits.shape[1]):
                    part = slice(layer, layer + 1), slice(i, i + 1)
                    target = targets._replace(
                        classes=targets.classes[i : i + 1],
                        boxes=targets.boxes[i : i + 1],
                        sizes=targets.sizes[i : i + 1],
                        counts=targets.counts[i : i + 1],
                    )
                    match([(logits[part], boxes[part], target)])

    return {"matching": lambda: match(sets), "one layer and image at a time": one_by_one}


def follow(model: nn.Module, watch: Stopwatch) -> None:
    """Count the parts of a detector from now on."""
    parts = [
        (model, "preprocess", "preprocessing"),
        (model.backbone, "forward", "backbone"),
        (model.neck, "forward", "neck"),
        (model.encoder, "forward", "encoder"),
        (model.queries, "forward", "query selection"),
        (model.queries, "encoder_predictions", "query selection"),
        (model.denoising, "forward", "denoising queries"),
        (model.decoder, "forward", "decoder"),
        (model.heads, "forward", "prediction heads"),
        (model.heads, "predict_boxes", "prediction heads"),
        (model.criterion, "forward", "losses"),
        (model.criterion, "known_losses", "losses"),
        (model.criterion.matcher, "match", "matcher"),
        (model, "select", "detections"),
        (model.adapter, "forward", "adapter"),
        (model.positive_queries, "select", "positive queries"),
        (model.positive_queries, "forward", "positive queries"),
        *((head, "losses", "auxiliary heads") for head in model.auxiliary_heads),
    ]
    for owner, method, name in parts:
        if owner is not None:
            setattr(owner, method, watch.timed(getattr(owner, method), name))


def measure_shares(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what share of inference and of a training step each part takes."""
    images, rows = inputs(args), {}
    for mode in ("inference", "training"):
        model, watch = build(name, 2, args.device), Stopwatch()
        if mode == "training":
            call = training_step(model, images, watch)
        else:
            call = inference(model, images)
        follow(model, watch)
        suppress = watch.timed(selection.soft_nms, "soft suppression")
        with mock.patch.object(selection, "soft_nms", suppress):
            call()
            watch.clear()
            with watch.part("the rest"):
                call()
        for part, share in watch.shares().items():
            rows.setdefault(part, {"model": name, "part": part})[f"{mode} %"] = 100 * share
    return list(rows.values())


def main(argv=None) -> None:
    parser = ToolParser(description=" ".join(__doc__.split()))
    parser.add_argument("--size", nargs=2, type=one_or_more, default=[512, 512], metavar=("H", "W"))
    parser.add_argument("--batch", type=one_or_more, default=1, help="images per call")
    parser.add_argument(
        "--rounds", type=one_or_more, default=5, help="of inference; a third of it for the rest"
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    benchmark.add_flags(parser)
    args = parser.parse_args(argv)
    parts = {
        "Inference": measure_inference,
        "Training": measure_training,
        "What it bought": measure_gains,
        "Shares of the time": measure_shares,
    }
    tables = {
        heading: [row for name in args.models for row in measure(name, args)]
        for heading, measure in parts.items()
    }
    script = f"python projects/CoDETR/tools/{Path(__file__).name}"
    if args.device == "cpu":
        command = f"{script} --device cuda --size 800 1333 --batch 2"
        tables["Full size on a GPU"] = [{"state": "not measured", "command": command}]
    height, width = args.size
    report = benchmark.write_report(
        args.output / f"codetr_{args.device}",
        title="Co-DETR's time, ResNet-50",
        command=f"{script} --rounds {args.rounds}",
        rows=tables,
        notes=[
            f"Batch {args.batch}, 3 x {height} x {width}, float32, channels_last, noise with "
            f"{_OBJECTS} boxes per image, untrained weights. inference: from the image to the "
            "detections, frozen norms folded. training: losses, backward and a step of AdamW.",
            f"{FLOOR}: every convolution (after im2col), linear layer and attention of inference "
            "as a product of random matrices of the same shape, and nothing in between.",
            "Variants take turns in one process; ratios are medians over rounds. GMAC counts "
            "convolutions and matrix products, of training with the backward pass; the sampling of "
            "deformable attention is none of them.",
            "peak MiB: memory on top of the model and the optimizer; on the CPU the process's.",
            "Shares: exclusive, of one call; a part's backward pass is in backward.",
        ],
    )
    print(report)


if __name__ == "__main__":
    sys.exit(run_tool(main))

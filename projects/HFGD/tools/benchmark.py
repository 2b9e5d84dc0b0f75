"""HFGD against SemanticFPN on one ResNet-50: time, MACs and memory as ratios; and one whole
Cityscapes image at output stride 2.

What HFGD adds are convolutions and products, so its time ratio should be at its MAC ratio.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2dense import benchmark, config
from d2dense.errors import ToolParser, one_or_more, run_tool
from d2dense.layers import fold_for_inference, replace_sync_norms

BASELINE = "SemanticFPN"
LARGE = "HFGD/hfgd_r50_os2_cityscapes"
NETWORKS = {
    BASELINE: ("HFGD/semantic_fpn_r50_pascal_context", []),
    "HFGD, OS 4": ("HFGD/hfgd_r50_os4_pascal_context", []),
    "HFGD, OS 4, no axial attention": (
        "HFGD/hfgd_r50_os4_pascal_context",
        ["model.sem_seg_head.axial_attention=false"],
    ),
    "HFGD, OS 2": ("HFGD/hfgd_r50_os4_pascal_context", ["model.sem_seg_head.out_stride=2"]),
}


class Network(nn.Module):
    """A segmenter between its normalised images and its head's losses or scores."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.backbone, self.head = model.backbone, model.sem_seg_head

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        scores, losses = self.head(self.backbone(images), targets)
        return sum(losses.values()) if self.training else scores


def build(name: str, overrides: list[str], device: str) -> Network:
    torch.manual_seed(0)
    with torch.device(device):
        model = Network(config.build_model(config.load(name, overrides), device=device))
    if device in ("cpu", "meta"):
        replace_sync_norms(model)
    return model


def training_step(model: Network, images: Tensor, targets: Tensor) -> Callable[[], None]:
    """Return forward, backward and a step of SGD."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step():
        model(images, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference(model: Network, images: Tensor, targets: Tensor | None = None) -> Callable[[], Any]:
    """Return the forward pass of the fine path, without gradients."""
    fold_for_inference(model.eval())

    @torch.no_grad()
    def call():
        return model(images)

    return call


def macs(make: Callable, name: str, overrides: list[str], shape: tuple[int, ...]) -> int:
    """Count on the meta device, where attention is plain products, which all are counted."""
    with torch.device("meta"):
        images = torch.empty(shape)
        targets = torch.empty(shape[0], *shape[2:], dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH):
        return benchmark.macs_of(make(build(name, overrides, "meta"), images, targets))


def measure(mode: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per network for ``training`` or ``inference``."""
    make = {"training": training_step, "inference": inference}[mode]
    shape = (args.batch, 3, *args.size)
    images = torch.randn(shape, device=args.device).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(0, 59, (args.batch, *args.size), device=args.device)
    calls, counts = {}, {}
    for label, (name, overrides) in NETWORKS.items():
        model = build(name, overrides, args.device).to(memory_format=torch.channels_last)
        calls[label] = make(model, images, targets)
        counts[label] = macs(make, name, overrides, shape)
    rows = benchmark.compare(
        calls, baseline=BASELINE, rounds=args.rounds, label="network", macs=counts
    )
    return [{"mode": mode, **row} for row in rows]


def measure_large(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return time and memory of one image at output stride 2."""
    model = build(LARGE, [], args.device).to(memory_format=torch.channels_last)
    shape = (1, 3, *args.large)
    images = torch.randn(shape, device=args.device).contiguous(memory_format=torch.channels_last)
    call = inference(model, images)
    peak = benchmark.peak_memory(call)
    times = benchmark.interleaved({LARGE: call}, rounds=1, warmup=int(args.device != "cpu"))
    height, width = (-(-side // 2) for side in args.large)
    heads = model.head.hfgm.attention.column.heads
    maps = 4 * heads * height * width * (height + width)  # bytes of both, if they were made
    count = macs(inference, LARGE, [], shape)
    return [
        {
            "network": LARGE,
            "image": " x ".join(map(str, args.large)),
            "s": times[LARGE][0],
            "GMAC": count / 1e9,
            "peak MiB": peak / 2**20,
            "attention maps MiB": maps / 2**20,
        }
    ]


def main(argv=None) -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs=2, type=one_or_more, default=[513, 513], metavar=("H", "W"))
    parser.add_argument("--batch", type=one_or_more, default=1, help="crops per call")
    parser.add_argument("--rounds", type=one_or_more, default=5)
    parser.add_argument(
        "--large",
        nargs=2,
        type=int,
        default=[1024, 2048],
        metavar=("H", "W"),
        help="size of the whole image; 0 0 leaves it out",
    )
    benchmark.add_flags(parser)
    args = parser.parse_args(argv)
    height, width = args.size
    tables = {
        "HFGD against SemanticFPN": [
            row for mode in ("inference", "training") for row in measure(mode, args)
        ]
    }
    if min(args.large) > 0:
        tables["A whole image at output stride 2"] = measure_large(args)
    report = benchmark.write_report(
        args.output / f"hfgd_{args.device}",
        title="HFGD against SemanticFPN, ResNet-50",
        command=f"{Path(__file__).name}, {args.rounds} rounds, networks in turns",
        rows=tables,
        notes=[
            f"Batch {args.batch}, 3 x {height} x {width}, 59 classes, float32, channels_last. "
            "inference: one forward pass up to scores of the image's size, CAR's features folded. "
            "training: forward, backward and a step of SGD, without the loading of data.",
            f"Ratios are to {BASELINE}; those of times are medians over rounds. GMAC counts "
            "convolutions and matrix products, attention and the backward pass included.",
            "peak MiB: memory on top of the model; on the CPU of a forked single-thread process. "
            "attention maps: what both layers' would take, had they been made.",
        ],
    )
    print(report)


if __name__ == "__main__":
    sys.exit(run_tool(main))

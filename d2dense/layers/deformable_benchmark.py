"""Time and memory of deformable sampling's ways beside the plain formula.

``python -m d2dense.layers.deformable_benchmark`` writes the table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2dense import benchmark
from d2dense.errors import ToolParser, one_or_more, run_tool

from .deformable_sampling import deformable_sampling, sample_by_grid

__all__ = ["main", "plain_formula"]

PLAIN, PURE, ORIGINAL = "plain formula", "pure PyTorch", "original operator (mmcv)"
FASTEST = {"cpu": "CPU operator", "cuda": "Triton"}
COMMAND = "python -m d2dense.layers.deformable_benchmark"

Way = Callable[[Tensor, Sequence[tuple[int, int]], Tensor, Tensor], Tensor]


def plain_formula(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Do what ``deformable_sampling`` does as it is usually written: sample every level, stack,
    weight, sum.
    """
    n, _, m, d = value.shape
    q = locations.shape[1]
    levels = value.split([height * width for height, width in shapes], dim=1)
    samples = []
    for level, (part, (height, width)) in enumerate(zip(levels, shapes)):
        image = part.permute(0, 2, 3, 1).reshape(n * m, d, height, width)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(n * m, q, -1, 2)
        samples.append(F.grid_sample(image, grid, padding_mode="zeros", align_corners=False))
    shares = weights.transpose(1, 2).reshape(n * m, 1, q, -1)
    total = (torch.stack(samples, dim=3).flatten(3) * shares).sum(dim=-1)  # (N M, D, Q)
    return total.view(n, m * d, q).transpose(1, 2)


def original_operator() -> Way | None:
    """Return Deformable DETR's CUDA operator as mmcv builds it, where it is installed."""
    try:
        from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
    except ImportError:
        return None

    def sample(value, shapes, locations, weights):
        sizes = torch.tensor(shapes, device=value.device)
        areas = sizes.prod(dim=1)
        kinds = (locations.to(value.dtype), weights.to(value.dtype))
        starts = areas.cumsum(dim=0) - areas
        return MultiScaleDeformableAttnFunction.apply(value, sizes, starts, *kinds, 64)

    return sample


def ways(device: str) -> dict[str, Way]:
    found: dict[str, Way] = {PLAIN: plain_formula, PURE: sample_by_grid}
    found[FASTEST[device]] = deformable_sampling
    original = original_operator() if device == "cuda" else None
    return found | ({ORIGINAL: original} if original else {})


def calls_of(way: Way, given: tuple, grad: Tensor) -> dict[str, Callable[[], Any]]:
    """Return forward alone, without a graph, and both directions."""
    value, shapes, locations, weights = given
    leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]

    @torch.no_grad()
    def forward():
        return way(*given)

    def both():
        return torch.autograd.grad(way(leaves[0], shapes, *leaves[1:]), leaves, grad)

    return {"forward": forward, "forward + backward": both}


def measure(device: str, dtype: torch.dtype, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per direction and way; the others compute ``dtype`` in float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(size, size) for size in args.sizes]
    n, q, m, d, points = args.batch, args.queries, args.heads, args.channels, args.points
    alike = (n, q, m, len(shapes), points)
    value = torch.randn(n, sum(h * w for h, w in shapes), m, d, generator=generator)
    locations = torch.rand(*alike, 2, generator=generator).to(device)
    weights = torch.rand(alike, generator=generator).to(device)
    grad = torch.randn(n, q, m * d, generator=generator).to(device)
    named = {}
    for name, way in ways(device).items():
        kind = dtype if name in (FASTEST[device], ORIGINAL) else torch.float32
        given = (value.to(device, kind), shapes, locations, weights)
        named[name] = calls_of(way, given, grad.to(kind))
    rows = []
    for direction in named[PLAIN]:
        calls = {name: both[direction] for name, both in named.items()}
        memory = {name: benchmark.peak_memory(call) for name, call in calls.items()}
        times = benchmark.interleaved(calls, rounds=args.rounds, warmup=2)
        rows += [
            {
                "type": str(dtype).removeprefix("torch."),
                "direction": direction,
                "way": name,
                "median ms": 1e3 * statistics.median(times[name]),
                "speed to plain": benchmark.ratios(times, name)[PLAIN],
                "extra MiB": memory[name] / 2**20,
                "memory to plain": memory[name] / memory[PLAIN],
            }
            for name in calls
        ]
    return rows


def main(argv=None) -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=one_or_more, default=2)
    parser.add_argument(
        "--sizes", type=one_or_more, nargs="+", default=[64, 32, 16, 8], help="of levels"
    )
    parser.add_argument("--queries", type=one_or_more, default=5440)
    parser.add_argument("--heads", type=one_or_more, default=8)
    parser.add_argument("--channels", type=one_or_more, default=32, help="of a head")
    parser.add_argument("--points", type=one_or_more, default=4)
    parser.add_argument("--rounds", type=one_or_more, default=9)
    parser.add_argument("--threads", type=one_or_more, default=2, help="of the CPU")
    benchmark.add_flags(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    kinds = [torch.float32]
    if args.device == "cuda":
        kinds += [torch.float16, torch.bfloat16]
    rows = [row for kind in kinds for row in measure(args.device, kind, args)]
    tables = {"CPU" if args.device == "cpu" else "GPU": rows}
    if args.device == "cpu":
        tables["GPU"] = [{"state": "not measured", "command": f"{COMMAND} --device cuda"}]
    name = "deformable_attention" + ("" if args.device == "cpu" else f"_{args.device}")
    report = benchmark.write_report(
        args.output / name,
        title="Multi-scale deformable attention: sampling and weighted sum",
        command=f"{COMMAND} --device {args.device} --rounds {args.rounds}",
        rows=tables,
        notes=[
            f"Batch {args.batch}, levels of {args.sizes} squared, {args.queries} queries, "
            f"{args.heads} heads of {args.channels} channels, {args.points} points per level, "
            "places drawn uniformly: the worst case for caches.",
            "The ways take turns in one process; speeds are medians over rounds of the plain "
            "formula's time divided by the way's in the same round, so they hold on a busy "
            "machine, and the times do not.",
            "extra MiB: the peak on top of the arguments, result and gradients included; on the "
            "CPU of a forked single-thread process.",
            "On a GPU the original operator is measured too if mmcv with its compiled operators "
            "is installed; torchvision and detectron2 have no such operator.",
        ],
    )
    print(report)


if __name__ == "__main__":
    sys.exit(run_tool(main))

"""What each of four processes does for the tests of the layers, all in one start."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2dense.layers import SyncBatchNorm, replace_sync_norms

CHANNELS = 3
# Images, height and width of the batch of each process.
SHAPES = {
    "equal": [(2, 4, 5)] * 4,
    "unequal": [(3, 4, 5), (1, 2, 7), (2, 1, 1), (4, 3, 3)],
    "one_empty": [(2, 3, 4), (0, 3, 4), (1, 1, 1), (3, 2, 2)],
    "one_element": [(0, 3, 4), (1, 1, 1), (0, 1, 1), (0, 1, 1)],
    "all_empty": [(0, 3, 4)] * 4,
    "large_mean": [(2, 4, 5)] * 4,
}
OPTIONS = {
    "plain": {},
    "cumulative": {"momentum": None},
    "not_affine": {"affine": False},
    "no_statistics": {"track_running_stats": False},
}
STEPS = 2


def batch(case: str, rank: int, step: int, dtype=torch.float64):
    """Return input and output gradient ``(N, C, H, W)`` of one process at one step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    n, height, width = SHAPES[case][rank]
    x, grad = torch.randn(2, n, CHANNELS, height, width, generator=generator, dtype=torch.float64)
    offset = 1000.0 if case == "large_mean" else torch.arange(3.0).view(1, 3, 1, 1)
    return (x * 2 + offset).to(dtype), grad.to(dtype)


def initialise(norm: nn.Module) -> nn.Module:
    if norm.weight is not None:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
            norm.bias.copy_(torch.tensor([0.5, 0.0, -1.0]))
    return norm


def run_case(case: str, group, dtype=torch.float64, **options) -> dict:
    """Run some steps, the norm's weights unchanged, and one evaluation."""
    norm = initialise(SyncBatchNorm(CHANNELS, process_group=group, dtype=dtype, **options))
    found = {"outputs": [], "gradients": []}
    for step in range(STEPS):
        x, grad = batch(case, dist.get_rank(), step, dtype)
        x.requires_grad_()
        y = norm(x)
        y.backward(grad)
        found["outputs"].append(y.detach())
        found["gradients"].append(x.grad)
    found["parameters"] = {name: p.grad for name, p in norm.named_parameters()}
    found["buffers"] = dict(norm.named_buffers())
    found["evaluated"] = norm.eval()(x).detach()
    return found


def in_bfloat16() -> dict:
    """Autocast gives the norm half precision; what it computes inside must be float32."""
    norm = initialise(SyncBatchNorm(CHANNELS))
    x = batch("large_mean", dist.get_rank(), 0, torch.bfloat16)[0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    y.float().square().sum().backward()
    found = {"outputs": y.detach(), "gradients": x.grad, "buffers": dict(norm.named_buffers())}
    return {**found, "weight": norm.weight.grad}


def wrapped() -> dict:
    """A model with PyTorch's norm, replaced and wrapped; note the gradients after one step."""
    torch.manual_seed(0)
    model = network(nn.SyncBatchNorm).double()
    count = replace_sync_norms(model)
    model = DistributedDataParallel(model, broadcast_buffers=False)
    x, _ = batch("equal", dist.get_rank(), 0)
    model(x).square().mean().backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters()}
    return {"count": count, "gradients": gradients, "buffers": dict(model.module.named_buffers())}


def network(norm) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), norm(4), nn.ReLU(), nn.Conv2d(4, 2, 1), norm(2))


def run(args) -> None:
    rank = comm.get_rank()
    pair = dist.new_group([0, 1])
    found = {}
    for case in SHAPES:
        found[case, 4, "plain"] = run_case(case, None)
        if rank < 2:
            found[case, 2, "plain"] = run_case(case, pair)
    for name, options in OPTIONS.items():
        found["unequal", 4, name] = run_case("unequal", None, **options)
    found["bfloat16"] = in_bfloat16()
    found["wrapped"] = wrapped()
    torch.save(found, Path(args.output_dir) / f"found{rank}.pth")

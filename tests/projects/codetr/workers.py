"""What each of two processes does for test_two_processes.py."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from tests.projects.codetr import tiny

# objects of the two images; the first process's may have none
CASES = {"both": (5, 2), "one": (0, 4), "none": (0, 0)}


def batch(case: str) -> list[dict]:
    return tiny.inputs(sizes=((64, 96), (64, 96)), counts=CASES[case])


def model() -> torch.nn.Module:
    """Nothing is drawn, and queries are positives only: their number would depend on what images
    are together.
    """
    heads = (
        lambda: tiny.rcnn(random_sampling=False, rpn={"random_sampling": False}),
        tiny.atss,
    )
    return tiny.detector(heads=heads, queries={"negatives": False})


def step(wrapped, samples) -> dict:
    """Losses, and gradients by name, of one step."""
    losses = wrapped(samples)
    sum(losses.values()).backward()
    bare = getattr(wrapped, "module", wrapped)
    return {
        "losses": {name: loss.detach() for name, loss in losses.items()},
        "gradients": {name: p.grad for name, p in bare.named_parameters()},
    }


def run(args) -> None:
    found = {}
    for case in CASES:
        mine = batch(case)[comm.get_rank() :][:1]
        found[case] = step(DistributedDataParallel(model()), mine)
    torch.save(found, Path(args.output_dir) / f"found{comm.get_rank()}.pth")

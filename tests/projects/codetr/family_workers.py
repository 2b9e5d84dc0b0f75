"""What each of two processes does for test_family_processes.py: steps as the trainer takes them."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.utils import comm

from d2dense.engine.parallel import Replicas
from d2dense.engine.settings import RunSettings
from tests.projects.codetr import family

SIZE = (64, 96)
BOXES = [[10, 20, 60, 50], [5, 5, 40, 60]]
# does each process have objects?
CASES = {"first": (True, False), "second": (False, True), "none": (False, False)}


def step(base, heads, case) -> dict:
    """Whether losses are numbers, and a sum that differs where any gradient does."""
    replicas = Replicas(RunSettings(output_dir="", max_iter=1, device="cpu"))
    model = family.detector(base, *heads)
    wrapped = replicas.wrap(model)
    boxes = BOXES if CASES[case][comm.get_rank()] else []
    losses = wrapped([family.image(*SIZE, boxes, seed=comm.get_rank())])
    sum(losses.values()).backward()
    replicas.check_gradients()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return {
        "finite": all(bool(each.isfinite().all()) for each in (*losses.values(), *gradients)),
        "sum": sum(float(each.double().abs().sum()) for each in gradients),
    }


def run(args) -> None:
    found = {}
    for base, heads in family.SETS:
        for case in CASES if len(heads) == 2 else ("first",):
            found["-".join((base, *heads, case))] = step(base, heads, case)
    torch.save(found, Path(args.output_dir) / f"found{comm.get_rank()}.pth")

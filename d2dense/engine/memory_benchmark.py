"""What each way of saving memory saves: peak memory of training steps, each in fresh processes.

``python -m d2dense.engine.memory_benchmark`` writes the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from d2dense import benchmark, config
from d2dense.errors import ToolParser, one_or_more, run_tool

from .launch import launch
from .parallel import build_parallel
from .recompute import enable_activation_checkpointing
from .settings import RunSettings
from .step import TrainStep

__all__ = ["Case", "main", "peak_memory"]

_STEPS = 2  # the optimizer makes its state in the first


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way of training.

    Attributes:
        images: per process and step.
        scale: factor on the sides of the images.
        settings: changes of the run's settings.
    """

    name: str
    images: int
    processes: int = 1
    scale: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)


def cases(images: int) -> list[list[Case]]:
    """Return the cases, in groups that are compared to their first."""
    amp = {"amp_enabled": True, "amp_dtype": "bfloat16"}
    recompute, parts = {"activation_checkpointing": True}, {"accumulation_steps": 2}
    half = images // 2
    alone = [
        Case(name="none", images=images),
        Case(name="bfloat16", images=images, settings=amp),
        Case(name="activation checkpointing", images=images, settings=recompute),
        Case(name="the batch in 2 parts", images=images, settings=parts),
        Case(name="these three", images=images, settings={**amp, **recompute, **parts}),
        Case(name="half the images", images=half),
        Case(name="sides of images halved", images=images, scale=0.5),
    ]
    shared = [
        Case(name=f"sharding {mode}", images=1, processes=2, settings={"sharding": mode})
        for mode in ("none", "zero1", "fsdp")
    ]
    return [alone, shared]


def peak_memory(case: Case, *, model: str, size: Sequence[int], device: str) -> int:
    """Return the bytes that building the model and training it for two steps need on top of what
    the process had before; the most of any process.

    On CUDA as the allocator counts them, on the CPU (Linux) as the largest resident size.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = argparse.Namespace(
            case=case,
            model=model,
            size=[round(side * case.scale) for side in size],
            device=device,
            folder=folder,
            num_gpus=case.processes,
            num_machines=1,
            machine_rank=0,
            dist_url="auto",
        )
        if case.processes == 1:
            mp.spawn(_alone, nprocs=1, args=(args,))
        else:
            launch(_train, args)
        found = [json.loads(file.read_text()) for file in Path(folder).iterdir()]
    return max(found)


def _alone(index: int, args: argparse.Namespace) -> None:
    _train(args)


def _train(args: argparse.Namespace) -> None:
    _start_counting(args.device)
    before = 0 if args.device == "cuda" else benchmark.process_memory("VmRSS")
    case = args.case
    settings = RunSettings(output_dir="", max_iter=_STEPS, device=args.device, **case.settings)
    model = _build_model(args.model, settings)
    parallel = build_parallel(settings)
    model = parallel.prepare(model)
    optimizer = parallel.build_optimizer(
        model, lambda each: torch.optim.AdamW(filter(_trainable, each.parameters()), lr=0.0)
    )
    step = TrainStep(model, optimizer, settings=settings, parallel=parallel)
    with EventStorage():  # detectron2's heads log into it
        batches = itertools.repeat(_batch(case.images // settings.accumulation_steps, args.size))
        for iteration in range(_STEPS):
            step(batches, iteration=iteration)
    peak = (
        torch.cuda.max_memory_allocated()
        if args.device == "cuda"
        else benchmark.process_memory("VmHWM")
    )
    Path(args.folder, str(comm.get_rank())).write_text(json.dumps(peak - before))


def _start_counting(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    torch.set_num_threads(1)
    benchmark.restart_process_peak()


def _trainable(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad


def _build_model(name: str, settings: RunSettings) -> torch.nn.Module:
    torch.manual_seed(0)
    model = config.build_model(config.load(name), device=settings.device).train()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            # the residual sums of an untrained net overflow otherwise
            module.weight.fill_(0.4)
    if settings.activation_checkpointing:
        enable_activation_checkpointing(model)
    return model


def _batch(images: int, size: Sequence[int]) -> list[dict[str, Any]]:
    height, width = size
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(images):
        corners = torch.rand(8, 2, 2, generator=generator).sort(dim=1).values
        boxes = corners.flatten(1) * torch.tensor([width, height, width, height])
        target = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=torch.arange(8))
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": target, "height": height, "width": width})
    return batch


def _compare(group: Sequence[Case], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per case of a group."""
    rows, first = [], None
    for case in group:
        row = {"lever": case.name, "processes": case.processes, "images each": case.images}
        rows.append(row)
        if args.device == "cuda" and case.processes > torch.cuda.device_count():
            row |= {"peak MiB": "not measured", "of the first": ""}
            continue
        size = peak_memory(case, model=args.config_file, size=args.size, device=args.device)
        first = first or size
        row |= {"peak MiB": round(size / 2**20), "of the first": size / first}
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config-file", default="FSCascade/faster_rcnn_r50_fpn_1x", metavar="F")
    add("--size", nargs=2, type=one_or_more, default=[480, 640], metavar=("H", "W"))
    add("--images", type=one_or_more, default=4, help="per step")
    benchmark.add_flags(parser)
    args = parser.parse_args(argv)
    # freed memory goes back to the system at once, so that the resident size is what is in use
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**16)
    rows = [row for group in cases(args.images) for row in _compare(group, args)]
    height, width = args.size
    report = benchmark.write_report(
        args.output / f"memory_levers_{args.device}",
        title=f"Memory levers, {args.config_file}",
        command=f"python -m d2dense.engine.memory_benchmark --images {args.images} "
        f"--size {height} {width} --device {args.device}",
        rows=rows,
        notes=[
            f"Images of {height} x {width} with 8 boxes, AdamW; the peak of building the model and "
            f"{_STEPS} steps in one process, over what the process had before.",
            "On the CPU it is the resident size of processes that compute on one thread; it holds "
            "the weights, gradients and optimizer state, and the scratch memory of convolutions.",
            "Sharding is compared to the row 'sharding none': two processes that hold everything.",
            "How much longer a step takes was not measured.",
        ],
    )
    print(report)


if __name__ == "__main__":
    sys.exit(run_tool(main))

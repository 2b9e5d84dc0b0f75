"""What the processes of the multi-process tests do; as a script it launches :func:`describe`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from d2dense.engine.launch import launch
from d2dense.engine.trainer import Trainer
from d2dense.errors import UserError, run_tool
from tests.engine.fakes import FakeExperiment, make_batches


def arguments(**changes) -> argparse.Namespace:
    defaults = {
        "num_gpus": 2,
        "num_machines": 1,
        "machine_rank": 0,
        "dist_url": "auto",
        "device": "cpu",
        "output_dir": "",
    }
    return argparse.Namespace(**{**defaults, **changes})


def train(args) -> None:
    """Train on two processes with accumulation; note how many gradient exchanges there were."""
    experiment = FakeExperiment(
        args.output_dir,
        batches=make_batches(8, 4),
        max_iter=3,
        accumulation_steps=2,
        clip_enabled=True,
        clip_type="full_model",
        clip_value=0.5,
        ema_enabled=True,
        ema_decay=0.5,
        best_metric="fake/score",
    )
    trainer = Trainer(experiment)
    exchanges = []

    def counting(state, bucket):
        exchanges.append(bucket.index())
        return default_hooks.allreduce_hook(state, bucket)

    trainer.step.model.register_comm_hook(dist.group.WORLD, counting)
    results = trainer.train()
    note = {"exchanges": len(exchanges), "results": results, "backend": dist.get_backend()}
    Path(args.output_dir, f"note{comm.get_rank()}.json").write_text(json.dumps(note))


def stop_early(args) -> None:
    """Every process must stop at the same step although only the main one has results.

    The layer that no loss depends on would end the second step without find_unused_parameters.
    """
    experiment = FakeExperiment(
        args.output_dir,
        script=[2.0, 1.0, 0.5],
        max_iter=50,
        eval_period=1,
        best_metric="fake/score",
        early_stop_patience=1,
        norm=True,
        unused=True,
        find_unused_parameters=True,
    )
    trainer = Trainer(experiment)
    trainer.train()
    Path(args.output_dir, f"note{comm.get_rank()}.json").write_text(str(trainer.completed))


def fail_on_the_second(args) -> None:
    if comm.get_rank() == 1:
        raise UserError("found one thing, expected another")
    comm.synchronize()


def crash(args) -> None:
    raise ZeroDivisionError("a defect of the program")


def count_threads(args) -> None:
    """Note how many threads this process computes with."""
    Path(args.output_dir, f"threads{comm.get_rank()}").write_text(str(torch.get_num_threads()))


def describe(args) -> None:
    note = {
        "rank": comm.get_rank(),
        "world": comm.get_world_size(),
        "local": comm.get_local_rank(),
        "sum": sum(comm.all_gather(comm.get_rank() + 1)),
    }
    Path(args.output_dir, f"note{comm.get_rank()}.json").write_text(json.dumps(note))


if __name__ == "__main__":
    sys.exit(run_tool(lambda: launch(describe, arguments(output_dir=os.environ["NOTES"]))))

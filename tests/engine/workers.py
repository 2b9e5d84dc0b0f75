"""What the processes of the multi-process tests do; as a script it launches :func:`describe`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from d2dense.engine.guard import NonFiniteError
from d2dense.engine.launch import launch
from d2dense.engine.signals import StopRequest
from d2dense.engine.trainer import Trainer
from d2dense.errors import UserError, run_tool
from tests.engine.fakes import FakeExperiment, TinyModel, make_batches


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


class RaisingOnTheSecond(TinyModel):
    def forward(self, batch):
        if self.training and comm.get_rank() == 1 and batch[0]["image_id"] == 5:
            raise FloatingPointError("Training has diverged.")
        return super().forward(batch)


def bad_on_the_second(args) -> None:
    """A NaN in the second process's share of the second batch, with each policy; then a forward
    pass that fails there.
    """
    notes = {}
    for name in ("raise", "skip", "forward"):
        batches = make_batches(6, 4)
        for each in (image for batch in batches for image in batch):
            each["file_name"] = f"photos/{each['image_id']}.jpg"
        if name != "forward":
            batches[1][3]["target"] = torch.tensor([float("nan"), 0.0])  # [1::2] of the batch
        experiment = FakeExperiment(
            Path(args.output_dir, name),
            batches=batches,
            test_names=(),
            max_iter=6,
            norm=True,
            non_finite_policy="raise" if name == "raise" else "skip",
        )
        if name == "forward":
            experiment.build_model = RaisingOnTheSecond
        trainer = Trainer(experiment)
        message, remember = "", Remember()
        try:
            trainer.register_hooks([remember])
            trainer.train()
        except NonFiniteError as error:
            message = str(error)
        after = {k: v.clone() for k, v in trainer.model.named_parameters()}
        notes[name] = {
            "completed": trainer.completed,
            "message": message,
            "skipped": trainer.step.guard.skipped,
            "moved": any(not torch.equal(after[k], v) for k, v in remember.weights.items()),
            "sum": sum(float(v.double().sum()) for v in after.values()),
        }
    Path(args.output_dir, f"note{comm.get_rank()}.json").write_text(json.dumps(notes))


class Remember(HookBase):
    """Keeps the weights from before the present step."""

    def before_step(self):
        self.weights = {k: v.clone() for k, v in self.trainer.model.named_parameters()}


class UnusedOnTheSecond(TinyModel):
    """No loss of the second process depends on one layer; those of the first do."""

    def __init__(self):
        super().__init__(unused=True)

    def forward(self, batch):
        losses = super().forward(batch)
        if self.training and comm.get_rank() == 0:
            losses["loss_more"] = self.unused(torch.ones(1, 1)).sum()
        return losses


def unused_on_the_second(args) -> None:
    experiment = FakeExperiment(args.output_dir, test_names=(), max_iter=6)
    experiment.build_model = UnusedOnTheSecond
    Trainer(experiment).train()


def fail_on_the_second(args) -> None:
    if comm.get_rank() == 1:
        raise UserError("found one thing, expected another")
    comm.synchronize()


def die_on_the_second(args) -> None:
    """One process is killed, as by a system that runs out of memory; the other is busy."""
    comm.synchronize()
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with StopRequest().listening():
        time.sleep(600)


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

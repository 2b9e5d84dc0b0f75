"""A training run that writes down the images it sees and is stopped at a chosen moment; its
function is importable, so that spawned processes find it.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import signal
from pathlib import Path

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from torch import nn

from d2dense.config import CLASS_COUNT_KEYS
from d2dense.engine import train_net
from d2dense.engine.guard import GuardedModel
from d2dense.engine.hooks import PeriodicEvaluation
from d2dense.engine.step import TrainStep
from tests.tools.tiny_detector import TinyDetector


class Crash(Exception):
    """Stands for whatever ends a run without a chance to save."""


CLASS_COUNT_KEYS["NoisyDetector"] = CLASS_COUNT_KEYS["TinyDetector"]


@META_ARCH_REGISTRY.register()
class NoisyDetector(TinyDetector):
    """Draws random numbers in its forward pass and keeps running statistics."""

    @configurable
    def __init__(self, *, num_classes: int):
        super().__init__(num_classes=num_classes)
        self.statistics = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.3)

    def forward(self, batch):
        if self.training:
            images = [self.statistics(each["image"][None].float())[0] for each in batch]
            batch = [
                {**each, "image": self.dropout(255 * image.sigmoid())}
                for each, image in zip(batch, images)
            ]
        return super().forward(batch)


def use_noisy_detector(lazy_config: str) -> None:
    """Let the lazy config of the tiny training build :class:`NoisyDetector`."""
    path = Path(lazy_config)
    text = path.read_text()
    assert "import TinyDetector" in text
    wanted = "from tests.tools.interrupted import NoisyDetector as TinyDetector"
    path.write_text(text.replace("from tests.tools.tiny_detector import TinyDetector", wanted))


def arguments(config_file, overrides, *, stream, processes=1, resume=False, stop=None, before=None):
    """Return what :func:`run` takes.

    Args:
        stream: beginning of the names of the files that :func:`run` notes the images in.
        stop: (moment, completed steps), or None for a run to the end.
        before: arguments of another run that the processes do first.
    """
    return argparse.Namespace(
        config_file=config_file,
        overrides=list(overrides),
        num_gpus=processes,
        num_machines=1,
        machine_rank=0,
        dist_url="auto",
        device="cpu",
        resume=resume,
        eval_only=False,
        stop=stop,
        before=before,
        stream=stream,
    )


def run(args: argparse.Namespace) -> None:
    """Train as the command line does, in one process of the run."""
    if args.before is not None:
        run(args.before)
    undo = _record(args)
    if args.stop is not None:
        undo += _STOPS[args.stop[0]](args.stop[1])
    try:
        train_net.run(args)
    finally:
        for owner, name, original in undo:
            setattr(owner, name, original)


def _patch(owner, name, make):
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    return [(owner, name, original)]


def _record(args):
    """Append file name and pixels of every image of this process to ``stream<rank>.txt``."""
    path = Path(f"{args.stream}{comm.get_rank()}")

    def make(forward):
        def recording(self, batch):
            with path.open("a") as file:
                for each in batch:
                    pixels = hashlib.sha1(each["image"].numpy().tobytes()).hexdigest()
                    file.write(f"{Path(each['file_name']).name} {pixels}\n")
            return forward(self, batch)

        return recording

    return _patch(GuardedModel, "forward", make)


def _in_step(completed):
    def make(call):
        def stopping(self, batches, *, iteration=0, stop=False):
            if iteration == completed:
                raise Crash
            return call(self, batches, iteration=iteration, stop=stop)

        return stopping

    return _patch(TrainStep, "__call__", make)


def _in_accumulation(completed):
    """Between two batches of the step after ``completed`` ones."""
    seen = {"batches": 0}

    def make(backward):
        def stopping(self, batch, *, is_last, stop):
            if is_last and seen["batches"] // self.accumulation_steps == completed:
                raise Crash
            seen["batches"] += 1
            return backward(self, batch, is_last=is_last, stop=stop)

        return stopping

    return _patch(TrainStep, "_backward", make)


def _after_evaluation(completed):
    """The results are there, the best checkpoint is not saved yet."""

    def make(judge):
        def stopping(self, value):
            if self.trainer.completed == completed:
                raise Crash
            return judge(self, value)

        return stopping

    return _patch(PeriodicEvaluation, "_judge", make)


def _by_signal(completed):
    """SIGTERM to the last process only, while it computes a step; the others must stop with it."""

    def make(call):
        def signalled(self, batches, *, iteration=0, stop=False):
            if iteration == completed - 1 and comm.get_rank() == comm.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
                stop = True  # the handler runs between two bytecodes: it has run by now
            return call(self, batches, iteration=iteration, stop=stop)

        return signalled

    return _patch(TrainStep, "__call__", make)


_STOPS = {
    "step": _in_step,
    "accumulation": _in_accumulation,
    "evaluation": _after_evaluation,
    "signal": _by_signal,
}


CLOCKS = {"data_seconds", "earlier_seconds"}


def assert_same(found, expected, where="checkpoint"):
    """Assert that two checkpoints hold the same values, bit for bit, measured times apart."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected.keys() - CLOCKS:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (one, two) in enumerate(zip(found, expected)):
            assert_same(one, two, f"{where}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found), where
    else:
        assert found == expected, where

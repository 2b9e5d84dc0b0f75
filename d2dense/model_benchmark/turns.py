"""Measure cells: their calls in turns, within a time limit, whatever some of them do."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from d2dense import benchmark, costs

from .cells import EXPORTED, FAILED, MEASURED, NOT_MEASURED, Cell, Settings, Turns
from .subjects import Subject

__all__ = ["OUT_OF_TIME", "Clock", "Report", "measure", "why"]

logger = logging.getLogger(__name__)

OUT_OF_TIME = "no time left (--minutes); --resume goes on"
# What a call may take, by that of inference of one image in single precision.
_TRAINING, _EXPORTING = 4.0, 5.0
_COMPILING = 60.0  # seconds
_WARMUPS = {"compiled": 1, EXPORTED + "torchscript": 2}  # that are not typical of later calls

# Takes what was found of a cell; nothing when it is tried, and no cell when turns begin.
Report = Callable[[Cell | None, Mapping[str, Any] | None], None]


class Clock:
    """How many seconds are left."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


def measure(
    turns: Turns,
    subjects: Mapping[str, Subject],
    settings: Settings,
    clock: Clock,
    known: dict[str, dict[str, Any]],
    report: Report,
) -> None:
    """Measure the cells of some turns and report each.

    Args:
        subjects: by name.
        known: by subject, what was found of it: ``params``, ``macs``, ``seconds`` of inference of
            one image; more is added.
    """
    calls: dict[Cell, Callable[[], Any]] = {}
    peaks: dict[Cell, int | None] = {}
    models: dict[tuple[str, bool], Any] = {}
    round_seconds = 0.0
    for cell in turns.cells:
        about = known.setdefault(cell.subject, {})
        expected = _expected(cell, about)
        needed = _expected_before(cell, about) + expected
        if clock.left < needed + turns.rounds * (round_seconds + expected):
            report(cell, {"state": NOT_MEASURED, "reason": OUT_OF_TIME})
            continue
        report(cell, None)
        try:
            call = _prepare(cell, subjects[cell.subject], settings, models, about)
            start = time.monotonic()
            peaks[cell] = _peak(call)
            seconds = time.monotonic() - start
        except Exception as error:  # of whatever library: it costs this cell alone
            report(cell, {"state": FAILED, "reason": why(error)})
            _free()
            continue
        calls[cell] = call
        round_seconds += seconds
        if cell.phase == "inference" and cell.batch == 1 and cell.mode == "eager":
            about.setdefault("seconds", seconds)
    report(None, None)
    rounds = min(turns.rounds, int(clock.left / max(round_seconds, 1e-9)))
    _take_turns(max(rounds, 1), calls, peaks, report)
    calls.clear()
    models.clear()
    _free()


def _expected(cell: Cell, about: Mapping[str, Any]) -> float:
    """Return the seconds that a call may take; 0 where nothing is known."""
    once = about.get("seconds", 0.0) * cell.batch
    return once * _TRAINING if cell.phase == "training" else once


def _expected_before(cell: Cell, about: Mapping[str, Any]) -> float:
    """Return the seconds that pass before the first call."""
    if cell.mode == "compiled":
        return _COMPILING
    if cell.mode.startswith(EXPORTED):
        return _EXPORTING * about.get("seconds", 0.0)
    return 0.0


def _take_turns(
    rounds: int,
    calls: Mapping[Cell, Callable[[], Any]],
    peaks: Mapping[Cell, int | None],
    report: Report,
) -> None:
    try:
        times = benchmark.interleaved(calls, rounds=rounds, warmup=0)
    except Exception as error:
        for cell in calls:
            report(cell, {"state": FAILED, "reason": f"in the rounds: {why(error)}"})
        return
    for cell, seconds in times.items():
        report(cell, {"state": MEASURED, "seconds": seconds, "peak": peaks[cell]})


def _peak(call: Callable[[], Any]) -> int | None:
    """Return the memory of a call; None on systems that do not say it."""
    try:
        return benchmark.peak_memory(call, forked=False)
    except OSError:
        call()
        return None


def _prepare(
    cell: Cell,
    subject: Subject,
    settings: Settings,
    models: dict[tuple[str, bool], Any],
    about: dict[str, Any],
) -> Callable[[], Any]:
    """Return the call of a cell, warmed up; models that cells share are kept in ``models``."""
    training = cell.phase == "training"
    key = subject.name, training
    if key not in models:
        model = subject.build(settings.size, settings.device, training=training)
        models[key] = model, _optimizer(model) if training else None
    model, optimizer = models[key]
    given, targets = subject.inputs(cell.batch, settings.size, settings.device)
    if "params" not in about and not training:
        about |= _costs(model, subject, settings)
    precision = partial(_precision, cell.precision, settings.device)
    if training:
        call = _step(partial(subject.loss, model, given, targets), optimizer, precision)
    else:
        run: Callable[[], Any] = partial(model, given)
        if cell.mode == "compiled":
            run = partial(torch.compile(model), given)
        elif cell.mode.startswith(EXPORTED):
            with torch.no_grad():
                run = subject.exported(model, given, cell.mode.removeprefix(EXPORTED))
        call = _inference(run, precision)
    for _ in range(_WARMUPS.get(cell.mode, 0) + (settings.device != "cpu")):
        call()
    return call


def _costs(model: nn.Module, subject: Subject, settings: Settings) -> dict[str, int | None]:
    """Return ``params``, and ``macs`` of one image, or None where an operator is in the way."""
    given, _ = subject.inputs(1, settings.size, settings.device)
    try:
        macs = costs.count_macs(model, given)[""]
    except (RuntimeError, NotImplementedError, TypeError) as error:
        logger.warning("no multiply-accumulates of %s: %s", subject.name, why(error))
        macs = None
    return {"params": sum(each.numel() for each in model.parameters()), "macs": macs}


def _precision(name: str, device: str) -> Any:
    if name == "fp32":
        return nullcontext()
    return torch.autocast(device, dtype=torch.bfloat16)


def _inference(run: Callable[[], Any], precision: Callable[[], Any]) -> Callable[[], Any]:
    @torch.no_grad()
    def call():
        with precision():
            run()

    return call


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW with its state; it leaves the weights as they are, so all steps are alike."""
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _step(
    loss: Callable[[], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    precision: Callable[[], Any],
) -> Callable[[], None]:
    """Return forward, backward and the optimizer's step."""

    def step():
        with EventStorage():  # detectron2's heads log into it
            with precision():
                total = loss()
            total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def why(error: BaseException) -> str:
    """Return an error's kind and first line, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""What a run reports: a storage that reads tensors only when asked, and where the values go."""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import os
import resource
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.events import (
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)
from fvcore.common.history_buffer import HistoryBuffer

__all__ = [
    "ConsoleWriter",
    "TensorStorage",
    "build_writers",
    "drop_rows_from",
    "max_memory_mb",
    "set_aside",
]

logger = logging.getLogger(__name__)

_LONGEST_ETA = 1e12  # seconds; a timedelta holds little more


class TensorStorage(EventStorage):
    """Detectron2's storage, except that tensors wait on their device until :meth:`flush`.

    ``put_scalar`` of the original reads a tensor at once, which makes the host wait for the GPU in
    every step and for every value. Histories are shorter, too: the original's million values of
    each scalar are gigabytes in the end.

    Args:
        start_iter: the first iteration.
        max_length: latest values that the history of a scalar keeps.
    """

    def __init__(self, start_iter: int = 0, *, max_length: int = 10_000):
        super().__init__(start_iter)
        self._history = defaultdict(lambda: HistoryBuffer(max_length=max_length))
        self._waiting: dict[tuple[str, bool], list[tuple[torch.Tensor, int]]] = defaultdict(list)
        self._restored: set[str] = set()

    def put_scalar(self, name, value, smoothing_hint=True, cur_iter=None) -> None:
        if not isinstance(value, torch.Tensor):
            self._put_number(name, value, smoothing_hint, cur_iter)
            return
        name = self._current_prefix + name
        cur_iter = self.iter if cur_iter is None else cur_iter
        # a copy: the original may change in place (a buffer), or be a view that keeps a large one
        self._waiting[name, smoothing_hint].append((value.detach().clone(), cur_iter))

    def flush(self, *, averaged: Sequence[str] = ()) -> None:
        """Read all waiting tensors, with one transfer per device.

        Args:
            averaged: names whose values are averaged over the processes; all of them must call
                this function at the same iteration. Only the main process keeps the result.
        """
        waiting, self._waiting = self._waiting, defaultdict(list)
        if not comm.is_main_process():  # nobody reads the rest here
            waiting = {key: values for key, values in waiting.items() if key[0] in averaged}
            self.clear_images()
            self.clear_histograms()
        tensors = [tensor for values in waiting.values() for tensor, _ in values]
        numbers = iter(_to_numbers(tensors))
        read = {
            key: {iteration: next(numbers) for _, iteration in values}
            for key, values in waiting.items()
        }
        averages = _average({name: read[name, hint] for name, hint in read if name in averaged})
        for (name, hint), values in read.items():
            for iteration, value in averages.get(name, values).items():
                self._put_number(name, value, hint, iteration)

    def _put_number(self, name: str, value: float, hint: bool, iteration: int | None) -> None:
        full = self._current_prefix + name
        if full in self._restored:  # the run may have been stopped to smooth it otherwise
            self._restored.remove(full)
            self._smoothing_hints[full] = hint
        super().put_scalar(name, value, smoothing_hint=hint, cur_iter=iteration)

    def recent(self, *, window: int, since: int) -> dict[str, dict[str, Any]]:
        """Return what reports to come still need: values of the ``window`` iterations that end with
        a scalar's last one where they are smoothed, else those after iteration ``since``.
        """
        result = {}
        for name, hint in self.smoothing_hints().items():
            history = self.history(name).values()
            oldest = history[-1][1] - window if hint else since
            values = [[v, int(i)] for v, i in history if i > oldest]
            if values:
                result[name] = {"smoothed": hint, "values": values}
        return result

    def restore(self, recent: Mapping[str, Mapping[str, Any]]) -> None:
        """Put back what :meth:`recent` returned."""
        for name, entry in recent.items():
            for value, iteration in entry.get("values", ()):
                self._put_number(name, value, entry["smoothed"], iteration)
            self._restored.add(name)


def set_aside(path: str | os.PathLike) -> None:
    """Rename the metrics file of an earlier run, ``metrics.json`` to ``metrics-1.json`` and so on,
    so that a new one does not go on in it.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size:
        names = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


def drop_rows_from(path: str | os.PathLike, iteration: int) -> None:
    """Remove the rows of ``iteration`` and later from a metrics file, and a half-written one."""
    path = Path(path)
    if not path.is_file():
        return
    kept = []
    lines = path.read_text(errors="replace").splitlines()
    for line in lines:
        try:
            if json.loads(line)["iteration"] < iteration:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the run was killed while it wrote this
    if len(kept) < len(lines):
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)


def _to_numbers(tensors: Sequence[torch.Tensor]) -> list[float]:
    """Read scalar tensors, in order, with one transfer per device."""
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        by_device[tensor.device].append(index)
    numbers = [0.0] * len(tensors)
    for indices in by_device.values():
        stacked = torch.stack([tensors[index].float().reshape(()) for index in indices])
        for index, value in zip(indices, stacked.tolist()):
            numbers[index] = value
    return numbers


def _average(local: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """Average ``name -> iteration -> value`` over the processes that have it; main process only."""
    if comm.get_world_size() == 1:
        return local
    collected: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for part in comm.gather(local):
        for name, values in part.items():
            for iteration, value in values.items():
                collected[name][iteration].append(value)
    return {
        name: {iteration: sum(found) / len(found) for iteration, found in values.items()}
        for name, values in collected.items()
    }


class ConsoleWriter(EventWriter):
    """Log one line with the progress of the training.

    Args:
        max_iter: iterations of the whole training.
        window: losses shown are medians over this many iterations.
    """

    def __init__(self, *, max_iter: int, window: int):
        self.max_iter = max_iter
        self.window = window

    def write(self) -> None:
        storage = get_event_storage()
        shown = storage.latest_with_smoothing_hint(self.window)
        latest = {name: value for name, (value, _) in shown.items()}
        # not the storage's, which is one ahead where a resumed run reports what it had done before
        _, iteration = shown["lr"]
        eta = datetime.timedelta(seconds=round(min(latest["eta_seconds"], _LONGEST_ETA)))
        losses = [f"{name} {latest[name]:.4g}" for name in sorted(latest) if "loss" in name]
        # the sum first: with several terms it is what one looks at
        losses.sort(key=lambda text: not text.startswith("total_loss"))
        logger.info(
            "iter %d/%d  eta %s  %s  lr %.4g  images/s %.4g  data %.4gs  step %.4gs  mem %.0fMB",
            iteration + 1,
            self.max_iter,
            eta,
            "  ".join(losses),
            latest["lr"],
            latest["images_per_second"],
            latest["data_time"],
            latest["time"],
            latest["max_mem_mb"],
        )


def max_memory_mb(device: str) -> float:
    """Return the peak memory of this process in MB: on the GPU for CUDA, else resident memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def build_writers(
    folder: str | os.PathLike, *, max_iter: int, window: int, go_on_from: int | None
) -> list[EventWriter]:
    """Return what writes the reports of a run: console, ``metrics.json`` and TensorBoard.

    Args:
        folder: of the run; created where it does not exist.
        max_iter: iterations of the whole training.
        window: iterations that reports smooth over.
        go_on_from: reports of this iteration and later are to be written again; None for a new run,
            which leaves those of an earlier one aside.
    """
    os.makedirs(folder, exist_ok=True)
    metrics = os.path.join(folder, "metrics.json")
    if go_on_from is None:
        set_aside(metrics)
    else:
        drop_rows_from(metrics, go_on_from)
    return [
        ConsoleWriter(max_iter=max_iter, window=window),
        JSONWriter(metrics, window_size=window),
        # what TensorBoard's writer holds back (two minutes by default), a killed run loses
        TensorboardXWriter(str(folder), window_size=window, purge_step=go_on_from, flush_secs=5),
    ]

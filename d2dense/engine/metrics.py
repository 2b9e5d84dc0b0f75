"""What a run reports: a storage that reads tensors only when asked, and the console line."""

from __future__ import annotations

import datetime
import logging
import resource
from collections import defaultdict
from collections.abc import Sequence

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

__all__ = ["ConsoleWriter", "TensorStorage", "max_memory_mb"]

logger = logging.getLogger(__name__)


class TensorStorage(EventStorage):
    """Detectron2's storage, except that tensors wait on their device until :meth:`flush`.

    ``put_scalar`` of the original reads a tensor at once, which makes the host wait for the GPU in
    every step and for every value.
    """

    def __init__(self, start_iter: int = 0):
        super().__init__(start_iter)
        self._waiting: dict[tuple[str, bool], list[tuple[torch.Tensor, int]]] = defaultdict(list)

    def put_scalar(self, name, value, smoothing_hint=True, cur_iter=None) -> None:
        if not isinstance(value, torch.Tensor):
            super().put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)
            return
        name = self._current_prefix + name
        cur_iter = self.iter if cur_iter is None else cur_iter
        self._waiting[name, smoothing_hint].append((value.detach(), cur_iter))

    def flush(self, *, averaged: Sequence[str] = ()) -> None:
        """Read all waiting tensors, with one transfer per device.

        Args:
            averaged: names whose values are averaged over the processes; all of them must call
                this function at the same iteration. Only the main process keeps the result.
        """
        waiting, self._waiting = self._waiting, defaultdict(list)
        if not comm.is_main_process():  # nobody reads the rest here
            waiting = {key: values for key, values in waiting.items() if key[0] in averaged}
        tensors = [tensor for values in waiting.values() for tensor, _ in values]
        numbers = iter(_to_numbers(tensors))
        read = {
            key: {iteration: next(numbers) for _, iteration in values}
            for key, values in waiting.items()
        }
        averages = _average({name: read[name, hint] for name, hint in read if name in averaged})
        for (name, hint), values in read.items():
            for iteration, value in averages.get(name, values).items():
                super().put_scalar(name, value, smoothing_hint=hint, cur_iter=iteration)


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
        eta = datetime.timedelta(seconds=round(latest["eta_seconds"]))
        losses = [f"{name} {latest[name]:.4g}" for name in sorted(latest) if "loss" in name]
        # the sum first: with several terms it is what one looks at
        losses.sort(key=lambda text: not text.startswith("total_loss"))
        logger.info(
            "iter %d/%d  eta %s  %s  lr %.4g  images/s %.4g  data %.4gs  step %.4gs  mem %.0fMB",
            storage.iter + 1,
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

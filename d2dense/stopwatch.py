"""What share of the time a model's parts take."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up the time of named parts; a part within another one does not count for that."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []  # time of parts within those that run, innermost last

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done within as part ``name``."""
        _synchronize()
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            _synchronize()
            passed = time.perf_counter() - start
            self.seconds[name] += passed - self._inner.pop()
            if self._inner:
                self._inner[-1] += passed

    def clear(self) -> None:
        """Start again at zero."""
        self.seconds.clear()

    def shares(self) -> dict[str, float]:
        """Return each part's share of all, largest first."""
        total = sum(self.seconds.values())
        order = sorted(self.seconds, key=lambda name: self.seconds[name], reverse=True)
        return {name: self.seconds[name] / total for name in order}

    def timed(self, function: Callable, name: str) -> Callable:
        """Return ``function``, whose time counts as part ``name``."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return call


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

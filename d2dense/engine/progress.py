"""How far a run is in its data, in terms that survive a change of processes or batch size."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from .settings import RunSettings

__all__ = ["Progress"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The part of a checkpoint that places a run in its stream of images.

    Attributes:
        seed: of the stream and of the processes' generators; never negative.
        world_size: processes.
        total_batch_size: images per optimizer step over all processes, 0 where it is not known.
        accumulation_steps: batches per optimizer step.
        images: images that the run has used (batches, where the size of a batch is not known).
    """

    seed: int
    world_size: int
    total_batch_size: int
    accumulation_steps: int
    images: int = 0

    @classmethod
    def start(cls, settings: RunSettings, *, seed: int, world_size: int) -> Progress:
        """Return the state before the first step."""
        return cls(
            seed=seed,
            world_size=world_size,
            total_batch_size=settings.total_batch_size,
            accumulation_steps=settings.accumulation_steps,
        )

    @property
    def batch_size(self) -> int:
        """Images that the loaders of all processes give together at a time."""
        return max(1, self.total_batch_size // self.accumulation_steps)

    @property
    def start_batch(self) -> int:
        """How many batches of the stream, at the present size, have been used."""
        return self.images // self.batch_size

    def after_step(self) -> Progress:
        """Return the progress after one more optimizer step."""
        return replace(self, images=self.images + self.batch_size * self.accumulation_steps)

    def resumed(self, saved: dict[str, Any]) -> Progress:
        """Return this progress at the place in the stream that ``saved`` notes."""
        return replace(self, seed=saved["seed"], images=saved["images"])

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

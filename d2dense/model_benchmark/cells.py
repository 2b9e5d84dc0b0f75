"""What is measured of a model: cells, the turns that they are measured in, and their plan."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .subjects import Group, Subject

__all__ = [
    "EXPORTED",
    "FAILED",
    "MEASURED",
    "NOT_MEASURED",
    "Cell",
    "Plan",
    "Settings",
    "Turns",
    "training_batch",
]

MEASURED, FAILED, NOT_MEASURED = "measured", "failed", "not measured"
EXPORTED = "exported "  # before the format, in the name of a mode


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, and how.

    Attributes:
        size: (height, width) of the images.
        batches: images per call of inference.
        precisions: of ``fp32`` and ``bf16``.
        modes: of ``eager``, ``compiled`` and ``exported``.
        formats: of the exported models.
        training: whether training steps are measured.
        training_batch: their images; more where a model of the group needs more.
        rounds: of inference of one image; training takes two thirds of it, larger batches a third.
        compile: patterns of the names of models that ``compiled`` is measured of.
        device: ``cpu`` or ``cuda``.
    """

    size: tuple[int, int]
    batches: tuple[int, ...] = (1, 8)
    precisions: tuple[str, ...] = ("fp32", "bf16")
    modes: tuple[str, ...] = ("eager", "compiled", "exported")
    formats: tuple[str, ...] = ("torchscript",)
    training: bool = True
    training_batch: int = 1
    rounds: int = 3
    compile: tuple[str, ...] = ()
    device: str = "cpu"

    def as_dict(self) -> dict[str, Any]:
        """Return JSON's types, which :meth:`from_dict` takes."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement of one model.

    Attributes:
        subject: the model's name.
        phase: ``inference`` or ``training``.
        mode: ``eager``, ``compiled``, or ``exported`` and a format.
    """

    subject: str
    phase: str
    batch: int
    precision: str = "fp32"
    mode: str = "eager"

    def __str__(self) -> str:
        return f"{self.subject}, {self.phase}, batch {self.batch}, {self.precision}, {self.mode}"


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Cells whose calls take turns, round by round."""

    name: str
    rounds: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is asked of a group.

    Attributes:
        left_out: cells that are not measured from the start, with the reason.
    """

    turns: list[Turns] = field(default_factory=list)
    left_out: list[tuple[Cell, str]] = field(default_factory=list)

    @classmethod
    def of(cls, group: Group, settings: Settings) -> Plan:
        """Return the plan for a group, what matters most first."""
        plan = cls()
        first = [*_inference(group, settings, 1), *_exported(group, settings)]
        if 1 in settings.batches:
            plan._add("inference, batch 1", settings.rounds, first)
        if settings.training:
            plan._add_training(group, settings)
        for batch in settings.batches:
            if batch > 1:
                rounds = max(1, settings.rounds // 3)
                cells = _inference(group, settings, batch)
                plan._add(f"inference, batch {batch}", rounds, cells)
        if "compiled" in settings.modes and 1 in settings.batches:
            plan._add_compiled(group, settings)
        return plan

    def _add(self, name: str, rounds: int, cells: Sequence[Cell]) -> None:
        if cells:
            self.turns.append(Turns(name=name, rounds=rounds, cells=tuple(cells)))

    def _add_training(self, group: Group, settings: Settings) -> None:
        batch = training_batch(group, settings)
        cells = [
            Cell(subject=subject.name, phase="training", batch=batch, precision=precision)
            for precision in settings.precisions
            for subject in group.subjects
        ]
        self._add("training", max(1, 2 * settings.rounds // 3), cells)

    def _add_compiled(self, group: Group, settings: Settings) -> None:
        """Compiled models take turns with their own eager selves, after all others: what was
        compiled once may change how a process computes.
        """
        cells = []
        for subject in _with_ratios(group):
            cell = Cell(subject=subject.name, phase="inference", batch=1, mode="compiled")
            if any(fnmatch.fnmatch(subject.name, pattern) for pattern in settings.compile):
                cells.append(cell)
            else:
                self.left_out.append((cell, "compiling takes minutes: --compile names others"))
        self._add("compiled", settings.rounds, cells)


def training_batch(group: Group, settings: Settings) -> int:
    """Return the images of a training step, which is the same for all models of a group."""
    return max(settings.training_batch, *(each.min_training_batch for each in group.subjects))


def _inference(group: Group, settings: Settings, batch: int) -> Iterator[Cell]:
    """Yield eager cells; on a CPU, larger batches in single precision only, for the time."""
    if "eager" not in settings.modes:
        return
    for precision in settings.precisions:
        if batch > 1 and settings.device == "cpu" and precision != settings.precisions[0]:
            continue
        for subject in group.subjects:
            yield Cell(subject=subject.name, phase="inference", batch=batch, precision=precision)


def _exported(group: Group, settings: Settings) -> Iterator[Cell]:
    if "exported" in settings.modes:
        for format in settings.formats:
            for subject in _with_ratios(group):
                mode = EXPORTED + format
                yield Cell(subject=subject.name, phase="inference", batch=1, mode=mode)


def _with_ratios(group: Group) -> list[Subject]:
    """Return the models of ours and the peers that they are named with."""
    named = {subject.peer for subject in group.subjects}
    return [each for each in group.subjects if each.peer or each.name in named]

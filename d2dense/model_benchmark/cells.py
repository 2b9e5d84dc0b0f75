"""What is measured of a model: cells, the turns that they are measured in, and their plan."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
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
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**given)


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
        """Return the plan for a group, what matters most first.

        Precisions and modes have turns of their own: one that takes forever leaves the others.
        """
        plan = cls()
        for precision in settings.precisions:
            plan._add_precision(group, settings, precision)
        if 1 in settings.batches:
            if "exported" in settings.modes:
                for format in settings.formats:
                    plan._add_exported(group, settings, EXPORTED + format)
            if "compiled" in settings.modes:
                plan._add_compiled(group, settings)
        return plan

    def _add_precision(self, group: Group, settings: Settings, precision: str) -> None:
        """Add one image, training, and larger batches; on a CPU, the last in one precision."""
        first = precision == settings.precisions[0]
        suffix = "" if first else f", {precision}"
        phases = []
        if "eager" in settings.modes and 1 in settings.batches:
            phases.append(("inference", 1, f"inference, batch 1{suffix}", settings.rounds))
        if settings.training:
            batch, rounds = training_batch(group, settings), max(1, 2 * settings.rounds // 3)
            phases.append(("training", batch, f"training{suffix}", rounds))
        if "eager" in settings.modes and (first or settings.device != "cpu"):
            for batch in settings.batches:
                if batch > 1:
                    rounds = max(1, settings.rounds // 3)
                    phases.append(("inference", batch, f"inference, batch {batch}{suffix}", rounds))
        for phase, batch, name, rounds in phases:
            cells = [
                Cell(subject=subject.name, phase=phase, batch=batch, precision=precision)
                for subject in group.subjects
            ]
            self._add(name, rounds, cells)

    def _add_exported(self, group: Group, settings: Settings, mode: str) -> None:
        cells = [
            Cell(subject=subject.name, phase="inference", batch=1, mode=mode)
            for subject in _with_ratios(group)
        ]
        self._add(mode, settings.rounds, cells)

    def _add(self, name: str, rounds: int, cells: Sequence[Cell]) -> None:
        if cells:
            self.turns.append(Turns(name=name, rounds=rounds, cells=tuple(cells)))

    def _add_compiled(self, group: Group, settings: Settings) -> None:
        """Add them after all others: what compiles may change how a process computes."""
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


def _with_ratios(group: Group) -> list[Subject]:
    """Return the models of ours and the peers that they are named with."""
    named = {subject.peer for subject in group.subjects}
    return [each for each in group.subjects if each.peer or each.name in named]

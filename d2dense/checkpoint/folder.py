"""The checkpoints of one run: names, the tag of the last one, and how many stay."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import files

__all__ = ["CheckpointFolder"]

_TAG = "last_checkpoint"


class CheckpointFolder:
    """Write ``model_0000099.pth``, ``model_final.pth``, ... and the tag ``last_checkpoint``.

    Args:
        path: the folder; created when the first file is written.
        keep: how many of this run's periodic files stay, 0 for all.
    """

    def __init__(self, path: str | os.PathLike, *, keep: int = 0):
        self.path = Path(path)
        self.keep = keep
        self.periodic: list[str] = []

    def save(self, name: str, content: Mapping[str, Any], *, tag: bool = True) -> Path:
        """Write ``<name>.pth``; with ``tag`` it becomes the one that :meth:`last` returns."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / f"{name}.pth"
        files.write(file, content)
        if tag:
            # after the checkpoint itself: the tag never names a file that is not complete
            temporary = self.path / f".{_TAG}.tmp"
            temporary.write_text(file.name)
            temporary.replace(self.path / _TAG)
        return file

    def save_periodic(self, iteration: int, content: Mapping[str, Any]) -> Path:
        """Write the file of ``iteration`` (counted from 0) and remove those beyond ``keep``."""
        name = f"model_{iteration:07d}"
        self.periodic = [each for each in self.periodic if each != name] + [name]
        file = self.save(name, content)
        while self.keep and len(self.periodic) > self.keep:
            (self.path / f"{self.periodic.pop(0)}.pth").unlink(missing_ok=True)
        return file

    def adopt_periodic(self, *, until: int) -> None:
        """Take over the periodic files up to iteration ``until`` of the run that goes on."""
        found = sorted(self.path.glob("model_" + "[0-9]" * 7 + ".pth"))
        self.periodic = [file.stem for file in found if int(file.stem[6:]) <= until]

    def last(self) -> Path | None:
        """Return the file that ``last_checkpoint`` names, or None where there is no tag."""
        tag = self.path / _TAG
        if not tag.is_file():
            return None
        return self.path / tag.read_text().strip()

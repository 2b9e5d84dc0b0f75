"""The files of a run: written after every step, and read by a run that goes on."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import d2dense
from d2dense import benchmark
from d2dense.errors import UserError

from . import report
from .cells import Settings
from .runner import Results
from .subjects import Group

__all__ = ["Record"]

_LIBRARIES = ("torchvision", "timm", "detectron2")


class Record:
    """A run's json and Markdown, ``machine_<device>`` in a folder.

    Args:
        command: that writes it.
    """

    def __init__(self, folder: Path, groups: Sequence[Group], settings: Settings, command: str):
        machine = benchmark.machine()
        self.path = folder / f"machine_{report.slug(machine)}"
        self.groups, self.settings, self.command = groups, settings, command
        self.identity: dict[str, Any] = {
            "machine": {key: value for key, value in machine.items() if key != "date"},
            "versions": {"d2dense": d2dense.__version__}
            | {name: importlib.metadata.version(name) for name in _LIBRARIES},
            "settings": settings.as_dict(),
            "models": [each.name for group in groups for each in group.subjects],
        }

    def read(self) -> Results:
        """Return what an equal run has found.

        Raises:
            UserError: there is none, or it was another machine, version or setting.
        """
        path = self.path.with_suffix(".json")
        try:
            saved = json.loads(path.read_text())
            identity, results = saved["identity"], Results.from_dict(saved["results"])
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; run without --resume") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} holds no results; run without --resume") from None
        for what, value in self.identity.items():
            before = identity.get(what)
            if before != value:
                raise UserError(
                    f"{path} was measured with other {what} ({_difference(before, value)}); give "
                    "the same flags, or run without --resume"
                )
        return results

    def write(self, results: Results) -> str:
        """Write both files and return the Markdown."""
        return benchmark.write_report(
            self.path,
            title=f"Models and their peers on {self._device()}",
            command=self.command,
            rows=report.tables(self.groups, self.settings, results),
            notes=[*report.notes(self.settings), self._versions()],
            identity=self.identity,
            results=results.as_dict(),
        )

    def _device(self) -> str:
        machine = self.identity["machine"]
        return machine["cpu"] if machine["device"] == "cpu" else machine["device"]

    def _versions(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.identity["versions"].items())


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *now]:
            if before.get(key) != now.get(key):
                return f"{key}: {before.get(key)}, now {now.get(key)}"
    return f"{before}, now {now}"

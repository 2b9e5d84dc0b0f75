"""The tables of a benchmark."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from d2dense import benchmark

from .cells import EXPORTED, FAILED, MEASURED, Cell, Plan, Settings, training_batch
from .runner import Results
from .subjects import Group, Subject

__all__ = ["failures", "notes", "slug", "tables"]

Row = dict[str, Any]
_NOISE = re.compile(r"\((r|tm|c)\)|@.*|\b(cpu|processor|\d+-core)\b")


def slug(machine: dict[str, Any]) -> str:
    """Return a name for files about a machine: its GPU, or its CPU and cores."""
    name = machine["device"]
    if name == "cpu":
        name = f"{_NOISE.sub(' ', machine['cpu'].lower())} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def tables(groups: Sequence[Group], settings: Settings, results: Results) -> dict[str, list[Row]]:
    """Return the rows of the report's tables by heading, of ``groups`` in their order; headings
    without rows are left out.
    """
    found = [_Found(group, settings, results) for group in groups]
    every = {
        "Summary": [row for each in found for row in each.summary()],
        "Precisions and modes": [row for each in found for row in each.modes()],
        "Ratios to every peer": [row for each in found for row in each.peers()],
        "Not measured": [row for each in found for row in each.missing()],
    }
    return {heading: rows for heading, rows in every.items() if rows}


class _Found:
    """What is known of one group."""

    def __init__(self, group: Group, settings: Settings, results: Results):
        self.group, self.settings = group, settings
        self.cells = results.cells.get(group.name, {})
        self.known = results.known.get(group.name, {})
        self.training_batch = training_batch(group, settings)

    def _inference(self, subject: Subject, batch: int = 1) -> Cell:
        precision = self.settings.precisions[0]
        return Cell(subject=subject.name, phase="inference", batch=batch, precision=precision)

    def _training(self, subject: Subject) -> Cell:
        return Cell(
            subject=subject.name,
            phase="training",
            batch=self.training_batch,
            precision=self.settings.precisions[0],
        )

    def seconds(self, cell: Cell) -> float | None:
        """Return the median of a cell's rounds."""
        times = self.cells.get(cell, {}).get("seconds")
        return statistics.median(times) if times else None

    def _ratio(self, cell: Cell, base: Cell) -> float | None:
        """Return the median over rounds of the ratio of times."""
        times = {each: self.cells.get(each, {}).get("seconds") or [] for each in (cell, base)}
        if not all(times.values()) or len(times[cell]) != len(times[base]):
            return None
        return benchmark.ratios(times, base)[cell]

    def _macs(self, subject: Subject) -> int | None:
        return self.known.get(subject.name, {}).get("macs")

    def _mac_ratio(self, subject: Subject, peer: Subject) -> float | None:
        return _over(self._macs(subject), self._macs(peer))

    def _peak(self, cell: Cell) -> float | None:
        return _over(self.cells.get(cell, {}).get("peak"), 2**20)

    def _subject(self, name: str) -> Subject:
        return next(each for each in self.group.subjects if each.name == name)

    def _ratios(self, subject: Subject, peer: Subject) -> Row:
        time = self._ratio(self._inference(subject), self._inference(peer))
        macs = self._mac_ratio(subject, peer)
        training = self._ratio(self._training(subject), self._training(peer))
        return {
            "time ratio": time,
            "MAC ratio": macs,
            "time / MAC ratio": _over(time, macs),
            "training time ratio": training,
        }

    def summary(self) -> list[Row]:
        rows = []
        for subject in self.group.subjects:
            known, one = self.known.get(subject.name, {}), self._inference(subject)
            row = {
                "group": self.group.name,
                "model": subject.name,
                "M params": _over(known.get("params"), 1e6),
                "GMAC": _over(self._macs(subject), 1e9),
                "ms": _times(self.seconds(one), 1000),
            }
            for batch in self.settings.batches:
                seconds = self.seconds(self._inference(subject, batch))
                row[f"images/s, batch {batch}"] = _over(batch, seconds)
            row |= {
                "training batch": self.training_batch,
                "s / training step": self.seconds(self._training(subject)),
                "MiB": self._peak(one),
                "MiB, training": self._peak(self._training(subject)),
                "peer": subject.peer or "",
            }
            if subject.peer:
                row |= self._ratios(subject, self._subject(subject.peer))
            rows.append(row)
        return rows

    def modes(self) -> list[Row]:
        """Return milliseconds of every precision and mode, and their ratios to the first."""
        planned = [cell for each in Plan.of(self.group, self.settings).turns for cell in each.cells]
        rows = []
        for subject in self.group.subjects:
            first = {
                "inference": self._inference(subject),
                "training": self._training(subject),
            }
            row: Row = {"group": self.group.name, "model": subject.name}
            for cell in planned:
                base = first[cell.phase]
                if cell.subject != subject.name or cell.batch != base.batch:
                    continue
                what = "" if cell.phase == "inference" else "training, "
                title = f"{what}{cell.precision} {cell.mode.removeprefix(EXPORTED)}"
                row[f"{title} ms"] = _times(self.seconds(cell), 1000)
                if cell != base:
                    row[f"{title} ratio"] = _over(self.seconds(cell), self.seconds(base))
            rows.append(row)
        return rows

    def peers(self) -> list[Row]:
        peers = [each for each in self.group.subjects if not each.peer]
        return [
            {
                "model": subject.name,
                "beside": peer.name,
                **self._ratios(subject, peer),
                "memory ratio": _over(
                    self._peak(self._inference(subject)), self._peak(self._inference(peer))
                ),
                "training memory ratio": _over(
                    self._peak(self._training(subject)), self._peak(self._training(peer))
                ),
            }
            for subject in self.group.subjects
            if subject.peer
            for peer in peers
        ]

    def missing(self) -> list[Row]:
        """Return one row per reason and way of measuring."""
        models: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for cell, found in self.cells.items():
            if found["state"] != MEASURED:
                way = str(cell).removeprefix(f"{cell.subject}, ")
                models[way, found["state"], found["reason"]].append(cell.subject)
        return [
            {"what": way, "of": ", ".join(names), "state": state, "why": reason}
            for (way, state, reason), names in models.items()
        ]


def _over(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def failures(results: Results) -> int:
    """Return how many cells failed."""
    return sum(
        found["state"] == FAILED for table in results.cells.values() for found in table.values()
    )


def notes(settings: Settings) -> list[str]:
    """Return how to read the tables."""
    height, width = settings.size
    memory = (
        "the most that the allocator held"
        if settings.device != "cpu"
        else "the process's largest resident size, with all threads"
    )
    return [
        f"Images of 3 x {height} x {width} noise; channels_last; untrained weights. ms: one image "
        "in evaluation, from the image to detections or scores (of a backbone: to its maps), "
        "median of the rounds. Segmenters see the whole image at once.",
        "Models of a group, with their peers, take turns in one process, round by round; a ratio "
        "of times is the median over rounds, so it holds on a busy machine; times do not. "
        f"{settings.rounds} rounds of one image and of exported models, "
        f"{max(1, 2 * settings.rounds // 3)} of training, {max(1, settings.rounds // 3)} of larger "
        "batches, fewer where time was short; one call goes before.",
        "Every two-stage detector gets 1000 proposals of an image, every region and anchor has one "
        "class with a score above the threshold of 0.05, and 100 detections stay, ours and peers' "
        "alike: the last layers' weights say so. Transformers return their usual number.",
        "GMAC: convolutions and matrix products (attention included) of one image, forward; params "
        "are those of inference, auxiliary heads of training included. time / MAC ratio: below 1, "
        "a multiply-accumulate takes less time than the peer's.",
        "training: forward, backward and a step of AdamW with images of 7 boxes, without the "
        "loading of data; detectors sample 512 regions of an image. Stem and first block are "
        "frozen where recipes say so, torchvision's too.",
        f"MiB: on top of the model (in training, and the optimizer) during one call: {memory}.",
        "Precisions and modes: bf16 is autocast; ratio: to the first column of the same phase, "
        "medians. torchscript: the exported model (torchvision's detectors scripted, all others "
        "traced). compiled: torch.compile, the time of compiling left out.",
        "An empty field was not measured; why is in the last table, if it was asked for.",
    ]
